"""Estimators of the paper's tables and figures (arXiv 2404.14313), and the tests that go with them.

Pure functions of numpy arrays; no torch. Two families:

- Mutual information of constitution and response, from log-probs `[N, C, C]`: N items, row = constitution,
  column = the response sampled under that constitution, so that the diagonal holds the matching pairs. Nats.
- Win rates from scores `[N]` of the judged model: 1 win, 0 loss, 0.5 tie. Percent.

An `Estimate` carries its standard error, 95 % interval and n. Input that has no meaning raises ValueError.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

RUNAWAY = 8.0  # a logistic coefficient beyond this (a rate past 99.97 %) comes from separation, not from data
Z95 = 1.96  # the paper's intervals use this rounded quantile, not scipy's


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and 95 % interval; both are None where n = 1 leaves them undefined."""

    value: float
    sem: float | None
    ci95: tuple[float, float] | None
    n: int


def _vector(values, name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"{name}: expected a non-empty list of finite numbers, found shape {x.shape}")
    return x


def mean(values) -> Estimate:
    """Mean of `[N]` values in their own unit: SEM with ddof 1, Student's t interval (holds for 3 seeds too).

    The ± SEM over 250 items of the paper's Figures 2, 3 and 9. One value: `sem` and `ci95` are None.
    """
    x = _vector(values, "values")
    if len(x) == 1:
        return Estimate(float(x[0]), None, None, 1)
    sem = float(x.std(ddof=1) / np.sqrt(len(x)))
    half = float(stats.t.ppf(0.975, len(x) - 1)) * sem
    return Estimate(float(x.mean()), sem, (float(x.mean()) - half, float(x.mean()) + half), len(x))


def share(values) -> Estimate:
    """Share (0 to 1) of `[N]` values that each lie in 0 to 1, with Wilson's interval over N items.

    Never empty or of no width at 0 and 1; on the safe side where an item's value is itself a mean (0.5).
    """
    x = _vector(values, "values")
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"values: expected 0 to 1, found {x.min():g} to {x.max():g}")
    p, n = float(x.mean()), len(x)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * float(np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)))
    return Estimate(p, float(np.sqrt(p * (1 - p) / n)), (max(0.0, centre - half), min(1.0, centre + half)), n)


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
    return mean(estimators[estimator](logprobs))


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
    x = _vector(scores, "scores")
    if not np.isin(x, (0.0, 0.5, 1.0)).all():
        raise ValueError(f"scores: allowed values are 0, 0.5 and 1, found {x[~np.isin(x, (0, 0.5, 1))][0]:g}")
    if ties not in ("half", "loss"):
        raise ValueError(f"ties: allowed values are half and loss, found {ties!r}")
    return x if ties == "half" else np.floor(x)


def normal_interval(percent: float, n: int) -> tuple[float, tuple[float, float], float | None]:
    """The paper's arithmetic (section A.7): (SEM, 95 % interval, t against 50) of a rate, percent but for t.

    SEM = sqrt(p (1 - p) / n), interval p ± 1.96 SEM, t = (p - 0.5) / SEM; t is None at 0 and 100 %.
    """
    sem = float(np.sqrt(percent * (100 - percent) / n))
    return sem, (percent - Z95 * sem, percent + Z95 * sem), (percent - 50) / sem if sem else None


def win_rate(scores, ties: str = "half") -> Estimate:
    """Raw win rate in percent of scores `[N]` in {0, 0.5, 1}, with the paper's normal interval.

    `ties`: "half" (Tables 8-9) counts a tie as half a win, "loss" (Tables 4-7) as none.
    """
    wins = _wins(scores, ties)
    percent = 100 * float(wins.mean())
    sem, ci95, _ = normal_interval(percent, len(wins))
    return Estimate(percent, sem, ci95, len(wins))


def win_rate_stratified(scores, longer, ties: str = "half") -> Estimate:
    """Length-controlled win rate in percent (section 4.1, Figure 2b): the unweighted mean of two strata.

    `longer [N]` is true where the judged response is longer than the baseline's. Each stratum counts the same
    however small it is, and so the SEM is half the root of the summed squares of the strata's SEMs.
    """
    wins, longer = _wins(scores, ties), np.asarray(longer, dtype=bool)
    if longer.shape != wins.shape:
        raise ValueError(f"longer: expected shape {list(wins.shape)}, found {list(longer.shape)}")
    if longer.all() or not longer.any():
        raise ValueError("longer: both strata need an item; every response is on one side of its baseline")
    rates = [100 * float(wins[m].mean()) for m in (longer, ~longer)]
    sems = [normal_interval(r, int(m.sum()))[0] for r, m in zip(rates, (longer, ~longer))]
    value, sem = float(np.mean(rates)), float(np.hypot(*sems)) / 2
    return Estimate(value, sem, (value - Z95 * sem, value + Z95 * sem), len(wins))


def win_rate_logistic(scores, length_difference, ties: str = "loss", ridge: float = 0.0) -> Estimate:
    """Win rate in percent at equal length, by logistic regression (appendix A.5, after AlpacaEval).

    `length_difference [N]` = tokens judged - tokens of the baseline. Maximum likelihood of
    P(win) = sigmoid(a + b tanh(d / sd(d))), sd with ddof 0, d not centred; the estimate is sigmoid(a), the
    fit at d = 0. `ridge` subtracts ridge b^2 / 2 from the log-likelihood (default none). SEM by the delta
    method, interval on the logit scale. The paper prints no formula: this one is ours, and how far it is from
    the printed cells is reported with every comparison.
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
            low, high = (100 * float(special.expit(beta[0] + s * Z95 * se)) for s in (-1, 1))
            return Estimate(100 * value, 100 * value * (1 - value) * se, (low, high), len(wins))
    raise ValueError("scores: the logistic fit does not converge (length separates wins from losses)")


def sign_test(scores) -> float:
    """Exact two-sided p-value of wins against losses in scores `[N]`; ties carry no sign and are left out."""
    x = _wins(scores, "half")
    wins, losses = int((x == 1).sum()), int((x == 0).sum())
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
