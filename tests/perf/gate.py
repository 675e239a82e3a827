"""Whether a path takes more time than it did, told on a machine that is busy with other things, too.

A round is one step of a yardstick and one of each path, in CPU seconds of this process with one thread: waiting for a core
costs none (nor is lost parallelism seen), and what slows all of a round, such as a clock, leaves their ratio. A ratio counts
by the side on which it lies of a line, halfway between the baseline's and one that is slower by SLOWDOWN: a sign test, which
no outlier turns. So no change and SLOWDOWN are told apart; of what lies between, either may be said. First the noise: how far the
yardstick's own steps lie apart from one round to the next. Where half of them are further apart than the line lies from
the baseline, nothing is told. Rounds are added until every path is told, ROUNDS at most; what is not told by then cannot be
told on this machine now.

    .venv/bin/python tests/perf/gate.py --study [--out results/bench/gate.json]

tries that: `check.py`'s paths as they are and slowed by SLOWDOWN, with 0 to 6 other busy processes, every other of which
multiplies and every other copies memory.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

SLOWDOWN = 1.3  # what has to be told from no change
FIRST, ROUNDS = 8, 32  # rounds: before the first look, between looks; at most
CHANCE = 0.005  # of so uneven a split of rounds that lie on either side alike
STEADY = 0.05  # noise, and difference of the halves, at most, of a baseline
YARDSTICK, PASS, FAULT, CANNOT_TELL = "yardstick", "pass", "fault", "cannot tell"

Step = Callable[[], object]


def round_of(steps: dict[str, Step]) -> dict[str, float]:
    """CPU seconds of one step of each."""
    seconds = {}
    for name, step in steps.items():
        start = time.process_time()
        step()
        seconds[name] = time.process_time() - start
    return seconds


def uneven(n: int) -> int:
    """The fewest of n rounds on one side of a line that chance alone (one half each) leads to at most CHANCE of the time."""
    return next(k for k in range(n + 1) if sum(math.comb(n, j) for j in range(k, n + 1)) <= CHANCE * 2 ** n)


def told(ratios: list[float], baseline: float) -> str:
    """PASS, FAULT or CANNOT_TELL. `ratios`: yardstick / path, which falls as the path slows down."""
    n, above = len(ratios), sum(r > baseline / math.sqrt(SLOWDOWN) for r in ratios)
    return PASS if above >= uneven(n) else FAULT if n - above >= uneven(n) else CANNOT_TELL


def noise(seconds: list[float]) -> float:
    """By how much half of the steps of one path lie apart from the next one's, as a ratio's log."""
    return statistics.median(abs(math.log(a / b)) for a, b in zip(seconds, seconds[1:]))


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Path -> the median of yardstick / path."""
    return {name: statistics.median(r[YARDSTICK] / r[name] for r in rounds) for name in rounds[0] if name != YARDSTICK}


def baseline(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Path -> its ratio now, and the noise. Raises ValueError where the machine is not quiet."""
    measured = [round_of(steps) for _ in range(rounds)]
    halves, apart = (medians(measured[::2]), medians(measured[1::2])), noise([r[YARDSTICK] for r in measured])
    wide = max(abs(math.log(halves[0][name] / halves[1][name])) for name in halves[0])
    if max(apart, wide) > STEADY:
        raise ValueError(f"the machine is busy: noise {apart:.0%}, halves of the rounds {wide:.0%} apart, {STEADY:.0%} at most")
    return medians(measured) | {"noise": apart}


def gate(steps: dict[str, Step], known: dict[str, float]) -> dict[str, dict]:
    """Path -> its verdict (`told`), median ratio, baseline (`known`), rounds and the noise then. `steps` has the YARDSTICK too."""
    found, rounds = {}, []
    while len(found) < len(known):
        rounds += [round_of(steps) for _ in range(FIRST)]
        apart, last = noise([r[YARDSTICK] for r in rounds]), len(rounds) >= ROUNDS
        for name in known.keys() - found.keys():
            ratios = [r[YARDSTICK] / r[name] for r in rounds]
            verdict = told(ratios, known[name]) if apart < math.log(SLOWDOWN) / 2 else CANNOT_TELL
            if verdict != CANNOT_TELL or last:
                found[name] = {"verdict": verdict, "ratio": statistics.median(ratios), "baseline": known[name],
                               "rounds": len(rounds), "noise": apart}
    return found


def slowed(step: Step, by: float = SLOWDOWN) -> Step:
    """The step, and then CPU time spent on nothing."""
    def run() -> None:
        start = time.process_time()
        step()
        end = start + by * (time.process_time() - start)
        while time.process_time() < end:
            pass

    return run


BUSY = """import os, torch
torch.set_num_threads(1)
a, parent = torch.randn(1500, 1500), os.getppid()
b = torch.empty(64 * 2**20)
print(flush=True)
while os.getppid() == parent:
    {}
"""


def study(runs: dict[int, int]) -> list[dict]:
    """`runs`: busy processes -> gates to run, each of the paths as they are and slowed. Held against a baseline of now."""
    import check

    rows = []
    with check.timed() as (steps, _):
        known = {name: ratio for name, ratio in baseline(steps, check.BASELINE_ROUNDS).items() if name != "noise"}
        for busy, times in runs.items():
            others = []
            try:
                for k in range(busy):
                    code = BUSY.format("b.add_(1)" if k % 2 else "a @ a")
                    others.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
                    others[-1].stdout.readline()
                for _, by in product(range(times), (1, SLOWDOWN)):
                    tried = {name: slowed(step) if by != 1 and name != YARDSTICK else step for name, step in steps.items()}
                    start = time.perf_counter()
                    for name, of in gate(tried, known).items():
                        rows.append({"busy": busy, "path": name, "slowed": by, **of, "seconds": time.perf_counter() - start})
                        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            finally:
                for other in others:
                    other.kill()
                    other.communicate()
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Of each number of busy processes and slowdown: gates by verdict."""
    keys = dict.fromkeys((r["busy"], r["slowed"]) for r in rows)
    return [{"busy": busy, "slowed": by, **{v: sum(r["verdict"] == v for r in rows if (r["busy"], r["slowed"]) == (busy, by))
                                           for v in (PASS, FAULT, CANNOT_TELL)}} for busy, by in keys]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", action="store_true", required=True)
    parser.add_argument("--quiet", type=int, default=20, help="gates with no other process of ours")
    parser.add_argument("--loaded", type=int, default=5, help="gates with 1, 2, ... 6 busy processes each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import check

    rows = study({0: args.quiet} | dict.fromkeys(range(1, 7), args.loaded))
    record = {"timed_on": check.timed_on(), "summary": summary(rows), "gates": rows}
    print(*record["summary"], sep="\n")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
