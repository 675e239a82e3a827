"""The experiments' own prompts through the core: this checkout, an older one beside it, and the reference path, interleaved.

    .venv/bin/python tests/perf/trees.py --before ../older_checkout --out trees.json [--pairs 5] [--cases exp1-2 exp2-4 ...]
    .venv/bin/python tests/perf/trees.py --curve --out trees_curve.json [--pairs 3]
    .venv/bin/python tests/perf/trees.py --draw trees_curve.json results/bench/trees

One process a way, each with SmolLM2-135M and the same token ids; each round runs all of them once, in an order that turns.
A line a case: the median of the rounds' ratios with their range, beside the ratio of counted FLOPs (linear layers,
attention and head apart) and of tokens. "score" is without a backward. --curve: what a query costs, scored, against C = R
(chat form, TL;DR length) and against the queries in one pack (exp2's, 2 x 2), beside its floor: the linear layers of its
unique tokens and the head of its scored ones at the rate of one large product, timed after the rounds. A benchmark, not a test.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
BATCH = 1024
PARTS = ("linear", "attention", "head")


# ---- the worker: imports the checkout that it is started for


def work(way: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from repro.base.settings import EMBEDDED
    from repro.core import logprobs
    from repro.core.engines import matmul_precision
    from repro.core.losses import symmetric_infonce
    from repro.core.tree import Scored
    from repro.models import load

    model = load.load_model(EMBEDDED, dtype="float32")
    logprobs.settled(model, way)
    queries, tokens = [], []
    model.get_input_embeddings().register_forward_hook(lambda _, x, __: tokens.append(x[0].numel()))

    def step():
        model.zero_grad(set_to_none=False)
        symmetric_infonce(logprobs.matrix_of(way, model, queries, length_normalize=True)).backward()

    def score(budget=BATCH):
        with torch.inference_mode():
            logprobs.matrix_of(way, model, queries, length_normalize=False, budget=budget)

    def rate() -> float:
        """FLOPs a second of the largest product of a layer, at a size at which it runs at its best."""
        weight = model.model.layers[0].mlp.gate_proj.weight
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(20):
                x @ weight.T
            return 20 * 2 * len(x) * weight.numel() / (time.perf_counter() - start)

    x = torch.randn(4096, model.config.hidden_size)
    ways = {"step": step, "score": score, "pack": lambda: score(None)}
    print(json.dumps(logprobs.__file__), flush=True)
    with matmul_precision(model, "fp32_master"):
        for line in sys.stdin:
            what, given = json.loads(line)
            if what == "queries":
                queries = [[[Scored(ids, start) for ids, start in group] for group in query] for query in given]
                answer = sum(len(ids) - start for query in given for group in query for ids, start in group)
            elif what == "count":
                tokens.clear()
                with FlopCounterMode(display=False) as counter:
                    ways[given]()
                found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
                attention = sum(n for op, n in found.items() if "mm" not in op or "bmm" in op)
                answer = {"tokens": sum(tokens), "attention": attention, "products": sum(found.values()) - attention}
            elif what == "rate":
                answer = rate()
            else:
                start = time.perf_counter()
                ways[what]()
                answer = time.perf_counter() - start
            print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, checkout: Path, way: str):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", way], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=checkout)
        loaded = Path(self._read())
        if checkout not in loaded.parents:  # an installation may be found first
            raise SystemExit(f"{loaded} was measured instead of {checkout}")

    def _read(self):
        return json.loads(self.process.stdout.readline())

    def __call__(self, what: str, given=None):
        print(json.dumps([what, given]), file=self.process.stdin, flush=True)
        return self._read()


# ---- cases: token ids of queries, [query][C][R] of (ids, where scoring starts)


class Texts:
    """Prompts as an experiment's mini renders them; responses as the embedded model samples them, or cut from posts."""

    def __init__(self, name: str, constitutions: str | None = None, form: str = "chat"):
        from repro.experiment import load_experiment
        from repro.models import load
        from repro.stages.run import Run

        spec = load_experiment(name, "mini")[-1]
        if constitutions:
            spec = dataclasses.replace(spec, constitutions=constitutions)
        spec = dataclasses.replace(spec, cot=spec.cot and form == "chat",
                                   model=dataclasses.replace(spec.model, prompt=form))
        self.run = Run(spec, Path(tempfile.mkdtemp()), lambda text: None)
        self.run.check()
        self.run.constitutions = self.run.inputs.constitutions
        self.voice = self.run.voice
        self.voice.frame(spec, self.run.constitutions, self.run.inputs.longest)
        self.items, self.tokenizer = self.run.items(), self.voice.tokenizer
        self.model = load.load_model(self.voice.place, dtype="float32")
        self.posts = [self.ids(item.query.text) for item in self.items]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompts(self, item, C: int) -> list[list[int]]:
        from repro.stages import draws

        return [self.ids(draws.prompt(self.voice, c, item.query, "evaluation", sample=False)) for c in item.constitutions[:C]]

    def sampled(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        from repro.sampling.greedy import greedy
        with torch.inference_mode():
            return greedy(self.model, prompts, self.run.response_tokens(), ends=[self.tokenizer.eos_token_id])

    def answered(self, items, C: int) -> tuple[list, list]:
        """Of each item its prompts [C], and what the model answers to each."""
        prompts = [self.prompts(item, C) for item in items]
        responses = self.sampled(sum(prompts, []))
        return prompts, [responses[k * C: (k + 1) * C] for k in range(len(items))]

    def cut(self, length: int, rng: random.Random) -> list[int]:
        """A response of about `length` tokens out of other posts."""
        ids = sum(rng.sample(self.posts, 16), [])
        return ids[: round(length * rng.uniform(0.6, 1.4))]

    def longer(self, item, tokens: int, rng: random.Random):
        text = item.query.text
        while len(self.ids(text)) < tokens:
            text += " " + rng.choice(self.items).query.text
        return dataclasses.replace(item, query=dataclasses.replace(item.query, text=text))


def made(name: str) -> tuple[list, str]:
    """The queries of a case, and what is timed of them."""
    rng, kind, C = random.Random(0), *name.rsplit("-", 1)
    C = int(C)
    if kind in ("exp1", "exp2"):
        texts = Texts(kind)
        chosen = texts.items[:: len(texts.items) // 8][: {("exp1", 2): 4, ("exp1", 4): 2, ("exp2", 2): 4, ("exp2", 4): 1}[kind, C]]
        prompts, responses = texts.answered(chosen, C)
    elif kind == "long":
        texts = Texts("exp2")
        prompts = [texts.prompts(texts.longer(texts.items[0], 300, rng), min(C, 4))]
        while len(prompts[0]) < C:  # more constitutions than the experiment has: others in the place of its last 25 tokens
            prompts[0].append(prompts[0][0][:-25] + texts.cut(25, rng)[:15] + prompts[0][0][-10:])
        responses = [[texts.cut(85, rng) for _ in range(C)]]
    elif kind == "plain":
        texts = Texts("exp1", "dialogue", "plain")
        prompts = [texts.prompts(item, C) for item in texts.items[:8]]
        responses = [[texts.cut(155, rng) for _ in range(C)] for _ in prompts]
    elif kind == "two_level":  # no constitution shares anything
        texts = Texts("exp1")
        prompts = [[[100 + 8 * q + c, *prompt] for c, prompt in enumerate(texts.prompts(item, C))]
                   for q, item in enumerate(texts.items[:4])]
        responses = [[[200 + r, *texts.cut(21, rng)] for r in range(C)] for _ in prompts]
    return [[[(p + r, len(p)) for r in own] for p in query] for query, own in zip(prompts, responses)], (
        "score" if kind == "plain" or C > 4 else "step")


def packed(count: int) -> list:
    """The first queries of exp2's mini, 2 x 2."""
    texts = Texts("exp2")
    return [[[(p + r, len(p)) for r in own] for p in query]
            for query, own in zip(*texts.answered(texts.items[:count], 2))]


CASES = ("exp1-2", "exp1-4", "exp2-2", "exp2-4", "long-2", "long-4", "plain-2", "two_level-2")


def timed(workers: dict, queries: list, what: str, pairs: int) -> tuple[dict, dict, int]:
    """(of each way its counts; its seconds, a round each; scored tokens)."""
    scored = [worker("queries", queries) for worker in workers.values()][0]
    counts = {way: worker("count", what) for way, worker in workers.items()}  # and every way is warm
    V, D = 49152, 576
    for count in counts.values():
        count["head"] = 2 * scored * V * D * (3 if what == "step" else 1)
        count["linear"] = count.pop("products") - count["head"]
    seconds = {way: [] for way in workers}
    for k in range(pairs):
        order = list(workers)
        for way in order[k % len(order):] + order[: k % len(order)]:
            seconds[way].append(workers[way](what))
    return counts, seconds, scored


def compared(name: str, workers: dict, pairs: int) -> dict:
    queries, what = made(name)
    counts, seconds, scored = timed(workers, queries, what, pairs)
    row = {"case": name, "what": what, "queries": len(queries), "scored": scored, "counts": counts,
           "seconds": {way: statistics.median(s) for way, s in seconds.items()}, "pairs": pairs, "against": {}}
    own = counts["tree"]
    for way in workers:
        if way != "tree":
            ratios = [a / b for a, b in zip(seconds[way], seconds["tree"])]
            flops = [sum(c[k] for k in PARTS) for c in (counts[way], own)]
            row["against"][way] = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)],
                                   "flops": flops[0] / flops[1], "tokens": counts[way]["tokens"] / own["tokens"]}
            share = statistics.median(ratios) / (flops[0] / flops[1])
            print(f"{name:12s} {what:5s} {len(queries)} queries, against {way:9s}: {statistics.median(ratios):.2f} "
                  f"[{min(ratios):.2f}, {max(ratios):.2f}], FLOPs {flops[0] / flops[1]:.2f} ({share:.0%} of it), tokens "
                  f"{counts[way]['tokens'] / own['tokens']:.2f}", file=sys.stderr, flush=True)
    parts = {k: own[k] / sum(own[j] for j in PARTS) for k in PARTS}
    print(f"{'':12s} of the tree's FLOPs: linear layers {parts['linear']:.0%}, attention {parts['attention']:.0%}, head "
          f"{parts['head']:.0%}; {own['tokens']} tokens, {scored} scored, {row['seconds']['tree']:.2f} s", file=sys.stderr,
          flush=True)
    return row


