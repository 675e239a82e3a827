"""The LLM judge against a server with faults: nothing lost, nothing asked twice, the budget held, no key anywhere."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from judge_habits import ENDS, FAILED, HABITS, READ, SILENT, WHY
from judge_server import RATES, Handler, JudgeServer

from repro.base import metrics
from repro.base.records import UserError, read_jsonl
from repro.base.settings import JudgeSpec
from repro.judges.llm import Pair, ask_judge, judge_of
from repro.judges.verdicts import read_text
from repro.paper.archive import LOCAL
from repro.servers.endpoint import PICO, Endpoint, text_of
from repro.servers.ledger import Ledger
from repro.text.queries import load_queries

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-canary-q7Wz3xK9mN2pR5tV8yB1"
SPEC = JudgeSpec(judges=(), model="judge-1", answer="text")


def made_pairs(count: int) -> list[Pair]:
    """Pairs on embedded queries, with responses of 20 to 60 words."""
    queries, rng = [q.text for q in load_queries("embedded")[0]], random.Random(3)
    words = " ".join(queries).split()

    def text():
        return " ".join(rng.choice(words) for _ in range(rng.randint(20, 60)))

    principles = ("Answers should be short and use plain words.", "Answers should name a concrete step to take.")
    return [Pair(id=f"made {k}", query=queries[k % len(queries)], principles=principles, ours=text(), theirs=text())
            for k in range(count)]


def endpoint(url, **changes) -> Endpoint:
    return Endpoint(**({"model": "judge-1", "base_url": url, "price": (3.0, 12.0), "deadline_s": 30.0, "backoff_s": 0.02} | changes))


def judged(server, pairs, path, *, spec=SPEC, reparse=False, **changes):
    """(verdicts, lines said) of one run against a fresh address of the server."""
    said = []
    with server.serve() as url:
        verdicts, _ = ask_judge(spec, pairs, endpoint(url, **changes), path, said.append, reparse=reparse)
    return verdicts, said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    pairs = made_pairs(24)
    return pairs, [v.to_json() for v in judged(JudgeServer(), pairs, tmp_path_factory.mktemp("judge") / "l.jsonl")[0]]


def test_judge_outcomes(undisturbed):
    outcomes = [v["outcome"] for v in undisturbed[1]]
    assert {"win", "loss", "flip", "unparsed"} <= set(outcomes)
    assert all((v["score"] is None) == (v["outcome"] in ("unparsed", "failed")) for v in undisturbed[1])


TRANSIENT = {
    "429": "HTTP 429: ", "429_date": "HTTP 429: ", "429_garbage": "HTTP 429: ", "500": "HTTP 500: ", "503": "HTTP 503: ",
    "timeout": "no whole answer within 1 s", "drip": "no whole answer within 1 s", "half": "the answer was cut: ",
    "reset": "no connection to 127.0.0.1: ", "garbage": "not JSON: '<html>welcome", "nan": "not JSON: ", "wrong_schema": "no choices: ",
    "empty_choices": "no choices: ", "error_in_200": "an error inside a 200: ", "big": "an answer of more than 4 MiB", "no_usage": None}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_judge_loses_nothing_to_a_fault_that_passes(fault, undisturbed, tmp_path):
    """Every fifth request meets the fault: all verdicts come all the same, each attempt has its outcome line, and one line
    says what happened."""
    pairs, expected = undisturbed[0][:6], undisturbed[1][:6]
    server = JudgeServer(lambda k, body: fault if k % 5 == 1 else None)
    began = time.monotonic()
    slow = fault in ("timeout", "drip")
    verdicts, said = judged(server, pairs, tmp_path / "l.jsonl", attempts=8, deadline_s=1.0 if slow else 30.0)
    assert [v.to_json() for v in verdicts] == expected and server.fired
    rows = read_jsonl(tmp_path / "l.jsonl")
    attempts = [(r["key"], r["attempt"]) for r in rows if r["record"] == "attempt"]
    outcomes = [(r["key"], r["attempt"]) for r in rows if r["record"] == "outcome"]
    assert sorted(attempts) == sorted(outcomes) and len(set(attempts)) == len(attempts)
    failed = sum(r["record"] == "outcome" and r["status"] == "failed" for r in rows)
    if slow:  # a machine under load may add a timeout of its own
        assert failed >= len(server.fired)
    else:
        assert failed == (0 if fault == "no_usage" else len(server.fired)) and len(attempts) == len(server.requests) + len(server.probes)
    assert Ledger(tmp_path / "l.jsonl", {"judge": "judge-1"}).spent >= server.billed
    assert time.monotonic() - began < 20
    lines = [line for line in said if "attempts failed, most often with: " in line]
    assert len(lines) == (TRANSIENT[fault] is not None) and all(TRANSIENT[fault] in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("fault, says", [
    ("revoked", r"the server refused the key in \$OPENAI_API_KEY \(HTTP 401"), ("no_credit", "the account has no credit left"),
    ("404", "has no model 'judge-1'"), ("429_hour", r"asks to wait 3600 s: come back at \d\d:\d\d")])
def test_judge_stops_at_a_fault_that_no_retry_mends(fault, says, undisturbed, tmp_path, monkeypatch):
    """From the 9th request on: one clear line, few requests after the first, and the rest once it is mended."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    pairs, expected = undisturbed
    server = JudgeServer(lambda k, body: fault if k >= 8 else None, latency=0.02)
    with pytest.raises(UserError, match=says) as e:
        judged(server, pairs, tmp_path / "l.jsonl", concurrency=4)
    assert "\n" not in str(e.value) and KEY[:12] not in str(e.value) and "run the same command to go on" in str(e.value)
    assert 1 <= len(server.fired) <= 4  # those in flight when it was first seen
    mended = JudgeServer()
    verdicts, _ = judged(mended, pairs, tmp_path / "l.jsonl")
    assert [v.to_json() for v in verdicts] == expected
    answered = {r for r, k in zip(server.requests, range(8))}
    assert not answered & set(mended.requests)  # nothing was asked again


