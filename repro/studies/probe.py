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

from repro.base.checks import choose
from repro.base.records import UserError, digest, locked, read_jsonl, remove_folder, write_json
from repro.base.settings import DataSpec, Experiment, JudgeSpec, ModelSpec, SamplingSpec
from repro.stages.draws import Item
from repro.stages.evaluate import evaluate
from repro.stages.folder import evaluation_file
from repro.stages.measure import following, records
from repro.stages.run import Run
from repro.studies import probed
from repro.text.principles import Constitution, load_constitutions
from repro.text.queries import Query, load_queries

SOURCES = {"dialogue": "embedded", "summary": "embedded-tldr"}


@dataclass
class Probed(Run):
    """A run that answers each query under each principle alone, and under its antithesis alone."""

    queries: int = 0
    trains = False

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
    """The page of `principles` (a shipped set, or a JSON or TOML file), `out`/<file>.md; beside it <file>.json. A probe
    that is stopped goes on with the same command; another file, model or source is another probe (in `out`/work). `source`
    of `queries` development queries: by default the embedded ones of the task. Raises UserError."""
    if queries < 2:
        raise UserError(f"--probe-queries {queries}: must be 2 or more")
    source = source or SOURCES[choose("--task", task, tuple(SOURCES))]
    try:
        constitutions = load_constitutions(principles)
    except UserError as e:
        raise UserError(str(e).replace("--constitutions ", "principles ", 1)) from None
    every = [q for q in load_queries(source)[0] if q.split == "development"]
    if len(every) < 2:
        raise UserError(f"--queries {source}: {len(every)} of its rows have the split development, and at least 2 are "
                        'needed (principles are not chosen on what is held out): mark some with "split": "development"')
    subsets = tuple(dict.fromkeys(q.subset for q in every))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(principles).stem).strip("-.") or "own"
    about = [constitutions.to_json(), [(q.subset, q.text) for q in every], task, model.name, model.prompt, queries,
             max_new_tokens]
    run = Probed(Experiment(
        name="probe", profile=name, constitutions=principles, task=task, iterations=1, model=model,
        sampling=SamplingSpec(batch_size=128, max_new_tokens=max_new_tokens), judge=JudgeSpec(judges=("rule",)),
        data=DataSpec(source=source, subsets=subsets, train=1, evaluation_split="development", truncate=True,
                      evaluation=-(-queries // len(subsets)))),
        Path(out) / "work" / f"{name}-{digest(about)[:12]}", say, queries=queries)
    new = not run.folder.exists()
    with locked(run.folder):
        try:
            run.prepare()
            run.adopt(run.constitutions)
        except UserError:
            if new:
                remove_folder(run.folder)
            raise
        evaluate(run, 0)
        found = _found(run)
    write_json(Path(out) / f"{name}.json", found)
    probed.write_page(Path(out) / f"{name}.md", found)
    return Path(out) / f"{name}.md"


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
