"""Training on 2 gloo ranks against one process, step checkpoints, and the faults of both. tests/fsdp_ranks.py has the cases."""

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from forked import killed
from fsdp_ranks import ragged, run_case
from safetensors.torch import load_file
from test_logprobs import tiny_family

from repro.base.records import MARKER, sealed, write_json
from repro.base.training import TrainSpec
from repro.core import checkpoints, engines, loop, shapes
from repro.core.checkpoints import StepCheckpoints
from repro.core.engines import OneProcess
from repro.core.logprobs import logprob_matrix
from repro.core.loop import train
from repro.models import load

HERE = Path(__file__).parent
FAMILIES = {"llama": {}, "llama_tied": {}, "mistral": {}, "mistral_tied": {}, "mixtral": {}, "mixtral_tied": {}}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One launch of 2 ranks does all cases; one process does them again where a test asks."""
    root = tmp_path_factory.mktemp("fsdp")
    for name in FAMILIES:
        family = name if name == "llama_tied" else name.removesuffix("_tied")
        change = {"tie_word_embeddings": True} if name.endswith("_tied") and family != name else {}
        tiny_family(family, **change).save_pretrained(root / name)
    tied = str(root / "llama_tied")
    cases = [{"name": name, "model": str(root / name)} for name in FAMILIES] + [
        {"name": "one_query", "model": tied, "spec": {"batch_size": 1}},
        {"name": "one_pass", "model": tied, "budget": 10_000},
        {"name": "clipped", "model": tied, "spec": {"max_grad_norm": 0.5}},
        {"name": "nca", "model": tied, "spec": {"objective": "nca", "anchor": 0.3}},
        {"name": "margin", "model": tied, "spec": {"objective": "conspo_rows"}},
        {"name": "rmsprop", "model": tied, "spec": {"optimizer": "rmsprop"}},
        {"name": "bf16", "model": tied, "spec": {"precision": "bf16"}},
        {"name": "fp32_master", "model": tied, "spec": {"precision": "fp32_master"}},
        {"name": "tight", "model": tied, "room": 1000},
        {"name": "half_tight", "model": tied, "room": 1_250_000},
        {"name": "poisoned", "model": tied, "poison": 1},
        {"name": "written_by_2", "model": tied, "steps": str(root / "of-2"), "asked": [15]},
        {"name": "read_by_2", "model": tied, "steps": str(root / "of-1")},
        {"name": "score", "score": str(root / "score")}]
    by_name = {case["name"]: case for case in cases}
    byte_tokenizer().save_pretrained(tied)
    write_json(root / "score/job.json", {"model": tied, "train": asdict(TrainSpec(precision="fp32", score_eos=True)),
                                         "backend": "shared", "pairs": [asdict(pair) for pair in ragged(9)]})
    stopped = run_case(OneProcess(), {**by_name["read_by_2"], "asked": [15]}, root)
    assert stopped == {"raised": "SystemExit: 143"}
    (root / "cases.json").write_text(json.dumps(cases))
    (root / "ranks").mkdir()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(HERE / "fsdp_ranks.py"), str(root / "cases.json"), str(root / "ranks")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]

    def both(name, **change):
        """What one process and each rank saw, and the weights of both."""
        (root / "one").mkdir(exist_ok=True)
        one = run_case(OneProcess(), by_name[name] | change, root / "one")
        ranks = json.loads((root / "ranks" / f"{name}.json").read_text())
        weights = [load_file(path) for folder in ("one", "ranks") if (path := root / folder / f"{name}.safetensors").exists()]
        return one, ranks, weights

    both.root = root
    return both


def assert_same(one, ranks, weights, *, rel=1e-5, atol=2e-6):
    """Loss, norm and weights to rounding. Both optimizers hide a gradient's scale, so the norm is what shows it."""
    for rank in ranks:
        assert [r["step"] for r in rank["trace"]] == [r["step"] for r in one["trace"]]
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in rank["trace"]] == pytest.approx([r[key] for r in one["trace"]], rel=rel)
    alone, sharded = weights
    assert alone.keys() == sharded.keys()
    for name, tensor in alone.items():
        assert sharded[name].dtype == tensor.dtype
        torch.testing.assert_close(sharded[name].float(), tensor.float(), atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_as_one_process_does(work, family):
    one, ranks, weights = work(family)
    assert_same(one, ranks, weights)
    assert ranks[0]["queries"] == one["queries"] == 15
    assert len({rank["passes"] for rank in ranks}) == 1 and ranks[0]["passes"] > 3
    assert all(rank["reductions"] == ["torch.float32"] * 3 * 3 for rank in ranks)  # a step: two layers and the root, once
    before = {k: v for k, v in load.load_model(str(work.root / family)).state_dict().items() if k in weights[0]}
    assert all(not torch.equal(before[k], v) for k, v in weights[0].items())  # every tensor was trained


@pytest.mark.parametrize("name", ["one_query", "one_pass", "clipped", "fp32_master", "nca", "margin"])
def test_other_batches_and_settings_on_two_ranks(work, name):
    """A rank without a query; a rank with one pass; clipping over shards; bf16 products (whose rounding differs a little); an
    objective whose initial matrix goes with its query; one that depends on the step."""
    one, ranks, weights = work(name)
    assert_same(one, ranks, weights, **({"rel": 2e-2, "atol": 5e-3} if name == "fp32_master" else {}))
    if name == "clipped":
        assert all(row["grad_norm"] > 0.5 for row in one["trace"])


def test_two_fsdp_ranks_score_as_one_process_does(work):
    """Every response of every query, in the queries' order, also where each rank needs several passes."""
    one, ranks, _ = work("score")
    model, part = load.load_model(str(work.root / "llama_tied")), ragged(9)
    with torch.inference_mode():
        truth = logprob_matrix(model, byte_tokenizer(), [p.prompts for p in part], [p.responses for p in part],
                               length_normalize=False, score_eos=True, backend="reference")
    for seen in (one, *ranks):
        torch.testing.assert_close(torch.tensor(seen["matrices"]), truth, rtol=1e-5, atol=1e-4)
    assert ranks[0]["queries"] == ranks[1]["queries"] == one["queries"] == 9


def test_bf16_weights_stay_bf16_and_gradients_are_summed_in_float32(work):
    one, ranks, weights = work("bf16")
    assert all(rank["reductions"] == ["torch.float32"] * 9 for rank in ranks)
    assert {t.dtype for part in weights for t in part.values()} == {torch.bfloat16}
    assert ranks[0]["trace"][0]["loss"] == pytest.approx(one["trace"][0]["loss"], rel=1e-3)  # the initial weights'
    assert ranks[0]["trace"][0]["grad_norm"] == pytest.approx(one["trace"][0]["grad_norm"], rel=2e-2)
    assert share_within(weights, 5e-3) > 0.95


def share_within(weights, atol):
    close = [((weights[0][k].float() - weights[1][k].float()).abs() <= atol).flatten() for k in weights[0]]
    return torch.cat(close).float().mean().item()


def test_rmsprop_on_two_ranks(work):
    """Where a gradient is rounding noise, its step is 10 learning rates either way: so all but a few weights agree."""
    one, ranks, weights = work("rmsprop")
    assert_same(one, ranks, weights, atol=0.06)
    assert share_within(weights, 2e-6) > 0.99


def test_two_ranks_without_room_checkpoint_activations_and_reduce_after_each_pass(work):
    one, ranks, weights = work("tight")
    assert_same(one, ranks, weights)
    assert all(rank["checkpointed"] == rank["passes"] and len(rank["reductions"]) == 3 * rank["passes"] for rank in ranks)


def test_fsdp_ranks_need_not_checkpoint_the_same_passes(work):
    one, ranks, weights = work("half_tight")
    assert_same(one, ranks, weights)
    assert all(0 < rank["checkpointed"] < rank["passes"] and len(rank["reductions"]) == 9 for rank in ranks)


def test_a_loss_that_is_not_finite_on_one_fsdp_rank_stops_all_before_the_update(work):
    _, ranks, weights = work("poisoned")
    for rank in ranks:
        assert "iteration 1, step 1: loss nan (on ranks [1])" in rank["raised"] and "not finite" in rank["raised"]
    for rank in (0, 1):
        facts = json.loads((work.root / "ranks" / f"poisoned-{rank}.json").read_text())
        assert facts["step"] == 1 and facts["ranks"] == [1] and facts["queries"] == [f"q{k}" for k in range(5)]
    assert len(weights) == 1  # none from the ranks


def test_fsdp_checkpoints_are_read_by_any_number_of_ranks(work):
    """2 ranks stopped after step 1 -> one process; one process stopped after step 1 -> 2 ranks; as if nothing had been."""
    one, ranks, _ = work("written_by_2", asked=[])
    assert [rank["raised"] for rank in ranks] == ["SystemExit: 143"] * 2
    assert len(one["trace"]) == 3 and one["passes"] < 15  # step 1 not again
    whole, _, (expected, _) = work("llama_tied")
    assert one["passes"] < whole["passes"]
    assert_same(whole, [one], [expected, load_file(work.root / "one" / "written_by_2.safetensors")])
    read_by_2 = json.loads((work.root / "ranks" / "read_by_2.json").read_text())
    assert all(rank["passes"] < json.loads((work.root / "ranks" / "llama_tied.json").read_text())[0]["passes"] for rank in read_by_2)
    assert_same(whole, read_by_2, [expected, load_file(work.root / "ranks" / "read_by_2.safetensors")])


# ---- without a launch

def test_fsdp_deals_every_query_once_and_equal_passes():
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.choice((1, 5, draw.randint(1, 900))) for _ in range(draw.randint(1, 40))]
        ranks, budget = draw.choice((1, 2, 3, 8)), draw.choice((1, 300, 1024, 10**6))
        passes = engines.deal(lengths, ranks, budget)
        counted = sorted(q for rank in passes for queries, n in rank if n for q in queries)
        assert counted == list(range(len(lengths))) and len(passes) == ranks and len({len(p) for p in passes}) == 1
        for queries, n in (p for rank in passes for p in rank):
            assert n in (0, len(queries)) and (len(queries) == 1 or sum(lengths[q] for q in queries) <= budget)
        loads = [sum(lengths[q] for queries, n in rank if n for q in queries) for rank in passes]
        assert max(loads) - min(loads) <= max(lengths)


