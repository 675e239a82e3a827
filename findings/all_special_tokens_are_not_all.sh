#!/usr/bin/env bash
# tokenizer.all_special_tokens lists the named ones alone; decode(skip_special_tokens=True) skips more
#
# One would expect `all_special_tokens` and `all_special_ids` to hold every token that the tokenizer treats as special. They
# hold those with a name of their own (eos, unk, ...); a token that was added with `special=True`
# is in neither, yet it is matched whole in any text and vanishes in `decode(..., skip_special_tokens=True)`. A check of
# texts for control tokens that goes by this list misses most of them (SmolLM2: 3 of 17). All are in
# `added_tokens_decoder`.
#
# Seen with transformers 5.23.0, tokenizers as it brings on a CPU:
# all_special_tokens: ['<eos>', '<unk>']; special in added_tokens_decoder: ['<eos>', '<file>', '<tool>', '<unk>']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
warnings.simplefilter("ignore")
torch.manual_seed(0)

words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("<file>", special=True)])
named = sorted(tokenizer.all_special_tokens)
special = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
ids = tokenizer("<tool>").input_ids
print(f"all_special_tokens: {named}; special in added_tokens_decoder: {special}")
assert named == ["<eos>", "<unk>"] and special == ["<eos>", "<file>", "<tool>", "<unk>"]
assert len(ids) == 1 and ids[0] not in tokenizer.all_special_ids
assert tokenizer.decode(ids, skip_special_tokens=True) == "" and tokenizer.decode(ids) == "<tool>"
PYTHON
