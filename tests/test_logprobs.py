"""The log-prob matrix: golden numbers, and the shared path against the float64 reference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repro.core.logprobs import logprob_matrix
from repro.core.losses import symmetric_infonce
from repro.models import load

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "llama_tiny"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden numbers absent: {GOLDEN}")
@pytest.mark.parametrize("backend", ["reference", "shared"])
@pytest.mark.parametrize("case", [0, 1])
def test_golden_numbers(backend, case):
    """The authors' trainer's matrix and loss within 1e-5, every gradient within 1e-4 of its norm."""
    golden = json.loads((GOLDEN / "cases.json").read_text())["cases"][case]
    model, tokenizer = load.load_model(str(GOLDEN)), load.load_tokenizer(str(GOLDEN))
    matrix = logprob_matrix(model, tokenizer, [golden["prompts"]], [golden["responses"]], length_normalize=True,
                            score_eos=False, backend=backend)
    loss = symmetric_infonce(matrix)
    loss.backward()
    torch.testing.assert_close(matrix[0], torch.tensor(golden["logprobs"]), atol=1e-5, rtol=0)
    assert abs(loss.item() - golden["loss"]) < 1e-5
    expected = load_file(GOLDEN / golden["grads"])
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm(), name


# ---- the shared path against the reference, both judged by the reference in float64

FAMILIES = ["llama", "llama_tied", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text", "mistral_window", "gemma2",
            "gemma3_windows", "gpt_oss", "cohere2", "deepseek_v3", "gpt2"]


ALTERNATING = ["sliding_attention", "full_attention"]


def tiny_family(family: str, **change):
    import transformers

    torch.manual_seed(1)
    size = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
                pad_token_id=0)
    prefix, special = {
        "llama": ("Llama", {"tie_word_embeddings": False}), "llama_tied": ("Llama", {"tie_word_embeddings": True}),
        "mistral": ("Mistral", {"sliding_window": None}), "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"head_dim": 8}),
        "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}),
        "gemma": ("Gemma", {"head_dim": 8}),
        # window above the pairs' length; final_logit_softcapping as Gemma 2 has it
        "gemma3_text": ("Gemma3", {"head_dim": 8, "sliding_window": 512, "final_logit_softcapping": 5.0}),
        "gemma3_windows": ("Gemma3", {"head_dim": 8, "sliding_window": 7, "layer_types": ALTERNATING}),
        "mistral_window": ("Mistral", {"sliding_window": 9}),
        "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 7, "layer_types": ALTERNATING, "attn_logit_softcapping": 3.0,
                              "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
        "gpt_oss": ("GptOss", {"head_dim": 8, "sliding_window": 7, "layer_types": ALTERNATING, "num_local_experts": 3,
                               "num_experts_per_tok": 2, "experts_implementation": "eager"}),  # sinks
        "cohere2": ("Cohere2", {"sliding_window": 7, "layer_types": ALTERNATING, "logit_scale": 0.3}),
        "deepseek_v3": ("DeepseekV3", {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                                       "v_head_dim": 12, "moe_intermediate_size": 16,
                                       "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
                                       "first_k_dense_replace": 1, "experts_implementation": "eager"}),
        "gpt2": ("GPT2", {"n_positions": 512}),
    }[family]
    size |= special | change
    name = "Gemma3Text" if prefix == "Gemma3" else prefix
    config = getattr(transformers, f"{name}Config")(**size)
    return getattr(transformers, "GPT2LMHeadModel" if family == "gpt2" else f"{prefix}ForCausalLM")(config).eval()


PROMPTS = [["Follow: be brief. Query: why is the sky blue?\n", "Follow: be long. Query: why is the sky blue?\n",
            "Follow: rhyme.\n"],
           ["Be kind: hello there\n", "Be short: hello there\n", "Be anything at all, as you like it: hello there\n"]]
RESPONSES = [["Air scatters blue light most.", "x"], ["Hello, how are you?", "Hello, who are you?"]]


def matrix(model, tokenizer, backend, **options):
    settings = {"length_normalize": True, "score_eos": False} | options
    return logprob_matrix(model, tokenizer, PROMPTS, RESPONSES, backend=backend, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score_eos", [False, True])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_shared_is_as_exact_as_the_reference(family, score_eos, length_normalize, monkeypatch):
    """C = 3, R = 2, ragged, a one-token response, responses with a common start, and several batches: the error of
    values and gradients is at most twice the float32 reference's own, and a floor for where that is zero."""
    from conftest import byte_tokenizer

    monkeypatch.setattr("repro.core.logprobs.BATCH_TOKENS", 300)
    tokenizer = byte_tokenizer()
    upstream = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def compute(dtype, backend):
        model = tiny_family(family).to(dtype)
        values = matrix(model, tokenizer, backend, score_eos=score_eos, length_normalize=length_normalize)
        (values.double() * upstream).sum().backward()
        return values.detach().double(), {n: p.grad.double() for n, p in model.named_parameters()}

    truth, truth_grads = compute(torch.float64, "reference")
    reference, reference_grads = compute(torch.float32, "reference")
    shared, shared_grads = compute(torch.float32, "shared")
    floor = 1e-6 * truth.abs().max()
    assert (shared - truth).abs().max() <= 2 * (reference - truth).abs().max() + floor
    for name, grad in truth_grads.items():
        floor = 1e-6 * grad.norm()
        assert (shared_grads[name] - grad).norm() <= 2 * (reference_grads[name] - grad).norm() + floor, name


