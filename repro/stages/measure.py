"""metrics.json from the files of a run: every metric with n, SEM and a 95 % interval."""

from collections.abc import Iterator, Sequence
from math import log

import numpy as np

from repro.base import metrics
from repro.base.records import read_jsonl, write_json
from repro.judges import likelihood, rule
from repro.judges.llm import judge_shares
from repro.judges.record import read_judgments
from repro.stages.draws import Item
from repro.stages.evaluate import BASELINE, judge_inputs, judged_responses
from repro.stages.folder import bare_file, evaluation_file, logprob_file, otherwise_file
from repro.stages.run import Run
from repro.text.rules import words


def measure(run: Run) -> None:
    """metrics.json from the files of the stages before it (design: one flat list of records)."""
    inputs = ["judge", *judge_inputs(run)]
    if not run.stage("metrics", ["metrics.json"], inputs):
        return
    write_json(run.folder / "metrics.json", list(records(run)))
    run.finish("metrics", ["metrics.json"], inputs)


def records(run: Run) -> Iterator[dict]:
    """Every metric of the run with n, SEM and 95 % interval. The unit of n is the held-out query, over whose items (of a
    pool it may have several) values are averaged first; of a win rate it is the item, of one principle the response."""
    spec, items = run.experiment, run.items()
    constants = {"model": spec.model.label, "writer": run.constitutions.writer, "cot": spec.cot, "seed": spec.seed}
    judgments = read_judgments(run.folder)
    C, initial = len(items[0].constitutions), {}
    for iteration in range(spec.iterations + 1):
        responses = read_jsonl(run.folder / evaluation_file(iteration))
        scored = read_jsonl(run.folder / logprob_file(iteration))
        for subset in dict.fromkeys(item.subset for item in items):
            at = [k for k, item in enumerate(items) if item.subset == subset]
            here, groups = [items[k] for k in at], [responses[k * C: (k + 1) * C] for k in at]
            sums = np.array([scored[k]["logprobs"] for k in at])
            means = sums / np.array([scored[k]["tokens"] for k in at])[:, None, :]
            fixed = constants | {"subset": subset, "iteration": iteration}

            def by_query(values, queries=tuple(item.query.id for item in here)) -> list[float]:
                found: dict[str, list[float]] = {}
                for query, value in zip(queries, values):
                    if value is not None:
                        found.setdefault(query, []).append(value)
                return [sum(each) / len(each) for each in found.values()]

            ceiling = float(np.log(C))
            for estimator, logprobs, most in (("infonce", means, ceiling), ("symmetric_infonce", means, ceiling),
                                              ("mean_of_logs", sums, np.inf)):
                yield _record("mi", metrics.mean(by_query(getattr(metrics, estimator)(logprobs)), most), fixed,
                              estimator=estimator)
            yield _record("accuracy_row", metrics.share(by_query(metrics.accuracy_row(means))), fixed)
            yield _record("accuracy_col", metrics.share(by_query(metrics.accuracy_col(means))), fixed)
            yield _length(run, by_query([g[0]["tokens"] for g in groups]), fixed)
            sides = by_query([c and rule.sides_followed(g[0]["text"], c) for g, c in
                              ((g, run.ruled(item.constitutions[0])) for g, item in zip(groups, here))])
            if sides:
                yield _record("following", metrics.share(sides), fixed)
            steered = by_query([steerability(item, g) for item, g in zip(here, groups)]) if not spec.writer else []
            if steered:
                yield _record("steerability", metrics.share(steered), fixed)
                before = initial.setdefault(subset, steered)
                if iteration:
                    yield _record("steerability_change", metrics.change([a - b for a, b in zip(steered, before)]), fixed)
            yield from _following(run, here, groups, fixed)
            if run.constitutions.kinds:
                yield from _by_principle(here, metrics.infonce(means), fixed)
            watch = [[likelihood.hack_watch(r["text"], " ".join(c.statements()), item.query.text)
                      for r, c in zip(g, item.constitutions)] for g, item in zip(groups, here)]
            for metric in watch[0][0]:
                yield _record(metric, metrics.share(by_query([sum(w[metric] for w in g) / C for g in watch])), fixed)
            mine = [j for j in judgments if (j["iteration"], j["subset"]) == (iteration, subset)]
            for judge, baseline in dict.fromkeys((j["judge"], j["baseline"]) for j in mine):
                rows = [j for j in mine if (j["judge"], j["baseline"]) == (judge, baseline)]
                for ties, length, estimate in _win_rates(rows):
                    yield _record("win_rate", estimate, fixed, baseline=baseline, judge=judge, ties=ties, length=length)
                for metric, values in judge_shares(rows).items():
                    yield _record(metric, metrics.share(values), fixed, baseline=baseline, judge=judge)
    if spec.baseline:
        rows = judged_responses(run, BASELINE, 1)
        for subset in dict.fromkeys(item.subset for item in items):
            lengths = [row["tokens"] for row, item in zip(rows, items) if item.subset == subset]
            yield _length(run, lengths, constants | {"model": spec.baseline.label, "subset": subset, "iteration": 0})


