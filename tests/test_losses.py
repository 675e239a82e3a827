"""The objectives: by hand, against a derivation of their own in numpy, their invariances, and their gradients."""

import math

import numpy as np
import pytest
import torch

from repro.base.records import UserError
from repro.base.training import NEEDS_INITIAL, OBJECTIVES, PARAMETERS, TrainSpec
from repro.core import losses
from repro.core.losses import symmetric_infonce


def softplus(x):
    return math.log1p(math.exp(x))


def test_by_hand():
    a, b, c, d = -1.0, -1.5, -2.0, -0.5
    expected = (softplus(b - a) + softplus(c - d) + softplus(c - a) + softplus(b - d)) / 4
    assert symmetric_infonce(torch.tensor([[[a, b], [c, d]]])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("C", [2, 3, 7])
def test_chance_is_log_c_and_certainty_is_zero(C):
    assert symmetric_infonce(torch.full((2, C, C), -3.0)).item() == pytest.approx(math.log(C), abs=1e-6)
    assert symmetric_infonce(torch.eye(C).expand(2, C, C) * 1e4).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_mean_over_queries():
    x = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert symmetric_infonce(x).item() == pytest.approx(sum(symmetric_infonce(q[None]).item() for q in x) / 5, abs=1e-6)


def test_only_a_global_constant_leaves_it_unchanged():
    x = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row, column = torch.zeros_like(x), torch.zeros_like(x)
    row[:, 0], column[:, :, 0] = 1.0, 1.0
    assert torch.allclose(symmetric_infonce(x + 5), symmetric_infonce(x))
    assert not torch.allclose(symmetric_infonce(x + row), symmetric_infonce(x))
    assert not torch.allclose(symmetric_infonce(x + column), symmetric_infonce(x))


def test_axes_are_not_swapped():
    """Renaming constitutions and responses together changes nothing; responses alone does."""
    x = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(symmetric_infonce(x[:, order][:, :, order]), symmetric_infonce(x))
    assert not torch.allclose(symmetric_infonce(x[:, :, order]), symmetric_infonce(x))


def test_gradient():
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(symmetric_infonce, x)


@pytest.mark.parametrize("shape", [(2, 2), (1, 2, 3), (1, 1, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="C = R"):
        symmetric_infonce(torch.zeros(shape))


# ---- the other objectives, of S, L and S0


def matrices(C, B=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (B, 1, C), generator=generator).expand(B, C, C).double()
    sums = -lengths * torch.rand(B, C, C, generator=generator, dtype=torch.float64) * 3
    return sums, lengths, sums + torch.randn(B, C, C, generator=generator, dtype=torch.float64) * 4


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def by_loops(name, S, L, S0, beta=0.1, temperature=1.0, margin=0.5, anchor=0.0):
    """The value, a query, a constitution and a response at a time; written from the papers' formulas, not from ours."""
    total = []
    for s, n, s0 in zip(S, L, S0):
        C, m = len(s), s / n
        score = (s if name == "sami_sum" else m) / temperature
        h = beta * (s - s0)
        others = [(c, r) for c in range(C) for r in range(C) if r != c]

        def chosen(values, k):  # -log of a softmax's k-th entry
            return -values[k] + np.log(np.exp(values - values.max()).sum()) + values.max()

        rows = np.mean([chosen(score[c], c) for c in range(C)])
        columns = np.mean([chosen(score[:, r], r) for r in range(C)])
        value = {
            "sami": (rows + columns) / 2, "sami_sum": (rows + columns) / 2, "sami_rows": rows, "sami_columns": columns,
            "mipo": -np.mean([log_sigmoid(h[c, c] - h[c, r]) for c, r in others]),
            "nca": -np.mean([log_sigmoid(h[c, c]) + (log_sigmoid(-h[c, c]) + log_sigmoid(-h[c, r])) / 2 for c, r in others]),
            "conspo_rows": np.mean([chosen(np.array([(m[c, r] - margin * (r == c)) / temperature for r in range(C)]), c) for c in range(C)]),
            "sft": -np.mean([m[c, c] for c in range(C)])}[name]
        total.append(value - anchor * np.mean([m[c, c] for c in range(C)]))
    return np.mean(total)


CASES = [(name, {}) for name in OBJECTIVES if name != "distil"] + [
    (name, {p: 0.7}) for name, takes in OBJECTIVES.items() for p in takes] + [("nca", {"beta": 2.0, "anchor": 0.3})]


@pytest.mark.parametrize("C", [2, 4])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_every_objective_is_its_formula(name, given, C):
    S, L, S0 = matrices(C)
    spec = TrainSpec(objective=name, **given)
    assert losses.objective(spec, S, L, initial=S0).item() == pytest.approx(by_loops(name, S.numpy(), L.numpy(), S0.numpy(), **given), rel=1e-12)
    x = S.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.objective(spec, s, L, initial=S0), x)
    losses.objective(spec, x, L, initial=S0).backward()
    step = 1e-6 * torch.randn(S.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = [by_loops(name, (S + sign * step).numpy(), L.numpy(), S0.numpy(), **given) for sign in (1, -1)]
    assert (x.grad * step).sum().item() == pytest.approx((moved[0] - moved[1]) / 2, rel=1e-5)


def test_by_hand_each(a=-1.0, b=-1.5, c=-2.0, d=-0.5):
    x, zero, f = torch.tensor([[[a, b], [c, d]]], dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64), softplus
    assert losses.infonce_rows(x).item() == pytest.approx((f(b - a) + f(c - d)) / 2)
    assert losses.infonce_columns(x).item() == pytest.approx((f(c - a) + f(b - d)) / 2)
    assert losses.mipo(x, zero, beta=0.5).item() == pytest.approx((f(0.5 * (b - a)) + f(0.5 * (c - d))) / 2)
    assert losses.nca(x, zero, beta=1.0).item() == pytest.approx((f(-a) + f(a) / 2 + f(b) / 2 + f(-d) + f(d) / 2 + f(c) / 2) / 2)
    assert losses.conspo_rows(x, margin=0.3, temperature=2.0).item() == pytest.approx((f((b - a + 0.3) / 2) + f((c - d + 0.3) / 2)) / 2)
    assert losses.imitation(x).item() == pytest.approx(-(a + d) / 2)
    assert losses.objective(TrainSpec(objective="distil"), x[:, :1, :1], zero[:, :1, :1] + 4).item() == pytest.approx(-a / 4)


def test_sami_is_unchanged_to_the_bit_and_its_halves_are_its_own():
    S, L, _ = (x.float() for x in matrices(3, seed=5))
    assert torch.equal(losses.objective(TrainSpec(), S, L), symmetric_infonce(S / L))
    assert torch.equal(losses.objective(TrainSpec(length_normalize=False), S, L), symmetric_infonce(S))
    assert torch.equal(losses.objective(TrainSpec(objective="sami_sum"), S, L), symmetric_infonce(S))
    halves = [losses.objective(TrainSpec(objective=name), S, L) for name in ("sami_rows", "sami_columns")]
    assert losses.objective(TrainSpec(), S, L).item() == pytest.approx(sum(halves).item() / 2, rel=1e-6)


def test_what_an_objective_does_not_see():
    """A response's own likelihood moves neither contrast over constitutions; nca keeps the chosen from falling, mipo does not."""
    S, L, S0 = matrices(2, seed=7)
    grown = S + torch.randn(3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * L  # a number a response
    same = {name: torch.allclose(losses.objective(TrainSpec(objective=name), S, L, initial=S0),
                                 losses.objective(TrainSpec(objective=name), grown, L, initial=S0)) for name in OBJECTIVES if name != "distil"}
    assert same == dict.fromkeys(same, False) | {"sami_columns": True}
    fallen = S0 - 30  # all as likely as before, all much less likely
    assert losses.mipo(fallen, S0, beta=0.1).item() == pytest.approx(math.log(2))
    assert losses.nca(fallen, S0, beta=0.1).item() > losses.nca(S0, S0, beta=0.1).item() + 1


def test_the_margin_grows_over_the_steps():
    S, L, _ = matrices(2)
    at = [losses.objective(TrainSpec(objective="conspo_rows"), S, L, progress=p).item() for p in (0.0, 0.5, 1.0)]
    assert at[0] == pytest.approx(losses.infonce_rows(S / L).item()) and at[0] < at[1] < at[2]


def test_what_an_objective_needs_and_takes():
    S, L, S0 = matrices(2)
    for name in NEEDS_INITIAL:
        with pytest.raises(ValueError, match="needs the log-probs under the initial model"):
            losses.objective(TrainSpec(objective=name), S, L)
        with pytest.raises(ValueError, match="are .3, 2, 1., the model's .3, 2, 2."):
            losses.objective(TrainSpec(objective=name), S, L, initial=S0[..., :1])
    assert set(losses.ON_MEANS) | set(losses.ON_RATIOS) == set(OBJECTIVES) and set(losses.ON_RATIOS) == set(NEEDS_INITIAL)
    assert {p for takes in OBJECTIVES.values() for p in takes} == set(PARAMETERS)


@pytest.mark.parametrize(("given", "said"), [
    ({"objective": "samii"}, r"TrainSpec.objective: 'samii' is unknown; allowed: 'sami', .*; did you mean 'sami'\?"),
    ({"objective": "sft", "anchor": 0.3}, "TrainSpec.anchor: 0.3; 'sft' takes none, but sami, .*nca.* do"),
    ({"beta": 0.1}, "TrainSpec.beta: 0.1; 'sami' takes none, but mipo, nca do"),
    ({"objective": "mipo", "beta": -0.1}, "TrainSpec.beta: -0.1; must be above 0"),
    ({"objective": "nca", "beta": float("nan")}, "TrainSpec.beta: nan; must be a finite number"),
    ({"temperature": 0.0}, "TrainSpec.temperature: 0.0; must be above 0"),
    ({"anchor": -1.0}, "TrainSpec.anchor: -1.0; must be 0 or more"),
    ({"objective": "conspo_rows", "margin": "wide"}, "TrainSpec.margin: 'wide'; must be a finite number")])
def test_settings_of_an_objective_that_cannot_be(given, said):
    with pytest.raises(UserError, match=said):
        TrainSpec(**given)
