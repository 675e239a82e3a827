"""The byte model of a training step, held against measured peaks (tests/perf/plan_check.py), and activation checkpointing
where a step would not fit without.

1 GB is 10^9 bytes here. Axes: B queries, C constitutions, R responses, T tokens of a pack, N scored tokens, D hidden size,
V vocabulary.
"""

import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from repro.base.records import UserError
from repro.core.shapes import Layer, Shape, counted

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides a training step's bytes. `pack_tokens` are computed together, `scored` log-probs are made of them;
    `longest`: tokens of the longest query, which is never cut. `lora`: the adapters' rank, 0 for all weights. `queries`: of
    a step, on all ranks together (0: not known), more than which no pack holds. `way`: of computing log-probs
    (core/logprobs.py): by the reference path, which is for one rank, each of a query's 2 x 2 pairs in full, and logits for
    all tokens; else the tree of the pack's texts."""

    ranks: int
    precision: str
    optimizer: str
    pack_tokens: int
    scored: int
    longest: int
    checkpointing: bool = False
    lora: int = 0
    device: str = "cuda"
    queries: int = 0
    way: str = "shared"

    @property
    def reference(self) -> bool:
        return self.way == "reference"

    @property
    def logits(self) -> bool:
        """Whether whole rows of logits are kept."""
        return self.way != "shared"

    @property
    def item(self) -> int:
        """Bytes of a weight, and of a number that autograd keeps. Frozen weights on a GPU have 16 bits as products do."""
        frozen = self.lora and self.precision == "fp32_master" and self.device == "cuda"
        return 2 if self.precision == "bf16" or frozen else 4

    @property
    def state(self) -> int:
        """Bytes of a trained number, of its gradient, and of each number that the optimizer keeps of it."""
        return 2 if self.precision == "bf16" else 4

    @property
    def pair(self) -> int:
        """Tokens of the longest prompt with one response, by the reference path."""
        return math.ceil(self.longest / 4)

    def on(self, ranks: int) -> "Step":
        """On so many ranks: a pack holds at most a rank's share of a step's queries."""
        most = math.ceil(self.queries / ranks) * self.longest or self.pack_tokens
        return replace(self, ranks=ranks).packed(min(self.pack_tokens, most))

    def packed(self, tokens: int) -> "Step":
        """With so many tokens a pack."""
        return replace(self, pack_tokens=tokens, scored=round(self.scored * tokens / self.pack_tokens))


def activation_bytes(shape: Shape, tokens: int, itemsize: int, pair: int = 0) -> int:
    """What a Llama-like decoder keeps for the backward of `tokens` tokens without activation checkpointing, the head's
    part not counted: of a token and layer, with two norms of 2 D each, 6 D + 4 I + 2 (H + K) d numbers, 2 (H + K) d more
    where queries and keys are normed, 4 I + 2 D for each expert that it goes to, the norms' inputs in float32 always; as
    counted on transformers 5.23 (tests/test_training.py). `pair`: tokens of a sequence, where the model's own attention may
    keep its scores (by the reference path).
    """
    return sum(layer_bytes(shape, layer, tokens, itemsize, pair) for layer in shape.layers)


def layer_bytes(shape: Shape, layer: Layer, tokens: int, itemsize: int, pair: int = 0) -> int:
    """What one layer keeps. Attention that makes whole matrices of scores keeps them after the softmax in float32, in the
    type in which they are multiplied, and where they are capped; and keys and values as often as there are heads."""
    numbers = layer.kept * itemsize + layer.wide * max(0, 4 - itemsize)
    if shape.scores and pair:
        numbers += 2 * (shape.num_attention_heads - shape.num_key_value_heads) * shape.head_dim * itemsize
        numbers += pair * shape.num_attention_heads * (4 + (itemsize if itemsize < 4 else 0) + itemsize * shape.softcap)
    return tokens * numbers


def largest_activations(shape: Shape, tokens: int, itemsize: int, pair: int = 0) -> int:
    """Of the layer that keeps the most."""
    return max(layer_bytes(shape, layer, tokens, itemsize, pair) for layer in set(shape.layers))


def slab_bytes(shape: Shape) -> int:
    """The logits that the fused head holds at a time, in float32: at least a row."""
    from kernels.modes import SLAB_ELEMENTS

    return 4 * max(SLAB_ELEMENTS, shape.vocab_size)


