"""The cases of `make bench`, run by bench.py under pytest-benchmark: our implementation is what it times; before each
round the others run once each, timed here, so that all are interleaved and every ratio is of one round."""

import os
import random
import statistics
import time

import pytest
import torch
from costs import VOCABULARY, costs, smollm2
from step import Ids, matrix_rate, texts

from kernels import reference
from kernels.infonce import symmetric_infonce
from kernels.linear_nll import linear_nll
from repro.core.engines import matmul_precision
from repro.core.logprobs import logprob_matrix
from repro.core.tree import tokenised

QUICK = os.environ.get("BENCH_QUICK") == "1"
ROUNDS = 2 if QUICK else 3
LAYERS, PROMPT, RESPONSE = (4, 60, 10) if QUICK else (30, 72, 12)
HEADS = {"smollm2": (320, 576, 49152), "mistral-7b": (64, 4096, 32000), "llama3-8b": (32, 4096, 128256),
         "llama3-70b": (16, 8192, 128256)}  # N, D, V


def interleaved(benchmark, runs: dict, rounds: int, reset) -> None:
    """Times `runs`, name -> callable or the reason why it is not run; the first is ours."""
    ours, *others = [name for name, run in runs.items() if callable(run)]
    seconds = {name: [] for name in others}

    def before() -> None:
        for name in others:
            reset()
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
        reset()

    benchmark.pedantic(runs[ours], setup=before, rounds=rounds)
    seconds = {ours: list(benchmark.stats.stats.data)} | seconds
    rate = matrix_rate()
    floor = benchmark.extra_info["floor_flops"] / rate / 1e9
    benchmark.extra_info |= {"rate_gflops": rate, "floor_seconds": floor}
    for name, run in runs.items():
        row = benchmark.extra_info["implementations"].setdefault(name, {})
        if not callable(run):
            row["not_run"] = run
            continue
        against = [b / a for a, b in zip(seconds[ours], seconds[name])]
        row |= {"seconds": statistics.median(seconds[name]), "rounds": rounds, "share_of_floor": floor / statistics.median(
            seconds[name]), "times_ours": statistics.median(against), "times_ours_min_max": [min(against), max(against)]}


@pytest.fixture(scope="module")
def model():
    return smollm2(LAYERS)


def with_logits_to_keep(model, query):
    """transformers alone, of one query's pairs [C][R]: full sequences, padded, logits for the last tokens of the batch that
    hold every response."""
    pairs = [pair for group in query for pair in group]
    longest = max(len(p.ids) for p in pairs)
    keep = longest - min(p.start for p in pairs) + 1
    ids = torch.tensor([p.ids + [0] * (longest - len(p.ids)) for p in pairs], device=model.device)
    mask = torch.tensor([[1] * len(p.ids) + [0] * (longest - len(p.ids)) for p in pairs], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits[:, :-1].float()
    first = longest - keep + 1  # the position that the first kept logits predict
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, first:].flatten(), reduction="none").view(len(pairs), -1)
    values = [-nll[k, p.start - first: len(p.ids) - first].mean() for k, p in enumerate(pairs)]
    return torch.stack(values).view(len(query), -1)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("C", [2, 4])
@pytest.mark.parametrize("lengths", ["equal", "ragged"])
def test_step(benchmark, model, lengths, C, queries):
    """Log-probs, loss and backward of `queries` queries of C x C sequences in one call."""
    if QUICK and C * queries > 8:
        pytest.skip("--quick")
    rng = random.Random(C + queries)
    prompts, responses = ([texts(rng, C, n, lengths == "ragged") for _ in range(queries)] for n in (PROMPT, RESPONSE))

    def ours(backend="shared"):
        loss = symmetric_infonce(logprob_matrix(model, Ids(), prompts, responses, length_normalize=True, score_eos=False,
                                                backend=backend))
        loss.backward()
        return loss.item()

    def transformers():
        queries = tokenised(Ids(), prompts, responses, score_eos=False)
        loss = symmetric_infonce(torch.stack([with_logits_to_keep(model, query) for query in queries]))
        loss.backward()
        return loss.item()

    runs = {"shared (ours)": ours, "reference": lambda: ours("reference"), "transformers, logits_to_keep": transformers}
    reset = lambda: model.zero_grad(set_to_none=True)  # noqa: E731
    found, losses = {}, []
    with matmul_precision(model, "fp32_master"):
        for name, run in runs.items():
            reset()
            found[name] = costs(lambda r=run: losses.append(r()), list(model.parameters()), VOCABULARY)
    assert max(losses) - min(losses) < 2e-2, losses  # one loss, products in bfloat16
    benchmark.extra_info |= {
        "what": "step", "model": f"smollm2-135m shape, {LAYERS} layers", "lengths": lengths, "C": C, "R": C, "queries": queries,
        "prompt": PROMPT, "response": RESPONSE, "precision": "fp32_master", "implementations": found,
        "floor_flops": found["shared (ours)"]["flops"]}
    with matmul_precision(model, "fp32_master"):
        interleaved(benchmark, runs, min(ROUNDS, 2) if C * queries > 8 else ROUNDS, reset)


