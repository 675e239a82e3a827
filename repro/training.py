"""One SAMI iteration: pairs -> log-prob matrices -> symmetric InfoNCE -> steps, from the initial weights.

The batches are a pure function of the pairs' order, so weights and optimizer are all there is to restore: an
iteration that was interrupted goes on after its last checkpointed step and gives the same weights (repro/steps.py).
The same loop trains on many ranks (repro/distributed.py); one process is the reference that they are held against.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from repro import models
from repro.config import TrainSpec
from repro.logprobs import matrix_by, packed_tokens, settled, slices
from repro.losses import symmetric_infonce
from repro.records import UserError, digest
from repro.shapes import Shape, counted
from repro.sizes import Step, peak, training_bytes

# The authors clipped at norm 1 after dividing each micro-batch's loss by its 16 accumulation steps, of which only the
# last counted: in units of the mean over its queries, the limit is 16.
AS_RUN_CLIP = 16.0

# Tokens between two backward passes (TrainSpec.pack_tokens), at least one query: what is paid once a pass (the head's and
# the embedding's gradients, launches) is shared by more of them. Fixed, so that the sums do not depend on free memory.
PACK_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class TrainingPair:
    """One query's example: C rendered prompts and R responses; in training R = C, response j sampled under prompt j. A
    response is the token ids that were sampled, or a text (repro/prefix.py)."""

    query: str
    prompts: tuple[str, ...]
    responses: tuple[str | tuple[int, ...], ...]


def weights_dtype(spec: TrainSpec) -> str:
    """Of the weights in training. Frozen ones have 16 bits where they are multiplied as such in any case (on a GPU)."""
    frozen = spec.lora and spec.precision == "fp32_master" and torch.cuda.is_available()
    return "bfloat16" if spec.precision == "bf16" or frozen else "float32"


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


def usable_bytes(device: torch.device) -> int:
    """Memory that training may take in all: of a GPU what is free and what torch holds, of a machine with a CPU half."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks_here


def known_shape(model) -> Shape | None:
    """What the byte model of `repro plan` needs of a model (before it is sharded); None for one that it does not know (the
    reference path takes any)."""
    try:
        return counted(model)
    except UserError:
        return None


@contextmanager
def activation_checkpointing(model, shape: Shape | None, step: Step):
    """On for the block where `step` would not fit with all activations kept, by the byte model of `repro plan` (it costs a
    third of the step), else off, and off where there is no such model. The same numbers either way."""
    usable = usable_bytes(model.device)
    if shape is None or model.is_activation_checkpointing or peak(training_bytes(shape, step, usable))[1] <= usable:
        yield
        return
    model.activation_checkpointing_enable()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_as_it_is, layer, layer.training, layer._gradient_checkpointing_func)
        layer.training = True
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        for layer, training in zip(layers, before):
            layer.training = training


def _as_it_is(layer, training: bool, checkpoint: Callable, forward: Callable, *inputs):
    """transformers (5.23) checkpoints layers in training alone, where they would also drop out: the mark is for its check,
    the layer's own forward sees it `training` or not as it was."""
    def forward_as_it_is(*inputs):
        layer.training = training
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(forward_as_it_is, *inputs)


@contextmanager
def dropout(spec: TrainSpec, model, *position: int):
    """What the model drops is drawn by its position (iteration, step, pass) alone, or nothing is dropped: there is no
    random state that a resumed run would have to know."""
    if spec.dropout == "off":
        yield
        return
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(int(digest(position)[:15], 16))
        yield
    model.eval()


class Objective(torch.nn.Module):
    """Queries -> their part of a batch's mean loss. Trunk, head and loss are one forward: whoever gathers weights around a
    forward (FSDP) has then gathered the head's too."""

    def __init__(self, model, tokenizer, spec: TrainSpec, way: str):
        """`way`: of repro/logprobs.py's WAYS, settled for the model."""
        super().__init__()
        self.model, self.tokenizer, self.spec, self.way = model, tokenizer, spec, way

    def forward(self, part: Sequence[TrainingPair], counted: int, queries: int) -> Tensor:
        """Mean loss of `part`, weighted as `counted` of the batch's `queries` (0: work that leaves no trace)."""
        logprobs = matrix_by(self.way, self.model, self.tokenizer, [p.prompts for p in part], [p.responses for p in part],
                             length_normalize=self.spec.length_normalize, score_eos=self.spec.score_eos)
        return symmetric_infonce(logprobs) * counted / queries


