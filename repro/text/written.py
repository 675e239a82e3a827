"""A principle writer's answers -> principles and antitheses, strictly, or what is wrong with them in words."""

import re
from collections.abc import Sequence

from repro.base.records import UserError
from repro.models.marks import defuse
from repro.text import prompts
from repro.text.principles import constitutions_of
from repro.text.rules import words

_TOKEN = re.compile(r"(?:(?:<[|\uff5c][^<>\s]{1,40}[|\uff5c]>|</?s>|<end_of_turn>|<eos>|\[/?(?:INST|EOS)\])\s{0,9})+$")
_THOUGHT = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", flags=re.I)


def own(text: str) -> str:
    """The answer without a draft (<think>...</think>: what follows the last; nothing of one that does not end) and without
    the control tokens that a server has left at its end."""
    marks = list(_THOUGHT.finditer(text))
    if marks and not marks[-1][1]:
        text = text[:marks[-1].start()] if len(marks) > 1 and text[:marks[0].start()].strip() else ""
    elif marks:
        text = text[marks[-1].end():]
    text = text.strip()
    return (text[:-200] + _TOKEN.sub("", text[-200:])).strip()


FEWEST_WORDS, MOST_WORDS = 3, 80  # of a principle; the paper's have 10 to 50


class Fault(Exception):
    """What is wrong with a writer's text, in words that are fit to be shown to it."""


# ---- the parser: a writer's texts in, a constitution file's principles out

_LINE = re.compile(r"[*_ ]*((?:Principle|Antithesis)(?: \d+)?)[*_ ]*:[*_ ]*(.*?)[*_ ]*")
_NEGATION = re.compile(r"not|no|never|without|neither|nor|nothing|cannot|\w+n't")
_JOINING = set("a an and as at be by for in is it of on or so that the to with".split())
_SHOWN = [re.sub(r"^Principle \d: ", "", line).split(": ") for line in (
    *"\n".join(lines for _, lines in prompts.WRITER_PRINCIPLES).splitlines(), *sum(prompts.WRITER_ANTITHESES, ()))]
_NAMES, _SENTENCES = ({tuple(words(part)) for part in column} for column in zip(*_SHOWN))  # of the examples


def parse_principles(text: str, task: str, controls: Sequence[str] = ()) -> list[dict]:
    """The two principles of a writer's text: [{name, text}].

    The text must be the lines "Principle 1: name: sentence" and "Principle 2: ..." and nothing else (markdown's emphasis
    around them is allowed). `controls`: texts that a tokenizer reads as control tokens. Raises Fault.
    """
    rows = []
    for label, (name, sentence) in _lines(text, ("Principle 1", "Principle 2")).items():
        _sentence(label, sentence, controls)
        subject = _subject(sentence)
        if any(subject == _subject(shown) for _, shown in _SHOWN) and not any(w[:4] == subject[:4] for w in words(task)):
            raise Fault(f"{label} is about the example's {subject}")
        rows.append({"name": re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_"), "text": sentence})
    if words(rows[0]["text"]) == words(rows[1]["text"]) or repeats(rows[0]["text"], rows[1]["text"]):
        raise Fault("Principle 2 says the same as Principle 1")
    _as_a_file_would([{**row, "antithesis": f"no: {row['text']}"} for row in rows])
    return rows


def parse_antithesis(text: str, row: dict, rows: Sequence[dict] = (), controls: Sequence[str] = ()) -> str:
    """The sentence of "Antithesis: name: sentence", the antithesis of the principle `row`, one of `rows`. Raises Fault."""
    (name, sentence), = _lines(text, ("Antithesis",)).values()
    _sentence("Antithesis", sentence, controls)
    if words(name) == words(row["name"].replace("_", " ")) or tuple(words(name)) in _NAMES:
        raise Fault(f"Antithesis has the name of the principle or of an example, {name!r}")
    if _subject(sentence) != _subject(row["text"]):
        raise Fault(f"Antithesis is about {_subject(sentence)!r}, the principle about {_subject(row['text'])!r}")
    if repeats(row["text"], sentence):
        raise Fault("Antithesis says the same as the principle")
    others = (other[k] for other in rows if other is not row for k in ("text", "antithesis") if k in other)
    if any(repeats(other, sentence) for other in others):
        raise Fault("Antithesis says the same as another sentence of this constitution")
    _as_a_file_would([{**row, "antithesis": sentence}])
    return sentence


def repeats(principle: str, other: str) -> bool:
    """Whether `other` is `principle` again, reworded at most: it begins with the whole of it; or, between the words that
    both begin and end with, one side is empty or `other` keeps more than half of the principle's words (those that join
    others apart), and neither side has more negations."""
    p, o = words(principle), words(other)
    if o[:len(p)] == p:
        return True
    while p and o and p[0] == o[0]:
        p, o = p[1:], o[1:]
    while p and o and p[-1] == o[-1]:
        p, o = p[:-1], o[:-1]
    if sum(map(bool, map(_NEGATION.fullmatch, p))) != sum(map(bool, map(_NEGATION.fullmatch, o))):
        return False
    told = [word for word in p if word not in _JOINING]
    return not p or not o or 2 * sum(word in o for word in told) > len(told)


def _subject(sentence: str) -> str:
    """The word before the first "should", or ""."""
    found = words(sentence)
    at = found.index("should") if "should" in found else 0
    return found[at - 1] if at else ""


def _lines(text: str, form: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The lines of a text by their labels, which must be `form`: label -> (name, sentence)."""
    found = {}
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        match = _LINE.fullmatch(line)
        if not match or match[1] not in form:
            raise Fault(f"there is a line that is not {' or '.join(form)}: {line[:60]!r}")
        if match[1] in found:
            raise Fault(f"{match[1]} is there twice")
        name, colon, sentence = match[2].partition(":")
        if not colon or not 1 <= len(words(name)) <= 3:
            raise Fault(f"{match[1]} has no name of one to three words, followed by a colon and a sentence")
        found[match[1]] = name.strip(" *_"), sentence.strip(" *_")
    if tuple(found) != tuple(form):
        raise Fault(f"expected {', '.join(form)}, in this order; found: {', '.join(found) or 'none'}")
    return found


def _sentence(label: str, sentence: str, controls: Sequence[str]) -> None:
    if sentence != defuse(sentence) or any(c in sentence for c in controls):
        raise Fault(f"{label} holds a control token")
    if re.search(r"[()\[\]<>]", sentence[:1]) or not FEWEST_WORDS <= len(words(sentence)) <= MOST_WORDS:
        raise Fault(f"{label} must be a sentence of its own, of {FEWEST_WORDS} to {MOST_WORDS} words")
    if not _subject(sentence):
        raise Fault(f'{label} does not say what something "should" be or do')
    if tuple(words(sentence)) in _SENTENCES:
        raise Fault(f"{label} says the same as the example")


def _as_a_file_would(rows: list[dict]) -> None:
    """Names, braces, and whatever else a user's file is held to."""
    try:
        constitutions_of({"principles": rows}, "principles")
    except UserError as e:
        raise Fault(str(e)) from None
