"""A server of the tests' own: deterministic verdicts in the openai protocol, with faults on demand, its own count of
requests and its own bill. It judges by the texts alone, so that a killed run can be held against an undisturbed one."""

import hashlib
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from judge_habits import HABITS

from repro.sampling import alike
from repro.servers.offers import TEN_WORDS

RATES = (3_000_000, 12_000_000)  # picodollars per token: 3 and 12 USD per million
WORDS = ("the first answer keeps close to what was asked while the second one wanders off and adds details that nobody wanted "
         "although it is written with care and ends on a friendly note that many readers will like").split()


def number(*texts: str) -> int:
    return int(hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12], 16)


class JudgeServer:
    """`faults(k, body)` names the fault of the k-th request (0, 1, ...), or None. `requests` holds (prompt, seed) of
    each; `billed` picodollars; `latency` seconds before each answer; `offers` what it knows beyond plain text. The small
    requests by which a client finds out what it may ask are counted apart: `probes`, `probe_faults`."""

    def __init__(self, faults=lambda k, body: None, *, latency=0.0, offers=("schema", "logprobs"), flips=5, unparsed=17,
                 probe_faults=lambda k, body: None):
        self.probe_faults, self.probes = probe_faults, []
        self.faults, self.latency, self.offers, self.flips, self.unparsed = faults, latency, offers, flips, unparsed
        self.requests, self.bodies, self.fired, self.billed, self.in_flight, self.sent = [], [], [], 0, 0, 0
        self.lock = threading.Lock()

    draws = True  # else it ignores the temperature

    def key(self, body: dict) -> tuple:
        return body["messages"][-1]["content"], body.get("seed")

    def verdict(self, prompt: str, seed: int) -> str | None:
        """The same text wins in both orders, but where the pair's hash says A (a flip) or nothing (unparsed)."""
        mark = re.search(r"^\[[0-9a-f]{8}\]$", prompt, flags=re.M)
        if not mark:
            return "A"  # the request that asks which form of answer is offered
        texts = prompt.split(mark[0])
        first, second = texts[5], texts[7]
        pair = number(*sorted((first, second)))
        if pair % self.unparsed == 0:
            return None
        if pair % self.flips == 0:
            return "A"
        return "A" if number(first) > number(second) else "B"

    def tokens(self, text: str) -> int:
        """This server's own tokenizer: words of up to eight letters, marks, digits."""
        return len(re.findall(r"[^\W\d_]{1,8}|\d|[^\w\s]|\n", text))

    def answer(self, body: dict) -> dict:
        prompt = body["messages"][-1]["content"]
        letter = self.verdict(prompt, body.get("seed"))
        drawn = str(body.get("seed")) if self.draws and prompt == TEN_WORDS else ""
        words = [WORDS[number(prompt + drawn, str(k)) % len(WORDS)] for k in range(75 + number(prompt) % 30)]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
        form = body.get("response_format", {}).get("type")
        if body.get("logprobs") and "logprobs" in self.offers:
            listed = [("The", -0.5), (" A", -1.0 if letter == "A" else -3.0), ("B", -1.0 if letter == "B" else -2.0)]
            choice["message"]["content"] = "The"
            choice["logprobs"] = {"content": [{"token": "The", "logprob": -0.5, "top_logprobs": [
                {"token": t, "logprob": p} for t, p in (listed if letter else listed[:1])]}]}
        elif form == "json_schema" and "schema" in self.offers:
            choice["message"]["content"] = json.dumps({"comparison": " ".join(words), "final_response": letter or "neither"})
        else:
            choice["message"]["content"] = f"Comparison: {' '.join(words)}\nFinal Response: {letter or 'neither'}"
        schema = json.dumps(body["response_format"]) if form else ""  # hosted servers bill it as part of the prompt
        usage = {"prompt_tokens": sum(self.tokens(m["content"]) + 5 for m in body["messages"]) + self.tokens(schema),
                 "completion_tokens": 1 if body.get("logprobs") else self.tokens(choice["message"]["content"])}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}

    def bill(self, answer: dict) -> None:
        usage = answer["usage"]
        with self.lock:
            self.billed += usage["prompt_tokens"] * RATES[0] + usage["completion_tokens"] * RATES[1]

    @contextmanager
    def serve(self):
        server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"judge": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class TextServer(JudgeServer):
    """Continues prompts, which are texts; or, with a `tokenizer` (its tokenizer.json), token ids, as vLLM does. The
    continuation is a function of the prompt; it ends at the end token, at a stop string, or at max_tokens. `lists`: its
    /v1/models, name -> root, beside which it has no models; None: any that is a model's, unlisted. `tells`: of its models, more."""

    END = 2
    any_name, tells = False, {}

    def __init__(self, *args, tokenizer=None, lists=None, secret="", **more):
        from tokenizers import Tokenizer

        super().__init__(*args, **more)
        self.tokenizer, self.lists, self.secret = tokenizer and Tokenizer.from_file(str(tokenizer)), lists, secret

    def key(self, body: dict) -> tuple:
        return body["model"], str(body["prompt"])

    def reads(self, text: str) -> int:
        """Tokens of a prompt of text, by the tiny models' tokenizer."""
        from conftest import byte_tokenizer

        return len(byte_tokenizer()(text).input_ids)

    def continuation(self, prompt: str) -> str:
        seed = number(prompt)
        words = [WORDS[number(str(seed), str(k)) % len(WORDS)] for k in range(1 + seed % 6)]
        return " " + " ".join(words) + "." + ("\n\nHuman: and ### more" if seed % 3 == 0 else "")

    def answer(self, body: dict) -> dict:
        given = body["prompt"]
        text = self.continuation(given if isinstance(given, str) else self.tokenizer.decode(given, skip_special_tokens=False))
        for stop in body.get("stop", ()):
            text = text.partition(stop)[0] + (stop if stop in text else "")
        ids = [*(self.tokenizer.encode(text).ids if self.tokenizer else text.encode()), self.END]
        reason = "stop" if len(ids) <= body["max_tokens"] else "length"
        ids = ids[: body["max_tokens"]]
        choice = {"index": 0, "text": "", "finish_reason": reason, "logprobs": None}
        if not self.tokenizer:
            choice["text"] = bytes(ids if reason == "length" else ids[:-1]).decode()
        elif body.get("return_token_ids"):
            choice |= {"token_ids": ids, "stop_reason": None}
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice],
                "usage": {"prompt_tokens": len(given) if isinstance(given, list) else self.reads(given), "completion_tokens": len(ids), "total_tokens": 0}}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 5 by default: of 8 connections at once some are dropped, and the kernel tries again after 1 s

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for the client's delayed ACK

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.judge.secret and self.headers["Authorization"] != f"Bearer {self.judge.secret}":
            return self.raw(b"{}", 401)
        if self.path.endswith("/models") and self.judge.lists is not None:
            return self.give({"data": [{"id": k, "root": v, **self.judge.tells} for k, v in self.judge.lists.items()]})
        if self.path == "/version" and self.judge.lists is not None:
            return self.give({"version": "0.0.1"})
        self.raw(b"{}", 200 if self.path == "/health" else 500)

    def do_POST(self):
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        lists = getattr(judge, "lists", None)
        if lists is not None and body["model"] not in lists:
            return self.error(404)
        if body["model"] == alike.NOBODY and not judge.any_name:
            return self.error(404)
        probe = body.get("max_tokens") == alike.TOKENS or "messages" in body and any(
            s in body["messages"][-1]["content"] for s in ("Neither response is shown", TEN_WORDS))
        with judge.lock:
            k = len(judge.probes if probe else judge.requests)
            (judge.probes if probe else judge.requests).append(judge.key(body))
            if not probe:
                judge.bodies.append(body)
            judge.in_flight += 1
        try:
            fault = (judge.probe_faults if probe else judge.faults)(k, body)
            if fault:
                judge.fired.append(fault)
            time.sleep(judge.latency)
            if fault in HABITS:  # no name is both a habit's and a fault's (tests/test_judge_server.py)
                answer = judge.answer(body)
                status, data, headers = HABITS[fault](answer)
                if status == 200:
                    judge.bill(answer)
                self.raw(data, status, headers)
            else:
                getattr(self, f"fault_{fault}")(body) if fault else self.give(judge.answer(body))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with judge.lock:
                judge.in_flight -= 1

    def give(self, answer: dict, status=200, headers=()):
        """A whole answer. The bill is written before the first byte: what is lost on the way is paid all the same."""
        if status == 200 and "usage" in answer:
            self.judge.bill(answer)
        self.raw(json.dumps(answer).encode(), status, headers)

    def raw(self, data: bytes, status=200, headers=(), length=None):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(length or len(data))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def error(self, status, headers=(), **more):
        self.give({"error": {"message": f"no: {self.headers['Authorization']}", **more}}, status, headers)

    def fault_429(self, body):
        self.error(429, [("Retry-After", "0.2")])

    def fault_429_date(self, body):
        from email.utils import formatdate
        self.error(429, [("Retry-After", formatdate(time.time() + 1, usegmt=True))])

    def fault_429_garbage(self, body):
        self.error(429, [("Retry-After", "soon")])

    def fault_429_hour(self, body):
        self.error(429, [("Retry-After", "3600")])

    def fault_429_30(self, body):
        self.error(429, [("Retry-After", "30")])

    def fault_no_credit(self, body):
        self.error(429, code="insufficient_quota")

    def fault_500(self, body):
        self.error(500)

    def fault_503(self, body):
        self.raw(b"<html>busy</html>", 503)

    def fault_400(self, body):
        self.error(400)

    def fault_revoked(self, body):
        self.error(401)

    def fault_other_model(self, body):
        self.give(self.judge.answer(body) | {"model": "another"})

    def fault_aborted(self, body):
        answer = self.judge.answer(body)
        answer["choices"][0]["finish_reason"] = "abort"
        self.give(answer)

    def fault_short(self, body):
        answer = self.judge.answer(body)
        answer["choices"][0]["finish_reason"] = "length"
        answer["choices"][0]["token_ids"] = answer["choices"][0]["token_ids"][:1]
        self.give(answer | {"usage": answer["usage"] | {"completion_tokens": 1}})

    def fault_other_prompt(self, body):
        answer = self.judge.answer(body)
        self.give(answer | {"usage": answer["usage"] | {"prompt_tokens": len(body["prompt"]) - 1}})

    def fault_no_ids(self, body):
        answer = self.judge.answer(body)
        answer["choices"][0].pop("token_ids", None)
        self.give(answer)

    def fault_404(self, body):
        self.error(404)

    def fault_timeout(self, body):
        self.judge.bill(self.judge.answer(body))
        time.sleep(2.5)

    def fault_drip(self, body):
        answer = self.judge.answer(body)
        self.judge.bill(answer)
        data = json.dumps(answer).encode()
        self.raw(data[:1], length=len(data))
        for k in range(1, 30):
            time.sleep(0.1)
            self.wfile.write(data[k: k + 1])
            self.wfile.flush()

    def fault_half(self, body):
        answer = self.judge.answer(body)
        self.judge.bill(answer)
        data = json.dumps(answer).encode()
        self.raw(data[: len(data) // 2], length=len(data))
        self.connection.shutdown(socket.SHUT_RDWR)

    def fault_reset(self, body):
        self.connection.shutdown(socket.SHUT_RDWR)

    def fault_garbage(self, body):
        self.raw(b"<html>welcome</html>")

    def fault_nan(self, body):
        self.raw(b'{"choices": NaN}')

    def fault_wrong_schema(self, body):
        self.give({"object": "list", "data": [{"text": "Final Response: A"}]})

    def fault_empty_choices(self, body):
        answer = self.judge.answer(body)
        self.give(answer | {"choices": []})

    def fault_error_in_200(self, body):
        self.give({"error": {"message": f"overloaded, {self.headers['Authorization']}"}})

    def fault_null_content(self, body):
        answer = self.judge.answer(body)
        answer["choices"][0] = {"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}
        self.give(answer)

    def fault_no_usage(self, body):
        answer = self.judge.answer(body)
        self.judge.bill(answer)
        answer.pop("usage")
        self.raw(json.dumps(answer).encode())

    def fault_endless(self, body):
        """An error whose body does not end: what of it was sent is counted."""
        self.raw(b"", 500, length=2**40)
        while self.judge.sent < 2**28:
            self.wfile.write(b"x" * 2**16)
            self.judge.sent += 2**16

    def fault_bomb(self, body):
        import zlib
        packer = zlib.compressobj(1, wbits=31)  # in pieces, since the tests measure memory
        data = b"".join(packer.compress(bytes(2**20)) for _ in range(2**9)) + packer.flush()
        self.raw(data, 500, [("Content-Encoding", "gzip")])

    def fault_nowhere(self, body):
        self.raw(b"", 302, [("Location", "http://[bad")])

    def fault_407(self, body):
        self.error(407)

    def fault_big(self, body):
        self.raw(b" " * (5 * 2**20))
