"""hidden x vocabulary -> per-token negative log-likelihood, without keeping [N, V] logits and their gradient.

NLL_n = logsumexp_v(z_nv) - z_n,target with z = hidden weight^T + bias. A per-token upstream gradient g scales row n
of dNLL/dz = softmax(z) - onehot = U, so g need not be known when U is computed: kept from the forward, U gives the
backward as two plain matrix products with scaled rows, 6 N D V FLOPs in all (derivation: kernels/README.md).

Axes: N tokens, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import choose, reference
from kernels.modes import MODES, NARROW, plan, slabs


def linear_nll(hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
               softcap: float | None = None, mode: str = "auto", impl: str | None = None) -> Tensor:
    """Per-token NLL [N] in nats, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    hidden [N, D], weight [V, D] and bias [V]: one float dtype and device; target [N] int64 in 0..V-1. `softcap` c
    replaces z by c tanh(z / c) (Gemma). `mode`: "auto" (see `plan`) or one of MODES. `impl`: None, "torch", "triton"
    or "reference", the eager truth; None is Triton for 16-bit inputs on a GPU and torch elsewhere (float32 products
    leave a GPU's tensor cores idle, and beside them there is nothing to save). Deterministic, no host
    synchronisation; nothing is mutated, so `retain_graph` is safe. Raises ValueError on shapes, dtypes, a mode or an
    `impl` that do not fit, and on a mode that gives no gradient where one is needed.
    """
    N, V = _check(hidden, weight, target, bias)
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    obstacle = None if half or (impl and hidden.dtype == torch.float32) else f"it takes 16-bit inputs, found {hidden.dtype}"
    impl = choose(impl, hidden.device.type, obstacle)
    if impl == "reference":
        return reference.linear_nll(hidden, weight, target, bias=bias, softcap=softcap)
    triton = impl == "triton"
    grad = torch.is_grad_enabled()
    head_grad = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    hidden_grad = grad and hidden.requires_grad
    itemsize = 8 if hidden.dtype == torch.float64 else 2 if triton and half else 4  # of an entry of U
    planned = plan(N, V, itemsize, hidden_grad=hidden_grad, head_grad=head_grad,
                   narrow=triton and hidden.shape[1] <= NARROW)
    if mode == "auto":
        mode = planned
    if mode not in MODES:
        raise ValueError(f"mode: allowed are 'auto' and {', '.join(map(repr, MODES))}, found {mode!r}")
    if (head_grad and mode in ("frozen_head", "loss_only")) or (hidden_grad and mode == "loss_only"):
        raise ValueError(f"mode {mode!r} has no gradient for an input that requires one")
    device = "cpu" if hidden.is_meta else hidden.device.type
    with torch.autocast(device, enabled=False):  # it would round the logits to 16 bits
        if triton:
            from kernels import linear_nll_triton as gpu

            x = (hidden.contiguous(), weight.contiguous(), target.contiguous(), bias, softcap)
            return gpu.statistics(*x)[0] if mode == "loss_only" else gpu.LinearNLL.apply(*x, mode)
        if mode == "loss_only":
            return _forward(hidden, weight, target, bias, softcap, keep=None)[0]
        return _LinearNLL.apply(hidden, weight, target, bias, softcap, mode)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[int, int]:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D], found {tuple(hidden.shape)}, {tuple(weight.shape)}")
    N, V = hidden.shape[0], weight.shape[0]
    if target.shape != (N,) or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{N}], found {target.dtype} {tuple(target.shape)}")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be [{V}], found {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, hidden {hidden.dtype} on {hidden.device}")
    return N, V


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: a 16-bit product of two 16-bit matrices would round the logits, and with them the loss."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden @ weight.T
    if bias is not None:
        z += bias
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _to_u(z: Tensor, lse: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Logits [n, V] -> U = dNLL / d(hidden weight^T + bias), in place. The true class is subtracted in this
    precision: after rounding to 16 bits nothing would be left of it where its probability is near 1."""
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    u = z.sub_(lse.unsqueeze(1)).exp_()
    u[torch.arange(len(u), device=u.device), target] -= 1
    return u if slope is None else u.mul_(slope)


def _forward(hidden, weight, target, bias, softcap, keep: str | None):
    """NLL [N], log-sum-exp [N], and what `keep` asks for: "U" [N, V], "UW" [N, D] or None."""
    hidden, weight, bias = _wide(hidden), _wide(weight), None if bias is None else _wide(bias)
    N, V = len(hidden), len(weight)
    nll, lse = hidden.new_empty(N), hidden.new_empty(N)
    kept = hidden.new_empty(N, {"U": V, "UW": hidden.shape[1]}[keep]) if keep else None
    for rows in slabs(N, V):
        z = _logits(hidden[rows], weight, bias, softcap)
        lse[rows] = z.logsumexp(1)
        nll[rows] = lse[rows] - z.gather(1, target[rows].unsqueeze(1)).squeeze(1)
        if keep:
            u = _to_u(z, lse[rows], target[rows], softcap)
            kept[rows] = u if keep == "U" else u @ weight
    return nll, lse, kept


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, softcap, mode):
        keep = {"store": "U", "frozen_head": "UW", "recompute": None}[mode]
        nll, lse, kept = _forward(hidden, weight, target, bias, softcap, keep)
        ctx.mode, ctx.softcap, ctx.dtype = mode, softcap, hidden.dtype
        ctx.save_for_backward(*((kept,) if mode == "frozen_head" else (hidden, weight, target, bias, lse, kept)))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.mode == "frozen_head":
            kept, = ctx.saved_tensors
            return (kept * upstream.to(kept.dtype).unsqueeze(1)).to(ctx.dtype), None, None, None, None, None
        hidden, weight, target, bias, lse, kept = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, _, _ = ctx.needs_input_grad
        g = upstream.to(lse.dtype).unsqueeze(1)
        X, W, b = _wide(hidden), _wide(weight), None if bias is None else _wide(bias)
        scaled = X * g  # the upstream gradient enters on [N, D], never on [N, V]
        dX = torch.empty_like(X) if need_hidden else None
        dW = torch.empty_like(W) if need_weight else None
        db = torch.zeros_like(b) if need_bias else None
        for rows in slabs(*lse.shape, len(weight)) if ctx.mode == "recompute" else [slice(None)]:
            u = kept if kept is not None else _to_u(_logits(X[rows], W, b, ctx.softcap), lse[rows], target[rows],
                                                    ctx.softcap)
            if need_hidden:
                dX[rows] = (u @ W) * g[rows]
            if need_weight:
                if rows.start:
                    torch.addmm(dW, u.T, scaled[rows], out=dW)
                else:  # written, not added to zeros: at few tokens the bytes of dW are what costs
                    torch.mm(u.T, scaled[rows], out=dW)
            if need_bias:
                db += u.T @ g[rows, 0]
        return (None if dX is None else dX.to(hidden.dtype), None if dW is None else dW.to(weight.dtype), None,
                None if db is None else db.to(bias.dtype), None, None)