def test_fsdp_with_one_rank_deals_as_one_process_does():
    lengths = [7, 300, 2, 2, 90]
    assert engines.deal(lengths, 1, 100) == [OneProcess().passes(lengths, 100)]


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gemma", "gemma3_text"])
def test_fsdp_finds_the_decoder_layers(family):
    layers = shapes.decoder_layers(tiny_family(family.removesuffix("_tied"), num_hidden_layers=3))
    assert len(layers) == 3 and all(type(layer).__name__.endswith("DecoderLayer") for layer in layers)


# ---- step checkpoints, one process

SPEC = TrainSpec(batch_size=2, batches=6, learning_rate=1e-3, precision="fp32")


def trained(tiny, folder=None, key="key", worth=0.0, asked=()):
    model = load.load_model(str(tiny))
    trace = train(model, byte_tokenizer(), ragged(12), SPEC, 1, asked=list(asked),
                  steps=StepCheckpoints(folder, key, worth=worth) if folder else None)
    return trace, model.state_dict()


def identical(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in b[1])


@pytest.fixture(scope="module")
def undisturbed(tiny):
    return trained(tiny)


def test_stopped_after_every_step_the_result_is_identical_to_the_bit(tiny, undisturbed, tmp_path, capsys):
    for step in range(1, 6):
        with pytest.raises(SystemExit, match="143"):
            trained(tiny, tmp_path, asked=[signal.SIGTERM])
        assert sorted(p.name for p in tmp_path.iterdir())[-1] == f"step-{step:06d}"
    assert len(list(tmp_path.iterdir())) == checkpoints.KEEP
    capsys.readouterr()
    assert identical(trained(tiny, tmp_path), undisturbed)
    assert f"going on after step 5 ({tmp_path / 'step-000005'})" in capsys.readouterr().err


