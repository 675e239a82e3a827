"""Every shipped experiment, end to end on a tiny model; resumption, refusals, and what a run must write."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import unrendered
from forked import killed

from repro.base.records import UserError, file_sha256, read_jsonl
from repro.experiment import EXPERIMENTS, load_experiment
from repro.models import decoding, hub, load
from repro.stages import draws
from repro.stages.pipeline import run

SHIPPED = [e for path in sorted(EXPERIMENTS.glob("exp*.py")) for profile in ("mini", "paper")
           for e in load_experiment(path.stem, profile)]
KEYS = {"metric", "subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator", "ties", "length", "seed",
        "value", "sem", "ci95", "n"}
# report.html and run.json hold wall seconds, so they are not compared
CONTRACT = ["constitutions.json", "metrics.json", "judgments.jsonl", "figures/iterations.png", "responses/training-1.jsonl",
            *(f"responses/evaluation-{k}.jsonl" for k in range(4))]


def small(experiment, tiny, **train):
    """The experiment as shipped but for its sizes, its models and the source of its queries."""
    def as_tiny(spec, field="name"):
        return spec and dataclasses.replace(spec, **{field: str(tiny)})

    posts = experiment.task == "summary"
    local = as_tiny(experiment.writer, "model")
    return dataclasses.replace(
        experiment, model=as_tiny(experiment.model), baseline=as_tiny(experiment.baseline), writer=local,
        data=dataclasses.replace(experiment.data, source="embedded-tldr" if posts else "embedded",
                                 train=32 if posts else 16, evaluation=2),
        sampling=dataclasses.replace(experiment.sampling, engine="transformers", max_new_tokens=6, reasoning_tokens=6, batch_size=5,
                                     drop_phrases=("]",), full_stop=False),
        train=dataclasses.replace(experiment.train, batch_size=2, batches=2, batches_increment=2, **train))


def contents(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in CONTRACT}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """exp1 mini on the tiny model, run to its end without interruption."""
    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    return experiment, run(experiment, tmp_path_factory.mktemp("runs"), say=lambda text: None)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda e: e.path)
def test_every_shipped_experiment_runs(shipped, tiny, tmp_path):
    """mini as it is; paper under the other dose, so that both go through a whole run. The tiny model writes nothing that
    can be used as principles, so that a run with a writer says so and goes on with the hand-written ones."""
    said = []
    experiment = small(shipped, tiny, **({"dose": "as_run"} if shipped.profile == "paper" else {}))
    if experiment.cot:  # nothing that the tiny model says holds the mark; all of it is reasoning, and no pair is left
        with pytest.raises(UserError, match="0 pairs of responses are left of the 4"):
            run(experiment, tmp_path, say=said.append)
        return
    with unrendered() if shipped.profile == "mini" else contextlib.nullcontext():  # these are in `finished` and in test_variants.py
        folder = run(experiment, tmp_path, say=said.append)
    assert folder == tmp_path / experiment.path
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {r["iteration"] for r in metrics} == {0, 1, 2, 3} and all(KEYS <= r.keys() for r in metrics)
    assert {r["metric"] for r in metrics} >= {"mi", "length_tokens", "accuracy_row", "accuracy_col", "win_rate",
                                              "hack_constitution_overlap", "hack_query_overlap", "hack_repetition"}
    record = json.loads((folder / "run.json").read_text())
    assert record["backend"] == "shared"  # not the slower path, unasked
    steps = [len(record["stages"][f"train-{k}"]["trace"]) for k in (1, 2, 3)]
    assert steps == [2, 4, 6]
    data = json.loads((folder / "constitutions.json").read_text())
    rules = [bool(p["rule"]) for p in (*data["principles"], *data.get("held_out", ()))]
    assert any(rules) == any(r["judge"] == "rule" for r in metrics)
    assert all(rules) != any("judge rule" in why for why in record["not_run"])
    assert {r["cot"] for r in metrics} == {experiment.cot} and {r["writer"] for r in metrics} == {"hand"}
    if experiment.writer:
        assert sum("no principles that can be used" in line and "going on with" in line for line in said) == 1
        assert len((folder / "writing.jsonl").read_text().splitlines()) >= 3
    if experiment.baseline:
        others = [r for r in metrics if r["metric"] == "win_rate" and r["baseline"] == experiment.baseline.label]
        assert {r["iteration"] for r in others} == ({0, 1, 2, 3} if any(rules) else set())
        assert len(read_jsonl(folder / "responses/baseline.jsonl")) == len(read_jsonl(folder / "logprobs/evaluation-0.jsonl"))
        assert {r["model"] for r in metrics if r["metric"] == "length_tokens"} == {experiment.model.label, experiment.baseline.label}


def test_values_are_in_range(finished):
    import math

    for r in json.loads((finished[1] / "metrics.json").read_text()):
        assert r["n"] == 2 and (r["ci95"] is None or r["ci95"][0] <= r["value"] <= r["ci95"][1]), r
        assert r["metric"] == "mi" or r["ci95"][1] > r["ci95"][0], r
        if r["metric"] == "mi" and r["estimator"] == "infonce":
            assert r["value"] <= math.log(4) + 1e-9 and r["ci95"][1] <= math.log(4)
        elif r["metric"].startswith(("accuracy", "hack", "following")):
            assert 0 <= r["value"] <= 1
        elif r["metric"] == "win_rate":
            assert 0 <= r["value"] <= 100 and r["baseline"] and r["ties"] in ("half", "loss")


def test_metrics_agree_with_the_files_they_come_from(finished):
    """Length and bound again, by hand from responses and log-probs."""
    import math

    folder = finished[1]
    rows = [json.loads(line) for line in (folder / "logprobs/evaluation-2.jsonl").read_text().splitlines()]
    bounds, lengths = [], []
    texts = [json.loads(line) for line in (folder / "responses/evaluation-2.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        if row["subset"] == "helpful":
            m = [[x / n for x, n in zip(line, row["tokens"])] for line in row["logprobs"]]
            bounds.append(sum(math.log(4 * math.exp(m[j][j]) / sum(math.exp(m[c][j]) for c in range(4))) for j in range(4)) / 4)
            lengths.append(texts[4 * k]["tokens"])
    metrics = json.loads((folder / "metrics.json").read_text())

    def value(**fixed):
        (found,) = [r["value"] for r in metrics if all(r[k] == v for k, v in fixed.items())]
        return found

    where = {"iteration": 2, "subset": "helpful"}
    assert value(metric="mi", estimator="infonce", **where) == pytest.approx(sum(bounds) / 2)
    assert value(metric="length_tokens", **where) == pytest.approx(sum(lengths) / 2)


def test_each_iteration_samples_with_the_model_before_it(finished):
    """Each iteration's responses come from the model before it: its greedy answers, sampled again, are the file's."""
    from repro.sampling.local import sample_batch
    from repro.stages.run import Run

    experiment, folder = finished
    shared = Run(experiment, folder, lambda text: None)
    shared.prepare()
    model = load.load_model(str(folder / "checkpoints/iteration-1"), dtype=experiment.sampling.dtype)
    rows = [json.loads(line) for line in (folder / "responses/training-2.jsonl").read_text().splitlines()]
    assert {r["iteration"] for r in rows} == {1}


    query, (_, negative) = shared.training_plan(2)[0]
    text = draws.prompt(shared.voice, negative, query, experiment.seed, 2, "sample", negative.id, sample=True)
    assert rows[1]["query"] == query.id and rows[1]["constitution"] == negative.id
    assert sample_batch(model, shared.voice.tokenizer, [text], max_new_tokens=6)[0]["text"] == rows[1]["text"]


def test_every_iteration_trains_the_initial_weights(finished, tiny):
    """The first loss of iteration 3 is the initial model's on its first batch, not that of iteration 2's model; and six
    RMSprop steps, each at most 10 learning rates (the least denominator is sqrt(0.01 g^2)), bound how far it moves."""
    from repro.core import engines
    from repro.core.logprobs import matrix_of
    from repro.core.losses import symmetric_infonce
    from repro.core.tree import tokenised
    from repro.stages.run import Run
    from repro.stages.sample import usable_pairs

    experiment, folder = finished
    shared = Run(experiment, folder, lambda text: None)
    shared.prepare()
    model = load.load_model(str(tiny))
    kept, _ = usable_pairs(shared, 3)
    losses = []
    with engines.matmul_precision(model, experiment.train.precision):
        for query, pair, responses in kept[:experiment.train.batch_size]:
            prompts = [draws.prompt(shared.voice, c, query, experiment.seed, 3, "train", c.id, sample=False) for c in pair]
            losses.append(symmetric_infonce(matrix_of("reference", model, tokenised(
                shared.voice.tokenizer, [prompts], [[r["ids"] for r in responses]], score_eos=False), length_normalize=True)).item())
    trace = json.loads((folder / "run.json").read_text())["stages"]["train-3"]["trace"]
    assert trace[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    before = load.load_model(str(tiny)).state_dict()
    after = load.load_model(str(folder / "checkpoints/iteration-3")).state_dict()
    farthest = max((after[k] - before[k]).abs().max().item() for k in before)
    assert 0 < farthest <= 60 * experiment.train.learning_rate * 1.01


def test_halves_alternate_and_pairs_hold_the_positive(finished):

    from repro.stages.run import Run

    experiment, folder = finished
    shared = Run(experiment, folder, lambda text: None)
    shared.prepare()
    asked = {k: {q.id for q, _ in shared.training_plan(k)} for k in (1, 2, 3)}
    assert not asked[1] & asked[2] and not asked[2] & asked[3] and asked[1] & asked[3]
    assert not {q.id for q in shared.held_out} & set().union(*asked.values())
    for query, (positive, negative) in shared.training_plan(3):
        assert positive == shared.constitutions.positive and negative in shared.constitutions.negatives(query.subset)


def test_the_second_run_does_nothing_and_says_so(finished):
    experiment, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.json*") if p.name not in ("constitutions.json", "queries.jsonl")}
    said = []
    run(experiment, folder.parents[1], say=said.append)
    assert sum("done before, skipped" in line for line in said) == 13
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_kill_between_a_stages_record_and_the_end_of_its_partial_file_leaves_none(finished, tmp_path):
    """One of 622 kills came there: the stage is done, and no later command looked at the file again."""
    experiment, folder = finished
    other = tmp_path / experiment.path
    shutil.copytree(folder, other)
    for name in ("evaluation-0", "evaluation-3", "training-2"):
        (other / f"responses/{name}.partial.jsonl").write_text("{}\n")
    run(experiment, tmp_path, say=lambda line: None)
    assert not list(other.rglob("*.partial.jsonl")) and contents(other) == contents(folder)


def test_an_altered_file_is_made_again(finished, tiny, tmp_path):
    import shutil

    experiment, folder = finished
    shutil.copytree(folder.parents[1], tmp_path / "runs")
    copy = tmp_path / "runs" / folder.relative_to(folder.parents[1])
    expected = contents(copy)
    path = copy / "logprobs/evaluation-3.jsonl"
    path.write_text(path.read_text().replace("-", "", 1))
    (copy / "checkpoints/iteration-2/model.safetensors").unlink()
    said = []
    run(experiment, tmp_path / "runs", say=said.append)
    assert contents(copy) == expected
    assert "evaluate-1: done before, skipped" in said and "evaluate-3: done before, skipped" not in said
    assert any(line.startswith("evaluate-3: done again, since ") and line.endswith("is missing or altered") for line in said), said


@pytest.mark.parametrize("module, function, nth", [
    ("stages.sample", "append_jsonl", 2), ("stages.sample", "write_jsonl", 3), ("core.engines", "objective", 9),
    ("stages.sample", "seal", 2), ("stages.folder", "write_json", 9), ("stages.measure", "write_json", 1)])
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(finished, tiny, tmp_path, module, function, nth):
    """A real SIGKILL in sampling, training, saving, recording and measuring."""
    experiment, folder = finished
    assert killed(f"repro.{module}", function, nth, run, experiment, tmp_path) == -signal.SIGKILL
    copy = run(experiment, tmp_path, say=lambda text: None)
    assert contents(copy) == contents(folder)
    assert not list(copy.rglob("*.tmp")) and not list(copy.rglob("*.partial*")) and not (copy / ".lock").exists()


def test_another_config_is_refused_and_the_field_named(finished):
    experiment, folder = finished
    other = dataclasses.replace(experiment, seed=7)
    with pytest.raises(UserError, match="holds a run of another config: seed .0 there, 7 here."):
        run(other, folder.parents[1], say=lambda text: None)


def test_two_runs_in_one_directory(finished, tiny):
    experiment, folder = finished
    code = ("import sys, time, pathlib\nfrom repro.base.records import locked\n"
            f"with locked(pathlib.Path({str(folder)!r})):\n print('held', flush=True); time.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(UserError, match=f"in use by process {owner.pid}"):
        run(experiment, folder.parents[1], say=lambda text: None)
    assert time.monotonic() - start < 1
    owner.kill()
    owner.wait()
    owner.stdout.close()


def test_the_report_says_that_a_checkout_was_modified():
    from repro.report.story import _short

    assert (_short("0123456789abcdef"), _short("0123456789abcdef-dirty"), _short(None)) == ("0123456789ab", "0123456789ab-dirty", "unknown")


def test_no_text_of_users_or_models_becomes_a_part_of_the_page(tiny, tmp_path):
    """Wherever it stands: tags and attributes are the same as without it, and it is shown as it is."""
    from html.parser import HTMLParser

    from repro.base.records import CHECK
    from repro.report.publish import write_report

    class Page(HTMLParser):
        def __init__(self, text: str):
            super().__init__()
            self.tags, self.text = [], ""
            self.feed(text)

        def handle_starttag(self, tag, attrs):
            if tag != "mark":  # words that the initial model did not say: other ones in another text
                self.tags.append((tag, [k for k, _ in attrs]))

        def handle_data(self, data):
            self.text += data

    folder = run(small(load_experiment("exp1", "paper")[0], tiny), tmp_path / "runs", say=lambda text: None)
    before, bad = Page((folder / "report.html").read_text()), """<img src=x onerror='a'> "&amp;" </td></table>{{ 7 * 7 }}"""
    shown = []

    def spoil(path, change, *, lines=False):
        values = [json.loads(line) for line in path.read_text().splitlines()] if lines else [json.loads(path.read_text())]
        for value in values:
            change(value)
        path.write_text("\n".join(map(json.dumps, values)) + "\n" * lines)

    def put(place: dict, key: str):
        place[key] = f"{bad} {path.name} {key}"
        shown.append(place[key])

    for path in (folder / "responses").glob("evaluation-*.jsonl"):
        spoil(path, lambda row: put(row, "text"), lines=True)
    spoil(path := folder / "queries.jsonl", lambda row: put(row, "text"), lines=True)
    spoil(path := folder / "run.json", lambda r: [r.pop(CHECK), put(r["config"]["model"], "label"), put(r["config"], "name"), put(r, "device"),
                                                  r["not_run"].append(bad)])
    spoil(path := folder / "metrics.json", lambda rows: [row.update({k: row[k] and bad + row[k] for k in ("model", "baseline")}) for row in rows])
    write_report(folder)
    after = Page((folder / "report.html").read_text())
    assert after.tags == before.tags
    assert after.text.count(bad) > 20 and all(text in after.text for text in set(shown))


def test_the_report_shows_responses_escaped_and_never_the_private_ones(tiny, tmp_path):
    from repro.report.publish import publish, write_report

    experiment = small(load_experiment("exp1", "paper")[0], tiny)
    folder = run(experiment, tmp_path / "runs", say=lambda text: None)
    page = (folder / "report.html").read_text()
    assert "<h5>not_helpful,harmless</h5>" in page and "not_harmless</h5>" not in page
    path = folder / "responses/evaluation-1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = "SECRET" if "not_harmless" in row["constitution"] else "<script>alert(1)</script>"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert" in page and "<script>alert" not in page and "SECRET" not in page
    out = publish([folder], tmp_path / "results")
    assert "SECRET" not in (out / "report.html").read_text()
    (out / "report.html").unlink()
    out = publish([folder], tmp_path / "results", page=False)
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [
        "constitutions.json", "following-seed-0.jsonl", "iterations.pdf", "iterations.png", "metrics.json", "run-seed-0.json"]


def said_by(capsys, *argv) -> tuple[int, str, str]:
    """A command's exit code, and what it says on either stream."""
    from repro import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, argv)))
    return stop.value.code, *capsys.readouterr()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_publish_joins_seeds_and_refuses_other_differences(finished, tiny, tmp_path, capsys):
    """At once or one after the other, in any order: the same files; and figures and page again from these alone."""
    from repro.report.publish import publish

    def command(*argv) -> tuple[int, str, str]:
        return said_by(capsys, "publish", *argv)

    experiment, folder = finished
    with unrendered():
        second = run(dataclasses.replace(experiment, seed=1), tmp_path / "b", say=lambda text: None)
        third = run(dataclasses.replace(experiment, seed=2, iterations=2), tmp_path / "c", say=lambda text: None)
    out = publish([folder, second], tmp_path / "results")
    assert {r["seed"] for r in json.loads((out / "metrics.json").read_text())} == {0, 1}
    with pytest.raises(UserError, match="different seeds"):
        publish([folder, folder], tmp_path / "results")
    with pytest.raises(UserError, match="its config differs in more than the seed: iterations"):
        publish([folder, third], tmp_path / "results")
    together = files_of(out)
    assert b"seeds 0, 1: helpful" in together["report.html"] and b"change of each seed" in together["report.html"]
    for name, order in (("up", [folder, second]), ("down", [second, folder])):
        for one in order:
            assert command(one, "--results", tmp_path / name)[0] == 0
        assert files_of(tmp_path / name / "exp1_dialogue/mini") == together
    assert command(second, "--results", tmp_path / "up")[0] == 0  # once more changes nothing
    assert files_of(tmp_path / "up/exp1_dialogue/mini") == together
    (out / "figures/iterations.png").unlink()
    (out / "figures/iterations.pdf").unlink()
    text = (out / "report.html").read_text()
    (out / "report.html").write_text(re.sub("<h1>.*?</h1>", "", text).replace("data:image/png;base64,", ""))
    assert command(out)[:2] == (0, f"made again from what it holds: {out}\n") and files_of(out) == together
    for argv, said in (([str(third)], "differs in more than the seed: iterations"),
                       ([str(second), "--numbers-only"], "its runs were published with one; publish these without --numbers-only")):
        code, _, error = command(*argv, "--results", tmp_path / "results")
        assert code == 2 and said in error and files_of(out) == together
    (out / "report.html").write_text("<html>a page of before</html>")
    for argv in ([str(out)], [str(second), "--results", str(tmp_path / "results")]):
        assert "report.html: an older page, which does not carry what it shows" in command(*argv)[2]


