"""`repro plan`: its arithmetic against models, autograd and measured peaks; what it says; what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from repro import cli
from repro.base.records import UserError
from repro.core import engines, loop, memory
from repro.core.memory import GB, Step, activation_bytes, peak, training_bytes
from repro.core.shapes import counted
from repro.models import load
from repro.plan import page
from repro.plan.estimate import disk_of, first_step, plan
from repro.plan.gpus import GPUS, gpu_of, matrix_flops, server_options, settle, shape_from, shape_of, ways
from repro.plan.texts import texts_of

sys.path.insert(0, str(Path(__file__).parent / "perf"))

MISTRAL, MIXTRAL, LLAMA = (shape_of(name) for name in (
    "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "meta-llama/Meta-Llama-3-70B"))
SIZE = {"vocab_size": 500, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 2048}
STEP = Step(ranks=1, precision="fp32_master", optimizer="adamw", pack_tokens=8192, scored=4000, longest=2600)


def config(family, **change):
    """The content of a config.json, as published: what is the family's own default is left out."""
    return {"model_type": family, **change}


def size(D, I, layers, H, K, V, **more):
    """The fields of every family, in the order: hidden and intermediate size, layers, heads, heads of keys, vocabulary."""
    return {"hidden_size": D, "intermediate_size": I, "num_hidden_layers": layers, "num_attention_heads": H,
            "num_key_value_heads": K, "vocab_size": V} | more


MODELS = {  # public config.json files, and billions of parameters: all, and of all layers those that multiply a token
    "Qwen2-0.5B": (config("qwen2", **size(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)), .494, .358),
    "Qwen3-8B": (config("qwen3", **size(4096, 12288, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=False)), 8.191, 6.946),
    "Qwen3-30B-A3B": (config("qwen3_moe", **size(2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768,
                                                 num_experts=128, num_experts_per_tok=8)), 30.532, 2.731),
    "Gemma 2B": (config("gemma", **size(2048, 16384, 18, 8, 1, 256000, head_dim=256)), 2.506, 1.982),
    "Gemma 2 2B": (config("gemma2", **size(2304, 9216, 26, 8, 4, 256000, head_dim=256)), 2.614, 2.024),
    "Gemma 3 1B": (config("gemma3_text", **size(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512)), 1.000, .698),
    "Phi-3-mini": (config("phi3", **size(3072, 8192, 32, 32, 32, 32064)), 3.821, 3.624),
    "OLMo-2-7B": (config("olmo2", **size(4096, 11008, 32, 32, 32, 100352)), 7.299, 6.476),
    "OLMoE-1B-7B": (config("olmoe", **size(2048, 1024, 16, 16, 16, 50304, num_experts=64, num_experts_per_tok=8)), 6.919, 1.076),
    "Granite-3.1-2B": (config("granite", **size(2048, 8192, 40, 32, 8, 49155, tie_word_embeddings=True)), 2.534, 2.433),
    "GLM-4-9B": (config("glm4", **size(4096, 13696, 40, 32, 2, 151552, head_dim=128, attention_bias=True)), 9.400, 8.158),
    "Command-R7B": (config("cohere2", **size(4096, 14336, 32, 32, 8, 256000)), 8.028, 6.979),
    "Llama-3.2-1B": (config("llama", **size(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True)), 1.236, .973),
    "Mixtral-8x22B": (config("mixtral", **size(6144, 16384, 56, 48, 8, 32768)), 140.630, 38.758)}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model_that_is_trained(name):
    """As its page says, and as the model has them that transformers builds, tied weights once; none left out of the layers."""
    data, billions, active = MODELS[name]
    shape = shape_from(data, name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**data))
    assert shape.parameters == sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, abs=1e6)
    assert shape.parameters - shape.root == sum(p.numel() for p in model.model.layers.parameters())
    assert shape.active == pytest.approx(active * 1e9, abs=1e6)
    assert shape.largest == max(p.numel() for p in model.model.layers.parameters())
    assert shape == counted(model) and shape.num_hidden_layers == data["num_hidden_layers"]


