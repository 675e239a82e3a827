"""compare(experiment, objectives): what a run samples once, each objective trained on it, its rate chosen, then held out.

1. The initial model answers the training queries under two constitutions each, and the held-out queries of the development
   and the evaluation split: once.
2. Each objective is trained from the initial weights at each rate of the same grid. Every try answers the development
   queries; kept is the rate with the highest steerability, of equals the lowest, among those whose answers still speak of
   the query (`_rank`).
3. The kept weights answer the evaluation queries under every constitution, without any, and under the all-positive one
   where the user's last sentence asks for its opposite.
4. `path`: the kept rate again with fewer steps, on the development queries.

Every step is a stage of a run folder (stages/folder.py): a comparison that is stopped goes on with the same command.
Weights are kept while they may still be the best, and not after.
"""

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from repro.base.identity import commit
from repro.base.records import UserError, first_line, locked, make_folder, read_json, remove_folder, write_json
from repro.base.settings import Experiment
from repro.base.training import OBJECTIVES, PARAMETERS, WITHOUT_CONSTITUTION, NotTrainable
from repro.stages.evaluate import ask_otherwise, evaluate, score_bare
from repro.stages.folder import checkpoint, evaluation_file, initial_file, logprob_file, training_file
from repro.stages.measure import development_values, held_out_values
from repro.stages.pipeline import write
from repro.stages.run import ANSWERS, Run
from repro.stages.sample import sample, score_initial, train_iteration
from repro.studies import comparison
from repro.text.principles import load_constitutions

GRID = (1.0, 3.0, 10.0)  # of the experiment's own learning rate
ANCHORED = ("sami", {"anchor": 0.3})  # one more row: the authors' `beta`, which was never wired, as an anchor
DEVELOPMENT = 12  # queries by which a rate is chosen


def rows_of(names: Sequence[str], pool: bool) -> dict[str, dict]:
    """What is compared: label -> settings of TrainSpec. By default all that the experiment's constitutions allow."""
    known = {name: {"objective": name} for name in OBJECTIVES if not (pool and name in WITHOUT_CONSTITUTION)}
    known["sami+anchor"] = {"objective": ANCHORED[0], **ANCHORED[1]}
    unknown = [name for name in names if name not in known]
    if unknown:
        why = ": a pool has no positive constitution" if pool and unknown[0] in WITHOUT_CONSTITUTION else ""
        raise UserError(f"--objectives: {unknown[0]!r}{why}; allowed: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--objectives: {', '.join(names)}; each at most once")
    return {name: known[name] for name in names or known}