def as_seed(folder: Path, seed: int, to: Path, **config) -> Path:
    """A finished run as if its seed had been another one (its numbers are the same)."""
    from repro.base.records import CHECK, write_json

    shutil.copytree(folder, to)
    record = {k: v for k, v in json.loads((to / "run.json").read_text()).items() if k != CHECK}
    write_json(to / "run.json", record | {"config": record["config"] | {"seed": seed} | config})
    write_json(to / "metrics.json", [r | {"seed": seed} for r in json.loads((to / "metrics.json").read_text())])
    return to


def test_a_publish_that_was_stopped_is_not_taken_for_whole(finished, tmp_path, monkeypatch):
    """Stopped at any of its writes: the same command does it again, another one is refused, and names what is missing."""
    from repro.base.records import write_json
    from repro.report import publish as module

    _, folder = finished
    one, two, three = (as_seed(folder, k, tmp_path / f"run{k}") for k in (1, 2, 3))
    want = files_of(module.publish([one], tmp_path / "a")) , files_of(module.publish([one, two], tmp_path / "b"))
    stops = 6  # after the first: a run's record, its marks, constitutions, metrics, figures, page
    for first, then, before, after in (((one,), (one,), (), want[0]), ((two,), (two,), (one,), want[1])):
        for at in range(stops + 1):
            out = tmp_path / f"stopped-{len(before)}-{at}"
            if before:
                module.publish(list(before), out)
            writes = iter(range(100))

            def stopped(real, writes=writes, at=at):
                def write(*args, **kwargs):
                    if next(writes) == at:
                        raise KeyboardInterrupt
                    return real(*args, **kwargs)
                return write

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                for name in ("write_json", "write_bytes", "_save_figures", "write_page"):
                    patch.setattr(module, name, stopped(getattr(module, name)))
                module.publish(list(first), out)
            place = out / "exp1_dialogue/mini"
            if (place / f"run-seed-{2 if before else 1}.json").exists():
                left = files_of(place)
                with pytest.raises(UserError, match=f"to publish seed-{2 if before else 1} did not come to its end; name that run again, too"):
                    module.publish([three], out)
                assert files_of(place) == left
            assert files_of(module.publish(list(then), out)) == after
    write_json(one / "run.json", json.loads((one / "run.json").read_text()) | {"counted": None})
    with pytest.raises(UserError, match="differs in more than the seed: what counts as followed"):
        module.publish([one], tmp_path / "b/nowhere/..")


