"""A run directory: the inputs it is bound to, which stages are done, and where each file lies.

run.json holds the config and its hash, provenance, and per stage the sha256 of what it left. A stage is skipped when
the config, what it depends on, and its files all match; never by file time.
"""

import contextlib
import functools
import gc
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import jinja2

from repro import models, prompts
from repro.config import Experiment, config_hash, flatten
from repro.constitutions import (
    Constitution,
    ConstitutionSet,
    check_control_tokens,
    constitutions_of,
    load_constitutions,
)
from repro.datasets import check_queries, disjoint, load_queries
from repro.endpoint import Endpoint
from repro.records import (
    MARKER,
    Query,
    UserError,
    digest,
    file_sha256,
    first_line,
    read_json,
    read_jsonl,
    sealed,
    write_json,
    write_jsonl,
)

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


def checkpoint(iteration: int) -> str:
    return f"checkpoints/iteration-{iteration}"


def training_file(iteration: int) -> str:
    return f"responses/training-{iteration}.jsonl"


def evaluation_file(iteration: int) -> str:
    return f"responses/evaluation-{iteration}.jsonl"


def logprob_file(iteration: int) -> str:
    return f"logprobs/evaluation-{iteration}.jsonl"


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
    endpoint: Endpoint | None = None  # where the LLM judge is, if there is one
    _started: float = field(default_factory=time.monotonic)

    # ---- inputs, checked before any model loads

    def prepare(self) -> None:
        """Read and check every input; then bind the directory to this configuration."""
        spec = self.experiment
        if "openai" in spec.judge.judges:
            self.endpoint = self.endpoint or Endpoint(model=spec.judge.model)
            self.endpoint.key(), self.endpoint.rates()
        self.constitutions: ConstitutionSet = load_constitutions(spec.constitutions)
        queries, self.dropped = load_queries(spec.data.source, spec=spec.data)
        self.place = models.resolve_model(spec.model.name)
        self.tokenizer = models.load_tokenizer(self.place)
        queries = self._fit(queries)
        self.training = [q for q in queries if q.split == "train"]
        self.held_out = [q for q in queries if q.split == spec.data.evaluation_split]
        self._enough()
        self._bind({"data.source": digest([asdict(q) | {"where": ""} for q in queries]),
                    "constitutions": digest(self.constitutions.to_json()),
                    "model.name": digest(models.describe(self.place)["sha256"]) if Path(self.place).is_dir()
                    else self.place})
        self.say(f"{len(self.training)} training and {len(self.held_out)} held-out queries"
                 + "".join(f"; dropped {n}: {why}" for why, n in sorted(self.dropped.items())))
        write_json(self.folder / "constitutions.json", self.constitutions.to_json())
        write_jsonl(self.folder / "queries.jsonl", [{"id": q.id, "subset": q.subset, "split": q.split, "text": q.text}
                                                    for q in (*self.training, *self.held_out)])

    def _fit(self, queries: list[Query]) -> list[Query]:
        """The queries as the model can take them: no control tokens, within the context. Decides the backend."""
        spec, controls = self.experiment, models.control_tokens(self.tokenizer)
        check_control_tokens(((f"{spec.constitutions}: principle {p.name}", s)
                              for p in self.constitutions.positive.principles for s in (p.text, p.antithesis)), controls)
        try:
            frames = [self.prompt(c, None, generation=True) for c in self.constitutions.constitutions]
        except (ValueError, jinja2.TemplateError) as e:
            raise UserError(f"--prompt chat: the tokenizer of {spec.model.name} has no chat template that takes a system "
                            f"and a user turn ({first_line(e)}); use --prompt plain") from e
        frame = max(len(ids) for ids in self.tokenizer(frames, add_special_tokens=False).input_ids)
        config = models.load_config(self.place)
        room = config.max_position_embeddings - frame - spec.sampling.max_new_tokens - 8
        if room < 1:
            raise UserError(f"{spec.constitutions}: the principles ({frame} tokens with the frame of the prompt) and "
                            f"{spec.sampling.max_new_tokens} response tokens leave no room in a context of "
                            f"{config.max_position_embeddings}")
        queries = check_queries(queries, self.tokenizer, controls, room=room, truncate=spec.data.truncate, say=self.say)
        if spec.data.truncate:  # texts that differ only beyond the cut are now the same
            queries = disjoint(queries, spec.data, self.dropped)
        longest = max(len(self.tokenizer(q.text, add_special_tokens=False).input_ids) for q in queries)
        from repro.logprobs import shared_refusal

        refusal = shared_refusal(config, frame + longest + spec.sampling.max_new_tokens)
        self.backend = "reference" if refusal else "shared"
        if refusal:
            self.say(f"log-probs by the reference path, which is slower: {refusal}")
        return queries

    def _enough(self) -> None:
        """Every subset needs training and held-out queries, every iteration the queries of its steps."""
        spec = self.experiment
        for subset in spec.data.subsets:
            counts = [sum(q.subset == subset for q in part) for part in (self.training, self.held_out)]
            if not all(counts):
                raise UserError(f"--queries {spec.data.source}: subset {subset!r} has {counts[0]} training and {counts[1]} "
                                f"{spec.data.evaluation_split} queries; both must be above 0")
        for iteration in range(1, spec.iterations + 1):
            need, have = spec.train.queries_needed(iteration), len(self.training_plan(iteration))
            if have < need:
                raise UserError(f"--queries {spec.data.source}: iteration {iteration} trains on {need} queries and its "
                                f"half of the training queries holds {have}; give at least {2 * need} training "
                                "queries, or a smaller TrainSpec.batch_size")

    def _bind(self, inputs: dict) -> None:
        fields = flatten(self.experiment.to_json()) | inputs
        hash = config_hash(self.experiment, inputs)
        path = self.folder / "run.json"
        here = {"packages": {name: version(name) for name in PACKAGES}, "python": platform.python_version(),
                "device": _device(), "threads": _threads()}
        if path.exists():
            self.record = read_json(path)
            if self.record.get("config_hash") != hash and self.record.get("stages"):
                theirs = flatten(self.record.get("config", {})) | self.record.get("inputs", {})
                differ = [f"{k} ({theirs.get(k)!r} there, {fields.get(k)!r} here)"
                          for k in sorted(fields.keys() | theirs.keys()) if fields.get(k) != theirs.get(k)]
                instead = "choose another OUT or --name, or delete the folder"
                if all(d.startswith("judge.") for d in differ):
                    instead = f"`repro judge {self.folder}` adds a judge to a finished run"
                raise UserError(f"{self.folder} holds a run of another config: {'; '.join(differ[:4])}; {instead}")
            if self.record.get("config_hash") == hash:
                changed = [key for key in here if self.record[key] != here[key]]
                if changed:
                    self.say(f"going on with another {', '.join(changed)}: what is still to do will not be byte-comparable")
                    self.record.setdefault("resumed_with", []).append(here)
                return
        not_run = list(self.experiment.not_run)
        if "rule" in self.experiment.judge.judges and not all(p.rule for p in self.constitutions.positive.principles):
            not_run.append("judge rule: a principle has no rule")
        self.record = {"config": self.experiment.to_json(), "config_hash": hash, "inputs": inputs, "commit": commit(),
                       **here, "seeds": [self.experiment.seed], "values": "measured", "backend": self.backend,
                       "dropped_queries": dict(self.dropped), "not_run": not_run, "stages": {}}
        write_json(path, self.record)

    # ---- what trains

    def training_plan(self, iteration: int) -> list[tuple[Query, Constitution]]:
        """Which queries an iteration samples and which constitution stands against the all-positive one.

        Two halves of the training queries alternate between iterations (arXiv 2404.14313, section 4); the order of
        a half is shuffled per iteration; subsets take turns; the negative is drawn from those of the query's subset.
        """
        spec = self.experiment
        want = round(spec.train.queries_needed(iteration) * (1 + spec.sampling.spare))
        halves = []
        for subset in spec.data.subsets:
            queries = [q for q in self.training if q.subset == subset]
            rng(spec.seed, "halves", subset).shuffle(queries)
            half = queries[(iteration - 1) % 2:: 2]
            rng(spec.seed, iteration, "order", subset).shuffle(half)
            halves.append(half)
        turns = [q for k in range(max(map(len, halves))) for half in halves for q in half[k: k + 1]]
        return [(q, rng(spec.seed, iteration, "negative", q.id).choice(self.constitutions.negatives(q.subset)))
                for q in turns[:want]]

    # ---- stages

    def stage(self, name: str, outputs: list[str], inputs: list[str]) -> bool:
        """True if the stage is to be done; otherwise says that it is skipped."""
        done = self.record["stages"].get(name)
        if done and done["key"] == self.key(inputs) and list(done["outputs"]) == sorted(outputs) and all(
                self._holds(path, fact) for path, fact in done["outputs"].items()):
            self.say(f"{name}: done before, skipped")
            return False
        self._started = time.monotonic()
        return True

    def _holds(self, output: str, fact: str) -> bool:
        path = self.folder / output
        return (sealed(path) if path.is_dir() else path.is_file()) and self._fact(output) == fact

    def _fact(self, output: str) -> str:
        """sha256 of a file; of its marker, which holds those of its files, for a sealed folder."""
        path = self.folder / output
        return file_sha256(path / MARKER if path.is_dir() else path)

    def finish(self, name: str, outputs: list[str], inputs: list[str], **facts) -> None:
        """Record the stage as done: what it left, what it depended on, its seconds."""
        spent = time.monotonic() - self._started
        self.record["stages"][name] = {
            "key": self.key(inputs), "commit": commit(), "seconds": round(spent, 2), "peak_rss_gib": _peak_gib(), **facts,
            "outputs": {output: self._fact(output) for output in sorted(outputs)}}
        write_json(self.folder / "run.json", self.record)
        for output in outputs:
            self.partial(self.folder / output).unlink(missing_ok=True)

    def partial(self, output: Path) -> Path:
        """Where the finished part of an unfinished output is kept."""
        return output.with_suffix(".partial.jsonl")

    def key(self, inputs: list[str]) -> str:
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


def open_run(folder: Path, say: Callable[[str], None]) -> Run:
    """A finished run as its files describe it. Raises UserError where there is none."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: no run.json; give the folder of a finished run, such as runs/exp1_dialogue/mini")
    record = read_json(folder / "run.json")
    if "metrics" not in record.get("stages", {}):
        raise UserError(f"{folder}: the run is not finished; run the same command again to finish it first")
    run = Run(Experiment.from_json(record["config"]), folder, say, record)
    run.constitutions = constitutions_of(read_json(folder / "constitutions.json"), f"{folder / 'constitutions.json'}")
    split = run.experiment.data.evaluation_split
    run.held_out = [Query(**row) for _, row in read_jsonl(folder / "queries.jsonl") if row["split"] == split]
    return run


# ---- provenance

@functools.cache
def commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files differ; None outside a checkout or without git."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "") or None
    except OSError:
        return None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
