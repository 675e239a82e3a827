"""kill -9 at random moments of a whole run; does the same command end with the same bytes, and is nothing done twice?

    python tests/faults/kill_study.py --kills 110 --seed 0                       # the tiny model, every stage
    python tests/faults/kill_study.py --experiment exp1 --against runs/exp1_dialogue/mini   # one kill of `make exp1`

Each trial runs in a fresh folder. A stage is drawn, then a moment of it; SIGKILL goes to the process group; the same run is
started again, and every other time killed again. A kill counts where the return code is -9. After it every
file must be whole (the old one or the new one); after the last run every file must be that of an undisturbed run, and no
unit that was finished before a kill may have been begun again. The child tells of each unit (sampling batch, writer's
answer, verdict, training step, stage) on a pipe when it begins and when it is on the disk: what the run says of itself is
not trusted.

Children are forked from a process that has imported torch and never used it, so a trial costs a run and not the imports.
"""

import argparse
import dataclasses
import gc
import json
import os
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # a forked process has one thread
    os.environ[name] = "1"
TESTS, ROOT = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(ROOT)]

import processes  # noqa: E402

from repro.base import records  # noqa: E402
from repro.base.records import MARKER, UserError, digest, dumps, loads, read_json, read_jsonl, sealed, write_text  # noqa: E402

RECORD = ROOT / "results/kill_study.json"
STAGES = ("prepare", "write", "evaluate", "baseline", "sample", "train", "judge", "metrics", "report")
RUNS = {"dialogue": 1, "summary": 1, "dialogue at a server": 1, "dialogue on 2 ranks": 2, "brief": 1}  # each with its number of ranks
TAKES = {"dialogue": 0.3, "summary": 0.4, "dialogue at a server": 0.24, "dialogue on 2 ranks": 0.06, "brief": 1.0}  # share of the trials
A_STAGE = 60  # kills of each that the record is to have: a stage is drawn the more often, the more it lacks
AGAIN, MOST = 0.5, 5  # the chance that a resumed run is killed too, and so on; kills of one trial at most
LIMIT_S = 300.0
# What may differ between two undisturbed runs, and so is left out of the comparison: wall clock, memory, the bill and the
# ledger of a judge (requests in flight at a kill are asked again, and arrive in any order).
CLOCKS = {"seconds", "peak_rss_gib", "date", "usd", "check"}  # the check of a line covers its date


def kind(stage: str) -> str:
    return re.sub(r"-\d+$", "", stage)


# ---- the child: a whole run that tells of its units

def experiment_of(name: str, tiny: Path):
    from test_experiments import small

    from repro.base.settings import JudgeSpec, ModelSpec
    from repro.experiment import load_experiment

    judge = JudgeSpec(judges=("rule", "likelihood", "openai"), model="judge-1", answer="text")
    if name == "summary":  # with a writer, a baseline and a judge behind a server
        weak = next(e for e in load_experiment("exp2", "mini") if e.writer)
        return dataclasses.replace(small(weak, tiny), iterations=2, judge=judge,
                                   baseline=ModelSpec(name=str(tiny), label="baseline"))
    dialogue = small(load_experiment("exp1", "mini")[0], tiny)
    if name == "brief":
        return dataclasses.replace(dialogue, iterations=1, judge=judge)
    if "server" in name:  # one that the run starts and stops: vLLM's stand-in
        return dataclasses.replace(dialogue, iterations=2, sampling=dataclasses.replace(dialogue.sampling, engine="vllm"))
    if "ranks" in name:  # each training and each scoring is a torchrun
        return dataclasses.replace(dialogue, iterations=1, judge=JudgeSpec(judges=("rule",)))
    return dataclasses.replace(dialogue, iterations=2)


