"""One look for every figure, of our runs, of the paper and of results/: style, palette, words, and how a file is written.

No torch; matplotlib is loaded when something is drawn. Drawings are `Figure`s, not pyplot's: nothing is to be closed.
"""

import io
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from pathlib import Path

from repro.base.records import write_bytes

# Okabe and Ito: told apart by colour-blind readers. Blue is what stands first (helpful, learned), orange what stands
# beside it (harmless, held out).
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY = "0.4"  # what is no series: limits, chance, models to compare with
COLOURS, MARKERS = (BLUE, ORANGE, GREEN, PURPLE), ("o", "s", "^", "D")
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.markersize": 4, "errorbar.capsize": 2, "savefig.dpi": 150,
}

LABELS = {  # metric -> its name in tables, in their order
    "mi": "MI (nats)", "accuracy_row": "accuracy, rows", "accuracy_col": "accuracy, columns",
    "length_tokens": "length (tokens), judged constitution", "following": "following, judged constitution",
    "steerability": "following, all constitutions", "steerability_change": "change of following, all constitutions",
    "answered": "responses that answer", "win_rate": "win rate (%)",
    "hack_constitution_overlap": "words taken from the constitution", "hack_query_overlap": "words taken from the query",
    "hack_repetition": "repeated trigrams", "position_rate": "answers that prefer the first response",
    "flip_rate": "verdicts that flip with the order", "parsed_share": "items with a verdict"}
MEANINGS = {  # metric -> what it is, in a sentence or two
    "mi": "Mutual information between constitution and response, over all constitutions of a query. infonce: a lower "
          "bound, at most log C for C constitutions, which training raises; symmetric_infonce: the training objective "
          "itself; mean_of_logs: what the paper plots, no bound.",
    "accuracy_row": "How often a constitution's own response is the likeliest under it.",
    "accuracy_col": "How often a response is likeliest under its own constitution.",
    "length_tokens": "Tokens of the response under the judged constitution: of a set that with all principles as they are.",
    "following": "Share of responses that are on a side of a principle, by a program's rule, and still answer the query: "
                 "of a principle under the judged constitution alone, of an antithesis (not_...) under all that hold it. "
                 "(The sides above are over all constitutions that hold them.)",
    "steerability": "Steerability; above: sides of the constitution followed. Share of sides followed over all "
                    "constitutions of a query, each in its own response. A model that hears no constitution follows 0.5 at "
                    "most.",
    "steerability_change": "Steerability less the initial model's, on the same queries.",
    "answered": "Share of responses that answer: not empty, no loop, no recital of the principles, enough words of the "
                "query, English where the query is.",
    "win_rate": "How often the response is judged better than the initial model's; half or loss: what a tie counts; raw, "
                "stratified or logistic: whether and how length is held equal. The rule judge counts sides followed; the "
                "likelihood judge restates the training objective.",
    "hack_constitution_overlap": "Share of the response's content words that are the constitution's: recital.",
    "hack_query_overlap": "Share of the response's content words that are the query's; it falls where the query is lost.",
    "hack_repetition": "Share of three-word sequences that occurred earlier in the response.",
    "position_rate": "How often the judge prefers the response that it is shown first; 0.5 is fair.",
    "flip_rate": "How often the judge's verdict changes when the two responses change places.",
    "parsed_share": "How many judged items have a verdict that could be read."}
AXES = {  # what is drawn -> its axis
    "infonce": "InfoNCE lower bound (nats)", "mean_of_logs": "plotted MI, mean of logs (nats)",
    "length_tokens": "response length (tokens)", "iteration": "iteration (0 = initial model)"}


def said(estimate, digits: int = 2, sign: str = "") -> str:
    """A value with its interval, where it has one; `sign` "+": with the sign of a difference."""
    around = f" [{estimate.ci95[0]:{sign}.{digits}f}, {estimate.ci95[1]:{sign}.{digits}f}]" if estimate.ci95 else ""
    return f"{estimate.value:{sign}.{digits}f}{around}"


def span(values: Collection[int]) -> str:
    """The least to the most of them; one number where they are equal."""
    return " to ".join(str(v) for v in sorted({min(values), max(values)}))


def plain(text: str) -> str:
    """Text of a user or a model for Markdown, as it is: nothing in it marks up the page."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|~!&" else c for c in " ".join(text.split()))


def printable(text: str) -> str:
    """Text of a user or a model for a terminal, on one line: nothing in it moves the cursor."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)) + "\n"


@contextmanager
def style():
    """Draw inside this context, or decorate what draws with it."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def subplots(rows: int, columns: int, size: tuple[float, float], **more):
    """(figure, axes) of a drawing of that width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **more)


@style()
def save(figure, stem: Path) -> list[Path]:
    """`stem`.png and .pdf, each whole or not at all; the same bytes for the same numbers and matplotlib."""
    paths = []
    # PNG first: constrained layout (matplotlib 3.11) goes on at every save from where the one before it left the axes.
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        paths.append(stem.parent / f"{stem.name}.{kind}")  # a judge's name may hold a dot
        write_bytes(paths[-1], buffer.getvalue())
    return paths
