"""Weights come with advice on decoding: at temperature 0 a run decodes greedily all the same, and takes the end tokens over."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from test_experiments import small
from test_judge_real import SERVING
from test_serving import as_text, prepared, sample

from repro.base.records import UserError
from repro.experiment import load_experiment
from repro.models import decoding, load
from repro.sampling import local
from repro.stages.pipeline import run

PROMPTS = ["hello there", "what", "x y z", "The quick brown fox"]
FIELDS = {  # which change what transformers 5.23 says at temperature 0, or end it with an error
    "max_time": 1e-9, "stop_strings": ["a"], "num_beams": 4, "use_mtp": True, "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[k] for k in range(3, 140)],
    "forced_eos_token_id": 5, "exponential_decay_length_penalty": [1, 5.0], "suppress_tokens": list(range(3, 150)),
    "begin_suppress_tokens": list(range(3, 150)), "sequence_bias": [[[9], 50.0]], "token_healing": True, "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0}, "num_return_sequences": 2, "return_dict_in_generate": True, "is_assistant": True,
    "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "penalty_alpha": 0.6, "dola_layers": "low", "constraints": [1],
    "force_words_ids": [[9]]}


def with_fields(tiny, folder: Path, place: str, **fields) -> Path:
    """A copy of the model with these fields in its file `place`; config.json counts where there is no other."""
    shutil.copytree(tiny, folder)
    if place == "config.json":
        (folder / decoding.GENERATION).unlink()
    (folder / place).write_text(json.dumps(json.loads((folder / place).read_text()) | fields))
    return folder


def answers(model, **how) -> list[dict]:
    return local.sample_batch(model, byte_tokenizer(), PROMPTS, max_new_tokens=16, **how)


@pytest.fixture(scope="module")
def plain(tiny):
    return answers(load.load_model(str(tiny)))


@pytest.mark.parametrize("place", [decoding.GENERATION, "config.json"])
@pytest.mark.parametrize("name", FIELDS)
def test_no_field_changes_what_a_model_says(tiny, tmp_path, plain, place, name):
    folder = with_fields(tiny, tmp_path / "m", place, **{name: FIELDS[name]})
    assert answers(load.load_model(str(folder))) == plain
    assert decoding.decodes_otherwise(str(folder)) == [name]


def test_a_field_that_transformers_refuses_is_not_read(tiny, tmp_path, plain):
    folder = with_fields(tiny, tmp_path / "m", decoding.GENERATION, cache_implementation="nonsense", compile_config={"mode": "x"})
    assert answers(load.load_model(str(folder))) == plain


def test_drawn_responses_are_free_of_it_too(tiny, tmp_path):
    fields = {"repetition_penalty": 3.0, "top_k": 2, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.1, "temperature": 9.0}
    folder = with_fields(tiny, tmp_path / "m", decoding.GENERATION, **fields)
    own, without = (answers(load.load_model(str(f)), temperature=0.7, seed=3) for f in (folder, tiny))
    assert own == without and len({a["text"] for a in own}) == 4


def test_a_model_that_the_caller_made_is_free_of_it_and_keeps_it(tiny, tmp_path, plain):
    folder = with_fields(tiny, tmp_path / "m", decoding.GENERATION, repetition_penalty=3.0, suppress_tokens=[5])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert answers(model) == plain
    assert model.generation_config.repetition_penalty == 3.0 and model.generation_config.eos_token_id == 2


# ---- end tokens

@pytest.mark.parametrize("named, ends", [(None, {2}), ([], {2}), (9, {2, 9}), ([9, 2, 11], {2, 9, 11}), ([9, 259, 10**9, -1], {2, 9})])
def test_end_tokens(tiny, tmp_path, named, ends):
    """Those that the model can say; a model and its place name the same ones, and so does what is saved of it."""
    folder = with_fields(tiny, tmp_path / "m", decoding.GENERATION, eos_token_id=named, num_beams=4, temperature=0.6)
    model, tokenizer = load.load_model(str(folder)), byte_tokenizer()
    assert decoding.end_tokens(tokenizer, model) == decoding.end_tokens(tokenizer, str(folder)) == ends
    load.save_model(model, tokenizer, tmp_path / "saved")
    assert decoding.end_tokens(tokenizer, str(tmp_path / "saved")) == ends
    assert (tmp_path / "saved" / decoding.GENERATION).read_bytes() == (folder / decoding.GENERATION).read_bytes()
    assert answers(load.load_model(str(tmp_path / "saved"))) == answers(model)


def test_end_tokens_without_the_file_are_those_of_the_config(tiny, tmp_path):
    folder = with_fields(tiny, tmp_path / "m", "config.json", eos_token_id=[9, 11], repetition_penalty=3.0)
    model, tokenizer = load.load_model(str(folder)), byte_tokenizer()
    assert decoding.end_tokens(tokenizer, model) == decoding.end_tokens(tokenizer, str(folder)) == {2, 9, 11}
    load.save_model(model, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / decoding.GENERATION).read_text())
    assert saved["eos_token_id"] == [9, 11] and "repetition_penalty" not in saved
    assert decoding.end_tokens(tokenizer, str(tmp_path / "saved")) == {2, 9, 11}


@pytest.mark.parametrize("text, said", [
    ("{", "is not valid JSON"), ("", "is not valid JSON"), ("[1]", "holds no JSON object"), ("null", "holds no JSON object"),
    *[(json.dumps({"eos_token_id": value}), "eos_token_id .*; allowed: a token id, a list of them, null")
      for value in ("2", 2.5, True, [[2]], {"a": 1}, ["2", 3])]])
def test_a_file_that_cannot_be_read_is_one_line_before_anything_is_written(tiny, tmp_path, text, said):
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    (folder / decoding.GENERATION).write_text(text)
    with pytest.raises(UserError, match=f"m: generation_config.json:? {said}") as e:
        run(small(load_experiment("exp1", "mini")[0], folder), tmp_path / "out")
    assert "\n" not in str(e.value) and not list((tmp_path / "out").rglob("*.json*"))
    with pytest.raises(UserError, match=said):
        load.load_model(str(folder))


def test_a_config_of_another_form_is_one_line(tiny, tmp_path):
    folder = with_fields(tiny, tmp_path / "m", "config.json", eos_token_id="2")
    with pytest.raises(UserError, match="config.json: .*'eos_token_id'.*'2'") as e:
        load.load_model(str(folder))
    assert "\n" not in str(e.value)


# ---- servers

@pytest.mark.skipif(not SERVING, reason="NOT RUN: transformers' serving extra is not installed; make setup installs it")
@pytest.mark.parametrize("place", [decoding.GENERATION, "config.json"])
def test_a_server_that_the_run_starts_decodes_greedily_and_ends_where_this_process_does(tiny, tmp_path, place):
    """The tokenizer's end token is not among the file's: either ends a response."""
    changed = with_fields(tiny, tmp_path / "changed", place, eos_token_id=[1], repetition_penalty=3.0, num_beams=2,
                          min_new_tokens=5, suppress_tokens=[40, 41], guidance_scale=3.0)
    same = with_fields(tiny, tmp_path / "same", place, eos_token_id=[1])
    here, there = sample(prepared(same, tmp_path / "here", "transformers")), sample(prepared(changed, tmp_path / "there", "server"))
    assert as_text(here) == as_text(there) and any(row["finished"] for row in here) and len({row["text"] for row in here}) > 3


def test_a_server_that_is_already_there_is_refused_where_it_would_not_decode_greedily(tiny, tmp_path):
    advised = with_fields(tiny, tmp_path / "advised", decoding.GENERATION, do_sample=True, temperature=0.6, top_p=0.9,
                          repetition_penalty=1.0, cache_implementation="hybrid", chat_format="x")  # all of no use at temperature 0
    assert decoding.decodes_otherwise(str(advised)) == []
    prepared(advised, tmp_path / "out", "server", sampler_url="http://127.0.0.1:9/v1")
    changed = with_fields(tiny, tmp_path / "changed", decoding.GENERATION, num_beams=2, repetition_penalty=1.05)
    with pytest.raises(UserError, match="--sampler-url with --sampler server: such a server obeys num_beams, repetition_penalty in") as e:
        prepared(changed, tmp_path / "none", "server", sampler_url="http://127.0.0.1:9/v1")
    assert "\n" not in str(e.value) and not list((tmp_path / "none").rglob("*.json*"))
    prepared(changed, tmp_path / "vllm", "vllm", sampler_url="http://127.0.0.1:9/v1")


def test_what_is_drawn_and_said_is_greedy(tiny, plain):
    """Token by token from the logits: what "greedy" means above."""
    model, tokenizer = load.load_model(str(tiny)), byte_tokenizer()
    for prompt, answer in zip(PROMPTS, plain):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) - start < 16 and (not ids[start:] or ids[-1] != 2):
            with torch.inference_mode():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert local.answer_of(tokenizer, ids[start:], {2}) == answer
