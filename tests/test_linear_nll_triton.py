"""The Triton kernels of kernels.linear_nll against float64, in the interpreter without a GPU: indexing and algebra in
float32 and float16. (bfloat16 there: its products are upcast, as the interpreter multiplies it as integers.)"""

from pathlib import Path

import pytest
import torch
from test_linear_nll import SHAPES, assert_no_worse, inputs, run, truth

from kernels import modes, reference
from kernels.linear_nll import linear_nll

pytest.importorskip("triton", reason="Triton is built for Linux only")
from kernels import linear_nll_triton as gpu  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ["store", "recompute"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks that small shapes do not fill, in several programs; memory a kernel must fill holds NaN."""
    monkeypatch.setattr(gpu, "TILE", {"BM": 16, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2})
    monkeypatch.setattr(gpu, "ROW_BLOCK", 64)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def slabs_of(monkeypatch, elements):
    monkeypatch.setattr(modes, "SLAB_ELEMENTS", elements)


def fenced(x):
    """The same tensors with NaN before and after them in memory, so that a read outside of one is seen."""
    def fence(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        around = torch.full((t.numel() + 4096,), float("nan"), dtype=t.dtype, device=t.device)
        return around[2048:-2048].copy_(t.detach().flatten()).view(t.shape).requires_grad_(t.requires_grad)
    return tuple(fence(t) for t in x)


def compare(x, mode, softcap=None, what=""):
    x = fenced(x)
    ours = run(linear_nll, *x, mode=mode, softcap=softcap, impl="triton")
    assert_no_worse(ours, run(reference.linear_nll, *x, softcap=softcap), truth(*x, softcap), what or mode)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias, softcap", [(False, None), (True, 5.0)])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_values_and_gradients_are_no_worse_than_the_reference(shape, bias, softcap, mode, dtype, monkeypatch):
    if dtype == torch.bfloat16 and shape[0] == 1:
        pytest.skip("one token in bfloat16: either error is a single rounding")
    slabs_of(monkeypatch, max(3 * shape[2], shape[0] * 40))  # several slabs of rows and of columns, the last ones ragged
    ours = compare(inputs(*shape, bias=bias, dtype=dtype, device=DEVICE, scale=0.5), mode, softcap)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 12.0])
@pytest.mark.parametrize("mode", MODES)
def test_probabilities_near_one_and_large_logits(mode, scale, dtype):
    hidden, weight, _, _, upstream = inputs(40, 24, 130, scale=scale, dtype=dtype, device=DEVICE)
    target = (hidden.double() @ weight.double().T).argmax(1)
    compare((hidden, weight, None, target, upstream), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e3])
def test_upstream_gradients_of_any_size(mode, size):
    """float16 holds 5 bits of exponent: a power of two brings the largest row into its range, and back."""
    hidden, weight, _, target, upstream = inputs(33, 16, 65, dtype=torch.float16, device=DEVICE)
    y, unscale = gpu.scaled_half(hidden.detach().float() * upstream.unsqueeze(1).float() * size)
    assert 2**14 <= y.abs().max() <= 2**15
    assert torch.allclose(y.double() * unscale, hidden.double() * upstream.unsqueeze(1) * size, rtol=1e-3, atol=size * 1e-6)
    if size > 1e-6:  # the gradient itself is float16
        compare((hidden, weight, None, target, upstream * size), mode)


@pytest.mark.parametrize("bias, softcap", [(False, None), (True, 5.0)])
def test_loss_only_equals_the_other_modes(bias, softcap):
    hidden, weight, b, target, _ = inputs(37, 20, 150, bias=bias, device=DEVICE)
    with torch.no_grad():
        value = linear_nll(hidden, weight, target, bias=b, softcap=softcap, impl="triton")
        exact = reference.linear_nll(hidden.double(), weight.double(), target, bias=None if b is None else b.double(), softcap=softcap)
        theirs = reference.linear_nll(hidden, weight, target, bias=b, softcap=softcap)
    assert_no_worse([value], [theirs], [exact])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_frozen_head_and_a_frozen_trunk(dtype):
    hidden, weight, bias, target, upstream = inputs(19, 12, 70, bias=True, dtype=dtype, device=DEVICE)
    for frozen in ((False, True, True), (True, False, True), (True, True, False), (True, False, False)):
        x = [t.detach().requires_grad_(f) for t, f in zip((hidden, weight, bias), frozen)]
        for mode in ["auto", "recompute"] + ["store"] * (dtype != torch.float32):
            compare((*x, target, upstream), mode, what=(mode, frozen))


@pytest.mark.parametrize("mode", MODES)
def test_bitwise_the_same_twice_and_backward_twice(mode):
    hidden, weight, _, target, upstream = inputs(20, 8, 50, dtype=torch.float16, device=DEVICE)
    nll = linear_nll(hidden, weight, target, mode=mode, impl="triton")
    grads = [torch.autograd.grad(nll, (hidden, weight), upstream.float(), retain_graph=True) for _ in range(2)]
    again = linear_nll(hidden, weight, target, mode=mode, impl="triton")
    grads.append(torch.autograd.grad(again, (hidden, weight), upstream.float()))
    assert torch.equal(nll, again) and all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))


@pytest.mark.parametrize("mode", [*MODES, "loss_only"])
@pytest.mark.parametrize("wrong", [-1, 70])
def test_a_target_outside_the_vocabulary_is_nan(mode, wrong):
    hidden, weight, _, target, _ = inputs(5, 8, 70, device=DEVICE)
    target[3] = wrong
    with torch.set_grad_enabled(mode != "loss_only"):
        nll = linear_nll(hidden, weight, target, mode=mode, impl="triton")
    assert nll.isnan().tolist() == [False, False, False, True, False]


def test_u_in_float16_keeps_what_bfloat16_loses():
    """Two constitutions whose rows nearly cancel in dW (kernels/README.md): at least 2 times nearer to the truth than
    the bfloat16 weight gradient of a float32 softmax."""
    g = torch.Generator().manual_seed(3)
    base = torch.randn(32, 24, generator=g, dtype=torch.float64)
    hidden = torch.cat([base, base + 0.1 * torch.randn(base.shape, generator=g, dtype=torch.float64)]).half().to(DEVICE)
    weight = torch.randn(80, 24, generator=g, dtype=torch.float64).half().to(DEVICE)
    target = (hidden[:32].double() @ weight.double().T).argmax(1).repeat(2)
    upstream = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(32).to(DEVICE)
    hidden.requires_grad_()
    weight.requires_grad_()
    exact = truth(hidden, weight, None, target, upstream, None)[2]
    nll, stats, u, _ = gpu.by_rows(hidden.detach(), weight.detach(), target, None, None, keep_u=True, keep_uw=False)
    y, unscale = gpu.scaled_half(hidden.detach().float() * upstream.float().unsqueeze(1))
    ours = gpu.product(u.T, y) * (unscale / gpu.U_SCALE)
    rounded = (u.double() / gpu.U_SCALE * upstream.unsqueeze(1)).bfloat16().double().T @ hidden.detach().double()
    assert (ours.double() - exact).norm() * 2 < (rounded - exact).norm()


def test_only_the_kept_u_has_all_rows_and_columns(monkeypatch):
    from test_linear_nll import Largest

    slabs_of(monkeypatch, 10 * 97)
    hidden, weight, _, target, _ = inputs(80, 8, 97, dtype=torch.float16, device=DEVICE)
    rows = {}
    for mode in ("store", "recompute"):
        with Largest(97) as guard:
            linear_nll(hidden, weight, target, mode=mode, impl="triton").sum().backward()
        rows[mode] = guard.rows
    assert rows == {"store": 80, "recompute": 0}


def test_no_host_synchronisation_and_no_atomics(monkeypatch):
    """On meta tensors there is nothing to read back, so whatever waits for the device raises."""
    class Launched(dict):
        def __missing__(self, grid):
            return lambda *args, **options: None

    from kernels import infonce, infonce_triton

    for module_, name in ((gpu, "row_kernel"), (gpu, "lse_kernel"), (gpu, "finalise_kernel"), (gpu, "u_kernel"),
                          (infonce_triton, "infonce_kernel")):
        monkeypatch.setattr(module_, name, Launched())
        assert "atomic" not in Path(module_.__file__).read_text()
    torch.use_deterministic_algorithms(False)  # its fill of empty tensors does not know meta
    x, w, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in ((9, 4), (30, 4), (30,)))
    target = torch.empty(9, dtype=torch.int64, device="meta")
    for mode in MODES:
        nll = linear_nll(x, w, target, bias=b, mode=mode, impl="triton")
        infonce.symmetric_infonce(nll, torch.empty(5, dtype=torch.int64, device="meta"), (1, 2, 2), impl="triton").backward()
        assert [t.grad.shape for t in (x, w, b)] == [x.shape, w.shape, b.shape]
