"""What training did to following: the published runs of results/ -> a table and a picture (results/steered.md, .png, .pdf).

Run: .venv/bin/python -m repro.studies.steered [RESULTS]
"""

import sys
from pathlib import Path

from repro.base.records import UserError, write_text
from repro.report import look
from repro.report.changes import ANSWERS, BOUND, FOLLOWED, PUBLISHED, TOKENS, Line, detectable, of_side, published, ruled

HEADER = ["run, subset", "n, seeds", "steerability", "change", "bound, nats", "tokens", "answers"]


def _row(line: Line) -> list[str]:
    change = line.change(FOLLOWED)
    return [f"{line.name}, {line.subset.replace('_', ' ')}", f"{change.n}, {len(line.rows)}", line.ends(FOLLOWED),
            look.said(change, sign="+"), *map(line.ends, (BOUND, TOKENS, ANSWERS))]


def write(results: Path) -> list[str]:
    """`results`/steered.md and its figure; returns what it says in words, a line a run. Raises UserError where no published
    run has a following.jsonl."""
    folders = sorted({path.parent for path in results.glob(f"*/*/{PUBLISHED}")})
    lines = [(folder, line) for folder in folders for line in published(folder) if line.known(FOLLOWED)]
    if not lines:
        raise UserError(f"{results}: no published run with {PUBLISHED} in it; `repro publish` puts it there")
    sides = []
    for folder, line in lines:
        names = ruled(folder)
        for side in (of_side(s, frozenset(names)) for name in names for s in (name, f"not_{name}")):
            if line.known(side):
                change = line.change(side)
                sides.append([line.name, line.subset.replace("_", " "), side.name, str(change.n), line.ends(side),
                              look.said(change, sign="+"), f"{detectable(change):.2f}"])
    words = [f"{line.name}, {line.subset}: {_verdict(line)}" for _, line in lines]
    write_text(results / "steered.md", """# What training did to following

A side of a constitution is followed where the response meets its rule (for an antithesis: does not) and still answers
(repro/text/answers.py). Steerability is the share of sides followed over all constitutions of a query, each in its own
response; the change is that of the last iteration against the initial model on the same held-out queries. In brackets 95 %
intervals over queries, over whose seeds values are averaged first. Answers: the share of responses that answer at all.

""" + "".join(f"- {line}.\n" for line in words) + """
![Change of steerability of each run and subset](steered.png)

""" + look.table(HEADER, [_row(line) for _, line in lines]) + """
n: held-out queries of the change (the bound may be of fewer: metrics.json).

## Every side

The last column: the change that so many queries would show in four of five such studies.

""" + look.table(["run", "subset", "side", "n", "followed", "change", "detectable"], sides))
    look.save(draw([line for _, line in lines]), results / "steered")
    return words


def _verdict(line: Line) -> str:
    change, rot, seeds = line.change(FOLLOWED), line.change(ANSWERS), line.seeds(FOLLOWED)
    low, high = change.ci95
    moved = ("is followed more" if low > 0 else "is followed less" if high < 0
             else "is not seen to be followed more or less")
    less, more = rot.ci95[1] < 0, rot.ci95[0] > 0
    text = "fewer responses answer" if less else "more responses answer" if more else "as many responses are seen to answer"
    spread = f"{len(seeds)} seeds from {min(seeds):+.2f} to {max(seeds):+.2f}" if len(seeds) > 1 else "1 seed"
    return (f"the constitution {moved}: {look.said(change, sign='+')} (n {change.n}, {spread}); {text}: "
            f"{look.said(rot, sign='+')}")


@look.style()
def draw(lines: list[Line]):
    """A point and interval a line: change of steerability, and of the share that answers; small ticks are seeds."""
    figure, panels = look.subplots(1, 2, (7.2, 1.2 + 0.42 * len(lines)), sharey=True)
    for axes, of, title in zip(panels, (FOLLOWED, ANSWERS), ("steerability", "responses that answer")):
        for k, line in enumerate(lines):
            change, colour = line.change(of), look.COLOURS[k % len(look.COLOURS)]
            axes.errorbar([change.value], [k], xerr=[[change.value - change.ci95[0]], [change.ci95[1] - change.value]],
                          color=colour, marker="o")
            axes.plot(line.seeds(of), [k + 0.25] * len(line.rows), ls="", marker="|", color=colour, markersize=5)
        axes.axvline(0, color=look.GREY, ls=":", lw=1)
        axes.set(xlabel="change against the initial model", title=title)
    panels[0].set_yticks(range(len(lines)), [f"{line.name}\n{line.subset.replace('_', ' ')}" for line in lines], fontsize=8)
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    figure.suptitle("95 % intervals over held-out queries; small marks: single seeds", fontsize=9)
    return figure


if __name__ == "__main__":
    try:
        print("\n".join(write(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))))
    except UserError as e:
        print(f"steered: {e}", file=sys.stderr)
        raise SystemExit(2) from None
