"""Prompts -> responses, greedily (the paper samples at temperature 0): by the model in this process, or by a server of it.

What is kept of a sample are its token ids, and beside them the text that they read as (repro/seam.py).

In this process the partition into batches is a fixed function of the prompts, so a resumed run computes the same batches
and gets the same bytes. A server gets one prompt a request, and what it answered is not asked again.
"""

from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from repro import seam, serving
from repro.asking import Asker
from repro.endpoint import Call, Ledger
from repro.intake import unsaid
from repro.models import end_tokens, plain_decoding, rows_of
from repro.records import Response, UserError, append_jsonl, digest, read_jsonl, write_jsonl
from repro.rundir import Run


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, longest first: a fixed partition with little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i: i + batch_size] for i in range(0, len(order), batch_size)]


def sample_batch(model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, temperature: float = 0.0,
                 seed: int = 0, stop: str | None = None, ends: Collection[int] = ()) -> list[dict]:
    """Responses to one batch, greedy at temperature 0: [{text, ids, tokens, finished}], control tokens dropped from the
    text. Rows of the model that the tokenizer has no token for are never chosen: they would be tokens without a text.
    Above 0 they are drawn from the whole distribution, the same ones for the same `seed`. `stop`: a text that ends a
    response, of which it is a part; `ends`: tokens that end one, beside the tokenizer's and the model's own."""
    import torch

    ends = end_tokens(tokenizer, model) | set(ends)
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    if stop:
        how |= {"stop_strings": [stop], "tokenizer": tokenizer}
    never = unsaid(tokenizer, rows_of(model.config) or 0)
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
    at a time (repro/probe.py). `ends`: as of `sample_batch`."""
    from repro.probe import pads

    batch_size = batch_size if pads(model.config) else 1
    lengths = [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]
    for batch in batches(lengths, batch_size):
        if all(i in done for i in batch):
            continue
        yield batch, sample_batch(model, tokenizer, [prompts[i] for i in batch], max_new_tokens=max_new_tokens, ends=ends)


def sample_to_file(run: Run, jobs, texts: list[str], iteration: int, path: Path, name: str) -> list[dict]:
    """Responses to the prompts `texts` by the model of `iteration`, in the order of `jobs`. What is already in the partial
    file is not sampled again; the file goes when the stage is finished. Reasoning is kept beside the response."""
    form, asked = run.form, texts
    texts = [text + " " + form.opening for text in texts] if form.opening else texts
    partial = run.partial(path)
    key = digest([texts, run.key([f"train-{iteration}"] if iteration else [])])
    rows: dict[int, dict] = {}
    if partial.exists():
        for _, row in read_jsonl(partial, torn_tail=True, all_checked=True):
            if row.pop("key") == key:
                rows[row.pop("job")] = row
    if len(rows) < len(jobs):
        sampled = _sampled_here if run.experiment.sampling.engine == "transformers" else _sampled_by_server
        for batch, answers in sampled(run, iteration, texts, rows.copy(), name, partial, key):
            for i, answer in zip(batch, answers):
                query, constitution = jobs[i]
                said, more = _kept(run, asked[i], answer)
                rows[i] = asdict(Response(query=query.id, constitution=constitution.id, iteration=iteration, **said)) | more
            append_jsonl(partial, [{"key": key, "job": i, **rows[i]} for i in batch])
    ordered = [rows[i] for i in range(len(jobs))]
    if anew := sum(bool(row.get("retokenised")) for row in ordered):
        run.say(f"{name}: the form cut {anew} of {len(ordered)} responses inside a token; what it left of it is tokenised "
                "anew")
    write_jsonl(path, ordered)
    return ordered


def _kept(run: Run, prompt: str, answer: dict) -> tuple[dict, dict]:
    """Of one sample (an `answer` as of `sample_batch` to the prompt and the form's opening) what its row says of the
    response (`Response`) and beside it: "reasoning" that stood before it in the sample and whether it is "closed", all that
    was "sampled" with chain of thought, "retokenised" where the form cut it inside a token, the ids of the mark that stood
    right before it ("lead"), and the "end" that was sampled, where that is not the tokenizer's."""
    form, tokenizer, spec, more = run.form, run.tokenizer, run.experiment.sampling, {}
    ids, text, finished, last = answer.get("ids"), answer["text"], answer["finished"], answer.get("end")
    if run.speaker.closing:
        opened = run.speaker.opened or seam.begins(tokenizer, ids, run.speaker.opening)
        ids, reasoning, lead = seam.after(ids, run.speaker.closing, opened)
        most = run.response_tokens() - spec.reasoning_tokens
        if reasoning is not None:
            closed = bool(lead) and len(reasoning) <= spec.reasoning_tokens
            more = {"reasoning": tokenizer.decode(reasoning), "closed": closed}
            if not closed:
                return {"text": "", "ids": [], "tokens": 0, "finished": False}, more
            more = more | {"lead": lead}
        ended = next((k for k, i in enumerate(ids) if i in run.speaker.ends_both), None)  # nothing could stop at it before
        if ended is not None:
            ids, finished, last = ids[:ended], True, ids[ended]
        ids, finished = ids[:most], finished and len(ids) <= most
        text = seam.text_of(tokenizer, ids)
    whole = form.opening + text
    text = form.response(whole)
    if form.cot:
        more = more | {"sampled": whole}
    if text != whole:  # the format ended it
        finished, last = finished or (form.kind == "plain" and not whole.rstrip().endswith(text)), None
    start = whole.index(text, whole.index(form.mark) + len(form.mark)) if form.cot and text else 0
    given = form.opening[start: len(text)]  # the part of the response that the sample was opened with
    before = seam.in_context(tokenizer, prompt, " " + given) if given else []
    start, end = (max(0, at - len(form.opening)) for at in (start, start + len(text)))  # in what was sampled
    if ids is None:  # it came as text
        space = " " if form.cot and form.kind == "plain" and text else ""
        ids = seam.in_context(tokenizer, prompt + " " * bool(given) + given, space + text[len(given):])
    elif text != whole:
        ids, anew = seam.cut(tokenizer, ids, start, end)
        more = more | ({"retokenised": True} if anew else {})
    if finished and last not in (None, tokenizer.eos_token_id):
        more = more | {"end": last}
    return {"text": text, "ids": before + ids, "tokens": len(before + ids), "finished": finished}, more


def _sampled_here(run: Run, iteration: int, texts: list[str], done: dict, name: str, *_) -> Iterator[tuple]:
    spec = run.experiment.sampling
    with run.model(iteration, spec.dtype) as model, tqdm(
            total=len(texts), initial=len(done), desc=name, unit="response") as bar:
        for batch, answers in sample_responses(model, run.tokenizer, texts, max_new_tokens=run.response_tokens(),
                                               batch_size=spec.batch_size, done=done, ends=run.speaker.ends):
            yield batch, answers
            bar.update(len(batch))


def _sampled_by_server(run: Run, iteration: int, texts: list[str], done: dict, name: str, partial: Path,
                       key: str) -> Iterator[tuple]:
    """One request a prompt; each is kept in the partial file with its raw answer as it arrives."""
    spec, most = run.experiment.sampling, run.response_tokens()
    todo = [i for i in range(len(texts)) if i not in done]
    ends = end_tokens(run.tokenizer, run.place) | run.speaker.ends
    requests = {i: serving.request(spec.engine, run.tokenizer, texts[i], most, ends, run.form.stops) for i in todo}
    calls = {i: Call(key=digest([key, i]), request=requests[i], about={"job": i}) for i in todo}
    ledger = Ledger(partial, {"sampler": spec.engine}, chat=False)
    if spec.engine == "server":
        run.once("the server answers with text: what is trained and scored are the token ids of that text behind its "
                 "prompt, which need not be those that were sampled (--sampler vllm gives them)")
    if any(call.key not in ledger.answers for call in calls.values()):
        longest = max(len(ids) for ids in run.tokenizer(texts, add_special_tokens=False).input_ids)
        with serving.served(spec.engine, run.weights(iteration), url=run.sampler_url, dtype=spec.dtype, say=run.say,
                            share=run.tensor_parallel, context=longest + most, ends=ends,
                            log=run.folder / "sampler.log") as server:
            run.record["sampled_by"] = server.facts()
            asker = Asker(server.endpoint, ledger, wrong=server.wrong)
            asker.run(calls.values(), label=name)
            missing = [call for call in calls.values() if call.key not in ledger.answers]
            if missing:
                why = asker.stopped or ledger.errors.get(missing[0].key, "no answer")
                raise UserError(f"{name}: {len(missing)} of {len(texts)} responses are missing: {why}{server.last_words()}"
                                "; what was answered stays: run the same command to go on")
    yield todo, [serving.read_answer(spec.engine, run.tokenizer, ledger.answers[calls[i].key][0], ends) for i in todo]
