"""What an objective buys and what it costs, from the files of a run: a value a query; then over queries and seeds.

Every value is of one held-out query (over whose items, of a pool, it is averaged).
"""

from collections.abc import Sequence

import numpy as np

from repro.base import metrics
from repro.base.metrics import Estimate
from repro.base.records import read_jsonl
from repro.judges import likelihood, rule
from repro.stages.folder import evaluation_file, logprob_file
from repro.stages.measure import steerability
from repro.stages.run import Run
from repro.text.rules import words

MEASURES = {  # name -> what it is, in words; the least and the most that a query's value can be
    "bound": ("InfoNCE bound on the mutual information of constitution and response, nats", None),
    "steerability": ("sides of the constitutions followed, by rule, over all constitutions, 0 to 1", (0, 1)),
    "following": ("sides followed under the all-positive constitution, 0 to 1", (0, 1)),
    "following_bare": ("the same sides followed without a constitution in the prompt, 0 to 1", (0, 1)),
    "following_contrary": ("the same, under it, where the user's last sentence asks for the opposite, 0 to 1", (0, 1)),
    "length": ("tokens of a response, over all constitutions", None),
    "initial_logprob": ("mean log-prob a token of the responses under the initial model, no constitution, nats", None),
    "distinct_words": ("different words among the words of a response, 0 to 1", (0, 1)),
    "repetition": ("repeated word trigrams among those of a response, 0 to 1", (0, 1)),
    "query_words": ("words taken from the query among the content words of a response, 0 to 1", (0, 1))}


def bare_file(iteration: int) -> str:
    """Log-probs of the responses under the initial model without a constitution."""
    return f"logprobs/bare-{iteration}.jsonl"


def _groups(run: Run, iteration: int) -> list[tuple]:
    """(item, its responses, its log-prob row)."""
    rows, scored = read_jsonl(run.folder / evaluation_file(iteration)), read_jsonl(run.folder / logprob_file(iteration))
    C = len(run.items()[0].constitutions)
    return [(item, rows[k * C: (k + 1) * C], scored[k]) for k, item in enumerate(run.items())]


def _by_query(run: Run, values: Sequence[float]) -> list[float]:
    found: dict[str, list[float]] = {}
    for item, value in zip(run.items(), values):
        found.setdefault(item.query.id, []).append(float(value))
    return [sum(each) / len(each) for each in found.values()]


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
    return {"n": len(found["bound"])} | {name: sum(values) / len(values) for name, values in found.items()}


def held_out_values(run: Run, iteration: int) -> dict[str, list[float]]:
    """Measure -> a value a query, in the order of `queries` of the record."""
    found = _texts(run, iteration)
    for kind in ("bare", "contrary"):
        rows = read_jsonl(run.folder / f"responses/{kind}-{iteration}.jsonl")
        found[f"following_{kind}"] = [rule.sides_followed(r["text"], item.constitutions[0])
                                      for r, item in zip(rows, run.items())]
    return {name: _by_query(run, found[name]) for name in MEASURES}


# ---- over queries and seeds


def estimate(name: str, values: Sequence[Sequence[float]]) -> Estimate:
    """Of one measure the mean over seeds and queries [seed][query]; its interval is about the queries, over whose seeds the
    values are averaged first."""
    per_query = np.mean(values, axis=0)
    return metrics.share(per_query) if MEASURES[name][1] else metrics.mean(per_query)


def difference(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]], *, draws: int = 2000) -> Estimate:
    """Of two objectives [seed][query], on the same queries and seeds: paired bootstrap over queries, whose seeds stay
    together."""
    return metrics.paired_bootstrap(np.mean(values, axis=0), np.mean(others, axis=0), draws=draws)
