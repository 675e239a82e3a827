"""What names a configuration (its digests), a checkout (its commit), and randomness (a function of its position alone)."""

import functools
import json
import random
import subprocess
from importlib import metadata
from pathlib import Path

from repro.base.places import CHECKOUT
from repro.base.records import digest
from repro.base.settings import Experiment


def config_hash(experiment: Experiment, inputs: dict) -> str:
    """Names a configuration: its fields, with files replaced by what they hold (`inputs`: field -> content hash),
    so that the same files elsewhere give the same hash."""
    return digest(_named_fields(experiment, inputs))


def training_hash(experiment: Experiment, inputs: dict) -> str:
    """Names what a run's responses and weights are bound to: the configuration without its judges, who see them when all
    is done."""
    return digest({k: v for k, v in _named_fields(experiment, inputs).items() if not k.startswith("judge.")})


def _named_fields(experiment: Experiment, inputs: dict) -> dict:
    fields = flatten(experiment.to_json())
    for name, first in (("sampling.engine", "transformers"), ("sampling.reasoning", False), ("train.dropout", "off")):
        if fields[name] == first:  # the only one there was: what it left keeps its hash
            del fields[name]
    return fields | inputs


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"train": {"dose": ...}} -> {"train.dose": ...}, for hashes and for naming a field that differs."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def rng(*keys) -> random.Random:
    """Randomness as a pure function of its position: seeded by the keys alone, so nothing needs to be saved."""
    return random.Random("/".join(map(str, keys)))


@functools.cache
def commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files differ; of an installation from a git address, the one that pip
    noted (PEP 610). None without git, and of a wheel: the repository that an environment may lie in is not ours."""
    if not CHECKOUT:
        return _noted_commit()

    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "") or None
    except OSError:
        return None


def _noted_commit() -> str | None:
    try:
        noted = metadata.distribution("sami-repro").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    return json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
