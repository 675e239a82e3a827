"""Habits of servers that speak the openai protocol, more or less: what each makes of an answer that would be right. WHY stands
in every reason that a server gives, so that a test can look for it in the line that a user gets."""

import copy
import gzip
import json
import re
import time
from email.utils import formatdate

WHY = "because the habit says so"


def _json(value, status=200, headers=()):
    return status, json.dumps(value).encode(), headers


def _changed(change, status=200, headers=()):
    """The answer after `change` has had it."""
    def habit(answer):
        answer = copy.deepcopy(answer)
        return _json(change(answer) or answer, status, headers)

    return habit


def _message(**fields):
    return _changed(lambda a: a["choices"][0]["message"].update(fields))


def _choice(value):
    return _changed(lambda a: a.update(choices=[value]))


def _text(write):
    """The answer with another text: `write(text, letter)`, its letter None where the answer has none."""
    def change(answer):
        message = answer["choices"][0]["message"]
        letter = re.search(r"Final Response: ([AB])$", message["content"])
        message["content"] = write(message["content"], letter[1]) if letter else message["content"]

    return _changed(change)


def _raw(data: bytes, status=200, headers=()):
    return lambda answer: (status, data, headers)


def _error(status, value=None, headers=()):
    return lambda answer: _json({"error": {"message": WHY}} if value is None else value, status, headers)


def _verdict(form: str):
    return _text(lambda text, letter: text.rpartition("\n")[0] + "\n" + form.replace("X", letter))


