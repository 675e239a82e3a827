"""judgments.jsonl and judge_requests.jsonl, and folders of older versions, which kept both in judgments.jsonl: whatever fails on
the way, no answer is lost, none counted twice, none asked for again."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from judge_server import JudgeServer
from test_checking import failing
from test_experiments import small
from test_records import Fault, disk_full, killed, torn
from test_records import failing as failing_calls

from repro.base.records import (
    UserError,
    append_jsonl,
    checked,
    digest,
    file_sha256,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from repro.base.settings import JudgeSpec
from repro.experiment import load_experiment
from repro.judges.record import JUDGMENTS, REQUESTS, JudgeLedger, read_judgments, write_judgments
from repro.report.publish import gather, publish
from repro.servers.endpoint import PICO, Call, Endpoint
from repro.stages.pipeline import judge_run, run

WHO = {"judge": "judge-1"}
JUDGED = [{"record": "judgment", "judge": name, "query": f"q{k}", "score": 1.0} for name in ("rule", "judge-1") for k in range(2)]


def answer(text: str) -> dict:
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}


def attempt(judge: str, key: str, number: int = 1) -> dict:
    return {"record": "attempt", "judge": judge, "key": key, "attempt": number, "reserved_usd": 0.5}


def outcome(judge: str, key: str, number: int = 1, **more) -> dict:
    return {"record": "outcome", "judge": judge, "key": key, "attempt": number, "usd": 0.25, "status": "answered",
            "answer": answer(f"{judge} {key} {number}")} | more


LINES = [attempt("judge-1", "a"), outcome("judge-1", "a", status="failed", error="503", answer=None), attempt("judge-0", "a"),
         attempt("judge-1", "a", 2), attempt("judge-1", "b"), outcome("judge-0", "a"), outcome("judge-1", "b"), outcome("judge-1", "a", 2),
         attempt("judge-1", "c")]  # the last: in flight at a kill
SPENT = round((0.25 + 0.25 + 0.25 + 0.5) * PICO)


def older(folder: Path, lines=LINES, tail: str = "") -> Path:
    """judgments.jsonl as an older version left it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / JUDGMENTS, JUDGED)
    append_jsonl(folder / JUDGMENTS, lines)
    with open(folder / JUDGMENTS, "a") as f:
        f.write(tail)
    return folder


def state(folder: Path, who: dict = WHO) -> tuple:
    """What counts of a ledger."""
    ledger = JudgeLedger(folder / REQUESTS, who)
    return ledger.spent, ledger.open, ledger.answers, ledger.errors, ledger.failures, ledger.numbers


