"""Figure 9 of the scoreboard, pairs of runs that must be identical; and what each fault of a run prints."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kill_study

from repro.base.records import read_json

ROOT, TESTS = kill_study.ROOT, kill_study.TESTS
TOLERANCE = 1e-2  # of the largest change of a weight in training: 1 rank against 2, whose sums have another order


def experiment_file(work: Path, tiny: Path, change: str = "e") -> Path:
    """A user's experiment: exp1 mini on the tiny model, one iteration; `change` is an expression over `e`."""
    path = work / f"mine_{abs(hash(change)) % 10**6}.py"
    path.write_text(f"import dataclasses, sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\nfrom test_experiments import small\n"
                    f"from repro.cli import load_experiment\ne = dataclasses.replace(small(load_experiment('exp1', 'mini')[0], "
                    f"Path({str(tiny)!r})), iterations=1)\nEXPERIMENTS = {{'mini': {change}}}\n")
    return path


LONGER = ("dataclasses.replace(e, data=dataclasses.replace(e.data, train=112), train=dataclasses.replace(e.train, batches=40, "
          "learning_rate={rate}), judge=dataclasses.replace(e.judge, judges=('rule',)))")
BLOWN = ("from torch.optim import RMSprop\nstep = RMSprop.step\n\n\ndef blown(self):\n    for group in self.param_groups:\n"
         "        group['lr'] = 1e30\n    return step(self)\n\n\nRMSprop.step = blown\n")
ONE_FULL = ("import os, resource\nif os.environ.get('RANK') == '1':\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n")
SOME = r": +\d+%\|[^|]*\| [1-9]"  # a bar that has begun to move


def started(argv: list[str], *, cwd: Path, wrap: tuple[str, ...] = (), **env) -> subprocess.Popen:
    return subprocess.Popen([*wrap, sys.executable, "-m", "repro.cli", *argv], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | env)


# ---- figure 9

def determinism(work: Path, quick: bool) -> dict:
    import torch
    from conftest import save_tiny
    from safetensors.torch import load_file

    tiny = save_tiny(work / "tiny")
    mine = experiment_file(work, tiny)

    def whole(name: str, file: Path = mine, extra=(), cwd: Path = work, umask: int | None = None, **env) -> Path:
        out = work / name
        wrap = ("sh", "-c", f"umask {umask:03o}; exec \"$@\"", "sh") if umask is not None else ()
        child = started(["run", str(file), "--out", str(out), *extra], cwd=cwd, wrap=wrap, **env)
        said = child.communicate()[0]
        assert child.returncode == 0, said[-2000:].decode()
        return out / "exp1_dialogue/mini"

    def same(a: Path, b: Path, but=()) -> bool:
        a, b = kill_study.contents(a), kill_study.contents(b)
        return {k: v for k, v in a.items() if k not in but} == {k: v for k, v in b.items() if k not in but}

    first = whole("first")
    other = work / "another place with spaces" / ("x" * 40)
    (work / "elsewhere").mkdir()
    environments = {
        "again": {}, "hash seed": {"PYTHONHASHSEED": "12345"}, "time zone": {"TZ": "Pacific/Kiritimati"},
        "locale": {"LC_ALL": "C", "LANG": "tr_TR.UTF-8", "PYTHONUTF8": "0"}, "working folder": {"cwd": work / "elsewhere"},
        "place of OUT": {"name": str(other)}, "umask": {"umask": 0o077}}
    if quick:
        environments = {k: environments[k] for k in ("again", "hash seed")}
    detail, bad = {}, []
    for what, change in environments.items():
        found = whole(**({"name": what} | change))
        detail[what] = [int(same(first, found)), 1]
        if not detail[what][0]:
            bad.append(what)
    # the inverse: without seeds from positions, the comparison must see it
    planted = work / "planted.py"
    planted.write_text(mine.read_text() + "\nimport random\nimport repro.stages.draws\n"
                       "repro.stages.draws.rng = lambda *keys: random.Random()\n")
    differs = not same(first, whole("planted", planted))
    two = whole("two ranks", extra=("--ranks", "2"))
    a, b = (load_file(f / "checkpoints/iteration-1/model.safetensors") for f in (first, two))
    apart = max((a[k].float() - b[k].float()).abs().max().item() for k in a)
    initial = load_file(tiny / "model.safetensors")
    moved = max((a[k].float() - initial[k].float()).abs().max().item() for k in a)
    detail["1 rank and 2, weights to 1 % of their change"] = [int(apart <= TOLERANCE * moved and moved > 0), 1]
    batches = whole("batches", experiment_file(work, tiny, "dataclasses.replace(e, sampling=dataclasses.replace(e.sampling, batch_size=3))"))
    name = "responses/evaluation-0.jsonl"
    detail["sampling in batches of 3 and 5"] = [int((first / name).read_bytes() == (batches / name).read_bytes()), 1]
    threads = whole("threads", OMP_NUM_THREADS="2")
    threads_same = same(first, threads, but=("run.json", "report.html"))
    del torch
    return {"value": sum(a for a, _ in detail.values()), "of": len(detail), "detail": detail, "bad": bad, "inverse_fails": differs,
            "ranks_apart": apart, "ranks_moved": moved, "two_threads_identical": threads_same,
            "counted": "pairs of whole runs with the same bytes in every file: again, under other hash seed, time zone, locale, working folder, "
                       "place of OUT and umask; responses in other batches; weights of 2 ranks within 1 % of what training changed. A planted nondeterminism "
                       f"{'is' if differs else 'IS NOT'} seen",
            "not_counted": "resumed against undisturbed: figure 1; other thread counts (recorded in run.json, not byte-comparable: here "
                           f"{'the same' if threads_same else 'other'} bytes); GPUs"}


