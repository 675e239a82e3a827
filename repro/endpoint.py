"""An OpenAI-compatible server, what its use costs, and the ledger of what was sent to it (repro/asking.py sends).

The ledger (JSONL, appended and fsynced) gets an attempt line before each send and an outcome line after it. What has
an answer there is never asked again. Money is counted in whole picodollars: what was billed, and for an attempt without
an outcome (a kill) the most that it can have cost.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from repro.records import UserError, append_jsonl, dumps, read_jsonl

HOSTED = "https://api.openai.com/v1"
PRICES_OF = "2026-06-21"
PRICES = {  # USD per million prompt and completion tokens on that date; --price overrides
    "gpt-5": (1.25, 10.0), "gpt-5-mini": (0.25, 2.0), "gpt-5-nano": (0.05, 0.4),
    "gpt-4.1": (2.0, 8.0), "gpt-4.1-mini": (0.4, 1.6), "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0), "gpt-4o-mini": (0.15, 0.6)}
PICO = 10**12


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server and the limits of its use. `key_env` names the environment variable that holds the key; `price` is
    USD per million prompt and completion tokens; `deadline_s` bounds one whole request, to its last byte."""

    model: str
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    price: tuple[float, float] | None = None
    max_usd: float = 10.0
    concurrency: int = 8
    deadline_s: float = 120.0
    attempts: int = 5
    backoff_s: float = 1.0

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("--base-url: expected http(s)://host[:port]/path, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(f"--base-url: no user, password or query in it; a key comes from ${self.key_env} alone")
        if self.price is not None and not all(0 <= p < 10**6 for p in self.price):
            raise UserError(f"--price: {self.price}; both must be USD per million tokens, 0 or more")
        for name in ("concurrency", "deadline_s", "attempts"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.removesuffix('_s')}: {getattr(self, name)!r}; must be above 0")
        if not 0 <= self.max_usd < 9000:  # a double holds every picodollar below that
            raise UserError(f"--max-usd: {self.max_usd}; must be from 0 to 9000")

    @property
    def url(self) -> str:
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or HOSTED).rstrip("/")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname

    @property
    def local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    def key(self) -> str:
        """The key, from the environment; a server on this machine or network may need none."""
        key = os.environ.get(self.key_env, "").strip()
        if not key and self.url == HOSTED:
            raise UserError(f"{HOSTED} needs a key in ${self.key_env}, which is not set")
        return key

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


def wrong_shape(answer) -> str | None:
    """What keeps a completion (of a chat or a prompt) from being one, in words; None where nothing does."""
    if not isinstance(answer, dict):
        return "not a JSON object"
    if answer.get("error"):
        return "an error inside a 200"
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        return "no choices"
    if isinstance(choices[0], dict) and isinstance(choices[0].get("text"), str):
        return None
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        return "no message in the first choice"
    return None


# ---- the ledger

class Ledger:
    """The attempt and outcome lines of one owner (say {"judge": name}) in a JSONL file that may hold other lines.

    `answers`: key -> the server's answers, oldest first. `errors`: key -> why its last attempt failed, if it did;
    `failures`: how often each. `spent`: picodollars billed, and at most billed where no
    outcome was written. `open`: attempts without outcome, left by a kill: possibly paid twice.
    """

    def __init__(self, path: Path, owner: dict):
        self.path, self.owner = Path(path), owner
        self.answers: dict[str, list[dict]] = {}
        self.errors: dict[str, str] = {}
        self.failures: Counter[str] = Counter()
        self.numbers: dict[str, int] = {}
        self.spent = 0
        waiting: dict[tuple[str, int], int] = {}
        for line, row in read_jsonl(self.path, torn_tail=True) if self.path.exists() else ():
            if row.get("record") not in ("attempt", "outcome") or any(row.get(k) != v for k, v in owner.items()):
                continue
            try:
                if row["record"] == "attempt":
                    waiting[row["key"], row["attempt"]] = round(row["reserved_usd"] * PICO)
                    self.numbers[row["key"]] = row["attempt"]
                else:
                    del waiting[row["key"], row["attempt"]]
                    self._settle(row)
            except (KeyError, TypeError) as e:
                raise UserError(f"{self.path}:{line}: not a line of a ledger ({type(e).__name__}: {e})") from None
        self.open = len(waiting)
        self.spent += sum(waiting.values())

    def _settle(self, row: dict) -> None:
        self.spent += round(row["usd"] * PICO)
        if row["status"] == "answered":
            if wrong := wrong_shape(row["answer"]):
                raise TypeError(wrong)
            self.answers.setdefault(row["key"], []).append(row["answer"])
            self.errors.pop(row["key"], None)
        else:
            self.errors[row["key"]] = row["error"]
            self.failures[row["error"]] += 1

    def begin(self, call: Call, reserved: int) -> int:
        """The attempt line; returns the attempt's number."""
        number = self.numbers[call.key] = self.numbers.get(call.key, 0) + 1
        append_jsonl(self.path, [{"record": "attempt", **self.owner, **call.about, "key": call.key, "attempt": number,
                                  "reserved_usd": reserved / PICO}])
        return number

    def end(self, call: Call, number: int, cost: int, **outcome) -> None:
        row = {"record": "outcome", **self.owner, "key": call.key, "attempt": number, "usd": cost / PICO, **outcome}
        append_jsonl(self.path, [row])
        self._settle(row)