def training_bytes(shape: Shape, step: Step, memory: float = math.inf) -> dict[str, dict[str, int]]:
    """Bytes per rank by kind at the three moments that may be the peak, gradients of earlier packs and optimizer state in
    place: "head", with all activations kept and the logits made; "layers", in the backward of the last layer, or of one
    that checkpointing computes again; "update". `memory`: bytes of a GPU, which decide where gradients are summed.

    Weights, gradients and optimizer state are float32, or bf16 in precision "bf16"; FSDP2 shards them by layer. Under LoRA
    there are gradients and optimizer state of the adapters alone; activations count as in full training, which is more.
    """
    from kernels.modes import NARROW
    from kernels.modes import plan as head_mode

    n, cuda, V, D = step.ranks, step.device == "cuda", shape.vocab_size, shape.hidden_size
    item, state = step.item, step.state
    trained = shape.adapters(step.lora) if step.lora else shape.parameters
    master = step.precision == "fp32_master" and not step.lora
    travels = 2 if item == 2 or (master and cuda) else 4  # of a layer's weight where it is multiplied

    held = {"master weights" if master else "weights": item * shape.parameters // n,
            "adapters": state * trained // n if step.lora else 0,
            "gradients": state * trained // n,
            "optimizer state": {"adamw": 2, "rmsprop": 1}[step.optimizer] * state * trained // n}

    if n > 1:  # the root's weights stay gathered; a layer's while it is computed, the next one's in flight, and its buffer
        gathered = item * shape.root + 3 * travels * shape.layer
    else:      # for the backward autograd keeps the 16-bit copy of a matrix that autocast has made
        rounded = shape.layer if step.checkpointing else shape.parameters - shape.root
        gathered = 2 * rounded if master and cuda else 0
    sums = 0
    if n > 1:  # one layer's in float32 and on its way; of all, where half of what is free holds them (core/engines.py)
        free = memory - item * shape.parameters // n  # at that moment there are weights alone
        layer = max(trained // shape.num_hidden_layers, shape.layer)
        sums = 4 * trained if 4 * trained <= free / 2 else 8 * layer

    tokens, rows_scored = step.pack_tokens, step.pack_tokens if step.reference else step.scored
    pair = step.pair if step.reference else 0
    activations = activation_bytes(shape, tokens, item, pair)
    one_layer = largest_activations(shape, pair or tokens, item, pair)
    if step.checkpointing:  # each layer's input
        activations = tokens * shape.num_hidden_layers * D * item
    activations += 2 * tokens * D * item + rows_scored * D * item  # the final norm's, and its scored rows
    again = (one_layer if step.checkpointing else 0) + one_layer // 2  # the half: gradients on their way through it

    triton = cuda and item == 2
    mode = head_mode(step.scored, V, 2 if triton else 4, hidden_grad=True, head_grad=not step.lora,
                     narrow=triton and D <= NARROW)
    rows = {"store": step.scored * V * (2 if triton else 4), "frozen_head": step.scored * D * 4, "recompute": 0}[mode]
    slab = min(4 * step.scored * V, slab_bytes(shape))
    head = 0 if step.lora else V * D * 4                       # its gradient, before it is added to the others
    wide = V * D * 4 if item == 2 and not cuda else 0          # a float32 copy of a 16-bit head
    scratch = max(slab + wide, head + wide + 3 * step.scored * D * 4 + (0 if mode == "store" else slab))
    if step.logits:  # log-softmax of the scored ones in float32; in the backward of one forward's logits three times that
        rows, scratch = 4 * step.scored * V, head + 12 * (pair or step.scored) * V

    # torch's optimizers make the square roots of all state at once on a GPU, of one matrix after the other on a CPU
    update = state * (trained // n if cuda else max(V * D, shape.largest))
    held_in_pass = held | {"gathered or rounded weights": gathered, "gradients not yet reduced": sums,
                           "activations": activations}
    return {"head": held_in_pass | {"head: scored rows": rows, "head: scratch": scratch},
            "layers": held_in_pass | {"one layer's backward": again},
            "update": held | {"optimizer's scratch": update}}


def peak(phases: dict[str, dict[str, int]]) -> tuple[str, int]:
    """Which moment takes the most bytes, and how many."""
    return max(((name, sum(kinds.values())) for name, kinds in phases.items()), key=lambda each: each[1])


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