@pytest.mark.parametrize("backend", ["reference", "shared"])
def test_a_response_that_was_cut_has_no_end_to_score(tiny, backend):
    """`finished`: of those that ended the end is scored, of the others nothing that they never said."""
    model, tokenizer = load.load_model(str(tiny)).double(), load.load_tokenizer(str(tiny))
    finished = [[True, False], [False, True]]
    every, none, some = (matrix(model, tokenizer, backend, score_eos=eos, finished=f, length_normalize=False)
                         for eos, f in ((True, None), (False, None), (True, finished)))
    for b, ended in enumerate(finished):
        for r, end in enumerate(ended):
            torch.testing.assert_close(some[b, :, r], (every if end else none)[b, :, r], rtol=1e-12, atol=0)
            assert not torch.allclose(every[b, :, r], none[b, :, r])
    assert torch.equal(matrix(model, tokenizer, backend, score_eos=False, finished=finished, length_normalize=False), none)
    with pytest.raises(ValueError, match="finished must be"):
        matrix(model, tokenizer, backend, score_eos=True, finished=[[True]] * len(RESPONSES))


@pytest.mark.parametrize("backend", ["reference", "shared"])
def test_score_eos_and_length_normalize_each_change_the_result(tiny, backend):
    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    with torch.no_grad():
        base = matrix(model, tokenizer, backend)
        assert not torch.allclose(base, matrix(model, tokenizer, backend, score_eos=True))
        sums = matrix(model, tokenizer, backend, length_normalize=False)
    counts = torch.tensor([[len(r) for r in row] for row in RESPONSES])[:, None, :]  # one token a byte
    torch.testing.assert_close(sums / counts, base)


def test_identical_responses_give_equal_columns(tiny):
    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    with torch.no_grad():
        values = logprob_matrix(model, tokenizer, [["a\n", "bb\n"]], [["same", "same"]], length_normalize=True,
                                score_eos=False)
    torch.testing.assert_close(values[..., 0], values[..., 1])


def equal_to_the_reference(model):
    """On 'shared', to float64's rounding."""
    from conftest import byte_tokenizer

    with torch.no_grad():
        ours, truth = (matrix(model, byte_tokenizer(), backend) for backend in ("shared", "reference"))
    return (ours - truth).abs().max() < 1e-9 * truth.abs().max()


@pytest.mark.parametrize("change", [{"attn_logit_softcapping": 2.0}, {"logit_scale": 0.1}, {"final_logit_softcapping": 2.0},
                                    {"sliding_window": 5}, {"model_type": "gpt2"}])
