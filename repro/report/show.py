"""A run in the terminal: what came out in words, what changed, and a few responses side by side; what its page begins with.
No torch, no network.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from repro.base.records import UserError
from repro.report import changes, look
from repro.report.changes import Line
from repro.report.page import HEADLINES, stories_of
from repro.report.publish import changed, is_published, leaves, standing_alone
from repro.report.story import sentences, story

WIDTH = 100


def show(folder: Path, answers: int = 2) -> Iterator[str]:
    """Lines about a finished run, its variants, or a published folder. Raises UserError where it is none of them."""
    if is_published(folder):
        own = changes.published(folder)
        try:
            stories = [one for one in stories_of(folder / "report.html") if one["items"]]
        except (UserError, FileNotFoundError):  # published without a page, or with an older one
            stories = []
    else:
        runs = leaves(folder)
        for run in runs:
            if not (run / "metrics.json").is_file():
                raise UserError(f"{run}: no metrics.json; only a finished run can be shown")
        stories, own = list(map(story, runs)), [line for found in changed(standing_alone(runs)).values() for line in found]
    for line in own:
        yield from _changes(line)
    if not own:
        yield f"{folder}: measured by an older version, which kept no values by query: see its report.html"
    for one in stories:
        said = sentences(one)
        for item in one["items"][:answers]:
            yield ""
            yield " ".join(filter(None, (one["variant"], f"seed {one['seed']},", item["subset"].replace("_", " "))))
            yield from _indented(item["query"], "")
            for c, constitution in enumerate(item["constitutions"]):
                yield f"  {constitution}: " + " ".join(look.printable(said[side]) for side in constitution.split(","))
                for name, texts in (("initial model", item["answers"][0]),
                                    (f"iteration {len(item['answers']) - 1}", item["answers"][-1])):
                    yield from _indented(f"{name}: {texts[c]}", "    ")


def _changes(line: Line) -> Iterator[str]:
    yield f"{line.name}, {line.subset.replace('_', ' ')}"
    for sentence in changes.verdict(line):
        yield from _indented(sentence, "  ")
    for measure in (m for m in HEADLINES if line.known(m)):
        change = line.change(measure)
        moved = look.said(change, max(measure.digits, 1), "+")
        yield f"  {measure.name:<58} {line.ends(measure):>14}  {moved:<22} n {change.n}"


def _indented(text: str, by: str) -> list[str]:
    return textwrap.wrap(look.printable(text), WIDTH, initial_indent=by, subsequent_indent=by + "  ")
