"""The pipeline and its torchrun workers: what a signal, a lost rank and a lost pipeline leave, and that it goes on."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from fsdp_ranks import ragged
from safetensors.torch import load_file, save_file
from test_experiments import small

from repro.base.records import UserError, read_jsonl, sealed
from repro.base.training import TrainSpec
from repro.core.engines import OneProcess
from repro.experiment import load_experiment
from repro.stages import jobs, rank
from repro.stages.folder import logprob_file
from repro.stages.pipeline import run

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
STEPS = 40
PIPELINE = """
import signal, sys
from pathlib import Path
from repro.stages import jobs
from repro.base.records import UserError
def end(number, frame):
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, end)
try:
    jobs.train(Path(sys.argv[1]), 1, 2, on_query=lambda n: print("queries", n, flush=True))
except UserError as e:
    print(e, flush=True)
    sys.exit(2)
"""


def write_job(folder: Path, model: Path) -> None:
    spec = TrainSpec(batch_size=2, batches=STEPS, learning_rate=1e-4, precision="fp32")
    jobs.write_job(folder, 1, model=str(model), pairs=ragged(2 * STEPS), spec=spec, backend="shared", key="key",
                     out="checkpoints/iteration-1", seed=0)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The job done by one process: its trace and weights."""
    folder = tmp_path_factory.mktemp("alone")
    write_job(folder, tiny)
    return jobs.work(folder, 1, OneProcess(), lambda n: None), load_file(folder / "checkpoints/iteration-1/model.safetensors")


