"""What judging leaves in a folder: judgments.jsonl, the judgments of all judges, replaced as a whole by each judging; and
judge_requests.jsonl, the ledger of what LLM judges were asked and answered, which is only ever appended to.

Older versions kept the ledger's lines in judgments.jsonl, behind the judgments. This module alone knows of that: such lines
count wherever they lie, and one that lies in both files is one line. They are appended to the ledger's own file before
anything else is (`take_over`); only then is judgments.jsonl written without them, so that a kill at any point loses none.
"""

from pathlib import Path

from repro.base.records import append_jsonl, dumps, read_jsonl, write_jsonl
from repro.servers.endpoint import Call
from repro.servers.ledger import Ledger, is_line, lines_of

JUDGMENTS = "judgments.jsonl"
REQUESTS = "judge_requests.jsonl"


def read_judgments(folder: Path) -> list[dict]:
    """The judgments of every judge, as they were written."""
    return [row for row in read_jsonl(Path(folder) / JUDGMENTS) if not is_line(row)]


def write_judgments(folder: Path, rows: list[dict]) -> None:
    """Put `rows` in the place of every judgment that is there."""
    take_over(Path(folder) / REQUESTS)
    write_jsonl(Path(folder) / JUDGMENTS, rows)


class JudgeLedger(Ledger):
    """A judge's ledger in `path`, with what an older version has left in the judgments.jsonl beside it."""

    _alone = False  # whether all of it lies in `path`

    def lines(self) -> list[tuple[str, dict]]:
        own = super().lines()
        return own + _left_behind(self.path, own)

    def begin(self, call: Call, reserved: int) -> int:
        if not self._alone:
            take_over(self.path)
            self._alone = True
        return super().begin(call, reserved)


def take_over(path: Path) -> None:
    """Append what only the older file holds to the ledger in `path`, durably. What a kill leaves half done, the next call
    completes."""
    if left := _left_behind(path, lines_of(path)):
        append_jsonl(path, [row for _, row in left])


def _left_behind(path: Path, own: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """(where, line) of those that the older file holds and `own`, the lines of the ledger in `path`, do not."""
    if not (older := lines_of(path.with_name(JUDGMENTS))):
        return []
    there = {dumps(row) for _, row in own}
    return [(where, row) for where, row in older if dumps(row) not in there]
