"""How often the 95 % intervals of repro/base/metrics.py hold the truth, and how wide they are: the table of results/README.md.

Run: .venv/bin/python tests/intervals.py    (about half a minute; the same numbers each time)
0 and 1 and scores with ties: every outcome, weighted by its probability. The rest: fixed-seed simulation.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy import special, stats

from repro.base import metrics

P = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
TIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # shares of items that tie; of a rate p at most 2 (1 - p) can
Found = tuple[float, float]  # coverage, mean width


@cache
def ours(mean: float, variance: float, n: int) -> tuple[float, float]:
    return metrics.bounded_interval((mean, variance, n))


def wilson(mean: float, variance: float, n: int) -> tuple[float, float]:
    ci = stats.binomtest(round(mean * n), n).proportion_ci(method="wilson")
    return ci.low, ci.high


def normal(mean: float, variance: float, n: int) -> tuple[float, float]:
    """What win rates had: the paper's, ends cut."""
    low, high = metrics.normal_interval(100 * mean, n)[1]
    return max(low, 0) / 100, min(high, 100) / 100


def students(mean: float, variance: float, n: int) -> tuple[float, float]:
    """What shares had: Student's t over the values, ends cut."""
    half = stats.t.ppf(0.975, n - 1) * np.sqrt(variance / (n - 1))
    return max(mean - half, 0.0), min(mean + half, 1.0)


def weigh(intervals, weights, truth: float) -> Found:
    low, high = np.array(intervals).T
    inside = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
    return float(weights @ inside / weights.sum()), float(weights @ (high - low) / weights.sum())


@cache
def _outcomes(n: int, method: Callable, ties: bool) -> tuple:
    wins, half = np.array([(w, t) for w in range(n + 1) for t in range((n - w) * ties + 1)]).T
    mean = (wins + half / 2) / n
    return wins, half, [method(m, v, n) for m, v in zip(mean.tolist(), ((wins + half / 4) / n - mean**2).tolist())]


