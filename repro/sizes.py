"""Shapes of models and GPUs -> bytes per GPU by kind, what makes them fit, FLOPs: arithmetic alone (repro/plan.py).

`training_bytes` is the byte model of a training step, held against measured peaks (tests/perf/plan_check.py).

1 GB is 10^9 bytes here. A GPU that is sold as 80 GB has 80 GiB = 85.9 of them: the 7 % between are what is left to CUDA's
context, NCCL's buffers and fragmentation.

Axes: B queries, C constitutions, R responses, T tokens of a pack, N scored tokens, D hidden size, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from repro import models
from repro.config import choose
from repro.records import UserError, read_json

GB = 10**9


# ---- model shapes

@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-like decoder, with the field names of its config.json (`num_local_experts` 1: no mixture)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tie_word_embeddings: bool = False
    num_local_experts: int = 1
    num_experts_per_tok: int = 1
    model_type: str = "llama"

    @property
    def attention(self) -> int:
        """Parameters of a layer's four projections."""
        return 2 * self.hidden_size * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim

    @property
    def expert(self) -> int:
        """Parameters of one feed-forward network."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def router(self) -> int:
        return self.hidden_size * self.num_local_experts if self.num_local_experts > 1 else 0

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.attention + self.router + self.num_local_experts * self.expert + 2 * self.hidden_size

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor of a layer: a mixture's experts are one, gate and up projection together."""
        if self.num_local_experts > 1:
            return self.num_local_experts * 2 * self.hidden_size * self.intermediate_size
        return self.hidden_size * max(self.intermediate_size, self.num_attention_heads * self.head_dim)

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, final norm and, where it is not the embedding, head."""
        return (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def parameters(self) -> int:
        return self.num_hidden_layers * self.layer + self.root

    @property
    def active(self) -> int:
        """Parameters of all layers that multiply a token."""
        return self.num_hidden_layers * (self.attention + self.router + self.num_experts_per_tok * self.expert)

    @property
    def cache(self) -> int:
        """Numbers that generation keeps of a token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of this rank on every projection of the attention and of each expert."""
        D, d = self.hidden_size, self.head_dim
        sides = 2 * (D + self.num_attention_heads * d) + 2 * (D + self.num_key_value_heads * d)
        sides += 3 * self.num_local_experts * (D + self.intermediate_size)
        return self.num_hidden_layers * rank * sides


def _mistral(**change) -> Shape:
    return Shape(**{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "model_type": "mistral"} | change)


PUBLISHED = {  # of the models' public config.json
    "mistralai/Mistral-7B-v0.1": _mistral(), "mistralai/Mistral-7B-Instruct-v0.1": _mistral(),
    "mistralai/Mixtral-8x7B-v0.1": _mistral(num_local_experts=8, num_experts_per_tok=2, model_type="mixtral"),
    "meta-llama/Meta-Llama-3-70B": _mistral(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                            num_attention_heads=64, vocab_size=128256, model_type="llama"),
    models.EMBEDDED: _mistral(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                              num_key_value_heads=3, head_dim=64, vocab_size=49152, model_type="llama",
                              tie_word_embeddings=True)}


def shape_of(name: str, config: Path | None = None) -> Shape:
    """The shape of a model: of the config.json given, of a folder, of the hub's cache on this machine, or published.

    Raises UserError where none of these knows it.
    """
    if config is None and (Path(name).expanduser() / "config.json").is_file():
        config = Path(name).expanduser() / "config.json"
    if config is None and name in PUBLISHED:
        return PUBLISHED[name]
    if config is None and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        config = Path(found) if isinstance(found, str) else None
    if config is None:
        raise UserError(f"--model {name}: its shape is not known on this machine; give its config.json with --config FILE "
                        f"(known: {', '.join(PUBLISHED)})")
    if not Path(config).is_file():
        raise UserError(f"--config {config}: no such file")
    return read_shape(config)


def read_shape(path: Path) -> Shape:
    """The shape in a config.json. Raises UserError for a field that is missing or no number."""
    return shape_from(read_json(path), str(path))


def shape_from(data, where: str) -> Shape:
    data = data.get("text_config") or data if isinstance(data, dict) else {}
    heads = data.get("num_attention_heads")
    defaults = {"num_key_value_heads": heads, "num_local_experts": data.get("num_experts")}
    if all(isinstance(x, int) and x > 0 for x in (data.get("hidden_size"), heads)):
        defaults["head_dim"] = data["hidden_size"] // heads
    found = {}
    for field in fields(Shape):
        value = data.get(field.name)
        value = defaults.get(field.name) if value is None else value
        if value is None and field.default is not MISSING:
            continue
        if not isinstance(value, field.type) or (field.type is int and (isinstance(value, bool) or value < 1)):
            raise UserError(f"{where}: {field.name}: found {value!r}; a Llama-like decoder's config.json has a "
                            f"{field.type.__name__} there")
        found[field.name] = value
    return Shape(**found)


# ---- GPUs

@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet: 10^12 FLOP/s of dense bf16 and of float32 products, GB/s of its memory and to the next GPU
    (NVLink; PCIe where it has none)."""

    label: str
    gb: float
    bf16: float
    fp32: float
    memory: float
    link: float


