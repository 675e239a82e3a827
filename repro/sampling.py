"""Prompts -> responses, greedily (the paper samples at temperature 0).

The partition into batches is a fixed function of the prompts, so a resumed run computes the same batches and
gets the same bytes.
"""

from collections.abc import Iterator, Sequence

import torch

from repro.models import control_tokens


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, longest first: a fixed partition with little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i: i + batch_size] for i in range(0, len(order), batch_size)]


def sample_batch(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int) -> list[dict]:
    """Greedy responses to one batch: [{text, tokens, finished}], control tokens dropped from the text."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False,
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    controls = control_tokens(tokenizer)
    answers = []
    for ids in out[:, inputs.input_ids.shape[1]:].tolist():
        finished = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for control in controls:  # spelled out in ordinary tokens, it would turn into the control token later
            text = text.replace(control, "")
        answers.append({"text": text, "tokens": len(ids), "finished": finished})
    return answers


def sample_responses(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int,
                     batch_size: int = 32) -> Iterator[tuple[list[int], list[dict]]]:
    """Greedy responses batch by batch: yields (indices into `prompts`, their answers as of `sample_batch`)."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]
    for batch in batches(lengths, batch_size):
        yield batch, sample_batch(model, tokenizer, [prompts[i] for i in batch], max_new_tokens=max_new_tokens)