def compare(experiment: Experiment, out: Path, *, objectives: Sequence[str] = (), rates: Sequence[float] = (),
            path: bool = False, say: Callable[[str], None]) -> Path:
    """The comparison of one seed, worked out in `out`/work; returns its record, `out`/<experiment>-seed-<k>.json, in which
    what an earlier call has put there stays. `path`: of the kept rate also what fewer steps give. Raises UserError."""
    constitutions = load_constitutions(experiment.constitutions)
    if experiment.writer or not any(p.rule for p in constitutions.principles):
        raise UserError("compare: following is measured by rules, and these principles have none; choose others "
                        "(--variant, or an experiment whose constitutions have rules)")
    if experiment.cot or experiment.sampling.reasoning:
        raise UserError("compare: a run that reasons first is not compared (cot, reasoning)")
    grid = sorted(rates or (factor * experiment.train.learning_rate for factor in GRID))
    if len(set(grid)) < len(grid) or not all(0 < rate <= 0.1 for rate in grid):
        raise UserError(f"--rates {' '.join(f'{r:g}' for r in grid)}: each once, above 0 and at most 0.1")
    if path and experiment.iterations > 1:
        raise UserError(f"--path: of one iteration's steps; --iterations: {experiment.iterations}")
    plain = replace(experiment.train, objective="sami", **dict.fromkeys(PARAMETERS))
    wanted = {label: {rate: replace(plain, learning_rate=rate, **settings) for rate in grid}
              for label, settings in rows_of(objectives, bool(constitutions.kinds)).items()}
    base = replace(experiment, train=plain, baseline=None, judge=replace(experiment.judge, judges=("rule",)),
                   data=replace(experiment.data, evaluation_split="evaluation"))
    tuning = replace(base.data, evaluation_split="development", evaluation=min(DEVELOPMENT, base.data.evaluation))
    stem = "-".join(filter(None, (experiment.name, experiment.variant)))
    file = Path(out) / f"{stem}-seed-{experiment.seed}.json"
    about = {"experiment": stem, "profile": base.profile, "model": base.model.label, "iterations": base.iterations,
             "counted": ANSWERS, "rates": grid,
             "train": {k: v for k, v in base.to_json()["train"].items() if k != "learning_rate"}}
    comparison.check(Path(out), about)
    folder = Path(out) / "work" / file.stem
    new = not folder.exists()
    with locked(folder):
        try:
            dev = _begun(replace(base, data=tuning), folder / "development", say)
            test = _begun(base, folder / "evaluation", say)
        except UserError:
            for part in ("development", "evaluation") if new else ():
                remove_folder(folder / part)
            raise
        for run in (dev, test):
            evaluate(run, 0)
            score_bare(run, 0)
        sample(dev, 1)
        ask_otherwise(test, 0)
        record = about | {
            "seed": base.seed, **{k: test.record[k] for k in ("config_hash", "device", "threads", "packages")},
            "queries": list(dict.fromkeys(item.query.id for item in test.items())),
            "constitutions": test.constitutions.count, "initial": held_out_values(test, 0),
            "initial_development": development_values(dev, 0), "objectives": {}}
        if file.is_file() and (before := read_json(file))["config_hash"] == record["config_hash"]:
            record["objectives"] = before["objectives"]
        for label, specs in wanted.items():
            tries = _tried(dev, folder, label, specs, record["initial_development"])
            if all("failed" in t for t in tries):
                raise UserError(f"compare: {label} cannot be trained at any of these rates: {tries[0]['failed']}")
            best = max((t for t in tries if "failed" not in t), key=partial(_rank, record["initial_development"]))
            spec = specs[best["learning_rate"]]
            found = {"objective": spec.objective, **spec.parameters, "commit": commit(),
                     "learning_rate": spec.learning_rate, "tries": tries,
                     "values": _held_out(dev, test, folder, label, spec)}
            if path or "path" in record["objectives"].get(label, {}):
                found["path"] = _path(dev, folder, label, spec)
            record["objectives"][label] = found
        write_json(file, record)
    return file


def _begun(experiment: Experiment, folder: Path, say) -> Run:
    run = Run(experiment, folder, say)
    run.prepare()
    if run.record.get("counted") != ANSWERS:
        raise UserError(f"{folder}: begun by an older version, which counted following otherwise; choose another --out, or "
                        "delete it")
    write(run)
    return run


def _derived(run: Run, train, folder: Path) -> Run:
    """A run like `run`, with its inputs, that trains otherwise, in a folder of its own."""
    other = copy.copy(run)
    other.experiment, other.folder, other.record = replace(run.experiment, train=train), folder, {}
    make_folder(folder)
    facts = ("backend", "counted", "spoken", "dropped_queries", "not_run")
    other.bind(run.inputs.digests(run.date), **{k: run.record[k] for k in facts})
    return other


def _shared(source: Run, target: Run, stage: str, outputs: list[str], inputs: list[str]) -> None:
    """Take a stage's files over from another run, unless they are there."""
    if not target.stage(stage, outputs, inputs):
        return
    for output in outputs:
        make_folder((target.folder / output).parent)
        shutil.copyfile(source.folder / output, target.folder / output)
    target.finish(stage, outputs, inputs, shared=source.folder.name)


def _rank(initial: dict, values: dict) -> tuple:
    """What a try is chosen by. Answers that fit every query follow well and say nothing: one that has lost the query's
    words stands behind all that have not, and there the one that has lost fewest is first."""
    speaks = values["query_words"] >= comparison.SPEAKS * initial["query_words"]
    return speaks, values["steerability" if speaks else "query_words"], -values["learning_rate"]


