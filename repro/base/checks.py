"""A setting, and what settings and texts are held against: allowed values, numbers within their range, control tokens."""

import difflib
import math
from dataclasses import field, fields

from repro.base.records import UserError, dumps


def choose(field_name: str, value: str, allowed) -> str:
    """`value` if it is one of `allowed`, else a UserError that names the field, the values and the nearest."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field_name}: {value!r} is unknown; allowed: {', '.join(map(repr, allowed))}{hint}")


def setting(default, flag: str | None = None, *, allowed: tuple[str, ...] = ()):
    """A field of a dataclass of settings. `flag`: what it is called on the command line (repro/flags.py), whose help is the
    text below the field; None: it is set in Python alone. `allowed`: what it, or each of several, may be."""
    return field(default=default, metadata={"flag": flag, "allowed": allowed})


def only_allowed(owner) -> None:
    """Hold every field that has `allowed` values against them."""
    for f in fields(owner):
        if allowed := f.metadata.get("allowed"):
            for value in getattr(owner, f.name) if isinstance(f.default, tuple) else [getattr(owner, f.name)]:
                choose(f"{type(owner).__name__}.{f.name}", value, allowed)


def check_control_tokens(texts, controls: list[str]) -> None:
    """texts: (where, text) pairs. No text of a user may become a control token of the model's template."""
    for where, text in texts:
        found = next((c for c in controls if c in text), None)
        if found is not None:
            raise UserError(f"{where}: holds the control token {found!r} of the model's chat template")


def _number(owner, name: str):
    """A field's value, if it is a finite number, and a whole one where the field holds such."""
    value, kind = getattr(owner, name), type(owner).__dataclass_fields__[name].type
    whole = kind in (int, int | None)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise UserError(f"{type(owner).__name__}.{name}: {value!r}; must be a {'whole' if whole else 'finite'} number")
    return value


def positive(owner, *names: str, most: float = math.inf) -> None:
    for name in names:
        if not 0 < _number(owner, name) <= most:
            raise UserError(f"{type(owner).__name__}.{name}: {getattr(owner, name)!r}; must be above 0"
                            + f" and at most {most:g}" * math.isfinite(most))


def distinct(owner, name: str) -> None:
    if len(set(values := getattr(owner, name))) < len(values):
        raise UserError(f"{type(owner).__name__}.{name}: {', '.join(values)}; each at most once")


def not_negative(owner, *names: str) -> None:
    for name in names:
        if not _number(owner, name) >= 0:
            raise UserError(f"{type(owner).__name__}.{name}: {getattr(owner, name)!r}; must be 0 or more")


def fits(kind: type, value, where) -> None:
    """Raise UserError where a JSON value is not of the type `kind` (a dataclass; what it does not name may be there too):
    `where`, the place in it, the field, and what it must be. pydantic looks, strictly: no text is a number, no true is 1.

    Not what a user writes: there our own checks name the nearest allowed word or show a row that is right, and hold fields
    against each other. Nor a run's config: pydantic (2.14) makes 1 a 1.0, with which it hashes to something else.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(kind).validate_json(dumps(value), strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
    else:
        return
    path = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in first["loc"]).removeprefix(".")
    place, _, field = path.rpartition("].")
    names = [str(where), f"{place}]" * bool(place), f"field {field}" * bool(field)]
    what = first["msg"].replace("Field required", "missing").replace("Input should be", "expected")
    found = "" if first["type"] == "missing" else f", found {dumps(first['input'])[:60]}"
    raise UserError(f"{': '.join(filter(None, names))}: {what}{found}")
