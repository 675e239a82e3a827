"""The LLM judge against real servers on this machine, with the embedded model: llama.cpp (xllamacpp) and `transformers
serve`. What is tested is the protocol; a model of 135M parameters is no judge (results/judges/)."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from llama_server import NAME

from repro.base.records import UserError
from repro.base.settings import JudgeSpec
from repro.judges.llm import Pair, ask_judge
from repro.models import embedded
from repro.servers.endpoint import Endpoint
from repro.servers.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent
SERVING = importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")
PAIRS = [Pair(id=str(k), query=q, principles=("Answers should be short.",), ours=a, theirs=b) for k, (q, a, b) in enumerate((
    ("How do I keep bread fresh?", "In a paper bag.", "There are many things that could be said about bread, and many people have said them."),
    ("Why is the sky blue?", "Air scatters blue light most.", "Let me begin with the history of optics, which is long."),
    ("What is 2 + 2?", "4", "The sum of two and two, as is widely known, is four."),
    ("Name a colour.", "Red", "Red")))]


@contextmanager
def process(argv, log: Path):
    with open(log, "w") as out:
        child = subprocess.Popen([sys.executable, *argv], stdout=out, stderr=subprocess.STDOUT,
                                 env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def wait_until(ready, child, log: Path):
    end = time.monotonic() + 90
    while time.monotonic() < end and child.poll() is None:
        if (value := ready()):
            return value
        time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("NOT RUN: xllamacpp is not installed; make setup installs it")
    log = tmp_path_factory.mktemp("llama") / "log"
    with process([str(ROOT / "tests/llama_server.py")], log) as child:
        address = re.compile(r"http://127\.0\.0\.1:\d+/v1")  # amid what the server logs, at times in the same line
        yield wait_until(lambda: (found := address.search(log.read_text())) and found[0], child, log)


@contextmanager
def transformers_serve(log: Path, *argv: str):
    """The address of `transformers serve`, once it is ready."""
    if not SERVING:
        pytest.skip("NOT RUN: transformers' serving extra is not installed; make setup installs it")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def healthy():
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except OSError:
            return False

    with process(["-m", "transformers.cli.transformers", "serve", *argv, "--host", "127.0.0.1", "--port", str(port), "--device",
                  "cpu"], log) as child:
        wait_until(healthy, child, log)
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` with the embedded model; it takes no schema and gives no log-probs."""
    if not SERVING:
        pytest.skip("NOT RUN: transformers' serving extra is not installed; make setup installs it")
    folder = str(embedded.embedded_model())
    with transformers_serve(tmp_path_factory.mktemp("serve") / "log", folder) as url:
        yield folder, url


def ask(path, url, answer, model=NAME, pairs=PAIRS, **changes):
    spec, said = replace(JudgeSpec(judges=(), model="m", name="small"), answer=answer, **changes), []
    endpoint = Endpoint(model=model, base_url=url, concurrency=2, deadline_s=100)
    verdicts, facts = ask_judge(spec, pairs, endpoint, path, said.append)
    return verdicts, facts, said


@pytest.mark.slow
def test_judge_by_llama_cpp_with_logprobs_gives_a_verdict_on_every_pair(llama, tmp_path):
    verdicts, facts, said = ask(tmp_path / "l.jsonl", llama, "logprobs")
    assert facts["answer"] == "logprobs" and [v.outcome for v in verdicts][3] == "tie"
    assert all(v.score is not None and set(v.orders.values()) <= {"A", "B"} for v in verdicts)
    ledger = Ledger(tmp_path / "l.jsonl", {"judge": "small"})
    answers = [a for each in ledger.answers.values() for a in each]
    assert len(answers) == 7 and {a["usage"]["completion_tokens"] for a in answers} == {1}
    again = ask(tmp_path / "l.jsonl", llama, "logprobs")
    assert again[0] == verdicts and "0 requests to make" in again[2][0]


@pytest.mark.slow
def test_judge_by_llama_cpp_keeps_to_the_schema(llama, tmp_path):
    """"auto" finds the schema; each finished answer parses (the grammar allows nothing else)."""
    verdicts, facts, _ = ask(tmp_path / "l.jsonl", llama, "auto", pairs=PAIRS[:2])
    assert facts["answer"] == "schema"
    ledger = Ledger(tmp_path / "l.jsonl", {"judge": "small"})
    finished = [a for each in ledger.answers.values() for a in each if a["choices"][0]["finish_reason"] == "stop"]
    assert finished and all(a["choices"][0]["message"]["content"].startswith("{") for a in finished)
    assert {v.outcome for v in verdicts} <= {"win", "loss", "flip", "unparsed"}


@pytest.mark.slow
def test_judge_by_transformers_serve_falls_back_to_text(served, tmp_path):
    folder, url = served
    verdicts, facts, said = ask(tmp_path / "l.jsonl", url, "auto", model=folder, pairs=PAIRS[2:], max_tokens=24)
    assert facts["answer"] == "text" and verdicts[1].outcome == "tie"
    assert verdicts[0].outcome in ("win", "loss", "flip", "unparsed")  # it answered; a verdict is not promised
    ledger = Ledger(tmp_path / "l.jsonl", {"judge": "small"})
    assert not ledger.errors and all(a["usage"]["prompt_tokens"] > 100 for each in list(ledger.answers.values())[1:] for a in each)
    with pytest.raises(UserError, match="does not offer --answer logprobs .*use --answer text"):
        ask(tmp_path / "l.jsonl", url, "logprobs", model=folder)
