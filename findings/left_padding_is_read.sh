#!/usr/bin/env bash
# RWKV and BART's decoder read left padding: in a batch a short prompt is continued otherwise than alone
#
# One would expect `generate` with `padding_side="left"` and an attention mask to continue each prompt of a batch as it does
# alone: that is how decoder-only models are sampled. RWKV's recurrence takes no mask, so the pads are read; BART's decoder
# (and those made like it: Marian, Pegasus, mBART, ...) counts positions from the row's start, so a padded prompt stands
# elsewhere. Neither says so. Sampled one at a time both are right.
#
# Seen with torch 2.13.0, transformers 5.23.0 on a CPU:
# rwkv: behind 4 masked pads the next token's logits move by 1.09 of their standard deviation
# bart: behind 4 masked pads the next token's logits move by 0.59 of their standard deviation
# llama: behind 4 masked pads the next token's logits move by 0.00 of their standard deviation
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import torch
import transformers
from transformers.utils import logging

logging.set_verbosity_error()
warnings.simplefilter("ignore")
torch.manual_seed(0)

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
MODELS = {
    "rwkv": transformers.RwkvForCausalLM(transformers.RwkvConfig(
        **SIZE, attention_hidden_size=32, intermediate_size=48, context_length=64)),
    "bart": transformers.BartForCausalLM(transformers.BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, is_encoder_decoder=False,
        is_decoder=True, max_position_embeddings=64)),
    "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SIZE, intermediate_size=48, num_attention_heads=4))}
prompt = torch.randint(3, 64, (1, 5))
padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
mask = torch.tensor([[0] * 4 + [1] * 5])
for name, model in MODELS.items():
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    plain = transformers.GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None,
                                          output_logits=True, return_dict_in_generate=True)
    model.generation_config = transformers.GenerationConfig()
    alone, = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=plain).logits
    behind, = model.generate(padded, attention_mask=mask, generation_config=plain).logits
    moved = ((alone - behind).abs().max() / alone.std()).item()
    print(f"{name}: behind 4 masked pads the next token's logits move by {moved:.2f} of their standard deviation")
    assert moved < 0.01 if name == "llama" else moved > 0.1
PYTHON
