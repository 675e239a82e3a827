"""Principle writers: a language model writes two principles and their antitheses for a task (arXiv 2404.14313, A.12).

A writer is a model of this machine (the embedded one is a weak writer), or one behind any OpenAI-compatible server (as
strong as its model). What it writes is parsed strictly, and what cannot be used goes back to it with the fault named.
Every answer is kept raw, with model, prompt hash and date, and none is asked for twice. Principles from a file that
names no writer are `hand`.
"""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from repro import prompts
from repro.asking import Asker
from repro.constitutions import ConstitutionSet, constitutions_of, load_constitutions
from repro.endpoint import HOSTED, Call, Endpoint, Ledger
from repro.records import UserError, append_jsonl, digest, first_line, read_jsonl, write_json
from repro.rules import words

ATTEMPTS = 3
MAX_TOKENS = 400
FEWEST_WORDS, MOST_WORDS = 3, 80  # of a principle; the paper's have 10 to 50


class Fault(Exception):
    """What is wrong with a writer's text, in words that are fit to be shown to it."""


class LocalWriter:
    """A model that transformers runs in this process: the embedded LM, a folder or a hub name. Greedy."""

    def __init__(self, model: str, *, label: str | None = None, max_tokens: int = MAX_TOKENS):
        self.model, self.name, self.max_tokens = model, label or Path(model).name, max_tokens
        self._loaded = None

    def identity(self) -> list:
        return ["transformers", self.model, self.max_tokens]

    def answer(self, messages: list[dict]) -> str:
        from repro.models import load_model, load_tokenizer
        from repro.sampling import sample_batch

        if self._loaded is None:
            self._loaded = load_model(self.model), load_tokenizer(self.model)
        model, tokenizer = self._loaded
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as e:
            raise UserError(f"writer {self.name}: the tokenizer has no chat template that takes a system and a user turn "
                            f"({first_line(e)}); a writer must be instruction-tuned") from e
        return sample_batch(model, tokenizer, [prompt], max_new_tokens=self.max_tokens)[0]["text"]


class ServerWriter:
    """A model behind an OpenAI-compatible server. `ledger`: the file that each request and its answer go to."""

    def __init__(self, endpoint: Endpoint, ledger: Path, *, label: str | None = None, max_tokens: int = MAX_TOKENS,
                 temperature: float | None = 0.0, seed: int = 0):
        self.endpoint, self.model, self.max_tokens, self.temperature = endpoint, endpoint.model, max_tokens, temperature
        self.name = label or re.sub(r"[^A-Za-z0-9_.-]+", "-", endpoint.model).strip("-.")
        self.ledger, self.seed = Ledger(ledger, {"writer": self.name}), seed

    def identity(self) -> list:
        return [self.endpoint.host, self.model, self.max_tokens, self.temperature, self.seed]

    def answer(self, messages: list[dict]) -> str:
        field = "max_completion_tokens" if self.endpoint.url == HOSTED else "max_tokens"
        request = {"messages": messages, field: self.max_tokens, "seed": self.seed}
        if self.temperature is not None:
            request["temperature"] = self.temperature
        call = Call(key=digest(["writer", self.name, self.endpoint.host, self.model, request]), request=request)
        asker = Asker(self.endpoint, self.ledger, lambda answer: bool(_content(answer).strip()))
        asker.run([call], label=f"writer {self.name}")
        answers = self.ledger.answers.get(call.key)
        if not answers:
            raise UserError(f"writer {self.name}: {asker.stopped or self.ledger.errors.get(call.key, 'no answer')}")
        return next((text for text in map(_content, answers) if text.strip()), "")


def _content(answer: dict) -> str:
    return answer["choices"][0]["message"].get("content") or ""


# ---- the parser: a writer's text in, a constitution file's principles out

_FORM = ("Principle 1", "Principle 2", "Antithesis 1", "Antithesis 2")
_LINE = re.compile(r"[*_ ]*((?:Principle|Antithesis) \d+)[*_ ]*:[*_ ]*(.*?)[*_ ]*")


def parse_principles(text: str, controls: Sequence[str] = ()) -> list[dict]:
    """The two principles of a writer's text, as the rows of a constitution file: [{name, text, antithesis}].

    The text must be four lines as in `prompts.WRITER_EXAMPLE`, in that order, and nothing else (markdown's emphasis around
    them is allowed). `controls`: texts that a tokenizer reads as control tokens. Raises Fault.
    """
    found = {}
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        match = _LINE.fullmatch(line)
        if not match or match[1] not in _FORM:
            raise Fault(f"there is a line that is none of {', '.join(_FORM)}: {line[:60]!r}")
        if match[1] in found:
            raise Fault(f"{match[1]} is there twice")
        found[match[1]] = match[2]
    if tuple(found) != _FORM:
        raise Fault(f"the lines must be {', '.join(_FORM)}, in this order; found: {', '.join(found) or 'none'}")
    rows = []
    for k in "12":
        name, colon, principle = found[f"Principle {k}"].partition(":")
        if not colon:
            raise Fault(f"Principle {k} has no name followed by a colon and a sentence")
        rows.append({"name": re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_"), "text": principle.strip(" *_"),
                     "antithesis": found[f"Antithesis {k}"]})
        if not name.strip() or len(words(name)) > 3:
            raise Fault(f"the name of Principle {k} must be one to three words")
    _check(rows, controls)
    return rows