# What is varied: C = R of one query, queries of one pack. The longest last: what is done before stays.
CURVES = (("C", 2), ("C", 4), ("C", 8), ("queries", 1), ("queries", 2), ("queries", 4), ("queries", 8), ("C", 16))


def cases(names: list[str], workers: dict, pairs: int) -> Iterator[dict]:
    for name in names:
        some = {k: v for k, v in workers.items() if k != "reference" or not name.startswith(("plain", "two_level"))}
        yield compared(name, some, pairs)


def curve(workers: dict, pairs: int) -> Iterator[dict]:
    """What a query costs: rows of seconds of each way and of the floor, median and range. The reference at C = R = 16 once."""
    for axis, value in CURVES:
        queries, what = (made(f"long-{value}")[0], "score") if axis == "C" else (packed(value), "pack")
        rounds = 1 if value == 16 else pairs
        counts, seconds, scored = timed(workers, queries, what, rounds)
        rate = statistics.median(workers["tree"]("rate") for _ in range(5))
        row = {"axis": axis, "value": value, "queries": len(queries), "rounds": rounds, "scored": scored, "counts": counts,
               "rate": rate, "floor": (counts["tree"]["linear"] + counts["tree"]["head"]) / rate / len(queries),
               "seconds": {way: [statistics.median(s) / len(queries), min(s) / len(queries), max(s) / len(queries)]
                           for way, s in seconds.items()}}
        print(f"{axis} {value}: " + ", ".join(
            f"{way} {s[0]:.2f} s a query ({counts[way]['tokens'] // len(queries)} tokens)" for way, s in row["seconds"].items())
            + f"; floor {row['floor']:.2f} s, reference / tree "
            f"{row['seconds']['reference'][0] / row['seconds']['tree'][0]:.2f}", file=sys.stderr, flush=True)
        yield row