def ask(folder: Path) -> None:
    """One request more, as `Asker` writes it down."""
    ledger, call = JudgeLedger(folder / REQUESTS, WHO), Call(key="d", request={"messages": []}, about={"item": "q1"})
    if "d" not in ledger.answers:
        ledger.end(call, ledger.begin(call, PICO // 2), PICO // 4, status="answered", answer=answer("d"))


def test_an_older_folder_reads_as_one_of_now_and_is_left_as_it_is(tmp_path):
    old, new = older(tmp_path / "old"), tmp_path / "new"
    write_judgments(new, JUDGED)
    append_jsonl(new / REQUESTS, LINES)
    before = (old / JUDGMENTS).read_bytes()
    for who in (WHO, {"judge": "judge-0"}, {}):
        assert state(old, who) == state(new, who) and state(old, who)[0] > 0
    assert state(old)[:2] == (SPENT, 1) and state(old)[2].keys() == {"a", "b"}
    assert read_judgments(old) == read_judgments(new) == JUDGED
    assert (old / JUDGMENTS).read_bytes() == before and [p.name for p in old.iterdir()] == [JUDGMENTS]  # reading writes nothing


@pytest.mark.parametrize("split", range(len(LINES) + 1))
def test_lines_that_lie_in_both_files_count_once(tmp_path, split):
    """As much of them as was appended before a kill, half a line included."""
    folder = older(tmp_path)
    whole = state(folder)
    append_jsonl(folder / REQUESTS, LINES[:split])
    with open(folder / REQUESTS, "a") as f:
        f.write(json.dumps(LINES[split])[:20] if split < len(LINES) else "")
    assert state(folder) == whole
    ask(folder)
    write_judgments(folder, JUDGED)
    assert [{k: v for k, v in row.items() if k != "check"} for row in read_jsonl(folder / REQUESTS)][:len(LINES)] == LINES
    assert read_jsonl(folder / JUDGMENTS) == JUDGED and state(folder)[0] == SPENT + PICO // 4


@pytest.mark.parametrize("asks", [True, False], ids=["asks", "reparses"])
@pytest.mark.parametrize("tail", ["", json.dumps(checked(attempt("judge-1", "e")))[:40]], ids=["whole", "torn"])
@pytest.mark.parametrize("act", [disk_full, killed, torn])
def test_taking_over_loses_and_doubles_nothing_whichever_call_fails(tmp_path, monkeypatch, act, tail, asks):
    judged, fired_in_all = [row | {"score": 0.0} for row in JUDGED], 0
    for nth in range(1, 100):
        folder = older(tmp_path / str(nth), tail=tail)
        with monkeypatch.context() as patch:
            fired = failing_calls(patch, nth, act)
            try:
                if asks:
                    ask(folder)
                write_judgments(folder, judged)
            except UserError as e:
                assert act is disk_full and "disk full" in str(e)
            except Fault:
                pass
        spent, _, answers, *_ = state(folder)
        assert read_judgments(folder) in (JUDGED, judged)
        assert {k: answers[k] for k in "ab"} == {k: [r["answer"] for r in LINES if r["record"] == "outcome" and r["key"] == k
                                                     and r["status"] == "answered" and r["judge"] == "judge-1"] for k in "ab"}
        assert spent - SPENT in (0, PICO // 2, PICO // 4)  # the new one: not sent, in flight, answered
        ask(folder)  # the same command goes on
        write_judgments(folder, judged)
        assert read_jsonl(folder / JUDGMENTS) == judged and "d" in state(folder)[2]
        lines = [{k: v for k, v in row.items() if k != "check"} for row in read_jsonl(folder / REQUESTS, torn_tail=True, all_checked=True)]
        assert [row for row in lines if row["key"] != "d"] == LINES
        assert state(folder)[0] - SPENT == sum(
            PICO // 4 if any(r["record"] == "outcome" and r["attempt"] == row["attempt"] for r in lines if r["key"] == "d")
            else PICO // 2 for row in lines if row["key"] == "d" and row["record"] == "attempt")
        if not fired:
            assert state(folder)[0] == SPENT + PICO // 4
            break
        fired_in_all += 1
    assert fired_in_all >= (20 if asks else 10)


def test_an_older_line_that_was_altered_or_is_none_is_refused_with_its_place(tmp_path):
    folder = older(tmp_path)
    data = (folder / JUDGMENTS).read_text()
    (folder / JUDGMENTS).write_text(data.replace('"usd":0.25', '"usd":0.05', 1))
    with pytest.raises(UserError, match=rf"{JUDGMENTS}:6: altered since it was written"):
        write_judgments(folder, JUDGED)
    (folder / JUDGMENTS).write_text(data)
    append_jsonl(folder / JUDGMENTS, [{"record": "outcome", "judge": "judge-1", "key": "z", "attempt": 1}])
    with pytest.raises(UserError, match=rf"{JUDGMENTS}:14: not a line of a ledger"):
        state(folder)


# ---- whole runs

SPEC = JudgeSpec(judges=("openai",), model="judge-1", answer="text")


def as_older(folder: Path) -> None:
    """A run's folder as a version without judge_requests.jsonl left it: the ledger behind the judgments, and the sha256 of both."""
    path, record = folder / JUDGMENTS, read_json(folder / "run.json")
    path.write_bytes(path.read_bytes() + (folder / REQUESTS).read_bytes())
    (folder / REQUESTS).unlink()
    stages = record["stages"]
    if "judge" in stages:
        stages["judge"]["outputs"] = {JUDGMENTS: file_sha256(path)}
        evaluated = sorted((name for name in stages if name.startswith("evaluate-")), key=lambda name: int(name[9:]))
        bound = {"metrics": ["judge", *evaluated, *(["baseline"] if "baseline" in stages else [])]}
        stages["metrics"]["key"] = digest([record["training_hash"], {k: stages[k]["outputs"] for k in bound["metrics"]}])
    write_json(folder / "run.json", checked(record))


@pytest.fixture(scope="module")
def judged(tiny, tmp_path_factory):
    """exp1 mini on the tiny model, one iteration, with an LLM judge's judgments beside the rules'."""
    experiment = small(load_experiment("exp1", "mini")[0], tiny, learning_rate=1e-2)  # enough to say something else
    experiment = dataclasses.replace(experiment, iterations=1, data=dataclasses.replace(experiment.data, evaluation=6))
    folder = run(experiment, tmp_path_factory.mktemp("runs"), say=lambda line: None)
    with JudgeServer(flips=2).serve() as url:
        rows = judge_run(folder, SPEC, where(url), say=lambda line: None)
    return experiment, folder, rows


def where(url: str = "http://127.0.0.1:9/v1", **more) -> Endpoint:
    return Endpoint(model="judge-1", base_url=url, price=(3.0, 12.0), backoff_s=0.01, **more)


def copy_of(done: Path, to: Path) -> Path:
    return Path(shutil.copytree(done.parents[1], to)) / done.relative_to(done.parents[1])


def test_an_older_run_is_verified_run_published_and_judged_without_a_request(judged, tmp_path):
    experiment, done, rows = judged
    folder = copy_of(done, tmp_path / "runs")
    as_older(folder)
    before, usd, said = (folder / JUDGMENTS).read_bytes(), read_json(folder / "run.json")["judges"]["judge-1"]["usd"], []
    assert failing(folder) == []
    run(experiment, tmp_path / "runs", say=said.append)
    assert sum("done before, skipped" in line for line in said) == 7, said
    out = publish([folder], tmp_path / "results")
    assert (out / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes() and not (out / REQUESTS).exists()
    judge_run(folder, SPEC, where(), dry_run=True, say=said.append)
    assert "judge judge-1: 0 requests to make" in said[-1]
    assert (folder / JUDGMENTS).read_bytes() == before and not (folder / REQUESTS).exists()
    with (server := JudgeServer()).serve() as url:
        for reparse in (True, False):
            assert judge_run(folder, SPEC, where(url, max_usd=0.0), reparse=reparse, say=said.append) == rows
            assert not server.requests and read_json(folder / "run.json")["judges"]["judge-1"]["usd"] == usd > 0
            assert (folder / JUDGMENTS).read_bytes() == (done / JUDGMENTS).read_bytes()
            assert (folder / REQUESTS).read_bytes() == (done / REQUESTS).read_bytes()
            assert failing(folder) == []
    assert (folder / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()


def test_an_older_run_goes_on_judging_where_it_was_killed(judged, tmp_path):
    """Half of its answers are there, the last line torn: the rest is asked for, and the budget holds what was spent."""
    experiment, done, rows = judged
    folder = copy_of(done, tmp_path / "runs")
    lines = (done / REQUESTS).read_bytes().splitlines(keepends=True)
    answered = sum(b'"record":"outcome"' in line for line in lines)
    half = len(lines) // 2
    (folder / REQUESTS).write_bytes(b"".join(lines[:half]))
    as_older(folder)
    with open(folder / JUDGMENTS, "ab") as f:
        f.write(lines[half][:30])
    spent, have = state(folder)[0], sum(map(len, state(folder)[2].values()))
    with (server := JudgeServer(flips=2)).serve() as url:
        with pytest.raises(UserError, match="the budget is used up"):
            judge_run(folder, SPEC, where(url, max_usd=spent / PICO), say=lambda line: None)
        assert not server.requests
        assert judge_run(folder, SPEC, where(url), say=lambda line: None) == rows
    assert 0 < have < answered and len(server.requests) == len(set(server.requests)) == answered - have
    assert (folder / JUDGMENTS).read_bytes() == (done / JUDGMENTS).read_bytes() and failing(folder) == []


def test_an_older_run_with_a_judge_of_its_own_is_judged_to_the_end(judged, tmp_path):
    """Killed before its judge stage, with answers in judgments.jsonl and no judgment: it ends as one that was never killed."""
    experiment, done, _ = judged
    own = dataclasses.replace(experiment, judge=SPEC, name="own")
    with (server := JudgeServer(flips=2)).serve() as url:
        whole = run(own, tmp_path / "whole", say=lambda line: None, endpoint=where(url))
        folder = copy_of(whole, tmp_path / "own")
        record = read_json(folder / "run.json")
        for name in ("judge", "metrics", "report"):
            del record["stages"][name]
        write_json(folder / "run.json", checked(record))
        (folder / JUDGMENTS).unlink()
        (folder / REQUESTS).rename(folder / JUDGMENTS)
        asked = len(server.requests)
        assert run(own, tmp_path / "own", say=lambda line: None, endpoint=where(url)) == folder
    assert len(server.requests) == asked > 0
    for name in (JUDGMENTS, REQUESTS, "metrics.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_judgments_that_are_put_together_hold_no_ledger(judged, tmp_path):
    folders = []
    for name in ("one", "two"):
        folder = Path(shutil.copytree(judged[1], tmp_path / "both" / name))
        folders.append(folder)
    as_older(folders[1])
    rows = read_jsonl(gather(folders) / JUDGMENTS)
    assert len(rows) == 2 * len(read_judgments(judged[1])) and {row["record"] for row in rows} == {"judgment"}


def test_what_another_judge_was_paid_for_outlives_one_that_cannot_be_used(judged, tmp_path):
    own = dataclasses.replace(judged[0], judge=SPEC, name="own")
    folder = tmp_path / own.path
    append_jsonl(folder / REQUESTS, [attempt("judge-0", "a"), outcome("judge-0", "a")])
    before = (folder / REQUESTS).read_bytes()
    with JudgeServer(probe_faults=lambda k, body: "404").serve() as url, pytest.raises(UserError, match="nothing was sampled or"):
        run(own, tmp_path, say=lambda line: None, endpoint=Endpoint(model="judge-1", base_url=url))
    assert (folder / REQUESTS).read_bytes().startswith(before) and state(folder, {"judge": "judge-0"})[0] == PICO // 4
