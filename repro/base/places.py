"""Where things lie. In a checkout (`pip install -e .`, `make`): experiments/ and results/ of the checkout. Installed from a
wheel: what is read (experiments, published tables, judges' admissions) lies in the package, where pyproject.toml maps it;
what is written goes below the current folder."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of the checkout, where there is one
CHECKOUT = (ROOT / "experiments").is_dir() and not (PACKAGE / "experiments").is_dir()

DATA = PACKAGE / "data"  # principles, queries, posts, planted attacks
EXPERIMENTS = ROOT / "experiments" if CHECKOUT else PACKAGE / "experiments"
PUBLISHED = ROOT / "results" / "published" if CHECKOUT else PACKAGE / "published"  # the paper's cells, the record's pins
JUDGES = ROOT / "results" / "judges" if CHECKOUT else PACKAGE / "judged"  # admissions that come with the project

ADMISSIONS = JUDGES if CHECKOUT else Path("results", "judges")  # where `repro judge --admit` writes; looked into first
ARCHIVE = ROOT.parent / "shared" / "archive" if CHECKOUT else Path("..", "shared", "archive")  # a local copy of the record


def cache_folder() -> Path:
    return Path(os.environ.get("SAMI_CACHE") or "~/.cache/sami-repro").expanduser()
