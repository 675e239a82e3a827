"""What experiments 2 and 3 add to a run: principle writers, variants side by side, pools, chain of thought."""

import contextlib
import dataclasses
import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import byte_tokenizer
from test_experiments import KEYS, contents, small

from repro import cli
from repro.base.records import UserError
from repro.judges.rule import follows
from repro.models.speaker import Speaker
from repro.report.publish import gather, leaves, publish
from repro.sampling import local
from repro.stages import draws
from repro.stages import sample as run_sample
from repro.stages.pipeline import check_together, run
from repro.stages.run import Run
from repro.stages.sample import usable_pairs
from repro.text.answers import fault
from repro.text.principles import Pool
from repro.text.prompts import CHAT_REASON, Form
from repro.text.rules import RULES

WRITTEN = ("Principle 1: Clear: Summaries should say what happened in the order of the post.\n"
           "Principle 2: Kind: Summaries should speak well of the author of the post.")
AGAINST = {"Clear": "Antithesis: muddled: Summaries should mix up whatever took place.",
           "Kind": "Antithesis: mocking: Summaries should make fun of whoever wrote it."}


def answer(self, messages, **more):
    """In the embedded writer's place: two principles, then the antithesis of each."""
    asked = messages[-1]["content"]
    return next((text for name, text in AGAINST.items() if f"Principle: {name.lower()}:" in asked), WRITTEN)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(text):
    pass


@pytest.fixture(scope="module")
def diverse(tiny, tmp_path_factory):
    """exp3 mini on the tiny model."""
    experiment = small(cli.load_experiment("exp3", "mini")[0], tiny)
    return experiment, run(experiment, tmp_path_factory.mktemp("diverse"), say=quiet)


