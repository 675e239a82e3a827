"""The measuring tools of tests/perf measure what they say, and kernels/README.md shows what the records hold."""

import json
import math
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

PERF = Path(__file__).parent / "perf"
sys.path.insert(0, str(PERF))
pytest.importorskip("triton", reason="Triton is built for Linux only")

import aot  # noqa: E402
import bench  # noqa: E402
import check  # noqa: E402
import gate  # noqa: E402
import gpu  # noqa: E402
import gpu_errors  # noqa: E402
from costs import costs  # noqa: E402


def test_costs_of_a_step_known_by_hand():
    x, w = torch.randn(8, 16), torch.randn(64, 16, requires_grad=True)

    def step():
        (x @ w.T).exp().sum().backward()

    found = costs(step, [w], 64)
    assert found["flops"] == 2 * 2 * 8 * 16 * 64  # forward and dW
    assert found["logit_rows"] == 8  # w.T is [16, 64], and a view
    assert found["saved_bytes"] == 4 * (8 * 16 + 8 * 64)  # x, and exp's result
    assert 4 * 2 * 8 * 64 <= found["peak_bytes"] < 4 * 4 * (8 * 64 + 64 * 16)
    assert w.grad is None and found == costs(step, [w], 64)


def test_a_regression_of_a_compiled_kernel_is_a_fault():
    good = {"registers": 100, "spilled": 0, "shared": 1000, "matrix": 4}
    key, other = "sm_90 u_kernel CAP=None", "sm_90 row_kernel CAP=None"
    assert aot.compare({key: good}, {key: good}) == []
    assert aot.compare({key: good | {"registers": 110}}, {key: good}) == []
    for change in ({"registers": 111}, {"shared": 1101}, {"spilled": 4}, {"matrix": 0}):
        assert len(aot.compare({key: good | change}, {key: good})) == 1, change
    assert aot.compare({other: good | {"matrix": 0}}, {other: good}) == []
    assert "not in the baseline" in aot.compare({key: good}, {})[0]


def _under_load(rng, slowdown, apart):
    """Rounds of a machine whose speed wanders, and whose steps are each disturbed now and then, by any factor."""
    speed = math.exp(rng.gauss(0, 0.3))
    while True:
        speed *= math.exp(rng.gauss(0, 0.05))
        yardstick, path = (of * speed * math.exp(rng.gauss(0, apart)) * (rng.paretovariate(1) if rng.random() < 0.1 else 1)
                           for of in (1.0, 0.25 * slowdown))
        yield {gate.YARDSTICK: yardstick, "path": path}


@pytest.mark.parametrize("apart, decided", [(0.02, 195), (0.06, 170), (0.4, 0)])
def test_load_leads_to_no_verdict_rather_than_a_wrong_one(apart, decided, monkeypatch):
    rng, found = random.Random(0), Counter()
    for k in range(400):
        rounds = _under_load(rng, gate.SLOWDOWN if k % 2 else 1, apart)
        monkeypatch.setattr(gate, "round_of", lambda steps, rounds=rounds: next(rounds))
        found[k % 2, gate.gate({}, {"path": 4.0})["path"]["verdict"]] += 1
    assert not found[0, gate.FAULT] and not found[1, gate.PASS], "a wrong verdict"
    assert found[0, gate.PASS] >= decided and found[1, gate.FAULT] >= decided
    if not decided:
        assert found[0, gate.CANNOT_TELL] == found[1, gate.CANNOT_TELL] == 200


def test_the_gate_times_the_processor_and_tells_a_planted_slowdown():
    """CPU seconds: a step that waits for another program takes none more."""
    def spin(seconds, wait=0.0):
        def step():
            time.sleep(wait)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
        return step

    steps = {gate.YARDSTICK: spin(0.01), "waits": spin(0.005, 0.02), "slow": gate.slowed(spin(0.005))}
    found = gate.gate(steps, {"waits": 2.0, "slow": 2.0})
    assert {name: of["verdict"] for name, of in found.items()} == {"waits": gate.PASS, "slow": gate.FAULT}
    assert found["slow"]["ratio"] == pytest.approx(2 / gate.SLOWDOWN, rel=0.05)


