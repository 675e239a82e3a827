"""A sample of tests/families.py, which has all: families of each kind, on each way, against one text at a time in float64."""

import families
import pytest
import torch

from repro.core import probe
from repro.core.logprobs import score

SAMPLE = {
    "shared": ["llama", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "phi3", "gpt2", "opt", "olmo2"],
    "shared, model's head": ["cohere2", "llama4_text"],
    "reference": ["mamba", "lfm2", "glm_moe_dsa", "deepseek_v32", "hy_v4", "axk2", "gptj", "bart"],
    "refused": ["bert", "roberta", "cpmant", "prophetnet", "xlnet"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("outcome, family", [(outcome, f) for outcome, names in SAMPLE.items() for f in names])
def test_a_family_is_right_or_refused(outcome, family):
    assert families.try_family(family)["outcome"] == outcome


def test_the_table_sees_a_way_that_is_wrong(monkeypatch):
    """Were the layout's windows lost, and the probe blind, the table would say so."""
    monkeypatch.setitem(probe.TOLERANCE, torch.float32, 1.0)
    assert families.try_family("lfm2")["outcome"] == "WRONG: shared"


def test_the_tiny_model_has_layers_of_every_kind_and_windows_that_the_texts_exceed():
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    small = probe.tiny_config(Gemma3TextConfig(num_hidden_layers=24, layer_types=kinds * 4, sliding_window=4096))
    assert set(small.layer_types) == set(kinds) and small.num_hidden_layers == len(small.layer_types) == 4
    assert small.sliding_window == 5 and small.hidden_size == 32


def test_what_begins_only_in_long_texts_is_tried_at_the_runs_length(monkeypatch):
    """Sparse attention under a name that nobody here knows: right on short texts, so the run's longest is tried as well."""
    from transformers import DeepseekV32Config

    monkeypatch.delitem(probe.SIZES, "index_topk")
    config = DeepseekV32Config(index_topk=60, layer_types=None)
    assert probe.of_config(config, score).way == "shared"
    assert probe.of_config(config, score, longest=200).way == "reference"
    assert probe.of_config(config, score, longest=50).way == "shared"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, together", [("llama", True), ("gemma2", True), ("mamba", True), ("rwkv", False), ("bart", False)])
def test_prompts_are_padded_together_where_that_changes_nothing(family, together):
    assert probe.pads(families.default_config(family)) == together


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_a_prompt_is_continued_in_a_batch_as_it_is_alone(family):
    """RWKV reads pads: its prompts go one at a time, whatever batch is asked for."""
    from conftest import byte_tokenizer

    from repro.sampling.local import sample_responses

    model = probe.tiny(families.default_config(family), vocab_size=259)
    prompts = ["A long prompt, of many bytes.", "Short.", "Middling one."]
    alone = [next(sample_responses(model, byte_tokenizer(), [p], max_new_tokens=8))[1][0]["text"] for p in prompts]
    found = {}
    for batch, answers in sample_responses(model, byte_tokenizer(), prompts, max_new_tokens=8, batch_size=3):
        found |= dict(zip(batch, (a["text"] for a in answers)))
    assert [found[k] for k in range(3)] == alone
