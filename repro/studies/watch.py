"""A run while it works, from the files that it leaves: which stage is done, each step's loss, what an iteration did to
bound, following and length, and an answer. It only reads; the run need not know of it, and may be on another machine that
shares its folder.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from repro.base.records import UserError, read_json, read_jsonl
from repro.report import look
from repro.report.changes import AMONG, ANSWERS, BOUND, FOLLOWED, TOKENS, lines
from repro.report.publish import leaves, without_places
from repro.stages.folder import evaluation_file
from repro.stages.jobs import steps_folder
from repro.stages.measure import following
from repro.stages.run import open_run

SHOWN = {BOUND: "bound", FOLLOWED: "sides followed", AMONG: "of answers", ANSWERS: "answer", TOKENS: "tokens"}
ORDER = ("write", "sample", "initial", "train", "evaluate", "baseline", "judge", "metrics", "report")

PATIENCE = 60.0  # seconds without a new variant, after which those that are finished are all


@dataclass(frozen=True)
class Event:
    """Something that a run has done: a name of its own, a line about it, and its numbers behind so many training steps."""

    key: str
    line: str
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)


def watch(folder: Path, every: float = 5.0, say: Callable[[str], None] = print, trackio: str | None = None) -> None:
    """Say what is new in `folder` (of a run, or of an experiment's variants) every so many seconds, until it is finished;
    its numbers go to the project of that name of `trackio`, too. Raises UserError where no run has begun there."""
    if not _runs(folder):
        raise UserError(f"{folder}: no run has begun there; give its folder, such as runs/exp1_dialogue/mini")
    told: dict[Path, set[str]] = {}
    logs: dict[Path, object] = {}
    quiet = 0  # looks since something was new
    while True:
        before = sum(map(len, told.values()))
        for run in _runs(folder):
            name = "" if run == folder else f"{run.name}, "
            if trackio and run not in logs:
                logs[run] = _log(trackio, run)
            for event in _events(run, told.setdefault(run, set())):
                told[run].add(event.key)
                say(name + event.line)
                if trackio and event.values:
                    logs[run].log(event.values, step=event.step)
        whole = leaves(folder) if (folder / "run.json").is_file() else []
        quiet = quiet + 1 if sum(map(len, told.values())) == before else 0
        # One variant alone is never put together with others, and another one may be about to begin.
        if all("report" in told.get(run, ()) for run in whole or _runs(folder)) and (whole or quiet * every >= PATIENCE):
            for log in logs.values():
                log.finish()
            return say(f"finished: {(folder if whole else _runs(folder)[-1]) / 'report.html'}")
        time.sleep(every)


def _log(project: str, run: Path):
    """A new run of trackio: in its files on this machine (TRACKIO_DIR), unless its own settings name a place elsewhere."""
    try:
        import trackio
    except ImportError:
        raise UserError("--trackio: the package is not here; pip install trackio (an environment of its own, where its "
                        "pins do not fit)") from None
    config = without_places(read_json(run / "run.json"))["config"]
    name = "-".join(filter(None, (config["name"], config.get("variant"), f"seed-{config['seed']}")))
    return trackio.init(project=project, name=name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False)


def _runs(folder: Path) -> list[Path]:
    own = [folder] if (folder / "run.json").is_file() and leaves(folder) == [folder] else []
    return own or sorted((path.parent for path in folder.glob("*/run.json")), key=lambda path: path.stat().st_mtime)


def _events(folder: Path, told: set[str]) -> Iterator[Event]:
    """What is there and not yet told, in the order of a run."""
    record, done = read_json(folder / "run.json"), 0
    stages, iterations = record["stages"], record["config"]["iterations"]
    for stage in sorted({*stages, *(f"train-{k}" for k in range(1, iterations + 1))}, key=_place):
        kind, _, k = stage.rpartition("-")
        for step in (stages.get(stage, {}).get("trace") or _steps(folder, int(k))) if kind == "train" else ():
            key, done = f"{stage}, step {step['step']}", done + 1
            if key not in told:
                yield Event(key, f"{key}: loss {step['loss']:.3f}, gradient norm {step['grad_norm']:.2f}", done,
                            {"loss": step["loss"], "grad_norm": step["grad_norm"], "iteration": int(k)})
        if stage in stages and stage not in told:
            yield Event(stage, f"{stage}: done in {stages[stage]['seconds'] / 60:.1f} min")
            if kind == "evaluate":
                yield from _values(folder, int(k), done)


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


def _values(folder: Path, iteration: int, done: int) -> Iterator[Event]:
    """What the model after an iteration does, over the held-out queries that it was asked, and one of its answers."""
    run = open_run(folder, lambda line: None, finished=False)
    rows = [row for row in following(run, (iteration,)) if row["sides"]]
    for line in lines("", {0: rows}):
        values = {word: (line.value(measure, iteration).value, measure.digits) for measure, word in SHOWN.items()
                  if line.has(measure, iteration)}
        n, scored = (len(line.by_query(measure, iteration)) for measure in (ANSWERS, BOUND))
        told = ", ".join(f"{word} {value:.{digits}f}" for word, (value, digits) in values.items())
        model, of = f"iteration {iteration}" if iteration else "initial model", line.subset
        told = f"{model}, {of.replace('_', ' ')}: {told} (n {n}; bound {scored})"
        numbers = {f"{of}/{word}": value for word, (value, _) in values.items()}
        yield Event(f"values {iteration} {of}", told, done, numbers)
    private, answers = run.constitutions.private_sides, read_jsonl(folder / evaluation_file(iteration))
    if answer := next((r for r in answers if not private & set(r["constitution"].split(","))), None):
        asked = next(q.text for q in run.held_out if q.id == answer["query"])
        yield Event(f"query {iteration}", f"  {look.printable(asked)} [{answer['constitution']}]")
        yield Event(f"answer {iteration}", f"  > {look.printable(answer['text'])}")
