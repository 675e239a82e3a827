"""One SAMI step (log-probs, loss, backward): the shared path against the reference, interleaved in one process.

    .venv/bin/python tests/perf/step.py [--pairs 7] [--prompt 300] [--response 64] [--ragged] [--sizes 2 4]

SmolLM2-135M's shape with random weights. Prints a line a setting and one JSON object last: medians of seconds, their
ratio beside the ratio of counted FLOPs, the bytes that autograd holds for the backward, the process's peak above weights
and gradients (each path in a process of its own), and the share of the chip's own matrix rate. A benchmark, not a test:
nothing here passes or fails.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from costs import Saved, smollm2
from torch.utils.flop_counter import FlopCounterMode

from repro.base.identity import commit
from repro.core.engines import matmul_precision
from repro.core.logprobs import logprob_matrix
from repro.core.losses import symmetric_infonce


class Ids:
    """A tokenizer for texts that are lists of ids written out: the step without the tokeniser's time."""

    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text, add_special_tokens=False):
        self.input_ids = [int(x) for x in text.split()]
        return self


def texts(rng, n, length, ragged, vocabulary=49000, common=0):
    """`n` texts of about `length` tokens, of which the first `common` are the same in all."""
    def drawn(tokens):
        return " " + " ".join(str(rng.randrange(10, vocabulary)) for _ in range(tokens))

    beginning = drawn(common) if common else ""
    own = [round((length - common) * rng.uniform(0.5, 1.5)) if ragged else length - common for _ in range(n)]
    return [beginning + drawn(tokens) for tokens in own]


def matrix_rate() -> float:
    """GFLOP/s of a large product in the current precision."""
    a, b = torch.randn(2048, 1536), torch.randn(1536, 2048)
    a @ b
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * 1536 * 2048 / statistics.median(seconds) / 1e9


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def step(model, backend: str, prompts, responses) -> None:
    symmetric_infonce(logprob_matrix(model, Ids(), [prompts], [responses], length_normalize=True, score_eos=False,
                                     backend=backend)).backward()


def peak(backend: str, prompts, responses) -> None:
    """Prints the bytes that one step adds to weights and gradients at its peak."""
    model = smollm2(layers=30)
    with matmul_precision(model, "fp32_master"):
        step(model, backend, [" 5 6 7"] * 2, [" 8", " 9"])  # gradients exist, libraries are loaded
        before = resident("VmRSS")
        step(model, backend, prompts, responses)
    print(resident("VmHWM") - before)


def peaks(prompts, responses) -> dict:
    found = {}
    for backend in ("reference", "shared"):
        argument = json.dumps([backend, prompts, responses])
        out = subprocess.run([sys.executable, __file__, "--peak-of"], input=argument, text=True, capture_output=True,
                             check=True)
        found[backend] = int(out.stdout.split()[-1]) / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--peak-of", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return peak(*json.load(sys.stdin))
    model, rng, rows = smollm2(layers=30), random.Random(0), []
    cases = {C: [texts(rng, C, n, args.ragged) for n in (args.prompt, args.response)] for C in args.sizes}
    peak_gib = {C: peaks(*case) for C, case in cases.items()}
    for precision in ("fp32", "fp32_master"):
        with matmul_precision(model, precision):
            rate = matrix_rate()
            for C, case in cases.items():
                seconds, flops, memory = {}, {}, {}
                for backend in ("reference", "shared"):
                    saved = Saved({p.untyped_storage().data_ptr() for p in model.parameters()})
                    with FlopCounterMode(display=False) as counter, saved:
                        step(model, backend, *case)
                    flops[backend], seconds[backend] = counter.get_total_flops(), []
                    memory[backend] = sum(saved.storages.values()) / 2**30
                for _ in range(args.pairs):
                    for backend in ("reference", "shared"):
                        start = time.perf_counter()
                        step(model, backend, *case)
                        seconds[backend].append(time.perf_counter() - start)
                median = {k: statistics.median(v) for k, v in seconds.items()}
                pairs = [r / s for r, s in zip(seconds["reference"], seconds["shared"])]
                rows.append({
                    "precision": precision, "C": C, "R": C, "seconds": median, "flops": flops, "saved_gib": memory,
                    "peak_gib": peak_gib[C], "ratio": statistics.median(pairs), "ratio_min_max": [min(pairs), max(pairs)],
                    "flop_ratio": flops["reference"] / flops["shared"],
                    "saved_ratio": memory["reference"] / memory["shared"],
                    "peak_ratio": peak_gib[C]["reference"] / peak_gib[C]["shared"],
                    "share_of_matrix_rate": {k: flops[k] / median[k] / 1e9 / rate for k in median}})
                print(f"{precision:12s} C=R={C}: reference {median['reference']:.2f} s, shared {median['shared']:.2f} s, "
                      f"ratio {rows[-1]['ratio']:.2f} [{min(pairs):.2f}, {max(pairs):.2f}] (FLOPs "
                      f"{rows[-1]['flop_ratio']:.2f}), held for backward {rows[-1]['saved_ratio']:.2f} times less, peak "
                      f"{peak_gib[C]['reference']:.2f} -> {peak_gib[C]['shared']:.2f} GiB ({rows[-1]['peak_ratio']:.2f}), "
                      f"of the matrix rate {rows[-1]['share_of_matrix_rate']['shared']:.0%}", file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "step", "model": "smollm2-135m shape", "prompt": args.prompt,
                      "response": args.response, "ragged": args.ragged, "pairs": args.pairs,
                      "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__,
                      "commit": commit(), "peaks": "fp32_master", "rows": rows}))


if __name__ == "__main__":
    main()
