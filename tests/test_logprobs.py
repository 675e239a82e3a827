"""The log-prob matrix: golden numbers, and the shared path against the float64 reference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repro import models
from repro.logprobs import logprob_matrix
from repro.losses import symmetric_infonce

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "llama_tiny"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden numbers absent: {GOLDEN}")
@pytest.mark.parametrize("backend", ["reference", "shared"])
@pytest.mark.parametrize("case", [0, 1])
def test_golden_numbers(backend, case):
    """The authors' trainer's matrix and loss within 1e-5, every gradient within 1e-4 of its norm."""
    golden = json.loads((GOLDEN / "cases.json").read_text())["cases"][case]
    model, tokenizer = models.load_model(str(GOLDEN)), models.load_tokenizer(str(GOLDEN))
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

FAMILIES = ["llama", "llama_tied", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text"]


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
    }[family]
    size |= change
    name = "Gemma3Text" if family == "gemma3_text" else prefix
    config = getattr(transformers, f"{name}Config")(**size, **special)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


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

    monkeypatch.setattr("repro.logprobs.BATCH_TOKENS", 300)
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
def test_score_eos_and_length_normalize_each_change_the_result(tiny, backend):
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    with torch.no_grad():
        base = matrix(model, tokenizer, backend)
        assert not torch.allclose(base, matrix(model, tokenizer, backend, score_eos=True))
        sums = matrix(model, tokenizer, backend, length_normalize=False)
    counts = torch.tensor([[len(r) for r in row] for row in RESPONSES])[:, None, :]  # one token a byte
    torch.testing.assert_close(sums / counts, base)


def test_what_is_shared_ends_before_what_is_scored():
    from repro.prefix import Scored, packed_length, shared_length

    same_start = [Scored([1, 2, 3, 7, 8], 3), Scored([1, 2, 3, 7, 9], 3)]
    assert shared_length(same_start) == 3  # not 4: the common first response token is scored once per response
    retokenised = [Scored([1, 2, 3, 8], 3), Scored([1, 2, 5, 9], 3)]
    assert shared_length(retokenised) == 2 and packed_length(retokenised) == 2 + 2 + 2


def test_identical_responses_give_equal_columns(tiny):
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    with torch.no_grad():
        values = logprob_matrix(model, tokenizer, [["a\n", "bb\n"]], [["same", "same"]], length_normalize=True,
                                score_eos=False)
    torch.testing.assert_close(values[..., 0], values[..., 1])


@pytest.mark.parametrize("change, name", [
    ({"attn_logit_softcapping": 30.0}, "soft-capped attention"), ({"logit_scale": 0.1}, "scaled logits"),
    ({"sliding_window": 5}, "sliding window 5 is shorter"), ({"_attn_implementation": "flex_attention"}, "load with 'sdpa'"),
    ({"model_type": "gpt2"}, "gpt2: not a family"), ({"attention_dropout": 0.1}, "attention_dropout 0.1")])
def test_what_the_shared_path_would_get_wrong_is_refused_by_name(tiny, change, name):
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    for key, value in change.items():
        setattr(model.config, key, value)
    model.train()
    with pytest.raises(ValueError, match=name):
        matrix(model, tokenizer, "shared")


def test_the_head_runs_on_scored_tokens_only_and_flops_equal_the_formula(tiny):
    """No [all tokens, V] tensor on the shared path, and exactly the matrix products that the layout needs."""
    from test_linear_nll import Largest
    from torch.utils.flop_counter import FlopCounterMode

    from repro.prefix import packed_length, shared_length, tokenize_pair

    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    config = model.config
    with Largest(config.vocab_size) as guard:
        matrix(model, tokenizer, "shared")
    groups = [[tokenize_pair(tokenizer, p, r, score_eos=False) for r in RESPONSES[b]] for b in range(2) for p in PROMPTS[b]]
    scored = sum(len(pair.ids) - pair.start for g in groups for pair in g)
    assert guard.rows == scored
    with Largest(config.vocab_size) as guard:
        matrix(model, tokenizer, "reference")
    assert guard.rows > 3 * scored  # the guard sees what it must forbid

    one = groups[0]

    def flops(backward):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            values = logprob_matrix(model, tokenizer, [PROMPTS[0][:1]], [RESPONSES[0]], length_normalize=True, score_eos=False)
            if backward:
                values.sum().backward()
        return counter.get_total_flops()

    T, D, heads, kv = packed_length(one), config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = D // heads
    linear = D * (heads + 2 * kv) * head_dim + heads * head_dim * D + 3 * D * config.intermediate_size
    shared = shared_length(one)
    first, second = (len(pair.ids) for pair in one)  # under QUERY_BLOCK: [prefix, tail 1] square, tail 2 by its keys
    attention = (first * first + (second - shared) * second) * heads * head_dim  # one product of scores' size
    head = sum(len(p.ids) - p.start for p in one) * D * config.vocab_size
    assert flops(backward=False) == 2 * (config.num_hidden_layers * (T * linear + 2 * attention) + head)
    # a backward is two products for each; attention's scores are computed again, the head's are not
    assert flops(backward=True) == 2 * (config.num_hidden_layers * (3 * T * linear + 7 * attention) + 3 * head)


@pytest.mark.parametrize("prompts, responses, backend", [
    ([["a", "b"], ["a"]], [["x"], ["y"]], "shared"), ([["a"]], [["x"], ["y"]], "shared"), ([["a"]], [[""]], "shared"),
    ([["a"]], [["x"]], "fast")])
def test_ragged_or_empty_input_is_refused(tiny, prompts, responses, backend):
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
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
    from repro.prefix import shared_length, tokenize_pair

    prompts, responses = [["bless", "kiss"]], [["sing", "a_song"]]
    pairs = [tokenize_pair(tokenizer, "bless", r, score_eos=False) for r in responses[0]]
    assert [len(p.ids) - p.start for p in pairs] == [3, 6] and shared_length(pairs) == 3  # b l e | sss ing, b l e | ss a ...
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
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
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
        model, tokenizer = models.load_model(str(tiny)).train(), models.load_tokenizer(str(tiny))
        if checkpoint:
            model.activation_checkpointing_enable()
        matrix(model, tokenizer, "shared").sum().backward()
        return [p.grad for p in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True)):
        assert torch.equal(plain, checkpointed)


def test_an_attached_model_still_generates_and_forwards_as_before(tiny):
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    inputs = tokenizer(["Hello", "A longer prompt"], return_tensors="pt", padding=True, padding_side="left")
    before = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        matrix(model, tokenizer, "shared")
    after = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_an_attention_that_does_not_know_the_layout_gives_nan_not_a_wrong_number(tiny, monkeypatch):
    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    monkeypatch.setattr("repro.logprobs.attach", lambda model: None)
    with torch.no_grad():
        assert matrix(model, tokenizer, "shared").isnan().all()


def test_many_queries_in_one_pack_equal_one_at_a_time(tiny, monkeypatch):
    from repro.logprobs import packed_tokens, slices

    model, tokenizer = models.load_model(str(tiny)), models.load_tokenizer(str(tiny))
    alone = torch.cat([logprob_matrix(model, tokenizer, PROMPTS[b:b + 1], RESPONSES[b:b + 1], length_normalize=True,
                                      score_eos=False) for b in (0, 1)])
    torch.testing.assert_close(matrix(model, tokenizer, "shared"), alone, atol=1e-5, rtol=0)
    (a, b), _ = packed_tokens(tokenizer, PROMPTS, RESPONSES, score_eos=False)
    assert slices([a, b], 1) == [slice(0, 1), slice(1, 2)] == slices([a, b], a + b - 1)
    assert slices([a, b], a + b) == [slice(0, 2)]
