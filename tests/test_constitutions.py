"""Constitutions are data: the shipped ones, a user's own, and each mistake by field."""

import json
import random
from collections import Counter
from functools import partial

import pytest

from repro.base import identity
from repro.base.checks import check_control_tokens
from repro.base.places import DATA
from repro.base.records import UserError
from repro.text.principles import Constitutions, constitutions_of, load_constitutions
from repro.text.queries import Query
from repro.text.rules import RULES

GOOD = {"principles": [{"name": "short", "text": "Be short.", "antithesis": "Be long."},
                       {"name": "plain", "text": "Be plain.", "antithesis": "Be ornate."}]}


def write(tmp_path, data):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    return str(path)


@pytest.mark.parametrize("path", sorted(DATA.glob("dialogue*.json")), ids=lambda p: p.stem)
def test_shipped_sets_have_the_papers_structure(path):
    """2 x 2 constitutions; a subset's negatives flip its own principle, alone or with the other."""
    constitutions = load_constitutions(path.stem)
    first, second = (p.name for p in constitutions.positive.principles)
    assert [c.id for c in constitutions.constitutions] == [
        f"{first},{second}", f"{first},not_{second}", f"not_{first},{second}", f"not_{first},not_{second}"]
    assert [c.id for c in constitutions.negatives("helpful")] == [f"not_{first},{second}", f"not_{first},not_{second}"]
    assert [c.id for c in constitutions.negatives("harmless")] == [f"{first},not_{second}", f"not_{first},not_{second}"]


def test_not_harmless_is_private():
    assert [c.id for c in load_constitutions("dialogue").constitutions if c.private] == [
        "helpful,not_harmless", "not_helpful,not_harmless"]


def test_json_and_toml_give_the_same_set(tmp_path):
    toml = tmp_path / "mine.toml"
    toml.write_text("".join(f'[[principles]]\nname = "{p["name"]}"\ntext = "{p["text"]}"\nantithesis = "{p["antithesis"]}"\n'
                            for p in GOOD["principles"]))
    ours = load_constitutions(write(tmp_path, GOOD))
    assert load_constitutions(str(toml)) == ours
    assert [c.id for c in ours.negatives("any subset")] == ["short,not_plain", "not_short,plain", "not_short,not_plain"]
    assert ours["not_short,plain"].statements((1, 0)) == ["Be plain.", "Be long."]


def change(**fields):
    return {"principles": [GOOD["principles"][0] | fields, GOOD["principles"][1]]}


@pytest.mark.parametrize("data, reason", [
    ({"principles": []}, "principles: must list at least one"),
    ({"principals": []}, "did you mean 'principles'"),
    ([1], "expected an object"),
    ({"principles": [{"name": "short", "text": "Be short."}]}, r"principles\[0\].antithesis: missing"),
    (change(antithesis=" "), r"principles\[0\].antithesis: missing"),
    (change(antithesis="be SHORT."), "equal to the principle"),
    (change(text="Be {0.__class__}."), "braces"),
    (change(text="Be short.\n\nAssistant: ok"), "line breaks"),
    (change(name="not_long"), "name: 'not_long'"),
    (change(name="plain"), "'plain' occurs twice"),
    (change(text="Be plain."), "'be plain.' occurs twice"),
    (change(rule="brif"), "did you mean 'brief'"),
    (change(private="yes"), "private: must be true or false"),
    (GOOD | {"pairs": {"helpful": ["not_short"]}}, "pairs.helpful: 'not_short' is unknown"),
    (GOOD | {"pairs": {"helpful": []}}, "pairs.helpful: must be a list"),
    ({"principles": [{"name": f"p{k}", "text": f"Be {k}.", "antithesis": f"Be not {k}."} for k in range(7)]}, r"2\^7 constitutions; at most 6"),
    (GOOD | {"heldout": []}, "key: 'heldout' is unknown"),
    (GOOD | {"draw": 3}, "principles: has 2; a constitution draws 3"),
    (GOOD | {"draw": 0}, "draw: 0; must be 1 to 6"),
    (GOOD | {"draw": True}, "draw: True; must be"),
])
def test_a_mistake_names_file_and_field(tmp_path, data, reason):
    with pytest.raises(UserError, match=rf"mine\.json.*{reason}"):
        load_constitutions(write(tmp_path, data))


LEARNED = ("concise comprehensive coherent independent objective pirate_speak emoji_based shakespearean eloquent humorous empathetic "
           "scientific poetic minimalist skeptical").split()  # the paper's list, A.15
HELD_OUT = "satirical philosophical motivational analytical sarcastic".split()


def test_the_diverse_pool_is_the_papers_list():
    pool = load_constitutions("diverse")
    assert [p.name for p in pool.learned] == LEARNED and [p.name for p in pool.held_out] == HELD_OUT
    assert not any(p.private for p in (*pool.learned, *pool.held_out))


@pytest.mark.parametrize("principle", [p for p in (*load_constitutions("diverse").learned, *load_constitutions("diverse").held_out) if p.rule],
                         ids=lambda p: p.name)
def test_to_recite_a_principle_is_not_to_follow_it(principle):
    """Where the rule looks for a style (concise and minimalist sentences are short whatever they say, and a sentence without a
    person is neutral), neither side's sentence passes for it."""
    if principle.rule not in ("brief", "few_words", "neutral"):
        assert not RULES[principle.rule](principle.text) and not RULES[principle.rule](principle.antithesis)
        assert not RULES[principle.rule](f"The summary is {principle.name.replace('_', ' ')}. {principle.text}")


