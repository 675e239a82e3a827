"""Shapes of published models, data sheets of GPUs, what makes a step fit, FLOPs: arithmetic alone.

A GPU that is sold as 80 GB has 80 GiB = 85.9 GB: the 7 % between are what is left to CUDA's context, NCCL's buffers and
fragmentation.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from repro.base.checks import choose
from repro.base.records import UserError, read_json
from repro.base.settings import EMBEDDED, GEMMA
from repro.core.memory import Step, peak, training_bytes
from repro.core.shapes import Shape, counted
from repro.models import load

# ---- model shapes


def _mistral(**change) -> dict:
    return {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000} | change


PUBLISHED = {  # of the models' public config.json
    "mistralai/Mistral-7B-v0.1": _mistral(), "mistralai/Mistral-7B-Instruct-v0.1": _mistral(),
    "mistralai/Mixtral-8x7B-v0.1": _mistral(num_local_experts=8, num_experts_per_tok=2, model_type="mixtral"),
    "meta-llama/Meta-Llama-3-70B": _mistral(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                            num_attention_heads=64, vocab_size=128256, model_type="llama"),
    EMBEDDED: _mistral(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                              num_key_value_heads=3, head_dim=64, vocab_size=49152, model_type="llama",
                              tie_word_embeddings=True),
    GEMMA: _mistral(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
                    num_key_value_heads=1, head_dim=256, vocab_size=262144, model_type="gemma3_text",
                    tie_word_embeddings=True)}


def shape_of(name: str, config: Path | None = None) -> Shape:
    """The shape of a model: of the config.json given, of a folder, of the hub's cache on this machine, or published.

    Raises UserError where none of these knows it.
    """
    if config is None and (Path(name).expanduser() / "config.json").is_file():
        config = Path(name).expanduser() / "config.json"
    if config is None and name in PUBLISHED:
        return shape_from(PUBLISHED[name], f"--model {name}")
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
    """The shape of the model of a config.json; raises UserError as `shape_from` does."""
    return shape_from(read_json(path), str(path))


def shape_from(data, where: str) -> Shape:
    """The shape of the model that transformers makes of a config.json's content, its own values in place of what is left
    out: built as `models.load_model` does, without weights. Raises UserError, with `where` first, for a family that
    transformers does not know, values of which no model can be made, quantised weights, and what is no Llama-like decoder.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{where}: model_type: found {kind!r}, no model that this transformers knows")
    if reason := load.quantised(data):
        raise UserError(f"{where}: {reason}")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(dict(data)), dtype=torch.bfloat16)
    except Exception as e:  # what a value of another form leads to is of many kinds
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: no causal LM can be made of it ({type(e).__name__}: {reason[:200]})") from e
    finally:
        logging.set_verbosity(before)
    try:
        return counted(model)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


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
        yield step.packed(tokens)


MOST_GPUS = 128  # beyond that no plan is offered
LORA_RANK = 16


def ways(shape: Shape, step: Step, memory: float) -> list[tuple[tuple[str, ...], Step, int]]:
    """What makes a step fit that does not: sets of changes, each with the step and its bytes, by trying all sets of: fewer
    tokens a pack, bf16 weights, LoRA, more GPUs. The smallest sets first, and first those that change least. A set that
    holds another is left out, unless it takes half the GPUs."""
    changes = {  # in the order in which they are laid on; each: the steps to try, the mildest first
        "bf16": lambda s: [replace(s, precision="bf16")] if s.precision != "bf16" else [],
        "lora": lambda s: [replace(s, lora=LORA_RANK)] if not s.lora and s.ranks == 1 and not shape.mixture else [],
        "pack": smaller_pack,
        "gpus": lambda s: (s.on(k) for k in range(s.ranks + 1, MOST_GPUS + 1)) if not s.reference else []}

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

def matrix_tokens(C: int, R: int, P: float, L: float, common: float | None) -> float:
    """Tokens of a C x R log-prob matrix: of the tree whose C prompts of P tokens begin with `common` tokens; None: of every
    pair in full."""
    return C * R * (P + L) if common is None else common + C * (P - common) + C * R * L


def matrix_flops(shape: Shape, C: int, R: int, P: float, L: float, common: float | None, *,
                 training: bool) -> tuple[float, float]:
    """FLOPs of a C x R log-prob matrix: (of the layers, of the head). Products alone: 2 a weight and token forward, 6 with
    the backward; attention 4 H d a pair of tokens forward, 12 with it. Of the tree (`matrix_tokens`), with head rows where
    a response token is predicted; or of every pair in full."""
    tokens = matrix_tokens(C, R, P, L, common)
    if common is None:
        rows, pairs = tokens, C * R * (P + L) ** 2 / 2
    else:
        rows, own = C * R * L, P - common
        pairs = common**2 / 2 + C * (own * common + own**2 / 2) + C * R * (L * P + L * L / 2)
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    times = 3 if training else 1
    return times * (2 * shape.active * tokens + 4 * heads * pairs), times * 2 * shape.hidden_size * shape.vocab_size * rows


def sampling_flops(shape: Shape, P: float, L: float) -> float:
    """FLOPs of one response of L tokens to a prompt of P."""
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    head = shape.hidden_size * shape.vocab_size
    return 2 * shape.active * (P + L) + 4 * heads * (P + L) ** 2 / 2 + 2 * head * (L + 1)
