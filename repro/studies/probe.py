"""probe(principles, model): before anything is trained, which of these principles can the initial model follow, and which
of their antitheses? Each is asked for alone, on development queries, one side and then the other.

A principle both of whose sides a model sometimes follows is one that SAMI can strengthen: the pairs that it trains on
differ in what the principle says. Where one side is never followed, all that the contrast can teach is to be told apart.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from repro.base.records import UserError, locked, read_jsonl, remove_folder, write_json
from repro.base.settings import DataSpec, Experiment, JudgeSpec, ModelSpec, SamplingSpec
from repro.base.training import TrainSpec
from repro.stages.draws import Item
from repro.stages.evaluate import evaluate
from repro.stages.folder import evaluation_file
from repro.stages.measure import following, records
from repro.stages.run import Run
from repro.studies import probed
from repro.text.principles import Constitution
from repro.text.queries import Query, load_queries

SOURCES = {"dialogue": "embedded", "summary": "embedded-tldr"}


@dataclass
class Probed(Run):
    """A run that answers each query under each principle alone, and under its antithesis alone."""

    queries: int = 0

    def items(self, iteration: int = 0) -> list[Item]:
        """An item of a query and a principle, whose name is the subset of its records."""
        asked = _in_turn(self.held_out)[:self.queries]
        return [Item(query, p.name, tuple(Constitution(principles=(p,), sides=(side,)) for side in (True, False)))
                for p in self.constitutions.principles for query in asked]


def _in_turn(queries: Sequence[Query]) -> list[Query]:
    """One of each subset, then the next of each."""
    subsets = [[q for q in queries if q.subset == subset] for subset in dict.fromkeys(q.subset for q in queries)]
    return [q for q in chain.from_iterable(zip_longest(*subsets)) if q]


def probe(principles: str, out: Path, *, task: str = "dialogue", model: ModelSpec, source: str | None = None,
          queries: int = 16, max_new_tokens: int = 48, say: Callable[[str], None]) -> Path:
    """The page of `principles` (a shipped set, or a JSON or TOML file), `out`/<file>/probe.md; beside it probe.json. A
    probe that is stopped goes on with the same command. `source` of `queries` development queries: by default the embedded
    ones of the task. Raises UserError."""
    if queries < 2:
        raise UserError(f"--probe-queries {queries}: must be 2 or more")
    source = source or SOURCES[task]
    counts = {}
    for q in load_queries(source)[0]:
        counts.setdefault(q.split, {}).setdefault(q.subset, 0)
        counts[q.split][q.subset] += 1
    if "development" not in counts:
        raise UserError(f"--queries {source}: no row has the split development; principles are not chosen on what is held "
                        'out: mark some rows with "split": "development"')
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(principles).stem).strip("-.") or "own"
    folder = Path(out) / name
    run, new = Probed(Experiment(
        name="probe", profile=name, constitutions=principles, task=task, iterations=1, model=model,
        sampling=SamplingSpec(batch_size=128, max_new_tokens=max_new_tokens), judge=JudgeSpec(judges=("rule",)),
        data=DataSpec(source=source, subsets=tuple(counts["development"]), train=2, evaluation_split="development",
                      evaluation=-(-queries // len(counts["development"]))),
        train=TrainSpec(batch_size=1, batches=1, batches_increment=0)), folder, say, queries=queries), not folder.exists()
    with locked(folder):
        try:
            run.prepare()
            run.adopt(run.constitutions)
        except UserError:
            if new:
                remove_folder(folder)
            raise
        evaluate(run, 0)
        found = _found(run)
        write_json(folder / "probe.json", found)
        probed.write_page(folder / "probe.md", found)
    return folder / "probe.md"


def _found(run: Probed) -> dict:
    """What the page says: of each principle its records and marks (repro/stages/measure.py), an answer of each side."""
    spec, known = run.experiment, [r for r in records(run, (0,)) if r["metric"] != "mi" or not r.get("principle")]
    marks, answers = following(run, (0,)), read_jsonl(run.folder / evaluation_file(0))
    asked = {q.id: q.text for q in run.held_out}
    rows = []
    for p in run.constitutions.principles:
        sides = {p.name: [row["sides"]["0"][0] for row in marks if row["subset"] == p.name],
                 f"not_{p.name}": [row["sides"]["0"][1] for row in marks if row["subset"] == p.name]}
        shown = {side: next({"query": asked[a["query"]], "text": a["text"]} for a in answers if a["constitution"] == side)
                 for side in sides if not (p.private and side != p.name)}
        rows.append({"name": p.name, "text": p.text, "antithesis": p.antithesis, "rule": p.rule, "marks": sides,
                     "shown": shown, "records": [r for r in known if r["subset"] == p.name]})
    return {"file": Path(spec.constitutions).name, "model": spec.model.label, "task": spec.task,
            "queries": len(rows[0]["marks"][rows[0]["name"]]), "source": Path(spec.data.source).name,
            "max_new_tokens": spec.sampling.max_new_tokens,
            **{k: run.record[k] for k in ("commit", "config_hash", "device", "packages")}, "principles": rows}
