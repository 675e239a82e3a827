"""What each engine does with what it is asked, seen by asking it: the table of repro/sampling/README.md.

    make vllm && .venv/bin/python tests/engines/habits.py [--engines vllm serve llama] [--out results/engines.json]

Each engine serves SmolLM2-135M on this machine's CPU: vLLM and `transformers serve` its float32 weights (and bfloat16, for
the answers alone), llama.cpp the GGUF file that they were made of (Q4_1). A cell is what came back, in words; the last ones
hold its greedy answers against transformers' in this process, from the weights in the same dtype.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from repro.base.records import read_json, write_json  # noqa: E402
from repro.models import embedded, load  # noqa: E402
from repro.models.decoding import end_tokens  # noqa: E402
from repro.sampling import launch  # noqa: E402

RECORD = ROOT / "results/engines.json"
ASKED = 32  # prompts that are answered greedily
TOKENS = 32
STORY = "Write a story about a river."


@dataclass
class Engine:
    url: str
    model: str
    tokenizer: object

    def post(self, path: str, **body) -> tuple[int, dict]:
        """(status, answer). An answer that is no JSON is {"text": ...}."""
        body = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, data = answer.status, answer.read()
        except urllib.error.HTTPError as e:
            status, data = e.code, e.read()
        try:
            return status, json.loads(data)
        except ValueError:
            return status, {"text": data.decode("utf-8", "replace")}

    @property
    def story(self) -> str:
        """A prompt that the model answers at some length."""
        return chat(self.tokenizer, STORY)

    def complete(self, prompt, **body) -> tuple[int, dict]:
        return self.post("completions", **{"prompt": prompt, "max_tokens": 16, "temperature": 0.0} | body)

    def text(self, prompt, **body) -> str | None:
        """The first choice's; None where the request is refused."""
        status, answer = self.complete(prompt, **body)
        return answer["choices"][0]["text"] if status == 200 else None


def chat(tokenizer, text: str) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


def refusal(status: int, answer: dict) -> str:
    """A refusal with the server's reason."""
    why = answer.get("error") or answer.get("detail") or answer.get("text") or ""
    why = why.get("message", "") if isinstance(why, dict) else why[0].get("msg", "") if isinstance(why, list) and why else why
    why = " ".join(str(why).split()).replace(str(Path.home()), "~")
    return f"refused ({status}: {why if len(why) <= 60 else why[:60] + '...'})"


# ---- one row of the table each: Engine -> words

def unknown_model(engine: Engine) -> str:
    status, answer = engine.complete("a", model="no-such-model")
    return refusal(status, answer) if status != 200 else f"answered, as {answer.get('model')!r}"


def unknown_field(engine: Engine) -> str:
    status, answer = engine.complete("a", no_such_field=1)
    return refusal(status, answer) if status != 200 else "ignored"


def id_prompts(engine: Engine) -> str:
    prompt = engine.story
    status, answer = engine.complete(engine.tokenizer(prompt).input_ids)
    if status != 200:
        return refusal(status, answer)
    return "taken" if answer["choices"][0]["text"] == engine.text(prompt) else "another answer than to the text"


def ids_back(engine: Engine) -> str:
    status, answer = engine.complete("a", return_token_ids=True)
    if status != 200:
        return refusal(status, answer)
    return "given" if answer["choices"][0].get("token_ids") else "not given"


def read_tokens(engine: Engine) -> str:
    prompt = engine.story
    _, answer = engine.complete(prompt)
    usage, want = answer.get("usage") or {}, len(engine.tokenizer(prompt).input_ids)
    return f"{usage.get('prompt_tokens')} for {want}"


def greedy(engine: Engine) -> str:
    return "the same twice" if engine.text(engine.story, max_tokens=48) == engine.text(engine.story, max_tokens=48) else "differs"


def no_temperature(engine: Engine) -> str:
    answers = {engine.post("completions", prompt=engine.story, max_tokens=24)[1]["choices"][0]["text"] for _ in range(3)}
    return "greedy" if answers == {engine.text(engine.story, max_tokens=24)} else "drawn" if len(answers) > 1 else "another, the same each time"