def test_a_config_that_says_what_the_model_does_not_do_misleads_nobody(change):
    """Llama knows none of these: what counts is what the model does."""
    model = tiny_family("llama").double()
    for key, value in change.items():
        setattr(model.config, key, value)
    assert equal_to_the_reference(model)


def test_a_window_that_is_changed_after_building_holds_as_in_the_model():
    model = tiny_family("mistral").double()
    wide = matrix(model, byte(), "shared").detach()
    model.config.sliding_window = 5
    assert equal_to_the_reference(model) and (matrix(model, byte(), "shared") - wide).abs().max() > 0.01


def byte():
    from conftest import byte_tokenizer

    return byte_tokenizer()


def test_a_head_with_more_in_it_than_its_matrix_is_called_itself():
    """A hook, found although the model was tried without it before; an adapter; a module around it."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_family("llama").double()
    assert equal_to_the_reference(model)
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: 1.7 * out)
    assert equal_to_the_reference(model)
    hook.remove()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    model.double()
    assert equal_to_the_reference(model)

    class Around(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        @property
        def weight(self):
            return self.head.weight

        bias = None

        def forward(self, hidden):
            return self.head(hidden.tanh())

    model = tiny_family("llama").double()
    model.lm_head = Around(model.lm_head)
    assert equal_to_the_reference(model)


@pytest.mark.parametrize("backend", ["reference", "shared"])
def test_what_looks_ahead_is_refused(backend):
    import transformers

    both_ways = tiny_family("gemma3_text", use_bidirectional_attention=True)
    encoder = transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3)).eval()
    for model in (both_ways, encoder):
        with pytest.raises(ValueError, match="not a causal language model: later tokens change"):
            matrix(model, byte(), backend)
    encoder.config.is_decoder = True
    with torch.no_grad():
        assert matrix(transformers.BertLMHeadModel(encoder.config).eval(), byte(), "reference").isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft reads
@pytest.mark.parametrize("backend", ["reference", "shared"])
def test_a_prompt_that_adapters_add_is_refused(backend):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_family("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with pytest.raises(ValueError, match="15 logits for 12 tokens"):
        matrix(model, byte(), backend)


def test_recurrent_layers_need_the_reference():
    import transformers

    model = transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=259, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3)).eval()
    with pytest.raises(ValueError, match="mamba: packed texts with shared beginnings .*use backend='reference'"):
        matrix(model, byte(), "shared")
    with torch.no_grad():
        assert matrix(model, byte(), "reference").isfinite().all()


def test_dropout_is_refused_where_a_prompt_is_shared():
    model = tiny_family("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention_dropout 0.1.* call model.eval"):
        matrix(model, byte(), "shared")
    assert matrix(model.eval(), byte(), "shared").isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "shared"])
@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
     "original_max_position_embeddings": 100}])
def test_rope_that_looks_at_the_batch_is_refused_beyond_its_first_context(backend, rope):
    """A query's numbers are the same alone, beside the others, and after them; 40 tokens more and they would not be."""
    longest = 100
    model = tiny_family("llama", rope_parameters=rope, max_position_embeddings=100 if rope["rope_type"] == "dynamic" else 400)
    options = dict(length_normalize=True, score_eos=False, backend=backend)
    with torch.no_grad():
        alone, beside = logprob_matrix(model, byte(), PROMPTS[:1], RESPONSES[:1], **options), matrix(model, byte(), backend)
        torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=0)
        fits = [["x" * (longest - 1)] * 2]
        logprob_matrix(model, byte(), fits, [["y", "z"]], **options)
        torch.testing.assert_close(logprob_matrix(model, byte(), PROMPTS[:1], RESPONSES[:1], **options), alone)
        with pytest.raises(ValueError, match="a pair of 140 tokens: RoPE of this model's kind .* from 101 tokens on"):
            logprob_matrix(model, byte(), [["x" * 139] * 2], [["y", "z"]], **options)


def test_without_a_pad_token_and_with_weights_that_are_not_finite_where_nobody_reads():
    """The reference pads nothing, and selects what it scores: a NaN elsewhere is none of its business."""
    model, tokenizer = tiny_family("llama"), byte()
    truth = matrix(model, tokenizer, "reference")
    tokenizer.pad_token = None
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.nan
    assert torch.equal(matrix(model, tokenizer, "reference"), truth)