@pytest.mark.parametrize("fault, says", [("endless", "HTTP 500: xxx"), ("bomb", "HTTP 500: "), ("nowhere", r"on to http://\[bad \(HTTP 302\)"),
                                         ("407", r"wants a login \(HTTP 407: no: .*\$HTTPS_PROXY")])
def test_judge_reads_an_error_no_further_than_it_needs(fault, says, undisturbed, tmp_path):
    """Whatever its body grows to: openai's client would read it to its end."""
    import tracemalloc

    server = JudgeServer(lambda k, body: fault, probe_faults=lambda k, body: fault)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=says) as e:
            judged(server, undisturbed[0][:2], tmp_path / "l.jsonl", attempts=2, concurrency=1)
        assert tracemalloc.get_traced_memory()[1] < 2**27 and server.sent < 2**27
    finally:
        tracemalloc.stop()
    assert "\n" not in str(e.value) and len(str(e.value)) < 600 and len(server.probes) <= 2


def test_judge_does_not_sleep_past_its_end(undisturbed, tmp_path):
    """One request is told to wait 30 s, another that the key is refused: the run ends now."""
    server = JudgeServer(lambda k, body: ("429_30", "revoked")[k], latency=0.05)
    began = time.monotonic()
    with pytest.raises(UserError, match="the server refused the key"):
        judged(server, undisturbed[0][:4], tmp_path / "l.jsonl", concurrency=2)
    assert time.monotonic() - began < 10


def test_judge_says_what_failed_and_asks_it_again_at_the_next_run(undisturbed, tmp_path):
    pairs, expected = undisturbed[0][:8], undisturbed[1][:8]
    victim = pairs[2].ours
    for fault, times in (("500", 3), ("400", 1)):  # a refused request is not tried again
        server = JudgeServer(lambda k, body, f=fault: f if victim in body["messages"][-1]["content"] else None)
        path = tmp_path / f"{fault}.jsonl"
        verdicts, said = judged(server, pairs, path, attempts=3)
        assert [v.outcome for v in verdicts].count("failed") == 1 and verdicts[2].score is None
        assert len(server.fired) == 2 * times
        assert any(re.search(rf"1 failed \(HTTP {fault}.*the same command asks for them again", line) for line in said)
        verdicts, said = judged(server := JudgeServer(), pairs, path)
        assert [v.to_json() for v in verdicts] == expected
        assert {r[0] for r in server.requests if victim not in r[0]} == set()


def test_judge_gives_up_on_a_dead_server_in_one_line(tmp_path):
    with pytest.raises(UserError, match="judge judge-1: no connection to 127.0.0.1: .*; run the command again once") as e:
        ask_judge(SPEC, made_pairs(30), endpoint("http://127.0.0.1:9/v1", attempts=2), tmp_path / "l.jsonl", lambda line: None)
    assert "\n" not in str(e.value)
    assert len(read_jsonl(tmp_path / "l.jsonl")) == 4  # one small request, twice
    server = JudgeServer(lambda k, body: "reset")
    with pytest.raises(UserError, match="8 requests in a row failed, the last with: no connection to 127.0.0.1"):
        judged(server, made_pairs(30), tmp_path / "l.jsonl", attempts=2)


def test_judge_null_answers_are_unparsed_and_asked_again_once_in_all(undisturbed, tmp_path):
    pairs = undisturbed[0][:3]
    server = JudgeServer(lambda k, body: "null_content")
    verdicts, said = judged(server, pairs, tmp_path / "l.jsonl")
    assert {v.outcome for v in verdicts} == {"unparsed"} and {v.score for v in verdicts} == {None}
    assert len(server.requests) == 12 and len(set(server.requests)) == 12  # a second time with another seed
    assert any("3 unparsed: no score" in line for line in said)
    verdicts, _ = judged(again := JudgeServer(), pairs, tmp_path / "l.jsonl")
    assert not again.requests and {v.outcome for v in verdicts} == {"unparsed"}


def test_judge_rereads_stored_answers_without_a_call(undisturbed, tmp_path, monkeypatch):
    """A better parser: what was unparsed has a verdict, and no request is made."""
    pairs, expected = undisturbed
    judged(JudgeServer(), pairs, tmp_path / "l.jsonl")
    monkeypatch.setattr("repro.judges.llm.read_text", lambda text, **how: "A" if text.endswith(": neither") else None)
    verdicts, _ = judged(server := JudgeServer(), pairs, tmp_path / "l.jsonl", reparse=True)
    assert not server.requests
    assert [v.outcome == "flip" for v in verdicts] == [v["outcome"] == "unparsed" for v in expected]