# ---- what each fault prints

def printed(work: Path, rows: list[dict], say: Callable[[str], None]) -> None:
    """Each fault of a run, injected into the command line as a user has it -> `rows`: exit code, seconds, its last line."""
    from conftest import save_tiny
    from test_fsdp_worker import workers

    tiny = save_tiny(work / "tiny")
    mine, longer = experiment_file(work, tiny), experiment_file(work, tiny, LONGER.format(rate=1e-5))

    def rest(child: subprocess.Popen) -> str:
        return child.communicate(timeout=120)[0].decode("utf-8", "replace")

    def note(fault: str, child: subprocess.Popen, since: float, said: str = "", lines: int = 1, **more) -> str:
        said += rest(child)
        own = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip() and not re.search(r"\d+%\|", line)]
        line = "\n".join(own[-lines:]).replace(str(work), "DIR")
        rows.append({"fault": fault, "exit": child.returncode, "seconds": round(time.monotonic() - since, 1), "printed": line,
                     "traceback": "Traceback" in said} | more)
        say(f"- {fault}: exit {child.returncode} after {rows[-1]['seconds']} s\n  {line}")
        return said

    def until(child: subprocess.Popen, mark: str) -> str:
        said = ""
        while not re.search(mark, said[-400:]) and (piece := child.stdout.read(1)):
            said += piece.decode("latin-1")
        return said

    def run(file, out, *extra, **how):
        return started(["run", str(file), "--out", str(work / out), *extra], cwd=work, **how)

    def finish(file, out, *extra) -> bool:
        child = run(file, out, *extra)
        child.communicate()
        return child.returncode == 0

    folder = "exp1_dialogue/mini"
    # a loss that is not finite, on ranks
    (work / "blown").mkdir()
    (work / "blown/sitecustomize.py").write_text(BLOWN)
    child = run(longer, "nan", "--ranks", "2", PYTHONPATH=f"{work / 'blown'}:{ROOT}")
    note("loss that is not finite (a first step that blows the weights up, 2 ranks)", child, time.monotonic())
    saved = work / "nan" / folder / "not_finite.json"
    rows[-1]["saved"] = read_json(saved) if saved.is_file() else None
    rows[-1]["steps_kept"] = sorted(p.name for p in (work / "nan" / folder / "checkpoints/iteration-1.steps").glob("step-*"))
    # a lost rank
    child = run(longer, "lost", "--ranks", "2")
    said = until(child, "train-1" + SOME)
    os.kill(workers(work / "lost" / folder)[1], signal.SIGKILL)
    note("rank 1 of 2 killed (-9)", child, time.monotonic(), said)
    rows[-1]["resumed"] = finish(longer, "lost")  # on one rank
    # SIGTERM in training
    for ranks in ("1", "2"):
        child = run(longer, f"term{ranks}", "--ranks", ranks)
        said = until(child, "train-1" + SOME)
        child.send_signal(signal.SIGTERM)
        note(f"SIGTERM in training, {ranks} rank{'s' * (ranks == '2')}", child, time.monotonic(), said, lines=2)
        rows[-1]["resumed"] = finish(longer, f"term{ranks}", "--ranks", ranks)
    # of two ranks, one that stands still for a while, and one whose files may not grow
    child = run(longer, "slow", "--ranks", "2")
    said = until(child, "train-1" + SOME)
    slow = workers(work / "slow" / folder)[1]
    os.kill(slow, signal.SIGSTOP)
    time.sleep(10)
    os.kill(slow, signal.SIGCONT)
    note("rank 1 of 2 stands still for 10 s (SIGSTOP)", child, time.monotonic(), said)
    same = [kill_study.contents(work / out / folder) for out in ("slow", "term2")]
    rows[-1]["identical"] = same[0] == same[1]
    (work / "small").mkdir()
    (work / "small/sitecustomize.py").write_text(ONE_FULL)
    child = run(longer, "one full", "--ranks", "2", PYTHONPATH=f"{work / 'small'}:{ROOT}")
    note("rank 1 of 2 cannot write (its files may not grow beyond 4 KiB)", child, time.monotonic())
    rows[-1]["resumed"] = finish(longer, "one full", "--ranks", "2")
    # two runs in one folder
    child = run(longer, "one")
    said = until(child, "evaluate-0")
    since, second = time.monotonic(), run(longer, "one")
    note("a second run in one folder", second, since)
    child.kill()
    child.communicate()
    since = time.monotonic()
    child = run(longer, "one")
    note("a run after the first one's kill -9", child, since)
    # the disk
    small = ("unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=300k none \"$0\" && exec \"$@\"")
    (work / "full").mkdir()
    if subprocess.run([*small, str(work / "full"), "true"], capture_output=True).returncode == 0:
        note("disk full (a file system of 300 KiB)", run(mine, "full", wrap=(*small, str(work / "full"))), time.monotonic())
        shutil.copytree(work / "term1", work / "ro")
        readonly = ("unshare", "-rm", "sh", "-c", "mount --bind \"$0\" \"$0\" && mount -o remount,ro,bind \"$0\" && exec \"$@\"")
        note("read-only directory", run(mine, "ro", wrap=(*readonly, str(work / "ro"))), time.monotonic())
    else:
        rows.append({"fault": "disk full and read-only by mount", "printed": "NOT RUN: this machine allows no mounts"})
    limited = ("sh", "-c", "ulimit -f 60; exec \"$@\"", "sh")  # 512-byte or 1-KiB blocks
    note("a file that may not grow (RLIMIT_FSIZE)", run(mine, "limit", wrap=limited), time.monotonic())
    rows[-1]["resumed"] = finish(mine, "limit")
    (work / "a file").write_text("x")
    note("OUT is a file", run(mine, "a file"), time.monotonic())
    # corrupt files
    done = work / "term1"

    def corrupt(fault: str, name: str, change, *, resumes: bool = True) -> None:
        out = f"corrupt {len(rows)}"
        shutil.copytree(done, work / out)
        path = work / out / folder / name
        path.write_bytes(change(path.read_bytes()))
        since = time.monotonic()
        child = run(longer, out)
        text = rest(child)
        own = [line.strip() for line in re.split(r"[\r\n]+", text) if name.split("/")[-1] in line or line.startswith("repro: ")]
        again = [stage for stage in read_json(work / "term1" / folder / "run.json")["stages"] if f"{stage}: done before" not in text]
        line = (own or ["(no line)"])[0].replace(str(work), "DIR")
        rows.append({"fault": fault, "exit": child.returncode, "seconds": round(time.monotonic() - since, 1), "printed": line,
                     "made_again": again if child.returncode == 0 else [], "traceback": "Traceback" in text})
        say(f"- {fault}: exit {child.returncode}\n  {line}" + (f"\n  made again: {', '.join(again)}" if child.returncode == 0 else ""))

    def flip(data: bytes) -> bytes:
        return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]

    corrupt("run.json cut", "run.json", lambda d: d[: len(d) // 2])
    corrupt("a bit of the checkpoint flipped", "checkpoints/iteration-1/model.safetensors", flip)
    corrupt("a bit of the responses flipped", "responses/evaluation-1.jsonl", flip)
    corrupt("metrics.json cut", "metrics.json", lambda d: d[: len(d) // 2])
    # unfinished work: a run killed in sampling, and one stopped in training
    child = run(longer, "partial")
    until(child, "sample-1" + SOME), child.kill(), child.communicate()
    partial = next((work / "partial" / folder / "responses").glob("*.partial.jsonl"), None)
    if partial:
        partial.write_bytes(flip(partial.read_bytes()))
        note("a bit of unfinished responses flipped", run(longer, "partial"), time.monotonic())
    child = run(longer, "steps")
    until(child, "train-1" + SOME), child.send_signal(signal.SIGTERM), child.communicate()
    newest = sorted((work / "steps" / folder / "checkpoints/iteration-1.steps").glob("step-*/__0_0.distcp"))[-1]
    newest.write_bytes(flip(newest.read_bytes()))
    child, since = run(longer, "steps"), time.monotonic()
    text = rest(child)
    own = [line for line in re.split(r"[\r\n]+", text) if "step-" in line]
    rows.append({"fault": "a bit of a step checkpoint flipped", "exit": child.returncode, "seconds": round(time.monotonic() - since, 1),
                 "printed": "\n".join(own).replace(str(work), "DIR"), "traceback": "Traceback" in text})
    say(f"- {rows[-1]['fault']}: exit {child.returncode}\n  {rows[-1]['printed']}")
    for name, damage in (("model.safetensors", lambda d: d[:1000]), ("tokenizer.json", flip), ("config.json", lambda d: d[:20])):
        model = Path(shutil.copytree(tiny, work / f"bad-{name}"))
        (model / name).write_bytes(damage((model / name).read_bytes()))
        note(f"the model's {name} damaged", started(["run", "exp1", "--model", str(model), "--out", str(work / "x")], cwd=work), time.monotonic())
    queries = work / "queries.jsonl"
    queries.write_text('{"query": "fine"}\n{"query": \n')
    note("a queries file with a torn line", started(["run", "exp1", "--model", str(tiny), "--queries", str(queries), "--out", str(work / "x")],
                                                    cwd=work), time.monotonic())
