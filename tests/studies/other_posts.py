"""The models of a finished run of exp2, evaluated on other posts: what was learned on ours, on real ones.

Run: .venv/bin/python tests/studies/other_posts.py RUN POSTS.jsonl OUT
RUN is runs/exp2_tldr/mini/<variant>; POSTS holds the run's training posts and other held-out ones, all with subset "tldr".
The result lies in OUT/exp2_tldr_real/mini/<variant>, like a run's, but nothing was trained for it.
"""

import sys
from dataclasses import replace
from pathlib import Path

from repro.base.records import locked, read_json
from repro.stages.evaluate import evaluate, judge
from repro.stages.folder import checkpoint
from repro.stages.measure import measure
from repro.stages.pipeline import report
from repro.stages.run import Run, open_run
from repro.text.principles import constitutions_of


def main(finished: Path, posts: Path, out: Path) -> None:
    def say(text):
        print(text, file=sys.stderr, flush=True)

    source = open_run(finished, say).experiment
    experiment = replace(source, name="exp2_tldr_real", writer=None, data=replace(
        source.data, source=str(posts), evaluation=10**9), sampling=replace(source.sampling, batch_size=64))
    run = Run(experiment, out / experiment.path, say)
    with locked(run.folder):
        run.prepare()
        by_hand = finished / ("by_hand.json" if source.writer else "constitutions.json")
        run.by_hand = constitutions_of(read_json(by_hand), str(by_hand))
        run.adopt(constitutions_of(read_json(finished / "constitutions.json"), "finished"))
        run.experiment = replace(experiment, writer=source.writer)  # whose rules measure following
        evaluate_with_checkpoints(run, finished)
    print(run.folder / "report.html")


def evaluate_with_checkpoints(run: Run, finished: Path) -> None:
    run.written = lambda: []  # nothing is written here
    if not (run.folder / "checkpoints").exists():
        (run.folder / "checkpoints").symlink_to((finished / "checkpoints").resolve())
    evaluate(run, 0)
    for iteration in range(1, run.experiment.iterations + 1):
        outputs = [checkpoint(iteration)]
        if run.stage(f"train-{iteration}", outputs, []):
            run.finish(f"train-{iteration}", outputs, [], trained_in="exp2_tldr")
        evaluate(run, iteration)
    judge(run)
    measure(run)
    report(run)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
