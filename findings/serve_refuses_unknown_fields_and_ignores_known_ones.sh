#!/usr/bin/env bash
# `transformers serve` refuses a field that it does not know, and ignores fields that it takes
#
# A server that answers 422 to an unknown field of a request seems to say that it obeys the others. `temperature`, `n`, `stop`,
# `logprobs` and `response_format` are taken with a 200 and change nothing: greedy text, one choice, past the stop string, no
# log-probs, no schema. So a judge that samples three verdicts at temperature 1 gets one verdict three times, and a base model's
# answer runs on past the text that should end it. A prompt longer than the model's positions is answered, too.
#
# Seen with torch 2.13.0, transformers 5.23.0 (its extra `serving`) on a CPU, a random model of two layers:
# no_such_field 422; temperature 1.5 under three seeds: the greedy text each time; n 3: one choice; stop: the answer goes on;
# logprobs: none; response_format: no JSON; a prompt of 300 tokens to a model of 256 positions: 200
set -euo pipefail
folder=$(mktemp -d)
trap 'kill %1 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 'transformers[serving]==5.23.0'
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE(vocab={c: k for k, c in enumerate([*letters, "<end>"])}, merges=[]))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters) + 1, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                     max_position_embeddings=256, initializer_range=0.3, eos_token_id=len(letters), bos_token_id=None))
model.save_pretrained("model")
tokenizer.save_pretrained("model")
PYTHON
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
HF_HUB_OFFLINE=1 venv/bin/python -m transformers.cli.transformers serve "$folder/model" --host 127.0.0.1 --port "$port" --device cpu > log 2>&1 &
venv/bin/python - "$port" "$folder/model" <<'PYTHON'
import json
import sys
import time
import urllib.error
import urllib.request

port, model = sys.argv[1:]


def post(path, **body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", json.dumps({"model": model} | body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def text(**body):
    status, answer = post("completions", prompt="What is a river?", max_tokens=24, **body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


for _ in range(300):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        break
    except OSError:
        time.sleep(0.2)
unknown, _ = post("completions", prompt="a", max_tokens=1, no_such_field=1)
greedy = text(temperature=0)
hot = {text(temperature=1.5, seed=k) for k in (1, 2, 3)}
_, many = post("completions", prompt="a", max_tokens=4, n=3)
ended = text(temperature=0, stop=[greedy[5:8]])
_, scored = post("completions", prompt="a", max_tokens=4, logprobs=2)
shape = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
status, kept = post("chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=8,
                    response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": shape}})
beyond, _ = post("completions", prompt="w" * 300, max_tokens=2)
print("an unknown field:", unknown)
print("temperature 1.5, three seeds: the greedy text each time:", hot == {greedy})
print("n 3:", len(many["choices"]), "choice")
print("stop: cut there:", greedy[5:8] not in ended)
print("logprobs:", scored["choices"][0].get("logprobs"))
print("response_format:", status, "begins with {:", kept["choices"][0]["message"]["content"].lstrip().startswith("{"))
print("300 tokens to 256 positions:", beyond)
assert unknown == 422 and hot == {greedy} and len(many["choices"]) == 1 and ended == greedy and beyond == 200
assert not scored["choices"][0].get("logprobs") and status == 200 and not kept["choices"][0]["message"]["content"].lstrip().startswith("{")
PYTHON