def test_the_example_of_a_library_trains_the_model_that_it_is_given(tiny, capsys):
    spec = importlib.util.spec_from_file_location("library", EXPERIMENTS / "library.py")
    spec.loader.exec_module(library := importlib.util.module_from_spec(spec))
    library.main(str(tiny))
    said = re.fullmatch(r"(\d) of 6 queries; loss (\d\.\d+); bound (-?\d\.\d+) -> (-?\d\.\d+) nats on the same responses \(n (\d); "
                        r"they were trained on\)\n", capsys.readouterr().out)
    assert said[1] == said[5] and int(said[1]) >= 2 and 0 < float(said[2]) < 2 * 0.7 and said[3] != said[4]
    assert len((EXPERIMENTS / "library.py").read_text().splitlines()) <= 60


def test_show_says_what_came_out(finished, tmp_path, capsys):
    """Of a run and of its published copy the same, but for the responses of other seeds; a mistake in one line."""
    from repro.report.publish import publish

    def shown(*argv) -> tuple[int, list[str], str]:
        code, out, error = said_by(capsys, "show", *argv)
        return code, out.splitlines(), error

    _, folder = finished
    code, lines, _ = shown(folder)
    assert code == 0 and lines[0] == "exp1_dialogue, helpful" and lines[1].startswith("  The bound on mutual information ")
    assert sum("initial model:" in line for line in lines) == 2 * 4 and any(re.match(r"  brief,not_simple: Answer in one", line) for line in lines)
    assert shown(publish([folder], tmp_path))[1] == lines
    assert not any("initial model:" in line for line in shown(folder, "--answers", 0)[1])
    for argv, said in (((tmp_path / "none",), "none: no metrics.json; only a finished run can be shown"), ((folder, "--answers", -1), "--answers -1: 0 or more")):
        assert shown(*argv)[0] == 2 and said in shown(*argv)[2]