def test_layers_that_differ():
    """The first layer dense, the others mixtures with a network that all tokens go to: 8 of 128 experts multiply a token."""
    D, I, J, E, heads = 256, 512, 64, 128, 2 * 256 * (4 + 2) * 64
    shape = shape_from(config("glm4_moe", **size(D, I, 4, 4, 2, 1000, head_dim=64, moe_intermediate_size=J, n_routed_experts=E,
                                                 num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=1)), "here")
    dense, *mixed = shape.layers
    assert dense.active == heads + 3 * D * I and {m.active for m in mixed} == {heads + D * E + 9 * 3 * D * J}
    assert shape.layer == mixed[0].parameters == heads + D * E + (E + 1) * 3 * D * J + 2 * D and shape.mixture
    assert mixed[0].largest == E * 2 * D * J and shape.root == 2 * 1000 * D + D
    sparse = config("qwen3_moe", **size(D, I, 4, 4, 2, 1000, head_dim=64, moe_intermediate_size=J, num_experts=E, num_experts_per_tok=8))
    for change, mixtures in (({"decoder_sparse_step": 2}, 2), ({"mlp_only_layers": [0, 1, 3]}, 1), ({}, 4)):
        layers = shape_from(sparse | change, "here").layers
        assert [layer.largest for layer in layers].count(E * 2 * D * J) == mixtures, change


def test_a_field_left_out_has_the_familys_default():
    """Gemma's head is its embedding, Llama's is not; a config.json from before a field was thought of says nothing of it."""
    for family, tied in (("gemma2", True), ("gemma3_text", True), ("gemma", True), ("cohere2", True), ("llama", False)):
        shape = shape_from(config(family, **SIZE, head_dim=16), "here")
        assert shape.root == (1 if tied else 2) * 500 * 96 + 96, family
        assert shape == shape_from(config(family, **SIZE, head_dim=16, tie_word_embeddings=tied), "here")


MLA = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}


@pytest.mark.parametrize("data, reason", [
    (config("deepseek_v3", **SIZE | MLA, n_routed_experts=8, n_group=2, topk_group=1), "deepseek_v3: self_attn: no attention of 6"),
    (config("deepseek_v2", **SIZE | MLA, n_routed_experts=8), "deepseek_v2: self_attn: no attention of 6 heads"),
    (config("jamba", **SIZE), "jamba: mamba: no attention"), (config("mamba", hidden_size=96), "no num_attention_heads"),
    (config("qwen3_next", **SIZE), "qwen3_next: linear_attn: no attention"),
    (config("gpt_oss", **SIZE, head_dim=16), "gpt_oss: self_attn: no attention"),  # sinks
    (config("llama4_text", **SIZE, head_dim=16), "feed_forward.experts: tensors of 16 x 96 x "),
    (config("starcoder2", **SIZE), "starcoder2: mlp: matrices of 160 x 96, 96 x 160, not a gated network"),
    (config("lfm2", **SIZE, layer_types=["full_attention"] * 3), "lfm2: feed_forward: a feed-forward network without an activation"),
    (config("gpt2", n_embd=96, n_head=6, n_layer=2), "gpt2: attn: no attention"), (config("bloom", hidden_size=96), "bloom: "),
    (config("opt", hidden_size=96, ffn_dim=160, num_attention_heads=6, num_hidden_layers=2), "opt: "),
    (config("bert", **SIZE), "bert: "), (config("t5"), "t5.json: no causal LM can be made of it (ValueError"),
    (config("bart", d_model=96, decoder_layers=2), "bart: "),
    (config("gemma3", text_config=config("gemma3_text", **SIZE, head_dim=16)), "gemma3: Gemma3ForConditionalGeneration has parts"),
    (config("made_up", **SIZE), "model_type: found 'made_up', no model that this transformers knows"),
    (SIZE, "model_type: found None"), (config(["llama"]), "model_type: found ['llama']"), ([], "model_type: found None"),
    (config("llama", **SIZE | {"hidden_size": "many"}), "no causal LM can be made of it"),
    (config("llama", **SIZE | {"hidden_size": None}), "no causal LM can be made of it"),
    (config("llama", **SIZE | {"num_hidden_layers": 0}), "llama: no decoder layers"),
    (config("qwen2", **SIZE, quantization_config={"quant_method": "awq", "bits": 4}), "quantization_config (awq, 4 bits): quantised"),
    (config("llama", **SIZE, quantization_config={"quant_method": "fp8"}), "quantization_config (fp8): quantised weights"),
    (config("gemma3", text_config=config("gemma3_text", quantization_config={"quant_method": "gptq"})), "(gptq)")])
