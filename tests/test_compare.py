"""Objectives on the same pairs: each trains in a run, its initial matrix is the initial model's, and a comparison says what came
out, the same after a kill."""

import dataclasses
import json
import math
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from forked import killed
from test_experiments import small
from test_training import SPEC, pairs

from repro import cli
from repro.base import metrics
from repro.base.identity import config_hash
from repro.base.records import UserError, read_json, read_jsonl
from repro.base.settings import Experiment
from repro.base.training import NEEDS_INITIAL, OBJECTIVES, NotTrainable
from repro.core import losses
from repro.core.logprobs import logprob_matrix
from repro.core.loop import train
from repro.experiment import load_experiment
from repro.models import load
from repro.stages import draws
from repro.stages.pipeline import run
from repro.stages.run import Run
from repro.studies import compare as module
from repro.studies import comparison
from repro.studies.compare import compare


def matrix(model, batch, *, length_normalize=False):
    return logprob_matrix(model, byte_tokenizer(), [p.prompts for p in batch], [p.responses for p in batch],
                          length_normalize=length_normalize, score_eos=False, backend="reference")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "distil"])
def test_the_loop_trains_each_objective(name, tiny):
    """The first step's loss and gradient norm against the function of reference matrices, and the loss falls."""
    spec = dataclasses.replace(SPEC, objective=name, batches=6, learning_rate=5e-4, anchor=0.2 if "anchor" in OBJECTIVES[name] else None)
    model, other = (load.load_model(str(tiny)) for _ in range(2))
    batch = pairs(12)
    with torch.no_grad():
        before = (matrix(other, batch) + 3 * torch.randn(12, 2, 2, generator=torch.Generator().manual_seed(0))).tolist()
    batch = [dataclasses.replace(p, initial=tuple(map(tuple, m))) for p, m in zip(batch, before)] if name in NEEDS_INITIAL else batch
    sums, means = matrix(other, batch[:2]), matrix(other, batch[:2], length_normalize=True)
    loss = losses.objective(spec, sums, (sums / means).detach().round(), initial=torch.tensor(before[:2]), progress=1 / 6)
    loss.backward()
    trace = train(model, byte_tokenizer(), batch, spec, 1)
    assert trace[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert trace[0]["grad_norm"] == pytest.approx(torch.stack([p.grad.norm() for p in other.parameters()]).norm().item(), rel=1e-3)
    again = [losses.objective(spec, matrix(m, batch).detach(), (matrix(m, batch) / matrix(m, batch, length_normalize=True)).detach().round(),
                              initial=torch.tensor(before), progress=0.0).item() for m in (load.load_model(str(tiny)), model)]
    assert again[1] < again[0]


@pytest.mark.parametrize("initial, said", [(None, "missing"), (((0.0, float("nan")), (0.0, 0.0)), "not finite")])
def test_an_initial_matrix_that_cannot_be_used(initial, said, tiny):
    model = load.load_model(str(tiny))
    with pytest.raises(UserError, match=f"iteration 1: mipo needs the initial model's log-probs; those of query 'q0' are {said}"):
        train(model, byte_tokenizer(), [dataclasses.replace(p, initial=initial) for p in pairs(4)],
              dataclasses.replace(SPEC, objective="mipo"), 1)


def shipped(tiny, **train) -> Experiment:
    base = small(next(e for e in load_experiment("exp2", "mini") if e.variant == "hand"), tiny, **train)
    return dataclasses.replace(base, iterations=1, data=dataclasses.replace(base.data, train=16, evaluation=3))


def test_settings_of_the_default_objective_change_no_hash(tiny):
    """A run of an older version goes on as what it was."""
    base = load_experiment("exp1", "mini")[0]
    data = base.to_json()
    assert not {"objective", "beta", "temperature", "margin", "anchor"} & data["train"].keys()
    assert Experiment.from_json(data) == base
    other = dataclasses.replace(base, train=dataclasses.replace(base.train, objective="nca", beta=0.2))
    assert Experiment.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert config_hash(other, {}) != config_hash(base, {})


def test_a_run_scores_its_pairs_under_the_initial_model_once(tiny, tmp_path):
    """mipo: at the first step nothing has moved, so that every log-ratio is 0 and the loss log 2; in iteration 2 the pairs are
    the trained model's, the matrix still the initial one's."""
    experiment = dataclasses.replace(shipped(tiny, objective="mipo"), iterations=2)
    folder = run(experiment, tmp_path, say=lambda text: None)
    record = read_json(folder / "run.json")
    for k in (1, 2):
        assert record["stages"][f"train-{k}"]["trace"][0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
        rows = read_jsonl(folder / f"logprobs/initial-{k}.jsonl")
        assert f"logprobs/initial-{k}.jsonl" in record["stages"][f"initial-{k}"]["outputs"]
        assert len(rows) == experiment.train.queries_needed(k) and all(np.shape(r["logprobs"]) == (2, 2) for r in rows)
    said = []
    run(experiment, tmp_path, say=said.append)
    assert "initial-1: done before, skipped" in said and "train-2: done before, skipped" in said
    path = folder / "logprobs/initial-2.jsonl"
    path.write_text(path.read_text().replace("-", "", 1))
    said.clear()
    run(experiment, tmp_path, say=said.append)
    assert any(line.startswith("initial-2: done again") for line in said) and "train-1: done before, skipped" in said
    assert read_json(folder / "run.json")["stages"]["train-2"] | {"seconds": 0, "peak_rss_gib": 0} == record["stages"]["train-2"] | {
        "seconds": 0, "peak_rss_gib": 0}


def test_distillation_trains_on_the_positive_response_without_a_constitution(tiny, tmp_path, monkeypatch):
    from repro.stages import jobs

    seen = []
    write = jobs.write_job
    monkeypatch.setattr(jobs, "write_job", lambda *given, pairs, **more: seen.extend(pairs) or write(*given, pairs=pairs, **more))
    experiment = shipped(tiny, objective="distil")
    folder = run(experiment, tmp_path, say=lambda text: None)
    rows = {(r["query"], r["constitution"]): r for r in read_jsonl(folder / "responses/training-1.jsonl")}
    shared = Run(experiment, folder, lambda text: None)
    shared.prepare()
    principles = [p.text for p in shared.constitutions.principles] + [p.antithesis for p in shared.constitutions.principles]
    assert seen and all(len(p.prompts) == len(p.responses) == 1 for p in seen)
    for pair in seen:
        own = rows[pair.query, shared.constitutions.positive.id]
        assert pair.responses[0] == draws.said(shared.voice, own) and not any(p in pair.prompts[0] for p in principles)


def test_a_pool_has_nothing_to_distil(tiny, tmp_path):
    pool = small(load_experiment("exp3", "mini")[0], tiny)
    with pytest.raises(UserError, match="--objectives: 'distil': a pool has no positive constitution; allowed: sami, "):
        compare(pool, tmp_path, objectives=("distil",), say=lambda text: None)
    with pytest.raises(UserError, match="--objective distil: a pool of principles has no all-positive constitution"):
        run(dataclasses.replace(pool, train=dataclasses.replace(pool.train, objective="distil")), tmp_path, say=lambda text: None)


# ---- the comparison

CHOSEN = ("sami", "mipo", "distil", "sami+anchor")
RATES = (1e-4, 1e-3)


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return shipped(tiny), compare(shipped(tiny), out, objectives=CHOSEN, rates=RATES, path=True, say=lambda text: None)


def numbers(path) -> dict:
    record = read_json(path)
    return record | {"objectives": {k: v | {"commit": ""} for k, v in record["objectives"].items()}}


def test_a_comparison_holds_what_it_says(compared):
    experiment, path = compared
    record, work = numbers(path), path.parent / "work" / path.stem
    assert path.name == "exp2_tldr-hand-seed-0.json" and set(record["objectives"]) == set(CHOSEN) and record["rates"] == list(RATES)
    for found in record["objectives"].values():
        tries = {t["learning_rate"]: t for t in found["tries"]}
        assert list(tries) == list(RATES)
        speak = [t for t in found["tries"] if t["query_words"] >= 0.75 * record["initial_development"]["query_words"]]
        best = max(t["steerability"] for t in speak) if speak else max(t["query_words"] for t in found["tries"])
        assert found["learning_rate"] == min(t["learning_rate"] for t in speak or found["tries"]
                                             if t["steerability" if speak else "query_words"] == best)
        assert set(found["values"]) == set(comparison.MEASURES) == set(record["initial"])
        assert all(len(v) == len(record["queries"]) == 3 for v in found["values"].values())
        (fewer,) = found["path"]
        kept = next(t for t in found["tries"] if t["learning_rate"] == found["learning_rate"])
        assert fewer["steps"] == 1 and fewer.keys() - {"steps"} == kept.keys() - {"learning_rate"}
        assert record["initial_development"]["bound"] != fewer["bound"] != kept["bound"]
    assert record["objectives"]["sami+anchor"]["anchor"] == 0.3
    assert not list(work.rglob("*.safetensors"))  # no weights are left
    same = {p.read_bytes() for p in work.rglob("responses/training-1.jsonl")}
    assert len(same) == 1 and len({p.read_bytes() for p in work.rglob("logprobs/initial-1.jsonl")}) == 1


@pytest.mark.parametrize("tries, chosen", [
    ([(1, 0.7, 0.30), (3, 0.9, 0.29), (10, 1.0, 0.10)], 3),  # (rate, steerability, words of the query)
    ([(1, 0.9, 0.30), (3, 0.9, 0.40)], 1), ([(1, 0.7, 0.20), (3, 0.9, 0.21), (10, 1.0, 0.0)], 3)])
def test_a_rate_whose_answers_have_lost_the_query_is_not_chosen(tries, chosen):
    """Answers that fit every query follow best and say nothing; of equals the lower rate; where all have lost it, the least lost."""
    found = [{"learning_rate": rate, "steerability": steered, "query_words": kept} for rate, steered, kept in tries]
    assert max(found, key=partial(module._rank, {"query_words": 0.36}))["learning_rate"] == chosen


def test_its_values_are_those_of_its_files(compared):
    """Following, bound and drift again, by hand from responses and log-probs."""
    from repro.text.answers import fault
    from repro.text.rules import RULES

    experiment, path = compared
    record, work = numbers(path), path.parent / "work" / path.stem
    shared = Run(experiment, work / "evaluation", lambda text: None)
    shared.prepare()
    for label, folder, k in (("initial", work / "evaluation", 0), ("mipo", next(work.glob("held_out/mipo-*")), 1)):
        values = record["initial"] if label == "initial" else record["objectives"][label]["values"]
        rows, scored, bare = (read_jsonl(folder / f"{name}-{k}.jsonl") for name in ("responses/evaluation", "logprobs/evaluation", "logprobs/bare"))
        for q, item in enumerate(shared.items()):
            C = len(item.constitutions)
            sides = [[fault(r["text"], item.query.text, c.statements()) is None and RULES[p.rule](r["text"]) == side
                      for p, side in zip(c.principles, c.sides) if p.rule]
                     for c, r in zip(item.constitutions, rows[q * C: (q + 1) * C])]
            assert values["steerability"][q] == pytest.approx(np.mean([np.mean(s) for s in sides]))
            assert values["following"][q] == pytest.approx(np.mean(sides[0]))
            assert values["answers"][q] == np.mean([fault(r["text"], item.query.text, c.statements()) is None
                                                    for c, r in zip(item.constitutions, rows[q * C: (q + 1) * C])])
            m = np.array(scored[q]["logprobs"]) / np.array(scored[q]["tokens"])
            assert values["bound"][q] == pytest.approx(metrics.infonce(m[None])[0])
            assert values["initial_logprob"][q] == pytest.approx(np.mean([s / n for s, n in zip(bare[q]["logprobs"], bare[q]["tokens"])]))
    initial = load.load_model(str(experiment.model.name), dtype="float32")
    item, text = shared.items()[0], read_jsonl(folder / "responses/evaluation-1.jsonl")[0]
    given = logprob_matrix(initial, shared.voice.tokenizer, [[draws.bare(shared.voice, item.query)]], [[tuple(text["ids"]) or "."]],
                           length_normalize=False, score_eos=False, backend="reference")
    assert read_jsonl(folder / "logprobs/bare-1.jsonl")[0]["logprobs"][0] == pytest.approx(given.item(), rel=5e-3)  # bf16 products
    contrary = draws.prompt(shared.voice, item.constitutions[0], item.query, draws.EVALUATION_ORDER, sample=True, last="No.")
    assert contrary.index("No.") > max(contrary.index(s) for s in item.constitutions[0].statements())


def recorded(steerability, answers, seed=0):
    """A record of which only these are looked at: [objective][query]; the initial model's first."""
    values = [{"steerability": s, "answers": a} for s, a in zip(steerability, answers)]
    return {"seed": seed, "initial": values[0], "objectives": {name: {"values": v} for name, v in zip(("sami", "mipo"), values[1:])}}


def test_following_among_answers_by_hand():
    """Two seeds of three queries, and one whose principles no rule knows: sides and answers are summed before they are divided."""
    records = [recorded([[0.5, 0.25, 0.0, None], [1.0, 0.25, 0.25, None]], [[1.0, 0.5, 0.0, 0.7], [1.0, 0.5, 0.5, 0.1]]),
               recorded([[0.5, 0.25, 0.5, None], [0.5, 0.25, 0.25, None]], [[0.5, 0.5, 1.0, 0.2], [1.0, 0.5, 0.5, 1.0]], 1)]
    before, after = (comparison.estimate("among", comparison._values(records, label, "among")) for label in ("initial", "sami"))
    assert (before.value, before.n) == (pytest.approx(2.0 / 3.5), 3) and after.value == pytest.approx(2.5 / 4)
    assert comparison._difference(records, "sami", "among", "initial").value == pytest.approx(2.5 / 4 - 2 / 3.5)
    draw = np.random.default_rng(0)  # the linearised interval against a bootstrap of the ratio itself
    answers = draw.integers(0, 5, 200) / 4
    sides = answers * draw.uniform(0, 1, 200)
    (linear,) = comparison._values([recorded([sides.tolist()], [answers.tolist()])], "initial", "among")
    found = comparison.estimate("among", [linear])
    ratios = [sides[i].sum() / answers[i].sum() for i in (draw.integers(0, 200, 200) for _ in range(2000))]
    assert found.value == pytest.approx(sides.sum() / answers.sum())
    np.testing.assert_allclose(found.ci95, np.quantile(ratios, [0.025, 0.975]), atol=0.006)


def test_where_nothing_answers_there_is_no_share_of_it():
    records = [recorded([[0.5, 0.5], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]])]
    assert comparison._cell(records, "sami", "among") == comparison._cell(records, "sami", "among", "initial") == "none answers"
    assert comparison._cell(records, "initial", "among").startswith("0.50")
    assert comparison._apart(records, ["sami"], "among", "initial").endswith("differs for none by more than its 95 % interval.")


def test_values_of_an_older_version_are_counted_anew_from_its_files(compared, tmp_path, monkeypatch):
    experiment, path = compared
    work = shutil.copytree(path.parent, tmp_path / "out") / "work"
    for older in work.glob("*/held_out/*/values.json"):
        older.write_text(json.dumps({k: v for k, v in read_json(older).items() if k != "answers"}))
    mine = tmp_path / "out" / path.name
    record = read_json(path)
    for values in (record["initial"], *(found["values"] for found in record["objectives"].values())):
        del values["answers"]
    mine.write_text(json.dumps(record))
    with pytest.raises(UserError, match="seed 0, initial: an older version left it without answers; the same `repro compare` adds that"):
        comparison.write_page(tmp_path / "out", "exp2_tldr-hand")
    monkeypatch.setattr(module, "_trained", lambda *given: pytest.fail("trained again"))
    assert numbers(compare(experiment, tmp_path / "out", objectives=CHOSEN, rates=RATES, path=True, say=print)) == numbers(path)
    comparison.write_page(tmp_path / "out", "exp2_tldr-hand")


@pytest.mark.parametrize("function, nth", [("evaluate", 4), ("ask_otherwise", 3), ("remove_folder", 3)])
def test_a_comparison_that_was_killed_ends_with_the_same_record(compared, function, nth, tmp_path):
    experiment, path = compared
    again = partial(compare, experiment, tmp_path, objectives=CHOSEN, rates=RATES, path=True, say=print)
    assert killed("repro.studies.compare", function, nth, again) == -signal.SIGKILL
    assert numbers(again()) == numbers(path)


def test_a_comparison_grows(compared, tmp_path):
    """Some objectives first, then all, then one: what was tried stays, and the record is that of all at once. What could not
    stand beside it is refused before anything is computed."""
    experiment, path = compared
    for chosen in (CHOSEN[1:3], CHOSEN, CHOSEN[:1]):
        found = numbers(compare(experiment, tmp_path, objectives=chosen, rates=RATES, path=chosen == CHOSEN, say=print))
    assert found == numbers(path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    for change, key in (({"iterations": 2}, "iterations"), ({"seed": 1, "model": dataclasses.replace(experiment.model, label="b")}, "model"),
                        ({"train": dataclasses.replace(experiment.train, batch_size=1)}, "train")):
        with pytest.raises(UserError, match=f"seed 0, with other {key} .*; choose another --out"):
            compare(dataclasses.replace(experiment, **change), tmp_path, rates=RATES, say=print)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_try_that_cannot_be_trained_is_recorded_as_such(tiny, tmp_path, monkeypatch):
    real = module._trained

    def trained(dev, trial):
        if trial.experiment.train.learning_rate == RATES[1] or trial.experiment.train.objective == "sft":
            raise NotTrainable("step 1: loss nan")
        real(dev, trial)

    monkeypatch.setattr(module, "_trained", trained)
    given = {"rates": RATES, "say": lambda text: None}
    path = compare(shipped(tiny), tmp_path, objectives=("sami",), **given)
    found = read_json(path)["objectives"]["sami"]
    assert found["tries"][1] == {"learning_rate": RATES[1], "failed": "step 1: loss nan"} and found["learning_rate"] == RATES[0]
    with pytest.raises(UserError, match="sft cannot be trained at any of these rates: step 1: loss nan"):
        compare(shipped(tiny), tmp_path, objectives=("sft",), **given)
    text = comparison.write_page(tmp_path, "exp2_tldr-hand").read_text()
    assert "| sami | 0.001 | failed | failed | failed | failed | 0 of 1 |" in text


def test_an_experiments_own_objective_is_no_part_of_the_others(compared, tiny, tmp_path):
    """What a file sets of its objective does not leak into the rows."""
    experiment = compared[0]
    odd = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, objective="nca", beta=0.7, anchor=0.9))
    assert numbers(compare(odd, tmp_path, objectives=CHOSEN, rates=RATES, path=True, say=print)) == numbers(compared[1])


