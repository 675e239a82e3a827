"""Model and pairs -> the log-prob matrix [B, C, R].

1. prompts[b][c] and responses[b][r] (text) -> token ids of prompt + response, tokenised jointly (repro/prefix.py).
2. "shared": each prompt is computed once for its R responses, many queries in one packed sequence without padding
   (kernels/attention.py); the head runs only where a response token is predicted (kernels/linear_nll.py).
   "reference": C x R sequences in full, logits for every token, the oracle.
3. log-softmax in float32, summed or averaged over each response's tokens -> [B, C, R] float32.

Axes: B queries, C constitutions, R responses, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kernels import reference
from kernels.attention import attention_forward
from kernels.linear_nll import linear_nll
from repro.prefix import Scored, pack, packed_length, tokenize_pair

BATCH_TOKENS = 1024  # tokens in one forward: on a CPU more only leave the cache; where a backward follows, all at once
ATTENTION = "shared_prefix"  # the name under which transformers finds kernels/attention.py
SHARED_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text")


def logprob_matrix(model, tokenizer, prompts: Sequence[Sequence[str]], responses: Sequence[Sequence[str]], *,
                   length_normalize: bool, score_eos: bool, backend: str = "shared") -> Tensor:
    """Log-probs of every response under every prompt of its query: float32 [B, C, R], with gradient.

    prompts: B lists of C rendered prompts; responses: B lists of R texts. `length_normalize` takes the mean over
    the scored tokens (what SAMI trains), else the sum (log p, Eq. 1). Computes in the model's dtype, log-softmax
    in float32 (float64 for a float64 model, whose matrix is float64). `backend`: "shared" or "reference".
    Raises ValueError for ragged C or R, an empty response, an unknown backend, or a model that "shared" does not
    know to be exact on (see `shared_refusal`).
    """
    if backend not in ("shared", "reference"):
        raise ValueError(f"backend {backend!r}: allowed are 'shared' and 'reference'")
    B, C, R = len(prompts), len(prompts[0]), len(responses[0])
    if len(responses) != B or any(len(p) != C for p in prompts) or any(len(r) != R for r in responses):
        raise ValueError("prompts must be [B][C] and responses [B][R], the same C and R for every query")
    groups = _groups(tokenizer, prompts, responses, score_eos)
    if backend == "shared":
        refusal = shared_refusal(model.config, max(len(p.ids) for g in groups for p in g), dropout=model.training)
        if refusal:
            raise ValueError(f"{refusal}; use backend='reference'")
        attach(model)
        score = _score_shared
    else:
        groups = [[pair] for group in groups for pair in group]
        score = partial(_score_reference, pad=tokenizer.pad_token_id)
    whole = backend == "shared" and torch.is_grad_enabled()
    parts = [slice(None)] if whole else slices([packed_length(group) for group in groups], BATCH_TOKENS)
    totals = torch.cat([score(model, groups[part]) for part in parts]).view(B, C, R)
    if not length_normalize:
        return totals
    counts = [len(p.ids) - p.start for g in groups for p in g]
    return totals / totals.new_tensor(counts).view(B, C, R)


def packed_tokens(tokenizer, prompts: Sequence[Sequence[str]], responses: Sequence[Sequence[str]], *,
                  score_eos: bool) -> tuple[list[int], list[int]]:
    """Tokens that each of the B queries takes in a packed sequence, and how many log-probs are of it."""
    groups, C = _groups(tokenizer, prompts, responses, score_eos), len(prompts[0])
    queries = [groups[k: k + C] for k in range(0, len(groups), C)]
    return ([sum(map(packed_length, query)) for query in queries],
            [sum(len(p.ids) - p.start for group in query for p in group) for query in queries])


def _groups(tokenizer, prompts, responses, score_eos: bool) -> list[list[Scored]]:
    return [[tokenize_pair(tokenizer, prompt, response, score_eos=score_eos) for response in responses[b]]
            for b in range(len(prompts)) for prompt in prompts[b]]


def slices(lengths: list[int], budget: int) -> list[slice]:
    """Consecutive items in parts whose lengths sum to at most `budget`, one item at least: a caller with a backward after
    each part gives `logprob_matrix` one part at once."""
    cuts, total = [0], 0
    for k, length in enumerate(lengths):
        if total and total + length > budget:
            cuts.append(k)
            total = 0
        total += length
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(lengths)])]


def attach(model) -> None:
    """Let `model` find the shared-prefix attention. It stays attached, so that activation checkpointing finds it again
    in the backward; where no layout is given it is SDPA, as before."""
    if model.config._attn_implementation != ATTENTION:
        AttentionInterface.register(ATTENTION, attention_forward)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)


def shared_refusal(config, longest: int, *, dropout: bool = False) -> str | None:
    """Why the shared layout would not be exact for a model of this config, or None; `longest` is a pair's tokens."""
    family = config.model_type
    if family not in SHARED_FAMILIES:
        return f"{family}: not a family that the shared path is tested on ({', '.join(SHARED_FAMILIES)})"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{family}: soft-capped attention"
    if getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", 1) not in (None, 1):
        return f"{family}: scaled logits"
    if dropout and getattr(config, "attention_dropout", 0):
        return (f"{family}: attention_dropout {config.attention_dropout} would draw one mask for all responses of a shared "
                "prompt")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < longest:
        return f"{family}: sliding window {window} is shorter than a pair ({longest} tokens)"
    if config._attn_implementation not in ("sdpa", ATTENTION, None):  # None: a config no model was made of yet
        return f"{family}: attention {config._attn_implementation!r} would be replaced by ours; load with 'sdpa'"
    return None


def _score_shared(model, groups: list[list[Scored]]) -> Tensor:
    """Sum of log-probs per pair [n], pairs counted group by group."""
    packed = pack(groups)
    ids, positions, source, target, offsets = (t.to(model.device) for t in (
        packed.ids, packed.positions, packed.source, packed.target, packed.offsets))
    # A 4-D mask stops transformers from making its own. Ours does not read it: were another attention called, with the
    # responses in sight of each other, the result would be NaN, not wrong.
    nowhere = torch.full((1, 1, 1, 1), torch.nan, dtype=model.dtype, device=model.device)
    hidden = model.base_model(input_ids=ids[None], position_ids=positions[None], attention_mask=nowhere, use_cache=False,
                              shared_prefix=packed.layout)[0]
    head = model.get_output_embeddings()
    nll = linear_nll(hidden[0, source].to(head.weight.dtype), head.weight, target, bias=head.bias,
                     softcap=getattr(model.config, "final_logit_softcapping", None))
    return torch.segment_reduce(-nll, "sum", offsets=offsets)  # in a fixed order, on a GPU too, where index_add has none


def _score_reference(model, groups: list[list[Scored]], *, pad: int) -> Tensor:
    """Sum of log-probs per pair [n]: each pair a row of its own, full logits."""
    pairs = [pair for group in groups for pair in group]
    width = max(len(p.ids) for p in pairs)
    ids = torch.full((len(pairs), width), pad)
    attend = torch.zeros(len(pairs), width, dtype=torch.long)
    scored = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, pair in enumerate(pairs):  # padded on the right: no token ever sees a pad
        ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
        attend[row, : len(pair.ids)] = 1
        scored[row, pair.start: len(pair.ids)] = True
    ids, attend, scored = (t.to(model.device) for t in (ids, attend, scored))
    logits = model(input_ids=ids, attention_mask=attend, use_cache=False).logits
    logprobs = reference.token_logprobs(logits[:, :-1], ids[:, 1:])
    return (logprobs * scored[:, 1:]).sum(1)