@pytest.mark.parametrize("offers, form", [(("schema", "logprobs"), "schema"), ((), "text")])
def test_judge_finds_out_what_the_server_offers(offers, form, undisturbed, tmp_path):
    """A JSON schema where the server keeps to it, the text form elsewhere; asked once."""
    pairs, expected = undisturbed[0][:5], undisturbed[1][:5]
    server, said = JudgeServer(offers=offers), []
    for _ in range(2):
        with server.serve() as url:
            verdicts, facts = ask_judge(replace(SPEC, answer="auto"), pairs, endpoint(url), tmp_path / "l.jsonl",
                                        lambda line: said.append((line, len(server.requests))))
        assert facts["answer"] == form and [v.outcome for v in verdicts] == [v["outcome"] for v in expected]
    assert "10 requests to make, about" in said[0][0] and said[0][1] == 0  # the estimate comes before any request
    assert len(server.probes) == 1 and "Neither response is shown" in server.probes[0][0]
    kinds = {body.get("response_format", {}).get("type") for body in server.bodies}
    assert kinds == ({"json_schema"} if form == "schema" else {None})


def test_judge_whose_server_ignores_the_temperature_stops_unless_it_is_left_out(undisturbed, tmp_path):
    """One answer over and over looks like a steady judge. At temperature 0 nothing is drawn, and nothing is asked."""
    pairs, warm = made_pairs(4), replace(SPEC, temperature=0.8)
    cold = JudgeServer()
    cold.draws = False
    with pytest.raises(UserError, match="ignores the temperature: one answer three times at 1.0; --leave-out temperature goes on"):
        judged(cold, pairs, tmp_path / "l.jsonl", spec=warm)
    assert len(cold.probes) == 4 and not cold.requests
    verdicts, _ = judged(cold, pairs, tmp_path / "l.jsonl", spec=warm, leave_out=("temperature",))
    assert len(verdicts) == 4 and not any(v.outcome == "failed" for v in verdicts)
    assert all("temperature" not in body for body in cold.bodies)
    for spec, asked in ((warm, 4), (replace(warm, answer="logprobs"), 1), (SPEC, 1)):
        server = JudgeServer()
        for _ in range(2):  # once a ledger
            judged(server, pairs, tmp_path / f"{spec.answer} {spec.temperature}.jsonl", spec=spec)
        assert len(server.probes) == asked


def test_judge_by_logprobs_needs_a_server_that_gives_them(undisturbed, tmp_path):
    pairs, expected = undisturbed[0][:8], undisturbed[1][:8]
    verdicts, _ = judged(server := JudgeServer(), pairs, tmp_path / "a.jsonl", spec=replace(SPEC, answer="logprobs"))
    assert [v.outcome for v in verdicts] == [v["outcome"] for v in expected]
    assert {body["max_tokens"] for body in server.bodies} == {1} and {body["top_logprobs"] for body in server.bodies} == {20}
    with pytest.raises(UserError, match="does not offer --answer logprobs .*use --answer text"):
        judged(JudgeServer(offers=()), pairs, tmp_path / "b.jsonl", spec=replace(SPEC, answer="logprobs"))


def test_judge_a_against_b_and_b_against_a_add_up_to_one_hundred(tmp_path):
    pairs = made_pairs(60)
    swapped = [replace(p, ours=p.theirs, theirs=p.ours) for p in pairs] + [replace(pairs[0], ours="same", theirs="same ")]
    both = []
    for k, these in enumerate((pairs, swapped)):
        verdicts, _ = judged(server := JudgeServer(), these, tmp_path / f"{k}.jsonl")
        assert len(server.requests) >= 120
        both.append([v for v in verdicts if v.outcome != "tie"])
    a, b = ([v.score for v in side if v.score is not None] for side in both)
    assert len(a) == len(b) > 50 and {v.outcome for v in both[0]} == {"win", "loss", "flip", "unparsed"}
    assert metrics.win_rate(a).value + metrics.win_rate(b).value == pytest.approx(100, abs=1e-12)
    assert metrics.win_rate(a).value != 50
    assert verdicts[-1].outcome == "tie" and verdicts[-1].score == 0.5 and len(server.requests) == len(
        {r for r in server.requests})  # identical texts tie without a call


# ---- money

def test_judge_estimate_is_within_a_fifth_of_the_bill(tmp_path):
    pairs = made_pairs(24)
    for answer in ("text", "schema", "logprobs"):
        server = JudgeServer(lambda k, body: {3: "429", 9: "500"}.get(k % 16), unparsed=10**9)
        _, said = judged(server, pairs, tmp_path / f"{answer}.jsonl", spec=replace(SPEC, answer=answer), attempts=9)
        estimate = float(re.search(r"48 requests to make, about ([\d.]+) USD", said[0])[1])
        assert estimate == pytest.approx(server.billed / PICO, rel=0.2), answer


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_judge_never_exceeds_its_budget(workers, tmp_path):
    """Random caps, faults that bill without an answer, random stops: after each run, all runs together are within the cap
    by the server's own bill, and the ledger never counts less than that bill."""
    rng, pairs = random.Random(workers), made_pairs(14)
    for trial in range(3):
        path, cap, billed = tmp_path / f"{trial}.jsonl", 0.0, 0
        for _ in range(3):
            cap += rng.uniform(0.002, 0.06)
            faults = [rng.choice(["half", "500", "empty_choices", "no_usage", "reset", None, None, None, None]) for _ in range(500)]
            server = JudgeServer(lambda k, body, f=faults: f[k])
            try:
                judged(server, pairs, path, max_usd=cap, concurrency=workers, attempts=3)
            except UserError as e:
                assert re.search(r"the budget is used up: [\d.]+ USD of --max-usd [\d.]+ spent|requests in a row failed", str(e))
            billed += server.billed
            spent = Ledger(path, {"judge": "judge-1"}).spent
            assert billed <= spent <= round(cap * PICO)


