"""A built model -> its shape: what `repro plan` and activation checkpointing compute with (repro/plan/gpus.py).

Nothing is taken from a config's fields that the modules themselves show: a config.json leaves fields out, and families
name them differently. The step of one kind of model is known, the Llama-like decoder: embedding and head, and layers of
norms, one attention (projections to queries, keys and values, apart or fused, and one back) and gated feed-forward networks
(three matrices, apart or the first two fused), one alone or a mixture's experts. A model that holds anything else is
refused, with the name of the part: neither its products nor what autograd keeps of it are known.

Axes: D hidden size, H heads, K heads of keys and values, d numbers of a head, I numbers between a network's matrices,
E experts.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from repro.base.records import UserError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Numbers of a decoder layer: parameters; those that multiply a token (of experts, those that it goes to); the
    largest tensor's; what autograd keeps of a token, `wide` of it in float32 always; rows and columns of all matrices."""

    parameters: int
    active: int
    largest: int
    kept: int
    wide: int
    sides: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-like decoder. `root`: parameters outside its layers, each once (a tied head is the embedding). `mixture`: a
    layer has experts. `scores`: attention keeps whole matrices of scores, twice where it caps them (`softcap`)."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    root: int
    layers: tuple[Layer, ...]
    mixture: bool
    scores: bool
    softcap: bool
    config: object = field(compare=False, repr=False)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        return self.root + sum(layer.parameters for layer in self.layers)

    @property
    def layer(self) -> int:
        """Parameters of the largest layer."""
        return max(layer.parameters for layer in self.layers)

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor of a layer: a mixture's experts are one, gate and up projection together."""
        return max(layer.largest for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters of all layers that multiply a token."""
        return sum(layer.active for layer in self.layers)

    @property
    def cache(self) -> int:
        """Numbers that generation keeps of a token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of this rank on every matrix of the layers."""
        return rank * sum(layer.sides for layer in self.layers)


def counted(model) -> Shape:
    """The shape of a transformers model, on whatever device (also "meta"), with or without adapters, which do not count.

    Raises UserError where it is no Llama-like decoder.
    """
    try:
        return _counted(model)
    except UserError as e:
        raise UserError(f"{model.config.model_type}: {e}; what a step takes is known of Llama-like decoders alone (one "
                        "attention over all tokens before and gated feed-forward networks in a layer)") from e


def _counted(model) -> Shape:
    from repro.core.shapes import decoder_layers

    config = model.config.get_text_config(decoder=True)
    if config is not model.config:
        raise UserError(f"{type(model).__name__} has parts for more than text, which would be loaded too")
    D, H = _field(config, "hidden_size"), _field(config, "num_attention_heads")
    K = getattr(config, "num_key_value_heads", None) or H
    blocks, embedding, head = decoder_layers(model), model.get_input_embeddings(), model.get_output_embeddings()
    if not blocks:
        raise UserError("no decoder layers")
    if head is None or head.weight.shape != embedding.weight.shape or head.weight.shape[1] != D:
        raise UserError("its head is no product of hidden states with a row for each token")
    d = next((m.head_dim for m in blocks[0].modules() if isinstance(getattr(m, "head_dim", None), int)), D // H)
    known: dict = {}
    layers = tuple(_layer(block, config, (D, H, K, d), known) for block in blocks)
    inside, root = {id(p) for block in blocks for p in block.parameters()}, {}
    for name, module in _parts(model):
        outside = {id(p): p.numel() for p in _own(module) if id(p) not in inside}
        if outside and module not in (embedding, head) and not _is_norm(module):
            raise UserError(f"{name}, beside embedding, layers, norm and head")
        root |= outside
    eager = model.config._attn_implementation == "eager"
    return Shape(model_type=model.config.model_type, hidden_size=D, vocab_size=head.weight.shape[0], num_attention_heads=H,
                 num_key_value_heads=K, head_dim=d, root=sum(root.values()), layers=layers,
                 mixture=any(p.ndim == 3 for block in blocks for p in block.parameters()), scores=eager,
                 softcap=eager and bool(getattr(config, "attn_logit_softcapping", None)), config=config)


def _field(config, name: str) -> int:
    try:
        return getattr(config, name)
    except (AttributeError, RuntimeError) as e:  # the latter: transformers 5.23, for what differs from layer to layer
        raise UserError(f"no {name} for all layers") from e


def _parts(module, name: str = "") -> Iterator[tuple]:
    """Names and modules: those that hold parameters themselves, norms without any; of one with adapters what is beneath."""
    module = getattr(module, "base_layer", module)
    if _own(module) or _is_norm(module):
        yield name, module
    for child, inner in module.named_children():
        yield from _parts(inner, f"{name}.{child}" if name else child)


def _own(module) -> list:
    return list(module.parameters(recurse=False))


def _is_norm(module) -> bool:
    from torch.nn import Linear

    return "norm" in type(module).__name__.lower() and not list(module.children()) and not isinstance(module, Linear)


def _norm(module, D: int, known: dict) -> tuple[int, int, int]:
    """Of a norm: numbers of its weight, or D; of each of these as it comes in, how many autograd keeps, and how many of
    those in float32 always. Families differ (some multiply by their weight in float32), so a copy of the norm is run."""
    import torch

    weight = next(iter(_own(module)), None)
    width = (D,) if weight is None else tuple(weight.shape)
    if (type(module), width) not in known:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            norm, kept = copy.deepcopy(module).to_empty(device="cpu").to(dtype), {}
            own = {p.untyped_storage().data_ptr() for p in norm.parameters()}

            def note(tensor, own=own, kept=kept):
                if tensor.untyped_storage().data_ptr() not in own:
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            x = torch.ones(4, *width, dtype=dtype, requires_grad=True)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                norm(x)
            found.append(sum(kept.values()) / x.numel())
        known[type(module), width] = round(found[0] / 4), round((found[1] - found[0] / 2) / 2)
    return (math.prod(width), *known[type(module), width])


def _layer(block, config, sizes: tuple[int, int, int, int], known: dict) -> Layer:
    """The layer that a block is. Raises UserError for a part that no such layer has."""
    D, H, K, d = sizes
    parts = list(_parts(block))
    norms = [_norm(m, D, known) for name, m in parts if _is_norm(m) and "." not in name]  # of hidden states
    inputs = min(2, len(norms))  # of attention and network: one where there is one norm for both
    groups: dict[str, list] = {}
    for name, module in parts:
        if "." in name or not _is_norm(module):
            groups.setdefault(name.split(".")[0], []).append((name, module))
    own = next((name for name, group in groups.items() if _is_attention([m for _, m in group], sizes)), None)
    if own is None:
        raise UserError(f"{next(iter(groups), 'layers')}: no attention of {H} heads of {d} numbers, {K} of keys and values")
    if len(groups) < 2:
        raise UserError("no feed-forward network in a layer")
    attention = [m for _, m in groups.pop(own)]
    linear = [m for m in attention if not _is_norm(m)]
    heads = [_norm(m, d, known) for m in attention if _is_norm(m)]  # of queries and keys: of each head, or of all together
    norms += [(n * width if width == d else width, *keeps) for (width, *keeps), n in zip(heads, (H, K))]
    fused = (H + K) * d if len(linear) == 2 else 0  # the values are a view, which keeps what queries and keys came from
    networks = [_network(block, name, group, config, D) for name, group in groups.items()]
    return Layer(parameters=sum(p.numel() for _, m in parts for p in _own(m)),
                 active=sum(m.weight.numel() for m in linear) + sum(n.active for n in networks),
                 largest=max(*(m.weight.numel() for m in linear), *(n.largest for n in networks)),
                 kept=inputs * D + 2 * (H + K) * d + fused + sum(width * keeps for width, keeps, _ in norms)
                 + sum(n.kept for n in networks), wide=sum(width * always for width, _, always in norms),
                 sides=sum(sum(m.weight.shape) for m in linear) + sum(n.sides for n in networks))


def _is_attention(group: list, sizes: tuple[int, int, int, int]) -> bool:
    """Whether these are projections of queries, keys and values, and one back; norms of queries and keys perhaps."""
    from torch.nn import Linear

    D, H, K, d = sizes
    linear = sorted(tuple(m.weight.shape) for m in group if isinstance(m, Linear))
    norms = sum(map(_is_norm, group))
    back = (D, H * d)
    return len(linear) + norms == len(group) and norms <= 2 and linear in (
        sorted([(H * d, D), (K * d, D), (K * d, D), back]), sorted([((H + 2 * K) * d, D), back]))


def _network(block, name: str, group: list, config, D: int) -> Layer:
    """Of a feed-forward network or a mixture of them, with a router and perhaps one that all tokens go to."""
    from torch.nn import Linear

    total = {"active": 0, "largest": 0, "kept": 0, "sides": 0}

    def add(**numbers) -> None:
        total.update({k: max(total[k], n) if k == "largest" else total[k] + n for k, n in numbers.items()})

    experts = [(path, m) for path, m in group if any(p.ndim == 3 for p in _own(m))]
    E = 0
    for path, module in experts:
        shapes = [tuple(p.shape) for p in _own(module)]
        E, I = shapes[0][0], min(math.prod(s) for s in shapes if len(s) == 3) // (shapes[0][0] * D)
        biases = [s for s in shapes if s in ((E, 2 * I), (E, D))]
        if len(experts) > 1 or sorted(s for s in shapes if s not in biases) != sorted([(E, 2 * I, D), (E, D, I)]):
            raise UserError(f"{path}: tensors of {_listed(shapes)}, not experts [E, 2 I, {D}] and [E, {D}, I]")
        _activation(block, path)
        k = next((m.top_k for m in block.get_submodule(name).modules() if isinstance(getattr(m, "top_k", None), int)),
                 getattr(config, "num_experts_per_tok", None))
        if not isinstance(k, int) or not 1 <= k <= E:
            raise UserError(f"{path}: {k} of {E} experts for a token")
        add(active=3 * k * I * D, largest=2 * E * I * D, kept=4 * k * I + 2 * k * D)
    dense: dict[str, list] = {}
    for path, module in group:
        shapes = [tuple(p.shape) for p in _own(module)]
        if E and set(shapes) <= {(E, D), (E,), (1, E), (1, D), (1,)}:  # the router, or the gate of a shared network
            add(active=sum(math.prod(s) for s in shapes if len(s) == 2 and s[1] == D))
        elif isinstance(module, Linear):
            dense.setdefault(path.rpartition(".")[0] or path, []).append(module)
        elif (path, module) not in experts:
            raise UserError(f"{path}: {type(module).__name__} in a feed-forward network")
    for path, linear in dense.items():
        shapes = [tuple(m.weight.shape) for m in linear]
        I = sum(map(math.prod, shapes)) // (3 * D)
        if sorted(shapes) not in (sorted([(I, D), (I, D), (D, I)]), sorted([(2 * I, D), (D, I)])):
            raise UserError(f"{path}: matrices of {_listed(shapes)}, not a gated network")
        _activation(block, path)
        add(active=3 * I * D, largest=max(map(math.prod, shapes)), kept=4 * I, sides=sum(map(sum, shapes)))
    return Layer(parameters=0, wide=0, **total)


def _activation(block, path: str) -> None:
    """Raise UserError where a network is no product of one function of a matrix and another matrix, as far as can be seen:
    functions with numbers of their own (clamps) keep more."""
    from torch.nn import Dropout

    inner = block.get_submodule(path).children()
    if sum(not (_own(m) or list(m.children()) or isinstance(m, Dropout)) for m in inner) != 1:
        raise UserError(f"{path}: a feed-forward network without an activation of its own")


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def decoder_layers(model) -> list:
    """The repeated blocks of a model: of its outermost module lists, the one with the most parameters."""
    from torch.nn import ModuleList

    lists, inner = [], set()
    for module in model.modules():  # parents come first
        if isinstance(module, ModuleList) and module not in inner:
            lists.append(module)
            inner.update(module.modules())
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of decoder layers in it to shard by; train it on one rank")
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))
