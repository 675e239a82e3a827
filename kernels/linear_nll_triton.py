"""The Triton side of kernels/linear_nll.py, for 16-bit inputs on a GPU (float32 too, for the tests' interpreter).

Plain matrix products are cuBLAS's, with float32 results. U is kept in float16 times 2^10, whatever the inputs: its
largest entry is 1 and its rounding error 2^-12, an eighth of bfloat16's. A bfloat16 weight shares one product with U,
U W: by rows of U, from a copy of them in bfloat16; by slabs of the vocabulary, from a copy of the weight's in float16.
Entries are indexed in 64 bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import interpreted, modes

U_SCALE = 1024.0
ROW_BLOCK = 4096  # entries of a row at a time
TILE = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def softcapped(z, CAP: tl.constexpr):
    """CAP tanh(z / CAP); near 0 by its series, where (1 - e) / (1 + e) would cancel."""
    x = z / CAP
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    y = x * x
    return CAP * tl.where(y < 0.04, x * (1 + y * (-1 / 3 + y * (2 / 15 - y * (17 / 315)))), far)


@triton.jit(do_not_specialize=["N", "first"])
def row_kernel(z_ptr, bias_ptr, target_ptr, stats_ptr, nll_ptr, u_ptr, v_ptr, N, V, first, CAP: tl.constexpr,
               SCALE: tl.constexpr, BIAS: tl.constexpr, U: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of a slab of float32 logits [n, V], whose first row is token `first`: maximum, log of the
    sum (stats [2, N]) and NLL from a first reading of the row (online softmax), U and its copy from a second."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    target = tl.load(target_ptr + first + row)
    at_target = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + offset
        z = tl.load(z_ptr + row * V + column, mask=column < V, other=float("-inf"))
        if BIAS:
            z += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
        if CAP is not None:
            z = tl.where(column < V, softcapped(z, CAP), float("-inf"))
        at_target += tl.where(column == target, z, 0.0)
        new = tl.maximum(largest, z)
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - finite) + tl.exp(z - finite)
        largest = new
    m = tl.max(largest, 0)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - m), 0))
    tl.store(stats_ptr + first + row, m)
    tl.store(stats_ptr + N + first + row, log_sum)
    nll = log_sum + (m - tl.sum(at_target, 0))
    tl.store(nll_ptr + first + row, tl.where((target >= 0) & (target < V), nll, float("nan")))
    if U or SECOND:
        for start in range(0, V, BLOCK):
            column = start + offset
            z = tl.load(z_ptr + row * V + column, mask=column < V, other=0.0)
            if BIAS:
                z += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            if CAP is not None:
                z = softcapped(z, CAP)
            u = tl.exp((z - m) - log_sum) - tl.where(column == target, 1.0, 0.0)
            if CAP is not None:
                u *= 1 - (z / CAP) * (z / CAP)
            if U:
                tl.store(u_ptr + row * V + column, (u * SCALE).to(u_ptr.dtype.element_ty), mask=column < V)
            if SECOND:
                tl.store(v_ptr + row * V + column, u.to(v_ptr.dtype.element_ty), mask=column < V)


@triton.jit
def tile_logits(x_ptr, w_ptr, bias_ptr, row, column, N, V, D, CAP: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The float32 logits [BM, BN] of rows `row`.. of x and `column`.. of w; what lies outside repeats the last one.
    The corner is placed in 64 bits, the tile in 32 within it: fewer registers."""
    rows = tl.minimum(tl.arange(0, BM), N - 1 - row)
    columns = tl.minimum(tl.arange(0, BN), V - 1 - column)
    k = tl.arange(0, BK)
    x_at = x_ptr + row.to(tl.int64) * D + (rows[:, None] * D + k[None, :])
    w_at = w_ptr + column.to(tl.int64) * D + (columns[None, :] * D + k[:, None])
    z = tl.zeros([BM, BN], tl.float32)
    for start in range(0, D, BK):
        x = tl.load(x_at, mask=k[None, :] < D - start, other=0.0)
        w = tl.load(w_at, mask=k[:, None] < D - start, other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 as integers
            x, w = x.to(tl.float32), w.to(tl.float32)
        z = tl.dot(x, w, z, input_precision="ieee")
        x_at += BK
        w_at += BK
    if BIAS:
        z += tl.load(bias_ptr + column + columns).to(tl.float32)[None, :]
    if CAP is not None:
        z = softcapped(z, CAP)
    return z


@triton.jit(do_not_specialize=["N"])
def lse_kernel(x_ptr, w_ptr, bias_ptr, target_ptr, max_ptr, sum_ptr, at_target_ptr, N, V, D, CAP: tl.constexpr,
               BIAS: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One program per tile of logits, which it never writes: maximum and sum of its columns for each row (each [tiles
    of V, N]), and the target's logit where it is among them. Row tiles first: they share w in the cache."""
    across = tl.cdiv(N, BM)
    tile = tl.program_id(0) // across
    row = (tl.program_id(0) % across) * BM
    z = tile_logits(x_ptr, w_ptr, bias_ptr, row, tile * BN, N, V, D, CAP, BIAS, UPCAST, BM, BN, BK)
    rows, columns = row + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    z = tl.where((columns < V)[None, :], z, float("-inf"))
    m = tl.max(z, 1)
    here = tile.to(tl.int64) * N + rows
    tl.store(max_ptr + here, m, mask=rows < N)
    tl.store(sum_ptr + here, tl.sum(tl.exp(z - m[:, None]), 1), mask=rows < N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    found = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    tl.store(at_target_ptr + rows, found, mask=(rows < N) & (target >= tile * BN) & (target < tile * BN + BN))


@triton.jit(do_not_specialize=["N", "V", "tiles"])
def finalise_kernel(max_ptr, sum_ptr, target_ptr, at_target_ptr, stats_ptr, nll_ptr, N, V, tiles, BM: tl.constexpr):
    """The tiles' maxima and sums of BM rows, combined in the order of the vocabulary -> stats [2, N] and NLL."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    max_at, sum_at = max_ptr + rows, sum_ptr + rows
    for _ in range(0, tiles):
        part = tl.load(max_at, mask=rows < N, other=0.0)
        new = tl.maximum(m, part)
        total = total * tl.exp(m - new) + tl.load(sum_at, mask=rows < N, other=1.0) * tl.exp(part - new)
        m = new
        max_at += N
        sum_at += N
    log_sum = tl.log(total)
    tl.store(stats_ptr + rows, m, mask=rows < N)
    tl.store(stats_ptr + N + rows, log_sum, mask=rows < N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    known = (target >= 0) & (target < V)  # else no tile had it, and at_target was never written
    at_target = tl.load(at_target_ptr + rows, mask=known, other=float("nan"))
    tl.store(nll_ptr + rows, log_sum + (m - at_target), mask=rows < N)


@triton.jit(do_not_specialize=["N", "first"])
def u_kernel(x_ptr, w_ptr, bias_ptr, target_ptr, stats_ptr, u_ptr, N, V, D, first, width, CAP: tl.constexpr,
             SCALE: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr):
    """One program per tile of U [N, width] = columns first .. first + width - 1, from logits computed again."""
    across = tl.cdiv(N, BM)
    row, place = (tl.program_id(0) % across) * BM, (tl.program_id(0) // across) * BN
    z = tile_logits(x_ptr, w_ptr, bias_ptr, row, first + place, N, V, D, CAP, BIAS, UPCAST, BM, BN, BK)
    rows, columns = row + tl.arange(0, BM), first + place + tl.arange(0, BN)
    m = tl.load(stats_ptr + rows, mask=rows < N, other=float("inf"))
    log_sum = tl.load(stats_ptr + N + rows, mask=rows < N, other=0.0)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    u = tl.exp((z - m[:, None]) - log_sum[:, None]) - tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
    if CAP is not None:
        u *= 1 - (z / CAP) * (z / CAP)
    here = row.to(tl.int64) * width + place + (tl.arange(0, BM)[:, None] * width + tl.arange(0, BN)[None, :])
    inside = (rows < N)[:, None] & (columns < first + width)[None, :]
    tl.store(u_ptr + here, (u * SCALE).to(u_ptr.dtype.element_ty), mask=inside)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32; of 16-bit matrices on a GPU by its tensor cores, without rounding the result to 16 bits."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def scaled_half(y: Tensor) -> tuple[Tensor, Tensor]:
    """y -> y s in float16 and 1 / s, s a power of two that brings the largest entry to 2^14 .. 2^15."""
    largest = torch.linalg.vector_norm(y, ord=torch.inf).float().clamp(1e-30, 1e30)
    s = torch.exp2(torch.floor(15 - torch.log2(largest)))
    return torch.mul(y, s, out=torch.empty_like(y, dtype=torch.float16)), 1 / s


def operands(weight: Tensor) -> tuple[torch.dtype, float, bool]:
    """U's dtype and scale, and whether U W needs a copy of it in the weight's dtype."""
    exact = weight.dtype == torch.float32
    return (torch.float32, 1.0, False) if exact else (torch.float16, U_SCALE, weight.dtype == torch.bfloat16)


def statistics(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None):
    """NLL [N] and stats [2, N] (maximum, log of the sum of exp(z - maximum)); no logits are written."""
    (N, D), V = x.shape, len(weight)
    tile, tiles = _tile(x), triton.cdiv(V, TILE["BN"])
    part, stats = x.new_empty(2, tiles, N, dtype=torch.float32), x.new_empty(2, N, dtype=torch.float32)
    at_target, nll = x.new_empty(N, dtype=torch.float32), x.new_empty(N, dtype=torch.float32)
    lse_kernel[(triton.cdiv(N, tile["BM"]) * tiles,)](x, weight, weight if bias is None else bias, target, *part, at_target,
                                                      N, V, D, CAP=softcap, BIAS=bias is not None, **tile)
    finalise_kernel[(triton.cdiv(N, 64),)](*part, target, at_target, stats, nll, N, V, tiles, BM=64, num_warps=2)
    return nll, stats


def u_slabs(x, weight, target, bias, softcap, stats, kept) -> Iterator[tuple[slice, Tensor]]:
    """(columns, U [N, width]), slab by slab of the vocabulary: views of what was kept, or computed again. Slabs of
    columns: each part of dW is then written once, and only dX [N, D] is summed over them."""
    (N, D), V = x.shape, len(weight)
    dtype, scale, _ = operands(weight)
    width = max(1, modes.SLAB_ELEMENTS // max(N, D))
    width = width // 128 * 128 or width
    for first in range(0, V, width):
        columns = slice(first, min(first + width, V))
        if kept is not None:
            yield columns, kept[:, columns]
            continue
        tile, n = _tile(x), columns.stop - first
        u = x.new_empty(N, n, dtype=dtype)
        u_kernel[(triton.cdiv(N, tile["BM"]) * triton.cdiv(n, tile["BN"]),)](
            x, weight, weight if bias is None else bias, target, stats, u, N, V, D, first, n,
            CAP=softcap, SCALE=scale, BIAS=bias is not None, **tile)
        yield columns, u


def _tile(x: Tensor) -> dict:
    return TILE | {"UPCAST": interpreted() and x.dtype == torch.bfloat16}


def by_rows(x, weight, target, bias, softcap, *, keep_u: bool, keep_uw: bool):
    """NLL [N], stats [2, N], U [N, V] or None, U W [N, D] in float32 or None; logits exist a slab of rows at a time."""
    (N, D), V = x.shape, len(weight)
    dtype, scale, second = operands(weight)
    nll, stats = x.new_empty(N, dtype=torch.float32), x.new_empty(2, N, dtype=torch.float32)
    kept = x.new_empty(N, V, dtype=dtype) if keep_u else None
    uw = x.new_empty(N, D, dtype=torch.float32) if keep_uw else None
    second = second and keep_uw
    for rows in modes.slabs(N, V):
        z = product(x[rows], weight.T)
        u = kept[rows] if keep_u else z.new_empty(z.shape, dtype=dtype) if not second else None
        copy = z.new_empty(z.shape, dtype=x.dtype) if second else None
        row_kernel[(len(z),)](z, weight if bias is None else bias, target, stats, nll, z if u is None else u,
                              z if copy is None else copy, N, V, rows.start, CAP=softcap, SCALE=scale,
                              BIAS=bias is not None, U=u is not None, SECOND=second, BLOCK=ROW_BLOCK, num_warps=8)
        if keep_uw:
            uw[rows] = product(copy, weight) if second else product(u, weight).div_(scale)
    return nll, stats, kept, uw


class LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, softcap, mode):
        kept = uw = None
        if mode == "recompute":
            nll, stats = statistics(x, weight, target, bias, softcap)
        else:
            nll, stats, kept, uw = by_rows(x, weight, target, bias, softcap, keep_u=mode == "store",
                                           keep_uw=ctx.needs_input_grad[0])
        ctx.softcap, ctx.dtype = softcap, x.dtype
        frozen = mode == "frozen_head"  # U W is all that its backward reads
        ctx.save_for_backward(*((None,) * 6 if frozen else (x, weight, target, bias, stats, kept)), uw)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, weight, target, bias, stats, kept, uw = ctx.saved_tensors
        need_x, need_weight, _, need_bias, _, _ = ctx.needs_input_grad
        g = upstream.float().unsqueeze(1)  # enters on [N, D], never on [N, V]
        if x is None:
            return (uw * g).to(ctx.dtype), None, None, None, None, None
        dX = torch.zeros_like(x, dtype=torch.float32) if need_x and uw is None else uw
        dW = torch.empty_like(weight) if need_weight else None
        db = torch.empty_like(bias) if need_bias else None
        if need_weight or need_bias or uw is None:
            scale = operands(weight)[1]
            y, unscale = scaled_half(x.float() * g) if scale != 1 else (x * g, 1.0)
            h, unscale_h = scaled_half(g) if scale != 1 else (g, 1.0)
            for columns, u in u_slabs(x, weight, target, bias, ctx.softcap, stats, kept):
                if need_x and uw is None:
                    W, unscale_w = weight[columns], 1.0
                    if W.dtype == torch.bfloat16:
                        W, unscale_w = scaled_half(W)
                    dX += product(u, W).mul_(unscale_w / scale)
                if need_weight:
                    torch.mul(product(u.T, y), unscale / scale, out=dW[columns])
                if need_bias:
                    db[columns] = (product(u.T, h) * (unscale_h / scale)).squeeze(1)
        return (dX * g).to(x.dtype) if need_x else None, dW, None, db, None, None
