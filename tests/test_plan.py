"""`repro plan`: its arithmetic against models, autograd and measured peaks; what it says; what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from repro import cli, training
from repro.plan import disk_of, plan, texts_of
from repro.records import UserError
from repro.sizes import (
    GB,
    GPUS,
    PUBLISHED,
    Shape,
    Step,
    gpu_of,
    matrix_flops,
    peak,
    server_options,
    settle,
    shape_from,
    shape_of,
    training_bytes,
    ways,
)

sys.path.insert(0, str(Path(__file__).parent / "perf"))

MISTRAL, MIXTRAL, LLAMA = (PUBLISHED[name] for name in (
    "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "meta-llama/Meta-Llama-3-70B"))
SIZE = {"vocab_size": 500, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 2048}
STEP = Step(ranks=1, precision="fp32_master", optimizer="adamw", pack_tokens=8192, scored=4000, longest=2600)


@pytest.mark.parametrize("family, change", [
    ("Llama", {"tie_word_embeddings": True}), ("Llama", {"head_dim": 24}), ("Mistral", {}),
    ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2})])
def test_parameters_are_the_models(family, change):
    config = getattr(transformers, f"{family}Config")(**SIZE, **change)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert shape_from(config.to_dict(), "here").parameters == sum(p.numel() for p in model.parameters())


def test_published_shapes():
    """The parameter counts of the models' pages."""
    assert [round(s.parameters / 1e9, 2) for s in (MISTRAL, MIXTRAL, LLAMA)] == [7.24, 46.70, 70.55]
    assert MIXTRAL.active == pytest.approx(12.6e9, rel=.01)  # and 0.26e9 in embedding and head
    assert MISTRAL.adapters(16) == 41_943_040  # as peft counts for all linear layers of mistral-7b


@pytest.mark.parametrize("C, R, shared, total, head", [
    (2, 2, False, 117.5, 2.14), (2, 2, True, 64.8, .25), (4, 4, False, 470, 8.56), (4, 4, True, 157.5, 1.01)])
def test_flops_of_mistral_by_hand(C, R, shared, total, head):
    """TFLOP of a query's matrix with backward, prompts of 600 and responses of 80 tokens."""
    layers, rows = matrix_flops(MISTRAL, C, R, 600, 80, shared=shared, training=True)
    assert (layers + rows) / 1e12 == pytest.approx(total, rel=.001) and rows / 1e12 == pytest.approx(head, rel=.01)


