"""What a server takes of a request and which form of answer it offers: found out once, by small requests.

Servers refuse fields that others need (`seed`, `max_tokens`, a `temperature` of 0), most with a 400 or 422 that names the
field, some without. A refused request is not billed; the one that is answered is, and lies in the ledger: the same
command finds it there and asks no more.
"""

import re
from collections.abc import Callable, Iterator
from itertools import combinations

from repro.base.records import UserError, digest
from repro.servers.client import Asker
from repro.servers.endpoint import HOSTED, LEAVABLE, Call, Endpoint, text_of
from repro.servers.ledger import Ledger

Build = Callable[[str, tuple[str, ...]], Call]  # form of answer, fields left out -> the request
Keeps = Callable[[str, dict], bool]             # form of answer, answer -> whether the server has kept to it
LATER = (408, 409, 425, 429)                    # of the 4xx, those that say nothing of the request


def _leavable(endpoint: Endpoint) -> tuple[str, ...]:
    return tuple(f for f in LEAVABLE if f != "max_tokens" or endpoint.url != HOSTED)  # which is sent the other one


def _choices(endpoint: Endpoint) -> list[tuple[str, ...]]:
    """What may be left out, the least first; where --leave-out decides, that."""
    if endpoint.leave_out is not None:
        return [endpoint.leave_out]
    fields = _leavable(endpoint)
    return [left for count in range(len(fields) + 1) for left in combinations(fields, count)]


def known(endpoint: Endpoint, ledger: Ledger, build: Build, forms: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What an answer in the ledger shows that may be left out, and, first, what is left out where nothing is known."""
    first, *more = _choices(endpoint)
    return [first, *(left for left in more if any(build(form, left).key in ledger.answers for form in forms))]


def _named(error: str, *words: str) -> bool:
    return any(re.search(rf"(?<!\w){word}(?!\w)", error, flags=re.I) for word in words)


def _status(error: str) -> int:
    """The HTTP status that a request ended with; 0 where it ended otherwise."""
    found = re.match(r"HTTP (\d{3})", error)
    return int(found[1]) if found else 0


def agree(endpoint: Endpoint, ledger: Ledger, build: Build, forms: tuple[str, ...],
          keeps: Keeps = lambda form, answer: True, *, who: str, say: Callable[[str], None]) -> tuple[str, tuple[str, ...]]:
    """The first of `forms` that the server offers, and the fields that it is not sent. Of several forms the last is one
    that every server has. Raises UserError, with the server's reason, where it takes no such request, or is not there."""
    def read(form: str, left: tuple[str, ...], answer: dict) -> tuple[str, tuple[str, ...]]:
        if keeps(form, answer):
            return form, left
        if form != forms[-1]:
            return forms[-1], left
        raise UserError(f"{who}: {endpoint.url} does not offer --answer {form} (it ignores the request for it); use "
                        "--answer text")

    for form in forms:
        for left in _choices(endpoint):
            if answers := ledger.answers.get(build(form, left).key):
                if left and endpoint.leave_out is None:
                    say(f"{who}: asked without {_listed(left)}, as found out before")
                return read(form, left, answers[0])

    def attempt(form: str, left: tuple[str, ...]) -> tuple[dict | None, str]:
        """The answer, or why there is none. Raises UserError where no other request would fare better."""
        call, last = build(form, left), form == forms[-1]
        asker = Asker(endpoint, ledger)
        asker.run([call], label=f"{who}: {form}?")
        if answers := ledger.answers.get(call.key):
            return answers[0], ""
        error = ledger.errors.get(call.key, "no answer")
        status = _status(error)
        refused = 400 <= status < 500 and status not in LATER or status == 501 or (status >= 500 and not last)
        if asker.stopped or not refused:
            raise UserError(f"{who}: {asker.stopped or error}; run the command again once that is mended")
        return None, error

    form, left, why, first = forms[0], endpoint.leave_out or (), [], ""
    for form, left, error in _trials(endpoint, attempt, forms):
        if isinstance(error, dict):
            break
        first, why = first or error, [*why, (form, left, error)]
    else:
        if forms[-1] == "text":
            first = next(e for form, _, e in why if form == "text")
            raise UserError(f"{who}: {endpoint.url} refuses every request ({first}); --leave-out names what it is not sent "
                            f"(any of {', '.join(LEAVABLE)}, or nothing)")
        raise UserError(f"{who}: {endpoint.url} does not offer --answer {forms[0]} ({first}); use --answer text")
    answer, error = error, why[-1][2] if why else ""
    if endpoint.leave_out is None and left:
        reason = next((e for _, _, e in why if _named(e, *left)), error)
        say(f"{who}: {endpoint.url} does not take {_listed(left)} ({reason}): asked without; --leave-out decides otherwise")
    if form != forms[0]:
        reason = next(e for f, _, e in reversed(why) if f == forms[0])
        say(f"{who}: {endpoint.url} does not answer in a JSON {forms[0]} ({reason}): asked for {form}; --answer decides "
            "otherwise")
    return read(form, left, answer)


HOT, SEEDS, TEN_WORDS = 1.0, (1, 2, 3), "Write down ten words that come to mind, in one line."


def check_draws(endpoint: Endpoint, ledger: Ledger, left: tuple[str, ...], *, who: str) -> None:
    """Raise UserError where a server that takes a temperature says the same under three seeds at HOT: it ignores it, as
    `transformers serve` (5.23) does, and what is drawn from it is one answer over and over. Nothing is asked of the hosted
    server, or where the temperature is left out."""
    if "temperature" in left or endpoint.url == HOSTED:
        return
    request = {"messages": [{"role": "user", "content": TEN_WORDS}], "temperature": HOT,
               "max_completion_tokens" if "max_tokens" in left else "max_tokens": 24}
    calls = [Call(key=digest(["does it draw?", who, endpoint.host, endpoint.model, k]),
                  request=request | ({} if "seed" in left else {"seed": k}),
                  about={"item": "does it draw?", "order": None}) for k in SEEDS]
    Asker(endpoint, ledger).run(calls, label=f"{who}: does it draw?")
    said = [text_of(answers[0]).split() for call in calls if (answers := ledger.answers.get(call.key))]
    if len(said) == len(SEEDS) and all(words == said[0] for words in said) and len(said[0]) > 3:
        raise UserError(f"{who}: {endpoint.url} ignores the temperature: one answer three times at {HOT}; --leave-out "
                        "temperature goes on without it, and the record says so")


def _listed(left: tuple[str, ...]) -> str:
    return ", ".join(f + " (max_completion_tokens is sent)" * (f == "max_tokens") for f in left)


def _trials(endpoint: Endpoint, attempt, forms: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...], dict | str]]:
    """(form, left out, error) of what the server refuses, then, with its answer, of what it takes; ends where nothing is
    left to try. What a reason names is left out at once; where it names nothing, the next form is tried, then each
    field."""
    left, free = endpoint.leave_out or (), endpoint.leave_out is None
    for form in forms:
        while True:
            answer, error = attempt(form, left)
            yield form, left, answer or error
            named = [f for f in _leavable(endpoint) if f not in left and _named(error, f)] if free and not answer else []
            if not named:
                break
            left = tuple(f for f in LEAVABLE if f in (*left, *named))
        if answer:
            return
    for more in _choices(endpoint)[1:] if free and not _named(error, "model") else ():
        if set(left) < set(more):
            answer, error = attempt(form, more)
            yield form, more, answer or error
            if answer:
                return
