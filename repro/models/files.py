"""A model's files and its tokenizer, held against each other before a run writes anything.

Nothing here loads weights: of a folder the files are looked at (of safetensors the header alone), of a model on the hub
its config. What is refused here transformers (5.23) would load in silence, or refuse after the run has begun, in words that
name no file.
"""

import json
import struct
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from repro.base.records import UserError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LFS, POINTER = b"version ", "a pointer of Git LFS in the file's place (`git lfs pull` fetches it)"
FLOATS = {"F64", "F32", "F16", "BF16"}
PACKED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "SCB", "_blocks", "_scales")
# Files that a tokenizer can be made from: alone, or with the others of its row.
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tokenizer.model",), ("spiece.model",),
              ("sentencepiece.bpe.model",), ("tekken.json",), ("vocab.json",), ("vocab.tiktoken",))
LEAST = 0.5  # of a model's rows that its tokenizer must know: Qwen 2.5 0.998, Phi-2 0.98, Pythia 0.99


# ---- files of a folder

def other_format(folder: Path) -> str:
    """Of a folder without config.json: what it is instead, and the way to a model in Hugging Face format."""
    if (folder / ADAPTER).is_file():
        return adapters_alone(folder)
    if found := sorted(p.name for p in folder.glob("*.gguf")):
        return (f"GGUF alone ({found[0]}), whose weights are mostly quantised; give the model in Hugging Face format, as "
                "it was before it was converted")
    return "a folder without config.json; give a model in Hugging Face format"


def adapters_alone(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return (f"adapters without the weights that they belong to ({base or 'a base model'}); give a folder with the merged "
            f"model, which peft makes: AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()"
            ".save_pretrained(NEW), with the base model's tokenizer files beside it")


def check_folder(name: str, folder: Path) -> dict[str, dict]:
    """What the weights in `folder` hold: tensor -> {dtype, shape, ...}. Raises UserError where they are not whole, plain
    safetensors that transformers would load as they are."""
    single, index = folder / SINGLE, folder / INDEX
    whole = single.is_file() or index.is_file()
    if (folder / ADAPTER).is_file():  # transformers (5.23) puts such an adapter into the model that it loads
        raise UserError(f"--model {name}: " + (
            f"{ADAPTER} beside whole weights: the adapter would be loaded into them; move {ADAPTER} elsewhere to train the "
            "weights as they are, or merge the adapter (peft's merge_and_unload) and give the folder of the result"
            if whole else adapters_alone(folder)))
    if not whole:
        raise UserError(f"--model {name}: {_without_safetensors(folder)}")
    shards, map_ = [single], {}
    if not single.is_file():  # where both are there transformers reads the single file
        try:
            map_ = json.loads(index.read_text())["weight_map"]
            shards = [folder / shard for shard in sorted(set(map_.values()))]
            if not shards:
                raise ValueError("an empty weight_map")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"--model {name}: {INDEX}: no index of shards ({type(e).__name__}: {first_line(e)})") from None
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise UserError(f"--model {name}: {len(missing)} of {len(shards)} files that {INDEX} names are missing: "
                            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}; copy or download them again")
    tensors = {}
    for shard in shards:
        try:
            tensors |= header(shard)
        except ValueError as e:
            raise UserError(f"--model {name}: {shard.name}: {e}; copy or download it again") from None
    if lost := sorted(map_.keys() - tensors.keys()):
        raise UserError(f"--model {name}: {map_[lost[0]]} lacks {lost[0]}, which {INDEX} names; copy or download it again")
    if not tensors:
        raise UserError(f"--model {name}: {shards[0].name} holds no tensor")
    for tensor, facts in tensors.items():
        dtype = facts["dtype"]
        if tensor.endswith(PACKED) or (dtype not in FLOATS and (dtype[0] == "F" or tensor.endswith("weight"))):
            raise UserError(f"--model {name}: {tensor} is stored as {dtype}: quantised weights cannot be trained here; "
                            "give the model with its weights as they were before")
    return tensors


