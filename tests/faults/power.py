"""Power loss under writers that are not ours: torch's checkpoints (C++) and safetensors' files (Rust), through our seals.

strace tells every call by which a process changes a folder. `lost` replays them up to any one of them and then makes one of the
states that a power loss may leave: of each file what was synced and any part of what was written since, the rest missing or
zeros; of each folder any of the names that were not synced, as they were or as they are. A unit whose seal had returned must
be whole in each such state, and nothing else may pass for whole. A write is taken to append (torch and safetensors do: checked).
"""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS, ROOT = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]
CALLS = ("openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,rename,renameat,renameat2,link,linkat,unlink,"
         "unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,msync,copy_file_range,sendfile,io_uring_enter")

WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from repro.base.records import seal
from repro.core.checkpoints import StepCheckpoints
from repro.core.engines import OneProcess
from repro.models import load

out, place = Path(sys.argv[1]), sys.argv[2]
model, tokenizer = load.load_model(place), load.load_tokenizer(place)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
steps = StepCheckpoints(out / "run/checkpoints/iteration-1.steps", "key", worth=0.0)
for k in (1, 2):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    steps.save(OneProcess(), model, optimizer, [{{"step": n + 1}} for n in range(k)])
    (out / f"returned step {{k}}").touch()
folder = out / "run/checkpoints/iteration-1"
load.save_model(model, tokenizer, folder)
model.save_pretrained(folder / "adapter")  # weights in a folder of their own, as an adapter's
seal(folder, "key")
(out / "returned weights").touch()
"""
UNITS = {"returned step 1": "run/checkpoints/iteration-1.steps/step-000001", "returned step 2": "run/checkpoints/iteration-1.steps/step-000002",
         "returned weights": "run/checkpoints/iteration-1"}


def usable() -> bool:
    """Whether strace is here and may trace."""
    return bool(shutil.which("strace")) and subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def traced(out: Path, place: Path) -> list[tuple]:
    """The calls by which WRITER changes `out`, in order: (what, path, ...)."""
    out.mkdir(parents=True)
    log = out.parent / "strace.log"
    code = WRITER.format(root=str(ROOT), tests=str(TESTS))
    subprocess.run(["strace", "-f", "-y", "--seccomp-bpf", "-s", "0", "-e", f"trace={CALLS}", "-o", str(log), sys.executable, "-c", code, str(out), str(place)],
                   check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    calls, open_calls = [], {}
    for line in log.read_text().splitlines():
        pid, text = line.split(" ", 1)
        text = text.lstrip()
        if text.endswith("<unfinished ...>"):
            open_calls[pid] = text.removesuffix("<unfinished ...>")
            continue
        if found := re.match(r"<\.\.\. \w+ resumed>", text):
            text = open_calls.pop(pid) + text[found.end():]
        if (call := _call(text, str(out))) is not None:
            calls.append(call)
    return calls


def _call(text: str, root: str) -> tuple | None:
    """A line of strace as a change below `root`; None where it is none. Raises ValueError for a change that is not known here."""
    found = re.match(r"(\w+)\((.*)\)\s+= (-?\d+)", text)
    if not found or int(found[3]) < 0 or root not in found[2]:
        return None
    name, arguments, result = found[1], found[2], int(found[3])
    path = next(p for p in re.findall(r'"([^"]*)"|\d+<([^>]*)>', arguments) if root in "".join(p))
    path = Path("".join(path))
    if any(not quoted.startswith("/") for quoted in re.findall(r'"([^"]*)"', arguments)) and name != "write":
        raise ValueError(f"strace: a path that begins at a folder's descriptor: {text[:200]}")
    if name in ("openat", "creat"):
        return ("create", path, "O_TRUNC" in arguments) if "O_CREAT" in arguments else None
    if name == "write":
        return "write", path, result
    if name == "ftruncate":
        return "size", path, int(arguments.rsplit(",", 1)[1])
    if name in ("rename", "renameat", "renameat2"):
        a, b = re.findall(r'"([^"]*)"', arguments)
        return "rename", Path(a), Path(b)
    if name in ("mkdir", "mkdirat"):
        return "mkdir", path
    if name in ("unlink", "unlinkat", "rmdir"):
        return "remove", path
    if name in ("fsync", "fdatasync"):
        return "sync", path
    raise ValueError(f"strace: {text[:200]}")


class Disk:
    """What a folder's calls leave: names and bytes as they are, and as they are on the disk. A file is a number; its bytes
    are counted alone."""

    def __init__(self, root: Path):
        self.root, self.files = root, 0
        self.names: dict[Path, int | str] = {}     # path -> its file, or "folder"
        self.kept: dict[Path, dict[str, int | str]] = {root: {}}  # folder -> its names on the disk
        self.written: dict[int, int] = {}
        self.sized: dict[int, int] = {}            # bytes that were only made room for: zeros
        self.synced: dict[int, int] = {}

    def apply(self, call: tuple) -> None:
        what, path, *more = call
        if what == "create" and (path not in self.names or more[0]):
            if path not in self.names:
                self.files += 1
                self.names[path] = self.files
            self.written[self.names[path]] = self.sized[self.names[path]] = self.synced[self.names[path]] = 0
        elif what == "write":
            self.written[self.names[path]] += more[0]
        elif what == "size":
            self.sized[self.names[path]] = more[0]
        elif what == "rename":
            self.names[more[0]] = self.names.pop(path)
        elif what == "mkdir":
            self.names[path] = "folder"
            self.kept.setdefault(path, {})
        elif what == "remove":
            self.names.pop(path, None)
        elif what == "sync":
            file = self.names.get(path)
            if path == self.root or file == "folder":
                self.kept[path] = {p.name: v for p, v in self.names.items() if p.parent == path}
            else:
                self.synced[file] = max(self.written[file], self.sized[file])

    def lose(self, rng: random.Random, contents: dict[int, bytes], into: Path) -> None:
        """One of the states that a power loss leaves now, below `into`."""
        def folder(path: Path, there: Path) -> None:
            there.mkdir()
            now, then = {p.name: v for p, v in self.names.items() if p.parent == path}, self.kept.get(path, {})
            for name in now.keys() | then.keys():
                value = rng.choice([now.get(name), then.get(name)])
                if value == "folder":
                    folder(path / name, there / name)
                elif value is not None:
                    (there / name).write_bytes(self._bytes(value, rng, contents.get(value, b"")))

        folder(self.root, into)

    def _bytes(self, file: int, rng: random.Random, content: bytes) -> bytes:
        most, least = max(self.written[file], self.sized[file]), self.synced[file]
        content = content[:most].ljust(most, b"?")  # of a file that is gone now, no matter what
        keep = rng.choice([least, most, rng.randint(least, most)])
        return rng.choice([content[:keep], content[:keep].ljust(most, b"\0")])


def lost(calls: list[tuple], out: Path, work: Path, *, seeds: int = 3, every: int = 1) -> dict[str, list[int]]:
    """What must hold -> [how often it did, how often it was looked at], over the states after each call in turn, every so-many-th
    write; `out`: as the writer has left it."""
    from contextlib import redirect_stderr
    from io import StringIO

    from repro.base.records import read_json, sealed

    final = Disk(out)
    for call in calls:
        final.apply(call)
    contents = {file: path.read_bytes() for path, file in final.names.items() if file != "folder"}
    assert all(len(data) == max(final.written[file], final.sized[file]) for file, data in contents.items()), "a write did not append"
    disk, returned = Disk(out), []
    found = {"a unit that had been sealed is whole": [0, 0], "what passes for whole is whole": [0, 0]}
    for k, call in enumerate(calls):
        disk.apply(call)
        if call[0] == "create" and call[1].name in UNITS:
            returned.append(call[1].name)
        if call[0] == "write" and k % every:
            continue
        for seed in range(seeds):
            state = work / "state"
            shutil.rmtree(state, ignore_errors=True)
            disk.lose(random.Random(f"power/{k}/{seed}"), contents, state)
            for mark, unit in UNITS.items():
                with redirect_stderr(StringIO()):
                    whole = sealed(state / unit, "key")
                if mark in returned:
                    found["a unit that had been sealed is whole"][0] += whole
                    found["a unit that had been sealed is whole"][1] += 1
                if whole:
                    names = read_json(state / unit / "complete.json")["files"]
                    good = names and all((state / unit / n).read_bytes() == (out / unit / n).read_bytes() for n in names)
                    found["what passes for whole is whole"][0] += bool(good)
                    found["what passes for whole is whole"][1] += 1
    return found


def losses(work: Path, place: Path, *, seeds: int = 3, every: int = 1, without=lambda call: False) -> dict[str, list[int]]:
    """As of `lost`, of the writer run now; `without` leaves calls out, to see that they matter."""
    calls = [call for call in traced(work / "out", place) if not without(call)]
    return lost(calls, work / "out", work, seeds=seeds, every=every)
