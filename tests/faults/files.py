"""Figures 2, 3 and 4 of the scoreboard: write faults, bad inputs, corrupted files. The generators are those of the tests."""

import errno
import io
import json
import os
import random
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import kill_study
import power
import pytest

from repro.base import records
from repro.base.records import UserError, append_jsonl, read_json, read_jsonl, remove_folder, seal, sealed, write_json

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT}
OLD, NEW = {"v": "old", "pad": "x" * 5000}, {"v": "new", "pad": "y" * 5000}


# ---- figure 2: every write, refused or cut short

def refusing(error: str, short: bool):
    def act(name, real, *args, **kwargs):
        if short and name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        raise OSError(ERRORS[error], os.strerror(ERRORS[error]))
    return act


def _writers(root: Path):
    """name -> (prepare, act, state): `state()` is "old" or "new", or raises for anything between."""
    path, folder = root / "a.json", root / "step"

    def one_of(value):
        return {dumps(OLD): "old", dumps(NEW): "new"}[dumps(value)]

    dumps = records.dumps
    yield "write_json", lambda: write_json(path, OLD), lambda: write_json(path, NEW), lambda: one_of(read_json(path))
    rows = root / "a.jsonl"

    def appended():
        found = read_jsonl(rows, torn_tail=True, all_checked=True)
        return {1: "old", 2: "new"}[len(found)] if found in ([OLD], [OLD, NEW]) else None

    def begin():
        rows.unlink(missing_ok=True)
        append_jsonl(rows, [OLD])

    yield "append_jsonl", begin, lambda: append_jsonl(rows, [NEW]), appended

    def unsealed():
        remove_folder(folder)
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(1000))

    yield "seal", unsealed, lambda: seal(folder, "key"), lambda: "new" if sealed(folder, "key") else "old"


def write_faults(work: Path, quick: bool) -> dict:
    """Each error at each file system call of each writer, until a call of which none failed; then at random calls of a
    whole run; then replays of a power loss."""
    from test_records import failing

    fired = survived = 0
    detail = {}
    for name, prepare, act, state in _writers(work / "w"):
        (work / "w").mkdir(exist_ok=True)
        for error in ERRORS:
            for short in (False, True):
                for nth in range(1, 100):
                    prepare()
                    said = None
                    with pytest.MonkeyPatch.context() as patch:
                        shot = failing(patch, nth, refusing(error, short))
                        try:
                            act()
                        except UserError as e:
                            said = str(e)
                    if not shot:
                        break
                    if short and shot != ["write"]:
                        continue  # the same as without
                    fired += 1
                    clean = state() in ("old", "new") and not list((work / "w").rglob("*.tmp"))
                    one_line = said is None or ("\n" not in said and os.strerror(ERRORS[error]) in said)
                    if state() == "old":
                        act()
                    good = clean and one_line and state() == "new"
                    survived += good
                    key = f"{name}: {'short write, then ' if short else ''}{error}"
                    counts = detail.setdefault(key, [0, 0])
                    counts[0] += good
                    counts[1] += 1
    replays = lost = 0
    for name, (good, done) in power_losses(work / "p", 20 if quick else 120).items():
        detail[f"{name}: power loss"] = [good, done]
        replays, lost = replays + done, lost + done - good
    theirs = 0
    if power.usable():
        from conftest import save_tiny

        for what, (good, done) in power.losses(work / "q", save_tiny(work / "tiny"), every=8 if quick else 1).items():
            detail[f"torch and safetensors: power loss: {what}"] = [good, done]
            theirs, replays, lost = theirs + done, replays + done, lost + done - good
    whole, of, bad = _whole_runs(work, 4 if quick else 24)
    detail["whole run: ENOSPC or EIO at a random call"] = [whole, of]
    return {"value": survived + replays - lost + whole, "of": fired + replays + of, "detail": detail, "bad": bad,
            "counted": f"{fired} of every error at every call of every writer, {replays} looks after a replayed power loss, {of} whole runs "
                       "with one call refused: one line, old or new state, no temporary file, and the same command ends as undisturbed",
            "not_counted": "write errors of torch.distributed.checkpoint and safetensors (C++ and Rust), which fail in tests of their own by a limit "
                           "on the size of a file; power loss under them " + (f"is in {theirs} of the looks (power.py)" if theirs
                           else "was NOT RUN: strace is not here, or may not trace")}


