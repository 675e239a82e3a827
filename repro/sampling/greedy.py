"""Greedy decoding of a batch: what its prompts begin with alike is computed once, and a row that has ended goes.

1. The prompts are packed as a tree, as training and scoring pack texts (core/tree.py), in parts of BATCH_TOKENS; the model
   computes each part once and leaves its keys and values in a cache of transformers' kind.
2. From there each prompt's own are copied into its row, which ends where the others do, with room for what is to come.
3. A step computes one token for each row that has not ended; its numbers depend on the batch alone, which is fixed.

`generate` is the reference (sampling/local.py), and decodes all that this is not right for (`core.probe.prefills`).

Axes: n rows, K key-value heads, P tokens of the longest prompt, M of a response at most, V vocabulary, d head size.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from repro.core.logprobs import BATCH_TOKENS, laid_out, slices
from repro.core.tree import Scored, own_tokens, pack

KEPT = 0.75  # rows that have ended are moved out where they are more than a quarter: each move copies the others


class Rows(DynamicLayer):
    """Keys and values [n, K, P + M, d] of a layer, of which the first `length` places are filled: DynamicLayer copies all
    of them for each new token."""

    def __init__(self, keys: Tensor, values: Tensor, length: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.length = keys, values, length

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        at = slice(self.length, self.length + key_states.shape[2])
        self.keys[:, :, at], self.values[:, :, at], self.length = key_states, value_states, at.stop
        return self.keys[:, :, :at.stop], self.values[:, :, :at.stop]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def greedy(model, prompts: Sequence[Sequence[int]], most: int, *, ends: Collection[int] = (),
           never: Collection[int] = (), seen: Callable[[Tensor], None] = lambda logits: None) -> list[list[int]]:
    """The likeliest token after each prompt (ids, not empty), and so on: `most` of them, or up to the first of `ends`,
    which is the last. Tokens of `never` are not chosen. `seen` is shown the logits [n, V] of each step's rows."""
    cache, logits = _prefilled(model, prompts, most)
    answers: list[list[int]] = [[] for _ in prompts]
    device, longest = model.device, max(map(len, prompts))
    rows = list(range(len(prompts)))  # whose answers the cache's rows are
    mask = torch.zeros(len(rows), longest + most, dtype=torch.long, device=device)
    for row, prompt in zip(mask, prompts):
        row[longest - len(prompt): longest] = 1
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    never, ends, live = sorted(never), set(ends), set(rows)
    for step in range(most):
        seen(logits)
        if never:
            logits[:, never] = -torch.inf
        chosen = logits.argmax(-1)
        for row, token in zip(rows, chosen.tolist()):
            if row in live:
                answers[row].append(token)
                if token in ends:
                    live.remove(row)
        if not live or step == most - 1:
            break
        if len(live) <= KEPT * len(rows):
            kept = torch.tensor([k for k, row in enumerate(rows) if row in live], device=device)
            rows, chosen, mask, lengths = [rows[k] for k in kept.tolist()], chosen[kept], mask[kept], lengths[kept]
            for layer in cache.layers:
                layer.keep(kept)
        mask[:, longest + step] = 1
        logits = model(input_ids=chosen[:, None], position_ids=(lengths + step)[:, None], use_cache=True,
                       attention_mask=mask[:, : longest + step + 1], past_key_values=cache).logits[:, -1].float()
    return answers


def _prefilled(model, prompts: Sequence[Sequence[int]], room: int) -> tuple[Cache, Tensor]:
    """A cache with the prompts as rows that end together, `room` more places each, and the logits [n, V] after each."""
    longest, layers, logits = max(map(len, prompts)), [], None
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])  # those that share stand together
    for part in slices(own_tokens([prompts[i] for i in order]), BATCH_TOKENS):
        chosen = order[part]
        tree, found = pack([Scored(list(prompts[i]), len(prompts[i])) for i in chosen]), DynamicCache()
        last = torch.tensor([place[-1] for place in tree.places], device=model.device)
        with laid_out(model, tree) as inputs:
            part_logits = model(**inputs, use_cache=True, past_key_values=found, logits_to_keep=last).logits[0].float()
        if logits is None:
            logits = part_logits.new_empty(len(prompts), part_logits.shape[1])
            layers = [[x.new_zeros(len(prompts), x.shape[1], longest + room, x.shape[3])
                       for x in (layer.keys, layer.values)] for layer in found.layers]
        logits[chosen] = part_logits
        for i, place in zip(chosen, tree.places):
            at, place = slice(longest - len(place), longest), torch.tensor(place, device=model.device)
            for rows, layer in zip(layers, found.layers):
                rows[0][i, :, at], rows[1][i, :, at] = layer.keys[0, :, place], layer.values[0, :, place]
    return Cache(layers=[Rows(*rows, longest) for rows in layers]), logits
