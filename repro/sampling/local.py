"""Prompts -> responses by a model in this process, greedily (the paper samples at temperature 0).

The partition into batches is a fixed function of the prompts, so a resumed run computes the same batches and gets the same
bytes.
"""

from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager

from repro.models.decoding import end_tokens, plain_decoding
from repro.models.files import unsaid
from repro.models.load import rows_of
from repro.text import seam


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, longest first: a fixed partition with little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i: i + batch_size] for i in range(0, len(order), batch_size)]


def sample_batch(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, temperature: float = 0.0,
                 seed: int = 0, stop: str | None = None, ends: Collection[int] = (),
                 tree: bool = False) -> list[dict]:
    """Responses to one batch, greedy at temperature 0: [{text, ids, tokens, finished}], control tokens dropped from the
    text. Rows of the model that the tokenizer has no token for are never chosen: they would be tokens without a text.
    Above 0 they are drawn from the whole distribution, the same ones for the same `seed`. `stop`: a text that ends a
    response, of which it is a part; `ends`: tokens that end one, beside the tokenizer's and the model's own. `tree`:
    greedily, with what the prompts share computed once (sampling/greedy.py), for models that this is right for."""
    import torch

    ends = end_tokens(tokenizer, model) | set(ends)
    never = unsaid(tokenizer, rows_of(model.config) or 0)
    if tree:
        from repro.sampling.greedy import greedy

        ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
        with torch.inference_mode():
            rows = greedy(model, ids, max_new_tokens, ends=ends, never=set(never) - ends)
        return [answer_of(tokenizer, row, ends) for row in rows]
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    if stop:
        how |= {"stop_strings": [stop], "tokenizer": tokenizer}
    with torch.inference_mode(), torch.random.fork_rng(), _plainly(model, ends, never):
        torch.manual_seed(seed)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **how, pad_token_id=tokenizer.pad_token_id)
    return [answer_of(tokenizer, ids, ends) for ids in out[:, inputs.input_ids.shape[1]:].tolist()]


@contextmanager
def _plainly(model, ends: Collection[int], never: Collection[int]) -> Iterator[None]:
    """`generate` without the tokens `never` and the model's own generation config, from which transformers (5.23) fills all
    that a call leaves open, a `generation_config` that it is given included. The model may be one that the caller made."""
    never = sorted(set(never) - set(ends)) or None
    own, model.generation_config = model.generation_config, plain_decoding(ends, suppress_tokens=never)
    try:
        yield
    finally:
        model.generation_config = own


def answer_of(tokenizer, ids: list[int], ends: Container[int]) -> dict:
    """{text, ids, tokens, finished} of generated token ids: up to the first of `ends`, where there is one; and that `end`,
    where it is not the tokenizer's."""
    length = next((k for k, i in enumerate(ids) if i in ends), len(ids))
    finished, own = length < len(ids), ids[:length]
    more = {"end": ids[length]} if finished and ids[length] != tokenizer.eos_token_id else {}
    return {"text": seam.text_of(tokenizer, own), "ids": list(own), "tokens": length, "finished": finished} | more


def sample_responses(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32,
                     done: Container[int] = (), ends: Collection[int] = ()) -> Iterator[tuple[list[int], list[dict]]]:
    """Greedy responses batch by batch: yields (indices into `prompts`, their answers as of `sample_batch`). A batch
    whose indices are all in `done` is passed over. Models that continue a padded prompt otherwise than alone get one prompt
    at a time (repro/core/probe.py). `ends`: as of `sample_batch`."""
    from repro.core.probe import pads, prefills
    from repro.sampling.greedy import greedy

    batch_size = batch_size if pads(model.config) else 1
    tree = batch_size > 1 and prefills(model.config, greedy)
    lengths = [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]
    for batch in batches(lengths, batch_size):
        if all(i in done for i in batch):
            continue
        yield batch, sample_batch(model, tokenizer, [prompts[i] for i in batch], max_new_tokens=max_new_tokens, ends=ends,
                                  tree=tree)
