"""What is sampled, trained and evaluated: pure functions of a run's inputs, its seed and a position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from repro.records import UserError
from repro.text import seam
from repro.text.principles import Constitution
from repro.text.queries import Query


@dataclass(frozen=True)
class Item:
    """What is evaluated: a held-out query under constitutions [C], the first of which is judged. `subset`: of records."""

    query: Query
    subset: str
    constitutions: tuple[Constitution, ...]
EVALUATION_ORDER = "evaluation"  # the principles' order at evaluation: the same for every iteration and seed


def held_out_pairs(run, rows: list[dict]) -> Iterator[tuple[Item, list[str], list]]:
    """Per item its generation prompts [C] and, of the responses `rows` of an evaluation, what is scored [C] (`seam.said`).
    """
    space, start = " " if run.experiment.model.prompt == "plain" else "", 0
    for item in run.items():
        texts = [scored_prompt(run, run.prompt(c, item.query, EVALUATION_ORDER, sample=True))
                 for c in item.constitutions]
        part, start = rows[start: start + len(texts)], start + len(texts)
        yield item, texts, [seam.said(run.tokenizer, row, space) for row in part]


def check(run) -> None:
    """Raise UserError where what stands before a response could not be told from it."""
    if run.speaker.closing and run.experiment.sampling.engine == "server":
        raise UserError(f"--sampler server: this model writes {run.speaker.mark!r} before it responds, which may be gone "
                        "from the text that such a server gives; use --sampler vllm or transformers, which give token ids")


def scored_prompt(run, text: str) -> str:
    """The prompt under which responses are scored and trained: without the reasoning, and, where the model reasons, behind
    the marker that closes it, as they were sampled; where the prompt itself has closed it, it is as it is."""
    mark = run.tokenizer.decode(run.speaker.closing[0]) if run.speaker.closing else ""
    return text if text.rstrip().endswith(mark.strip()) else text + mark


def tell_old(run, rows: Sequence[dict], name: str) -> None:
    """Say, once a run, where rows have no ids."""
    if any(row.get("ids") is None for row in rows):
        run.once(f"{name}: responses without token ids, made before they were kept: their text is tokenised")
