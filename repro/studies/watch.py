"""A run while it works, from the files that it leaves: which stage is done, each step's loss, what an iteration did to
bound, following and length, and an answer. It only reads; the run need not know of it, and may be on another machine that
shares its folder.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from repro.base.records import UserError, read_json, read_jsonl
from repro.report.changes import AMONG, ANSWERS, BOUND, FOLLOWED, TOKENS, lines
from repro.report.publish import leaves
from repro.stages.folder import evaluation_file
from repro.stages.jobs import steps_folder
from repro.stages.measure import following
from repro.stages.run import open_run

SHOWN = {BOUND: "bound", FOLLOWED: "sides followed", AMONG: "of answers", ANSWERS: "answer", TOKENS: "tokens"}


def watch(folder: Path, every: float = 5.0, say: Callable[[str], None] = print) -> None:
    """Say what is new in `folder` (of a run, or of an experiment's variants) every so many seconds, until it is finished.
    Raises UserError where no run has begun there."""
    told: dict[Path, set[str]] = {}
    if not _runs(folder):
        raise UserError(f"{folder}: no run has begun there; give its folder, such as runs/exp1_dialogue/mini")
    while True:
        for run in _runs(folder):
            name = "" if run == folder else f"{run.name}, "
            for key, line in _events(run, told.setdefault(run, set())):
                told[run].add(key)
                say(name + line)
        whole = (folder / "run.json").is_file() and leaves(folder)
        if whole and all("report" in read_json(run / "run.json")["stages"] for run in whole):
            return say(f"finished: {folder / 'report.html'}")
        time.sleep(every)


def _runs(folder: Path) -> list[Path]:
    own = [folder] if (folder / "run.json").is_file() and leaves(folder) == [folder] else []
    return own or sorted((path.parent for path in folder.glob("*/run.json")), key=lambda path: path.stat().st_mtime)


def _events(folder: Path, told: set[str]) -> Iterator[tuple[str, str]]:
    """What is there and not yet told, with a name for each."""
    record = read_json(folder / "run.json")
    stages, iterations = record["stages"], record["config"]["iterations"]
    for stage in sorted({*stages, *(f"train-{k}" for k in range(1, iterations + 1))}, key=_place):
        kind, _, k = stage.rpartition("-")
        for step in (stages.get(stage, {}).get("trace") or _steps(folder, int(k))) if kind == "train" else ():
            if (key := f"{stage}, step {step['step']}") not in told:
                yield key, f"{key}: loss {step['loss']:.3f}, gradient norm {step['grad_norm']:.2f}"
        if stage in stages and stage not in told:
            yield stage, f"{stage}: done in {stages[stage]['seconds'] / 60:.1f} min"
            if kind == "evaluate":
                for n, line in enumerate(_values(folder, int(k))):
                    yield f"{stage}, line {n}", line


ORDER = ("write", "sample", "initial", "train", "evaluate", "baseline", "judge", "metrics", "report")


def _place(stage: str) -> tuple[float, int]:
    """Where a stage stands in the order of a run."""
    kind, _, k = stage.rpartition("-")
    numbered = k.isdigit()
    name = kind if numbered else stage
    return (int(k) if numbered else -1 if stage == "write" else math.inf), ORDER.index(name) if name in ORDER else 2


def _steps(folder: Path, iteration: int) -> list[dict]:
    """The steps that an iteration's training has saved so far; they go when it has ended."""
    try:
        return read_json(max((folder / steps_folder(iteration)).glob("step-*/trace.json")))
    except (ValueError, FileNotFoundError, UserError):
        return []


def _values(folder: Path, iteration: int) -> Iterator[str]:
    """What the model after an iteration does, over the held-out queries that it was asked, and one of its answers."""
    run = open_run(folder, lambda line: None, finished=False)
    rows = [row for row in following(run, (iteration,)) if row["sides"]]
    for line in lines("", {0: rows}):
        found = {word: line.by_query(measure, iteration) for measure, word in SHOWN.items()}
        values = [f"{word} {line.value(measure, iteration).value:.{measure.digits}f}" for measure, word in SHOWN.items()
                  if found[word] and (not measure.over or any(found["answer"].values()))]
        yield (f"{'initial model' if iteration == 0 else f'iteration {iteration}'}, {line.subset.replace('_', ' ')}: "
               f"{', '.join(values)} (n {len(found['tokens'])}; bound {len(found['bound'])})")
    private = run.constitutions.private_sides
    answers = read_jsonl(folder / evaluation_file(iteration))
    if answer := next((r for r in answers if not private & set(r["constitution"].split(","))), None):
        asked = next(q.text for q in run.held_out if q.id == answer["query"])
        yield f"  {' '.join(asked.split())} [{answer['constitution']}]"
        yield f"  > {' '.join(answer['text'].split())}"
