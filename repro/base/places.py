"""Where things lie: the checkout, or the package where there is none, and the cache."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[1] / "data"  # of the package: principles, queries, posts, planted attacks


def cache_folder() -> Path:
    return Path(os.environ.get("SAMI_CACHE") or "~/.cache/sami-repro").expanduser()
