"""The intervals hold the truth 95 times in 100 at every n and rate, and are not wide for it. See tests/intervals.py."""


import intervals
import numpy as np
import pytest
from intervals import P, judged, lengths, normal, ours, scores, simulate, wilson
from scipy import special, stats

from repro.base import metrics as m
from repro.report.changes import lines, verdict
from repro.report.figures import draw, draw_principles, draw_win_rate
from repro.report.page import _cell

SIZES = (3, 8, 16, 32, 64, 125, 250)
MIRRORED = sorted({*P, *(round(1 - p, 2) for p in P)})


def of_zero_and_one(count: int, n: int) -> list[float]:
    return [1.0] * count + [0.0] * (n - count)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 24, 32, 250])
def test_a_share_of_zeros_and_ones_is_clopper_and_pearsons(n):
    for k in range(n + 1):
        exact = stats.binomtest(k, n).proportion_ci(method="exact")
        assert m.share(of_zero_and_one(k, n)).ci95 == pytest.approx((exact.low, exact.high), abs=1e-9)
        assert m.win_rate(of_zero_and_one(k, n)).ci95 == pytest.approx((100 * exact.low, 100 * exact.high), abs=1e-7)


@pytest.mark.parametrize("n", SIZES)
def test_coverage_and_width_of_zeros_and_ones(n):
    """Exactly, at every rate; at most a little wider than Wilson's, which misses 15 of 100 near 1."""
    found = [scores(n, p) for p in MIRRORED]
    assert min(c for c, _ in found) >= 0.95 - 1e-6
    width, wilsons = (np.mean([w for _, w in f]) for f in (found, [scores(n, p, method=wilson) for p in MIRRORED]))
    assert width < (1 + 0.7 / np.sqrt(n)) * wilsons
    old = min(scores(n, p, method=normal)[0] for p in MIRRORED)
    assert old < 0.93, "what this test tells apart"


@pytest.mark.parametrize("ties", intervals.TIES[1:])
@pytest.mark.parametrize("n", [3, 8, 16, 32, 64])
def test_coverage_and_width_with_ties(n, ties):
    """Exactly; and a rate of many ties is known better than one of none."""
    found = [scores(n, p, ties) for p in MIRRORED]
    assert min(c for c, _ in found) >= 0.95
    if n >= 16 and ties >= 0.5:
        assert scores(n, 0.5, ties)[1] < 0.9 * scores(n, 0.5)[1]


def test_coverage_with_ties_at_the_papers_size():
    for ties in (0.1, 0.9):
        found = [scores(250, p, ties) for p in P]
        assert min(c for c, _ in found) >= 0.948
        assert np.mean([w for _, w in found]) < np.mean([scores(250, p, ties, normal)[1] for p in P])


@pytest.mark.parametrize("draws", [2, 3, 4])
@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, 8, 32, 125])
def test_coverage_and_width_of_means_of_several_draws(n, alike, draws):
    found = [simulate(intervals.draws(p, draws, alike), p, n, times=1500) for p in (0.5, 0.7, 0.9, 0.97, 0.99, 0.03)]
    assert min(c for c, _ in found) >= 0.94
    if n >= 8 and not alike:
        assert found[0][1] < 0.93 * scores(n, 0.5)[1]


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 32, 64, 250])
def test_coverage_of_any_two_values(n):
    """Exactly: a with 1 - q, b with q, over all of a < b and q. What two moments alone would leave at 0.92."""
    k, q = np.arange(n + 1), np.r_[np.geomspace(0.002, 0.1, 25), np.linspace(0.1, 0.9, 41)[1:],
                                   1 - np.geomspace(0.1, 0.002, 25)[1:]]
    weight = stats.binom.pmf(k[None], n, q[:, None])
    for a, b in ((0, 0.5), (0.1, 1), (0.25, 0.75), (0.5, 1), (0.75, 1), (0.9, 1), (0.95, 1), (0.2, 0.9), (0.8, 0.9)):
        mean = a + (b - a) * k / n
        low, high = np.array([ours(x, (b - a) ** 2 * j / n * (1 - j / n), n) for x, j in zip(mean.tolist(), k.tolist())]).T
        truth = (a + (b - a) * q)[:, None]
        covered = (weight * ((low <= truth + 1e-9) & (truth - 1e-9 <= high))).sum(1)
        assert covered.min() >= 0.945, (a, b, float(q[covered.argmin()]))


