"""Doses, steps, precision, and the golden loss trace."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer

from repro import cli
from repro.base.identity import config_hash
from repro.base.records import UserError
from repro.base.settings import DataSpec, Experiment, SamplingSpec
from repro.base.training import TrainSpec, Update
from repro.core import engines, logprobs, loop, memory
from repro.core.engines import TrainingPair
from repro.core.loop import train
from repro.core.losses import symmetric_infonce
from repro.core.memory import activation_bytes
from repro.core.shapes import counted
from repro.models import load

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "tests/golden_trace.txt"


def test_as_printed_is_table_1():
    spec = TrainSpec(dose="as_printed")
    assert [spec.updates(k) for k in (1, 2, 3)] == [[Update(128, 1.0)] * n for n in (2, 4, 6)]
    llama = TrainSpec(batches=4, batches_increment=4)
    assert [len(llama.updates(k)) for k in (1, 2, 3)] == [4, 8, 12]


def test_as_run_is_what_the_logs_show():
    """Effective batch 8, first step at rate 0: so 1, 3, 5 updates that change anything."""
    for iteration, changing in ((1, 1), (2, 3), (3, 5)):
        plan = TrainSpec(dose="as_run").updates(iteration)
        assert {u.queries for u in plan} == {8} and plan[0].rate == 0
        assert sum(u.rate > 0 for u in plan) == changing
    assert [u.rate for u in TrainSpec(dose="as_run").updates(2)] == [0, 1, 13 / 14, 12 / 14]


def pairs(n):
    return [TrainingPair(query=f"q{k}", prompts=(f"Be short. Question {k}?\n", f"Be long. Question {k}?\n"),
                         responses=(f"yes {k}", f"yes, and then much more of {k}")) for k in range(n)]


def trained(tiny, spec, n=8, iteration=1, pairs=pairs):
    model = load.load_model(str(tiny), dtype="bfloat16" if spec.precision == "bf16" else "float32")
    return model, train(model, byte_tokenizer(), pairs(n), spec, iteration)


SPEC = TrainSpec(dose="as_printed", batch_size=2, learning_rate=2e-4, precision="fp32")


def test_golden_loss_trace(tiny):
    """Six RMSprop steps on the tiny model. A refactor must reproduce them; a change of the method updates the file."""
    _, trace = trained(tiny, SPEC, 12, iteration=3)
    expected = [float(line) for line in TRACE.read_text().split()]
    assert [row["loss"] for row in trace] == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0]


def test_a_step_is_the_mean_gradient_of_its_batch(tiny):
    """One plain step by hand: RMSprop's first update of the mean loss over the batch."""
    from repro.core.logprobs import logprob_matrix
    spec = TrainSpec(batch_size=3, batches=1, learning_rate=1e-3, precision="fp32")
    model, trace = trained(tiny, spec, 3)
    ours = load.load_model(str(tiny))
    batch = pairs(3)
    matrices = logprob_matrix(ours, byte_tokenizer(), [p.prompts for p in batch], [p.responses for p in batch],
                              length_normalize=True, score_eos=False, backend="reference")
    symmetric_infonce(matrices).backward()
    norm = torch.stack([p.grad.norm() for p in ours.parameters()]).norm().item()
    assert trace[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)  # RMSprop's step would hide a wrong scale
    with torch.no_grad():
        for (name, p), q in zip(ours.named_parameters(), model.parameters()):
            step = p.grad / ((0.01 * p.grad**2).sqrt() + 1e-8)
            # where a gradient is rounding noise, RMSprop's step is +-10 either way
            solid = p.grad.abs() > 1e-4 * p.grad.abs().max()
            torch.testing.assert_close(q[solid], (p - 1e-3 * step)[solid], atol=2e-4, rtol=1e-3, msg=name)


def test_as_run_leaves_the_first_step_without_effect(tiny):
    spec = TrainSpec(dose="as_run", batch_size=2, batches=1, learning_rate=1e-2, precision="fp32")
    model, trace = trained(tiny, spec, 2)
    before = load.load_model(str(tiny)).state_dict()
    assert [row["rate"] for row in trace] == [0.0]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bf16_rounds_small_updates_away_and_fp32_master_does_not(tiny):
    """At learning rate 5e-7 most of bf16's updates are lost: a real hyper-parameter of SAMI."""
    def moved(precision):
        spec = TrainSpec(batch_size=2, batches=2, learning_rate=5e-7, precision=precision, optimizer="adamw")
        model, _ = trained(tiny, spec, 4)
        before = load.load_model(str(tiny), dtype="bfloat16" if precision == "bf16" else "float32").state_dict()
        after = model.state_dict()
        return sum((before[k] != v).sum().item() for k, v in after.items()) / sum(v.numel() for v in after.values())

    assert moved("bf16") < 0.1 < 0.9 < moved("fp32_master")


