"""Chat templates as transformers renders them: with a date of ours, in several layouts; what they say themselves, and which
marks in it open and close reasoning. What follows from that for a model is decided in repro/models/speaker.py.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import jinja2.ext
import jinja2.meta

from repro.base.records import first_line
from repro.models.marks import defuse

SYSTEM, USER, ANSWER = "Every reply is short.", "What is the colour of the sky?", "It is mostly blue."
THOUGHT, AGAIN = "Rain fell.", "And at night?"
LAYOUTS = ("text", "parts", "parts of the user's")

WORD = r"(?:think|thought|reason|analys|deliberat|inner_)"
BRACKETED = r"(?:<[^<>\n]{1,60}>|\[[^\[\]\n]{1,60}\]|\u25c1[^\u25c1\u25b7\n]{1,60}\u25b7)"
BRACKET = re.compile(BRACKETED)
# A mark that names reasoning: <think>, [THINK], <|END_THINKING|>; or the word between two, <|channel|>analysis<|message|>.
BLOCK = re.compile(rf"{BRACKETED}{WORD}\w*{BRACKETED}?|{BRACKETED}", re.I)
CLOSES = re.compile(r"^.\W{0,2}/|(?<![a-z])(?:end|close)|suffix", re.I)


def template_of(tokenizer) -> str:
    """The chat template that transformers would take; "" where there is none."""
    try:
        return tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        return ""


@contextmanager
def _dated(template: str, date: str) -> Iterator[list[str]]:
    """`strftime_now` in the template tells this date; yields the formats that it is asked for. transformers 5.23 gives
    templates today, and turns a function that a caller passes into a placeholder; the compiled template, which it keeps,
    looks up its own globals first."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    moment, own = datetime.fromisoformat(date), _compile_jinja_template(template).globals
    asked: list[str] = []
    own["strftime_now"] = lambda form: asked.append(form) or moment.strftime(form)
    try:
        yield asked
    finally:
        own.pop("strftime_now", None)


def apply(tokenizer, messages: list[dict], date: str, cue: bool, **switch) -> str:
    with _dated(tokenizer.get_chat_template(), date):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue, **switch)


def reads_clock(tokenizer, messages: list[dict], **switch) -> bool:
    """Whether the template asks for today. Not whether the renders of some days differ: it may look at Sundays alone."""
    with _dated(tokenizer.get_chat_template(), "2026-01-01") as asked:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
    return bool(asked)


def read_values(tokenizer) -> dict[str, list]:
    """The variables that the template reads, less the call's own, each with values that may mean something to it: False,
    True, and each text that it compares anything with; these below each attribute that it reads of the variable too."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = template_of(tokenizer)
    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "date", "cue"}
    texts = {c.value for node in tree.find_all(jinja2.nodes.Compare) for c in node.find_all(jinja2.nodes.Const)
             if isinstance(c.value, str) and c.value}
    names = jinja2.meta.find_undeclared_variables(environment.parse(template)) - taken  # this folds lists in its tree
    values = [False, True, *sorted(texts)]
    found: dict[str, list] = {name: list(values) for name in names}
    reads = [(node.node, node.attr) for node in tree.find_all(jinja2.nodes.Getattr)]
    reads += [(node.node, node.arg.value) for node in tree.find_all(jinja2.nodes.Getitem) if isinstance(
        node.arg, jinja2.nodes.Const)]
    reads += [(node.node.node, node.args[0].value) for node in tree.find_all(jinja2.nodes.Call) if isinstance(
        node.node, jinja2.nodes.Getattr) and node.node.attr == "get" and node.args and isinstance(
        node.args[0], jinja2.nodes.Const)]
    for base, key in dict.fromkeys((b.name, k) for b, k in reads if isinstance(b, jinja2.nodes.Name) and b.name in names):
        found[base] += [{key: value} for value in values]
    return found


def turn(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text} | more


# ---- control tokens

_own: dict[str, str] = {}


def own_text(tokenizer) -> str:
    """All that the chat template itself says, in its literals and in a rendered conversation (marks that it puts together
    from pieces), texts apart by a null character."""
    template = template_of(tokenizer)
    if template not in _own:
        said = []
        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
            said += [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
            said += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        except jinja2.TemplateError:
            said.append(template)
        texts = (SYSTEM, USER, ANSWER, AGAIN)
        turns = [turn(role, text) for role, text in zip(("system", "user", "assistant", "user"), texts)]
        for some in (turns, turns[1:], turns[1:2]):
            for layout in LAYOUTS[:2]:
                try:
                    out = apply(tokenizer, laid(some, layout), "2026-01-01", True)
                except Exception:  # a template may raise anything
                    continue
                said.append(re.sub("|".join(map(re.escape, texts)), "\0", out))
        _own[template] = "\0".join(said)
    return _own[template]


class _Generation(jinja2.ext.Extension):
    """transformers' {% generation %} block, as far as its text goes."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def control_tokens(tokenizer) -> list[str]:
    """The texts that the tokenizer reads as control tokens, longest first: its special tokens, and of the other added ones
    (DeepSeek's turns, Qwen's <think> and <tool_call> are not special by their files) those that have the shape of a mark
    or stand in what the chat template says. A word of small letters ("assistant") does not count for the latter."""
    # of transformers 5.23, all_special_tokens has the named ones alone: 3 of SmolLM2's 17
    own = own_text(tokenizer)
    found = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special or defuse(t.content) != t.content or (
        t.content.strip() and t.content in own and not re.fullmatch(r"\s*[a-z]+\s*", t.content))}
    found |= set(tokenizer.all_special_tokens)
    # SentencePiece's sign of a space: Code Llama reads its "\u2581<PRE>" in " <PRE>" too
    found |= {t.replace("\u2581", " ").strip() for t in found} - {""}
    return sorted(found, key=lambda t: (-len(t), t))