def watched(tell) -> None:
    """Have the modules tell of each unit: "begin" before its work, "done" once it is on the disk."""
    from test_variants import answer

    from repro.core import checkpoints, engines
    from repro.sampling import local, writers
    from repro.servers.ledger import Ledger
    from repro.stages import jobs, sample
    from repro.stages.run import Run

    now = {"stage": "prepare", "unit": None, "step": 0}

    def around(owner, name, before=None, after=None):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if before:
                before(*args, **kwargs)
            result = real(*args, **kwargs)
            if after:
                after(result, *args, **kwargs)
            return result
        setattr(owner, name, call)

    def begin(unit):
        now["unit"] = unit
        tell("begin", unit)

    def done(*_, **__):
        tell("done", now["unit"])

    def stage(todo, run, name, *_, **__):
        if todo:
            now["stage"] = name
            tell("begin", f"stage {name}")

    around(Run, "stage", after=stage)
    around(Run, "finish", after=lambda _, run, name, *__, **___: tell("done", f"stage {name}"))
    around(local, "sample_batch", lambda model, tokenizer, prompts, **_: now["stage"] == "write" or begin(
        f"batch {now['stage']} {digest(list(prompts))[:12]}"))
    around(sample, "append_jsonl", after=done)

    real_answer = writers.LocalWriter.answer
    writers.LocalWriter.answer = lambda self, messages, **how: (  # asked, and not listened to: it writes nothing usable
        begin(f"answer {digest([messages, how])[:12]}"), real_answer(self, messages, **how), answer(self, messages))[-1]
    around(writers, "append_jsonl", after=done)

    def request(ledger, call):
        return f"verdict {call.key[:12]} {len(ledger.answers.get(call.key, []))}"

    real_end = Ledger.end
    around(Ledger, "begin", lambda ledger, call, *_: tell("begin", request(ledger, call)))

    def end(self, call, number, cost, **outcome):
        unit = request(self, call)
        real_end(self, call, number, cost, **outcome)
        if outcome["status"] == "answered":
            tell("done", unit)
    Ledger.end = end

    # Steps of one process; every step is saved, so that saves are killed too. Those of ranks: `saved_queries`.
    checkpoints.StepCheckpoints.__init__.__kwdefaults__["worth"] = 0.0

    def restored(trace, *_):
        now["step"] = len(trace)

    def step(*_):
        now["step"] += 1
        begin(f"step {now['stage']} {now['step']}")

    around(checkpoints.StepCheckpoints, "restore", after=restored)
    around(engines.OneProcess, "clip", step)
    around(checkpoints.StepCheckpoints, "save", after=done)

    real_train, heard = jobs.train, []
    jobs.train = lambda folder, iteration, ranks, *, on_query, **how: (heard.clear(), real_train(
        folder, iteration, ranks, **how, on_query=lambda n: (
            heard or tell("restored", f"{iteration} {n}"), heard.append(n), on_query(n))))[-1]


def forked(act, log: Path) -> tuple[int, int]:
    """Run `act(tell)` in a forked session of its own; returns its process id and the pipe that it tells on."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        os.read(out, 1)  # it has its own process group
        return pid, out
    code = 1
    try:
        os.setsid()
        os.write(into, b".")
        with open(log, "ab", buffering=0) as f:
            os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
        act(lambda word, what: os.write(into, f"{word} {what}\n".encode()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


@dataclass
class Ran:
    """One child: its return code, what it told with the second it told it, and when it was killed and in which stage."""

    code: int = 0
    told: list[tuple[float, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    stage: str = "prepare"
    into: float = 0.0

    def stages(self) -> dict[str, float]:
        """Seconds from each stage's beginning to the next one's."""
        begun = [(0.0, "prepare"), *((at, what[6:]) for at, word, what in self.told if word == "begin"
                                     and what.startswith("stage ")), (self.seconds, "")]
        return {name: after - at for (at, name), (after, _) in zip(begun, begun[1:])}


def run_child(act, log: Path, *, target: str | None = None, wait: float = 0.0) -> Ran:
    """Run `act`; with a `target`, kill its process group `wait` seconds after that stage begins."""
    ran, start, data = Ran(), time.monotonic(), b""
    pid, pipe = forked(act, log)
    deadline = start + wait if target == "prepare" else None
    killed = False
    while True:
        now = time.monotonic()
        if (deadline is not None and now >= deadline and not killed) or now - start > LIMIT_S:
            killed = True
            os.killpg(pid, signal.SIGKILL)
        ready, _, _ = select.select([pipe], [], [], max(0.0, (start + LIMIT_S if deadline is None or killed else deadline) - now))
        if not ready:
            continue
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        data += chunk
        *lines, data = data.split(b"\n")
        for line in lines:
            word, what = line.decode().split(" ", 1)
            ran.told.append((time.monotonic() - start, word, what))
            if (word, what) == ("begin", f"stage {target}"):
                deadline = time.monotonic() + wait
    os.close(pipe)
    _, status = os.waitpid(pid, 0)
    ran.code, ran.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - start
    *_, (ran.stage, ran.into) = ran.stages().items()
    return ran


# ---- what a folder holds

def contents(folder: Path) -> dict[str, str]:
    """Every file of a finished run -> what of it must be the same in any run."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name == "sampler.log":  # of a port and of processes
            continue
        if name in ("run.json", "writing.jsonl", "judge_requests.jsonl"):
            rows = [read_json(path)] if path.suffix == ".json" else read_jsonl(path)
            rows = [row for row in rows if row.get("record") not in ("attempt", "outcome")]
            found[name] = digest(json.loads(dumps(rows), object_hook=lambda o: {k: v for k, v in o.items() if k not in CLOCKS}))
        elif name == "report.html":
            found[name] = re.sub(r"seed \d+: [\d.]+ min", "", path.read_text())
        else:
            found[name] = records.file_sha256(path)
    if "run.json" in found:  # dates and minutes are in these two, whose sha256 is therefore a run's own
        record = read_json(folder / "run.json")
        for facts in record["stages"].values():
            facts["outputs"] = {k: v for k, v in facts["outputs"].items() if k not in ("writing.jsonl", "report.html")}
            facts.pop("key")  # it depends on those
        found["run.json"] = digest(json.loads(dumps(record), object_hook=lambda o: {k: v for k, v in o.items() if k not in CLOCKS}))
    return found


