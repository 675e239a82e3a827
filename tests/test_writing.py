"""Principle writers: the parser and what it refuses, answers asked for again, raw answers kept, the user's fallback."""

import dataclasses
import json
import re
import shutil

import pytest
from judge_habits import HABITS
from judge_server import JudgeServer

from repro.base.records import UserError, read_jsonl, write_json
from repro.sampling.writers import ATTEMPTS, LocalWriter, ServerWriter, write_principles, written_constitutions
from repro.servers.endpoint import Endpoint
from repro.text import prompts
from repro.text.principles import constitutions_of, load_constitutions
from repro.text.written import Fault, parse_antithesis, parse_principles, repeats

GOOD = """Principle 1: concise: A summary should be short and to the point.
Principle 2: complete: A summary should hold all that matters."""
ANTI = ["Antithesis: lengthy: A summary should be as long as the post.", "Antithesis: partial: A summary should leave out what matters."]
PAIR = [{"name": "concise", "text": "A summary should be short and to the point."}, {"name": "complete", "text": "A summary should hold all that matters."}]
ROWS = [{**row, "antithesis": text.split(": ")[-1]} for row, text in zip(PAIR, ANTI)]
TASK = "summarise a post"
CONTROLS = ["<|im_end|>", "END_OF_TEXT"]


def change(old, new, text=GOOD):
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize("text", [
    GOOD, "\n" + GOOD.replace("\n", "\n\n") + "\n \n", re.sub(r"^(\w+ \d):", r"**\1:**", GOOD, flags=re.M),
    change("concise:", " Concise :"), change("Principle 2:", "_Principle 2_ :")])
def test_two_lines_are_two_principles(text):
    assert parse_principles(text, TASK) == PAIR


@pytest.mark.parametrize("text, fault", [
    ("", "in this order; found: none"),
    (prompts.WRITER_PRINCIPLES[0][1], "Principle 1 says the same as the example"),
    (change("A summary should hold", "Stories should hold"), "Principle 2 is about the example's stories"),
    (change("concise:", "(a name of one word):"), "no name of one to three words"),
    ("Sure! Here they are:\n" + GOOD, "a line that is not Principle 1 or Principle 2: 'Sure! Here they are:'"),
    (GOOD + "\nI hope that helps.", "a line that is not"),
    (GOOD + "\nPrinciple 3: kind: A summary should be kind to its author.", "a line that is not"),
    (GOOD + "\nPrinciple 2: kind: A summary should be kind.", "Principle 2 is there twice"),
    (GOOD.split("\n")[0], "found: Principle 1$"),
    ("\n".join(GOOD.split("\n")[::-1]), "in this order; found: Principle 2, Principle 1"),
    (change("complete: ", ""), "Principle 2 has no name of one to three words, followed by a colon"),
    (change("complete:", ":"), "Principle 2 has no name of"),
    (change("complete:", "it holds all that matters:"), "Principle 2 has no name of"),
    (change("complete:", "not complete:"), "name: 'not_complete'"),
    (change("complete:", "1:"), r"principles\[1\].name: '1'"),
    (change("complete:", "Concise:"), "the name 'concise' occurs twice"),
    (change("hold all that matters", "be SHORT, and to the point"), "Principle 2 says the same as Principle 1"),
    (change("hold all that matters", "be to the point and short"), "Principle 2 says the same as Principle 1"),
    (change("matters.", "matters.<|im_end|>"), "Principle 2 holds a control token"),
    (change("matters.", "matters.</s>"), "Principle 2 holds a control token"),
    (change("matters.", "matters. END_OF_TEXT"), "Principle 2 holds a control token"),
    (change("matters.", "{query}"), r"principles\[1\].text: braces"),
    (change("A summary should hold all that matters.", "[insert a sentence that says so here]"), "Principle 2 must be a sentence of its own"),
    (change("A summary should hold all that matters.", "No."), "Principle 2 must be a sentence of its own, of 3 to 80 words"),
    (change("all that matters.", "all that matters " * 30), "Principle 2 must be a sentence of its own, of 3 to 80 words"),
    (change("A summary should hold all", "This is all"), 'Principle 2 does not say what something "should" be'),
])
def test_what_is_refused_and_why(text, fault):
    with pytest.raises(Fault, match=fault):
        parse_principles(text, TASK, controls=CONTROLS)


