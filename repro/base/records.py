"""The one module that writes, reads and locks. Every stage talks to the next through files written here.

What holds after a crash at any instruction (tests/test_records.py fails every write in turn):
- `write_*` leaves the old file or the new one, never a mixture: temporary file in the same folder,
  write until all bytes are out, fsync, rename, fsync of the folder.
- `append_jsonl` may leave one torn last line; `read_jsonl(torn_tail=True)` drops that line, says so, and
  nothing else is ever dropped. Each line carries its own check, so that an altered one is refused.
- `seal` writes a folder's marker last, with size and sha256 of each file; `sealed` believes nothing else.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

MARKER = "complete.json"
CHECK = "check"  # in an object that carries its own check: the beginning of the sha256 of the rest of it


class UserError(Exception):
    """A mistake of the user's, or an input that cannot be used: one clear line, exit code 2, no traceback."""


def first_line(error: BaseException) -> str:
    """An exception in one line; its kind where it has no text. A line that ends at a colon goes on with the next ones."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(" ".join(lines).split())[:400] if lines[0].rstrip().endswith(":") else lines[0]


def dumps(value, indent: int | None = None) -> str:
    """Strict JSON with a stable byte form: sorted keys, no NaN, ASCII (so that no separator hides in a string)."""
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True, indent=indent,
                      separators=separators)


def loads(text: str):
    """Strict JSON: NaN and duplicate keys are errors (ValueError), as is nesting that overflows the parser."""
    def no_constant(name):
        raise ValueError(f"{name} is not a JSON number")

    def no_duplicates(pairs):
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [k for k, _ in pairs]
            raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
        return out

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def digest(value) -> str:
    """sha256 (hex) of a JSON value's stable form: the hash of configs and stage inputs."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def checked(value: dict) -> dict:
    """The object with its own check."""
    return value | {CHECK: digest(value)[:16]}


def _altered(value: dict) -> bool:
    """Takes the check out of an object; True if it is not of the rest, or if there is none."""
    return value.pop(CHECK, None) != digest(value)[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- writing

@contextmanager
def _readable(path: Path, doing: str):
    """Turn what the file system refuses into one line that names the file."""
    try:
        yield
    except OSError as e:
        hint = " (disk full)" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"cannot {doing} {path}: {e.strerror or e}{hint}") from e


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # os.write may write less than it was given and raise nothing
        view = view[os.write(fd, view):]


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> Path:
    """The folder, made durably with those above it: what is synced in a folder whose own name is lost is lost with it."""
    with _readable(path, "create folder"):
        new = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for p in new:
            with suppress(PermissionError):  # a folder that may be written and not read
                _fsync(p.parent)
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically and durably."""
    path = Path(path)
    make_folder(path.parent)
    tmp = path.with_name(f".{path.name}.tmp")
    with _readable(path, "write"):
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(tmp, path)
            _fsync(path.parent)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
    write_text(path, dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(dumps(row) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Append rows durably, each with its check, in one write. A crash may tear the last line only; a disk that refuses
    leaves the file as it was."""
    data = "".join(dumps(checked(row)) + "\n" for row in rows).encode()
    make_folder(Path(path).parent)
    with _readable(path, "append to"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(fd).st_size
            try:
                _write_all(fd, data)
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)  # else the next line of this process would join the torn one
                raise
        finally:
            os.close(fd)
        _fsync(Path(path).parent)  # of a new file, the name must be durable too


# ---- reading

def open_log(path: Path):
    """A file to which another program's output is appended: no part of a run's record."""
    make_folder(Path(path).parent)
    with _readable(path, "append to"):
        return open(path, "ab")


def read_text(path: Path) -> str:
    """A file's text, or one line that says why not (missing, a folder, not UTF-8: with the line number)."""
    with _readable(path, "read"):
        data = Path(path).read_bytes()
    _without_mark(path, data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{data[e.start]:02x})") from None


