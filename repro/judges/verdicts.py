"""A judge's own answer in, "A", "B" or None out. What is unambiguous is read; what contradicts itself is not.

In a text only the judge's own last line counts: it may quote a response, and a response may hold lines that look like
verdicts. Prose after the verdict is passed over only where nothing that was judged holds such a line.
"""

import re
from collections.abc import Sequence

from repro.base.records import loads
from repro.text import prompts
from repro.text.written import own

_LETTER = (r"[*_`\"'\u201c\u201d([{\s]*+(?:\\boxed\{)?(?:(?i:(?:the )?(?:response|option|letter|answer))[*_ ]++)?"
           r"[*_`\"'\u201c(\[{]*+([ABab])[*_`\"'\u201d)\]}]*+[.!]?[*_`\"'\u201d)\]}\s]*+")
_LABEL = r"[#*_\- ]*+(?i:final (?:response|answer|verdict))(?:[*_ ]*+[:\uff1a=][*_ ]*+|[*_ ]++is:?[*_ ]*+)"
_VERDICT = re.compile(_LABEL + _LETTER)           # a line of its own
_ALONE = re.compile(_LETTER)                      # a letter and nothing else
_NAMED = re.compile(_LABEL)                       # its letter is on the next line
_DOUBLE = re.compile(r"\s*\[\[([AB])\]\]\s*")     # a form of its own, known from other judges' prompts
_UNDECIDED = re.compile(_LABEL + r"\W*(?i:neither|both|tie|none|either|equal|unclear|unable|n/?a)\b.*")
_PROSE = re.compile(r"(?i)\b([ab]|responses?|answers?|verdict|final|first|second|former|latter|neither|both|tie|other|not?|"
                    r"wait|actually|however|but|instead|correct\w*|mistake\w*|sorry)\b")  # what may take a verdict back
_QUOTABLE = re.compile(r"(?im)final\s{1,9}(?:response|answer|verdict)|\[\[[AB]\]\]|^[^\w\n]{0,20}[AB][^\w\n]{0,20}$")
LONGEST = 300  # characters of a line that is looked at


def looks_like_a_verdict(text: str) -> bool:
    """Whether a text that is judged could be taken for a verdict where a judge quotes it."""
    return bool(_QUOTABLE.search(text))


def read_text(text: str, *, quoted: Sequence[str] = (), cut: bool = False) -> str | None:
    """The verdict of the last line: `Final Response: A`, in any of the forms that judges write, "(A)", "[[A]]",
    "Response A" or "**A**"; on the line after `Final Response:`; or such a letter alone. A line with the other letter makes
    the answer a contradiction: None. `quoted`: the texts that were judged. `cut`: the answer ended at the cap on its
    tokens, so that its last line may be the beginning of another."""
    text = own(text)
    if text.startswith(("{", "```")):
        return read_schema(text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines or any(_UNDECIDED.fullmatch(line[:LONGEST]) for line in lines):
        return None
    found: list[tuple[int, str]] = []  # the line where a verdict with its label ends, and its letter
    for k, line in enumerate(lines):
        match = _VERDICT.fullmatch(line[:LONGEST + 1]) or _DOUBLE.fullmatch(line) or (
            k and _NAMED.fullmatch(lines[k - 1][:LONGEST]) and _ALONE.fullmatch(line[:LONGEST + 1]))
        if match and len(line) <= LONGEST:
            found.append((k, match[1].upper()))
    quotable = any(map(looks_like_a_verdict, quoted))
    if found:
        rest = lines[found[-1][0] + 1:]
        if len({letter for _, letter in found}) > 1 or (rest and (len(found) > 1 or quotable or not _courtesy(rest))):
            return None
        return None if quotable and _DOUBLE.fullmatch(lines[-1]) else found[-1][1]
    alone = {match[1].upper() for line in lines if len(line) <= LONGEST and (match := _ALONE.fullmatch(line))}
    certain = not cut and not quotable and len(alone) == 1 and _ALONE.fullmatch(lines[-1][:LONGEST + 1])
    return alone.pop() if certain else None


def _courtesy(rest: Sequence[str]) -> bool:
    """Whether the lines after a verdict say nothing of it."""
    return len(rest) <= 2 and all(len(line) <= LONGEST and not _PROSE.search(line) for line in rest)


def read_schema(text: str) -> str | None:
    """The verdict of a JSON object of exactly the schema's fields; a fence of code around it is allowed."""
    text = own(text)
    if fence := re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, flags=re.S):
        text = fence[1]
    try:
        value = loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != set(prompts.JUDGE_SCHEMA["required"]):
        return None
    letter = value["final_response"]
    return letter if letter in ("A", "B") and isinstance(value["comparison"], str) else None


def read_logprobs(logprobs) -> str | None:
    """The likelier of A and B as the first token, spaces around it ignored; None where neither is listed, or both as
    likely. With one of them listed, the other is less likely than every listed token."""
    try:
        listed = logprobs["content"][0]["top_logprobs"]
        best = {letter: max((float(t["logprob"]) for t in listed if t["token"].strip() == letter), default=float("-inf"))
                for letter in "AB"}
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):
        return None
    return None if best["A"] == best["B"] else max(best, key=best.get)
