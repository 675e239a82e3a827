"""Principles and constitutions: data that a user writes without touching code.

A file (JSON or TOML) lists principles, each with its antithesis. A constitution takes one side of every
principle: with two principles, 2 x 2 = 4 constitutions (arXiv 2404.14313, section 4.1). Its id names the sides,
"brief,not_warm"; the all-positive one comes first. `pairs` says, per subset of queries, which constitutions stand
against the all-positive one in training; a subset that is not named takes all of them.

A file of many principles (section 4.3: 15 learned, 5 in `held_out`) is a pool: pairs of opposite constitutions are
drawn from it.
"""

import itertools
import random
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from repro.config import choose
from repro.records import UserError, loads, read_text
from repro.rules import RULES

DATA = Path(__file__).parent / "data"
MOST = 6  # principles of a constitution: each doubles the number of constitutions


@dataclass(frozen=True, kw_only=True)
class Principle:
    """`rule` names a rule of repro/rules.py. `private`: responses under the antithesis stay in the run
    directory (never in a report or a committed result)."""

    name: str
    text: str
    antithesis: str
    rule: str | None = None
    private: bool = False


@dataclass(frozen=True, kw_only=True)
class Constitution:
    """One side of every principle. `sides[k]` is True for principle k, False for its antithesis."""

    principles: tuple[Principle, ...]
    sides: tuple[bool, ...]

    @property
    def id(self) -> str:
        return ",".join(p.name if side else f"not_{p.name}" for p, side in zip(self.principles, self.sides))

    @property
    def private(self) -> bool:
        return any(p.private and not side for p, side in zip(self.principles, self.sides))

    def opposite(self) -> "Constitution":
        """The constitution with every side flipped."""
        return replace(self, sides=tuple(not side for side in self.sides))

    def statements(self, order: tuple[int, ...] | None = None) -> list[str]:
        """The sentences, in `order` (a permutation of the principles' indices; default as listed)."""
        order = range(len(self.principles)) if order is None else order
        return [self.principles[k].text if self.sides[k] else self.principles[k].antithesis for k in order]


