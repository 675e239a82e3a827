"""Each operation of kernels/ on this device, forward and backward, against float64: the first half of gpu.py.

A case is right if its error is at most twice that of the plain computation in the same dtype (three times, of any 128 rows
of a matrix or of one parameter of a step), and a second run gives the same bits. Upstream gradients are random, shapes odd,
lengths ragged.
"""

import json
import random
import sys

import torch
from layouts import drawn, grouped
from step import Ids, texts

from kernels import attention, linear_nll, reference
from kernels.infonce import symmetric_infonce
from repro.base.settings import EMBEDDED
from repro.core.logprobs import logprob_matrix
from repro.plan.gpus import PUBLISHED

LOSS = 5e-3  # nats that a bfloat16 step's loss may be off: one number, whose ratio to another's error would say nothing
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MISTRAL, LLAMA_70B, SMOLLM2 = (PUBLISHED[name] for name in (
    "mistralai/Mistral-7B-v0.1", "meta-llama/Meta-Llama-3-70B", EMBEDDED))
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 512}


def build(config: dict):
    """A model of this config.json on the device, bfloat16, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16).train()


def share(a, b, x, times: float) -> float:
    """The error of `a` over what is allowed: `times` that of `b`, and float32's own rounding. NaN counts as infinite."""
    error, allowed = (a.double() - x).norm(), times * (b.double() - x).norm() + 2e-7 * x.norm()
    found = (error / allowed if x.norm() else error).item()
    return float("inf") if found != found else found


def worst(ours, theirs, exact) -> float:
    """The largest share of a tensor, and of each 128 rows of a large matrix: a lost tile is little of the whole."""
    found = []
    for a, b, x in zip(ours, theirs, exact):
        found.append(share(a, b, x, 2))
        if x.ndim == 2 and len(x) >= 256:
            found += [share(*rows, 3) for rows in zip(a.split(128), b.split(128), x.split(128))]
    return max(found)


def outcome(op, leaves, upstream) -> list:
    """The value of `op(*leaves)` and its gradients."""
    out, wanted = op(*leaves), [x for x in leaves if x.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, upstream.to(out.dtype)) if wanted else ())]


def judged(op: str, case: str, dtype, ours, theirs, leaves, upstream) -> dict:
    """A row: `ours` and `theirs` of `leaves` in `dtype` against `theirs` in float64, and ours twice."""
    exact = outcome(theirs, [x.detach().double().requires_grad_(x.requires_grad) for x in leaves], upstream)
    first, again = (outcome(ours, leaves, upstream) for _ in range(2))
    found = worst(first, outcome(theirs, leaves, upstream), exact)
    return {"op": op, "case": case, "dtype": str(dtype).removeprefix("torch."), "of_allowed": found,
            "same_twice": all(torch.equal(a, b) for a, b in zip(first, again))}


def leaf(generator, *shape, dtype, scale=1.0, grad=True):
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, device=DEVICE) * scale
    return x.to(dtype).requires_grad_(grad)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def head_errors(tiny: bool):
    shapes = [(1, 8, 40), (37, 40, 130)] if tiny else [
        (1, 64, 515), (97, 520, 1003), (321, 576, 49152), (130, 4096, 32000), (64, 8192, 128256)]
    for N, D, V in shapes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for mode in ("auto", *linear_nll.MODES):
                for bias, softcap in ((False, None), (True, 15.0)):
                    g = seeded(N)
                    grads = {"loss_only": (False,) * 3, "frozen_head": (True, False, False)}.get(mode, (True,) * 3)
                    hidden = leaf(g, N, D, dtype=dtype, grad=grads[0])
                    weight = leaf(g, V, D, dtype=dtype, scale=3 * D**-0.5, grad=grads[1])
                    b = [leaf(g, V, dtype=dtype, grad=grads[2])] * bias
                    target = torch.randint(V, (N,), generator=g, device=DEVICE)
                    target[: N // 2] = (hidden[: N // 2].detach() @ weight.detach().T).argmax(1)  # p near 1 as well
                    upstream = torch.randn(N, generator=g, dtype=torch.float64, device=DEVICE)
                    impl = "triton" if dtype != torch.float32 and not CUDA else None

                    def ours(h, w, b=None, target=target, softcap=softcap, mode=mode, impl=impl):
                        return linear_nll.linear_nll(h, w, target, bias=b, softcap=softcap, mode=mode, impl=impl)

                    def theirs(h, w, b=None, target=target, softcap=softcap):
                        return reference.linear_nll(h, w, target, bias=b, softcap=softcap)

                    case = f"N {N}, D {D}, V {V}, {mode}" + ", bias, soft-cap" * bias
                    yield judged("linear_nll", case, dtype, ours, theirs, [hidden, weight, *b], upstream)


def loss_errors(tiny: bool):
    for B, C, R in ((1, 2, 2), (3, 2, 5), (2, 4, 4), *(() if tiny else ((1, 64, 64), (5, 33, 7)))):
        for longest in (0, 1, 9 if tiny else 700):  # 0: the matrix itself
            g = seeded(B + C + longest)
            lengths = torch.randint(1, max(longest, 1) + 1, (B * C * R,), generator=g, device=DEVICE)
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]) if longest else None
            size = (int(lengths.sum()),) if longest else (B, C, R)
            x = leaf(g, *size, dtype=torch.float32, scale=4.0)

            def loss(x, impl=None, offsets=offsets, shape=(B, C, R)):
                return symmetric_infonce(x, offsets, shape if offsets is not None else None, impl=impl)

            yield judged("symmetric_infonce", f"{B} x {C} x {R}, up to {longest} tokens" if longest else f"{B} x {C} x {R}",
                         torch.float32, lambda x, f=loss: f(x, impl="triton"), lambda x, f=loss: f(x, impl="reference"), [x],
                         torch.tensor(-0.7, device=DEVICE))


