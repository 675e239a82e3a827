"""Attention over a packed tree of texts: each token sees the tokens before it in its own text, and no others.

Texts that begin alike share what they have in common: a packed sequence of T tokens holds each token of the tree once, as
branches (repro/core/tree.py). As segments with queries and keys of different lengths and causality aligned at the end
(bottom right), a branch's queries are its own tokens and its keys the path to it, then its own tokens. So the queries are
the packed tokens in their order, and only keys and values are repeated, a path for each branch.

A layer may see less than that (a sliding window, chunks): its mask is then a tensor. Scores may be capped (Gemma 2), and a
head may have a sink (gpt-oss): one more logit in the softmax's normaliser, without a value.

Axes: H query heads, K key-value heads (H a multiple of K), T tokens, d head size, e size of a value.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference

QUERY_BLOCK = 128  # queries whose scores exist at a time: causality then skips most of the upper triangle
IMPLS = ("blocks", "varlen", "reference")


Runs = tuple[tuple[int, int], ...]  # (first token, end) of each


@dataclass(frozen=True)
class Layout:
    """branches: (tokens, parent, after) of each, in the order of the packed sequence. A branch goes on from the first
    `after` tokens of the branch `parent`, which comes before it, and so sees the path to there: 1 <= after <= the parent's
    tokens. One that begins a text has parent -1 and after 0. None is empty."""

    branches: tuple[tuple[int, int, int], ...]

    @cached_property
    def segments(self) -> list[tuple[int, int, Runs]]:
        """(first query, end, path) of each branch: keys are the path's tokens, then the queries' own."""
        segments, at = [], 0
        for tokens, parent, after in self.branches:
            path: Runs = ()
            if parent >= 0:
                begin, _, path = segments[parent]
                path = (*path, (begin, begin + after))
            segments.append((at, at + tokens, path))
            at += tokens
        return segments

    @property
    def tokens(self) -> int:
        return self.segments[-1][1]

    def mask(self, device=None) -> Tensor:
        """bool [T, T], True where query (row) sees key: the definition, for the reference."""
        mask = torch.zeros(self.tokens, self.tokens, dtype=torch.bool, device=device)
        for begin, end, path in self.segments:
            for first, last in path:
                mask[begin:end, first:last] = True
            mask[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool, device=device).tril()
        return mask

    def varlen(self, device) -> "Varlen":
        """The index tensors of the varlen path on `device`, made once: each copy to a device waits for it."""
        cache = self.__dict__.setdefault("_varlen", {})
        if device not in cache:
            cache[device] = Varlen(self, device)
        return cache[device]


class Varlen:
    """Segments as index tensors: `gather` [Tk] takes packed keys to repeated ones, with `cu_q` and `cu_k` [segments + 1]
    and their largest steps as varlen kernels have them; back again, `back` [Tk] has the places of a token's copies
    together, its own segment's first, and `copies` [T + 1] where each token's begin."""

    def __init__(self, layout: Layout, device):
        segments = layout.segments  # a run of keys each: of its path, then of its own
        first, end, own = torch.tensor([(*run, own) for a, b, path in segments for run, own in
                                        (*((run, 0) for run in path), ((a, b), 1))]).T
        lengths = end - first
        gather = torch.arange(int(lengths.sum())) + (first - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
        cu_q = torch.tensor([0, *(b for _, b, _ in segments)])
        cu_k = torch.cat([cu_q[:1], lengths.cumsum(0)[own > 0]])
        back = gather.argsort(stable=True)  # a branch's own tokens stand before those that go on from it
        copies = torch.cat([cu_q[:1], gather.bincount().cumsum(0)])
        self.max_q, self.max_k = (int(cu.diff().max()) for cu in (cu_q, cu_k))
        self.cu_q, self.cu_k = (cu.to(device, torch.int32) for cu in (cu_q, cu_k))
        self.gather, self.back, self.copies = (x.to(device) for x in (gather, back, copies))

    def ungather(self, grad: Tensor) -> Tensor:
        """[Tk, ...] -> [T, ...], the gradients of a token's copies summed in float32, in a fixed order, without atomics."""
        each = grad[self.back].flatten(1).float()
        return torch.segment_reduce(each, "sum", offsets=self.copies, unsafe=True).view(-1, *grad.shape[1:]).to(grad.dtype)


