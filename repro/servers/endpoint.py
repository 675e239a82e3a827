"""An OpenAI-compatible server: where it is, its key, what its use costs, and what an answer must look like."""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import urlsplit

from repro.base.checks import setting
from repro.base.records import UserError, dumps

HOSTED = "https://api.openai.com/v1"
PRICES_OF = "2026-06-21"
PRICES = {  # USD per million prompt and completion tokens on that date; --price overrides
    "gpt-5": (1.25, 10.0), "gpt-5-mini": (0.25, 2.0), "gpt-5-nano": (0.05, 0.4),
    "gpt-4.1": (2.0, 8.0), "gpt-4.1-mini": (0.4, 1.6), "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0), "gpt-4o-mini": (0.15, 0.6)}
PICO = 10**12
BASE_URL = "OPENAI_BASE_URL"
LEAVABLE = ("seed", "temperature", "max_tokens")  # the last is sent as max_completion_tokens instead


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible server and the limits of its use. `flag` gives its address, in messages; what
    it is not sent, where nothing is said, offers.py finds out."""

    model: str
    base_url: str | None = setting(None, "base_url")
    """Any OpenAI-compatible server, such as http://127.0.0.1:8000/v1; by default the hosted one."""
    key_env: str = setting("OPENAI_API_KEY", "key_env")
    """The environment variable that holds the key."""
    leave_out: tuple[str, ...] | None = setting(None, "leave_out")
    """What the server is not sent: any of seed, temperature, max_tokens (max_completion_tokens goes in its place), or
    nothing. By default found out by a small request."""
    price: tuple[float, float] | None = setting(None, "price")
    """USD per million prompt and completion tokens; by default a dated table, and 0 for a server on this machine."""
    max_usd: float = setting(10.0, "max_usd")
    """What the server may cost in a run's folder, earlier runs included; never exceeded."""
    concurrency: int = setting(8, "concurrency")
    """Requests in flight, at most."""
    deadline_s: float = setting(120.0, "deadline")
    """Seconds for one whole request, to its last byte."""
    attempts: int = setting(5, "attempts")
    """Tries of one request whose server fails, per run of the command."""
    backoff_s: float = 1.0
    flag: str = "--base-url"

    def __post_init__(self):
        named = self.flag if self.base_url else f"{self.flag} (${BASE_URL})"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):  # not shown: it may be the key itself
            raise UserError("--key-env: must be the name of an environment variable (letters, digits and _)")
        if self.base_url == "":  # as of a variable that is not set: not a reason to ask, and pay, the hosted one
            raise UserError(f"{self.flag}: empty; give a server's address, or leave it out for {HOSTED}")
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none, half an IPv6 address
            good = False
        if not good or " " in self.url or not self.url.isprintable():  # urlsplit drops line breaks; httpx2 (2.16) refuses
            raise UserError(f"{named}: expected http(s)://host[:port]/path, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(f"{named}: no user, password or query in it; a key comes from ${self.key_env} alone")
        for name in self.leave_out or ():
            if name not in (*LEAVABLE, "nothing") or (name == "nothing" and len(self.leave_out) > 1):
                raise UserError(f"--leave-out: {name!r}; allowed: any of {', '.join(LEAVABLE)}, or nothing alone")
        if self.leave_out is not None:
            object.__setattr__(self, "leave_out", tuple(n for n in LEAVABLE if n in self.leave_out))
        if self.price is not None and not all(0 <= p < 10**6 for p in self.price):
            raise UserError(f"--price: {self.price}; both must be USD per million tokens, 0 or more")
        for name in ("concurrency", "deadline_s", "attempts"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.removesuffix('_s')}: {getattr(self, name)!r}; must be above 0")
        if not 0 <= self.max_usd < 9000:  # a double holds every picodollar below that
            raise UserError(f"--max-usd: {self.max_usd}; must be from 0 to 9000")

    @property
    def url(self) -> str:
        return (self.base_url or os.environ.get(BASE_URL) or HOSTED).rstrip("/")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname

    @property
    def local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    def key(self) -> str:
        """The key, from the environment; a server on this machine or network may need none."""
        key = os.environ.get(self.key_env, "").strip()
        _in_header(self.key_env, key)
        if not key and self.url == HOSTED:
            raise UserError(f"{HOSTED} needs a key in ${self.key_env}, which is not set")
        return key

    def check(self) -> None:
        """Raise UserError, before any request, for whatever in the environment no request can be made with: openai (3.52)
        and httpx2 (2.16) raise UnicodeEncodeError, ImportError or ValueError, in the first request or before it."""
        self.key(), self.rates()
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):  # the client sends them as headers
            _in_header(name, os.environ.get(name, ""))
        if not self.local:  # else no proxy stands between
            check_proxies()

    def rates(self) -> tuple[int, int]:
        """Picodollars per prompt and per completion token. A server on this machine is free unless a price is given."""
        name = re.sub(r"-20\d\d-\d\d-\d\d$", "", self.model)
        price = self.price or (PRICES.get(name) if self.url == HOSTED else (0.0, 0.0) if self.local else None)
        if price is None:
            raise UserError(f"no price is known for {self.model!r} at {self.host} (table of {PRICES_OF}); give --price IN "
                            "OUT, in USD per million prompt and completion tokens")
        return round(price[0] * 10**6), round(price[1] * 10**6)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Picodollars."""
        into, out = self.rates()
        return prompt_tokens * into + completion_tokens * out


def _in_header(name: str, value: str) -> None:
    """Raise UserError, without the value, where an HTTP header cannot hold it."""
    for k, c in enumerate(value, start=1):
        if not "!" <= c <= "~":
            what = unicodedata.name(c, f"U+{ord(c):04X}")
            raise UserError(f"${name}: character {k} is {what}, which no HTTP header takes; set it again, typed or pasted "
                            "as plain text")


def check_proxies() -> None:
    """Raise UserError, naming the variable, for a proxy that httpx2 cannot take. Its address is not shown: it may hold a
    password."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        if not (value := os.environ.get(name)):
            continue
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            good = parts.hostname and value.isprintable() and value.isascii() and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise UserError(f"${name}: not the address of a proxy; expected http://host:port, or unset it")
        if parts.scheme in ("socks5", "socks5h") and not find_spec("socksio"):
            raise UserError(f"${name}: a {parts.scheme} proxy needs the package socksio (pip install socksio); or name an "
                            "http:// proxy, or unset it")
        if parts.scheme not in ("http", "https", "socks5", "socks5h"):
            raise UserError(f"${name}: a proxy of the scheme {parts.scheme!r}; allowed are http, https, socks5 and "
                            "socks5h; or unset it")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request: `key` names it for ever, `request` goes over the wire (with the model), `about` is for readers."""

    key: str
    request: dict
    about: dict = field(default_factory=dict)

    @property
    def prompt(self) -> str | list[int] | None:
        """Text or token ids to continue; None of a chat."""
        return self.request.get("prompt")

    @property
    def text(self) -> str:
        schema = self.request.get("response_format")
        return "".join(m["content"] for m in self.request["messages"]) + (dumps(schema) if schema else "")

    @property
    def max_prompt_tokens(self) -> int:
        """No tokenizer makes more tokens than bytes; a template adds a few per message."""
        if self.prompt is not None:
            return 1 + len(self.prompt if isinstance(self.prompt, list) else self.prompt.encode("utf-8", "surrogatepass"))
        return len(self.text.encode("utf-8", "surrogatepass")) + 32 * (1 + len(self.request["messages"]))

    @property
    def max_completion_tokens(self) -> int:
        return self.request.get("max_tokens") or self.request["max_completion_tokens"]


def count_tokens(text: str) -> int:
    """About how many tokens a byte-pair tokenizer makes of a text: for estimates (within 10 % on English prose)."""
    return sum(1 + (len(piece.encode("utf-8", "surrogatepass")) - 1) // 7
               for piece in re.findall(r"[^\W\d_]+|\d{1,3}|_|[^\w\s]|\n+", text))


# ---- a server's answer

def wrong_shape(answer, *, chat: bool = True) -> str | None:
    """What keeps a completion (of a chat, else of a prompt) from being one, in words; None where nothing does."""
    if not isinstance(answer, dict):
        return "not a JSON object"
    if answer.get("error"):
        return "an error inside a 200"
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        return "no choices"
    first = choices[0] if isinstance(choices[0], dict) else {}
    if not chat:
        return None if isinstance(first.get("text"), str) else "no text in the first choice"
    message = first.get("message")
    if not isinstance(message, dict):
        return "no message in the first choice"
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        return None
    return None if isinstance(content, str | None) else "a message whose content is neither text nor parts"


def text_of(answer: dict) -> str:
    """The text of a chat's answer, "" where there is none: of a content in parts, those that are text and no thoughts."""
    content = answer["choices"][0]["message"].get("content")
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text") else part
             for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def was_cut(answer: dict) -> bool:
    """Whether the answer ended at the cap on its tokens."""
    return answer["choices"][0].get("finish_reason") in ("length", "max_tokens", "MAX_TOKENS")


def shown(text: str, most: int = 200, *, end: bool = False) -> str:
    """A stranger's text for a message: one line, at most `most` characters of it (`end`: its last), and nothing in it that
    a terminal obeys."""
    flat = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return flat if len(flat) <= most else f"...{flat[-most:]}" if end else f"{flat[:most]}..."
