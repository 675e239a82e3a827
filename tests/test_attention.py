"""Attention over the shared-prefix layout: each path against SDPA under the T x T mask, in float64 and float32."""

import functools
import itertools
import sys

import pytest
import torch
from layouts import drawn, grouped
from transformers import masking_utils

from kernels import attention, interfaces
from kernels.attention import Layout, Varlen, shared_prefix_attention

LAYOUTS = {name: grouped(groups) for name, groups in {
    "one group": ((5, (3, 4)),), "ragged": ((7, (1, 6, 2)), (1, (3, 1, 1)), (12, (9, 2, 5))), "one tail": ((4, (3,)), (2, (1,))),
    "no prefix": ((0, (2, 3)), (3, (1, 1))), "all alone": ((0, (1, 1)),), "longer than a block": ((40, (30, 17)), (3, (33, 1)))}.items()}
LAYOUTS |= {"a chain of forks": Layout(((9, -1, 0), (4, 0, 5), (3, 1, 2), (2, 2, 1), (1, 3, 2))),
            "a text goes on where another ends": Layout(((3, -1, 0), (2, 0, 3), (4, 0, 3), (1, 1, 2))),
            "many leaves of a node": Layout(((6, -1, 0), *[(k % 3 + 1, 0, 4) for k in range(7)], (3, 0, 1))),
            "drawn": drawn(1, 12), "drawn, with more texts": drawn(8, 20, 30)}