@pytest.mark.parametrize("kind, n", [("stratified", 6), ("stratified", 16), ("stratified", 64), ("logistic", 16),
                                     ("logistic", 64)])
def test_coverage_and_width_with_length_control(kind, n):
    for p, ties in ((0.5, 0.0), (0.5, 0.6), (0.8, 0.0), (0.95, 0.3)):
        (covered, width), (_, before) = judged(kind, n, p, ties, 400)
        assert covered >= 0.94 and width < 80
        assert n < 64 or width < 1.2 * before


@pytest.mark.parametrize("n", [6, 32])
@pytest.mark.parametrize("centre", [0.4, 0.8, 1.5, 5.0])
def test_coverage_of_lengths_up_to_a_cap(n, centre):
    draw_lengths, truth = lengths(centre)
    covered, width = simulate(draw_lengths, truth, n, times=2000)
    assert covered >= 0.95 and width < (0.62 if n == 6 else 0.25)
    e = m.bounded([48] * n, 48)
    assert e.ci95 == (pytest.approx(48 * 0.025 ** (1 / n)), 48) and (e.value, e.sem) == (48, 0)


def test_coverage_of_means_without_bounds_is_written_down():
    """Student's t: right for symmetric values, short for skewed ones, and it ends at the most that is possible."""
    assert min(intervals.bounds("infonce", n, 0.2, 2000)[0] for n in (6, 32)) >= 0.94
    assert intervals.bounds("infonce", 6, 6, 2000)[0] < 0.9  # as results/README.md says
    assert m.mean([1.3, 1.1, 0.5], np.log(4)).ci95[1] == np.log(4)
    matrices = np.array([9, 9, 1])[:, None, None] * np.eye(4)
    assert m.mutual_information(matrices).ci95[1] == np.log(4) < m.mutual_information(matrices, "mean_of_logs").ci95[1]
    assert m.mean([2.0, 2.0, 2.0]) == m.Estimate(2.0, 0.0, None, 3)


@pytest.mark.parametrize("value", [0.0, 0.2, 0.5, 2 / 3, 0.97, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 32, 250])
def test_equal_values_have_a_width_and_one_value_no_sem(value, n):
    """At least as far as the values that n draws leave unseen 1 time in 40 may lie, were they rare and at the end."""
    for e, unit in ((m.share([value] * n), 1), (m.win_rate([value] * n), 100), (m.bounded([48 * value] * n, 48), 48)):
        low, high = (end / unit for end in e.ci95)
        assert 0 <= low <= value <= high <= 1 and high - low > 1 / (n + 2)
        assert (e.sem is None) == (n == 1) and e.n == n
    assert m.win_rate_logistic([value] * n, [0] * n, "half") == m.win_rate([value] * n)
    e = m.win_rate_stratified([value] * (n + 1), [True] * n + [False])
    assert e.sem is None and e.ci95[0] <= e.value + 1e-9 and e.value - 1e-9 <= e.ci95[1] and np.ptp(e.ci95) > 1


def test_scores_that_are_means_of_draws():
    scores, d = [2 / 3, 1, 0, 1 / 3, 0.5], [3, -2, 1, -4, 2]
    assert m.win_rate(scores).value == pytest.approx(50) and m.win_rate(scores, "loss").value == pytest.approx(40)
    assert m.win_rate_stratified(scores, [x > 0 for x in d]).n == 5
    assert 0 < m.win_rate_logistic(scores, d, "half").value < 100
    assert m.sign_test(scores) == 1.0 and m.sign_test([2 / 3] * 6) == pytest.approx(2 / 64)
    with pytest.raises(ValueError, match="scores: expected 0 to 1, found 0 to 1.5"):
        m.win_rate([0, 1.5])


def test_the_interval_holds_the_value_and_mirrors():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        for x in (rng.random(n), rng.random(n) ** 9, rng.integers(4, size=n) / 3, 0.3 + 0 * rng.random(n)):
            low, high = m.share(x).ci95
            assert low <= x.mean() <= high
            assert m.share(1 - x).ci95 == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_the_published_arithmetic_is_apart():
    """`as_published` is p ± 1.96 SEM, or that on the logit scale, of the same value and SEM."""
    e = m.win_rate([1] * 142 + [0] * 108)
    assert m.as_published(e).ci95 == m.normal_interval(56.8, 250)[1] != e.ci95
    fit = m.win_rate_logistic([1, 1, 1, 0, 1, 1, 0, 0], [4] * 4 + [-4] * 4)
    p = fit.value / 100
    half = 1.96 * fit.sem / 100 / (p * (1 - p))
    assert m.as_published(fit, logit=True).ci95 == pytest.approx(
        tuple(100 * special.expit(special.logit(p) + s * half) for s in (-1, 1)))
    assert m.as_published(m.win_rate([1.0])).ci95 is None