def steerability(item: Item, responses: list[dict]) -> float | None:
    """The share of sides followed, by rule, over all constitutions of the item, each in its own response; None where no
    principle has a rule."""
    shares = [rule.sides_followed(r["text"], c) for c, r in zip(item.constitutions, responses)]
    known = [s for s in shares if s is not None]
    return sum(known) / len(known) if known else None


def _length(run: Run, tokens: list[float], fixed: dict) -> dict:
    """Mean length up to the cap on a response (one cut out of its form and tokenised anew may be longer)."""
    spec = run.experiment.sampling
    most = spec.max_new_tokens + spec.reasoning_tokens * bool(run.experiment.cot)
    return _record("length_tokens", metrics.bounded(tokens, max(most, *tokens)), fixed)


def _following(run: Run, items: list[Item], groups: list[list[dict]], fixed: dict) -> Iterator[dict]:
    """The share of responses that follow each principle, and each antithesis ("not_..."), by rule, under a constitution
    that holds it: of a set the judged one for the principle, all that hold it otherwise. Of principles that a model
    wrote: the hand-written ones, under the judged constitution."""
    if run.experiment.writer:
        for name in (p.name for p in run.by_hand.principles if p.rule):
            yield _record("following", metrics.share([
                float(rule.follows(group[0]["text"], run.by_hand.positive)[name]) for group in groups]), fixed,
                principle=name)
        return
    found: dict[tuple[str, bool], list[float]] = {}
    for group, item in zip(groups, items):
        for p in (p for p in item.constitutions[0].principles if p.rule):
            for side in (True, False):
                values = [rule.follows(r["text"], c)[p.name] for r, c in zip(group, item.constitutions)
                          if c.sides[c.principles.index(p)] == side]
                values = values[:1] if side else values
                found.setdefault((p.name, side), []).append(sum(values) / len(values))
    for (name, side), values in found.items():
        yield _record("following", metrics.share(values), fixed, principle=name if side else f"not_{name}")


def _by_principle(items: list[Item], bounds, fixed: dict) -> Iterator[dict]:
    """Of a pool: the bound over the items whose constitution holds the principle (another one is beside it)."""
    found: dict[str, list[float]] = {}
    for item, bound in zip(items, bounds):
        for p in item.constitutions[0].principles:
            found.setdefault(p.name, []).append(bound)
    for name, values in found.items():
        yield _record("mi", metrics.mean(values, log(2)), fixed, estimator="infonce", principle=name)


