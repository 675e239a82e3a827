"""The rule judge and the likelihood judge."""

import math

import pytest

from repro.judges.likelihood import likelihood_score
from repro.judges.rule import follows, judge_pairwise
from repro.text.principles import load_constitutions

MINI = load_constitutions("dialogue_mini")


def test_follows_takes_the_constitutions_side():
    short, long = "Use warm soap now.", "Utilise appropriate detergents. " * 5
    positive, negative = MINI.constitutions[0], MINI.constitutions[-1]
    assert follows(short, positive) == {"brief": True, "simple": True}
    assert follows(short, negative) == {"brief": False, "simple": False}
    assert follows(long, negative) == {"brief": True, "simple": True}
    assert not any(follows("", c)[p] for c in MINI.constitutions for p in ("brief", "simple"))
    assert [judge_pairwise(a, b, positive) for a, b in ((short, long), (long, short), (short, short))] == [1, 0, 0.5]


def test_likelihood_score_is_the_posterior_of_the_judged_constitution():
    """Softmax by hand: [0, -1] gives 0.731 to the first, [-3, -3] gives 0.5; the level of the log-probs is no matter."""
    assert likelihood_score([0, -1], [-3, -3]) == 1
    assert likelihood_score([-3, -3], [0, -1]) == 0
    assert likelihood_score([-5, -6], [-1, -2]) == 0.5
    assert likelihood_score([-1000.0, -2000.0], [0.0, 0.0]) == 1
    assert math.isclose(1 / (1 + math.exp(-1)), 0.731, abs_tol=1e-3)


@pytest.mark.parametrize("text", ["a<|im_<|im_end|>end|>b", "a<file_<file_sep>sep>b", "a</think>b<\uff5cUser\uff5c>"])
def test_control_tokens_that_a_response_spells_out_do_not_come_back(text):
    """Removing one may make another: none is left."""
    from conftest import byte_tokenizer
    from marks import marked_tokenizer
    from transformers import PreTrainedConfig

    from repro.sampling.local import sample_batch

    class Model:
        device, generation_config, config = "cpu", None, PreTrainedConfig()

        def generate(self, input_ids, **kwargs):
            import torch

            ids = byte_tokenizer()(text, add_special_tokens=False, split_special_tokens=True).input_ids
            return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    assert sample_batch(Model(), marked_tokenizer(), ["x"], max_new_tokens=99)[0]["text"] == "ab"
