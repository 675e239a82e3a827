"""Following as a run measures it: which held-out queries are answered and scored when, what counts, and the paired change."""

import dataclasses
import json

import numpy as np
import pytest
from test_experiments import small

from repro.base import metrics
from repro.base.records import UserError, read_jsonl, write_jsonl
from repro.base.settings import DataSpec, Experiment
from repro.experiment import load_experiment
from repro.plan.texts import texts_of
from repro.stages import verify
from repro.stages.measure import following, records
from repro.stages.pipeline import run
from repro.stages.run import open_run


@pytest.fixture(scope="module")
def sparse(tiny, tmp_path_factory):
    """exp1 on the tiny model: 4 held-out queries a subset, 2 of them scored, 3 iterations."""
    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, evaluation=4, scored=2))
    return experiment, run(experiment, tmp_path_factory.mktemp("sparse"), say=lambda text: None)


def test_all_are_answered_first_and_last_and_the_scored_ones_in_between(sparse):
    experiment, folder = sparse
    answered = [read_jsonl(folder / f"responses/evaluation-{k}.jsonl") for k in range(4)]
    scored = [read_jsonl(folder / f"logprobs/evaluation-{k}.jsonl") for k in range(4)]
    assert [len(rows) for rows in answered] == [32, 16, 16, 32] and {len(rows) for rows in scored} == {4}
    for rows in answered[1:3]:
        assert [(r["query"], r["constitution"]) for r in rows] == [(r["query"], r["constitution"]) for r in answered[0][:16]]
    assert [r["query"] for r in scored[3]] == [r["query"] for r in answered[3][:16:4]]
    found = json.loads((folder / "metrics.json").read_text())
    n = {(r["metric"], r["iteration"]): r["n"] for r in found if r["subset"] == "helpful" and not r.get("principle")
         and r["judge"] != "likelihood"}
    assert [n["mi", k] for k in range(4)] == [2] * 4 and [n["steerability", k] for k in range(4)] == [4, 2, 2, 4]
    assert [n["steerability_change", k] for k in (1, 2, 3)] == [2, 2, 4] and n["win_rate", 3] == 4 and n["answered", 3] == 4
    judged = [r["n"] for r in found if r["judge"] == "likelihood" and r["subset"] == "helpful" and r["metric"] == "win_rate"]
    assert set(judged) == {2}
    assert all(status == "PASS" for _, status, *_ in verify.check_run(folder))
    assert "4, 2, 2, 4" in (folder / "report.html").read_text()  # the page says which n is whose


def test_an_altered_mark_is_told(sparse, tmp_path):
    import shutil

    folder = shutil.copytree(sparse[1], tmp_path / "run")
    rows = read_jsonl(folder / "following.jsonl")
    rows[0]["sides"]["0"][0] = "11" if rows[0]["sides"]["0"][0] != "11" else "00"
    write_jsonl(folder / "following.jsonl", rows)
    found = {group: (status, why) for group, status, _, why in verify.check_run(folder)}
    assert found["metrics"][0] == "FAIL" and "following.jsonl" in found["metrics"][1] and found["files"][0] == "FAIL"


def test_what_counts_is_what_answers(sparse, tmp_path):
    """Texts by hand in the place of the tiny model's: a change that only answers can make."""
    import shutil

    folder = shutil.copytree(sparse[1], tmp_path / "run")
    queries = {q["id"]: q["text"] for q in read_jsonl(folder / "queries.jsonl")}

    def word(query):
        return max(queries[query].replace("?", "").replace(".", "").replace("'", " ").split(), key=len)

    first, last = (folder / f"responses/evaluation-{k}.jsonl" for k in (0, 3))
    write_jsonl(first, [row | {"text": "Hello to you all."} for row in read_jsonl(first)])  # short, simple, no answer
    write_jsonl(last, [row | {"text": f"So {word(row['query'])} it is to us all."} for row in read_jsonl(last)])
    opened = open_run(folder, lambda line: None)
    found = {(r["metric"], r["iteration"], r.get("principle")): r for r in records(opened) if r["subset"] == "harmless"}
    assert found["answered", 0, None]["value"] == 0 == found["steerability", 0, None]["value"]
    assert found["answered", 3, None]["value"] == 1
    change = found["steerability_change", 3, None]
    assert change["value"] == found["steerability", 3, None]["value"] > 0.4 and change["n"] == 4
    assert found["following", 3, "brief"]["value"] == 1 and found["following", 3, "not_brief"]["value"] == 0
    marks = [mark for row in following(opened) for mark in row["sides"]["0"]]
    assert {mark.partition(" ")[2] for mark in marks} == {"off"} and {mark[0] for mark in marks} == {"0", "1"}
    opened.record.pop("counted")  # a run that is older than this counts as it did
    older = {(r["metric"], r["iteration"]): r["value"] for r in records(opened) if r["subset"] == "harmless" and not r.get("principle")}
    assert older["steerability", 0] > 0.4 and ("answered", 0) not in older


