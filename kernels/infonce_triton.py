"""Segments -> means -> C x R -> symmetric InfoNCE -> loss and weights in one launch (kernels/infonce.py has the op)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "B", "C", "R"])
def infonce_kernel(x_ptr, offsets_ptr, weight_ptr, loss_ptr, N, B, C, R, RAGGED: tl.constexpr, MEAN: tl.constexpr,
                   GRAD: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, TP: tl.constexpr):
    """One program per query: its C x R matrix M in a [CP, RP] tile of registers, fp32, every sum in a fixed order."""
    c, r = tl.arange(0, CP)[:, None], tl.arange(0, RP)[None, :]
    real = (c < C) & (r < R)
    cell = tl.program_id(0).to(tl.int64) * C * R + c * R + r
    t = tl.arange(0, TP)[None, None, :]
    if RAGGED:
        start = tl.load(offsets_ptr + cell, mask=real, other=0).to(tl.int32)  # N < 2^31: half the registers
        length = tl.load(offsets_ptr + cell + 1, mask=real, other=0).to(tl.int32) - start
        longest = tl.max(length)
        first_token, tokens = start[:, :, None], length[:, :, None]
        total = tl.zeros([CP, RP, TP], tl.float32)
        lost = tl.zeros([CP, RP, TP], tl.float32)
        for first in range(0, longest, TP):  # Kahan: a long response loses no digits
            here = first_token + first + t
            y = tl.load(x_ptr + here, mask=(first + t < tokens) & (here < N), other=0.0) - lost
            new = total + y
            lost = (new - total) - y
            total = new
        m = tl.sum(lost, 2) - tl.sum(total, 2)
        divisor = tl.where(real & MEAN, length, 1).to(tl.float32)
        m = tl.div_rn(m, divisor)  # a GPU's own division may be 2 ulp off
    else:
        m = tl.load(x_ptr + cell, mask=real, other=0.0)
    m = tl.where(real, m, float("-inf"))

    K = tl.minimum(C, R)
    on = (c == r) & real
    row_max = tl.where(c < C, tl.max(m, 1)[:, None], 0.0)
    column_max = tl.where(r < R, tl.max(m, 0)[None, :], 0.0)
    row, column = tl.exp(m - row_max), tl.exp(m - column_max)
    row_sum = tl.where(c < C, tl.sum(row, 1)[:, None], 1.0)
    column_sum = tl.where(r < R, tl.sum(column, 0)[None, :], 1.0)
    rows = tl.where(c < K, tl.log(row_sum) + tl.sum(tl.where(on, row_max - m, 0.0), 1)[:, None], 0.0)
    columns = tl.where(r < K, tl.log(column_sum) + tl.sum(tl.where(on, column_max - m, 0.0), 0)[None, :], 0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.div_rn(tl.sum(rows) + tl.sum(columns), (2 * K).to(tl.float32)))

    if GRAD:
        one = tl.where(on, 1.0, 0.0)
        p, q = tl.div_rn(row, tl.broadcast_to(row_sum, [CP, RP])), tl.div_rn(column, tl.broadcast_to(column_sum, [CP, RP]))
        slope = tl.where(c < K, p - one, 0.0) + tl.where(r < K, q - one, 0.0)
        slope = tl.div_rn(slope, 2.0 * K * B)  # d loss / d M
        if RAGGED:
            slope = -tl.div_rn(slope, divisor)[:, :, None]
            for first in range(0, longest, TP):
                here = first_token + first + t
                tl.store(weight_ptr + here, tl.broadcast_to(slope, [CP, RP, TP]), mask=(first + t < tokens) & (here < N))
        else:
            tl.store(weight_ptr + cell, slope, mask=real)


class SymmetricInfoNCE(torch.autograd.Function):
    """The forward writes d loss / d x beside the loss; the backward scales it by the upstream scalar."""

    @staticmethod
    def forward(ctx, x: Tensor, offsets: Tensor | None, shape: tuple[int, int, int], mean: bool) -> Tensor:
        B, C, R = shape
        CP, RP = triton.next_power_of_2(C), triton.next_power_of_2(R)
        losses = x.new_empty(B)
        weight = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ragged = offsets is not None
        infonce_kernel[(B,)](x, offsets if ragged else x, x if weight is None else weight, losses, x.numel(), B, C, R,
                             RAGGED=ragged, MEAN=mean, GRAD=weight is not None, CP=CP, RP=RP,
                             TP=max(1, min(256, 2048 // (CP * RP))), num_warps=16 if CP * RP > 1024 else 4)
        ctx.save_for_backward(weight)
        return losses.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        return ctx.saved_tensors[0] * upstream, None, None, None
