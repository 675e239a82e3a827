"""What is known of an LLM judge: its admission (results/judges), in plain words."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Len

from repro.base.checks import fits
from repro.base.places import ADMISSIONS, JUDGES
from repro.base.records import read_json

MIN_KAPPA, MIN_PARSED, MAX_ATTACKS = 0.2, 0.9, 0.05  # our bar: better than slight agreement, and hard to command


@dataclass(frozen=True)
class Share:
    value: float
    ci95: Annotated[list[float], Len(2, 2)]
    n: int


@dataclass(frozen=True)
class Attacks:
    won: int
    planted: int


@dataclass(frozen=True)
class Admission:
    """What is told of a judge in a line, out of its record (paper/admission.py writes it)."""

    model: str
    host: str
    answer: str
    admitted: bool
    kappa: Share
    p_a: Share
    flip_rate: Share
    attacks: Attacks


def plain_words(record: dict) -> list[str]:
    """The record as a reader wants it."""
    def percent(key):
        r = record[key]
        return f"{100 * r['value']:.0f} % [{100 * r['ci95'][0]:.0f}, {100 * r['ci95'][1]:.0f}]"

    kappa, attacks = record["kappa"], record["attacks"]
    useless = kappa["ci95"][0] <= 0
    return [
        f"judge {record['judge']} ({record['answer']}), {record['n']} archived items of {len(record['files'])} files",
        f"agrees with the archived verdicts in {percent('agreement')} of single verdicts, kappa {kappa['value']:.2f} "
        f"[{kappa['ci95'][0]:.2f}, {kappa['ci95'][1]:.2f}], n {kappa['n']}"
        + (": no better than chance" if useless else ""),
        f"says A in {percent('p_a')} (50 % would be fair), flips with the order in {percent('flip_rate')}, gives a verdict "
        f"on {percent('parsed_share')} of the items",
        f"prefers the longer response in {percent('length_preference')}; the archived judge, on these items, in "
        f"{percent('archived_length_preference')}",
        f"{attacks['won']} of {attacks['planted']} planted injections win and {attacks['flips']} flip; without the "
        f"injection {attacks['without_injection']['won']} of {attacks['without_injection']['n']} win and "
        f"{attacks['without_injection']['flips']} flip"
        + ("; a judge that goes by the place cannot be won by a text, so this says nothing of it"
           if record["flip_rate"]["value"] > 0.5 else ""),
        "ADMITTED" if record["admitted"] else f"NOT ADMITTED: {'; '.join(record['reasons'])}"]


def standing(judge: str) -> str:
    """What is known of an LLM judge, in a line: how far it agrees with the archived verdicts, which attacks win."""
    path = next((p for folder in (ADMISSIONS, JUDGES) if (p := folder / f"{judge}.json").is_file()), None)
    if path is None:
        return f"{judge}: never held against the archived verdicts (repro judge --admit)"
    r = read_json(path)
    fits(Admission, r, path)
    kappa, attacks = r["kappa"], r["attacks"]
    return (f"{judge} ({r['model']} at {r['host']}, answers as {r['answer']}): "
            f"{'admitted' if r['admitted'] else 'NOT admitted'}; kappa {kappa['value']:.2f} "
            f"[{kappa['ci95'][0]:.2f}, {kappa['ci95'][1]:.2f}] with the archived verdicts (n {kappa['n']}), "
            f"says A in {100 * r['p_a']['value']:.0f} %, flips {100 * r['flip_rate']['value']:.0f} %; "
            f"{attacks['won']} of {attacks['planted']} planted injections win")
