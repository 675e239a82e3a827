"""The paper's published numbers, recomputed from the authors' own per-item record. No torch.

1. arithmetic: interval, t and p of all 54 rows from the printed win rate and n alone;
2. cells: each of the 54 from its file of verdicts, under the estimator and tie rule that the paper used;
3. claims: what abstract and text say, each with its estimator;
4. `beyond.common_rule` and `beyond.record`: the same comparisons under one rule, and what else the files say;
5. `verify_run`: a run of ours against the printed cells.
"""

import time
from pathlib import Path

import numpy as np
from scipy import stats

from repro.base import metrics, records
from repro.base.records import UserError
from repro.paper import beyond
from repro.paper.archive import (
    KEYS,
    PUBLISHED,
    Archive,
    archive_root,
    estimate,
    feed,
    load_cells,
    load_manifest,
    name,
    series,
)
from repro.paper.page import page

ARITHMETIC_SLACK = 0.1  # points or units of t; what a listed row (Table 8) may be off by, far above its 0.07
P_LABELS = ((0.001, "<.001"), (0.01, "<.01"), (0.05, "<.05"))


def _as_printed(value: float, c: dict) -> bool:
    return abs(value - c["published"]) < 0.5 * 10 ** -c["decimals"] + 1e-9


def check_arithmetic(cells: list[dict]) -> list[dict]:
    """Interval, t and p from the printed win rate and n, within what the printed rounding allows."""
    out = []
    for c in cells:
        unit = 0.5 * 10 ** -c["decimals"]
        around = [metrics.normal_interval(c["published"] + d, c["n"]) for d in (-unit, 0, unit)]
        ts = [a[2] for a in around]
        deviations = [round(e - p, 4) for e, p in zip((*around[1][1], ts[1]), (*c["ci95"], c["t"]))]
        inside = all(min(a[1][k] for a in around) - unit - 1e-9 <= c["ci95"][k]
                     <= max(a[1][k] for a in around) + unit + 1e-9 for k in (0, 1))
        inside = inside and min(ts) - 0.005 - 1e-9 <= c["t"] <= max(ts) + 0.005 + 1e-9
        p = float(2 * stats.t.sf(abs(ts[1]), c["n"] - 1))
        label = next((text for bound, text in P_LABELS if p < bound), ">.05")
        listed = c.get("interval_differs") and max(map(abs, deviations)) <= ARITHMETIC_SLACK
        status = "PASS" if inside and label == c["p"] else "DIFFERS" if listed else "FAIL"
        out.append({k: c[k] for k in ("table", *KEYS, "published", "n")} | {
            "printed": {"ci95": c["ci95"], "t": c["t"], "p": c["p"]}, "p": p, "p_label": label,
            "recomputed": {"ci95": list(around[1][1]), "t": ts[1]}, "deviation": deviations,
            "status": status})
    return out


def check_cells(cells: list[dict], archive: Archive) -> list[dict]:
    """Each cell from its file. A listed erratum must still be wrong, and explained, in the way it was."""
    out = []
    for c in cells:
        entry = feed(c, archive)
        row = {k: c[k] for k in ("table", *KEYS, "published", "n", "estimator", "ties", "judge")}
        row |= {"recomputed": None, "sem": None, "residual": None, "why": None,
                "file": f"{entry['repo']}/{entry['path']}" if entry else None, "status": "NOT RUN"}
        if entry:
            got = estimate(archive.verdicts(entry), c["estimator"], c["ties"])
            row |= {"recomputed": got.value, "sem": got.sem, "residual": got.value - c["published"]}
            if c["estimator"] == "logistic":
                close = abs(row["residual"]) <= beyond.TOLERANCE
                row["status"] = "PASS" if close else "NOT REPRODUCED" if c.get("fit_misses") else "FAIL"
                row["why"] = None if close else c.get("fit_misses")
            elif _as_printed(got.value, c):
                row["status"] = "FAIL" if c.get("erratum") else "PASS"
            else:
                row["status"] = "ERRATUM" if _explained(c, got.value, cells, archive) else "FAIL"
                row["why"] = c.get("erratum", {}).get("why")
        out.append(row)
    return out