def test_the_products_setting_is_put_back(tiny):
    before = torch.backends.mkldnn.matmul.fp32_precision
    trained(tiny, copy.replace(SPEC, precision="fp32_master") if hasattr(copy, "replace") else
            TrainSpec(batch_size=2, precision="fp32_master"), 4)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, monkeypatch):
    model, loss = load.load_model(str(tiny)), engines.objective
    monkeypatch.setattr(engines, "objective", lambda *given, **more: loss(*given, **more) * float("nan"))
    before = copy.deepcopy(model.state_dict())
    saved = []
    with pytest.raises(UserError, match="iteration 1, step 1: loss nan.*not finite at learning rate 0.0002; stopped"):
        train(model, byte_tokenizer(), pairs(4), SPEC, 1, save_batch=lambda facts: saved.append(facts) or "batch.json")
    assert saved == [{"iteration": 1, "step": 1, "ranks": [0], "loss": "nan", "grad_norm": "nan", "queries": ["q0", "q1"]}]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_that_are_not_finite_are_refused_before_the_first_step(tiny):
    model = load.load_model(str(tiny))
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    with pytest.raises(UserError, match=r"the loaded model \(.*\): llama: its logits are not finite"):
        train(model, byte_tokenizer(), pairs(4), SPEC, 1)


def test_too_few_pairs_is_said(tiny):
    with pytest.raises(UserError, match="iteration 2: 3 training pairs left of 8 needed"):
        trained(tiny, SPEC, 3, iteration=2)


@pytest.mark.parametrize("backend", ["shared", "reference"])
def test_packs_of_many_queries_give_the_same_step(tiny, backend):
    """One query a backward or all of them in one: the same gradient to rounding."""
    def norms(tokens):
        seen, told = load.load_model(str(tiny)), []
        trace = train(seen, byte_tokenizer(), pairs(7), TrainSpec(batch_size=7, batches=1, precision="fp32", pack_tokens=tokens),
                      1, backend=backend, on_query=told.append)
        return trace[0]["loss"], trace[0]["grad_norm"], [n for n in told if n]

    *alone, one_by_one = norms(1)
    *packed, at_once = norms(10_000)
    assert one_by_one == [1] * 7 and at_once == [7]
    assert packed == pytest.approx(alone, rel=1e-5)


def test_activations_are_checkpointed_where_they_would_not_fit(tiny, monkeypatch):
    """By plan, off again afterwards, and without a difference in the weights."""
    spec, on = TrainSpec(batch_size=4, batches=1, learning_rate=1e-3, precision="fp32"), []
    enable = transformers.PreTrainedModel.activation_checkpointing_enable
    monkeypatch.setattr(transformers.PreTrainedModel, "activation_checkpointing_enable",
                        lambda self, *a, **k: on.append(1) or enable(self, *a, **k))
    plain, _ = trained(tiny, spec, 4)
    assert not on
    monkeypatch.setattr(memory, "usable_bytes", lambda device: 1000)
    tight, _ = trained(tiny, spec, 4)
    assert on and not tight.is_activation_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tight.parameters()))


# ---- dropout

DROPPING = {"gpt2": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4, "n_positions": 512},
            "llama": {"attention_dropout": 0.4}, "opt": {"dropout": 0.4, "attention_dropout": 0.4, "layerdrop": 0.3},
            "phimoe": {"attention_dropout": 0.4, "hidden_dropout": 0.4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3,
                       "num_local_experts": 2, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default",
                                                                                             "rope_theta": 1e4}}}


def dropping(family: str):
    torch.manual_seed(3)
    size = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512} | DROPPING[family]
    size |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {"intermediate_size": 48} if family != "gpt2" else {}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **size))


