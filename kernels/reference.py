"""Eager PyTorch truth for each operation of the core: readable, any float dtype (float64 for tests), no tricks.

Axes: B queries, C constitutions, R responses, N tokens, V vocabulary.
"""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] per token, in float32 at least.

    logits: [..., V] any float dtype; targets: [...] int64. Returns [...] float32 (float64 for float64 logits).
    A 16-bit log-softmax would be noise here: the differences that SAMI trains on are 0.02 to 0.05 nats.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def symmetric_infonce(logprobs: Tensor) -> Tensor:
    """Mean over B of the symmetric InfoNCE loss of each C x R matrix (arXiv 2404.14313, Eq. 2 and Figure 6).

    logprobs: [B, C, R]; entry [b, j, k] scores response k under constitution j, and response j was sampled under
    constitution j. Loss = half the cross-entropy of each row to the diagonal (which response belongs to this
    constitution) plus half that of each column (which constitution to this response). SAMI has C = R; rows and
    columns beyond the diagonal are negatives only. Its value at chance is log C (half log C plus half log R); the
    bound of Eq. 2 is log C minus it.
    """
    rows = logprobs.log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    columns = logprobs.log_softmax(dim=1).diagonal(dim1=1, dim2=2)
    return -(rows + columns).mean() / 2


def segments(values: Tensor, offsets: Tensor, *, mean: bool) -> Tensor:
    """The mean (or sum) of each segment: values [N], offsets int64 [S + 1]; returns [S]."""
    reduce = torch.mean if mean else torch.sum
    return torch.stack([reduce(values[start:end]) for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist())])


def linear_nll(hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
               softcap: float | None = None) -> Tensor:
    """Per-token NLL [N] from full logits: hidden [N, D], weight [V, D], target [N] (see kernels/linear_nll.py)."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -token_logprobs(logits, target)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, softcap: float | None = None,
              sinks: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v where mask [T, T] is True: query [H, T, d], key [K, T, d], value [K, T, e] -> [H, T, e].
    `softcap` c: scores s become c tanh(s / c). `sinks` [H]: a logit more in each head's normaliser, without a value."""
    key, value = (x.repeat_interleave(len(query) // len(key), 0) for x in (key, value))
    if softcap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = scale * query @ key.transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(mask), 1).to(scores.dtype)), 2)
    return scores.softmax(2)[..., : len(mask)] @ value
