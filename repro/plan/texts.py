"""An experiment's settings and texts -> how many queries and tokens there are."""

import os
import statistics
from collections import Counter
from dataclasses import dataclass

from repro.base.identity import rng
from repro.base.settings import Experiment
from repro.servers.endpoint import count_tokens
from repro.text.principles import Constitution, load_constitutions
from repro.text.prompts import Form
from repro.text.queries import SOURCES, load_queries

# Tokens of a query (mean, longest), by `count_tokens`: 1,200 first human turns of HH-RLHF's training rows; 250 posts of
# TL;DR's validation rows.
QUERIES = {"hh-rlhf": (15, 162), "tldr": (326, 506)}
# Tokens of a response: means over iterations 0 to 3 of what the authors' record holds, in the models' own tokens.
RESPONSES = {"exp1_dialogue": 155, "exp2_tldr": 85, "exp3_diverse": 214, "exp3_diverse_cot": 151}


@dataclass(frozen=True)
class Texts:
    """Tokens, estimated: (mean, longest) of a training prompt, of what a query's prompts begin with under all
    constitutions, of a prompt that asks for a sample, and of a response; of a query and of a response for the judge; and
    how many held-out items there are, of them scored, under how many constitutions each."""

    prompt: tuple[float, int]
    common: tuple[float, int]
    asking: tuple[float, int]
    response: tuple[float, int]
    reasoning: int
    query: float
    items: int
    scored: int
    C: int

    def answered(self, iterations: int) -> int:
        """Items answered by the models of iterations 1 to the last: all by the last."""
        return (iterations - 1) * self.scored + self.items


class _Spelled:
    """In a speaker's place, for prompts whose tokens are only counted."""

    bos = ""

    def render(self, system, user):
        return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"


def shown(spec: Experiment) -> tuple[Constitution, ...]:
    """Constitutions of the experiment, with each learned principle among them."""
    return load_constitutions(spec.constitutions).sample(rng("plan"))


def texts_of(spec: Experiment, response_tokens: float | None = None) -> Texts:
    """How long the experiment's texts are, and how many are held out."""
    constitutions, every = load_constitutions(spec.constitutions), shown(spec)
    if spec.data.source in QUERIES:
        query, longest = QUERIES[spec.data.source]
        counts = [spec.data.evaluation] * len(spec.data.subsets or SOURCES[spec.data.source])
    else:
        queries, _ = load_queries(spec.data.source, spec=spec.data)
        lengths = [count_tokens(q.text) for q in queries]
        query, longest = statistics.mean(lengths), max(lengths)
        counts = [*Counter(q.subset for q in queries if q.split == spec.data.evaluation_split).values()]
    form = Form(spec.model.prompt, spec.task, bool(spec.cot))

    def frames(**how):
        found = [count_tokens(form.render(_Spelled(), c.statements(), "", **how)) for c in every]
        return round(statistics.mean(found) + query), max(found) + longest

    mark = "\0"
    begin = os.path.commonprefix([form.render(_Spelled(), c.statements(), mark, sample=False) for c in every])
    fixed, own = count_tokens(begin.replace(mark, "")), mark in begin
    most, each = spec.sampling.max_new_tokens, constitutions.items_per_query(spec.data.draws)
    mean = response_tokens or RESPONSES.get(spec.name + "_cot" * bool(spec.cot), RESPONSES.get(spec.name, most))
    return Texts(prompt=frames(sample=False), common=(fixed + own * query, fixed + own * longest),
                 asking=frames(sample=True, reason=form.cot), response=(min(mean, most), most), query=query,
                 C=constitutions.count, items=each * sum(counts),
                 scored=each * sum(min(n, spec.data.scored or n) for n in counts),
                 reasoning=spec.sampling.reasoning_tokens if spec.cot or spec.sampling.reasoning else 0)
