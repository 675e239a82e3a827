"""Where a prompt ends and an answer begins, on token ids: what is sampled is what is trained and scored, and text is for
reading.

1. A sample's ids, up to the end token, are its response (`answer_of`); their text is decoded (`text_of`).
2. A model that reasons: what follows the marker that closes the reasoning, found on ids (`after`). One that may, and has
   not, has only responded.
3. Where the form keeps a part of the text, the same part of the ids (`cut`).
4. Trained and scored are the prompt's ids, those of that marker where there was one, and then these ids, the reasoning
   left out (stages/draws.py, core/tree.py): nothing is tokenised twice.

An answer that came as text (`--sampler server`) has the ids that its text has behind its prompt (`in_context`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from repro.models.template import control_tokens


def text_of(tokenizer, ids: Sequence[int]) -> str:
    """The text of sampled ids, control tokens dropped."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    controls = set(control_tokens(tokenizer))
    first = next((piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece and piece not in controls), "")
    if first.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # SentencePiece's mark of a new word, which decoding drops at the start of a text
    return without_controls(tokenizer, text)


def without_controls(tokenizer, text: str) -> str:
    """The text without control tokens: spelled out, one would turn into the control token later."""
    controls = control_tokens(tokenizer)
    while any(control in text for control in controls):
        for control in controls:
            text = text.replace(control, "")
    return text


def begins(tokenizer, ids: Sequence[int], mark: str) -> bool:
    """Whether a sample begins with a mark, white space apart, which may be control tokens."""
    return bool(mark) and tokenizer.decode(ids, skip_special_tokens=False).lstrip().startswith(mark)


def after(ids: Sequence[int], closing: Sequence[Sequence[int]],
          opened: bool) -> tuple[list[int], list[int] | None, list[int]]:
    """(response, reasoning, mark) of sampled ids: what follows the first of the id sequences `closing`, what stands before
    it, and itself. Without one, the sample is all reasoning, with no mark, where it was `opened` (by the prompt, or the
    sample's own first mark); else all response, and the reasoning None. On ids, since decoding drops a marker that is a
    special token."""
    ids = list(ids)
    found = [(k + len(mark), -len(mark)) for mark in map(list, closing) if mark
             for k in range(len(ids) - len(mark) + 1) if ids[k: k + len(mark)] == mark]
    if found:
        end, length = min(found)  # of two that end together the longer one: its beginning is no reasoning
        return ids[end:], ids[: end + length], ids[end + length: end]
    return ([], ids, []) if opened else (ids, None, [])


def cut(tokenizer, ids: Sequence[int], start: int, end: int) -> tuple[list[int], bool]:
    """The ids of the characters [start, end) of `text_of(ids)`, and whether any of them were tokenised anew.

    The shortest run of ids whose text holds these characters. White space that its first and last tokens have beyond them
    stays, as it was sampled. Where they have anything else (the format's "###" behind a full stop, in one token), the part
    of that token within the cut is tokenised anew in its context: no sampled id stands for it.
    """
    ids = list(ids)
    if start >= end:
        return [], False
    whole, texts = text_of(tokenizer, ids), {0: ""}

    def text(k: int) -> str:
        if k not in texts:
            texts[k] = text_of(tokenizer, ids[:k])
        return texts[k]

    def border(k: int) -> bool:
        return whole.startswith(text(k))  # else it is in the middle of a character's bytes

    def held(k: int) -> int:
        """Characters of the whole text that the first k ids have settled: not the first bytes of one, of which there are at
        most 3 (and which make SentencePiece's decoder drop the whole characters right before them)."""
        return max(common(text(j), whole) for j in range(k if border(k) else max(0, k - 3), k + 1))

    points = range(len(ids) + 1)
    first, last = bisect_right(points, start, key=held) - 1, bisect_left(points, end, key=held)
    first = next(k for k in range(first, -1, -1) if border(k) and held(k) <= start)
    inner, outer = first, last  # between these the ids are kept
    if whole[held(first): start].strip():
        inner = next((k for k in range(first + 1, last) if border(k) and held(k) >= start), last)
    if text(last)[end:].strip():
        outer = next(k for k in range(last - 1, -1, -1) if border(k) and held(k) <= end)
    if (inner, outer) == (first, last):
        return ids[first:last], False
    if inner > outer:
        return in_context(tokenizer, "", whole[start:end]), True
    head = in_context(tokenizer, "", whole[start: min(held(inner), end)]) if inner > first else []
    tail = in_context(tokenizer, whole[:held(outer)], whole[held(outer): end]) if outer < last else []
    return head + ids[inner:outer] + tail, True


def common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def in_context(tokenizer, before: str, text: str) -> list[int]:
    """The ids of `text` behind `before`: those that the two have together beyond those of `before`. Where the tokens of
    `before` change once `text` follows them, or there is none, those behind a line's end, where a word begins by itself."""
    for anchor in (before, "\n"):
        own = tokenizer(anchor, add_special_tokens=False).input_ids
        ids = tokenizer(anchor + text, add_special_tokens=False).input_ids
        if own and ids[: len(own)] == own and (len(ids) > len(own) or not text):
            return ids[len(own):]
    return tokenizer(text, add_special_tokens=False).input_ids