def trained_with(family: str, spec: TrainSpec, backend: str = "reference", start: int = 7, **options):
    torch.manual_seed(start)  # of whoever called: it must not count
    model = dropping(family).train()
    torch.manual_seed(start)
    trace = train(model, byte_tokenizer(), pairs(8), spec, 2, backend=backend, **options)
    return [row["loss"] for row in trace], [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dropout", ["off", "drawn"])
@pytest.mark.parametrize("family", DROPPING)
def test_dropout_is_off_or_drawn_by_position(family, dropout):
    """Two runs are equal to the bit whatever random state they find; off, the first loss is that of the model at rest."""
    spec = dataclasses.replace(SPEC, dropout=dropout)
    (one, weights), (two, again) = (trained_with(family, spec, start=seed) for seed in (7, 8))
    assert one == two and all(map(torch.equal, weights, again))
    model = dropping(family).eval()
    at_rest = [symmetric_infonce(logprobs.matrix_of("reference", model, [ids], length_normalize=True)).item()
               for ids in engines.ids_of(byte_tokenizer(), pairs(2), score_eos=False)]
    assert (one[0] == pytest.approx(sum(at_rest) / 2, abs=1e-6)) == (dropout == "off")


def test_what_is_dropped_differs_from_pass_to_pass():
    """The same two queries at each step, at rate 0: other losses; and the same again."""
    spec = TrainSpec(dose="as_printed", batch_size=2, batches=3, learning_rate=1e-30, precision="fp32", dropout="drawn")
    same = [pairs(2)[k % 2] for k in range(6)]
    losses = [[row["loss"] for row in train(dropping("gpt2"), byte_tokenizer(), same, spec, 1, backend="reference")]
              for _ in range(2)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


@pytest.mark.parametrize("dropout", ["off", "drawn"])
def test_a_run_with_dropout_goes_on_with_the_same_bytes(tmp_path, dropout):
    """Stopped after its first step, whatever the random state is then."""
    from repro.core.checkpoints import StepCheckpoints

    spec = dataclasses.replace(SPEC, dropout=dropout)
    whole = trained_with("gpt2", spec)

    class Stop(Exception):
        pass

    class OneStep(StepCheckpoints):
        def save(self, *args, **kwargs):
            super().save(*args, **kwargs)
            raise Stop

    with pytest.raises(Stop):
        trained_with("gpt2", spec, steps=OneStep(tmp_path, "key", worth=0))
    on = trained_with("gpt2", spec, steps=StepCheckpoints(tmp_path, "key", worth=0), start=99)
    assert on[0] == whole[0] and all(map(torch.equal, on[1], whole[1]))


@pytest.mark.parametrize("raised", [SystemExit(143), KeyboardInterrupt()], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_a_checkpoint_is_written_is_no_failure_to_write(raised, tmp_path, monkeypatch):
    """The second signal acts at once; torch wraps what is raised in its writer as a failure of that rank. The same call goes on."""
    from torch.distributed.checkpoint import FileSystemWriter

    from repro.core.checkpoints import StepCheckpoints

    def interrupted(*given):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", interrupted)
        with pytest.raises(type(raised)) as found:
            trained_with("gpt2", SPEC, steps=StepCheckpoints(tmp_path, "key", worth=0))
        assert found.value.args == raised.args
    whole, on = (trained_with("gpt2", SPEC, steps=steps) for steps in (None, StepCheckpoints(tmp_path, "key", worth=0)))
    assert on[0] == whole[0] and all(map(torch.equal, on[1], whole[1]))


@pytest.mark.parametrize("dropout", ["off", "drawn"])
def test_checkpointed_layers_drop_what_they_dropped(monkeypatch, dropout):
    """transformers checkpoints in training alone; here it does at rest too, and the numbers are those without. Each layer
    is computed twice."""
    spec = dataclasses.replace(SPEC, dropout=dropout)
    backend = "shared" if dropout == "off" else "reference"
    plain, calls = trained_with("llama", spec, backend), []
    monkeypatch.setattr(memory, "usable_bytes", lambda device: 1000)
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward",
                        lambda self, x: calls.append((self.training, torch.is_grad_enabled())) or forward(self, x))
    tight = trained_with("llama", spec, backend)
    assert tight[0] == plain[0] and all(map(torch.equal, plain[1], tight[1]))
    assert {training for training, grad in calls if grad} == {dropout == "drawn"}
    passes = 4 if backend == "shared" else 4 * 8  # steps; of two queries with four pairs each
    assert sum(grad for _, grad in calls) == 2 * 2 * passes  # layers, forward and again


@pytest.mark.parametrize("dropout", ["off", "drawn"])
def test_a_layer_that_drops_by_itself_does_not_when_it_is_checkpointed_at_rest(monkeypatch, dropout):
    """OPT's layers ask their own `training`, which transformers needs to be on to checkpoint."""
    spec = dataclasses.replace(SPEC, dropout=dropout)
    plain, on = trained_with("opt", spec), []
    enable = transformers.PreTrainedModel.activation_checkpointing_enable
    monkeypatch.setattr(transformers.PreTrainedModel, "activation_checkpointing_enable", lambda self: on.append(1) or enable(self))
    for name, value in (("training_bytes", lambda *of: {}), ("peak", lambda of: ("", 1 << 62))):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(loop, "known_shape", lambda model: "known")
    tight = trained_with("opt", spec)
    assert on and tight[0] == plain[0] and all(map(torch.equal, plain[1], tight[1]))


def test_the_config_says_which_and_old_hashes_stay():
    with pytest.raises(UserError, match="TrainSpec.dropout: 'on' is unknown; allowed: 'off', 'drawn'"):
        TrainSpec(dropout="on")
    off = Experiment(name="e", profile="mini", constitutions="dialogue_mini")
    drawn = dataclasses.replace(off, train=dataclasses.replace(off.train, dropout="drawn"))
    assert off.to_json()["train"]["dropout"] == "off" and config_hash(off, {}) != config_hash(drawn, {})


@pytest.mark.parametrize("optimizer, numbers", [("rmsprop", 3), ("adamw", 4)])
def test_checkpointing_counts_weights_gradients_and_optimizer_state(tiny, monkeypatch, optimizer, numbers):
    """Room for the activations and half of these is too little; for all of both, with the head's part, enough."""
    from repro.core.tree import packed_tokens

    model, batch, on = load.load_model(str(tiny)), pairs(2), []
    lengths = list(map(packed_tokens, engines.ids_of(byte_tokenizer(), batch, score_eos=False)))
    held = 4 * numbers * sum(p.numel() for p in model.parameters())
    activations = activation_bytes(counted(model), sum(lengths), 4)
    monkeypatch.setattr(transformers.PreTrainedModel, "activation_checkpointing_enable", lambda self: on.append(1))
    monkeypatch.setattr(transformers.PreTrainedModel, "activation_checkpointing_disable", lambda self: None)
    for usable in (held // 2 + activations, held + 3 * activations):
        monkeypatch.setattr(memory, "usable_bytes", lambda device: usable)  # noqa: B023
        trained(tiny, TrainSpec(optimizer=optimizer, precision="fp32", batch_size=2, batches=1), 2)
    assert on == [1]


def test_a_younger_setting_leaves_the_hashes_of_older_runs():
    record = json.loads((ROOT / "results/exp3_diverse/mini/run-seed-0.json").read_text())
    known = Experiment.from_json(record["config"])
    assert config_hash(known, record["inputs"]) == record["config_hash"]
    other = dataclasses.replace(known, train=dataclasses.replace(known.train, pack_tokens=512))
    assert config_hash(other, record["inputs"]) != record["config_hash"] and Experiment.from_json(other.to_json()) == other
    with pytest.raises(UserError, match="TrainSpec.pack_tokens: 0; must be above 0"):
        TrainSpec(pack_tokens=0)


@pytest.mark.parametrize("make, says", [
    (lambda: TrainSpec(batches_increment=-1), "TrainSpec.batches_increment: -1; must be 0 or more"),
    (lambda: SamplingSpec(spare=-0.5), "SamplingSpec.spare: -0.5; must be 0 or more"),
    (lambda: DataSpec(subsets=("helpful", "helpful")), "DataSpec.subsets: helpful, helpful; each at most once")])
def test_settings_that_would_change_numbers_in_silence_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_flags_of_training_and_data():
    (e,) = cli.configure(cli.Run("exp1", profile="paper", precision="bf16", dose="as_run", leakage="keep"))
    assert (e.train.precision, e.train.dose, e.data.leakage) == ("bf16", "as_run", "keep")
    with pytest.raises(UserError, match="--dose: 'as run' is unknown; allowed: 'as_printed', 'as_run'"):
        cli.configure(cli.Run("exp1", dose="as run"))


@pytest.mark.parametrize("family, error", [("llama", .05), ("mistral", .05), ("qwen2", .1), ("qwen3", .1), ("mixtral", .15)])
def test_the_byte_model_of_activations_is_what_autograd_keeps(family, error):
    """Two layers' worth: the difference between four layers and two."""
    from test_logprobs import PROMPTS, RESPONSES, tiny_family

    from repro.core.logprobs import logprob_matrix
    from repro.core.tree import packed_tokens, tokenised

    def kept(layers):
        model = tiny_family(family, num_hidden_layers=layers)
        weights, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            logprob_matrix(model, byte_tokenizer(), PROMPTS, RESPONSES, length_normalize=True, score_eos=False)
        return sum(storages.values()), activation_bytes(counted(model), tokens, 4)

    tokens = sum(map(packed_tokens, tokenised(byte_tokenizer(), PROMPTS, RESPONSES, score_eos=False)))
    (four, expected), (two, less) = kept(4), kept(2)
    assert expected - less == pytest.approx(four - two, rel=error)


def test_products_under_autocast_use_the_updated_weights(monkeypatch):
    """On CUDA the whole of an iteration is one context, whose cache of bf16 weights would outlive an update."""
    from types import SimpleNamespace

    from repro.core.engines import matmul_precision

    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, **how: autocast("cpu", **how))
    layer, x = torch.nn.Linear(8, 8, bias=False), torch.ones(1, 8)
    with matmul_precision(SimpleNamespace(device=torch.device("cuda")), "fp32_master"):
        before = layer(x).detach()
        with torch.no_grad():
            layer.weight.add_(1.0)
        assert before.dtype == torch.bfloat16 and torch.allclose(layer(x).float(), before.float() + 8, atol=0.1)