def inputs(layout: Layout, H=4, K=2, d=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(layout.tokens)
    q, k, v = (torch.randn(h, layout.tokens, d, generator=generator, dtype=dtype).requires_grad_() for h in (H, K, K))
    upstream = torch.randn(layout.tokens, H, d, generator=generator, dtype=dtype)
    return (q, k, v), upstream


def outcome(layout, tensors, upstream, impl, scale=0.4):
    out = shared_prefix_attention(*tensors, layout, scale=scale, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def test_the_mask_is_the_layouts_definition():
    """By hand: prefix a b, tails c d and e."""
    assert grouped(((2, (2, 1)),)).mask().int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("block", [1, 13, 128])
def test_blocks_equal_the_reference(layout, heads, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    tensors, upstream = inputs(layout, *heads)
    for ours, truth in zip(outcome(layout, tensors, upstream, "blocks"), outcome(layout, tensors, upstream, "reference")):
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("size", [1.0, 6.0])  # at 6 the largest scores are near 100: all weight on one key
def test_blocks_in_float32_err_at_most_twice_as_much_as_the_reference(size):
    layout = grouped(((70, (20, 11)), (31, (40, 3))))
    tensors, upstream = inputs(layout, d=16)
    tensors = [(x * size).detach().requires_grad_() for x in tensors]
    truth = outcome(layout, tensors, upstream, "reference")
    single = [x.detach().float().requires_grad_() for x in tensors]
    ours, theirs = (outcome(layout, single, upstream.float(), impl) for impl in ("blocks", "reference"))
    for a, b, t in zip(ours, theirs, truth):
        assert (a - t).norm() <= 2 * (b - t).norm() + 1e-7 * t.norm()


def places(layout: Layout) -> torch.Tensor:
    """[T], each token's place in its own text."""
    return layout.mask().sum(1) - 1


def window(layout: Layout, width: int) -> torch.Tensor:
    """bool [T, T]: keys fewer than `width` places before the query, in the text that both are of."""
    return places(layout)[:, None] - places(layout)[None] < width


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("block", [1, 13, 128])
@pytest.mark.parametrize("width, softcap, sink, e", [(3, None, False, 8), (None, 1.5, False, 8), (None, None, True, 8),
                                                     (None, None, False, 5), (4, 0.7, True, 11)])
def test_windows_caps_sinks_and_values_of_another_size(layout, heads, block, width, softcap, sink, e, monkeypatch):
    """Outputs and gradients, the sinks' too, against autograd through the eager truth."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    H, K = heads
    (q, k, _), _ = inputs(layout, H, K)
    generator = torch.Generator().manual_seed(layout.tokens + e)
    v = torch.randn(K, layout.tokens, e, generator=generator, dtype=torch.float64).requires_grad_()
    sinks = torch.randn(H, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(layout.tokens, H, e, generator=generator, dtype=torch.float64)
    wanted = (q, k, v, sinks) if sink else (q, k, v)

    def outcome(impl):
        out = shared_prefix_attention(q, k, v, layout, scale=0.4, softcap=softcap, sinks=sinks if sink else None, impl=impl,
                                      mask=None if width is None else window(layout, width))
        return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]

    for ours, truth in zip(outcome("blocks"), outcome("reference")):
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-10)


def test_the_eager_truth_of_caps_and_sinks_by_hand():
    """One head, two tokens: scores 0 and 2 capped at 1 are 0 and tanh 2; a sink of log 3 takes 3 of the weight."""
    q, k = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [2.0]]])
    v = torch.tensor([[[1.0], [5.0]]])
    out = shared_prefix_attention(q, k, v, grouped(((1, (1,)),)), scale=1.0, softcap=1.0, sinks=torch.tensor([3.0]).log(),
                                  impl="reference")
    second = torch.tensor(2.0).tanh().exp()
    assert out.flatten().tolist() == pytest.approx([1 / 4, ((1 + 5 * second) / (4 + second)).item()])


def test_blocks_are_the_same_twice_and_keep_only_the_inputs_and_the_output():
    layout = LAYOUTS["longer than a block"]
    tensors, upstream = inputs(layout, dtype=torch.float32)
    for a, b in zip(*(outcome(layout, tensors, upstream, "blocks") for _ in range(2))):
        assert torch.equal(a, b)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        shared_prefix_attention(*tensors, layout, scale=1.0)
    assert sum(saved) == sum(x.numel() for x in (*tensors, upstream))


def test_sixteen_bit_inputs_are_multiplied_in_float32():
    layout = LAYOUTS["ragged"]
    tensors, upstream = inputs(layout, dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in tensors]
    for ours, truth in zip(outcome(layout, tensors, upstream, "blocks"), outcome(layout, wide, upstream.float(), "blocks")):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() <= 4e-3 * truth.norm()  # one rounding of the result, one of the saved output


# ---- varlen's bookkeeping, with a kernel in torch ops in place of the CUDA one


def plain_varlen(q, k, v, index, scale):
    """What a varlen kernel computes: per segment, causality aligned at the last key."""
    out = []
    for (a, b), (c, d) in zip(*(zip(cu.tolist(), cu.tolist()[1:]) for cu in (index.cu_q, index.cu_k))):
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        out.append(torch.nn.functional.scaled_dot_product_attention(
            q[a:b].transpose(0, 1), *(x[c:d].transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (k, v)),
            attn_mask=seen, scale=scale).transpose(0, 1))
        assert b - a <= index.max_q and d - c <= index.max_k
    return torch.cat(out)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_varlen_segments_equal_the_reference(layout, monkeypatch):
    """Outputs, and gradients summed over the prefix's copies."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda: plain_varlen)
    tensors, upstream = inputs(layout)
    ours = outcome(layout, tensors, upstream, "varlen")
    for a, truth in zip(ours, outcome(layout, tensors, upstream, "reference")):
        torch.testing.assert_close(a, truth, atol=1e-6, rtol=1e-6)  # the sum over copies is float32


@pytest.mark.parametrize("seed", range(40))
def test_varlen_index_is_the_layout_token_by_token(seed):
    layout = drawn(seed, 1 + seed % 23, 1 + seed)
    index = Varlen(layout, "cpu")
    keys, copies, sizes = [], [[] for _ in range(layout.tokens)], []
    for begin, end, path in layout.segments:
        before = [token for run in path for token in range(*run)]
        for at, token in enumerate(before, len(keys)):
            copies[token].append(at)
        for at, token in enumerate(range(begin, end), len(keys) + len(before)):
            copies[token].insert(0, at)
        keys += [*before, *range(begin, end)]
        sizes.append((end - begin, len(before) + end - begin))
    assert index.gather.tolist() == keys
    for cu, most, each in zip((index.cu_q, index.cu_k), (index.max_q, index.max_k), zip(*sizes)):
        assert cu.dtype == torch.int32 and cu.tolist() == [0, *itertools.accumulate(each)] and most == max(each)
    assert [index.back[a:b].tolist() for a, b in itertools.pairwise(index.copies.tolist())] == copies  # as they are summed
    grad = torch.randn(len(keys), 3, 2, dtype=torch.float64)
    torch.testing.assert_close(index.ungather(grad), torch.zeros(layout.tokens, 3, 2).double().index_add_(0, index.gather, grad),
                               atol=1e-5, rtol=1e-5)


def test_copies_are_summed_in_float32():
    """-256 + (256 + 1) is 1; a bfloat16 sum of the copies would make it 0."""
    layout = grouped(((1, (1, 1, 1)),))
    grad = torch.tensor([-256.0, 0, 256, 0, 1, 0]).bfloat16().view(-1, 1, 1)  # prefix and tail of each segment
    assert Varlen(layout, "cpu").ungather(grad).flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("newer", [True, False])
def test_torchs_varlen_function_is_called_as_its_version_takes_it(newer, heads, monkeypatch):
    """torch 2.11 has no `enable_gqa`; later ones refuse fewer key-value heads without it."""
    seen = {}

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (heads[0] != heads[1]) and window_size == (-1, 0) and query.shape[1:] == (heads[0], 8)
        seen["q"], index = query, varlen
        assert (cu_seq_q, cu_seq_k, max_q, max_k) == (index.cu_q, index.cu_k, index.max_q, index.max_k)
        return plain_varlen(query, key, value, index, scale)

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
                      enable_gqa=heads[0] != heads[1])

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend if newer else older)
    layout = grouped(((5, (3, 4)),))
    varlen = layout.varlen(torch.device("cpu"))
    tensors, upstream = inputs(layout, *heads)
    for a, truth in zip(outcome(layout, tensors, upstream, "varlen"), outcome(layout, tensors, upstream, "reference")):
        torch.testing.assert_close(a, truth, atol=1e-6, rtol=1e-6)
    assert seen


def test_the_varlen_backward_runs_in_torchs_deterministic_mode_and_leaves_it(monkeypatch):
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory))
            return grad

    monkeypatch.setattr(attention, "varlen_kernel", lambda: lambda q, *rest: plain_varlen(Noted.apply(q), *rest))
    layout = grouped(((5, (3, 4)),))
    tensors, upstream = inputs(layout)
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    outcome(layout, tensors, upstream, "varlen")
    assert seen == [(2, False)]
    assert before == (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == (0, True)


# ---- misuse


def test_what_does_not_fit_is_refused():
    (q, k, v), _ = inputs(grouped(((5, (3, 4)),)))
    with pytest.raises(ValueError, match="do not fit"):
        shared_prefix_attention(q, k, v, grouped(((5, (3, 3)),)), scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        shared_prefix_attention(q[:3], k, v, grouped(((5, (3, 4)),)), scale=1.0)
    with pytest.raises(ValueError, match="impl: allowed are"):
        shared_prefix_attention(q, k, v, grouped(((5, (3, 4)),)), scale=1.0, impl="flash")
    layout = grouped(((5, (3, 4)),))
    attend = interfaces.attention_interface(None)
    with interfaces.packed(layout, torch.arange(12)):
        for batch, options in ((2, {}), (1, {"dropout": 0.1})):
            with pytest.raises(ValueError, match="batch of one and no dropout"):
                attend(None, *(x.expand(batch, *x.shape) for x in (q, k, v)), None, **options)
    for kind in ({"softcap": 2.0}, {"sinks": torch.zeros(4)}, {"mask": layout.mask()}):
        with pytest.raises(ValueError, match="'varlen': takes no mask"):
            shared_prefix_attention(q, k, v, layout, scale=1.0, impl="varlen", **kind)
    for kind in ({"sinks": torch.zeros(3)}, {"mask": layout.mask()[1:]}):
        with pytest.raises(ValueError, match="do not fit"):
            shared_prefix_attention(q, k, v, layout, scale=1.0, **kind)


# ---- what a mask function hides, found out once


def sliding(size):
    return lambda batch, head, query, key: (key <= query) & (key > query - size)


def definition(function, P):
    """Asked of each pair of places; None where nothing before a place is hidden from it."""
    sees = torch.tensor([[bool(function(*map(torch.tensor, (0, 0, query, key)))) for key in range(P)] for query in range(P)])
    return None if all(sees[query, key] for query in range(P) for key in range(query + 1)) else sees


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_kept_of_a_mask_function_is_kept_of_no_other(order, monkeypatch):
    monkeypatch.setattr(interfaces, "_HIDES_NOTHING", {})
    own = [masking_utils.sliding_window_causal_mask_function(size) for size in (4, 9)]
    functions = [*own, masking_utils.causal_mask_function, masking_utils.and_masks(*own), masking_utils.or_masks(*own),
                 masking_utils.or_masks(own[0], sliding(6)), sliding(4), sliding(9), functools.partial(own[1]),
                 masking_utils.chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long))]
    for P in (1, 3, 4, 5, 6, 8, 9, 10, 4, 9)[::order]:
        for function in functions:
            ours, truth = interfaces.seen(function, P), definition(function, P)
            assert ours is truth is None or torch.equal(ours, truth)
    kept = {interfaces._frozen(each): most for each, most in ((own[0], 4), (own[1], 9), (functions[2], 10),
                                                              (functions[3], 4), (functions[4], 9))}
    assert interfaces._HIDES_NOTHING == kept