def test_watch_tells_each_thing_once_while_the_run_works(finished, tmp_path, monkeypatch):
    """A run as its folder stood after the first evaluation, in the middle of training, and when it was finished."""
    from repro.base.records import CHECK, write_json
    from repro.studies import watch

    whole = shutil.copytree(finished[1], tmp_path / "mini")
    record = {k: v for k, v in json.loads((whole / "run.json").read_text()).items() if k != CHECK}
    write_json(whole / "run.json", record | {"stages": {k: v for k, v in record["stages"].items() if k == "evaluate-0"}})
    trace = record["stages"]["train-1"]["trace"]
    later, lines, looks = [
        lambda: (whole / "checkpoints/iteration-1.steps/step-000001").mkdir(parents=True) or write_json(
            whole / "checkpoints/iteration-1.steps/step-000001/trace.json", trace[:1]),
        lambda: None,
        lambda: (shutil.rmtree(whole / "checkpoints/iteration-1.steps"), write_json(whole / "run.json", record))], [], []

    def sleep(seconds):
        looks.append((seconds, len(lines)))
        later.pop(0)()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.watch(whole, 0.5, lines.append)
    assert [s for s, _ in looks] == [0.5] * 3 and looks[1][1] == looks[0][1] + 1 == looks[2][1]  # a step; then nothing new
    assert lines[0].startswith("evaluate-0: done in ") and re.match(r"initial model, helpful: bound -?\d\.\d\d, sides followed 0\.\d\d, ", lines[1])
    assert lines[looks[0][1]] == f"train-1, step 1: loss {trace[0]['loss']:.3f}, gradient norm {trace[0]['grad_norm']:.2f}"
    order = [line.split(":")[0] for line in lines if re.match(r"(sample|train|evaluate|judge|metrics|report)[-:\d]*: done", line)]
    assert order == ["evaluate-0", *(f"{s}-{k}" for k in (1, 2, 3) for s in ("sample", "train", "evaluate")), "judge", "metrics", "report"]
    assert sum(line.startswith("train-") and "step" in line for line in lines) == sum(
        len(record["stages"][f"train-{k}"]["trace"]) for k in (1, 2, 3))
    told = [line for line in lines if not line.startswith("  ")]  # a query and its answer may be the same again
    assert len(set(told)) == len(told) == len(lines) - 8
    found = {(r["metric"], r["subset"], r["iteration"]): r for r in json.loads((whole / "metrics.json").read_text())
             if r["metric"] in ("steerability", "answered")}
    for subset in ("helpful", "harmless"):
        line = next(line for line in lines if line.startswith(f"iteration 3, {subset}: "))
        assert f"sides followed {found['steerability', subset, 3]['value']:.2f}, " in line and f"(n {found['steerability', subset, 3]['n']};" in line
    assert lines[-1] == f"finished: {whole / 'report.html'}"
    with pytest.raises(UserError, match="no run has begun there"):
        watch.watch(tmp_path / "none")

    logged = []
    log = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **how: logged.append((how["project"], how["name"])) or log))
    watch.watch(whole, say=lines.append, trackio="mine")
    assert logged[0] == ("mine", "exp1_dialogue-seed-0") and logged[-1] == "finished"
    traces = [step for k in (1, 2, 3) for step in record["stages"][f"train-{k}"]["trace"]]
    assert [(step, values["loss"]) for step, values in logged[1:-1] if "loss" in values] == [(n, t["loss"]) for n, t in enumerate(traces, 1)]
    after = {step: values["helpful/sides followed"] for step, values in logged[1:-1] if "helpful/sides followed" in values}
    assert list(after) == [0, 2, 6, 12] and after[12] == pytest.approx(found["steerability", "helpful", 3]["value"])
    monkeypatch.setitem(sys.modules, "trackio", None)  # as where it is not installed
    with pytest.raises(UserError, match="--trackio: the package is not here; pip install trackio"):
        watch.watch(whole, trackio="mine")


