"""The LLM judge: a prompt, an endpoint and a parser, asked in both orders (arXiv 2404.14313, A.19).

An item's outcome is win or loss where both orders agree, tie where the texts are identical (no call), flip where the
orders disagree (half, and counted), unparsed or failed where a verdict is missing (no score: never a tie). The score of
a judged item is the mean of its two orders, so the rates of A against B and of B against A add up to one hundred.
Verdicts are read from the stored answers each time: a better parser needs no call.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from repro.base.records import UserError, digest, dumps
from repro.base.settings import JudgeSpec
from repro.judges.record import JudgeLedger
from repro.judges.verdicts import read_logprobs, read_schema, read_text
from repro.servers.client import Asker
from repro.servers.endpoint import HOSTED, PICO, PRICES_OF, Call, Endpoint, count_tokens, shown, text_of, was_cut
from repro.servers.ledger import Ledger
from repro.servers.offers import agree, check_draws, known
from repro.text import prompts

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
    likelier as the first token). `temperature` None leaves it to the server. `left_out`: what its server does not take
    (`Endpoint.leave_out`).
    """

    name: str
    host: str
    model: str
    answer: str
    max_tokens: int = 300
    temperature: float | None = 0.0
    seed: int = 0
    tokens_field: str = "max_tokens"
    left_out: tuple[str, ...] = ()

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
        field = "max_completion_tokens" if "max_tokens" in self.left_out else self.tokens_field
        request = {"messages": messages, field: 1 if self.answer == "logprobs" else self.max_tokens}
        if "seed" not in self.left_out:
            request["seed"] = seed
        if self.temperature is not None and "temperature" not in self.left_out:
            request["temperature"] = self.temperature
        if self.answer == "schema":
            request["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "verdict", "strict": True, "schema": prompts.JUDGE_SCHEMA}}
        elif self.answer == "logprobs":
            request |= {"logprobs": True, "top_logprobs": TOP}
        return Call(key=digest([self.name, self.host, self.model, request]), request=request, about=about)

    def all_calls(self, pairs: Iterable[Pair]) -> list[Call]:
        return [call for pair in pairs for call in self.calls(pair).values()]

    def probe(self) -> Call:
        """A small request of the same form about nothing."""
        messages = [{"role": "system", "content": prompts.JUDGE_SYSTEM},
                    {"role": "user", "content": f"Neither response is shown yet. {prompts.JUDGE_ASKS[self.answer]}"}]
        return self._call(messages, 0, {"item": "which form of answer", "order": None})

    def usable(self, answer: dict) -> bool:
        return self.verdict(answer) is not None

    def verdict(self, answer: dict, quoted: Sequence[str] = ()) -> str | None:
        """"A", "B", or None where the server's answer holds no verdict. Total: no answer raises. `quoted`: what was
        judged."""
        if self.answer == "logprobs":
            return read_logprobs(answer["choices"][0].get("logprobs"))
        text = text_of(answer)
        return read_schema(text) if self.answer == "schema" else read_text(text, quoted=quoted, cut=was_cut(answer))


# ---- what the server takes, and which form of answer it offers

def judge_of(spec: JudgeSpec, endpoint: Endpoint, seed: int) -> LLMJudge:
    """The judge of `spec` as its server is asked before anything is known of it."""
    return LLMJudge(name=spec.label, host=endpoint.host, model=endpoint.model, seed=seed, max_tokens=spec.max_tokens,
                    answer="schema" if spec.answer == "auto" else spec.answer, temperature=spec.temperature,
                    tokens_field="max_completion_tokens" if endpoint.url == HOSTED else "max_tokens",
                    left_out=endpoint.leave_out or ())


def settle(spec: JudgeSpec, judge: LLMJudge, endpoint: Endpoint, ledger: Ledger, say: Callable[[str], None]) -> LLMJudge:
    """The judge as its server takes it: for "auto", in a JSON schema where one small request shows that the server keeps to
    it, else in text; less the fields that it refuses. Found out once, counted and billed like any other request; every
    judge is, so that a server that cannot be used is told before anything depends on it. Raises UserError for one."""
    def build(form: str, left: tuple[str, ...]) -> Call:
        return replace(judge, answer=form, left_out=left).probe()

    def keeps(form: str, answer: dict) -> bool:
        return form == "text" or replace(judge, answer=form).verdict(answer) is not None

    form, left = agree(endpoint, ledger, build, _forms(spec), keeps, who=f"judge {judge.name}", say=say)
    if judge.temperature and form != "logprobs":  # which draws nothing
        check_draws(endpoint, ledger, left, who=f"judge {judge.name}")
    return replace(judge, answer=form, left_out=left)


def _forms(spec: JudgeSpec) -> tuple[str, ...]:
    return ("schema", "text") if spec.answer == "auto" else (spec.answer,)


def probe_judge(spec: JudgeSpec, endpoint: Endpoint, path: Path, say: Callable[[str], None], *, seed: int = 0) -> None:
    """`settle` alone, with its ledger in `path`, before the first response to be judged is there."""
    settle(spec, judge_of(spec, endpoint, seed), endpoint, JudgeLedger(path, {"judge": spec.label}), say)


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
    orders, errors, quoted = {}, [], (pair.ours, pair.theirs, pair.query, *pair.principles)
    for order, call in calls.items():
        answers = ledger.answers.get(call.key, [])
        orders[order] = next(filter(None, (judge.verdict(answer, quoted) for answer in answers)), None)
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
    ledger, judge = JudgeLedger(path, {"judge": spec.label}), judge_of(spec, endpoint, seed)
    lefts = known(endpoint, ledger, lambda form, left: replace(judge, answer=form, left_out=left).probe(), _forms(spec))
    trials = [replace(judge, answer=form, left_out=left) for left in lefts for form in _forms(spec)]
    if len(trials) > 1:  # for now, the one that has most answers
        judge = max(trials, key=lambda j: sum(c.key in ledger.answers for c in j.all_calls(pairs)))
    if not reparse:
        say(estimate(endpoint, judge, Asker(endpoint, ledger, judge.usable).missing(judge.all_calls(pairs))))
        if ledger.open:
            say(f"judge {judge.name}: {ledger.open} requests were in flight at a kill: counted at the most they can have "
                "cost, and possibly paid twice")
    stopped = None
    if not (dry_run or reparse):
        if Asker(endpoint, ledger, judge.usable).missing(judge.all_calls(pairs)):
            judge = settle(spec, judge, endpoint, ledger, say)
        asker = Asker(endpoint, ledger, judge.usable)
        asker.run(judge.all_calls(pairs), label=judge.name)
        stopped = asker.stopped
    verdicts = [read_verdict(judge, pair, ledger) for pair in pairs]
    if stopped:
        have = sum(v.score is not None for v in verdicts)
        raise UserError(f"judge {judge.name}: {stopped}. {have} of {len(pairs)} verdicts are kept in {path}; run the same "
                        "command to go on")
    if not dry_run:
        for line in summary(judge, verdicts, ledger, pairs):
            say(line)
    return verdicts, {"model": judge.model, "host": judge.host, "answer": judge.answer, "max_tokens": judge.max_tokens,
                      "temperature": judge.temperature, "seed": seed, "left_out": list(judge.left_out),
                      "usd": ledger.spent / PICO,
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


def unread(judge: LLMJudge, verdicts: Sequence[Verdict], pairs: Sequence[Pair], ledger: Ledger) -> list[dict]:
    """The last answer to each request whose answers hold no verdict."""
    calls = ((v, order, call) for v, pair in zip(verdicts, pairs) for order, call in judge.calls(pair).items())
    return [ledger.answers[call.key][-1] for v, order, call in calls if not v.orders[order] and call.key in ledger.answers]


INSTEAD = {"refusal": "a refusal", "tool_calls": "a call of a tool", "reasoning_content": "reasoning",
           "reasoning": "reasoning"}  # where a message has no text


def example(answer: dict) -> str:
    """What a judge wrote in the place of a verdict, for a reader: the end of its text, or what there is instead."""
    message, text = answer["choices"][0]["message"], text_of(answer)
    if text.strip():
        return repr(shown(text, 100, end=True))
    for field, what in INSTEAD.items():
        if said := message.get(field):
            return f"no text, but {what}: {shown(said if isinstance(said, str) else dumps(said), 100)!r}"
    return f"no text (finish_reason {shown(str(answer['choices'][0].get('finish_reason')), 40)})"


def summary(judge: LLMJudge, verdicts: Sequence[Verdict], ledger: Ledger, pairs: Sequence[Pair] = ()) -> Iterable[str]:
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
        answers = unread(judge, verdicts, pairs, ledger)
        cut = sum(map(was_cut, answers)) if judge.answer != "logprobs" else 0
        yield (f"judge {judge.name}: {counts['unparsed']} unparsed: no score; their answers are kept in {ledger.path}"
               + (f", such as {example(answers[0])}" if answers else ""))
        if cut:
            many = "all" if cut == len(answers) else f"{cut} of"
            yield (f"judge {judge.name}: {many} {len(answers)} answers without a verdict were cut at {judge.max_tokens} "
                   "tokens: `repro judge` with a higher --max-tokens asks again")
    if len(found := served(ledger)) > 1:
        yield f"judge {judge.name}: the server changed while it judged: {', '.join(map(str, found))}"


def served(ledger: Ledger) -> list[tuple]:
    """(model, system fingerprint) as the server named them; more than one means that it changed on the way."""
    answers = [a for each in ledger.answers.values() for a in each]
    def name(value) -> str | None:  # whatever the server put there
        return value if isinstance(value, str | None) else shown(dumps(value), 100)

    return sorted({(name(a.get("model")), name(a.get("system_fingerprint"))) for a in answers}, key=str)
