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
