"""A bounded asynchronous client of an OpenAI-compatible server that loses nothing and never overspends.

What the ledger (repro/endpoint.py) has an answer to is not asked; a kill re-asks at most the requests in flight. The
openai client's own retries are off and ours are counted, because every attempt may be billed; what was billed plus the
most that is in flight never exceeds the budget. One deadline bounds a whole request: the client's own timeout does not
end an answer that drips.
"""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime

from tqdm import tqdm

from repro.endpoint import PICO, Call, Endpoint, Ledger, wrong_shape
from repro.records import first_line, loads

MAX_BODY = 4 * 2**20   # bytes of one answer
MAX_WAIT = 60.0        # seconds of a Retry-After that are waited; a longer one ends the run
IN_A_ROW = 8           # calls that fail one after the other before the server counts as down
ASKED_AGAIN = 1        # how often an answer that cannot be used is asked for again, in all


class _Failed(Exception):
    """One attempt failed. `cost` in picodollars, None where the server may have billed it in full. `wait`: seconds that
    the server asks for. `again`: worth another attempt. `fatal`: no other request will fare better."""

    def __init__(self, error: str, *, cost: int | None = 0, wait: float | None = None, again=True, fatal=False):
        super().__init__(error)
        self.cost, self.wait, self.again, self.fatal = cost, wait, again, fatal


def redact(text: str, key: str) -> str:
    """The text with every piece of the key (8 characters or more) blacked out: servers echo keys in their errors."""
    hidden = bytearray(len(text))
    size = min(8, len(key))
    for k in range(len(key) - size + 1 if key else 0):
        piece, at = key[k: k + size], -1
        while (at := text.find(piece, at + 1)) >= 0:
            hidden[at: at + size] = b"\1" * size
    return re.sub("\0+", "[key]", "".join("\0" if h else c for c, h in zip(text, hidden))) if any(hidden) else text