def test_judge_uses_its_budget_up_to_the_last_request(tmp_path):
    """Without faults it stops only when the next request might not fit; a raised cap goes on from there."""
    pairs = made_pairs(30)
    server = JudgeServer()
    with pytest.raises(UserError, match="the budget is used up") as e:
        judged(server, pairs, tmp_path / "l.jsonl", max_usd=0.05)
    next_cost = float(re.search(r"may cost (\d+\.\d+)", str(e.value))[1])
    assert 0.05 - next_cost - 1e-4 < server.billed / PICO <= 0.05
    assert Ledger(tmp_path / "l.jsonl", {"judge": "judge-1"}).spent == server.billed
    more = JudgeServer()
    judged(more, pairs, tmp_path / "l.jsonl", max_usd=1.0)
    assert not set(server.requests) & set(more.requests)
    with pytest.raises(UserError, match="the budget is used up: 0.0000 USD of --max-usd 0 spent"):
        judged(JudgeServer(), pairs, tmp_path / "none.jsonl", max_usd=0.0)


def test_judge_needs_a_price_for_a_server_elsewhere():
    assert Endpoint(model="gpt-4.1-mini-2025-04-14").rates() == (400_000, 1_600_000)
    assert Endpoint(model="anything", base_url="http://127.0.0.1:1/v1").rates() == (0, 0)
    for bad in ({"model": "gpt-9"}, {"model": "gpt-4.1", "base_url": "http://example.org/v1"}):
        with pytest.raises(UserError, match="no price is known .*--price IN OUT"):
            Endpoint(**bad).rates()
    with pytest.raises(UserError, match="no user, password or query"):
        Endpoint(model="m", base_url="http://me:secret@example.org/v1")


# ---- kills

def many_pairs() -> list[Pair]:
    """110 archived TL;DR comparisons where the archive lies beside the project, else made ones."""
    if not LOCAL.is_dir():
        return made_pairs(110)
    from repro.paper.admission import load_items
    from repro.paper.archive import Archive, load_manifest

    return [item.pair for item in load_items(Archive(LOCAL, load_manifest()), ["tldr/mistral-7b/claude-opus/3"], 110)]


def drive(pairs: Path, url: str, folder: Path, max_usd: float, in_flight: int = 8, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/judge_driver.py"), str(pairs), url, str(folder / "l.jsonl"), str(folder / "out.json"),
         str(max_usd), str(in_flight)], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY} | env)


def test_judge_killed_three_times_loses_and_pays_nothing_but_what_was_in_flight(tmp_path):
    """kill -9 after 40, 90 and 150 requests of 220: the same verdicts and win rate as undisturbed; what was asked twice, by
    the server's count, was in flight; its bill, kills included, is within the cap."""
    pairs = many_pairs()
    (tmp_path / "pairs.json").write_text(json.dumps([vars(p) for p in pairs]))
    quiet = JudgeServer(latency=0.02)
    with quiet.serve() as url:
        expected, _ = ask_judge(SPEC, pairs, endpoint(url), tmp_path / "quiet.jsonl", lambda line: None)
    cap = 1.02 * quiet.billed / PICO + 8 * 3 * 0.03
    server, in_flight = JudgeServer(latency=0.02), []
    with server.serve() as url:
        for at in (40, 90, 150):
            child = drive(tmp_path / "pairs.json", url, tmp_path, cap)
            while len(server.requests) < at and child.poll() is None:
                time.sleep(0.002)
            child.kill()
            assert child.wait() == -signal.SIGKILL
            child.stderr.close()
            ledger = Ledger(tmp_path / "l.jsonl", {"judge": "judge-1"})
            in_flight.append(ledger.open - sum(in_flight))
            assert ledger.spent <= round(cap * PICO)
        child = drive(tmp_path / "pairs.json", url, tmp_path, cap)
        said = child.communicate()[1]
        assert child.returncode == 0, said
    assert f"{sum(in_flight)} requests were in flight at a kill" in said
    got = json.loads((tmp_path / "out.json").read_text())
    assert got == [v.to_json() for v in expected]
    rates = [metrics.win_rate([s for s in scores if s is not None]).value
             for scores in ([v["score"] for v in got], [v.score for v in expected])]
    assert rates[0] == rates[1]
    twice = len(server.requests) - len(set(server.requests))
    assert set(server.requests) == set(quiet.requests) and 0 < sum(in_flight) <= 3 * 8 and twice <= sum(in_flight)
    assert server.billed <= Ledger(tmp_path / "l.jsonl", {"judge": "judge-1"}).spent <= round(cap * PICO)