def shared_prefix_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float,
                            mask: Tensor | None = None, softcap: float | None = None, sinks: Tensor | None = None,
                            impl: str | None = None) -> Tensor:
    """softmax(scale q k^T) v over the layout's segments: query [H, T, d], key [K, T, d], value [K, T, e] -> [T, H, e].

    `mask`: bool [T, T], what a query may see of what the layout lets it see, itself at least. `softcap` c replaces scores
    s by c tanh(s / c). `sinks` [H]: a logit more in each head's normaliser. `impl`: "blocks" (any device and float dtype,
    products in float32 at least), "varlen" (CUDA, 16-bit, none of the three, e = d), "reference" (eager, under the T x T
    mask), None: "varlen" where it runs, else "blocks". Deterministic; differentiable once.
    Raises ValueError on shapes that do not fit the layout, and on what "varlen" cannot do.
    """
    H, T, d = query.shape
    plain = mask is None and softcap is None and sinks is None and value.shape[-1] == d
    if key.shape[:2] != value.shape[:2] or key.shape[1:] != (T, d) or H % len(key) or T != layout.tokens or (
            mask is not None and mask.shape != (T, T)) or (sinks is not None and sinks.shape != (H,)):
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not fit each "
                         f"other, their mask or sinks, or the layout of {layout.tokens} tokens")
    if impl not in (None, *IMPLS):
        raise ValueError(f"impl: allowed are None, {', '.join(map(repr, IMPLS))}, found {impl!r}")
    if impl == "varlen" and not plain:
        raise ValueError("impl 'varlen': takes no mask, soft-cap or sinks, and values of the keys' size alone")
    if impl == "reference":
        seen = layout.mask(query.device) if mask is None else layout.mask(query.device) & mask
        return reference.attention(query, key, value, seen, scale=scale, softcap=softcap, sinks=sinks).transpose(0, 1)
    if impl is None:
        impl = "varlen" if plain and query.is_cuda and query.element_size() == 2 else "blocks"
    if impl == "varlen":
        return _Varlen.apply(*(x.transpose(0, 1) for x in (query, key, value)), layout, scale, varlen_kernel())
    return _Blocks.apply(query, key, value, sinks, mask, layout, scale, softcap)


# ---- blocks: matrix products and a softmax for one block of queries at a time


