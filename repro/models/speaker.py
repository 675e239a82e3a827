"""How a chat model is spoken to: decided once for its tokenizer, checked, and said. Everything else asks here.

1. The chat template (models/template.py) is rendered with a conversation of our own, in several ways -> where a system text
   goes, whether a content is a text or a list of parts, what the clock changes.
2. With each variable that may switch reasoning, by what changes -> the off switch (or the on switch).
3. With a turn of the model's -> where an answer ends, what closes reasoning, whether the template renders an answer as it
   was sampled.
4. Every later render is held against what was asked, word for word.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date as Date

from repro.base.records import UserError
from repro.models.marks import opened
from repro.models.template import (
    AGAIN,
    ANSWER,
    BRACKET,
    CLOSES,
    LAYOUTS,
    LEAST,
    SYSTEM,
    THOUGHT,
    USER,
    WORD,
    apply,
    control_tokens,
    headed,
    laid,
    mirrored,
    own_text,
    read_values,
    reads_clock,
    reason_of,
    sequences,
    state_of,
    switches,
    turn,
    where_lost,
)

# What some template alters: blank lines, indents, quotes, words that switch. A text is tried with it before the plain one.
HARD = "One:  3 < 4 & \"five\", {{ 6 }}\n\n\n    two's /think /no_think\n\n- three."
UNKNOWN = "qzx"  # a value that no template knows


@dataclass(frozen=True)
class Speaker:
    """How a model is spoken to. Made by `Speaker.of` (a chat template) or `Speaker.plain` (a base model).

    `system`: "turn", or "head of the user turn" where a system turn is dropped or refused. `content`: one of LAYOUTS.
    `switch`: the template's variables that are passed. `date`: what it gets for today, None where it asks for none. `cue`:
    what follows the user's text. `ends`: ids that end an answer, beside the tokenizer's and the model's; `ends_both`: ids
    that end a block of reasoning too, at which nothing may be stopped before that is over. `reasons`: the model may reason
    before it answers; `opened`: the cue has begun it; `opening`: else the mark with which the model begins it, "" where
    none is known. `closing`: the sequences of ids after one of which the response begins, the mark as it stands alone
    first. `unlike`: why the template renders an answer in another way than it is sampled; "" where prompt + answer + end is
    its own rendering.
    """

    tokenizer: object = field(repr=False, compare=False)
    name: str = ""
    bos: str = ""
    system: str = "turn"
    content: str = "text"
    switch: dict = field(default_factory=dict)
    date: str | None = None
    cue: str = ""
    ends: frozenset[int] = frozenset()
    ends_both: frozenset[int] = frozenset()
    reasons: bool = False
    opened: bool = False
    opening: str = ""
    closing: tuple[tuple[int, ...], ...] = ()
    mark: str = ""
    unlike: str = ""
    idle: bool = field(default=False, repr=False)
    instead: str = "use --prompt plain"

    @classmethod
    def plain(cls, tokenizer) -> "Speaker":
        """Of a base model: no template, no turns, and `bos` before each text."""
        return cls(tokenizer, bos=opened(tokenizer))

    @classmethod
    def of(cls, tokenizer, *, reasoning: bool = False, date: str | None = None, name: str | None = None,
           flag: str = "--prompt chat", instead: str = "use --prompt plain") -> "Speaker":
        """Decide. `date`: ISO, by default today's. Raises UserError where the template cannot be spoken through, or
        `reasoning` cannot be had. `flag` and `instead` begin and end what it says."""
        name = str(getattr(tokenizer, "name_or_path", "")) if name is None else name
        draft = cls(tokenizer, name, instead=instead, date=date or Date.today().isoformat())
        try:
            draft = draft._laid_out()._switched(reasoning)
            draft = replace(draft, cue=draft._cue())
            draft = draft._answered(reasoning)
            turns = draft._turns([turn("system", SYSTEM), turn("user", USER)])
            return draft if reads_clock(tokenizer, turns, **draft.switch) else replace(draft, date=None)
        except _Mute as e:
            raise UserError(f"{flag}: {e}; {instead}") from e

    @property
    def _whose(self) -> str:
        return f" of {self.name}" if self.name else ""

    # ---- what everything else asks

    def render(self, system: str, user: str) -> str:
        """The prompt, up to where the model answers. Raises UserError where it does not say both texts, word for word
        (white space around a text apart), or ends otherwise than the prompts of all other texts."""
        return self.chat([turn("system", system), turn("user", user)])

    def chat(self, messages: Sequence[dict]) -> str:
        """`render` of any conversation of texts that ends in a user's turn."""
        try:
            out = self._render(messages)
        except Exception as e:  # the template's own: by its checks of roles, or a mistake in it
            raise UserError(f"the chat template{self._whose} does not take a text ({reason_of(e)}); reword it, or "
                            f"{self.instead}") from e
        for m in messages:
            if m["content"].strip() not in out:
                raise UserError(f"the chat template{self._whose} alters the {m['role']}'s text "
                                f"{where_lost(m['content'].strip(), out)}; reword it, or {self.instead}")
        if not out.endswith(self.cue):
            raise UserError(f"the chat template{self._whose} ends its prompt in another way for this text "
                            f"({out[-40:]!r}, not {self.cue[-40:]!r}); reword it, or {self.instead}")
        return out

    def facts(self) -> dict:
        """What a run's record says: JSON data."""
        return {"system": self.system, "content": self.content, "switch": self.switch, "date": self.date, "cue": self.cue,
                "ends": [self._token(i) for i in sorted(self.ends | self.ends_both)], "reasons": self.reasons,
                "opened": self.opened, "opening": self.opening or None, "closing": self.mark or None,
                "rendered_as_sampled": not self.unlike, "unlike": self.unlike or None}

    # ---- how it is decided

    def _token(self, i: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(i))

    def _render(self, messages: Sequence[dict], cue: bool = True, **switch) -> str:
        return apply(self.tokenizer, self._turns(messages), self.date or Date.today().isoformat(), cue,
                     **self.switch | switch)

    def _turns(self, messages: Sequence[dict]) -> list[dict]:
        return laid(messages if self.system == "turn" else headed(messages), self.content)

    def _probe(self, **switch) -> str:
        return self._render([turn("system", SYSTEM), turn("user", USER)], **switch)

    def _try(self, **switch) -> str | None:
        """The probe with other variables; None where the template does not take them or loses a text."""
        try:
            out = self._probe(**switch)
        except Exception:
            return None
        return out if SYSTEM in out and USER in out else None

    def _laid_out(self) -> "Speaker":
        """System and content: the first way in which nothing is lost. That of a hard text, else of a plain one."""
        failure = lost = None
        for system in ("turn", "head of the user turn"):
            for user in (HARD, USER):
                for content in LAYOUTS:
                    draft = replace(self, system=system, content=content)
                    try:
                        out = draft._render([turn("system", SYSTEM), turn("user", user)])
                    except Exception as e:
                        failure = failure or e
                        continue
                    if SYSTEM in out and user in out:
                        return draft
                    lost = lost or ("a system's" if user in out else "a user's")
        if lost is None:
            raise _Mute(f"the tokenizer{self._whose} has no chat template that takes a user turn ({reason_of(failure)})")
        raise _Mute(f"the chat template{self._whose} leaves {lost} text out of the prompt, given as text or as parts")

    def _switched(self, reasoning: bool) -> "Speaker":
        """With the variable passed that switches reasoning off, or on: found by what it changes."""
        own = read_values(self.tokenizer)
        base = self._probe()
        found: list[tuple[bool, dict, dict]] = []
        for name, offs, ons in switches(own):
            nonsense = self._try(**{name: UNKNOWN})

            def known(value, out, nonsense=nonsense):  # "Reasoning: none" only prints the word: not one of the template's
                return not isinstance(value, str) or nonsense is None or nonsense.replace(UNKNOWN, value) != out

            reads = {v: out for v in ons if (out := self._try(**{name: v})) is not None}
            for off in offs:
                out = self._try(**{name: off})
                closed = out is not None and self._state_of(out) == "closed"
                other = [v for v in reads if reads[v] != out]
                if out is None or self._state_of(out) == "opened" or not (other or base != out) or not (
                        closed or (known(off, out) and off not in LEAST and other)):
                    continue
                opens = [v for v in other if self._state_of(reads[v]) == "opened" and known(v, reads[v])]
                on = next((v for v in other if isinstance(v, bool)), None)
                on = {name: opens[0] if on is None and opens else on} if on is not None or opens else (
                    {} if base != out else {name: other[0]})
                found.append((not closed, {name: off}, on))
        if not found:
            found = list(self._by_effect(own, base))
        if not found:  # Granite 3.3: a switch that does nothing beside a system text, so that nothing asks for reasoning
            return replace(self, idle=any(re.fullmatch("(enable_)?thinking", n) for n in own))
        _, off, on = min(found, key=lambda f: f[0])
        return replace(self, switch=on if reasoning else off)

    def _by_effect(self, own: dict[str, list], base: str) -> Iterator[tuple[bool, dict, dict]]:
        """A variable of any name, with a value that the template itself compares something with, is a switch where it
        undoes the reasoning that the cue opens, or opens what the cue has closed."""
        was, cue = self._state_of(base), self._cue_of(base)
        for name in sorted(own) if was else ():
            nonsense = self._try(**{name: UNKNOWN}) or ""
            for value in own[name]:
                out = self._try(**{name: value})
                if out is None or isinstance(value, str) and nonsense.replace(UNKNOWN, value) == out:
                    continue
                state = self._state_of(out)
                if was == "opened" and (state == "closed" or not state and cue.startswith(self._cue_of(out).rstrip())):
                    yield state != "closed", {name: value}, {}
                elif was == "closed" and state == "opened":
                    yield False, {}, {name: value}

    def _state_of(self, out: str) -> str:
        return state_of(self._cue_of(out))

    def _cue_of(self, out: str) -> str:
        return out[out.rindex(USER) + len(USER):]

    def _cue(self) -> str:
        """What follows the user's text. Raises _Mute where that is no place for an answer."""
        with_cue, without = self._probe(), self._told(cue=False)
        cue, head = self._cue_of(with_cue), self._head()
        last = (BRACKET.findall(cue) or [""])[-1]
        missing = head is not None and head.startswith(cue.rstrip()) and head[len(cue.rstrip()):].strip() and not (
            re.search("assistant|model|bot|gpt|response", last, re.I))
        if with_cue == without and (missing or not cue.strip()):
            raise _Mute(f"the chat template{self._whose} gives the model no place to answer (it does nothing for "
                        f"add_generation_prompt; its prompts end in {with_cue[-20:]!r})")
        return cue

    def _spoken(self, *after: dict, **more) -> str | Exception:
        """The conversation with an answer in it (of the fields `more`), and `after`; or what the template raises."""
        return self._told(turn("assistant", ANSWER, **more), *after)

    def _told(self, *after: dict, cue: bool = False) -> str | Exception:
        try:
            return self._render([turn("system", SYSTEM), turn("user", USER), *after], cue)
        except Exception as e:
            return e

    def _head(self) -> str | None:
        """What stands between the user's text and the answer, in the template's own rendering."""
        full = self._spoken()
        if isinstance(full, str) and USER in full and ANSWER in full[full.rindex(USER):]:
            return full[full.rindex(USER) + len(USER): full.rindex(ANSWER)]
        return None

    def _answered(self, reasoning: bool) -> "Speaker":
        """Ends, reasoning, and whether the template renders an answer as it is sampled."""
        state, head = state_of(self.cue), self._head()
        wrapper = head.removeprefix(self.cue).strip() if head is not None and head.startswith(self.cue) else ""
        begun, between = self._between()
        told = (BRACKET.findall(self.cue) or [""])[-1]  # Command A: <|START_RESPONSE|>
        said = "" if self.idle or re.search("response|final|answer", told, re.I) else own_text(self.tokenizer)
        closers = [m for m in BRACKET.findall(said) if re.search(WORD, m, re.I) and CLOSES.search(m) and " " not in m]
        closes = wrapper if wrapper and between.endswith(wrapper) else between or next(iter(closers), "") or (
            mirrored(self.cue) or mirrored(said) if state == "opened" or (reasoning and self.switch) else "")
        reasons = state == "opened" or (state == "" and bool(closes) and (reasoning or not self.switch))
        if reasoning and not reasons:
            raise UserError(f"--reasoning: the chat template{self._whose} has no switch for reasoning that does anything "
                            "here, and shows none; leave --reasoning out")
        if reasons and not closes:
            raise _Mute(f"the chat template{self._whose} opens reasoning that nothing switches off ({self.cue[-30:]!r}) "
                        "and does not say how it is closed")
        mark = closes if reasons else wrapper if BRACKET.search(wrapper) else ""
        closing = sequences(self.tokenizer, mark) if mark else ()
        inside = set(self.tokenizer(between, add_special_tokens=False).input_ids) if reasons and between else set()
        ends = self._ends()
        shown = (m for m in BRACKET.findall(own_text(self.tokenizer)) if mirrored(m) == closes)
        opening = "" if not reasons or state == "opened" else begun or next(shown, "") or mirrored(closes, back=True)
        return replace(self, reasons=reasons, opened=state == "opened", opening=opening, closing=closing, mark=mark,
                       ends=frozenset(ends - inside), ends_both=frozenset(ends & inside), unlike=self._unlike(head))

    def _between(self) -> tuple[str, str]:
        """What the template renders between its cue and a turn's reasoning, and between that and the answer; "" where it
        renders no reasoning."""
        given = ({k: THOUGHT for k in ("reasoning_content", "reasoning", "thinking")},
                 {"content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": ANSWER}]})
        for more in given:
            full = self._spoken(**more)
            if isinstance(full, str) and THOUGHT in full and ANSWER in full[full.rindex(THOUGHT):]:
                text = full[full.rindex(THOUGHT) + len(THOUGHT): full.rindex(ANSWER)].strip()
                if BRACKET.search(text) and "{" not in text and len(text) <= 160:  # else it prints the fields themselves
                    head = full[:full.rindex(THOUGHT)].rpartition(USER)[2]
                    return head.removeprefix(self.cue).strip() if head.startswith(self.cue) else "", text
        return "", ""

    def _ends(self) -> set[int]:
        """The control token that follows an answer: the turn's end, else the beginning of the user's next turn."""
        controls = set(control_tokens(self.tokenizer))
        for after in ((), (turn("user", AGAIN),)):
            full = self._spoken(*after)
            if not isinstance(full, str) or ANSWER not in full[full.rfind(USER):] or USER not in full:
                continue  # a template of the last turn alone: its cue follows, no end
            rest = full[full.rindex(ANSWER) + len(ANSWER):]
            rest = rest[:rest.index(AGAIN)] if after and AGAIN in rest else rest
            for i in self.tokenizer(rest, add_special_tokens=False).input_ids:
                if self._token(i) in controls:
                    return {i}
                if self.tokenizer.decode([i]).strip():
                    break
        return set()

    def _unlike(self, head: str | None) -> str:
        full = self._spoken()
        if not isinstance(full, str):
            return f"it raises for a turn of the model's ({reason_of(full)})"
        if head is None:
            return "it alters the answer"
        prompt = self._probe()
        if full.startswith(prompt + ANSWER):
            return ""
        squeezed = ["".join(t.split()) for t in (full, prompt + ANSWER)]
        if squeezed[0].startswith(squeezed[1]):
            return "white space"
        if state_of(self.cue) or re.search(WORD, head, re.I):
            return "a block of reasoning is dropped from a turn that is over, or added"
        if full.startswith(prompt):
            return f"{head.removeprefix(self.cue)!r} stands before the answer"
        return "what stands before the answer is rendered anew"


class _Mute(Exception):
    """Why a template cannot be spoken through."""
