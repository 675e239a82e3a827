"""A command line, made of dataclasses: each is a command, each of its fields a flag, the text below a field its help;
`examples` stand below the help.
"""

import argparse
import ast
import inspect
import re
import sys
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import get_args

from repro.base.records import UserError


def argument(default=MISSING):
    """A field that the command line gives by its place, not by a flag."""
    return field(default=default, metadata={"place": True})


def spelled(f: Field) -> str:
    """A field as the command line has it."""
    return f.name if f.metadata.get("place") else "--" + f.name.replace("_", "-")


def parse(argv: list[str], commands: dict[str, type]):
    """The command that `argv` names, made of its words. UserError, in one line, for a mistake."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):  # --a_b is --a-b, and --a=b is --a b, also where more values follow
            name = name.replace("_", "-")
            words += [name, value] if equals and value[:1] != "-" else [name + equals + value]
        elif words and words[-1][:2] == "--" and re.fullmatch(r"-([\d.]+e.*|inf|nan)", word):
            words[-1] += f"={word}"  # argparse (of Python 3.11) takes these numbers for flags
        else:
            words.append(word)
    if not words:
        raise UserError(f"a command is missing: one of {', '.join(commands)}; see repro --help")
    if words[0] not in (*commands, "-h", "--help"):
        raise _unknown(words[0], commands)
    given, rest = _parser(commands).parse_known_args(words)
    if rest:
        raise _unknown(rest[0], commands, words[0])
    kind = commands[words[0]]
    return kind(**{f.name: _value(f, getattr(given, f.name)) for f in fields(kind) if hasattr(given, f.name)})


def _value(f: Field, words: bool | str | list[str]):
    """What was given for a field, as the field has it: a tuple of several words, or one; None may be given as None."""
    if isinstance(words, bool):
        return words
    words = [words] if isinstance(words, str) else words
    kind, one, more = _kinds(f)
    if words == ["None"] and kind is not f.type:
        return None
    try:
        values = tuple(map(one, words))
    except ValueError:
        values = None
    if values is None or (more and ... not in more and len(words) != 1 + len(more)):
        what = {int: "whole number", float: "number", str: "text"}[one]
        raise UserError(f"{spelled(f)}: {' '.join(words)!r}; must be {f'{1 + len(more)} {what}s' if more else f'a {what}'}")
    return values if more else values[0]


def _kinds(f: Field) -> tuple[type, type, list]:
    """A field's type without None; what each of its words is; and of several the others' types (... any number of them)."""
    kind = next(t for t in get_args(f.type) if t is not NoneType) if NoneType in get_args(f.type) else f.type
    one, *more = get_args(kind) or [kind]
    return kind, one, more


class _Parser(argparse.ArgumentParser):
    """One that tells a mistake in one line."""

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


class _Help(argparse.HelpFormatter):
    """One that leaves examples on their lines."""

    def _fill_text(self, text, width, indent):
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def _parser(commands: dict[str, type]) -> _Parser:
    top = _Parser(prog="repro", description="`repro --version` says which version this is.")
    named = top.add_subparsers(title="commands", metavar="COMMAND")
    for name, kind in commands.items():
        parser = named.add_parser(name, help=kind.__doc__, description=kind.__doc__, allow_abbrev=False,
                                  formatter_class=_Help, epilog="\n  ".join(["examples:", *kind.examples]))
        places = [f.name.upper() if f.default is MISSING else f"[{f.name.upper()}]"
                  for f in fields(kind) if f.metadata.get("place")]
        parser.usage = " ".join(["repro", name, *places, "[flags]"])
        groups = {kind: parser}
        for f in fields(kind):
            of, _ = f.metadata.get("of", (kind, ""))
            if of not in groups:
                groups[of] = parser.add_argument_group(re.split(r"[.:(]", of.__doc__)[0].strip())
            _add(groups[of], kind, f)
    return top


def _add(parser, kind: type, f: Field) -> None:
    """Give a parser, or a group of one, a command's field."""
    of, name = f.metadata.get("of", (kind, f.name))
    told = _texts(of.__module__)[of.__name__, name].replace("%", "%%")
    if f.default is not False and f.default not in (MISSING, None, "", ()):
        told += f" (default: {f.default})"
    kind, one, more = _kinds(f)
    place, allowed = f.metadata.get("place"), f.metadata.get("allowed")
    if one is bool:
        how = {"action": argparse.BooleanOptionalAction}
    else:
        how = {"nargs": "*" if more else "?" if place and f.default is not MISSING else None,
               "metavar": f.name.upper() if place else f"{{{','.join(allowed)}}}" if allowed else one.__name__.upper()}
    parser.add_argument(spelled(f), default=argparse.SUPPRESS, help=told, **how)


@cache
def _texts(module: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the text below the field, in a module's source."""
    return {(kind.name, f.target.id): " ".join(text.value.value.split())
            for kind in ast.parse(inspect.getsource(sys.modules[module])).body if isinstance(kind, ast.ClassDef)
            for f, text in pairwise(kind.body) if isinstance(f, ast.AnnAssign) and isinstance(text, ast.Expr)}


def _unknown(word: str, commands: dict[str, type], within: str = "") -> UserError:
    """What is wrong with a word that is no command, or no flag of one: whose flag it is, or the nearest."""
    flags = {name: [spelled(f) for f in fields(kind) if not f.metadata.get("place")] for name, kind in commands.items()}
    others = [f"repro {name}" for name in commands if word in flags[name]]
    known = flags[within] if within else [*commands, *sorted(set().union(*flags.values()))]
    near = get_close_matches(word, known, n=1, cutoff=0.4) if word[:1] == "-" or not within else []
    hint = f"it is a flag of {', '.join(others)}" if others else f"did you mean {near[0]}?" if near else (
        f"see {f'repro {within}'.strip()} --help")
    return UserError(f"unknown option or command {word if word and word.isprintable() else repr(word)}; {hint}")
