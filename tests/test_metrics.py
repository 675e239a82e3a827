"""Each estimator against a case worked by hand; the arithmetic is in the test."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from repro.base import metrics as m

LOG = np.log
# Two constitutions, two responses, as probabilities: row = constitution, column = response.
HAND = LOG(np.array([[[0.6, 0.2],
                      [0.3, 0.4]]]))


def test_mean():
    # 1, 2, 3, 6: mean 3, squared deviations 4+1+0+9 = 14, ddof 1: 14/3, SEM sqrt(14/3/4); t(0.975, 3) = 3.18245
    e = m.mean([1, 2, 3, 6])
    assert (e.value, e.n) == (3.0, 4)
    assert e.sem == pytest.approx(np.sqrt(14 / 12))
    assert e.ci95 == pytest.approx((3 - 3.182446 * e.sem, 3 + 3.182446 * e.sem))
    assert m.mean([2.5]) == m.Estimate(2.5, None, None, 1)
    with pytest.raises(ValueError, match="values"):
        m.mean([])


def test_infonce_contrasts_constitutions():
    # response 1: 0.6 / mean(0.6, 0.3) = 4/3; response 2: 0.4 / mean(0.2, 0.4) = 4/3
    assert m.infonce(HAND) == pytest.approx([LOG(4 / 3)])


def test_symmetric_infonce_is_log_c_minus_the_loss():
    # over responses: 0.6 / mean(0.6, 0.2) = 3/2 and 0.4 / mean(0.3, 0.4) = 8/7
    assert m.symmetric_infonce(HAND) == pytest.approx([(LOG(4 / 3) + (LOG(3 / 2) + LOG(8 / 7)) / 2) / 2])


def test_mean_of_logs():
    # response 1: log .6 - (log .6 + log .3)/2 = log(2)/2; response 2: log .4 - (log .2 + log .4)/2 = log(2)/2
    assert m.mean_of_logs(HAND) == pytest.approx([LOG(2) / 2])


def test_mi_ceiling_chance_and_jensen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4, 4)) * 30 + 100 * np.eye(4)
    assert (m.infonce(x) <= LOG(4) + 1e-12).all() and (m.symmetric_infonce(x) <= LOG(4) + 1e-12).all()
    assert (m.mean_of_logs(x) >= m.infonce(x) - 1e-9).all() and m.mean_of_logs(x).max() > LOG(4)
    flat = np.full((3, 4, 4), -7.0)
    for f in (m.infonce, m.symmetric_infonce, m.mean_of_logs):
        assert f(flat) == pytest.approx(np.zeros(3))


def test_mi_axes_are_not_interchangeable():
    # a constant per response (column) leaves the contrast over constitutions as it was, a constant per row does not
    shifted_columns, shifted_rows = HAND + [[[1.0, -2.0]]], HAND + [[[1.0], [-2.0]]]
    for f in (m.infonce, m.mean_of_logs):
        assert f(shifted_columns) == pytest.approx(f(HAND))
        assert f(shifted_rows) == pytest.approx(f(HAND)) if f is m.mean_of_logs else f(shifted_rows) != f(HAND)
    # mean_of_logs per response changes even so: only its mean over responses is symmetric for C = 2
    three = np.log(np.array([[[.5, .2, .3], [.1, .7, .2], [.3, .3, .4]]]))
    assert m.infonce(three.transpose(0, 2, 1)) != pytest.approx(m.infonce(three))


def test_accuracies():
    x = np.array([[[5, 1], [6, 2]],      # rows: 5 > 1 yes, 2 < 6 no; columns: 5 < 6 no, 2 > 1 yes
                  [[3, 3], [0, 4]],      # rows: tie no, yes; columns: yes, yes
                  [[1, 1], [1, 1]]], dtype=float)
    assert m.accuracy_row(x).tolist() == [0.5, 0.5, 0.0]
    assert m.accuracy_col(x).tolist() == [0.5, 1.0, 0.0]
    y = np.array([[[2, 9, 0], [1, 8, 0], [0, 0, 5]]], dtype=float)  # rows: no, yes, yes; columns: yes, no, yes
    assert m.accuracy_row(y) == pytest.approx([2 / 3]) and m.accuracy_col(y) == pytest.approx([2 / 3])


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.zeros((1, 2, 3)), np.zeros((0, 2, 2)), np.full((1, 2, 2), np.nan)])
def test_logprobs_of_no_meaning(bad):
    for f in (m.infonce, m.symmetric_infonce, m.mean_of_logs, m.accuracy_row, m.accuracy_col):
        with pytest.raises(ValueError, match="logprobs"):
            f(bad)


def test_win_rate():
    scores = [1, 1, 0.5, 0]  # half: 2.5/4 = 62.5, SEM sqrt(.625 * .375 / 4) = 24.206 %; loss: 2/4 = 50, SEM 25 %
    e = m.win_rate(scores)
    assert e.value == 62.5 and e.sem == pytest.approx(24.20615) and e.n == 4
    assert m.as_published(e).ci95 == pytest.approx((15.0560, 109.9440), abs=1e-3)
    assert m.as_published(m.win_rate(scores, ties="loss")) == m.Estimate(50.0, 25.0, (1.0, 99.0), 4)
    # upper end: 1, 1, 1, 0.5, 0 have mean 0.7 and variance 0.16; r = 0.16 / 0.21; 0.16 / 6 (1 + 2 (1 - r) / 6) = 0.02878;
    # Beta with that mean and variance: 0.7 * 0.3 / 0.02878 - 1 = 6.2973, so (4.4081, 1.8892), of which 97.5 % lie below
    assert e.ci95[1] == pytest.approx(100 * stats.beta.ppf(0.975, 4.4081, 1.8892), abs=0.01)
    # lower end: 1, 1, 0.5, 0, 0: mean 0.5, variance 0.2, r = 0.8; 0.2 / 6 (1 + 0.4 / 6) = 0.035556; k = 6.03125
    assert e.ci95[0] == pytest.approx(100 * stats.beta.ppf(0.025, 3.015625, 3.015625), abs=0.01)
    for bad, field in (([1.3], "scores"), ([-0.1, 0], "scores"), ([], "scores")):
        with pytest.raises(ValueError, match=field):
            m.win_rate(bad)
    with pytest.raises(ValueError, match="ties"):
        m.win_rate(scores, ties="drop")


def test_normal_interval_is_the_papers():
    # Table 4, mixtral-8x7b, iteration 1: 56.80 [50.66, 62.94], t = 2.17, n = 250
    sem, ci95, t = m.normal_interval(56.8, 250)
    assert [round(v, 2) for v in (*ci95, t)] == [50.66, 62.94, 2.17]
    assert sem == pytest.approx(3.13286, abs=1e-4)
    assert m.normal_interval(100.0, 5) == (0.0, (100.0, 100.0), None)


def test_win_rate_stratified():
    # longer: 1, 1, 0.5, 1 -> 87.5; not longer: 0, 1 -> 50; mean 68.75 (the raw rate would be 75)
    scores, longer = [1, 1, 0.5, 1, 0, 1], [True, True, True, True, False, False]
    e = m.win_rate_stratified(scores, longer)
    # SEMs: sqrt(.875 * .125 / 4) = 16.5359 and sqrt(.25 / 2) = 35.3553; half of hypot = 19.5156
    assert e.value == 68.75 and e.sem == pytest.approx(19.5156, abs=1e-3) and e.n == 6
    assert m.win_rate_stratified(scores, longer, ties="loss").value == 62.5
    with pytest.raises(ValueError, match="strata"):
        m.win_rate_stratified(scores, [True] * 6)


def test_win_rate_logistic_at_two_lengths():
    # Differences +4 and -4 only, so sd = 4 and the covariate is ±tanh(1): the model is saturated. Shares 3/4 and
    # 2/4 are fitted exactly, and the intercept is the mean of both logits: (log 3 + log 1)/2 -> sqrt3/(1+sqrt3).
    scores, d = [1, 1, 1, 0, 1, 1, 0, 0], [4] * 4 + [-4] * 4
    e = m.win_rate_logistic(scores, d)
    assert e.value == pytest.approx(100 * np.sqrt(3) / (1 + np.sqrt(3)))
    # variance of the mean of two logits: (1/(4*.75*.25) + 1/(4*.25)) / 4 = (4/3 + 1)/4
    p = e.value / 100
    assert e.sem == pytest.approx(100 * p * (1 - p) * np.sqrt((4 / 3 + 1) / 4), rel=1e-6)
    assert e.ci95[0] < e.value < e.ci95[1] < 100
    assert m.win_rate_logistic([1, 0.5], [3, 3], ties="half").value == 75.0  # no length difference, no correction
    with pytest.raises(ValueError, match="does not converge"):
        m.win_rate_logistic([1, 1, 0, 0], [5, 3, -5, -3])


def test_win_rate_logistic_ridge():
    # at shares 3/4 and 1/4 the intercept is 0 whatever the slope; with an endless ridge the slope goes and the
    # intercept becomes the raw rate: 5 of 8
    assert m.win_rate_logistic([1, 1, 1, 0, 0, 0, 0, 1], [4] * 4 + [-4] * 4, ridge=2.0).value == pytest.approx(50)
    assert m.win_rate_logistic([1, 1, 1, 0, 1, 1, 0, 0], [4] * 4 + [-4] * 4, ridge=1e9).value == pytest.approx(62.5)


def test_win_rate_logistic_ties():
    scores, d = [1, 0.5, 0, 0.5], [4, 4, -4, -4]
    # half: shares 3/4 and 1/4 -> logits ±log 3, intercept 0 -> 50; as losses: 1/2 and 0 -> no finite fit
    assert m.win_rate_logistic(scores, d, ties="half").value == pytest.approx(50)
    with pytest.raises(ValueError, match="does not converge"):
        m.win_rate_logistic(scores, d, ties="loss")


def test_sign_test():
    # 5 wins, 1 loss, 3 ties left out: two-sided 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64
    assert m.sign_test([1] * 5 + [0] + [0.5] * 3) == pytest.approx(14 / 64)
    assert m.sign_test([0.5, 0.5]) == 1.0


def test_item_bootstrap():
    scores = np.array([1.0, 0.0] * 50)
    e = m.item_bootstrap(scores, draws=4000)
    assert e.value == 0.5 and e.sem == pytest.approx(0.05, rel=0.05)  # sqrt(.25 / 100)
    assert e.ci95 == pytest.approx((0.4, 0.6), abs=0.02)
    assert e == m.item_bootstrap(scores, draws=4000) != m.item_bootstrap(scores, draws=4000, seed=1)


def test_paired_bootstrap_uses_the_pairing():
    a, b = np.array([1.0, 0.0] * 50), np.array([1.0, 0.0] * 50)
    assert m.paired_bootstrap(a, b) == m.Estimate(0.0, 0.0, (0.0, 0.0), 100)  # unpaired, the SEM would be 0.07
    assert m.paired_bootstrap(b, 1 - a).sem == pytest.approx(0.1, rel=0.1)  # differences ±1: sqrt(1 / 100)
    assert m.paired_bootstrap([1, 1, 0, 1], [0, 1, 0, 0]).value == 0.5
    with pytest.raises(ValueError, match="same items"):
        m.paired_bootstrap([1], [1, 0])


def test_detectable_rate():
    # (1.95996 + 0.84162) * 50 / sqrt(250) = 8.8593
    assert m.detectable_rate(250) == pytest.approx(58.8593, abs=1e-3)


def test_no_torch():
    code = "import sys, repro.base.metrics; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
