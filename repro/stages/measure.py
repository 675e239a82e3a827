"""metrics.json from the files of a run: every metric with n, SEM and a 95 % interval; and following.jsonl: of every item
its bound, of every response which sides it follows, by rule, and its length, from which paired changes over several seeds
can be told without the responses."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import log

import numpy as np

from repro.base import metrics
from repro.base.records import read_jsonl, write_json, write_jsonl
from repro.judges import rule
from repro.judges.llm import judge_shares
from repro.judges.record import read_judgments
from repro.judges.rule import FOLLOWING
from repro.stages.draws import Item
from repro.stages.evaluate import BASELINE, judge_inputs, judged_responses
from repro.stages.folder import bare_file, evaluation_file, logprob_file, otherwise_file
from repro.stages.run import ANSWERS, Run
from repro.text.answers import fault, hack_watch, overlap, repetition
from repro.text.principles import Constitution
from repro.text.rules import words


def measure(run: Run) -> None:
    """metrics.json from the files of the stages before it (design: one flat list of records), and following.jsonl."""
    inputs, outputs = ["judge", *judge_inputs(run)], ["metrics.json", *[FOLLOWING] * marks_following(run)]
    if not run.stage("metrics", outputs, inputs):
        return
    write_json(run.folder / "metrics.json", list(records(run)))
    if marks_following(run):
        write_jsonl(run.folder / FOLLOWING, following(run))
    run.finish("metrics", outputs, inputs)


def marks_following(run: Run) -> bool:
    """Whether the run has a following.jsonl: not where a side counts without an answer, as in older runs."""
    return run.record.get("counted") == ANSWERS


def following(run: Run, iterations: Iterable[int] | None = None) -> list[dict]:
    """A row for each held-out item: {"query", "subset", "constitutions": ids [C]}, and by iteration "sides" (marks [C]),
    "tokens" (lengths [C]) and, of an item that is scored, "bound" (nats). A mark has 1 or 0 for each principle of the
    constitution with a rule, in its order: the response is on its side; "-" where none has a rule. Behind it stands why
    the response is no answer, where it is none ("11 loop"): then neither side counts as followed."""
    rows = [{"query": item.query.id, "subset": item.subset, "constitutions": [c.id for c in item.constitutions],
             "sides": {}, "tokens": {}, "bound": {}} for item in run.items()]
    for iteration in range(run.experiment.iterations + 1) if iterations is None else iterations:
        for row, (item, responses) in zip(rows, _answered(run, iteration)):
            row["sides"][str(iteration)] = [_mark(r["text"], item.query.text, c)
                                            for r, c in zip(responses, item.constitutions)]
            row["tokens"][str(iteration)] = [r["tokens"] for r in responses]
        for row, bound in zip(rows, _bounds(read_jsonl(run.folder / logprob_file(iteration)))):
            row["bound"][str(iteration)] = bound
    return rows


def _bounds(scored: list[dict]) -> list[float]:
    """The InfoNCE bound of each item that was scored."""
    sums, tokens = (np.array([row[key] for row in scored]) for key in ("logprobs", "tokens"))
    return metrics.infonce(sums / tokens[:, None, :]).tolist()


def _mark(text: str, query: str, constitution: Constitution) -> str:
    sides = "".join("01"[holds] for holds in rule.met(text, constitution).values())
    return " ".join(filter(None, (sides or "-", fault(text, query, constitution.statements()))))


def _answered(run: Run, iteration: int) -> list[tuple[Item, list[dict]]]:
    """(item, its responses [C]) of an iteration."""
    rows = iter(read_jsonl(run.folder / evaluation_file(iteration)))
    return [(item, [next(rows) for _ in item.constitutions]) for item in run.items(iteration)]


def records(run: Run, iterations: Iterable[int] | None = None) -> Iterator[dict]:
    """Every metric of the run with n, SEM and 95 % interval. The unit of n is the held-out query, over whose items (of a
    pool it may have several) values are averaged first; of a win rate it is the item, of one principle the response."""
    spec = run.experiment
    constants = {"model": spec.model.label, "writer": run.constitutions.writer, "cot": spec.cot, "seed": spec.seed}
    judgments = read_judgments(run.folder) if iterations is None else []
    C, initial = len(run.items()[0].constitutions), {}
    for iteration in range(spec.iterations + 1) if iterations is None else iterations:
        answered, scored = _answered(run, iteration), read_jsonl(run.folder / logprob_file(iteration))
        for subset in dict.fromkeys(item.subset for item, _ in answered):
            at = [k for k, (item, _) in enumerate(answered) if item.subset == subset]
            here, groups = ([answered[k][part] for k in at] for part in (0, 1))
            core = [item for item in here if item.scored]
            sums = np.array([scored[k]["logprobs"] for k in at if k < len(scored)])
            means = sums / np.array([scored[k]["tokens"] for k in at if k < len(scored)])[:, None, :]
            fixed = constants | {"subset": subset, "iteration": iteration}

            def by_query(values, items=tuple(here)) -> list[float]:
                return list(_means(items, values).values())

            of_core = partial(by_query, items=tuple(core))

            ceiling = float(np.log(C))
            for estimator, logprobs, most in (("infonce", means, ceiling), ("symmetric_infonce", means, ceiling),
                                              ("mean_of_logs", sums, np.inf)):
                yield _record("mi", metrics.mean(of_core(getattr(metrics, estimator)(logprobs)), most), fixed,
                              estimator=estimator)
            yield _record("accuracy_row", metrics.share(of_core(metrics.accuracy_row(means))), fixed)
            yield _record("accuracy_col", metrics.share(of_core(metrics.accuracy_col(means))), fixed)
            yield _length(run, by_query([g[0]["tokens"] for g in groups]), fixed)
            sides = by_query([c and rule.sides_followed(g[0]["text"], c, run.asked(item), _told(item))
                              for g, item, c in ((g, item, run.ruled(item.constitutions[0]))
                                                 for g, item in zip(groups, here))])
            if sides:
                yield _record("following", metrics.share(sides), fixed)
            steered = _means(here, [steerability(run, item, g) for item, g in zip(here, groups)]) if not spec.writer else {}
            if steered:
                yield _record("steerability", metrics.share([*steered.values()]), fixed)
                before = initial.setdefault(subset, steered)
                if iteration:
                    yield _record("steerability_change", metrics.change([steered[q] - before[q] for q in steered]), fixed)
            if run.asked(here[0]):
                yield _record("answered", metrics.share(by_query([sum(
                    fault(r["text"], item.query.text, c.statements()) is None for r, c in zip(g, item.constitutions)) / C
                    for item, g in zip(here, groups)])), fixed)
            yield from _following(run, here, groups, fixed)
            if run.constitutions.kinds:
                yield from _by_principle(core, metrics.infonce(means), fixed)
            watch = [[hack_watch(r["text"], " ".join(c.statements()), item.query.text)
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
        rows, items = judged_responses(run, BASELINE, 1), run.items()
        for subset in dict.fromkeys(item.subset for item in items):
            lengths = [row["tokens"] for row, item in zip(rows, items) if item.subset == subset]
            yield _length(run, lengths, constants | {"model": spec.baseline.label, "subset": subset, "iteration": 0})


def steerability(run: Run, item: Item, responses: list[dict]) -> float | None:
    """The share of sides followed, by rule, over all constitutions of the item, each in its own response; None where no
    principle has a rule."""
    shares = [rule.sides_followed(r["text"], c, run.asked(item)) for c, r in zip(item.constitutions, responses)]
    known = [s for s in shares if s is not None]
    return sum(known) / len(known) if known else None


def _told(item: Item) -> list[str]:
    """The sentences under which the judged response was asked."""
    return item.constitutions[0].statements()


def _means(items: Sequence[Item], values: Iterable[float | None]) -> dict[str, float]:
    """Query -> the mean of its items' values, less those that are not known."""
    found: dict[str, list[float]] = {}
    for item, value in zip(items, values):
        if value is not None:
            found.setdefault(item.query.id, []).append(float(value))
    return {query: sum(each) / len(each) for query, each in found.items()}


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
                float(rule.follows(group[0]["text"], run.by_hand.positive, run.asked(item), _told(item))[name])
                for group, item in zip(groups, items)]), fixed, principle=name)
        return
    found: dict[tuple[str, bool], list[float]] = {}
    for group, item in zip(groups, items):
        for p in (p for p in item.constitutions[0].principles if p.rule):
            for side in (True, False):
                values = [rule.follows(r["text"], c, run.asked(item))[p.name] for r, c in zip(group, item.constitutions)
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


# ---- a value a query: what objectives are compared by (studies/comparison.py)

def _by_query(run: Run, values: Sequence[float | None]) -> list[float | None]:
    """None for a query of which nothing is known: of all its principles none has a rule, or it was not scored."""
    found = _means(run.items(), values)
    return [found.get(query) for query in dict.fromkeys(item.query.id for item in run.items())]


def _texts(run: Run, iteration: int) -> dict[str, list[float]]:
    groups, scored = _answered(run, iteration), read_jsonl(run.folder / logprob_file(iteration))
    bare = read_jsonl(run.folder / bare_file(iteration))

    def over(of) -> list[float]:
        return [sum(of(r["text"], item) for r in rows) / len(rows) for item, rows in groups]

    return {
        "bound": _bounds(scored),
        "steerability": [steerability(run, item, rows) for item, rows in groups],
        "following": [rule.sides_followed(rows[0]["text"], item.constitutions[0], run.asked(item))
                      for item, rows in groups],
        "answers": [sum(fault(r["text"], item.query.text, c.statements()) is None for r, c in zip(rows, item.constitutions))
                    / len(rows) for item, rows in groups],
        "initial_logprob": [float(np.mean(np.divide(r["logprobs"], r["tokens"]))) for r in bare],
        "length": [sum(r["tokens"] for r in rows) / len(rows) for _, rows in groups],
        "distinct_words": over(lambda text, item: len(set(words(text))) / len(words(text)) if words(text) else 0.0),
        "repetition": over(lambda text, item: repetition(text)),
        "query_words": over(lambda text, item: overlap(text, item.query.text))}


def development_values(run: Run, iteration: int) -> dict[str, float]:
    """Means over the development queries, and their number: what a try is judged by."""
    found = {name: _by_query(run, values) for name, values in _texts(run, iteration).items()}
    known = {name: [v for v in values if v is not None] for name, values in found.items()}
    return {"n": len(found["steerability"])} | {name: sum(values) / len(values) for name, values in known.items()}


def held_out_values(run: Run, iteration: int) -> dict[str, list[float | None]]:
    """Measure -> a value a query, in the order in which the run has its queries."""
    found = _texts(run, iteration)
    for kind in ("bare", "contrary"):
        rows = read_jsonl(run.folder / otherwise_file(kind, iteration))
        found[f"following_{kind}"] = [rule.sides_followed(r["text"], item.constitutions[0], run.asked(item))
                                      for r, item in zip(rows, run.items())]
    return {name: _by_query(run, values) for name, values in found.items()}