def check_tensors(name: str, held: dict[str, dict], model) -> None:
    """Raise UserError where files that hold `held` lack a parameter of `model` (without weights, as its config has it) or
    have it in another shape. Files that spell a name in another way than the model (older ones, experts one by one)
    transformers renames when it loads them; of such ones loading tells what is missing."""
    asked, spellings = {}, {}
    for parameter, tensor in model.named_parameters(remove_duplicate=False):
        asked[parameter] = tuple(tensor.shape)
        spellings.setdefault(id(tensor), []).append(parameter)  # tied ones are one tensor, stored under any of its names
    if held.keys() - asked.keys() - dict(model.named_buffers()).keys():
        return
    lacking(name, [names[0] for names in spellings.values() if not held.keys() & set(names)])
    misshapen(name, [(k, tuple(held[k]["shape"]), shape) for k, shape in asked.items()
                     if k in held and tuple(held[k]["shape"]) != shape])


def lacking(name: str, missing: Collection[str]) -> None:
    """Raise UserError where any tensor is."""
    if missing := sorted(missing):
        raise UserError(f"--model {name}: the weights lack {len(missing)} of the tensors that config.json asks for: "
                        f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")


def misshapen(name: str, found: Collection[tuple]) -> None:
    """Raise UserError for tensors that are of another shape than they should be: (tensor, shape, shape asked for)."""
    if found := sorted(found):
        tensor, there, asked = found[0]
        raise UserError(f"--model {name}: {tensor} is {tuple(there)} in the weights and {tuple(asked)} by config.json ("
                        + (f"{len(found)} such tensors)" if len(found) > 1 else "the only one)"))


def _without_safetensors(folder: Path) -> str:
    names = {p.name for p in folder.iterdir()}
    if found := [n for n in (SINGLE, INDEX) if n in names]:  # as in a copy of the hub's cache, whose files are links
        link = f", but a link to {(folder / found[0]).readlink()}, which is not there" * (folder / found[0]).is_symlink()
        return f"{found[0]} is no file{link}; copy the file itself (cp -L follows links)"
    if found := sorted(n for n in names if n.endswith(".gguf")):
        return f"no {SINGLE}, but {found[0]}: GGUF is not read; give the model in Hugging Face format"
    if found := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")) and n != "training_args.bin"):
        convert = (f", which transformers makes of it: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
                   f".save_pretrained({str(folder)!r})") * any(n.startswith("pytorch_model") for n in found)
        return f"{found[0]} is no safetensors file, and reading it could run code; give the weights as safetensors{convert}"
    if found := sorted(n for n in names if n.endswith(".safetensors")):
        return f"no {SINGLE} and no {INDEX}; {found[0]} is not a name that transformers looks for"
    if found := sorted(n for n in names if n.endswith((".h5", ".msgpack", ".onnx", ".ckpt"))):
        return f"no {SINGLE}, but {found[0]}; give the weights as safetensors"
    return f"no weights: neither {SINGLE} nor {INDEX}; copy or download them again"


def header(path: Path) -> dict[str, dict]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file. Raises ValueError where the file is not whole: eight
    bytes, a header of that many bytes, and data up to the last offset."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        first = f.read(8)
        if first == LFS:
            raise ValueError(POINTER)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if size < 8 + length:
            raise ValueError(f"cut short ({size} bytes)")
        try:
            tensors = json.loads(f.read(length))
            tensors.pop("__metadata__", None)
            end = max((facts["data_offsets"][1] for facts in tensors.values()), default=0)
            assert all(isinstance(facts["dtype"], str) for facts in tensors.values())
        except (ValueError, AttributeError, LookupError, TypeError, AssertionError):
            raise ValueError("its header is not that of a safetensors file") from None
    if size != 8 + length + end:
        how = "cut short" if size < 8 + length + end else "too long"
        raise ValueError(f"{how} ({size} bytes, by its header {8 + length + end})")
    return tensors


# ---- what a config says

def check_kind(name: str, config) -> None:
    """Raise UserError where a transformers config is not that of a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, built = config.model_type, ", ".join(getattr(config, "architectures", None) or [])
    what = f"{kind}{f' ({built})' if built else ''}"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"--model {name}: {what} is an encoder-decoder; give a causal (decoder-only) language model")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        sees = " that reads more than text" if getattr(config, "vision_config", None) or "vision" in kind else ""
        raise UserError(f"--model {name}: {what} is no causal language model that transformers knows, but one of another "
                        f"kind{sees}; give a causal (decoder-only) language model of text")


# ---- tokenizers

def without_tokenizer(place: str) -> str | None:
    """Why no tokenizer can be made of what lies in a folder; None where that does not show (as of a model on the hub)."""
    folder = Path(place)
    if not folder.is_dir():
        return None
    names = {p.name for p in folder.iterdir()}
    have = [row for row in TOKENIZERS if names.issuperset(row)]
    have += [(n,) for n in sorted(names) if n.endswith((".tiktoken", ".model")) and (n,) not in have]
    if not have:
        return ("no tokenizer files: tokenizer.json is missing (or tokenizer.model, or vocab.json with merges.txt); copy "
                "them, with tokenizer_config.json, from where the weights come from")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        if file in names and (fault := _no_json(folder / file)):
            return f"{file} {fault}; copy or download it again"
    if ("tokenizer.json",) in have:
        return None
    file = next((row[0] for row in have if row[0].endswith((".model", ".tiktoken"))), None)
    if file is None:
        return None
    if not (data := (folder / file).read_bytes()):
        return f"{file} is empty; copy or download it again"
    # transformers (5.23) asks for tiktoken where it cannot read a SentencePiece file, a protobuf, whose first byte is 0x0a
    kind, packages = ("SentencePiece", ("sentencepiece", "protobuf")) if data[0] == 0x0A else ("tiktoken", ("tiktoken",))
    missing = [package for package in packages if _absent(package)]
    if missing:
        return (f"its tokenizer is a {kind} file alone ({file}), which takes a package that is not installed: pip install "
                f"{' '.join(missing)}; or give a copy with tokenizer.json")
    return None


def _no_json(path: Path) -> str | None:
    """What keeps a file from being a JSON object, in words; None where nothing does."""
    try:
        data = path.read_bytes()
        if data.startswith(LFS):
            return f"is {POINTER}"
        return None if isinstance(json.loads(data), dict) else "holds no JSON object"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    except ValueError as e:
        return "is empty" if not data else f"is not valid JSON ({first_line(e)})"


def _absent(package: str) -> bool:
    try:
        return not version(package)
    except PackageNotFoundError:
        return True


def check_tokenizer(name: str, tokenizer, rows: int | None, ends: Collection[int]) -> None:
    """Raise UserError where `tokenizer` and a model of `rows` embedding rows, whose files name the end tokens `ends`, do
    not belong together."""
    if tokenizer.eos_token_id is None and not ends:
        raise UserError(f"--model {name}: no end token: tokenizer_config.json has no eos_token and neither config.json nor "
                        "generation_config.json an eos_token_id, so that no response would ever end; write \"eos_token\" "
                        "into tokenizer_config.json")
    if rows is None:
        return
    ids = tokenizer.get_vocab()
    beyond = {token: i for token, i in ids.items() if i >= rows}
    if beyond := {token: beyond[token] for token in _can_occur(tokenizer, beyond)}:
        token, i = max(beyond.items(), key=lambda item: (item[1], item[0]))
        raise UserError(f"--model {name}: the tokenizer's token {token!r} has id {i}, and the model has {rows} rows (ids 0 "
                        f"to {rows - 1}): {len(beyond)} of {len(ids)} tokens lie beyond it; give the tokenizer that the "
                        f"model was trained with, or rows for them (model.resize_token_embeddings({i + 1}), saved)")
    if len(unsaid(tokenizer, rows)) > (1 - LEAST) * rows:
        raise UserError(f"--model {name}: the tokenizer has {len(ids)} tokens and the model {rows} rows: a tokenizer of "
                        "another model; copy the model's own tokenizer files into the folder")


def _can_occur(tokenizer, tokens: Collection[str]) -> list[str]:
    """Those of `tokens` that can get into what a model reads. Control tokens cannot, by a text (it is refused) or a
    response (they are taken out), unless the chat template spells them or they pad, begin, end or stand for the unknown:
    Gemma 3 1B's tokenizer has an <image_soft_token> beyond the model's rows, which nothing ever writes."""
    from repro.models.template import control_tokens

    controls, template = set(control_tokens(tokenizer)) if tokens else set(), str(tokenizer.chat_template or "")
    named = {tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    return [token for token in tokens if token in named or token not in controls or token in template]


def unsaid(tokenizer, rows: int) -> list[int]:
    """Ids of a model's rows that the tokenizer has no token for, as padded vocabularies have: they decode to nothing."""
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))