def _without_mark(path: Path, data: bytes) -> None:
    """Raise UserError for text that begins with a byte order mark, as some editors and spreadsheets write it."""
    for mark, name in ((b"\xef\xbb\xbf", "UTF-8-SIG"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if data.startswith(mark):
            raise UserError(f"{path}:1: begins with a byte order mark ({name}); save it as UTF-8 without one: python3 -c "
                            f"\"import sys; open(sys.argv[2], 'w').write(open(sys.argv[1], encoding='{name}').read())\" "
                            f"{path} NEW")


def read_json(path: Path):
    """A file's value. Of an object that carries its own check (`checked`), the rest, if that is what was written."""
    text = read_text(path)
    try:
        value = loads(text)
    except ValueError as e:
        raise UserError(f"{path}:{getattr(e, 'lineno', 1)}: not valid JSON: {getattr(e, 'msg', e)}") from None
    if isinstance(value, dict) and CHECK in value and _altered(value):
        raise UserError(f"{path}: altered since it was written; remove it, and what it stands for is done again")
    return value


def read_jsonl(path: Path, *, torn_tail: bool = False, all_checked: bool = False) -> list[dict]:
    """The object of each line, split on newline bytes alone; any bad line is a UserError.

    With `torn_tail`, a last line without its newline (a crash in `append_jsonl`) is cut off the file, and that
    is said on stderr; a line that is not what was appended is a UserError (`all_checked`: as is one without a check).
    """
    return [row for _, row in numbered_jsonl(path, torn_tail=torn_tail, all_checked=all_checked)]


def numbered_jsonl(path: Path, *, torn_tail: bool = False, all_checked: bool = False) -> list[tuple[int, dict]]:
    """As `read_jsonl`, each row with the number of its line (from 1), for messages."""
    with _readable(path, "read"):
        data = Path(path).read_bytes()
    _without_mark(path, data)
    if torn_tail and data and not data.endswith(b"\n"):
        whole = data[: data.rfind(b"\n") + 1]
        print(f"{path}: 1 unfinished record dropped from the end", file=sys.stderr)
        write_bytes(path, whole)
        data = whole
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            if number <= data.count(b"\n"):
                raise UserError(f"{path}:{number}: empty line; every line must hold one JSON object")
            continue
        try:
            row = loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise UserError(f"{path}:{number}: not UTF-8 text (byte 0x{line[e.start]:02x})") from None
        except ValueError as e:
            raise UserError(f"{path}:{number}: not valid JSON: {getattr(e, 'msg', e)}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        if torn_tail and (all_checked or CHECK in row) and _altered(row):
            raise UserError(f"{path}:{number}: altered since it was written; remove the line, and its work is done again")
        rows.append((number, row))
    return rows


# ---- completeness

def file_facts(folder: Path, pattern: str = "*") -> dict[str, dict]:
    """Name -> size and sha256 of the files below `folder`, made durable; the marker left out."""
    paths = sorted(p for p in Path(folder).rglob(pattern) if p.is_file() and p.name != MARKER)
    for path in (*paths, *{q for p in paths for q in p.parents if q.is_relative_to(folder)}):  # files, and names
        with _readable(path, "write"):
            _fsync(path)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths}


def seal(folder: Path, key: str, files: dict[str, dict] | None = None) -> None:
    """Declare `folder` complete: the marker, written last, holds `key` and each file's size and sha256 (`files`, where
    several processes have found them out)."""
    write_json(Path(folder) / MARKER, {"key": key, "files": file_facts(folder) if files is None else files})
    with _readable(folder, "write"):
        _fsync(Path(folder).parent)  # before anyone removes an older folder in its favour


def sealed(folder: Path, key: str | None = None, share: slice = slice(None)) -> bool:
    """True if the folder is complete (for `key`, where given) and every file (of its `share` of them, in the order of
    names) still has its size and sha256."""
    folder = Path(folder)
    if not (folder / MARKER).is_file():
        return False
    try:
        marker = read_json(folder / MARKER)
        files = [(folder / name, fact["bytes"], fact["sha256"]) for name, fact in sorted(marker["files"].items())]
        if key is not None and marker["key"] != key:
            return False
    except (UserError, KeyError, TypeError, AttributeError):
        files = [(folder / MARKER, None, None)]
    for path, size, sha256 in files[share]:
        if not path.is_file() or path.stat().st_size != size or file_sha256(path) != sha256:
            print(f"{path}: missing or altered since it was written; it will be made again", file=sys.stderr)
            return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, its marker first: what a crash leaves of it is not complete. Nothing where there is
    none."""
    if Path(folder).is_dir():
        with _readable(folder, "remove"):
            (Path(folder) / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


# ---- one run, one process

@contextmanager
def locked(folder: Path, *, wait: bool = False):
    """Hold the folder for this process. A second run gets a UserError that names the first, or says so and waits (`wait`).

    POSIX record locks (`lockf`): free after any death of the owner and not inherited by forked workers, which
    `flock` would be.
    """
    made = [p for p in (Path(folder), *Path(folder).parents) if not p.exists()]
    path = Path(folder) / ".lock"
    while True:
        make_folder(Path(folder))  # the last owner may have left none
        with _readable(path, "lock"):
            f = open(path, "a+")
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                f.seek(0)
                said = f"{folder} is in use by {f.read().strip() or 'another process'}"
                if not wait:
                    f.close()
                    raise UserError(f"{said}; wait for it, or choose another OUT") from None
                print(f"{said}; waiting for it", file=sys.stderr, flush=True)
                fcntl.lockf(f, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(f.fileno()).st_ino == path.stat().st_ino:
                break
        f.close()  # the last owner removed the file between our open and our lock
    try:
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        f.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # where nothing was written into a new folder, leave none
            for new in made:
                new.rmdir()
        f.close()
