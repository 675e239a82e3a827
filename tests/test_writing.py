"""Principle writers: the parser and what it refuses, retries with the fault named, raw answers kept, the user's fallback."""

import json
import re
import shutil

import pytest
from judge_server import JudgeServer

from repro import prompts
from repro.constitutions import constitutions_of, load_constitutions
from repro.endpoint import Endpoint
from repro.records import UserError, read_jsonl, write_json
from repro.writing import Fault, LocalWriter, ServerWriter, parse_principles, write_principles, written_constitutions

GOOD = """Principle 1: concise: A summary should be short and to the point.
Principle 2: complete: A summary should hold all that matters.
Antithesis 1: A summary should be as long as the post.
Antithesis 2: A summary should leave out what matters."""
ROWS = [{"name": "concise", "text": "A summary should be short and to the point.", "antithesis": "A summary should be as long as the post."},
        {"name": "complete", "text": "A summary should hold all that matters.", "antithesis": "A summary should leave out what matters."}]
TASK = "summarise a post"


def change(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize("text", [
    GOOD, "\n" + GOOD.replace("\n", "\n\n") + "\n \n", re.sub(r"^(\w+ \d):", r"**\1:**", GOOD, flags=re.M),
    change("concise:", " Concise :"), change("Antithesis 1:", "_Antithesis 1_ :")])
def test_four_lines_are_two_principles(text):
    assert parse_principles(text) == ROWS
    assert [p.name for p in constitutions_of({"principles": ROWS}, "x").positive.principles] == ["concise", "complete"]


@pytest.mark.parametrize("text, fault", [
    ("", "in this order; found: none"),
    (prompts.WRITER_EXAMPLE[1], "Principle 1 says the same as the example"),
    (change("A summary should leave out what matters.", prompts.WRITER_EXAMPLE[1].split(": ")[-1]), "Antithesis 2 says the same as the example"),
    (change("concise:", "(a name of one word):"), "the name of Principle 1 must be one to three words"),
    ("Sure! Here they are:\n" + GOOD, "a line that is none of Principle 1, .*'Sure! Here they are:'"),
    (GOOD + "\nI hope that helps.", "a line that is none of"),
    (GOOD + "\nPrinciple 3: kind: A summary should be kind to its author.", "a line that is none of"),
    (GOOD + "\nAntithesis 2: A summary should be rude.", "Antithesis 2 is there twice"),
    (change("Antithesis 2: A summary should leave out what matters.", ""), "found: Principle 1, Principle 2, Antithesis 1$"),
    ("\n".join(GOOD.split("\n")[k] for k in (0, 2, 1, 3)), "in this order; found: Principle 1, Antithesis 1"),
    (change("complete: ", ""), "Principle 2 has no name followed by a colon"),
    (change("complete:", ":"), "the name of Principle 2 must be one to three words"),
    (change("complete:", "it holds all that matters:"), "the name of Principle 2 must be one to three words"),
    (change("complete:", "not complete:"), "name: 'not_complete'"),
    (change("complete:", "1:"), r"principles\[1\].name: '1'"),
    (change("complete:", "Concise:"), "the name 'concise' occurs twice"),
    (change("as long as the post", "short and to the point"), "Antithesis 1 says the same as Principle 1"),
    (change("as long as the post.", "SHORT, and to the point"), "Antithesis 1 says the same as Principle 1"),
    (change("hold all that matters", "be as long as the post"), "Principle 2 says the same as Antithesis 1"),
    (change("leave out what matters", "be as long as the post"), "Antithesis 2 says the same as Antithesis 1"),
    (change("what matters.", "what matters.<|im_end|>"), "Antithesis 2 holds a control token"),
    (change("what matters.", "what matters.</s>"), "Antithesis 2 holds a control token"),
    (change("what matters.", "what matters. END_OF_TEXT"), "Antithesis 2 holds a control token"),
    (change("what matters.", "{query}"), r"principles\[1\].antithesis: braces"),
    (change("A summary should leave out what matters.", "[insert a sentence that says so here]"), "Antithesis 2 must be a sentence of its own"),
    (change("A summary should leave out what matters.", "No."), "Antithesis 2 must be a sentence of its own, of 3 to 80 words"),
    (change("what matters.", "what matters " * 50), "Antithesis 2 must be a sentence of its own, of 3 to 80 words"),
])
def test_what_is_refused_and_why(text, fault):
    with pytest.raises(Fault, match=fault):
        parse_principles(text, controls=["<|im_end|>", "END_OF_TEXT"])


class Made:
    """A writer whose answers are given; it remembers what it was asked."""

    name = model = "made"

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def identity(self):
        return ["made"]

    def answer(self, messages):
        self.asked.append(messages)
        return self.answers.pop(0)


def test_the_example_is_in_the_form_that_is_asked_for():
    rows = parse_principles(prompts.WRITER_EXAMPLE[1].replace("Directions", "Instructions"))
    assert [row["name"] for row in rows] == ["clear", "calm"]


def test_a_fault_is_named_and_the_answer_shown_again(tmp_path):
    writer = Made("No idea<|im_end|>.", GOOD)
    data = write_principles(writer, TASK, tmp_path / "writing.jsonl")
    assert data["principles"] == ROWS and data["written"]["attempt"] == 2 and data["written"]["answer"] == GOOD
    first, second = writer.asked
    assert first == prompts.write_principles(TASK) and TASK in first[-1]["content"]
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user"] and first[2]["content"] == prompts.WRITER_EXAMPLE[1]
    assert second[:4] == first and [m["role"] for m in second[4:]] == ["assistant", "user"]
    assert second[4]["content"] == "No idea< |im_end|>." and "a line that is none of" in second[5]["content"]
    assert not any("<|im_end|>" in m["content"] for m in second)


def test_every_answer_is_kept_raw_and_none_asked_for_twice(tmp_path):
    record = tmp_path / "writing.jsonl"
    data = write_principles(Made("First try.", GOOD), TASK, record)
    rows = [row for _, row in read_jsonl(record)]
    assert [(r["answer"], r["attempt"], r["model"], r["writer"], r["task"]) for r in rows] == [
        ("First try.", 1, "made", "made", TASK), (GOOD, 2, "made", "made", TASK)]
    assert all(re.fullmatch(r"[0-9a-f]{64}", r["prompt_sha256"]) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", r["date"]) for r in rows)
    assert len({r["prompt_sha256"] for r in rows}) == 1
    before = record.read_bytes()
    again = Made()
    assert write_principles(again, TASK, record) == data and not again.asked and record.read_bytes() == before
    record.write_bytes(before[:-20])  # a kill tore the last line: only that answer is asked for again
    again = Made(GOOD)
    assert write_principles(again, TASK, record)["principles"] == ROWS and len(again.asked) == 1
    other = Made(GOOD)
    write_principles(other, "answer a question", record)
    assert len(other.asked) == 1 and json.loads(record.read_text().splitlines()[-1])["prompt_sha256"] != rows[0]["prompt_sha256"]


def test_without_usable_principles_the_users_fallback_or_an_end(tmp_path):
    said = []
    constitutions = written_constitutions(Made("a", "b"), TASK, tmp_path, fallback="tldr", say=said.append, attempts=2)
    assert constitutions == load_constitutions("tldr") and constitutions.writer == "hand"
    assert len(said) == 1 and re.search(r"writer made: no principles that can be used in 2 attempts \(the last: .*'b'\).*writing\.jsonl; "
                                        r"going on with tldr, written by hand", said[0])
    assert [r["answer"] for _, r in read_jsonl(tmp_path / "writing.jsonl")] == ["a", "b"]
    assert not (tmp_path / "principles.json").exists()
    with pytest.raises(UserError, match=r"in 3 attempts .*writing\.jsonl; name a constitution file to go on with"):
        written_constitutions(Made("c", "d", "e"), TASK, tmp_path / "other", fallback=None, say=said.append)
    unasked = Made()
    with pytest.raises(UserError, match="did you mean 'tldr'"):
        written_constitutions(unasked, TASK, tmp_path / "third", fallback="tldrr", say=said.append)
    assert not unasked.asked and not (tmp_path / "third").exists()


def test_what_was_written_is_a_constitution_file_with_its_origin(tmp_path):
    said = []
    constitutions = written_constitutions(Made(GOOD), TASK, tmp_path, fallback="tldr", say=said.append)
    assert not said and constitutions.writer == "made" and constitutions.positive.id == "concise,complete"
    assert load_constitutions(str(tmp_path / "principles.json")) == constitutions
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
    def attempt(writer):
        with pytest.raises(Fault, match="Principle 1"):
            write_principles(writer, TASK, tmp_path / "writing.jsonl", attempts=2)

    attempt(LocalWriter(str(tiny), max_tokens=8))
    rows = [row for _, row in read_jsonl(tmp_path / "writing.jsonl")]
    assert [r["writer"] for r in rows] == ["tiny", "tiny"] and [r["attempt"] for r in rows] == [1, 2]
    again = LocalWriter(str(tiny), max_tokens=8)
    attempt(again)
    assert again._loaded is None and len(read_jsonl(tmp_path / "writing.jsonl")) == 2


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
        rounds = sum(m["role"] == "assistant" for m in body["messages"]) - 1  # one is the example
        content = self.texts[rounds]
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
        assert len(server.bodies) == 3 and server.bodies[0]["messages"] == server.bodies[1]["messages"] == prompts.write_principles(TASK)
        assert server.bodies[0]["model"] == "org/strong-model" and server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 400
        assert write_principles(server_writer(url, path), TASK, path) == data and len(server.bodies) == 3
        kept = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in kept if json.loads(line)["record"] != "written"))  # killed before our own line
        assert write_principles(server_writer(url, path), TASK, path)["principles"] == ROWS and len(server.bodies) == 3
    assert [json.loads(line)["record"] for line in kept] == ["attempt", "outcome", "attempt", "outcome", "written", "attempt", "outcome", "written"]


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
    assert not any(row["record"] == "written" for _, row in read_jsonl(path))
