"""The symmetric InfoNCE loss: by hand, its invariances, and its gradient."""

import math

import pytest
import torch

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