@pytest.fixture(scope="module")
def variants(tiny, tmp_path_factory):
    """exp2 mini on the tiny model, whose writer is made to write."""
    out = tmp_path_factory.mktemp("tldr")
    experiments = [small(e, tiny) for e in cli.load_experiment("exp2", "mini")]
    # a rate at which the responses change: a judge is asked of those that differ
    experiments = [dataclasses.replace(e, train=dataclasses.replace(e.train, learning_rate=1e-2)) for e in experiments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repro.sampling.writers.LocalWriter.answer", answer)
        folders = [run(e, out, say=quiet) for e in experiments]
    return experiments, gather(folders)


def prepared(experiment, folder):
    shared = Run(experiment, folder, quiet)
    shared.prepare()
    return shared


# ---- pools

def test_items_of_a_pool_are_the_same_for_every_seed_and_each_principle_counts_alike(diverse, tmp_path):
    experiment, folder = diverse
    shared = prepared(experiment, folder)
    other = prepared(dataclasses.replace(experiment, seed=5), tmp_path)
    assert shared.items() == other.items() and shared.training_plan(1) != other.training_plan(1)
    assert Counter(i.subset for i in shared.items()) == {"learned": 2, "held_out": 2}
    held_out = {p.name for p in shared.constitutions.held_out}
    for item in shared.items():
        assert {p.name in held_out for c in item.constitutions for p in c.principles} == {item.subset == "held_out"}
        assert item.constitutions[1] == item.constitutions[0].opposite()
    for k in (1, 2, 3):  # no held-out principle trains
        assert not held_out & {p.name for _, pair in shared.training_plan(k) for c in pair for p in c.principles}


def test_the_shipped_evaluation_has_no_item_twice():
    experiment = cli.load_experiment("exp3", "mini")[0]
    from repro.text.queries import load_queries

    queries, _ = load_queries(experiment.data.source, spec=experiment.data)
    shared = Run(experiment, None, quiet)
    from repro.text.principles import load_constitutions

    shared.constitutions, shared.held_out = load_constitutions(experiment.constitutions), [q for q in queries if q.split == "evaluation"]
    items = shared.items()
    assert len(items) == len({(i.query.id, frozenset(p.name for p in i.constitutions[0].principles)) for i in items}) == 256
    times = Counter(p.name for i in items for p in i.constitutions[0].principles)
    assert set(times.values()) == {36, 37, 64} and len(times) == 11


def test_metrics_of_a_pool_agree_with_the_responses(diverse):
    """Following of each principle and side, and in all, recomputed from the files by hand."""
    experiment, folder = diverse
    items, metrics = prepared(experiment, folder).items(), json.loads((folder / "metrics.json").read_text())
    assert all(KEYS <= r.keys() and r["cot"] is False for r in metrics) and {r["subset"] for r in metrics} == {"learned", "held_out"}
    queries, texts = {q["id"]: q["text"] for q in rows(folder / "queries.jsonl")}, {}
    for p in (p for i in items for p in i.constitutions[0].principles):
        texts |= {p.name: p.text, f"not_{p.name}": p.antithesis}

    def answers(row):
        return fault(row["text"], queries[row["query"]], [texts[part] for part in row["constitution"].split(",")]) is None

    for iteration in range(4):
        responses = rows(folder / f"responses/evaluation-{iteration}.jsonl")
        sides = {}
        for row in responses:
            for part in row["constitution"].split(","):
                sides.setdefault(part, []).append(row)
        rules = {p.name: p.rule for i in items for p in i.constitutions[0].principles}
        found = {r["principle"]: r for r in metrics if (r["metric"], r["iteration"]) == ("following", iteration) and r.get("principle")}
        assert set(found) == {part for part in sides if rules[part.removeprefix("not_")]}
        for part, record in found.items():
            rule = RULES[rules[part.removeprefix("not_")]]
            want = [answers(r) and rule(r["text"]) != part.startswith("not_") for r in sides[part]]
            assert record["n"] == len(want) and record["value"] == pytest.approx(sum(want) / len(want))
        for subset in ("learned", "held_out"):
            by_query = {}
            for item, row in zip(items, responses[::2]):
                marks = follows(row["text"], item.constitutions[0], item.query.text)
                if item.subset == subset and marks:
                    by_query.setdefault(item.query.id, []).append(sum(marks.values()) / len(marks))
            shares = [sum(each) / len(each) for each in by_query.values()]
            record = [r for r in metrics if (r["metric"], r["iteration"], r["subset"], r.get("principle")) == (
                "following", iteration, subset, None)]
            if shares:
                assert (record[0]["n"], record[0]["value"]) == (len(shares), pytest.approx(sum(shares) / len(shares)))
    assert {r["n"] for r in metrics if r["metric"] in ("mi", "length_tokens") and not r.get("principle")} == {2}  # queries
    by_principle = [r for r in metrics if r["metric"] == "mi" and r.get("principle") and r["iteration"] == 3]
    assert {r["principle"] for r in by_principle} == {p.name for i in items for p in i.constitutions[0].principles}
    judged = [r for r in rows(folder / "judgments.jsonl") if r["judge"] == "rule" and r["iteration"] == 1]
    assert len(judged) == sum(any(p.rule for p in i.constitutions[0].principles) for i in items)
    assert (folder / "figures/principles.png").stat().st_size > 10_000


# ---- writers and variants

def test_a_written_constitution_is_used_kept_raw_and_judged_by_the_hand_written_rules(variants):
    (weak, _), folder = variants
    data = json.loads((folder / "weak/constitutions.json").read_text())
    assert [p["name"] for p in data["principles"]] == ["clear", "kind"] and data["written"]["writer"] == weak.writer.label
    assert [r["answer"] for r in rows(folder / "weak/writing.jsonl")] == [WRITTEN, *AGAINST.values()]
    answers = rows(folder / "weak/responses/evaluation-0.jsonl")
    assert [r["constitution"] for r in answers[:4]] == ["clear,kind", "clear,not_kind", "not_clear,kind", "not_clear,not_kind"]
    metrics = json.loads((folder / "weak/metrics.json").read_text())
    following = {r.get("principle"): r for r in metrics if r["metric"] == "following" and r["iteration"] == 0}
    by_hand = {p["name"]: p["rule"] for p in json.loads((folder / "hand/constitutions.json").read_text())["principles"]}
    assert set(following) == {None, *(name for name, rule in by_hand.items() if rule)}
    name, rule = next((name, rule) for name, rule in by_hand.items() if rule)
    asked = {q["id"]: q["text"] for q in rows(folder / "weak/queries.jsonl")}
    told = [p["text"] for p in data["principles"]]  # what was asked for is what was written
    assert following[name]["value"] == sum(fault(r["text"], asked[r["query"]], told) is None and RULES[rule](r["text"])
                                           for r in answers[::4]) / len(answers[::4])


def test_variants_stand_side_by_side_in_one_folder_with_the_files_of_any_run(variants):
    (weak, hand), folder = variants
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {r["writer"] for r in metrics} == {weak.writer.label, "hand"}
    assert metrics == [*json.loads((folder / "weak/metrics.json").read_text()), *json.loads((folder / "hand/metrics.json").read_text())]
    record = json.loads((folder / "run.json").read_text())
    assert record["variants"] == ["weak", "hand"] and leaves(folder) == [folder / "weak", folder / "hand"]
    assert record["values"] == "measured" and record["seeds"] == [0] and "weak/write" in record["stages"]
    assert {p.name for p in (folder / "responses").iterdir()} >= {"weak-evaluation-3.jsonl", "hand-training-1.jsonl"}
    assert {r["variant"] for r in rows(folder / "judgments.jsonl")} == {"weak", "hand"}
    page = (folder / "report.html").read_text()
    assert "Summaries should speak well" in page and "<h3>hand seed 0</h3>" in page and (folder / "figures/iterations.png").exists()
    lines = cli.summary(folder)
    assert lines[0].startswith("weak, tldr: The bound") and lines[-1].startswith("report: ")
    assert any(line.startswith("weak, tldr: Whether the constitution is followed cannot be said") for line in lines)
    assert any(re.match("hand, tldr: The constitution is .*followed .*as the share of its sides", line) for line in lines)


def test_a_writer_that_writes_nothing_usable_leaves_the_hand_written_run_once(tiny, tmp_path, unrendered):
    experiments = [small(e, tiny) for e in cli.load_experiment("exp2", "mini")]
    folder = gather([run(e, tmp_path, say=quiet) for e in experiments])
    metrics, alone = (json.loads((folder / name / "metrics.json").read_text()) for name in (".", "hand"))
    assert metrics == alone and {r["writer"] for r in metrics} == {"hand"}
    why = "wrote nothing that can be used; the principles are those of tldr_mini"
    assert any(why in line for line in json.loads((folder / "run.json").read_text())["not_run"])
    assert why in (folder / "report.html").read_text()


def test_variants_are_published_together(variants, tmp_path):
    out = publish([variants[1]], tmp_path)
    assert {p.name for p in out.iterdir()} == {
        "metrics.json", "report.html", "figures", "constitutions.json", "constitutions-weak-seed-0.json",
        "writing-weak-seed-0.jsonl", "run-weak-seed-0.json", "run-hand-seed-0.json", "following-hand-seed-0.jsonl",
        "following-weak-seed-0.jsonl"}
    assert json.loads((out / "metrics.json").read_text()) == json.loads((variants[1] / "metrics.json").read_text())


def test_a_resumed_writer_is_not_asked_again(variants):
    (weak, _), folder = variants
    before, said = contents(folder / "weak"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repro.sampling.writers.LocalWriter.answer", lambda self, *args, **kwargs: pytest.fail("asked again"))
        run(weak, folder.parents[1], say=said.append)
    assert "write: done before, skipped" in said and contents(folder / "weak") == before


@pytest.mark.parametrize("flags, reason", [
    ({"writer": "gpt"}, "allowed: 'hand', 'local', 'openai'"),
    ({"writer": "openai"}, "--writer-model"),
    ({"asked": "sing"}, "need --writer"),
    ({"variant": "weak"}, "exp1 has one run"),
    ({"writer": "local", "writer_url": "http://127.0.0.1:1"}, "--writer-url needs --writer openai"),
    ({"writer": "local", "writer_model": "somewhere/hand"}, "--writer-model: 'hand'.*other than hand"),
])
def test_flags_of_the_writer_that_do_not_fit(flags, reason):
    with pytest.raises(UserError, match=reason):
        cli.configure(cli.Run("exp1", **flags))


def test_flags_of_the_writer():
    weak, hand = cli.configure(cli.Run("exp2", writer="openai", writer_model="m", asked="sing"))
    assert (weak.writer.label, weak.writer.asked, hand.writer) == ("m", "sing", None)  # what is by hand stays so
    (only,) = cli.configure(cli.Run("exp2", variant="hand"))
    assert only.variant == "hand" and only.writer is None
    (only,) = cli.configure(cli.Run("exp1", writer="openai", writer_model="org/some model", asked="answer"))
    assert (only.writer.kind, only.writer.label, only.writer.asked) == ("openai", "some-model", "answer")
    assert {e.writer for e in cli.configure(cli.Run("exp2", writer="hand"))} == {None}
    with pytest.raises(UserError, match="variant: 'weka' is unknown.*'weak'"):
        cli.configure(cli.Run("exp2", variant="weka"))


def test_runs_that_cannot_stand_side_by_side_are_refused_before_the_first_begins(tiny, tmp_path, variants):
    weak, hand = [small(e, tiny) for e in cli.load_experiment("exp2", "mini")]
    with pytest.raises(UserError, match="hand and other cannot be told apart in metrics.json"):
        check_together([hand, dataclasses.replace(hand, variant="other", iterations=1)], tmp_path)
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({"principles": [{"name": n, "text": f"Be {n}.", "antithesis": f"Be no {n}."} for n in "abc"]}))
    with pytest.raises(UserError, match="different numbers of constitutions"):
        check_together([weak, dataclasses.replace(hand, constitutions=str(wide))], tmp_path)
    with pytest.raises(UserError, match="no such file"):  # of the second run
        check_together([weak, dataclasses.replace(hand, data=dataclasses.replace(hand.data, source="none.jsonl"))], tmp_path)
    assert list(tmp_path.iterdir()) == [wide]
    check_together(variants[0], variants[1].parents[1])
    folder = tmp_path / "exp2_tldr/mini"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"stages": {}}')
    with pytest.raises(UserError, match="holds a single run"):
        check_together([weak, hand], tmp_path)
    with pytest.raises(UserError, match="Experiment.variant: '../x'"):
        dataclasses.replace(hand, variant="../x")
    with pytest.raises(UserError, match="Experiment.baseline: its label is the policy's"):
        dataclasses.replace(hand, baseline=hand.model)
    with pytest.raises(UserError, match="--cot: this profile has runs with chain of thought"):
        cli.configure(cli.Run("exp3", profile="paper", cot=True))


