"""Estimators of the paper's tables and figures (arXiv 2404.14313), and the tests that go with them.

Pure functions of numpy arrays; no torch. Two families:

- Mutual information of constitution and response, from log-probs `[N, C, C]`: N items, row = constitution,
  column = the response sampled under that constitution, so that the diagonal holds the matching pairs. Nats.
- Win rates from scores `[N]` of the judged model: 1 win, 0 loss, 0.5 tie; of several draws their mean. Percent.

An `Estimate` carries its standard error, 95 % interval and n. Input that has no meaning raises ValueError.
Intervals are of three kinds (their coverage, by `tests/intervals.py`, is in results/README.md): `bounded_interval` of
what lies between two known ends (shares, win rates, lengths up to a cap); Student's t of what does not (`mean`); and the
paper's own arithmetic, `normal_interval`, for what is held against its tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats

RUNAWAY = 8.0  # a logistic coefficient beyond this (a rate past 99.97 %) comes from separation, not from data
Z95 = 1.96  # the paper's intervals use this rounded quantile, not scipy's


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and 95 % interval; `sem` is None where n = 1, `ci95` where nothing defines it."""

    value: float
    sem: float | None
    ci95: tuple[float, float] | None
    n: int


def _vector(values, name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"{name}: expected a non-empty list of finite numbers, found shape {x.shape}")
    return x


def _within(values, name: str, most: float) -> np.ndarray:
    x, slack = _vector(values, name), 1e-9 * most  # a mean may end one rounding beyond
    if x.min() < -slack or x.max() > most + slack:
        raise ValueError(f"{name}: expected 0 to {most:g}, found {x.min():g} to {x.max():g}")
    return np.clip(x, 0, most)


def mean(values, most: float = np.inf) -> Estimate:
    """Mean of `[N]` values in their own unit: SEM with ddof 1, Student's t interval, which ends at `most`, the most that
    a value can be.

    The ± SEM over 250 items of the paper's Figures 2, 3 and 9. One value: `sem` and `ci95` are None. Equal values: no
    `ci95`, since they show no spread and no bound says what was missed. Skewed values are covered less often than 95 %.
    """
    x = _vector(values, "values")
    if len(x) == 1:
        return Estimate(float(x[0]), None, None, 1)
    value, sem = float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))
    half = float(stats.t.ppf(0.975, len(x) - 1)) * sem
    return Estimate(value, sem, (value - half, min(value + half, most)) if np.ptp(x) else None, len(x))


def bounded_interval(*parts: tuple[float, float, float]) -> tuple[float, float]:
    """95 % interval of a mean of values in 0 to 1, from their mean, variance (ddof 0) and number; of several `parts`, of
    the unweighted mean of their means.

    Each end is a quantile of a Beta distribution. For the upper one a value of 1 joins the n values, and all get random
    (Dirichlet) weights, as in Gaffke's bound (2005), whose mean and variance the Beta has: no value yet unseen can be
    worse. The lower one mirrors it. Of values 0 and 1 that is Clopper and Pearson's exact interval. Of few other values
    two moments alone would be a little short; the factor 1 + 2 (1 - r) / (n + 2), where r is the variance's share of
    the most possible, mends that (the 2 by the coverage of two-valued distributions between 0 and 1).
    """
    ends = []
    for end, level in ((0.0, 0.025), (1.0, 0.975)):
        centre = spread = 0.0
        for value, variance, n in parts:
            m = (n * value + end) / (n + 1)
            s = (n * (variance + (value - m) ** 2) + (end - m) ** 2) / (n + 1)
            r = min(1.0, s / (m * (1 - m))) if 0 < m < 1 else 1.0
            centre += m / len(parts)
            spread += s / (n + 2) * (1 + 2 * (1 - r) / (n + 2)) / len(parts) ** 2
        k = centre * (1 - centre) / spread - 1 if spread > 0 and 0 < centre < 1 else 0.0
        ends.append(float(special.betaincinv(centre * k, (1 - centre) * k, level)) if k > 0 else end)
    return ends[0], ends[1]


def bounded(values, most: float = 1.0) -> Estimate:
    """Mean of `[N]` values that each lie in 0 to `most`, in their own unit: SEM with ddof 1, `bounded_interval`.

    The interval has a width where all values are equal, and for one value, which has no SEM.
    """
    x = _within(values, "values", most)
    low, high = bounded_interval((float(x.mean()) / most, float(x.var()) / most**2, len(x)))
    return replace(mean(x), ci95=(most * low, most * high))