def temperature(engine: Engine) -> str:
    hot = {engine.text(engine.story, temperature=1.5, seed=k, max_tokens=24) for k in (1, 2, 3)}
    return "refused" if None in hot else "drawn" if len(hot) == 3 else "ignored" if hot == {engine.text(engine.story, max_tokens=24)} else "?"


def seed(engine: Engine) -> str:
    same = {engine.text(engine.story, temperature=1.5, seed=7, max_tokens=24) for _ in range(3)}
    return "nothing is drawn" if temperature(engine) != "drawn" else "obeyed" if len(same) == 1 else "ignored"


def choices(engine: Engine) -> str:
    status, answer = engine.complete(engine.story, n=2, temperature=1.0)
    return refusal(status, answer) if status != 200 else "obeyed" if len(answer["choices"]) == 2 else "ignored: one choice"


def stop(engine: Engine) -> str:
    plain = engine.text(engine.story, max_tokens=24)
    word = plain.split()[3]
    cut = engine.text(engine.story, max_tokens=24, stop=[word])
    return "refused" if cut is None else "obeyed" if word not in cut and plain.startswith(cut) else "ignored"


def most_tokens(engine: Engine) -> str:
    status, answer = engine.complete(engine.story, max_tokens=5)
    said = (answer.get("usage") or {}).get("completion_tokens")
    return f"{said} of 5, {answer['choices'][0].get('finish_reason')}"


def penalty(engine: Engine) -> str:
    prompt = "la la la la la la la la"
    a, b = engine.text(prompt), engine.text(prompt, repetition_penalty=1.8)
    return "refused" if b is None else "ignored" if a == b else "obeyed"


def logprobs(engine: Engine) -> str:
    status, answer = engine.complete("a", logprobs=2)
    completion = "refused" if status != 200 else "given" if answer["choices"][0].get("logprobs") else "ignored"
    status, answer = engine.post("chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=2, logprobs=True,
                                 top_logprobs=2)
    chatted = "refused" if status != 200 else "given" if answer["choices"][0].get("logprobs") else "ignored"
    return completion if completion == chatted else f"{completion}, of a chat {chatted}"


