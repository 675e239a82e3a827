"""Sampling behind a server: the prompts it gets, what becomes of its answers, faults, resuming, and that what a run starts
ends with the run. The real servers are `transformers serve` and, where $SAMI_VLLM names one, vLLM."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from judge_server import TextServer
from processes import left
from test_experiments import small
from test_judge_real import SERVING

from repro import cli
from repro.base import identity, records, settings
from repro.base.records import UserError, read_jsonl
from repro.sampling import launch, local
from repro.sampling import server as sampling_server
from repro.servers import client
from repro.servers.endpoint import Endpoint
from repro.stages import draws
from repro.stages.run import Run
from repro.stages.sample import sample_to_file

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests/fake_vllm.py"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """vLLM, as far as its command line and its answers go."""
    script = tmp_path / "vllm"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {FAKE} \"$@\"\n")
    script.chmod(0o755)
    monkeypatch.setenv("SAMI_VLLM", str(script))
    return script


def prepared(tiny, folder: Path, engine: str, name="exp1", **more) -> Run:
    experiment = small(cli.load_experiment(name, "paper")[0], tiny)
    experiment = dataclasses.replace(experiment, baseline=None, writer=None, sampling=dataclasses.replace(
        experiment.sampling, engine=engine, max_new_tokens=24, dtype="float32"))
    run = Run(experiment, folder, more.pop("say", lambda line: None), **more)
    run.prepare()
    run.adopt(run.constitutions)
    return run


def sample(run: Run, iteration=0) -> list[dict]:
    jobs = [(item.query, c) for item in run.items() for c in item.constitutions]
    texts = [draws.prompt(run.voice, c, q, "evaluation", sample=True) for q, c in jobs]
    return sample_to_file(run, jobs, texts, iteration, run.folder / "responses/x.jsonl", "x")


def as_text(rows: list[dict]) -> list[dict]:
    """What a server of text can know of responses."""
    return [{k: v for k, v in row.items() if k not in ("ids", "tokens", "end")} for row in rows]


@pytest.fixture(scope="module")
def calm(tiny, tmp_path_factory) -> list[dict]:
    """What a server of token ids says without a fault."""
    with TextServer(tokenizer=tiny / "tokenizer.json", lists={str(tiny): str(tiny)}).serve() as url:
        return sample(prepared(tiny, tmp_path_factory.mktemp("calm"), "vllm", sampler_url=url))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 5.0)
    send = Endpoint.__init__

    def quick(self, **fields):
        send(self, **{"backoff_s": 0.01} | fields)

    monkeypatch.setattr(Endpoint, "__init__", quick)


# ---- the configuration

def test_the_engine_is_part_of_the_configuration_and_the_default_keeps_its_hash():
    base = cli.load_experiment("exp1", "mini")[0]
    assert base.sampling.engine == "transformers"
    fields = identity.flatten(base.to_json())
    for younger in ("sampling.engine", "sampling.reasoning", "train.dropout"):
        fields.pop(younger)
    assert identity.config_hash(base, {}) == records.digest(fields)  # what was run before the field was there
    hashes = {identity.config_hash(dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, engine=e)), {})
              for e in settings.ENGINES}
    assert len(hashes) == 3
    with pytest.raises(UserError, match="SamplingSpec.engine: 'vlm' is unknown; .*did you mean 'vllm'"):
        settings.SamplingSpec(engine="vlm")
    for name in ("exp1", "exp2", "exp3"):
        assert {e.sampling.engine for e in cli.load_experiment(name, "paper")} == {"vllm"}
        assert {e.sampling.engine for e in cli.load_experiment(name, "mini")} == {"transformers"}


def test_the_missing_step_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SAMI_VLLM", raising=False)
    with pytest.raises(UserError, match="there is no vllm on PATH; install it in an environment of its own"):
        launch.check("vllm", None)
    monkeypatch.setenv("SAMI_VLLM", "/nowhere/vllm")
    with pytest.raises(UserError, match="SAMI_VLLM is '/nowhere/vllm', which is no executable"):
        launch.check("vllm", None)
    launch.check("vllm", "http://127.0.0.1:8000/v1")
    with pytest.raises(UserError, match="--sampler-url: the engine transformers samples in this process"):
        launch.check("transformers", "http://127.0.0.1:8000/v1")
    with pytest.raises(UserError, match="expected http"):
        launch.check("server", "localhost:8000")


def test_the_command_line_of_vllm(fake):
    argv = launch.command("vllm", "m", port=7, dtype="bfloat16", gpus=8, share=None, context=900)
    assert argv == ["env", "-u", "PYTHONPATH", str(fake), "serve", "m", "--host", "127.0.0.1", "--port", "7", "--dtype",
                    "bfloat16", "--tensor-parallel-size", "8", "--max-model-len", "900", "--seed", "0", "--generation-config",
                    "vllm"]
    argv = launch.command("vllm", "m", port=7, dtype="bfloat16", gpus=8, share=2, context=900)
    assert argv[argv.index("--tensor-parallel-size"):][:4] == ["--tensor-parallel-size", "2", "--data-parallel-size", "4"]


# ---- prompts and answers

def test_prompts_go_as_the_token_ids_that_the_model_is_trained_with():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    ids = tokenizer("<|im_start|>ab", add_special_tokens=False).input_ids
    extra = {"return_token_ids": True, "repetition_penalty": 1.0}  # which vLLM else takes from the weights' generation config
    assert sampling_server.request("vllm", tokenizer, "<|im_start|>ab", 5, {2}, ("###",)) == {
        "prompt": ids, "max_tokens": 5, "temperature": 0.0, "stop": ["###"], "extra_body": extra}
    assert sampling_server.request("server", tokenizer, "<|im_start|>ab", 5, {2}, ("###",)) == {
        "prompt": "<|im_start|>ab", "max_tokens": 5, "temperature": 0.0}
    assert sampling_server.request("vllm", tokenizer, "<|im_start|>ab", 5, {2, 9})["extra_body"] == extra | {
        "stop_token_ids": [9]}  # what the weights' generation config names beside the tokenizer's
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    assert tokenizer("ab").input_ids[0] == 1
    assert sampling_server.request("vllm", tokenizer, "<|im_start|>ab", 5, {2})["prompt"] == ids  # not two of them
    assert sampling_server.request("server", tokenizer, "<|im_start|>ab", 5, {2})["prompt"] == "ab"
    with pytest.raises(UserError, match="would read another prompt than the model is trained with; use --sampler vllm"):
        sampling_server.request("server", tokenizer, "ab", 5, {2})


def test_the_first_space_of_a_sentencepiece_response_stays():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "\u2581": 2, "w": 3, "as": 4, "\u2581was": 5, "a": 6, "s": 7},
                                   merges=[("a", "s")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([5, 3]) == "wasw"
    assert local.answer_of(tokenizer, [5, 3, 1, 4], {1}) == {
        "text": " wasw", "ids": [5, 3], "tokens": 2, "finished": True}
    assert local.answer_of(tokenizer, [3, 5], {1}) == {
        "text": "w was", "ids": [3, 5], "tokens": 2, "finished": False}


@pytest.mark.parametrize("name", ["exp1", "exp2"])
def test_both_ways_in_give_the_same_responses(tiny, tmp_path, name):
    """The same continuations, told as token ids that end at a stop string, or as text that runs on: cut where the format
    ends, counted alike."""
    left = []
    for engine, options in (("vllm", {"tokenizer": tiny / "tokenizer.json", "lists": {str(tiny): str(tiny)}}), ("server", {})):
        server = TextServer(**options)
        with server.serve() as url:
            run = prepared(tiny, tmp_path / engine, engine, name, sampler_url=url)
            left.append(sample(run))
        probe, *asked = server.bodies
        assert len(asked) == len(left[-1]) and all(b["temperature"] == 0.0 and b["max_tokens"] == 24 for b in asked)
        assert [b.get("stop") for b in asked] == [list(run.voice.form.stops) if engine == "vllm" else None] * len(asked)
        opening = run.voice.tokenizer(run.voice.form.opening).input_ids if engine == "vllm" else run.voice.form.opening
        assert all(b["prompt"][len(b["prompt"]) - len(opening):] == opening for b in asked)
    assert left[0] == left[1] and len({row["text"] for row in left[0]}) > 5
    for row in left[0]:
        assert row["text"].startswith(run.voice.form.opening + " ") and not any(stop in row["text"] for stop in run.voice.form.stops)
        assert row["text"].endswith(".") if row["finished"] else len(row["text"]) >= 22  # of 24, white space at the end dropped
    assert any(row["finished"] for row in left[0]) and (name == "exp2" or not all(row["finished"] for row in left[0]))


def test_control_tokens_that_are_spelled_out_are_dropped(tiny, tmp_path):
    class Server(TextServer):
        def continuation(self, prompt):
            return "a<|im_<|im_end|>end|>b"

    for engine, options in (("server", {}), ("vllm", {"tokenizer": tiny / "tokenizer.json"})):
        answer = Server(**options).answer({"model": "m", "prompt": "x", "max_tokens": 99, "return_token_ids": True})
        if engine == "vllm":  # as text it is encoded to the control token itself
            answer["choices"][0]["token_ids"] = [*byte_tokenizer()("a<|im_").input_ids, *byte_tokenizer()("end|>b").input_ids]
        assert sampling_server.read_answer(engine, byte_tokenizer(), answer, {2})["text"] == "ab"


def test_no_proxy_stands_before_a_server_of_this_machine(tiny, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with TextServer().serve() as url:
        assert len(sample(prepared(tiny, tmp_path / "run", "server", sampler_url=url))) == 16


# ---- whose answers they are

class Drawing(TextServer):
    """It knows no temperature."""

    drawn = 0

    def continuation(self, prompt):
        self.drawn += 1
        return super().continuation(f"{prompt} {self.drawn}")


def odd(tiny, what: str) -> TextServer:
    server = (Drawing if what == "draws" else TextServer)(tokenizer=tiny / "tokenizer.json", lists=None if what == "any name" else {str(tiny): str(tiny)})
    server.any_name = what == "any name"
    server.tells = {"meta": {"n_params": 1000, "size": 562}} if what == "quantised" else {}
    return server


@pytest.mark.parametrize("what, said", [("draws", "it draws its answers, although it is asked at temperature 0"),
                                        ("any name", "it answers to any model's name and does not list this one"),
                                        ("quantised", "its weights are quantised to 4.5 bits each")])
def test_a_server_whose_answers_are_not_those_of_the_weights_stops_the_run_or_is_taken_as_it_is(tiny, tmp_path, what, said):
    """Neither is seen in a single answer. Taken as it is, the run says so in its record."""
    server, lines = odd(tiny, what), []
    with server.serve() as url:
        with pytest.raises(UserError, match=f"{url} does not answer as {tiny} does: {said}.*--sampler-as-is takes them") as e:
            sample(prepared(tiny, tmp_path / "run", "vllm", sampler_url=url))
        assert "\n" not in str(e.value) and len(server.requests) == 1  # nothing was sampled
        run = prepared(tiny, tmp_path / "as it is", "vllm", sampler_url=url, sampler_as_is=True, say=lines.append)
        assert len(sample(run)) == 16
    assert said in run.record["sampled_by"]["differs"][0] and any(said in line for line in lines)
    run.partial(run.folder / "responses/x.jsonl").unlink()
    with TextServer(tokenizer=tiny / "tokenizer.json", lists={str(tiny): str(tiny)}).serve() as url:  # a later stage, a right server
        run.sampler_url = url
        sample(run)
    assert said in records.read_json(run.folder / "run.json")["sampled_by"]["differs"][0]


@pytest.mark.parametrize("meta", [{"n_params": 1000, "size": 2000}, {"n_params": 0, "size": 5}, {"n_params": "many"}, 3, None])
def test_what_a_server_tells_of_its_size_is_believed_where_it_is_two_numbers(meta):
    from repro.sampling import alike

    assert alike.differences(lambda body: {}, "server", "m", {"id": "m", "meta": meta}) == []


def test_a_server_that_reads_another_text_than_is_trained_with_is_said(tiny, tmp_path):
    """As one that puts a second opening token before it: the answer looks like any other."""
    class Opens(TextServer):
        def reads(self, text):
            return super().reads(text) + 1

    with Opens().serve() as url:
        with pytest.raises(UserError, match=r"16 of 16 responses are missing: .* an answer to a prompt of (\d+) tokens, not \d+"):
            sample(prepared(tiny, tmp_path / "run", "server", sampler_url=url))


def test_an_answer_longer_than_it_was_asked_for_is_no_answer(tiny, tmp_path, monkeypatch):
    class Long(TextServer):
        def answer(self, body):
            right = super().answer(body)
            right["usage"]["completion_tokens"] = body["max_tokens"] + 1
            return right

    with Long(tokenizer=tiny / "tokenizer.json", lists={str(tiny): str(tiny)}).serve() as url:
        with pytest.raises(UserError, match="must serve .* now.*an answer of 2 tokens, where 1 were asked for"):
            sample(prepared(tiny, tmp_path / "run", "vllm", sampler_url=url))


# ---- faults, and going on

@pytest.mark.parametrize("fault", ["429", "500", "503", "half", "reset", "garbage", "wrong_schema", "empty_choices",
                                   "error_in_200", "other_model", "aborted", "no_ids", "nan", "short", "other_prompt", "no_usage"])
def test_a_fault_costs_nothing_but_another_request(tiny, calm, tmp_path, fault):
    place, want = str(tiny), calm
    server = TextServer(lambda k, body: fault if k and k % 4 == 1 else None, tokenizer=tiny / "tokenizer.json", lists={place: place})
    with server.serve() as url:
        run = prepared(tiny, tmp_path / "run", "vllm", sampler_url=url)
        assert sample(run) == want
    assert len(server.fired) >= 3 and len(server.requests) == 1 + len(want) + len(server.fired)
    assert len(set(server.requests[1:])) == len(want)


def test_what_is_missing_is_an_error_and_what_was_answered_is_not_asked_again(tiny, calm, tmp_path, monkeypatch):
    place = str(tiny)
    monkeypatch.setattr(sampling_server, "CONCURRENCY", {"vllm": 1})
    monkeypatch.setattr(client, "IN_A_ROW", 2)
    server = TextServer(lambda k, body: "400" if k > 5 else None, tokenizer=tiny / "tokenizer.json", lists={place: place})
    with server.serve() as url:
        run = prepared(tiny, tmp_path / "run", "vllm", sampler_url=url)
        with pytest.raises(UserError, match=r"x: 11 of 16 responses are missing: 2 requests in a row failed, .*HTTP 400.*run "
                                            "the same command to go on"):
            sample(run)
        assert not (run.folder / "responses/x.jsonl").exists()
        partial = run.folder / "responses/x.partial.jsonl"
        with open(partial, "a") as f:
            f.write('{"record": "outcome", "torn')
        server.faults = lambda k, body: None
        before = len(server.requests)
        rows = sample(run)
        assert len(server.requests) == before + 1 + 11  # the probe, and what was missing
        partial_rows = [row for row in read_jsonl(partial) if row.get("status") == "answered"]
        assert len(partial_rows) == len(rows) == 16
        again = len(server.requests)
        assert sample(run) == rows and len(server.requests) == again
    assert rows == calm


@pytest.mark.parametrize("signalled", [SystemExit, KeyboardInterrupt])
def test_a_signal_amid_the_requests_is_told_once_and_without_a_traceback(tiny, calm, tmp_path, monkeypatch, caplog, signalled):
    """It is raised wherever Python is: in a request's task as often as not, whose exception asyncio then tells of."""
    real, seen = launch.Server.wrong, []

    def wrong(self, answer, request, **how):
        seen.append(answer)
        if len(seen) == 6:
            raise signalled(143)
        return real(self, answer, request, **how)

    with TextServer(tokenizer=tiny / "tokenizer.json", lists={str(tiny): str(tiny)}).serve() as url:
        run = prepared(tiny, tmp_path / "run", "vllm", sampler_url=url)
        monkeypatch.setattr(launch.Server, "wrong", wrong)
        with suppress(signalled):
            sample(run)
        gc.collect()  # a task tells of its exception when it goes, and whoever holds that exception holds the task
        assert len(seen) >= 6 and not caplog.records
        monkeypatch.setattr(launch.Server, "wrong", real)
        assert sample(run) == calm