GPUS = {"a100": GPU("A100 80 GB", 80, 312, 19.5, 2039, 300), "h100": GPU("H100 80 GB", 80, 989, 66.9, 3350, 450),
        "h200": GPU("H200 141 GB", 141, 989, 66.9, 4800, 450), "a10": GPU("A10 24 GB", 24, 125, 31.2, 600, 25),
        "rtx3090": GPU("RTX 3090 24 GB", 24, 71, 35.6, 936, 25), "rtx4090": GPU("RTX 4090 24 GB", 24, 165, 82.6, 1008, 25)}
USUAL = {80: "a100", 141: "h200", 24: "rtx4090"}  # by memory, where only that is given; 80 GB is the paper's


def gpu_of(name: str | None, gb: float | None) -> GPU:
    """A GPU by name, by its memory, or by both (a memory other than the data sheet's)."""
    if name is None:
        gb = 80 if gb is None else gb
        if gb not in USUAL:
            raise UserError(f"--gpu-memory {gb:g}: which GPU's speed? name it with --gpu ({', '.join(GPUS)})")
        return GPUS[USUAL[gb]]
    gpu = GPUS[choose("--gpu", name, tuple(GPUS))]
    if gb is None or gb == gpu.gb:
        return gpu
    if not gb > 0:
        raise UserError(f"--gpu-memory {gb:g}: must be above 0")
    return replace(gpu, gb=gb, label=f"{gpu.label.rsplit(' ', 2)[0]} {gb:g} GB")


# ---- bytes

@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides a training step's bytes. `pack_tokens` are computed at once, `scored` of them get a log-prob;
    `longest`: tokens of the longest query, which is never cut. `lora`: the adapters' rank, 0 for all weights."""

    ranks: int
    precision: str
    optimizer: str
    pack_tokens: int
    scored: int
    longest: int
    checkpointing: bool = False
    lora: int = 0
    device: str = "cuda"

    @property
    def item(self) -> int:
        """Bytes of a weight, and of a number that autograd keeps. Frozen weights on a GPU have 16 bits as products do."""
        frozen = self.lora and self.precision == "fp32_master" and self.device == "cuda"
        return 2 if self.precision == "bf16" or frozen else 4

    @property
    def state(self) -> int:
        """Bytes of a trained number, of its gradient, and of each number that the optimizer keeps of it."""
        return 2 if self.precision == "bf16" else 4


def activation_bytes(shape: Shape, tokens: int, itemsize: int) -> int:
    """What a Llama-like decoder keeps for the backward of `tokens` tokens without activation checkpointing, the head's
    part not counted: 6 D + 4 I + 2 (H + K) d numbers a token and layer, twice the last where queries and keys are
    normed, 2 D more for each expert of a mixture, 2 of the D in float32 always (norms); as counted on transformers 5.23
    (tests/test_training.py)."""
    attention = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    attention *= 4 if shape.model_type in ("qwen3", "gemma3_text") else 2
    experts = shape.num_experts_per_tok
    numbers = 6 * shape.hidden_size + 4 * experts * shape.intermediate_size + attention
    numbers += 2 * experts * shape.hidden_size if experts > 1 else 0
    norms = 2 * shape.hidden_size * max(0, 4 - itemsize)
    return tokens * shape.num_hidden_layers * (numbers * itemsize + norms)


def training_bytes(shape: Shape, step: Step, memory: float = math.inf) -> dict[str, dict[str, int]]:
    """Bytes per rank by kind at the three moments that may be the peak, gradients of earlier packs and optimizer state in
    place: "head", with all activations kept and the logits made; "layers", in the backward of the last layer, or of one
    that checkpointing computes again; "update". `memory`: bytes of a GPU, which decide where gradients are summed.

    Weights, gradients and optimizer state are float32, or bf16 in precision "bf16"; FSDP2 shards them by layer. Under LoRA
    there are gradients and optimizer state of the adapters alone; activations count as in full training, which is more.
    """
    from kernels.linear_nll import NARROW, SLAB_ELEMENTS
    from kernels.linear_nll import plan as head_mode

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
        layers = 1 if step.checkpointing else shape.num_hidden_layers
        gathered = 2 * layers * shape.layer if master and cuda else 0
    sums = 0
    if n > 1:  # one layer's in float32 and on its way; of all, where half of what is free holds them (repro/distributed.py)
        free = memory - item * shape.parameters // n  # at that moment there are weights alone
        layer = trained // shape.num_hidden_layers
        sums = 4 * trained if 4 * trained <= free / 2 else 8 * layer

    activations = activation_bytes(shape, step.pack_tokens, item)
    one_layer = activations // shape.num_hidden_layers
    if step.checkpointing:  # each layer's input
        activations = step.pack_tokens * shape.num_hidden_layers * D * item
    activations += 2 * step.pack_tokens * D * item + step.scored * D * item  # the final norm's, and its scored rows
    again = (one_layer if step.checkpointing else 0) + one_layer // 2  # the half: gradients on their way through it

    triton = cuda and item == 2
    mode = head_mode(step.scored, V, 2 if triton else 4, hidden_grad=True, head_grad=not step.lora,
                     narrow=triton and D <= NARROW)
    rows = {"store": step.scored * V * (2 if triton else 4), "frozen_head": step.scored * D * 4, "recompute": 0}[mode]
    slab = 4 * min(step.scored * V, max(SLAB_ELEMENTS, V))
    head = 0 if step.lora else V * D * 4                       # its gradient, before it is added to the others
    wide = V * D * 4 if item == 2 and not cuda else 0          # a float32 copy of a 16-bit head
    scratch = max(slab + wide, head + wide + 3 * step.scored * D * 4 + (0 if mode == "store" else slab))

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


