#!/usr/bin/env bash
# Activation checkpointing is switched on, and does nothing in eval mode, without a word
#
# One would expect a model whose activation (gradient) checkpointing is enabled to keep no activations inside its layers. The
# layers look at `self.training`: in eval mode, which is how one trains without dropout, everything is kept, no warning is
# given, and `is_activation_checkpointing` is still true. The memory that was counted on is not there.
#
# Seen with torch 2.13.0, transformers 5.23.0 on a CPU:
# computations of a layer's MLP in a step, by mode: {'train': 2, 'eval': 1}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
warnings.simplefilter("ignore")
torch.manual_seed(0)

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4))
model.activation_checkpointing_enable()
times = []
for layer in model.model.layers:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x, forward=forward: times.append(1) or forward(x)
found = {}
for mode in (True, False):
    model.train(mode)
    times.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randint(0, 64, (1, 9)), use_cache=False).logits.sum().backward()
    found["train" if mode else "eval"] = len(times) // 2
    assert model.is_activation_checkpointing
print(f"computations of a layer's MLP in a step, by mode: {found}")
assert found == {"train": 2, "eval": 1}
PYTHON