def test_where_the_line_lies():
    line = 4 / math.sqrt(gate.SLOWDOWN)
    assert [gate.told([line * f] * 8, 4.0) for f in (1.01, 0.99)] == [gate.PASS, gate.FAULT]
    assert gate.told([line * 1.01] * 7 + [line * 0.5], 4.0) == gate.CANNOT_TELL
    assert [gate.uneven(n) for n in (8, 16)] == [8, 14]  # 1 / 256; 137 / 65536


def test_a_busy_machine_makes_no_baseline(monkeypatch):
    rounds = _under_load(random.Random(1), 1, 0.1)
    monkeypatch.setattr(gate, "round_of", lambda steps: next(rounds))
    with pytest.raises(ValueError, match="the machine is busy: noise"):
        gate.baseline({}, 48)
    rounds = _under_load(random.Random(1), 1, 0.001)
    monkeypatch.setattr(gate, "round_of", lambda steps: {k: 1.0 if k == gate.YARDSTICK else 0.25 for k in next(rounds)})
    assert gate.baseline({}, 48) == {"path": 4.0, "noise": 0.0}


@pytest.mark.parametrize("known, must_tell, faults", [
    ({"2x2": 0.5, "4x4": 0.5}, True, 0), ({"2x2": 0.5, "4x4": 0.7}, False, 1), (None, False, 0), (None, True, 1), ({"2x2": 0.5}, False, 1)])
def test_what_the_check_makes_of_a_verdict(known, must_tell, faults, monkeypatch, tmp_path, capsys):
    """Of no baseline of this machine, and of one of other paths, too."""
    monkeypatch.setattr(check, "steps", lambda plant: dict.fromkeys((gate.YARDSTICK, "2x2", "4x4")))
    monkeypatch.setattr(gate, "round_of", lambda steps: {gate.YARDSTICK: 1.0, "2x2": 2.0, "4x4": 2.0})
    monkeypatch.setattr(check, "BASELINE", tmp_path / "check.json")
    check.BASELINE.write_text(json.dumps({"times": {check.timed_on(): known} if known else {}}))
    told = []
    check.times_now(False, None, must_tell, told.append)
    assert len(told) == faults, told


def test_the_yardstick_is_not_ours():
    """What a change of ours slows down it must not: it has a model of its own, with transformers' attention."""
    taken = check.steps()
    for step in taken.values():
        step()
    models = {name: step.__closure__ for name, step in taken.items()}
    of = {name: next(c.cell_contents for c in cells if hasattr(c.cell_contents, "config")) for name, cells in models.items()}
    assert of["2x2"] is of["4x4"] is not of[gate.YARDSTICK]
    assert of[gate.YARDSTICK].config._attn_implementation == "sdpa" != of["2x2"].config._attn_implementation


def test_the_baseline_knows_the_paths_that_are_timed():
    baseline = json.loads(check.BASELINE.read_text())["times"]
    assert baseline and all(set(of) == {"2x2", "4x4", "noise"} and of["noise"] < gate.STEADY for of in baseline.values())


