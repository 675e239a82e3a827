"""run(experiment): queries -> constitutions -> [sample -> train -> evaluate] x iterations -> judge -> metrics -> report.

Each stage leaves files in the run directory and then a line in run.json with the sha256 of each. The same command
skips a stage whose config, inputs and files match, and does the rest: a run that was killed anywhere ends with the
same bytes (same machine, versions and thread count).
"""

import contextlib
import gc
import platform
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from repro import judging, metrics, models, prompts
from repro.config import Experiment, config_hash, flatten
from repro.constitutions import Constitution, ConstitutionSet, check_control_tokens, load_constitutions
from repro.datasets import check_queries, load_queries
from repro.records import (
    Query,
    Response,
    UserError,
    append_jsonl,
    digest,
    file_sha256,
    locked,
    read_json,
    read_jsonl,
    seal,
    sealed,
    write_json,
    write_jsonl,
)

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")
EVALUATION_ORDER = "evaluation"  # the principles' order at evaluation: the same for every iteration and seed


def rng(*keys) -> random.Random:
    """Randomness as a pure function of its position: seeded by the keys alone, so nothing needs to be saved."""
    return random.Random("/".join(map(str, keys)))


@dataclass
class Run:
    """A run directory and what its stages share."""

    experiment: Experiment
    folder: Path
    say: Callable[[str], None]
    record: dict = field(default_factory=dict)

    # ---- inputs, checked before any model loads

    def prepare(self) -> None:
        """Read and check every input; bind the directory to this configuration."""
        spec = self.experiment
        self.constitutions: ConstitutionSet = load_constitutions(spec.constitutions)
        queries, dropped = load_queries(spec.data.source, spec=spec.data)
        self.place = models.resolve_model(spec.model.name)
        self.tokenizer = models.load_tokenizer(self.place)
        controls = models.control_tokens(self.tokenizer)
        check_control_tokens(((f"{spec.constitutions}: principle {p.name}", s)
                              for p in self.constitutions.positive.principles for s in (p.text, p.antithesis)), controls)
        frame = max(len(self.tokenizer(self.prompt(c, None, "", generation=True), add_special_tokens=False).input_ids)
                    for c in self.constitutions.constitutions)
        room = models.context_length(self.place) - frame - spec.sampling.max_new_tokens - 8
        queries = check_queries(queries, self.tokenizer, controls, room=room, truncate=spec.data.truncate, say=self.say)
        self.training = [q for q in queries if q.split == "train"]
        self.held_out = [q for q in queries if q.split == spec.data.evaluation_split]
        if not self.training or not self.held_out:
            raise UserError(f"--queries {spec.data.source}: {len(self.training)} training and {len(self.held_out)} "
                            f"{spec.data.evaluation_split} queries; both must be above 0")
        self.dropped = dropped
        self._bind({"data.source": digest([asdict(q) | {"where": ""} for q in queries]),
                    "constitutions": digest(self.constitutions.to_json()),
                    "model.name": digest(models.describe(self.place)["sha256"]) if Path(self.place).is_dir()
                    else self.place})
        self.say(f"{len(self.training)} training and {len(self.held_out)} held-out queries"
                 + "".join(f"; dropped {n}: {why}" for why, n in sorted(dropped.items())))
        write_json(self.folder / "constitutions.json", self.constitutions.to_json())
        write_jsonl(self.folder / "queries.jsonl", [{"id": q.id, "subset": q.subset, "split": q.split, "text": q.text}
                                                    for q in (*self.training, *self.held_out)])

    def _bind(self, inputs: dict) -> None:
        fields = flatten(self.experiment.to_json()) | inputs
        hash = config_hash(self.experiment, inputs)
        path = self.folder / "run.json"
        if path.exists():
            self.record = read_json(path)
            if self.record.get("config_hash") != hash:
                theirs = flatten(self.record.get("config", {})) | self.record.get("inputs", {})
                differ = [f"{k} ({theirs.get(k)!r} there, {fields.get(k)!r} here)"
                          for k in sorted(fields.keys() | theirs.keys()) if fields.get(k) != theirs.get(k)]
                raise UserError(f"{self.folder} holds a run of another config: {'; '.join(differ[:4])}; choose another "
                                "OUT or --name, or delete the folder")
            return
        self.record = {
            "config": self.experiment.to_json(), "config_hash": hash, "inputs": inputs, "commit": _commit(),
            "packages": {name: version(name) for name in PACKAGES}, "python": platform.python_version(),
            "device": _device(), "threads": _threads(), "seeds": [self.experiment.seed], "values": "measured",
            "dropped_queries": dict(self.dropped), "not_run": list(self.experiment.not_run), "stages": {}}
        write_json(path, self.record)

    # ---- stages

    def stage(self, name: str, outputs: list[str], inputs: list[str]) -> bool:
        """True if the stage is to be done; otherwise says that it is skipped."""
        done = self.record["stages"].get(name)
        if done and done["key"] == self._key(inputs) and list(done["outputs"]) == sorted(outputs) and all(
                self._holds(path, fact) for path, fact in done["outputs"].items()):
            self.say(f"{name}: done before, skipped")
            return False
        self._started = time.monotonic()
        return True

    def _holds(self, output: str, fact: str) -> bool:
        path = self.folder / output
        if path.is_dir():
            return sealed(path, fact)
        return path.is_file() and file_sha256(path) == fact

    def finish(self, name: str, outputs: list[str], inputs: list[str], **facts) -> None:
        """Record the stage as done: its outputs' sha256 (a sealed folder's key), its inputs' key and its seconds."""
        spent = time.monotonic() - self._started
        self.record["stages"][name] = {
            "key": self._key(inputs), "seconds": round(spent, 2), "peak_rss_gib": _peak_gib(), **facts,
            "outputs": {path: read_json(self.folder / path / "complete.json")["key"] if (self.folder / path).is_dir()
                        else file_sha256(self.folder / path) for path in sorted(outputs)}}
        write_json(self.folder / "run.json", self.record)

    def _key(self, inputs: list[str]) -> str:
        """Names what the stage depends on: the config and the recorded outputs of the stages before it."""
        return digest([self.record["config_hash"],
                       {name: self.record["stages"][name]["outputs"] for name in inputs}])

    # ---- prompts

    def prompt(self, constitution: Constitution, query: Query | None, *keys, generation: bool) -> str:
        """The rendered prompt; the principles' order is a function of `keys`, query and constitution."""
        order = list(range(len(constitution.principles)))
        if query is not None:
            rng(*keys, query.id).shuffle(order)
        return prompts.render(self.tokenizer, self.experiment.model.prompt, constitution.statements(tuple(order)),
                              query.text if query else "", generation=generation)

    # ---- models

    @contextlib.contextmanager
    def model(self, iteration: int, dtype: str) -> Iterator:
        """The model after `iteration` iterations (0 = initial) with weights in `dtype`; freed afterwards."""
        place = self.place if iteration == 0 else str(self.folder / checkpoint(iteration))
        model = models.load_model(place, dtype=dtype)
        try:
            yield model
        finally:
            del model
            gc.collect()