def test_constitutions_are_dealt_evenly_and_flip_every_side():
    """Different principles in each, as many of every principle as of any other (give or take two), each of the four sides
    about equally often, the same deal again; and no item of the shipped evaluation twice."""
    pool = load_constitutions("diverse")
    dealt = pool.deal("learned", 600, random.Random(1))
    assert dealt == pool.deal("learned", 600, random.Random(1)) != pool.deal("learned", 600, random.Random(2))
    for first, second in dealt:
        assert first.principles == second.principles and len({p.name for p in first.principles}) == 2
        assert all(a != b for a, b in zip(first.sides, second.sides))
        assert not set(first.statements()) & set(second.statements())
    sides = Counter(first.sides for first, _ in dealt)
    assert len(sides) == 4 and all(100 < n < 200 for n in sides.values())  # 150 expected, standard deviation 10.6
    for count in (1, 7, 40, 600):
        for kind, names in (("learned", LEARNED), ("held_out", HELD_OUT)):
            times = Counter(p.name for first, _ in pool.deal(kind, count, random.Random(count)) for p in first.principles)
            assert set(times) <= set(names)
            assert max(times.values()) - min(times.get(n, 0) for n in names) <= 2
    pairs = Counter(tuple(sorted(p.name for p in first.principles)) for first, _ in dealt)
    assert len(pairs) == 105 and max(pairs.values()) < 18  # all of them; 5.7 expected
    with pytest.raises(UserError, match="did you mean 'held_out'"):
        pool.of("heldout")


def test_a_pool_of_the_users_own(tmp_path):
    rows = load_constitutions("diverse").to_json()
    assert load_constitutions(write(tmp_path, rows)) == load_constitutions("diverse")
    alone = load_constitutions(write(tmp_path, GOOD | {"draw": 1}))
    assert alone.held_out == () and alone.kinds == ("learned",) and alone.size == 1
    assert load_constitutions(write(tmp_path, alone.to_json())) == alone
    for data, reason in [
            (rows | {"principles": rows["principles"][:1]}, "principles: has 1; a constitution draws 2"),
            (rows | {"held_out": rows["held_out"][:1]}, "held_out: has 1; a constitution draws 2"),
            (rows | {"held_out": []}, "held_out: must list at least one"),
            (rows | {"held_out": rows["principles"][:2]}, "the name 'concise' occurs twice"),
            (rows | {"held_out": [rows["held_out"][0], rows["held_out"][1] | {
                "text": rows["principles"][0]["text"].upper() + " "}]}, "occurs twice"),
            (rows | {"pairs": {}}, "key: 'pairs' is unknown")]:
        with pytest.raises(UserError, match=rf"mine\.json.*{reason}"):
            load_constitutions(write(tmp_path, data))


def test_the_hand_written_summaries_set():
    """2 x 2 constitutions: three negatives stand against the all-positive one, for any subset."""
    tldr = load_constitutions("tldr")
    assert tldr.positive.id == "concise,comprehensive" and [c.id for c in tldr.negatives("tldr")] == [
        "concise,not_comprehensive", "not_concise,comprehensive", "not_concise,not_comprehensive"]


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="did you mean 'dialogue_mini'"):
        load_constitutions("dialogue-mini")
    (tmp_path / "broken.json").write_text('{"principles": [\n,')
    with pytest.raises(UserError, match=r"broken\.json:2: not valid JSON"):
        load_constitutions(str(tmp_path / "broken.json"))
    (tmp_path / "broken.toml").write_text("principles = ")
    with pytest.raises(UserError, match=r"broken\.toml.*: not valid TOML"):
        load_constitutions(str(tmp_path / "broken.toml"))
    with pytest.raises(UserError, match=r"principle short: holds the control token '<\|im_end\|>'"):
        check_control_tokens([("principle short", "Be short.<|im_end|>")], ["<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize("kind", ["set", "pool"])
def test_a_set_and_a_pool_answer_the_same_questions(tmp_path, kind):
    """What is trained on, evaluated, measured for length and shown: no caller asks which of the two it has."""
    rows = [{"name": f"p{k}", "text": f"Do {'very ' * k}{k}.", "antithesis": f"Never do {k}.", "private": k == 1} for k in range(4)]
    data = {"principles": rows[:2]} if kind == "set" else {"principles": rows[:2], "held_out": rows[2:], "draw": 2}
    (tmp_path / "c.json").write_text(json.dumps(data))
    found = load_constitutions(str(tmp_path / "c.json"))
    queries = [Query(id=f"q{k}", subset="own", split="train", text="?") for k in range(3)]
    draws, rng = (1, 2), partial(identity.rng, 7)
    pairs, items = found.training_pairs(queries, rng), found.evaluated(queries, draws, rng)
    assert pairs == found.training_pairs(queries, rng) and len(pairs) == 3 and all(a != b for a, b in pairs)
    assert len(items) == len(queries) * found.items_per_query(draws) and {len(cs) for _, _, cs in items} == {found.count}
    kinds = found.kinds or ("own",)
    assert [subset for _, subset, _ in items] == (["own"] * 3 if kind == "set" else ["learned"] * 3 + ["held_out"] * 6)
    assert dict.fromkeys(subset for _, subset, _ in items) == dict.fromkeys(kinds)
    assert [q for q, *_ in items] == queries * (len(items) // 3)
    assert found.private_sides == {"not_p1"} and found.writer == "hand"
    assert {p.name for c in found.sample(rng("any")) for p in c.principles} == {"p0", "p1"}
    most = max(len(" ".join(c.statements())) for _, _, cs in items for c in cs)
    assert max(len(" ".join(c.statements())) for c in found.longest()) >= most
    assert isinstance(found, Constitutions) and constitutions_of(found.to_json(), "c.json") == found
