"""What `repro probe` found (repro/studies/probe.py) -> its page (Markdown), and the same in lines for the terminal."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from repro.base import metrics
from repro.base.records import write_text
from repro.report import look
from repro.text.answers import FAULTS

SOMETIMES = 0.1  # share of answers that follow a side, from which on training has something to strengthen
ABOVE = 0.9  # and from which on there is little left to gain


def shares(marks: list[str]) -> dict[str, metrics.Estimate]:
    """Of one side's marks (repro/stages/measure.py): the share that follows it in an answer, that is on its side of the
    rule whether or not it answers, and that answers."""
    answers = [" " not in mark for mark in marks]
    met = [mark[0] == "1" for mark in marks]
    return {"followed": metrics.share([float(a and m) for a, m in zip(answers, met)]),
            "met": metrics.share([float(m) for m in met]), "answered": metrics.share([float(a) for a in answers])}


def verdict(row: dict) -> str:
    """What the initial model can do with a principle, in words."""
    bound = _bound(row)
    apart = bound["ci95"] is None or bound["ci95"][0] > 0
    if not row["rule"]:
        return f"no rule; the model {'tells its sides apart' if apart else 'does not tell its sides apart'}"
    sides = {side: shares(marks)["followed"].value for side, marks in row["marks"].items()}
    never = [side for side, value in sides.items() if value < SOMETIMES]
    if len(never) == 2:
        return "neither side is followed"
    if never:
        return f"{never[0]} is hardly ever followed"
    if not apart:
        return "both sides are followed sometimes, but not told apart"
    if min(sides.values()) > ABOVE:
        return "both sides are followed nearly always: little to gain"
    return "both sides are followed sometimes: can be trained"


def _bound(row: dict) -> dict:
    return next(r for r in row["records"] if (r["metric"], r["estimator"]) == ("mi", "infonce"))


def in_words(found: dict) -> list[str]:
    """A line a principle, and what came out in one sentence."""
    verdicts = {row["name"]: verdict(row) for row in found["principles"]}
    width = max(map(len, verdicts))
    can = [name for name, said in verdicts.items() if said.endswith("can be trained")]
    return [*(f"{name:<{width}}  {said}" for name, said in verdicts.items()),
            f"{len(can)} of {len(verdicts)} principles can be trained, by what {found['model']} does with "
            f"{found['queries']} queries before any training" + (f": {', '.join(can)}" if can else "")]


def write_page(path: Path, found: dict) -> None:
    header = ["principle", "bound, nats", "followed", "antithesis followed", "answers", "no answer, why", "verdict"]
    rows = []
    for row in found["principles"]:
        bound, (of, against) = _bound(row), (shares(row["marks"][side]) for side in (row["name"], f"not_{row['name']}"))
        every = [mark for marks in row["marks"].values() for mark in marks]
        why = Counter(mark.split(" ")[1] for mark in every if " " in mark)
        sides = [look.said(e["followed"]) if row["rule"] else "no rule" for e in (of, against)]
        rows.append([row["name"], look.said(SimpleNamespace(**bound)), *sides,
                     f"{sum(' ' not in mark for mark in every)} of {len(every)}",
                     ", ".join(f"{name} {why[name]}" for name in FAULTS if why[name]) or "none", verdict(row)])
    text = f"""# What {found['model']} can do with {found['file']}

{in_words(found)[-1]}.

Each principle was asked for alone, then its antithesis, on the same {found['queries']} development queries
({found['source']}; {found['task']}; greedy, at most {found['max_new_tokens']} tokens). Nothing was trained. In brackets
95 % intervals over queries.

""" + look.table(header, rows) + f"""
- bound: InfoNCE lower bound on the information between side and response, at most 0.69; with an interval that holds 0 the
  model does not answer differently.
- followed: the share of responses that answer the query and are on the principle's side of its rule (of the antithesis: on
  the other).
- answers: responses of both sides that are an answer at all; why not: `loop` repeats itself, `recital` recites the
  principle, `off` has too few words of the query, `foreign` is not English (repro/text/answers.py).
- verdict: a side is followed sometimes from {SOMETIMES:.0%} on, nearly always above {ABOVE:.0%}.

## One answer of each side

""" + "\n".join(_shown(row) for row in found["principles"]) + f"""
Model {found['model']}, {found['device']}, torch {found['packages']['torch']}, config {found['config_hash'][:12]}.
"""
    write_text(path, text)


def _shown(row: dict) -> str:
    lines = [f"**{row['name']}**{'' if row['rule'] else ' (no rule)'}"]
    for side, sentence in ((row["name"], row["text"]), (f"not_{row['name']}", row["antithesis"])):
        if side in row["shown"]:
            query, text = (look.plain(row["shown"][side][part]) for part in ("query", "text"))
            lines.append(f"- {look.plain(sentence)} (*{query}*)\n  > {text}")
        else:
            lines.append(f"- {look.plain(sentence)} (answers under this side are not shown)")
    return "\n".join(lines) + "\n"
