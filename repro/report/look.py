"""One look for every figure, of our runs, of the paper and of results/: style, palette, words, and how a file is written.

No torch; matplotlib is loaded when something is drawn. Drawings are `Figure`s, not pyplot's: nothing is to be closed.
"""

import io
import math
from contextlib import contextmanager
from pathlib import Path

from repro.base.records import write_bytes

# Okabe and Ito: told apart by colour-blind readers. Blue is what stands first (helpful, learned), orange what stands
# beside it (harmless, held out).
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY = "#666666"  # what is no series: limits, chance, models to compare with
COLOURS, MARKERS = (BLUE, ORANGE, GREEN, PURPLE), ("o", "s", "^", "D")
WIDTH = 6.8  # inches, two panels: as wide as a page of paper, and texts of 8 points can be read on a phone
STYLE = {
    "font.size": 8.5, "axes.titlesize": 9.5, "axes.labelsize": 8, "legend.fontsize": 8, "figure.titlesize": 9.5,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "errorbar.capsize": 2.0, "axes.grid": True, "axes.axisbelow": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.5, "savefig.dpi": 170, "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}

LABELS = {  # metric -> its name in tables, in their order
    "mi": "MI (nats)", "accuracy_row": "accuracy, rows", "accuracy_col": "accuracy, columns",
    "length_tokens": "length (tokens)", "following": "following", "win_rate": "win rate (%)",
    "hack_constitution_overlap": "words taken from the constitution", "hack_query_overlap": "words taken from the query",
    "hack_repetition": "repeated trigrams", "position_rate": "answers that prefer the first response",
    "flip_rate": "verdicts that flip with the order", "parsed_share": "items with a verdict"}
AXES = {  # what is drawn -> its axis
    "infonce": "InfoNCE lower bound (nats)", "mean_of_logs": "plotted MI, mean of logs (nats)",
    "length_tokens": "response length (tokens)", "iteration": "iteration (0 = initial model)"}


@contextmanager
def style():
    """Draw inside this context, or decorate what draws with it."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def subplots(rows: int, columns: int, height: float, **more):
    """(figure, axes) of a drawing, `height` inches high without its legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, **more)


def legend(figure, handles: dict) -> None:
    """One legend for all panels, below them, for which the drawing grows: label -> what is drawn."""
    columns = 2 if len(handles) == 4 or max(map(len, handles)) > 30 else 3
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(handles) / columns))


@style()
def save(figure, stem: Path) -> list[Path]:
    """`stem`.png and .pdf, each whole or not at all; the same bytes for the same numbers and matplotlib."""
    paths = []
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        paths.append(stem.parent / f"{stem.name}.{kind}")  # a judge's name may hold a dot
        write_bytes(paths[-1], buffer.getvalue())
    return paths