def scores(n: int, p: float, ties: float = 0.0, method: Callable = ours) -> Found:
    """Exactly: n scores with a mean of p, of which `ties` are 0.5 (fewer where p allows fewer)."""
    ties = min(ties, 2 * p, 2 * (1 - p))
    wins, half, intervals = _outcomes(n, method, ties > 0)
    shares = np.array([p - ties / 2, ties, max(0.0, 1 - p - ties / 2)])
    counts = np.stack([wins, half, n - wins - half], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.exp(special.gammaln(n + 1) - special.gammaln(counts + 1).sum(1) + special.xlogy(counts, shares).sum(1))
    return weigh(intervals, weight, p)


def simulate(draw: Callable, truth: float, n: int, method: Callable = ours, times: int = 4000) -> Found:
    """`draw(generator, shape)` gives values in 0 to 1 with the mean `truth`."""
    x = draw(np.random.default_rng(0), (times, n))
    found = [method(float(m), float(v), n) for m, v in zip(x.mean(1), x.var(1))]
    return weigh(found, np.ones(times), truth)


def draws(p: float, m: int = 3, alike: float = 0.0) -> Callable:
    """Means of m draws of 0 or 1 an item; `alike`: the share of items whose draws all agree."""
    def draw(rng, shape):
        free, same = rng.binomial(m, p, shape) / m, (rng.random(shape) < p).astype(float)
        return np.where(rng.random(shape) < alike, same, free)
    return draw


def lengths(centre: float) -> tuple[Callable, float]:
    """Log-normal lengths cut at the cap, in parts of it; and their mean."""
    def draw(rng, shape):
        return np.minimum(np.exp(rng.normal(np.log(centre), 0.5, shape)), 1.0)
    return draw, float(draw(np.random.default_rng(1), 10**6).mean())


def judged(kind: str, n: int, p: float, ties: float, times: int) -> tuple[Found, Found]:
    """A stratified or logistic win rate, ours and the paper's interval, where length moves the log-odds by 1 at most."""
    rng, found = np.random.default_rng(0), []
    for _ in range(times):
        d = np.round(rng.normal(0, 8, n))
        chance = special.expit(special.logit(p) + np.where(d > 0, 1.0, -1.0)) if kind == "stratified" else \
            special.expit(special.logit(p) + np.tanh(d / 8))
        tie, u = np.minimum(ties, 2 * np.minimum(chance, 1 - chance)), rng.random(n)
        x = np.where(u < chance - tie / 2, 1.0, np.where(u < chance + tie / 2, 0.5, 0.0))
        try:
            e = metrics.win_rate_stratified(x, d > 0) if kind == "stratified" else metrics.win_rate_logistic(x, d, "half")
        except ValueError:  # no record then: one stratum is empty, or no finite fit
            continue
        if e.sem is not None:
            before = metrics.as_published(e, logit=kind == "logistic").ci95
            found.append((e.ci95, (max(before[0], 0.0), min(before[1], 100.0))))
    truth = 100 * (special.expit(special.logit(p) + np.array([1, -1])).mean() if kind == "stratified" else p)
    return tuple(weigh([f[k] for f in found], np.ones(len(found)), truth) for k in (0, 1))


def bounds(kind: str, n: int, apart: float, times: int = 4000) -> Found:
    """Student's t of InfoNCE over C = 4 made constitutions whose log-probs lie `apart` from each other's."""
    rng = np.random.default_rng(0)
    own = getattr(metrics, kind)(rng.normal(size=(100000, 4, 4)) + apart * np.eye(4))
    picked = [metrics.mean(own[i], np.log(4)).ci95 for i in rng.integers(len(own), size=(times, n))]
    return weigh(picked, np.ones(times), float(own.mean()))


def table() -> str:
    """Markdown: the least coverage over the settings of a row, and the mean width over them, ours and before."""
    lines = ["| values | n | least coverage | mean width | before: least coverage | mean width |",
             "|---|---|---|---|---|---|"]

    def row(what, n, new, old, scale=1):
        cells = [f"{min(c for c, _ in f):.3f} | {scale * np.mean([w for _, w in f]):.3g}" if f else "as now |"
                 for f in (new, old)]
        lines.append(f"| {what} | {n} | {cells[0]} | {cells[1]} |")

    for n in (3, 8, 32, 250):
        row("0 and 1", n, [scores(n, p) for p in P], [scores(n, p, method=students) for p in P])
    for n in (8, 250):
        row("win rate with 10 to 90 % ties, raw (%)", n, [scores(n, p, t) for p in P for t in TIES[1:]],
            [scores(n, p, t, normal) for p in P for t in TIES[1:]], 100)
    for n in (3, 32):
        grid = [(p, draws(p, m, a)) for p in P for m in (2, 3, 4) for a in (0.0, 0.5)]
        row("means of 2 to 4 draws", n, [simulate(d, p, n) for p, d in grid],
            [simulate(d, p, n, students) for p, d in grid])
    for kind, sizes in (("stratified", (10, 250)), ("logistic", (32,))):
        for n in sizes:
            both = [judged(kind, n, p, t, 600) for p in (0.5, 0.8, 0.95) for t in (0.0, 0.5)]
            row(f"win rate, {kind} (%)", n, [a for a, _ in both], [b for _, b in both])
    for n in (6, 32):
        made = [lengths(c) for c in (0.4, 0.8, 1.5)]
        row("lengths, 3 to 79 % at the cap (of the cap)", n, [simulate(d, m, n) for d, m in made],
            [simulate(d, m, n, students) for d, m in made])
    for what, n, apart in (("middling", 6, (0.2, 1)), ("near log 4", 32, (3, 6))):
        row(f"InfoNCE, {what} (nats; Student's t)", n, [bounds("infonce", n, a) for a in apart], [])
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