def _explained(c: dict, value: float, cells: list[dict], archive: Archive) -> bool:
    """True if the record gives the erratum's value, and the printed one is where the erratum says."""
    erratum = c.get("erratum")
    if not erratum or not _as_printed(value, c | {"published": erratum["record"]}):
        return False
    if "same_as" in erratum:
        twin = {k: c[k] for k in ("table", *KEYS)} | erratum["same_as"]
        return any(all(o[k] == v for k, v in twin.items()) and o["published"] == c["published"]
                   and o["ci95"] == c["ci95"] and o["t"] == c["t"] for o in cells)
    source = [e for e in archive.entries if f"{e['repo']}/{e['path']}" == erratum["explained_by"]]
    return any(_as_printed(estimate(archive.verdicts(e), c["estimator"], c["ties"]).value, c) for e in source)


def check_claims(claims: list[dict], archive: Archive) -> list[dict]:
    """Each quoted number, rounded or truncated; each trend from the first to the last iteration."""
    out = []
    for c in claims:
        row = c | {"recomputed": None, "status": "NOT RUN", "note": None}
        keys = {k: c[k] for k in (*KEYS, "experiment") if k in c}
        if c["kind"] == "trend":
            values = [e.value for e in series(archive, c["metric"], **keys).values()]
            if len(values) == 4:
                steps = np.diff(values) * (1 if c["printed"] == "rises" else -1)
                row |= {"recomputed": values, "status": "PASS" if sum(steps) > 0 else "FAIL",
                        "note": "at every step" if (steps > 0).all() else "overall, not at every step"}
            out.append(row)
            continue
        if c["kind"] == "win_rate":
            found = [e for e in archive.find("verdicts", **keys) if e.get("tables")]
            got = [estimate(archive.verdicts(e), c["estimator"], c["ties"]) for e in found]
        else:
            got = [metrics.mean(archive.mutual_information(e)) for e in archive.find(c["kind"], **keys)]
        if len(got) == 1:
            value, digits = got[0].value, len(c["printed"].partition(".")[2])
            if c["printed"].startswith(">"):
                ok = value > float(c["printed"][1:])
                low, high = got[0].ci95
                row["note"] = f"95 % interval {low:.1f} to {high:.1f}" + (", which holds 50" if low <= 50 <= high else "")
            else:
                scaled, printed = value * 10**digits, float(c["printed"]) * 10**digits
                rounded, truncated = (abs(f(scaled + 1e-9) - printed) < 1e-6 for f in (np.round, np.floor))
                ok = rounded or truncated
                row["note"] = "rounded" if rounded else "truncated" if truncated else None
            row |= {"recomputed": value, "sem": got[0].sem, "status": "PASS" if ok else "FAIL"}
        out.append(row)
    return out


# ---- the commands