def power_losses(root: Path, want: int) -> dict[str, list[int]]:
    """Writer -> [replays that left a legal state, replays]: at least `want`, at every call in turn."""
    found = {}
    for name, prepare, act, legal in _durable(root):
        nth, counts = 1, found.setdefault(name, [0, 0])
        while counts[1] < want:
            for seed in range(3):
                shutil.rmtree(root, ignore_errors=True)
                root.mkdir(parents=True)
                prepare()
                returned = False
                with pytest.MonkeyPatch.context() as patch:
                    power = PowerLoss(root, nth)
                    patch.setattr(records, "os", power)
                    with suppress(PowerLoss.Out):
                        act()
                        returned = True
                power.lose(random.Random(f"{name}/{nth}/{counts[1]}/{seed}"))
                counts[1] += 1
                with suppress(UserError), redirect_stderr(io.StringIO()):
                    counts[0] += legal(returned)
            nth = 1 if returned else nth + 1
    return found


class PowerLoss:
    """`os` for repro.base.records. The nth call raises; `lose` then makes of the folder one of the states that a power loss may
    leave: unsynced bytes truncated or zeroed, names whose folder was not synced as they were or as they are."""

    class Out(Exception):
        pass

    def __init__(self, root: Path, nth: int):
        self.root, self.left, self.paths = root, nth, {}
        self.names = self._names()                                          # durable: path -> inode
        self.bytes = {p.stat().st_ino: p.read_bytes() for p in self._files()}  # durable: inode -> content
        self.folders = {p for p in (root, *root.rglob("*")) if p.is_dir()}

    def _files(self):
        return [p for p in self.root.rglob("*") if p.is_file()]

    def _names(self):
        return {p: p.stat().st_ino for p in self._files()}

    def __getattr__(self, name):
        return getattr(os, name)

    def _tick(self):
        self.left -= 1
        if self.left == 0:
            raise self.Out

    def open(self, path, *args, **kwargs):
        self._tick()
        fd = os.open(path, *args, **kwargs)
        self.paths[fd] = Path(path)
        return fd

    def write(self, fd, data):
        self._tick()
        return os.write(fd, data)

    def fsync(self, fd):
        self._tick()
        path = self.paths.get(fd) or Path(os.readlink(f"/proc/self/fd/{fd}"))
        os.fsync(fd)
        if path.is_dir():
            self.names = {p: i for p, i in self.names.items() if p.parent != path}
            self.names |= {p: i for p, i in self._names().items() if p.parent == path}
            self.folders = {p for p in self.folders if p.parent != path} | {p for p in path.iterdir() if p.is_dir()}
        else:
            self.bytes[os.fstat(fd).st_ino] = path.read_bytes()

    def replace(self, a, b):
        self._tick()
        os.replace(a, b)

    def lose(self, rng: random.Random) -> None:
        now, content = self._names(), {p.stat().st_ino: p.read_bytes() for p in self._files()}
        folders = [p for p in (self.root, *self.root.rglob("*")) if p.is_dir()]
        gone = [p for p in folders if p not in self.folders and rng.random() < 0.5]
        back = [p for p in self.folders if p not in folders and p != self.root and rng.random() < 0.5]  # removed, not durably
        after = {}
        for path in {**self.names, **now}:
            inode = rng.choice([self.names.get(path), now.get(path)])
            if inode is None or any(f in path.parents for f in gone) or (path.parent not in folders and path.parent not in back):
                continue
            durable, latest = self.bytes.get(inode, b""), content.get(inode, self.bytes.get(inode, b""))
            if latest != durable:
                keep = rng.randrange(min(len(durable), len(latest)) if latest.startswith(durable) else 0, len(latest) + 1)
                latest = rng.choice([durable, latest, latest[:keep], latest[:keep] + bytes(len(latest) - keep)])
            after[path] = latest
        for path in self._files():
            path.unlink()
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        for path, data in after.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _durable(root: Path):
    """name -> (prepare, act, whether what is left is legal, given whether the act returned)."""
    path, rows = root / "a.json", root / "a.jsonl"
    yield ("write_json", lambda: write_json(path, OLD), lambda: write_json(path, NEW),
           lambda returned: read_json(path) in ([NEW] if returned else [OLD, NEW]))

    def appended(base):
        def check(returned):
            found = read_jsonl(rows, torn_tail=True, all_checked=True) if rows.exists() else []
            return found in ([[*base, NEW]] if returned else [base, [*base, NEW]])
        return check

    yield "append_jsonl", lambda: append_jsonl(rows, [OLD]), lambda: append_jsonl(rows, [NEW]), appended([OLD])
    yield "append_jsonl to a new file", lambda: None, lambda: append_jsonl(rows, [NEW]), appended([])

    def step(name):
        folder = records.make_folder(root / name)
        write_json(folder / "weights", NEW)
        seal(folder, "key")

    def replaced():
        step("step-2")
        remove_folder(root / "step-1")

    yield ("seal, then remove the one before", lambda: step("step-1"), replaced,
           lambda returned: any(sealed(root / s, "key") for s in ("step-1", "step-2")))


