#!/usr/bin/env bash
# generate(generation_config=mine) is not mine alone: what it leaves open comes from the model's own
#
# One would expect a GenerationConfig that is passed to `generate` to be all that counts. What it leaves unset is filled from
# `model.generation_config`, which `from_pretrained` reads from the generation_config.json beside the weights: a repetition
# penalty, beams or forbidden tokens there change what "greedy" says, although the config that was passed names none.
#
# Seen with torch 2.13.0, transformers 5.23.0 on a CPU:
# greedy, 12 tokens, the same config passed both times; with a repetition penalty in the model's own: other tokens
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
warnings.simplefilter("ignore")
torch.manual_seed(0)

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, initializer_range=0.5)).eval()
prompt = torch.randint(3, 64, (1, 6))
mine = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
first = model.generate(prompt, generation_config=mine)
model.generation_config.repetition_penalty = 5.0
second = model.generate(prompt, generation_config=mine)
model.generation_config = GenerationConfig()
third = model.generate(prompt, generation_config=mine)
print("as it was:", first[0, 6:].tolist())
print("with a penalty in model.generation_config:", second[0, 6:].tolist())
assert not torch.equal(first, second) and torch.equal(first, third) and mine.repetition_penalty is None
PYTHON