def test_judge_budget_holds_through_kills(tmp_path):
    """A cap of half the whole cost, kill -9 after 12 and 24 requests: the third run stops at the cap, and by the server's own
    bill all runs together are within it."""
    pairs = made_pairs(60)
    (tmp_path / "pairs.json").write_text(json.dumps([vars(p) for p in pairs]))
    quiet = JudgeServer()
    judged(quiet, pairs, tmp_path / "quiet.jsonl")
    cap = round(quiet.billed / PICO / 2, 4)
    server = JudgeServer(latency=0.03)
    with server.serve() as url:
        for at in (12, 24, 10**9):
            child = drive(tmp_path / "pairs.json", url, tmp_path, cap, in_flight=3)
            while len(server.requests) < at and child.poll() is None:
                time.sleep(0.002)
            child.kill()
            said = child.communicate()[1]
            assert child.returncode == (2 if at == 10**9 else -signal.SIGKILL)
    ledger = Ledger(tmp_path / "l.jsonl", {"judge": "judge-1"})
    assert "the budget is used up" in said and ledger.open > 0
    assert server.billed <= ledger.spent <= round(cap * PICO)
    assert server.billed > 0.5 * cap * PICO


def test_judge_key_is_in_no_file_and_no_output(tmp_path):
    """A run with every fault that echoes the key, debug logs on: no piece of eight characters of it anywhere."""
    (tmp_path / "pairs.json").write_text(json.dumps([vars(p) for p in made_pairs(12)]))
    outputs = []
    echo = ("500", "429", "error_in_200", "503")
    for name, faults in (("echo", lambda k, body: echo[k % 4] if k % 3 == 0 else None), ("end", lambda k, body: "revoked")):
        server = JudgeServer(faults)
        (tmp_path / name).mkdir()
        with server.serve() as url:
            child = drive(tmp_path / "pairs.json", url, tmp_path / name, 5, OPENAI_LOG="debug")
            outputs.append(child.communicate()[1])
        assert server.fired
    assert "refused the key in $OPENAI_API_KEY" in outputs[1] and "[key]" in outputs[1]
    texts = outputs + [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(texts) >= 5
    for k in range(len(KEY) - 7):
        assert not any(KEY[k: k + 8] in text for text in texts)


def test_judge_deadline_is_one_for_the_whole_request(tmp_path):
    """A byte every 0.1 s keeps the client's own timeout from ever firing."""
    server = JudgeServer(lambda k, body: "drip")
    began = time.monotonic()
    verdicts, said = judged(server, made_pairs(1), tmp_path / "l.jsonl", attempts=1, deadline_s=1.0)
    assert time.monotonic() - began < 4 and verdicts[0].error == "no whole answer within 1 s"


def test_judge_ledger_of_another_form_is_refused(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"record":"outcome","judge":"judge-1","key":"k","attempt":1,"usd":0,"status":"answered","answer":{}}\n')
    with pytest.raises(UserError, match=r"l.jsonl:1: not a line of a ledger"):
        Ledger(path, {"judge": "judge-1"})
    path.write_text('{"record":"attempt","judge":"judge-1","key":"k","attempt":1,"reserved_usd":0.25}\n{"rec')
    ledger = Ledger(path, {"judge": "judge-1"})
    assert ledger.open == 1 and ledger.spent == PICO // 4 and path.read_text().endswith("}\n")


def test_judge_asks_from_a_fresh_event_loop_each_time():
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_judge_rates_of_the_server_are_those_of_the_tests():
    assert endpoint("http://127.0.0.1:1/v1").rates() == RATES


# ---- habits of servers

def habit_run(habit: str, pairs, expected, folder: Path) -> dict:
    """What a habit does at every request, at some, and what is left of it with a good server: {lost, wrong, poisoned, ends}."""
    rng = random.Random(habit)
    always, at_times = JudgeServer(lambda k, body: habit), JudgeServer(
        lambda k, body: habit if (k % 37 == 36 if habit in ENDS else rng.random() < 0.2) else None)
    found = {"fired": 0, "lost": 0, "wrong": 0, "poisoned": 0, "not_one_line": 0, "no_reason": 0, "twice": 0}

    def command(server, path, **more):
        try:
            verdicts, said = judged(server, pairs, path, **{"attempts": 3, "backoff_s": 0.004, "concurrency": 8} | more)
        except UserError as e:
            verdicts, said = None, [str(e)]
        found["not_one_line"] += any("\n" in line or not line.isprintable() for line in said)
        return verdicts, said

    path = folder / "always.jsonl"
    verdicts, said = command(always, path)
    if habit in READ:
        found["lost"] += sum(v.outcome == "failed" for v in verdicts)
        found["wrong"] += sum(v.to_json() != want for v, want in zip(verdicts, expected))
    else:
        found["no_reason"] += habit not in SILENT and WHY in str(HABITS[habit](always.answer(always.bodies[0]))) and not any(
            WHY in line for line in said)
        found["poisoned"] += bool(Ledger(path, {"judge": "judge-1"}).answers.keys() - {SMALL})
        found["not_one_line"] += verdicts is not None
    mended = command(JudgeServer(), path)[0]
    found["poisoned"] += sum(v.to_json() != want for v, want in zip(mended, expected))
    path = folder / "at_times.jsonl"
    for _ in range(8):
        verdicts, said = command(at_times, path, attempts=8)
        if verdicts and all(v.outcome != "failed" for v in verdicts):
            break
    found["lost"] += sum(v.outcome == "failed" for v in verdicts) if verdicts else len(pairs)
    found["wrong"] += sum(v.outcome != "failed" and v.to_json() != want for v, want in zip(verdicts or (), expected))
    answers = Ledger(path, {"judge": "judge-1"}).answers
    found["twice"] += sum(read_text(text_of(answer)) is not None for each in answers.values() for answer in each[:-1])
    found["fired"] = len(always.fired) + len(at_times.fired)
    return found


SMALL = judge_of(SPEC, endpoint("http://127.0.0.1:1/v1"), 0).probe().key


@pytest.mark.parametrize("habit", list(HABITS)[::5])
def test_judge_loses_nothing_to_a_habit_and_keeps_nothing_of_it(habit, undisturbed, tmp_path):
    """At every request, then with a good server; and at a fifth of the requests. All habits, 100 answers each: figure 5."""
    found = habit_run(habit, undisturbed[0][:6], undisturbed[1][:6], tmp_path)
    assert found.pop("fired") >= 3 and not any(found.values()), found


def test_judge_habits_are_at_least_forty():
    assert len(HABITS) >= 80 and len(READ) >= 20 and len(FAILED) >= 40
    assert not any(hasattr(Handler, f"fault_{name}") for name in HABITS)


def test_judge_backs_off_from_a_server_that_says_wait_zero(undisturbed, tmp_path):
    """A third of the answers are 429 with `Retry-After: 0`: all verdicts come, in as many attempts as without the header,
    and the waits double."""
    for name in ("HTTP 429", "429 wait 0", "429 wait -5"):
        server = JudgeServer(lambda k, body, name=name: name if k % 3 == 0 else None)
        verdicts, _ = judged(server, undisturbed[0], tmp_path / f"{name}.jsonl", attempts=10)
        assert [v.to_json() for v in verdicts] == undisturbed[1], name
    times = []
    server = JudgeServer(lambda k, body: times.append(time.monotonic()) or "429 wait 0")
    judged(server, undisturbed[0][:1], tmp_path / "l.jsonl", attempts=5, backoff_s=0.1, concurrency=1)
    first = [b - a for a, b in zip(times[:5], times[1:5])]
    assert all(gap >= 0.05 * 2 ** k for k, gap in enumerate(first)), first


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_judge_follows_no_redirect(code, undisturbed, tmp_path):
    """A loop, and one to another server: each POST is one attempt in the ledger, and the other server hears nothing."""
    other = JudgeServer()
    with other.serve() as elsewhere:
        for k, to in enumerate(("/v1/chat/completions", f"{elsewhere}/chat/completions")):
            HABITS["to"] = lambda answer, to=to: (code, b"", [("Location", to)])
            try:
                server, path = JudgeServer(lambda k, body: "to"), tmp_path / f"{k}.jsonl"
                with pytest.raises(UserError, match=rf"sends its requests on to http://127.0.0.1:\d+/v1 \(HTTP {code}\), .*--base-url"):
                    judged(server, undisturbed[0], path)
                with pytest.raises(UserError, match=f"HTTP {code}"):
                    judged(probed := JudgeServer(probe_faults=lambda k, body: "to"), undisturbed[0], tmp_path / f"{k}-probe.jsonl")
            finally:
                del HABITS["to"]
            sent = sum(row["record"] == "attempt" for row in read_jsonl(path))
            assert sent == len(server.requests) + len(server.probes) <= 9 and len(probed.probes) == 1 and not probed.requests
    assert not other.requests and not other.probes


# ---- what servers take

def refusing(fields, *, named=True, status=400, schema=None):
    """A server that refuses the fields, and answers a schema with `schema`."""
    def habit(k, body):
        if schema and "response_format" in body:
            HABITS["refusal"] = lambda answer: (schema, json.dumps({"error": {"message": f"grammar failed, {WHY}"}}).encode(), ())
            return "refusal"
        bad = [f for f in fields if f in body]
        if not bad:
            return None
        detail = {"detail": [{"type": "extra_forbidden", "loc": ["body", bad[0]], "msg": WHY}]} if named else {"error": {"message": WHY}}
        HABITS["refusal"] = lambda answer: (status, json.dumps(detail).encode(), ())
        return "refusal"

    return JudgeServer(habit, probe_faults=habit, latency=0.001)


@pytest.fixture
def no_refusal():
    yield
    HABITS.pop("refusal", None)


@pytest.mark.parametrize("answer", ["auto", "text", "schema", "logprobs"])
@pytest.mark.parametrize("fields, named, status", [
    (("seed",), True, 422), (("max_tokens",), True, 400), (("temperature",), True, 400), (("seed", "max_tokens", "temperature"), True, 422),
    (("seed",), False, 400), (("max_tokens",), False, 422), (("temperature", "seed"), False, 400)])
def test_judge_finds_out_once_what_the_server_does_not_take(fields, named, status, answer, undisturbed, tmp_path, no_refusal):
    """One line names it, with the server's reason; the verdicts are the same; the record holds it, and the next command
    asks nothing; `--leave-out` decides."""
    pairs, expected = undisturbed[0][:4], [v["outcome"] for v in undisturbed[1][:4]]
    spec, path = replace(SPEC, answer=answer), tmp_path / "l.jsonl"
    server, said = refusing(fields, named=named, status=status), []
    with server.serve() as url:
        verdicts, facts = ask_judge(spec, pairs, endpoint(url), path, said.append)
        assert [v.outcome for v in verdicts] == expected and set(facts["left_out"]) == set(fields)
        (line,) = [line for line in said if "does not take" in line]
        assert all(f in line for f in fields) and WHY in line and f"HTTP {status}" in line and "--leave-out" in line and "\n" not in line
        assert ("max_completion_tokens" in line) == ("max_tokens" in fields) == ("max_completion_tokens" in server.bodies[0])
        assert not any(f in body for f in fields for body in server.bodies) and len(server.probes) <= 8
        assert not server.fired or len(server.fired) < len(server.probes)  # no request but the small ones was refused
        probes, asked = len(server.probes), len(server.requests)
        again, facts2 = ask_judge(spec, pairs, endpoint(url), path, said.append)
        reread, facts3 = ask_judge(spec, pairs, endpoint(url), path, said.append, reparse=True)
        assert again == reread == verdicts and (len(server.probes), len(server.requests)) == (probes, asked)
        assert facts["left_out"] == facts2["left_out"] == facts3["left_out"] and facts2["answer"] == facts["answer"]
        ask_judge(spec, undisturbed[0][:5], endpoint(url), path, said.append)  # one pair more: nothing is found out again
        assert len(server.probes) == probes
        told = ask_judge(spec, pairs, endpoint(url, leave_out=fields), tmp_path / "told.jsonl", said.append)[1]
        assert set(told["left_out"]) == set(fields) and len(server.probes) == probes + 1
        with pytest.raises(UserError, match="--leave-out names what it is not sent|does not offer --answer") as e:
            ask_judge(replace(spec, answer="text"), pairs, endpoint(url, leave_out=("nothing",)), tmp_path / "none.jsonl", said.append)
        assert WHY in str(e.value)


@pytest.mark.parametrize("status", [400, 422, 500, 501, 503])
def test_judge_goes_on_in_text_where_a_schema_fails(status, undisturbed, tmp_path, no_refusal):
    pairs, expected = undisturbed[0][:4], [v["outcome"] for v in undisturbed[1][:4]]
    server, said = refusing(("seed",), schema=status), []
    with server.serve() as url:
        for _ in range(2):
            verdicts, facts = ask_judge(replace(SPEC, answer="auto"), pairs, endpoint(url), tmp_path / "l.jsonl", said.append)
            assert [v.outcome for v in verdicts] == expected and (facts["answer"], facts["left_out"]) == ("text", ["seed"])
        (line,) = [line for line in said if "does not answer in a JSON schema" in line]
        assert f"HTTP {status}: grammar failed, {WHY}" in line
        with pytest.raises(UserError, match=f"HTTP {status}: grammar failed|does not offer --answer schema"):
            ask_judge(replace(SPEC, answer="schema"), pairs, endpoint(url), tmp_path / "s.jsonl", said.append)


def test_judge_whose_name_the_server_refuses_with_a_400_is_not_told_to_take_another_form(undisturbed, tmp_path):
    HABITS["named"] = lambda a: (400, b'{"error": {"message": "Model judge-1 not found."}}', ())
    try:
        for answer in ("auto", "text"):
            server = JudgeServer(probe_faults=lambda k, body: "named")
            with pytest.raises(UserError, match=r"refuses every request \(HTTP 400: Model judge-1 not found\); --leave-out names") as e:
                judged(server, undisturbed[0], tmp_path / f"{answer}.jsonl", spec=replace(SPEC, answer=answer))
            assert len(server.probes) <= 2 and not server.requests and "--answer" not in str(e.value)
    finally:
        del HABITS["named"]


def test_judge_shows_an_answer_that_was_not_read_and_says_when_the_cap_cut_them(undisturbed, tmp_path):
    def answering(text, finish_reason="stop", **message):
        choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text} | message}
        HABITS["says"] = lambda a: (200, json.dumps(a | {"choices": [choice]}).encode(), ())
        return JudgeServer(lambda k, body: "says")

    try:
        _, said = judged(answering("I like both.\x1b[2J\u202e\nFinal Response: hm"), undisturbed[0][:3], tmp_path / "a.jsonl")
        (line,) = [line for line in said if "3 unparsed: " in line]
        assert r"such as 'I like both.\\x1b[2J\\u202e Final Response: hm'" in line and line.isprintable() and not any("cut at" in x for x in said)
        _, said = judged(answering("", finish_reason="length", reasoning_content="Hm " * 99), undisturbed[0][:3], tmp_path / "b.jsonl")
        assert any("such as no text, but reasoning: 'Hm Hm" in line for line in said)
        assert any("all 6 answers without a verdict were cut at 300 tokens: `repro judge` with a higher --max-tokens" in line for line in said)
        _, said = judged(answering(None, refusal="I can't."), undisturbed[0][:3], tmp_path / "c.jsonl")
        assert any("no text, but a refusal: \"I can't.\"" in line for line in said)
    finally:
        del HABITS["says"]


