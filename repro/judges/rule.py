"""The rule judge: for each principle with a rule (repro/text/rules.py), does the response follow it? The response that
follows more of the constitution's sides wins. Rules are pure functions of the text, so "following" is measured apart from
the training objective. A side counts as followed only in a text that still answers its query (repro/text/answers.py).
"""

from collections.abc import Mapping, Sequence

from repro.text.answers import fault
from repro.text.principles import Constitution
from repro.text.rules import RULES

FOLLOWING = "following.jsonl"  # in a run's folder: which sides each response follows (repro/stages/measure.py)


def met(text: str, constitution: Constitution) -> dict[str, bool]:
    """Principle name -> whether the text is on the constitution's side of its rule; principles without a rule are left out.
    An antithesis is met where the rule is not. An empty text meets nothing."""
    return {p.name: bool(text.strip()) and RULES[p.rule](text) == side
            for p, side in zip(constitution.principles, constitution.sides) if p.rule}


def follows(text: str, constitution: Constitution, query: str | None = None,
            told: Sequence[str] | None = None) -> Mapping[str, bool]:
    """As `met`; and where the `query` is given, nothing is followed by a text that does not answer it. `told`: the
    sentences under which it was asked, where those are not the constitution's."""
    answers = query is None or fault(text, query, told or constitution.statements()) is None
    return {name: answers and holds for name, holds in met(text, constitution).items()}


def sides_followed(text: str, constitution: Constitution, query: str | None = None,
                   told: Sequence[str] | None = None) -> float | None:
    """The share of the constitution's sides that the text follows (see `follows`); None where no principle has a rule."""
    found = follows(text, constitution, query, told).values()
    return sum(found) / len(found) if found else None


def judge_pairwise(text: str, baseline: str, constitution: Constitution, query: str | None = None,
                   told: Sequence[str] | None = None) -> float:
    """1 where `text` follows more of the constitution than `baseline`, 0 where fewer, 0.5 where as many: the
    rule judge. Principles without a rule do not count; `query` and `told`: see `follows`."""
    ours, theirs = (sum(follows(t, constitution, query, told).values()) for t in (text, baseline))
    return 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