def _whole_runs(work: Path, count: int) -> tuple[int, int, list]:
    """Whole runs of the tiny model in which one file system call of ours, drawn at random, is refused."""
    kill_study.imports()
    tiny = work / "tiny"
    kill_study.run_child(lambda tell: kill_study.save_tiny(tiny), work / "log")
    experiment = kill_study.experiment_of("dialogue on 2 ranks", tiny)  # one iteration; here on one rank

    def running(out, nth=None, error="ENOSPC"):
        def act(tell):
            from repro.stages.pipeline import run

            calls = 0

            class Os:
                def __getattr__(self, name):
                    real = getattr(os, name)
                    if name not in ("open", "write", "fsync", "replace"):
                        return real

                    def call(*args, **kwargs):
                        nonlocal calls
                        calls += 1
                        if calls == nth:
                            tell("fired", name)
                            raise OSError(ERRORS[error], os.strerror(ERRORS[error]))
                        return real(*args, **kwargs)
                    return call

            records.os = Os()
            try:
                run(experiment, out, say=lambda line: None)
            except UserError as e:
                tell("said", str(e).replace("\n", "\\n"))
            tell("calls", calls)
        return act

    setting = kill_study.undisturbed(kill_study.Setting("whole", running, str(experiment.path)), work)
    total = int(next(what for _, word, what in kill_study.run_child(running(work / "count"), work / "log").told if word == "calls"))
    good, fired, bad, rng = 0, 0, [], random.Random("write faults")
    for k in range(count):
        nth, error = rng.randint(1, total), rng.choice(["ENOSPC", "EIO"])
        out = work / f"fault-{k}"
        first = kill_study.run_child(running(out, nth, error), work / "log")
        told = {word: what for _, word, what in first.told}
        if "fired" not in told:
            continue
        fired += 1
        folder = out / experiment.path
        left = [str(p) for p in out.rglob("*.tmp")]
        torn = kill_study.torn(folder, setting.final) if folder.exists() else []
        second = kill_study.run_child(running(out), work / "log")
        same = second.code == 0 and kill_study.contents(folder) == setting.final
        one_line = first.code == 0 and os.strerror(ERRORS[error]) in told.get("said", "") and "\\n" not in told["said"]
        good += same and one_line and not left and not torn
        if not (same and one_line) or left or torn:
            bad.append({"call": nth, "what": told.get("fired"), "error": error, "said": told.get("said"), "left": left, "torn": torn,
                        "same": same})
        shutil.rmtree(out)
    return good, fired, bad


# ---- figure 3: bad inputs