@pytest.mark.parametrize("env, says", [
    ({"OPENAI_API_KEY": "\u201csk-canary-q7Wz3x\u201d"}, r"\$OPENAI_API_KEY: character 1 is LEFT DOUBLE QUOTATION MARK"),
    ({"OPENAI_API_KEY": "sk-canary-q7\u00e9"}, r"\$OPENAI_API_KEY: character 13 is LATIN SMALL LETTER E WITH ACUTE"),
    ({"OPENAI_API_KEY": "sk-canary\n-q7Wz3x"}, r"\$OPENAI_API_KEY: character 10 is U\+000A"),
    ({"OPENAI_API_KEY": "sk-canary q7Wz3x"}, r"\$OPENAI_API_KEY: character 10 is SPACE"),
    ({"OPENAI_ORG_ID": "caf\u00e9"}, r"\$OPENAI_ORG_ID: character 4"), ({"OPENAI_PROJECT_ID": "p\n"}, r"\$OPENAI_PROJECT_ID: character 2"),
    ({"ALL_PROXY": "socks5://u:sk-canary@127.0.0.1:9"}, r"\$ALL_PROXY: a socks5 proxy needs the package socksio"),
    ({"all_proxy": "socks://127.0.0.1:9"}, r"\$all_proxy: a proxy of the scheme 'socks'; allowed are http"),
    ({"HTTPS_PROXY": "ftp://127.0.0.1:9"}, r"\$HTTPS_PROXY: a proxy of the scheme 'ftp'"), ({"https_proxy": "http://["}, r"\$https_proxy: not the address"),
    ({"HTTP_PROXY": "http://h:99999"}, r"\$HTTP_PROXY: not the address"), ({"HTTPS_PROXY": "h:9\n"}, r"\$HTTPS_PROXY: not the address"),
    ({"HTTPS_PROXY": "http:///"}, r"\$HTTPS_PROXY: not the address"), ({"SSL_CERT_FILE": "/nowhere/x"}, r"see \$SSL_CERT_FILE")])