def _win_rates(rows: list[dict]) -> Iterator[tuple[str, str, metrics.Estimate]]:
    """(ties, length, win rate) under each tie rule and length control that these judgments define. A missing verdict
    is no item; a flip is half a win under either rule: the orders disagreed, the texts did not tie."""
    rows = [row for row in rows if row["score"] is not None]
    if not rows:
        return
    difference = [float(row["tokens"] - row["baseline_tokens"]) for row in rows]
    for ties in ("half", "loss"):
        scores = [0.0 if (row["outcome"], ties) == ("tie", "loss") else row["score"] for row in rows]
        yield ties, "raw", metrics.win_rate(scores, ties="half")
        longer = [d > 0 for d in difference]
        if min(sum(longer), len(longer) - sum(longer)) >= 2:  # a stratum of one has no SEM
            yield ties, "stratified", metrics.win_rate_stratified(scores, longer, ties="half")
        try:
            yield ties, "logistic", metrics.win_rate_logistic(scores, difference, ties="half")
        except ValueError:
            pass  # equal lengths throughout, or wins that length separates: no finite fit


def _record(metric: str, estimate: metrics.Estimate, fixed: dict, **extra) -> dict:
    """One line of metrics.json."""
    keys = ("subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator", "ties", "length", "seed")
    return ({"metric": metric} | dict.fromkeys(keys) | fixed | extra
            | {"value": estimate.value, "sem": estimate.sem, "n": estimate.n,
               "ci95": None if estimate.ci95 is None else list(estimate.ci95)})


# ---- a value a query: what objectives are compared by (report/comparison.py)

def _groups(run: Run, iteration: int) -> list[tuple]:
    """(item, its responses, its log-prob row)."""
    rows, scored = read_jsonl(run.folder / evaluation_file(iteration)), read_jsonl(run.folder / logprob_file(iteration))
    C = len(run.items()[0].constitutions)
    return [(item, rows[k * C: (k + 1) * C], scored[k]) for k, item in enumerate(run.items())]


def _by_query(run: Run, values: Sequence[float | None]) -> list[float | None]:
    """None for a query of which nothing is known: of all its principles none has a rule."""
    found: dict[str, list[float]] = {}
    for item, value in zip(run.items(), values):
        found.setdefault(item.query.id, []).extend([] if value is None else [float(value)])
    return [sum(each) / len(each) if each else None for each in found.values()]


def _texts(run: Run, iteration: int) -> dict[str, list[float]]:
    groups = _groups(run, iteration)
    sums, tokens = (np.array([scored[key] for *_, scored in groups]) for key in ("logprobs", "tokens"))
    bare = read_jsonl(run.folder / bare_file(iteration))

    def over(of) -> list[float]:
        return [sum(of(r["text"], item) for r in rows) / len(rows) for item, rows, _ in groups]

    return {
        "bound": metrics.infonce(sums / tokens[:, None, :]).tolist(),
        "steerability": [steerability(item, rows) for item, rows, _ in groups],
        "following": [rule.sides_followed(rows[0]["text"], item.constitutions[0]) for item, rows, _ in groups],
        "initial_logprob": [float(np.mean(np.divide(r["logprobs"], r["tokens"]))) for r in bare],
        "length": [sum(r["tokens"] for r in rows) / len(rows) for _, rows, _ in groups],
        "distinct_words": over(lambda text, item: len(set(words(text))) / len(words(text)) if words(text) else 0.0),
        "repetition": over(lambda text, item: likelihood.repetition(text)),
        "query_words": over(lambda text, item: likelihood.overlap(text, item.query.text))}


def development_values(run: Run, iteration: int) -> dict[str, float]:
    """Means over the development queries, and their number: what a try is judged by."""
    found = {name: _by_query(run, values) for name, values in _texts(run, iteration).items()}
    known = {name: [v for v in values if v is not None] for name, values in found.items()}
    return {"n": len(found["bound"])} | {name: sum(values) / len(values) for name, values in known.items()}


def held_out_values(run: Run, iteration: int) -> dict[str, list[float | None]]:
    """Measure -> a value a query, in the order in which the run has its queries."""
    found = _texts(run, iteration)
    for kind in ("bare", "contrary"):
        rows = read_jsonl(run.folder / otherwise_file(kind, iteration))
        found[f"following_{kind}"] = [rule.sides_followed(r["text"], item.constitutions[0])
                                      for r, item in zip(rows, run.items())]
    return {name: _by_query(run, values) for name, values in found.items()}
