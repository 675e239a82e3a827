"""Fails when a change makes the suite slower: exact costs, compiled kernels, and the wall time's ratio to the reference.

    .venv/bin/python tests/perf/check.py [--rebaseline [costs]] [--plant recompute-prompt|recompute-query|full-logits|
                                   registers]

First the shared path must equal the reference. Then, against results/bench/check.json: tokens, FLOPs, bytes held for the
backward, peak bytes and operations of a step may not grow by one, and no logits are made but for scored tokens; the
Triton kernels as in aot.py; and reference / shared wall time, interleaved, may not fall below the baseline by more than
noise. The noise is measured: the spread of the baseline's own repetitions (LEAST at least), and the error of this run's
median; Z of them are allowed, and MARGIN more on a processor other than the baseline's, but MOST in all: on a disturbed
machine the noise would excuse anything. Below in each of ATTEMPTS measurements is a fault. `--rebaseline` writes the baseline anew, `--rebaseline costs` all but the ratios;
`--plant` makes one thing slower on purpose, to see the check fail. Prints one JSON object last; exits with 1 on a fault.
"""

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from costs import VOCABULARY, costs, smollm2
from step import Ids, texts

from repro.core.engines import matmul_precision
from repro.core.logprobs import logprob_matrix
from repro.core.losses import symmetric_infonce

BASELINE = Path(__file__).resolve().parents[2] / "results" / "bench" / "check.json"
LAYERS, PROMPT, COMMON, RESPONSE, PAIRS, REPETITIONS = 4, 72, 48, 12, 7, 6
Z, MARGIN, LEAST, MOST, ATTEMPTS = 4.0, 0.15, 0.06, 0.40, 3