def test_the_difference_of_two_rates():
    """Exactly: of 3 and of 32 items against 250; and 3 wins of 3 do not contradict a rate of 65.6."""
    for n in (3, 8, 32):
        for p in (0.5, 0.8, 0.95):
            k, j = np.arange(n + 1), np.arange(251)
            weight = stats.binom.pmf(k, n, p)[:, None] * stats.binom.pmf(j, 250, 0.65)
            pairs = np.array([[m.difference_interval(100 * a / n, n, 100 * b / 250, 250) for b in j] for a in k])
            covered = (pairs[..., 0] <= 100 * (p - 0.65)) & (100 * (p - 0.65) <= pairs[..., 1])
            assert (weight * covered).sum() >= 0.93
    low, high = m.difference_interval(100.0, 3, 65.6, 250)
    assert low < 0 < high < 100


# ---- where they are shown

def row(**more) -> dict:
    keys = ("cot", "baseline", "judge", "estimator", "ties", "length", "principle")
    return dict.fromkeys(keys) | {"subset": "s", "iteration": 0, "model": "m", "writer": "hand", "seed": 0, "value": 0.5,
                                  "sem": None, "ci95": None, "n": 1} | more


def made(sem) -> list[dict]:
    kinds = [{"metric": "mi", "estimator": "infonce"}, {"metric": "mi", "estimator": "infonce", "principle": "brief"},
             {"metric": "length_tokens"}, {"metric": "following"}, {"metric": "following", "principle": "brief"},
             {"metric": "win_rate", "judge": "rule", "baseline": "m", "ties": "half", "length": "raw"},
             {"metric": "win_rate", "judge": "llm", "baseline": "m", "ties": "half", "length": "raw"}]
    return [row(iteration=i, sem=sem, n=2 if sem else 1, **kind) for i in (0, 1) for kind in kinds]


def test_one_query_is_said_to_be_one():
    """No "±0.000", and no change that is seen, where one query has no SEM."""
    row = {"query": "q", "subset": "s", "constitutions": ["a"], "sides": {"0": ["0"], "1": ["1"]}, "tokens": {"0": [9], "1": [4]},
           "bound": {"0": 0.25, "1": 0.5}}
    (line,) = lines("mine", {0: [row]})
    assert verdict(line) == [
        "The bound on mutual information is not seen to move: 0.25 -> 0.50, +0.25, in nats (n 1, 1 seed).",
        "The constitution is not seen to be followed more or less: 0.00 -> 1.00, +1.00 [-0.95, +1.00], as the share of its sides (n 1, 1 seed).",
        "Among responses that answer, the share of sides followed is not seen to change: 0.00 -> 1.00, +1.00.",
        "No change of how many answer is seen: 1.00 -> 1.00, +0.00 [-0.97, +0.97]; their length is not seen to change: 9 -> 4, -5.0, in tokens."]
    assert _cell(made(None)[0], 3) == {"value": "0.500", "around": "n 1"}


def test_no_bar_is_drawn_for_one_query():
    from matplotlib.collections import LineCollection

    def bars(figure, axis: int) -> list[float]:
        found = [abs(np.diff(s[:, axis])[0]) for a in figure.axes for c in a.collections
                 if isinstance(c, LineCollection) for s in c.get_segments() if len(s) == 2]
        return [n for n in found if np.isfinite(n)]

    for sem, bare in ((None, True), (0.25, False)):
        rows = [r | {"subset": "learned"} for r in made(sem)]
        whole, each = draw(rows, 2, "t"), draw_principles(rows, {"learned": ["brief"], "held_out": []}, "t")
        for figure in (whole, each):
            assert ("n 1: no bar" in figure._suptitle.get_text()) == bare
        assert (bars(whole, 1) == []) == (bars(each, 0) == []) == bare
        judges = bars(draw_win_rate(rows, "llm", "t"), 1)
        assert judges == [0.0] if bare else judges == [0.0, 0.5, 0.5]  # the 50 % of the start is no measurement
