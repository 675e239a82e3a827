"""The held-out side of a run: responses under every constitution, their log-probs, judgments, metrics.json."""

from collections.abc import Iterator

from tqdm import tqdm

from repro import judging, metrics
from repro.config import JudgeSpec
from repro.llm_judge import Pair, ask_judge, judge_shares
from repro.records import read_jsonl, write_json, write_jsonl
from repro.rundir import Run, evaluation_file, logprob_file
from repro.sampling import sample_to_file

SCORED_AT_ONCE = 8  # queries handed over together, for full packs
JUDGMENTS = "judgments.jsonl"
EVALUATION_ORDER = "evaluation"  # the principles' order at evaluation: the same for every iteration and seed


def evaluate(run: Run, iteration: int) -> None:
    """Responses to the held-out queries under every constitution, and their log-probs under every constitution."""
    name = f"evaluate-{iteration}"
    outputs = [evaluation_file(iteration), logprob_file(iteration)]
    inputs = [f"train-{iteration}"] if iteration else []
    if not run.stage(name, outputs, inputs):
        return
    jobs = [(q, c) for q in run.held_out for c in run.constitutions.constitutions]
    texts = [run.prompt(c, q, EVALUATION_ORDER, generation=True) for q, c in jobs]
    rows = sample_to_file(run, jobs, texts, iteration, run.folder / evaluation_file(iteration), name)
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
            matrices = []
            with tqdm(total=len(queries), desc=f"{name} {label}", unit="query") as bar:
                for k in range(0, len(queries), SCORED_AT_ONCE):
                    part = queries[k: k + SCORED_AT_ONCE]
                    matrices += logprob_matrix(
                        model, run.tokenizer, [p for _, p, _, _ in part], [r[select] for _, _, r, _ in part],
                        length_normalize=False, score_eos=eos, backend=run.record["backend"]).tolist()
                    bar.update(len(part))
            return matrices

    own = score(iteration, slice(None), "log-probs")
    initial = [[row[:1] for row in m] for m in own] if iteration == 0 else score(0, slice(1), "under the initial model")
    return [{"query": q.id, "subset": q.subset, "logprobs": m, "tokens": t, "initial": [row[0] for row in i]}
            for (q, _, _, t), m, i in zip(queries, own, initial)]


def judge(run: Run) -> None:
    """Every iteration's response under the all-positive constitution against the initial model's -> judgments.jsonl."""
    iterations = range(1, run.experiment.iterations + 1)
    if not run.stage("judge", [JUDGMENTS], _judge_inputs(run)):
        return
    constitution, C = run.constitutions.positive, len(run.constitutions.constitutions)
    responses = {i: [row for _, row in read_jsonl(run.folder / evaluation_file(i))][::C] for i in (0, *iterations)}
    logprobs = {i: [row for _, row in read_jsonl(run.folder / logprob_file(i))] for i in (0, *iterations)}
    rows = []
    for name in run.record.get("judges", {}):
        if name != run.experiment.judge.label:
            run.say(f"judge {name}: its judgments are taken out; `repro judge {run.folder}` puts them back and asks "
                    "nothing that it has answered")
    for judge in run.experiment.judge.judges:
        if judge == "openai":
            rows += llm_judgments(run, run.experiment.judge)
            continue
        if judge == "rule" and not all(p.rule for p in constitution.principles):
            run.say("judge rule: NOT RUN: a principle has no rule")
            continue
        for i in iterations:
            for ours, theirs, a, b in zip(responses[i], responses[0], logprobs[i], logprobs[0]):
                if ours["text"] == theirs["text"]:
                    score = 0.5  # identical texts tie: their scores differ by rounding alone
                elif judge == "rule":
                    score = judging.judge_pairwise(ours["text"], theirs["text"], constitution)
                else:
                    score = judging.likelihood_score(_normalized(a), _normalized(b))
                rows.append(_judgment(judge, ours, theirs, a["subset"]) | {
                    "score": score, "outcome": {1.0: "win", 0.5: "tie", 0.0: "loss"}[score]})
    _write_judgments(run, rows)


def _judge_inputs(run: Run) -> list[str]:
    return [f"evaluate-{i}" for i in range(run.experiment.iterations + 1)]


def _judgment(judge: str, ours: dict, theirs: dict, subset: str) -> dict:
    return {"record": "judgment", "judge": judge, "query": ours["query"], "subset": subset,
            "iteration": ours["iteration"], "baseline": theirs["iteration"], "tokens": ours["tokens"],
            "baseline_tokens": theirs["tokens"]}


def _write_judgments(run: Run, rows: list[dict]) -> None:
    """The stage's output: the judgments in item order, then every ledger line of an LLM judge as it was appended."""
    path = run.folder / JUDGMENTS
    ledger = [row for _, row in read_jsonl(path, torn_tail=True) if row.get("record") in ("attempt", "outcome")] \
        if path.exists() else []
    write_jsonl(path, rows + ledger)
    run.finish("judge", [JUDGMENTS], _judge_inputs(run))


