"""What training changed, of one run or over the seeds of several: paired changes from following.jsonl (stages/measure.py).

The unit is the held-out query, over whose items, constitutions, sides and seeds values are averaged first; so a change is
paired, and seeds, which share their queries, make no query count twice. No torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from repro.base import metrics
from repro.base.metrics import Estimate
from repro.base.records import read_json, read_jsonl
from repro.report import look

PUBLISHED = "following-*.jsonl"  # in a published folder, one a run: its variant and seed


@dataclass(frozen=True)
class Measure:
    """`of` a row of following.jsonl and an iteration: its values, one or more; none where it has none. `share`: they are
    shares, from 0 to 1. `over`: another measure, by whose mean over queries this one's is divided."""

    name: str
    of: Callable[[dict, str], list[float]]
    share: bool = True
    digits: int = 2
    over: "Measure | None" = None


def _followed(row: dict, iteration: str, side: str | None = None, ruled: frozenset[str] = frozenset()) -> list[float]:
    values: list[float] = []
    for constitution, mark in zip(row["constitutions"], row["sides"].get(iteration, ())):
        marks, _, fault = mark.partition(" ")
        own = [] if marks == "-" else [float(m == "1" and not fault) for m in marks]
        if side:
            known = [s for s in constitution.split(",") if s.removeprefix("not_") in ruled]
            own = [value for s, value in zip(known, own) if s == side]
        values += own
    return values


def _of(row: dict, name: str, iteration: str) -> list[float]:
    """Numbers of a row, which one of an older version does not have."""
    found = row.get(name, {}).get(iteration, [])
    return found if isinstance(found, list) else [found]


BOUND = Measure("bound on mutual information, nats", lambda row, i: _of(row, "bound", i), share=False)
FOLLOWED = Measure("sides of the constitution followed", _followed)
ANSWERS = Measure("responses that answer", lambda row, i: [float(" " not in mark) for mark in row["sides"].get(i, ())])
TOKENS = Measure("length of all responses, tokens", lambda row, i: _of(row, "tokens", i), share=False, digits=0)


def _answered_sides(row: dict, iteration: str) -> list[float]:
    """For every side with a rule whether its response answers."""
    marks = (mark.partition(" ") for mark in row["sides"].get(iteration, ()))
    return [float(not fault) for of, _, fault in marks if of != "-" for _ in of]


AMONG = Measure("sides followed, of responses that answer", _followed, share=False,
                over=Measure("sides of responses that answer", _answered_sides))


def _won(row: dict, iteration: str) -> list[float]:
    """1 where the response under the judged constitution follows more of its sides than the initial model's, 0 where
    fewer: the rule judge (judges/rule.py)."""
    ours, theirs = (_followed(row | {"constitutions": row["constitutions"][:1]}, i) for i in (iteration, "0"))
    return [0.5 + 0.5 * ((sum(ours) > sum(theirs)) - (sum(ours) < sum(theirs)))] if ours else []


WINS = Measure("judged better than the initial model's, by rule, ties half", _won)


def of_side(side: str, ruled: frozenset[str]) -> Measure:
    """As FOLLOWED, of one side alone. `ruled`: the names of principles with a rule, in whose order marks stand."""
    return Measure(side, lambda row, iteration: _followed(row, iteration, side, ruled))