def test_the_gpu_script_measures_and_tables_every_case(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LEAST", 2)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--rounds", "2"])
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert ": 86 of 86 right; " in lines[-1]
    table = [line for line in lines if line.startswith("|")]
    head, *cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in [table[0], *table[2:]]]
    assert {c[0].split(":")[0] for c in cells} == {"head", "loss", "step"} and {len(c) for c in cells} == {len(head)}
    (of_step, *_) = steps = [[c for c in cells if c[0].startswith(f"step: tiny, {form} form, ragged lengths, C=R=4")]
                             for form in ("plain", "chat")]
    assert all([c[1] for c in each] == [
        "shared (ours), checkpointing", "shared (ours)", "shared (ours), SDPA under a mask", "reference, checkpointing", "reference",
        "transformers, logits_to_keep, checkpointing", "transformers, logits_to_keep"] for each in steps)
    ratio = head.index("times ours [min, max]")
    assert {c[1]: c[ratio] for c in of_step}.items() >= dict.fromkeys(("shared (ours), checkpointing", "shared (ours)"),
                                                                       "1.00 [1.00, 1.00]").items()
    flops = head.index("FLOPs, times ours")
    plain, chat = (float(next(c[flops] for c in each if c[1] == "reference")) for each in steps)
    assert 1 < plain < chat and sum("the reference takes" in line for line in lines) == 6
    assert all("(2)" in c[2] for c in cells if "NOT RUN" not in c[2])


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_what_a_gpu_case_counts_is_what_it_computes(form):
    """Against torch's own counter, attention apart: of that, the mask's entries."""
    model = gpu.build(gpu.SMOLLM2 | gpu.TINY)
    case = gpu.Case(model, gpu.counted(model), form, 2, 2, "ragged", 60, 12)
    alone = sum(case.alone)
    for name, said in {"shared (ours)": case.counted(case.tokens, 0, case.scored), "reference": case.counted(alone, 0, alone)}.items():
        with gpu.without_cuda(), FlopCounterMode(display=False) as counter:
            case.implementations()[name]()
        assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == said, name
    seen = int(gpu.tree.pack(case.pairs()).layout.mask().sum())
    assert case.flops() == case.counted(case.tokens, seen, case.scored)


def test_the_gpu_script_times_what_it_says(monkeypatch):
    """The other attention is called where it is named, and no run tries the model again, which a run of training does not."""
    model, called = gpu.build(gpu.SMOLLM2 | gpu.TINY), Counter()
    case = gpu.Case(model, gpu.counted(model), "chat", 2, 1, "ragged", 12, 4)
    monkeypatch.setattr(gpu.logprobs.probe, "of_model", lambda *given: called.update(["probe"]))
    monkeypatch.setattr(gpu, "sdpa", lambda *given, plain=gpu.sdpa, **options: called.update(["sdpa"]) or plain(*given, **options))
    losses = {}
    for name, run in case.implementations().items():
        with gpu.without_cuda(), gpu.checkpointed(model, "checkpointing" in name):
            before = called.total()
            losses[name] = run().item()
        assert called.total() - before == (2 if "SDPA" in name else 0), name  # layers
    assert max(losses.values()) - min(losses.values()) < 2e-2 and len(set(losses.values())) > 2


def lose_the_copies(monkeypatch):
    monkeypatch.setattr(gpu.attention.Varlen, "ungather", lambda self, grad: grad[self.back[self.copies[:-1]]])


def lose_the_scale_of_u(monkeypatch):
    from kernels import linear_nll_triton

    monkeypatch.setattr(linear_nll_triton, "scaled_half", lambda x: (x.half(), 2.0))


def none_of_these(tiny):
    return ()


def change_from_run_to_run(monkeypatch):
    noise, plain = torch.Generator().manual_seed(0), gpu.attention.shared_prefix_attention
    monkeypatch.setattr(gpu.attention, "shared_prefix_attention", lambda q, *x, impl=None, **options: plain(q, *x, impl=impl, **options)
                        * (1 + 1e-7 * torch.rand(1, generator=noise, dtype=q.dtype) * (impl != "reference")))


@pytest.mark.parametrize("plant, kind, op", [
    (lose_the_copies, "attention_errors", "attention, varlen"), (lose_the_scale_of_u, "head_errors", "linear_nll"),
    (change_from_run_to_run, "attention_errors", "attention, blocks")])
def test_the_gpu_script_times_nothing_that_is_wrong(plant, kind, op, monkeypatch, capsys):
    plant(monkeypatch)
    for other in {"head_errors", "loss_errors", "attention_errors", "step_errors"} - {kind}:  # these are right, and seen above
        monkeypatch.setattr(gpu_errors, other, none_of_these)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    assert gpu.main() == 1
    out = capsys.readouterr().out
    faults = [json.loads(line.removeprefix("FAULT ")) for line in out.splitlines() if line.startswith("FAULT ")]
    assert op in {fault["op"] for fault in faults}
    assert "nothing timed" in out and "| step" not in out