def share(values) -> Estimate:
    """Share (0 to 1) of `[N]` values that each lie in 0 to 1: yes or no, or an item's own mean. See `bounded`."""
    return bounded(values)


def change(values) -> Estimate:
    """Mean of `[N]` differences of shares, each from -1 to 1, of the same items. See `bounded`."""
    shifted = bounded(_vector(values, "values") + 1, 2)
    return replace(shifted, value=shifted.value - 1, ci95=tuple(end - 1 for end in shifted.ci95))


def of_ratio(tops, bottoms) -> np.ndarray:
    """`[N]` values whose mean is that of `tops` divided by that of `bottoms`, with the spread that this ratio of means has
    (linearised): for `mean`, or differences of it. The bottoms' mean is not 0."""
    tops, bottoms = _vector(tops, "tops"), _vector(bottoms, "bottoms")
    ratio = tops.mean() / bottoms.mean()
    return ratio + (tops - ratio * bottoms) / bottoms.mean()


# ---- mutual information: logprobs [N, C, C] -> [N]

def _matrices(logprobs) -> np.ndarray:
    x = np.asarray(logprobs, dtype=np.float64)
    if x.ndim != 3 or x.shape[1] != x.shape[2] or 0 in x.shape:
        raise ValueError(f"logprobs: expected shape [N, C, C], found {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError("logprobs: every entry must be finite")
    return x


def _diagonal(x: np.ndarray) -> np.ndarray:
    return np.diagonal(x, axis1=1, axis2=2)


def infonce(logprobs) -> np.ndarray:
    """InfoNCE bound per item, `[N, C, C]` -> `[N]` nats: Eq 1, the contrast over constitutions.

    mean_j log( p(y_j|c_j) / mean_k p(y_j|c_k) ). At most log C, and in expectation a lower bound on the
    information for any critic: length-normalised log-probs are as valid as summed ones (Poole et al. 2019).
    """
    x = _matrices(logprobs)
    return (_diagonal(x) - special.logsumexp(x, axis=1)).mean(axis=1) + np.log(x.shape[1])


def symmetric_infonce(logprobs) -> np.ndarray:
    """log C minus the training loss per item, `[N, C, C]` -> `[N]` nats: Eq 2, mean of both contrasts.

    The contrast over responses is a bound only under equal marginals, an assumption of the paper's section 3.
    """
    x = _matrices(logprobs)
    responses = (_diagonal(x) - special.logsumexp(x, axis=2)).mean(axis=1) + np.log(x.shape[1])
    return (infonce(x) + responses) / 2


def mean_of_logs(logprobs) -> np.ndarray:
    """The estimator plotted in Figures 2, 3 and 9, `[N, C, C]` -> `[N]` nats; give it SUMMED log-probs.

    mean_j ( log p(y_j|c_j) - mean_k log p(y_j|c_k) ): the mean of logs; InfoNCE takes the log of the mean.
    By Jensen it is at least InfoNCE; it has no ceiling at log C and grows with length. It is no lower bound.
    """
    x = _matrices(logprobs)
    return (_diagonal(x) - x.mean(axis=1)).mean(axis=1)


def mutual_information(logprobs, estimator: str = "infonce") -> Estimate:
    """Mean over N items of an MI estimator by name, `[N, C, C]` -> nats, with SEM and 95 % interval.

    `estimator`: "infonce" (Eq 1), "symmetric_infonce" (Eq 2) or "mean_of_logs" (what the paper plots).
    """
    estimators = {"infonce": infonce, "symmetric_infonce": symmetric_infonce, "mean_of_logs": mean_of_logs}
    if estimator not in estimators:
        raise ValueError(f"estimator: allowed values are {', '.join(estimators)}, found {estimator!r}")
    most = np.inf if estimator == "mean_of_logs" else float(np.log(np.shape(logprobs)[-1]))
    return mean(estimators[estimator](logprobs), most)


def _diagonal_wins(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    alone = (x == top).sum(axis=axis) == 1
    return ((_diagonal(x) == top.squeeze(axis)) & alone).mean(axis=1)


def accuracy_row(logprobs) -> np.ndarray:
    """Share of constitutions whose own response is the likeliest of the row, `[N, C, C]` -> `[N]` in 0..1.

    A tie for the maximum counts as wrong: a matrix of equal entries identifies nothing.
    """
    return _diagonal_wins(_matrices(logprobs), axis=2)


def accuracy_col(logprobs) -> np.ndarray:
    """Share of responses likeliest under their own constitution, `[N, C, C]` -> `[N]` in 0..1; ties wrong."""
    return _diagonal_wins(_matrices(logprobs), axis=1)


# ---- win rates: scores [N] -> percent

def _wins(scores, ties: str) -> np.ndarray:
    x = _within(scores, "scores", 1.0)
    if ties not in ("half", "loss"):
        raise ValueError(f"ties: allowed values are half and loss, found {ties!r}")
    return x if ties == "half" else np.where(x == 0.5, 0.0, x)


def normal_interval(percent: float, n: int) -> tuple[float, tuple[float, float], float | None]:
    """The paper's arithmetic (section A.7): (SEM, 95 % interval, t against 50) of a rate, percent but for t.

    SEM = sqrt(p (1 - p) / n), interval p ± 1.96 SEM, t = (p - 0.5) / SEM; t is None at 0 and 100 %. For the paper's
    numbers alone: at 0 and 100 % it has no width, and at 97 % of 32 it holds the rate 62 times in 100.
    """
    sem = float(np.sqrt(percent * (100 - percent) / n))
    return sem, (percent - Z95 * sem, percent + Z95 * sem), (percent - 50) / sem if sem else None


def as_published(rate: Estimate, *, logit: bool = False) -> Estimate:
    """A win rate in percent with the paper's interval, value ± 1.96 SEM, in place of ours; for the published record
    alone. `logit`: ± 1.96 standard errors on the logit scale, as its logistic cells are shown."""
    if rate.sem is None:
        return replace(rate, ci95=None)
    p, half = rate.value / 100, Z95 * rate.sem
    if not logit or not 0 < p < 1:
        return replace(rate, ci95=(rate.value - half, rate.value + half))
    low, high = (100 * float(special.expit(special.logit(p) + s * half / 100 / (p * (1 - p)))) for s in (-1, 1))
    return replace(rate, ci95=(low, high))


def _percent(*parts: tuple[float, float, float]) -> tuple[float, float]:
    low, high = bounded_interval(*parts)
    return 100 * low, 100 * high


def win_rate(scores, ties: str = "half") -> Estimate:
    """Raw win rate in percent of scores `[N]` in 0 to 1, with `bounded_interval`, which knows that ties vary less.

    `ties`: "half" (Tables 8-9) counts a tie, 0.5, as half a win, "loss" (Tables 4-7) as none; a score that is a mean of
    several draws has its draws' ties counted before. The SEM is the paper's, as if there were no ties; None for one score.
    """
    wins = _wins(scores, ties)
    percent, n = 100 * float(wins.mean()), len(wins)
    return Estimate(percent, normal_interval(percent, n)[0] if n > 1 else None,
                    _percent((float(wins.mean()), float(wins.var()), n)), n)


def win_rate_stratified(scores, longer, ties: str = "half") -> Estimate:
    """Length-controlled win rate in percent (section 4.1, Figure 2b): the unweighted mean of two strata.

    `longer [N]` is true where the judged response is longer than the baseline's. Each stratum counts the same
    however small it is, and so the SEM is half the root of the summed squares of the strata's SEMs; it is None where a
    stratum has one item. The interval is the `bounded_interval` of both.
    """
    wins, longer = _wins(scores, ties), np.asarray(longer, dtype=bool)
    if longer.shape != wins.shape:
        raise ValueError(f"longer: expected shape {list(wins.shape)}, found {list(longer.shape)}")
    if longer.all() or not longer.any():
        raise ValueError("longer: both strata need an item; every response is on one side of its baseline")
    strata = [wins[m] for m in (longer, ~longer)]
    rates = [100 * float(s.mean()) for s in strata]
    value = float(np.mean(rates))
    sem = float(np.hypot(*(normal_interval(r, len(s))[0] for r, s in zip(rates, strata)))) / 2
    return Estimate(value, sem if min(map(len, strata)) > 1 else None,
                    _percent(*((float(s.mean()), float(s.var()), len(s)) for s in strata)), len(wins))


def win_rate_logistic(scores, length_difference, ties: str = "loss", ridge: float = 0.0) -> Estimate:
    """Win rate in percent at equal length, by logistic regression (appendix A.5, after AlpacaEval).

    `length_difference [N]` = tokens judged - tokens of the baseline. Maximum likelihood of
    P(win) = sigmoid(a + b tanh(d / sd(d))), sd with ddof 0, d not centred; the estimate is sigmoid(a), the
    fit at d = 0. `ridge` subtracts ridge b^2 / 2 from the log-likelihood (default none). SEM by the delta
    method. The interval is the `bounded_interval` of as many yes-or-no items as would have this SEM (Korn and Graubard's
    effective number, 1998). The paper prints no formula: this one is ours, and how far it is from the printed cells is
    reported with every comparison.
    """
    wins, d = _wins(scores, ties), _vector(length_difference, "length_difference")
    if d.shape != wins.shape:
        raise ValueError(f"length_difference: expected shape {list(wins.shape)}, found {list(d.shape)}")
    if not d.std():
        return win_rate(scores, ties)
    design = np.stack([np.ones_like(d), np.tanh(d / d.std())], axis=1)
    beta = np.zeros(2)
    for _ in range(50):  # Newton's method; a few steps suffice unless length separates wins from losses
        fitted = special.expit(design @ beta)
        information = design.T @ (design * (fitted * (1 - fitted))[:, None]) + np.diag([0.0, ridge])
        if np.linalg.cond(information) > 1e12:
            break
        step = np.linalg.solve(information, design.T @ (wins - fitted) - [0.0, ridge * beta[1]])
        beta = beta + step
        if np.abs(step).max() < 1e-10 and np.abs(beta).max() < RUNAWAY:
            value, se = float(special.expit(beta[0])), float(np.sqrt(np.linalg.inv(information)[0, 0]))
            spread = value * (1 - value)
            ci95 = _percent((value, spread, 1 / (spread * se**2)))
            return Estimate(100 * value, 100 * value * (1 - value) * se, ci95, len(wins))
    raise ValueError("scores: the logistic fit does not converge (length separates wins from losses)")


def difference_interval(first: float, n: int, second: float, m: int) -> tuple[float, float]:
    """95 % interval of first - second, two rates in percent over n and m items that have nothing in common.

    Agresti and Caffo's (2000): one success and one failure more in each, so that 0 and 100 % are not taken for certain.
    """
    a, b = (n * first / 100 + 1) / (n + 2), (m * second / 100 + 1) / (m + 2)
    half = Z95 * float(np.sqrt(a * (1 - a) / (n + 2) + b * (1 - b) / (m + 2)))
    return 100 * max(a - b - half, -1.0), 100 * min(a - b + half, 1.0)


def sign_test(scores) -> float:
    """Exact two-sided p-value of scores `[N]` above 0.5 against those below; ties carry no sign and are left out."""
    x = _wins(scores, "half")
    wins, losses = int((x > 0.5).sum()), int((x < 0.5).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _bootstrap(statistic: Callable[[np.ndarray], float], n: int, draws: int, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    sample = np.array([statistic(rng.integers(n, size=n)) for _ in range(draws)])
    low, high = np.quantile(sample, [0.025, 0.975])
    return Estimate(float(statistic(np.arange(n))), float(sample.std(ddof=1)), (float(low), float(high)), n)


def item_bootstrap(values, statistic: Callable = np.mean, *, draws: int = 2000, seed: int = 0) -> Estimate:
    """Percentile bootstrap over items: `values [N, ...]` resampled along axis 0, in the statistic's unit."""
    x = np.asarray(values, dtype=np.float64)
    return _bootstrap(lambda i: statistic(x[i]), len(x), draws, seed)


def paired_bootstrap(first, second, statistic: Callable = np.mean, *, draws: int = 2000,
                     seed: int = 0) -> Estimate:
    """statistic(first) - statistic(second) on the same items, resampled together, in the statistic's unit.

    `first` and `second` are `[N, ...]`, item by item the same query judged for two models.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) != len(b):
        raise ValueError(f"paired_bootstrap: the same items are needed twice, found {len(a)} and {len(b)}")
    return _bootstrap(lambda i: statistic(a[i]) - statistic(b[i]), len(a), draws, seed)


def detectable_rate(n: int, power: float = 0.8) -> float:
    """Smallest true win rate in percent that n items tell from 50 with this power (two-sided 5 %, normal)."""
    half = 50 / np.sqrt(n)
    return 50 + float((stats.norm.ppf(0.975) + stats.norm.ppf(power)) * half)
