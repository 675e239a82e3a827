"""What is sampled, trained and evaluated: pure functions of a run's inputs, its seed and a position."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from repro.base.identity import rng
from repro.base.records import UserError
from repro.base.settings import Experiment
from repro.core.tree import Sampled
from repro.text.principles import Constitution, Constitutions
from repro.text.queries import Query

EVALUATION_ORDER = "evaluation"  # the principles' order at evaluation: the same for every iteration and seed


@dataclass(frozen=True)
class Item:
    """What is evaluated: a held-out query under constitutions [C], the first of which is judged. `subset`: of records.
    `scored`: it gets log-probs, and answers of every iteration."""

    query: Query
    subset: str
    constitutions: tuple[Constitution, ...]
    scored: bool = True


def training_plan(spec: Experiment, constitutions: Constitutions, training: Sequence[Query],
                  subsets: Sequence[str], iteration: int) -> list[tuple[Query, tuple[Constitution, Constitution]]]:
    """Which queries an iteration samples, each with two constitutions.

    Two halves of the training queries alternate between iterations (arXiv 2404.14313, section 4); the order of
    a half is shuffled per iteration; subsets take turns. Of a set, the all-positive constitution stands against one
    of the negatives of the query's subset; of a pool, one drawn from the learned principles against its opposite.
    """
    want = math.ceil(spec.train.queries_needed(iteration) * (1 + spec.sampling.spare))
    halves = []
    for subset in subsets:
        queries = [q for q in training if q.subset == subset]
        rng(spec.seed, "halves", subset).shuffle(queries)
        half = queries[(iteration - 1) % 2:: 2]
        rng(spec.seed, iteration, "order", subset).shuffle(half)
        halves.append(half)
    turns = [q for k in range(max(map(len, halves))) for half in halves for q in half[k: k + 1]][:want]
    return list(zip(turns, constitutions.training_pairs(turns, partial(rng, spec.seed, iteration))))


def items(spec: Experiment, constitutions: Constitutions, held_out: Sequence[Query]) -> list[Item]:
    """Of a set: every held-out query under all its constitutions. Of a pool: every held-out query under constitutions
    drawn from the learned, then from the held-out principles, each with its opposite. The same for every iteration
    and seed. Those that are scored come first: what is evaluated in between is the beginning of what is evaluated first."""
    scored, seen = set(), Counter()
    for query in held_out:
        seen[query.subset] += 1
        if not spec.data.scored or seen[query.subset] <= spec.data.scored:
            scored.add(query.id)
    found = [Item(*item, item[0].id in scored)
             for item in constitutions.evaluated(held_out, spec.data.draws, partial(rng, "evaluation"))]
    return sorted(found, key=lambda item: not item.scored)


def prompt(voice, constitution: Constitution, query: Query | None, *keys, sample: bool, reason: bool = False,
           last: str = "") -> str:
    """The rendered prompt; the principles' order is a function of `keys`, query and constitution. `last`: the user's last
    sentence, where there is one more."""
    order = list(range(len(constitution.principles)))
    if query is not None:
        rng(*keys, query.id).shuffle(order)
    statements, text = constitution.statements(tuple(order)), query.text if query else ""
    if last:  # what the user says ends with the principles, or, in a base model's form, with the query
        statements, text = ([*statements, last], text) if voice.form.kind == "chat" else (statements, f"{text} {last}")
    return voice.form.render(voice.speaker, statements, text, sample=sample, reason=reason)


def bare(voice, query: Query) -> str:
    """The rendered prompt of a query without any constitution."""
    return voice.form.render(voice.speaker, (), query.text, sample=False)


def held_out_pairs(run, rows: list[dict]) -> Iterator[tuple[Item, list[str], list]]:
    """Per scored item its generation prompts [C] and, of the responses `rows` of an evaluation, what is scored [C]
    (`said`)."""
    start = 0
    for item in run.scored():
        texts = [prompt(run.voice, c, item.query, EVALUATION_ORDER, sample=True) for c in item.constitutions]
        part, start = rows[start: start + len(texts)], start + len(texts)
        yield item, texts, [said(run.voice, row) for row in part]


def check(voice, engine: str) -> None:
    """Raise UserError where what stands before a response could not be told from it."""
    if voice.speaker.closing and engine == "server":
        raise UserError(f"--sampler server: this model writes {voice.speaker.mark!r} before it responds, which may be gone "
                        "from the text that such a server gives; use --sampler vllm or transformers, which give token ids")


def said(voice, row: dict) -> str | tuple[int, ...] | Sampled:
    """What is trained and scored of a response's row: the ids that were sampled, behind the mark behind which they were
    (the one that closes reasoning, where there was any), with the end that was sampled, or none where it was cut. An empty
    response is scored as ".", by ids too (a text would join a prompt that ends in ">"); a row without ids, made before they
    were kept, by its text: both behind a space in a base model's form."""
    space = " " if voice.form.kind == "plain" else ""
    if row.get("ids") is None:
        return space + (row["text"].strip() or ".")
    ids = tuple(row["ids"] or voice.tokenizer(space + ".", add_special_tokens=False).input_ids)
    mark = voice.speaker.closing[0] if "reasoning" in row else ()  # of reasoning that was never closed, too
    lead, end, finished = tuple(row.get("lead", mark)), row.get("end"), row.get("finished", True)
    return Sampled(ids, lead, end, finished) if lead or end is not None or not finished else ids


def tell_old(run, rows: Sequence[dict], name: str) -> None:
    """Say, once a run, where rows have no ids."""
    if any(row.get("ids") is None for row in rows):
        run.once(f"{name}: responses without token ids, made before they were kept: their text is tokenised")
