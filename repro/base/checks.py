"""What settings and texts are held against: allowed values, numbers within their range, control tokens."""

import difflib
import math

from repro.base.records import UserError


def choose(field_name: str, value: str, allowed) -> str:
    """`value` if it is one of `allowed`, else a UserError that names the field, the values and the nearest."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field_name}: {value!r} is unknown; allowed: {', '.join(map(repr, allowed))}{hint}")


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


def _positive(owner, *names: str, most: float = math.inf) -> None:
    for name in names:
        if not 0 < _number(owner, name) <= most:
            raise UserError(f"{type(owner).__name__}.{name}: {getattr(owner, name)!r}; must be above 0"
                            + f" and at most {most:g}" * math.isfinite(most))


def _distinct(owner, name: str) -> None:
    if len(set(values := getattr(owner, name))) < len(values):
        raise UserError(f"{type(owner).__name__}.{name}: {', '.join(values)}; each at most once")


def _not_negative(owner, *names: str) -> None:
    for name in names:
        if not _number(owner, name) >= 0:
            raise UserError(f"{type(owner).__name__}.{name}: {getattr(owner, name)!r}; must be 0 or more")