@pytest.mark.parametrize("backend", ["shared", "reference"])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_flops_are_those_counted(family, backend):
    """Within 4 %: the kernel takes whole blocks of the attention's triangle and computes scores again."""
    from step import Ids

    from repro.logprobs import logprob_matrix

    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"} if family == "Mixtral" else {}
    config = getattr(transformers, f"{family}Config")(**SIZE | {"hidden_size": 192, "intermediate_size": 384}, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    P, L = 24, 8
    prompts = [[" " + " ".join(str(10 + k + c) for k in range(P)) for c in range(3)]]
    responses = [[" " + " ".join(str(100 + 9 * k + r) for k in range(L)) for r in range(2)]]
    with FlopCounterMode(display=False) as counter:
        logprob_matrix(model, Ids(), prompts, responses, length_normalize=True, score_eos=False, backend=backend).sum().backward()
    expected = matrix_flops(shape_from(config.to_dict(), "here"), 3, 2, P, L, shared=backend == "shared", training=True)
    assert sum(expected) == pytest.approx(counter.get_total_flops(), rel=.04)


@pytest.mark.parametrize("case", [
    ("tiny-llama", "fp32", "adamw", False, 300, 80), ("tiny-llama", "fp32", "rmsprop", True, 300, 80),
    ("tiny-llama", "bf16", "rmsprop", False, 300, 80), ("tiny-mixtral", "fp32", "adamw", True, 300, 80)])
def test_bytes_are_those_measured(case, monkeypatch):
    """A step of a small model: kinds to 10 %, the peak of all live tensors from -5 to +30 %."""
    import plan_check

    for name in ("_optimizer", "usable_bytes"):
        monkeypatch.setattr(training, name, getattr(training, name))  # what `measure` puts in their place
    kinds = plan_check.measure(*case)["kinds"]
    for exact in ("weights", "gradients", "head: scored rows"):
        assert kinds[exact]["ratio"] == 1, exact
    assert kinds["optimizer state"]["ratio"] == pytest.approx(1, abs=.001)  # and a step count for each tensor
    assert kinds["activations kept"]["ratio"] == pytest.approx(1, abs=.1)
    assert .95 < kinds["peak of live tensors"]["ratio"] < 1.3


def test_what_is_sharded_and_what_is_not():
    one, eight = (training_bytes(LLAMA, dataclasses.replace(STEP, precision="bf16", ranks=n), 80 * GB)["layers"] for n in (1, 8))
    for kind in ("weights", "gradients", "optimizer state"):
        assert one[kind] == pytest.approx(8 * eight[kind], rel=1e-6)
    assert one["weights"] == 2 * LLAMA.parameters and one["optimizer state"] == 4 * LLAMA.parameters  # AdamW: two numbers
    assert one["activations"] == eight["activations"] and one["gradients not yet reduced"] == 0
    layer = 856e6  # of llama3-70b
    assert eight["gathered or rounded weights"] == pytest.approx(2 * 2 * 128256 * 8192 + 3 * 2 * layer, rel=.01)
    assert eight["gradients not yet reduced"] == pytest.approx(2 * 4 * layer + 8 * 2 * 128256 * 8192 / 80, rel=.01)
    mistral = training_bytes(MISTRAL, dataclasses.replace(STEP, ranks=8), 80 * GB)["layers"]
    assert mistral["gradients not yet reduced"] == 4 * MISTRAL.parameters  # half of what is free holds all of them
    tighter = training_bytes(MISTRAL, dataclasses.replace(STEP, ranks=8), 50 * GB)["layers"]  # all of it would, half does not
    assert tighter["gradients not yet reduced"] == 8 * (MISTRAL.parameters // 32)
    assert mistral["master weights"] == 4 * MISTRAL.parameters // 8 and "weights" not in mistral


def test_the_heads_bytes():
    """U is kept up to a GiB; a slab of logits is made beside it; the weight's gradient is float32 before it is added up."""
    def head(shape, **change):
        return {k: v for k, v in training_bytes(shape, dataclasses.replace(STEP, **change))["head"].items() if "head" in k}

    weight = 4 * 32000 * 4096
    assert head(MISTRAL, scored=1000) == {"head: scored rows": 4 * 1000 * 32000, "head: scratch": weight + 3 * 4 * 1000 * 4096}
    assert head(LLAMA, scored=8000, precision="bf16") == {  # computed again, a slab at a time
        "head: scored rows": 0, "head: scratch": 4 * 128256 * 8192 + 3 * 4 * 8000 * 8192 + 4 * 2**25}
    assert head(MISTRAL, scored=1000, lora=16)["head: scored rows"] == 4 * 1000 * 4096  # the head is frozen
    small = dataclasses.replace(MISTRAL, vocab_size=8192, hidden_size=256)
    assert head(small, scored=800)["head: scratch"] == 4 * 800 * 8192  # the slab is the larger


def test_lora_trains_adapters_alone():
    kinds = training_bytes(MISTRAL, dataclasses.replace(STEP, lora=16))["layers"]
    adapters = MISTRAL.adapters(16)
    assert (kinds["weights"], kinds["adapters"]) == (2 * MISTRAL.parameters, 4 * adapters)
    assert (kinds["gradients"], kinds["optimizer state"]) == (4 * adapters, 8 * adapters)
    spec = cli.load_experiment("exp1", "paper")[0]
    whole, lora = (disk_of(MISTRAL, spec, dataclasses.replace(STEP, precision="bf16", lora=rank)) for rank in (0, 16))
    assert (whole["iterations"], lora["iterations"]) == tuple(b * spec.iterations * MISTRAL.parameters for b in (2, 4))
    assert (whole["machine memory"], lora["machine memory"]) == (2 * MISTRAL.parameters, 4 * MISTRAL.parameters)  # the merge


@pytest.mark.parametrize("shape, ranks, gb", [(MISTRAL, 1, 141), (MISTRAL, 1, 24), (MIXTRAL, 1, 141), (MIXTRAL, 1, 80),
                                              (LLAMA, 8, 80), (LLAMA, 1, 141), (LLAMA, 1, 80)])
def test_ways_to_fit_are_computed(shape, ranks, gb):
    """Each way fits, in what it says that it takes; with one change of it undone, it does not."""
    step = dataclasses.replace(STEP, ranks=ranks, precision="fp32_master" if shape is MISTRAL else "bf16")
    settled, total = settle(shape, step, gb * GB)
    found = ways(shape, step, gb * GB)
    assert total > gb * GB and found and settled.checkpointing
    for names, way, need in found:
        assert settle(shape, way, gb * GB) == (way, need) and need == peak(training_bytes(shape, way, gb * GB))[1] <= gb * GB
        changed = {"pack": ("pack_tokens", "scored"), "gpus": ("ranks",), "bf16": ("precision",), "lora": ("lora",)}
        assert {n for n, fs in changed.items() if any(getattr(way, f) != getattr(step, f) for f in fs)} == set(names)
        for name in names:
            less = dataclasses.replace(way, **{f: getattr(step, f) for f in changed[name]})
            if name == "gpus":
                less = dataclasses.replace(way, ranks=way.ranks - 1)
            if set(names) - {name} not in [set(n) for n, _, _ in found]:  # else that set is listed, with more GPUs
                assert settle(shape, less, gb * GB)[1] > gb * GB, (names, name)


def test_what_no_number_of_gpus_makes_fit():
    """What is not sharded alone: gathered weights, a layer's gradient in float32, the head's."""
    step = dataclasses.replace(STEP, precision="bf16")
    for shape in (MIXTRAL, LLAMA):
        assert ways(shape, step, 24 * GB) == []
        assert 8 * (shape.layer + shape.root // shape.num_hidden_layers) + 2 * shape.root + 6 * shape.layer > 16 * GB
    assert not any("lora" in names for names, _, _ in ways(MIXTRAL, step, 141 * GB))  # experts are no linear layers
    assert not any("lora" in names for names, _, _ in ways(LLAMA, dataclasses.replace(step, ranks=8), 80 * GB))


def test_the_server_holds_weights_and_cache():
    """llama3-70b in 80 GB: 141 GB of weights on two GPUs leave little, on four enough; 320 KiB of cache a token."""
    assert 2 * LLAMA.cache == 320 * 1024
    options = dict(server_options(LLAMA, 80 * GB, 1000))
    assert 1 not in options and options[2] < 16 and options[4] > 100
    assert options[2] == int((.9 * 80e9 - LLAMA.parameters) // (2 * LLAMA.cache * 1000 / 2))
    assert set(options) <= {2, 4, 8, 16, 32, 64}


def test_what_a_run_counts():
    spec = cli.load_experiment("exp2", "paper")[0]
    planned = plan(spec, GPUS["a100"], 8)
    assert planned.texts.items == 250 and planned.texts.C == 4
    assert planned.judge.requests == 2 * 250 * (3 + 4)  # against the initial model, and against the baseline from 0 on
    assert planned.stages[0].note == f"{2 * 2 * 128 * 12 + 4 * 250 * 4 + 250:,.0f} responses"  # spare 1, 2 + 4 + 6 batches, baseline
    assert planned.judge.usd == pytest.approx((.4 * planned.judge.prompt_tokens + 1.6 * planned.judge.completion_tokens) / 1e6)
    twice = plan(spec, GPUS["a100"], 16, fraction=.4)
    assert twice.stages[2].hours < .8 * planned.stages[2].hours and twice.stages[2].flops == planned.stages[2].flops
    slow = plan(spec, GPUS["a100"], 8, fraction=.2)
    assert slow.hours == pytest.approx(2 * planned.hours, rel=.02)
    own = dataclasses.replace(spec, judge=dataclasses.replace(spec.judge, judges=("openai",), model="our-own"))
    assert plan(own, GPUS["a100"], 8).judge.usd is None and plan(own, GPUS["a100"], 8).judge.asked
    assert plan(own, GPUS["a100"], 8, price=(1, 1)).judge.usd > 1
    pool = cli.load_experiment("exp3", "paper")[0]
    assert texts_of(pool).items == 500 and texts_of(pool).C == 2


def test_held_out_log_probs_are_sharded_as_training_is():
    """llama3-70b in bf16: 141 GB on one GPU, an eighth of it and the gathered layers on eight; the time is shared too."""
    spec = cli.load_experiment("exp3", "paper")[0]
    one, eight = (plan(spec, GPUS["a100"], n) for n in (1, 8))
    assert (one.scoring_gpus > 8) == (one.trained.ranks > 8)  # with the GPUs that training needs
    assert eight.scoring["weights"] == eight.step.item * LLAMA.parameters // eight.scoring_gpus
    assert sum(eight.scoring.values()) < 80 * GB and eight.stages[1].hours
    small, = cli.load_experiment("exp1", "paper")
    alone, shared = (plan(small, GPUS["h200"], n).stages[1] for n in (2, 8))
    assert shared.hours == pytest.approx(alone.hours / 4) and shared.flops == alone.flops


def test_embedded_queries_are_counted(monkeypatch):
    spec, = cli.load_experiment("exp1", "mini")
    texts = texts_of(spec)
    assert texts.items == 64 and texts.prompt[0] < texts.prompt[1] and texts.query < 40


def test_another_models_shape(tmp_path):
    data = dict(SIZE, model_type="llama")
    (tmp_path / "config.json").write_text(json.dumps(data))
    shape = shape_of(str(tmp_path))
    assert (shape.head_dim, shape.num_local_experts) == (16, 1)
    assert shape_of("lab/unknown", tmp_path / "config.json") == shape
    for change, reason in (({"hidden_size": None}, "hidden_size: found None"), ({"vocab_size": "many"}, "found 'many'"),
                           ({"num_hidden_layers": 0}, "num_hidden_layers: found 0")):
        (tmp_path / "config.json").write_text(json.dumps(data | change))
        with pytest.raises(UserError, match=reason):
            shape_of(str(tmp_path))
    with pytest.raises(UserError, match="its shape is not known on this machine; give its config.json with --config"):
        shape_of("lab/unknown")


@pytest.mark.parametrize("argv, reason", [
    (["exp1", "--gpu-memory", "48"], "--gpu-memory 48: which GPU's speed? name it with --gpu (a100,"),
    (["exp1", "--gpu", "h20"], "did you mean 'h200'"), (["exp1", "--gpus", "0"], "--gpus 0: must be 1 or more"),
    (["exp1", "--fraction", "40"], "--fraction 40: the share"), (["exp1", "--lora", "-1"], "--lora -1"),
    (["exp1", "--config", "none.json"], "--config none.json: no such file"), (["exp7"], "experiment: 'exp7' is unknown"),
    (["exp2", "--variant", "mistral"], "did you mean 'mistral-7b'"), (["exp1", "--variant", "x"], "has one run"),
    (["exp1", "--judge-model", "unheard-of"], "no price is known for 'unheard-of'")])
def test_mistakes(capsys, argv, reason):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("repro: ") and reason in captured.err and captured.err.count("\n") == 1


def test_a_gpu_by_memory_or_name():
    assert gpu_of(None, None) is GPUS["a100"] and gpu_of(None, 141) is GPUS["h200"]
    assert gpu_of("h100", 94).gb == 94 and gpu_of("h100", 94).label == "H100 94 GB"


def test_the_committed_page_is_what_the_command_says(capsys, tmp_path):
    """And it says of each run what fits, and what makes the rest fit."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "all", "--out", str(tmp_path / "plan.md")])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and (tmp_path / "plan.md").read_text() == text
    assert text.count("\n## ") == 15 and text.count("**Training fits**") + text.count("**Training does not fit**") == 15
    committed = Path(__file__).parent.parent / "results" / "plan.md"
    assert committed.read_text() == text, "run: .venv/bin/repro plan all --out results/plan.md"


def test_a_shape_of_none():
    with pytest.raises(UserError, match="hidden_size: found None"):
        shape_from([], "x.json")
    assert isinstance(shape_from(dict(SIZE), "x.json"), Shape)
