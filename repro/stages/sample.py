"""The stages that sample pairs of responses and train on them; and the scoring of pairs.

A server gets one prompt a request, and what it answered is not asked again.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from repro.base.records import UserError, append_jsonl, digest, read_jsonl, seal, write_jsonl
from repro.base.training import NEEDS_INITIAL, WITHOUT_CONSTITUTION, NotTrainable
from repro.core import lora
from repro.models import load
from repro.models.decoding import end_tokens
from repro.sampling import launch
from repro.sampling.local import sample_responses
from repro.sampling.response import Response, response_of
from repro.sampling.server import read_answer, request
from repro.servers.client import Asker
from repro.servers.endpoint import Call
from repro.servers.ledger import Ledger
from repro.stages import draws, jobs
from repro.stages.draws import held_out_pairs
from repro.stages.folder import checkpoint, evaluation_file, initial_file, training_file
from repro.stages.run import Run
from repro.text.principles import Constitution
from repro.text.queries import Query


def sample_to_file(run: Run, wanted, texts: list[str], iteration: int, path: Path, name: str) -> list[dict]:
    """Responses to the prompts `texts` of what is `wanted` (query, constitution) by the model of `iteration`. What is
    already in the partial file is not sampled again; the file goes when the stage is finished. Reasoning is kept beside the
    response."""
    form, asked = run.voice.form, texts
    texts = [text + " " + form.opening for text in texts] if form.opening else texts
    partial = run.partial(path)
    key = digest([texts, run.key([f"train-{iteration}"] if iteration else [])])
    rows: dict[int, dict] = {}
    if partial.exists():
        for row in read_jsonl(partial, torn_tail=True, all_checked=True):
            if row.pop("key") == key:
                rows[row.pop("job")] = row
    if len(rows) < len(wanted):
        sampled = _sampled_here if run.experiment.sampling.engine == "transformers" else _sampled_by_server
        for batch, answers in sampled(run, iteration, texts, rows.copy(), name, partial, key):
            for i, answer in zip(batch, answers):
                query, constitution = wanted[i]
                said, more = response_of(run.voice, run.experiment.sampling, asked[i], answer)
                rows[i] = asdict(Response(query=query.id, constitution=constitution.id, iteration=iteration, **said)) | more
            append_jsonl(partial, [{"key": key, "job": i, **rows[i]} for i in batch])
    ordered = [rows[i] for i in range(len(wanted))]
    if anew := sum(bool(row.get("retokenised")) for row in ordered):
        run.say(f"{name}: the form cut {anew} of {len(ordered)} responses inside a token; what it left of it is tokenised "
                "anew")
    write_jsonl(path, ordered)
    return ordered


def _sampled_here(run: Run, iteration: int, texts: list[str], done: dict, name: str, *_) -> Iterator[tuple]:
    spec = run.experiment.sampling
    with run.model(iteration, spec.dtype) as model, tqdm(
            total=len(texts), initial=len(done), desc=name, unit="response") as bar:
        for batch, answers in sample_responses(model, run.voice.tokenizer, texts, max_new_tokens=run.response_tokens(),
                                               batch_size=spec.batch_size, done=done, ends=run.voice.speaker.ends):
            yield batch, answers
            bar.update(len(batch))


def _sampled_by_server(run: Run, iteration: int, texts: list[str], done: dict, name: str, kept: Path,
                       key: str) -> Iterator[tuple]:
    """One request a prompt; each is `kept` in the partial file with its raw answer as it arrives."""
    spec, most = run.experiment.sampling, run.response_tokens()
    todo = [i for i in range(len(texts)) if i not in done]
    ends = end_tokens(run.voice.tokenizer, run.voice.place) | run.voice.speaker.ends
    requests = {i: request(spec.engine, run.voice.tokenizer, texts[i], most, ends, run.voice.form.stops) for i in todo}
    lengths = [len(ids) for ids in run.voice.tokenizer(texts, add_special_tokens=False).input_ids]
    reads = {requests[i]["prompt"]: lengths[i] for i in todo if isinstance(requests[i]["prompt"], str)}
    calls = {i: Call(key=digest([key, i]), request=requests[i], about={"job": i}) for i in todo}
    ledger = Ledger(kept, {"sampler": spec.engine}, chat=False)
    if spec.engine == "server":
        run.once("the server answers with text: what is trained and scored are the token ids of that text behind its "
                 "prompt, which need not be those that were sampled (--sampler vllm gives them)")
    if any(call.key not in ledger.answers for call in calls.values()):
        with launch.served(spec.engine, run.weights(iteration), url=run.sampler_url, dtype=spec.dtype, say=run.say,
                            share=run.tensor_parallel, context=max(lengths) + most, ends=ends,
                            log=run.folder / "sampler.log", as_is=run.sampler_as_is) as server:
            run.sampled_by(server.facts())
            asker = Asker(server.endpoint, ledger, wrong=partial(server.wrong, reads=reads))
            asker.run(calls.values(), label=name)
            missing = [call for call in calls.values() if call.key not in ledger.answers]
            if missing:
                why = asker.stopped or ledger.errors.get(missing[0].key, "no answer")
                raise UserError(f"{name}: {len(missing)} of {len(texts)} responses are missing: {why}{server.last_words()}"
                                "; what was answered stays: run the same command to go on")
    yield todo, [read_answer(spec.engine, run.voice.tokenizer, ledger.answers[calls[i].key][0], ends) for i in todo]


@contextmanager
def _as_trained(run: Run, iteration: int, dtype: str):
    """The model of an iteration as it was trained. Of adapters beside weights of 16 bits that is not the merged one, which
    16 bits would round to little more than the initial model."""
    train = run.experiment.train
    if not (train.lora and iteration and dtype == "bfloat16"):
        with run.model(iteration, dtype) as model:
            yield model
        return
    model = lora.trained(run.folder / checkpoint(iteration), run.voice.place, train)
    try:
        yield model
    finally:
        del model
        load.release()


SCORED_AT_ONCE = 8  # queries handed over together, for full packs


def score_pairs(run: Run, iteration: int, pairs: list, name: str, label: str) -> list[tuple[list[list[float]], list[int]]]:
    """Of each of `pairs` (TrainingPairs) the summed log-probs [C][R] under the model of `iteration` as it was trained, and
    the scored tokens [R]."""
    import torch

    from repro.core.engines import ids_of, matmul_precision, settle, weights_dtype
    from repro.core.logprobs import BATCH_TOKENS, matrix_of

    spec = run.experiment.train
    ids = ids_of(run.voice.tokenizer, pairs, score_eos=spec.score_eos)
    scored = [[len(p.ids) - p.start for p in query[0]] for query in ids]
    if run.ranks > 1:
        with tqdm(total=len(pairs), desc=f"{name} {label}", unit="query") as bar:
            return list(zip(jobs.score(run.folder, name, run.ranks, model=run.weights(iteration), pairs=pairs, spec=spec,
                                       backend=run.record["backend"], on_query=bar.update), scored))
    with _as_trained(run, iteration, weights_dtype(spec)) as model, torch.inference_mode():
        matrices, way = [], settle(model, run.record["backend"])
        with matmul_precision(model, spec.precision), tqdm(total=len(pairs), desc=f"{name} {label}", unit="query") as bar:
            for k in range(0, len(ids), SCORED_AT_ONCE):
                part = ids[k: k + SCORED_AT_ONCE]
                matrices += matrix_of(way, model, part, length_normalize=False, budget=BATCH_TOKENS).tolist()
                bar.update(len(part))
        return list(zip(matrices, scored))


MERGE_CHECKED = 4  # held-out queries: in float32 on a CPU, minutes for 7 billion parameters


def sample(run: Run, iteration: int) -> None:
    """Pairs of responses to training queries by the previous iteration's model -> responses/training-k.jsonl."""
    name, outputs = f"sample-{iteration}", [training_file(iteration)]
    inputs = [f"train-{iteration - 1}"] if iteration > 1 else run.written()
    if not run.stage(name, outputs, inputs):
        return
    wanted = [(query, constitution) for query, pair in run.training_plan(iteration) for constitution in pair]
    texts = [draws.prompt(run.voice, c, q, run.experiment.seed, iteration, "sample", c.id, sample=True,
                          reason=run.voice.form.cot) for q, c in wanted]
    rows = sample_to_file(run, wanted, texts, iteration - 1, run.folder / training_file(iteration), name)
    run.finish(name, outputs, inputs, responses=len(rows))


