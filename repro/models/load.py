"""A model's place -> its tokenizer, weights and config, checked, with what is wrong in words; and back to files."""

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

from repro.base.records import UserError, first_line, make_folder, write_bytes
from repro.models import files
from repro.models.decoding import GENERATION, generation_file, own_ends, plain_decoding
from repro.models.hub import file_of, hub_errors, load_config, resolve_model

# oneDNN (3.12, of torch 2.13), and torch above it, keep what they have made for the last 1,024 shapes of a product, 0.6 MB
# together, and hardly two packs have as many tokens. A pass has up to a few hundred shapes (attention has one a branch),
# which must stay for its next layer: with fewer kept than that, a step took 1.4 times as long. Read at the first product.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "512")


def check_model(name: str) -> None:
    """Raise UserError, before anything loads, where `name` is no causal language model with plain, whole weights."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    place = resolve_model(name)
    fields = hub_errors(place, lambda: PreTrainedConfig.get_config_dict(place)[0])
    if not isinstance(fields, dict):
        raise UserError(f"--model {name}: not a model in Hugging Face format (config.json holds no object)")
    if refusal := quantised(fields):
        raise UserError(f"--model {name}: {refusal}")
    if fields.get("auto_map") and fields.get("model_type") not in CONFIG_MAPPING:
        raise UserError(f"--model {name}: {fields.get('model_type')} needs code that comes with the weights (auto_map in "
                        "config.json), which is not run here; give a model of a family that transformers knows")
    files.check_kind(name, hub_errors(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=False)))
    if Path(place).is_dir():
        held = files.check_folder(name, Path(place))
        try:
            model = load_model(name, device="meta")
        except Exception as e:  # whatever a model's own code makes of values that nobody has checked
            raise UserError(f"--model {name}: config.json: no model can be made of it ({type(e).__name__}: "
                            f"{first_line(e)})") from e
        files.check_tensors(name, held, model)
    elif file_of(place, files.ADAPTER):
        raise UserError(f"--model {name}: {files.ADAPTER} beside the weights: the adapter would be loaded into them; give "
                        "a folder with a copy without it")


def load_tokenizer(name: str):
    """The tokenizer, with an end token, a pad token and nothing added on its own (callers pass add_special_tokens=False).
    Raises UserError where it cannot be read, or does not belong to the model (repro/models/files.py)."""
    from transformers import AutoTokenizer

    place = resolve_model(name)
    try:
        tokenizer = hub_errors(place, lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False))
    except Exception as e:  # tokenizers (0.23) raises that very class for a file of another form
        if reason := files.without_tokenizer(place):
            raise UserError(f"--model {place}: {reason}") from e
        if type(e) is not Exception:
            raise
        raise UserError(f"--model {place}: tokenizer.json is not of a form that the installed tokenizers reads "
                        f"({first_line(e)}); a newer one may, or save the tokenizer again with this one") from e
    ends = [i for i in own_ends(place) if tokenizer.convert_ids_to_tokens(i)]
    files.check_tokenizer(place, tokenizer, rows_of(load_config(place)), ends)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows_of(config) -> int | None:
    """Rows of the embedding, one for each token id; None where the config does not say."""
    found = getattr(config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def load_model(name: str, *, dtype: str = "float32", device: str | None = None):
    """A causal LM in eval mode with weights in `dtype` (float32 or bfloat16), on the GPU where there is one or on `device`;
    on "meta" without weights, from its config alone.

    safetensors only, no remote code. Of the weights' generation config the end tokens alone are taken over (transformers
    5.23 fills whatever a call of `generate` leaves open from it: penalties, beams, token lists); `save_model` writes it
    back. Raises UserError where the weights are missing or do not fit the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    place = resolve_model(name)
    logging.disable_progress_bar()
    config = hub_errors(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=False))
    if device == "meta":
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    ids = {k: getattr(config.get_text_config(), k, None) for k in ("bos_token_id", "pad_token_id")}
    model, info = hub_errors(place, lambda: AutoModelForCausalLM.from_pretrained(
        place, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
        generation_config=plain_decoding(own_ends(place), **ids)))  # given one, it does not read the file
    files.lacking(name, info["missing_keys"])  # transformers (5.23) draws them at random, and warns
    files.misshapen(name, info["mismatched_keys"])
    model.generation_file = generation_file(place)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def quantised(config) -> str | None:
    """Why weights of this config (a transformers config, or the content of a config.json) cannot be trained here: they are
    quantised; None where they are not. In a multimodal model the entry may stand in the text part's config."""
    data = config if isinstance(config, dict) else config.to_dict()
    for part in (data, data.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found is not None:  # transformers reads null as none
            found = found if isinstance(found, dict) else {}
            method, bits = (found.get(key) for key in ("quant_method", "bits"))
            how = ", ".join([str(method)] * bool(method) + [f"{bits} bits"] * bool(bits))
            return (f"quantization_config{f' ({how})' if how else ''}: quantised weights cannot be trained here; give the "
                    "model with its weights as they were before")
    return None


def context_of(config) -> int:
    """Tokens that the model can take, all texts alike. Raises UserError where its config does not say."""
    found = getattr(config, "max_position_embeddings", None)
    if not found:
        raise UserError(f"{config.name_or_path or config.model_type}: config.json has no max_position_embeddings; models "
                        "without a limit of their own (such as BLOOM and MPT) are not supported")
    return min(found, steady_length(config) or found)


def steady_length(config) -> int | None:
    """Tokens of a text up to which RoPE is a function of the position alone; None where it always is.

    As of transformers 5.23 the kinds "dynamic" and "longrope" take other frequencies once the longest text of a *batch* is
    beyond the original context: all texts beside it change, and with "dynamic" also later batches, up to the longest that
    was ever seen. Within that context nothing does.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]
    if not any(str(p.get("rope_type", p.get("type"))).endswith(("dynamic", "longrope")) for p in kinds):
        return None
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "original_max_position_embeddings")]
    return min(filter(None, (*limits, *(p.get("original_max_position_embeddings") for p in kinds))), default=None)


def dropouts(config) -> list[str]:
    """The config's rates of dropout (and of layers or experts dropped) that are above 0, as "name rate"."""
    return [f"{name} {rate:g}" for name, rate in config.get_text_config().to_dict().items()
            if ("drop" in name or "jitter" in name) and isinstance(rate, float) and rate > 0]


def save_model(model, tokenizer, folder: Path) -> None:
    """Weights, config and tokenizer in Hugging Face format (safetensors). The generation config is the file that came with
    the initial weights, byte for byte: who uses both models elsewhere, with their publisher's defaults, compares weights
    alone. A model that had no such file gets one with its end tokens."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(make_folder(folder))
    tokenizer.save_pretrained(folder)
    if data := getattr(model, "generation_file", None):
        write_bytes(Path(folder) / GENERATION, data)


def release() -> None:
    """Give back the memory of models that nothing refers to. glibc alone would keep what lies between small blocks that
    stay, where the next model's large ones do not fit: 1 GiB in a run of 135M parameters."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
