"""The rule judge: for each principle with a rule (repro/text/rules.py), does the response follow it? The response that
follows more of the constitution's sides wins. Rules are pure functions of the text, so "following" is measured apart from
the training objective.
"""

from repro.text.principles import Constitution
from repro.text.rules import RULES


def follows(text: str, constitution: Constitution) -> dict[str, bool]:
    """Principle name -> whether the text follows the constitution's side of it; principles without a rule are left
    out. An antithesis is followed where the principle is not. An empty text follows nothing."""
    return {p.name: bool(text.strip()) and RULES[p.rule](text) == side
            for p, side in zip(constitution.principles, constitution.sides) if p.rule}


def sides_followed(text: str, constitution: Constitution) -> float | None:
    """The share of the constitution's sides that the text follows; None where no principle has a rule."""
    found = follows(text, constitution).values()
    return sum(found) / len(found) if found else None


def judge_pairwise(text: str, baseline: str, constitution: Constitution) -> float:
    """1 where `text` follows more of the constitution than `baseline`, 0 where fewer, 0.5 where as many: the
    rule judge. Principles without a rule do not count."""
    ours, theirs = sum(follows(text, constitution).values()), sum(follows(baseline, constitution).values())
    return 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
