#!/usr/bin/env bash
# DPO's reference is the model that was passed, or the one at its path, by a setting that should only save memory
#
# One would expect TRL's DPOTrainer, given a model and no `ref_model`, to hold its reference as the model was when it was
# passed, and `precompute_ref_log_probs` to change when the reference is computed, not which one it is. Without it the
# reference is loaded again from `config._name_or_path`; with it, it is the model in memory. Where weights have changed since
# they were loaded (a first stage of training, a merge, new rows of the embedding) the two differ: at the first step one
# loss is log 2, the other is not, and nothing is said.
#
# Seen with trl 1.16.0, torch 2.13.0, transformers 5.23.0 on a CPU:
# precompute_ref_log_probs=True: loss of the first step 0.693
# precompute_ref_log_probs=False: loss of the first step 0.654
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import math
import warnings

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

logging.set_verbosity_error()
logging.disable_progress_bar()
disable_progress_bars()
warnings.simplefilter("ignore")

words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(["<end>", "<pad>", *"abcdef"])}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
rows = Dataset.from_list([{"prompt": "a b", "chosen": " c d e", "rejected": " f d c"}] * 2)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4)).save_pretrained("model")
losses = {}
for precompute in (True, False):
    model = LlamaForCausalLM.from_pretrained("model", dtype="float32")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # as after a first stage of training
            parameter += 0.1 * torch.randn(parameter.shape)
    trainer = DPOTrainer(model=model, train_dataset=rows, processing_class=tokenizer, args=DPOConfig(
        output_dir="out", max_steps=1, per_device_train_batch_size=2, precompute_ref_log_probs=precompute, logging_steps=1,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses[precompute] = float(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    print(f"precompute_ref_log_probs={precompute}: loss of the first step {losses[precompute]:.3f}")
assert abs(losses[True] - math.log(2)) < 1e-3 < abs(losses[False] - math.log(2))
PYTHON