def checkpoint(iteration: int) -> str:
    return f"checkpoints/iteration-{iteration}"


def training_file(iteration: int) -> str:
    return f"responses/training-{iteration}.jsonl"


def evaluation_file(iteration: int) -> str:
    return f"responses/evaluation-{iteration}.jsonl"


def logprob_file(iteration: int) -> str:
    return f"logprobs/evaluation-{iteration}.jsonl"


def run(experiment: Experiment, out: Path | str = "runs", *, say: Callable[[str], None] | None = None) -> Path:
    """Run the experiment (or what is left of it) in `out`/<name>/<profile>; returns that folder.

    Raises UserError for any input that cannot be used, before a model loads and with nothing half-written.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    folder = Path(out) / experiment.name / experiment.profile
    with locked(folder):
        run = Run(experiment, folder, say)
        run.prepare()
        evaluate(run, 0)
        for iteration in range(1, experiment.iterations + 1):
            sample(run, iteration)
            train_iteration(run, iteration)
            evaluate(run, iteration)
        judge(run)
        measure(run)
        report(run)
    return folder


# ---- sampling

def sample(run: Run, iteration: int) -> None:
    """Pairs of responses to training queries by the previous iteration's model -> responses/training-k.jsonl."""
    name, outputs = f"sample-{iteration}", [training_file(iteration)]
    inputs = [f"train-{iteration - 1}"] if iteration > 1 else []
    if not run.stage(name, outputs, inputs):
        return
    jobs = []
    for query, negative in training_plan(run, iteration):
        for constitution in (run.constitutions.positive, negative):
            jobs.append((query, constitution))
    texts = [run.prompt(c, q, run.experiment.seed, iteration, "sample", c.id, generation=True) for q, c in jobs]
    rows = _sample(run, jobs, texts, iteration - 1, run.folder / training_file(iteration), name)
    write_jsonl(run.folder / training_file(iteration), rows)
    run.finish(name, outputs, inputs, responses=len(rows))


