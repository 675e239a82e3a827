"""The measured costs over commits: results/bench/history.jsonl, a row a commit, and its picture. `make bench` adds a row.

    .venv/bin/python tests/perf/history.py             # the row of the records as they are now, and the picture
    .venv/bin/python tests/perf/history.py --backfill  # the rows that git's history holds, too

A row holds what that commit's records say anew: times and bytes of a step against the reference's (bench_cpu.json, a ratio in
one run), the exact costs of the check's case (check.json), the seconds of exp1's stages (its first seed's run). Seconds are of
whatever else the machine did then; ratios and costs are not. pytest-benchmark keeps each run's own samples in .benchmarks
(`pytest-benchmark compare`), which is not committed.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HISTORY, PICTURE = ROOT / "results/bench/history.jsonl", ROOT / "results/bench/history"
BENCH, CHECK, EXP1 = "results/bench/bench_cpu.json", "results/bench/check.json", "results/exp1_dialogue/mini/run-seed-0.json"
SIZES = ("2x2", "4x4")

Read = Callable[[str], dict | None]


def _now(path: str) -> dict | None:
    return json.loads((ROOT / path).read_text()) if (ROOT / path).is_file() else None


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout


def _then(commit: str) -> Read:
    def read(path: str) -> dict | None:
        text = _git("show", f"{commit}:{path}")
        return json.loads(text) if text else None

    return read


def measured(read: Read) -> dict:
    """What the records say, less what is not there: `step`, reference / shared {size: [ratio, min, max]}; `peak_mib`, `held_mib` and
    `gflop` of a step by the shared path; `stages` of exp1 in seconds, with its threads and the held-out queries of a subset.
    `on`: the commit that was measured, where the record tells it."""
    bench, check, exp1 = read(BENCH), read(CHECK), read(EXP1)
    found = {}
    for row in (bench or {}).get("rows", []):
        size = f"{row.get('C')}x{row.get('R')}"
        other = row["implementations"].get("reference", {})
        if row["what"] == "step" and row["lengths"] == "equal" and row["queries"] == 1 and size in SIZES and "times_ours" in other:
            found.setdefault("step", {"on": row["commit"][:8]})[size] = [round(x, 3) for x in (other["times_ours"], *other["times_ours_min_max"])]
    costs = list((check or {}).get("costs", {}).values())
    if costs:
        shared = {size: costs[-1][size]["shared"] for size in SIZES}
        found["peak_mib"] = {size: round(x["peak_bytes"] / 2**20, 1) for size, x in shared.items()}
        found["held_mib"] = {size: round(x["saved_bytes"] / 2**20, 1) for size, x in shared.items()}
        found["gflop"] = {size: round(x["flops"] / 1e9, 2) for size, x in shared.items()}
    if exp1:
        stages: dict[str, float] = {}
        for name, facts in exp1["stages"].items():
            kind = re.sub(r"-\d+$", "", name)
            stages[kind] = round(stages.get(kind, 0.0) + facts["seconds"], 1)
        found["stages"] = {"on": exp1["commit"][:8], "threads": exp1["threads"],
                           "queries": exp1["config"]["data"]["evaluation"]} | stages
    return found


def rows() -> list[dict]:
    return [json.loads(line) for line in HISTORY.read_text().splitlines()] if HISTORY.is_file() else []


def append(commit: str, date: str, found: dict, old: list[dict]) -> list[dict]:
    """`old`, less an earlier row of this commit, and its row now: what was measured anew, if anything was."""
    kept, known = [row for row in old if row["commit"] != commit], {}
    for row in kept:
        known |= row
    new = {k: v for k, v in found.items() if known.get(k) != v}
    return [*kept, {"commit": commit, "date": date} | new] if new else kept


def write(found: list[dict]) -> None:
    HISTORY.write_text("".join(json.dumps(row) + "\n" for row in found))
    draw(found)


def update() -> None:
    """The row of the records as they are, on the commit that is checked out: the one that was measured. (`backfill` names the one
    that holds the record.)"""
    head = _git("log", "-1", "--format=%H %cs").split()
    if not head:
        print("history: no git here, no row", file=sys.stderr)
        return
    write(append(head[0][:7], head[1], measured(_now), rows()))


def backfill() -> None:
    """Rows of every commit that changed a record."""
    found: list[dict] = []
    for line in _git("log", "--reverse", "--format=%H %cs", "--", BENCH, CHECK, EXP1).splitlines():
        commit, date = line.split()
        found = append(commit[:7], date, measured(_then(commit)), found)
    write(found)


def draw(found: list[dict]) -> None:
    """Three panels over commits: the step's ratio, its memory, exp1's stages."""
    from repro.report import look

    with look.style():
        figure, (step, memory, stages) = look.subplots(3, 1, (7, 7.5))
        for k, size in enumerate(SIZES):
            for axis, name in ((step, "step"), (memory, "held_mib")):
                at = [(j, row[name][size]) for j, row in enumerate(found) if size in row.get(name, {})]
                if name == "step":
                    values = [v[0] for _, v in at]
                    axis.errorbar([j for j, _ in at], values, yerr=[[v[0] - v[1] for _, v in at], [v[2] - v[0] for _, v in at]],
                                  color=look.COLOURS[k], marker=look.MARKERS[k], label=f"C x R = {size}")
                else:
                    axis.plot([j for j, _ in at], [v for _, v in at], color=look.COLOURS[k], marker=look.MARKERS[k], label=f"C x R = {size}")
        step.axhline(1, color=look.GREY, lw=0.8, ls=":")
        step.set(ylabel="reference / shared,\ntime of a step", ylim=(0, None), title="A step against the reference (one run; bars: least and most)")
        memory.set(ylabel="MiB held for\nthe backward", ylim=(0, None), title="Memory of a step, counted (4 layers of SmolLM2-135M)")
        bottom = [0.0] * len(found)
        kinds = [k for k in ("sample", "train", "evaluate") if any(k in row.get("stages", {}) for row in found)]
        for k, kind in enumerate(kinds):
            minutes = [row.get("stages", {}).get(kind, 0.0) / 60 for row in found]
            stages.bar(range(len(found)), minutes, bottom=bottom, color=look.COLOURS[k], label=kind, width=0.6)
            bottom = [a + b for a, b in zip(bottom, minutes)]
        for j, row in enumerate(found):
            if "stages" in row:
                threads = row["stages"]["threads"]
                stages.annotate(f"{threads} thread{'s' * (threads > 1)},\n{row['stages']['queries']} held out", (j, bottom[j]), ha="center", va="bottom",
                                fontsize=6)
        stages.set(ylabel="minutes", title="exp1 mini, seed 0, as published then (wall clock, beside whatever else ran)")
        stages.margins(y=0.2)
        for axis in (step, memory, stages):
            axis.set_xticks(range(len(found)), [f"{row['commit'][:7]}\n{row['date'][5:]}" for row in found], fontsize=6)
            axis.set_xlim(-0.6, len(found) - 0.4)
            axis.legend(fontsize=7)
        look.save(figure, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backfill", action="store_true", help="the rows of all commits that changed a record, anew")
    args = parser.parse_args()
    backfill() if args.backfill else update()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
