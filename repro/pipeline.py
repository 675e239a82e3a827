"""run(experiment): queries -> constitutions -> evaluate -> [sample -> train -> evaluate] x iterations -> judge -> metrics
-> report.

Each stage leaves files in the run directory and then a line in run.json with the sha256 of each (repro/rundir.py). The
same command skips a stage whose config, inputs and files match, and does the rest: a run that was killed anywhere ends
with the same bytes (same machine, versions and thread count).
"""

import gc
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from repro import lora, seam, worker
from repro.config import Experiment, JudgeSpec
from repro.constitutions import Constitution, constitutions_of
from repro.endpoint import Endpoint
from repro.evaluation import (
    add_judgments,
    evaluate,
    evaluate_baseline,
    greet_judge,
    held_out_pairs,
    judge,
    llm_judgments,
    measure,
)
from repro.records import Query, UserError, digest, locked, read_json, read_jsonl, seal
from repro.report import report_figures, write_report
from repro.rundir import Run, checkpoint, evaluation_file, open_run, training_file
from repro.sampling import sample_to_file
from repro.writing import LocalWriter, ServerWriter, written_constitutions

MERGE_CHECKED = 4  # held-out queries: in float32 on a CPU, minutes for 7 billion parameters


def run(experiment: Experiment, out: Path | str = "runs", *, say: Callable[[str], None] | None = None,
        endpoint: Endpoint | None = None, writer_endpoint: Endpoint | None = None, ranks: int = 1,
        nodes: int = 1, sampler_url: str | None = None, tensor_parallel: int | None = None) -> Path:
    """Run the experiment (or what is left of it) in `out`/<name>/<profile>[/<variant>]; returns that folder. `endpoint`
    is where the LLM judge is, `writer_endpoint` the principle writer, by default the hosted one; `ranks` is how many
    processes train (on each of `nodes` machines), each on a GPU where there are any; a server samples at `sampler_url`, or
    is started on `tensor_parallel` GPUs (repro/serving.py).

    Raises UserError for any input that cannot be used, before a model loads and with nothing half-written.
    """
    say = say or _say
    worker.check_ranks(ranks, nodes)
    folder = Path(out) / experiment.path
    run = Run(experiment, folder, say, endpoint=endpoint, writer_endpoint=writer_endpoint, ranks=ranks, nodes=nodes,
              sampler_url=sampler_url, tensor_parallel=tensor_parallel)
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
                                    controls=run.controls(), seed=run.experiment.seed))
    if run.constitutions is run.by_hand:
        run.record["not_run"].append(f"writer {spec.label}: wrote nothing that can be used; the principles are those of "
                                     f"{run.experiment.constitutions}")
    run.finish("write", outputs, [], writer=run.constitutions.writer)


def sample(run: Run, iteration: int) -> None:
    """Pairs of responses to training queries by the previous iteration's model -> responses/training-k.jsonl."""
    name, outputs = f"sample-{iteration}", [training_file(iteration)]
    inputs = [f"train-{iteration - 1}"] if iteration > 1 else run.written()
    if not run.stage(name, outputs, inputs):
        return
    jobs = [(query, constitution) for query, pair in run.training_plan(iteration) for constitution in pair]
    texts = [run.prompt(c, q, run.experiment.seed, iteration, "sample", c.id, sample=True, reason=run.form.cot)
             for q, c in jobs]
    rows = sample_to_file(run, jobs, texts, iteration - 1, run.folder / training_file(iteration), name)
    run.finish(name, outputs, inputs, responses=len(rows))


def usable_pairs(run: Run, iteration: int) -> tuple[list[tuple[Query, tuple[Constitution, ...], list[dict]]], Counter]:
    """The sampled pairs that may train, in order, each with its two rows, and the dropped ones counted by the first reason
    that holds."""
    rows = [row for _, row in read_jsonl(run.folder / training_file(iteration))]
    plan = run.training_plan(iteration)
    kept, dropped = [], Counter()
    for k, (query, pair) in enumerate(plan):
        both = rows[2 * k: 2 * k + 2]
        responses = [row["text"] for row in both]
        phrase = next((p for p in run.experiment.sampling.drop_phrases if any(p in r for r in responses)), None)
        if not all(row.get("closed", True) for row in both):
            dropped["reasoning not closed"] += 1
        elif not all(row["text"].strip() and row.get("ids", True) for row in both):
            dropped["empty"] += 1
        elif responses[0].strip() == responses[1].strip():
            dropped["identical"] += 1
        elif phrase is not None:
            dropped[f"phrase {phrase!r}"] += 1
        elif run.experiment.sampling.full_stop and not responses[0].rstrip().endswith("."):
            dropped["no full stop"] += 1
        else:
            kept.append((query, pair, both))
    return kept, dropped