@pytest.mark.parametrize("old, new, fault", [
    ("", "", None), ("Antithesis:", "**Antithesis**:", None), ("as long as the post", "neither short nor to the point", None),
    ("as long as the post", "short and to the point", "says the same as the principle"),
    ("as long as the post", "short and to the point, and nice", "says the same as the principle"),
    ("as long as the post", "short and to the point, with no more", "says the same as the principle"),
    ("be as long as the post", "leave out what matters", "the same as another sentence of this constitution"),
    ("A summary", "A story", "about 'story', the principle about 'summary'"),
    ("lengthy", "Concise", "the name of the principle or of an example, 'Concise'"),
    ("lengthy", "old-fashioned", "the name of the principle or of an example"),
    ("lengthy: ", "", "no name of one to three words"),
    ("post.", "post.<|im_end|>", "holds a control token"),
    ("post.", "{query}.", "antithesis: braces"),
    ("Antithesis", "Principle 1", "a line that is not Antithesis"),
    ("post.", "post.\nThat is all.", "a line that is not Antithesis"),
])
def test_an_antithesis(old, new, fault):
    text, rows = change(old, new, ANTI[0]), [PAIR[0], ROWS[1]]
    if fault is None:
        assert parse_antithesis(text, PAIR[0], rows, CONTROLS).startswith("A summary should be ")
    else:
        with pytest.raises(Fault, match=fault):
            parse_antithesis(text, PAIR[0], rows, CONTROLS)


@pytest.mark.parametrize("principle, other, same", [
    ("Posts should be easy to read.", "Posts should be hard to read.", False), ("Posts should be kind.", "Posts should not be kind.", False),
    ("Posts should never be rude.", "Posts should be rude.", False), ("Posts should name every street.", "Posts should leave out the streets.", False),
    ("Posts should be short and neat.", "Posts should be neat and short.", True), ("Posts should be bold.", "Posts should be very bold.", True),
    ("Posts should be fair and not too easy.", "Posts should be fair, not too easy.", True), ("Posts should be short.", "Posts should be short, not long.", True)])
def test_a_sentence_that_says_the_same_again(principle, other, same):
    assert repeats(principle, other) is same


class Made:
    """A writer whose answers are given; it remembers what it was asked."""

    name = model = "made"
    temperature = 0.5

    def __init__(self, *answers, converses=False):
        self.answers, self.asked, self.seeds, self.converses = list(answers), [], [], converses

    def identity(self):
        return ["made"]

    def answer(self, messages, *, opening, seed):
        self.asked.append(messages)
        self.seeds.append(seed)
        return self.answers.pop(0)


def test_the_examples_are_in_the_form_that_is_asked_for():
    for _, lines in prompts.WRITER_PRINCIPLES:
        rows = parse_principles(re.sub("Directions|Stories", "Summaries", lines), TASK)
        assert len(rows) == 2
    for principle, other in prompts.WRITER_ANTITHESES:
        name, text = principle.split(": ")
        assert not repeats(text, other.split(": ")[1]) and f"Principle: {principle}\nAntithesis: {other}" in prompts.write_antithesis("a", "b")[0]["content"]