@pytest.fixture
def pipeline(tiny, tmp_path):
    """A pipeline in the middle of training on two ranks."""
    write_job(tmp_path, tiny)
    process = subprocess.Popen([sys.executable, "-c", PIPELINE, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)
    for _ in range(4):
        assert process.stdout.readline().startswith("queries"), process.stderr.read()
    yield process
    process.kill()
    process.communicate()


def workers(folder: Path) -> dict[int, int]:
    """Rank -> process id of the workers in a folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"repro.stages.rank" in words and str(folder).encode() in words and b"torch.distributed.run" not in words:
            found[int(next(v[5:] for v in environment if v.startswith(b"RANK=")))] = int(process.name)
    return found


def goes_on(folder: Path, ranks: int, alone) -> None:
    """The same job ends as if nothing had happened, without its first steps again."""
    assert not (folder / "checkpoints/iteration-1").exists()
    assert [p for p in (folder / jobs.steps_folder(1)).iterdir() if sealed(p, "key")]
    told = []
    trace = jobs.train(folder, 1, ranks, on_query=told.append)
    assert sum(told) == 2 * STEPS and told[0] >= 2  # what was done before
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in trace] == pytest.approx([row[key] for row in alone[0]], rel=1e-3)
    weights = load_file(folder / "checkpoints/iteration-1/model.safetensors")
    assert weights.keys() == alone[1].keys()
    for name, tensor in alone[1].items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=0)


def test_sigterm_to_the_pipeline_saves_the_step_of_its_fsdp_ranks(pipeline, tmp_path, alone, forked_ranks):
    pipeline.send_signal(signal.SIGTERM)
    assert pipeline.wait(60) == 128 + signal.SIGTERM
    assert not workers(tmp_path)
    goes_on(tmp_path, 2, alone)


def test_a_lost_fsdp_rank_ends_all_within_a_minute_with_the_reason(pipeline, tmp_path, alone, forked_ranks):
    os.kill(workers(tmp_path)[1], signal.SIGKILL)
    start = time.monotonic()
    said = pipeline.stdout.read().splitlines()[-1]
    assert pipeline.wait(60) == 2 and time.monotonic() - start < 60
    assert said == ("iteration-1 on 2 ranks stopped: rank 1 was lost (killed by signal 9); what is saved stays: run the same "
                    "command to go on")
    assert not workers(tmp_path)
    goes_on(tmp_path, 1, alone)


def test_fsdp_ranks_end_with_their_pipeline(pipeline, tmp_path):
    """They must not write into a folder whose lock is free."""
    assert len(workers(tmp_path)) == 2
    pipeline.kill()
    limit = time.monotonic() + 20
    while workers(tmp_path) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not workers(tmp_path)
    assert not (tmp_path / "checkpoints/iteration-1").exists()  # they did not do the rest of it first


def test_an_fsdp_rank_whose_stdin_ends_ends_at_once():
    """Not only when it next tells something: it may be in the middle of a long step."""
    code = ("import threading, time; from repro.stages import rank; threading.Thread(target=rank._heed, args=([],), "
            "daemon=True).start(); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    child.stdin.close()
    try:
        assert child.wait(40) == 1
    finally:
        child.kill()
        child.wait()


def test_fsdp_workers_tell_a_loss_that_is_not_finite_in_one_line(tiny, tmp_path):
    poisoned = Path(shutil.copytree(tiny, tmp_path / "poisoned"))
    weights = load_file(poisoned / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][byte_tokenizer()("e").input_ids[0]] = torch.nan  # not tried by repro/core/probe.py
    config = json.loads((poisoned / "config.json").read_text()) | {"tie_word_embeddings": False}
    (poisoned / "config.json").write_text(json.dumps(config))
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    write_job(tmp_path, poisoned)
    with pytest.raises(rank.UserError, match=r"^iteration 1, step 1: loss nan \(on ranks \[0, 1\]\), gradient norm nan: not fin"):
        jobs.launch(tmp_path, jobs.job_file(1), 2, on_query=lambda n: None)
    facts = json.loads((tmp_path / "not_finite.json").read_text())
    assert facts == {"iteration": 1, "step": 1, "ranks": [0, 1], "loss": "nan", "grad_norm": "nan", "queries": ["q0", "q1"]}


def test_a_whole_run_whose_iteration_is_trained_by_fsdp_ranks(tiny, tmp_path, unrendered, served_ranks):
    """Another number of ranks is no other config: what is finished counts, and the training is the same to rounding."""
    experiment = dataclasses.replace(small(load_experiment("exp1", "mini")[0], tiny), iterations=1)
    records, said = [], []
    for ranks in (1, 2):
        folder = run(experiment, tmp_path / str(ranks), say=said.append, ranks=ranks)
        records.append(json.loads((folder / "run.json").read_text()))
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["iteration-1"]  # no job, no steps
    scored = [[row for k in (0, 1) for row in read_jsonl(tmp_path / str(ranks) / experiment.path / logprob_file(k))]
              for ranks in (1, 2)]
    for one, two in zip(*scored, strict=True):
        assert one["query"] == two["query"] and one["tokens"] == two["tokens"]
        assert torch.tensor(two["logprobs"]) == pytest.approx(torch.tensor(one["logprobs"]), rel=2e-2)
        assert two["initial"] == pytest.approx(one["initial"], rel=2e-2)
    assert not list(tmp_path.glob("**/*.job.json"))
    one, two = (record["stages"]["train-1"] for record in records)
    assert (one["ranks"], two["ranks"]) == (1, 2) and records[0]["config_hash"] == records[1]["config_hash"]
    assert [row["loss"] for row in two["trace"]] == pytest.approx([row["loss"] for row in one["trace"]], rel=2e-2)  # bf16 products
    said.clear()
    run(experiment, tmp_path / "2", say=said.append)
    assert "train-1: done before, skipped" in said


def test_two_nodes_of_one_fsdp_rank_each(tiny, tmp_path, alone, monkeypatch, capfd):
    """The pipeline is node 0 and names the command of the other, which may come earlier or later."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    write_job(tmp_path, tiny)
    other = subprocess.Popen([sys.executable, "-m", *jobs.torchrun(tmp_path, jobs.job_file(1), 1, 2, 1)], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT)
    try:
        trace = jobs.train(tmp_path, 1, 1, nodes=2, on_query=lambda n: None)
        assert other.wait(60) == 0, other.stdout.read()
    finally:
        other.kill()
        other.communicate()
    assert [row["loss"] for row in trace] == pytest.approx([row["loss"] for row in alone[0]], rel=1e-3)
    weights = load_file(tmp_path / "checkpoints/iteration-1/model.safetensors")
    for name, tensor in alone[1].items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=0)
    assert f"start there: {sys.executable} -m {' '.join(jobs.torchrun(tmp_path, jobs.job_file(1), 1, 2, 1))}\n" in capfd.readouterr().err


def test_an_fsdp_worker_may_print_what_is_no_text(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text("import sys\nfor _ in range(9000): sys.stdout.buffer.write(bytes([0xff]) * 40 + b'\\n')\n"
                                      "print('{\"row\": 7}\\n{\"done\": 1}', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(jobs, "torchrun", lambda *args: ["loud"])
    found = []
    launch = threading.Thread(daemon=True, target=lambda: found.append(jobs.launch(tmp_path, "x.job.json", 2, on_query=lambda n: None)))
    launch.start()
    launch.join(60)
    assert found == [[7]]  # nothing, where the run hangs


def test_an_fsdp_scoring_job_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fails(folder, job, ranks, **more):
        assert (folder / job).is_file()
        raise UserError("rank 1 was lost")

    monkeypatch.setattr(jobs, "launch", fails)
    with pytest.raises(UserError, match="rank 1 was lost"):
        jobs.score(tmp_path, "evaluation-0", 2, model="m", pairs=[], spec=TrainSpec(), backend="shared", on_query=lambda n: None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_number_of_ranks_that_cannot_be(tiny, tmp_path, ranks):
    with pytest.raises(rank.UserError, match=f"--ranks {ranks}: must be 1 or more"):
        run(small(load_experiment("exp1", "mini")[0], tiny), tmp_path / "out", ranks=ranks)
    assert not (tmp_path / "out").exists()