class Asker:
    """Asks the calls that the ledger has no usable answer to. `usable(answer)` is False for an answer that is to be
    asked for again (with the next seed); `wrong(answer, request)` says what makes one a failure of the server, to be
    tried again as such. After `run`, `stopped` says why it ended early, or is None."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger, usable: Callable[[dict], bool] = lambda answer: True,
                 wrong: Callable[[dict, dict], str | None] = lambda answer, request: None):
        self.endpoint, self.ledger, self.usable, self.wrong = endpoint, ledger, usable, wrong
        self.stopped: str | None = None
        self._cap = round(endpoint.max_usd * PICO)
        self._reserved, self._in_flight, self._row = 0, 0, 0
        self._not_before = 0.0

    def missing(self, calls: Iterable[Call]) -> list[Call]:
        """The calls still to make, each key once, in order."""
        return [c for c in {c.key: c for c in calls}.values() if self._wanted(c.key)]

    def _wanted(self, key: str) -> bool:
        answers = self.ledger.answers.get(key, [])
        return len(answers) <= ASKED_AGAIN and not any(map(self.usable, answers))

    def run(self, calls: Iterable[Call], *, label: str = "requests") -> None:
        todo = self.missing(calls)
        if todo:
            key = self.endpoint.key()
            self.endpoint.rates()
            asyncio.run(self._run(todo, key, label))

    async def _run(self, todo: list[Call], key: str, label: str) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

        direct = {"http_client": DefaultAsyncHttpx2Client(trust_env=False)} if self.endpoint.local else {}  # past any proxy
        self._settled, self._end = asyncio.Condition(), asyncio.Event()
        queue = iter(todo)
        async with AsyncOpenAI(api_key=key or "none", base_url=self.endpoint.url, max_retries=0,
                               timeout=self.endpoint.deadline_s, **direct) as client:
            with tqdm(total=len(todo), desc=label, unit="request", disable=None) as bar:
                async def worker():
                    for call in queue:
                        await self._ask(client, key, call)
                        bar.update()
                        if self.stopped:
                            return

                await asyncio.gather(*(worker() for _ in range(min(self.endpoint.concurrency, len(todo)))))

    async def _ask(self, client, key: str, call: Call) -> None:
        most = self.endpoint.cost(call.max_prompt_tokens, call.max_completion_tokens)
        failures = 0
        while self._wanted(call.key):
            if not await self._reserve(most):
                return
            try:
                failure = await self._attempt(client, key, call, most)
            finally:
                async with self._settled:
                    self._reserved -= most
                    self._in_flight -= 1
                    self._settled.notify_all()
            if failure is None:
                self._row = 0
                continue
            failures += 1
            if failure.fatal:
                self._stop(str(failure))
                return
            if failure.wait is not None and failure.wait > MAX_WAIT:
                at = time.strftime("%H:%M", time.localtime(time.time() + failure.wait))
                self._stop(f"{failure}; the server asks to wait {failure.wait:.0f} s: come back at {at}")
                return
            if not failure.again or failures >= self.endpoint.attempts:
                self._row += 1
                if self._row >= IN_A_ROW:
                    self._stop(f"{IN_A_ROW} requests in a row failed, the last with: {failure}")
                return
            jitter = random.Random(f"{call.key}/{failures}").uniform(0.5, 1)
            wait = min(MAX_WAIT, self.endpoint.backoff_s * 2 ** (failures - 1)) * jitter
            if failure.wait is not None:  # everyone waits: the limit is the account's, not this request's
                wait = max(0.0, failure.wait)
                self._not_before = max(self._not_before, time.monotonic() + wait)
            await self._pause(wait)

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or why
        self._end.set()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past the end of the run."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), seconds)

    async def _reserve(self, most: int) -> bool:
        """Wait until the budget holds the most that this attempt can cost; False once it never will."""
        while (wait := self._not_before - time.monotonic()) > 0 and not self.stopped:
            await self._pause(wait)
        async with self._settled:
            while not self.stopped and self.ledger.spent + self._reserved + most > self._cap:
                if not self._in_flight:
                    self._stop(f"the budget is used up: {self.ledger.spent / PICO:.4f} USD of --max-usd "
                               f"{self.endpoint.max_usd:g} spent, and the next request may cost {most / PICO:.4f}")
                    break
                await self._settled.wait()
            if self.stopped:
                return False
            self._reserved += most
            self._in_flight += 1
            return True

    async def _attempt(self, client, key: str, call: Call, most: int) -> _Failed | None:
        """Send once; both lines. Between them the ledger's own sum does not hold this attempt: `_reserved` does."""
        request = dict(call.request)
        if "seed" in request:
            request["seed"] += len(self.ledger.answers.get(call.key, []))
        number = self.ledger.begin(call, most)
        try:
            answer = await self._send(client, key, request)
        except _Failed as e:
            cost = most if e.cost is None else e.cost
            self.ledger.end(call, number, cost, status="failed", error=str(e))
            return e
        self.ledger.end(call, number, self._billed(answer, most), status="answered", answer=answer)
        return None

    def _billed(self, answer: dict, otherwise: int | None) -> int | None:
        usage = answer.get("usage")
        counts = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
        if len(counts) != 2 or not all(type(n) is int and n >= 0 for n in counts):
            return otherwise
        return self.endpoint.cost(*counts)

    async def _send(self, client, key: str, request: dict) -> dict:
        """The server's answer, checked for shape; raises _Failed for everything else that can happen."""
        import httpx2
        import openai

        body = bytearray()
        try:
            async with asyncio.timeout(self.endpoint.deadline_s):
                create = client.completions if "prompt" in request else client.chat.completions
                async with create.with_streaming_response.create(
                        model=self.endpoint.model, **request) as response:
                    async for chunk in response.iter_bytes():
                        body += chunk
                        if len(body) > MAX_BODY:
                            raise _Failed(f"an answer of more than {MAX_BODY >> 20} MiB", cost=None)
        except (TimeoutError, openai.APITimeoutError):
            raise _Failed(f"no whole answer within {self.endpoint.deadline_s:g} s", cost=None) from None
        except openai.APIStatusError as e:
            raise self._refused(e, key) from None
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            refused = isinstance(cause, httpx2.ConnectError)
            raise _Failed(f"no connection to {self.endpoint.host}: {redact(first_line(cause), key)}",
                          cost=0 if refused else None) from None
        except (openai.OpenAIError, httpx2.HTTPError, OSError) as e:
            raise _Failed(f"the answer was cut: {redact(first_line(e), key)[:200]}", cost=None) from None
        text = redact(body.decode("utf-8", "replace"), key)
        try:
            answer = loads(text)
        except ValueError:
            raise _Failed(f"not JSON: {text[:80]!r}", cost=None) from None
        wrong = wrong_shape(answer) or self.wrong(answer, request)
        if wrong:
            raise _Failed(f"{wrong}: {text[:120]!r}", cost=self._billed(answer, None) if isinstance(answer, dict) else None)
        return answer

    def _refused(self, e, key: str) -> _Failed:
        """An HTTP error as what to do about it. Servers do not bill these."""
        said = redact(f"HTTP {e.status_code}: {first_line(e)}", key)[:240]
        body = e.body if isinstance(e.body, dict) else {}
        if e.status_code in (401, 403):
            return _Failed(f"the server refused the key in ${self.endpoint.key_env} ({said})", fatal=True)
        if e.status_code == 404:
            return _Failed(f"{self.endpoint.url} has no model {self.endpoint.model!r} or no such path ({said})", fatal=True)
        if e.status_code == 429 and "insufficient_quota" in (body.get("code"), body.get("type")):
            return _Failed(f"the account has no credit left ({said})", fatal=True)
        again = e.status_code in (408, 409, 425, 429) or e.status_code >= 500
        return _Failed(said, wait=_retry_after(e.response.headers.get("retry-after")), again=again)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None where there is none, or none that makes sense."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return seconds if 0 <= seconds < 10**7 else None
