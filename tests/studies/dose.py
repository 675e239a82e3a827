"""The dose of `mini`: what learning rate and steps do to the bound, and to the text. -> results/dose/

One SAMI iteration of experiment 2 with the hand-written principles, from the initial weights, on the same pairs, for each
learning rate and number of steps; evaluated on the development split, which no committed result uses.

Run: .venv/bin/python tests/studies/dose.py [OUT]    (about 15 minutes on 2 CPU cores; goes on where it stopped)
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

from repro.base.records import digest, locked, seal, sealed, write_json, write_jsonl
from repro.config import JudgeSpec
from repro.core import engines, loop
from repro.experiment import load_experiment
from repro.models import load
from repro.report.figures import select
from repro.report.look import AXES, COLOURS, save, style, subplots
from repro.stages import draws
from repro.stages.evaluate import evaluate
from repro.stages.folder import checkpoint
from repro.stages.measure import records
from repro.stages.pipeline import write
from repro.stages.run import Run
from repro.stages.sample import sample, usable_pairs

RATES = (5e-7, 2e-6, 5e-6, 1e-6)  # in the order in which they were run
STEPS = (2, 4, 6)  # those of iterations 1, 2 and 3
GRID = list(itertools.product(RATES, STEPS))
RESULTS = Path(__file__).parents[2] / "results" / "dose"


def train(run: Run, number: int, rate: float, steps: int) -> None:
    """Point `number` of the grid, in the place of an iteration's checkpoint."""
    outputs, key = [checkpoint(number)], digest([run.record["config_hash"], rate, steps])
    if not sealed(run.folder / checkpoint(number), key):  # of another grid
        run.record["stages"].pop(f"train-{number}", None)
    if not run.stage(f"train-{number}", outputs, ["sample-1"]):
        return
    spec = replace(run.experiment.train, learning_rate=rate, batches=steps)
    pairs = [engines.TrainingPair(
        query=query.id, responses=tuple(draws.said(run.voice, row) for row in both),
        prompts=tuple(draws.prompt(run.voice, c, query, run.experiment.seed, 1, "train", c.id, sample=False) for c in pair))
        for query, pair, both in usable_pairs(run, 1)[0]]
    with run.model(0, "float32") as model:
        trace = loop.train(model, run.voice.tokenizer, pairs, spec, 1, backend=run.record["backend"])
        load.save_model(model, run.voice.tokenizer, run.folder / checkpoint(number))
    seal(run.folder / checkpoint(number), key)
    run.finish(f"train-{number}", outputs, ["sample-1"], trace=trace)


@style()
def draw(rows: list[dict]):
    figure, axes = subplots(1, 4, (13, 3.7))
    panels = (("following", "following, all-positive constitution (%)", 100),
              ("hack_constitution_overlap", "words taken from the constitution (%)", 100),
              ("hack_query_overlap", "words taken from the post (%)", 100),
              ("hack_repetition", "repeated trigrams (%)", 100))
    for axis, (metric, label, scale) in zip(axes, panels):
        def at(row, of):
            (found,) = [r for r in select(row["metrics"], metric=of) if r.get("principle") is None
                        and r["estimator"] in (None, "infonce")]
            return found

        for k, rate in enumerate(sorted(RATES)):
            line = [rows[0], *(r for r in rows if r["learning_rate"] == rate)]
            x, y = [at(r, "mi") for r in line], [at(r, metric) for r in line]
            axis.errorbar([r["value"] for r in x], [scale * r["value"] for r in y], [scale * r["sem"] for r in y],
                          [r["sem"] for r in x], color=COLOURS[k], lw=0.8, capsize=0, elinewidth=0.5, label=f"{rate:g}")
            for row, a, b in list(zip(line, x, y))[1:]:
                axis.plot(a["value"], scale * b["value"], "o", color=COLOURS[k], ms=2 + row["steps"])
        axis.plot(at(rows[0], "mi")["value"], scale * at(rows[0], metric)["value"], "k*", ms=9, zorder=5,
                  label="initial model")
        axis.set(xlabel=AXES["infonce"], ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend(title="learning rate", fontsize=7, title_fontsize=7)
    n = rows[0]["metrics"][0]["n"]
    figure.suptitle("Dose: one iteration of exp2_tldr, mini, hand-written principles; small, middle and large points: "
                    f"2, 4, 6 steps of 8 posts\n(development split, {n} posts, 1 seed; bars: ± SEM over posts)",
                    fontsize=10)
    return figure


def main(out: Path) -> None:
    (base,) = (e for e in load_experiment("exp2", "mini") if e.variant == "hand")
    experiment = replace(
        base, name="dose", variant="", iterations=len(GRID), judge=JudgeSpec(),
        data=replace(base.data, evaluation_split="development"),
        train=replace(base.train, batches=max(STEPS), batches_increment=0))
    run = Run(experiment, out / experiment.path, lambda text: print(text, file=sys.stderr))
    with locked(run.folder):
        run.prepare()
        write(run)
        evaluate(run, 0)
        sample(run, 1)
        for number, (rate, steps) in enumerate(GRID, start=1):
            train(run, number, rate, steps)
            evaluate(run, number)
        write_jsonl(run.folder / "judgments.jsonl", [])
        measured = list(records(run))
    keys = ("metric", "principle", "estimator", "value", "sem", "ci95", "n")
    rows = [{"learning_rate": rate, "steps": steps, "metrics": [
        {k: r.get(k) for k in keys} for r in select(measured, iteration=number)]}
        for number, (rate, steps) in enumerate([(0.0, 0), *GRID])]
    write_json(RESULTS / "dose.json", {"config": experiment.to_json(), "points": rows, **{
        k: run.record[k] for k in ("commit", "packages", "device", "threads")}})
    save(draw(rows), RESULTS / "dose")
    print(f"{len(GRID)} points: {RESULTS / 'dose.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