DETAIL = {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream"], "msg": WHY}]}
PAGE = f"<!DOCTYPE html><html><head><title>502 {WHY}</title></head><body>\n{'x' * 3000}</body></html>".encode()

# read as the answer that they are
READ = {
    "parts": _changed(lambda a: a["choices"][0]["message"].update(content=[
        {"type": "thinking", "thinking": "Final Response: A"}, {"type": "text", "text": a["choices"][0]["message"]["content"]}])),
    "parts in pieces": _changed(lambda a: a["choices"][0]["message"].update(content=[
        {"type": "text", "text": t} for t in re.findall(r".{1,40}", a["choices"][0]["message"]["content"], flags=re.S)])),
    "a byte order mark": lambda a: (200, b"\xef\xbb\xbf" + json.dumps(a).encode(), ()),
    "called HTML": _changed(lambda a: None, headers=[("Content-Type", "text/html; charset=utf-16")]),
    "gzip": lambda a: (200, gzip.compress(json.dumps(a).encode()), [("Content-Encoding", "gzip")]),
    "usage null": _changed(lambda a: a.update(usage=None)), "no usage": _changed(lambda a: a.pop("usage") and None),
    "usage in words": _changed(lambda a: a.update(usage={"prompt_tokens": "many", "completion_tokens": "few"})),
    "usage as text": _changed(lambda a: a.update(usage={k: str(v) for k, v in a["usage"].items()})),
    "usage as float": _changed(lambda a: a.update(usage={k: float(v) for k, v in a["usage"].items()})),
    "usage absurd": _changed(lambda a: a.update(usage={"prompt_tokens": 10**400, "completion_tokens": -1})),
    "two choices": _changed(lambda a: a["choices"].append(a["choices"][0] | {"index": 1})),
    "a fingerprint that is an object": _changed(lambda a: a.update(system_fingerprint={"a": [1]}, model=["m"])),
    "a lone surrogate": _text(lambda text, letter: "\ud83d" + text), "closes": _changed(lambda a: None, headers=[("Connection", "close")]),
    "reasoning beside": _message(reasoning_content="Final Response: B\nFinal Response: A"),
    "(A)": _verdict("Final Response: (X)"), "[[A]]": _verdict("Final Response: [[X]]"), "bold": _verdict("**Final Response:** **X**"),
    "lower case": _text(lambda text, letter: text[:-1].lower() + letter.lower()), "Response A": _verdict("Final Response: Response X"),
    "the next line": _verdict("Final Response:\nX"), "an end token": _verdict("Final Response: X<|im_end|>"),
    "a courtesy": _verdict("Final Response: X\n\nLet me know if you need more!"), "a heading": _verdict("### Final Response: X."),
    "a draft": _text(lambda text, letter: f"<think>\nFinal Response: {'AB'[letter == 'A']}\nno.\n</think>\n\n{text}")}
# no answer, or a failure that may pass: tried again
FAILED = {
    "text, no message": _choice({"index": 0, "text": "Final Response: A", "finish_reason": "stop"}),
    "choices null": _changed(lambda a: a.update(choices=None)), "choices empty": _changed(lambda a: a.update(choices=[])),
    "choices an object": _changed(lambda a: a.update(choices={"0": a["choices"][0]})), "a choice that is text": _choice("Final Response: A"),
    "a choice null": _choice(None), "message null": _choice({"index": 0, "message": None}), "message a list": _choice({"message": ["A"]}),
    "content a number": _message(content=3), "content an object": _message(content={"text": "A"}), "content of numbers": _message(content=[1, 2]),
    "detail in a 200": _raw(json.dumps({"detail": WHY}).encode()), "error in a 200": _error(200), "error text in a 200": _error(200, {"error": WHY}),
    "a page": _raw(b"<html>hello</html>"), "a page with a title": _raw(PAGE), "nothing": _raw(b""), "null": _raw(b"null"), "a list": _raw(b"[]"),
    "a text": _raw(b'"Final Response: A"'), "a stream": _raw(b'data: {"choices": [{"delta": {"content": "A"}}]}\n\ndata: [DONE]\n\n'),
    "half JSON": lambda a: (200, json.dumps(a).encode()[:-20], ()), "a key twice": _raw(b'{"id": "x", "id": "y", "choices": []}'),
    "infinity": lambda a: (200, json.dumps(a)[:-1].encode() + b', "x": 1e999}', ()), "NaN": _raw(b'{"choices": NaN}'),
    "deep": lambda a: (200, json.dumps(a)[:-1].encode() + b', "x": ' + b"[" * 400 + b"]" * 400 + b"}", ()),
    "gzip that is none": _changed(lambda a: None, headers=[("Content-Encoding", "gzip")]), "bytes": _raw(bytes(range(256))),
    "HTTP 429": _error(429), "429 wait 0": _error(429, None, [("Retry-After", "0")]), "429 wait -5": _error(429, None, [("Retry-After", "-5")]),
    "429 wait nan": _error(429, None, [("Retry-After", "nan")]), "429 wait inf": _error(429, None, [("Retry-After", "inf")]),
    "429 wait absurd": _error(429, None, [("Retry-After", "1e99")]), "429 wait until 1970": _error(429, None, [("Retry-After", formatdate(0, usegmt=True))]),
    "429 wait in words": _error(429, None, [("Retry-After", "a while")]), "HTTP 408": _error(408), "HTTP 409": _error(409), "HTTP 425": _error(425),
    "HTTP 500": _error(500), "500 with a list": _error(500, [{"msg": WHY}]), "500 in plain text": _raw(WHY.encode(), 500), "500 empty": _raw(b"", 500),
    "502 with a page": _raw(PAGE, 502), "HTTP 503": _error(503, {"message": WHY}), "HTTP 504": _error(504, {"errors": [WHY]}),
    "HTTP 529": _error(529, {"type": "error", "error": {"type": "overloaded_error", "message": WHY}})}
# refused: asked again by the next command
REFUSED = {"HTTP 501": _error(501), "HTTP 400": _error(400), "400 with a control character": _error(400, {"error": {"message": f"\x1b[31m\u202e{WHY}\r\n\n"}}), "HTTP 402": _error(402),
           "HTTP 405": _error(405), "HTTP 413": _error(413, {"error": {"message": WHY, "param": "messages"}}), "HTTP 422": _error(422, DETAIL),
           "422 in a message": _error(422, {"object": "error", "message": DETAIL}), "HTTP 451": _raw(PAGE, 451)}
# nothing else will fare better: the command ends
ENDS = {"HTTP 401": _error(401), "HTTP 403": _error(403), "HTTP 404": _error(404),
        "quota": _error(429, {"error": {"message": WHY, "code": "insufficient_quota"}}),
        **{f"{code} {where}": _raw(b"", code, [("Location", where)]) for code in (301, 302, 303, 307, 308)
           for where in ("/v1/chat/completions", "http://127.0.0.1:9/v2/chat/completions")},
        "429 an hour": _error(429, None, [("Retry-After", "3600")]),
        "429 until then": lambda a: _json({"error": {"message": WHY}}, 429, [("Retry-After", formatdate(time.time() + 5000, usegmt=True))])}
HABITS = READ | FAILED | REFUSED | ENDS
SILENT = {"nothing", "null", "a list", "500 empty", *(k for k in ENDS if k.startswith("30"))}  # give no reason, or no body
