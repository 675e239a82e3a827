"""One SAMI iteration: pairs -> log-prob matrices -> symmetric InfoNCE -> steps, from the initial weights.

The batches are a pure function of the pairs' order, so there is no state to restore: an iteration that was
interrupted is trained again and gives the same weights.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from repro.config import TrainSpec
from repro.logprobs import logprob_matrix
from repro.losses import symmetric_infonce
from repro.records import UserError

# The authors clipped at norm 1 after dividing each micro-batch's loss by its 16 accumulation steps, of which only the
# last counted: in units of the mean over its queries, the limit is 16.
AS_RUN_CLIP = 16.0


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
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
    else:
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


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
    trace, start = [], 0
    model.train()
    with matmul_precision(model, spec.precision):
        for step, update in enumerate(plan, start=1):
            batch = pairs[start: start + update.queries]
            start += update.queries
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for pair in batch:
                logprobs = logprob_matrix(model, tokenizer, [pair.prompts], [pair.responses],
                                          length_normalize=spec.length_normalize, score_eos=spec.score_eos,
                                          backend=backend)
                loss = symmetric_infonce(logprobs)
                (loss / len(batch)).backward()
                total += loss.item() / len(batch)
                on_query(1)
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
