"""`repro verify RUN`: an untouched run passes; each thing that can be altered fails in its group, also where the record was made
to fit; and no number of another model is held against the paper's."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import unrendered
from judge_server import JudgeServer
from test_experiments import small

from repro import cli
from repro.base.records import CHECK, UserError, checked, file_sha256, read_json, write_json
from repro.base.settings import JudgeSpec
from repro.paper import cells
from repro.report.publish import publish
from repro.servers.endpoint import HOSTED, Endpoint
from repro.stages import verify
from repro.stages.pipeline import judge_run, run

GROUPS = ["config", "inputs", "files", "judgments", "metrics"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A small run of exp1 paper, baseline and all, with the judgments of an LLM judge too."""
    experiment = small(cli.load_experiment("exp1", "paper")[0], tiny, learning_rate=0.01)  # enough to say something else
    with unrendered(), JudgeServer(flips=3).serve() as url:
        folder = run(dataclasses.replace(experiment, iterations=1), tmp_path_factory.mktemp("runs"), say=lambda line: None)
        judge_run(folder, JudgeSpec(judges=("openai",), model="judge-1"), Endpoint(model="judge-1", base_url=url),
                  say=lambda line: None)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("host, hosted", [("api.openai.com", True), ("api", False), ("openai", False), ("::1", False), ("127.0.0.1", False)])
def test_a_judges_host_is_the_hosted_one_by_its_whole_name(host, hosted):
    endpoint = Endpoint(model="m", base_url=verify._address(host))
    assert (endpoint.url == HOSTED) == hosted and endpoint.host == host


def failing(folder: Path) -> list[str]:
    rows = verify.check_run(folder)
    assert [group for group, *_ in rows] == GROUPS
    return [group for group, status, *_ in rows if status == "FAIL"]


def edit(folder: Path, name: str, change, *, made_to_fit: bool) -> None:
    """Change a JSON file, or the first row of a JSONL file; `made_to_fit`: and its sha256 in run.json."""
    path = folder / name
    lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    data = json.loads(lines[0])
    change(data)
    path.write_text("\n".join([again(data), *lines[1:]]) + "\n")
    record = read_json(folder / "run.json")
    for stage in record["stages"].values() if made_to_fit else ():
        if name in stage["outputs"]:
            stage["outputs"][name] = file_sha256(path)
    if made_to_fit:
        write_json(folder / "run.json", checked(record))


def again(data) -> str:
    """JSON of what was altered, its own check renewed where it has one: as someone would who wants it to fit."""
    return json.dumps(checked(data) if isinstance(data, dict) and data.pop(CHECK, None) else data)


def test_an_untouched_run_passes(finished, capsys):
    assert cli.verify_run(finished) == 0
    said = capsys.readouterr().out
    assert said.count(" PASS (n ") == 5 and "FAIL" not in said and "NOT RUN" not in said
    counts = {line.split()[-4]: int(line.split()[-1].rstrip(")")) for line in said.splitlines() if "PASS" in line}
    rows = [json.loads(line) for line in (finished / "judgments.jsonl").read_text().splitlines()]
    judged = [row for row in rows if row.get("record") == "judgment"]
    assert counts["judgments"] == len(judged) and {row["judge"] for row in judged} == {"likelihood", "judge-1"}
    assert counts["metrics"] == len(json.loads((finished / "metrics.json").read_text()))
    assert "not held against the paper's cells: its model is" in said and "Table" not in said
    assert cli.verify_run(finished, strict=True) == 1  # nothing was compared


def test_a_loaded_model_is_not_needed(finished, monkeypatch):
    monkeypatch.setattr("repro.models.load.load_model", None)
    assert failing(finished) == []