def test_judge_environment_that_no_request_can_be_made_with_names_its_variable(env, says, undisturbed, tmp_path, monkeypatch):
    import httpx2

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-fine")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", lambda *a: pytest.fail("a request was sent"))
    with pytest.raises(UserError, match=says) as e:
        ask_judge(replace(SPEC, model="gpt-4.1-mini"), undisturbed[0], Endpoint(model="gpt-4.1-mini", backoff_s=0.01), tmp_path / "l.jsonl", lambda line: None)
    assert "canary" not in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "l.jsonl").exists()


@pytest.mark.parametrize("url", ["http://[::1", "http://h:99999/v1", "http://h:x/v1", "http://h /v1", "http://h/v1\n", "https://h/v1#x", "ftp://h", "h:80", "http://"])
def test_judge_address_that_is_none_is_one_line_and_names_where_it_came_from(url, monkeypatch):
    with pytest.raises(UserError, match=r"^--base-url: ") as e:
        Endpoint(model="m", base_url=url)
    assert "\n" not in str(e.value)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UserError, match=r"^--writer-url \(\$OPENAI_BASE_URL\): "):
        Endpoint(model="m", flag="--writer-url")


def test_judge_address_that_is_empty_is_not_the_hosted_one():
    with pytest.raises(UserError, match="--base-url: empty; give a server's address"):
        endpoint("")


