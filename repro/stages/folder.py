"""A run's folder: what it is bound to, which stages are done, and where each file lies.

run.json holds the config and its hash, provenance, and per stage the sha256 of what it left. A stage is skipped when
the config, what it depends on, and its files all match; never by file time.
"""

import contextlib
import functools
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date as Date
from importlib.metadata import version
from pathlib import Path

from repro.base.identity import commit, config_hash, flatten, training_hash
from repro.base.records import (
    MARKER,
    UserError,
    checked,
    digest,
    file_sha256,
    read_json,
    remove_folder,
    sealed,
    write_json,
)
from repro.base.settings import Experiment

BY_HAND = "by_hand.json"  # beside constitutions that a model wrote: those whose rules measure following
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


def checkpoint(iteration: int) -> str:
    return f"checkpoints/iteration-{iteration}"


def training_file(iteration: int) -> str:
    return f"responses/training-{iteration}.jsonl"


def initial_file(iteration: int) -> str:
    return f"logprobs/initial-{iteration}.jsonl"


def evaluation_file(iteration: int) -> str:
    return f"responses/evaluation-{iteration}.jsonl"


def logprob_file(iteration: int) -> str:
    return f"logprobs/evaluation-{iteration}.jsonl"


def bare_file(iteration: int) -> str:
    """Log-probs of the responses under the initial model without a constitution."""
    return f"logprobs/bare-{iteration}.jsonl"


def otherwise_file(kind: str, iteration: int) -> str:
    """Responses without a constitution ("bare"), or where the user asks for the opposite ("contrary")."""
    return f"responses/{kind}-{iteration}.jsonl"