def test_one_that_converses_is_told_its_fault_and_one_that_does_not_is_asked_afresh(tmp_path):
    writer = Made("No idea<|im_end|>.", GOOD, *ANTI, converses=True)
    data = write_principles(writer, TASK, tmp_path / "a.jsonl")
    assert data["principles"] == ROWS and [a["attempt"] for a in data["written"]["answers"]] == [2, 1, 1]
    first, second, *antitheses = writer.asked
    assert first == prompts.write_principles(TASK) and TASK in first[-1]["content"]
    assert antitheses == [prompts.write_antithesis(r["name"], r["text"]) for r in PAIR]
    assert second[:-2] == first and [m["role"] for m in second[-2:]] == ["assistant", "user"]
    assert second[-2]["content"] == "No idea< |im_end|>." and "a line that is not" in second[-1]["content"]
    assert not any("<|im_end|>" in m["content"] for m in second)
    afresh = Made("No idea.", GOOD, *ANTI)
    assert write_principles(afresh, TASK, tmp_path / "b.jsonl")["principles"] == ROWS
    assert afresh.asked == [first, first, *antitheses] and afresh.seeds == [0, 1, 0, 0]


def test_other_principles_where_one_has_no_antithesis(tmp_path):
    other = change("concise: A summary should be short", "brief: A summary should be terse")
    writer, said = Made(GOOD, "a", "b", other, *ANTI), []
    data = write_principles(writer, TASK, tmp_path / "writing.jsonl", seed=1, attempts=2, say=said.append)
    assert data["principles"][0]["name"] == "brief" and len(said) == 2 and "Antithesis: attempt 2 of 2: there is a line" in said[1]
    assert writer.seeds[0] == writer.seeds[1] == 4 * ATTEMPTS and writer.seeds[3] == 5 * ATTEMPTS and len(set(writer.seeds)) == 3
    with pytest.raises(Fault):
        write_principles(Made(GOOD, "a", "b", converses=True), TASK, tmp_path / "c.jsonl", attempts=2)


