"""The page of a run or of an experiment: what came out in words, six numbers, figures, the responses side by side, every
value, where it comes from. No torch, no network. What it shows is escaped where page.html takes it in, and nowhere else.

The pages of paper/ and plan/ are Markdown, sentences around numbers: Python's strings say that more plainly than templates.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from repro.base.records import UserError, loads, read_text, write_text
from repro.base.settings import safe_name
from repro.judges.standing import standing
from repro.report import look
from repro.report.changes import AMONG, ANSWERS, BOUND, FOLLOWED, TOKENS, WINS, Line, Measure, of_side, verdict
from repro.report.figures import SERIES, language_models, named, select, telling
from repro.report.look import LABELS, MEANINGS
from repro.report.story import sentences
from repro.text.answers import FAULTS
from repro.text.rules import RULES


def _cell(row: dict, digits: int) -> dict:
    """A value and its interval; its n instead for one value, or equal ones."""
    around = f"n {row['n']}" if row["ci95"] is None else f"[{row['ci95'][0]:.{digits}f}, {row['ci95'][1]:.{digits}f}]"
    return {"value": f"{row['value']:.{digits}f}", "around": around}


def _values(metrics: list[dict]) -> tuple[list[int], list[tuple]]:
    """Every value: the iterations, and rows of (what, of which line, seed, a cell or None for each iteration, last less
    first, n)."""
    rows, tell = [], telling(metrics)
    fields = ("metric", "estimator", "judge", "baseline", "ties", "length", "principle")
    found: dict[tuple, dict[int, dict]] = {}
    for r in sorted(metrics, key=lambda r: list(LABELS).index(r["metric"])):
        found.setdefault(tuple(r.get(f) for f in (*fields, *SERIES, "seed")), {})[r["iteration"]] = r
    iterations = sorted({r["iteration"] for r in metrics})
    baselines = {r["baseline"] for r in metrics if r["baseline"]}
    policies = {r["model"] for r in select(metrics, metric="mi")}
    for key, of in found.items():
        metric, estimator, judge, baseline, ties, length, principle = key[:len(fields)]
        what = ", ".join(filter(None, (estimator, judge and named(judge), baseline and len(baselines) > 1 and
                                       f"against {baseline}", ties and f"ties {ties}", length, principle)))
        digits = 1 if metric in ("length_tokens", "win_rate") else 3
        first, last, n = of[min(of)], of[max(of)], [r["n"] for r in of.values()]
        rows.append((LABELS[metric] + (f": {what}" if what else ""),
                     tell(first) if first["model"] in policies else first["model"], first["seed"],
                     [_cell(of[i], digits) if i in of else None for i in iterations],
                     "" if first is last or first["iteration"] else f"{last['value'] - first['value']:+.{digits}f}",
                     n[0] if len(set(n)) == 1 else ", ".join(map(str, n))))
    return iterations, rows


HEADLINES = (BOUND, FOLLOWED, AMONG, WINS, ANSWERS, TOKENS)


def _rows(line: Line, measures: Sequence[Measure]) -> list[dict]:
    """Rows of a table of what training changed."""
    rows = []
    for measure in (m for m in measures if line.known(m)):
        (first, last), change, digits = line.ends(measure).split(" -> "), line.change(measure), max(measure.digits, 1)
        rows.append({"name": measure.name, "first": first, "last": last, "change": look.said(change, digits, "+"),
                     "n": change.n, "seeds": [f"{value:+.{digits}f}" for value in line.seeds(measure)]})
    return rows


def _group(stories: list[dict], own: list[Line]) -> dict:
    """What the page says of a variant: `own` lines say what changed; responses are those of the first of its runs."""
    first, measured, written = stories[0], {}, {}
    for one in stories:
        by, rows = one["principles"]
        written.setdefault(json.dumps(rows), [by, rows, []])[2].append(str(one["seed"]))
        measured.setdefault(one["measured"], []).append(one["took"])
    seeds = ", ".join(str(one["seed"]) for one in stories)
    ruled = [p for p, *_, rule in first["principles"][1] if rule != "none"] if not first["principles"][0] else []
    sides = [of_side(side, frozenset(ruled)) for p in ruled for side in (p, f"not_{p}")]
    return first | {
        "title": " ".join(filter(None, (first["variant"], f"seed{'s' * (len(stories) > 1)} {seeds}"))),
        "facts": [*first["setting"], *(f"Measured on {where}; {'; '.join(took)}." for where, took in measured.items()),
                  *dict.fromkeys(line for one in stories for line in (one["not_run"], *one["notes"]))],
        "warnings": list(dict.fromkeys(line for one in stories for line in one["worsened"])),
        "apart": len(written) > 1,
        "written": [(by and f"Written by {by}, seed{'s' * (len(of) > 1)} {', '.join(of)}",
                     [[*row[:3], _rule(row[3])] for row in rows]) for by, rows, of in written.values()],
        "lines": [{"subset": line.subset.replace("_", " "), "last": line.last, "verdict": verdict(line),
                   "tables": [(what, rows) for what, measures in (("measure", HEADLINES), ("side followed", sides))
                              if (rows := _rows(line, measures))]} for line in own],
        "shown": [_shown(item, first) for item in first["items"]]}


def _setting(groups: dict[str, list[dict]]) -> list[str]:
    """What the runs are, each sentence once, with the variants that it is of where it is not of all."""
    of: dict[str, list[str]] = {}
    for variant, runs in groups.items():
        for line in runs[0]["setting"]:
            of.setdefault(line, []).append(variant)
    return [line if len(variants) == len(groups) else f"{', '.join(variants)}: {line}" for line, variants in of.items()]


def _rule(name: str) -> str:
    """A rule's name, and what it holds of a text."""
    told = re.split(r"\.\s+(?=[A-Z])", RULES[name].__doc__ or "")[0] if name in RULES else ""
    return " ".join(f"{name}: {told}".split()) if told else name


