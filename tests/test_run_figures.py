"""The figures of runs: a line looks the same in every figure, whatever the order of the records."""

import itertools
import random

import pytest

from repro.report import look
from repro.report.figures import draw, draw_win_rate, looks, series

BLUE, ORANGE, GREEN, PINK = zip(look.COLOURS, look.MARKERS)


def records(*lines, judges=("rule",), principles=("short", "plain"), baselines=()):
    """Every record of the four panels for `lines` of (model, writer, cot, subset), two iterations, two seeds."""
    keys = ("baseline", "judge", "estimator", "ties", "length", "principle")
    rows = []
    for (model, writer, cot, subset), iteration, seed in itertools.product(lines, (0, 1), (0, 1)):
        mine = dict.fromkeys(keys) | {"model": model, "writer": writer, "cot": cot, "subset": subset, "iteration": iteration,
                                      "seed": seed, "sem": 0.5, "ci95": [0, 1], "n": 8, "value": 0.25 + 0.5 * iteration + seed / 8}
        rows.append(mine | {"metric": "mi", "estimator": "infonce"})
        rows.append(mine | {"metric": "length_tokens"})
        rows += [mine | {"metric": "following", "principle": p} for p in (None, *principles)]
        rows += [mine | {"metric": "win_rate", "judge": j, "ties": "half", "length": "raw", "baseline": b}
                 for j in judges for b in (model, *baselines) if iteration or b != model]
    return rows


def drawn(figure) -> list[dict]:
    """Per panel, label -> colour, marker, line style of what its legend shows."""
    def look(handle):
        return handle[0].get_color(), handle[0].get_marker(), handle[0].get_linestyle()

    out = []
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        out.append({label: look(h) for h, label in zip(handles, labels) if hasattr(h, "has_yerr")})
    return out


def orders(rows):
    yield rows
    yield rows[::-1]
    for seed in range(3):
        yield random.Random(seed).sample(rows, len(rows))


HAND, MODEL, OTHER = ("m", "hand", None, "tldr"), ("m", "m", None, "tldr"), ("m", "strong", None, "tldr")


@pytest.mark.parametrize("lines, expected", [
    ((HAND, MODEL), {HAND: ORANGE, MODEL: BLUE}), ((HAND,), {HAND: ORANGE}), ((MODEL,), {MODEL: BLUE}),
    ((HAND, MODEL, OTHER), {HAND: ORANGE, MODEL: BLUE, OTHER: GREEN}),  # of two writers by name
    ((("m", "hand", None, "helpful"), ("m", "hand", None, "harmless")),
     {("m", "hand", None, "helpful"): BLUE, ("m", "hand", None, "harmless"): ORANGE}),
    ((("m", "hand", None, "harmless"),), {("m", "hand", None, "harmless"): ORANGE}),
    (tuple(("m", "hand", cot, s) for cot in (True, False) for s in ("held_out", "learned")),
     {("m", "hand", cot, s): look for (cot, s), look in zip(itertools.product((False, True), ("learned", "held_out")),
                                                            (BLUE, ORANGE, GREEN, PINK))}),
    ((("m", "hand", None, "mine"), ("m", "hand", None, "also")), {("m", "hand", None, "also"): BLUE, ("m", "hand", None, "mine"): GREEN})])
def test_a_line_looks_as_what_it_is_whatever_the_order_of_the_records(lines, expected):
    rows = records(*lines)
    for some in orders(rows):
        found = {tuple(line.values()): (look["color"], look["marker"]) for line, look in zip(series(some), looks(some))}
        assert found == expected


def test_more_lines_than_colours_still_differ():
    rows = records(*itertools.product(("a", "b"), ("hand", "x"), (False, True), ("learned", "held_out")))
    assert len({(look["color"], look["marker"]) for look in looks(rows)}) == 16 == len(series(rows))


@pytest.mark.parametrize("lines", [(HAND, MODEL), (HAND, MODEL, OTHER)])
def test_every_panel_draws_the_same_line_in_the_same_look(lines):
    """Also the styles of principles, and the order of the lines and of the dashed baselines."""
    rows = records(*lines, judges=("rule", "judge-b", "judge-a"), baselines=("other", "another"))
    first = drawn(draw(rows, 4, "t"))
    assert first[0]["writer hand"][:2] == ORANGE and first[0]["writer m"][:2] == BLUE
    assert first[3]["plain, writer hand"] == (*ORANGE, "-") and first[3]["short, writer m"] == (*BLUE, "--")
    one = drawn(draw_win_rate(rows, "judge-a", "t"))[0]
    assert {label.split(",")[0]: look[:2] for label, look in one.items()}["writer hand"] == ORANGE
    for some in orders(rows):
        for panel, again in zip([*first, one], [*drawn(draw(some, 4, "t")), *drawn(draw_win_rate(some, "judge-a", "t"))]):
            assert again == panel and list(again) == list(panel)


@pytest.mark.parametrize("seeds, said", [({HAND: (0, 1), MODEL: (0, 1)}, "each of 2 seeds"), ({HAND: (0, 1), MODEL: (0,)}, "each of 1 to 2 seeds"),
                                         ({HAND: (0,), MODEL: (0,)}, None)])
def test_a_figure_says_how_many_seeds_each_line_has(seeds, said):
    rows = [r for r in records(HAND, MODEL) if r["seed"] in seeds[r["model"], r["writer"], r["cot"], r["subset"]]]
    title = draw(rows, 4, "a run")._suptitle.get_text()
    assert said in title if said else "seeds" not in title
