"""One GET or POST of JSON to a server that is looked at, beside the client that asks it for answers (client.py)."""

import functools
from contextlib import nullcontext, suppress

from repro.base.records import dumps, first_line, loads
from repro.servers.client import MAX_ERROR, http_client
from repro.servers.endpoint import shown
from repro.servers.words import reason, redact


class Refused(OSError):
    """An HTTP status that is no success, with the server's own reason."""

    def __init__(self, status: int, said: str):
        super().__init__(f"HTTP {status}: {said}")
        self.status = status


@functools.cache
def _http():
    """No proxy stands between (a transport of our own takes none from the environment), no redirect is followed, and no
    connection is kept."""
    import httpx2

    transport = http_client(httpx2.HTTPTransport, limits=httpx2.Limits(max_keepalive_connections=0))
    return http_client(httpx2.Client, transport=transport)


def get_json(url: str, key: str = "", body: dict | None = None, timeout: float = 10.0):
    """The JSON that a GET, or a POST of `body`, is answered with ({} where there is none). Raises OSError where no answer
    comes within `timeout` seconds of silence or it is no success (Refused), ValueError where it is no JSON."""
    import httpx2

    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    method, data, text = ("GET", None, bytearray()) if body is None else ("POST", dumps(body).encode(), bytearray())
    try:
        with _http().stream(method, url, content=data, headers=headers, timeout=timeout) as answer:
            good = answer.is_success
            with nullcontext() if good else suppress(httpx2.HTTPError):  # of an error, what came of its body
                for chunk in answer.iter_bytes():
                    text += chunk
                    if len(text) > MAX_ERROR and not good:
                        break
    except (httpx2.HTTPError, httpx2.InvalidURL) as e:
        raise ConnectionError(first_line(e)) from None
    text = text.decode("utf-8", "replace")
    if not good:
        to = answer.headers.get("location") if answer.status_code < 400 else None
        said = f"it sends on to {to}, where none goes unless --sampler-url names it" if to else reason(text)
        raise Refused(answer.status_code, redact(shown(said), key))
    return loads(text) if text.strip() else {}