def alternatives(hidden, weight, target, reduction="none"):
    """NLL of public packages, per token or their mean: name -> callable, or why it does not run here."""
    functional = torch.nn.functional

    def liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, target, reduction=reduction)

    def cce(impl):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=impl)

    runs = {"Liger": liger, "cut-cross-entropy": lambda: cce("cce"),
            "cut-cross-entropy, torch_compile": lambda: cce("torch_compile")}
    if hasattr(functional, "linear_cross_entropy"):
        runs["torch linear_cross_entropy"] = lambda: functional.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        runs["torch linear_cross_entropy, chunked"] = lambda: functional.linear_cross_entropy(
            hidden, weight, target, reduction=reduction, options=torch.nn.LinearCrossEntropyOptions())
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # whatever a package raises on a machine it was not made for
            runs[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return runs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", list(HEADS))
def test_head(benchmark, head):
    """linear_nll, forward and backward with random upstream gradients, float32."""
    N, D, V = HEADS[head]
    if QUICK and D > 576:
        pytest.skip("--quick")
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g).requires_grad_()
    weight = (torch.randn(V, D, generator=g) / D**0.5).requires_grad_()
    target, upstream = torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)
    forward = {"linear_nll, store (ours)": lambda: linear_nll(hidden, weight, target, mode="store"),
               "linear_nll, recompute (ours)": lambda: linear_nll(hidden, weight, target, mode="recompute"),
               "reference": lambda: reference.linear_nll(hidden, weight, target)} | alternatives(hidden, weight, target)
    runs = {name: (lambda f=f: f().backward(upstream)) if callable(f) else f for name, f in forward.items()}

    def reset():
        hidden.grad = weight.grad = None

    found, truth = {}, []
    for name in sorted(filter(lambda n: callable(runs[n]), runs), key="reference".__ne__):  # the reference first
        reset()
        step = lambda r=runs[name]: (r(), truth.append(hidden.grad))  # noqa: E731
        if "compile" in name:  # a compiled function does not run under a watch
            step()
            found[name] = {"note": "compiled: its operations are not seen, so its costs are not counted"}
        else:
            found[name] = costs(step, [hidden, weight], V)
        assert (truth[-1] - truth[0]).norm() < 1e-4 * truth[0].norm(), name
    benchmark.extra_info |= {"what": "head", "head": head, "N": N, "D": D, "V": V, "precision": "fp32",
                             "implementations": found, "floor_flops": 6 * N * D * V}
    found |= {name: found.pop(name) for name in runs if name in found}  # in the order of `runs`
    interleaved(benchmark, runs, ROUNDS, reset)


@pytest.mark.parametrize("C", [2, 4, 64])
def test_infonce(benchmark, C):
    """Segment means and loss of one query, forward and backward: microseconds on a CPU, torch against the eager truth."""
    offsets = torch.arange(C * C + 1) * RESPONSE
    nll = torch.randn(int(offsets[-1]), generator=torch.Generator().manual_seed(0)).requires_grad_()
    runs = {f"symmetric_infonce, {name}": lambda impl=impl: symmetric_infonce(nll, offsets, (1, C, C), impl=impl).backward()
            for name, impl in (("torch (ours)", "torch"), ("reference", "reference"))}
    runs["symmetric_infonce, Triton"] = "no GPU; its interpreter is for tests"

    def reset():
        nll.grad = None

    benchmark.extra_info |= {"what": "infonce", "C": C, "R": C, "tokens": len(nll), "precision": "fp32", "floor_flops": 0,
                             "implementations": {name: costs(r, [nll], 0) for name, r in runs.items() if callable(r)}}
    interleaved(benchmark, runs, 20, reset)