def test_a_pool_is_compared_where_some_principles_have_no_rule(tiny, tmp_path):
    pool = small(load_experiment("exp3", "mini")[0], tiny)
    pool = dataclasses.replace(pool, cot=None, iterations=1, data=dataclasses.replace(pool.data, train=16, evaluation=4))
    path = compare(pool, tmp_path, objectives=("sami",), rates=RATES[:1], say=print)
    values = read_json(path)["objectives"]["sami"]["values"]
    assert len(values["bound"]) == 4 and None not in values["bound"]
    assert comparison.write_page(tmp_path, path.stem.split("-seed")[0]).read_text().count("nan") == 0


def test_a_run_with_ends_scored_scores_none_where_an_answer_was_cut(tiny, tmp_path):
    experiment = shipped(tiny, score_eos=True)
    experiment = dataclasses.replace(experiment, sampling=dataclasses.replace(experiment.sampling, max_new_tokens=40))
    folder = run(experiment, tmp_path, say=lambda text: None)
    rows, scored = read_jsonl(folder / "responses/evaluation-1.jsonl"), read_jsonl(folder / "logprobs/evaluation-1.jsonl")
    counts = [n for row in scored for n in row["tokens"]]
    assert {r["finished"] for r in rows} == {True, False}  # or nothing is shown
    assert counts == [max(1, len(r["ids"])) + r["finished"] for r in rows]
    assert cli.verify_run(folder) == 0


