"""The ledger of what was sent to a server (JSONL, appended and fsynced): an attempt line before each send and an outcome
line after it. What has an answer there is never asked again. Money is counted in whole picodollars: what was billed, and
for an attempt without an outcome (a kill) the most that it can have cost.
"""

from collections import Counter
from pathlib import Path

from repro.base.records import UserError, append_jsonl, numbered_jsonl
from repro.servers.endpoint import PICO, Call, wrong_shape


def is_line(row: dict) -> bool:
    """Whether a row of a file is a ledger's."""
    return row.get("record") in ("attempt", "outcome")


def lines_of(path: Path) -> list[tuple[str, dict]]:
    """("file:line", row) of a file's attempt and outcome lines, oldest first; none where there is no file."""
    rows = numbered_jsonl(path, torn_tail=True) if path.exists() else ()
    return [(f"{path}:{number}", row) for number, row in rows if is_line(row)]


class Ledger:
    """The attempt and outcome lines of one owner (say {"judge": name}; {}: of all) in a JSONL file that may hold others.

    `answers`: key -> the server's answers, oldest first. `errors`: key -> why its last attempt failed, if it did;
    `failures`: how often each. `spent`: picodollars billed, and at most billed where no
    outcome was written. `open`: attempts without outcome, left by a kill: possibly paid twice. `chat`: what the answers
    must be. One that is none, as older versions kept, is paid for and a failure: asked for again.
    """

    def __init__(self, path: Path, owner: dict, *, chat: bool = True):
        self.path, self.owner, self.chat = Path(path), owner, chat
        self.answers: dict[str, list[dict]] = {}
        self.errors: dict[str, str] = {}
        self.failures: Counter[str] = Counter()
        self.numbers: dict[str, int] = {}
        self.spent = 0
        waiting: dict[tuple[str, int], int] = {}
        for where, row in self.lines():
            if any(row.get(k) != v for k, v in owner.items()):
                continue
            try:
                if row["record"] == "attempt":
                    waiting[row["key"], row["attempt"]] = round(row["reserved_usd"] * PICO)
                    self.numbers[row["key"]] = row["attempt"]
                else:
                    del waiting[row["key"], row["attempt"]]
                    self._settle(row)
            except (KeyError, TypeError) as e:
                raise UserError(f"{where}: not a line of a ledger ({type(e).__name__}: {e})") from None
        self.open = len(waiting)
        self.spent += sum(waiting.values())

    def lines(self) -> list[tuple[str, dict]]:
        """("file:line", row) of what was written before, of every owner."""
        return lines_of(self.path)

    def _settle(self, row: dict) -> None:
        self.spent += round(row["usd"] * PICO)
        error = wrong_shape(row["answer"], chat=self.chat) if row["status"] == "answered" else row["error"]
        if error is None:
            self.answers.setdefault(row["key"], []).append(row["answer"])
            self.errors.pop(row["key"], None)
        else:
            self.errors[row["key"]] = error
            self.failures[error] += 1

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
