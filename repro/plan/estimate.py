"""What a run takes before it starts: bytes per GPU, tokens, FLOPs, hours, disk, judge cost; and what makes it fit.

1. The experiment's settings and texts -> how many queries, tokens and requests there are.
2. The model's shape -> bytes and FLOPs (plan/gpus.py): bytes for the longest responses, FLOPs for texts of mean length.
3. A GPU's data sheet, and the fraction of it that is reached (an assumption) -> hours.

No weights, no network. Queries on the hub count with the lengths in `QUERIES`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from repro.base.records import UserError
from repro.base.settings import Experiment
from repro.base.training import NEEDS_INITIAL
from repro.core.memory import GB, Step, largest_activations, peak, slab_bytes, training_bytes
from repro.core.shapes import Shape
from repro.plan.gpus import (
    GPU,
    MOST_GPUS,
    PUBLISHED,
    matrix_flops,
    matrix_tokens,
    sampling_flops,
    server_options,
    settle,
    shape_of,
    smaller_pack,
    ways,
)
from repro.plan.judge import Judge, judge_of
from repro.plan.texts import Texts, texts_of

FRACTION = 0.4  # of a GPU's rate, while it computes, and of its memory's, while it decodes: an assumption, not measured
TOLERABLE = 1.2  # times the fastest server's seconds


def first_step(spec: Experiment, texts: Texts, gpus: int, lora: int = 0, way: str = "shared") -> Step:
    """The training step of the paper's loop on `gpus` GPUs, before it is known whether it fits. A pack holds a GPU's share
    of a step's queries at most."""
    from repro.core.loop import PACK_TOKENS

    common = None if way == "reference" else texts.common[1]
    longest = math.ceil(matrix_tokens(2, 2, texts.prompt[1], texts.response[1], common))
    queries = max(u.queries for k in range(1, spec.iterations + 1) for u in spec.train.updates(k))
    tokens = max(spec.train.pack_tokens or PACK_TOKENS["cuda"], longest)
    return Step(ranks=gpus, precision=spec.train.precision, optimizer=spec.train.optimizer, pack_tokens=tokens,
                scored=round(tokens * 4 * texts.response[1] / longest), longest=longest, lora=lora, queries=queries,
                way=way).on(gpus)


@dataclass(frozen=True)
class Stage:
    """Of all iterations: tokens through the model, FLOPs, and hours; None where it does not fit."""

    name: str
    tokens: float
    flops: float
    hours: float | None
    note: str = ""


@dataclass(frozen=True)
class Server:
    """A sampling server: GPUs that share one copy of the weights, copies, responses in flight on one copy, bytes per GPU.
    No copies: there are fewer GPUs than one copy takes."""

    gpus: int
    copies: int
    slots: int
    weights: int
    cache: int


@dataclass(frozen=True)
class Plan:
    """What `repro plan` says of one run. Bytes are per GPU. `step`: the training step as it would run; `ways`: what makes
    it fit where it does not (repro/plan/gpus.py), and `trained` the first of them, which the rest of the plan is for (None
    where there is none). `refusal`: why log-probs go by the reference path, which works on one GPU alone. `scoring`: bytes
    of held-out log-probs on `scoring_gpus`, all that there are (or that training needs); `enough_for_scoring`: the fewest
    that would do, 0 where none would."""

    run: str
    model: str
    shape: Shape
    gpu: GPU
    gpus: int
    fraction: float
    texts: Texts
    refusal: str | None
    step: Step
    phases: dict[str, dict[str, int]]
    ways: list[tuple[tuple[str, ...], Step, int]]
    trained: Step | None
    faster: Step | None
    server: Server
    scoring: dict[str, int]
    scoring_gpus: int
    enough_for_scoring: int
    stages: list[Stage]
    judge: "Judge"
    disk: dict[str, int]

    @property
    def memory(self) -> float:
        return self.gpu.gb * GB

    @property
    def hours(self) -> float:
        """Of the stages that fit."""
        return sum(stage.hours or 0 for stage in self.stages)

    @property
    def complete(self) -> bool:
        """Whether all stages do."""
        return all(stage.hours is not None for stage in self.stages)


