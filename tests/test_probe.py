"""`repro probe`: what the page says of a model and principles, from real answers of the tiny model and from marks by hand."""

import json

import pytest

from repro import cli
from repro.base.records import UserError, read_json, read_jsonl
from repro.base.settings import ModelSpec
from repro.stages.folder import evaluation_file
from repro.studies import probed
from repro.studies.probe import probe

PRINCIPLES = {"principles": [
    {"name": "short", "rule": "brief", "text": "Answer in one short sentence.", "antithesis": "Answer at length."},
    {"name": "kind", "text": "Be *kind* to <all>.", "antithesis": "Be cold to all.", "private": True},
    {"name": "asking", "rule": "question", "text": "End with a question.", "antithesis": "End with a statement."}]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PRINCIPLES))
    return path


def run(file, tiny, out, **more):
    return probe(str(file), out, model=ModelSpec(name=str(tiny), label="tiny"), queries=3, max_new_tokens=6,
                 say=more.pop("say", lambda line: None), **more)


def test_a_page_of_every_principle_alone(file, tiny, tmp_path):
    page = run(file, tiny, tmp_path / "out")
    found = read_json(page.with_suffix(".json"))
    assert page == tmp_path / "out/mine.md" and (found["file"], found["model"], found["queries"]) == ("mine.json", "tiny", 3)
    (work,) = (tmp_path / "out/work").iterdir()
    rows = read_jsonl(work / evaluation_file(0))
    assert len(rows) == 3 * 3 * 2 and {r["constitution"] for r in rows} == {"short", "not_short", "kind", "not_kind", "asking", "not_asking"}
    asked = {side: [r["query"] for r in rows if r["constitution"] == side] for side in ("short", "not_asking")}
    assert asked["short"] == asked["not_asking"]  # the same queries, of both subsets
    queries = {q["id"]: q for q in read_jsonl(work / "queries.jsonl")}
    assert [queries[q]["subset"] for q in asked["short"]] == ["helpful", "harmless", "helpful"]
    assert {queries[q]["split"] for q in asked["short"]} == {"development"}
    for row in found["principles"]:
        bound = [r for r in row["records"] if (r["metric"], r["estimator"]) == ("mi", "infonce")]
        assert len(bound) == 1 and bound[0]["n"] == 3 and bound[0]["value"] <= 0.6932
        assert {side: len(marks) for side, marks in row["marks"].items()} == {row["name"]: 3, f"not_{row['name']}": 3}
    text = page.read_text()
    probed.write_page(tmp_path / "again.md", found)  # from the record, whose keys are sorted
    assert (tmp_path / "again.md").read_text() == text
    assert "answers under this side are not shown" in text and "not_kind" not in found["principles"][1]["shown"]
    private = [r["text"] for r in rows if r["constitution"] == "not_kind"]
    assert not any(t in text for t in private if len(t.strip()) > 3)
    assert "Be \\*kind\\* to \\<all\\>." in text and "| kind |" in text and "no rule" in text
    said = []
    again = page.read_bytes()
    run(file, tiny, tmp_path / "out", say=said.append)
    assert "evaluate-0: done before, skipped" in said and page.read_bytes() == again
    assert not any("sampled pairs" in line for line in said)  # nothing is trained


def test_another_probe_of_the_same_file_is_another_one(file, tiny, tmp_path):
    """More queries, or principles that were edited: the page is made anew, and no answer is taken for another one's."""
    first = read_json(run(file, tiny, tmp_path / "out").with_suffix(".json"))
    file.write_text(json.dumps(PRINCIPLES).replace("Answer at length.", "Answer in many words."))
    edited = read_json(run(file, tiny, tmp_path / "out").with_suffix(".json"))
    assert edited["principles"][0]["antithesis"] == "Answer in many words." and len(list((tmp_path / "out/work").iterdir())) == 2
    assert edited["principles"][1] == first["principles"][1]
    more = read_json(probe(str(file), tmp_path / "out", model=ModelSpec(name=str(tiny), label="tiny"), queries=4, max_new_tokens=6,
                           say=lambda line: None).with_suffix(".json"))
    assert more["queries"] == 4 and [row["marks"]["short"][:3] for row in more["principles"][:1]] == [
        row["marks"]["short"] for row in edited["principles"][:1]]


@pytest.mark.parametrize("of, against, bound, said", [
    (["1", "1", "0", "0"], ["1", "0", "1", "0"], 0.1, "both sides are followed sometimes: can be trained"),
    (["1", "1", "0", "0"], ["0 off", "0", "1 loop", "0"], 0.1, "not_p is hardly ever followed"),
    (["1 off", "1 off", "1 recital", "0"], ["1", "1", "1", "1"], 0.1, "p is hardly ever followed"),
    (["0", "0", "0", "0"], ["0", "0", "0", "0"], 0.1, "neither side is followed"),
    (["1", "1", "0", "1"], ["1", "0", "1", "1"], -0.1, "both sides are followed sometimes, but not told apart"),
    (["1", "1", "1", "1"], ["1", "1", "1", "1"], 0.3, "both sides are followed nearly always: little to gain"),
])
def test_the_verdict_in_words(of, against, bound, said):
    row = {"name": "p", "rule": "brief", "marks": {"p": of, "not_p": against}, "records": [
        {"metric": "mi", "estimator": "infonce", "value": 0.2, "ci95": [bound, 0.3], "n": 4}]}
    assert probed.verdict(row) == said
    assert probed.verdict(row | {"rule": None}).startswith("no rule")
    shares = probed.shares(of)
    assert shares["followed"].value <= shares["met"].value and shares["followed"].n == 4


@pytest.mark.parametrize("argv, said", [
    (["probe", "nowhere.json"], "principles nowhere.json: no such file"),
    (["probe", "dialogue_mini", "--probe-queries", "1"], "--probe-queries 1: must be 2 or more"),
    (["probe", "dialogue_mini", "--queries", "nowhere.jsonl"], "--queries nowhere.jsonl: no such file"),
    (["probe", "dialogue_mini", "--task", "poem"], "--task"),
    (["probe", "dialogue_mini", "--model", "nowhere"], "--model 'nowhere': unknown"),
    (["probe", "dialogue_mini", "--max-new-tokens", "0"], "--max-new-tokens: 0; must be above 0"),
    (["probe", "dialogue_mini", "--accept-licence", "mine"], "--accept-licence: 'mine' is unknown; allowed: 'gemma'"),
])
def test_a_mistake_is_one_line_and_leaves_nothing(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, *(["--out", "out"] if "--accept-licence" not in argv else [])])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and told.count("\n") == 1
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_principles_are_not_chosen_on_what_is_held_out(file, tiny, tmp_path):
    """Two development queries are needed, and nothing else."""
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "Is it late?", "split": "development"}\n{"query": "Is it early?", "split": "evaluation"}\n')
    with pytest.raises(UserError, match="1 of its rows have the split development, and at least 2 are needed"):
        run(file, tiny, tmp_path / "out", source=str(queries))
    assert not (tmp_path / "out").exists()
    queries.write_text('{"query": "Is it late?", "split": "development"}\n{"query": "Is it early?", "split": "development"}\n')
    assert read_json(run(file, tiny, tmp_path / "out", source=str(queries)).with_suffix(".json"))["queries"] == 2