def test_export_makes_a_folder_that_transformers_and_the_hub_read(finished, tmp_path, capsys):
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer


    def command(*argv) -> tuple[int, str]:
        code, *said = said_by(capsys, "export", *argv)
        return code, "".join(said)

    _, folder = finished
    code, said = command(folder, out := tmp_path / "hub/model")
    assert code == 0 and said == f"exported, with a model card: {out}\n"
    kept = files_of(folder / "checkpoints/iteration-3")
    assert {k: v for k, v in files_of(out).items() if k != "README.md"} == {k: v for k, v in kept.items() if k != "complete.json"}
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, folder / "checkpoints/iteration-3"))
    assert all((theirs[k] == ours[k]).all() for k in ours) and AutoTokenizer.from_pretrained(out)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "smollm2-135m-instruct" and "sami" in card.data.tags and card.data.license is None
    rows = json.loads((folder / "metrics.json").read_text())
    (change,) = [r for r in rows if (r["metric"], r["subset"], r["iteration"]) == ("steerability_change", "helpful", 3)]
    assert f"{change['value']:+.2f} [{change['ci95'][0]:+.2f}, {change['ci95'][1]:+.2f}]" in card.text and "Answer at length" in card.text
    before = files_of(tmp_path)
    cut = shutil.copytree(folder, tmp_path.parent / "cut")
    (cut / "checkpoints/iteration-2/config.json").unlink()
    for argv, said in (((folder, out), "there is something already"), ((folder, tmp_path / "b", "--iteration", 4), "--iteration 4: 1 to 3"),
                       ((cut, tmp_path / "b", "--iteration", 2), "not there, or not as it was written"),
                       ((tmp_path, tmp_path / "b"), "only a finished run can be exported")):
        code, told = command(*argv)
        assert code == 2 and said in told.splitlines()[-1] and files_of(tmp_path) == before
    assert command(folder, tmp_path / "first", "--iteration", 1)[0] == 0
    assert "The numbers are those of iteration 3." in (tmp_path / "first/README.md").read_text()