def test_a_template_without_a_system_turn_has_it_in_the_users(tiny):
    from transformers import AutoTokenizer

    from repro.text.prompts import CHAT_SYSTEM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert "system\n" + CHAT_SYSTEM in Form().render(Speaker.of(tokenizer), ["Be brief."], "Why?", sample=True)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    text = Form().render(Speaker.of(tokenizer), ["Be brief."], "Why?", sample=True)
    assert f"user\n{CHAT_SYSTEM}\n\nWhy?\n\nBe brief.<|im_end|>" in text and "system\n" not in text


@pytest.mark.parametrize("body, reason", [
    ("EXPERIMENTS = {'mini': (E, E)}", "a variant of its own"),
    ("EXPERIMENTS = {'mini': ()}", "must be a dict"),
    ("EXPERIMENTS = {'mini': (replace(E, variant='a'), replace(E, variant='b', name='n'))}", "one name and profile"),
])
def test_a_file_of_several_runs_that_do_not_go_together(body, reason, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from dataclasses import replace\nfrom repro.config import Experiment\n"
                    f"E = Experiment(name='m', profile='mini', constitutions='tldr')\n{body}\n")
    with pytest.raises(UserError, match=rf"mine\.py: EXPERIMENTS.*{reason}"):
        cli.load_experiment(str(file), "mini")