def test_a_mask_function_that_may_change_is_asked_every_time(monkeypatch):
    monkeypatch.setattr(interfaces, "_HIDES_NOTHING", {})
    size = torch.tensor(9)
    changing = [sliding(size), masking_utils.or_masks(sliding(size)), masking_utils.sliding_window_causal_mask_function(size)]
    assert [interfaces.seen(function, 6) for function in changing] == [None] * 3 and not interfaces._HIDES_NOTHING
    size.fill_(2)
    assert all(interfaces.seen(function, 6) is not None for function in changing)
    reads = {"W": 9}
    exec("def of_another_module(b, h, query, key): return (key <= query) & (key > query - W)", reads)  # noqa: S102
    wrapped = functools.wraps(masking_utils.causal_mask_function)(reads["of_another_module"])  # names its module
    assert interfaces.seen(wrapped, 6) is None
    reads["W"] = 2
    assert interfaces.seen(wrapped, 6) is not None


def test_a_mask_function_is_asked_again_for_more_places_alone(monkeypatch):
    monkeypatch.setattr(interfaces, "_HIDES_NOTHING", {})
    asked, arange = [], torch.arange
    monkeypatch.setattr(torch, "arange", lambda P: asked.append(P) or arange(P))
    for P in (6, 5, 6, 8, 7, 9, 10, 9, 10):
        function = masking_utils.sliding_window_causal_mask_function(9)  # made anew at every forward
        assert (interfaces.seen(function, P) is None) == (P < 10)
    assert asked == [6, 8, 9, 10, 10]