def plan(spec: Experiment, gpu: GPU, gpus: int, *, fraction: float = FRACTION, config: Path | None = None, lora: int = 0,
         response_tokens: float | None = None, judge_model: str | None = None,
         price: tuple[float, float] | None = None) -> Plan:
    """Everything that is known of a run before it starts.

    Raises UserError for a model whose shape is not known, and for settings out of range.
    """
    from repro.core.logprobs import way_for

    for name, value, least, most in (("--gpus", gpus, 1, 100_000), ("--lora", lora, 0, math.inf)):
        if not least <= value <= most:
            raise UserError(f"{name} {value}: must be {least} or more" + f", {most} at most" * math.isfinite(most))
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: the share of the peak rate that is reached; above 0, at most 1")
    if lora and gpus > 1:
        raise UserError(f"--lora with --gpus {gpus}: adapters train on one GPU; leave one of them out")
    if response_tokens is not None and not 0 < response_tokens < math.inf:
        raise UserError(f"--response-tokens {response_tokens:g}: must be a number above 0")
    shape, texts, memory = shape_of(spec.model.name, config), texts_of(spec, response_tokens), gpu.gb * GB
    if lora > shape.hidden_size:
        raise UserError(f"--lora {lora}: must be at most the model's hidden size, {shape.hidden_size}")
    if lora and shape.mixture:
        raise UserError(f"--lora: {spec.model.label} is a mixture, whose experts are no linear layers; train all weights")
    found = way_for(shape.config, max(texts.prompt[1], texts.asking[1]) + texts.response[1], spec.train.dropout)
    if found.way is None:
        raise UserError(f"--model {spec.model.name}: {found.refusal}")
    refusal = found.refusal if found.way == "reference" else None
    step, total = settle(shape, first_step(spec, texts, 1 if refusal else gpus, lora, found.way), memory)
    found = [] if total <= memory else ways(shape, step, memory)
    trained = step if total <= memory else found[0][1] if found else None
    faster = next((s for s in smaller_pack(replace(step, checkpointing=False))
                   if peak(training_bytes(shape, s, memory))[1] <= memory), None) if step.checkpointing else None
    usable, like = max(gpus, (trained or step).ranks), trained or step
    scorers, most = (1, 1) if refusal else (usable, max(usable, MOST_GPUS))
    scoring = {n: scoring_bytes(shape, spec, texts, like, n) for n in range(1, most + 1)}
    server, sampled = sampling(shape, spec, texts, gpu, usable, fraction)
    fits = sum(scoring[scorers].values()) <= memory
    return Plan(run=spec.path, model=spec.model.label, shape=shape, gpu=gpu, gpus=gpus, fraction=fraction, texts=texts,
                refusal=refusal, step=step, phases=training_bytes(shape, step, memory), ways=found, trained=trained,
                faster=faster, server=server, scoring=scoring[scorers], scoring_gpus=scorers,
                disk=disk_of(shape, spec, like),
                enough_for_scoring=next((n for n in scoring if sum(scoring[n].values()) <= memory), 0),
                judge=judge_of(spec, texts, judge_model, price),
                stages=[sampled, scored(shape, spec, texts, gpu, fraction, like, scorers, fits),
                        *([under_initial(shape, spec, texts, gpu, fraction, like, scorers, fits)]
                          if spec.train.objective in NEEDS_INITIAL else []),
                        training(shape, spec, texts, gpu, fraction, like, fits=trained is not None)])


# ---- sampling