def test_pages_and_figures_of_two_seeds(compared, tmp_path, tiny):
    experiment, path = compared
    for seed in (0, 1):
        record = read_json(path) | {"seed": seed}
        (tmp_path / f"exp2_tldr-hand-seed-{seed}.json").write_text(json.dumps(record))
    page = comparison.write_page(tmp_path, "exp2_tldr-hand")
    text = page.read_text()
    values = read_json(path)["objectives"]["mipo"]["values"]["steerability"]
    assert "| mipo | " in text and f"{np.mean(values):.2f} [" in text and "Seeds: 0, 1." in text
    change = comparison.difference([values] * 2, [record["initial"]["steerability"]] * 2)
    assert f"{change.value:+.2f} [{change.ci95[0]:+.2f}, " in re.search(
        r"to the initial model\n.*?\n(\| mipo \|.*?)\n.*## Differences to sami", text, flags=re.S)[1]
    assert re.search(r"## Differences to sami\n.*\n\| mipo \|", text, flags=re.S) and "## Every try" in text
    assert f"| mipo | 1 of 2 | {', '.join([format(read_json(path)['objectives']['mipo']['path'][0]['bound'], '.2f')] * 2)} |" in text
    assert (tmp_path / "exp2_tldr-hand.png").is_file() and (tmp_path / "exp2_tldr-hand-dose.png").is_file()
    assert "beyond which a better rate may lie (in how many seeds): sami (2), mipo (2), distil (2), sami+anchor (2)." in text  # of two rates
    record = read_json(path)
    points = [(t["initial_logprob"], t["steerability"]) for t in sum((f["tries"] for f in record["objectives"].values()), [record["initial_development"]])]
    front = [p for p in points if all(q == p or q[0] < p[0] or q[1] < p[1] for q in points)]
    np.testing.assert_allclose(sorted(p[:2] for p in comparison._frontier(comparison.read(tmp_path, "exp2_tldr-hand"))), sorted(front))
    first = comparison.difference([[1.0, 0.0, 0.5]] * 2, [[0.5, 0.0, 0.0]] * 2)
    assert first.value == pytest.approx(1 / 3) and first.n == 3  # queries, not queries times seeds
    (tmp_path / "exp2_tldr-hand-seed-1.json").write_text(json.dumps(read_json(path) | {"seed": 1, "rates": [1.0]}))
    with pytest.raises(UserError, match="seed 0, with other rates"):
        comparison.write_page(tmp_path, "exp2_tldr-hand")