def usable_pairs(run: Run, iteration: int) -> tuple[list[tuple[Query, tuple[Constitution, ...], list[dict]]], Counter]:
    """The sampled pairs that may train, in order, each with its two rows, and the dropped ones counted by the first reason
    that holds."""
    rows = read_jsonl(run.folder / training_file(iteration))
    plan = run.training_plan(iteration)
    kept, dropped = [], Counter()
    for k, (query, pair) in enumerate(plan):
        both = rows[2 * k: 2 * k + 2]
        responses = [row["text"] for row in both]
        phrase = next((p for p in run.experiment.sampling.drop_phrases if any(p in r for r in responses)), None)
        if not all(row.get("closed", True) for row in both):
            dropped["reasoning not closed"] += 1
        elif not all(row["text"].strip() and row.get("ids", True) for row in both):
            dropped["empty"] += 1
        elif responses[0].strip() == responses[1].strip():
            dropped["identical"] += 1
        elif phrase is not None:
            dropped[f"phrase {phrase!r}"] += 1
        elif run.experiment.sampling.full_stop and not responses[0].rstrip().endswith("."):
            dropped["no full stop"] += 1
        else:
            kept.append((query, pair, both))
    return kept, dropped


def training_pairs(run: Run, iteration: int, kept: list) -> list:
    """TrainingPairs of the usable ones, under the prompts of training; for an objective without constitutions the positive
    response under the prompt that has none."""
    from repro.core.engines import TrainingPair

    seed = run.experiment.seed
    if run.experiment.train.objective in WITHOUT_CONSTITUTION:
        return [TrainingPair(query=q.id, prompts=(draws.bare(run.voice, q),), responses=(draws.said(run.voice, both[0]),))
                for q, _, both in kept]
    return [TrainingPair(
        query=q.id, responses=tuple(draws.said(run.voice, row) for row in both),
        prompts=tuple(draws.prompt(run.voice, c, q, seed, iteration, "train", c.id, sample=False) for c in pair))
        for q, pair, both in kept]


