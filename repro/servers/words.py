"""What servers say: the reason of a refusal, and keys blacked out wherever they are echoed."""

import re
from html import unescape

from repro.base.records import loads
from repro.servers.endpoint import shown

MAX_DEPTH = 50  # objects and lists in one another; Python's parser reads more than its writer writes


def redact(text: str, key: str) -> str:
    """The text with every piece of the key (8 characters or more) blacked out: servers echo keys in their errors. A shorter
    key is no secret, but what servers without one are given ("x", "none"), and may stand in any answer."""
    hidden = bytearray(len(text))
    for k in range(len(key) - 7):
        piece, at = key[k: k + 8], -1
        while (at := text.find(piece, at + 1)) >= 0:
            hidden[at: at + 8] = b"\1" * 8
    return re.sub("\0+", "[key]", "".join("\0" if h else c for c, h in zip(text, hidden))) if any(hidden) else text


def redacted(value, key: str, depth: int = 0):
    """A JSON value whose texts are redacted: a key that is spelled with escapes is one only after parsing. Raises
    ValueError for one that could not be kept."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {redact(k, key): redacted(v, key, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [redacted(v, key, depth + 1) for v in value]
    return redact(value, key) if isinstance(value, str) else value


TITLE = re.compile(r"<title[^<>]*>([^<]*[^<\s])", flags=re.I)
_TAG = re.compile(r"<[^<>]*>")


def reason(body: str) -> str:
    """Why a server refuses, out of the body of its error, in one line: OpenAI's {"error": {"message"}}, pydantic's
    {"detail": [{"loc", "msg"}]}, a page's title, or the text as it is."""
    try:
        text = _said(loads(body))
    except ValueError:
        text, title = body[:10**5], TITLE.search(body[:10**5])
        text = unescape(title[1] if title else _TAG.sub(" ", text) if text.lstrip().startswith("<") else text)
    return shown((text.strip() or body.strip() or "no reason given").rstrip("."))


def _said(value, depth: int = 0) -> str:
    if isinstance(value, str) or depth > 8:
        return str(value)
    if isinstance(value, list):
        return "; ".join(filter(None, (_said(v, depth + 1) for v in value[:3])))
    if not isinstance(value, dict):
        return ""
    if isinstance(value.get("msg"), str):
        loc = value.get("loc")
        return (".".join(map(str, loc)) + ": " if isinstance(loc, list) else "") + value["msg"]
    parts = (_said(value.get(k), depth + 1) for k in ("error", "message", "detail", "errors", "title"))
    text, param = next(filter(None, parts), ""), value.get("param")
    return f"{text} ({param})" if text and isinstance(param, str) and param not in text else text
