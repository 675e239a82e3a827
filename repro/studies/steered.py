"""What training did to following: the published runs of results/ -> a table and a picture (results/steered.md, .png, .pdf).

Run: .venv/bin/python -m repro.studies.steered [RESULTS]
"""

import sys
from pathlib import Path

from repro.base.records import UserError, write_text
from repro.report import changes, look
from repro.report.changes import AMONG, ANSWERS, BOUND, FOLLOWED, TOKENS, Line

HEADER = ["run, subset", "n, seeds", "steerability", "change", "change among answers", "bound, nats", "tokens", "answers"]


def _row(line: Line) -> list[str]:
    among = look.said(line.change(AMONG), sign="+") if line.known(AMONG) else "NOT RUN"
    return [_name(line), f"{line.change(FOLLOWED).n}, {len(line.seeds(FOLLOWED))}", line.ends(FOLLOWED),
            look.said(line.change(FOLLOWED), sign="+"), among, *map(line.ends, (BOUND, TOKENS, ANSWERS))]


def _name(line: Line) -> str:
    return f"{line.name}, {look.plain(line.subset.replace('_', ' '))}"


def _sides(folder: Path, line: Line) -> list[list[str]]:
    """A row for every side whose principle has a rule."""
    names = changes.ruled(folder)
    sides = [changes.of_side(s, frozenset(names)) for name in names for s in (name, f"not_{name}")]
    return [[_name(line), side.name, str((change := line.change(side)).n), line.ends(side),
             look.said(change, sign="+"), changes.detectable(change)] for side in sides if line.known(side)]


def write(results: Path) -> list[str]:
    """`results`/steered.md and its figure; returns what it says in words. Raises UserError where no published run has a
    following.jsonl."""
    folders = sorted({path.parent for path in results.glob(f"*/*/{changes.PUBLISHED}")})
    lines = [(folder, line) for folder in folders for line in changes.published(folder) if line.known(FOLLOWED)]
    if not lines:
        raise UserError(f"{results}: no published run with {changes.PUBLISHED} in it; `repro publish` puts it there")
    words = [f"{_name(line)}: {' '.join(changes.verdict(line))}" for _, line in lines]
    write_text(results / "steered.md", """# What training did to following

A side of a constitution is followed where the response meets its rule (for an antithesis: does not) and still answers
(repro/text/answers.py). Steerability is the share of sides followed over all constitutions of a query, each in its own
response; the change is that of the last iteration against the initial model on the same held-out queries. It rises where a
model comes to answer more often, too; so beside it stands the change of the share of sides followed among responses that
answer. In brackets 95 % intervals over queries, over whose seeds values are averaged first.

""" + "".join(f"- {line}\n" for line in words) + """
![Change of steerability, of following among answers, and of answers, of each run and subset](steered.png)

""" + look.table(HEADER, [_row(line) for _, line in lines]) + """
n: held-out queries of the change (the bound may be of fewer: metrics.json).

## Every side

The last column: the change that so many queries would show in four of five such studies.

""" + look.table(["run, subset", "side", "n", "followed", "change", "detectable"],
                 [row for folder, line in lines for row in _sides(folder, line)]))
    look.save(draw([line for _, line in lines]), results / "steered")
    return words


@look.style()
def draw(lines: list[Line]):
    """A point and interval a line: change of steerability, among answers, of the share that answers; small marks: seeds."""
    figure, panels = look.subplots(1, 3, (8.6, 1.2 + 0.42 * len(lines)), sharey=True)
    titles = {FOLLOWED: "steerability", AMONG: "among answers", ANSWERS: "responses that answer"}
    for axes, (measure, title) in zip(panels, titles.items()):
        for k, line in enumerate(lines):
            if not line.known(measure):
                continue
            change, seeds, colour = line.change(measure), line.seeds(measure), look.COLOURS[k % len(look.COLOURS)]
            low, high = change.ci95 or (change.value, change.value)
            axes.errorbar([change.value], [k], xerr=[[change.value - low], [high - change.value]], color=colour, marker="o")
            axes.plot(seeds, [k + 0.25] * len(seeds), ls="", marker="|", color=colour, markersize=5)
        axes.axvline(0, color=look.GREY, ls=":", lw=1)
        axes.set(xlabel="change", title=title)
        axes.locator_params(axis="x", nbins=4)
    names = [f"{line.name}\n{line.subset.replace('_', ' ')}" for line in lines]
    panels[0].set_yticks(range(len(lines)), names, fontsize=8)
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    figure.suptitle("Against the initial model; 95 % intervals over held-out queries; small marks: seeds", fontsize=9)
    return figure


if __name__ == "__main__":
    try:
        print("\n".join(write(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))))
    except UserError as e:
        print(f"steered: {e}", file=sys.stderr)
        raise SystemExit(2) from None