def train_iteration(run: Run, iteration: int) -> None:
    """Train from the initial weights on this iteration's pairs -> checkpoints/iteration-k."""
    from repro import training

    name, inputs, outputs = f"train-{iteration}", [f"sample-{iteration}"], [checkpoint(iteration)]
    if not run.stage(name, outputs, inputs):
        return worker.clear(run.folder, iteration)
    spec, folder = run.experiment, run.folder / checkpoint(iteration)
    kept, dropped = usable_pairs(run, iteration)
    need = spec.train.queries_needed(iteration)
    run.say(f"{name}: {len(kept)} pairs usable, {need} needed"
            + "".join(f"; dropped {n}: {why}" for why, n in sorted(dropped.items())))
    seam.tell_old(run, [row for _, _, both in kept for row in both], training_file(iteration))
    pairs = [training.TrainingPair(
        query=q.id, responses=tuple(seam.said(run.tokenizer, row, " " if spec.model.prompt == "plain" else "")
                                    for row in both),
        prompts=tuple(seam.scored_prompt(run, run.prompt(c, q, spec.seed, iteration, "train", c.id, sample=False))
                      for c in pair)) for q, pair, both in kept]
    if len(kept) < need:
        done = len(kept) + sum(dropped.values())
        raise UserError(f"iteration {iteration}: {len(kept)} pairs of responses are left of the {need} that it trains on: "
                        f"{sum(dropped.values())} of {done} sampled were dropped ("
                        + ", ".join(f"{why}: {n}" for why, n in sorted(dropped.items()))
                        + "); give another run (--name) more training queries, a smaller --batch-size or fewer --iterations"
                        + ", or other --drop-phrases" * any(why.startswith("phrase") for why in dropped)
                        + (", or, where training has made the responses alike, a lower --learning-rate"
                           if iteration > 1 and 2 * (dropped["identical"] + dropped["empty"]) > done else ""))
    worker.write_job(run.folder, iteration, model=run.place, pairs=pairs, spec=spec.train, key=run.key(inputs),
                     backend=run.record["backend"], out=checkpoint(iteration), seed=spec.seed)
    with tqdm(total=need, desc=name, unit="query") as bar:
        trace = worker.train(run.folder, iteration, run.ranks, on_query=bar.update, nodes=run.nodes)
    gc.collect()
    merged = {"merged": check_merged(run, iteration)} if spec.train.lora else {}
    seal(folder, digest([run.record["config_hash"], iteration]))
    run.finish(name, outputs, inputs, trace=trace, dropped_pairs=dict(dropped), ranks=run.ranks * run.nodes, **merged)
    worker.clear(run.folder, iteration)


def check_merged(run: Run, iteration: int) -> dict:
    """`lora.merged_difference` on the initial model's responses to some held-out queries, two constitutions each."""
    every = list(held_out_pairs(run, [row for _, row in read_jsonl(run.folder / evaluation_file(0))]))
    some = every[:: math.ceil(len(every) / MERGE_CHECKED)]
    facts = lora.merged_difference(
        run.folder / checkpoint(iteration), run.place, run.tokenizer, run.experiment.train,
        [texts[:2] for _, texts, _ in some], [responses[:2] for _, _, responses in some], run.record["backend"])
    run.say("train-{}: the saved model is within {max_abs_difference_nats:.1e} nats of the trained one ({pairs} summed "
            "log-probs of {queries} held-out queries)".format(iteration, **facts))
    return facts


def report(run: Run, *, again: bool = False) -> None:
    """figures/ and report.html, from the files of the run and what is known of its judges (results/judges)."""
    outputs = [*report_figures(run.folder), "report.html"]
    if not run.stage("report", outputs, ["metrics"], again=again):
        return
    write_report(run.folder)
    run.finish("report", outputs, ["metrics"])