# ---- chain of thought

def test_reasoning_is_sampled_kept_and_not_trained(tiny, tmp_path, monkeypatch, unrendered):
    plain = local.sample_batch
    asked = []

    def thinking(model, tokenizer, prompts, **more):
        asked.extend(prompts)
        first = tokenizer("Let me think. Summary: ").input_ids
        return [local.answer_of(tokenizer, first + a["ids"], {2}) for a in plain(model, tokenizer, prompts, **more)]

    monkeypatch.setattr(local, "sample_batch", thinking)
    experiment = dataclasses.replace(small(cli.load_experiment("exp3", "mini")[0], tiny), cot=True)
    folder = run(experiment, tmp_path, say=quiet)
    ask = CHAT_REASON.split("{mark}")[0].strip()
    assert asked and all(ask in prompt for prompt in asked)
    for name in ("training-2", "evaluation-3"):
        assert all(r["sampled"].startswith("Let me think. Summary:") and "think" not in r["text"]
                   for r in rows(folder / f"responses/{name}.jsonl"))
    shared = prepared(experiment, folder)
    assert isinstance(shared.constitutions, Pool)
    query, pair, responses = usable_pairs(shared, 1)[0][0]
    assert not any("think" in r["text"] or "think" in shared.voice.tokenizer.decode(r["ids"]) for r in responses)
    assert ask not in draws.prompt(shared.voice, pair[0], query, "train", sample=False)
    assert {r["cot"] for r in json.loads((folder / "metrics.json").read_text())} == {True}
    assert cli.configure(cli.Run("exp3", cot=True))[0].name == "exp3_diverse_cot"


