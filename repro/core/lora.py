"""LoRA (arXiv 2106.09685) with peft: W x becomes W x + (alpha / rank) B A x in every linear layer of attention and MLP;
A and B train, everything else is frozen. For one GPU of 24 GB (`repro plan` says what it takes).

The adapters are put into the transformers model itself: who calls it sees the model that it was, with some of its linear
layers replaced. An iteration leaves the adapter in peft's format and the merged weights, which all later stages read, in
float32: in bf16, which frozen weights have on a GPU, most of a merge would round away.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from repro.base.records import UserError, make_folder
from repro.base.training import LoraSpec, TrainSpec
from repro.models import load

ADAPTER = "adapter"  # the folder beside the merged weights
WEIGHTS = "adapter_model.safetensors"
NAME = "default"     # of the adapter in the model


def check(config, ranks: int, rank: int = 1) -> None:
    """Raise UserError where adapters of this rank cannot be trained: without peft, on many ranks, in a mixture of experts,
    or with more numbers than a square matrix that they stand beside."""
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int) and rank > width:
        raise UserError(f"--lora {rank}: must be at most the model's hidden size, {width}; ranks of 8 to 64 are usual")
    if find_spec("peft") is None:
        raise UserError("--lora needs peft: pip install 'sami-repro[lora]'")
    if ranks > 1:
        raise UserError(f"--lora with --ranks {ranks}: adapters train in one process; leave one of them out")
    if any("experts" in name and isinstance(n, int) and n > 1 for name, n in config.to_dict().items()):
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
    for layer in _layers(model).values():
        layer.cast_input_dtype_enabled = False  # where dtypes differ there is autocast, which keeps one copy of an input
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
            factor.to(torch.bfloat16 if half else torch.float32)
            trained.append(factor.weight.requires_grad_())
        A = layer.lora_A[NAME].weight
        with torch.no_grad():
            A.copy_(torch.empty(A.shape).uniform_(-1, 1, generator=generator) / math.sqrt(A.shape[1]))
            layer.lora_B[NAME].weight.zero_()
    return trained


def _layers(model) -> dict:
    """The layers with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def save(model, tokenizer, folder: Path, base: str) -> None:
    """The adapter in `folder`/adapter, which `PeftModel.from_pretrained` loads onto `base`; the merged weights (float32),
    config and tokenizer in `folder`. `model` is of no use afterwards.

    The merge is into the weights of `base` as they are published, read anew: those in `model` may be rounded. That takes 4
    bytes a parameter of the machine's memory (29 GB for 7.2 billion), and none of a GPU's.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter = make_folder(Path(folder) / ADAPTER)
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(adapter)
    state = {f"base_model.model.{name}": t.contiguous().cpu() for name, t in
             get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False).items()}
    save_file(state, adapter / WEIGHTS, metadata={"format": "pt"})
    plain = load.load_model(base, dtype="float32", device="cpu")
    with torch.no_grad():
        for name, layer in _layers(model).items():
            for factors in (layer.lora_A, layer.lora_B):  # peft (0.21) rounds the product to their dtype
                factors.to("cpu", torch.float32)
            plain.get_submodule(name).weight += layer.get_delta_weight(NAME)
    load.save_model(plain, tokenizer, folder)


def trained(folder: Path, base: str, spec: TrainSpec, device: str | None = None):
    """The model that was trained: `base`, rounded as it was then, with the adapter beside it that `save` left in `folder`.
    """
    import torch
    from safetensors.torch import load_file

    from repro.core.engines import weights_dtype

    model = load.load_model(base, dtype=weights_dtype(spec), device=device)
    put_into(model, spec.lora, half=spec.precision == "bf16", seed="0")
    state = load_file(Path(folder) / ADAPTER / WEIGHTS)
    with torch.no_grad():
        for name, layer in _layers(model).items():
            for kind in ("lora_A", "lora_B"):
                getattr(layer, kind)[NAME].weight.copy_(state[f"base_model.model.{name}.{kind}.weight"])
    return model.requires_grad_(False)


def merged_difference(folder: Path, base: str, tokenizer, spec: TrainSpec, prompts: Sequence[Sequence[str]],
                      responses: Sequence[Sequence], backend: str) -> dict:
    """How far what `save` left is from what was trained, on pairs as of `logprob_matrix`: the largest absolute difference
    of their log-probs (summed, in nats) under the merged weights and under `base`, rounded as it was in training, with the
    adapter beside it. Both are read from the files and computed in float32, one after the other; where a GPU has no room
    for that, on the CPU: 4 bytes a parameter of the machine's memory."""
    import torch

    from repro.core.logprobs import BATCH_TOKENS, matrix_of, settled
    from repro.core.memory import usable_bytes
    from repro.core.tree import tokenised

    queries = tokenised(tokenizer, prompts, responses, score_eos=spec.score_eos)

    def matrix(model):
        need = 5 * sum(p.numel() for p in model.parameters())  # 4 bytes each, and room for the texts
        if torch.cuda.is_available() and need < usable_bytes(torch.device("cuda")):
            model.to("cuda")
        with torch.inference_mode():
            return matrix_of(settled(model, backend), model, queries, length_normalize=False, budget=BATCH_TOKENS).cpu()

    model = trained(folder, base, spec, device="cpu").float()
    beside = matrix(model)
    del model
    load.release()
    merged = matrix(load.load_model(str(folder), device="cpu"))
    return {"max_abs_difference_nats": (merged - beside).abs().max().item(), "queries": len(prompts),
            "pairs": merged.numel()}
