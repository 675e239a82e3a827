"""kernels.linear_nll against the eager truth in float64: values and every gradient, in every mode."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import modes, reference
from kernels.linear_nll import linear_nll
from kernels.modes import plan


def inputs(N, D, V, *, scale=1.0, bias=False, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    b = torch.randn(V, generator=g, dtype=torch.float64) if bias else None
    target = torch.randint(V, (N,), generator=g)
    upstream = torch.randn(N, generator=g, dtype=torch.float64)
    leaf = [None if t is None else t.to(device, dtype).requires_grad_() for t in (hidden, weight, b)]
    return *leaf, target.to(device), upstream.to(device)


def run(op, hidden, weight, bias, target, upstream, **options):
    nll = op(hidden, weight, target, bias=bias, **options)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def truth(hidden, weight, bias, target, upstream, softcap):
    doubles = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight, bias)]
    return run(reference.linear_nll, *doubles, target, upstream, softcap=softcap)


def assert_no_worse(ours, theirs, exact, what=""):
    """Error at most twice the same-dtype reference's, relative to the norm."""
    for k, (a, b, x) in enumerate(zip(ours, theirs, exact)):
        error, allowed = (a.double() - x).norm(), 2 * (b.double() - x).norm() + 2e-7 * x.norm()
        assert error <= allowed, (what, k, error.item(), allowed.item())


SHAPES = [(1, 1, 2), (1, 5, 3), (7, 16, 11), (63, 33, 127), (130, 64, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["auto", "store", "recompute"])
@pytest.mark.parametrize("bias, softcap", [(False, None), (True, None), (True, 5.0)])
def test_float32_is_no_worse_than_the_reference(shape, mode, bias, softcap, monkeypatch):
    monkeypatch.setattr(modes, "SLAB_ELEMENTS", 3 * shape[2])  # several slabs, the last one ragged
    x = inputs(*shape, bias=bias)
    assert_no_worse(run(linear_nll, *x, mode=mode, softcap=softcap), run(reference.linear_nll, *x, softcap=softcap),
                    truth(*x, softcap), (shape, mode))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 12.0])
@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_probabilities_near_one_and_large_logits(scale, mode):
    """|logit| reaches 50 and more, and the target is the largest entry: U of the true class is a difference of near
    equals."""
    hidden, weight, _, _, upstream = inputs(40, 24, 300, scale=scale)
    target = (hidden @ weight.T).argmax(1)
    x = (hidden, weight, None, target, upstream)
    assert_no_worse(run(linear_nll, *x, mode=mode), run(reference.linear_nll, *x), truth(*x, None))


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_bfloat16_is_no_worse_than_the_reference(mode):
    x = inputs(65, 40, 333, dtype=torch.bfloat16)
    ours = run(linear_nll, *x, mode=mode)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    assert_no_worse(ours, run(reference.linear_nll, *x), truth(*x, None))


def test_float64_gradcheck():
    hidden, weight, bias, target, _ = inputs(4, 3, 5, bias=True, dtype=torch.float64)
    for mode in ("store", "recompute"):
        for softcap in (None, 2.0):
            assert torch.autograd.gradcheck(
                lambda h, w, b, m=mode, s=softcap: linear_nll(h, w, target, bias=b, mode=m, softcap=s), (hidden, weight, bias))


def test_frozen_head_and_frozen_trunk():
    hidden, weight, bias, target, upstream = inputs(9, 6, 21, bias=True)
    for frozen in ((False, True, True), (True, False, True), (True, True, False)):
        x = [t.detach().requires_grad_(f) for t, f in zip((hidden, weight, bias), frozen)]
        assert_no_worse(run(linear_nll, *x, target, upstream), run(reference.linear_nll, *x, target, upstream),
                        truth(*x, target, upstream, None), frozen)
    x = [hidden, weight.detach(), bias.detach()]
    assert_no_worse(run(linear_nll, *x, target, upstream, mode="frozen_head"),
                    run(reference.linear_nll, *x, target, upstream), truth(*x, target, upstream, None))


def test_loss_only_equals_the_loss_with_gradient():
    hidden, weight, bias, target, _ = inputs(30, 8, 77, bias=True)
    with torch.no_grad():
        value = linear_nll(hidden, weight, target, bias=bias)
    assert torch.equal(value, linear_nll(hidden, weight, target, bias=bias).detach())


