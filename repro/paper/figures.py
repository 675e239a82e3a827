"""The paper's figures from the authors' record, and runs of ours in the same panels. No torch.

`PANELS` says what each panel shows; `points` turns it into numbers (the CSV, unrounded, in a fixed order);
`_draw` draws those numbers and nothing else, in the look of all figures (report/look.py).
Error bars are ± SEM over items.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from repro.base import metrics, records
from repro.base.metrics import Estimate
from repro.base.records import UserError
from repro.paper.archive import PUBLISHED, Archive, archive_root, estimate, load_cells, load_manifest, series
from repro.paper.beyond import CONSTITUTIONS, TOLERANCE
from repro.report import look

OUR_COLOURS, OUR_MARKERS = (look.GREEN, look.PURPLE, look.SKY, look.AMBER), ("D", "^", "v", "P")  # subsets by judges
COLUMNS = ("figure", "panel", "series", "metric", "subset", "model", "writer", "cot", "baseline", "iteration",
           "estimator", "ties", "value", "sem", "n", "printed", "source")
INSTRUCT, WEAK, STRONG = "mistral-7b-instruct", "mistral-7b-instruct", "claude-opus"


def errorbar(ax, x, estimates: Sequence[Estimate], label: str, colour: str, marker: str, **line) -> None:
    """One series with ± SEM; a point without SEM (an anchor, one item) is drawn without a bar."""
    y = [e.value for e in estimates]
    ax.errorbar(x, y, [e.sem or 0.0 for e in estimates], color=colour, marker=marker, label=label, **line)


# ---- what each panel shows

def _mi_and_length(experiment: str, lines, title: str = "", **keys) -> list[dict]:
    return [dict(metric=m, experiment=experiment, lines=lines, title=title, estimator=e, keys=keys)
            for m, e in (("mutual_information", "mean_of_logs"), ("length_tokens", "mean"))]


def _win_rates(experiment: str, lines, estimator: str, ties: str, title: str = "", **keys) -> list[dict]:
    return [dict(metric="win_rate", experiment=experiment, lines=lines, title=title, estimator=estimator,
                 ties=ties, baseline=b, keys=keys) for b in ("base", INSTRUCT)]


HH = [(f"{s} queries", {"subset": s, "model": "mistral-7b", "writer": STRONG})
      for s in ("helpful", "harmless")]
TLDR = [(m, {"subset": "tldr", "model": m}) for m in ("mistral-7b", "mixtral-8x7b")]
DIVERSE = [(label, {"subset": s, "model": "llama3-70b", "writer": STRONG})
           for label, s in (("learned principles", "learned"), ("held-out principles", "held_out"))]
WRITERS = ((f"weak principle writer ({WEAK})", WEAK), (f"strong principle writer ({STRONG})", STRONG))
COT = (("without CoT", False), ("with CoT", True))
PANELS = {
    "fig2a": _mi_and_length("exp1", HH),
    "fig2b": _win_rates("exp1", HH, "stratified", "half"),
    "fig3": [p for t, w in WRITERS for p in _mi_and_length("exp2", TLDR, t, writer=w)],
    "fig4": [p for t, w in WRITERS for p in _win_rates("exp2", TLDR, "raw", "loss", t, writer=w)],
    "fig5": [p for t, c in COT for p in _win_rates("exp3", DIVERSE, "raw", "half", t, cot=c)[:1]],
    "fig7": _win_rates("exp1", HH, "raw", "half"),
    "fig8": _win_rates("exp1", HH, "logistic", "loss"),
    "fig9": [p for t, c in COT for p in _mi_and_length("exp3", DIVERSE, t, cot=c)],
}
TITLES = {
    "fig2a": "Figure 2a: dialogue, mutual information (as plotted) and length",
    "fig2b": "Figure 2b: dialogue, win rate, stratified by length, ties half",
    "fig3": "Figure 3: summaries, mutual information (as plotted) and length",
    "fig4": "Figure 4: summaries, win rate, raw, ties as losses",
    "fig5": "Figure 5: diverse principles, win rate against base, raw, ties half",
    "fig7": "Figure 7: dialogue, win rate, no length control, ties half",
    "fig8": "Figure 8: dialogue, win rate, logistic length control (our fit), ties as losses",
    "fig9": "Figure 9: diverse principles, mutual information (as plotted) and length;\n"
            "which files the paper plots is inferred",
}


# ---- panels -> numbers

def _published(figure: str, number: int, panel: dict, archive: Archive, cells: list[dict]) -> list[dict]:
    rows = []
    for label, keys in panel["lines"]:
        keys = {"cot": None, **keys, **panel["keys"]}
        common = {"figure": figure, "panel": number, "series": label, "metric": panel["metric"],
                  "estimator": panel["estimator"], "ties": panel.get("ties"), "baseline": None,
                  "printed": None, **keys}
        if panel["metric"] != "win_rate":
            found = series(archive, panel["metric"], **keys)
        else:
            base = common["baseline"] = keys["model"] if panel["baseline"] == "base" else panel["baseline"]
            found = {e["iteration"]: estimate(archive.verdicts(e), panel["estimator"], panel["ties"])
                     for e in archive.find("verdicts", baseline=base, **keys) if e.get("tables")}
            if panel["baseline"] == "base":
                rows.append(common | {"iteration": 0, "value": 50.0, "source": "chance"})
        for iteration, e in sorted(found.items()):
            row = common | {"iteration": iteration, "value": e.value, "sem": e.sem, "n": e.n,
                            "source": "published record"}
            same = ("subset", "model", "writer", "cot", "baseline", "iteration", "estimator", "ties")
            row["printed"] = next((c["published"] for c in cells if all(c[k] == row[k] for k in same)), None)
            rows.append(row)
    if panel["metric"] != "win_rate" and panel["experiment"] != "exp3":
        rows += _instruct(figure, number, panel, archive)
    return rows


def _instruct(figure: str, number: int, panel: dict, archive: Archive) -> list[dict]:
    """The dashed line(s): mistral-7b-instruct's own value; in experiment 2 both models share one."""
    rows, seen = [], set()
    for _, keys in panel["lines"]:
        keys = {"cot": None, **keys, **panel["keys"]}
        if keys["subset"] in seen:
            continue
        seen.add(keys["subset"])
        if panel["metric"] == "mutual_information":
            writer = keys["writer"] if keys["subset"] == "tldr" else None  # experiment 1 names none
            found = archive.find("mutual_information", subset=keys["subset"], model=INSTRUCT, writer=writer)
            values = [archive.mutual_information(e) for e in found]
        else:
            found = archive.find("verdicts", baseline=INSTRUCT, iteration=0, **keys)
            values = [archive.verdicts(e)[:, 1] for e in found if e.get("tables")]
        for v in values:
            e = metrics.mean(v)
            rows.append({"figure": figure, "panel": number, "series": INSTRUCT, "metric": panel["metric"],
                         "estimator": panel["estimator"], "value": e.value, "sem": e.sem, "n": e.n,
                         "source": "published record", **keys, "model": INSTRUCT})
    return rows


