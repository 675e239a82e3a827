"""Fails when a change makes the suite slower: exact costs, compiled kernels, and CPU time against the reference.

    .venv/bin/python tests/perf/check.py [--rebaseline [costs]] [--must-tell] [--plant recompute-prompt|recompute-query|
                                   full-logits|registers|slower]

First the shared path must equal the reference. Then, against results/bench/check.json: tokens, FLOPs, bytes held for the
backward, peak bytes and operations of a step may not grow by one, and no logits are made but for scored tokens; the
Triton kernels as in aot.py; and a step's CPU time may not grow by a third (gate.py, which says "cannot tell" where the machine
is too busy: no fault, unless `--must-tell`). `--rebaseline` writes the baseline anew, that of times for this processor;
`--rebaseline costs` all but the times; `--plant` makes one thing slower on purpose, to see the check fail. Prints one JSON
object last; exits with 1 on a fault.
"""

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import gate
import torch
from costs import VOCABULARY, costs, smollm2
from step import Ids, texts

from repro.core.engines import matmul_precision
from repro.core.logprobs import logprob_matrix
from repro.core.losses import symmetric_infonce

BASELINE = Path(__file__).resolve().parents[2] / "results" / "bench" / "check.json"
LAYERS, PROMPT, COMMON, RESPONSE = 4, 72, 48, 12
TIMED_LAYERS, BASELINE_ROUNDS = 2, 40


def processor() -> str:
    """What a ratio of times depends on: makers give a name to several generations."""
    path = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", path.read_text(), re.MULTILINE)) if path.exists() else {}
    return ", ".join([facts.get("model name", platform.processor()), *(f"{k} {facts[k]}" for k in ("cpu family", "model") if k in facts),
                      torch.backends.cpu.get_cpu_capability()])


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


def steps(model, plant: str | None = None) -> dict[str, gate.Step]:
    """The reference path as the yardstick, and the shared one."""
    def step(C: int, backend: str) -> gate.Step:
        case = Case(model, C, plant)

        def run() -> None:
            model.zero_grad()
            case.step(backend)

        return gate.slowed(run) if plant == "slower" and backend == "shared" else run

    return {gate.YARDSTICK: step(2, "reference"), "2x2": step(2, "shared"), "4x4": step(4, "shared")}


@contextmanager
def timed(plant: str | None = None):
    """What gate.gate takes: steps with one thread, the ratios of the baseline, whether that is another processor's."""
    known = json.loads(BASELINE.read_text()).get("times", {}) if BASELINE.exists() else {}
    own, model, threads = known.get(processor()), smollm2(TIMED_LAYERS), torch.get_num_threads()
    every = {name: statistics.median(of[name] for of in known.values()) for name in next(iter(known.values()), {}) if name != "noise"}
    torch.set_num_threads(1)
    try:
        with matmul_precision(model, "fp32_master"):
            taken = steps(model, plant)
            gate.round_of(taken)  # to warm up
            yield taken, {k: v for k, v in own.items() if k != "noise"} if own else every, not own
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rebaseline", nargs="?", const="all", choices=("all", "costs"))
    parser.add_argument("--plant", choices=("recompute-prompt", "recompute-query", "full-logits", "registers", "slower"))
    parser.add_argument("--must-tell", action="store_true", help="a path whose time cannot be told now is a fault")
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

    times = {}
    with timed(args.plant) as (taken, baseline, elsewhere):
        if args.rebaseline == "all":
            rounds = [gate.round_of(taken) for _ in range(BASELINE_ROUNDS)]
            times = {name: statistics.median(r[gate.YARDSTICK] / r[name] for r in rounds) for name in taken if name != gate.YARDSTICK}
            times["noise"] = gate.noise([r[gate.YARDSTICK] for r in rounds])
            print("yardstick / path", times)
        elif not args.rebaseline:
            if not baseline:
                fault("no baseline of times: --rebaseline")
            times = gate.gate(taken, baseline, elsewhere)
            for name, of in sorted(times.items()):
                line = (f"CPU time, reference 2x2 / shared {name}: {of['ratio']:.2f}, baseline {of['baseline']:.2f}"
                        f"{' (of another processor)' * elsewhere}; {of['rounds']} rounds, noise {of['noise']:.0%}: {of['verdict']}")
                print(line, flush=True)
                if of["verdict"] == "fault" or args.must_tell and of["verdict"] != "pass":
                    fault(line)
    if args.rebaseline:
        new = old | {"layers": LAYERS, "prompt": PROMPT, "common": COMMON, "response": RESPONSE,
                     "costs": old.get("costs", {}) | {torch.__version__: record}}
        new |= {"times": old.get("times", {}) | {processor(): times}} if times else {}
        BASELINE.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"check": "fail" if faults else "pass", "faults": faults, "costs": record, "times": times,
                      "seconds": round(time.time() - started)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
