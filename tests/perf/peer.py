"""A step on exp2 mini's pairs, SAMI here against DPO by TRL's DPOTrainer, interleaved.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl
    .venv/bin/python tests/perf/peer.py --trl /tmp/trl/bin/python [--pairs 5] [--queries 4] > peer.json

A query is two DPO pairs, under its two prompts: each response is chosen under its own and rejected under the other. The same
model (SmolLM2-135M), texts, float32 and machine; TRL's reference log-probs are computed before. Timed on both sides: forward
and backward, without the update. TRL once as it is by default, with gradient checkpointing, and once without; it scores an end
token a response, ours none. Peak memory is the process's own, its import included. A benchmark, not a test.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def peak_gib() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def train_by_trl(given: dict) -> None:
    """One step a line of stdin; answers with its seconds and the peak so far."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    answers, sys.stdout = sys.stdout, sys.stderr

    class Paced(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            sys.stdin.readline()
            self.started = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, **_):
            print(json.dumps([time.perf_counter() - self.started, peak_gib()]), file=answers, flush=True)

    rows = given["rows"]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(rows), max_steps=given["steps"], bf16=False, use_cpu=True,
        gradient_checkpointing=given["checkpointing"], precompute_ref_log_probs=True, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_steps=1000, max_grad_norm=0.0, learning_rate=1e-6, optim="rmsprop")
    trainer = DPOTrainer(model=AutoModelForCausalLM.from_pretrained(given["model"], dtype="float32"), args=config,
                         train_dataset=Dataset.from_list(rows), callbacks=[Paced()],
                         processing_class=AutoTokenizer.from_pretrained(given["model"]))
    trainer.train()


def train_here(given: dict) -> None:
    import torch

    from repro.core import logprobs
    from repro.core.loop import PACK_TOKENS
    from repro.core.losses import symmetric_infonce
    from repro.core.tree import Scored
    from repro.models import load

    model = load.load_model(given["model"], dtype="float32")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-6)
    logprobs.settled(model, "shared")
    queries = [[[Scored(ids, start) for ids, start in group] for group in query] for query in given["queries"]]
    for _ in sys.stdin:
        optimizer.zero_grad()
        start = time.perf_counter()
        for part in logprobs.slices([logprobs.packed_tokens(pairs) for pairs in queries], PACK_TOKENS["cpu"]):
            symmetric_infonce(logprobs.matrix_of("shared", model, queries[part], length_normalize=True)).backward()
        print(json.dumps([time.perf_counter() - start, peak_gib()]), flush=True)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", help="the Python of an environment with trl")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        given = json.loads(args.work.read_text())
        return train_by_trl(given) if "rows" in given else train_here(given)

    from trees import Texts
    texts = Texts("exp2")
    chosen = texts.items[:: len(texts.items) // args.queries][: args.queries]
    prompts, responses = texts.answered(chosen, 2)
    said = texts.tokenizer.decode
    rows = [{"prompt": said(p), "chosen": said(r[k]), "rejected": said(r[1 - k])}
            for own, r in zip(prompts, responses) for k, p in enumerate(own)]
    queries = [[[(p + x, len(p)) for x in r] for p in own] for own, r in zip(prompts, responses)]
    shared = {"model": texts.voice.place, "steps": args.pairs + 1}
    del texts.model
    kinds = {"here": (sys.executable, shared | {"queries": queries}),
             "trl": (args.trl, shared | {"rows": rows, "checkpointing": True}),
             "trl, without checkpointing": (args.trl, shared | {"rows": rows, "checkpointing": False})}
    workers = {}
    for name, (python, given) in kinds.items():
        file = Path(tempfile.mkdtemp()) / "work.json"
        file.write_text(json.dumps(given))
        log = open(file.with_name("log"), "w")
        workers[name] = subprocess.Popen([python, __file__, "--work", file], text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=log,
                                         env={"PYTHONPATH": str(HERE), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())})
        workers[name].log = log.name

    def one(name: str) -> list:
        worker = workers[name]
        print("step", file=worker.stdin, flush=True)
        line = worker.stdout.readline()
        if not line:
            raise SystemExit(f"{name} ended:\n{Path(worker.log).read_text()[-3000:]}")
        print(name, line.strip(), file=sys.stderr, flush=True)
        return json.loads(line)

    for name in workers:
        one(name)  # warm
    found = {name: [] for name in workers}
    for k in range(args.pairs):
        order = list(workers)
        for name in order[k % 3:] + order[: k % 3]:
            found[name].append(one(name))
    result = {"benchmark": "peer", "queries": len(queries), "pairs": args.pairs, "machine": platform.machine(), "rows": {}}
    for name, steps in found.items():
        ratios = [s / o for (s, _), (o, _) in zip(steps, found["here"])]
        result["rows"][name] = row = {"seconds": statistics.median(s for s, _ in steps), "peak_gib": steps[-1][1],
                                      "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        print(f"{name:28s} {row['seconds']:.2f} s a step of {len(queries)} queries, {row['ratio']:.2f} times ours "
              f"[{min(ratios):.2f}, {max(ratios):.2f}], peak {row['peak_gib']:.2f} GiB", file=sys.stderr)
    versions = subprocess.run([args.trl, "-c", "import trl, torch, transformers as t; print(trl.__version__, t.__version__, "
                               "torch.__version__)"], text=True, capture_output=True, check=True).stdout.split()
    print(json.dumps(result | {"versions": dict(zip(("trl", "transformers", "torch"), versions))}))


if __name__ == "__main__":
    main()