def _fits(r: dict, panel: dict, metric: str) -> bool:
    """Whether a record of ours may stand in this panel: same estimator, tie rule, kind of baseline, CoT."""
    writer, cot = panel["keys"].get("writer"), panel["keys"].get("cot")
    if writer is not None and (r.get("writer") == STRONG) != (writer == STRONG):
        return False  # a writer that is neither of the paper's stands beside the weak one
    if cot is not None and bool(r.get("cot")) != cot:
        return False
    if metric == "mi":
        return r.get("estimator") == panel["estimator"]
    if metric == "length_tokens":
        return True
    own = r.get("baseline") in (r.get("model"), "base", "initial")
    return (r.get("length"), r.get("ties")) == (panel["estimator"], panel["ties"]) and \
        (own if panel["baseline"] == "base" else r.get("baseline") == panel["baseline"])


def _ours(figure: str, number: int, panel: dict, runs: Sequence[Path]) -> list[dict]:
    """Records of our runs that this panel's metric, subset, estimator, tie rule and kind of baseline fit."""
    rows, metric = [], {"mutual_information": "mi"}.get(panel["metric"], panel["metric"])
    subsets = [keys["subset"] for _, keys in panel["lines"]]
    for run in runs:
        path = Path(run) / "metrics.json"
        found = records.read_json(path)
        if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
            raise UserError(f"{path}: expected a list of records")
        for i, r in enumerate(found):
            if (r.get("metric"), r.get("principle")) != (metric, None) or r.get("subset") not in subsets:
                continue
            for field in ("iteration", "value"):
                if type(r.get(field)) not in (int, float):
                    raise UserError(f"{path}: record {i}: field {field}: expected a number, "
                                    f"found {r.get(field)!r}")
            if _fits(r, panel, metric):
                judge = f", judge {r.get('judge')}" if metric == "win_rate" else ""
                by = f", writer {r.get('writer')}" if "writer" in panel["keys"] else ""
                name = f"ours: {r.get('model')}{by}{judge}"
                if len(set(subsets)) > 1:
                    name += f", {r['subset'].replace('_', '-')}"
                rows.append({k: r.get(k) for k in COLUMNS} | {
                    "figure": figure, "panel": number, "series": name, "metric": panel["metric"],
                    "estimator": panel["estimator"], "ties": panel.get("ties"), "printed": None,
                    "source": f"run {'/'.join(Path(run).parts[-2:])}, seed {r.get('seed')}"})
    return rows