@pytest.mark.parametrize("sampled, text, finished", [
    ("I think. Summary: She was", "She was", False), ("I think. Summary: She was\n\nPost: and", "She was", True),
    ("I think.", "", False)])
def test_a_plain_response_is_finished_where_the_format_ended_it(tiny, tmp_path, monkeypatch, sampled, text, finished):
    """Not where the cap did: with reasoning, the response is never the whole sample."""
    experiment = small(cli.load_experiment("exp3", "mini")[0], tiny)
    experiment = dataclasses.replace(experiment, cot=True, model=dataclasses.replace(experiment.model, prompt="plain"))
    shared = prepared(experiment, tmp_path)
    monkeypatch.setattr(local, "sample_batch", lambda model, tokenizer, prompts, **more: [
        {"text": sampled.removeprefix(shared.voice.form.opening), "tokens": 9, "finished": False}] * len(prompts))
    monkeypatch.setattr(shared, "model", lambda *args: contextlib.nullcontext(SimpleNamespace(config=None)))
    monkeypatch.setattr("repro.core.probe.pads", lambda config: True)
    monkeypatch.setattr("repro.core.probe.prefills", lambda config, greedy: False)
    (row,) = run_sample.sample_to_file(shared, [(shared.held_out[0], shared.items()[0].constitutions[0])], ["x"], 0, tmp_path / "r.jsonl", "r")
    assert (row["text"], row["finished"]) == (text, finished)


def test_the_response_is_what_follows_the_mark():
    summary = Form("chat", "summary", True)
    assert summary.response("I think. Summary: It rained.\n\nSummary: no") == "It rained."
    assert summary.response("I only think about it.") == ""
    plain = Form("plain", "summary", True)
    assert plain.response("The constitution asks much.\nSummary: The post says no. ### Main") == "The post says no."
    assert Form("plain", "summary").response("The post is short. Human: Thanks") == "The post is short."
    assert Form("plain").response("Human: no.\n\nHuman: Thanks") == "Human: no."
    assert Form("chat", "dialogue").response("Human: kept as it is") == "Human: kept as it is"


