"""Model and pairs -> the log-prob matrix [B, C, R].

1. prompts[b][c] and responses[b][r] (text) -> token ids of prompt + response, tokenised jointly.
2. Every sequence (b, c, r) goes through the model in full, in batches of similar length.
3. log-softmax in float32 at the response's positions, summed or averaged -> [B, C, R] float32.

Axes: B queries, C constitutions, R responses, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference

BATCH_TOKENS = 4096  # padded tokens in one forward: 4096 x 49152 float32 logits are 0.8 GB


@dataclass(frozen=True)
class Scored:
    """Token ids of one prompt + response and where the scored tokens begin."""

    ids: list[int]
    start: int


def tokenize_pair(tokenizer, prompt: str, response: str, *, score_eos: bool) -> Scored:
    """Joint tokenisation, as the paper's trainer has it: tokens beyond the prompt's own count are scored.

    With `score_eos` the end token is appended and scored too. Raises ValueError where nothing is left to score.
    """
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = tokenizer(prompt + response, add_special_tokens=False).input_ids
    if score_eos:
        ids = ids + [tokenizer.eos_token_id]
    if len(ids) <= start:
        raise ValueError(f"response {response[:40]!r} adds no token to its prompt")
    return Scored(ids, start)


def logprob_matrix(model, tokenizer, prompts: Sequence[Sequence[str]], responses: Sequence[Sequence[str]], *,
                   length_normalize: bool, score_eos: bool, backend: str = "reference") -> Tensor:
    """Log-probs of every response under every prompt of its query: float32 [B, C, R], with gradient.

    prompts: B lists of C rendered prompts; responses: B lists of R texts. `length_normalize` takes the mean over
    the scored tokens (what SAMI trains), else the sum (log p, Eq. 1). Computes in the model's dtype, log-softmax
    in float32. `backend`: "reference" runs all C x R sequences in full with all logits.
    Raises ValueError for ragged C or R, an empty response or an unknown backend.
    """
    if backend != "reference":
        raise ValueError(f"backend {backend!r}: allowed is 'reference'")
    B, C, R = len(prompts), len(prompts[0]), len(responses[0])
    if len(responses) != B or any(len(p) != C for p in prompts) or any(len(r) != R for r in responses):
        raise ValueError("prompts must be [B][C] and responses [B][R], the same C and R for every query")
    pairs = [tokenize_pair(tokenizer, prompt, response, score_eos=score_eos)
             for b in range(B) for prompt in prompts[b] for response in responses[b]]
    values: list[Tensor | None] = [None] * len(pairs)
    for batch in _batches([len(p.ids) for p in pairs]):
        for index, value in zip(batch, _score(model, tokenizer, [pairs[i] for i in batch], length_normalize)):
            values[index] = value
    return torch.stack(values).float().view(B, C, R)


def _batches(lengths: list[int]) -> list[list[int]]:
    """Indices grouped by length, longest first, each group within BATCH_TOKENS when padded."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


def _score(model, tokenizer, pairs: list[Scored], length_normalize: bool) -> Tensor:
    """[n] log-probs of n pairs in one padded forward."""
    width = max(len(p.ids) for p in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    attend = torch.zeros(len(pairs), width, dtype=torch.long)
    scored = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, pair in enumerate(pairs):  # padded on the right: no token ever sees a pad
        ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
        attend[row, : len(pair.ids)] = 1
        scored[row, pair.start: len(pair.ids)] = True
    ids, attend, scored = (t.to(model.device) for t in (ids, attend, scored))
    logits = model(input_ids=ids, attention_mask=attend, use_cache=False).logits
    logprobs = reference.token_logprobs(logits[:, :-1], ids[:, 1:])
    scored = scored[:, 1:]
    total = (logprobs * scored).sum(1)
    return total / scored.sum(1) if length_normalize else total
