"""exp1 mini through vLLM itself, on a CPU: the weights served anew each iteration, and what a run does when its server dies,
does not come up, or is refused memory, and when the run is stopped. Needs `make vllm` and about ten minutes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch  # noqa: F401  in a run it is there before a server is

from repro.base.records import UserError, read_json, read_jsonl
from repro.models import embedded
from repro.sampling import launch

ROOT = Path(__file__).resolve().parents[2]
VLLM = os.environ.get("SAMI_VLLM") or ""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not VLLM, reason="NOT RUN: no vLLM here; `make vllm` installs it")]

SMALL = """import dataclasses
from repro.experiment import load_experiment
e = load_experiment("exp1", "mini")[0]
EXPERIMENTS = {"mini": dataclasses.replace(
    e, name="through_{engine}", iterations=1, sampling=dataclasses.replace(e.sampling, engine="{engine}", dtype="float32"),
    data=dataclasses.replace(e.data, subsets=("helpful",), evaluation=4, scored=0),
    train=dataclasses.replace(e.train, batch_size=2, batches=2, batches_increment=0))}
"""


def argv(folder: Path, engine: str = "vllm") -> list[str]:
    file = folder / f"{engine}.py"
    file.write_text(SMALL.replace("{engine}", engine))
    return [sys.executable, "-m", "repro.cli", "run", str(file), "--out", str(folder / "runs")]


def _heed() -> None:
    """A shell's background jobs are born deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, engine: str = "vllm", **env) -> subprocess.Popen:
    return subprocess.Popen(argv(folder, engine), cwd=ROOT, preexec_fn=_heed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | env)


def finish(folder: Path, engine: str = "vllm", **env) -> str:
    child = start(folder, engine, **env)
    said = child.communicate(timeout=1200)[0]
    assert child.returncode == 0, said[-3000:]
    return said


def home(folder: Path, engine: str = "vllm") -> Path:
    return folder / "runs" / f"through_{engine}" / "mini"


MARK = "SAMI_STARTED_BY"  # in the environment of all that these tests start


@pytest.fixture(autouse=True, scope="module")
def marked():
    os.environ[MARK] = str(os.getpid())
    yield
    del os.environ[MARK]


SESSIONS: set[int] = set()  # of servers that were started: a process that titles itself has no environment to be read


def serving() -> dict[int, str]:
    """Processes of a vLLM that these tests have started, by their command lines or the titles that they give themselves."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            line = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and (VLLM in line or line.startswith("VLLM::")):
                found[process.pid] = line
                if process.environ().get(MARK) == str(os.getpid()):
                    SESSIONS.add(os.getsid(process.pid))
    return {pid: line for pid, line in found.items() if _session(pid) in SESSIONS}


def _session(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(pid)


def nothing_left(patience: float = 60.0) -> bool:
    end = time.monotonic() + patience
    while (left := serving()) and time.monotonic() < end:
        time.sleep(0.2)
    return not left


def until_sampling(folder: Path, child: subprocess.Popen, answers: int = 2, patience: float = 300.0) -> None:
    """Until so many responses of the first stage are on the disk."""
    partial, end = home(folder) / "responses/evaluation-0.partial.jsonl", time.monotonic() + patience
    while time.monotonic() < end and child.poll() is None:
        if partial.exists() and partial.read_bytes().count(b'"answered"') >= answers:
            return
        time.sleep(0.02)
    pytest.fail(f"no response came: {child.communicate()[0][-2000:] if child.poll() is not None else serving()}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(folder)


def test_the_whole_loop_runs_and_each_iterations_weights_are_served(whole):
    folder, said = whole
    record, log = read_json(home(folder) / "run.json"), (home(folder) / "sampler.log").read_text()
    assert record["sampled_by"]["engine"] == "vllm" and record["sampled_by"]["started_here"] and record["sampled_by"]["version"]
    served = re.findall(r"starting vllm with (\S+);", said)
    first, last = str(embedded.embedded_model()), str((home(folder) / "checkpoints/iteration-1").resolve())
    assert served == [first, first, last] and log.count("POST /v1/completions") > 16
    rows = {k: read_jsonl(home(folder) / f"responses/evaluation-{k}.jsonl") for k in (0, 1)}
    assert len(rows[0]) == len(rows[1]) == 16 and all(row["ids"] for row in rows[0]) and rows[0] != rows[1]
    assert nothing_left(5)


def test_its_answers_in_float32_are_those_of_this_process(whole, tmp_path):
    """Of the initial weights; ties between two tokens may fall otherwise."""
    finish(tmp_path, "transformers")
    here, there = (read_jsonl(home(f, e) / "responses/evaluation-0.jsonl") for f, e in ((tmp_path, "transformers"), (whole[0], "vllm")))
    assert sum(a == b for a, b in zip(here, there)) >= 15 and len(here) == 16


@pytest.mark.parametrize("part", ["the server", "its engine"])
def test_a_server_killed_in_mid_sampling_is_one_line_and_the_same_command_goes_on(whole, tmp_path, part):
    child = start(tmp_path)
    until_sampling(tmp_path, child)
    pid = next(pid for pid, line in serving().items() if line.startswith("VLLM::") == (part == "its engine") and "repro.sampling.launch" not in line)
    os.kill(pid, signal.SIGKILL)
    said = child.communicate(timeout=300)[0]
    assert child.returncode == 2 and "Traceback" not in said
    line = said.strip().splitlines()[-1]
    print(line)
    assert re.search(r"evaluate-0: \d+ of 16 responses are missing: .*what was answered stays: run the same command to go on", line)
    assert nothing_left()
    kept = {row["key"] for row in read_jsonl(home(tmp_path) / "responses/evaluation-0.partial.jsonl") if row.get("status") == "answered"}
    finish(tmp_path)
    assert len(kept) >= 2 and nothing_left(5)
    a, b = (read_jsonl(home(f) / "responses/evaluation-0.jsonl") for f in (tmp_path, whole[0]))
    assert sum(x == y for x, y in zip(a, b)) >= 15


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_no_server(tmp_path, number, code):
    child = start(tmp_path)
    until_sampling(tmp_path, child)
    child.send_signal(number)
    said = child.communicate(timeout=120)[0]
    print(said.strip().splitlines()[-1])
    assert child.returncode == code and "Traceback" not in said
    assert nothing_left()


def served(tmp_path, **more):
    return launch.served("vllm", str(embedded.embedded_model()), url=None, dtype="float32", share=None, context=256,
                         log=tmp_path / "sampler.log", say=print, **more)


def refused(tmp_path) -> str:
    with pytest.raises(UserError) as e, served(tmp_path):
        pytest.fail("it came up")
    print(e.value)
    assert "\n" not in str(e.value) and nothing_left()
    return str(e.value)


def test_a_port_that_is_taken_is_said(tmp_path, monkeypatch):
    with socket.create_server((launch.HOST, 0)) as taken:
        monkeypatch.setattr(launch, "_free_port", lambda: taken.getsockname()[1])
        assert "address already in use" in refused(tmp_path).lower()


def test_memory_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4000")
    said = refused(tmp_path)
    assert "memory" in said and "4000" in said


def test_a_start_that_takes_longer_than_it_may_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "START_S", 2.0)
    monkeypatch.setattr(launch, "SAY_EVERY_S", 1.0)
    assert "was not ready within 2 s" in refused(tmp_path)