def training_plan(run: Run, iteration: int) -> list[tuple[Query, Constitution]]:
    """Which queries this iteration samples and which constitution stands against the all-positive one.

    Two halves of the training queries alternate between iterations (arXiv 2404.14313, section 4); the order of
    a half is shuffled per iteration; subsets take turns; the negative is drawn from those of the query's subset.
    """
    from repro.training import queries_needed

    spec = run.experiment
    want = round(queries_needed(spec.train, iteration) * (1 + spec.sampling.spare))
    lists = []
    for subset in spec.data.subsets:
        queries = [q for q in run.training if q.subset == subset]
        rng(spec.seed, "halves", subset).shuffle(queries)
        half = queries[(iteration - 1) % 2:: 2]
        rng(spec.seed, iteration, "order", subset).shuffle(half)
        lists.append(half)
    turns = [q for k in range(max(map(len, lists))) for half in lists for q in half[k: k + 1]]
    return [(q, rng(spec.seed, iteration, "negative", q.id).choice(run.constitutions.negatives(q.subset)))
            for q in turns[:want]]


def _sample(run: Run, jobs, texts: list[str], iteration: int, path: Path, name: str) -> list[dict]:
    """Responses to `texts` by the model of `iteration`, in the order of `jobs`. Batches already in the partial file
    are not sampled again."""
    from repro.sampling import batches, sample_batch

    spec = run.experiment.sampling
    partial = path.with_suffix(".partial.jsonl")
    key = digest([run.record["config_hash"], texts])
    rows: dict[int, dict] = {}
    if partial.exists():
        for _, row in read_jsonl(partial, torn_tail=True):
            if row.pop("key") == key:
                rows[row.pop("job")] = row
    lengths = [len(ids) for ids in run.tokenizer(texts, add_special_tokens=False).input_ids]
    todo = [b for b in batches(lengths, spec.batch_size) if not all(i in rows for i in b)]
    if todo:
        with run.model(iteration, spec.dtype) as model, tqdm(
                total=len(jobs), initial=len(jobs) - sum(map(len, todo)), desc=name, unit="response") as bar:
            for batch in todo:
                answers = sample_batch(model, run.tokenizer, [texts[i] for i in batch],
                                       max_new_tokens=spec.max_new_tokens)
                for i, answer in zip(batch, answers):
                    query, constitution = jobs[i]
                    answer["text"] = prompts.cut(run.experiment.model.prompt, answer["text"])
                    rows[i] = asdict(Response(query=query.id, constitution=constitution.id, iteration=iteration,
                                              **answer))
                append_jsonl(partial, [{"key": key, "job": i, **rows[i]} for i in batch])
                bar.update(len(batch))
    ordered = [rows[i] for i in range(len(jobs))]
    write_jsonl(path, ordered)
    partial.unlink(missing_ok=True)
    return ordered