def bad_inputs(work: Path, quick: bool) -> dict:
    """Each through the command line, as a user would give it."""
    import test_cli
    import test_constitutions
    import test_datasets
    import test_judge
    import test_records
    from conftest import save_tiny

    from repro import cli

    tiny = save_tiny(work / "tiny")

    def cases(module, name):
        return getattr(module, name).pytestmark[0].args[1]

    def with_queries(data: bytes, name="queries.jsonl"):
        (work / name).write_bytes(data)
        return ["run", "exp1", "--model", str(tiny), "--queries", str(work / name), "--subsets", "own"]

    def with_constitutions(data: bytes, name="mine.json"):
        (work / name).write_bytes(data)
        return ["run", "exp1", "--model", str(tiny), "--constitutions", str(work / name)]

    def as_bytes(value):
        return value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else json.dumps(value).encode()

    good_queries = test_cli.GOOD_QUERIES.encode()

    def corpus():
        for argv, reason in cases(test_cli, "test_flags"):
            yield "flags", [*argv, *(["--model", str(tiny)] if "--model" not in argv and argv[:2] == ("run", "exp1") else [])], reason
        for argv, _ in cases(test_judge, "test_judge_mistakes_end_in_one_line"):
            yield "flags of judge", list(argv), ""
        for data, _ in cases(test_cli, "test_query_files"):
            yield "queries", with_queries(as_bytes(data)), "queries.jsonl"
        for row, _ in cases(test_datasets, "test_a_bad_row_names_file_and_line"):
            yield "queries", with_queries(b'{"query": "fine", "id": "one"}\n' + as_bytes(row) + b"\n"), "queries.jsonl:2"
        for line, _ in cases(test_records, "test_a_bad_line_names_file_and_line"):
            yield "queries", with_queries(good_queries + line + b'\n{"query": "ok"}\n'), "queries.jsonl:25"
        for change, _ in cases(test_cli, "test_constitution_files"):
            yield "constitutions", with_constitutions(as_bytes({"principles": [test_cli.GOOD_SET["principles"][0] | change]})), "mine.json"
        for data, _ in cases(test_constitutions, "test_a_mistake_names_file_and_field"):
            yield "constitutions", with_constitutions(as_bytes(data)), "mine.json"
        for text, _ in cases(test_cli, "test_a_users_experiment_file"):
            (work / "mine.py").write_text(text)
            yield "experiment file", ["run", str(work / "mine.py")], "mine.py"
        for number in ("--seed", "--train-queries", "--evaluation-queries", "--max-usd", "--ranks"):
            for value in ("", "x", "nan", "-1", "1e99", "0x10", "one"):
                if (number, value) != ("--seed", "-1"):
                    yield "numbers", ["run", "exp1", "--model", str(tiny), "--judge", "openai", "--judge-model", "m", "--base-url",
                                      "http://127.0.0.1:9/v1", number, value], ""
        for name in ("../x", "a/b", "", "a b", "x" * 300, "\u00e9\n"):
            yield "names", ["run", "exp1", "--model", str(tiny), "--name", name], ""
        for url in ("ftp://h/v1", "http://", "127.0.0.1:1", "http://u:p@h/v1", "http://h/v1?key=1", "file:///etc/passwd"):
            yield "urls", ["run", "exp1", "--model", str(tiny), "--judge", "openai", "--judge-model", "m", "--base-url", url], "--base-url"
        for flag, values in (("--prompt", ("chatt", "Plain")), ("--task", ("sumary",)), ("--writer", ("me",)), ("--answer", ("xml",)),
                             ("--judge", ("ruled", "gpt")), ("--profile", ("large",)), ("--variant", ("weak",))):
            for value in values:
                yield "words", ["run", "exp1", "--model", str(tiny), flag, value], ""
        raw = {"an empty file": b"", "NUL bytes": bytes(200), "an HTML page": b"<!doctype html><html></html>\n", "gzip": b"\x1f\x8b\x08\0" * 9,
               "UTF-16": "hello\n".encode("utf-16"), "a byte order mark": b"\xef\xbb\xbf" + good_queries, "a long integer": b'{"query": 1' + b"0" * 5000 + b"}\n",
               "deep brackets": b"[" * 200_000, "deep objects": b'{"a":' * 100_000, "a bare NaN": b"NaN\n", "two on a line": b'{"query": "a"} {"query": "b"}\n',
               "half a record": good_queries + b'{"query": "a', "NULs in the middle": good_queries + bytes(100) + b"\n" + good_queries,
               "a lone surrogate": b'{"query": "\\ud800"}\n', "NUL in a text": b'{"query": "a\\u0000b"}\n', "a number": b"3\n", "a string": b'"x"\n'}
        for what, data in raw.items():
            yield f"queries: {what}", with_queries(data), "queries.jsonl"
            yield f"constitutions: {what}", with_constitutions(data), "mine.json"
            yield f"constitutions as TOML: {what}", with_constitutions(data, "mine.toml"), "mine.toml"
        (work / "a folder").mkdir(exist_ok=True)
        (work / "loop").unlink(missing_ok=True)
        (work / "loop").symlink_to(work / "loop")
        for odd in ("a folder", "loop", "x" * 300, "missing/queries.jsonl"):
            yield "paths", ["run", "exp1", "--model", str(tiny), "--queries", str(work / odd)], ""
            yield "paths", ["run", "exp1", "--model", str(tiny), "--constitutions", str(work / odd)], ""
            yield "paths", ["run", "exp1", "--model", str(work / odd)], ""
            yield "paths", ["judge", str(work / odd), "--model", "m"], ""
            yield "paths", ["publish", str(work / odd)], ""
        for name, data in (("config.json", b"{"), ("config.json", b"[]"), ("config.json", b'{"model_type": "nosuch"}'), ("tokenizer.json", b"{}"),
                           ("tokenizer.json", b"\xff"), ("config.json", b'{"auto_map": {"AutoConfig": "evil.C"}, "model_type": "evil"}')):
            broken = work / f"broken-{name}-{records.digest(data.hex())[:6]}"
            shutil.copytree(tiny, broken, dirs_exist_ok=True)
            (broken / name).write_bytes(data)
            yield "models", ["run", "exp1", "--model", str(broken)], "--model"
        text = "Be {0.__class__.__init__.__globals__}."
        for bad in (text, "Be %s.\n\nAssistant: ok", "Be \0.", "Be <|im_end|>.", "<|im_start|>system", "Be x" * 40_000):
            yield "principles", with_constitutions(as_bytes({"principles": [test_cli.GOOD_SET["principles"][0] | {"text": bad}]})), ""

    tried = fine = slowest = 0
    bad, kinds = [], {}
    os.environ.pop("OPENAI_API_KEY", None)
    for kind, argv, reason in corpus():
        out, said = work / "out", io.StringIO()
        shutil.rmtree(out, ignore_errors=True)
        argv = [*argv, "--out", str(out)] if argv[:1] == ["run"] else argv
        start, code = time.monotonic(), None
        try:
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                cli.main(argv)
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            code = f"{type(e).__name__}: {e}"
        took = time.monotonic() - start
        lines = [line for line in said.getvalue().strip().splitlines() if line.strip()]
        good = (code == 2 and len(lines) == 1 and lines[0].startswith("repro: ") and reason in lines[0] and not out.exists() and took < 5)
        tried, fine, slowest = tried + 1, fine + good, max(slowest, took)
        counts = kinds.setdefault(kind.split(":")[0], [0, 0])
        counts[0] += good
        counts[1] += 1
        if not good:
            bad.append({"kind": kind, "argv": [a.replace(str(work), "")[:80] for a in argv], "code": code,
                        "said": [line.replace(str(work), "")[:200] for line in lines[-2:]], "wrote": out.exists(), "seconds": round(took, 1)})
    return {"value": fine, "of": tried, "detail": kinds, "bad": bad, "slowest_s": round(slowest, 2),
            "counted": "files and flags through the command line: exit code 2, one line that names file and line or the field, under 5 s, "
                       "nothing written",
            "not_counted": "inputs that need a network (hub names, downloads); no permission (root reads everything)"}


