"""Settings tried on the development split: what each does to following and to the text -> results/search/<experiment>.json.

A variation is a name and changes to an experiment's parts. Each is one run of one seed, its held-out queries the development
ones, of which few are scored; a search that is stopped goes on. Nothing is chosen on the evaluation split.

Run: .venv/bin/python tests/studies/settings.py exp1 [--variant hand] [--only NAME ...] [--model NAME] [--constitutions FILE]
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

from repro.base.identity import commit
from repro.base.records import read_json, read_jsonl, write_json
from repro.base.settings import ModelSpec, prompt_for
from repro.experiment import load_experiment, only_variant
from repro.report import changes as training
from repro.report.changes import ANSWERS, BOUND, FOLLOWED, TOKENS
from repro.stages.folder import checkpoint
from repro.stages.pipeline import run

RATES = {"exp1": (5e-7, 1e-6, 2e-6, 4e-6), "exp2": (5e-7, 1e-6, 2e-6, 4e-6), "exp3": (1e-6, 2e-6, 4e-6, 8e-6)}
POOL = {"constitutions": "diverse_mini", "sampling": {"max_new_tokens": 64}}


def variations(name: str) -> dict[str, dict]:
    """Name -> changes: of the experiment's own fields, and by part."""
    own = POOL if name == "exp3" else {}
    found = {"as it is": {}} | ({"other styles": own} if own else {})
    for objective in ("sami", "sami_columns", "nca"):
        for rate in RATES[name]:
            found[f"{objective} {rate:g}"] = own | {"train": {"objective": objective, "learning_rate": rate}}
    return found | {
        "sami 2e-06, end scored": own | {"train": {"learning_rate": 2e-6, "score_eos": True}},
        "sami 2e-06, one iteration": own | {"iterations": 1, "train": {"learning_rate": 2e-6}},
        "sami 2e-06, steps 4 each": own | {"train": {"learning_rate": 2e-6, "batches": 4, "batches_increment": 0}},
        "sami 2e-06, anchor 0.1": own | {"train": {"learning_rate": 2e-6, "anchor": 0.1}}}


def changed(experiment, changes: dict, scored: int):
    """The experiment with the changes, on the development split."""
    parts = {k: dataclasses.replace(getattr(experiment, k), **v) for k, v in changes.items() if isinstance(v, dict)}
    own = {k: v for k, v in changes.items() if not isinstance(v, dict)}
    data = dataclasses.replace(parts.get("data", experiment.data), evaluation_split="development", evaluation=64, scored=scored)
    judge = dataclasses.replace(experiment.judge, judges=("rule",))
    return dataclasses.replace(experiment, **own | parts | {"data": data, "judge": judge})


def told(folder: Path) -> dict:
    """Of each subset, what came out: the initial model, the last iteration, and the change with its interval."""
    found = {}
    for line in training.lines(folder.name, {0: read_jsonl(folder / "following.jsonl")}):
        found[line.subset] = {"n": line.value(ANSWERS).n}
        for name, measure in (("steerability", FOLLOWED), ("answered", ANSWERS), ("bound", BOUND), ("length", TOKENS)):
            if line.known(measure):
                change = line.change(measure)
                found[line.subset][name] = {
                    "before": line.value(measure).value, "after": line.value(measure, line.last).value,
                    "change": change.value, "ci95": change.ci95 and list(change.ci95), "sem": change.sem, "n": change.n}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", choices=tuple(RATES))
    parser.add_argument("--variant")
    parser.add_argument("--only", nargs="*", help="names of variations; by default all")
    parser.add_argument("--model", help="another policy than the experiment's")
    parser.add_argument("--constitutions", help="other principles than the experiment's")
    parser.add_argument("--scored", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/search"))
    parser.add_argument("--work", type=Path, default=Path("runs/search"))
    args = parser.parse_args()
    base = only_variant(load_experiment(args.experiment, "mini"), args.variant, args.experiment)[-1]
    if args.model:
        base = dataclasses.replace(base, model=ModelSpec(
            name=args.model, label=Path(args.model).name, prompt=prompt_for(args.model, None) or base.model.prompt))
    if args.constitutions:
        base = dataclasses.replace(base, constitutions=args.constitutions)
    known = variations(args.experiment)
    if unknown := set(args.only or ()) - set(known):
        print(f"settings: --only {sorted(unknown)[0]!r}: unknown; allowed: {', '.join(map(repr, known))}", file=sys.stderr)
        raise SystemExit(2)
    stem = "-".join(filter(None, (args.experiment, base.variant, args.model and base.model.label,
                                  args.constitutions and Path(args.constitutions).stem)))
    file = args.out / f"{stem}.json"
    record = read_json(file) if file.is_file() else {}
    for k, (name, changes) in enumerate(known.items()):
        if name in record or (args.only and name not in args.only):
            continue
        experiment = dataclasses.replace(changed(base, changes, args.scored), name=f"search_{stem}_{k}")
        folder = run(experiment, args.work)
        record[name] = {"changes": changes, "commit": commit(), "subsets": told(folder),
                        "seconds": sum(s["seconds"] for s in read_json(folder / "run.json")["stages"].values())}
        write_json(file, record)
        for iteration in range(1, experiment.iterations + 1):
            shutil.rmtree(folder / checkpoint(iteration), ignore_errors=True)
        for subset, row in record[name]["subsets"].items():
            print(f"{name}, {subset}: steerability {row['steerability']['before']:.2f} -> {row['steerability']['after']:.2f} "
                  f"({row['steerability']['change']:+.3f} +- {row['steerability']['sem']:.3f}), answers {row['answered']['before']:.2f} -> "
                  f"{row['answered']['after']:.2f}, bound {row['bound']['before']:.2f} -> {row['bound']['after']:.2f}, "
                  f"tokens {row['length']['before']:.0f} -> {row['length']['after']:.0f}", flush=True)


if __name__ == "__main__":
    main()
