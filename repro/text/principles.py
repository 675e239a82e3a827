"""Principles and constitutions: data that a user writes without touching code.

A file (JSON or TOML) lists principles, each with its antithesis. A constitution takes one side of every
principle: with two principles, 2 x 2 = 4 constitutions (arXiv 2404.14313, section 4.1). Its id names the sides,
"brief,not_warm"; the all-positive one comes first. `pairs` says, per subset of queries, which constitutions stand
against the all-positive one in training; a subset that is not named takes all of them.

A file with `draw` or `held_out` (section 4.3: 15 learned principles, 5 held out) is a pool: constitutions of `draw`
principles, by default two, are drawn from it, each against its opposite.
"""

import itertools
import random
import re
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from repro.base.checks import choose
from repro.base.places import DATA
from repro.base.records import UserError, loads, read_text
from repro.text.rules import RULES

MOST = 6  # principles of a constitution: each doubles the number of constitutions
Rng = Callable[..., random.Random]


@dataclass(frozen=True, kw_only=True)
class Principle:
    """`rule` names a rule of repro/text/rules.py. `private`: responses under the antithesis stay in the run
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


class Constitutions(ABC):
    """What a constitution file holds: a set, under all of which every query is evaluated, or a pool, from which they are
    drawn. Its users need not know which. `count`: C, the constitutions of an evaluated item. `kinds`: the subsets of
    principles that records are about, of a pool; a set has none, its records are about the queries' subsets. Queries are
    those of repro/text/queries.py; `rng(*keys)` is randomness by position, `draws` items of a query by kind."""

    principles: tuple[Principle, ...]
    writer: str  # in records: the name of a model, or "hand"
    count: int
    kinds: tuple[str, ...] = ()

    def of(self, kind: str) -> tuple[Principle, ...]:
        """The principles of a kind."""
        return getattr(self, choose("kind (of principles)", kind, self.kinds))

    @property
    def private_sides(self) -> set[str]:
        """The sides, as they stand in a constitution's id, whose responses are not shown."""
        return {f"not_{p.name}" for p in self.principles if p.private}

    @abstractmethod
    def training_pairs(self, queries: Sequence, rng: Rng) -> list[tuple[Constitution, Constitution]]:
        """The two constitutions that each of an iteration's queries is sampled under."""

    @abstractmethod
    def evaluated(self, queries: Sequence, draws: Sequence[int], rng: Rng) -> list[tuple]:
        """Held-out items: (query, subset of records, constitutions [C], the first of which is judged)."""

    @abstractmethod
    def items_per_query(self, draws: Sequence[int]) -> int:
        """How many items `evaluated` makes of a query."""

    @abstractmethod
    def longest(self) -> tuple[Constitution, ...]:
        """Constitutions among which is one with the longest sentences."""

    @abstractmethod
    def sample(self, generator: random.Random) -> tuple[Constitution, ...]:
        """Constitutions that stand for all: every principle that is learned is in one of them."""


@dataclass(frozen=True, kw_only=True)
class ConstitutionSet(Constitutions):
    """All constitutions of a file, the all-positive first, and what stands against it in training. `written`: which
    model wrote the principles, and when (repro/sampling/writers.py); None for a person."""

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
    def principles(self) -> tuple[Principle, ...]:
        return self.positive.principles

    @property
    def positive(self) -> Constitution:
        return self.constitutions[0]

    def negatives(self, subset: str) -> list[Constitution]:
        """What may stand against the all-positive constitution for this subset's queries, in the file's order."""
        ids = self.pairs.get(subset) or [c.id for c in self.constitutions[1:]]
        return [self[id] for id in ids]

    @property
    def count(self) -> int:
        return len(self.constitutions)

    def training_pairs(self, queries, rng):
        """The all-positive constitution against one of the negatives of the query's subset."""
        return [(self.positive, rng("negative", q.id).choice(self.negatives(q.subset))) for q in queries]

    def evaluated(self, queries, draws, rng):
        """Every query under all constitutions."""
        return [(q, q.subset, self.constitutions) for q in queries]

    def items_per_query(self, draws):
        return 1

    def longest(self):
        return self.constitutions

    def sample(self, generator):
        return self.constitutions

    def to_json(self) -> dict:
        return {"principles": [_row(p) for p in self.positive.principles],
                "pairs": {k: list(v) for k, v in self.pairs.items()},
                "constitutions": [{"id": c.id, "private": c.private} for c in self.constitutions],
                **({"written": self.written} if self.written else {})}


