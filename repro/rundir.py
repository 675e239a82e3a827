"""A run directory: the inputs it is bound to, which stages are done, and where each file lies.

run.json holds the config and its hash, provenance, and per stage the sha256 of what it left. A stage is skipped when
the config, what it depends on, and its files all match; never by file time.
"""

import contextlib
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

from repro import models, prompts
from repro.config import Experiment, config_hash, flatten
from repro.constitutions import Constitution, ConstitutionSet, check_control_tokens, load_constitutions
from repro.datasets import check_queries, load_queries
from repro.records import MARKER, Query, UserError, digest, file_sha256, read_json, sealed, write_json, write_jsonl

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
        not_run = list(self.experiment.not_run)
        if "rule" in self.experiment.judge.judges and not all(p.rule for p in self.constitutions.positive.principles):
            not_run.append("judge rule: a principle has no rule")
        self.record = {
            "config": self.experiment.to_json(), "config_hash": hash, "inputs": inputs, "commit": _commit(),
            "packages": {name: version(name) for name in PACKAGES}, "python": platform.python_version(),
            "device": _device(), "threads": _threads(), "seeds": [self.experiment.seed], "values": "measured",
            "dropped_queries": dict(self.dropped), "not_run": not_run, "stages": {}}
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
        return (sealed(path) if path.is_dir() else path.is_file()) and self._fact(output) == fact

    def _fact(self, output: str) -> str:
        """sha256 of a file; of its marker, which holds those of its files, for a sealed folder."""
        path = self.folder / output
        return file_sha256(path / MARKER if path.is_dir() else path)

    def finish(self, name: str, outputs: list[str], inputs: list[str], **facts) -> None:
        """Record the stage as done: what it left, what it depended on, its seconds."""
        spent = time.monotonic() - self._started
        self.record["stages"][name] = {
            "key": self._key(inputs), "seconds": round(spent, 2), "peak_rss_gib": _peak_gib(), **facts,
            "outputs": {output: self._fact(output) for output in sorted(outputs)}}
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
