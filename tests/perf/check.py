"""Fails when a change makes the suite slower: exact costs, compiled kernels, and CPU time against a yardstick.

    .venv/bin/python tests/perf/check.py [--rebaseline [costs]] [--must-tell] [--plant recompute-prompt|recompute-query|
                                   full-logits|registers|slower]

First the shared path must equal the reference. Then, against results/bench/check.json: tokens, FLOPs, bytes held for the
backward, peak bytes and operations of a step may not grow by one, and no logits are made but for scored tokens; the
Triton kernels as in aot.py; and a step's CPU time may not grow (gate.py tells a third more from none, and says "cannot
tell" where the machine is too busy or has no baseline: no fault, unless `--must-tell`). `--rebaseline` writes the baseline anew, that of times for this processor;
`--rebaseline costs` all but the times; `--plant` makes one thing slower on purpose, to see the check fail. Prints one JSON
object last; exits with 1 on a fault.
"""

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import gate
import torch
import transformers
from costs import VOCABULARY, costs, smollm2
from step import Ids, texts

from repro.core.engines import matmul_precision
from repro.core.logprobs import logprob_matrix
from repro.core.losses import symmetric_infonce

BASELINE = Path(__file__).resolve().parents[2] / "results" / "bench" / "check.json"
LAYERS, PROMPT, COMMON, RESPONSE = 4, 72, 48, 12
TIMED = {"layers": 4, "vocabulary": 4096}  # at two layers and the whole vocabulary the head would hide the rest
BASELINE_ROUNDS = 48


def processor() -> str:
    """Makers give a name to several generations."""
    path = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^([^:\n\t]+)\t*: (.*)$", path.read_text(), re.MULTILINE)) if path.exists() else {}
    named = [facts.get("model name", platform.processor()), *(f"{k} {facts[k]}" for k in (
        "cpu family", "model", "CPU implementer", "CPU part") if k in facts)]
    return ", ".join([*filter(None, named), torch.backends.cpu.get_cpu_capability()])


def timed_on() -> str:
    """What a ratio of times depends on besides our code."""
    return f"{processor()}; torch {torch.__version__}, transformers {transformers.__version__}"


class Case:
    """One query of C x C sequences at SmolLM2's widths; of each prompt, COMMON tokens are the query's."""

    def __init__(self, model, C: int, plant: str | None):
        rng = random.Random(C)
        self.model, self.C, self.plant = model, C, plant
        ids = min(49000, model.config.vocab_size)
        self.prompts = texts(rng, C, PROMPT, True, ids, COMMON)
        self.responses = texts(rng, C, RESPONSE, True, ids)
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


def steps(plant: str | None = None) -> dict[str, gate.Step]:
    """The shared path, and a yardstick that no change of ours moves: transformers' forward and backward of a few tokens,
    of a model that the shared path never sees, and without our precision."""
    other, model = smollm2(**TIMED), smollm2(**TIMED)
    tokens = torch.arange(2 * (PROMPT + RESPONSE)).view(2, -1)

    def yardstick() -> None:
        other.zero_grad()
        other(input_ids=tokens, labels=tokens).loss.backward()

    def shared(C: int) -> gate.Step:
        case = Case(model, C, plant)

        def run() -> None:
            model.zero_grad()
            with matmul_precision(model, "fp32_master"):
                case.step("shared")

        return gate.slowed(run) if plant == "slower" else run

    return {gate.YARDSTICK: yardstick, "2x2": shared(2), "4x4": shared(4)}


@contextmanager
def timed(plant: str | None = None):
    """What gate.gate takes: steps, with one thread; the baseline's ratios here (None: it has none)."""
    known = json.loads(BASELINE.read_text()).get("times", {}).get(timed_on()) if BASELINE.exists() else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = steps(plant)
        for _ in range(2):
            gate.round_of(taken)  # to warm up
        yield taken, known and {name: known.get(name) for name in taken if name != gate.YARDSTICK}
    finally:
        torch.set_num_threads(threads)


def times_now(baseline: bool, plant: str | None, must_tell: bool, fault) -> dict:
    """The times as they are now: held against the baseline's, or a new one."""
    with timed(plant) as (taken, known):
        if baseline:
            try:
                return gate.baseline(taken, BASELINE_ROUNDS)
            except ValueError as e:
                fault(f"no baseline of times: {e}")
                return {}
        if known is None:
            line = f"CPU time: cannot tell, no baseline on {timed_on()} (--rebaseline)"
            fault(line) if must_tell else print(line, flush=True)
            return {}
        if None in known.values():
            fault(f"the baseline of times is of other paths than {', '.join(known)}: --rebaseline")
            return {}
        found = gate.gate(taken, known)
    for name, of in sorted(found.items()):
        line = (f"CPU time, yardstick / shared {name}: {of['ratio']:.3f}, baseline {of['baseline']:.3f}; "
                f"{of['rounds']} rounds, noise {of['noise']:.0%}: {of['verdict']}")
        print(line, flush=True)
        if of["verdict"] == gate.FAULT or must_tell and of["verdict"] != gate.PASS:
            fault(line)
    return found


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

    times = {} if args.rebaseline == "costs" else times_now(bool(args.rebaseline), args.plant, args.must_tell, fault)
    if args.rebaseline:
        new = {"layers": LAYERS, "prompt": PROMPT, "common": COMMON, "response": RESPONSE, "timed": TIMED,
               "costs": old.get("costs", {}) | {torch.__version__: record},
               "times": old.get("times", {}) | ({timed_on(): times} if times else {})}
        BASELINE.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"check": "fail" if faults else "pass", "faults": faults, "costs": record, "times": times,
                      "seconds": round(time.time() - started)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