@dataclass(frozen=True, kw_only=True)
class Pool(Constitutions):
    """Many principles to draw constitutions of `size` from: `learned` in training, `held_out` in evaluation alone."""

    learned: tuple[Principle, ...]
    held_out: tuple[Principle, ...] = ()
    size: int = 2
    writer = "hand"
    count = 2  # each against its opposite

    @property
    def principles(self) -> tuple[Principle, ...]:
        return self.learned + self.held_out

    @property
    def kinds(self) -> tuple[str, ...]:
        """The subsets of principles that it has."""
        return ("learned", "held_out") if self.held_out else ("learned",)

    def deal(self, kind: str, count: int, generator: random.Random) -> list[tuple[Constitution, Constitution]]:
        """`count` constitutions of different principles, each on a side drawn evenly, with their opposites (all sides
        flip: arXiv 2404.14313, section 4.3). Dealt like cards, so that no principle occurs more often than another by
        more than one, two at the most; the paper draws each time from all."""
        dealt, deck = [], []
        for _ in range(count):
            hand = []
            while len(hand) < self.size:
                if not any(p not in hand for p in deck):
                    deck += generator.sample(self.of(kind), len(self.of(kind)))
                hand.append(deck.pop(next(k for k, p in enumerate(deck) if p not in hand)))
            first = Constitution(principles=tuple(hand), sides=tuple(generator.random() < 0.5 for _ in hand))
            dealt.append((first, first.opposite()))
        return dealt

    def training_pairs(self, queries, rng):
        return self.deal("learned", len(queries), rng("deal"))

    def evaluated(self, queries, draws, rng):
        return [(queries[k % len(queries)], kind, hand) for kind, times in zip(self.kinds, draws)
                for k, hand in enumerate(self.deal(kind, times * len(queries), rng(kind)))]

    def items_per_query(self, draws):
        return sum(times for _, times in zip(self.kinds, draws))

    def longest(self):
        longest = tuple(sorted(self.principles, key=lambda p: -max(len(p.text), len(p.antithesis)))[:self.size])
        return (Constitution(principles=longest, sides=tuple(len(p.text) >= len(p.antithesis) for p in longest)),)

    def sample(self, generator):
        return tuple(c for hand in self.deal("learned", len(self.learned), generator) for c in hand)

    def to_json(self) -> dict:
        held_out = {"held_out": [_row(p) for p in self.held_out]} if self.held_out else {}
        return {"principles": [_row(p) for p in self.learned], **held_out, "draw": self.size}


def _row(principle: Principle) -> dict:
    return {k: getattr(principle, k) for k in ("name", "text", "antithesis", "rule", "private")}


def load_constitutions(source: str) -> Constitutions:
    """Read and check a constitution file: a name of repro/data/ or a path.

    Raises UserError (file and field) for a missing side, equal sides, braces, a repeated name, an unknown rule,
    key or pair, more than six principles of a set, and fewer than a constitution draws of a pool. Control tokens are
    checked by `check_control_tokens` once the tokenizer is known.
    """
    data, where = _read(source)
    return constitutions_of(data, where)


def _read(source: str) -> tuple[object, str]:
    """What a file of repro/data/ or a path holds, and its path for messages."""
    path = DATA / f"{source}.json"
    if not path.is_file():
        path = Path(source).expanduser()
        if not path.is_file() and (path.suffix or "/" in source):
            raise UserError(f"--constitutions {source}: no such file (a path counts from where the command runs)")
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


def constitutions_of(data, where: str) -> Constitutions:
    """The set or pool of a file's content, or of what `to_json` wrote."""
    if isinstance(data, dict) and data.keys() & {"draw", "held_out"}:
        return _pool(data, where)
    return _set({k: v for k, v in data.items() if k != "constitutions"} if isinstance(data, dict) else data, where)


def _pool(data: dict, where: str) -> Pool:
    _keys(data, {"principles", "held_out", "draw", "note"}, where)
    learned = _principles(data.get("principles"), f"{where}: principles")
    held_out = _principles(data["held_out"], f"{where}: held_out") if "held_out" in data else ()
    _different((*learned, *held_out), where)
    size = data.get("draw", 2)
    if type(size) is not int or not 1 <= size <= MOST:
        raise UserError(f"{where}: draw: {size!r}; must be 1 to {MOST}, the principles of a constitution")
    for field, part in (("principles", learned), ("held_out", held_out)):
        if part and len(part) < size:
            raise UserError(f"{where}: {field}: has {len(part)}; a constitution draws {size}")
    return Pool(learned=learned, held_out=held_out, size=size)


def _set(data, where: str) -> ConstitutionSet:
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