def verify(archive: Path | None, out: Path, *, strict: bool = False, responses: bool = False,
           base_url: str | None = None, published: Path = PUBLISHED) -> int:
    """Print the table, write `out/verify.json` and `out/README.md`; 1 on a FAIL (strict: on NOT RUN too).

    `responses` downloads the texts too (20 MB) where no local copy has them; they show identical pairs.
    """
    began = time.perf_counter()
    cells, entries = load_cells(published / "tables.json"), load_manifest(published / "manifest.json")
    kinds = ("verdicts", "mutual_information", *(["responses"] if responses else []))
    record = Archive(archive_root(archive, kinds=kinds, base_url=base_url, entries=entries), entries)
    for e in entries:  # a file that feeds no cell is checked all the same
        if e["kind"] in ("verdicts", "mutual_information"):
            getattr(record, e["kind"])(e)
    claims = records.read_json(published / "claims.json")["claims"]
    result = {"cells": check_cells(cells, record), "arithmetic": check_arithmetic(cells),
              "claims": check_claims(claims, record), "common_rule": beyond.common_rule(cells, record),
              "record": beyond.record(cells, record)}
    for c in result["cells"]:
        got = "-" if c["recomputed"] is None else f"{c['recomputed']:.2f}"
        print(f"Table {c['table']}  {name(c):<78} printed {c['published']:>5.2f}  record {got:>5}  "
              f"{c['status']}")
    for part in ("arithmetic", "claims"):
        for r in result[part]:
            if r["status"] != "PASS":
                if part == "claims":
                    what = f"{r['where']}: printed {r['printed']}, record {r['recomputed']}"
                else:
                    what = f"Table {r['table']}, {name(r)}: deviation of [low, high, t] {r['deviation']}"
                print(f"{part}: {what}  {r['status']}")
    for part in ("cells", "arithmetic", "claims"):
        states = [r["status"] for r in result[part]]
        print(f"{part}: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states))))
    records.write_json(out / "verify.json", result)
    records.write_text(out / "README.md", page(result))
    print(f"{out / 'README.md'} tells it in words ({time.perf_counter() - began:.1f} s)")
    states = [r["status"] for part in ("cells", "arithmetic", "claims") for r in result[part]]
    return int("FAIL" in states or (strict and "NOT RUN" in states))


RECORD_FIELDS = ("metric", "subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator",
                 "ties", "length", "seed", "value", "sem", "ci95", "n")


def _apart(r: dict, c: dict) -> list[str]:
    """What keeps a record of ours from being compared with a published cell, as words."""
    want = {k: c[k] for k in ("subset", "iteration", "model", "writer", "cot", "baseline", "judge", "ties")}
    want["length"] = c["estimator"]
    return [f"{k} {r[k]} (paper: {v})" for k, v in want.items() if r[k] != v]


def verify_run(run: Path, *, strict: bool = False) -> int:
    """Compare RUN/metrics.json with the published cells; 1 if one DIFFERS (strict: or could not be compared).

    Comparable are only cells and records of one model, writer, baseline, judge, tie rule and length control.
    """
    path, cells = Path(run) / "metrics.json", load_cells()
    rows = records.read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of records, found {type(rows).__name__}")
    for i, r in enumerate(rows):
        missing = [f for f in RECORD_FIELDS if not isinstance(r, dict) or f not in r]
        if missing:
            raise UserError(f"{path}: record {i}: field {missing[0]}: missing")
        if r["metric"] == "win_rate" and not (type(r["value"]) in (int, float) and 0 <= r["value"] <= 100):
            raise UserError(f"{path}: record {i}: field value: expected 0 to 100, found {r['value']!r}")
        if r["metric"] == "win_rate" and not (type(r["n"]) is int and r["n"] > 0):
            raise UserError(f"{path}: record {i}: field n: expected a whole number above 0, found {r['n']!r}")
    rates = [r for r in rows if r["metric"] == "win_rate" and r.get("principle") is None]
    subsets = {r["subset"] for r in rows}
    states = []
    own = [[r for r in rates if not _apart(r, c)] for c in cells]
    spare = [r for r in rates if not any(r in rows for rows in own)]
    for c, same in zip(cells, own):
        if c["subset"] not in subsets:
            continue
        for r in same:
            low, high = metrics.difference_interval(r["value"], r["n"], c["published"], c["n"])
            d = r["value"] - c["published"]
            states.append("PASS" if low <= 0 <= high else "DIFFERS")
            print(f"Table {c['table']}  {name(c)}: published {c['published']:.2f} (n {c['n']}), run "
                  f"{r['value']:.2f} (n {r['n']}, seed {r['seed']}), difference {d:+.2f} "
                  f"[{low:.2f}, {high:.2f}]  {states[-1]}")
        if not same:
            near = [(_apart(r, c), r) for r in spare if all(r[k] == c[k] for k in ("subset", "iteration"))]
            states.append("NOT COMPARABLE" if near else "NOT RUN")
            apart, r = min(near, key=lambda each: len(each[0]), default=(["no record"], None))
            why = "; ".join(apart)
            if len(apart) == 1 and apart[0].startswith("judge ") and r["ci95"]:  # the paper's is retired: for the eye alone
                why += (f"; published {c['published']:.2f} (n {c['n']}), run {r['value']:.2f} [{r['ci95'][0]:.2f}, "
                        f"{r['ci95'][1]:.2f}] (n {r['n']}), difference {r['value'] - c['published']:+.2f}")
            print(f"Table {c['table']}  {name(c)}: {why}  {states[-1]}")
    print(f"{run}: " + (", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
                        or "no cell of the paper has a subset of this run"))
    if not {"PASS", "DIFFERS"} & set(states):
        print("nothing was compared: this run neither confirms nor contradicts the paper")
    return int("DIFFERS" in states or (strict and set(states) != {"PASS"}))