def points(archive: Archive, cells: list[dict], runs: Sequence[Path] = ()) -> dict[str, list[dict]]:
    """figure -> the numbers drawn, one row per point, in the order of panels and series."""
    return {figure: [row for i, panel in enumerate(panels) for row in (
        _published(figure, i, panel, archive, cells) + _ours(figure, i, panel, runs))]
        for figure, panels in PANELS.items()}


def differs(row: dict) -> bool:
    """True where the printed value is not what the record gives (for our fit: beyond its tolerance)."""
    slack = TOLERANCE if row["estimator"] == "logistic" else 0.05
    return row.get("printed") is not None and abs(row["printed"] - row["value"]) > slack


# ---- numbers -> pictures

def _panel(ax, panel: dict, rows: list[dict]) -> None:
    if panel["metric"] == "win_rate":
        ax.axhline(50, color=look.GREY, linewidth=0.8, linestyle=":", label="chance")
        initial = " (ours: vs initial model)" if any(r["source"].startswith("run ") for r in rows) else ""
        ax.set(ylim=(0, 100), ylabel=f"win rate vs {panel['baseline']}{initial} (%)")
    else:
        ax.set(ylabel=look.AXES["mean_of_logs" if panel["metric"] == "mutual_information" else panel["metric"]])
    lines = dict.fromkeys((r["series"], r["source"]) for r in rows
                          if r.get("iteration") is not None and r["source"] != "chance")
    names = list(dict.fromkeys(s for s, source in lines if source == "published record"))
    ours = sorted({s for s, source in lines if source != "published record"})  # not by the order of the runs given
    for name, source in lines:
        mine = source != "published record"
        anchor = () if mine else ("chance",)
        here = [r for r in rows if r["series"] == name and r["source"] in (source, *anchor)]
        i = (ours if mine else names).index(name)
        colours, markers = (OUR_COLOURS, OUR_MARKERS) if mine else (look.COLOURS[:2], look.MARKERS[:2])
        colour, marker = colours[i % len(colours)], markers[i % len(markers)]
        shift = 0.05 * (i - 0.5) + (0.03 if mine else 0)  # keeps error bars of equal values apart
        here = sorted(here, key=lambda r: r["iteration"])
        errorbar(ax, [r["iteration"] + shift for r in here],
                 [Estimate(r["value"], r.get("sem"), None, 0) for r in here], name, colour, marker,
                 **({"linestyle": "-.", "linewidth": 0.8, "markersize": 3} if mine else {"linestyle": "-"}))
        for r in filter(differs, here):
            ax.plot([r["iteration"] + shift] * 2, [r["value"], r["printed"]], color=colour, linewidth=0.7,
                    linestyle=":")
            ax.plot(r["iteration"] + shift, r["printed"], marker="o", color=colour,
                    markerfacecolor="white", markersize=6, linestyle="none")
    dashed = [r for r in rows if r.get("iteration") is None]
    for r in dashed:
        colour, label = look.GREY, INSTRUCT
        if len(dashed) > 1:
            colour = look.COLOURS[[k["subset"] for _, k in panel["lines"]].index(r["subset"])]
            label += f", {r['subset']}"
        ax.axhline(r["value"], color=colour, linestyle="--", linewidth=1, label=label)
        ax.axhspan(r["value"] - r["sem"], r["value"] + r["sem"], color=colour, alpha=0.12, linewidth=0)
    if panel["metric"] == "mutual_information":
        c = CONSTITUTIONS[panel["experiment"]]
        ax.axhline(np.log(c), color=look.GREY, linestyle=":", linewidth=0.8, label=f"ceiling of InfoNCE, log {c}")
        if panel["experiment"] == "exp3":  # 2 to 208 nats: a linear axis would hide all but the last points
            ax.set(yscale="log", ylabel="plotted MI (nats, log axis)", ylim=(0.5, 400))
            ax.yaxis.set_major_formatter("{x:g}")
        else:
            ax.set_ylim(bottom=0)
    elif panel["metric"] == "length_tokens":
        ax.set_ylim(bottom=0)
    ax.set(xlabel="iteration", xticks=range(4), xlim=(-0.25, 3.25), title=panel["title"])