def _blocks(layout: Layout) -> Iterator[tuple[int, int, Runs]]:
    """Segments cut into at most QUERY_BLOCK queries a..b: (a, b, their keys as runs of tokens); the last b - a keys are the
    queries' own tokens."""
    for begin, end, path in layout.segments:
        pieces = -(-(end - begin) // QUERY_BLOCK)
        cuts = [begin + (end - begin) * k // pieces for k in range(pieces + 1)]
        for a, b in zip(cuts, cuts[1:]):
            yield a, b, (*path, (begin, b))


class _Blocks(torch.autograd.Function):
    """Scores of grouped query heads are one product a key-value head; they are computed again in the backward, so
    that q, k, v and the output are all that is kept."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, mask, layout, scale, softcap):
        ctx.layout, ctx.scale, ctx.softcap, ctx.hidden = layout, scale, softcap, None if mask is None else ~mask
        q, k, v, sink = _wide(query) * scale, _wide(key), _wide(value), None if sinks is None else _wide(sinks)
        K, T, _ = k.shape
        out = q.new_empty(T, len(q), v.shape[2])
        later = _later(q)
        for a, b, keys in _blocks(layout):
            p, _, _ = _probabilities(_rows(q, K, a, b), _keys(k, keys), _hidden(ctx.hidden, later, a, b, keys), softcap,
                                     sink)
            out[a:b] = _unrows(torch.bmm(p, _keys(v, keys)), b - a)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, sinks, out = ctx.saved_tensors
        q, k, v, grad = _wide(query) * ctx.scale, _wide(key), _wide(value), _wide(grad)
        sink = None if sinks is None else _wide(sinks)
        K, later = len(k), _later(q)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dsink = None if sink is None else torch.zeros_like(sink)
        delta = (grad * out).sum(2).T.unsqueeze(2)  # [H, T, 1]: what the softmax's normaliser takes back
        grad = grad.transpose(0, 1)
        for a, b, keys in _blocks(ctx.layout):
            qs, gs, ks, taken = _rows(q, K, a, b), _rows(grad, K, a, b), _keys(k, keys), _rows(delta, K, a, b)
            p, slope, drained = _probabilities(qs, ks, _hidden(ctx.hidden, later, a, b, keys), ctx.softcap, sink)
            _add_keys(dv, torch.bmm(p.transpose(1, 2), gs), keys)
            ds = torch.bmm(gs, _keys(v, keys).transpose(1, 2))
            ds.sub_(taken).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            if dsink is not None:  # whose value is 0
                dsink -= (drained * taken).view(len(q), b - a).sum(1)
            dq[:, a:b] = torch.bmm(ds, ks).view(len(q), b - a, -1)
            _add_keys(dk, torch.bmm(ds.transpose(1, 2), qs), keys)
        return (dq.mul_(ctx.scale).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype),
                None if dsink is None else dsink.to(sinks.dtype), None, None, None, None)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, K: int, a: int, b: int) -> Tensor:
    """[H, T, n] -> [K, H / K * (b - a), n]: the query heads of one key-value head are rows of one product."""
    return x[:, a:b].reshape(K, -1, x.shape[2])


def _unrows(x: Tensor, queries: int) -> Tensor:
    """Back to [b - a, H, d]."""
    return x.view(-1, queries, x.shape[2]).transpose(0, 1)


def _keys(x: Tensor, keys: Runs) -> Tensor:
    parts = [x[:, first:last] for first, last in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _add_keys(total: Tensor, part: Tensor, keys: Runs) -> None:
    for (first, last), own in zip(keys, part.split([last - first for first, last in keys], 1)):
        total[:, first:last] += own


def _later(like: Tensor) -> Tensor:
    """bool [QUERY_BLOCK, QUERY_BLOCK], True where the key comes after the query."""
    return torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=like.device).triu_(1)


def _hidden(hidden: Tensor | None, later: Tensor, a: int, b: int, keys: Runs) -> Tensor:
    """bool [b - a, n], True where queries a..b do not see the last n keys: their own tokens, or, of a mask, all keys."""
    if hidden is None:
        return later[: b - a, : b - a]
    seen = torch.cat([hidden[a:b, first:last] for first, last in keys], 1)
    seen[:, -(b - a):] |= later[: b - a, : b - a]
    return seen


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor, softcap: float | None,
                   sinks: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax of q k^T [K, H / K * n, keys] where the last keys are not `hidden` [n, keys]; the slope of capped scores; and
    what goes to the sinks [H], [K, H / K * n, 1]."""
    n, scores = len(hidden), torch.bmm(q, k.transpose(1, 2))
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores * scores
        scores = scores.mul_(softcap)
    scores.view(-1, n, scores.shape[2])[..., -hidden.shape[1]:].masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(2), slope, None
    sink = sinks.view(len(k), -1, 1).expand(-1, -1, n).reshape(len(k), -1, 1)
    p = torch.cat((scores, sink), 2).softmax(2)
    return p[..., :-1], slope, p[..., -1:]


# ---- varlen: one launch over all segments


def varlen_kernel():
    """flash-attn's varlen function where it is installed, else torch's: (q, k, v, Varlen, scale) -> [T, H, d]."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 has no such option: there fewer key-value heads need no word
        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        return lambda q, k, v, index, scale: varlen_attn(
            q, k, v, index.cu_q, index.cu_k, index.max_q, index.max_k, scale=scale, window_size=(-1, 0),
            **(grouped if q.shape[1] != k.shape[1] else {}))
    return lambda q, k, v, index, scale: flash_attn_varlen_func(
        q, k, v, index.cu_q, index.cu_k, index.max_q, index.max_k, softmax_scale=scale, causal=True, deterministic=True)


@contextmanager
def _in_a_fixed_order():
    """torch's varlen kernel sums dq in a fixed order in torch's deterministic mode alone, and has no option of its own."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class _Varlen(torch.autograd.Function):
    """Only the packed q, k, v are kept: keys are gathered and the attention (about 1 % of a step) run again in the
    backward. That costs less than the repeated prefixes would hold, and needs the kernels' public functions alone."""

    @staticmethod
    def forward(ctx, query, key, value, layout, scale, kernel):
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        ctx.save_for_backward(query, key, value)
        index = layout.varlen(query.device)
        return kernel(query, key[index.gather], value[index.gather], index, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        index = ctx.layout.varlen(query.device)
        inputs = [x.detach().requires_grad_() for x in (query, key[index.gather], value[index.gather])]
        with torch.enable_grad():
            out = ctx.kernel(*inputs, index, ctx.scale)
        with _in_a_fixed_order():
            dq, dk, dv = torch.autograd.grad(out, inputs, grad)
        return dq, index.ungather(dk), index.ungather(dv), None, None, None
