"""Token ids of C x R pairs -> one packed sequence that computes each shared prefix once.

1. pair (c, r) of a query -> ids of prompt + response, and the position where scoring starts. A response is the token ids
   that were sampled, which follow the prompt's (`Sampled`: with what stood between the two); or a text, tokenised jointly
   with the prompt.
2. The R sequences of one constitution share their longest common prefix of token ids (at most the tokens before the
   first scored one): what is *shared* is found on ids, what is *scored* is kept apart from it.
3. One group per (query, constitution), [prefix | tail 1 | ... | tail R], group after group in one sequence without
   padding. Each tail sees its group's prefix and itself; its positions continue the prefix's. The token that predicts a
   tail's first token is the prefix's last one.

Axes: T tokens of the packed sequence, S scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import Layout


@dataclass(frozen=True)
class Scored:
    """Token ids of one prompt + response and where the scored tokens begin."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Sampled:
    """A response's token ids; before them, not scored, those of the mark behind which they were sampled (`lead`); and the
    token that ended it, where that is not the tokenizer's own end."""

    ids: tuple[int, ...]
    lead: tuple[int, ...] = ()
    end: int | None = None


@dataclass(frozen=True)
class Packed:
    """Groups in one packed sequence. `source` and `target` point at each scored token: the position whose hidden state
    predicts it, and its id; those of one pair stand together, pairs in the order of their groups, and `offsets` has where
    each pair begins."""

    ids: Tensor        # [T] int64
    positions: Tensor  # [T] int64
    layout: Layout
    source: Tensor     # [S] int64
    target: Tensor     # [S] int64
    offsets: Tensor    # [pairs + 1] int64


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


def follow(prompt: Sequence[int], response: Sequence[int], end: int | None = None) -> Scored:
    """The ids of a prompt and then those of a response, as they were sampled; `end`, where given, is appended and scored.
    Raises ValueError where one of them is empty."""
    ids = [*prompt, *response, *([] if end is None else [end])]
    if not prompt or not response:
        raise ValueError("a response without token ids, or an empty prompt")
    return Scored(ids, len(prompt))


def pairs_of(tokenizer, prompt: str, responses: Sequence[str | Sequence[int] | Sampled], *,
             score_eos: bool) -> list[Scored]:
    """One prompt with each of its responses: token ids by `follow`, text by `tokenize_pair`."""
    ids = [] if all(isinstance(r, str) for r in responses) else tokenizer(prompt, add_special_tokens=False).input_ids

    def sampled(r: Sampled) -> Scored:
        own = tokenizer.eos_token_id if r.end is None else r.end
        return follow([*ids, *r.lead], r.ids, own if score_eos else None)

    return [tokenize_pair(tokenizer, prompt, r, score_eos=score_eos) if isinstance(r, str) else
            sampled(r if isinstance(r, Sampled) else Sampled(tuple(r))) for r in responses]


Pairs = list[list[Scored]]  # of a query, [C][R]


def tokenised(tokenizer, prompts: Sequence[Sequence[str]], responses: Sequence[Sequence[str | Sequence[int] | Sampled]], *,
              score_eos: bool) -> list[Pairs]:
    """prompts [B][C] and responses [B][R] -> the pairs [C][R] of each of B queries, by `pairs_of`. Raises ValueError for
    ragged C or R."""
    C, R = len(prompts[0]), len(responses[0])
    if len(responses) != len(prompts) or any(len(p) != C for p in prompts) or any(len(r) != R for r in responses):
        raise ValueError("prompts must be [B][C] and responses [B][R], the same C and R for every query")
    return [[pairs_of(tokenizer, prompt, own, score_eos=score_eos) for prompt in query]
            for query, own in zip(prompts, responses)]


def scored_tokens(pairs: Pairs) -> int:
    """How many log-probs a query's matrix is summed from."""
    return sum(len(p.ids) - p.start for group in pairs for p in group)


def packed_tokens(pairs: Pairs) -> int:
    """Tokens that a query takes in a packed sequence."""
    return sum(map(packed_length, pairs))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    shortest, longest = min(sequences), max(sequences)  # lexicographic extremes differ first
    return next((k for k, (a, b) in enumerate(zip(shortest, longest)) if a != b), min(len(shortest), len(longest)))


def shared_length(pairs: Sequence[Scored]) -> int:
    """Tokens computed once for these pairs: common to all, and before the first scored token of each."""
    return min(common_prefix([p.ids for p in pairs]), min(p.start for p in pairs))


def packed_length(pairs: Sequence[Scored]) -> int:
    """Tokens that these pairs take in a packed sequence."""
    shared = shared_length(pairs)
    return shared + sum(len(p.ids) - shared for p in pairs)


def pack(groups: Sequence[Sequence[Scored]]) -> Packed:
    """groups: lists of pairs that share a prompt, the same number of pairs in each."""
    ids, positions, layout, source, target, offsets = [], [], [], [], [], [0]
    for group in groups:
        shared, origin = shared_length(group), len(ids)
        ids += group[0].ids[:shared]
        positions += range(shared)
        for scored in group:
            begin = len(ids)
            ids += scored.ids[shared:]
            positions += range(shared, len(scored.ids))
            for k in range(scored.start, len(scored.ids)):
                # token k - 1 of the sequence predicts token k; it lies in the tail, or is the prefix's last token
                source.append(begin + k - 1 - shared if k > shared else origin + shared - 1)
                target.append(scored.ids[k])
            offsets.append(len(target))
        layout.append((shared, tuple(len(p.ids) - shared for p in group)))
    ids, positions, source, target, offsets = map(torch.tensor, (ids, positions, source, target, offsets))
    return Packed(ids, positions, Layout(tuple(layout)), source, target, offsets)
