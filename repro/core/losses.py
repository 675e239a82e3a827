"""The objective of SAMI: one pure function of a log-prob matrix."""

from torch import Tensor

from kernels import infonce


def symmetric_infonce(logprobs: Tensor) -> Tensor:
    """The mean symmetric InfoNCE loss over B queries, in nats: arXiv 2404.14313, Eq. 2 without its constant log C.

    logprobs: [B, C, R] float, C = R >= 2; [b, j, k] = score of response k under constitution j (the training
    objective uses the mean log-prob of a response's tokens). Response j was sampled under constitution j.
    Returns a scalar: log C at chance, 0 when each response is certain of its constitution and the reverse.
    Raises ValueError on another shape.

    By hand, for [[a, b], [c, d]]: rows softplus(b - a), softplus(c - d); columns softplus(c - a),
    softplus(b - d); the loss is the mean of the four.
    """
    if logprobs.ndim != 3 or logprobs.shape[1] != logprobs.shape[2] or logprobs.shape[1] < 2:
        raise ValueError(f"logprobs must be [B, C, R] with C = R >= 2, found {tuple(logprobs.shape)}")
    return infonce.symmetric_infonce(logprobs)