def test_backward_twice_and_bitwise_the_same_twice():
    hidden, weight, _, target, upstream = inputs(20, 8, 50)
    nll = linear_nll(hidden, weight, target)
    first = torch.autograd.grad(nll, (hidden, weight), upstream.float(), retain_graph=True)
    second = torch.autograd.grad(nll, (hidden, weight), upstream.float(), retain_graph=True)
    twice = torch.autograd.grad(nll, (hidden, weight), 2 * upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, twice))


def test_the_planner():
    both = {"hidden_grad": True, "head_grad": True}
    assert plan(10, 100, 4, hidden_grad=False, head_grad=False) == "loss_only"
    assert plan(10, 100, 4, hidden_grad=True, head_grad=False) == "frozen_head"
    assert plan(1280, 49152, 2, narrow=True, **both) == "recompute"
    assert plan(1280, 49152, 4, **both) == "store" and plan(10_000, 128_256, 4, **both) == "recompute"


class Largest(TorchDispatchMode):
    """The number of rows of the largest [rows, V] tensor made, and whether any op made more than `allowed`."""

    def __init__(self, V):
        super().__init__()
        self.V, self.rows = V, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.ndim >= 2 and t.shape[-1] == self.V:
                self.rows = max(self.rows, t.numel() // self.V)
        return out


def test_no_mode_but_store_makes_all_logits(monkeypatch):
    monkeypatch.setattr(modes, "SLAB_ELEMENTS", 10 * 97)
    hidden, weight, _, target, _ = inputs(80, 8, 97)
    rows = {}
    for mode in ("store", "recompute"):
        with Largest(97) as guard:
            linear_nll(hidden, weight, target, mode=mode).sum().backward()
        rows[mode] = guard.rows
    with Largest(97) as guard, torch.no_grad():
        linear_nll(hidden, weight, target)
    assert rows == {"store": 80, "recompute": 10} and guard.rows == 10


@pytest.mark.parametrize("mode", ["store", "recompute", "frozen_head", "loss_only"])
def test_flops_equal_the_formula(mode):
    from torch.utils.flop_counter import FlopCounterMode

    N, D, V = 48, 16, 129
    hidden, weight, _, target, _ = inputs(N, D, V)
    if mode == "frozen_head":
        weight = weight.detach()
    with FlopCounterMode(display=False) as counter:
        if mode == "loss_only":
            with torch.no_grad():
                linear_nll(hidden, weight, target)
        else:
            linear_nll(hidden, weight, target, mode=mode).sum().backward()
    assert counter.get_total_flops() == {"store": 6, "recompute": 8, "frozen_head": 4, "loss_only": 2}[mode] * N * D * V


@pytest.mark.parametrize("change, reason", [
    ({"hidden": torch.zeros(3)}, "hidden must be"), ({"weight": torch.zeros(5, 3)}, "hidden must be"),
    ({"target": torch.zeros(2, dtype=torch.int64)}, "target must be"), ({"target": torch.zeros(4)}, "target must be"),
    ({"bias": torch.zeros(3)}, "bias must be"), ({"weight": torch.zeros(5, 2).bfloat16()}, "weight is torch.bfloat16"),
    ({"mode": "fast"}, "mode: allowed"), ({"impl": "cuda"}, "impl: allowed"), ({"mode": "loss_only"}, "no gradient"),
    ({"hidden": torch.zeros(4, 2).double(), "weight": torch.zeros(5, 2).double(), "impl": "triton"}, "takes 16-bit inputs")])
def test_what_does_not_fit_is_refused(change, reason):
    x = {"hidden": torch.zeros(4, 2, requires_grad=True), "weight": torch.zeros(5, 2),
         "target": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=reason):
        linear_nll(x.pop("hidden"), x.pop("weight"), x.pop("target"), **x)


def test_a_frozen_head_keeps_a_row_of_hidden_size_for_each_token_and_makes_no_gradient_of_the_weight():
    N, D, V = 48, 16, 129
    hidden, weight, _, target, upstream = inputs(N, D, V)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        nll = linear_nll(hidden, weight.detach(), target)
    assert kept == [(N, D)]
    with Shapes() as seen:
        nll.backward(upstream.float())
    assert hidden.grad is not None and (V, D) not in seen.shapes and not any(V in shape for shape in seen.shapes)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make."""

    shapes: set = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)}
        return out
