"""Principle writers: a language model writes two principles and their antitheses for a task (arXiv 2404.14313, A.12).

A writer is a model of this machine (the embedded one is a weak writer), or one behind any OpenAI-compatible server (as
strong as its model). It is asked for both principles, then for the antithesis of each; each answer is parsed strictly, and
one that cannot be used is asked for again. Every answer is kept raw, with model, prompt hash, seed and date, and none is
asked for twice. Principles from a file that names no writer are `hand`.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from repro.base.records import UserError, append_jsonl, digest, read_jsonl
from repro.models import marks
from repro.models.speaker import Speaker
from repro.servers.client import Asker
from repro.servers.endpoint import HOSTED, Call, Endpoint, text_of
from repro.servers.ledger import Ledger
from repro.servers.offers import agree, check_draws
from repro.text import prompts
from repro.text.principles import ConstitutionSet, constitutions_of
from repro.text.written import Fault, own, parse_antithesis, parse_principles

ATTEMPTS = 8  # at each question: the two principles, then each antithesis
ROUNDS = 4  # how often a writer that is asked afresh may begin with other principles
MAX_TOKENS = 400
ORIGIN = ("prompt_sha256", "attempt", "temperature", "seed")  # of each answer, in the constitution file


class LocalWriter:
    """A model that transformers runs in this process: the embedded LM, a folder or a hub name.

    It is asked afresh after an answer that cannot be used: a small model repeats what a conversation shows it. Answers
    are drawn `ATTEMPTS` at a time, in a batch: eight cost little more than one. `date`: what its chat template prints for
    today.
    """

    converses = False

    def __init__(self, model: str, *, label: str | None = None, max_tokens: int = 100, temperature: float | None = None,
                 date: str | None = None):
        self.model, self.name, self.max_tokens, self.date = model, label or Path(model).name, max_tokens, date
        self.temperature = 0.7 if temperature is None else temperature
        self._loaded, self._drawn = None, {}

    def identity(self) -> list:
        return ["transformers", self.model, self.max_tokens, self.temperature]

    def answer(self, messages: list[dict], *, opening: str = "", seed: int = 0) -> str:
        """Answer number `seed`, which begins with `opening` (the model continues it) and ends at a blank line."""
        from repro.models.load import load_model, load_tokenizer
        from repro.sampling.local import sample_batch

        if self._loaded is None:
            tokenizer = load_tokenizer(self.model)
            self._loaded = speaker_of_writer(tokenizer, self.name, self.date), tokenizer, load_model(self.model)
        speaker, tokenizer, model = self._loaded
        prompt = speaker.chat(messages)
        batch, k = divmod(seed, ATTEMPTS)
        if (prompt, opening, batch) not in self._drawn:
            self._drawn = {(prompt, opening, batch): sample_batch(
                model, tokenizer, [prompt + opening] * ATTEMPTS, max_new_tokens=self.max_tokens,
                temperature=self.temperature, seed=batch, stop="\n\n")}
        return opening + self._drawn[prompt, opening, batch][k]["text"]


def speaker_of_writer(tokenizer, name: str, date: str | None = None) -> Speaker:
    """How a writer on this machine is spoken to. Raises UserError where it reasons in any case: it has to continue a text
    that is begun for it."""
    speaker = Speaker.of(tokenizer, date=date, name="", flag=f"writer {name}",
                         instead="a writer must be instruction-tuned")
    if speaker.closing:
        raise UserError(f"writer {name}: it writes {speaker.mark!r} before it responds, which nothing switches off; choose "
                        "a writer that begins with its response (--writer-model)")
    return speaker


class ServerWriter:
    """A model behind an OpenAI-compatible server. `ledger`: the file that each request and its answer go to. What is
    wrong with an answer is said to it. `temperature` None: the field is not sent."""

    converses = True

    def __init__(self, endpoint: Endpoint, ledger: Path, *, label: str | None = None, max_tokens: int = MAX_TOKENS,
                 temperature: float | None = None, say: Callable[[str], None] = lambda line: None):
        self.say, self.left_out, self.draws = say, endpoint.leave_out, False
        self.endpoint, self.model, self.max_tokens, self.temperature = endpoint, endpoint.model, max_tokens, temperature
        self.name = label or re.sub(r"[^A-Za-z0-9_.-]+", "-", endpoint.model).strip("-.")
        self.ledger = Ledger(ledger, {"writer": self.name})

    def identity(self) -> list:
        return [self.endpoint.host, self.model, self.max_tokens, self.temperature]

    def answer(self, messages: list[dict], *, opening: str = "", seed: int = 0) -> str:
        """The answer; a server cannot be made to continue `opening`. The first request shows what the server takes."""
        def build(form: str, left: tuple[str, ...]) -> Call:
            more = self.endpoint.url == HOSTED or "max_tokens" in left
            request = {"messages": messages, "max_completion_tokens" if more else "max_tokens": self.max_tokens}
            if "seed" not in left:
                request["seed"] = seed
            if self.temperature is not None and "temperature" not in left:
                request["temperature"] = self.temperature
            return Call(key=digest(["writer", self.name, self.endpoint.host, self.model, request]), request=request)

        if self.left_out is None:
            _, self.left_out = agree(self.endpoint, self.ledger, build, ("text",), who=f"writer {self.name}", say=self.say)
        if self.temperature and not self.draws:
            check_draws(self.endpoint, self.ledger, self.left_out, who=f"writer {self.name}")
            self.draws = True
        call = build("text", self.left_out)
        asker = Asker(self.endpoint, self.ledger, lambda answer: bool(_content(answer).strip()))
        asker.run([call], label=f"writer {self.name}")
        answers = self.ledger.answers.get(call.key)
        if not answers:
            raise UserError(f"writer {self.name}: {asker.stopped or self.ledger.errors.get(call.key, 'no answer')}")
        return next((text for text in map(_content, answers) if text.strip()), "")


def _content(answer: dict) -> str:
    """The text without a draft that some servers leave in it."""
    return own(text_of(answer))


# ---- writing

def write_principles(writer, task: str, record: Path, *, seed: int = 0, attempts: int = ATTEMPTS, rounds: int = ROUNDS,
                     controls: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> dict:
    """Principles for `task` ("write a summary of a post"), as the content of a constitution file with its origin in
    `written`. Two calls with the same seed give the same.

    Every answer goes to `record` (JSONL); what is there already is not asked for again. `say` hears of each answer that
    cannot be used. Raises Fault, the last one, where a question gets no answer that can be used in `attempts`, and
    UserError where there is no answer.
    """
    if not task.strip() or re.search(r"[{}\0\ud800-\udfff]|[^\S ]", task):
        raise UserError(f"task: {task!r}; one line that says what the model is to do, without braces")
    if task != marks.defuse(task) or any(c in task for c in controls):
        raise UserError(f"task: {task!r} holds a control token")
    kept = {row["key"]: row for row in (read_jsonl(record, torn_tail=True) if Path(record).exists() else ())
            if row.get("record") == "written"}

    def ask(messages: list[dict], opening: str, parse, first: int) -> tuple:
        prompt = digest(messages)
        for attempt in range(1, attempts + 1):
            number = first + attempt - 1
            key = digest([writer.identity(), messages, opening, number])
            row = kept.get(key)
            if row is None:
                row = {"record": "written", "writer": writer.name, "key": key, "model": writer.model, "task": task,
                       "prompt_sha256": prompt, "attempt": attempt, "temperature": writer.temperature, "seed": number,
                       "answer": writer.answer(messages, opening=opening, seed=number),
                       "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                append_jsonl(record, [row])
            try:
                return parse(row["answer"]), {k: row[k] for k in ORIGIN}
            except Fault as e:
                fault = e
                say(f"writer {writer.name}: {opening} attempt {attempt} of {attempts}: {fault}")
                if writer.converses:
                    messages = [*messages, *prompts.write_again(row["answer"], str(fault))]
        raise fault

    for k in range(1 if writer.converses else rounds):
        first = (seed * ROUNDS + k) * ATTEMPTS
        try:
            rows, origin = ask(prompts.write_principles(task), "Principle 1:",
                               lambda text: parse_principles(text, task, controls), first)
            used = [origin]
            for row in rows:
                parse = partial(parse_antithesis, row=row, rows=rows, controls=controls)
                messages = prompts.write_antithesis(row["name"].replace("_", " "), row["text"])
                row["antithesis"], origin = ask(messages, "Antithesis:", parse, first)
                used.append(origin)
        except Fault as e:
            fault = e
        else:
            return {"principles": rows,
                    "written": {"writer": writer.name, "model": writer.model, "task": task, "answers": used}}
    raise fault


def written_constitutions(writer, task: str, folder: Path, *, instead: ConstitutionSet | None, say: Callable[[str], None],
                          seed: int = 0, attempts: int = ATTEMPTS, rounds: int = ROUNDS,
                          controls: Sequence[str] = ()) -> ConstitutionSet:
    """The constitutions of the principles that `writer` writes; its raw answers are kept in `folder` as writing.jsonl.

    Where nothing that can be used is written, that is said, and `instead`, which the user chose, is returned under its
    own writer's name; without one, UserError.
    """
    record = Path(folder) / "writing.jsonl"
    try:
        data = write_principles(writer, task, record, seed=seed, attempts=attempts, rounds=rounds, controls=controls,
                                say=say)
    except Fault as e:
        said = (f"writer {writer.name}: no principles that can be used in {attempts} attempts at a question (the last: "
                f"{e}); the raw answers are in {record}")
        if instead is None:
            raise UserError(f"{said}; name a constitution file to go on with") from None
        say(f"{said}; going on with the constitutions written by {instead.writer}")
        return instead
    return constitutions_of(data, f"principles of {writer.name}")