def score_initial(run: Run, iteration: int) -> None:
    """For an objective that needs them, the log-probs of this iteration's pairs under the initial model
    -> logprobs/initial-k.jsonl: once, so that training holds one model."""
    name, inputs, outputs = f"initial-{iteration}", [f"sample-{iteration}"], [initial_file(iteration)]
    if run.experiment.train.objective not in NEEDS_INITIAL or not run.stage(name, outputs, inputs):
        return
    kept, _ = usable_pairs(run, iteration)
    pairs = training_pairs(run, iteration, kept[:run.experiment.train.queries_needed(iteration)])
    found = score_pairs(run, 0, pairs, name, "log-probs")
    write_jsonl(run.folder / initial_file(iteration), [{"query": p.query, "logprobs": m, "tokens": n}
                                                       for p, (m, n) in zip(pairs, found)])
    run.finish(name, outputs, inputs)


def train_iteration(run: Run, iteration: int) -> None:
    """Train from the initial weights on this iteration's pairs -> checkpoints/iteration-k."""
    name, inputs, outputs = f"train-{iteration}", [f"sample-{iteration}"], [checkpoint(iteration)]
    if run.experiment.train.objective in NEEDS_INITIAL:
        inputs.append(f"initial-{iteration}")
    if not run.stage(name, outputs, inputs):
        return jobs.clear(run.folder, iteration)
    spec, folder = run.experiment, run.folder / checkpoint(iteration)
    kept, dropped = usable_pairs(run, iteration)
    need = spec.train.queries_needed(iteration)
    run.say(f"{name}: {len(kept)} pairs usable, {need} needed"
            + "".join(f"; dropped {n}: {why}" for why, n in sorted(dropped.items())))
    draws.tell_old(run, [row for _, _, both in kept for row in both], training_file(iteration))
    if len(kept) < need:
        done = len(kept) + sum(dropped.values())
        why = ", ".join(f"{why}: {n}" for why, n in sorted(dropped.items()))
        alike = iteration > 1 and 2 * (dropped["identical"] + dropped["empty"]) > done
        raise NotTrainable(
            f"iteration {iteration}: {len(kept)} pairs of responses are left of the {need} that it trains on: "
            f"{sum(dropped.values())} of {done} sampled were dropped ({why}); give another run (--name) more training "
            "queries, a smaller --batch-size or fewer --iterations"
            + ", or other --drop-phrases" * any(why.startswith("phrase") for why in dropped)
            + ", or, where training has made the responses alike, a lower --learning-rate" * alike)
    pairs = training_pairs(run, iteration, kept)
    if spec.train.objective in NEEDS_INITIAL:
        pairs = [replace(p, initial=tuple(map(tuple, row["logprobs"])))
                 for p, row in zip(pairs, read_jsonl(run.folder / initial_file(iteration)))]
    jobs.write_job(run.folder, iteration, model=run.voice.place, pairs=pairs, spec=spec.train, key=run.key(inputs),
                     backend=run.record["backend"], out=checkpoint(iteration), seed=spec.seed)
    with tqdm(total=need, desc=name, unit="query") as bar:
        trace = jobs.train(run.folder, iteration, run.ranks, on_query=bar.update, nodes=run.nodes)
    load.release()
    merged = {"merged": check_merged(run, iteration)} if spec.train.lora else {}
    seal(folder, digest([run.record["config_hash"], iteration]))
    run.finish(name, outputs, inputs, trace=trace, dropped_pairs=dict(dropped), ranks=run.ranks * run.nodes, **merged)
    jobs.clear(run.folder, iteration)


def check_merged(run: Run, iteration: int) -> dict:
    """`lora.merged_difference` on the initial model's responses to some held-out queries, two constitutions each."""
    every = list(held_out_pairs(run, read_jsonl(run.folder / evaluation_file(0))))
    some = every[:: math.ceil(len(every) / MERGE_CHECKED)]
    facts = lora.merged_difference(
        run.folder / checkpoint(iteration), run.voice.place, run.voice.tokenizer, run.experiment.train,
        [texts[:2] for _, texts, _ in some], [responses[:2] for _, _, responses in some], run.record["backend"])
    run.say("train-{}: the saved model is within {max_abs_difference_nats:.1e} nats of the trained one ({pairs} summed "
            "log-probs of {queries} held-out queries)".format(iteration, **facts))
    return facts