@pytest.mark.parametrize("lists, said", [({"other": "/models/other"}, "but serves other"), (None, "but does not list it"),
                                         ({}, "but does not list it")])
def test_a_server_that_serves_something_else_is_told_what_to_serve(tiny, tmp_path, lists, said):
    class Server(TextServer):
        def answer(self, body):
            return super().answer(body) | ({"model": "other"} if self.lists is None else {})

    place = str(tiny)
    server = Server(tokenizer=tiny / "tokenizer.json", lists=lists)
    with server.serve() as url:
        run = prepared(tiny, tmp_path / "run", "vllm", sampler_url=url)
        with pytest.raises(UserError) as e:
            sample(run)
        assert f"{url} must serve {place} now, {said}" in str(e.value) and "\n" not in str(e.value)
        assert f"serve it (`vllm serve {place} --dtype float32" in str(e.value) and "run the same command" in str(e.value)
        server.lists = {"sami": place}  # under a name of its own, told apart by its root
        sample(run)
        assert {body["model"] for body in server.bodies[-16:]} == {"sami"}


def test_a_key_is_sent_and_its_refusal_said(tiny, tmp_path, monkeypatch):
    with TextServer(tokenizer=tiny / "tokenizer.json", lists={str(tiny): str(tiny)}, secret="secret-key-1").serve() as url:
        run = prepared(tiny, tmp_path / "run", "vllm", sampler_url=url)
        with pytest.raises(UserError, match=r"refused the key in \$VLLM_API_KEY"):
            sample(run)
        monkeypatch.setenv("VLLM_API_KEY", "secret-key-1")
        assert len(sample(run)) == 16
    run = prepared(tiny, tmp_path / "none", "vllm", sampler_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="no sampling server answers at http://127.0.0.1:9/v1"):
        sample(run)


