"""One iteration: pairs -> log-prob matrices -> objective (SAMI's: symmetric InfoNCE) -> steps, from the initial weights.

The batches are a pure function of the pairs' order, so weights and optimizer are all there is to restore: an
iteration that was interrupted goes on after its last checkpointed step and gives the same weights (core/checkpoints.py).
The same loop trains on many ranks (repro/core/engines.py); one process is the reference that they are held against.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch

from repro.base.records import UserError, digest
from repro.base.training import NEEDS_INITIAL, NotTrainable, TrainSpec
from repro.core.engines import Objective, OneProcess, TrainingPair, ids_of, matmul_precision
from repro.core.memory import Step, activation_checkpointing, known_shape
from repro.core.tree import packed_tokens, scored_tokens, whole_tokens

# The authors clipped at norm 1 after dividing each micro-batch's loss by its 16 accumulation steps, of which only the
# last counted: in units of the mean over its queries, the limit is 16.
AS_RUN_CLIP = 16.0

# Tokens between two backward passes (TrainSpec.pack_tokens), at least one query: what is paid once a pass (the head's and
# the embedding's gradients, launches) is shared by more of them. Fixed, so that the sums do not depend on free memory.
PACK_TOKENS = {"cpu": 512, "cuda": 8192}


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
    repro/core/lora.py leaves a model. `steps` (a StepCheckpoints) holds what an
    interrupted call has done; with it, SIGTERM and SIGINT (or a number in `asked`) end the call after the current step,
    saved, as SystemExit or KeyboardInterrupt. `engine`: a `Sharded` for many ranks, each of which calls this with the same
    arguments. Raises UserError on a loss or gradient that is not finite, before the update and on all ranks; `save_batch`
    is given iteration, step, ranks and the queries' ids first.
    """
    plan, need = spec.updates(iteration), spec.queries_needed(iteration)
    if len(pairs) < need:
        raise UserError(f"iteration {iteration}: {len(pairs)} training pairs left of {need} needed; give more queries, "
                        "a smaller batch_size, or fewer batches")
    if spec.objective in NEEDS_INITIAL:
        missing = [p.query for p in pairs[:need] if p.initial is None]
        wrong = [p.query for p in pairs[:need] if p.initial and not all(math.isfinite(x) for row in p.initial for x in row)]
        if missing or wrong:
            raise UserError(f"iteration {iteration}: {spec.objective} needs the initial model's log-probs; those of query "
                            f"{(missing or wrong)[0]!r} are {'missing' if missing else 'not finite'}")
    engine, asked = engine or OneProcess(), [] if asked is None else asked
    shape = known_shape(model)
    model.eval()  # what is trained is what is scored (`dropout`)
    way = engine.settle(model, backend)
    module = engine.prepare(Objective(model, spec, way))
    optimizer = _optimizer(module, spec)
    clip = AS_RUN_CLIP if spec.dose == "as_run" and spec.max_grad_norm is None else spec.max_grad_norm
    device = "cuda" if model.device.type == "cuda" else "cpu"
    budget = spec.pack_tokens or PACK_TOKENS[device]
    computed = whole_tokens if way == "reference" else packed_tokens
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
            ids = ids_of(tokenizer, batch, score_eos=spec.score_eos)
            lengths, scored = list(map(computed, ids)), list(map(scored_tokens, ids))
            passes = engine.passes(lengths, budget)
            for k, (chosen, counted) in enumerate(passes, start=1):
                engine.before_backward(module, last=k == len(passes))
                tokens, rows = computed(*(ids[q] for q in chosen)), sum(scored[q] for q in chosen)
                with dropout(spec, model, iteration, step, k), activation_checkpointing(model, shape, Step(
                        ranks=engine.ranks, precision=spec.precision, optimizer=spec.optimizer, pack_tokens=tokens,
                        scored=rows, longest=max(lengths[q] for q in chosen), device=device,
                        lora=spec.lora.rank if spec.lora else 0, way=way)):
                    loss = module([ids[q] for q in chosen], counted, len(batch), initial=[
                        batch[q].initial for q in chosen if batch[q].initial], progress=step / len(plan))
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
                raise NotTrainable(f"iteration {iteration}, step {step}: loss {total}{whose}, gradient norm {norm}: not "
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