# ---- training

def usable_pairs(run: Run, iteration: int) -> tuple[list[tuple[Query, list[Constitution], list[str]]], Counter]:
    """The sampled pairs that may train, in order, and the dropped ones counted by the first reason that holds."""
    rows = [row for _, row in read_jsonl(run.folder / training_file(iteration))]
    plan = training_plan(run, iteration)
    kept, dropped = [], Counter()
    for k, (query, negative) in enumerate(plan):
        responses = [row["text"] for row in rows[2 * k: 2 * k + 2]]
        phrase = next((p for p in run.experiment.sampling.drop_phrases if any(p in r for r in responses)), None)
        if not all(r.strip() for r in responses):
            dropped["empty"] += 1
        elif responses[0].strip() == responses[1].strip():
            dropped["identical"] += 1
        elif phrase is not None:
            dropped[f"phrase {phrase!r}"] += 1
        else:
            kept.append((query, [run.constitutions.positive, negative], responses))
    return kept, dropped


def train_iteration(run: Run, iteration: int) -> None:
    """Train from the initial weights on this iteration's pairs -> checkpoints/iteration-k."""
    from repro import training

    name, inputs, outputs = f"train-{iteration}", [f"sample-{iteration}"], [checkpoint(iteration)]
    if not run.stage(name, outputs, inputs):
        return
    spec, folder = run.experiment, run.folder / checkpoint(iteration)
    kept, dropped = usable_pairs(run, iteration)
    need = training.queries_needed(spec.train, iteration)
    run.say(f"{name}: {len(kept)} pairs usable, {need} needed"
            + "".join(f"; dropped {n}: {why}" for why, n in sorted(dropped.items())))
    pairs = [training.TrainingPair(
        query=q.id, responses=tuple(" " + r.strip() if spec.model.prompt == "plain" else r.strip() for r in responses),
        prompts=tuple(run.prompt(c, q, spec.seed, iteration, "train", c.id, generation=False) for c in pair))
        for q, pair, responses in kept]
    with run.model(0, training.weights_dtype(spec.train.precision)) as model:
        with tqdm(total=need, desc=name, unit="query") as bar:
            def save_batch(ids):
                write_json(run.folder / "not_finite.json", {"iteration": iteration, "queries": ids})
                return run.folder / "not_finite.json"

            trace = training.train(model, run.tokenizer, pairs, spec.train, iteration, on_query=bar.update,
                                   save_batch=save_batch)
        models.save_model(model, run.tokenizer, folder)
    seal(folder, digest([run.record["config_hash"], iteration]))
    run.finish(name, outputs, inputs, trace=trace, dropped_pairs=dict(dropped))


# ---- evaluation

def evaluate(run: Run, iteration: int) -> None:
    """Responses to the held-out queries under every constitution, and their log-probs under every constitution."""
    name = f"evaluate-{iteration}"
    outputs = [evaluation_file(iteration), logprob_file(iteration)]
    inputs = [f"train-{iteration}"] if iteration else []
    if not run.stage(name, outputs, inputs):
        return
    jobs = [(q, c) for q in run.held_out for c in run.constitutions.constitutions]
    texts = [run.prompt(c, q, EVALUATION_ORDER, generation=True) for q, c in jobs]
    rows = _sample(run, jobs, texts, iteration, run.folder / evaluation_file(iteration), name)
    write_jsonl(run.folder / logprob_file(iteration), _score_held_out(run, iteration, texts, rows, name))
    run.finish(name, outputs, inputs)