def attention_errors(tiny: bool):
    layouts = {"ragged": grouped(((7, (1, 6, 2)), (1, (3, 1, 1)), (12, (9, 2, 5)))), "no prefix": grouped(((0, (5, 3)), (3, (1, 1)))),
               "a tree": drawn(8, 20)}
    if not tiny:
        layouts |= {"P 600, L 80": grouped(((600, (80, 80)),) * 2), "long tree": drawn(8, 20, 150),
                    "long and ragged": grouped(((613, (97, 1, 40, 130)), (255, (64, 65, 2, 9))))}
    for name, layout in layouts.items():
        for H, K, d in ((4, 2, 16),) if tiny else ((32, 8, 128), (9, 3, 64)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                g = seeded(d)
                leaves = [leaf(g, heads, layout.tokens, d, dtype=dtype) for heads in (H, K, K)]
                upstream = torch.randn(layout.tokens, H, d, generator=g, dtype=torch.float64, device=DEVICE)
                for impl in ("blocks",) if dtype == torch.float32 else ("varlen", "blocks"):
                    def run(q, k, v, impl=impl, layout=layout, d=d):
                        return attention.shared_prefix_attention(q, k, v, layout, scale=d**-0.5, impl=impl)

                    yield judged(f"attention, {impl}", f"{name}, H {H}, K {K}, d {d}", dtype, run,
                                 lambda *x, f=run: f(*x, impl="reference"), leaves, upstream)


def step_errors(tiny: bool):
    """A whole step of two layers at real widths: the loss and every gradient, shared against the reference path."""
    for name, config in ({"smollm2": SMOLLM2} | ({} if tiny else {"mistral-7b": MISTRAL})).items():
        model = build(config | (TINY if tiny else {"num_hidden_layers": 2}))
        P, L = (9, 4) if tiny else (300, 40)
        cases = {}
        for form, common in (("plain", 0), ("chat", P // 2)):
            rng = random.Random(0)
            cases[form] = [[texts(rng, 2, n, True, model.config.vocab_size, common) for _ in range(2)] for n, common in ((P, common), (L, 0))]

        def gradients(model, form, backend, cases=cases):
            loss = symmetric_infonce(logprob_matrix(model, Ids(), *cases[form], length_normalize=True, score_eos=False,
                                                    backend=backend))
            return loss.item(), torch.autograd.grad(loss, list(model.parameters()))

        found = {form: [gradients(model, form, backend) for backend in ("shared", "shared", "reference")] for form in cases}
        model.double()
        for form, ((loss, first), (_, again), (_, theirs)) in found.items():
            true, exact = gradients(model, form, "reference")
            whole = [torch.cat([x.flatten().double() for x in each]) for each in (first, theirs, exact)]
            shares = [share(*whole, 2), *(share(a, b, x, 3) for a, b, x in zip(first, theirs, exact)), abs(loss - true) / LOSS]
            yield {"op": "a step", "case": f"{name}, 2 layers, {form} form, C=R=2", "dtype": "bfloat16", "of_allowed": max(shares),
                   "same_twice": all(torch.equal(a, b) for a, b in zip(first, again))}


def errors(tiny: bool) -> list[dict]:
    rows = []
    for cases in (head_errors, loss_errors, attention_errors, step_errors):
        for row in cases(tiny):
            row["right"] = row["of_allowed"] <= 1 and row["same_twice"]
            rows.append(row)
            if not row["right"]:
                print("FAULT", json.dumps(row), flush=True)
        print(f"{cases.__name__}: {sum(r['right'] for r in rows)} of {len(rows)} right so far", file=sys.stderr, flush=True)
    return rows
