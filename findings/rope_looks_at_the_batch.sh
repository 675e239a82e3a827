#!/usr/bin/env bash
# RoPE of the kinds longrope and dynamic: a text's logits depend on the longest text of its batch
#
# One would expect that a causal model gives a text the same logits alone and beside another one, padded and masked. With
# these two kinds of RoPE the frequencies of the whole batch are chosen by its largest position: beside one text beyond the
# original context every other text is computed with the long context's frequencies too. Padded training batches, packed
# sequences and evaluations in batches all change numbers with what happens to stand beside. Within the original context
# nothing does.
#
# Seen with torch 2.13.0, transformers 5.23.0 on a CPU:
# longrope: beside a longer text the logits of a short one differ by 13.1; beside one within the context by 0.0
# dynamic: beside a longer text the logits of a short one differ by 2.8; beside one within the context by 0.0
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

KINDS = {
    "longrope": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 4,
                 "long_factor": [3.0] * 4, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}
for kind, rope in KINDS.items():
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.5, max_position_embeddings=64 if kind == "longrope" else 16, rope_parameters=rope)).eval()
    short = torch.randint(3, 64, (1, 10))
    differences = []
    for length in (40, 14):  # beyond the original context of 16, and within it
        other, rest = torch.randint(3, 64, (1, length)), length - 10
        ids = torch.cat([other, torch.cat([short, torch.zeros(1, rest, dtype=torch.long)], 1)])
        mask = torch.ones_like(ids)
        mask[1, 10:] = 0
        with torch.no_grad():
            alone = model(short).logits
            differences.append((model(ids, attention_mask=mask).logits[1:, :10] - alone).abs().max().item())
    beyond, within = differences
    print(f"{kind}: beside a longer text the logits of a short one differ by {beyond:.1f}; beside one within the context "
          f"by {within:.1f}")
    assert beyond > 1 and within < 1e-4
PYTHON
