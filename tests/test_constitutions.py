"""Constitutions are data: the shipped ones, a user's own, and each mistake by field."""

import json

import pytest

from repro.constitutions import DATA, check_control_tokens, load_constitutions
from repro.records import UserError

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
])
def test_a_mistake_names_file_and_field(tmp_path, data, reason):
    with pytest.raises(UserError, match=rf"mine\.json.*{reason}"):
        load_constitutions(write(tmp_path, data))


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