def schema(engine: Engine) -> str:
    shape = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    status, answer = engine.post("chat/completions", messages=[{"role": "user", "content": "Tell me of rivers."}], max_tokens=40, temperature=0.0,
                                 response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": shape}})
    if status != 200:
        return refusal(status, answer)
    text = answer["choices"][0]["message"]["content"]
    return "obeyed" if re.match(r'\s*\{\s*"a"', text) else "ignored"


def too_long(engine: Engine, context: int) -> str:
    """A prompt longer than the context that the server was started with."""
    ids = engine.tokenizer("word " * (context + 200)).input_ids
    status, answer = engine.complete(engine.tokenizer.decode(ids))
    if status != 200:
        return refusal(status, answer)
    usage = answer.get("usage") or {}
    return f"answered: {usage.get('prompt_tokens')} tokens read of {len(ids)}"


def tells(engine: Engine) -> str:
    """What /v1/models says of the weights."""
    try:
        with urllib.request.urlopen(f"{engine.url}/models", timeout=60) as answer:
            rows = json.loads(answer.read()).get("data") or [{}]
    except (OSError, ValueError):
        return "nothing"
    row = next((row for row in rows if engine.model in (row.get("id"), row.get("root"))), rows[0])
    facts = ["their folder"] if row.get("root") == engine.model else []
    if meta := row.get("meta"):
        facts.append(f"{8 * meta['size'] / meta['n_params']:.1f} bits a weight")
    return ", ".join(facts) or "its name alone"


HABITS = {"a model's name that it does not serve": unknown_model, "a field that it does not know": unknown_field,
          "a prompt of token ids": id_prompts, "`return_token_ids`": ids_back, "prompt tokens counted, chat of a template": read_tokens,
          "`temperature: 0`": greedy, "no `temperature`": no_temperature, "`temperature: 1.5`": temperature, "`seed`": seed, "`n: 2`": choices,
          "`stop`": stop, "`max_tokens`": most_tokens, "`repetition_penalty`": penalty, "`logprobs`": logprobs, "`response_format`, a schema": schema,
          "what it says of its weights": tells}


BEYOND = "a prompt longer than its context"


# ---- greedy answers

def prompts(tokenizer) -> list[str]:
    """Prompts of dialogue's form, of different lengths, about queries of ours."""
    from repro.config import DataSpec
    from repro.text.queries import load_queries

    queries, _ = load_queries("embedded", spec=DataSpec(source="embedded"))
    some = queries[:: len(queries) // ASKED][:ASKED]
    ways = ("Answer in one short sentence.", "Answer at length, with an example.", "Use simple words.", "Use the words of a scientist.")
    return [chat(tokenizer, f"{q.text}\n\n{ways[k % 4]}") for k, q in enumerate(some)]


def here(place: str, dtype: str, texts: list[str]) -> list[list[int]]:
    """Transformers' greedy answers in this process, one prompt at a time: no padding, nothing shared."""
    import torch

    model, tokenizer = load.load_model(place, dtype=dtype), load.load_tokenizer(place)
    ends = end_tokens(tokenizer, place)
    answers = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, num_beams=1, use_cache=True)
            new = out[0, ids.input_ids.shape[1]:].tolist()
            answers.append(new[: next((k for k, t in enumerate(new) if t in ends), len(new))])
    return answers


def same(engine: Engine, texts: list[str], want: list[list[int]], at_once: int) -> dict:
    """How many answers are those of this process, as token ids (as text where no ids come back)."""
    def ask(text):
        body = {"max_tokens": TOKENS}
        status, answer = engine.complete(engine.tokenizer(text, add_special_tokens=False).input_ids, return_token_ids=True, **body)
        if status == 200 and (ids := answer["choices"][0].get("token_ids")):
            return engine.tokenizer.decode([t for t in ids if t != engine.tokenizer.eos_token_id])
        return engine.text(text, **body)

    with ThreadPoolExecutor(at_once) as pool:
        got = list(pool.map(ask, texts))
    def clean(text):
        return text.replace("<|im_end|>", "").strip()

    wanted = [clean(engine.tokenizer.decode(ids)) for ids in want]
    return {"same": sum(clean(a) == b for a, b in zip(got, wanted)), "of": len(wanted), "at_once": at_once,
            "first_words_same": sum(clean(a).split()[:5] == b.split()[:5] for a, b in zip(got, wanted))}


# ---- the engines

@contextmanager
def serving(kind: str, dtype: str, place: str, tokenizer, work: Path, context: int):
    """(Engine, its version, seconds until it was ready)."""
    log, began = work / f"{kind}-{dtype}.log", time.monotonic()
    if kind == "llama":
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(log, "w") as out:
            child = subprocess.Popen([sys.executable, str(ROOT / "tests/llama_server.py")], stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:\d+/v1", log.read_text())):
                time.sleep(0.2)
                assert child.poll() is None, log.read_text()[-2000:]
            from llama_server import NAME
            yield Engine(found[0], NAME, tokenizer), f"llama.cpp (xllamacpp {version('xllamacpp')})", time.monotonic() - began
        finally:
            child.kill()
            child.wait()
        return
    with launch.served("vllm" if kind == "vllm" else "server", place, url=None, dtype=dtype, share=None, context=context, log=log,
                       say=lambda line: print(line, flush=True), ends={tokenizer.eos_token_id}) as server:
        name = f"vLLM {server.facts()['version']}" if kind == "vllm" else f"transformers serve {version('transformers')}"
        yield Engine(server.endpoint.url, server.endpoint.model, tokenizer), name, time.monotonic() - began


# ---- the table

README, START, END = ROOT / "repro/sampling/README.md", "<!-- engines: tests/engines/habits.py --table -->", "<!-- end of engines -->"


def table(record: dict) -> list[str]:
    """Markdown: a line a habit, a column an engine; then how many greedy answers are transformers'; then tokens a second."""
    engines = [record["engines"][k] for k in CONTEXT if k in record["engines"]]
    lines = ["| asked | " + " | ".join(f"{e['name']}, {e['weights']}" for e in engines) + " |", "|---|" + "---|" * len(engines)]
    for what in (*HABITS, BEYOND):
        lines.append(f"| {what} | " + " | ".join(e["cells"][what].replace("|", "\\|") for e in engines) + " |")
    for what, dtype in (("greedy answers that are transformers', one at a time, 16 at once", "float32"), ("the same, both in bfloat16", "bfloat16")):
        cells = [", ".join(f"{a['same']} of {a['of']}" for a in e["answers"][dtype]) if dtype in e["answers"] else "NOT RUN" for e in engines]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    if speed := record.get("speed"):
        arms = sorted(speed["arms"].items(), key=lambda arm: (arm[0].startswith("vLLM"), statistics.median(arm[1]["tokens_a_second"])))
        first = statistics.median(arms[0][1]["tokens_a_second"])
        lines += ["", f"{speed['processor']}; {speed['threads']} threads; prompts of {speed['tokens_of_a_prompt']:.0f} tokens, answers of at most 48.", "",
                  "| | tokens a second, median (least, most; rounds) | times the first | prompt tokens at hand |", "|---|---|---|---|"]
        for name, row in arms:
            found = row["tokens_a_second"]
            lines.append(f"| {name} | {statistics.median(found):.0f} ({min(found):.0f}, {max(found):.0f}; {len(found)}) | "
                         f"{statistics.median(found) / first:.2f} | " + (f"{row['prefix']:.0%}" if "prefix" in row else "") + " |")
    return lines


def with_table(text: str, record: dict) -> str:
    head, rest = text.split(START)
    return head + "\n".join([START, *table(record), END]) + rest.split(END)[1]


CONTEXT = {"vllm": 1024, "serve": 8192, "llama": 2560}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=list(CONTEXT), default=list(CONTEXT))
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--table", action="store_true", help="run nothing: write the record into repro/sampling/README.md")
    args = parser.parse_args()
    if args.table:
        README.write_text(with_table(README.read_text(), read_json(args.out)))
        return
    place = str(embedded.embedded_model())
    tokenizer = load.load_tokenizer(place)
    texts = prompts(tokenizer)
    want = {dtype: here(place, dtype, texts) for dtype in ("float32", "bfloat16")}
    record = read_json(args.out) if args.out.is_file() else {"engines": {}}
    with tempfile.TemporaryDirectory(prefix="engines-") as work:
        for kind in args.engines:
            with serving(kind, "float32", place, tokenizer, Path(work), CONTEXT[kind]) as (engine, name, ready):
                row = {"name": name, "ready_s": round(ready, 1), "context": CONTEXT[kind], "weights": "Q4_1" if kind == "llama" else "float32"}
                row["cells"] = {}
                for what, look in HABITS.items():
                    row["cells"][what] = look(engine)
                    print(f"{name}: {what}: {row['cells'][what]}", flush=True)
                row["cells"][BEYOND] = too_long(engine, CONTEXT[kind])
                row["answers"] = {"float32": [same(engine, texts, want["float32"], n) for n in (1, 16)]}
            if kind == "vllm":
                with serving(kind, "bfloat16", place, tokenizer, Path(work), CONTEXT[kind]) as (engine, *_):
                    row["answers"]["bfloat16"] = [same(engine, texts, want["bfloat16"], n) for n in (1, 16)]
            print(f"{name}: {row['cells'][BEYOND]}; {row['answers']}", flush=True)
            record["engines"][kind] = row
            write_json(args.out, record)


if __name__ == "__main__":
    main()
