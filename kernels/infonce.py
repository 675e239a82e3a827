"""Symmetric InfoNCE of a log-prob matrix, or of the tokens it is made of.

On a GPU one Triton launch takes ragged segments of token NLLs to means, to the C x R matrix, to the loss and to the
weight of every token (kernels/infonce_triton.py); elsewhere the same in torch. Derivation: kernels/README.md.

Axes: B queries, C constitutions, R responses, N tokens.
"""

import torch
from torch import Tensor

from kernels import choose, reference

LARGEST = 64  # C and R of the Triton kernel: the matrix is one tile of registers


def symmetric_infonce(x: Tensor, offsets: Tensor | None = None, shape: tuple[int, int, int] | None = None, *,
                      length_normalize: bool = True, impl: str | None = None) -> Tensor:
    """Mean over B of the symmetric InfoNCE loss, in nats: a scalar of x's dtype, differentiable in x.

    Either x = log-probs [B, C, R]; or x = token NLLs [N] in nats with `offsets` int64 [B*C*R + 1] and `shape`
    (B, C, R): cell (b, c, r) is minus the mean (the sum without `length_normalize`) of tokens
    offsets[i] .. offsets[i + 1] - 1, i = (b C + c) R + r, at least one each, offsets[0] = 0, offsets[-1] = N. (On a
    GPU the offsets' values are not read back; an empty segment makes the loss NaN.) C may differ from R: rows and
    columns beyond the diagonal are negatives only. x is float32 or float64, on a GPU float32 for the kernel.
    `impl`: None (Triton on a GPU, torch elsewhere), "torch", "triton" or "reference".
    Deterministic, no host synchronisation. Raises ValueError on what does not fit.
    """
    shape = _check(x, offsets, shape)
    obstacle = None
    if x.dtype != torch.float32:
        obstacle = f"it takes float32, found {x.dtype}"
    elif max(shape[1:]) > LARGEST:
        obstacle = f"C and R are at most {LARGEST}, found {shape[1]} x {shape[2]}"
    elif x.numel() >= 2**31:
        obstacle = f"at most 2^31 - 1 tokens, found {x.numel()}"
    impl = choose(impl, x.device.type, obstacle)
    if impl == "triton":
        from kernels.infonce_triton import SymmetricInfoNCE

        return SymmetricInfoNCE.apply(x.contiguous(), None if offsets is None else offsets.contiguous(), shape,
                                      length_normalize)
    if offsets is not None:
        if impl == "reference":
            x = reference.segments(x, offsets, mean=length_normalize)
        else:  # summed in float64: a long response loses no digits
            x = torch.segment_reduce(x.double(), "mean" if length_normalize else "sum", offsets=offsets).to(x.dtype)
        x = -x.view(shape)
    return reference.symmetric_infonce(x)


def _check(x: Tensor, offsets: Tensor | None, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, found {x.dtype}")
    if offsets is None:
        if x.ndim != 3 or 0 in x.shape or shape not in (None, tuple(x.shape)):
            raise ValueError(f"without offsets, x must be log-probs [B, C, R], found {tuple(x.shape)}")
        return tuple(x.shape)
    if x.ndim != 1 or shape is None or len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"with offsets, x must be [N] and shape (B, C, R), found {tuple(x.shape)} and {shape}")
    B, C, R = shape
    if offsets.shape != (B * C * R + 1,) or offsets.dtype != torch.int64 or offsets.device != x.device:
        raise ValueError(f"offsets must be int64 [{B * C * R + 1}] on {x.device}, found {offsets.dtype} "
                         f"{tuple(offsets.shape)} on {offsets.device}")
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != len(x) or (offsets.diff() < 1).any()):
        raise ValueError(f"offsets must rise from 0 to {len(x)}, every segment at least one token")
    return shape
