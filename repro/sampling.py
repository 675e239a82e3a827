"""Prompts -> responses, greedily (the paper samples at temperature 0).

The partition into batches is a fixed function of the prompts, so a resumed run computes the same batches and
gets the same bytes.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from repro.models import control_tokens
from repro.records import Response, append_jsonl, digest, read_jsonl, write_jsonl
from repro.rundir import Run


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, longest first: a fixed partition with little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i: i + batch_size] for i in range(0, len(order), batch_size)]


def sample_batch(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, temperature: float = 0.0,
                 seed: int = 0, stop: str | None = None) -> list[dict]:
    """Responses to one batch, greedy at temperature 0: [{text, tokens, finished}], control tokens dropped from the text.
    Above 0 they are drawn from the whole distribution, the same ones for the same `seed`. `stop`: a text that ends a
    response, of which it is a part."""
    import torch

    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    if stop:
        how |= {"stop_strings": [stop], "tokenizer": tokenizer}
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **how,
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    controls = control_tokens(tokenizer)
    answers = []
    for ids in out[:, inputs.input_ids.shape[1]:].tolist():
        finished = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        while any(control in text for control in controls):  # spelled out, it would turn into the control token later
            for control in controls:
                text = text.replace(control, "")
        answers.append({"text": text, "tokens": len(ids), "finished": finished})
    return answers


def sample_responses(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int,
                     batch_size: int = 32, done: Container[int] = ()) -> Iterator[tuple[list[int], list[dict]]]:
    """Greedy responses batch by batch: yields (indices into `prompts`, their answers as of `sample_batch`). A batch
    whose indices are all in `done` is passed over."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]
    for batch in batches(lengths, batch_size):
        if all(i in done for i in batch):
            continue
        yield batch, sample_batch(model, tokenizer, [prompts[i] for i in batch], max_new_tokens=max_new_tokens)


def sample_to_file(run: Run, jobs, texts: list[str], iteration: int, path: Path, name: str) -> list[dict]:
    """Responses to the prompts `texts` by the model of `iteration`, in the order of `jobs`. Batches already in the partial
    file are not sampled again; the file goes when the stage is finished. Reasoning is kept beside the response."""
    spec, form = run.experiment.sampling, run.form
    texts = [text + " " + form.opening for text in texts] if form.opening else texts
    partial = run.partial(path)
    key = digest([texts, run.key([f"train-{iteration}"] if iteration else [])])
    rows: dict[int, dict] = {}
    if partial.exists():
        for _, row in read_jsonl(partial, torn_tail=True, all_checked=True):
            if row.pop("key") == key:
                rows[row.pop("job")] = row
    if len(rows) < len(jobs):
        with run.model(iteration, spec.dtype) as model, tqdm(
                total=len(jobs), initial=len(rows), desc=name, unit="response") as bar:
            for batch, answers in sample_responses(model, run.tokenizer, texts, max_new_tokens=run.response_tokens(),
                                                   batch_size=spec.batch_size, done=rows.copy()):
                for i, answer in zip(batch, answers):
                    query, constitution = jobs[i]
                    whole = form.opening + answer["text"]
                    text = form.response(whole)
                    if text != whole:  # its length is that of what is left; the format ended it
                        finished = answer["finished"] or form.kind == "plain"
                        answer = answer | {"finished": finished}
                    if text != answer["text"]:
                        answer = answer | {"text": text,
                                           "tokens": len(run.tokenizer(text, add_special_tokens=False).input_ids)}
                    rows[i] = asdict(Response(query=query.id, constitution=constitution.id, iteration=iteration,
                                              **answer)) | ({"sampled": whole} if form.cot else {})
                append_jsonl(partial, [{"key": key, "job": i, **rows[i]} for i in batch])
                bar.update(len(batch))
    ordered = [rows[i] for i in range(len(jobs))]
    write_jsonl(path, ordered)
    return ordered