def _draw(figure: str, rows: list[dict]) -> Figure:
    panels, lines = PANELS[figure], len(PANELS[figure]) // 2
    drawing, axes = look.subplots(lines, 2, (7.6, 1), squeeze=False)
    axes = axes.ravel()
    for i, (ax, panel) in enumerate(zip(axes, panels)):
        _panel(ax, panel, [r for r in rows if r["panel"] == i])
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    handles = dict(sorted(handles.items(), key=lambda h: isinstance(h[1], Line2D)))  # series come first
    if any(differs(r) for r in rows):
        handles["printed value, where it differs from the record"] = Line2D(
            [], [], color=look.GREY, marker="o", markerfacecolor="white", markersize=6, linestyle="none")
    counts = [r["n"] for r in rows if r.get("n")]
    over = f" over n = {look.span(counts)} items" if counts else ""
    drawing.suptitle(f"{TITLES[figure]}\nbars and bands: ± SEM{over}", fontsize=9)
    columns = 2 if len(handles) == 4 or max(map(len, handles)) > 30 else 3
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    drawing.set_figheight(2.8 * lines + 0.5 + 0.17 * -(-len(handles) // columns))
    return drawing


def draw(archive: Path | None, out: Path, runs: Sequence[Path] = (), *, base_url: str | None = None,
         published: Path = PUBLISHED) -> list[Path]:
    """Write each figure as .csv, .pdf and .png under `out`; `runs` are folders with a metrics.json."""
    cells, entries = load_cells(published / "tables.json"), load_manifest(published / "manifest.json")
    record = Archive(archive_root(archive, base_url=base_url, entries=entries), entries)
    numbers, paths = points(record, cells, runs), []
    with look.style():
        drawings = {figure: _draw(figure, rows) for figure, rows in numbers.items()}
        for figure, rows in numbers.items():
            text = io.StringIO()
            table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows({k: row.get(k) for k in COLUMNS} for row in rows)
            records.write_text(out / f"{figure}.csv", text.getvalue())
            paths += [out / f"{figure}.csv", *look.save(drawings[figure], out / figure)]
    return paths
