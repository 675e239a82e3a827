"""The small version of the kill study; the studies themselves are run by `make faults`."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes_and_does_nothing_twice(tmp_path):
    path = tmp_path / "kill_study.json"
    done = subprocess.run([sys.executable, str(HERE / "kill_study.py"), "--kills", "8", "--runs", "brief", "--seed", "8",
                           "--work", str(tmp_path), "--record", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    assert 8 <= record["kills"] == record["identical"] == sum(record["stages"].values()) and record["killed_twice"] >= 1
    assert record["redone"] == record["torn"] == 0 and len(record["stages"]) >= 4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
