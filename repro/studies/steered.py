"""What training did to following: the published runs of results/ -> a table and a picture (results/steered.md, .png, .pdf).

Of each run following.jsonl is read (repro/stages/measure.py): which sides every response follows, of the initial model and
of the last iteration. The unit is the held-out query, over whose items, constitutions, sides and seeds values are averaged
first; so a change is paired, and seeds, which share their queries, make no query count twice.

Run: .venv/bin/python -m repro.studies.steered [RESULTS]
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repro.base import metrics
from repro.base.metrics import Estimate
from repro.base.records import UserError, read_json, read_jsonl, write_text
from repro.report import look

PUBLISHED = "following-*.jsonl"  # in a published folder, one a run: its variant and seed


@dataclass(frozen=True)
class Line:
    """One line of the table: the runs (seeds) of an experiment's variant, and a subset of its items. `rows`: of each seed
    those of following.jsonl; `metrics`: of all seeds and this subset."""

    name: str
    subset: str
    rows: dict[int, list[dict]]
    metrics: list[dict]

    @property
    def last(self) -> str:
        return max((k for rows in self.rows.values() for row in rows for k in row["sides"]), key=int)

    def by_query(self, of: Callable[[str, list[str]], list[float]], iteration: str) -> dict[str, float]:
        """Query -> the mean over seeds of the means of what `of` makes of a mark and its constitution's sides."""
        found: dict[str, list[float]] = {}
        for rows in self.rows.values():
            own: dict[str, list[float]] = {}
            for row in rows:
                for constitution, mark in zip(row["constitutions"], row["sides"].get(iteration, ())):
                    own.setdefault(row["query"], []).extend(of(mark, constitution.split(",")))
            for query, values in own.items():
                if values:
                    found.setdefault(query, []).append(sum(values) / len(values))
        return {query: sum(values) / len(values) for query, values in found.items()}

    def value(self, of: Callable, iteration: str = "0") -> Estimate:
        """The mean over queries at an iteration, by default of the initial model."""
        return metrics.share(list(self.by_query(of, iteration).values()))

    def change(self, of: Callable) -> Estimate:
        """Last iteration less the initial model, on the same queries."""
        first, last = self.by_query(of, "0"), self.by_query(of, self.last)
        return metrics.change([last[q] - first[q] for q in first if q in last])

    def seeds(self, of: Callable) -> list[float]:
        """The change of each seed alone."""
        return [Line(self.name, self.subset, {seed: rows}, []).change(of).value for seed, rows in self.rows.items()]

    def mean(self, metric: str, iteration: int, **fixed) -> tuple[float, int] | None:
        """A metric's mean over seeds, and its n."""
        rows = [r for r in self.metrics if r["metric"] == metric and r["iteration"] == iteration and not r.get("principle")
                and all(r[k] == v for k, v in fixed.items())]
        return (sum(r["value"] for r in rows) / len(rows), rows[0]["n"]) if rows else None


def followed(mark: str, sides: list[str]) -> list[float]:
    """A value for every side with a rule: 1 where it is followed by a text that answers."""
    marks, _, fault = mark.partition(" ")
    return [] if marks == "-" else [float(m == "1" and not fault) for m in marks]


def answers(mark: str, sides: list[str]) -> list[float]:
    return [float(" " not in mark)]


def of_side(side: str, ruled: set[str]) -> Callable[[str, list[str]], list[float]]:
    """As `followed`, of one side alone. `ruled`: the names of principles with a rule, in whose order marks stand."""
    def of(mark: str, sides: list[str]) -> list[float]:
        known = [s for s in sides if s.removeprefix("not_") in ruled]
        return [value for s, value in zip(known, followed(mark, sides)) if s == side]
    return of


def read(folder: Path) -> list[Line]:
    """The lines of one published experiment, by variant, then subset. (Runs whose principles a model wrote have none.)"""
    runs: dict[str, dict[int, list[dict]]] = {}
    for path in sorted(folder.glob(PUBLISHED)):
        variant, _, seed = path.stem.removeprefix("following-").rpartition("seed-")
        runs.setdefault(variant.strip("-"), {})[int(seed)] = read_jsonl(path)
    known, lines = read_json(folder / "metrics.json") if runs else [], []
    for variant, seeds in runs.items():
        config = read_json(folder / f"run-{'-'.join(filter(None, (variant, f'seed-{min(seeds)}')))}.json")["config"]
        own = [r for r in known if (r["model"], r["cot"], r["writer"]) == (config["model"]["label"], config["cot"], "hand")]
        for subset in dict.fromkeys(row["subset"] for rows in seeds.values() for row in rows):
            lines.append(Line("-".join(filter(None, (folder.parent.name, variant))), subset,
                              {seed: [row for row in rows if row["subset"] == subset] for seed, rows in seeds.items()},
                              [r for r in own if r["subset"] == subset]))
    return lines


def ruled(folder: Path) -> dict[str, str]:
    """Names of the principles with a rule -> the rule."""
    data = read_json(folder / "constitutions.json")
    return {p["name"]: p["rule"] for p in (*data["principles"], *data.get("held_out", ())) if p["rule"]}


def detectable(change: Estimate) -> float:
    """The change that these queries would show in four of five such studies (two-sided 5 %, normal)."""
    return 2.8 * (change.sem or float("nan"))


HEADER = ["run, subset", "n, seeds", "steerability", "change", "bound, nats", "tokens", "answers"]


def _row(line: Line) -> list[str]:
    last = int(line.last)
    ends = [[line.mean(metric, k, **fixed) for k in (0, last)] for metric, fixed in (
        ("mi", {"estimator": "infonce"}), ("length_tokens", {}))]
    told = [f"{a[0]:.{digits}f} -> {b[0]:.{digits}f}" if a and b else "NOT RUN" for (a, b), digits in zip(ends, (2, 0))]
    change, (steered, rot) = line.change(followed), (
        f"{line.value(of).value:.2f} -> {line.value(of, line.last).value:.2f}" for of in (followed, answers))
    return [f"{line.name}, {line.subset.replace('_', ' ')}", f"{change.n}, {len(line.rows)}", steered,
            look.said(change, sign="+"), *told, rot]


def write(results: Path) -> list[str]:
    """`results`/steered.md and its figure; returns what it says in words, a line a run. Raises UserError where no published
    run has a following.jsonl."""
    folders = sorted({path.parent for path in results.glob(f"*/*/{PUBLISHED}")})
    lines = [(folder, line) for folder in folders for line in read(folder)]
    lines = [(folder, line) for folder, line in lines if line.by_query(followed, "0")]
    if not lines:
        raise UserError(f"{results}: no published run with {PUBLISHED} in it; `repro publish` puts it there")
    sides = []
    for folder, line in lines:
        names = ruled(folder)
        for side in [s for name in names for s in (name, f"not_{name}")]:
            of = of_side(side, set(names))
            if values := line.by_query(of, "0"):
                change = line.change(of)
                sides.append([line.name, line.subset.replace("_", " "), side, str(len(values)),
                              f"{line.value(of).value:.2f} -> {line.value(of, line.last).value:.2f}",
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
    change, rot, seeds = line.change(followed), line.change(answers), line.seeds(followed)
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
    for axes, of, title in zip(panels, (followed, answers), ("steerability", "responses that answer")):
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
