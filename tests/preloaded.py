"""What forked.py's children need, imported once, with the garbage collector told that it stays."""

import gc

import test_experiments  # noqa: F401
import test_fsdp  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

gc.collect()
gc.freeze()
