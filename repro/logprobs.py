"""Model and pairs -> the log-prob matrix [B, C, R].

1. prompts[b][c] and responses[b][r] (text) -> token ids of prompt + response, tokenised jointly (repro/prefix.py).
2. "shared": one row per (query, constitution) computes its prompt once for all R responses; the head runs only where
   a response token is predicted (kernels/linear_nll.py). "reference": C x R sequences in full, logits for every token,
   the oracle.
3. log-softmax in float32, summed or averaged over each response's tokens -> [B, C, R] float32.

Axes: B queries, C constitutions, R responses, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.linear_nll import linear_nll
from repro.prefix import Scored, build_rows, row_length, tokenize_pair

BATCH_TOKENS = 2048  # padded tokens in one forward
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
    groups = [[tokenize_pair(tokenizer, prompt, response, score_eos=score_eos) for response in responses[b]]
              for b in range(B) for prompt in prompts[b]]
    if backend == "shared":
        refusal = shared_refusal(model.config, max(len(p.ids) for g in groups for p in g), dropout=model.training)
        if refusal:
            raise ValueError(f"{refusal}; use backend='reference'")
        score = _score_shared
    else:
        groups, score = [[pair] for group in groups for pair in group], _score_reference
    values: list[Tensor | None] = [None] * len(groups)
    for batch in _batches([row_length(g) for g in groups]):
        totals = score(model, [groups[i] for i in batch], tokenizer.pad_token_id)
        for index, value in zip(batch, totals.split([len(groups[i]) for i in batch])):
            values[index] = value
    totals = torch.cat(values).view(B, C, R)
    if not length_normalize:
        return totals
    counts = [len(p.ids) - p.start for g in groups for p in g]
    return totals / totals.new_tensor(counts).view(B, C, R)


def _batches(lengths: list[int]) -> list[list[int]]:
    """Indices grouped by length, longest first, each group within BATCH_TOKENS when padded."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


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
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager", None):
        return f"{family}: attention {config._attn_implementation!r} takes no mask of ours; load with 'sdpa'"
    return None


def _score_shared(model, groups: list[list[Scored]], pad: int) -> Tensor:
    """Sum of log-probs per pair [n], pairs counted row by row; one row per group."""
    rows = build_rows(groups, pad)
    ids, positions, mask, source, target, pair = (t.to(model.device) for t in (
        rows.ids, rows.positions, rows.mask, rows.source, rows.target, rows.pair))
    bias = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, torch.finfo(model.dtype).min)
    hidden = model.base_model(input_ids=ids, position_ids=positions, attention_mask=bias, use_cache=False)[0]
    head = model.get_output_embeddings()
    nll = linear_nll(hidden.flatten(0, 1)[source].to(head.weight.dtype), head.weight, target, bias=head.bias,
                     softcap=getattr(model.config, "final_logit_softcapping", None))
    return nll.new_zeros(sum(map(len, groups))).index_add(0, pair, -nll)


def _score_reference(model, groups: list[list[Scored]], pad: int) -> Tensor:
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