def torn(folder: Path, final: dict[str, str]) -> list[str]:
    """The files that are neither the old state nor the new one, after a kill. What has no marker yet (weights, a step's
    shards) and temporary files are no state: nothing believes them."""
    bad = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        home = next((p for p in path.parents if p != folder and (p.name.startswith(("step-", "iteration-")))
                     and not p.name.endswith(".steps")), None)
        try:
            if path.name.endswith(".tmp") or path.name in (".lock", "sampler.log"):
                continue
            if home is not None:
                if (home / MARKER).exists() and path.name == MARKER and not sealed(home):
                    bad.append(name)
            elif name.endswith(".partial.jsonl") or name in ("writing.jsonl", "judge_requests.jsonl"):
                for line in path.read_bytes().split(b"\n")[:-1]:
                    loads(line.decode())
            elif path.suffix == ".json" and (name == "run.json" or name.endswith(".job.json")):
                read_json(path)
            elif name == "report.html":
                path.read_text().index("</html>")
            elif name not in final or final[name] != records.file_sha256(path):
                bad.append(name)
        except (UserError, ValueError) as e:
            bad.append(f"{name}: {e}")
    return bad


def outlived(folder: Path, patience: float = 20.0) -> list[int]:
    """The processes of servers that the run has started (as the stand-in tells them) which are there `patience` seconds later."""
    log = folder / "sampler.log"
    told = re.findall(r"^pids: (\d+) (\d+)$", log.read_text(), re.MULTILINE) if log.exists() else []
    return processes.left([int(pid) for pids in told for pid in pids], patience)


def saved_queries(folder: Path) -> dict[str, int]:
    """Iteration -> queries of the steps whose checkpoint is complete."""
    found = {}
    for steps in folder.glob("checkpoints/iteration-*.steps"):
        name = steps.name.split(".")[0]
        try:
            key = read_json(folder / f"checkpoints/{name}.job.json")["key"]
        except UserError:
            continue
        whole = [s for s in sorted(steps.iterdir()) if (s / MARKER).exists() and sealed(s, key)]
        if whole:
            found[name.split("-")[1]] = sum(row["queries"] for row in read_json(whole[-1] / "trace.json"))
    return found


def redone(before: list[Ran], saved: dict[str, int], ran: Ran) -> list[str]:
    """Units that `ran` began although they were done before."""
    finished = {what for earlier in before for _, word, what in earlier.told if word == "done"}
    again = [what for _, word, what in ran.told if word == "begin" and what in finished]
    for _, word, what in ran.told:
        if word == "restored":
            iteration, queries = what.split()
            if int(queries) < saved.get(iteration, 0):
                again.append(f"iteration {iteration}: {saved[iteration]} queries saved, {queries} restored")
    return again


# ---- a trial

@dataclass
class Setting:
    """One of RUNS, run to its end without a kill (twice in the first study of a record: the comparison must hold)."""

    name: str
    act: object
    folder: str
    final: dict[str, str] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def undisturbed(setting: Setting, work: Path, times: int = 2) -> Setting:
    for k in range(times):
        out = work / f"{setting.name} {k}"
        ran = run_child(setting.act(out), work / "log")
        if ran.code:
            raise SystemExit(f"an undisturbed run failed:\n{(work / 'log').read_text()[-4000:]}")
        found = contents(out / setting.folder)
        if k and found != setting.final:
            raise SystemExit(f"two undisturbed runs differ: {sorted(n for n in found if found[n] != setting.final.get(n))}")
        setting.final, setting.stages, setting.seconds = found, ran.stages(), ran.seconds
    return setting


