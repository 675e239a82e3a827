"""Small versions of the studies, and what a stranger's checkpoint may not do. The studies themselves: `make faults`."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes_and_does_nothing_twice(tmp_path):
    path = tmp_path / "kill_study.json"
    done = subprocess.run([sys.executable, str(HERE / "kill_study.py"), "--kills", "8", "--runs", "brief", "--seed", "8",
                           "--work", str(tmp_path), "--record", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    assert 8 <= record["kills"] == record["identical"] == sum(record["stages"].values()) and record["killed_again"] >= 1
    assert record["redone"] == record["torn"] == 0 and len(record["stages"]) >= 4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_finished_batch_is_not_sampled_again(tiny, tmp_path, monkeypatch):
    from test_experiments import small

    from repro.experiment import load_experiment
    from repro.sampling import local
    from repro.stages.pipeline import run

    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    begun, real = [], local.sample_batch

    def stopped(model, tokenizer, prompts, **how):
        begun.append(tuple(prompts))
        if len(begun) in (4, 6):
            raise KeyboardInterrupt
        return real(model, tokenizer, prompts, **how)

    monkeypatch.setattr(local, "sample_batch", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path, say=lambda line: None)
    assert len(set(begun[:3])) == 3 and begun[4] == begun[3]  # the one in flight, and no other, is done again
    assert begun[5] not in begun[:5]


def test_a_power_loss_leaves_the_old_state_or_the_new_one(tmp_path):
    """Unsynced bytes cut or zeroed, unsynced names as they were or as they are, after every call of every writer."""
    from files import power_losses

    for writer, (good, replays) in power_losses(tmp_path / "p", 120).items():
        assert good == replays >= 120, writer


@pytest.fixture(scope="module")
def their_writes(tiny, tmp_path_factory):
    """What torch and safetensors do to a folder, call by call; the folder."""
    import power

    if not power.usable():
        pytest.skip("NOT RUN: strace is not here, or may not trace")
    out = tmp_path_factory.mktemp("power") / "out"
    return power.traced(out, tiny), out


def test_a_power_loss_under_torch_and_safetensors_leaves_what_was_sealed(their_writes, tmp_path):
    import power

    calls, out = their_writes
    found = power.lost(calls, out, tmp_path, every=12)
    assert all(good == looked >= 250 for good, looked in found.values()), found


@pytest.mark.parametrize("without", ["files", "names", "names above"])
def test_a_power_loss_is_seen_where_something_was_not_synced(their_writes, tmp_path, without):
    """And so is each kind of sync that our seals do for them."""
    import power

    calls, out = their_writes
    left_out = {"files": lambda p: p.is_file(), "names": lambda p: p.is_dir() and p.name in ("adapter", "iteration-1"),
                "names above": lambda p: p in (out, out / "run", out / "run/checkpoints")}[without]
    assert any(c[0] == "sync" and left_out(c[1]) for c in calls)
    found = power.lost([c for c in calls if not (c[0] == "sync" and left_out(c[1]))], out, tmp_path, every=40)
    good, looked = found["a unit that had been sealed is whole"]
    assert good < looked


def test_a_key_and_a_token_are_in_no_file_and_no_output_of_a_whole_run(tmp_path):
    """Nor in run.json, nor below HOME; a judge's server echoes the key, git's remote has a token, debug logs are on."""
    from judges import secrets

    found = secrets(tmp_path, quick=True)
    assert found["value"] == 0 and found["of"] > 20 and found["exit_codes"] == [0, 2, 2], found


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("forged", ["index alone", "index and marker of another run"])
def test_an_index_that_would_run_code_is_not_loaded(tiny, tmp_path, capsys, forged):
    """The index of torch.distributed.checkpoint is a pickle. In a checkpoint whose marker does not confirm it, or whose
    marker is not of this run, it is not opened."""
    from test_fsdp import identical, trained

    from repro.base.records import seal
    from repro.core.checkpoints import _io

    folder, ran = tmp_path / "steps", tmp_path / "ran"
    for _ in range(2):
        with pytest.raises(SystemExit):
            trained(tiny, folder, asked=[15])
    (folder / "step-000002/.metadata").write_bytes(pickle.dumps(Evil(ran)))
    if forged != "index alone":
        seal(folder / "step-000002", "a key that its maker could not know")
    undisturbed = trained(tiny)
    capsys.readouterr()
    assert identical(trained(tiny, folder), undisturbed)
    said = capsys.readouterr().err
    assert "step-000002" in said and "skipped" in said and "going on after step 1" in said and not ran.exists()
    # and it would have run: what is guarded against is real
    from torch.distributed import checkpoint

    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(BaseException):  # noqa: B017
        _io("read", checkpoint.load, {}, evil)
    assert ran.exists()
