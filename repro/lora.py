"""LoRA (arXiv 2106.09685) with peft: W x becomes W x + (alpha / rank) B A x in every linear layer of attention and MLP;
A and B train, everything else is frozen. For one GPU of 24 GB (`repro plan` says what it takes).

The adapters are put into the transformers model itself: who calls it sees the model that it was, with some of its linear
layers replaced. An iteration leaves the adapter in peft's format and the merged weights, which all later stages read.
"""

import math
from importlib.util import find_spec
from pathlib import Path

from repro import models
from repro.config import LoraSpec
from repro.records import UserError, make_folder

ADAPTER = "adapter"  # the folder beside the merged weights
NAME = "default"     # of the adapter in the model


def check(config, ranks: int) -> None:
    """Raise UserError where adapters cannot be trained: without peft, on many ranks, in a mixture of experts."""
    if find_spec("peft") is None:
        raise UserError("--lora needs peft: pip install 'sami-repro[lora]'")
    if ranks > 1:
        raise UserError(f"--lora with --ranks {ranks}: adapters train in one process; leave one of them out")
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise UserError(f"--lora: {config.model_type} is a mixture, whose experts are no linear layers; train all weights")


def put_into(model, spec: LoraSpec, *, half: bool, seed: str) -> list:
    """Freeze `model` and put fresh adapters into it, a pure function of `seed` (hexadecimal): A uniform within
    1 / sqrt(inputs), B zero, so that the first step starts from the model itself. They are float32, or bf16 where `half`.
    Returns the parameters that train."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules="all-linear", lora_dropout=0.0,
                                       bias="none", task_type="CAUSAL_LM"), model, NAME)
    generator = torch.Generator().manual_seed(int(seed[:15], 16))
    trained = []
    for layer in _layers(model):
        layer.cast_input_dtype_enabled = False  # where dtypes differ there is autocast, which keeps one copy of an input
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
            factor.to(torch.bfloat16 if half else torch.float32)
            trained.append(factor.weight.requires_grad_())
        A = layer.lora_A[NAME].weight
        with torch.no_grad():
            A.copy_(torch.empty(A.shape).uniform_(-1, 1, generator=generator) / math.sqrt(A.shape[1]))
            layer.lora_B[NAME].weight.zero_()
    return trained


def _layers(model) -> list:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def save(model, tokenizer, folder: Path, base: str) -> None:
    """The adapter in `folder`/adapter, which `PeftModel.from_pretrained` loads onto `base`; the merged weights, config and
    tokenizer in `folder`. `model` is merged afterwards, a plain transformers model again."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter = make_folder(Path(folder) / ADAPTER)
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(adapter)
    state = {f"base_model.model.{name}": t.contiguous().cpu() for name, t in
             get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False).items()}
    save_file(state, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = set(_layers(model))
    for name, layer in [(n, m) for n, m in model.named_modules() if m in layers]:
        plain = layer.get_base_layer()
        with torch.no_grad():
            plain.weight.copy_(plain.weight.float() + layer.get_delta_weight(NAME).float())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    del model.peft_config
    models.save_model(model, tokenizer, folder)