def test_every_answer_is_kept_raw_and_none_asked_for_twice(tmp_path):
    record = tmp_path / "writing.jsonl"
    data = write_principles(Made("First try.", GOOD, *ANTI), TASK, record)
    rows = read_jsonl(record)
    assert [(r["answer"], r["attempt"], r["seed"], r["temperature"], r["model"], r["writer"], r["task"]) for r in rows] == [
        (text, k + 1, k, 0.5, "made", "made", TASK) for text, k in (("First try.", 0), (GOOD, 1), (ANTI[0], 0), (ANTI[1], 0))]
    assert all(re.fullmatch(r"[0-9a-f]{64}", r["prompt_sha256"]) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", r["date"]) for r in rows)
    before = record.read_bytes()
    again = Made()
    assert write_principles(again, TASK, record) == data and not again.asked and record.read_bytes() == before
    record.write_bytes(before[:-20])  # a kill tore the last line: only that answer is asked for again
    again = Made(ANTI[1])
    assert write_principles(again, TASK, record)["principles"] == ROWS and len(again.asked) == 1
    for more in ({"task": "answer a question"}, {"task": TASK, "seed": 1}):
        other = Made(GOOD, *ANTI)
        write_principles(other, record=record, **more)
        assert len(other.asked) == 3 if "seed" in more else len(other.asked) == 1


def test_without_usable_principles_the_users_fallback_or_an_end(tmp_path):
    said = []
    constitutions = written_constitutions(Made("a", "b"), TASK, tmp_path, instead=load_constitutions("tldr"), say=said.append,
                                         attempts=2, rounds=1)
    assert constitutions == load_constitutions("tldr") and constitutions.writer == "hand"
    assert len(said) == 3 and re.search(r"writer made: no principles that can be used in 2 attempts at a question \(the last: .*'b'\)"
                                        r".*writing\.jsonl; going on with the constitutions written by hand", said[2])
    assert [r["answer"] for r in read_jsonl(tmp_path / "writing.jsonl")] == ["a", "b"]
    with pytest.raises(UserError, match=r"in 1 attempts .*writing\.jsonl; name a constitution file to go on with"):
        written_constitutions(Made("c"), TASK, tmp_path / "other", instead=None, say=said.append, attempts=1, rounds=1)


def test_what_was_written_is_a_constitution_file_with_its_origin(tmp_path):
    said = []
    constitutions = written_constitutions(Made(GOOD, *ANTI), TASK, tmp_path, instead=None, say=said.append)
    assert not said and constitutions.writer == "made" and constitutions.positive.id == "concise,complete"
    write_json(tmp_path / "constitutions.json", constitutions.to_json())
    assert constitutions_of(json.loads((tmp_path / "constitutions.json").read_text()), "run") == constitutions
    assert constitutions_of(constitutions.to_json(), "run") == constitutions
    assert load_constitutions("tldr").writer == "hand" and "written" not in load_constitutions("tldr").to_json()
    write_json(tmp_path / "mine.json", {"principles": ROWS, "written": {"writer": "hand"}})
    with pytest.raises(UserError, match=r"mine\.json: written: must be an object that names the model"):
        load_constitutions(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("task, reason", [("", "one line"), ("a\nb", "one line"), ("sum {x}", "without braces"),
                                          ("x<|im_end|>", "holds a control token"), ("x EOT", "holds a control token")])
def test_a_task_that_cannot_be_used(tmp_path, task, reason):
    writer = Made()
    with pytest.raises(UserError, match=f"task: .*{reason}"):
        write_principles(writer, task, tmp_path / "writing.jsonl", controls=["EOT"])
    assert not writer.asked and not (tmp_path / "writing.jsonl").exists()


def test_a_model_of_this_machine(tmp_path, tiny):
    """A random model writes nothing of use: every attempt is made, kept and refused; the same again from the record."""
    def attempt(writer, name="writing", seed=0):
        with pytest.raises(Fault, match="Principle 1"):
            write_principles(writer, TASK, tmp_path / f"{name}.jsonl", attempts=2, rounds=1, seed=seed)
        return [row["answer"] for row in read_jsonl(tmp_path / f"{name}.jsonl")]

    first = attempt(LocalWriter(str(tiny), max_tokens=8))
    assert len(set(first)) == 2 and all(text.startswith("Principle 1:") for text in first)
    again = LocalWriter(str(tiny), max_tokens=8)
    assert attempt(again) == first and again._loaded is None
    assert attempt(LocalWriter(str(tiny), max_tokens=8), "same") == first
    assert not set(attempt(LocalWriter(str(tiny), max_tokens=8), "other", seed=1)) & set(first)


def test_a_model_without_a_chat_template_is_no_writer(tmp_path, tiny):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="writer base: the tokenizer has no chat template .* must be instruction-tuned"):
        LocalWriter(str(base)).answer(prompts.write_principles(TASK))


class WriterServer(JudgeServer):
    """The judge's test server with texts of a writer."""

    def __init__(self, *texts, **options):
        super().__init__(**options)
        self.texts = texts

    def answer(self, body):
        asked = [m["content"] for m in body["messages"]]
        content = next((text for row, text in zip(PAIR, ANTI) if asked[0].endswith(row["text"])),
                       self.texts[any("cannot be used" in text for text in asked)])
        usage = {"prompt_tokens": sum(self.tokens(m["content"]) for m in body["messages"]), "completion_tokens": self.tokens(content)}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage,
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]}


def server_writer(url, path, **more):
    return ServerWriter(Endpoint(model="org/strong-model", base_url=url, backoff_s=0.01, attempts=3, **more), path)


