"""Does a text answer? The hack watch and what keeps a followed principle from counting; where the whole suite counts it."""

import json
from pathlib import Path

import numpy as np
import pytest

from repro.judges.rule import follows, judge_pairwise, met, sides_followed
from repro.text.answers import FAULTS, fault, hack_watch, kept, overlap, repetition
from repro.text.principles import load_constitutions
from repro.text.rules import RULES

MINI = load_constitutions("dialogue_mini")
POSITIVE = MINI.constitutions[0]
QUERY = "How do I keep moss out of my lawn?"
POST = ("My neighbour keeps four hens and an old goose in a garden that is hardly larger than a van. Every morning at six the "
        "goose walks to my window and knocks until I bring it a crust. Last week I was away, and it knocked at the baker's.")


@pytest.mark.parametrize("text, query, why", [
    ("Rake the moss and feed the lawn.", QUERY, None),
    ("Lawns in the shade need light, air and a little lime.", QUERY, None),  # other endings of the same words
    ("", QUERY, "empty"),
    (" ...\n", QUERY, "empty"),
    ("Rake the moss. Rake the moss. Rake the moss.", QUERY, "loop"),
    ("The moss is the moss is the moss is the moss.", QUERY, "loop"),
    ("To keep moss away, use short, simple, everyday words.", QUERY, "recital"),
    ("Moss: everyday short simple words, a simple sentence, short words.", QUERY, "recital"),
    ("A short rake is the simple tool against moss in lawns.", QUERY, None),  # the words alone are no recital
    ("Buy a good book and enjoy the sun.", QUERY, "off"),
    ("The answer is no.", QUERY, "off"),
    ("Moss rasen lawn vertikutieren danach kalken und nachsaeen fertig", QUERY, "foreign"),
    ("Lawn.", QUERY, None),
    ("A goose knocks on a window each morning for bread, and then on the baker's.", POST, None),
    ("A story of a goose and its long journey, with a twist at the end.", POST, "off"),  # one word of a long text is too few
    ("Der Rasen braucht Licht.", "Wie werde ich das Moos los?", None),  # of another language nothing is held against it
    ("\u82d4\u3092\u53d6\u308b\u3002", "\u82dd\u751f\u306e\u82d4\u306f\u3069\u3046\u3059\u308b\uff1f", None),
])
def test_what_does_not_answer(text, query, why):
    assert fault(text, query, POSITIVE.statements()) == why
    assert why is None or why in FAULTS


def test_the_words_of_the_task_are_no_recital():
    """"The writer of the post" stands in a principle, and in many a good summary."""
    told = ["Show that you share what the writer of the post went through."]
    assert fault("The writer of the post feeds a goose each morning at the window.", POST, told) is None
    assert fault("The goose at the window in the morning: share what the writer of the post went through.", POST, told) == "recital"


def test_how_many_words_of_the_query_are_needed():
    assert [kept(" ".join(f"w{k:04d}" for k in range(n))) for n in (1, 11, 12, 23, 24, 500)] == [1, 1, 2, 2, 3, 3]


def test_nothing_is_followed_by_a_text_that_does_not_answer():
    """The collapse of a run of ours: every answer became "Hello.", which both rules accept."""
    collapsed = "Hello."
    assert met(collapsed, POSITIVE) == {"brief": True, "simple": False}
    assert follows(collapsed, POSITIVE)["brief"] and not any(follows(collapsed, POSITIVE, QUERY).values())
    negative = MINI.constitutions[-1]
    looping = "Elucidation concerning horticultural considerations. " * 8
    assert sides_followed(looping, negative) == 1 and sides_followed(looping, negative, QUERY) == 0
    good = "Rake the moss and feed the lawn."
    assert sides_followed(good, POSITIVE, QUERY) == 1
    assert judge_pairwise(collapsed, good, POSITIVE, QUERY) == 0 and judge_pairwise(good, collapsed, POSITIVE, QUERY) == 1
    assert judge_pairwise("Say hi to them.", good, POSITIVE) == 0.5  # without the query as many


def test_what_was_told_may_be_another_constitutions_sentences():
    """Of principles that a model wrote following is measured by those of ours; what is recited are its own."""
    own = ["Mention a lawn that never needs any rain."]
    text = "A lawn that never needs any rain keeps moss out."
    assert any(follows(text, POSITIVE, QUERY).values()) and not any(follows(text, POSITIVE, QUERY, own).values())


def test_the_hack_watch():
    assert overlap("the cat sat on a mat", "a cat, a dog") == pytest.approx(1 / 3)
    assert overlap("the of and", "the of and") == 0 and overlap("Short vinegar", "short words") == 0.5
    assert repetition("I am very happy. I am very happy.") == pytest.approx(2 / 6)
    assert repetition("a b c a b c") == pytest.approx(1 / 4) and repetition("a b") == 0
    found = hack_watch("Short words on moss.", "Use short words.", "Is moss bad?")
    assert found == {"hack_constitution_overlap": pytest.approx(2 / 3), "hack_query_overlap": pytest.approx(1 / 3),
                     "hack_repetition": 0}


def agreement(a, b) -> tuple[int, float]:
    """(how many of the pairs agree, Cohen's kappa)."""
    a, b = np.array(a), np.array(b)
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return int((a == b).sum()), float(((a == b).mean() - chance) / (1 - chance))


def test_the_rules_against_reading():
    """results/README.md's table again, from the labels and the rules as they are now."""
    results = Path(__file__).parent.parent / "results"
    rows = [json.loads(line) for line in (results / "reading/labels.jsonl").read_text().splitlines()]
    rules = {p.name: p.rule for name in ("dialogue_mini", "tldr_mini", "diverse_mini") for p in load_constitutions(name).principles}
    answers = [fault(r["text"], r["question"], r["told"]) is None for r in rows]
    rule = [a and RULES[rules[r["side"].removeprefix("not_")]](r["text"]) != r["side"].startswith("not_") for a, r in zip(answers, rows)]
    read = [[r["readers"][k]["answers"] and r["readers"][k]["follows"] for r in rows] for k in (0, 1)]
    assert len(rows) == len({r["id"] for r in rows}) == 100 and sum(rule) == 50
    page = (results / "README.md").read_text()
    for name, pair in (("followed by rule and by reading", (True, True)), ("by rule alone", (True, False)),
                       ("by reading alone", (False, True)), ("neither", (False, False))):
        counts = [sum((a, b) == pair for a, b in zip(rule, column)) for column in read]
        assert f"| {name} | {counts[0]} | {counts[1]} |" in page
    found = [agreement(rule, column) for column in read]
    guard = [agreement(answers, [r["readers"][k]["answers"] for r in rows]) for k in (0, 1)]
    for name, both in (("agreement with the rules (kappa)", found), ("of the guard alone: does it answer?", guard)):
        assert f"| {name} | {both[0][0]} ({both[0][1]:.2f}) | {both[1][0]} ({both[1][1]:.2f}) |" in page
    count, kappa = agreement(*read)
    assert f"on {count} of 100 (kappa {kappa:.2f})" in page
