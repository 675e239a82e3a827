"""The figures: the numbers behind them, what is drawn, and bytes that do not change between two runs."""

import csv
import io

import made_archive as made
import pytest
from matplotlib.figure import Figure

from repro.base import places, records
from repro.base.metrics import Estimate
from repro.base.records import UserError
from repro.paper import archive, figures
from repro.report import look

REAL = archive.LOCAL
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the authors' record is not at {REAL}")
NAMES = ["fig2a", "fig2b", "fig3", "fig4", "fig5", "fig7", "fig8", "fig9"]


def rows_of(path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(records.read_text(path))))


def our_record(**more) -> dict:
    keys = ("metric", "subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator", "ties",
            "length", "seed", "value", "sem", "ci95", "n", "principle")
    return dict.fromkeys(keys) | {"subset": "helpful", "model": "small-lm", "seed": 0, "sem": 0.5, "n": 64} | more


@pytest.fixture
def small(tmp_path):
    archive, facts = made.make(tmp_path)
    return archive, facts, tmp_path


def test_every_figure_three_files_and_stable_bytes(small):
    archive, facts, tmp_path = small
    paths = figures.draw(archive, tmp_path / "one", published=facts)
    assert sorted(p.name for p in paths) == sorted(n + s for n in NAMES for s in (".csv", ".pdf", ".png"))
    figures.draw(archive, tmp_path / "two", published=facts)
    for p in paths:
        assert p.stat().st_size and p.read_bytes() == (tmp_path / "two" / p.name).read_bytes(), p.name


def test_csv_of_the_small_archive(small):
    archive, facts, tmp_path = small
    figures.draw(archive, tmp_path, published=facts)
    learned = [r for r in rows_of(tmp_path / "fig5.csv") if r["series"] == "learned principles" and r["cot"] == "True"]
    assert [(r["iteration"], float(r["value"]), r["source"]) for r in learned] == [
        ("0", 50.0, "chance"), ("1", 54.0, "published record")]
    assert learned[1]["printed"] == "67.6" and float(learned[1]["sem"]) == pytest.approx((54 * 46 / 250) ** 0.5)
    helpful, = [r for r in rows_of(tmp_path / "fig2b.csv") if r["source"] == "published record"]
    assert float(helpful["value"]) == pytest.approx(67.0, abs=0.01) and helpful["printed"] == ""


def test_a_run_of_ours_stands_in_its_panels_and_no_other(small):
    archive, facts, tmp_path = small
    mine = dict(iteration=1, value=61.5, baseline="small-lm", judge="rules", ties="half", metric="win_rate")
    records.write_json(tmp_path / "metrics.json", [
        our_record(**mine, length="raw"),
        our_record(**mine | {"iteration": 2}, length="stratified"),
        our_record(metric="mi", estimator="mean_of_logs", iteration=0, value=0.25),
        our_record(metric="mi", estimator="infonce", iteration=0, value=0.2),  # another estimator: in no panel
        our_record(metric="win_rate", **{k: v for k, v in mine.items() if k != "metric"} | {"baseline": "other"}, length="raw"),
        our_record(**mine, length="raw", principle="concise"),
    ])
    figures.draw(archive, tmp_path / "out", [tmp_path], published=facts)
    got = [(name, r["panel"], r["iteration"], float(r["value"]), r["series"]) for name in NAMES
           for r in rows_of(tmp_path / "out" / f"{name}.csv") if r["source"].startswith("run ")]
    assert got == [("fig2a", "0", "0", 0.25, "ours: small-lm, helpful"),
                   ("fig2b", "0", "2", 61.5, "ours: small-lm, judge rules, helpful"),
                   ("fig7", "0", "1", 61.5, "ours: small-lm, judge rules, helpful")]