def test_the_head_runs_on_scored_tokens_only_and_flops_equal_the_formula(tiny):
    """No [all tokens, V] tensor on the shared path, and exactly the matrix products that the layout needs."""
    from test_linear_nll import Largest
    from torch.utils.flop_counter import FlopCounterMode

    from repro.core.tree import common_prefix, packed_tokens, tokenize_pair

    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    config = model.config
    matrix(model, tokenizer, "shared")  # which tries the model, once
    with Largest(config.vocab_size) as guard:
        matrix(model, tokenizer, "shared")
    groups = [[tokenize_pair(tokenizer, p, r, score_eos=False) for r in RESPONSES[b]] for b in range(2) for p in PROMPTS[b]]
    scored = sum(len(pair.ids) - pair.start for g in groups for pair in g)
    assert guard.rows == scored
    with Largest(config.vocab_size) as guard:
        matrix(model, tokenizer, "reference")
    assert guard.rows == max(len(pair.ids) for g in groups for pair in g)  # the guard sees what it must forbid

    one = groups[0]

    def flops(backward):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            values = logprob_matrix(model, tokenizer, [PROMPTS[0][:1]], [RESPONSES[0]], length_normalize=True, score_eos=False)
            if backward:
                values.sum().backward()
        return counter.get_total_flops()

    T, D, heads, kv = packed_tokens([one]), config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = D // heads
    linear = D * (heads + 2 * kv) * head_dim + heads * head_dim * D + 3 * D * config.intermediate_size
    shared = common_prefix([pair.ids for pair in one])
    first, second = (len(pair.ids) for pair in one)  # under QUERY_BLOCK: the first text square, of the other what it does not share by its keys
    attention = (first * first + (second - shared) * second) * heads * head_dim  # one product of scores' size
    head = sum(len(p.ids) - p.start for p in one) * D * config.vocab_size
    assert flops(backward=False) == 2 * (config.num_hidden_layers * (T * linear + 2 * attention) + head)
    # a backward is two products for each; attention's scores are computed again, the head's are not
    assert flops(backward=True) == 2 * (config.num_hidden_layers * (3 * T * linear + 7 * attention) + 3 * head)


@pytest.mark.parametrize("prompts, responses, backend", [
    ([["a", "b"], ["a"]], [["x"], ["y"]], "shared"), ([["a"]], [["x"], ["y"]], "shared"), ([["a"]], [[""]], "shared"),
    ([["a"]], [["x"]], "fast")])
def test_ragged_or_empty_input_is_refused(tiny, prompts, responses, backend):
    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    with pytest.raises(ValueError):
        logprob_matrix(model, tokenizer, prompts, responses, length_normalize=True, score_eos=False, backend=backend)


