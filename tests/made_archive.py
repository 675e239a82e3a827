"""A small archive in the authors' layout, with tables that its files reproduce: for tests without the real one."""

import hashlib
import json
from pathlib import Path

import numpy as np

REPO, COMMIT = "someone/record", "0" * 40


def _cell(table, subset, model, writer, cot, iteration, baseline, published, estimator, ties, **more):
    sem = np.sqrt(published * (100 - published) / 250)
    t = (published - 50) / sem
    label = next((x for bound, x in ((3.33, "<.001"), (2.6, "<.01"), (1.97, "<.05")) if abs(t) > bound), ">.05")
    return {"table": table, "experiment": {2: "exp1", 5: "exp2", 9: "exp3"}[table], "subset": subset, "model": model,
            "writer": writer, "cot": cot, "iteration": iteration, "baseline": baseline, "published": published,
            "ci95": [round(published - 1.96 * sem, 2), round(published + 1.96 * sem, 2)], "t": round(t, 2),
            "p": label, "n": 250, "decimals": 2, "estimator": estimator, "ties": ties, "judge": "gpt-4-0613", **more}


def scores(wins: int, ties: int) -> list[list]:
    """250 rows: wins, ties, then losses; lengths alternate around the baseline's 50 tokens, so length is no matter."""
    values = [1] * wins + [0.5] * ties + [0] * (250 - wins - ties)
    return [[v, 50, 60 if i % 2 else 40] for i, v in enumerate(values)]


def cells_and_files():
    tldr, ours = ("tldr", "mistral-7b", "mistral-7b-instruct", None), ("llama3-70b", "claude-opus", True)
    errata = [{"same_as": {"model": "mistral-7b"}, "record": 52.0, "why": "repeated cell"},
              {"explained_by": f"{REPO}/earlier.json", "record": 54.0, "why": "earlier series"}]
    cells = [
        _cell(5, *tldr, 0, "mistral-7b-instruct", 24.8, "raw", "loss"),
        _cell(5, "tldr", "mixtral-8x7b", "mistral-7b-instruct", None, 0, "mistral-7b-instruct", 24.8, "raw", "loss",
              erratum=errata[0]),
        _cell(9, "held_out", *ours, 1, "llama3-70b", 56.2, "raw", "half"),
        _cell(9, "learned", *ours, 1, "llama3-70b", 67.6, "raw", "half", erratum=errata[1]),
        _cell(2, "helpful", "mistral-7b", "claude-opus", None, 1, "mistral-7b", 60.0, "logistic", "loss"),
    ]
    rows = {"a.json": scores(62, 1), "b.json": scores(130, 0), "c.json": scores(138, 5), "d.json": scores(126, 18),
            "e.json": scores(150, 35), "earlier.json": scores(166, 6), "mi.json": [0.5 + i / 1000 for i in range(250)]}
    return cells, rows


def make(root: Path) -> tuple[Path, Path]:
    """(archive folder, folder of published facts)."""
    cells, rows = cells_and_files()
    archive, facts = root / "archive", root / "published"
    (archive / REPO).mkdir(parents=True)
    facts.mkdir()
    keys = ("experiment", "subset", "model", "writer", "cot", "iteration", "baseline")
    entries = []
    for name, values in rows.items():
        (archive / REPO / name).write_text(json.dumps(values))
        entry = {"repo": REPO, "commit": COMMIT, "path": name, "kind": "verdicts", "tables": [], "figures": []}
        if name == "mi.json":
            entry |= {"kind": "mutual_information", "figures": ["figure2a"], "experiment": "exp1", "subset": "helpful",
                      "model": "mistral-7b", "iteration": 0}
        elif name != "earlier.json":
            cell = cells["abcde".index(name[0])]
            entry |= {k: cell[k] for k in keys} | {"tables": [f"table{cell['table']}"]}
        entries.append(entry)
    claims = [
        {"kind": "win_rate", "where": "text", "printed": "56", "estimator": "raw", "ties": "half"}
        | {k: cells[2][k] for k in keys},
        {"kind": "win_rate", "where": "text, by strata", "printed": "67", "estimator": "stratified", "ties": "half"}
        | {k: cells[4][k] for k in keys},
        {"kind": "mutual_information", "where": "text", "printed": "0.62", "experiment": "exp1", "subset": "helpful",
         "model": "mistral-7b", "iteration": 0, "estimator": "mean_of_logs"},
    ]
    (facts / "tables.json").write_text(json.dumps({"cells": cells}))
    (facts / "claims.json").write_text(json.dumps({"claims": claims}))
    (facts / "manifest.json").write_text(json.dumps({"files": entries}))
    rehash(archive, facts)
    return archive, facts


def rehash(archive: Path, facts: Path) -> None:
    """Pin the files as they are now: what someone who alters a verdict would do to the manifest."""
    def pin(entry):
        data = (archive / entry["repo"] / entry["path"]).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit(facts / "manifest.json", lambda m: [pin(e) for e in m["files"]])


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