def _shown(item: dict, one: dict) -> dict:
    """An item with all that the template needs: a column for every constitution, in it the answers by iteration."""
    said, ruled = sentences(one), {p for p, *_, rule in one["principles"][1] if rule != "none"}
    columns = []
    for c, constitution in enumerate(item["constitutions"]):
        sides, answers = constitution.split(","), [row[c] for row in item["answers"]]
        marks = [row[c] for row in item["marks"]] if "marks" in item else [None] * len(answers)
        columns.append({
            "id": constitution, "sentences": [said[side] for side in sides],
            "answers": [{"iteration": i, "words": _words(text, answers[0] if i else text),
                         **_followed(mark, [s for s in sides if s.removeprefix("not_") in ruled])}
                        for i, (text, mark) in enumerate(zip(answers, marks))]})
    of = item["subset"].replace("_", " ") + " principles" * bool(one["kinds"])
    return {"query": item["query"], "of": of, "columns": columns}


def _followed(mark: str | None, sides: list[str]) -> dict:
    """What following.jsonl says of a response, in words and as a kind to filter by."""
    if mark is None or mark == "-":
        return {"kind": "unknown", "said": ""}
    marks, _, fault = mark.partition(" ")
    if fault:
        return {"kind": "none", "said": f"no answer: {FAULTS.get(fault, fault)}"}
    held = [side for side, m in zip(sides, marks) if m == "1"]
    return {"kind": "every" if len(held) == len(sides) else "some", "said": ", ".join(
        f"{side} {'followed' if side in held else 'not followed'}" for side in sides)}


def _words(text: str, before: str) -> list[tuple[bool, str]]:
    """The text in pieces, those with words that `before` has not at that place marked."""
    parts, old = (re.findall(r"\s+|\S+", t) for t in (text, before))
    pieces = SequenceMatcher(a=old, b=parts, autojunk=False).get_opcodes()
    return [(kind != "equal", "".join(parts[low:high])) for kind, _, _, low, high in pieces if high > low]


CARRIED = re.compile(r'<script type="application/json" id="runs">(.*?)</script>', re.DOTALL)


def stories_of(path: Path) -> list[dict]:
    """The stories that a page carries. Raises UserError where it carries none."""
    found = CARRIED.search(read_text(path))
    if not found:
        raise UserError(f"{path}: an older page, which does not carry what it shows; it can only be made from the runs")
    try:
        return loads(found[1])
    except ValueError as e:
        raise UserError(f"{path}: what it carries (in the element with the id runs) was altered: {e}") from None


def write_page(path: Path, stories: list[dict], metrics: list[dict], figures: Path, own: dict[str, list[Line]]) -> None:
    """The page of one run, or of an experiment: `stories` of its runs, those of a variant beside each other, the first of
    them with responses; `own`: variant -> what training changed in its runs."""
    import jinja2
    from markupsafe import Markup

    groups: dict[str, list[dict]] = {}
    for one in stories:
        groups.setdefault(one["variant"], []).append(one)
    pictures = [(name, standing(name.removeprefix("win_rate-")) if name.startswith("win_rate-") else "",
                 base64.b64encode((figures / f"{name}.png").read_bytes()).decode())
                for name in figure_names(stories[0]["kinds"], metrics)]
    source, script = ((Path(__file__).parent / f"page.{kind}").read_text() for kind in ("html", "js"))
    # The standard library escapes; what it has not seen jinja2 would.
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                  finalize=lambda value: Markup(html.escape(str(value)))).from_string(source)
    iterations, values = _values(metrics)
    text = template.render(
        name=stories[0]["name"], profile=stories[0]["profile"], setting=_setting(groups), pictures=pictures,
        iterations=iterations, values=values,
        groups=[_group(runs, own.get(variant, [])) for variant, runs in groups.items()],
        meanings=[(LABELS[m], MEANINGS[m]) for m in dict.fromkeys(r["metric"] for r in metrics) if m in MEANINGS],
        files=[name for name in ("metrics.json", "run.json", "responses", *sorted(
            f.name for pattern in ("run-*.json", "following*.jsonl") for f in path.parent.glob(pattern)))
            if (path.parent / name).exists()],
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    block = json.dumps(stories, ensure_ascii=False).replace("<", "\\u003c")  # no text in it ends the element
    text, end = text.rsplit("</body>", 1)
    carried = f'<script type="application/json" id="runs">{block}</script>'
    write_text(path, f"{text}{carried}\n<script>{script}</script>\n</body>{end}")


def figure_names(kinds: Sequence[str], metrics: list[dict]) -> list[str]:
    """One figure of all measures, one of the principles of a pool (which has kinds), one of each LLM judge's win rate."""
    return ["iterations", *(principles_figures(metrics) if kinds else ()),
            *(f"win_rate-{j}" for j in language_models(metrics))]


def principles_figures(metrics: list[dict]) -> dict[str, list[dict]]:
    """Name -> records of a figure of every principle: one for each model and kind of sampling."""
    found: dict[tuple, list[dict]] = {}
    for r in metrics:
        found.setdefault((r["model"], r["writer"], r["cot"]), []).append(r)
    found = {key: rows for key, rows in found.items() if select(rows, metric="mi")}  # less a baseline's
    if len(found) == 1:
        return {"principles": next(iter(found.values()))}
    return {safe_name(f"principles-{model}{'-cot' if cot else ''}"): rows for (model, _, cot), rows in found.items()}