def trial(setting: Setting, work: Path, rng: random.Random, had: dict[str, int]) -> dict:
    """One folder, killed once or more often, then run to its end. `had`: kills so far by kind of stage."""
    out, before, kills, faults, scheduled = work / "trial", [], [], [], 0
    shutil.rmtree(out, ignore_errors=True)
    (work / "log").unlink(missing_ok=True)
    folder, saved = out / setting.folder, {}
    planned = 1
    while planned < MOST and rng.random() < AGAIN:
        planned += 1
    while True:
        left = [s for s in setting.stages if not any(
            (word, what) == ("done", f"stage {s}") for ran in before for _, word, what in ran.told)]
        target, wait = None, 0.0
        if scheduled < planned:
            scheduled += 1
            kinds = list(dict.fromkeys(map(kind, left)))
            if setting.name.endswith("ranks"):
                kinds = [k for k in ("train", "evaluate") if k in kinds] or kinds
            drawn = rng.choices(kinds, [max(1, A_STAGE - had.get(k, 0)) for k in kinds])[0]
            target = rng.choice([s for s in left if kind(s) == drawn] or left)
            wait = rng.random() * setting.stages[target]
        ran = run_child(setting.act(out), work / "log", target=target, wait=wait)
        faults += [f"redone: {unit}" for unit in redone(before, saved, ran)]
        before.append(ran)
        if ran.code == -signal.SIGKILL and target:
            kills.append([ran.stage, round(ran.into, 3)])
            faults += [f"torn: {name}" for name in torn(folder, setting.final)]
            faults += [f"outlived the run: process {pid}" for pid in outlived(folder)]
            saved = saved_queries(folder)
        elif ran.code:
            faults.append(f"exit code {ran.code}")
            break
        else:
            break
    faults += [f"outlived the run: process {pid}" for pid in outlived(folder)]  # of a server that had not told its own at the kill, too
    found = contents(folder) if before[-1].code == 0 else {}
    leftover = [n for n in found if n.endswith((".tmp", ".lock")) or ".partial" in n or ".steps" in n or ".job" in n]
    differ = sorted(n for n in found.keys() | setting.final.keys() if found.get(n) != setting.final.get(n))
    return {"run": setting.name, "kills": kills, "scheduled": scheduled, "identical": not differ, "differ": differ,
            "faults": faults + [f"left: {n}" for n in leftover],
            "lost_s": round(sum(r.seconds for r in before) - setting.seconds, 2)}


# ---- the record

def summarise(record: dict) -> dict:
    """The figures over all trials, and over the kills of whole shipped experiments."""
    trials = record["trials"]
    fired = [t for t in trials if t["kills"]]
    whole = record.get("whole_runs", [])
    stages = Counter(kind(stage) for t in (*fired, *whole) for stage, _ in t["kills"])
    lost = [t["lost_s"] / len(t["kills"]) for t in fired]
    return record | {
        "kills": sum(len(t["kills"]) for t in (*fired, *whole)),
        "identical": sum(len(t["kills"]) for t in (*fired, *whole) if t["identical"] and not t["faults"]),
        "stages": {s: stages[s] for s in STAGES if stages[s]},
        "scheduled": sum(t["scheduled"] for t in (*trials, *whole)),
        "killed_again": sum(len(t["kills"]) > 1 for t in fired),
        "redone": sum(f.startswith("redone") for t in (*fired, *whole) for f in t["faults"]),
        "torn": sum(f.startswith("torn") for t in (*fired, *whole) for f in t["faults"]),
        "seconds_lost_per_kill": {"median": round(statistics.median(lost), 2), "max": round(max(lost), 2),
                                  "n": len(lost)} if lost else None}


def write_record(path: Path, record: dict) -> None:
    """Its figures first; a trial a line."""
    record = summarise(record)
    trials = ",\n  ".join(dumps(t) for t in record.pop("trials"))
    write_text(path, dumps(record, indent=1).removesuffix("\n}") + f',\n "trials": [\n  {trials}\n ]\n}}\n')