def _tried(dev: Run, folder: Path, label: str, specs: dict, initial: dict) -> list[dict]:
    """What came out at each learning rate on the development split, or why it failed. Of the objective's weights those of
    the best try so far are kept."""
    tries, best = [], None
    for rate, spec in specs.items():
        trial = _derived(dev, spec, folder / "tries" / f"{label}-{rate:g}")
        weights = (trial.folder / checkpoint(1)).parent
        tries.append({"learning_rate": rate, **_development(dev, trial, f"{label}, learning rate {rate:g}")})
        if "failed" not in tries[-1] and (best is None or _rank(initial, tries[-1]) > best[0]):
            if best:
                remove_folder(best[1])
            best = _rank(initial, tries[-1]), weights
        else:
            remove_folder(weights)
    return tries


def _path(dev: Run, folder: Path, label: str, spec) -> list[dict]:
    """What the kept rate gives with fewer steps, one and more, on the development queries."""
    found = []
    for steps in range(1, spec.batches):
        trial = _derived(dev, replace(spec, batches=steps), folder / "path" / f"{label}-{spec.learning_rate:g}-{steps}")
        found.append({"steps": steps, **_development(dev, trial, f"{label}, {steps} of {spec.batches} steps")})
        remove_folder((trial.folder / checkpoint(1)).parent)
    return found


def _development(dev: Run, trial: Run, name: str) -> dict:
    """The values of a try on the development queries, or why it failed; trained where they are not known yet."""
    done, last = trial.folder / "values.json", dev.experiment.iterations
    if not done.is_file():
        dev.say(f"--- {name}")
        try:
            _trained(dev, trial)
            evaluate(trial, last)
            score_bare(trial, last)
            found = development_values(trial, last)
        except NotTrainable as e:
            dev.say(f"{name}: {e}")
            found = {"failed": first_line(e)}
        write_json(done, found)
    return read_json(done)


def _trained(dev: Run, trial: Run) -> None:
    """Train `trial` on the pairs of `dev`, whose initial matrix is computed by the first that needs it; from the second
    iteration on, on its own."""
    initial = "initial-1", [initial_file(1)], ["sample-1"]
    _shared(dev, trial, "evaluate-0", [evaluation_file(0), logprob_file(0)], trial.written())
    _shared(dev, trial, "sample-1", [training_file(1)], trial.written())
    if "initial-1" in dev.record["stages"] and not dev.stage(*initial):
        _shared(dev, trial, *initial)
    for iteration in range(1, trial.experiment.iterations + 1):
        if iteration > 1:
            sample(trial, iteration)
        score_initial(trial, iteration)
        if iteration == 1 and "initial-1" in trial.record["stages"]:
            _shared(trial, dev, *initial)
        train_iteration(trial, iteration)


def _held_out(dev: Run, test: Run, folder: Path, label: str, spec) -> dict:
    """The values of an objective on the evaluation split, by the weights of its best try."""
    last, name = test.experiment.iterations, f"{label}-{spec.learning_rate:g}"
    final = _derived(test, spec, folder / "held_out" / name)
    done, weights = final.folder / "values.json", final.folder / checkpoint(last)
    trial = _derived(dev, spec, folder / "tries" / name)
    if not done.is_file():
        if not weights.is_dir():
            _trained(dev, trial)  # again, where they went with a smaller comparison
            make_folder(weights.parent)
            (trial.folder / checkpoint(last)).rename(weights)
        final.record["stages"][f"train-{last}"] = trial.record["stages"][f"train-{last}"]
        test.say(f"--- {label}, held out")
        evaluate(final, last)
        score_bare(final, last)
        ask_otherwise(final, last)
    if not done.is_file() or read_json(done).keys() != comparison.MEASURES.keys():  # of a version with other measures
        write_json(done, held_out_values(final, last))
    for run in (trial, final):
        remove_folder((run.folder / checkpoint(1)).parent)
    return read_json(done)
