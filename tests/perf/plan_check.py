"""The byte model of `repro plan` (repro/plan/gpus.py) against the measured peak of a training step on a CPU.

    .venv/bin/python tests/perf/plan_check.py [--only NAME ...] [--out results/bench/plan_check.json]

Small models with random weights, each setting in a process of its own: two updates of two packs of one query each go
through `repro.core.loop.train`, so that gradients and the optimizer's state are in place in the last pack. By kind: weights, gradients and
optimizer state are the bytes of those tensors; activations and scored rows what autograd keeps of a pack. Peaks: of the
bytes of all live tensors, counted at each operation, and of the process (VmHWM less what it had before the model).
Prints predicted / measured and one JSON object last. A benchmark, not a test; what only many ranks or a GPU need is not
in it.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from costs import Saved, Watch, smollm2
from step import Ids, resident, texts
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from repro.base.identity import commit
from repro.base.records import write_json
from repro.base.training import LoraSpec, TrainSpec
from repro.core import engines, logprobs, loop, lora, memory
from repro.core.memory import Step, peak, training_bytes
from repro.core.shapes import counted
from repro.core.tree import packed_tokens, whole_tokens

TINY = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 4096}


def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))


def tiny_mixtral():
    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))


MODELS = {"smollm2-135m": lambda: smollm2(layers=30), "tiny-llama": tiny_llama, "tiny-mixtral": tiny_mixtral}
CASES = [  # model, precision, optimizer, checkpointing, tokens of a prompt and of a response, rank of adapters
    ("smollm2-135m", "fp32_master", "rmsprop", False, 150, 40),
    ("smollm2-135m", "fp32_master", "rmsprop", False, 150, 40, 8),
    ("smollm2-135m", "fp32_master", "adamw", True, 150, 40),
    ("smollm2-135m", "bf16", "rmsprop", False, 150, 40),
    ("tiny-llama", "fp32", "rmsprop", False, 600, 200),
    ("tiny-llama", "fp32", "adamw", True, 600, 200),
    ("tiny-llama", "bf16", "adamw", False, 600, 200),
    ("tiny-llama", "fp32", "adamw", False, 600, 200, 8),
    ("tiny-mixtral", "fp32", "adamw", False, 600, 200),
    ("tiny-mixtral", "fp32", "rmsprop", True, 600, 200),
    ("tiny-mixtral", "bf16", "rmsprop", False, 600, 200)]


def warm_up(name: str, spec: TrainSpec) -> None:
    """Load what a first step loads, so that only the model's own bytes are measured after it."""
    size = TINY | {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**size)) if name != "tiny-mixtral" else MixtralForCausalLM(
        MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2))
    pair = engines.TrainingPair("q", (" 5 6 7", " 6 7 8"), (" 8 9", " 9"))
    loop.train(prepared(model, spec), Ids(), [pair], replace(spec, batch_size=1, batches=1), 1)


def prepared(model, spec: TrainSpec):
    """The model as a worker has it before it trains."""
    model.to(getattr(torch, engines.weights_dtype(spec)))
    if spec.lora:
        lora.put_into(model, spec.lora, half=spec.precision == "bf16", seed="0")
    return model


def measure(name: str, precision: str, optimizer: str, checkpointing: bool, prompt: int, response: int, rank: int = 0,
            backend: str = "shared") -> dict:
    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), Ids()
    spec = TrainSpec(precision=precision, optimizer=optimizer, batch_size=2, batches=2,
                     lora=LoraSpec(rank=rank, alpha=2 * rank) if rank else None)
    warm_up(name, spec)
    before = resident("VmRSS")
    model = prepared(MODELS[name](), spec)
    shape = counted(model)
    vocabulary = model.config.vocab_size

    def ids(n, length):
        return tuple(" " + " ".join(str(int(x) % vocabulary) for x in text.split()) for text in texts(rng, n, length, False))

    pairs = [engines.TrainingPair(f"q{k}", ids(2, prompt), ids(2, response)) for k in range(4)]
    optimizers, make = [], loop._optimizer
    loop._optimizer = lambda *a: optimizers.append(make(*a)) or optimizers[-1]
    if checkpointing:
        memory.usable_bytes = lambda device: 0
    ids = engines.ids_of(tokenizer, pairs, score_eos=False)
    tokens = max(map(whole_tokens if backend == "reference" else packed_tokens, ids))
    spec = replace(spec, pack_tokens=tokens)  # a query a pass, as the step below says
    step = Step(ranks=1, precision=precision, optimizer=optimizer, pack_tokens=tokens, scored=4 * response, longest=tokens,
                device="cpu", lora=rank, way=backend)

    way = engines.settle(model, backend)  # tried once
    with Watch(vocabulary) as watch:
        loop.train(model, tokenizer, pairs, spec, 1, backend=backend)
    process = resident("VmHWM") - before
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    state = sum(t.nbytes for s in optimizers[0].state.values() for t in s.values() if torch.is_tensor(t))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    live = watch.peak + sum(weights.values())

    saved = Saved(set(weights))
    rows = {}
    keep = saved.pack_hook
    saved.pack_hook = lambda t: rows.update({t.untyped_storage().data_ptr(): t.nbytes} if
                                            t.shape[-1:] == (vocabulary,) and t.untyped_storage().data_ptr() not in weights
                                            and t.numel() > vocabulary else {}) or keep(t)
    with engines.matmul_precision(model, precision), memory.activation_checkpointing(model, shape, step), saved:
        logprobs.matrix_of(way, model, ids[:1], length_normalize=True)
    kept = {k: v for k, v in saved.storages.items() if k not in rows}

    phases = training_bytes(shape, replace(step, checkpointing=checkpointing))
    moment, predicted = peak(phases)
    backward = phases["head"]
    own = backward["head: scored rows"] if rank else 0  # a frozen head's rows have the hidden size, like other activations
    kinds = {"weights": (sum(backward.get(k, 0) for k in ("weights", "master weights", "adapters")), sum(weights.values())),
             "gradients": (backward["gradients"], gradients), "optimizer state": (backward["optimizer state"], state),
             "activations kept": (backward["activations"] + own, sum(kept.values())),
             "head: scored rows": (backward["head: scored rows"] - own, sum(rows.values())),
             "peak of live tensors": (predicted, live), "peak of the process": (predicted, process)}
    return {"model": name, "precision": precision, "optimizer": optimizer, "checkpointing": checkpointing,
            "lora": rank, "pack_tokens": tokens, "scored": 4 * response, "moment": moment,
            "kinds": {k: {"predicted": p, "measured": m, "ratio": p / m if m else None} for k, (p, m) in kinds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        return print(json.dumps(measure(*CASES[args.case])))
    rows = []
    for k, case in enumerate(CASES):
        if case[0] not in args.only:
            continue
        done = subprocess.run([sys.executable, __file__, "--case", str(k)], text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{' '.join(map(str, case[:3]))}{' checkpointing' * case[3]}{' LoRA' * (len(case) > 6)}: " + ", ".join(
            f"{kind} {r['predicted'] / 1e6:.1f} / {r['measured'] / 1e6:.1f} MB" + (f" = {r['ratio']:.2f}" if r["ratio"] else "")
            for kind, r in rows[-1]["kinds"].items()), file=sys.stderr, flush=True)
    record = {"benchmark": "plan_check", "rows": rows, "torch": torch.__version__, "transformers": transformers.__version__,
              "python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads(),
              "commit": commit()}
    if args.out:
        write_json(args.out, record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