def test_what_is_no_llama_like_decoder_is_refused(data, reason, tmp_path, capsys):
    """In one line and before anything is printed: its step is not known."""
    family = data.get("model_type") if isinstance(data, dict) else ""
    path = tmp_path / f"{family if isinstance(family, str) else 'x'}.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "exp1", "--gpus", "8", "--model", "me/x", "--config", str(path)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"repro: {path}: ") and reason in captured.err


def test_null_is_no_quantisation():
    assert shape_from(config("llama", **SIZE, quantization_config=None), "here").parameters > 0
    assert load.quantised(transformers.LlamaConfig(**SIZE)) is None
    assert "awq" in load.quantised(transformers.LlamaConfig(**SIZE, quantization_config={"quant_method": "awq"}))


SMALL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, change, error", [
    ("gemma", {}, .05), ("gemma3_text", {}, .05), ("gemma2", {}, .05), ("olmo", {}, .05), ("olmo2", {}, .05), ("phi3", {}, .1),
    ("cohere2", {}, .1), ("glm4", {}, .1), ("granite", {}, .05), ("stablelm", {}, .1), ("qwen2", {}, .05), ("qwen3", {}, .05),
    ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 56}, .05),
    ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2}, .05)])
def test_what_autograd_keeps_of_two_layers(family, change, error, dtype):
    """Of each family that is planned: other norms, and how many; fused projections; scores kept; experts of another size."""
    def kept(layers):
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(family, **SIZE | change | SMALL | {"num_hidden_layers": layers, "head_dim": 16})
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype).train()
        weights, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.model(torch.randint(3, 400, (3, 50)), use_cache=False)
        return sum(storages.values()), activation_bytes(counted(model), 150, dtype.itemsize, 50)

    (four, expected), (two, less) = kept(4), kept(2)
    assert (expected - less) == pytest.approx(four - two, rel=error)


def test_published_shapes():
    """The parameter counts of the models' pages."""
    assert [round(s.parameters / 1e9, 2) for s in (MISTRAL, MIXTRAL, LLAMA)] == [7.24, 46.70, 70.55]
    assert MIXTRAL.active == pytest.approx(12.6e9, rel=.01)  # and 0.26e9 in embedding and head
    assert MISTRAL.adapters(16) == 41_943_040  # as peft counts for all linear layers of mistral-7b


@pytest.mark.parametrize("C, R, common, total, head", [
    (2, 2, None, 117.5, 2.14), (2, 2, 0, 64.8, .25), (4, 4, None, 470, 8.56), (4, 4, 0, 157.5, 1.01), (4, 4, 600, 81.3, 1.01)])
def test_flops_of_mistral_by_hand(C, R, common, total, head):
    """TFLOP of a query's matrix with backward, prompts of 600 and responses of 80 tokens."""
    layers, rows = matrix_flops(MISTRAL, C, R, 600, 80, common, training=True)
    assert (layers + rows) / 1e12 == pytest.approx(total, rel=.001) and rows / 1e12 == pytest.approx(head, rel=.01)