def test_judge_key_that_stands_in_the_place_of_its_name_is_not_shown():
    with pytest.raises(UserError, match="--key-env: must be the name") as e:
        Endpoint(model="m", key_env=KEY)
    assert KEY[:8] not in str(e.value)
    with pytest.raises(UserError, match="--leave-out: 'stop'; allowed: any of seed, temperature, max_tokens, or nothing alone"):
        Endpoint(model="m", leave_out=("seed", "stop"))


@pytest.mark.parametrize("key", ["e", "A", "Final", "x"])
def test_judge_key_that_is_a_word_changes_no_answer(key, undisturbed, tmp_path, monkeypatch):
    """As servers that need none are given."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert [v.to_json() for v in judged(JudgeServer(), undisturbed[0][:6], tmp_path / "l.jsonl")[0]] == undisturbed[1][:6]


def test_judge_key_spelled_with_escapes_is_redacted_too(undisturbed, tmp_path, monkeypatch):
    """In an answer and in an error: JSON may write any letter of it as an escape."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    spelled = "".join(f"\\u{ord(c):04x}" for c in KEY).encode()
    HABITS["spells"] = lambda a: (200, json.dumps(a).encode().replace(b"Comparison", b"Comparison " + spelled), ())
    HABITS["spells in an error"] = lambda a: (400, b'{"error": {"message": "no: ' + spelled + b'"}}', ())
    try:
        judged(JudgeServer(lambda k, body: "spells" if k % 2 else "spells in an error"), undisturbed[0][:4], tmp_path / "l.jsonl")
    finally:
        del HABITS["spells"], HABITS["spells in an error"]
    text = (tmp_path / "l.jsonl").read_text()
    assert text.count("[key]") >= 8 and KEY[:8] not in text