def test_the_marks_give_the_steerability_again(sparse):
    """following.jsonl against metrics.json: a second way of counting."""
    _, folder = sparse
    found = json.loads((folder / "metrics.json").read_text())
    for subset in ("helpful", "harmless"):
        for iteration in range(4):
            values = []
            for row in read_jsonl(folder / "following.jsonl"):
                if row["subset"] == subset and str(iteration) in row["sides"]:
                    values.append(np.mean([0 if " " in mark else mark.count("1") / len(mark) for mark in row["sides"][str(iteration)]]))
            (record,) = [r for r in found if (r["metric"], r["subset"], r["iteration"]) == ("steerability", subset, iteration)]
            assert (record["value"], record["n"]) == (pytest.approx(np.mean(values)), len(values))


def test_the_setting_is_no_part_of_a_config_that_does_not_use_it():
    plain = load_experiment("exp2", "mini")[1]
    plain = dataclasses.replace(plain, data=dataclasses.replace(plain.data, scored=0))
    assert "scored" not in plain.to_json()["data"] and Experiment.from_json(plain.to_json()) == plain
    some = dataclasses.replace(plain, data=dataclasses.replace(plain.data, evaluation=96, scored=32))
    assert some.to_json()["data"]["scored"] == 32 and Experiment.from_json(some.to_json()) == some
    with pytest.raises(UserError, match="DataSpec.scored: -1"):
        DataSpec(scored=-1)
    texts = texts_of(some)
    assert (texts.items, texts.scored, texts.answered(3)) == (96, 32, 2 * 32 + 96)
    texts = texts_of(plain)
    assert texts.items == texts.scored == plain.data.evaluation and texts.answered(3) == 3 * plain.data.evaluation


@pytest.mark.parametrize("steps, chances", [
    ((-0.5, -0.25, 0, 0.25, 0.5), (0.05, 0.15, 0.4, 0.25, 0.15)),  # as they are seen
    ((0, 0.25), (0.9, 0.1)), ((0, 1), (0.9, 0.1)), ((0, 1), (0.97, 0.03)), ((-1, 0, 1), (0.1, 0.7, 0.2))])  # rare, on one side
@pytest.mark.parametrize("n, half", [(16, 0.5), (32, 0.3), (128, 0.12)])
def test_the_interval_of_a_change_covers(n, half, steps, chances):
    """And 128 queries tell a change of six points as changes are seen."""
    rng, hits, widths = np.random.default_rng(n), 0, []
    for _ in range(400):
        found = metrics.change(rng.choice(steps, size=n, p=chances))
        hits += found.ci95[0] <= float(np.dot(steps, chances)) <= found.ci95[1]
        widths.append((found.ci95[1] - found.ci95[0]) / 2)
        assert found.ci95[0] <= found.value <= found.ci95[1]
    assert hits / 400 >= 0.93  # 95 % less what 400 draws cannot tell
    assert np.mean(widths) < (half / 2 if 1 not in steps else half)


def test_a_change_without_a_spread_has_an_interval_all_the_same():
    still = metrics.change([0.0] * 32)
    assert still.value == 0 and still.ci95[0] < 0 < still.ci95[1]
    assert metrics.change([0.5]).ci95[1] <= 1