def _check(rows: list[dict], controls: Sequence[str]) -> None:
    sides = [(f"{side} {k}", row[key]) for k, row in enumerate(rows, start=1)
             for side, key in (("Principle", "text"), ("Antithesis", "antithesis"))]
    example = [line.rpartition(": ")[2] for line in prompts.WRITER_EXAMPLE[1].splitlines()]
    seen = {tuple(words(sentence)): "the example" for sentence in example}
    for label, sentence in sides:
        if sentence != prompts.defuse(sentence) or any(c in sentence for c in controls):
            raise Fault(f"{label} holds a control token")
        if re.search(r"[()\[\]<>]", sentence[:1]) or not FEWEST_WORDS <= len(words(sentence)) <= MOST_WORDS:
            raise Fault(f"{label} must be a sentence of its own, of {FEWEST_WORDS} to {MOST_WORDS} words")
        same = tuple(words(sentence))
        if same in seen:
            raise Fault(f"{label} says the same as {seen[same]}")
        seen[same] = label
    try:  # names, braces, and whatever else a user's file is held to
        constitutions_of({"principles": rows}, "principles")
    except UserError as e:
        raise Fault(str(e)) from None


# ---- writing

def write_principles(writer, task: str, record: Path, *, attempts: int = ATTEMPTS, controls: Sequence[str] = ()) -> dict:
    """Principles for `task` ("summarise a post"), as the content of a constitution file with its origin in `written`.

    Every answer goes to `record` (JSONL) with its fault; what is there already is not asked for again. Raises Fault,
    the last one, where no attempt gives two principles that can be used, and UserError where there is no answer.
    """
    if not task.strip() or re.search(r"[{}\0\ud800-\udfff]|[^\S ]", task):
        raise UserError(f"task: {task!r}; one line that says what the model is to do, without braces")
    if task != prompts.defuse(task) or any(c in task for c in controls):
        raise UserError(f"task: {task!r} holds a control token")
    kept = {row["key"]: row for _, row in (read_jsonl(record, torn_tail=True) if Path(record).exists() else ())
            if row.get("record") == "written"}
    messages = prompts.write_principles(task)
    prompt = digest(messages)
    for attempt in range(1, attempts + 1):
        key = digest([writer.identity(), messages])
        row = kept.get(key)
        if row is None:
            row = {"record": "written", "writer": writer.name, "key": key, "model": writer.model, "task": task,
                   "prompt_sha256": prompt, "attempt": attempt, "answer": writer.answer(messages),
                   "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            append_jsonl(record, [row])
        try:
            rows = parse_principles(row["answer"], controls)
        except Fault as e:
            fault = e
            messages = [*messages, *prompts.write_again(row["answer"], str(e))]
            continue
        origin = {k: row[k] for k in ("writer", "model", "task", "prompt_sha256", "attempt", "date", "answer")}
        return {"principles": rows, "written": origin}
    raise fault


def written_constitutions(writer, task: str, folder: Path, *, fallback: str | None, say: Callable[[str], None],
                          attempts: int = ATTEMPTS, controls: Sequence[str] = ()) -> ConstitutionSet:
    """The constitutions of the principles that `writer` writes, kept in `folder` as principles.json beside the raw
    writing.jsonl.

    Where nothing that can be used is written, that is said, and the constitutions of `fallback` (a name or a file that
    the user chose) are returned under their own writer's name; without one, UserError.
    """
    record = Path(folder) / "writing.jsonl"
    instead = None if fallback is None else load_constitutions(fallback)  # a mistake in it is found before the writing
    try:
        data = write_principles(writer, task, record, attempts=attempts, controls=controls)
    except Fault as e:
        said = (f"writer {writer.name}: no principles that can be used in {attempts} attempts (the last: {e}); the raw "
                f"answers are in {record}")
        if instead is None:
            raise UserError(f"{said}; name a constitution file to go on with") from None
        say(f"{said}; going on with {fallback}, written by {instead.writer}")
        return instead
    path = Path(folder) / "principles.json"
    write_json(path, data)
    return constitutions_of(data, str(path))