def sampling(shape: Shape, spec: Experiment, texts: Texts, gpu: GPU, gpus: int, fraction: float) -> tuple[Server, Stage]:
    """Prompts at the rate of products; then a token of every response in flight at a time, for which all weights and the
    caches are read. A base model is stopped by the cap alone, so its responses count with the most tokens they can have.
    The baseline's count as the policy's. Of all servers that `gpus` GPUs hold the smallest that is nearly the fastest; else
    the smallest that there is."""
    train = sum(2 * round(spec.train.queries_needed(k) * (1 + spec.sampling.spare)) for k in range(1, spec.iterations + 1))
    count = train + (texts.items + texts.answered(spec.iterations)) * texts.C + texts.items * bool(spec.baseline)
    P, L = texts.asking[0], texts.response[spec.model.prompt == "plain"] + texts.reasoning
    longest = texts.asking[1] + texts.response[1] + texts.reasoning
    flops, first = sampling_flops(shape, P, L), sampling_flops(shape, P, 0)

    def takes(k: int, slots: int, copies: int) -> float:
        rate = k * gpu.bf16 * 1e12 * fraction
        cache = 2 * shape.cache * (P + L / 2) / min(k, shape.num_key_value_heads)
        reading = (2 * shape.parameters / k + slots * cache) / (gpu.memory * 1e9 * fraction)
        computing = slots * (flops - first) / L / rate
        return count / copies * first / rate + math.ceil(count / copies / slots) * L * max(reading, computing)

    options = server_options(shape, gpu.gb * GB, longest)
    held = [(takes(k, slots, gpus // k), k, slots) for k, slots in options if k <= gpus]
    enough = TOLERABLE * min(held)[0] if held else 0  # more GPUs a copy than that takes only talk to each other
    took, k, slots = next((h for h in held if h[0] <= enough), (math.nan, *(options[0] if options else (0, 0))))
    server = Server(k, gpus // k if held else 0, slots, 2 * shape.parameters // max(1, k),
                    2 * slots * shape.cache * longest // max(1, min(k, shape.num_key_value_heads)))
    return server, Stage("sampling", count * (P + L), count * flops, took / 3600 if held else None, f"{count:,} responses")


# ---- log-probs of held-out responses: in one process, or sharded as in training (repro/stages/measure.py)

def scoring_bytes(shape: Shape, spec: Experiment, texts: Texts, step: Step, gpus: int = 1) -> dict[str, int]:
    """Bytes by kind on each of `gpus` GPUs, the weights in the form of training."""
    from repro.core.logprobs import BATCH_TOKENS, QUERY_TOKENS

    item = step.item
    rounded = item == 4 and step.precision == "fp32_master"
    query = math.ceil(matrix_tokens(texts.C, texts.C, texts.prompt[1], texts.response[1], texts.common[1]))
    tokens = max(step.pack_tokens, query) if gpus > 1 else max(BATCH_TOKENS, min(query, QUERY_TOKENS),
                                                               texts.prompt[1] + texts.C * texts.response[1])
    if step.reference:
        tokens = texts.prompt[1] + texts.response[1]
    rows = tokens if step.reference else texts.C * texts.response[1]
    copies = 2 * shape.largest if rounded else 0
    if gpus > 1:
        copies = item * shape.root + 3 * (2 if rounded else item) * shape.layer
    return {"weights": item * shape.parameters // gpus, "gathered or rounded weights": copies,
            "activations": largest_activations(shape, tokens, item, step.pair if step.reference else 0),
            "head: scratch": 12 * rows * shape.vocab_size if step.logits else slab_bytes(shape)}


def scored(shape: Shape, spec: Experiment, texts: Texts, gpu: GPU, fraction: float, step: Step, gpus: int,
           fits: bool) -> Stage:
    """On many GPUs each pack gathers all layers once, beside the products: the slower of the two counts."""
    C, n, P, L = texts.C, spec.iterations, texts.prompt[0], texts.response[0]
    common = None if step.reference else texts.common[0]
    own, first = (matrix_flops(shape, C, R, P, L, common, training=False) for R in (C, 1))
    again = n if "likelihood" in spec.judge.judges else 0  # under the initial model
    layers, head = (texts.scored * ((n + 1) * a + again * b) for a, b in zip(own, first))
    tokens = texts.scored * ((n + 1) * matrix_tokens(C, C, P, L, common) + again * matrix_tokens(C, 1, P, L, common))
    took = seconds(gpu, "bf16" if step.item == 2 else step.precision, fraction, gpus, layers, head)
    gathered = (4 if step.precision == "fp32" else 2) * (shape.parameters - shape.root) * (gpus - 1) / gpus
    took = max(took, math.ceil(tokens / gpus / step.pack_tokens) * gathered / (gpu.link * 1e9))
    return Stage("log-probs of held-out responses", tokens, layers + head, took / 3600 if fits else None,
                 f"sharded over {gpus} GPUs" if gpus > 1 else "on one GPU")


def under_initial(shape: Shape, spec: Experiment, texts: Texts, gpu: GPU, fraction: float, step: Step, gpus: int,
                  fits: bool) -> Stage:
    """The training pairs' matrix under the initial model, for an objective that needs it: one pass without a backward, by
    the same means as held-out responses are scored, so that training holds one model."""
    queries = sum(spec.train.queries_needed(k) for k in range(1, spec.iterations + 1))
    P, L, common = texts.prompt[0], texts.response[0], None if step.reference else texts.common[0]
    layers, head = (queries * f for f in matrix_flops(shape, 2, 2, P, L, common, training=False))
    took = seconds(gpu, "bf16" if step.item == 2 else step.precision, fraction, gpus, layers, head)
    return Stage("log-probs of training pairs under the initial model", queries * matrix_tokens(2, 2, P, L, common),
                 layers + head, took / 3600 if fits else None, f"{spec.train.objective}; once, kept in the run")


def seconds(gpu: GPU, precision: str, fraction: float, gpus: int, layers: float, head: float) -> float:
    """Of products: float32 ones (all in "fp32", the head's wherever weights are float32) do not use the tensor cores."""
    rates = {"bf16": (gpu.bf16, gpu.bf16), "fp32_master": (gpu.bf16, gpu.fp32), "fp32": (gpu.fp32, gpu.fp32)}[precision]
    return sum(f / rate for f, rate in zip((layers, head), rates)) / (1e12 * fraction * gpus)


# ---- training

def training(shape: Shape, spec: Experiment, texts: Texts, gpu: GPU, fraction: float, step: Step, fits: bool) -> Stage:
    """C = R = 2. Checkpointing computes the layers a third time; on many GPUs a pack gathers all layers twice and sends
    gradients at most once, beside the products: the slower of the two counts."""
    P, L = texts.prompt[0], texts.response[0]
    queries = sum(spec.train.queries_needed(k) for k in range(1, spec.iterations + 1))
    common = None if step.reference else texts.common[0]
    layers, head = (queries * f for f in matrix_flops(shape, 2, 2, P, L, common, training=True))
    reference = queries * sum(matrix_flops(shape, 2, 2, P, L, None, training=True))
    each = matrix_tokens(2, 2, P, L, common)
    tokens = queries * each
    note = f"{queries:,} queries; by the reference path" + (
        "" if step.reference else f" {reference / (layers + head):.2f} times the FLOPs")
    if not fits:
        return Stage("training", tokens, layers + head, None, note)
    if step.lora:  # no gradients of weights, and none of the head's
        layers, head = layers * 2 / 3, head * 2 / 3
    if step.checkpointing:
        layers += layers / (2 if step.lora else 3)
    precision = "bf16" if step.item == 2 else step.precision
    computing = seconds(gpu, precision, fraction, step.ranks, layers, head)
    packs = sum(math.ceil(u.queries / step.ranks / max(1, step.pack_tokens // each))
                for k in range(1, spec.iterations + 1) for u in spec.train.updates(k))
    moved = packs * (2 * (4 if precision == "fp32" else 2) + 4) * (shape.parameters - shape.root)
    sending = moved * (step.ranks - 1) / step.ranks / (gpu.link * 1e9)
    return Stage("training", tokens, layers + head, max(computing, sending) / 3600,
                 note + (f"; sending weights takes {sending / computing:.0%} of the products' time, beside them"
                         if sending > computing / 10 else ""))


def disk_of(shape: Shape, spec: Experiment, step: Step) -> dict[str, int]:
    """Bytes in files: the published weights in bf16 (of the policy, the baseline and a writer on this machine, where their
    shapes are known), a checkpoint of every iteration, and three of steps with the optimizer's state while one trains (two
    complete, one being written). Rank 0 holds the weights once in the machine's memory while it reads and writes them.
    What adapters are merged into is float32."""
    from repro.core.checkpoints import KEEP

    own = step.item * shape.parameters
    trained = step.state * shape.adapters(step.lora) if step.lora else own
    saved = 4 * shape.parameters if step.lora else own
    states = {"adamw": 2, "rmsprop": 1}[step.optimizer]
    others = {other.name for other in [spec.baseline] if other} | {
        writer.model for writer in [spec.writer] if writer and writer.kind == "local"}
    others = (shape_of(name).parameters for name in others - {spec.model.name} if name in PUBLISHED)
    published = shape.parameters + sum(others)
    return {"download": 2 * published, "iterations": spec.iterations * saved, "steps": (KEEP + 1) * (1 + states) * trained,
            "machine memory": saved}
