"""Decoding a batch from the tree of its prompts, held against `generate` of each prompt alone."""

import random

import families
import pytest
import torch
from transformers import GenerationConfig

from repro.core import probe
from repro.core.tree import Scored, packed_tokens
from repro.sampling import greedy as decoding
from repro.sampling.greedy import greedy

MOST = 9


def tiny(family="llama"):
    return probe.tiny(families.default_config(family), dtype=torch.float64)


def prompts_of(seed: int, count: int = 11) -> list[list[int]]:
    """Over three tokens: some are equal, some the beginning of another, one a single token."""
    draw = random.Random(seed)
    return [[3]] + [[draw.randint(2, 4) for _ in range(draw.randint(1, 12))] for _ in range(count)]


def alone(model, prompt, *, ends=(), never=(), most=MOST):
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=0, max_new_tokens=most,
                                               do_sample=False, suppress_tokens=sorted(never) or None)
    return model.generate(input_ids=torch.tensor([prompt]))[0, len(prompt):].tolist()


def usual(model, prompts):
    """The tokens that the model says most, of which some make good ends."""
    said = [token for prompt in prompts for token in alone(model, prompt)]
    return sorted(set(said), key=said.count)[-6:]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "mistral"])
@pytest.mark.parametrize("budget", [1024, 7])
def test_each_row_gets_what_generate_gives_its_prompt_alone(family, budget, monkeypatch):
    """Sliding windows (gemma2, of 5 tokens), learned positions, sinks, values of another size; the prompts in one part and
    in many; rows that end at once, later and never."""
    monkeypatch.setattr(decoding, "BATCH_TOKENS", budget)
    model, prompts = tiny(family), prompts_of(0)
    often = usual(model, prompts)
    for ends, never in (((), ()), (often[:2], ()), (often[2:4], often[4:])):
        found = greedy(model, prompts, MOST, ends=ends, never=never)
        assert found == [alone(model, prompt, ends=ends, never=never) for prompt in prompts]
    assert len({len(row) for row in found}) > 2  # some ended


@pytest.mark.parametrize("family", ["mamba", "rwkv", "bloom", "bamba"])
def test_what_keeps_another_kind_of_state_is_not_decoded_so(family):
    assert not probe.prefills(families.default_config(family), greedy)


def test_a_model_whose_prefilled_rows_differ_is_found(monkeypatch):
    config = families.default_config("llama")
    assert probe.prefills(config, greedy)
    real = decoding.pack

    def shifted(pairs):  # the positions of all but the first text begin one too late
        tree = real(pairs)
        tree.positions[tree.layout.segments[0][1]:] += 1
        return tree

    monkeypatch.setattr(decoding, "pack", shifted)
    monkeypatch.setattr(probe, "_TRIED", {})
    assert not probe.prefills(config, greedy)


def test_what_prompts_share_is_computed_once_and_an_ended_row_goes():
    model, prompts = tiny(), prompts_of(1)
    ends = usual(model, prompts)[-3:]
    computed = []
    with torch.no_grad():
        hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape))
        answers = greedy(model, prompts, MOST, ends=ends)
        hook.remove()
    beginnings = {tuple(p[:k]) for p in prompts for k in range(1, len(p) + 1)}
    assert computed[0].numel() == len(beginnings) == packed_tokens([[Scored(p, 1) for p in prompts]])
    rows = [shape[0] for shape in computed[1:]]
    live = [sum(len(answer) > step for answer in answers) for step in range(1, 1 + len(rows))]  # a token is computed if read
    assert all(1 <= b and b * decoding.KEPT <= a + 1 and a >= b for a, b in zip(rows, live)) and rows[-1] < rows[0]
    assert len(rows) == max(map(len, answers)) - 1


@pytest.mark.slow
def test_a_batch_of_real_prompts_is_answered_as_by_generate():
    """The embedded model in float32, left-padded by `generate`."""
    from repro.models import load
    from repro.models.embedded import EMBEDDED
    from repro.sampling.local import sample_batch

    model, tokenizer = load.load_model(EMBEDDED), load.load_tokenizer(EMBEDDED)
    queries = ["Name a river in France.", "How do I boil an egg?", "Why is the sky blue?", "Write one line about rain."]
    orders = ["", " Answer briefly.", " Answer at length and with an example."]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": query + order}], tokenize=False,
                                             add_generation_prompt=True) for query in queries for order in orders]
    tree, plain = (sample_batch(model, tokenizer, prompts, max_new_tokens=12, tree=tree) for tree in (True, False))
    assert tree == plain and len({answer["text"] for answer in plain}) > 6