@pytest.mark.parametrize("name, change, fits, groups", [
    ("responses/evaluation-1.jsonl", lambda r: r.update(tokens=r["tokens"] + 1), False, ["files", "judgments", "metrics"]),
    ("responses/evaluation-1.jsonl", lambda r: r.update(tokens=r["tokens"] + 1), True, ["judgments", "metrics"]),
    ("responses/baseline.jsonl", lambda r: r.update(text="another"), True, ["judgments"]),
    ("responses/training-1.jsonl", lambda r: r.update(text="another"), False, ["files"]),
    ("logprobs/evaluation-1.jsonl", lambda r: r["logprobs"][0].reverse(), True, ["metrics"]),
    ("judgments.jsonl", lambda r: r.update(score=1 - r["score"] if r["score"] != 0.5 else 1.0), True, ["judgments", "metrics"]),
    ("metrics.json", lambda r: r[0].update(value=r[0]["value"] + 1e-6), True, ["metrics"]),
    ("metrics.json", lambda r: r[3].update(ci95=None), True, ["metrics"]),
    ("metrics.json", lambda r: r.pop(), True, ["metrics"]),
    ("queries.jsonl", lambda r: r.update(text="Another?"), True, ["inputs"]),
    ("constitutions.json", lambda r: r["principles"][0].update(text="Another text for it."), True, ["inputs", "judgments"]),
    ("run.json", lambda r: r["config"]["train"].update(learning_rate=0.02), False, ["config"]),
    ("run.json", lambda r: r["inputs"].update({"model.name": "another"}), False, ["config"]),
    ("run.json", lambda r: r["spoken"]["baseline"].update(date="1999-03-02"), False, ["config"]),
    ("run.json", lambda r: r.update(config_hash="0" * 64), False, ["config"])])
def test_what_was_altered_fails_in_its_group(copy, name, change, fits, groups):
    edit(copy, name, change, made_to_fit=fits)
    assert failing(copy) == groups
    assert cli.verify_run(copy) == 1


def test_a_log_prob_decides_the_likelihood_judge(finished, tmp_path):
    """One way or the other: what was a win cannot be one on both sides."""
    found = []
    for k, change in enumerate((-900, 900)):
        folder = Path(shutil.copytree(finished, tmp_path / str(k)))
        edit(folder, "logprobs/evaluation-0.jsonl", lambda r, by=change: r["initial"].__setitem__(0, r["initial"][0] + by),
             made_to_fit=True)
        found += failing(folder)
    assert found == ["judgments"]


def test_a_raw_answer_of_the_judge_counts_not_only_its_verdict(copy):
    path = copy / "judge_requests.jsonl"
    text = path.read_text()
    assert text.count('Final Response: A') + text.count('final_response\\": \\"A') > 0
    lines = text.replace("Final Response: A", "Final Response: B").replace('final_response\\": \\"A', 'final_response\\": \\"B')
    path.write_text("".join(again(json.loads(line)) + "\n" for line in lines.splitlines()))
    assert "judgments" in failing(copy)


def test_what_is_missing(copy, finished, tmp_path):
    shutil.rmtree(copy / "checkpoints")  # often not kept: said, and no failure
    rows = {group: (status, why) for group, status, _, why in verify.check_run(copy)}
    assert rows["files"] == ("PASS", "1 not kept here")
    (copy / "responses/evaluation-1.jsonl").unlink()
    assert failing(copy) == ["files", "judgments", "metrics"]
    weights = Path(shutil.copytree(finished, tmp_path / "other")) / "checkpoints/iteration-1/config.json"
    weights.write_text(weights.read_text() + " ")
    assert failing(tmp_path / "other") == ["files"]
    (copy / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not the record of a run"):
        cli.verify_run(copy)


def test_a_published_folder_and_an_unfinished_run(copy, tmp_path, capsys):
    folder = publish([copy], tmp_path / "results", page=False)
    assert not (folder / "run.json").exists()
    cli.verify_run(folder)  # numbers alone, as before: cell by cell
    assert "NOT COMPARABLE" in capsys.readouterr().out
    edit(copy, "run.json", lambda r: r["stages"].pop("metrics"), made_to_fit=False)
    rows = {group: (status, why) for group, status, _, why in verify.check_run(copy)}
    assert rows["metrics"] == rows["judgments"] == ("NOT RUN", "the run is not finished") and rows["files"][0] == "PASS"


def test_only_the_papers_models_by_name_are_held_against_the_paper(copy, monkeypatch):
    """A label alone is not enough: it is the user's to choose."""
    called = []
    monkeypatch.setattr(cells, "verify_run", lambda folder, strict: called.append(folder) or 0)
    edit(copy, "run.json", lambda r: r["config"]["model"].update(label="mistral-7b"), made_to_fit=False)
    cli.verify_run(copy)
    assert not called
    edit(copy, "run.json", lambda r: [r["config"][part].update(name=name, label=label) for part, name, label in (
        ("model", "mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("baseline", "mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-instruct"))], made_to_fit=False)
    cli.verify_run(copy)
    assert called == [copy]
    edit(copy, "run.json", lambda r: r["config"].update(profile="mini"), made_to_fit=False)
    cli.verify_run(copy)
    assert len(called) == 1