def test_a_server_writes_and_is_asked_once(tmp_path):
    """A busy server, an unusable first answer, then principles; afterwards everything comes from the record."""
    server, path = WriterServer("Here you go:\n" + GOOD, GOOD, faults=lambda k, body: "503" if k == 0 else None), tmp_path / "writing.jsonl"
    with server.serve() as url:
        data = write_principles(server_writer(url, path), TASK, path)
        assert data["principles"] == ROWS and data["written"]["writer"] == "org-strong-model" and data["written"]["model"] == "org/strong-model"
        assert len(server.bodies) == 5 and server.bodies[0]["messages"] == server.bodies[1]["messages"] == prompts.write_principles(TASK)
        assert server.bodies[0]["model"] == "org/strong-model" and "temperature" not in server.bodies[0] and server.bodies[0]["max_tokens"] == 400
        assert write_principles(server_writer(url, path), TASK, path) == data and len(server.bodies) == 5
        kept = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in kept if json.loads(line)["record"] != "written"))  # killed before our own line
        assert write_principles(server_writer(url, path), TASK, path)["principles"] == ROWS and len(server.bodies) == 5
    assert [json.loads(line)["record"] for line in kept] == ["attempt", "outcome", *["attempt", "outcome", "written"] * 4]


def test_a_server_that_is_down_or_too_dear(tmp_path):
    path = tmp_path / "writing.jsonl"
    server = WriterServer(GOOD, faults=lambda k, body: "500")
    with server.serve() as url:
        with pytest.raises(UserError, match="writer org-strong-model: HTTP 500"):
            write_principles(server_writer(url, path), TASK, path)
        assert len(server.bodies) == 3
        with pytest.raises(UserError, match="writer org-strong-model: the budget is used up"):
            write_principles(server_writer(url, path, price=(1000.0, 1000.0), max_usd=0.01), TASK, path)
        assert len(server.bodies) == 3
    assert not any(row["record"] == "written" for row in read_jsonl(path))


@pytest.mark.parametrize("fields", [("seed",), ("max_tokens",), ("seed", "max_tokens")])
def test_a_server_that_refuses_a_field_is_asked_without_it(tmp_path, fields):
    """Said once, with the server's reason; --leave-out decides; and a content in parts, after a draft, is read."""
    class Picky(WriterServer):
        def answer(self, body):
            answer = super().answer(body)
            message = answer["choices"][0]["message"]
            message["content"] = [{"type": "text", "text": "<think>hm</think>\n"}, {"type": "text", "text": message["content"]}]
            return answer

    def refuse(k, body):
        bad = next((f for f in fields if f in body), None)
        HABITS["refusal"] = lambda answer: (422, json.dumps({"detail": [{"loc": ["body", bad], "msg": "not here"}]}).encode(), ())
        return bad and "refusal"

    try:
        server, said = Picky(GOOD, faults=refuse), []
        with server.serve() as url:
            end = Endpoint(model="org/strong-model", base_url=url, backoff_s=0.01)
            data = write_principles(ServerWriter(end, tmp_path / "a.jsonl", say=said.append), TASK, tmp_path / "a.jsonl")
            assert data["principles"] == ROWS and len(server.fired) == len(fields)
            (line,) = [line for line in said if "does not take" in line]
            assert all(f in line for f in fields) and "not here" in line and "\n" not in line
            told = dataclasses.replace(end, leave_out=("nothing",))
            with pytest.raises(UserError, match=f"refuses every request .HTTP 422: body.{fields[0]}: not here.*--leave-out|HTTP 422"):
                write_principles(ServerWriter(told, tmp_path / "b.jsonl"), TASK, tmp_path / "b.jsonl")
    finally:
        HABITS.pop("refusal", None)


def test_a_server_that_answers_with_text_and_no_message_writes_nothing(tmp_path):
    server = WriterServer(GOOD, faults=lambda k, body: "text, no message")
    with server.serve() as url, pytest.raises(UserError, match="writer org-strong-model: no message in the first choice"):
        write_principles(server_writer(url, tmp_path / "w.jsonl"), TASK, tmp_path / "w.jsonl")
    with WriterServer(GOOD).serve() as url:
        assert write_principles(server_writer(url, tmp_path / "w.jsonl"), TASK, tmp_path / "w.jsonl")["principles"] == ROWS