def _score_held_out(run: Run, iteration: int, texts: list[str], rows: list[dict], name: str) -> list[dict]:
    """Per query: summed log-probs [C][R] and scored tokens [R] of the iteration's own model; and the initial model's
    [C] for the all-positive constitution's response, for the likelihood judge. Scored with the generation prompts."""
    import torch

    from repro.logprobs import logprob_matrix
    from repro.prefix import tokenize_pair
    from repro.training import matmul_precision, weights_dtype

    spec, C = run.experiment, len(run.constitutions.constitutions)
    dtype, eos = weights_dtype(spec.train.precision), spec.train.score_eos
    space = " " if spec.model.prompt == "plain" else ""
    queries = []
    for k, query in enumerate(run.held_out):
        part = slice(k * C, (k + 1) * C)
        responses = [space + (row["text"].strip() or ".") for row in rows[part]]  # "." scores an empty response
        tokens = [len(p.ids) - p.start for p in (tokenize_pair(run.tokenizer, texts[k * C], r, score_eos=eos)
                                                 for r in responses)]
        queries.append((query, texts[part], responses, tokens))

    def score(which: int, select: slice, label: str) -> list[list[list[float]]]:
        with run.model(which, dtype) as model, torch.inference_mode(), matmul_precision(model, spec.train.precision):
            return [logprob_matrix(model, run.tokenizer, [p], [r[select]], length_normalize=False, score_eos=eos
                                   )[0].tolist()
                    for _, p, r, _ in tqdm(queries, desc=f"{name} {label}", unit="query")]

    own = score(iteration, slice(None), "log-probs")
    initial = [[row[:1] for row in m] for m in own] if iteration == 0 else score(0, slice(1), "under the initial model")
    return [{"query": q.id, "subset": q.subset, "logprobs": m, "tokens": t, "initial": [row[0] for row in i]}
            for (q, _, _, t), m, i in zip(queries, own, initial)]


# ---- judging, metrics, report

def judge(run: Run) -> None:
    """Every iteration's response under the all-positive constitution against the initial model's -> judgments.jsonl."""
    iterations = range(1, run.experiment.iterations + 1)
    inputs = [f"evaluate-{i}" for i in (0, *iterations)]
    if not run.stage("judge", ["judgments.jsonl"], inputs):
        return
    constitution, C = run.constitutions.positive, len(run.constitutions.constitutions)
    responses = {i: [row for _, row in read_jsonl(run.folder / evaluation_file(i))][::C] for i in (0, *iterations)}
    logprobs = {i: [row for _, row in read_jsonl(run.folder / logprob_file(i))] for i in (0, *iterations)}
    rows = []
    for judge in run.experiment.judge.judges:
        if judge == "rule" and not all(p.rule for p in constitution.principles):
            run.say("judge rule: NOT RUN: a principle has no rule")
            continue
        for i in iterations:
            for ours, theirs, a, b in zip(responses[i], responses[0], logprobs[i], logprobs[0]):
                score = (judging.rule_score(ours["text"], theirs["text"], constitution) if judge == "rule" else
                         judging.likelihood_score(_normalized(a), _normalized(b)))
                rows.append({"judge": judge, "query": ours["query"], "subset": a["subset"], "iteration": i,
                             "baseline": 0, "score": score,
                             "outcome": {1.0: "win", 0.5: "tie", 0.0: "loss"}[score],
                             "tokens": ours["tokens"], "baseline_tokens": theirs["tokens"]})
    write_jsonl(run.folder / "judgments.jsonl", rows)
    run.finish("judge", ["judgments.jsonl"], inputs)


def _normalized(row: dict) -> list[float]:
    return [x / row["tokens"][0] for x in row["initial"]]


def measure(run: Run) -> None:
    """metrics.json from the files of the stages before it (design: one flat list of records)."""
    inputs = ["judge", *(f"evaluate-{i}" for i in range(run.experiment.iterations + 1))]
    if not run.record["stages"].get("judge") or not run.stage("metrics", ["metrics.json"], inputs):
        return
    write_json(run.folder / "metrics.json", list(records(run)))
    run.finish("metrics", ["metrics.json"], inputs)