@dataclass
class Folder:
    """A run's folder and its record (run.json)."""

    experiment: Experiment
    folder: Path
    say: Callable[[str], None]
    record: dict = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _told: set[str] = field(default_factory=set)

    def once(self, text: str) -> None:
        """Say it, unless it was said before."""
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    # ---- what it is bound to

    @functools.cached_property
    def date(self) -> str:
        """What chat templates that print a date print for today: the day on which the run began."""
        path = self.folder / "run.json"
        began = read_json(path).get("inputs", {}).get("date") if path.exists() else None
        return began or Date.today().isoformat()

    def bind(self, inputs: dict, **facts) -> None:
        """Bind the folder to its experiment and to what its files hold (`inputs`: field -> digest); of a new one, `facts`
        join the record. Raises UserError where it holds another run."""
        fields = flatten(self.experiment.to_json()) | inputs
        hash = config_hash(self.experiment, inputs)
        path = self.folder / "run.json"
        packages = (*PACKAGES, "peft") if self.experiment.train.lora else PACKAGES
        here = {"packages": {name: version(name) for name in packages}, "python": platform.python_version(),
                "device": _device(), "threads": _threads()}
        if path.exists():
            self.record = read_json(path)
            if self.record.get("config_hash") != hash and self.record.get("stages"):
                there, here_ = flatten(self.record.get("config", {})), flatten(self.experiment.to_json())
                with contextlib.suppress(UserError):  # what an older version did not know was at its default
                    there = flatten(Experiment.from_json(self.record["config"]).to_json())
                theirs = there | self.record.get("inputs", {})
                differ = [f"{k} ({there.get(k)!r} there, {here_.get(k)!r} here)" if there.get(k) != here_.get(k)
                          else f"{k} (another content)"
                          for k in sorted(fields.keys() | theirs.keys(), key=lambda k: (k.startswith("judge."), k))
                          if fields.get(k) != theirs.get(k)]
                if not differ or not all(d.startswith("judge.") for d in differ):
                    raise UserError(f"{self.folder} holds a run of another config: {'; '.join(differ[:4])}; choose another "
                                    "OUT or --name, or delete the folder")
                self._judge_anew(hash, differ, facts["not_run"])
            if self.record.get("config_hash") == hash:
                changed = [key for key in here if self.record[key] != here[key]]
                if changed:
                    self.say(f"going on with another {', '.join(changed)}: what is still to do will not be byte-comparable")
                    self.record.setdefault("resumed_with", []).append(here)
                return
        self.record = {"config": self.experiment.to_json(), "config_hash": hash,
                       "training_hash": training_hash(self.experiment, inputs), "inputs": inputs, "commit": commit(),
                       **here, "seeds": [self.experiment.seed], "values": "measured", **facts, "stages": {}}
        write_json(path, checked(self.record))

    def _judge_anew(self, hash: str, differ: list[str], not_run: list[str]) -> None:
        """Bind the folder to other judges: what was sampled and trained stays. The likelihood judge needs log-probs that
        an evaluation without it has not left."""
        had, stages = self.record["config"].get("judge", {}).get("judges", ()), self.record["stages"]
        again = [name for name in stages if name == "judge" or (
            name.startswith("evaluate-") and "likelihood" in self.experiment.judge.judges and "likelihood" not in had)]
        for name in again:
            del stages[name]
        self.say(f"other judges than before: {'; '.join(differ[:4])}; what was sampled and trained stays")
        kept = [line for line in self.record["not_run"] if not line.startswith("judge rule")]
        kept += [line for line in not_run if line.startswith("judge rule")]
        self.record |= {"config": self.experiment.to_json(), "config_hash": hash, "training_hash": self._bound_to(),
                        "not_run": kept}
        write_json(self.folder / "run.json", checked(self.record))

    def _bound_to(self) -> str:
        """What the stages' keys hold: the digest without the judges; in a folder that is older than it, the whole one."""
        return self.record.get("training_hash", self.record["config_hash"])

    def abandon(self) -> None:
        """Take back what `prepare` and `adopt` have written into a new folder, where nothing else is in it: a run that
        fails before its first stage leaves none. What was sampled or answered, and a server's log, stay."""
        written = [self.folder / name for name in ("run.json", "queries.jsonl", "constitutions.json", BY_HAND)]
        if {p for p in self.folder.rglob("*") if p.is_file()} <= {*written, self.folder / ".lock"}:
            for path in written:
                path.unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.is_dir():
                    remove_folder(path)

    # ---- stages

    def stage(self, name: str, outputs: list[str], inputs: list[str], *, again: bool = False) -> bool:
        """True if the stage is to be done (`again`: in any case); otherwise says that it is skipped."""
        done = self.record["stages"].get(name)
        if done and not again and done["key"] == self.key(inputs) and list(done["outputs"]) == sorted(outputs):
            wrong = [path for path, fact in done["outputs"].items() if not self._holds(path, fact)]
            if not wrong:
                self._without_partials(outputs)  # a kill may have come between the record and this
                self.say(f"{name}: done before, skipped")
                return False
            self.say(f"{name}: done again, since {', '.join(wrong)} is missing or altered")
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
        write_json(self.folder / "run.json", checked(self.record))
        self._without_partials(outputs)

    def sampled_by(self, facts: dict) -> None:
        """Record which server samples, before it does: how the answers of any were others than the weights' stays."""
        differs = {*self.record.get("sampled_by", {}).get("differs", ()), *facts.get("differs", ())}
        self.record["sampled_by"] = facts | ({"differs": sorted(differs)} if differs else {})
        write_json(self.folder / "run.json", checked(self.record))

    def _without_partials(self, outputs: list[str]) -> None:
        for output in outputs:
            self.partial(self.folder / output).unlink(missing_ok=True)

    def partial(self, output: Path) -> Path:
        """Where the finished part of an unfinished output is kept."""
        return output.with_suffix(".partial.jsonl")

    def key(self, inputs: list[str]) -> str:
        """Names what the stage depends on: the config less its judges, whose own stage goes where they change (`_bind`),
        and the recorded outputs of the stages before it."""
        return digest([self._bound_to(),
                       {name: self.record["stages"][name]["outputs"] for name in inputs}])


# ---- provenance

def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