# ---- figure 4: corrupted files

def corruptions(work: Path, quick: bool) -> dict:
    """One byte changed or the end cut off, at random, in each kind of file that is read again."""
    from conftest import byte_tokenizer, save_tiny
    from judge_server import JudgeServer

    from repro.models.embedded import WHEEL, _fetch_wheel
    from repro.servers.endpoint import Endpoint
    from repro.servers.ledger import Ledger
    from repro.stages.pipeline import run
    from repro.stages.run import Run

    tiny = save_tiny(work / "tiny")
    experiment = kill_study.experiment_of("brief", tiny)
    each = 6 if quick else 24
    quiet = io.StringIO()
    with JudgeServer().serve() as url, redirect_stderr(quiet):
        endpoint = Endpoint(model="judge-1", base_url=url, price=(3.0, 12.0))
        folder = run(experiment, work / "runs", say=lambda line: None, endpoint=endpoint)
    prepared = Run(experiment, folder, lambda line: None, endpoint=endpoint)
    with redirect_stderr(quiet):
        prepared.prepare()
    stages = read_json(folder / "run.json")["stages"]
    rng, kinds, bad = random.Random("corruptions"), {}, []

    def damaged(data: bytes) -> bytes:
        while True:
            if rng.random() < 0.3:
                return data[: rng.randrange(len(data))]
            out = bytearray(data)
            out[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            if bytes(out).split() != data.split():
                return bytes(out)

    def trial(kind: str, path: Path, detected) -> None:
        whole = path.read_bytes()
        path.write_bytes(damaged(whole))
        try:
            with redirect_stderr(quiet):
                good = bool(detected())
        except UserError as e:
            good = "\n" not in str(e)
        except Exception as e:
            good = False
            bad.append({"kind": kind, "what": f"{type(e).__name__}: {e}"[:200]})
        path.write_bytes(whole)
        counts = kinds.setdefault(kind, [0, 0])
        counts[0] += good
        counts[1] += 1
        if not good and (not bad or bad[-1]["kind"] != kind):
            bad.append({"kind": kind, "what": "used as it was"})

    outputs = [(output, fact) for facts in stages.values() for output, fact in facts["outputs"].items()]
    for output, fact in outputs:  # what a stage left: its sha256 is in run.json, or in its marker's
        path = folder / output
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            kind = f"stage output {file.suffix}" if not path.is_dir() else f"checkpoint: {file.name}"
            for _ in range(max(1, each // 6)):
                trial(kind, file, lambda output=output, fact=fact: not prepared._holds(output, fact))
    partial = work / "partial.jsonl"
    append_jsonl(partial, [{"key": "k", "job": k, "text": "some words " * 9, "tokens": 9, "finished": True} for k in range(5)])
    for _ in range(each):
        def short():
            return len(read_jsonl(partial, torn_tail=True, all_checked=True)) < 5
        trial("unfinished output (.partial.jsonl)", partial, short)
    ledger = shutil.copy(folder / "judge_requests.jsonl", work / "ledger.jsonl")
    whole = Ledger(ledger, {"judge": "judge-1"})
    for _ in range(each):
        def other():
            found = Ledger(ledger, {"judge": "judge-1"})
            if found.answers == whole.answers and found.spent == whole.spent:
                return True  # the name of the check was hit: what is used is what was written
            return found.open > whole.open or sum(map(len, found.answers.values())) < sum(map(len, whole.answers.values()))
        trial("judge's ledger", ledger, other)
    record = folder / "run.json"
    expected = kill_study.contents(folder)
    for _ in range(each):
        def another():
            run(experiment, work / "runs", say=lambda line: None, endpoint=endpoint)
            return kill_study.contents(folder) == expected
        kept = shutil.copytree(work / "runs", work / "kept", dirs_exist_ok=True)
        trial("run.json", record, another)
        shutil.rmtree(folder)
        shutil.copytree(kept, work / "runs", dirs_exist_ok=True)
    step = _step_checkpoint(work, tiny, byte_tokenizer)
    for file in sorted(p for p in step.iterdir() if p.is_file()):
        for _ in range(each // 2):
            trial(f"step checkpoint: {file.name}", file, lambda: not sealed(step, "key"))
    os.environ["SAMI_CACHE"] = str(work / "cache")
    (work / "cache").mkdir(exist_ok=True)
    for k in range(each // 4):
        (work / "cache" / WHEEL).write_bytes(bytes([k]) * 100)
        try:
            _fetch_wheel()
            found = 0
        except UserError as e:
            found = "sha256" in str(e)
        counts = kinds.setdefault("download (wheel)", [0, 0])
        counts[0] += found
        counts[1] += 1
    return {"value": sum(a for a, _ in kinds.values()), "of": sum(b for _, b in kinds.values()), "detail": kinds, "bad": bad[:20],
            "counted": "a bit flipped or the end cut off, at random, in every kind of file of ours that is read again: refused, or made "
                       "again, before anything uses it",
            "not_counted": "a model, queries or constitutions of the user's own, of which nobody knows the right bytes (their sha256 is part "
                           "of the run's key: another content is another config)"}


def _step_checkpoint(work: Path, tiny: Path, byte_tokenizer) -> Path:
    from test_fsdp import trained

    with redirect_stderr(io.StringIO()), suppress(SystemExit):
        trained(tiny, work / "steps", asked=[15])
    return work / "steps/step-000001"