def test_a_page_carries_what_it_shows_and_nothing_private(tiny, tmp_path):
    from repro.report.page import stories_of
    from repro.report.publish import again, publish, write_report

    folder = run(small(load_experiment("exp1", "paper")[0], tiny), tmp_path / "runs", say=lambda text: None)
    path = folder / "responses/evaluation-1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = "SECRET" if "not_harmless" in row["constitution"] else "</script><!--<script> \\u003c \u2028 &lt;"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_report(folder)
    one, = stories_of(folder / "report.html")
    assert one["items"][0]["answers"][1] == ["</script><!--<script> \\u003c \u2028 &lt;" + " […]" * (not r["finished"])
                                             for r in rows[:4] if "not_harmless" not in r["constitution"]]
    assert "SECRET" not in (folder / "report.html").read_text() and (folder / "report.html").read_text().count("</script") == 2  # the block, the script
    out = publish([folder], tmp_path / "results")
    before = files_of(out)
    shutil.rmtree(folder)
    assert files_of(again(out)) == before and (out / "report.html").read_text().count("<mark>&lt;/script&gt;") > 0


def test_sigterm_and_sigint_stop_with_one_line(tiny, tmp_path):
    """The command line, stopped in the middle: its exit code, no traceback, and it can go on."""
    file = tmp_path / "mine.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
                    "from test_experiments import small\nfrom repro.cli import load_experiment\n"
                    f"EXPERIMENTS = {{'mini': small(load_experiment('exp1', 'mini')[0], Path({str(tiny)!r}))}}\n")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = subprocess.Popen([sys.executable, "-m", "repro.cli", "run", str(file), "--out", str(tmp_path / str(code))],
                                 stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                                 # a shell's background job ignores SIGINT, and its children with it
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        for line in child.stderr:
            if "held-out" in line:
                break
        time.sleep(1.5)
        child.send_signal(number)
        rest = child.stderr.read()
        child.stderr.close()
        assert child.wait() == code, rest
        assert "Traceback" not in rest and "run the same command to go on" in rest


def test_dropped_pairs_are_counted_by_their_first_reason(finished, tmp_path):
    """Empty, identical, and each phrase of the filter; the rest keep their order and their sides."""
    from repro.base.records import write_jsonl
    from repro.stages.folder import training_file
    from repro.stages.run import Run
    from repro.stages.sample import usable_pairs

    experiment, folder = finished
    experiment = dataclasses.replace(experiment, sampling=dataclasses.replace(experiment.sampling, drop_phrases=("sorry", "]")))
    shared = Run(experiment, tmp_path / "other", lambda text: None)
    shared.prepare()
    plan = shared.training_plan(3)
    texts = [("", "b"), ("same ", "same"), ("I am sorry", "b"), ("a", "see [1]"), ("  ", "sorry")] + [("a", "b")] * (len(plan) - 5)
    write_jsonl(shared.folder / training_file(3), [{"text": t} for pair in texts for t in pair])
    kept, dropped = usable_pairs(shared, 3)
    assert dropped == {"empty": 2, "identical": 1, "phrase 'sorry'": 1, "phrase ']'": 1}
    assert [(q, c) for q, c, _ in kept] == plan[5:]
    assert all([row["text"] for row in r] == ["a", "b"] for _, _, r in kept)


def test_identical_responses_tie_under_every_judge(finished, tmp_path, unrendered):
    import shutil

    from repro.base.records import read_json, read_jsonl, write_jsonl

    experiment, folder = finished
    shutil.copytree(folder.parents[1], tmp_path / "runs")
    copy = tmp_path / "runs" / folder.relative_to(folder.parents[1])
    first = read_jsonl(copy / "responses/evaluation-0.jsonl")
    write_jsonl(copy / "responses/evaluation-3.jsonl", [row | {"iteration": 3} for row in first])
    record = read_json(copy / "run.json")
    record["stages"]["evaluate-3"]["outputs"]["responses/evaluation-3.jsonl"] = file_sha256(
        copy / "responses/evaluation-3.jsonl")
    (copy / "run.json").write_text(json.dumps(record))
    run(experiment, tmp_path / "runs", say=lambda text: None)
    rows = [row for row in read_jsonl(copy / "judgments.jsonl") if row["iteration"] == 3]
    assert {row["judge"] for row in rows} == {"rule", "likelihood"} and {row["outcome"] for row in rows} == {"tie"}


def test_a_cut_response_has_the_length_of_what_is_left(tiny, tmp_path, monkeypatch):
    """Base models run on into the format; the record holds the answer's own length."""
    from repro.sampling import local

    experiment = small(load_experiment("exp1", "paper")[0], tiny)
    monkeypatch.setattr(local, "sample_batch", lambda model, tokenizer, prompts, **_: [
        {"text": " Yes.\n\nHuman: and more", "tokens": 99, "finished": False} for _ in prompts])
    with pytest.raises(UserError, match="0 pairs of responses are left"):  # every pair is identical
        run(experiment, tmp_path, say=lambda text: None)
    (path,) = tmp_path.rglob("responses/evaluation-0.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["text"], r["tokens"], r["finished"]) for r in rows} == {(" Yes.", 5, True)}


def save_gpt2(folder: Path) -> Path:
    """A family that the shared path does not know."""
    import torch
    from conftest import byte_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=1024, bos_token_id=1,
                               eos_token_id=2)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dropout", ["off", "drawn"])
def test_a_family_whose_byte_model_nobody_knows_runs_to_its_end_and_says_how(tmp_path, dropout, unrendered):
    """GPT-2 with its usual dropout: off, on the shared path; drawn, on the reference. The same bytes under another name."""
    experiment = dataclasses.replace(small(load_experiment("exp1", "mini")[0], save_gpt2(tmp_path / "gpt2"), learning_rate=1e-3),
                                     iterations=1)
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, dropout=dropout))
    said, folders = [], []
    for name in ("one", "two"):
        folders.append(run(dataclasses.replace(experiment, name=name), tmp_path, say=said.append))
    record = json.loads((folders[0] / "run.json").read_text())
    assert record["config"]["train"]["dropout"] == dropout
    assert record["backend"] == ("shared" if dropout == "off" else "reference")
    assert all(step["loss"] > 0 for step in record["stages"]["train-1"]["trace"])
    words = "dropout is off in training (of the model's config: " if dropout == "off" else "by the reference path, which is slower: dropout"
    assert any(words in line for line in said)
    for file in ("checkpoints/iteration-1/model.safetensors", "logprobs/evaluation-1.jsonl"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_a_model_that_looks_ahead_is_refused_before_anything_is_written(tmp_path):
    """An encoder that is run as a decoder, and attention that goes both ways."""
    from conftest import byte_tokenizer
    from transformers import BertConfig, BertLMHeadModel, Gemma3ForCausalLM, Gemma3TextConfig

    size = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=2048)
    for model in (BertLMHeadModel(BertConfig(**size)),
                  Gemma3ForCausalLM(Gemma3TextConfig(**size, head_dim=8, num_key_value_heads=2, use_bidirectional_attention=True))):
        place = tmp_path / model.config.model_type
        model.save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        with pytest.raises(UserError, match=f"--model {place}: {model.config.model_type}: not a causal language model"):
            run(small(load_experiment("exp1", "mini")[0], place), tmp_path / "out")
        assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_model_that_names_no_context_is_refused_in_one_line(tmp_path):
    from transformers import BloomConfig

    BloomConfig(vocab_size=259, hidden_size=8, n_layer=1, n_head=1).save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match="bloom.*no max_position_embeddings"):
        load.context_of(hub.load_config(str(tmp_path / "bloom")))


