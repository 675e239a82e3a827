"""Token ids of C x R pairs -> one packed sequence that computes each token of their tree once.

1. pair (c, r) of a query -> ids of prompt + response, and the position where scoring starts. A response is the token ids
   that were sampled, which follow the prompt's (`Sampled`: with what stood between the two); or a text, tokenised jointly
   with the prompt.
2. The sequences of all pairs that are packed together form a tree: what several of them begin with is computed once,
   whatever it is (the system text of all queries, a query under all its constitutions, the first tokens of responses).
   What is *shared* is found on ids, what is *scored* is kept apart from it.
3. The tree in one sequence without padding, as branches (kernels/attention.py): the first text whole, then of each other
   one what it does not share, from the place where it leaves. Positions are those in a text of its own. The token that
   predicts a scored one may predict several, one of each text that goes on from it.

Axes: T tokens of the packed sequence, S scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    """A response's token ids; before them, not scored, those of the mark behind which they were sampled (`lead`); the token
    that ended it, where that is not the tokenizer's own end; and whether any did (`finished`), or it was cut."""

    ids: tuple[int, ...]
    lead: tuple[int, ...] = ()
    end: int | None = None
    finished: bool = True


@dataclass(frozen=True)
class Packed:
    """Pairs in one packed sequence. `source` and `target` point at each scored token: the position whose hidden state
    predicts it, and its id; those of one pair stand together, pairs in their order, and `offsets` has where each begins."""

    ids: Tensor        # [T] int64
    positions: Tensor  # [T] int64
    layout: Layout
    source: Tensor     # [S] int64
    target: Tensor     # [S] int64
    offsets: Tensor    # [pairs + 1] int64
    places: list[list[int]]  # of each pair, where its tokens stand


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


def pairs_of(tokenizer, prompt: str, responses: Sequence[str | Sequence[int] | Sampled], *, score_eos: bool,
             finished: Sequence[bool] | None = None) -> list[Scored]:
    """One prompt with each of its responses: token ids by `follow`, text by `tokenize_pair`. Of a response that did not end
    by itself (`finished`, by default all did, and `Sampled.finished`) no end is scored."""
    ended = [True] * len(responses) if finished is None else finished
    ids = [] if all(isinstance(r, str) for r in responses) else tokenizer(prompt, add_special_tokens=False).input_ids

    def sampled(r: Sampled, end: bool) -> Scored:
        own = tokenizer.eos_token_id if r.end is None else r.end
        return follow([*ids, *r.lead], r.ids, own if score_eos and end and r.finished else None)

    return [tokenize_pair(tokenizer, prompt, r, score_eos=score_eos and end) if isinstance(r, str) else
            sampled(r if isinstance(r, Sampled) else Sampled(tuple(r)), end) for r, end in zip(responses, ended)]


Pairs = list[list[Scored]]  # of a query, [C][R]


def tokenised(tokenizer, prompts: Sequence[Sequence[str]], responses: Sequence[Sequence[str | Sequence[int] | Sampled]], *,
              score_eos: bool, finished: Sequence[Sequence[bool]] | None = None) -> list[Pairs]:
    """prompts [B][C], responses and `finished` [B][R] -> the pairs [C][R] of each of B queries, by `pairs_of`. Raises
    ValueError for ragged C or R."""
    C, R = len(prompts[0]), len(responses[0])
    if len(responses) != len(prompts) or any(len(p) != C for p in prompts) or any(len(r) != R for r in responses):
        raise ValueError("prompts must be [B][C] and responses [B][R], the same C and R for every query")
    if finished is not None and [len(ended) for ended in finished] != [R] * len(responses):
        raise ValueError("finished must be [B][R], as responses are")
    return [[pairs_of(tokenizer, prompt, own, score_eos=score_eos, finished=ended) for prompt in query]
            for query, own, ended in zip(prompts, responses, finished or [None] * len(prompts))]


def scored_tokens(pairs: Pairs) -> int:
    """How many log-probs a query's matrix is summed from."""
    return sum(len(p.ids) - p.start for group in pairs for p in group)


def packed_tokens(*queries: Pairs) -> int:
    """Tokens that queries take in one packed sequence: those of the tree."""
    return sum(own_tokens(sorted(pair.ids for pairs in queries for group in pairs for pair in group)))


def own_tokens(texts: Sequence[Sequence[int]]) -> list[int]:
    """Of each of sorted texts the tokens that it does not share with those before it."""
    return [len(text) - common_prefix((before, text)) for before, text in zip([[], *texts], texts)]


def whole_tokens(*queries: Pairs) -> int:
    """Tokens of all their sequences, each counted in full: what the reference path computes."""
    return sum(len(pair.ids) for pairs in queries for group in pairs for pair in group)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    first, last = min(sequences), max(sequences)  # lexicographic extremes differ first
    same, other = 0, min(len(first), len(last)) + 1  # up to where they are the same, and where they are not
    while other - same > 1:
        half = (same + other) // 2
        if first[same:half] == last[same:half]:
            same = half
        else:
            other = half
    return same


def pack(pairs: Sequence[Scored]) -> Packed:
    """The tree of these pairs' sequences. Branches stand in the order in which their texts do, a text's own tokens as near
    to it as they can: which texts there are, and their order, decides every number's place, and nothing else does."""
    texts = [pair.ids for pair in pairs]
    ids, positions, branches = [], [], []
    places: list[list[int]] = [[] for _ in texts]  # of each text's tokens, in the packed sequence
    # What is still to do: texts that share their first `depth` tokens and go on with the same one; which branch they
    # leave, and how deep in their text that branch begins.
    todo = [(group, 0, -1, 0) for group in reversed(_forks(texts, range(len(texts)), 0))]
    while todo:
        group, depth, parent, start = todo.pop()
        branch, begin, first = len(branches), len(ids), depth
        while group:  # along the first of them to its end
            until = common_prefix([texts[i] for i in group])
            ids += texts[group[0]][depth:until]
            for i in group:
                places[i] += range(begin + depth - first, begin + until - first)
            depth = until
            forks = _forks(texts, group, depth)
            group, others = (forks[0], forks[1:]) if forks else ([], [])
            todo += [(other, depth, branch, first) for other in reversed(others)]
        positions += range(first, depth)
        branches.append((depth - first, parent, first - start if parent >= 0 else 0))
    source = [place[k - 1] for place, pair in zip(places, pairs) for k in range(pair.start, len(pair.ids))]
    target = [token for pair in pairs for token in pair.ids[pair.start:]]
    offsets = [0, *accumulate(len(pair.ids) - pair.start for pair in pairs)]
    ids, positions, source, target, offsets = map(torch.tensor, (ids, positions, source, target, offsets))
    return Packed(ids, positions, Layout(tuple(branches)), source, target, offsets, places)


def _forks(texts: Sequence[Sequence[int]], group: Sequence[int], depth: int) -> list[list[int]]:
    """The texts of a group that have a token at `depth`, by that token, in the order in which they stand."""
    forks: dict[int, list[int]] = {}
    for i in group:
        if depth < len(texts[i]):
            forks.setdefault(texts[i][depth], []).append(i)
    return list(forks.values())
