"""Everything under kernels/ on a GPU, in one run: first that it is right, then how fast it is and how much memory it takes.

    .venv/bin/python tests/perf/gpu.py [--only errors steps heads losses] [--models mistral-7b ...] [--rounds 50] [--minutes M]
                                       [--anyway] [--out FOLDER] [--tiny]

errors: each operation, forward and backward, against float64 (gpu_errors.py). After a fault nothing is timed, but with
`--anyway`; exit 1. steps, heads, losses, in the order asked for: ours and every alternative that runs, interleaved, the L2
cache flushed before each, by CUDA events; 20th, 50th and 80th percentile, peak bytes above what was there, and the share of
the floor: the FLOPs that the case needs at this GPU's own rate for a large bf16 product. A step's time holds the packing of
its ids by the host (`host_ms`); each stands against ours with the same checkpointing, and beside the reference how many
times our FLOPs it needs (`flops_times_ours`; nothing twice). Prompts of the plain form share nothing, of the chat form the
query. Writes FOLDER/gpu_NAME.json (results/bench) after every case, and rows of an older record of the same commit stay;
bench.py --table puts it into kernels/README.md. Prints a table last. All of it takes about half an hour on an H200, an estimate:
`--minutes` begins no case after so many. Without the package installed: PYTHONPATH=. before the command.
`--tiny` is for trying the script: small shapes, on a CPU too, with Triton's interpreter and a plain attention where CUDA's
kernels would be; it writes nothing, and its times mean nothing.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import os
import random
import re
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # cases of many sizes, on a GPU that they fill

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

sys.path.append(str(Path(__file__).parents[1]))  # of the tests' own modules

from bench import gpu_table, installed  # noqa: E402
from bench_cases import alternatives, with_logits_to_keep  # noqa: E402
from gpu_errors import CUDA, DEVICE, LLAMA_70B, MISTRAL, SMOLLM2, TINY, build, errors, leaf, seeded  # noqa: E402
from step import Ids, texts  # noqa: E402

from kernels import attention, interfaces, linear_nll, reference  # noqa: E402
from kernels import modes as head_modes  # noqa: E402
from kernels.infonce import symmetric_infonce  # noqa: E402
from repro.base.identity import commit  # noqa: E402
from repro.base.records import read_json, write_json  # noqa: E402
from repro.core import logprobs, tree  # noqa: E402
from repro.core.memory import Step, training_bytes  # noqa: E402
from repro.core.shapes import Shape, counted  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LEAST, SECONDS = 3, 6.0  # rounds of a case, and how long they may take beyond these
AHEAD = 2_000_000        # cycles that the GPU sleeps before a run, about a millisecond, in which the host gets ahead of it
SPREAD = 0.05            # nats between the losses of one case's implementations: what is compared is one computation
COMMON = 0.93            # of a chat prompt, what all constitutions of a query share: 345 of 371 tokens, of a TL;DR post
PARTS = ("errors", "steps", "heads", "losses")
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "liger-kernel", "cut-cross-entropy")


# ---- what is measured with


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def quantiles(values: list[float]) -> list[float]:
    return torch.tensor(values).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()


def flushing():
    """What writes more bytes than an L2 cache holds."""
    return torch.empty(2**28 if CUDA else 0, dtype=torch.uint8, device=DEVICE).zero_


def timed(run, flush) -> float:
    """Milliseconds of `run`."""
    sync()
    flush()
    if not CUDA:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_of(run) -> tuple:
    """(what `run` returns, the bytes allocated at its peak above what was there before; not known on a CPU)."""
    if not CUDA:
        return run(), None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = run()
    sync()
    return value, torch.cuda.max_memory_allocated() - before


def why_not(name: str, error: Exception) -> str:
    """What is said of an implementation that does not run here. Ours may lack memory, nothing else."""
    if "(ours)" in name and not isinstance(error, torch.OutOfMemoryError):
        raise error
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def interleaved(runs: dict, rounds: int, reset, inside=lambda name: nullcontext(), ours=None) -> dict:
    """`runs`: name -> callable, or why it is not run. Name -> what was measured, in `rounds` rounds, or as many as fit into
    SECONDS, but at least LEAST, each run `inside` a context of its name. `ours`: name -> the name of ours that it is held
    against, by default the first."""
    found, ms, flush = {}, {}, flushing()
    for name, run in runs.items():
        if not callable(run):
            found[name] = {"not_run": run}
            continue
        try:
            with inside(name):
                reset()
                run()  # compiles
                reset()
                value, peak = peak_of(run)
                found[name] = {"peak_bytes": peak} | ({} if value is None else {"loss": value.item()})
                reset()
                ms[name] = [timed(run, flush)]
        except Exception as error:  # whatever a package raises on a machine it was not made for
            found[name] = {"not_run": why_not(name, error)}
    rounds = max(LEAST, min(rounds, int(SECONDS * 1e3 / max(1e-3, sum(sum(values) for values in ms.values())))))
    ms = {name: [] for name in ms}
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) if CUDA else 0
    for _ in range(rounds):
        for name in [name for name in ms if "not_run" not in found[name]]:
            try:
                with inside(name):
                    reset()
                    ms[name].append(timed(runs[name], flush))
            except Exception as error:
                found[name] = {"not_run": why_not(name, error)}
    reset()
    ms = {name: values for name, values in ms.items() if "not_run" not in found[name]}
    for name, values in ms.items():
        found[name] |= {"ms": quantiles(values), "rounds": rounds}
        if base := ms.get(ours(name) if ours else next(iter(runs))):
            ratios = [b / a for a, b in zip(base, values)]
            found[name] |= {"times_ours": statistics.median(ratios), "times_ours_min_max": [min(ratios), max(ratios)]}
    if CUDA and (retries := torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries):
        for name in ms:
            found[name]["allocator_retries"] = retries  # memory was given back and asked for anew: times of little worth
    return found


def ceilings(tiny: bool) -> dict:
    """This device's own rates: TFLOP/s of a large bf16 product of random numbers, TB/s of a large copy (read and written)."""
    n, size = (256, 2**20) if tiny else (8192, 2**32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randint(255, (size,), device=DEVICE, dtype=torch.uint8)
    y, flush = torch.empty_like(x), flushing()
    product, copy = (min(timed(run, flush) for _ in range(12)) for run in (lambda: a @ b, lambda: y.copy_(x)))
    return {"tflops": 2 * n**3 / product / 1e9, "tbytes": 2 * size / copy / 1e9}


# ---- times


HEADS = {  # N, D, V
    "llama3-8b, N 1024": (1024, 4096, 128256), "llama3-8b, N 4096": (4096, 4096, 128256), "mistral-7b, N 320": (320, 4096, 32000),
    "mistral-7b, N 2048": (2048, 4096, 32000), "N 512, V 131072": (512, 4096, 131072), "N 8192, V 131072": (8192, 4096, 131072),
    "llama3-70b, N 1280": (1280, 8192, 128256), "smollm2, N 1280": (1280, 576, 49152), "gemma2-2b, N 8192": (8192, 2304, 256000)}


def heads(tiny: bool, rounds: int, rate: float):
    for name, shape in ({"tiny": (40, 64, 300)} if tiny else HEADS).items():
        for reduction in ("none", "mean"):
            yield head(name, *shape, reduction, rounds, rate)


def head(name: str, N: int, D: int, V: int, reduction: str, rounds: int, rate: float) -> dict:
    """The head alone in bfloat16, forward and backward: NLLs with a random upstream gradient each, or their mean."""
    g = seeded(0)
    hidden = leaf(g, N, D, dtype=torch.bfloat16)
    weight = (torch.randn(V, D, device=DEVICE) / D**0.5).bfloat16().requires_grad_()
    target, upstream = torch.randint(V, (N,), generator=g, device=DEVICE), torch.randn(N, device=DEVICE)
    planned = head_modes.plan(N, V, 2, hidden_grad=True, head_grad=True, narrow=D <= head_modes.NARROW)
    modes = sorted(("store", "recompute"), key=planned.__ne__)
    forward = {f"linear_nll, {mode} (ours{', planned' * (mode == planned)})":
               lambda mode=mode: linear_nll.linear_nll(hidden, weight, target, mode=mode) for mode in modes}
    forward["linear_nll, frozen head (ours)"] = lambda: linear_nll.linear_nll(hidden, weight.detach(), target)
    forward["reference"] = lambda: reference.linear_nll(hidden, weight, target)

    def backward(op):
        def run():
            value = op()
            if reduction == "mean":
                value.mean().backward()
            else:
                value.backward(upstream.to(value.dtype))
        return run

    runs = {each: backward(f) if callable(f) else f
            for each, f in (forward | alternatives(hidden, weight, target, reduction)).items()}

    def loss_only():
        linear_nll.linear_nll(hidden.detach(), weight.detach(), target)

    runs["linear_nll, loss only (ours)"] = loss_only
    needed = {"linear_nll, frozen head (ours)": 4, "linear_nll, loss only (ours)": 2}

    def reset():
        hidden.grad = weight.grad = None

    return row("head", f"{name}, D {D}, V {V}, {'a gradient a token' if reduction == 'none' else 'mean'}",
               interleaved(runs, rounds, reset), {each: needed.get(each, 6) * N * D * V for each in runs}, rate)


def losses(tiny: bool, rounds: int, rate: float):
    for B, C, L in ((2, 2, 5),) if tiny else ((1, 2, 80), (4, 4, 80), (64, 2, 80), (1, 64, 80)):
        yield loss(B, C, L, rounds, rate)


def loss(B: int, C: int, L: int, rounds: int, rate: float) -> dict:
    """Segment means, matrix and loss of a batch of queries, forward and backward."""
    offsets = torch.arange(B * C * C + 1, device=DEVICE) * L
    nll = torch.randn(B * C * C * L, device=DEVICE).requires_grad_()
    runs = {f"symmetric_infonce, {name}": lambda impl=impl: symmetric_infonce(nll, offsets, (B, C, C), impl=impl).backward()
            for name, impl in (("Triton (ours)", "triton"), ("torch", "torch"), ("reference", "reference"))}

    def reset():
        nll.grad = None

    return row("loss", f"B {B}, C=R={C}, {L} tokens a response", interleaved(runs, rounds, reset), {}, rate)


@functools.lru_cache(1)
def mask_of(layout) -> torch.Tensor:
    return layout.mask(DEVICE)


def sdpa(q, k, v, layout, *, scale, **options):
    """The shared layout with torch's attention under a T x T mask, in the form that its fused kernels take."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask_of(layout), scale=scale)
    return out[0].transpose(0, 1)


class Case:
    """`queries` queries of C x C sequences for a model of `shape`, each implementation a forward and a backward of all;
    gradients are added to those in place, as in training."""

    def __init__(self, model, shape: Shape, form: str, C: int, queries: int, lengths: str, P: int, L: int):
        rng = random.Random(C + queries)
        self.model, self.shape = model, shape
        prompts, responses = ([texts(rng, C, n, lengths == "ragged", shape.vocab_size, common) for _ in range(queries)]
                              for n, common in ((P, round(COMMON * P) if form == "chat" else 0), (L, 0)))
        self.ids = tree.tokenised(Ids(), prompts, responses, score_eos=False)
        tokens, scored = list(map(tree.packed_tokens, self.ids)), list(map(tree.scored_tokens, self.ids))
        self.tokens, self.scored, self.longest = tree.packed_tokens(*self.ids), sum(scored), max(tokens)
        self.alone = [len(pair.ids) for pair in self.pairs()]
        self.ways = {backend: logprobs.settled(model, backend) for backend in ("shared", "reference")}  # as a run does: once

    def pairs(self) -> list[tree.Scored]:
        return [pair for pairs in self.ids for group in pairs for pair in group]

    def host_ms(self) -> float:
        """What the host does before the GPU begins: the packed sequence, the attention's index tensors."""
        start = time.perf_counter()
        tree.pack(self.pairs()).layout.varlen(torch.device("cpu"))
        return (time.perf_counter() - start) * 1e3

    def matrix(self, backend: str, ids) -> torch.Tensor:
        return logprobs.matrix_of(self.ways[backend], self.model, ids, length_normalize=True)

    def ours(self, attend=None):
        def run():
            with mock.patch.object(interfaces, "shared_prefix_attention", attend) if attend else nullcontext():
                loss = symmetric_infonce(self.matrix("shared", self.ids))
                loss.backward()
            return loss.detach()
        return run

    def by_query(self, matrix):
        """One query after the other, as the authors ran it, each sequence in full."""
        def run():
            total = 0
            for query in range(len(self.ids)):
                loss = symmetric_infonce(matrix(query)) / len(self.ids)
                loss.backward()
                total += loss.detach()
            return total
        return run

    def implementations(self) -> dict:
        def full(query):
            return self.matrix("reference", self.ids[query:query + 1])

        def kept(query):
            return with_logits_to_keep(self.model, self.ids[query]).unsqueeze(0)

        runs = {"shared (ours), checkpointing": self.ours(), "shared (ours)": self.ours(),
                "shared (ours), SDPA under a mask": self.ours(sdpa),
                "reference, checkpointing": self.by_query(full), "reference": self.by_query(full),
                "transformers, logits_to_keep, checkpointing": self.by_query(kept), "transformers, logits_to_keep": self.by_query(kept)}
        if len(self.ids) > 1:
            runs["shared (ours), SDPA under a mask"] = "for one query alone: the mask is T x T"
        if len(self.ids) * len(self.ids[0]) > 8:
            again = f"goes query by query: {len(self.ids)} times the case of one"
            runs |= {name: again for name in runs if "(ours)" not in name}
        return runs

    def flops(self) -> int:
        """That the case needs: each beginning once, only response tokens scored, nothing computed twice."""
        return self.counted(self.tokens, int((tree.pack(self.pairs()).positions + 1).sum()), self.scored)

    def in_full(self) -> int:
        """The same for the reference: each sequence by itself, with logits for every token."""
        return self.counted(sum(self.alone), sum(n * (n + 1) // 2 for n in self.alone), sum(self.alone))

    def counted(self, tokens: int, pairs: int, logits: int) -> int:
        """FLOPs of a forward and a backward: `pairs` of a token that looks and one that it sees."""
        s = self.shape
        heads = s.num_hidden_layers * s.num_attention_heads * s.head_dim
        return 6 * s.active * tokens + 12 * heads * pairs + 6 * s.hidden_size * s.vocab_size * logits

    def predicted(self, checkpointing: bool) -> int:
        """Bytes above weights and gradients at the peak of ours, by the byte model of `repro plan`."""
        step = Step(ranks=1, precision="bf16", optimizer="rmsprop", pack_tokens=self.tokens, scored=self.scored,
                    longest=self.longest, checkpointing=checkpointing, device="cuda")
        phases = training_bytes(self.shape, step)
        return max(sum(v for k, v in phases[moment].items() if k not in ("weights", "gradients", "optimizer state"))
                   for moment in ("head", "layers"))


@contextlib.contextmanager
def checkpointed(model, on: bool):
    if on:
        model.activation_checkpointing_enable()
    try:
        yield
    finally:
        if on:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()


CASES = (("plain", "ragged", 1), ("chat", "ragged", 1), ("plain", "equal", 1), ("plain", "ragged", 4), ("chat", "ragged", 4),
         ("plain", "equal", 4))  # form, lengths, queries a pack


def steps(tiny: bool, rounds: int, rate: float, models=None):
    """A whole step: log-probs, loss, backward."""
    configs = {"tiny": SMOLLM2 | TINY} if tiny else {
        "mistral-7b": MISTRAL, "llama3-70b, 8 layers": LLAMA_70B | {"num_hidden_layers": 8}, "smollm2-135m": SMOLLM2}
    for name, config in configs.items():
        if models and not any(name.startswith(each) for each in models):
            continue
        model = build(config)
        shape = counted(model)
        kinds = CASES[:3] if tiny else CASES[:4] if name != "mistral-7b" else CASES
        for (form, lengths, queries), C in itertools.product(kinds, (2, 4)):
            yield step(name, shape, model, form, C, queries, lengths, tiny, rounds, rate)
        del model
        gc.collect()


def step(name: str, shape: Shape, model, form: str, C: int, queries: int, lengths: str, tiny: bool, rounds: int, rate: float) -> dict:
    case = Case(model, shape, form, C, queries, lengths, *((12, 4) if tiny else (600, 80)))
    runs = case.implementations()
    found = interleaved(runs, rounds, lambda: None, lambda each: checkpointed(model, "checkpointing" in each),
                        lambda each: "shared (ours)" + ", checkpointing" * ("checkpointing" in each))
    model.zero_grad(set_to_none=True)
    losses = [x["loss"] for x in found.values() if "loss" in x]
    for each in ("reference, checkpointing", "reference"):
        found[each]["flops_times_ours"] = case.in_full() / case.flops()
    return row("step", f"{name}, {form} form, {lengths} lengths, C=R={C}, queries a pack: {queries}", found,
               dict.fromkeys(runs, case.flops()), rate) | {
        "host_ms": case.host_ms(), "spread": max(losses, default=0) - min(losses, default=0), "predicted_bytes": {
            "shared (ours), checkpointing": case.predicted(True), "shared (ours)": case.predicted(False)}}


def row(what: str, case: str, found: dict, flops: dict, rate: float) -> dict:
    """A case's row: what was measured, and the share of the floor that its FLOPs set at `rate` TFLOP/s."""
    for name, measured in found.items():
        if "ms" in measured and name in flops:
            measured |= {"flops": flops[name], "share_of_floor": flops[name] / rate / 1e9 / measured["ms"][1]}
    return {"what": what, "case": case, "implementations": found}


def in_words(row: dict) -> str:
    """Of a step, how the reference stands against ours."""
    said = [f"{x['times_ours']:.2f} times as long as ours {how} checkpointing, for {x['flops_times_ours']:.2f} times the FLOPs"
            for name, how in (("reference, checkpointing", "with"), ("reference", "without"))
            if "times_ours" in (x := row["implementations"].get(name, {})) and "flops_times_ours" in x]
    return f"{row['case']}: the reference takes " + ", ".join(said) if said else ""


def without_cuda():
    """The tests' varlen kernel in the place of CUDA's."""
    from test_attention import plain_varlen

    return mock.patch.object(attention, "varlen_kernel", lambda: plain_varlen)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", help="of the steps: mistral-7b, llama3-70b, smollm2-135m")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--anyway", action="store_true", help="time after a fault too")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not CUDA and not args.tiny:
        print("gpu: torch finds no CUDA device (--tiny tries the script without one)", file=sys.stderr)
        return 2
    started = time.time()
    properties = torch.cuda.get_device_properties(DEVICE) if CUDA else None
    name = properties.name if CUDA else "no GPU"
    path = args.out / f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    record = {"benchmark": "gpu", "device": name, "capability": [properties.major, properties.minor] if CUDA else None,
              "memory_bytes": properties.total_memory if CUDA else None, "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version(), "versions": {p: installed(p) for p in PACKAGES}, "commit": commit(),
              "errors": [], "rows": []}
    old = {}
    if path.is_file() and not args.tiny:
        old = read_json(path)
        if any(old[k] != record[k] for k in ("commit", "versions", "cuda")):
            old = {}

    def keep() -> None:
        """The record so far, with what an earlier call of the same commit and versions has beyond it."""
        if args.tiny:
            return
        made = {(r["what"], r["case"]) for r in record["rows"]}
        whole = record | {"errors": record["errors"] or old.get("errors", []),
                          "rows": [r for r in old.get("rows", []) if (r["what"], r["case"]) not in made] + record["rows"]}
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(path, whole)

    with nullcontext() if CUDA else without_cuda():
        if "errors" in args.only:
            record["errors"] = errors(args.tiny)
        faults = sum(not each["right"] for each in record["errors"])
        if not faults or args.anyway:
            record |= ceilings(args.tiny)
            parts = {"heads": heads, "losses": losses, "steps": functools.partial(steps, models=args.models)}
            for found in itertools.chain.from_iterable(  # one case after the other
                    parts[part](args.tiny, args.rounds, record["tflops"]) for part in dict.fromkeys(args.only) if part in parts):
                record["rows"].append(found)
                print(*gpu_table({"rows": [found]})[2:], sep="\n", file=sys.stderr, flush=True)
                keep()
                if time.time() - started > 60 * args.minutes:
                    print(f"gpu: {args.minutes:g} minutes are over; what is left is not begun", file=sys.stderr)
                    break
        keep()
    spreads = [r["case"] for r in record["rows"] if not r.get("spread", 0) < SPREAD]
    print(*gpu_table(record), *filter(None, map(in_words, record["rows"])), sep="\n")
    for case in spreads:
        print(f"FAULT {case}: the implementations' losses are more than {SPREAD} nats apart")
    print(f"{name}: {len(record['errors']) - faults} of {len(record['errors'])} right; " +
          (f"{record['tflops']:.0f} TFLOP/s, {record['tbytes']:.2f} TB/s" if "tflops" in record else "nothing timed") +
          (f"; {path}" if not args.tiny else ""))
    return int(faults > 0 or bool(spreads))


if __name__ == "__main__":
    sys.exit(main())