WRONG = {  # what a server may say to a completion, and what is said of it
    "a chat": {"choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]}, "choices null": {"choices": None},
    "a choice null": {"choices": [None]}, "a choice that is text": {"choices": ["x"]}, "ids as text": {"choices": [{"text": "", "token_ids": ["5"]}]},
    "ids below 0": {"choices": [{"text": "", "token_ids": [-1]}]}, "text a number": {"choices": [{"text": 3}]}}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_answer_of_another_shape_is_no_answer(tiny, calm, tmp_path, wrong):
    """Neither where the server is looked at nor later: no traceback, nothing kept, and a good one goes on."""
    class Server(TextServer):
        good = 0

        def answer(self, body):
            right = super().answer(body)
            bad = WRONG[wrong]
            if self.good and len(self.requests) > self.good:
                first = bad["choices"][0] if bad["choices"] else None
                return right | bad | ({"choices": [right["choices"][0] | first]} if isinstance(first, dict) and "message" not in first else {})
            return right if self.good else right | bad

    server = Server(tokenizer=tiny / "tokenizer.json", lists={str(tiny): str(tiny)})
    with server.serve() as url:
        run = prepared(tiny, tmp_path / "run", "vllm", sampler_url=url)
        with pytest.raises(UserError, match="must serve .* now, but serves") as e:
            sample(run)
        assert "\n" not in str(e.value)
        server.good = len(server.requests) + 4
        with pytest.raises(UserError, match=r"x: \d+ of 16 responses are missing: .*(no choices|no text in|no token_ids)"):
            sample(run)
        server.good = 10**9
        assert sample(run) == calm


def raw_server(answer: bytes):
    """A server that says these bytes to whatever it is asked."""
    import socket
    import threading

    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as request:  # all of it: a close resets what is left unread
                length = 0
                while (line := request.readline()).strip():
                    length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length:") else length
                request.read(length)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize("answer, says", [
    (b"HTTP/9 hm\r\n\r\n", "no sampling server answers at"), (b"hello\r\n", "no sampling server answers at"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{}", "no sampling server answers at"), (b"HTTP/1.1 200 OK\r\n\r\n<html>", "no sampling server answers"),
    (b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": ["m"]}, 3, {"id": "m", "root": 5}]}', "but serves m .no choices"),
    (b'HTTP/1.1 422 No\r\n\r\n{"detail": [{"loc": ["body", "max_tokens"], "msg": "too few"}]}', r"but does not list it .HTTP 422: body.max_tokens: too few"),
    (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/v1/models\r\n\r\n", "HTTP 302: it sends on to http://127.0.0.1:9/v1/models, where none goes"),
    (b'HTTP/1.1 403 No\r\n\r\n{"error": "not you"}', r"refused the key in .VLLM_API_KEY .HTTP 403: not you")])
def test_a_sampling_server_that_is_none_is_one_line_with_its_reason(tiny, tmp_path, answer, says):
    listener, url = raw_server(answer)
    with listener, pytest.raises(UserError, match=says) as e:
        sample(prepared(tiny, tmp_path / "run", "vllm", sampler_url=url))
    assert "\n" not in str(e.value)


def test_a_key_that_no_header_takes_is_told_before_a_run(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "\u2018secret\u2019")
    with pytest.raises(UserError, match=r"\$VLLM_API_KEY: character 1 is LEFT SINGLE QUOTATION MARK"):
        launch.check("vllm", "http://127.0.0.1:9/v1")


# ---- what a run starts ends with it

def pids(log: Path, patience=20.0) -> list[int]:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        lines = [line for line in (log.read_text() if log.exists() else "").splitlines() if line.startswith("pids:")]
        if lines:
            return [int(p) for p in lines[-1].split()[1:]]
        time.sleep(0.05)
    pytest.fail("the server did not start")


def gone(processes: list[int], patience: float) -> bool:
    return not left(processes, patience)


def test_the_run_starts_waits_for_and_stops_its_server(tiny, tmp_path, fake):
    said = []
    run = prepared(tiny, tmp_path / "run", "vllm", say=said.append, tensor_parallel=2)
    rows = sample(run)
    log = run.folder / "sampler.log"
    assert len(rows) == 16 and any(line.startswith("starting vllm with") and "sampler.log" in line for line in said)
    assert f"argv: serve {tiny} " in log.read_text() and "--tensor-parallel-size 2 " in log.read_text()
    longest = max(len(run.voice.tokenizer(draws.prompt(run.voice, c, item.query, "evaluation", sample=True)).input_ids)
                  for item in run.items() for c in item.constitutions)
    assert f"--max-model-len {longest + 24} " in log.read_text()
    assert gone(pids(log), 2)
    assert run.record["sampled_by"] == {"engine": "vllm", "version": "0.0.1", "started_here": True}


def test_a_server_that_does_not_come_up_or_dies_is_an_error_with_its_last_words(tiny, tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "dies")
    said = []
    run = prepared(tiny, tmp_path / "run", "vllm", say=said.append)
    with pytest.raises(UserError, match="ended before it was ready .*: ValueError: not enough memory for the KV cache$"):
        sample(run)
    assert "argv: serve" in said[-1]
    monkeypatch.setenv("FAKE_VLLM", "another")
    with pytest.raises(UserError, match="must serve .* now, but serves another"):
        sample(run)
    assert gone(pids(run.folder / "sampler.log"), 2)
    monkeypatch.setenv("FAKE_VLLM", "dies-later")
    with pytest.raises(UserError, match=r"responses are missing: .* \(the server ended: .*sampler.log tells more\); what was"):
        sample(run)
    monkeypatch.setenv("FAKE_VLLM", "")
    assert len(sample(run)) == 16


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_does_not_outlive_a_run_that_is_killed(tiny, tmp_path, fake, number):
    code = ("import sys, time; from pathlib import Path; from repro import cli; from repro.sampling import launch\n"
            "import signal; signal.signal(signal.SIGTERM, cli._terminate); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "launch.GRACE_S = 5\n"
            "with launch.served('vllm', sys.argv[1], url=None, dtype='float32', share=1, context=9,"
            " log=Path(sys.argv[2]), say=print):\n    print('up', flush=True); time.sleep(60)\n")
    log = tmp_path / "sampler.log"
    child = subprocess.Popen([sys.executable, "-c", code, str(tiny), str(log)], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert any(line == "up\n" for line in child.stdout)
    found = pids(log)
    assert len(found) == 2 and not gone(found, 0)
    child.send_signal(number)
    child.wait(20)
    child.stdout.close()
    assert gone(found, 5)


def test_what_a_server_died_of_is_read_from_its_own_lines_of_the_last_start(tmp_path):
    log = tmp_path / "log"
    log.write_text(f"{launch.STARTED}vllm\nValueError: an older start\n{launch.STARTED}vllm\nshutting down{launch.ENDED}0\n")
    assert launch._why(log) == "shutting down" and launch._tail(log, 9) == "shutting down"
    log.write_text(f"{launch.STARTED}vllm\n(W) ERROR [a.py:1] ValueError: the cause\nRuntimeError: see above\n  warnings.warn('leaked')\n{launch.ENDED}1\n")
    assert launch._why(log) == "ValueError: the cause"
    log.write_text(f"{launch.STARTED}vllm\n(A) ERROR [b.py:9] vllm.v1.EngineDeadError: it died\n" + "INFO: 500\n" * 40 + f"See https://a.b{launch.ENDED}0\n")
    assert launch._why(log) == "vllm.v1.EngineDeadError: it died"
    log.write_text(f"{launch.STARTED}vllm\n{launch.ENDED}-9\n")
    assert launch._why(log) == "nothing" and launch._why(tmp_path / "none") == "nothing"


def test_a_server_that_ends_by_itself_leaves_nothing_behind():
    """vLLM's engine processes may outlive the one that was started."""
    guard = subprocess.Popen([sys.executable, "-m", "repro.sampling.launch", "sh", "-c", "sleep 300 & echo $!; exit 3"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT)
    began, left, said = guard.stdout.readline(), int(guard.stdout.readline()), guard.stdout.readline()
    guard.stdout.close(), guard.stdin.close()
    assert began.startswith(launch.STARTED) and said == f"{launch.ENDED}3\n"
    assert guard.wait(20) == -signal.SIGKILL and gone({left}, 5)


# ---- real servers

@pytest.mark.parametrize("engine", ["server", "vllm"])
def test_a_real_server_says_what_this_process_says(tiny, tmp_path, engine):
    """Greedy and in float32: the same texts and ends, byte for byte; the same token ids, where the server gives them."""
    if engine == "server" and not SERVING:
        pytest.skip("NOT RUN: transformers' serving extra is not installed; make setup installs it")
    if engine == "vllm" and not os.environ.get("SAMI_VLLM"):
        pytest.skip("NOT RUN: no vLLM here; SAMI_VLLM names its executable")
    here, there = (sample(prepared(tiny, tmp_path / e, e)) for e in ("transformers", engine))
    assert as_text(here) == as_text(there) and (engine == "server" or here == there)
    assert len({row["text"] for row in here}) > 3
    log = (tmp_path / engine / "sampler.log").read_text()
    assert "POST /v1/completions" in log


def test_the_table_of_engines_is_what_their_record_says():
    sys.path.insert(0, str(ROOT / "tests/engines"))
    import habits

    record, text = records.read_json(habits.RECORD), habits.README.read_text()
    assert habits.with_table(text, record) == text, "run: .venv/bin/python tests/engines/habits.py --table"
    assert {"vllm", "serve", "llama"} <= record["engines"].keys() and "speed" in record
