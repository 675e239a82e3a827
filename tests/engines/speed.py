"""Tokens a second of vLLM and of this process's own sampling on a CPU, over exp1's prompts: results/engines.json, "speed".

    make vllm && .venv/bin/python tests/engines/speed.py [--out results/engines.json]

64 prompts a round (16 held-out queries under four constitutions each, no query twice), answers of at most 48 tokens, float32
unless said; a round of each arm is timed after one that is not. Tokens are those of the answers, counted from their ids. Arms
take turns, a server an arm, alone on the machine. `prefix` says what share of the prompts' tokens vLLM had at hand.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/engines")]

from habits import RECORD, Engine, chat  # noqa: E402

from repro.base.identity import commit, rng  # noqa: E402
from repro.base.records import read_json, write_json  # noqa: E402
from repro.models import embedded, load  # noqa: E402
from repro.models.decoding import end_tokens  # noqa: E402
from repro.sampling import launch  # noqa: E402
from repro.sampling.local import sample_responses  # noqa: E402

TOKENS, QUERIES, ROUNDS = 48, 16, 3
INSTALLED, ONE_IDLE = ["--block-size", "128"], {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}  # what vLLM chooses by itself, on two cores
ARMS = {  # name -> (engine, answers at a time, its flags, its environment, dtype)
    "transformers, 32 at a time": ("here", 32, [], {}, "float32"),
    "transformers, 64 at a time": ("here", 64, [], {}, "float32"),
    "vLLM, 32 at a time": ("vllm", 32, INSTALLED, ONE_IDLE, "float32"),
    "vLLM, 64 at a time": ("vllm", 64, INSTALLED, ONE_IDLE, "float32"),
    "vLLM, 64, blocks of 32 tokens": ("vllm", 64, [], ONE_IDLE, "float32"),
    "vLLM, 64, no core reserved": ("vllm", 64, INSTALLED, {}, "float32"),
    "vLLM, 64, bfloat16": ("vllm", 64, INSTALLED, ONE_IDLE, "bfloat16"),
    "vLLM, 64, as a run starts it": ("vllm", 64, [], {}, "float32"),
    "vLLM, 64, as a run starts it, bfloat16": ("vllm", 64, [], {}, "bfloat16"),
}


def rounds(tokenizer) -> list[list[str]]:
    """Prompts of each round, the warm one first; a query's stand side by side, as a run asks them."""
    from repro.config import DataSpec
    from repro.text.principles import load_constitutions
    from repro.text.queries import load_queries

    queries, _ = load_queries("embedded", spec=DataSpec(source="embedded"))
    constitutions = load_constitutions("dialogue_mini").sample(rng("speed"))
    found = []
    for k in range(ROUNDS + 1):
        part = queries[k * QUERIES: (k + 1) * QUERIES]
        found.append([chat(tokenizer, f"{q.text}\n\n{' '.join(c.statements())}") for q, c in itertools.product(part, constitutions)])
    return found


def metric(url: str, name: str) -> float:
    """The sum of one of vLLM's counters."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}(_total)?\{{", line))


def over_http(engine: Engine, texts: list[str], at_once: int) -> int:
    """The tokens of the answers."""
    def ask(text):
        status, answer = engine.complete(engine.tokenizer(text, add_special_tokens=False).input_ids, max_tokens=TOKENS, return_token_ids=True)
        assert status == 200, answer
        return len(answer["choices"][0]["token_ids"])

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(ask, texts))


def timed(act, parts: list[list[str]]) -> list[float]:
    """Tokens a second of each round but the first."""
    found = []
    for texts in parts:
        began = time.perf_counter()
        tokens = act(texts)
        found.append(tokens / (time.perf_counter() - began))
    return found[1:]


def arm(name: str, place: str, tokenizer, parts: list[list[str]], work: Path) -> dict:
    kind, at_once, flags, env, dtype = ARMS[name]
    if kind == "here":
        model, ends = load.load_model(place, dtype=dtype), end_tokens(tokenizer, place)

        def act(texts):
            return sum(len(a["ids"]) + a["finished"] for _, answers in sample_responses(
                model, tokenizer, texts, max_new_tokens=TOKENS, batch_size=at_once, done={}, ends=ends) for a in answers)

        return {"tokens_a_second": timed(act, parts)}
    for variable in ONE_IDLE:  # of the arm before
        os.environ.pop(variable, None)
    os.environ |= env
    plain = launch.command
    launch.command = lambda *args, **how: [*plain(*args, **how), *flags]
    try:
        with launch.served("vllm", place, url=None, dtype=dtype, share=None, context=256, log=work / "log", say=lambda line: None) as server:
            engine = Engine(server.endpoint.url, server.endpoint.model, tokenizer)
            found = timed(lambda texts: over_http(engine, texts, at_once), parts)
            asked, hit = (metric(engine.url, f"vllm:prefix_cache_{what}") for what in ("queries", "hits"))
        return {"tokens_a_second": found, "prefix": hit / asked if asked else 0.0}
    finally:
        launch.command = plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--turns", type=int, default=2, help="of each arm, one after the other")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    import torch
    from check import processor

    place = str(embedded.embedded_model())
    tokenizer = load.load_tokenizer(place)
    parts, rows = rounds(tokenizer), {}
    for turn, name in itertools.product(range(args.turns), args.arms):
        with tempfile.TemporaryDirectory(prefix="speed-") as work:
            found = arm(name, place, tokenizer, parts, Path(work))
        row = rows.setdefault(name, {"tokens_a_second": []})
        row["tokens_a_second"] += [round(x, 1) for x in found.pop("tokens_a_second")]
        row |= found
        print(f"turn {turn + 1}: {name}: {row}", flush=True)
    record = read_json(args.out) if args.out.is_file() else {}
    rows = record.get("speed", {}).get("arms", {}) | rows
    record["speed"] = {"processor": processor(), "threads": torch.get_num_threads(), "commit": commit(), "prompts": len(parts[0]),
                       "tokens_of_a_prompt": round(sum(len(tokenizer(t).input_ids) for p in parts for t in p) / sum(map(len, parts)), 1), "arms": {name: rows[name] for name in ARMS if name in rows}}
    write_json(args.out, record)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests/perf"))
    main()
