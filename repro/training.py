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

AS_RUN_QUERIES = 8     # queries whose gradient reached an update in the paper's runs (see `updates`)
AS_RUN_SCHEDULE = 15   # length in steps of their linear learning-rate schedule


@dataclass(frozen=True)
class TrainingPair:
    """One query's training example: C rendered prompts and R = C responses, response j sampled under prompt j."""

    query: str
    prompts: tuple[str, ...]
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Update:
    """One optimizer step: how many queries give its gradient, and its share of the learning rate."""

    queries: int
    rate: float


def updates(spec: TrainSpec, iteration: int) -> list[Update]:
    """The optimizer steps of an iteration (1, 2, ...).

    "as_printed": Table 1; each step averages `batch_size` queries at a constant rate; 2, 4, 6 steps.
    "as_run": what the authors' trainer did (their code and logs). Gradients were zeroed before every micro-step, so
    only the last micro-batch of each batch, 8 queries, reached the step; the rate warmed up over one step and
    decayed linearly over 15, so the first step had rate 0; gradients were clipped to norm 1.
    """
    steps = spec.batches + (iteration - 1) * spec.batches_increment
    if spec.dose == "as_printed":
        return [Update(spec.batch_size, 1.0)] * steps
    queries = min(AS_RUN_QUERIES, spec.batch_size)
    return [Update(queries, 0.0 if k == 0 else max(0.0, (AS_RUN_SCHEDULE - k) / (AS_RUN_SCHEDULE - 1)))
            for k in range(steps)]


def queries_needed(spec: TrainSpec, iteration: int) -> int:
    return sum(u.queries for u in updates(spec, iteration))


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
          on_query: Callable[[int], None] = lambda n: None, save_batch: Callable[[list[str]], object] = lambda ids: None,
          ) -> list[dict]:
    """Train `model` in place on `pairs` in their order; returns one row per update: step, loss, queries, rate, norm.

    `pairs` must hold at least `queries_needed(spec, iteration)` items; `on_query` is told of each finished query.
    `precision` "bf16" needs a model in bfloat16, the others float32 weights. Raises UserError on a loss or gradient
    that is not finite, before the update; `save_batch` is given the queries' ids first.
    """
    plan = updates(spec, iteration)
    if len(pairs) < sum(u.queries for u in plan):
        raise UserError(f"iteration {iteration}: {len(pairs)} training pairs left of {sum(u.queries for u in plan)} "
                        "needed; give more queries, a smaller batch_size, or fewer batches")
    optimizer = _optimizer(model, spec)
    clip = 1.0 if spec.dose == "as_run" and spec.max_grad_norm is None else spec.max_grad_norm
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
                                          length_normalize=spec.length_normalize, score_eos=spec.score_eos)
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
