"""The measuring tools of tests/perf measure what they say, and kernels/README.md shows what the records hold."""

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

PERF = Path(__file__).parent / "perf"
sys.path.insert(0, str(PERF))
pytest.importorskip("triton", reason="Triton is built for Linux only")

import aot  # noqa: E402
import bench  # noqa: E402
import check  # noqa: E402
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


def test_the_error_of_a_median():
    g = torch.Generator().manual_seed(0)
    medians = torch.randn(4000, 25, generator=g).median(1).values
    estimates = [check.error_of_median(row.tolist()) for row in torch.randn(400, 25, generator=g)]
    assert sum(estimates) / 400 == pytest.approx(medians.std().item(), rel=0.15)


def test_noise_widens_the_band_but_does_not_excuse_everything():
    quiet, known = [1.30, 1.29, 1.31, 1.30, 1.30], [1.30, 1.28, 1.32, 1.31, 1.29, 1.30]
    wild = [1.3, -0.4, 2.0, 0.1, 1.9]
    assert check.Z * check.LEAST <= check.band(known, quiet, True) < check.band(known, quiet, False) <= check.MOST
    assert check.band(known, wild, True) == check.band(known, wild, False) == check.MOST


def test_the_gpu_script_measures_and_tables_every_case(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LEAST", 2)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--rounds", "2"])
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert ": 85 of 85 right; " in lines[-1]
    head, *cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in [lines[0], *lines[2:-1]]]
    assert {c[0].split(":")[0] for c in cells} == {"head", "loss", "step"} and {len(c) for c in cells} == {len(head)}
    assert [c[1] for c in cells if c[0].startswith("step: tiny, ragged lengths, C=R=4")] == [
        "shared (ours), checkpointing", "shared (ours)", "shared (ours), SDPA under a mask", "reference, checkpointing", "reference",
        "transformers, logits_to_keep"]
    assert all("(2)" in c[2] for c in cells if "NOT RUN" not in c[2])


def lose_the_copies(monkeypatch):
    monkeypatch.setattr(gpu.attention.Varlen, "ungather", lambda self, grad: grad[self.own])


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