def draw(record: Path, stem: Path) -> None:
    from repro.report import look

    rows = json.loads(record.read_text())["rows"]
    with look.style():
        figure, panels = look.subplots(1, 2, (7.2, 3.0))
        for axes, axis, label, ticks in zip(panels, ("C", "queries"), (
                "constitutions = responses of a query", "queries in one pack (2 x 2)"), ((1, 10, 100), (0.25, 0.5, 1, 2))):
            part = [row for row in rows if row["axis"] == axis]
            x = [row["value"] for row in part]
            for way, name, colour, marker in (("reference", "reference: every text in full", look.ORANGE, "s"),
                                              ("tree", "tree: each token once", look.BLUE, "o")):
                middle, low, high = zip(*(row["seconds"][way] for row in part))
                axes.errorbar(x, middle, yerr=[[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]],
                              color=colour, marker=marker, label=name)
                for at, value, top in zip(x, middle, high):
                    axes.annotate(f"{value:.0f}" if value > 10 else f"{value:.2g}", (at, top), (0, 5),
                                  textcoords="offset points", ha="center", fontsize=7)
            axes.plot(x, [row["floor"] for row in part], color=look.GREY, linestyle="--", label="floor: unique tokens at full rate")
            axes.set(xscale="log", yscale="log", xlabel=label, xticks=x, xticklabels=x)
            axes.set_yticks(ticks, labels=[f"{t:g}" for t in ticks])
            axes.minorticks_off()
        panels[0].set_ylabel("seconds to score a query")
        panels[0].legend(loc="upper left", fontsize=8)
        panels[1].set_ylim(0.22, 2.4)
        look.save(figure, stem)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="an older checkout")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("trees.json"))
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("RECORD", "FIGURE"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    sys.path.insert(0, str(HERE))
    if args.draw:
        return draw(*args.draw)
    import torch

    from repro.base.identity import commit
    workers = {"tree": Worker(HERE, "shared")}
    if args.before:
        workers["before"] = Worker(args.before.resolve(), "shared")
    workers["reference"] = Worker(HERE, "reference")
    record = {"benchmark": "trees", "model": "smollm2-135m", "precision": "fp32_master", "machine": platform.machine(),
              "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(), "rows": []}
    if args.before:
        record["before"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=args.before, text=True, capture_output=True).stdout.strip()
    for row in curve(workers, args.pairs) if args.curve else cases(args.cases, workers, args.pairs):
        record["rows"].append(row)
        args.out.write_text(json.dumps(record, indent=1) + "\n")  # what is done stays where it is stopped


if __name__ == "__main__":
    main()