def add_judgments(run: Run, judge: str, rows: list[dict]) -> None:
    """Put one judge's judgments beside those of the other judges of a finished run, in place of its earlier ones."""
    others = [row for _, row in read_jsonl(run.folder / JUDGMENTS, torn_tail=True) if row.get("record") not in (
        "attempt", "outcome") and row["judge"] != judge]
    _write_judgments(run, others + rows)


def llm_judgments(run: Run, spec: JudgeSpec, *, dry_run: bool = False, reparse: bool = False) -> list[dict]:
    """As `judge`, by an LLM behind an endpoint, in both orders. Its answers are appended to judgments.jsonl as they
    arrive; what lies there already is not asked again."""
    responses = {}
    for i in range(run.experiment.iterations + 1):
        rows = [row for _, row in read_jsonl(run.folder / evaluation_file(i))]
        responses[i] = [row for row in rows if row["constitution"] == run.constitutions.positive.id]
    queries = {q.id: q for q in run.held_out}
    principles = tuple(run.constitutions.positive.statements())
    jobs = [(ours, theirs) for i in range(1, run.experiment.iterations + 1)
            for ours, theirs in zip(responses[i], responses[0])]
    pairs = [Pair(id=ours["query"], query=queries[ours["query"]].text, principles=principles, ours=ours["text"],
                  theirs=theirs["text"]) for ours, theirs in jobs]
    verdicts, facts = ask_judge(spec, pairs, run.endpoint, run.folder / JUDGMENTS, run.say, seed=run.experiment.seed,
                                dry_run=dry_run, reparse=reparse)
    if not dry_run:
        run.record.setdefault("judges", {})[spec.label] = facts
    return [_judgment(spec.label, ours, theirs, queries[ours["query"]].subset) | verdict.to_json()
            for (ours, theirs), verdict in zip(jobs, verdicts)]


def _normalized(row: dict) -> list[float]:
    return [x / row["tokens"][0] for x in row["initial"]]


def measure(run: Run) -> None:
    """metrics.json from the files of the stages before it (design: one flat list of records)."""
    inputs = ["judge", *(f"evaluate-{i}" for i in range(run.experiment.iterations + 1))]
    if not run.stage("metrics", ["metrics.json"], inputs):
        return
    write_json(run.folder / "metrics.json", list(records(run)))
    run.finish("metrics", ["metrics.json"], inputs)


def records(run: Run) -> Iterator[dict]:
    """Every metric of the run with n, SEM and 95 % interval; the unit of n is the held-out query."""
    import numpy as np

    spec = run.experiment
    constants = {"model": spec.model.label, "writer": spec.writer, "seed": spec.seed}
    texts = {q.id: q.text for q in run.held_out}
    judgments = [row for _, row in read_jsonl(run.folder / JUDGMENTS) if row.get("record") not in ("attempt", "outcome")]
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
            for estimator, logprobs in (("infonce", means), ("symmetric_infonce", means), ("mean_of_logs", sums)):
                yield _record("mi", metrics.mutual_information(logprobs, estimator), fixed, estimator=estimator)
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
            for judge in dict.fromkeys(j["judge"] for j in judgments):
                rows = [j for j in judgments if (j["judge"], j["iteration"], j["subset"]) == (judge, iteration, subset)]
                for ties, length, estimate in _win_rates(rows):
                    yield _record("win_rate", estimate, fixed, baseline=spec.model.label, judge=judge, ties=ties,
                                  length=length)
                for metric, values in judge_shares(rows).items():
                    yield _record(metric, metrics.share(values), fixed, baseline=spec.model.label, judge=judge)


def _win_rates(rows: list[dict]) -> Iterator[tuple[str, str, metrics.Estimate]]:
    """(ties, length, win rate) under each tie rule and length control that these judgments define. A missing verdict
    is no item; a flip is half a win under either rule, since only identical texts tie."""
    rows = [row for row in rows if row["score"] is not None]
    if not rows:
        return
    difference = [float(row["tokens"] - row["baseline_tokens"]) for row in rows]
    for ties in ("half", "loss"):
        scores = [0.0 if (row["outcome"], ties) == ("tie", "loss") else row["score"] for row in rows]
        yield ties, "raw", metrics.win_rate(scores, ties="half")
        longer = [d > 0 for d in difference]
        if min(sum(longer), len(longer) - sum(longer)) >= 2:  # a stratum of one has no interval
            yield ties, "stratified", metrics.win_rate_stratified(scores, longer, ties="half")
        try:
            yield ties, "logistic", metrics.win_rate_logistic(scores, difference, ties="half")
        except ValueError:
            pass  # equal lengths throughout, or wins that length separates: no finite fit


def _record(metric: str, estimate: metrics.Estimate, fixed: dict, **extra) -> dict:
    keys = ("subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator", "ties", "length", "seed")
    return ({"metric": metric} | dict.fromkeys(keys) | fixed | extra
            | {"value": estimate.value, "sem": estimate.sem, "n": estimate.n,
               "ci95": None if estimate.ci95 is None else list(estimate.ci95)})