def test_a_response_ends_at_any_end_token_of_the_model(tiny, tmp_path):
    """Chat models may end a turn with another token than the tokenizer's: the generation config names both."""
    import shutil

    from conftest import byte_tokenizer

    from repro.sampling.local import answer_of, sample_batch

    folder, tokenizer, prompt = Path(shutil.copytree(tiny, tmp_path / "chat")), byte_tokenizer(), "<|im_start|>user\nHow?<|im_end|>\n"
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    ids = load.load_model(str(tiny)).generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1]:].tolist()
    assert len(ids) == 8 and 2 not in ids
    end = ids[3]
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, end]}))
    model = load.load_model(str(folder))
    found = sample_batch(model, tokenizer, [prompt], max_new_tokens=8)[0]
    assert found == answer_of(tokenizer, ids, {2, end}) and found["finished"] and found["tokens"] == ids.index(end) <= 3
    assert decoding.end_tokens(tokenizer, model) == decoding.end_tokens(tokenizer, str(folder)) == {2, end}
    (folder / "generation_config.json").unlink()
    assert decoding.end_tokens(tokenizer, str(folder)) == {2}


@pytest.mark.parametrize("change, reason", [
    ({"data": {"train": 5}}, "iteration 2 trains on 8 queries and its half of the training queries holds 4; give at least 24 training"),
    ({"sampling": {"max_new_tokens": 2000}}, "leave no room in a context of 2048")])
def test_what_cannot_be_run_is_refused_before_anything_is_written(tiny, tmp_path, change, reason):
    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    for name, fields in change.items():
        experiment = dataclasses.replace(experiment, **{name: dataclasses.replace(getattr(experiment, name), **fields)})
    with pytest.raises(UserError, match=reason):
        run(experiment, tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_chat_template_is_named(tmp_path, tiny):
    import shutil

    folder = shutil.copytree(tiny, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template that takes a user turn.*--prompt plain"):
        run(small(load_experiment("exp1", "mini")[0], folder), tmp_path / "out", say=lambda text: None)


def test_a_refused_run_leaves_the_users_empty_folder(tmp_path, tiny):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError):
        run(dataclasses.replace(small(load_experiment("exp1", "mini")[0], tiny), constitutions="none"), tmp_path / "out",
            say=lambda text: None)
    assert list((tmp_path / "out").iterdir()) == []
