"""The ten figures of reliability, filled in by one command: each is "value of b", b counted by the faults that fired.

    make faults                                       # all: about half an hour, most of it the kill study
    make faults ARGS=--quick                          # a small version of each, to see that it works
    make faults ARGS='--more 200'                     # so many kills more (by default 100), which join those of the record
    python tests/faults/scoreboard.py --figures 3 4   # some; the others keep their place in the record

Each figure runs in a process and a scratch folder of its own. The record is results/reliability.json, the kill study's is
results/kill_study.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import kill_study  # noqa: E402  first: it sets the environment of a process with one thread

from repro.base.records import read_json, write_json  # noqa: E402

RECORD = kill_study.ROOT / "results/reliability.json"
NAMES = {1: "kills survived with identical bytes", 2: "write faults survived", 3: "bad inputs refused in one line",
         4: "corruptions detected before use", 5: "judge faults without a lost, wrong or doubled verdict",
         6: "budget overshoot, USD", 7: "injections that win against an admitted judge", 8: "secrets found",
         9: "determinism pairs identical", 10: "planted defects caught"}
TARGETS = {1: "1,000 of 1,000, at least 60 of every stage", 2: "all", 3: "all, at least 150", 4: "all, at least 200", 5: "all, at least 300", 6: "0.00, 100 runs",
           7: "at most 5 %, no control token", 8: "0", 9: "all, and the inverse fails", 10: "all, at least 20"}


def more_kills(count: int, path: Path, *options: str) -> None:
    """So many kills more, by the seed after the record's last."""
    seed = max(kill_study.read_record(path)["seeds"], default=-1) + 1
    subprocess.run([sys.executable, str(HERE / "kill_study.py"), "--kills", str(count), "--seed", str(seed), "--record", str(path), *options],
                   check=True)


def kills(work: Path, quick: bool) -> dict:
    """Figure 1, from the record of the kill study, which is made where it is missing; in the quick version, eight kills."""
    path, want = (work / "kill_study.json", 8) if quick else (kill_study.RECORD, 110)
    have = kill_study.summarise(kill_study.read_record(path))
    if have["kills"] < want:  # else what is there stays; `--more` adds to it
        runs = ["--runs", "brief"] if quick else []
        more_kills(want - have["kills"], path, "--work", str(work), *runs)
    record = read_json(path)
    return {"value": record["identical"], "of": record["kills"], "detail": {s: [n, n] for s, n in record["stages"].items()},
            "redone_units": record["redone"], "torn_files": record["torn"], "seconds_lost_per_kill": record["seconds_lost_per_kill"],
            "whole_shipped_experiments": sum(len(t["kills"]) for t in record.get("whole_runs", [])),
            "counted": "children that a SIGKILL ended (return code -9) at a random moment of a random stage; then every file is the undisturbed "
                       "run's, none is torn, and no unit that was done is begun again",
            "not_counted": f"{record['scheduled'] - record['kills']} scheduled kills that did not fire; power loss (figure 2)"}


def figure(number: int, work: Path, quick: bool, part: slice) -> dict:
    import defects
    import files
    import judges
    import runs

    if number == 10:
        return defects.defects(work, quick, part)
    act = {1: kills, 2: files.write_faults, 3: files.bad_inputs, 4: files.corruptions, 5: judges.judge_faults, 6: judges.budget,
           7: judges.injections, 8: judges.secrets, 9: runs.determinism}
    return act[number](work, quick)


def table(record: dict) -> str:
    """The figures as a table for a reader."""
    rows = ["| | figure | value | target | what was counted |", "|---|---|---|---|---|"]
    for number in NAMES:
        row = record["figures"].get(str(number))
        if row is None:
            rows.append(f"| {number} | {NAMES[number]} | NOT RUN | {TARGETS[number]} | |")
            continue
        value = f"{row['value']} of {row['of']}"
        if number == 6:
            value = f"{row['overshoot_usd']:.2f} ({row['of']} runs)"
        elif number == 7:
            value = f"{value} (none is admitted); {row['control_token_leaks'][0]} leaks in {row['control_token_leaks'][1]} prompts" if not row["of"] \
                else f"{value}; {row['control_token_leaks'][0]} leaks in {row['control_token_leaks'][1]} prompts"
        elif number == 8:
            value = f"{row['value']} in {row['of']} files and outputs"
        rows.append(f"| {number} | {NAMES[number]} | {value} | {TARGETS[number]} | {row['counted']} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", type=int, nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--quick", action="store_true", help="a small version of each; not recorded unless --record says where")
    parser.add_argument("--part", default="", help="of figure 10: which defects, as FROM:TO; those recorded before stay")
    parser.add_argument("--more", type=int, nargs="?", const=100, metavar="N", help="N kills more (by default 100), and figure 1 anew; nothing else")
    parser.add_argument("--printed", action="store_true", help="what each fault of a run prints, instead of the figures")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # one figure, in a process of its own
    args = parser.parse_args()
    bounds = [int(n) if n else None for n in args.part.split(":")] if args.part else [None]
    if args.more is not None:
        more_kills(args.more, kill_study.RECORD)
        args.figures = [1]
    if args.into:
        with tempfile.TemporaryDirectory(prefix="faults-") as work:
            write_json(args.into, figure(args.figures[0], Path(work), args.quick, slice(*bounds)))
        return 0
    record_path = args.record or (None if args.quick else RECORD)
    record = read_json(record_path) if record_path and record_path.is_file() else {"figures": {}}
    failed = []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        if args.printed:
            import runs

            def noted(line: str) -> None:
                print(line, flush=True)
                if record_path:
                    write_json(record_path, record)

            record["printed"], args.figures = [], []
            runs.printed(Path(scratch), record["printed"], noted)
        for number in args.figures:
            into, began = Path(scratch) / f"{number}.json", time.monotonic()
            done = subprocess.run([sys.executable, __file__, "--figures", str(number), "--into", str(into), *(["--quick"] if args.quick else []),
                                   *([f"--part={args.part}"] if args.part else [])], env=os.environ)
            if done.returncode or not into.is_file():
                failed.append(number)
                continue
            row = read_json(into)
            if number == 10 and args.part and "10" in record["figures"]:
                row["detail"] = record["figures"]["10"]["detail"] | row["detail"]
                row["value"], row["of"] = sum(a for a, _ in row["detail"].values()), len(row["detail"])
            record["figures"][str(number)] = {"name": NAMES[number], "target": TARGETS[number], "seconds": round(time.monotonic() - began, 1),
                                              "quick": args.quick, "provenance": kill_study.provenance()} | row
            print(f"{number:2d} {NAMES[number]}: {row['value']} of {row['of']} ({time.monotonic() - began:.0f} s)"
                  + (f"; bad: {row['bad']}" if row.get("bad") else ""), flush=True)
            if record_path:
                write_json(record_path, record)
    if record_path:
        write_json(record_path, record)
    print(table(record))
    if failed:
        print(f"figures that could not be made: {failed}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