@pytest.mark.parametrize("argv, said", [
    (["--objectives", "samy"], "--objectives: 'samy'; allowed: sami, "), (["--objectives", "sft", "sft"], "--objectives: sft, sft; each at most once"),
    (["--rates", "1e-6", "1e-6"], "--rates 1e-06 1e-06: each once, above 0"), (["--rates", "-1"], "--rates -1: each once, above 0"),
    (["--seeds", "1", "1"], "--seeds 1 1: each at most once"), (["--variant", "weak"], "these principles have none"),
    (["--iterations", "0"], "--iterations: 0; must be above 0"),
    (["--iterations", "2", "--path"], "--path: of one iteration's steps; --iterations: 2")])
def test_a_mistake_is_one_line_and_leaves_nothing(argv, said, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "exp2", "--model", str(tiny), "--out", str(tmp_path / "runs"), *argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and said in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_mistake_that_is_found_later_leaves_nothing_either(tiny, tmp_path):
    experiment = shipped(tiny)
    bad = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, subsets=("nothing",)))
    with pytest.raises(UserError, match="nothing"):
        compare(bad, tmp_path / "out", rates=RATES, say=print)
    assert not list(tmp_path.iterdir())


def test_a_comparison_of_an_older_version_is_not_gone_on_with(tiny, tmp_path):
    """It counted following by the rule alone: its values would stand beside others of the same name."""
    experiment = shipped(tiny)
    run = module._begun(experiment, tmp_path / "work", lambda line: None)
    del run.record["counted"]
    (tmp_path / "work/run.json").write_text(json.dumps(run.record))
    with pytest.raises(UserError, match="begun by an older version, which counted following otherwise; choose another --out"):
        module._begun(experiment, tmp_path / "work", lambda line: None)