def read_record(path: Path) -> dict:
    return read_json(path) if path.is_file() else {"trials": [], "seeds": [], "provenance": []}


def provenance() -> dict:
    from importlib.metadata import version

    from repro.base.identity import commit
    from repro.stages.folder import PACKAGES

    return {"commit": commit(), "packages": {name: version(name) for name in PACKAGES}, "python": sys.version.split()[0],
            "cores": os.cpu_count()}


# ---- the two studies

def imports() -> None:
    """What a run imports as it goes, imported once; no thread is started by it."""
    import httpx2  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_pdf  # noqa: F401
    import openai.resources.chat  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from repro.stages import (
        pipeline,  # noqa: F401
    )

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not forked"
    gc.collect(), gc.freeze()  # a run collects garbage each time that it lets a model go: the imports stay


def save_tiny(folder: Path) -> None:
    from conftest import save_tiny

    save_tiny(folder)


def study(args) -> dict:
    """Trials of the tiny model's runs until `--kills` have fired (or `--minutes` are over)."""
    imports()
    from judge_server import JudgeServer

    from repro.servers.endpoint import Endpoint
    from repro.stages.pipeline import run

    record = read_record(args.record)
    if args.seed in record["seeds"]:
        raise SystemExit(f"{args.record} holds the trials of seed {args.seed} already")
    work = Path(tempfile.mkdtemp(prefix="kill-study-", dir=args.work))
    tiny = work / "tiny"
    if run_child(lambda tell: save_tiny(tiny), work / "log").code:
        raise SystemExit((work / "log").read_text())
    def serve(tell):
        with JudgeServer(latency=0.01).serve() as address:
            tell("at", address)
            signal.pause()

    stand_in = work / "vllm"
    stand_in.write_text(f"#!/bin/sh\nexec {sys.executable} {TESTS / 'fake_vllm.py'} \"$@\"\n")
    stand_in.chmod(0o755)
    os.environ["SAMI_VLLM"] = str(stand_in)
    server, pipe = forked(serve, work / "server.log")
    url = os.read(pipe, 1000).decode().split()[1]

    def act_of(name):
        experiment, endpoint = experiment_of(name, tiny), Endpoint(
            model="judge-1", base_url=url, price=(3.0, 12.0), max_usd=50.0, deadline_s=30.0, backoff_s=0.02, concurrency=4)
        return experiment.path, lambda out: lambda tell: (watched(tell), run(
            experiment, out, endpoint=endpoint, ranks=RUNS[name]))

    began, fired = time.monotonic(), 0
    try:
        settings = {}
        for name in args.runs:
            folder, act = act_of(name)
            settings[name] = undisturbed(Setting(name, act, str(folder)), work, 1 if record["trials"] else 2)
            print(f"{name}: undisturbed {settings[name].seconds:.1f} s ("
                  + ", ".join(f"{s} {t:.1f}" for s, t in settings[name].stages.items())
                  + f"), {len(settings[name].final)} files", flush=True)
        record["seeds"].append(args.seed)
        record["provenance"].append({"seed": args.seed, "undisturbed_s": {
            n: round(s.seconds, 1) for n, s in settings.items()}} | provenance())
        k = 0
        while fired < args.kills and time.monotonic() - began < 60 * args.minutes:
            rng = random.Random(f"kill study/{args.seed}/{k}")
            name = rng.choices(args.runs, [TAKES[n] for n in args.runs])[0]
            done = trial(settings[name], work, rng, summarise(record)["stages"]) | {"seed": args.seed}
            record["trials"].append(done)
            write_record(args.record, record)
            k, fired = k + 1, fired + len(done["kills"])
            good = done["identical"] and not done["faults"]
            print(f"{fired:4d} {name}: killed in " + ", ".join(f"{s} at {at:.2f} s" for s, at in done["kills"])
                  + (f"; identical, {done['lost_s']:.1f} s lost" if good else f"; NOT GOOD: {done['differ']} {done['faults']}"),
                  flush=True)
            if not good:
                shutil.copytree(work / "trial", work / f"bad-{k}")
                shutil.copy(work / "log", work / f"bad-{k}.log")
                print(f"kept: {work}/bad-{k}", flush=True)
    finally:
        os.killpg(server, signal.SIGKILL)
        os.waitpid(server, 0)
    if not list(work.glob("bad-*")):
        shutil.rmtree(work)
    return record