def test_a_prompt_and_responses_that_tokenise_differently_together():
    """A merge across the boundary, in one response only: the shared prefix ends before it, and the paths agree."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as bpe
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ss", "sss"]
    backend = Tokenizer(bpe.BPE(vocab={t: k for k, t in enumerate(tokens)}, merges=[("s", "s"), ("ss", "s")]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    from repro.core.tree import common_prefix, tokenize_pair

    prompts, responses = [["bless", "kiss"]], [["sing", "a_song"]]
    pairs = [tokenize_pair(tokenizer, "bless", r, score_eos=False) for r in responses[0]]
    assert [len(p.ids) - p.start for p in pairs] == [3, 6] and common_prefix([p.ids for p in pairs]) == 3  # b l e | sss ing, b l e | ss a ...
    model = tiny_family("llama")
    model.resize_token_embeddings(len(tokens))
    model.double()
    kind = dict(length_normalize=True, score_eos=False)
    torch.testing.assert_close(logprob_matrix(model, tokenizer, prompts, responses, **kind),
                               logprob_matrix(model, tokenizer, prompts, responses, backend="reference", **kind),
                               atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "shared"])
def test_identical_prompts_and_responses_give_the_losses_of_chance(tiny, backend):
    """A constant matrix: log C. Identical responses under two constitutions: the row half is log R."""
    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    kind = dict(length_normalize=True, score_eos=False, backend=backend)
    constant = logprob_matrix(model, tokenizer, [["a\n"] * 3], [["same"] * 3], **kind)
    assert symmetric_infonce(constant).item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)
    rows = logprob_matrix(model, tokenizer, [["a\n", "bb\n"]], [["same", "same"]], **kind)[0].log_softmax(1).diagonal()
    assert (-rows.mean()).item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("scale", [30.0, 60.0])
def test_large_logits_and_certain_tokens(scale):
    """|logit| near 50 and p near 1: the error stays within twice the reference's own."""
    from conftest import byte_tokenizer

    def compute(dtype, backend):
        model = tiny_family("llama")
        with torch.no_grad():
            model.lm_head.weight *= scale / 5
        model.to(dtype)
        values = matrix(model, byte_tokenizer(), backend)
        values.sum().backward()
        return values.detach().double(), model.lm_head.weight.grad.double(), model

    truth, grad, model = compute(torch.float64, "reference")
    logits = model(torch.arange(3, 60)[None]).logits
    assert logits.abs().max() > 30 and logits.softmax(-1).max() > 0.999
    reference, shared = compute(torch.float32, "reference"), compute(torch.float32, "shared")
    assert (shared[0] - truth).abs().max() <= 2 * (reference[0] - truth).abs().max() + 1e-6 * truth.abs().max()
    assert (shared[1] - grad).norm() <= 2 * (reference[1] - grad).norm() + 1e-6 * grad.norm()


def test_activation_checkpointing_gives_the_same_gradients(tiny):
    """The recomputation runs in the backward, outside logprob_matrix, and must find the layout's attention again."""
    def gradients(checkpoint):
        model, tokenizer = load.load_model(str(tiny)).train(), load.load_tokenizer(str(tiny))
        if checkpoint:
            model.activation_checkpointing_enable()
        matrix(model, tokenizer, "shared").sum().backward()
        return [p.grad for p in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True)):
        assert torch.equal(plain, checkpointed)


def test_an_attached_model_still_generates_and_forwards_as_before(tiny):
    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    inputs = tokenizer(["Hello", "A longer prompt"], return_tensors="pt", padding=True, padding_side="left")
    before = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        matrix(model, tokenizer, "shared")
    after = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_an_attention_that_does_not_know_the_layout_gives_nan_and_is_refused(tiny, monkeypatch):
    from kernels import interfaces
    from repro.core import logprobs
    from repro.core.tree import tokenised

    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    monkeypatch.setattr(logprobs, "attention_interface", lambda fallback: fallback)
    with torch.no_grad():
        assert logprobs.matrix_of("shared", model, tokenised(tokenizer, PROMPTS, RESPONSES, score_eos=False),
                                  length_normalize=True).isnan().all()
    with pytest.raises(ValueError, match="have other log-probs than each alone .by nan"):
        matrix(model, tokenizer, "shared")
    assert interfaces.attention_interface is not logprobs.attention_interface


def test_many_queries_in_one_pack_equal_one_at_a_time(tiny, monkeypatch):
    from repro.core.logprobs import slices
    from repro.core.tree import packed_tokens, tokenised

    model, tokenizer = load.load_model(str(tiny)), load.load_tokenizer(str(tiny))
    alone = torch.cat([logprob_matrix(model, tokenizer, PROMPTS[b:b + 1], RESPONSES[b:b + 1], length_normalize=True,
                                      score_eos=False) for b in (0, 1)])
    torch.testing.assert_close(matrix(model, tokenizer, "shared"), alone, atol=1e-5, rtol=0)
    a, b = map(packed_tokens, tokenised(tokenizer, PROMPTS, RESPONSES, score_eos=False))
    assert slices([a, b], 1) == [slice(0, 1), slice(1, 2)] == slices([a, b], a + b - 1)
    assert slices([a, b], a + b) == [slice(0, 2)]