@pytest.mark.parametrize("where, nth, left", [
    ("engines.objective", 3, 1),        # in step 2 or 3
    ("checkpoints:checkpoint.save", 3, 2),      # step 3 trained, none of its files written
    ("checkpoints.write_json", 3, 2),           # its shard written, the trace not
    ("checkpoints.seal", 3, 2),                 # all but the marker
    ("checkpoints.remove_folder", 5, 4)])       # sealed, while older ones are removed
def test_killed_in_a_step_or_its_save_the_same_call_goes_on(tiny, undisturbed, tmp_path, capsys, where, nth, left):
    owner, _, name = where.rpartition(".")
    assert killed(f"repro.core.{owner}", name, nth, trained, tiny, tmp_path) == -signal.SIGKILL
    complete = [p for p in sorted(tmp_path.iterdir()) if sealed(p, "key")]
    assert complete
    assert identical(trained(tiny, tmp_path), undisturbed)
    assert f"going on after step {int(complete[-1].name[-6:])} " in capsys.readouterr().err


def test_an_altered_or_torn_checkpoint_is_skipped_with_a_word(tiny, undisturbed, tmp_path, capsys):
    """One flipped bit anywhere, a file cut or missing, a marker that is gone or no JSON: the one before it is taken."""
    for _ in range(2):
        with pytest.raises(SystemExit):
            trained(tiny, tmp_path / "whole", asked=[15])
    names = sorted(p.name for p in (tmp_path / "whole/step-000002").iterdir())
    assert names == [".metadata", "__0_0.distcp", MARKER, "trace.json"]
    draw = random.Random(0)

    def flip(path):
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))

    damages = [(name, flip) for name in names for _ in range(12)] + [
        (name, damage) for name in names for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1]),
                                                        lambda p: p.write_bytes(b""))]
    engine = OneProcess()
    for k, (name, damage) in enumerate(damages):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(k)))
        path = folder / "step-000002" / name
        before = path.read_bytes()
        damage(path)
        if name == MARKER and path.exists() and path.read_bytes().split() == before.split():
            continue  # white space, which says nothing
        model = load.load_model(str(tiny))
        module = engine.prepare(torch.nn.ModuleDict({"model": model}))
        trace = StepCheckpoints(folder, "key").restore(engine, module, torch.optim.RMSprop(module.parameters()))
        said = capsys.readouterr().err
        assert len(trace) == 1 and "step-000002" in said and "skipped" in said and "going on after step 1" in said, (name, k, said)
    assert identical(trained(tiny, tmp_path / "0"), undisturbed)


