"""run(experiment): queries -> constitutions -> evaluate -> [sample -> train -> evaluate] x iterations -> judge -> metrics
-> report.

Each stage leaves files in the run directory and then a line in run.json with the sha256 of each (folder.py). The
same command skips a stage whose config, inputs and files match, and does the rest: a run that was killed anywhere ends
with the same bytes (same machine, versions and thread count).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from repro.base.records import UserError, locked, read_json
from repro.base.settings import Experiment, JudgeSpec
from repro.report.publish import report_figures, write_report
from repro.sampling.writers import LocalWriter, ServerWriter, written_constitutions
from repro.servers.endpoint import Endpoint
from repro.stages import jobs
from repro.stages.evaluate import add_judgments, evaluate, evaluate_baseline, greet_judge, judge, llm_judgments
from repro.stages.measure import measure
from repro.stages.run import Run, open_run
from repro.stages.sample import sample, score_initial, train_iteration
from repro.text.principles import constitutions_of


def run(experiment: Experiment, out: Path | str = "runs", *, say: Callable[[str], None] | None = None,
        endpoint: Endpoint | None = None, writer_endpoint: Endpoint | None = None, ranks: int = 1,
        nodes: int = 1, sampler_url: str | None = None, sampler_as_is: bool = False,
        tensor_parallel: int | None = None) -> Path:
    """Run the experiment (or what is left of it) in `out`/<name>/<profile>[/<variant>]; returns that folder. `endpoint`
    is where the LLM judge is, `writer_endpoint` the principle writer, by default the hosted one; `ranks` is how many
    processes train (on each of `nodes` machines), each on a GPU where there are any; a server samples at `sampler_url`, or
    is started on `tensor_parallel` GPUs (repro/sampling/launch.py).

    Raises UserError for any input that cannot be used, before a model loads and with nothing half-written.
    """
    say = say or _say
    jobs.check_ranks(ranks, nodes)
    folder = Path(out) / experiment.path
    run = Run(experiment, folder, say, endpoint=endpoint, writer_endpoint=writer_endpoint, ranks=ranks, nodes=nodes,
              sampler_url=sampler_url, sampler_as_is=sampler_as_is, tensor_parallel=tensor_parallel)
    with locked(folder):
        new = not (folder / "run.json").exists()
        try:
            run.prepare()
            greet_judge(run)
            write(run)
            evaluate(run, 0)
        except Exception:
            if new and not run.record.get("stages"):
                run.abandon()
            raise
        evaluate_baseline(run)
        for iteration in range(1, experiment.iterations + 1):
            sample(run, iteration)
            score_initial(run, iteration)
            train_iteration(run, iteration)
            evaluate(run, iteration)
        judge(run)
        measure(run)
        report(run)
    return folder


def check_together(experiments: Sequence[Experiment], out: Path | str, servers: Sequence[dict] = ()) -> None:
    """Check the inputs of every run of an experiment, and that their results can stand side by side, before the first of
    them begins. `servers`: of each, what `run` is told of them (`endpoint`, ...). Raises UserError."""
    runs, lines, together = [], {}, Path(out) / experiments[0].name / experiments[0].profile
    if (together / "run.json").is_file() and "variants" not in read_json(together / "run.json"):
        raise UserError(f"{together} holds a single run; choose another OUT or --name, or delete the folder")
    for experiment, known in zip(experiments, servers or [{}] * len(experiments)):
        writer = experiment.writer and experiment.writer.label
        other = lines.setdefault((experiment.model.label, writer, experiment.cot), experiment.variant)
        if other != experiment.variant:
            raise UserError(f"the runs {other} and {experiment.variant} cannot be told apart in metrics.json: their "
                            "models' labels, writers or chain of thought must differ; choose one with --variant")
        runs.append(Run(experiment, Path(out) / experiment.path, lambda text: None, **known))
        runs[-1].check()
    if len({len(run.items()[0].constitutions) for run in runs}) > 1:
        raise UserError(f"{together}: the runs have different numbers of constitutions; their bounds cannot stand side by "
                        "side; choose one with --variant")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def judge_run(folder: Path | str, spec: JudgeSpec, endpoint: Endpoint, *, dry_run: bool = False, reparse: bool = False,
              say: Callable[[str], None] = _say) -> list[dict]:
    """Judge the stored responses of a finished run with the LLM judge of `spec`: its judgments, metrics, figure and
    page join those of the run. Returns the judgments. `dry_run` says what it would cost and changes nothing."""
    if not (Path(folder) / "run.json").is_file():
        open_run(folder, say)  # says what is wrong, before a lock makes the folder
    with locked(Path(folder)):
        run = open_run(folder, say)
        run.endpoint = endpoint
        rows = llm_judgments(run, spec, dry_run=dry_run, reparse=reparse)
        if not dry_run:
            add_judgments(run, spec.label, rows)
            measure(run)
            report(run, again=True)  # what is known of the judge may have changed since
    return rows


def write(run: Run) -> None:
    """The constitutions of the run -> constitutions.json: those of its file, or those that its writer writes, whose raw
    answers lie in writing.jsonl."""
    spec = run.experiment.writer
    if spec is None:
        return run.adopt(run.constitutions)
    outputs = ["constitutions.json", "by_hand.json", "writing.jsonl"]
    if not run.stage("write", outputs, []):
        path = run.folder / "constitutions.json"
        return run.adopt(constitutions_of(read_json(path), str(path)))
    how = {"label": spec.label, "temperature": spec.temperature}
    writer = LocalWriter(spec.model, **how, date=run.date) if spec.kind == "local" else ServerWriter(
        run.writer_endpoint, run.folder / "writer_requests.jsonl", say=run.say, **how)
    run.adopt(written_constitutions(writer, spec.asked, run.folder, instead=run.by_hand, say=run.say,
                                    controls=run.voice.controls(), seed=run.experiment.seed))
    if run.constitutions is run.by_hand:
        run.record["not_run"].append(f"writer {spec.label}: wrote nothing that can be used; the principles are those of "
                                     f"{run.experiment.constitutions}")
    run.finish("write", outputs, [], writer=run.constitutions.writer)


def report(run: Run, *, again: bool = False) -> None:
    """figures/ and report.html, from the files of the run and what is known of its judges (results/judges)."""
    outputs = [*report_figures(run.folder), "report.html"]
    if not run.stage("report", outputs, ["metrics"], again=again):
        return
    write_report(run.folder)
    run.finish("report", outputs, ["metrics"])