def records(run: Run) -> Iterator[dict]:
    """Every metric of the run with n, SEM and 95 % interval; the unit of n is the held-out query."""
    import numpy as np

    spec = run.experiment
    constants = {"model": spec.model.label, "writer": spec.writer, "seed": spec.seed}
    texts = {q.id: q.text for q in run.held_out}
    judgments = [row for _, row in read_jsonl(run.folder / "judgments.jsonl")]
    C = len(run.constitutions.constitutions)
    for iteration in range(spec.iterations + 1):
        responses = [row for _, row in read_jsonl(run.folder / evaluation_file(iteration))]
        scored = [row for _, row in read_jsonl(run.folder / logprob_file(iteration))]
        for subset in spec.data.subsets:
            at = [k for k, row in enumerate(scored) if row["subset"] == subset]
            sums = np.array([scored[k]["logprobs"] for k in at])
            means = sums / np.array([scored[k]["tokens"] for k in at])[:, None, :]
            fixed = constants | {"subset": subset, "iteration": iteration}
            groups = [[responses[k * C + c] for c in range(C)] for k in at]
            yield _record("mi", metrics.mean(metrics.infonce(means)), fixed, estimator="infonce")
            yield _record("mi", metrics.mean(metrics.symmetric_infonce(means)), fixed, estimator="symmetric_infonce")
            yield _record("mi", metrics.mean(metrics.mean_of_logs(sums)), fixed, estimator="mean_of_logs")
            yield _record("accuracy_row", metrics.mean(metrics.accuracy_row(means)), fixed)
            yield _record("accuracy_col", metrics.mean(metrics.accuracy_col(means)), fixed)
            yield _record("length_tokens", metrics.mean([g[0]["tokens"] for g in groups]), fixed)
            followed = [[judging.follows(r["text"], c) for r, c in zip(g, run.constitutions.constitutions)]
                        for g in groups]
            for principle in (p for p in run.constitutions.positive.principles if p.rule):
                yield _record("following", metrics.mean([float(f[0][principle.name]) for f in followed]), fixed,
                              principle=principle.name)
                against = [k for k, c in enumerate(run.constitutions.constitutions) if c.id.split(",")[
                    run.constitutions.positive.principles.index(principle)].startswith("not_")]
                yield _record("following", metrics.mean([
                    sum(f[k][principle.name] for k in against) / len(against) for f in followed]), fixed,
                    principle=f"not_{principle.name}")
            watch = [[judging.hack_watch(r["text"], " ".join(c.statements()), texts[r["query"]])
                      for r, c in zip(g, run.constitutions.constitutions)] for g in groups]
            for metric in watch[0][0]:
                yield _record(metric, metrics.mean([sum(w[metric] for w in g) / C for g in watch]), fixed)
            for judge in spec.judge.judges:
                rows = [j for j in judgments if (j["judge"], j["iteration"], j["subset"]) == (judge, iteration, subset)]
                if rows:
                    for ties in ("half", "loss"):
                        yield _record("win_rate", metrics.win_rate([j["score"] for j in rows], ties=ties), fixed,
                                      baseline=spec.model.label, judge=judge, ties=ties, length="raw")


def _record(metric: str, estimate: metrics.Estimate, fixed: dict, **extra) -> dict:
    keys = ("subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator", "ties", "length", "seed")
    return ({"metric": metric} | dict.fromkeys(keys) | fixed | extra
            | {"value": estimate.value, "sem": estimate.sem, "n": estimate.n,
               "ci95": None if estimate.ci95 is None else list(estimate.ci95)})


def report(run: Run) -> None:
    """figures/ and report.html, from the files of the run alone."""
    from repro.report import write_report

    outputs = ["figures/iterations.png", "figures/iterations.pdf", "report.html"]
    if not run.stage("report", outputs, ["metrics"]):
        return
    write_report(run.folder)
    run.finish("report", outputs, ["metrics"])


# ---- provenance

def _commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files differ; None outside a checkout."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True).stdout

    commit = git("rev-parse", "HEAD").strip()
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "") or None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