class Scorer(Objective):
    """Queries -> their summed log-probs [B, C, R], in one forward of a model whose weights need no gradient."""

    def forward(self, part: Sequence[TrainingPair]) -> Tensor:
        # Not under no_grad: there the matrix is computed in parts, as many as the texts are long, and all ranks must
        # gather the weights equally often. Nothing is kept for a backward, since nothing needs a gradient.
        return matrix_by(self.way, self.model, self.tokenizer, [p.prompts for p in part], [p.responses for p in part],
                         length_normalize=False, score_eos=self.spec.score_eos)


def settle(model, backend: str) -> str:
    """As `repro.logprobs.settled`, for a run: what was found before the weights were loaded must hold for them."""
    try:
        return settled(model, backend)
    except ValueError as e:
        raise UserError(f"the loaded model ({model.config.name_or_path}): {e}") from e


class OneProcess:
    """The whole of a batch here. repro/distributed.py has the same methods for many ranks."""

    rank, ranks = 0, 1

    def load_model(self, name: str, *, dtype: str):
        """The model that `train` takes."""
        return models.load_model(name, dtype=dtype)

    def settle(self, model, backend: str) -> str:
        """The way of computing `backend` that is right for the loaded model. Raises UserError where none is."""
        return settle(model, backend)

    def prepare(self, objective: Objective) -> Objective:
        """The module to train, its weights where they belong."""
        self._objective = objective
        return objective

    def passes(self, lengths: list[int], budget: int) -> list[tuple[list[int], int]]:
        """This rank's forward-backward passes: which queries (`lengths`: packed tokens of each), how many count."""
        return [(list(range(*part.indices(len(lengths)))), part.stop - part.start) for part in slices(lengths, budget)]

    def before_backward(self, module: Objective, *, last: bool) -> None:
        """Gradients of the other passes are summed before they travel."""

    def clip(self, module: Objective, limit: float) -> float:
        """The gradient's norm over all ranks, before it is scaled down to `limit`."""
        return torch.nn.utils.clip_grad_norm_(module.parameters(), limit).item()

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """Every rank's values, in the order of ranks."""
        return [values]

    def together(self, do: Callable) -> list:
        """What `do()` returns on every rank; where it raises UserError on any, it does on all."""
        return [do()]

    def export(self, save: Callable) -> None:
        """`save(model)` once, with all trained weights."""
        save(self._objective.model)


def _optimizer(module, spec: TrainSpec):
    kinds = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}
    return kinds[spec.optimizer]([p for p in module.parameters() if p.requires_grad], lr=spec.learning_rate)