@pytest.mark.parametrize("common", [None, 0, 16])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_flops_are_those_counted(family, common):
    """Within 4 %: the kernel takes whole blocks of the attention's triangle and computes scores again."""
    from step import Ids

    from repro.core.logprobs import logprob_matrix

    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"} if family == "Mixtral" else {}
    config = getattr(transformers, f"{family}Config")(**SIZE | {"hidden_size": 192, "intermediate_size": 384}, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    P, L = 24, 8
    backend = "reference" if common is None else "shared"
    prompts = [[" " + " ".join(str(10 + k + c * (k >= (common or 0))) for k in range(P)) for c in range(3)]]
    responses = [[" " + " ".join(str(100 + 9 * k + r) for k in range(L)) for r in range(2)]]
    engines.settle(model, backend)  # tried once
    with FlopCounterMode(display=False) as counter:
        logprob_matrix(model, Ids(), prompts, responses, length_normalize=True, score_eos=False, backend=backend).sum().backward()
    expected = matrix_flops(counted(model), 3, 2, P, L, common, training=True)
    assert sum(expected) == pytest.approx(counter.get_total_flops(), rel=.04)


@pytest.mark.parametrize("case", [
    ("tiny-llama", "fp32", "adamw", False, 300, 80), ("tiny-llama", "fp32", "rmsprop", True, 300, 80),
    ("tiny-llama", "bf16", "rmsprop", False, 300, 80), ("tiny-mixtral", "fp32", "adamw", True, 300, 80)])
def test_bytes_are_those_measured(case, monkeypatch):
    """A step of a small model: kinds to 10 %, the peak of all live tensors from -5 to +30 %."""
    import plan_check

    for module, name in ((loop, "_optimizer"), (memory, "usable_bytes")):
        monkeypatch.setattr(module, name, getattr(module, name))  # what `measure` puts in their place
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
    small = shape_from(SIZE | {"model_type": "llama", "vocab_size": 8192, "hidden_size": 256, "num_attention_heads": 8}, "here")
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


def test_an_objective_that_needs_the_initial_model_costs_one_pass_and_no_memory():
    """A pass without a backward over what trains: as many tokens, a third of its FLOPs, or a fourth where layers are computed again."""
    (spec,), gpu = cli.load_experiment("exp1", "paper"), GPUS["a100"]
    own, other = (plan(dataclasses.replace(spec, train=dataclasses.replace(spec.train, objective=name)), gpu, 8) for name in ("sami", "mipo"))
    more = [s for s in other.stages if s.name not in {s.name for s in own.stages}]
    (training,) = [s for s in other.stages if s.name == "training"]
    assert [s for s in other.stages if s not in more] == own.stages and other.phases == own.phases
    assert len(more) == 1 and more[0].tokens == training.tokens and more[0].flops == pytest.approx(
        training.flops / (4 if own.step.checkpointing else 3), rel=0.01)


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
    assert texts.items == 2 * 128 and texts.prompt[0] < texts.prompt[1] and texts.query < 40


def test_another_models_shape(tmp_path):
    data = config("llama", **SIZE)
    (tmp_path / "config.json").write_text(json.dumps(data))
    shape = shape_of(str(tmp_path))
    assert shape.head_dim == 16 and not shape.mixture
    assert shape_of("lab/unknown", tmp_path / "config.json") == shape
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


# ---- packs, and the reference path

def test_a_pack_holds_a_step_at_most():
    """exp1's first profile trains on few queries: their tokens are what goes together, not what a pack could hold."""
    (mini,), (paper,) = (cli.load_experiment("exp1", profile) for profile in ("mini", "paper"))
    small = dataclasses.replace(mini, train=dataclasses.replace(mini.train, pack_tokens=None, batch_size=4))
    for gpus in (1, 2, 3, 8):
        texts = texts_of(small)
        longest, step = 2 * (texts.prompt[1] + 2 * texts.response[1]) - texts.common[1], first_step(small, texts, gpus)
        assert texts.common[1] > 40 and 4 * longest < loop.PACK_TOKENS["cuda"] and step.pack_tokens == -(-4 // gpus) * longest
        assert step.scored == -(-4 // gpus) * 4 * texts.response[1] and step.longest == longest
    assert first_step(paper, texts_of(paper), 8).pack_tokens == loop.PACK_TOKENS["cuda"]  # 128 queries a step
    step = first_step(small, texts_of(small), 1)
    assert step.on(4).pack_tokens == step.longest == step.on(100).pack_tokens  # more GPUs, fewer queries on each
    less, more = (plan(e, GPUS["a100"], 1) for e in (small, dataclasses.replace(small, train=dataclasses.replace(
        small.train, batch_size=64))))
    assert less.phases["head"]["activations"] < .5 * more.phases["head"]["activations"]


def test_a_family_on_the_reference_path_is_planned_as_it_runs(tmp_path):
    """On one GPU alone whatever --gpus says, all pairs in full and all logits made; sampling may use the others."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Qwen3-30B-A3B"][0] | {"attention_dropout": 0.1}))
    spec = cli.load_experiment("exp1", "paper")[0]
    assert plan(spec, GPUS["a100"], 8, config=path).refusal is None  # dropout is off
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, dropout="drawn"))
    one, eight = (plan(spec, GPUS["a100"], n, config=path) for n in (1, 8))
    assert one.refusal == eight.refusal and "dropout (attention_dropout 0.1) would draw" in one.refusal
    assert eight.step == one.step and eight.step.ranks == 1 and eight.scoring == one.scoring and eight.scoring_gpus == 1
    assert eight.server.gpus * eight.server.copies == 8 and not any("gpus" in names for names, _, _ in eight.ways)
    queries = sum(spec.train.queries_needed(k) for k in range(1, spec.iterations + 1))
    P, L = one.texts.prompt[0], one.texts.response[0]
    assert one.stages[2].tokens == queries * 4 * (P + L) and "times" not in one.stages[2].note
    shared = plan(dataclasses.replace(spec, train=dataclasses.replace(spec.train, dropout="off")), GPUS["a100"], 1, config=path)
    assert one.step.longest == 4 * (one.texts.prompt[1] + one.texts.response[1]) > shared.step.longest
    logits = training_bytes(one.shape, one.step)["head"]["head: scored rows"]
    assert logits == 4 * one.step.scored * 151936
    text = "\n".join(page.page(one))
    assert "30.5 billion" in text and "by the reference path**, which works on one GPU alone" in text


def test_what_looks_ahead_is_not_planned(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Gemma 3 1B"][0] | {"use_bidirectional_attention": True}))
    with pytest.raises(UserError, match="gemma3_text: not a causal language model"):
        plan(cli.load_experiment("exp1", "paper")[0], GPUS["a100"], 8, config=path)


def test_bytes_of_the_reference_path_are_those_measured(monkeypatch):
    import plan_check

    for module, name in ((loop, "_optimizer"), (memory, "usable_bytes")):
        monkeypatch.setattr(module, name, getattr(module, name))
    kinds = plan_check.measure("tiny-llama", "fp32", "rmsprop", False, 300, 80, backend="reference")["kinds"]
    for kind in ("activations kept", "head: scored rows"):
        assert kinds[kind]["ratio"] == pytest.approx(1, abs=.05), kind
    assert .95 < kinds["peak of live tensors"]["ratio"] < 1.3


def test_a_run_counts_the_model_that_it_has(monkeypatch, tiny):
    """No model is built for it; of one that the byte model does not know nothing is said."""
    shape = memory.known_shape(load.load_model(str(tiny)))
    assert shape == shape_of(str(tiny))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50))
    assert memory.known_shape(gpt2) is None
    step = dataclasses.replace(STEP, device="cpu")
    monkeypatch.setattr(memory, "usable_bytes", lambda device: 0)
    with memory.activation_checkpointing(gpt2, None, step):
        assert not gpt2.is_activation_checkpointing
