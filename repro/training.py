"""One SAMI iteration: pairs -> log-prob matrices -> symmetric InfoNCE -> steps, from the initial weights.

The batches are a pure function of the pairs' order, so there is no state to restore: an iteration that was
interrupted is trained again and gives the same weights.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from repro.config import TrainSpec
from repro.logprobs import logprob_matrix, packs
from repro.losses import symmetric_infonce
from repro.records import UserError

# The authors clipped at norm 1 after dividing each micro-batch's loss by its 16 accumulation steps, of which only the
# last counted: in units of the mean over its queries, the limit is 16.
AS_RUN_CLIP = 16.0

# Tokens between two backward passes, at least one query: what is paid once a pass (the head's and the embedding's
# gradients, launches) is shared by more of them. Fixed, so that the sums do not depend on the machine's memory.
PACK_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class TrainingPair:
    """One query's training example: C rendered prompts and R = C responses, response j sampled under prompt j."""

    query: str
    prompts: tuple[str, ...]
    responses: tuple[str, ...]


def weights_dtype(precision: str) -> str:
    return "bfloat16" if precision == "bf16" else "float32"


@contextmanager
def matmul_precision(model, precision: str):
    """bf16 products on float32 weights for "fp32_master", where the chip has them; nothing otherwise.

    On a CPU this is oneDNN's setting, which is nearer to float32 than autocast and as fast; on CUDA autocast.
    """
    if precision != "fp32_master":
        yield
    elif model.device.type == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):  # a cached copy would outlive the update
            yield
    else:
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


def activation_bytes(config, tokens: int, itemsize: int) -> int:
    """What a Llama-like decoder keeps for the backward of `tokens` tokens without activation checkpointing, the head's
    part not counted: 6 D + 4 I + 2 (H + K) d numbers a token and layer, twice the last where queries and keys are
    normed; as counted on transformers 5.23 (tests/test_training.py)."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = (config.num_attention_heads + config.num_key_value_heads) * d
    attention *= 4 if config.model_type in ("qwen3", "gemma3_text") else 2
    experts = getattr(config, "num_experts_per_tok", 1)
    numbers = 6 * config.hidden_size + 4 * experts * config.intermediate_size + attention
    return tokens * config.num_hidden_layers * numbers * itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that activations may take: what is free on a GPU, half of what a machine has on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def activation_checkpointing(model, tokens: int):
    """On for the block where the activations of `tokens` tokens would not fit (it costs a third of the
    step), else off. The same numbers either way."""
    itemsize = next(model.parameters()).element_size()
    if model.is_activation_checkpointing or activation_bytes(model.config, tokens, itemsize) <= free_bytes(model.device):
        yield
        return
    model.activation_checkpointing_enable()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _optimizer(model, spec: TrainSpec):
    kinds = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}
    return kinds[spec.optimizer](model.parameters(), lr=spec.learning_rate)


def train(model, tokenizer, pairs: Sequence[TrainingPair], spec: TrainSpec, iteration: int, *,
          backend: str = "shared", on_query: Callable[[int], None] = lambda n: None,
          save_batch: Callable[[list[str]], object] = lambda ids: None) -> list[dict]:
    """Train `model` in place on `pairs` in their order; returns one row per update: step, loss, queries, rate, norm.

    `pairs` must hold at least `spec.queries_needed(iteration)` items; `on_query` is told of each finished query.
    `precision` "bf16" needs a model in bfloat16, the others float32 weights. Raises UserError on a loss or gradient
    that is not finite, before the update; `save_batch` is given the queries' ids first.
    """
    plan, need = spec.updates(iteration), spec.queries_needed(iteration)
    if len(pairs) < need:
        raise UserError(f"iteration {iteration}: {len(pairs)} training pairs left of {need} needed; give more queries, "
                        "a smaller batch_size, or fewer batches")
    optimizer = _optimizer(model, spec)
    clip = AS_RUN_CLIP if spec.dose == "as_run" and spec.max_grad_norm is None else spec.max_grad_norm
    budget = PACK_TOKENS["cuda" if model.device.type == "cuda" else "cpu"]
    trace, start = [], 0
    model.train()
    with matmul_precision(model, spec.precision):
        for step, update in enumerate(plan, start=1):
            batch = pairs[start: start + update.queries]
            start += update.queries
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            prompts, responses = [p.prompts for p in batch], [p.responses for p in batch]
            for part, tokens in packs(tokenizer, prompts, responses, score_eos=spec.score_eos, budget=budget):
                with activation_checkpointing(model, tokens):
                    logprobs = logprob_matrix(model, tokenizer, prompts[part], responses[part], backend=backend,
                                              length_normalize=spec.length_normalize, score_eos=spec.score_eos)
                    loss = symmetric_infonce(logprobs) * len(prompts[part]) / len(batch)
                    loss.backward()
                total += loss.item()
                on_query(len(prompts[part]))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item()
            if not math.isfinite(total) or not math.isfinite(norm):
                where = save_batch([p.query for p in batch])
                raise UserError(f"iteration {iteration}, step {step}: loss {total}, gradient norm {norm}: not finite; "
                                f"stopped before the update (the batch: {where})")
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * update.rate
            optimizer.step()
            trace.append({"step": step, "loss": total, "queries": len(batch), "rate": update.rate, "grad_norm": norm})
    model.eval()
    return trace