@contextmanager
def stop_after_step(asked: list[int]) -> Iterator[None]:
    """The first SIGTERM or SIGINT only puts its number into `asked`; the second acts at once. One that comes too late for
    a step of the block acts after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number, frame):
        asked.append(number)
        noted.append(number)
        signal.signal(number, before[number])
        with suppress(RuntimeError):  # in the middle of another line on stderr
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    noted: list[int] = []
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


def train(model, tokenizer, pairs: Sequence[TrainingPair], spec: TrainSpec, iteration: int, *,
          backend: str = "shared", on_query: Callable[[int], None] = lambda n: None,
          save_batch: Callable[[dict], object] = lambda facts: None, steps=None, engine=None,
          asked: list[int] | None = None) -> list[dict]:
    """Train `model` in place on `pairs` in their order; returns one row per update: step, loss, queries, rate, norm.

    `pairs` must hold at least `spec.queries_needed(iteration)` items; `on_query` is told of each finished query.
    `precision` "bf16" needs a model in bfloat16, the others float32 weights; what does not require a gradient is frozen, as
    repro/lora.py leaves a model. `steps` (a StepCheckpoints) holds what an
    interrupted call has done; with it, SIGTERM and SIGINT (or a number in `asked`) end the call after the current step,
    saved, as SystemExit or KeyboardInterrupt. `engine`: a `Sharded` for many ranks, each of which calls this with the same
    arguments. Raises UserError on a loss or gradient that is not finite, before the update and on all ranks; `save_batch`
    is given iteration, step, ranks and the queries' ids first.
    """
    plan, need = spec.updates(iteration), spec.queries_needed(iteration)
    if len(pairs) < need:
        raise UserError(f"iteration {iteration}: {len(pairs)} training pairs left of {need} needed; give more queries, "
                        "a smaller batch_size, or fewer batches")
    engine, asked = engine or OneProcess(), [] if asked is None else asked
    shape = known_shape(model)
    model.eval()  # what is trained is what is scored (`dropout`)
    way = engine.settle(model, backend)
    module = engine.prepare(Objective(model, tokenizer, spec, way))
    optimizer = _optimizer(module, spec)
    clip = AS_RUN_CLIP if spec.dose == "as_run" and spec.max_grad_norm is None else spec.max_grad_norm
    device = "cuda" if model.device.type == "cuda" else "cpu"
    budget = spec.pack_tokens or PACK_TOKENS[device]
    trace = steps.restore(engine, module, optimizer) if steps else []
    start = sum(update.queries for update in plan[: len(trace)])
    if start:
        on_query(start)
    with matmul_precision(model, spec.precision), stop_after_step(asked) if steps else nullcontext():
        for step, update in list(enumerate(plan, start=1))[len(trace):]:
            batch = pairs[start: start + update.queries]
            start += update.queries
            optimizer.zero_grad(set_to_none=True)
            own, done = 0.0, 0
            lengths, scored = packed_tokens(tokenizer, [p.prompts for p in batch], [p.responses for p in batch],
                                            score_eos=spec.score_eos)
            passes = engine.passes(lengths, budget)
            for k, (chosen, counted) in enumerate(passes, start=1):
                engine.before_backward(module, last=k == len(passes))
                tokens, rows = (sum(counts[q] for q in chosen) for counts in (lengths, scored))
                with dropout(spec, model, iteration, step, k), activation_checkpointing(model, shape, Step(
                        ranks=engine.ranks, precision=spec.precision, optimizer=spec.optimizer, pack_tokens=tokens,
                        scored=rows, longest=max(lengths[q] for q in chosen), device=device,
                        lora=spec.lora.rank if spec.lora else 0, way=way)):
                    loss = module([batch[q] for q in chosen], counted, len(batch))
                    loss.backward()
                own += loss.item()
                del loss  # what its graph holds would else lie beside the next pass's
                done += counted
                on_query(counted)
            norm = engine.clip(module, clip or math.inf)
            losses, stops = zip(*engine.gather(own, max(asked, default=0)))
            total = sum(losses)
            if not math.isfinite(total) or not math.isfinite(norm):
                ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
                where = save_batch({"iteration": iteration, "step": step, "ranks": ranks, "loss": str(total),
                                    "grad_norm": str(norm), "queries": [p.query for p in batch]})
                whose = f" (on ranks {ranks})" if ranks and engine.ranks > 1 else ""
                raise UserError(f"iteration {iteration}, step {step}: loss {total}{whose}, gradient norm {norm}: not "
                                f"finite at learning rate {spec.learning_rate:g}; stopped before the update (the batch: "
                                f"{where})")
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * update.rate
            optimizer.step()
            trace.append({"step": step, "loss": total, "queries": len(batch), "rate": update.rate, "grad_norm": norm})
            if done < len(batch):
                on_query(len(batch) - done)
            if steps:
                steps.save(engine, module, optimizer, trace, now=max(stops) > 0)
                if max(stops):
                    raise KeyboardInterrupt if max(stops) == signal.SIGINT else SystemExit(128 + int(max(stops)))
    return trace
