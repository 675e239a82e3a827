"""What an LLM judge would cost."""

from dataclasses import dataclass

from repro.base.records import UserError
from repro.base.settings import Experiment
from repro.judges.llm import LLMJudge, Pair, expected_tokens
from repro.plan.texts import Texts, shown
from repro.servers.endpoint import HOSTED, PICO, Endpoint, count_tokens

JUDGE = "gpt-4.1-mini"  # whose cost is told where the experiment names no LLM judge


# ---- judge and disk

@dataclass(frozen=True)
class Judge:
    """What the comparisons would cost with an LLM judge, in both orders."""

    model: str
    asked: bool  # whether the experiment has this judge
    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None  # None: its price is not known


def judge_of(spec: Experiment, texts: Texts, model: str | None, price: tuple[float, float] | None) -> Judge:
    """Requests about texts of the mean lengths, by the judge `model`, else the experiment's own, else JUDGE.

    Raises UserError where the price of a `model` that was asked for is not known."""
    endpoint = Endpoint(model=model or spec.judge.model or JUDGE, base_url=HOSTED, price=price)
    answered = texts.answered(spec.iterations)
    comparisons = answered + (texts.items + answered) * bool(spec.baseline)

    def words(n):
        return " ".join(["word"] * round(n))

    statements = max((c.statements() for c in shown(spec)), key=lambda s: sum(map(count_tokens, s)))
    pair = Pair(id="plan", query=words(texts.query), principles=tuple(statements), ours=words(texts.response[0]),
                theirs=words(texts.response[0]) + ".")
    judge = LLMJudge(name="plan", host=endpoint.host, model=endpoint.model, max_tokens=spec.judge.max_tokens,
                     answer="schema" if spec.judge.answer == "auto" else spec.judge.answer)
    into, out = (comparisons * n for n in expected_tokens(judge, judge.all_calls([pair])))
    try:
        usd = endpoint.cost(into, out) / PICO
    except UserError:
        if model:
            raise
        usd = None
    return Judge(endpoint.model, "openai" in spec.judge.judges, 2 * comparisons, into, out, usd)