def test_base_models_see_the_form_once_more_when_they_sample():
    form = Form("plain", "summary", True)
    speaker = Speaker.plain(byte_tokenizer())
    sample = form.render(speaker, ["Be brief.", "Be kind."], "A post.", sample=True, reason=True)
    train = form.render(speaker, ["Be brief.", "Be kind."], "A post.", sample=False)
    assert sample.count("Constitution:\n") == 2 and "[insert" in sample and sample.endswith("Reasoning:")
    assert train.count("Constitution:\n1. Be brief.\n2. Be kind.\n\nPOST: A post.\n\nSummary:") == 1
    assert "[insert" not in train and "Reasoning" not in train and train.endswith("Summary:")
    assert form.opening and Form("plain", "summary").opening == "The post" and Form("chat", "summary").opening == ""
    with pytest.raises(UserError, match="chain of thought in a dialogue"):
        base = cli.load_experiment("exp1", "paper")[0]
        dataclasses.replace(base, cot=True)


def test_a_base_models_prompt_begins_as_its_tokenizer_begins_a_text():
    """With its first token, once, where the tokenizer puts one (Llama's, Mistral's), and not where it does not; a chat's
    template has its own."""
    from tokenizers.processors import TemplateProcessing

    plain, adding = byte_tokenizer(), byte_tokenizer()
    adding._tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    how = {"statements": ["Be brief."], "query": "A post.", "sample": True}
    for tokenizer, count in ((plain, 0), (adding, 1)):
        ids = tokenizer(Form("plain", "summary").render(Speaker.plain(tokenizer), **how), add_special_tokens=False).input_ids
        assert ids.count(1) == count and (ids[0] == 1) == bool(count)
    assert Form().render(Speaker.of(adding), **how) == Form().render(Speaker.of(plain), **how)


# ---- an LLM judge on variants and pools

def test_a_judge_of_several_runs_joins_each_and_the_folder_of_all(variants, tmp_path, capsys):
    import shutil

    from judge_server import JudgeServer

    folder = shutil.copytree(variants[1].parents[1], tmp_path / "runs") / "exp2_tldr/mini"
    argv = ["--model", "judge-1", "--answer", "text", "--price", "3", "12"]
    with JudgeServer(flips=2).serve() as url:
        asked = []
        for place in (folder, folder / "weak"):  # the second time nothing is left to ask
            with pytest.raises(SystemExit) as e:
                cli.main(["judge", str(place), *argv, "--base-url", url])
            assert e.value.code == 0, capsys.readouterr().err
            asked.append([r["key"] for r in rows(folder / "weak/judge_requests.jsonl") if r["record"] == "attempt"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {r["writer"] for r in metrics if r["judge"] == "judge-1"} == {"hand", variants[0][0].writer.label}
    assert (folder / "figures/win_rate-judge-1.png").exists() and "judge-1" in (folder / "report.html").read_text()
    assert asked[1] == asked[0] and max(Counter(asked[0]).values()) <= 2  # one without a verdict once more


def test_a_judge_of_a_pool_is_told_the_principles_of_each_item(diverse, tmp_path, unrendered):
    import shutil

    from judge_server import JudgeServer

    experiment, done = diverse
    folder = shutil.copytree(done.parents[1], tmp_path / "runs") / "exp3_diverse/mini"
    server = JudgeServer()
    with server.serve() as url, pytest.raises(SystemExit) as e:
        cli.main(["judge", str(folder), "--model", "judge-1", "--answer", "text", "--price", "3", "12", "--base-url", url])
    assert e.value.code == 0
    judged = [r for r in rows(folder / "judgments.jsonl") if r["record"] == "judgment" and r["judge"] == "judge-1"]
    items = prepared(experiment, done).items()
    assert [r["constitution"] for r in judged] == 3 * [i.constitutions[0].id for i in items]
    assert {r["subset"] for r in judged} == {"learned", "held_out"}
    asked = [prompt for prompt, _ in server.requests]
    for row, item in zip(judged, [*items] * 3):
        told = item.constitutions[0].statements()
        assert row["outcome"] == "tie" or any(all(s in p for s in told) and item.query.text in p for p in asked)