def test_bad_runs_are_one_clear_line_and_nothing_is_written(small):
    archive, facts, tmp_path = small
    for content, message in (({}, "expected a list"), ([our_record(metric="mi", value="x", iteration=0)], "field value")):
        records.write_json(tmp_path / "metrics.json", content)
        with pytest.raises(UserError, match=message):
            figures.draw(archive, tmp_path / "out", [tmp_path], published=facts)
    with pytest.raises(UserError, match="cannot read"):
        figures.draw(archive, tmp_path / "out", [tmp_path / "absent"], published=facts)
    assert not (tmp_path / "out").exists()


def test_hollow_marker_only_where_the_printed_value_differs():
    row = {"value": 54.0, "printed": 67.6, "estimator": "raw"}
    assert figures.differs(row) and not figures.differs(row | {"printed": 54.0})
    assert not figures.differs(row | {"printed": None})
    assert not figures.differs(row | {"printed": 54.6, "estimator": "logistic"})
    rows = [{"figure": "fig5", "panel": 1, "series": "learned principles", "source": "published record", "iteration": 1,
             "sem": 3.0, **row}]
    drawn = figures._draw("fig5", rows).axes[1]
    hollow = [line for line in drawn.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow] == [67.6]


def test_our_runs_have_their_colours_by_name_not_by_the_order_in_which_they_are_given():
    rows = [{"figure": "fig5", "panel": 1, "series": f"ours: {name}", "source": f"run {name}, seed 0", "iteration": 1, "value": 50.0, "sem": 3.0,
             "estimator": "raw"} for name in "abc"]
    for some in (rows, rows[::-1]):
        found = figures._draw("fig5", some).axes[1].get_legend_handles_labels()
        colours = {label: handle[0].get_color() for handle, label in zip(*found) if label.startswith("ours")}
        assert colours == {"ours: a": look.GREEN, "ours: b": look.PURPLE, "ours: c": look.SKY}


def test_errorbar_is_plus_minus_sem():
    with look.style():
        ax = Figure().subplots()
        figures.errorbar(ax, [0, 1], [Estimate(50.0, None, None, 1), Estimate(60.0, 3.0, None, 250)], "x", look.BLUE, "o")
    segments = ax.containers[0].lines[2][0].get_segments()
    assert segments[0][:, 1].tolist() == [50.0, 50.0] and segments[1][:, 1].tolist() == [57.0, 63.0]


def test_figure_9_says_inferred_and_names_its_axis():
    drawing = figures._draw("fig9", [])
    assert "inferred" in drawing.get_suptitle()
    assert {ax.get_yscale() for ax in drawing.axes[::2]} == {"log"} and "log axis" in drawing.axes[0].get_ylabel()
    for name in NAMES:
        for ax in figures._draw(name, []).axes:
            assert ax.get_xlabel() == "iteration" and any(u in ax.get_ylabel() for u in ("nats", "tokens", "%"))


@needs_real
def test_figures_of_the_real_record(tmp_path):
    figures.draw(None, tmp_path)
    start = [r for name in ("fig2a", "fig3") for r in rows_of(tmp_path / f"{name}.csv")
             if r["metric"] == "mutual_information" and r["iteration"] == "0"]
    assert [round(float(r["value"]), 3) for r in start][:4] == [1.274, 1.919, 0.103, 0.195]
    assert all(len(r["value"]) > 6 for r in start)  # unrounded
    odd = {}
    for name in NAMES:
        rows = rows_of(tmp_path / f"{name}.csv")
        assert {r["iteration"] for r in rows} - {""} == {"0", "1", "2", "3"}
        for r in rows:
            r |= {"value": float(r["value"]), "printed": float(r["printed"]) if r["printed"] else None}
        odd[name] = [(r["subset"], r["model"], r["iteration"]) for r in rows if figures.differs(r)]
        assert all(r["value"] == 50 for r in rows if r["source"] == "chance")
        committed = rows_of(places.ROOT / "results" / "figures" / f"{name}.csv")
        assert [float(r["value"]) for r in committed] == pytest.approx([r["value"] for r in rows])
    assert {k: v for k, v in odd.items() if v} == {
        "fig4": [("tldr", "mixtral-8x7b", "0")], "fig5": [("learned", "llama3-70b", "1")],
        "fig8": [("harmless", "mistral-7b", "2")]}