@dataclass(frozen=True)
class Line:
    """The runs (seeds) of an experiment's variant, and a subset of their items. `rows`: of each seed those of
    following.jsonl."""

    name: str
    subset: str
    rows: dict[int, list[dict]]
    _recent: list[tuple[Measure, int, dict[str, float]]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def last(self) -> int:
        return max(int(k) for rows in self.rows.values() for row in rows for k in row["sides"])

    def by_query(self, measure: Measure, iteration: int) -> dict[str, float]:
        """Query -> the mean over seeds of the means of its values. What was asked for last is kept: a value, its change and
        whether there is one are asked for together."""
        for of, at, known in self._recent:
            if of is measure and at == iteration:
                return known
        self._recent[:] = [*self._recent[-5:], (measure, iteration, self._by_query(measure, iteration))]
        return self._recent[-1][2]

    def _by_query(self, measure: Measure, iteration: int) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for rows in self.rows.values():
            own: dict[str, list[float]] = {}
            for row in rows:
                own.setdefault(row["query"], []).extend(measure.of(row, str(iteration)))
            for query, values in own.items():
                if values:
                    found.setdefault(query, []).append(sum(values) / len(values))
        return {query: sum(values) / len(values) for query, values in found.items()}

    def _ratios(self, measure: Measure, iteration: int, queries: list[str]) -> list[float]:
        """A value a query, whose mean is the mean over queries divided by that of what it is over."""
        tops, bottoms = (self.by_query(m, iteration) for m in (measure, measure.over))
        return metrics.of_ratio([tops[q] for q in queries], [bottoms[q] for q in queries]).tolist()

    def value(self, measure: Measure, iteration: int = 0) -> Estimate:
        """The mean over queries at an iteration, by default of the initial model."""
        found = self.by_query(measure, iteration)
        if measure.over:
            return metrics.mean(self._ratios(measure, iteration, list(found)))
        return (metrics.share if measure.share else metrics.mean)(list(found.values()))

    def change(self, measure: Measure) -> Estimate:
        """Last iteration less the initial model, on the same queries."""
        first, last = self.by_query(measure, 0), self.by_query(measure, self.last)
        queries = [q for q in first if q in last]
        if measure.over:
            before, after = (self._ratios(measure, k, queries) for k in (0, self.last))
            return metrics.mean([b - a for a, b in zip(before, after)])
        return (metrics.change if measure.share else metrics.mean)([last[q] - first[q] for q in queries])

    def seeds(self, measure: Measure) -> list[float]:
        """The change of each seed that has one."""
        alone = (Line(self.name, self.subset, {seed: rows}) for seed, rows in self.rows.items())
        return [line.change(measure).value for line in alone if line.known(measure)]

    def has(self, measure: Measure, iteration: int) -> bool:
        """Whether there is a value at an iteration."""
        found = self.by_query(measure, iteration)
        return bool(found) and (not measure.over or any(self.by_query(measure.over, iteration)[q] for q in found))

    def known(self, measure: Measure) -> bool:
        """Whether both ends have a value."""
        return self.has(measure, 0) and self.has(measure, self.last)

    def ends(self, measure: Measure) -> str:
        """The initial model -> the last iteration."""
        if not self.known(measure):
            return "NOT RUN"
        return " -> ".join(f"{self.value(measure, k).value:.{measure.digits}f}" for k in (0, self.last))


def verdict(line: Line) -> list[str]:
    """What training did, in sentences: to the bound, to following, to the text."""
    def few(seeds: list[float]) -> str:
        return f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"

    told = []
    if line.known(BOUND):
        moved, n = _moved(line, BOUND, "rose", "fell", "is not seen to move"), line.change(BOUND).n
        told.append(f"The bound on mutual information {moved}, in nats (n {n}, {few(line.seeds(BOUND))}).")
    if line.known(FOLLOWED):
        change, seeds = line.change(FOLLOWED), line.seeds(FOLLOWED)
        told.append("The constitution " + _moved(line, FOLLOWED, "is followed more", "is followed less",
                                                 "is not seen to be followed more or less")
                    + f", as the share of its sides (n {change.n}, {few(seeds)}"
                    + (f" from {min(seeds):+.2f} to {max(seeds):+.2f})" if len(seeds) > 1 else ")")
                    + ("." if change.ci95[0] > 0 or change.ci95[1] < 0 or not change.sem else
                       f"; so many queries would show a change of {detectable(change)}."))
        if line.known(AMONG):
            alone = _rose(line, FOLLOWED) and _rose(line, ANSWERS) and not _rose(line, AMONG)
            told.append("Among responses that answer, the share of sides followed "
                        f"{_moved(line, AMONG, 'has grown', 'has shrunk', 'is not seen to change')}"
                        f"{': more is followed because more responses answer' if alone else ''}.")
    else:
        told.append("Whether the constitution is followed cannot be said: no program can check its principles.")
    neither = "No change of how many answer is seen"
    answer = _moved(line, ANSWERS, "More responses answer", "Fewer responses answer", neither)
    if not line.known(TOKENS):
        return [*told, f"{answer}."]
    length = _moved(line, TOKENS, "grew", "fell", "is not seen to change")
    return [*told, f"{answer}; their length {length}, in tokens."]


def _seen(change: Estimate) -> tuple[float, float]:
    """The interval of a change: where all changed alike its value, and of a single one, which shows nothing, zero."""
    return change.ci95 or ((change.value,) * 2 if change.n > 1 else (0, 0))


def _rose(line: Line, measure: Measure) -> bool:
    return _seen(line.change(measure))[0] > 0


def _moved(line: Line, measure: Measure, more: str, less: str, neither: str) -> str:
    change = line.change(measure)
    low, high = _seen(change)
    word = more if low > 0 else less if high < 0 else neither
    return f"{word}: {line.ends(measure)}, {look.said(change, digits=max(measure.digits, 1), sign='+')}"


def lines(name: str, runs: dict[int, list[dict]]) -> list[Line]:
    """A line for each subset of the items of `runs`, the rows of following.jsonl by seed."""
    return [Line(name, subset, {seed: [row for row in rows if row["subset"] == subset] for seed, rows in runs.items()})
            for subset in dict.fromkeys(row["subset"] for rows in runs.values() for row in rows)]


def published(folder: Path, variant: str | None = None) -> list[Line]:
    """The lines of one published experiment, by variant, then subset; of one `variant` alone, where it is given."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for path in sorted(folder.glob(PUBLISHED)):
        if of := re.fullmatch(r"following-(?:(.+)-)?seed-(\d+)", path.stem):
            runs.setdefault(of[1] or "", {})[int(of[2])] = read_jsonl(path)
    return [line for own, seeds in runs.items() if variant in (None, own)
            for line in lines("-".join(filter(None, (folder.absolute().parent.name, own))), seeds)]


def ruled(folder: Path) -> dict[str, str]:
    """Names of the principles with a rule -> the rule."""
    data = read_json(min(folder.glob("constitutions*.json"), key=lambda path: len(path.name)))
    return {p["name"]: p["rule"] for p in (*data["principles"], *data.get("held_out", ())) if p["rule"]}


def detectable(change: Estimate) -> str:
    """The change that these queries would show in four of five such studies (two-sided 5 %, normal); nothing where all
    changed alike, which does not say."""
    return f"{2.8 * change.sem:.2f}" if change.sem else ""
