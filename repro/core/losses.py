"""The objectives: pure functions of log-prob matrices. `symmetric_infonce` is SAMI's; the others are its halves and its
rivals on the same pairs (`TrainSpec.objective`).

Axes: B queries, C constitutions, R responses, C = R >= 2; response j of a query was sampled under its constitution j, so
that the diagonal is each response under its own. S [B, C, R]: summed log-probs; L: scored tokens; M = S / L: their means;
S0: S under the initial model. All are float; a result is a scalar in nats, the mean over queries. Other shapes raise
ValueError.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels import infonce
from repro.base.training import TrainSpec


def symmetric_infonce(logprobs: Tensor) -> Tensor:
    """The mean symmetric InfoNCE loss over B queries, in nats: arXiv 2404.14313, Eq. 2 without its constant log C.

    logprobs: [B, C, R] float, C = R >= 2; [b, j, k] = score of response k under constitution j (the training
    objective uses the mean log-prob of a response's tokens). Response j was sampled under constitution j.
    Returns a scalar: log C at chance, 0 when each response is certain of its constitution and the reverse.
    Raises ValueError on another shape.

    By hand, for [[a, b], [c, d]]: rows softplus(b - a), softplus(c - d); columns softplus(c - a),
    softplus(b - d); the loss is the mean of the four.
    """
    return infonce.symmetric_infonce(_square(logprobs))


def infonce_rows(logprobs: Tensor) -> Tensor:
    """Half of `symmetric_infonce`: the contrast over responses, at a fixed constitution (section 3).

    By hand, for [[a, b], [c, d]]: the mean of softplus(b - a) and softplus(c - d).
    """
    return -_square(logprobs).log_softmax(2).diagonal(dim1=1, dim2=2).mean()


def infonce_columns(logprobs: Tensor) -> Tensor:
    """The other half: the contrast over constitutions, at a fixed response; log C minus it is the bound of Eq. 1.

    By hand, for [[a, b], [c, d]]: the mean of softplus(c - a) and softplus(b - d).
    """
    return -_square(logprobs).log_softmax(1).diagonal(dim1=1, dim2=2).mean()


def mipo(sums: Tensor, initial: Tensor, *, beta: float) -> Tensor:
    """DPO on the same pairs (MIPO, arXiv 2603.19294; DPO: arXiv 2305.18290, Eq. 7): under constitution c the response that
    was sampled under it is chosen, each other one rejected; the mean over the C (R - 1) of them.

    By hand, for S - S0 = [[a, b], [c, d]]: the mean of softplus(beta (b - a)) and softplus(beta (c - d)).
    """
    h = beta * _ratios(sums, initial)
    return -_others(logsigmoid(h.diagonal(dim1=1, dim2=2)[:, :, None] - h)).mean()


def nca(sums: Tensor, initial: Tensor, *, beta: float) -> Tensor:
    """Noise contrastive alignment of pairs (arXiv 2402.05369, section 4), which keeps the likelihood of the chosen response
    from falling, as a contrast alone does not. Chosen and rejected as in `mipo`.

    By hand, for beta (S - S0) = [[a, b], [c, d]]: the mean of softplus(-a) + softplus(a) / 2 + softplus(b) / 2 and
    softplus(-d) + softplus(d) / 2 + softplus(c) / 2.
    """
    h = beta * _ratios(sums, initial)
    own = h.diagonal(dim1=1, dim2=2)
    return -(logsigmoid(own) + logsigmoid(-own) / 2).mean() - _others(logsigmoid(-h)).mean() / 2


def conspo_rows(logprobs: Tensor, *, margin: float, temperature: float = 1.0) -> Tensor:
    """`infonce_rows` with a margin between a response's score and the others'. The idea is ConSPO's (arXiv 2605.12969,
    abstract: length-normalised scores, InfoNCE within a group, a margin that grows by a schedule); its formula and schedule
    could not be read. Here the margin is subtracted from the own score, and grows linearly over an iteration's steps.

    By hand, for [[a, b], [c, d]]: the mean of softplus((b - a + margin) / temperature) and
    softplus((c - d + margin) / temperature).
    """
    own = torch.eye(_square(logprobs).shape[1], dtype=logprobs.dtype, device=logprobs.device)
    return infonce_rows((logprobs - margin * own) / temperature)


def imitation(logprobs: Tensor) -> Tensor:
    """The own responses' mean negative log-prob per token: the control without a contrast. Of one cell [B, 1, 1], the
    positive response under a prompt without a constitution, it is context distillation (arXiv 2112.00861, whose loss is the
    divergence between whole distributions) with one sampled response in the distribution's place.

    By hand, for [[a, b], [c, d]]: -(a + d) / 2.
    """
    return -logprobs.diagonal(dim1=1, dim2=2).mean()


ON_MEANS: dict[str, Callable[..., Tensor]] = {
    "sami": symmetric_infonce, "sami_rows": infonce_rows, "sami_columns": infonce_columns, "sami_sum": symmetric_infonce,
    "conspo_rows": conspo_rows, "sft": imitation, "distil": imitation}
ON_RATIOS: dict[str, Callable[..., Tensor]] = {"mipo": mipo, "nca": nca}


def objective(spec: TrainSpec, sums: Tensor, lengths: Tensor, *, initial: Tensor | None = None,
              progress: float = 1.0) -> Tensor:
    """The objective of `spec`, with its parameters, of S, L and, where it needs it, S0: a scalar. `progress`: which share
    of the iteration's steps the present one ends. Raises ValueError where S0 is missing or of another shape."""
    name, given = spec.objective, dict(spec.parameters)
    anchor = given.pop("anchor", 0.0)
    scores = sums / lengths if spec.length_normalize and name != "sami_sum" else sums
    if name in ON_RATIOS:
        if initial is None:
            raise ValueError(f"the objective {name!r} needs the log-probs under the initial model")
        loss = ON_RATIOS[name](sums, initial, **given)
    elif name == "conspo_rows":
        loss = conspo_rows(scores, margin=given["margin"] * progress, temperature=given["temperature"])
    else:
        temperature = given.get("temperature", 1.0)
        loss = ON_MEANS[name](scores if temperature == 1 else scores / temperature)
    return loss + anchor * imitation(sums / lengths) if anchor else loss


def _square(logprobs: Tensor) -> Tensor:
    if logprobs.ndim != 3 or logprobs.shape[1] != logprobs.shape[2] or logprobs.shape[1] < 2:
        raise ValueError(f"logprobs must be [B, C, R] with C = R >= 2, found {tuple(logprobs.shape)}")
    return logprobs


def _ratios(sums: Tensor, initial: Tensor) -> Tensor:
    """S - S0, the log-ratios to the initial model."""
    if initial.shape != _square(sums).shape:
        raise ValueError(f"the initial model's log-probs are {tuple(initial.shape)}, the model's {tuple(sums.shape)}")
    return sums - initial


def _others(x: Tensor) -> Tensor:
    """The entries beside the diagonal: [B, C, R] -> [B, C (R - 1)]."""
    return x[:, ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)]