def test_checkpoints_of_other_inputs_are_not_taken_and_make_room(tiny, undisturbed, tmp_path, capsys):
    for _ in range(3):
        with pytest.raises(SystemExit):
            trained(tiny, tmp_path, key="other", asked=[15])
    with pytest.raises(SystemExit):
        trained(tiny, tmp_path, asked=[15])
    assert capsys.readouterr().err.count("of another config or other inputs; skipped") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert identical(trained(tiny, tmp_path), undisturbed)
    assert "going on after step 1" in capsys.readouterr().err


def test_saving_takes_no_more_than_its_share(tiny, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(StepCheckpoints, "_prune", lambda self, newest: saves.append(1))
    trained(tiny, tmp_path, worth=1e9)
    assert len(saves) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_one_that_comes_too_late_is_not_lost(tiny, undisturbed, tmp_path, monkeypatch, number):
    def ended(number, frame):
        raise SystemExit("by the handler")

    before = signal.signal(number, ended)
    real, calls = loop.ids_of, []
    try:
        monkeypatch.setattr(loop, "ids_of", lambda *a, **k: (
            calls.append(1), len(calls) == 2 and signal.raise_signal(number), real(*a, **k))[2])
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt, match="143|^$"):
            trained(tiny, tmp_path)
        assert len(calls) == 2 and signal.getsignal(number) is ended
        monkeypatch.setattr(StepCheckpoints, "save", lambda self, e, m, o, trace, now: len(trace) == 6 and signal.raise_signal(number))
        with pytest.raises(SystemExit, match="by the handler"):
            trained(tiny, tmp_path)
        assert len(calls) == 6
    finally:
        signal.signal(number, before)
    monkeypatch.undo()
    assert identical(trained(tiny, tmp_path), undisturbed)


def test_a_disk_that_is_full_in_a_save_ends_in_one_line_and_the_last_step_stays(tiny, undisturbed, tmp_path):
    """A limit on the size of a file, which the shard of the second save does not fit into."""
    with pytest.raises(SystemExit):
        trained(tiny, tmp_path, asked=[15])
    size = (tmp_path / "step-000001/__0_0.distcp").stat().st_size
    code = ("import resource, sys\nfrom pathlib import Path\n"
            f"sys.path.insert(0, {str(HERE)!r})\nfrom test_fsdp import trained\nfrom repro.base.records import UserError\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
            f"try:\n    trained(Path({str(tiny)!r}), Path({str(tmp_path)!r}))\n"
            "except UserError as e:\n    print(e); sys.exit(2)\n")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 2, child.stderr
    assert child.stdout.startswith(f"cannot write checkpoint {tmp_path / 'step-000002'} (rank 0): ") and "MiB are free" in child.stdout
    assert child.stdout.count("\n") == 1 and "Traceback" not in child.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert identical(trained(tiny, tmp_path), undisturbed)
