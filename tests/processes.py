"""Whether processes that a test has started are still there."""

import time
from collections.abc import Iterable
from pathlib import Path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left(pids: Iterable[int], patience: float) -> list[int]:
    """Those of `pids` that are there `patience` seconds later, or none as soon as all are gone."""
    end = time.monotonic() + patience
    while (still := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return still