@pytest.mark.skipif(platform.system() != "Linux", reason="the record is of Linux")
def test_the_readme_shows_the_records():
    text = bench.README.read_text()
    assert bench.with_tables(text) == text, "run: .venv/bin/python tests/perf/bench.py --table"


# ---- history

def test_a_row_of_history_holds_what_was_measured_anew_and_a_commit_has_one():
    import history

    step = [{"what": "step", "lengths": "equal", "queries": 1, "C": 2, "R": 2, "commit": "c" * 40, "implementations": {
        "reference": {"times_ours": 2.5, "times_ours_min_max": [2.4, 2.6]}, "shared (ours)": {"times_ours": 1.0}}}]
    costs = {"costs": {"2.13": {size: {"shared": {"peak_bytes": 2**20, "saved_bytes": 2**19, "flops": 10**9}} for size in history.SIZES}}}
    exp1 = {"commit": "d" * 40, "threads": 2, "config": {"data": {"evaluation": 8}},
            "stages": {"train-1": {"seconds": 3.0}, "train-2": {"seconds": 4.5}, "judge": {"seconds": 1.0}}}
    files = {history.BENCH: {"rows": step}, history.CHECK: costs, history.EXP1: exp1}
    found = history.measured(files.get)
    assert found == {"step": {"on": "c" * 8, "2x2": [2.5, 2.4, 2.6]}, "peak_mib": {"2x2": 1.0, "4x4": 1.0}, "held_mib": {"2x2": 0.5, "4x4": 0.5},
                     "gflop": {"2x2": 1.0, "4x4": 1.0}, "stages": {"on": "d" * 8, "threads": 2, "queries": 8, "train": 7.5, "judge": 1.0}}
    assert history.measured(lambda path: None) == {}
    rows = history.append("a", "2026-01-01", found, [])
    assert rows == [{"commit": "a", "date": "2026-01-01"} | found]
    assert history.append("b", "2026-01-02", found, rows) == rows  # nothing new
    slower = found | {"step": {"on": "e" * 8, "2x2": [2.0, 1.9, 2.1]}}
    rows = history.append("b", "2026-01-02", slower, rows)
    assert rows[1:] == [{"commit": "b", "date": "2026-01-02", "step": slower["step"]}]
    assert history.append("b", "2026-01-02", found, rows) == rows[:1]  # measured again, and it was as before


def test_the_history_in_the_repository_is_what_its_records_say_and_is_drawn(tmp_path, monkeypatch):
    import history

    rows = history.rows()
    assert len(rows) >= 5 and len({row["commit"] for row in rows}) == len(rows)
    known = {}
    for row in rows:
        known |= row
    now = history.measured(history._now)
    assert {k: known[k] for k in now} == now, "make bench, or tests/perf/history.py, adds the row"
    monkeypatch.setattr(history, "PICTURE", tmp_path / "history")
    history.draw(rows[:2])  # with a kind that is not there yet
    assert (tmp_path / "history.png").stat().st_size > 10000


# ---- scale

def test_the_page_of_a_million_queries_is_what_its_record_says():
    import scale

    record = json.loads(scale.RECORD.read_text())
    assert [row["queries"] for row in record["rows"]] == [10**4, 10**5, 10**6]
    assert scale.page(record) == scale.README.read_text(), "run: .venv/bin/python tests/perf/scale.py --page"


def test_a_run_without_its_model_goes_through_every_stage(tmp_path):
    out = tmp_path / "scale.json"
    subprocess.run([sys.executable, str(PERF / "scale.py"), "--queries", "400", "--out", str(out)], check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert list(row["stages"]) == ["inputs", "evaluate-0", "sample-1", "train-1", "evaluate-1", "judge", "metrics", "report"]
    assert all(stage["peak_mib"] > 100 for stage in row["stages"].values())
