"""Model and pairs -> the log-prob matrix [B, C, R].

1. prompts[b][c] and responses[b][r] -> token ids of prompt + response (core/tree.py): texts tokenised jointly; in a run
   the ids that were sampled.
2. "shared": what several pairs begin with is computed once, many queries in one packed sequence without padding
   (kernels/attention.py); the head runs only where a response token is predicted (kernels/linear_nll.py).
   "reference": C x R sequences in full, one at a time, logits for every token, the oracle.
3. log-softmax in float32, summed or averaged over each response's tokens -> [B, C, R] float32.

Which of them is right for a model is tried on it, not read off its name (repro/core/probe.py).

Axes: B queries, C constitutions, R responses, T tokens, V vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernels import reference
from kernels.interfaces import attention_interface, mask_interface, packed
from kernels.linear_nll import linear_nll
from repro.base.records import first_line
from repro.core import probe
from repro.core.tree import Packed, Pairs, Scored, pack, packed_tokens, tokenised
from repro.models.load import dropouts, steady_length

BATCH_TOKENS = 1024  # tokens in one forward: on a CPU more only leave the cache; where a backward follows, all at once
QUERY_TOKENS = 8192  # up to as many a query stays whole even so: its constitutions share more than the cache is worth
ATTENTION = "shared_prefix"  # begins the names under which transformers finds kernels/attention.py
WAYS = (*probe.SHARED, "reference")


def logprob_matrix(model, tokenizer, prompts: Sequence[Sequence[str]], responses: Sequence[Sequence[str]], *,
                   length_normalize: bool, score_eos: bool, finished: Sequence[Sequence[bool]] | None = None,
                   backend: str = "shared") -> Tensor:
    """Log-probs of every response under every prompt of its query: float32 [B, C, R], with gradient.

    prompts: B lists of C rendered prompts; responses: B lists of R texts. `length_normalize` takes the mean over
    the scored tokens (what SAMI trains), else the sum (log p, Eq. 1). `score_eos` scores the token that ends a response
    too, but of those that did not end by themselves (`finished` [B][R], by default all did). Computes in the model's dtype,
    log-softmax in float32 (float64 for a float64 model, whose matrix is float64). `backend`: "shared" or "reference".
    Raises ValueError for ragged C, R or `finished`, an empty response, an unknown backend, a model that is not causal, one
    that "shared" is seen to be wrong on (repro/core/probe.py), and pairs so long that the model's RoPE would look at the
    batch.
    """
    way = settled(model, backend)
    return matrix_of(way, model, tokenised(tokenizer, prompts, responses, score_eos=score_eos, finished=finished),
                     length_normalize=length_normalize, budget=None if torch.is_grad_enabled() else BATCH_TOKENS)


def settled(model, backend: str) -> str:
    """The way (of WAYS) to compute `backend` for this model. Raises ValueError where there is none that is right."""
    if backend not in ("shared", "reference"):
        raise ValueError(f"backend {backend!r}: allowed are 'shared' and 'reference'")
    found = probe.of_model(model, score)
    if found.way is None or (backend == "shared" and found.way == "reference"):
        raise ValueError(found.refusal if found.way is None else f"{found.refusal}; use backend='reference'")
    if backend == "shared" and model.training and dropouts(model.config):  # `train` takes it out of training
        raise ValueError(f"dropout ({', '.join(dropouts(model.config))}) would draw one mask for all responses of a "
                         "shared prompt; call model.eval()")
    return found.way if backend == "shared" else backend


def way_for(config, longest: int, dropout: str = "off") -> probe.Found:
    """As `settled`, before there are weights: tried on a tiny model of the same class and config, up to texts of `longest`
    tokens. The reference path where no such model can be made: the loaded one is tried too. `dropout`: of TrainSpec."""
    if dropout == "drawn" and (rates := ", ".join(dropouts(config))):
        return probe.Found("reference", f"dropout ({rates}) would draw one mask for all responses of a shared prompt")
    try:
        return probe.of_config(config, score, longest)
    except ValueError as e:
        return probe.Found("reference", first_line(e))


def matrix_of(way: str, model, queries: Sequence[Pairs], *, length_normalize: bool, budget: int | None = None) -> Tensor:
    """`logprob_matrix` of tokenised queries (`core.tree.tokenised`), in one of WAYS, whose being right for the model is
    settled. `budget`: tokens in one forward, at least those of one query (of some of its constitutions where it has more
    than QUERY_TOKENS); None: all in one, as where a backward follows."""
    groups = [group for pairs in queries for group in pairs]
    steady, longest = steady_length(model.config), max(len(p.ids) for g in groups for p in g)
    if steady is not None and longest > steady:
        raise ValueError(f"a pair of {longest} tokens: RoPE of this model's kind looks at the longest text of a batch from "
                         f"{steady + 1} tokens on")
    parts = [groups] if budget is None else _parts(queries, budget)
    totals = torch.cat([score(way, model, part) for part in parts]).view(len(queries), len(queries[0]), -1)
    return totals / lengths_of(queries, totals) if length_normalize else totals


def lengths_of(queries: Sequence[Pairs], sums: Tensor) -> Tensor:
    """Scored tokens of each pair, as `sums` [B, C, R] are."""
    return sums.new_tensor([len(p.ids) - p.start for pairs in queries for group in pairs for p in group]).view_as(sums)


def _parts(queries: Sequence[Pairs], budget: int) -> list[Pairs]:
    """What goes together in one forward, in order: a function of the queries and their order alone, since what a number's
    last bit is depends on what is computed beside it."""
    pieces = []
    for pairs in queries:
        size = packed_tokens(pairs)
        cuts = [slice(None)] if size <= max(budget, QUERY_TOKENS) else slices(
            [packed_tokens([group]) for group in pairs], QUERY_TOKENS)
        pieces += [(pairs[cut], packed_tokens(pairs[cut])) for cut in cuts]
    return [[group for piece, _ in pieces[part] for group in piece] for part in slices([n for _, n in pieces], budget)]


def slices(lengths: list[int], budget: int) -> list[slice]:
    """Consecutive items in parts whose lengths sum to at most `budget`, one item at least: as few parts as that takes, and
    the largest of them as small as it can then be, which is what decides a pass's memory. A caller with a backward after
    each part gives `logprob_matrix` one part at once."""
    few = _cuts(lengths, budget)
    low, high = 0, budget  # the smallest budget that makes no more parts
    while low < high:
        middle = (low + high) // 2
        if len(_cuts(lengths, middle)) > len(few):
            low = middle + 1
        else:
            high = middle
    few = _cuts(lengths, high)
    return [slice(a, b) for a, b in zip(few, [*few[1:], len(lengths)])]


def _cuts(lengths: list[int], budget: int) -> list[int]:
    """Where parts begin that each take as much as `budget` lets them."""
    cuts, total = [0], 0
    for k, length in enumerate(lengths):
        if total and total + length > budget:
            cuts.append(k)
            total = 0
        total += length
    return cuts


def attach(model) -> None:
    """Let `model` find the shared-prefix attention. It stays attached, so that activation checkpointing finds it again
    in the backward; where no layout is given, what was there before attends (sdpa knows neither Gemma 2's soft-cap nor
    gpt-oss' sinks: such families have an eager attention of their own). Raises ValueError where the model's attention is
    its own code."""
    before = model.config._attn_implementation
    if before.startswith(ATTENTION):
        return
    if not model._can_set_attn_implementation():
        raise ValueError(f"{model.config.model_type}: its attention cannot be replaced")
    name = f"{ATTENTION}_{before}"  # one a predecessor, since transformers knows functions by name alone
    attend = _eager if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]
    AttentionInterface.register(name, attention_interface(attend))
    AttentionMaskInterface.register(name, mask_interface(ALL_MASK_ATTENTION_FUNCTIONS[before]))
    model.set_attn_implementation(name)


def _eager(module, *inputs, **options):
    """The attention that a family's file calls where no other is asked for; it stands in no registry."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *inputs, **options)


def score(way: str, model, groups: list[list[Scored]]) -> Tensor:
    """Sum of log-probs per pair [n], pairs counted group by group."""
    if way == "reference":
        return torch.stack([_score_alone(model, pair) for group in groups for pair in group])
    tree = pack([pair for group in groups for pair in group])
    source, target, offsets = (t.to(model.device) for t in (tree.source, tree.target, tree.offsets))
    with laid_out(model, tree) as inputs:
        if way == "shared":
            hidden, head = model.base_model(**inputs, use_cache=False)[0], model.get_output_embeddings()
            nll = linear_nll(hidden[0, source].to(head.weight.dtype), head.weight, target, bias=head.bias,
                             softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None))
        else:  # a head with more in it than its matrix
            nll = -reference.token_logprobs(model(**inputs, use_cache=False, logits_to_keep=source).logits[0], target)
    return torch.segment_reduce(-nll, "sum", offsets=offsets)  # in a fixed order, on a GPU too, where index_add has none


@contextmanager
def laid_out(model, tree: Packed) -> Iterator[dict[str, Tensor]]:
    """What `model` is called with for a packed sequence, in the block alone."""
    attach(model)
    ids, positions = (t.to(model.device)[None] for t in (tree.ids, tree.positions))
    with packed(tree.layout, tree.positions):
        # transformers takes a batch of one without a mask for several texts, split where positions start again; a mask of
        # ones leaves it to our own (kernels/attention.py), which knows that texts share their beginnings.
        yield {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}


def _score_alone(model, pair: Scored) -> Tensor:
    """Sum of log-probs []: a row of its own, without padding (sparse attention would choose from it) and without a mask."""
    ids = torch.tensor([pair.ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    if len(logits) != len(pair.ids):
        raise ValueError(f"{type(model).__name__}: {len(logits)} logits for {len(pair.ids)} tokens (a prompt of its own?)")
    return reference.token_logprobs(logits[pair.start - 1: -1], ids[0, pair.start:]).sum()
