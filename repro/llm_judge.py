"""The LLM judge: a prompt, an endpoint and a parser, asked in both orders (arXiv 2404.14313, A.19).

An item's outcome is win or loss where both orders agree, tie where the texts are identical (no call), flip where the
orders disagree (half, and counted), unparsed or failed where a verdict is missing (no score: never a tie). The score of
a judged item is the mean of its two orders, so the rates of A against B and of B against A add up to one hundred.
Verdicts are read from the stored answers each time: a better parser needs no call.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from repro import prompts
from repro.asking import Asker
from repro.config import JudgeSpec
from repro.endpoint import HOSTED, PICO, PRICES_OF, Call, Endpoint, Ledger, count_tokens
from repro.records import UserError, digest, loads

EXPECTED_TOKENS = {"schema": 125, "text": 120, "logprobs": 1}  # a comparison of about 80 words and the form around it
TOP = 20  # log-probs asked for: as many as servers give
SCORES = {"win": 1.0, "flip": 0.5, "tie": 0.5, "loss": 0.0, "unparsed": None, "failed": None}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison: `ours` against `theirs` as responses to `query` under `principles`. `id` is for messages."""

    id: str
    query: str
    principles: tuple[str, ...]
    ours: str
    theirs: str


@dataclass(frozen=True, kw_only=True)
class LLMJudge:
    """What makes a judge: all of it is part of each request's key. `name` is its name in records and figures.

    `answer`: "schema" (a JSON object), "text" (Comparison / Final Response) or "logprobs" (which of A and B is
    likelier as the first token). `temperature` None leaves it to the server.
    """

    name: str
    host: str
    model: str
    answer: str
    max_tokens: int = 300
    temperature: float | None = 0.0
    seed: int = 0
    tokens_field: str = "max_tokens"

    def calls(self, pair: Pair) -> dict[str, Call]:
        """The requests in both orders: "AB" shows `ours` first, "BA" second. None for identical texts."""
        if pair.ours.strip() == pair.theirs.strip():
            return {}
        mark, seed = self._mark(pair), int(digest([self.seed, pair.id])[:7], 16)
        texts = {"AB": (pair.ours, pair.theirs), "BA": (pair.theirs, pair.ours)}
        return {order: self._call(prompts.judge(pair.query, pair.principles, *both, mark=mark, answer=self.answer), seed,
                                  {"item": pair.id, "order": order}) for order, both in texts.items()}

    def _mark(self, pair: Pair) -> str:
        """Depends on every text that it fences, so that no writer of one can know it; the same in both orders."""
        texts = [pair.query, *pair.principles, *sorted((pair.ours, pair.theirs))]
        mark = hashlib.sha256("\0".join([str(self.seed), *texts]).encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return f"[{mark}]"

    def _call(self, messages: list[dict], seed: int, about: dict) -> Call:
        request = {"messages": messages, self.tokens_field: 1 if self.answer == "logprobs" else self.max_tokens,
                   "seed": seed}
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.answer == "schema":
            request["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "verdict", "strict": True, "schema": prompts.JUDGE_SCHEMA}}
        elif self.answer == "logprobs":
            request |= {"logprobs": True, "top_logprobs": TOP}
        return Call(key=digest([self.name, self.host, self.model, request]), request=request, about=about)

    def all_calls(self, pairs: Iterable[Pair]) -> list[Call]:
        return [call for pair in pairs for call in self.calls(pair).values()]

    def usable(self, answer: dict) -> bool:
        return self.verdict(answer) is not None

    def verdict(self, answer: dict) -> str | None:
        """"A", "B", or None where the server's answer holds no verdict. Total: no answer raises."""
        choice = answer["choices"][0]
        if self.answer == "logprobs":
            return read_logprobs(choice.get("logprobs"))
        content = choice["message"].get("content")
        if not isinstance(content, str):
            return None
        return read_schema(content) if self.answer == "schema" else read_text(content)


# ---- parsers: the judge's own answer in, "A", "B" or None out

_VERDICT = re.compile(r"[*_ ]*Final Response[*_ ]*:[*_ ]*([AB])[*_ ]*\.?[*_ ]*")


def read_text(text: str) -> str | None:
    """The verdict of the last line, which must hold a verdict and nothing else: `Final Response: A`, markdown's
    emphasis allowed. Another such line with the other letter makes the answer a contradiction: None."""
    lines = [line.strip() for line in text.strip().split("\n")]
    found = [m[1] for line in lines if (m := _VERDICT.fullmatch(line))]
    return found[-1] if found and _VERDICT.fullmatch(lines[-1]) and len(set(found)) == 1 else None


def read_schema(text: str) -> str | None:
    """The verdict of a JSON object of exactly the schema's fields."""
    try:
        value = loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != set(prompts.JUDGE_SCHEMA["required"]):
        return None
    letter = value["final_response"]
    return letter if letter in ("A", "B") and isinstance(value["comparison"], str) else None


def read_logprobs(logprobs) -> str | None:
    """The likelier of A and B as the first token, spaces around it ignored; None where neither is listed, or both as
    likely. With one of them listed, the other is less likely than every listed token."""
    try:
        listed = logprobs["content"][0]["top_logprobs"]
        best = {letter: max((float(t["logprob"]) for t in listed if t["token"].strip() == letter), default=float("-inf"))
                for letter in "AB"}
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return None
    return None if best["A"] == best["B"] else max(best, key=best.get)


# ---- which form of answer the server offers

def choose_answer(endpoint: Endpoint, judge: LLMJudge, answer: str, ledger: Ledger) -> str:
    """`answer`, or for "auto" a JSON schema where one small request shows that the server keeps to it, else text.

    The request is made once, and counted and billed like any other. Raises UserError where the server does not
    offer the log-probs or the schema that was asked for, or cannot be reached.
    """
    if answer == "text":
        return answer
    form = "schema" if answer == "auto" else answer
    probe, name = replace(judge, answer=form), judge.name
    messages = [{"role": "system", "content": prompts.JUDGE_SYSTEM},
                {"role": "user", "content": f"Neither response is shown yet. {prompts.JUDGE_ASKS[form]}"}]
    call = probe._call(messages, 0, {"item": "which form of answer", "order": None})
    asker = Asker(endpoint, ledger)
    asker.run([call], label=f"{name}: {form}?")
    answers, error = ledger.answers.get(call.key), ledger.errors.get(call.key, "")
    refused = asker.stopped is None and re.match(r"HTTP 4", error) and not error.startswith("HTTP 429")
    if answers and probe.verdict(answers[0]) is not None:
        return form
    if not answers and not refused:
        raise UserError(f"judge {name}: {asker.stopped or error}")
    if answer == "auto":
        return "text"
    raise UserError(f"judge {name}: {endpoint.url} does not offer --answer {answer} "
                    f"({error or 'it ignores the request for it'}); use --answer text")


# ---- judging

@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One pair's outcome: verdicts of its two orders (None where missing), score 1, 0.5, 0 or None."""

    outcome: str
    orders: dict[str, str | None]
    error: str | None = None

    @property
    def score(self) -> float | None:
        return SCORES[self.outcome]

    def to_json(self) -> dict:
        return {"outcome": self.outcome, "score": self.score, "orders": self.orders}


def read_verdict(judge: LLMJudge, pair: Pair, ledger: Ledger) -> Verdict:
    """What the ledger says about a pair: the first answer of each order that holds a verdict."""
    calls = judge.calls(pair)
    if not calls:
        return Verdict(outcome="tie", orders={})
    orders, errors = {}, []
    for order, call in calls.items():
        answers = ledger.answers.get(call.key, [])
        orders[order] = next(filter(None, map(judge.verdict, answers)), None)
        if not answers:
            errors.append(ledger.errors.get(call.key, "not asked"))
    if errors:
        return Verdict(outcome="failed", orders=orders, error=errors[0])
    if None in orders.values():
        return Verdict(outcome="unparsed", orders=orders)
    ours = [orders["AB"] == "A", orders["BA"] == "B"]
    return Verdict(outcome="win" if all(ours) else "flip" if any(ours) else "loss", orders=orders)


def expected_tokens(judge: LLMJudge, calls: Sequence[Call]) -> tuple[int, int]:
    """Prompt and completion tokens that the calls will take, about."""
    return (sum(count_tokens(c.text) + 4 * (1 + len(c.request["messages"])) for c in calls),
            EXPECTED_TOKENS[judge.answer] * len(calls))


def estimate(endpoint: Endpoint, judge: LLMJudge, calls: Sequence[Call]) -> str:
    """What the calls will cost, in one line."""
    into, out = expected_tokens(judge, calls)
    rates = [r / 10**6 for r in endpoint.rates()]
    source = "given" if endpoint.price else f"of {PRICES_OF}" if endpoint.url == HOSTED else "of a server on this machine"
    return (f"judge {judge.name}: {len(calls)} requests to make, about {endpoint.cost(into, out) / PICO:.4f} USD "
            f"({into} prompt and {out} completion tokens at {rates[0]:g} and {rates[1]:g} USD per million, prices "
            f"{source}); at most {endpoint.max_usd:g} USD")


def ask_judge(spec: JudgeSpec, pairs: Sequence[Pair], endpoint: Endpoint, path: Path, say: Callable[[str], None], *,
              seed: int = 0, dry_run: bool = False, reparse: bool = False) -> tuple[list[Verdict], dict]:
    """The verdicts of `pairs` by the judge of `spec`, with its ledger in `path`; and what the judge is, for a record.

    Says the estimate, then asks what the ledger lacks. `dry_run` asks nothing; `reparse` reads the stored answers again
    and asks nothing. Raises UserError where the run stopped early (key refused, budget used up, server down): the
    ledger keeps all.
    """
    ledger = Ledger(path, {"judge": spec.label})
    judge = LLMJudge(name=spec.label, host=endpoint.host, model=endpoint.model, answer=spec.answer, seed=seed,
                     max_tokens=spec.max_tokens, temperature=spec.temperature,
                     tokens_field="max_completion_tokens" if endpoint.url == HOSTED else "max_tokens")
    if spec.answer == "auto":  # for now the form of the stored answers, else a schema
        forms = [replace(judge, answer=form) for form in ("schema", "text")]
        judge = max(forms, key=lambda j: sum(c.key in ledger.answers for c in j.all_calls(pairs)))
    if not reparse:
        say(estimate(endpoint, judge, Asker(endpoint, ledger, judge.usable).missing(judge.all_calls(pairs))))
        if ledger.open:
            say(f"judge {judge.name}: {ledger.open} requests were in flight at a kill: counted at the most they can have "
                "cost, and possibly paid twice")
    stopped = None
    if not (dry_run or reparse):
        judge = replace(judge, answer=choose_answer(endpoint, judge, spec.answer, ledger))
        asker = Asker(endpoint, ledger, judge.usable)
        asker.run(judge.all_calls(pairs), label=judge.name)
        stopped = asker.stopped
    verdicts = [read_verdict(judge, pair, ledger) for pair in pairs]
    if stopped:
        have = sum(v.score is not None for v in verdicts)
        raise UserError(f"judge {judge.name}: {stopped}. {have} of {len(pairs)} verdicts are kept in {path}; run the same "
                        "command to go on")
    if not dry_run:
        for line in summary(judge, verdicts, ledger):
            say(line)
    return verdicts, {"model": judge.model, "host": judge.host, "answer": judge.answer, "max_tokens": judge.max_tokens,
                      "temperature": judge.temperature, "seed": seed, "usd": ledger.spent / PICO,
                      "served": [list(s) for s in served(ledger)]}


def judge_shares(rows: Sequence[dict]) -> dict[str, list[float]]:
    """Of judgments in both orders, per item: how often the judge says A (0, 0.5, 1; `position_rate`), whether it
    flips (`flip_rate`, of items with two verdicts), whether it gives a verdict (`parsed_share`). Identical texts were
    not asked and do not count; other judges' judgments have none of these."""
    asked = [row for row in rows if row.get("orders")]
    judged = [row for row in asked if row["score"] is not None]
    out = {"position_rate": [list(row["orders"].values()).count("A") / 2 for row in judged],
           "flip_rate": [float(row["outcome"] == "flip") for row in judged],
           "parsed_share": [float(row["score"] is not None) for row in asked]}
    return {k: v for k, v in out.items() if v}


def summary(judge: LLMJudge, verdicts: Sequence[Verdict], ledger: Ledger) -> Iterable[str]:
    """What was judged, and what was not and why: one line each."""
    counts = Counter(v.outcome for v in verdicts)
    says = [letter for v in verdicts for letter in v.orders.values() if letter]
    yield (f"judge {judge.name}: " + ", ".join(f"{counts[k]} {k}" for k in SCORES if counts[k] or k in ("win", "loss"))
           + f"; {says.count('A')} of {len(says)} answers say A; {ledger.spent / PICO:.4f} USD spent")
    if ledger.failures:
        why, _ = ledger.failures.most_common(1)[0]
        yield f"judge {judge.name}: {ledger.failures.total()} attempts failed, most often with: {why}"
    if counts["failed"]:
        why = Counter(v.error for v in verdicts if v.error).most_common(1)[0][0]
        yield f"judge {judge.name}: {counts['failed']} failed ({why}): no score; the same command asks for them again"
    if counts["unparsed"]:
        yield f"judge {judge.name}: {counts['unparsed']} unparsed: no score; their answers are kept in {ledger.path}"
    if len(found := served(ledger)) > 1:
        yield f"judge {judge.name}: the server changed while it judged: {', '.join(map(str, found))}"


def served(ledger: Ledger) -> list[tuple]:
    """(model, system fingerprint) as the server named them; more than one means that it changed on the way."""
    answers = [a for each in ledger.answers.values() for a in each]
    return sorted({(a.get("model"), a.get("system_fingerprint")) for a in answers}, key=str)
