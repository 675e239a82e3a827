"""LoRA: what trains, against a float64 reference; what is saved, loaded and merged; resuming; what is refused."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from forked import killed
from fsdp_ranks import ragged
from safetensors.torch import load_file
from test_experiments import contents, small
from test_logprobs import PROMPTS, RESPONSES, tiny_family

from repro.base.records import UserError, sealed
from repro.base.settings import EMBEDDED, Experiment
from repro.base.training import LoraSpec, TrainSpec
from repro.cli import parse
from repro.core import engines, loop, lora, memory
from repro.core.logprobs import logprob_matrix
from repro.core.losses import symmetric_infonce
from repro.experiment import configure, load_experiment
from repro.models import decoding, load
from repro.plan.gpus import PUBLISHED, shape_from, shape_of
from repro.stages import jobs
from repro.stages.pipeline import run

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed: nothing of LoRA is tested")
SPEC = LoraSpec(rank=3, alpha=6)
TRAIN = TrainSpec(batch_size=2, batches=6, learning_rate=1e-2, precision="fp32", lora=SPEC)


def adapted(tiny, *, seed="0f", random=False, spec=SPEC):
    """The tiny model with adapters; `random`: the second factor too."""
    model = load.load_model(str(tiny))
    trained = lora.put_into(model, spec, half=False, seed=seed)
    if random:
        torch.manual_seed(5)
        for p in trained:
            torch.nn.init.normal_(p, std=.2)
    return model, trained


def matrix(model, backend="shared"):
    return logprob_matrix(model, byte_tokenizer(), [p[:2] for p in PROMPTS], RESPONSES, length_normalize=True, score_eos=False, backend=backend)


def factors(model):
    return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in model.named_modules() if hasattr(m, "lora_A")}


def test_adapters_are_on_every_linear_layer_of_attention_and_mlp_and_nothing_else_trains(tiny):
    model, trained = adapted(tiny)
    names = {name.removeprefix("model.layers.") for name in factors(model)}
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert names == {f"{k}.{part}" for k in range(2) for part in parts}
    training_now = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in training_now} and len(trained) == 2 * 14
    assert sum(p.numel() for p in trained) == shape_from(model.config.to_dict(), "here").adapters(3)
    symmetric_infonce(matrix(model)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(tiny):
    plain = load.load_model(str(tiny))
    torch.manual_seed(1)
    model, _ = adapted(tiny)
    assert torch.equal(matrix(model), matrix(plain))
    torch.manual_seed(2)
    for seed, same in (("0f", True), ("1f", False)):
        other = factors(adapted(tiny, seed=seed)[0])
        assert all(torch.equal(A, other[name][0]) == same for name, (A, _) in factors(model).items())
    for A, B in factors(model).values():
        assert not B.any() and 0.8 < A.abs().max() * A.shape[1]**.5 <= 1


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen3", "gemma"])
def test_gradients_are_those_of_the_dense_weights(family):
    """dL/dB = s G A^T and dL/dA = s B^T G, G the dense model's gradient at the merged weights: float64 (but for the
    norms, which transformers computes in float32), random upstream gradients of the log-probs."""
    model = tiny_family(family)
    torch.manual_seed(3)
    for p in lora.put_into(model, SPEC, half=False, seed="3"):
        torch.nn.init.normal_(p, std=.1)
    dense, model = tiny_family(family).double(), model.double()
    layers = factors(model)
    for name, (A, B) in layers.items():
        dense.get_submodule(name).weight.data += 2 * B.detach() @ A.detach()
    ours, theirs = matrix(model), matrix(dense, "reference")
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    for name, (A, B) in layers.items():
        G = dense.get_submodule(name).weight.grad
        torch.testing.assert_close(B.grad, 2 * G @ A.T, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(A.grad, 2 * B.T @ G, atol=1e-6, rtol=1e-5)


def test_a_step_is_that_of_the_adapter_alone(tiny):
    """RMSprop's first update by hand, from the reference path; A does not move while B is zero; no other weight does."""
    model, _ = adapted(tiny)
    before, start = {k: v.clone() for k, v in model.state_dict().items()}, ragged(2)
    byhand, _ = adapted(tiny)
    loss = symmetric_infonce(logprob_matrix(byhand, byte_tokenizer(), [p.prompts for p in start], [p.responses for p in start],
                                            length_normalize=True, score_eos=False, backend="reference"))
    loss.backward()
    trace = loop.train(model, byte_tokenizer(), start, dataclasses.replace(TRAIN, batches=1), 1)
    norm = torch.stack([p.grad.norm() for p in byhand.parameters() if p.requires_grad]).norm()
    assert trace[0]["loss"] == pytest.approx(loss.item(), abs=1e-5) and trace[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, (A, B) in factors(model).items():
        g = factors(byhand)[name][1].grad
        expected = -1e-2 * g / ((.01 * g * g).sqrt() + 1e-8)
        torch.testing.assert_close(B[g.abs() > 1e-5], expected[g.abs() > 1e-5], atol=1e-3, rtol=1e-2)
        assert torch.equal(A, before[f"{name}.lora_A.default.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "lora_B" not in k)
    more = loop.train(adapted(tiny)[0], byte_tokenizer(), ragged(2) * 6, TRAIN, 1)
    assert more[-1]["loss"] < more[0]["loss"]


def test_activations_are_checkpointed_with_the_same_result(tiny, monkeypatch):
    plain, _ = adapted(tiny)
    expected = loop.train(plain, byte_tokenizer(), ragged(12), TRAIN, 1)
    monkeypatch.setattr(memory, "usable_bytes", lambda device: 1000)
    tight, _ = adapted(tiny)
    assert loop.train(tight, byte_tokenizer(), ragged(12), TRAIN, 1) == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tight.parameters()))


def test_the_head_keeps_no_logits_and_has_no_gradient(tiny, monkeypatch):
    from kernels import linear_nll as head

    model = adapted(tiny)[0]
    engines.settle(model, "shared")  # tried once
    modes, planned = [], head.plan
    monkeypatch.setattr(head, "plan", lambda *a, **k: modes.append(planned(*a, **k)) or modes[-1])
    symmetric_infonce(matrix(model)).backward()
    assert modes == ["frozen_head"]


def test_every_iteration_has_a_fresh_adapter(tmp_path):
    def seed(iteration, seed):
        jobs.write_job(tmp_path, iteration, model="m", pairs=[], spec=TRAIN, backend="shared", key="key", out="out", seed=seed)
        return json.loads((tmp_path / jobs.job_file(iteration)).read_text())["seed"]

    assert len({seed(1, 0), seed(2, 0), seed(1, 1)}) == 3 and seed(1, 0) == seed(1, 0)


# ---- what an iteration leaves

def job(tiny, folder, **train):
    jobs.write_job(folder, 1, model=str(tiny), pairs=ragged(12), spec=dataclasses.replace(TRAIN, **train), backend="shared",
                     key="key", out="checkpoints/iteration-1", seed=7)
    return folder / "checkpoints/iteration-1"


def done(tiny, folder, **train):
    out = job(tiny, folder, **train)
    trace = jobs.work(folder, 1, engines.OneProcess(), lambda n: None)
    return trace, out


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    return done(tiny, tmp_path_factory.mktemp("alone"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft reads
def test_the_adapter_loads_with_peft_and_the_merged_model_is_the_same(tiny, alone):
    _, folder = alone
    assert {p.name for p in (folder / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        plain = base(ids).logits
        with_adapter = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
        merged = load.load_model(str(folder))
        ours = merged(ids).logits
    assert (ours - plain).abs().max() > .1
    torch.testing.assert_close(ours, with_adapter, atol=2e-5, rtol=1e-5)
    assert type(merged).__name__ == "LlamaForCausalLM" and not factors(merged)
    assert set(load_file(folder / "model.safetensors")) == set(load_file(tiny / "model.safetensors"))
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(stored) == 28 and all(name.startswith("base_model.model.model.layers.") for name in stored)


def work(folder):
    return jobs.work(folder, 1, engines.OneProcess(), lambda n: None)


def test_a_killed_iteration_goes_on_and_leaves_the_same_bytes(tiny, alone, tmp_path, capsys):
    """Step checkpoints hold the adapter and its optimizer's state, and no weight of the model."""
    out = job(tiny, tmp_path)
    assert killed("repro.core.engines", "objective", 4, work, tmp_path) == -signal.SIGKILL
    saved = sorted((tmp_path / jobs.steps_folder(1)).glob("step-*"))
    shard = saved[-1] / "__0_0.distcp"
    numbers = shape_from(json.loads((tiny / "config.json").read_text()), "here").adapters(3)
    assert sealed(saved[-1], "key") and b"embed_tokens" not in (saved[-1] / ".metadata").read_bytes()
    assert 2 * 4 * numbers < shard.stat().st_size < 2 * 4 * numbers + 28 * 8 * 1024
    trace = work(tmp_path)
    assert f"going on after step {int(saved[-1].name[-6:])}" in capsys.readouterr().err and trace == alone[0]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (alone[1] / name).read_bytes()


def test_bf16(tiny, tmp_path):
    """Adapters that train in bf16 stay so; what they are merged into does not round them away."""
    _, folder = done(tiny, tmp_path, precision="bf16")
    for file, dtype in (("model.safetensors", torch.float32), ("adapter/adapter_model.safetensors", torch.bfloat16)):
        assert {t.dtype for t in load_file(folder / file).values()} == {dtype}
    merged, base, stored = (load_file(f) for f in (folder / "model.safetensors", tiny / "model.safetensors",
                                                   folder / "adapter/adapter_model.safetensors"))
    layer = "model.layers.0.mlp.down_proj"
    A, B = (stored[f"base_model.model.{layer}.lora_{f}.weight"].float() for f in "AB")
    torch.testing.assert_close(merged[f"{layer}.weight"], base[f"{layer}.weight"] + 2 * B @ A, atol=1e-7, rtol=1e-6)


@pytest.fixture(params=["bfloat16", "float32"])
def published(request, tiny, tmp_path):
    """Weights as their publisher saved them."""
    load.save_model(load.load_model(str(tiny), dtype=request.param), byte_tokenizer(), tmp_path / "published")
    return tmp_path / "published", request.param


def test_what_trains_on_weights_of_16_bits_is_saved_as_it_was_trained(published, tmp_path, monkeypatch):
    """On a GPU: frozen weights in bf16, adapters in float32. The trained model by peft and the reference path, from bf16
    weights; the merged one as it is saved. Where the publisher's weights have 32 bits, the rounding in training is the
    difference, and it is told."""
    base, dtype = published
    model = load.load_model(str(base), dtype="bfloat16")
    torch.manual_seed(5)
    for p in lora.put_into(model, SPEC, half=False, seed="0f"):
        torch.nn.init.normal_(p, std=.01)  # a merge into bf16 rounds most of it away
    lora.save(model, byte_tokenizer(), tmp_path / "out", str(base))

    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    layers = {name for name in before if name.split(".")[-2].endswith("_proj")}
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert all(torch.equal(before[n].float(), after[n]) for n in before.keys() - layers)
    assert min((before[n].float() != after[n]).float().mean() for n in layers) > .99
    assert max((before[n].bfloat16() != after[n].bfloat16()).float().mean() for n in layers) < .5

    trained = load.load_model(str(base), dtype="bfloat16").float()
    lora.put_into(trained, SPEC, half=False, seed="1")
    state = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    peft.set_peft_model_state_dict(trained, {k.removeprefix("base_model.model."): v for k, v in state.items()}, adapter_name="default")
    expected, prompts = matrix(trained, "reference"), [p[:2] for p in PROMPTS]
    monkeypatch.setattr(engines, "weights_dtype", lambda spec: "bfloat16")

    def off():
        facts = lora.merged_difference(tmp_path / "out", str(base), byte_tokenizer(), TRAIN, prompts, RESPONSES, "shared")
        assert facts["queries"] == len(prompts) and facts["pairs"] == expected.numel()
        return facts["max_abs_difference_nats"]

    with torch.no_grad():
        off_here = (matrix(load.load_model(str(tmp_path / "out"))) - expected).abs().max()
        rounding = (matrix(load.load_model(str(base), dtype="bfloat16").float()) - matrix(load.load_model(str(base)))).abs().max()
    if dtype == "float32":
        assert off_here == pytest.approx(rounding.item(), rel=.5) and off() > off_here > .01
        return
    assert rounding == 0 and off_here < 2e-5 and off() < 1e-3
    load.save_model(load.load_model(str(tmp_path / "out"), dtype="bfloat16"), byte_tokenizer(), tmp_path / "out")
    assert off() > .05  # a merge into bf16


def test_a_checkpoint_carries_the_generation_config_of_the_initial_model(tiny, tmp_path):
    import shutil

    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / decoding.GENERATION).write_text('{"eos_token_id": [2, 9], "repetition_penalty": 1.05}')
    _, folder = done(base, tmp_path)
    assert (folder / decoding.GENERATION).read_bytes() == (base / decoding.GENERATION).read_bytes()
    assert decoding.end_tokens(byte_tokenizer(), str(folder)) == {2, 9}


def test_a_run_with_adapters(tiny, tmp_path):
    """exp1 by the command's flags, to its end, and again; an iteration's folder is sealed with the adapter in it."""
    args = parse(["run", "exp1", "--lora", "2", "--learning-rate", "1e-3"])
    experiment = small(configure(args)[0], tiny)
    assert experiment.train.lora == LoraSpec(rank=2, alpha=4) and experiment.train.learning_rate == 1e-3
    assert experiment.name == "exp1_dialogue_lora" and Experiment.from_json(experiment.to_json()) == experiment
    assert configure(parse(["run", "exp1", "--lora", "2"]))[0].train.learning_rate == 1e-4
    folder = run(experiment, tmp_path, say=lambda text: None)
    first = contents(folder)
    assert "LoRA adapters of rank 2" in (folder / "report.html").read_text()
    record = json.loads((folder / "run.json").read_text())
    for iteration in (1, 2, 3):
        assert sealed(folder / f"checkpoints/iteration-{iteration}")
        facts = record["stages"][f"train-{iteration}"]["merged"]
        assert facts["queries"] == 4 and facts["pairs"] == 16 and 0 <= facts["max_abs_difference_nats"] < 1e-2
    one, two = (load_file(folder / f"checkpoints/iteration-{k}/adapter/adapter_model.safetensors") for k in (1, 2))
    assert not any(torch.equal(one[k], two[k]) for k in one if "lora_A" in k)  # fresh for each iteration
    (folder / "checkpoints/iteration-3/adapter/adapter_model.safetensors").write_bytes(b"altered")
    said = []
    run(experiment, tmp_path, say=said.append)
    assert "train-2: done before, skipped" in said and "train-3: done before, skipped" not in said and contents(folder) == first


# ---- sizes and refusals

def test_the_share_that_trains():
    """Rank 8 on the embedded model: at most 2 % of its parameters, as counted and as the plan has it."""
    config = transformers.LlamaConfig(**{k: PUBLISHED[EMBEDDED][k] for k in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
        "tie_word_embeddings")})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters())
    adapters = sum(p.numel() for p in lora.put_into(model, LoraSpec(rank=8, alpha=16), half=False, seed="0"))
    assert adapters == shape_of(EMBEDDED).adapters(8) == 2_442_240 and adapters / whole < .02


def test_refusals(tiny, monkeypatch, tmp_path):
    experiment = dataclasses.replace(small(load_experiment("exp1", "mini")[0], tiny, lora=SPEC))
    with pytest.raises(UserError, match="--lora with --ranks 2: adapters train in one process"):
        run(experiment, tmp_path, ranks=2)
    with pytest.raises(UserError, match="--lora: mixtral is a mixture"):
        lora.check(transformers.MixtralConfig(), 1)
    with pytest.raises(UserError, match="--lora: 0; must be above 0"):
        configure(parse(["run", "exp1", "--lora", "0"]))
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--lora needs peft: pip install 'sami-repro\[lora\]'"):
        run(experiment, tmp_path)
    assert not list(Path(tmp_path).rglob("*.json*"))