def processor() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(
        "model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return f"{names[0]}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


class Case:
    """One query of C x C sequences at SmolLM2's widths, LAYERS layers; of each prompt, COMMON tokens are the query's."""

    def __init__(self, model, C: int, plant: str | None):
        rng = random.Random(C)
        self.model, self.C, self.plant = model, C, plant
        (query,) = texts(rng, 1, COMMON, False)
        self.prompts = [query + own for own in texts(rng, C, PROMPT - COMMON, True)]
        self.responses = texts(rng, C, RESPONSE, True)
        self.scored = C * sum(len(r.split()) for r in self.responses)

    def step(self, backend: str) -> float:
        parts = [(self.prompts, self.responses)]
        plant = self.plant if backend == "shared" else None
        if plant == "recompute-prompt":
            parts = [(self.prompts, [response]) for response in self.responses]
        elif plant == "recompute-query":
            parts = [([prompt], self.responses) for prompt in self.prompts]
        matrix = torch.cat([logprob_matrix(self.model, Ids(), [prompts], [responses], length_normalize=True, score_eos=False,
                                           backend=backend) for prompts, responses in parts],
                           1 if plant == "recompute-query" else 2)
        loss = symmetric_infonce(matrix)
        loss.backward()
        return loss.item()

    def costs(self, backend: str) -> dict[str, int]:
        tokens = []
        hook = self.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
        found = costs(lambda: self.step(backend), list(self.model.parameters()))
        hook.remove()
        return found | {"tokens": sum(tokens)}

    def gradient(self, backend: str) -> tuple[float, torch.Tensor]:
        self.model.zero_grad()
        loss = self.step(backend)
        return loss, torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def ratios(self, pairs: int) -> list[float]:
        seconds = {"reference": [], "shared": []}
        for k in range(pairs + 1):  # the first is for warming up
            for backend in seconds:
                self.model.zero_grad()
                start = time.perf_counter()
                self.step(backend)
                if k:
                    seconds[backend].append(time.perf_counter() - start)
        return [r / s for r, s in zip(seconds["reference"], seconds["shared"])]


def spread(values: list[float]) -> float:
    """Standard deviation by the median absolute deviation: one repetition that another program disturbed is no noise."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(v - middle) for v in values)


def error_of_median(values: list[float]) -> float:
    """Standard error of the median, as for a normal distribution."""
    return 1.2533 * spread(values) / math.sqrt(len(values))


def band(known: list[float], logs: list[float], same_processor: bool) -> float:
    """By how much the median of `logs` (log ratios) may lie below that of `known`, the baseline's repetitions."""
    noise = Z * math.hypot(max(spread(known), LEAST), error_of_median(logs))
    return min(MOST, noise + (0 if same_processor else MARGIN))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rebaseline", nargs="?", const="all", choices=("all", "costs"))
    parser.add_argument("--plant", choices=("recompute-prompt", "recompute-query", "full-logits", "registers"))
    args = parser.parse_args()
    if args.plant and args.rebaseline:
        parser.error("a planted fault is no baseline")
    started, faults, record = time.time(), [], {}
    old = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}

    def fault(line: str) -> None:
        faults.append(line)
        print("FAULT", line, flush=True)

    model = smollm2(LAYERS)
    if args.plant == "full-logits":
        def every_logit(module, args, output) -> None:
            model.lm_head(output[0])

        model.model.register_forward_hook(every_logit)
    with matmul_precision(model, "fp32"):
        for C in (2, 4):
            case = Case(model, C, args.plant)
            (a, x), (b, y) = case.gradient("reference"), case.gradient("shared")
            apart = ((x - y).norm() / x.norm()).item()
            if abs(a - b) > 1e-5 or apart > 1e-4:
                fault(f"{C} x {C}: shared differs from the reference: loss {a} and {b}, gradient by {apart:.1e}; no cost matters")
                return 1
            model.zero_grad(set_to_none=True)
            found = {backend: case.costs(backend) for backend in ("reference", "shared")}
            shared = found["shared"]
            if shared["logit_rows"] > case.scored:
                fault(f"{C} x {C}: logits [{shared['logit_rows']}, {VOCABULARY}] were made; {case.scored} tokens are scored")
            before = old.get("costs", {}).get(torch.__version__, {}).get(f"{C}x{C}", {}).get("shared", {})
            for name in ("tokens", "flops", "saved_bytes", "peak_bytes", "operations"):
                if name not in before:
                    if not args.rebaseline:
                        fault(f"{C} x {C}: no baseline of {name} for torch {torch.__version__}: --rebaseline")
                elif shared[name] > before[name]:
                    fault(f"{C} x {C}: {name} {before[name]} -> {shared[name]}")
                elif shared[name] < before[name]:
                    print(f"better, {C} x {C}: {name} {before[name]} -> {shared[name]} (--rebaseline keeps it)")
            record[f"{C}x{C}"] = found
    print(f"costs: {time.time() - started:.0f} s", flush=True)

    if platform.system() == "Linux" and platform.machine() == "x86_64":
        command = [sys.executable, str(Path(__file__).with_name("aot.py")), "--quiet"]
        command += ["--rebaseline"] * bool(args.rebaseline) + ["--plant"] * (args.plant == "registers")
        result = subprocess.run(command, capture_output=True, text=True)
        for line in result.stdout.splitlines() or [result.stderr] * bool(result.returncode):
            fault(line)
        print(f"compiled kernels: {time.time() - started:.0f} s", flush=True)
    else:
        print("compiled kernels: NOT RUN, Triton is built for Linux")

    ratio = {}
    with matmul_precision(model, "fp32_master"):
        for C in (2, 4):
            case = Case(model, C, args.plant)
            before = old.get("ratio", {}).get(f"{C}x{C}")
            if args.rebaseline == "all":
                medians = [statistics.median(case.ratios(PAIRS)) for _ in range(REPETITIONS)]
                ratio[f"{C}x{C}"] = {"medians": medians, "pairs": PAIRS}
                print(f"{C} x {C}: reference / shared {statistics.median(medians):.3f}, repetitions {min(medians):.3f} "
                      f"to {max(medians):.3f}")
                continue
            if before is None:
                fault(f"{C} x {C}: no baseline of the ratio: --rebaseline")
                continue
            known = [math.log(m) for m in before["medians"]]
            for attempt in range(1, ATTEMPTS + 1):  # another program can disturb one; a slower path is slower in all
                logs = [math.log(r) for r in case.ratios(PAIRS)]
                allowed = band(known, logs, old["processor"] == processor())
                now, least = math.exp(statistics.median(logs)), math.exp(statistics.median(known) - allowed)
                ratio[f"{C}x{C}"] = {"now": now, "least": least, "pairs": PAIRS, "attempt": attempt}
                line = (f"{C} x {C}: reference / shared {now:.2f}; baseline {math.exp(statistics.median(known)):.2f}, "
                        f"least {least:.2f} (noise {allowed:.0%})")
                print(line, flush=True)
                if now >= least:
                    break
            else:
                fault(line)
    if args.rebaseline:
        new = old | {"layers": LAYERS, "prompt": PROMPT, "common": COMMON, "response": RESPONSE,
                     "costs": old.get("costs", {}) | {torch.__version__: record}}
        new |= {"processor": processor(), "ratio": ratio} if args.rebaseline == "all" else {}
        BASELINE.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"check": "fail" if faults else "pass", "faults": faults, "costs": record, "ratio": ratio,
                      "seconds": round(time.time() - started)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