def whole_run(args) -> dict:
    """One kill of a shipped experiment, as its make target runs it, held against a finished run of the same."""
    record = read_record(args.record)
    against = read_json(args.against / "run.json")
    out = Path(tempfile.mkdtemp(prefix="kill-study-", dir=args.work))
    folder = out / against["config"]["name"] / against["config"]["profile"]
    made = (ROOT / ".venv/.complete").exists()
    command = (["make", args.experiment, f"PROFILE={args.profile}", f"OUT={out}"] if made else
               [sys.executable, "-m", "repro.cli", "run", args.experiment, "--profile", args.profile, "--out", str(out)])
    seconds = {stage: facts["seconds"] for stage, facts in against["stages"].items()}
    order = sorted(seconds, key=lambda s: _order(s, against["config"]["iterations"]))
    rng = random.Random(f"whole run/{args.seed}")
    target = rng.choices(order, [seconds[s] for s in order])[0]  # uniform over the run's time
    into = rng.random() * seconds[target]
    print(f"{' '.join(command)}\nto be killed in {target}, {into:.1f} s into it", flush=True)
    before = order[: order.index(target)]
    env = os.environ | {"OMP_NUM_THREADS": str(against["threads"])}  # a sum depends on them

    def start():
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)

    def finished():
        try:
            return read_json(folder / "run.json")["stages"]
        except UserError:
            return {}

    began = time.monotonic()
    child = start()
    while child.poll() is None and not set(before) <= finished().keys():
        time.sleep(0.1)
    try:
        child.wait(into)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
    code, at_kill = child.wait(), time.monotonic() - began
    print(f"return code {code} after {at_kill:.1f} s", flush=True)
    assert code == -signal.SIGKILL, "the kill did not fire"
    stages = finished()
    here = next((s for s in order if s not in stages), order[-1])
    faults = [f"torn: {n}" for n in torn(folder, contents(args.against))]
    saved = saved_queries(folder)
    began = time.monotonic()
    child = start()
    restored = child.wait()
    resumed = time.monotonic() - began
    if restored:
        faults.append(f"exit code {restored}")
    final = read_json(folder / "run.json")
    faults += [f"redone: stage {s}" for s, facts in stages.items() if final["stages"][s] != facts]
    found, expected = contents(folder), contents(args.against)
    differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n) and n != "run.json")
    done = {"command": " ".join(command).replace(str(out), "OUT").replace(sys.executable, "python"),
            "kills": [[here, round(into, 1)]], "scheduled": 1, "identical": not differ, "differ": differ, "faults": faults,
            "killed_after_s": round(at_kill, 1), "resumed_s": round(resumed, 1), "undisturbed_s": round(sum(seconds.values()), 1),
            "metrics_sha256": records.file_sha256(folder / "metrics.json"), "steps_saved_at_kill": saved, "seed": args.seed,
            "commit_of_undisturbed": against["commit"]} | provenance()
    print(f"{'identical' if done['identical'] else 'NOT identical: ' + str(differ)}; {faults or 'no fault'}", flush=True)
    shutil.rmtree(out)
    record.setdefault("whole_runs", []).append(done)
    return record


def _order(stage: str, iterations: int) -> tuple:
    """The place of a stage in a run."""
    where = {"write": (-2,), "evaluate-0": (-1,), "baseline": (0,), "judge": (iterations + 1,), "metrics": (iterations + 2,),
             "report": (iterations + 3,)}
    return where.get(stage) or (int(stage.split("-")[1]), ("sample", "train", "evaluate").index(kind(stage)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=110, help="stop once so many have fired")
    parser.add_argument("--minutes", type=float, default=600.0, help="or after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=[name for name in RUNS if name != "brief"])
    parser.add_argument("--record", type=Path, default=RECORD, help="its trials are kept, these are added")
    parser.add_argument("--work", type=Path, help="where the run folders go; by default the system's folder for such files")
    parser.add_argument("--experiment", help="instead: one kill of this experiment, as make runs it")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--against", type=Path, help="a finished, undisturbed run of it")
    args = parser.parse_args()
    if bool(args.experiment) != bool(args.against):
        parser.error("--experiment and --against go together")
    record = whole_run(args) if args.experiment else study(args)
    write_record(args.record, record)
    record = summarise(record)
    print(f"{args.record}: {record['kills']} kills, {record['identical']} identical, {record['redone']} units done again, "
          f"{record['torn']} torn files; {record['stages']}")
    return int(record["identical"] != record["kills"])


if __name__ == "__main__":
    raise SystemExit(main())
