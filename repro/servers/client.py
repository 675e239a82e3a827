"""A bounded asynchronous client of an OpenAI-compatible server that loses nothing and never overspends.

What the ledger (servers/endpoint.py) has an answer to is not asked; a kill re-asks at most the requests in flight. The
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
from urllib.parse import urljoin

from tqdm import tqdm

from repro.base.records import UserError, dumps, first_line, loads
from repro.servers.endpoint import PICO, Call, Endpoint, shown, wrong_shape
from repro.servers.ledger import Ledger
from repro.servers.words import TITLE, reason, redact, redacted

MAX_BODY = 4 * 2**20   # bytes of one answer
MAX_ERROR = 2**16      # bytes read of an error's body, as they were sent
MAX_COUNT = 10**9      # tokens that a server can have counted
MAX_WAIT = 60.0        # seconds of a Retry-After that are waited; a longer one ends the run
IN_A_ROW = 8           # calls that fail one after the other before the server counts as down
ASKED_AGAIN = 1        # how often an answer that cannot be used is asked for again, in all


class _Failed(Exception):
    """One attempt failed. `cost` in picodollars, None where the server may have billed it in full. `wait`: seconds that
    the server asks for. `again`: worth another attempt. `fatal`: no other request will fare better."""

    def __init__(self, error: str, *, cost: int | None = 0, wait: float | None = None, again=True, fatal=False):
        super().__init__(error)
        self.cost, self.wait, self.again, self.fatal = cost, wait, again, fatal


def http_client(kind: Callable, **options):
    """An HTTP client of httpx2, the one that the openai package brings; `kind` makes it. Raises UserError where none can
    be made of the proxies and certificates that the environment names."""
    try:
        return kind(**options)
    except Exception as e:
        raise UserError(f"no connection can be set up: {first_line(e)} (see $SSL_CERT_FILE, $SSL_CERT_DIR, $NO_PROXY "
                        "and the proxies' variables)") from None


async def _cut_error(response) -> None:
    """Let no more than MAX_ERROR bytes of an error's body be read: openai's client (3.52) reads it to its end, however
    far that is, into memory."""
    import httpx2

    class Head(httpx2.AsyncByteStream):
        def __init__(self, stream):
            self.stream = stream

        async def __aiter__(self):
            left = MAX_ERROR
            async for chunk in self.stream:
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return

        async def aclose(self):
            await self.stream.aclose()

    if response.status_code >= 300:
        response.stream = Head(response.stream)


def _untold(loop, context: dict) -> None:
    """A signal's exception, raised in whatever request was being looked at, ends the loop: it is no request's failure to
    tell of, with a traceback, once the run has said that it stopped."""
    if not isinstance(context.get("exception"), SystemExit | KeyboardInterrupt):
        loop.default_exception_handler(context)


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
            self.endpoint.check()
            key = self.endpoint.key()
            asyncio.run(self._run(todo, key, label))

    async def _run(self, todo: list[Call], key: str, label: str) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

        asyncio.get_running_loop().set_exception_handler(_untold)
        # openai's own client (3.52) follows 20 redirects of a POST, each a request that nobody counts
        http = http_client(DefaultAsyncHttpx2Client, trust_env=not self.endpoint.local, follow_redirects=False,
                           event_hooks={"response": [_cut_error]},
                           # plain HTTP, no proxy, no redirect: no certificate, and to read the system's takes 30 ms
                           verify=not (self.endpoint.local and self.endpoint.url.startswith("http:")))
        self._settled, self._end = asyncio.Condition(), asyncio.Event()
        queue = iter(todo)
        async with AsyncOpenAI(api_key=key or "none", base_url=self.endpoint.url, max_retries=0,
                               timeout=self.endpoint.deadline_s, http_client=http) as client:
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
                wait = max(wait, failure.wait)  # a server that says 0 is not asked in a loop
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
        usage = usage if isinstance(usage, dict) else {}
        counts = [_count(usage.get(k)) for k in ("prompt_tokens", "completion_tokens")]
        if None in counts:
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
            raise _Failed(f"the answer was cut: {shown(redact(first_line(e), key))}", cost=None) from None
        except (ValueError, httpx2.InvalidURL) as e:
            raise _Failed(f"no request can be made of this ({shown(redact(first_line(e), key))})", fatal=True) from None
        text = body.decode("utf-8-sig", "replace")
        try:
            answer = redacted(loads(text), key)
            dumps(answer)  # a number that no JSON holds (1e999) could not be kept
        except (ValueError, RecursionError):
            stream = " but a stream of events, which was not asked for" * bool(re.match(r"\s*(data|event|id|:)", text))
            raise _Failed(f"not JSON{stream}: {_begins(text, key)}", cost=None) from None
        wrong = wrong_shape(answer, chat="messages" in request) or self.wrong(answer, request)
        if wrong:
            said = reason(dumps(answer)) if isinstance(answer, dict) and answer.get("error", answer.get("detail")) else ""
            raise _Failed(f"{wrong}: {said or _begins(text, key)}",
                          cost=self._billed(answer, None) if isinstance(answer, dict) else None)
        return answer

    def _refused(self, e, key: str) -> _Failed:
        """An HTTP error as what to do about it. Servers do not bill these."""
        try:
            text = e.response.content.decode("utf-8-sig", "replace")
        except RuntimeError:  # a body that was not read
            text = first_line(e)
        said = redact(f"HTTP {e.status_code}: {reason(text)}", key)
        body = e.body if isinstance(e.body, dict) else {}
        if 300 <= e.status_code < 400 and (to := e.response.headers.get("location")):
            with contextlib.suppress(ValueError):  # of an address that is none
                to = urljoin(f"{self.endpoint.url}/", to).removesuffix("/chat/completions").removesuffix("/completions")
            return _Failed(f"{self.endpoint.url} sends its requests on to {shown(redact(to, key))} (HTTP {e.status_code}), "
                           f"where none goes unless {self.endpoint.flag} names it", fatal=True)
        if e.status_code == 407:
            return _Failed(f"the proxy before {self.endpoint.host} wants a login ({said}): give it in $HTTPS_PROXY or "
                           "$HTTP_PROXY (http://user:password@host:port)", fatal=True)
        if e.status_code in (401, 403):
            return _Failed(f"the server refused the key in ${self.endpoint.key_env} ({said})", fatal=True)
        if e.status_code == 404:
            return _Failed(f"{self.endpoint.url} has no model {self.endpoint.model!r} or no such path ({said})", fatal=True)
        if e.status_code == 429 and "insufficient_quota" in (body.get("code"), body.get("type")):
            return _Failed(f"the account has no credit left ({said})", fatal=True)
        again = e.status_code in (408, 409, 425, 429) or (e.status_code >= 500 and e.status_code not in (501, 505))
        return _Failed(said, wait=_retry_after(e.response.headers.get("retry-after")), again=again)


def _begins(text: str, key: str) -> str:
    """How an answer that is none begins; of a page with a title, that."""
    if TITLE.search(text[:10**5]):
        return repr(redact(reason(text), key))
    return repr(redact(shown(text, 120), key)) if text.strip() else "nothing at all"


def _count(value) -> int | None:
    """A count of tokens, which some servers write as 10.0 or "10"; None where it is none."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT and value == int(value):
        return int(value)
    return None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None where there is none, or none that makes sense: 0, the
    past, months from now. Then the wait is ours, which doubles."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return seconds if 0 < seconds < 10**7 else None