# ---- rendering in several ways

def laid(messages: Sequence[dict], layout: str) -> list[dict]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) and (
        layout == "parts" or (layout != "text" and m["role"] == "user")) else m for m in messages]


def headed(messages: Sequence[dict]) -> list[dict]:
    """The system text at the head of the first user turn."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, first, *others = messages
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]


def state_of(cue: str) -> str:
    """Whether the cue has "opened" a block of reasoning, "closed" one, or neither ("")."""
    blocks = [m for m in BLOCK.finditer(cue) if re.search(WORD, m[0], re.I)]
    if not blocks:
        brackets = list(BRACKET.finditer(cue))
        words = cue[brackets[-1].end() if brackets else 0:]  # Apriel: "Here are my reasoning steps:"
        return "opened" if re.search(WORD, words, re.I) else ""
    last = blocks[-1]
    return "closed" if CLOSES.search(last[0]) or BRACKET.search(cue, last.end()) else "opened"


def mirrored(text: str, back: bool = False) -> str:
    """The mark that closes what the last opening mark of reasoning in a text opens, by the habits of marks; "" where it has
    no such form, or there is none. `back`: the mark that opens what this one closes."""
    if back:
        if turned := re.fullmatch(r"<(\w+)\|>", text):
            return f"<|{turned[1]}>"
        for opens, closes in (("begin", "end"), ("START", "END")):
            if re.search(rf"(?<![A-Za-z]){closes}(?![A-Za-z])", text):
                return text.replace(closes, opens)
        return text.replace("/", "", 1) if "/" in text[:3] else ""
    mark = next((m[0] for m in reversed(list(BLOCK.finditer(text)))
                 if re.search(WORD, m[0], re.I) and not CLOSES.search(m[0]) and " " not in m[0]), "")
    if turned := re.fullmatch(r"<\|(\w+)>\w*", mark):  # Gemma 4: <|channel>thought ... <channel|>
        return f"<{turned[1]}|>"
    for opens, closes in (("begin", "end"), ("BEGIN", "END"), ("start", "end"), ("START", "END")):
        if opens in mark:
            return mark.replace(opens, closes)
    return "" if mark.startswith("<|") or not mark else f"{mark[0]}/{mark[1:]}"


def sequences(tokenizer, mark: str) -> tuple[tuple[int, ...], ...]:
    """The ids that a mark may have: alone first, then as its first or last characters join what stands beside them, where
    the tokenizer does not keep it whole."""
    def ids(text):
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    found = [ids(mark)]
    for before in ("\n", "\n\n", ".", ".\n", ".\n\n", " "):
        for after in ("", "\n", "\n\n"):
            own, whole = ids(before), ids(before + mark + after)
            found.append(whole[len(own):] if whole[:len(own)] == own else whole)
    tail = {ids("\n"), ids("\n\n")}
    kept = [s for k, s in enumerate(found) if s and not any(
        s != t and s[:len(t)] == t and (s[len(t):] in tail or not s[len(t):]) for t in found)]
    return tuple(dict.fromkeys([found[0], *kept]))


# ---- switches of reasoning

_NAMES = re.compile(r"think|reason|effort", re.I)  # of variables that may switch reasoning
_LEVELS = re.compile(r"effort|mode|option|strength|level", re.I)
_INVERTED = re.compile(r"skip|disable|hide|^no_", re.I)
OFF, LEAST, ON = ("none", "no_think", "off", "disabled"), ("minimal", "low"), ("on", "enabled", "high", "medium")


def switches(names: Iterable[str]) -> Iterator[tuple[str, tuple, tuple]]:
    """Of a template's variables those that may switch reasoning, by their names, with the values that may switch it off and
    on; the commonest first."""
    for name in sorted((n for n in names if _NAMES.search(n)), key=lambda n: (n != "enable_thinking", n != "thinking", n)):
        if _INVERTED.search(name):
            yield name, (True,), (False,)
        elif "budget" in name:
            yield name, (0,), (-1,)
        elif _LEVELS.search(name):
            yield name, (*OFF, *LEAST), ON
        else:
            yield name, (False, *OFF), (True, *ON)


# ---- what is wrong, in words

def reason_of(error: Exception | None) -> str:
    return first_line(error) if isinstance(error, ValueError | jinja2.TemplateError) else (
        f"{type(error).__name__}: {first_line(error)}")


def where_lost(text: str, out: str) -> str:
    """Where a render leaves a text: the last words that it has of it, and what is lost."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] in out else (low, middle - 1)
    return f"(after {text[max(0, low - 20): low]!r} it leaves out or changes {text[low: low + 20]!r})"
