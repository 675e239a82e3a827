"""What a step costs, exactly: FLOPs, bytes held for the backward, peak bytes, operations, and the largest logits made."""

import contextlib
import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 49152


def smollm2(layers: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """SmolLM2-135M's shape (30 layers) with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True))


class Watch(TorchDispatchMode):
    """Counts operations, follows the bytes of the tensors they make, and the rows of the largest [..., vocabulary]."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows, self.operations, self.live, self.peak, self.known = vocabulary, 0, 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        inputs = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs))
                  if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known and key not in inputs:
                self.known.add(key)  # new memory, not a view: W^T is no logits
                if t.ndim >= 2 and t.shape[-1] == self.vocabulary:
                    self.rows = max(self.rows, t.numel() // self.vocabulary)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, key, size)
        return out

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd holds for the backward, each storage once, weights left out."""

    def __init__(self, weights: set[int]):
        self.storages: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def costs(step, weights, vocabulary: int = VOCABULARY) -> dict[str, int]:
    """The costs of `step()`, a forward and backward that leaves its gradients in `weights` (they are dropped)."""
    saved = Saved({w.untyped_storage().data_ptr() for w in weights})
    gc.collect()
    gc.disable()  # cycles are collected when it pleases the collector: the peak would depend on it
    with contextlib.ExitStack() as stack:
        stack.callback(gc.enable)
        flops = stack.enter_context(FlopCounterMode(display=False))
        watch = stack.enter_context(Watch(vocabulary))
        stack.enter_context(saved)
        step()
    for w in weights:
        w.grad = None
    return {"flops": flops.get_total_flops(), "saved_bytes": sum(saved.storages.values()), "peak_bytes": watch.peak,
            "operations": watch.operations, "logit_rows": watch.rows}
