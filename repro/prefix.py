"""Token ids of C x R pairs -> rows that compute each shared prefix once.

1. pair (c, r) of a query -> ids of prompt + response, tokenised jointly, and the position where scoring starts.
2. The R sequences of one constitution share their longest common prefix of token ids (at most the tokens before the
   first scored one): what is *shared* is found on ids, what is *scored* is kept apart from it.
3. One row per (query, constitution): [prefix | tail 1 | ... | tail R]. Each tail sees the prefix and itself; its
   positions continue the prefix's. The token that predicts a tail's first token is the prefix's last one.

Axes: N rows, T tokens of a row (padded), S scored tokens in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """Token ids of one prompt + response and where the scored tokens begin."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Rows:
    """A batch of rows. `source` and `target` point at each scored token: the flat position [N * T] whose hidden state
    predicts it, and its id; `pair` says which pair it belongs to, pairs counted row by row."""

    ids: Tensor        # [N, T] int64
    positions: Tensor  # [N, T] int64
    mask: Tensor       # [N, 1, T, T] bool, True = may be attended to
    source: Tensor     # [S] int64
    target: Tensor     # [S] int64
    pair: Tensor       # [S] int64


def tokenize_pair(tokenizer, prompt: str, response: str, *, score_eos: bool) -> Scored:
    """Joint tokenisation, as the paper's trainer has it: tokens beyond the prompt's own count are scored.

    With `score_eos` the end token is appended and scored too. Raises ValueError where nothing is left to score.
    """
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = tokenizer(prompt + response, add_special_tokens=False).input_ids
    if score_eos:
        ids = ids + [tokenizer.eos_token_id]
    if len(ids) <= start or start == 0:
        raise ValueError(f"response {response[:40]!r} adds no token to its prompt, or the prompt is empty")
    return Scored(ids, start)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    shortest, longest = min(sequences), max(sequences)  # lexicographic extremes differ first
    return next((k for k, (a, b) in enumerate(zip(shortest, longest)) if a != b), min(len(shortest), len(longest)))


def shared_length(pairs: Sequence[Scored]) -> int:
    """Tokens computed once for these pairs: common to all, and before the first scored token of each."""
    return min(common_prefix([p.ids for p in pairs]), min(p.start for p in pairs))


def row_length(pairs: Sequence[Scored]) -> int:
    """Tokens of the row that computes these pairs."""
    shared = shared_length(pairs)
    return shared + sum(len(p.ids) - shared for p in pairs)


def build_rows(groups: Sequence[Sequence[Scored]], pad: int) -> Rows:
    """groups: N lists of pairs that share a prompt. Rows are padded on the right; a pad attends to itself alone."""
    width = max(map(row_length, groups))
    ids = torch.full((len(groups), width), pad)
    positions = torch.zeros(len(groups), width, dtype=torch.long)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(groups), 1, 1)
    source, target, pair = [], [], []
    count = 0
    for row, group in enumerate(groups):
        shared = shared_length(group)
        ids[row, :shared] = torch.tensor(group[0].ids[:shared])
        positions[row, :shared] = torch.arange(shared)
        mask[row, :shared, :shared] = torch.ones(shared, shared, dtype=torch.bool).tril()
        begin = shared
        for scored in group:
            end = begin + len(scored.ids) - shared
            ids[row, begin:end] = torch.tensor(scored.ids[shared:])
            positions[row, begin:end] = torch.arange(shared, len(scored.ids))
            mask[row, begin:end, :shared] = True
            mask[row, begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
            for k in range(scored.start, len(scored.ids)):
                # token k - 1 of the sequence predicts token k; it lies in the tail, or is the prefix's last token
                before = begin + k - 1 - shared if k > shared else shared - 1
                source.append(row * width + before)
                target.append(scored.ids[k])
                pair.append(count)
            count += 1
            begin = end
    return Rows(ids, positions, mask.unsqueeze(1), *map(torch.tensor, (source, target, pair)))
