"""What a crash at any instruction leaves behind: the old file or the new one, and nothing else."""

import os
import signal
import subprocess
import sys
import time

import pytest

from repro.base import records
from repro.base.records import (
    UserError,
    append_jsonl,
    checked,
    dumps,
    loads,
    locked,
    read_json,
    read_jsonl,
    seal,
    sealed,
    write_json,
)

CALLS = ("open", "write", "fsync", "replace", "close")
OLD, NEW = {"v": "old", "pad": "x" * 5000}, {"v": "new", "pad": "y" * 5000}


class Fault(Exception):
    pass


def failing(monkeypatch, nth: int, act):
    """Make the nth of the file system calls that `records` issues go wrong; returns the list of those that did."""
    count, fired = 0, []

    def wrap(name, real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == nth:
                fired.append(name)
                return act(name, real, *args, **kwargs)
            return real(*args, **kwargs)
        return call

    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

    shim = Os()
    for name in CALLS:
        setattr(shim, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr(records, "os", shim)
    return fired


def disk_full(name, real, *args, **kwargs):
    raise OSError(28, "No space left on device")


def killed(name, real, *args, **kwargs):
    raise Fault(name)


def torn(name, real, *args, **kwargs):
    if name == "write":
        real(args[0], args[1][: len(args[1]) // 2])
    raise Fault(name)


@pytest.mark.parametrize("act", [disk_full, killed, torn])
def test_write_is_old_or_new_whichever_call_fails(tmp_path, monkeypatch, act):
    fired_in_all = 0
    for nth in range(1, 100):
        path = tmp_path / f"{act.__name__}-{nth}.json"
        write_json(path, OLD)
        with monkeypatch.context() as patch:
            fired = failing(patch, nth, act)
            try:
                write_json(path, NEW)
            except UserError as e:
                assert act is disk_full and "disk full" in str(e) and str(path) in str(e)
                assert not list(tmp_path.glob(".*.tmp"))
            except Fault:
                pass
        assert read_json(path) in (OLD, NEW)
        if not fired:
            assert read_json(path) == NEW
            break
        fired_in_all += 1
        write_json(path, NEW)  # what a crash left behind is no obstacle
        assert read_json(path) == NEW and not list(tmp_path.glob(".*.tmp"))
    assert fired_in_all >= 6


@pytest.mark.parametrize("act", [disk_full, killed, torn])
def test_append_loses_at_most_the_row_that_was_being_written(tmp_path, monkeypatch, act, capsys):
    fired_in_all = 0
    for nth in range(1, 100):
        path = tmp_path / f"{act.__name__}-{nth}.jsonl"
        append_jsonl(path, [OLD])
        with monkeypatch.context() as patch:
            fired = failing(patch, nth, act)
            try:
                append_jsonl(path, [NEW])
            except (UserError, Fault):
                pass
        rows = read_jsonl(path, torn_tail=True)
        assert rows in ([OLD], [OLD, NEW])
        if not fired:
            assert rows == [OLD, NEW]
            break
        fired_in_all += 1
    assert fired_in_all >= 3
    assert (act is torn) == ("1 unfinished record dropped" in capsys.readouterr().err)


def test_an_append_that_the_disk_refuses_halfway_leaves_no_half_line_for_the_next_one(tmp_path, monkeypatch):
    def half(name, real, *args, **kwargs):
        real(args[0], args[1][: len(args[1]) // 2])
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.jsonl"
    append_jsonl(path, [OLD])
    with monkeypatch.context() as patch:
        assert failing(patch, 2, half) == []
        with pytest.raises(UserError, match="disk full"):
            append_jsonl(path, [NEW])
        append_jsonl(path, [NEW])  # another worker of the same process
    assert read_jsonl(path, torn_tail=True, all_checked=True) == [OLD, NEW]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

    shim = Os()
    shim.write = lambda fd, data: os.write(fd, bytes(data)[:7])
    monkeypatch.setattr(records, "os", shim)
    write_json(tmp_path / "a.json", NEW)
    assert read_json(tmp_path / "a.json") == NEW


def test_torn_tail_at_every_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"t": "é"}, {"t": "日本"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_jsonl(path, torn_tail=True) == [{"t": "é"}]
        assert path.read_bytes() == whole[:first]


def test_an_altered_line_that_was_appended_is_refused(tmp_path):
    """Each bit of the first line flipped: refused, or the row as it was, under any name of its check."""
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [OLD | {"pad": "x"}, NEW])
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * whole.index(b"\n")):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            row, *_ = read_jsonl(path, torn_tail=True)
            assert row.items() >= (OLD | {"pad": "x"}).items() and len(row) == 3
        except UserError as e:
            assert f"{path}:1: " in str(e)
            refused += 1
        with pytest.raises(UserError):
            read_jsonl(path, torn_tail=True, all_checked=True)
    assert refused > 200
    path.write_bytes(whole)
    assert read_jsonl(path, torn_tail=True, all_checked=True) == [OLD | {"pad": "x"}, NEW]


def test_an_altered_object_that_carries_its_check_is_refused(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, checked(OLD))
    assert read_json(path) == OLD
    path.write_text(path.read_text().replace("old", "odd"))
    with pytest.raises(UserError, match="run.json: altered since it was written"):
        read_json(path)


@pytest.mark.parametrize("line, reason", [
    (b'{"a": NaN}', "NaN"), (b'{"a": 1, "a": 2}', "duplicate key 'a'"), (b"[1]", "expected a JSON object"),
    (b"", "empty line"), (b'{"a": "\xff"}', "not UTF-8"), (b'{"a": 1} {"b": 2}', "Extra data"), (b'{"a"', "Expecting"),
    (b'{"a":' * 100_000, "nested too deeply"),
])
def test_a_bad_line_names_file_and_line(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"ok": 1}\n' + line + b'\n{"ok": 2}\n')
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{reason}"):
        read_jsonl(path)


def test_unicode_separators_do_not_split_a_record(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"t": "a\u2028b\u0085c\x1cd"}\n'.replace("\x1c", "\\u001c"), encoding="utf-8")
    assert [r["t"] for r in read_jsonl(path)] == ["a\u2028b\u0085c\x1cd"]


def test_strict_json_round_trip():
    value = {"b": [1, 2.5, None, True], "a": "\u2028é"}
    assert loads(dumps(value)) == value
    with pytest.raises(ValueError):
        dumps({"x": float("nan")})


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_seal_notices_every_change(tmp_path, harm, capsys):
    (tmp_path / "weights").write_bytes(bytes(range(256)))
    seal(tmp_path, "key")
    assert sealed(tmp_path, "key") and not sealed(tmp_path, "other")
    data = bytearray(range(256))
    if harm == "remove":
        (tmp_path / "weights").unlink()
    else:
        data[100] ^= 1
        (tmp_path / "weights").write_bytes(data if harm == "flip" else data[:-1])
    assert not sealed(tmp_path, "key")
    assert "weights" in capsys.readouterr().err


HOLD = ("import sys, time, pathlib\nfrom repro.base.records import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), wait=True):\n print('held', flush=True); sys.stdin.readline()")


def _process(folder):
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_what_two_runs_want_the_same_way_the_second_waits_for(tmp_path):
    """The model that both are the first to need (models/embedded.py), in a folder that the first may remove again."""
    folder = tmp_path / "new"
    with _process(folder) as owner:
        assert owner.stdout.readline() == "held\n"
        with _process(folder) as second:
            assert f"in use by process {owner.pid}" in (said := second.stderr.readline()) and "waiting" in said
            owner.communicate("free\n", timeout=30)
            assert second.stdout.readline() == "held\n"
            assert second.communicate("free\n", timeout=30) == ("", "")
    assert not (folder / ".lock").exists()


def test_a_second_run_is_refused_and_a_killed_one_frees_the_folder(tmp_path):
    owner = _process(tmp_path)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {owner.pid}"), locked(tmp_path):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert owner.returncode == -signal.SIGKILL
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < 1
    assert not (tmp_path / ".lock").exists()