@dataclass(frozen=True, kw_only=True)
class ConstitutionSet:
    """All constitutions of a file, the all-positive first, and what stands against it in training. `written`: which
    model wrote the principles, and when (repro/writing.py); None for a person."""

    constitutions: tuple[Constitution, ...]
    pairs: dict[str, tuple[str, ...]]
    written: dict | None = None

    @property
    def writer(self) -> str:
        """The writer's name in records: that of a model, or "hand"."""
        return self.written["writer"] if self.written else "hand"

    def __getitem__(self, id: str) -> Constitution:
        return next(c for c in self.constitutions if c.id == id)

    @property
    def positive(self) -> Constitution:
        return self.constitutions[0]

    def negatives(self, subset: str) -> list[Constitution]:
        """What may stand against the all-positive constitution for this subset's queries, in the file's order."""
        ids = self.pairs.get(subset) or [c.id for c in self.constitutions[1:]]
        return [self[id] for id in ids]

    def to_json(self) -> dict:
        return {"principles": [_row(p) for p in self.positive.principles],
                "pairs": {k: list(v) for k, v in self.pairs.items()},
                "constitutions": [{"id": c.id, "private": c.private} for c in self.constitutions],
                **({"written": self.written} if self.written else {})}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Many principles to draw constitutions from: `learned` in training, `held_out` in evaluation alone."""

    learned: tuple[Principle, ...]
    held_out: tuple[Principle, ...] = ()

    def of(self, subset: str) -> tuple[Principle, ...]:
        """The principles of the subset "learned" or "held_out"."""
        return getattr(self, choose("subset (of principles)", subset, ("learned", "held_out")))

    def draw(self, subset: str, generator: random.Random, *, size: int = 2) -> tuple[Constitution, Constitution]:
        """A constitution of `size` different principles, each on a side drawn evenly, and its opposite (both
        principles flip: arXiv 2404.14313, section 4.3)."""
        principles = tuple(generator.sample(self.of(subset), size))
        first = Constitution(principles=principles, sides=tuple(generator.random() < 0.5 for _ in principles))
        return first, first.opposite()

    def to_json(self) -> dict:
        return {"principles": [_row(p) for p in self.learned], "held_out": [_row(p) for p in self.held_out]}


def _row(principle: Principle) -> dict:
    return {k: getattr(principle, k) for k in ("name", "text", "antithesis", "rule", "private")}


def load_constitutions(source: str) -> ConstitutionSet:
    """Read and check a constitution file: a name of repro/data/ or a path.

    Raises UserError (file and field) for a missing side, equal sides, braces, a repeated name, an unknown rule,
    key or pair, and more than six principles. Control tokens are checked by `check_control_tokens` once the tokenizer
    is known.
    """
    return _parse(*_read(source))


def load_pool(source: str) -> Pool:
    """Read and check a file of many principles, with `held_out` ones or without: at least two of each kind that it has.
    Raises UserError as `load_constitutions` does."""
    data, where = _read(source)
    _keys(data, {"principles", "held_out", "note"}, where)
    learned = _principles(data.get("principles"), f"{where}: principles")
    held_out = _principles(data["held_out"], f"{where}: held_out") if "held_out" in data else ()
    _different((*learned, *held_out), where)
    for field, part in (("principles", learned), ("held_out", held_out)):
        if len(part) == 1:
            raise UserError(f"{where}: {field}: has one principle; a constitution draws two")
    return Pool(learned=learned, held_out=held_out)


def _read(source: str) -> tuple[object, str]:
    """What a file of repro/data/ or a path holds, and its path for messages."""
    path = DATA / f"{source}.json"
    if not path.is_file():
        path = Path(source).expanduser()
        if not path.is_file():
            shipped = sorted(p.stem for p in DATA.glob("*.json"))
            choose("--constitutions", source, (*shipped, "a JSON or TOML file"))
    text = read_text(path)
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else loads(text)
    except ValueError as e:
        where = f"{path}:{e.lineno}" if hasattr(e, "lineno") else str(path)
        raise UserError(f"{where}: not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {e}") from None
    return data, str(path)


def constitutions_of(data: dict, where: str) -> ConstitutionSet:
    """The set that `ConstitutionSet.to_json` wrote."""
    return _parse({k: v for k, v in data.items() if k != "constitutions"}, where)


def _parse(data, where: str) -> ConstitutionSet:
    _keys(data, {"principles", "pairs", "note", "written"}, where)
    written = data.get("written")
    if written is not None and not (isinstance(written, dict) and isinstance(written.get("writer"), str)
                                    and written["writer"].strip() not in ("", "hand")):
        raise UserError(f"{where}: written: must be an object that names the model that wrote, as its writer")
    principles = _principles(data.get("principles"), f"{where}: principles")
    _different(principles, where)
    if len(principles) > MOST:
        raise UserError(f"{where}: principles: {len(principles)} give 2^{len(principles)} constitutions; at most {MOST}")
    constitutions = tuple(Constitution(principles=principles, sides=sides)
                          for sides in itertools.product((True, False), repeat=len(principles)))
    ids = [c.id for c in constitutions[1:]]
    pairs = data.get("pairs", {})
    if not isinstance(pairs, dict):
        raise UserError(f"{where}: pairs: must map a subset to a list of constitution ids")
    for subset, against in pairs.items():
        if not isinstance(against, list) or not against:
            raise UserError(f"{where}: pairs.{subset}: must be a list of constitution ids")
        for id in against:
            choose(f"{where}: pairs.{subset}", id, ids)
    return ConstitutionSet(constitutions=constitutions, pairs={k: tuple(v) for k, v in pairs.items()}, written=written)


def _principles(rows, where: str) -> tuple[Principle, ...]:
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where}: must list at least one principle")
    return tuple(_principle(row, f"{where}[{k}]") for k, row in enumerate(rows))


def _different(principles: tuple[Principle, ...], where: str) -> None:
    """No name and no sentence twice."""
    names = [p.name for p in principles]
    sentences = [s.strip().casefold() for p in principles for s in (p.text, p.antithesis)]
    for values, what in ((names, "name"), (sentences, "sentence")):
        repeated = next((v for v in values if values.count(v) > 1), None)
        if repeated is not None:
            raise UserError(f"{where}: principles: the {what} {repeated!r} occurs twice")


def _principle(row, where: str) -> Principle:
    _keys(row, {"name", "text", "antithesis", "rule", "private"}, where)
    for key in ("name", "text", "antithesis"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}.{key}: missing or empty; every principle needs a name, a text and its antithesis")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row["name"]) or row["name"].startswith("not_"):
        raise UserError(f"{where}.name: {row['name']!r}; allowed: lower-case letters, digits and _, not not_...")
    for key in ("text", "antithesis"):
        if re.search(r"[{}\0\ud800-\udfff]|[^\S ]", row[key]):
            raise UserError(f"{where}.{key}: braces, tabs, line breaks and broken characters are not allowed: {row[key]!r}")
    if row["text"].strip().casefold() == row["antithesis"].strip().casefold():
        raise UserError(f"{where}.antithesis: equal to the principle")
    if row.get("rule") is not None:
        choose(f"{where}.rule", row["rule"], sorted(RULES))
    if not isinstance(row.get("private", False), bool):
        raise UserError(f"{where}.private: must be true or false")
    return Principle(**row)


def _keys(row, allowed: set[str], where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    for key in row:
        choose(f"{where}: key", key, sorted(allowed))


def check_control_tokens(texts, controls: list[str]) -> None:
    """texts: (where, text) pairs. No text of a user may become a control token of the model's template."""
    for where, text in texts:
        found = next((c for c in controls if c in text), None)
        if found is not None:
            raise UserError(f"{where}: holds the control token {found!r} of the model's chat template")
