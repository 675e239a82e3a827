"""kernels.symmetric_infonce: the Triton kernel (in the interpreter without a GPU) and the torch path against float64."""

import math

import pytest
import torch

from kernels.infonce import symmetric_infonce

triton = pytest.importorskip("triton", reason="Triton is built for Linux only")
from kernels import infonce_triton, reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 2, 2), (3, 2, 2), (2, 4, 4), (2, 3, 3), (2, 2, 5), (1, 5, 3), (1, 1, 1), (1, 4, 1), (1, 13, 17), (1, 64, 64)]


def tokens(shape, *, longest=9, scale=1.0, seed=0):
    """Ragged NLLs around 2 nats whose means differ by little, some segments of one token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (math.prod(shape),), generator=g)
    lengths[0] = 1
    lengths[-1] = 3 * longest  # longer than the others, and than a block where the tile is large
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return 2 + scale * torch.randn(int(offsets[-1]), generator=g, dtype=torch.float64), offsets


def run(x, offsets=None, shape=None, upstream=1.0, **options):
    x = x.to(DEVICE).detach().requires_grad_()
    loss = symmetric_infonce(x, None if offsets is None else offsets.to(DEVICE), shape, **options)
    return loss.detach().cpu(), torch.autograd.grad(loss, x, torch.tensor(upstream, dtype=x.dtype, device=DEVICE))[0].cpu()


def assert_no_worse(ours, theirs, exact):
    for a, b, x in zip(ours, theirs, exact):
        error, allowed = (a.double() - x).norm(), 2 * (b.double() - x).norm() + 2e-7 * x.norm() + 1e-9
        assert error <= allowed, (error.item(), allowed.item())


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel must fill holds NaN, so a value that it does not write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_segments(shape, mean, impl):
    nll, offsets = tokens(shape)
    upstream = -1.7
    exact = run(nll, offsets, shape, upstream, impl="reference", length_normalize=mean)
    theirs = run(nll.float(), offsets, shape, upstream, impl="reference", length_normalize=mean)
    assert_no_worse(run(nll.float(), offsets, shape, upstream, impl=impl, length_normalize=mean), theirs, exact)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix(shape, scale, impl):
    """Up to differences of 50 nats and more: one entry of a row takes all of the probability."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale - 2
    exact = run(x, upstream=0.3, impl="reference")
    assert_no_worse(run(x.float(), upstream=0.3, impl=impl), run(x.float(), upstream=0.3, impl="reference"), exact)


def test_long_segments_lose_no_digits():
    """Sums (not means) of 600 tokens, which this tile adds one after the other: no worse than sums in float64 that are
    rounded to float32. A plain running sum is."""
    shape = (1, 33, 33)
    offsets = torch.arange(33 * 33 + 1) * 600
    nll = (2 + 0.01 * torch.randn(int(offsets[-1]), generator=torch.Generator().manual_seed(2), dtype=torch.float64)).float()
    ours, theirs = (run(nll, offsets, shape, impl=impl, length_normalize=False) for impl in ("triton", "torch"))
    assert_no_worse(ours, theirs, run(nll.double(), offsets, shape, impl="torch", length_normalize=False))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_known_values(impl):
    x = torch.full((2, 3, 3), -2.5)
    assert run(x, impl=impl)[0].item() == pytest.approx(math.log(3))
    assert run(torch.full((1, 2, 8), -2.5), impl=impl)[0].item() == pytest.approx((math.log(2) + math.log(8)) / 2)
    assert run(torch.eye(4)[None] * 1e4, impl=impl)[0].item() == 0


def test_bitwise_the_same_twice_and_backward_twice():
    nll, offsets = tokens((2, 4, 4))
    first, second = (run(nll.float(), offsets, (2, 4, 4), impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    x = nll.float().to(DEVICE).requires_grad_()
    loss = symmetric_infonce(x, offsets.to(DEVICE), (2, 4, 4), impl="triton")
    assert torch.equal(*(torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)))
    with torch.no_grad():
        assert torch.equal(loss, symmetric_infonce(x, offsets.to(DEVICE), (2, 4, 4), impl="triton"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_empty_segment_or_a_lost_token_is_seen():
    nll, offsets = tokens((1, 2, 2))
    empty = offsets.clone()
    empty[1] = 0
    with pytest.raises(ValueError, match="at least one token"):
        symmetric_infonce(nll.float(), empty, (1, 2, 2))
    losses = torch.empty(1, device=DEVICE)
    infonce_triton.infonce_kernel[(1,)](nll.float().to(DEVICE), empty.to(DEVICE), losses, losses, len(nll), 1, 2, 2,
                                        RAGGED=True, MEAN=True, GRAD=False, CP=2, RP=2, TP=8)
    assert losses.isnan().all()


def test_torch_on_a_cpu_is_the_default_and_allows_float64():
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(symmetric_infonce, x)
    assert torch.equal(symmetric_infonce(x), reference.symmetric_infonce(x))


@pytest.mark.parametrize("x, offsets, shape, options, reason", [
    (torch.zeros(2, 2), None, None, {}, r"log-probs \[B, C, R\]"),
    (torch.zeros(1, 2, 2, dtype=torch.bfloat16), None, None, {}, "float32 or float64"),
    (torch.zeros(4), torch.arange(5), None, {}, "shape"),
    (torch.zeros(4), torch.arange(4), (1, 2, 2), {}, r"int64 \[5\]"),
    (torch.zeros(4), torch.arange(5).int(), (1, 2, 2), {}, "int64"),
    (torch.zeros(5), torch.arange(5), (1, 2, 2), {}, "rise from 0 to 5"),
    (torch.zeros(1, 2, 2), None, None, {"impl": "cuda"}, "impl: allowed"),
    (torch.zeros(1, 2, 65), None, None, {"impl": "triton"}, "at most 64"),
    (torch.zeros(1, 2, 2).double(), None, None, {"impl": "triton"}, "takes float32")])
def test_what_does_not_fit_is_refused(x, offsets, shape, options, reason):
    with pytest.raises(ValueError, match=reason):
        symmetric_infonce(x, offsets, shape, **options)