def settle(shape: Shape, step: Step, memory: float) -> tuple[Step, int]:
    """The step as it would run, and its peak bytes: without activation checkpointing where that fits, else with it."""
    found = [(each, peak(training_bytes(shape, each, memory))[1])
             for each in (replace(step, checkpointing=on) for on in (False, True))]
    return next((each for each in found if each[1] <= memory), found[1])


def smaller_pack(step: Step) -> Iterator[Step]:
    """The step with half the tokens a pack, and half of that, down to the longest query."""
    tokens = step.pack_tokens
    while tokens > step.longest:
        tokens = max(tokens // 2, step.longest)
        yield replace(step, pack_tokens=tokens, scored=round(step.scored * tokens / step.pack_tokens))


MOST_GPUS = 128  # beyond that no plan is offered
LORA_RANK = 16


def ways(shape: Shape, step: Step, memory: float) -> list[tuple[tuple[str, ...], Step, int]]:
    """What makes a step fit that does not: sets of changes, each with the step and its bytes, by trying all sets of: fewer
    tokens a pack, bf16 weights, LoRA, more GPUs. The smallest sets first, and first those that change least. A set that
    holds another is left out, unless it takes half the GPUs."""
    changes = {  # in the order in which they are laid on; each: the steps to try, the mildest first
        "bf16": lambda s: [replace(s, precision="bf16")] if s.precision != "bf16" else [],
        "lora": lambda s: [replace(s, lora=LORA_RANK)] if not s.lora and s.ranks == shape.num_local_experts == 1 else [],
        "pack": smaller_pack,
        "gpus": lambda s: (replace(s, ranks=k) for k in range(s.ranks + 1, MOST_GPUS + 1))}

    def first(s: Step, names: tuple[str, ...]) -> tuple[Step, int] | None:
        if not names:
            settled = settle(shape, s, memory)
            return settled if settled[1] <= memory else None
        return next(filter(None, (first(each, names[1:]) for each in changes[names[0]](s))), None)

    found: list[tuple[tuple[str, ...], Step, int]] = []
    for size in range(1, len(changes) + 1):
        for names in itertools.combinations(changes, size):
            if "lora" in names and {"bf16", "gpus"} & set(names):
                continue  # under LoRA the weights are bf16, on one GPU
            way = first(step, names)
            if way and not any(set(less) <= set(names) and s.ranks <= 2 * way[0].ranks - 1 for less, s, _ in found):
                found.append((names, *way))
    mild = ("pack", "bf16", "lora", "gpus")
    return sorted(found, key=lambda each: (len(each[0]), sorted(map(mild.index, each[0]))))


def server_options(shape: Shape, memory: float, tokens: int) -> list[tuple[int, int]]:
    """How a sampling server can hold bf16 weights: (GPUs that share one copy, responses of `tokens` tokens in flight on a
    copy, 8 to 256), in 90 % of the GPUs' memory. Tensor parallel: a power of two that divides the heads."""
    found = []
    for k in (2**e for e in range(8)):
        if shape.num_attention_heads % k == 0:
            cache = 2 * shape.cache * tokens / min(k, shape.num_key_value_heads)
            slots = int((0.9 * memory - 2 * shape.parameters / k) // cache)
            found += [(k, min(slots, 256))] if slots >= 8 else []
    return found


# ---- FLOPs

def matrix_flops(shape: Shape, C: int, R: int, P: float, L: float, *, shared: bool, training: bool) -> tuple[float, float]:
    """FLOPs of a C x R log-prob matrix: (of the layers, of the head). Products alone: 2 a weight and token forward, 6 with
    the backward; attention 4 H d a pair of tokens forward, 12 with it. `shared`: each prompt once, head rows where a
    response token is predicted; else every pair in full."""
    tokens = C * (P + R * L) if shared else C * R * (P + L)
    rows = C * R * L if shared else tokens
    pairs = C * (P * P / 2 + R * (L * P + L * L / 2)) if shared else C * R * (P + L) ** 2 / 2
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    times = 3 if training else 1
    return times * (2 * shape.active * tokens + 4 * heads * pairs), times * 2 * shape.hidden_size * shape.vocab_size * rows


def sampling_flops(shape: Shape, P: float, L: float) -> float:
    """FLOPs of one response of L tokens to a prompt of P."""
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    head = shape.hidden_size * shape.vocab_size
    return 2 * shape.active * (P + L) + 4 * heads * (P + L) ** 2 / 2 + 2 * head * (L + 1)
