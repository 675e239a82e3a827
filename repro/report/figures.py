"""A run's metrics -> its figures: MI, length, win rate and following by iteration, in the manner of the paper's Figures 2
to 5; each LLM judge's win rate; of a pool, every principle by itself. No torch, no network.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Callable

from repro.judges.standing import standing
from repro.report.look import AXES, COLOURS, GREY, MARKERS, span, style, subplots

SERIES = ("model", "writer", "cot", "subset")  # what tells one line of a figure from another
SECOND = ("harmless", "held_out")  # subsets that are drawn beside another one
PANEL_PRINCIPLES = 4  # more than these are drawn by themselves


def select(metrics: list[dict], **fixed) -> list[dict]:
    return [r for r in metrics if all(r.get(k) == v for k, v in fixed.items())]


def series(metrics: list[dict]) -> list[dict]:
    """The lines of a figure: the combinations of model, writer, chain of thought and subset that have an MI, in the order
    of their looks."""
    return [line for _, line in sorted(_places(metrics).items())]


def looks(metrics: list[dict]) -> list[dict]:
    """Colour and marker of each line of `series`: the same in every figure, whatever the order of the records."""
    return [{"color": COLOURS[n % 4], "marker": MARKERS[(n + n // 4) % 4]} for n in sorted(_places(metrics))]


def _places(metrics: list[dict]) -> dict[int, dict]:
    """Place -> line. The place says what the line is: 0 or 1 by its subset (of posts by who wrote the principles: a model,
    or we by hand), 2 more with chain of thought. Of lines that are alike in these (other models, writers, subsets) each
    goes 2 further than the one before it, by name."""
    lines = {tuple(r[k] for k in SERIES) for r in select(metrics, metric="mi")}
    places: dict[int, dict] = {}
    for line in (dict(zip(SERIES, values)) for values in sorted(lines, key=lambda values: [str(v) for v in values])):
        second = line["writer"] == "hand" if line["subset"] == "tldr" else line["subset"] in SECOND
        place = second + 2 * bool(line["cot"])
        while place in places:
            place += 2
        places[place] = line
    return places


def telling(metrics: list[dict]) -> Callable[[dict], str]:
    """What to call a record's line: the fields that differ between lines, the subset where none does."""
    lines = series(metrics)
    differ = [k for k in SERIES if len({line[k] for line in lines}) > 1] or ["subset"]
    words = {"writer": lambda v: f"writer {v}", "cot": lambda v: "with CoT" if v else "without CoT",
             "subset": lambda v: v.replace("_", " "), "model": str}
    return lambda record: ", ".join(words[k](record[k]) for k in differ)


def judges(metrics: list[dict]) -> list[str]:
    """The judges that gave a win rate, by name."""
    return sorted({r["judge"] for r in metrics if r["metric"] == "win_rate"})


def language_models(metrics: list[dict]) -> list[str]:
    return [j for j in judges(metrics) if j not in ("rule", "likelihood")]


def named(judge: str) -> str:
    return f"{judge} judge" if judge in ("rule", "likelihood") else f"judge {judge}"


def principles(metrics: list[dict]) -> list[str]:
    """The principles whose following was measured, by name."""
    return sorted({r["principle"] for r in select(metrics, metric="following")
                   if r.get("principle") and not r["principle"].startswith("not_")})


def _bar(record: dict) -> tuple[float, float]:
    """(value, half of its bar); without a SEM not a number, for which matplotlib (3.11) draws a point and no bar."""
    return record["value"], math.nan if record["sem"] is None else record["sem"]


def _bare(metrics: list[dict]) -> str:
    return "; n 1: no bar" if any(r["sem"] is None for r in metrics) else ""


@style()
def draw_win_rate(metrics: list[dict], judge: str, title: str):
    """One panel: an LLM judge's win rate by iteration (ties half, raw, mean of both orders), with its standing."""
    figure, axis = subplots(1, 1, (5.6, 4.2))
    rows, tell = select(metrics, metric="win_rate", judge=judge, ties="half", length="raw"), telling(metrics)
    for k, (line, look) in enumerate(zip(series(metrics), looks(metrics))):
        for seed in sorted({r["seed"] for r in rows}):
            found = select(rows, seed=seed, baseline=line["model"], **line)
            if not found:
                continue
            points = sorted((r["iteration"], *_bar(r)) for r in found)
            x, y, e = zip((0, 50, 0), *points)
            axis.errorbar([i + 0.04 * k for i in x], y, e, **look,
                          label=f"{tell(line)}, n {found[0]['n']}, seed {seed}")
    axis.axhline(50, color=GREY, ls=":", lw=1)
    axis.set(title=f"Win rate, judge {judge}, both orders", xlabel=AXES["iteration"], ylim=(0, 103),
             xticks=sorted({r["iteration"] for r in metrics}), ylabel="against the initial model (%), ties half")
    axis.legend(loc="best", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("\n".join(textwrap.wrap(standing(judge), 95)), fontsize=7)
    return figure


@style()
def draw(metrics: list[dict], constitutions: int, title: str):
    """Four panels by iteration: MI, length, win rate against the initial model, following: of all sides where that was
    measured, else of principles. Bars: ± SEM over items.

    With several seeds each is a thin line, their mean a thick one with the mean of their bars. Dashed: another baseline's
    length, and the win rate against it. `constitutions`: C of the bound's limit, log C.
    """
    lines, tell = series(metrics), telling(metrics)
    seeds = sorted({r["seed"] for r in metrics})
    iterations = sorted({r["iteration"] for r in metrics})
    found = judges(metrics)
    judge = next((j for j in ("rule", *found) if j in found and j != "likelihood"), "likelihood")
    figure, panels = subplots(2, 2, (8.6, 7.4))
    axes = panels.flatten()

    def plot(axis, color, marker, style="-", label=None, anchor=None, scale=1.0, shift=0.0, **fixed):
        found = select(metrics, **fixed)
        if not found:
            return
        start = {} if anchor is None else {iterations[0]: (anchor, 0)}
        if len(seeds) > 1:
            for seed in seeds:
                points = start | {r["iteration"]: (scale * r["value"], 0) for r in select(found, seed=seed)}
                axis.plot(*zip(*((i, y) for i, (y, _) in sorted(points.items()))), color=color, lw=0.8, ls=style,
                          alpha=0.4)
        points = dict(start)
        for i in {r["iteration"] for r in found}:
            rows = select(found, iteration=i)
            points[i] = tuple(scale * sum(ends) / len(rows) for ends in zip(*map(_bar, rows)))
        x = sorted(points)
        axis.errorbar([i + shift for i in x], [points[i][0] for i in x], [points[i][1] for i in x], color=color,
                      marker=marker, lw=1.6, ls=style, label=label)

    steered = bool(select(metrics, metric="steerability"))
    shown = [] if steered else principles(metrics)
    shown = shown if len(shown) <= PANEL_PRINCIPLES else [None]
    for k, (line, own) in enumerate(zip(lines, looks(metrics))):
        aside = 0.04 * (k - (len(lines) - 1) / 2)  # so that bars do not hide each other
        look = own | {"label": tell(line), "shift": aside}
        plot(axes[0], **look, metric="mi", estimator="infonce", principle=None, **line)
        plot(axes[1], **look, metric="length_tokens", **line)
        won = {"metric": "win_rate", "judge": judge, "ties": "half", "length": "raw"}
        plot(axes[2], **look, anchor=50, baseline=line["model"], **won, **line)
        for other in sorted({r["baseline"] for r in select(metrics, **won, **line)} - {line["model"]}):
            plot(axes[2], **look | {"label": f"{tell(line)}, against {other}"}, style="--", baseline=other, **won, **line)
        plot(axes[3], **own, label=tell(line), scale=100, shift=aside, metric="steerability", **line)
        for p, principle in enumerate(shown):
            label = f"{principle}, {tell(line)}" if principle else tell(line)
            plot(axes[3], **own, style=("-", "--", ":", "-.")[p % 4], label=label, scale=100,
                 shift=aside + 0.08 * (p - (len(shown) - 1) / 2), metric="following", principle=principle, **line)
    for other in sorted({r["model"] for r in select(metrics, metric="length_tokens")} - {line["model"] for line in lines}):
        rows = select(metrics, metric="length_tokens", model=other)
        axes[1].axhline(sum(r["value"] for r in rows) / len(rows), color=GREY, ls="--", lw=1, label=other)
    limit = math.log(constitutions)
    axes[0].axhline(limit, color=GREY, ls=":", lw=1)
    axes[0].text(iterations[0], 1.02 * limit, f"log {constitutions}, the most possible", va="bottom", fontsize=8,
                 color=GREY)
    axes[0].set(title="Mutual information", ylabel=AXES["infonce"], ylim=(0, limit * 1.15))
    axes[1].set(title="Length, judged constitution", ylabel=AXES["length_tokens"])
    axes[1].set_ylim(0, axes[1].get_ylim()[1] * 1.04)
    axes[2].axhline(50, color=GREY, ls=":", lw=1)
    axes[2].set(title=f"Win rate, {named(judge)}", ylabel="against the initial model (%), ties half", ylim=(0, 103))
    written = any(line["writer"] != "hand" for line in lines)
    axes[3].set(ylim=(0, 103), title="Following, all constitutions" if steered else "Following" if shown == [None] else
                "Following the hand-written principles" if written else "Following, all-positive constitution",
                ylabel="sides of the constitution followed (%)" if steered or shown == [None] else
                "responses that follow the principle (%)")
    if judge in language_models(metrics):
        axes[2].text(0.02, 0.02, "\n".join(textwrap.wrap(standing(judge), 52)), fontsize=6, transform=axes[2].transAxes)
    for axis, metric in zip(axes, ("mi", "length_tokens", "length_tokens", "length_tokens")):
        counts = [", ".join(map(str, sorted({r["n"] for r in select(metrics, metric=metric, iteration=i, principle=None)})))
                  for i in iterations]
        axis.set_xticks(iterations, [f"{i}\nn {n}" if len(set(counts)) > 1 else i for i, n in zip(iterations, counts)])
        axis.set_xlabel(AXES["iteration"])
    if steered and any(not select(metrics, metric="steerability", **line) for line in lines):
        axes[3].text(0.5, 0.02, "not of principles without a rule", fontsize=7, ha="center", transform=axes[3].transAxes)
    if shown and shown != [None]:  # else it would be the legend of all panels again
        axes[3].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=7, handlelength=3.2, ncols=2,
                       columnspacing=1)
    elif not shown and not steered:
        axes[3].text(0.5, 0.5, "NOT RUN: no principle has a rule", ha="center", transform=axes[3].transAxes)
    known = {label: handle for axis in axes[:3] for handle, label in zip(*axis.get_legend_handles_labels())}
    if len(known) > 1:
        figure.legend(known.values(), known, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"{title}\n{_bars(metrics)}", fontsize=9)
    return figure


def _bars(metrics: list[dict]) -> str:
    """What bars and thin lines are, and over how many queries: the fewest to the most of a point."""
    seeds = Counter(line for line, _ in {(tuple(r[k] for k in SERIES), r["seed"]) for r in metrics}).values()
    over = span([r["n"] for r in metrics if not r.get("principle") and not r.get("judge")])
    each = f"; thin: each of {span(seeds)} seeds, thick: their mean" if max(seeds) > 1 else ""
    return f"bars: ± SEM over n = {over} held-out queries{_bare(metrics)}{each}"


@style()
def draw_principles(metrics: list[dict], kinds: dict[str, list[str]], title: str):
    """Every principle of a pool by itself, the initial model (open) and the last iteration (filled): the bound over the
    items that hold it, and how often the principle is followed where it is asked for, and its antithesis where that is.
    Bars: ± SEM over items, of several seeds the mean. `metrics`: of one model, writer and kind of sampling. `kinds`:
    "learned", "held_out" -> names."""
    last = max(r["iteration"] for r in metrics)
    names = [(kind, name) for kind in kinds for name in kinds[kind]]
    figure, axes = subplots(1, 2, (8.6, 1.9 + 0.36 * len(names)), sharey=True)

    def pooled(**fixed):
        """The mean of the seeds, and of their SEMs (they share the items); empty where nothing was measured."""
        rows = select(metrics, **fixed)
        return rows and [sum(ends) / len(rows) for ends in zip(*map(_bar, rows))]

    def bar(axis, y, found, colour, marker, filled, scale=1.0):
        if found:
            axis.errorbar(scale * found[0], y, xerr=scale * found[1], color=colour, marker=marker, ms=5, capsize=0, lw=1,
                          mfc=colour if filled else "white")

    for y, (kind, name) in enumerate(names):
        if y % 2:
            for axis in axes:
                axis.axhspan(y - 0.5, y + 0.5, color="0.95", zorder=0)
        for iteration, filled, up in ((0, False, -0.14), (last, True, 0.14)):
            fixed = {"iteration": iteration, "subset": kind}
            bar(axes[0], y + up, pooled(metric="mi", estimator="infonce", principle=name, **fixed),
                COLOURS[kind == "held_out"], "o", filled)
            for side, aside, colour, marker in ((name, -0.2, COLOURS[2], "^"), (f"not_{name}", 0.2, COLOURS[3], "v")):
                found = pooled(metric="following", principle=side, **fixed)
                bar(axes[1], y + aside + 0.6 * up, found, colour, marker, filled, 100)
        if not select(metrics, metric="following", principle=name):
            axes[1].text(50, y, "no rule", ha="center", va="center", fontsize=7, color="0.45")
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for _, name in names])
    axes[0].invert_yaxis()
    axes[0].axvline(math.log(2), color=GREY, ls=":", lw=1)
    axes[0].set(xlabel="InfoNCE lower bound, nats\n(dotted: log 2, the most possible)", title="Mutual information")
    axes[0].set_xlim(left=min(0, axes[0].get_xlim()[0]))
    axes[1].set(xlabel="responses that follow the side they were asked for (%)", title="Following", xlim=(-4, 104))
    line = len(kinds["learned"]) - 0.5
    for axis in axes:
        axis.axhline(line, color="0.3", lw=0.8)
    from matplotlib.lines import Line2D

    def key(colour, marker, label, filled=True):
        return Line2D([], [], color=colour, marker=marker, ls="none", mfc=colour if filled else "white", label=label)

    figure.legend(handles=[key(COLOURS[0], "o", "learned"), key(COLOURS[1], "o", "held out"),
                           key(COLOURS[2], "^", "principle"), key(COLOURS[3], "v", "antithesis"),
                           key(GREY, "o", "initial model", False), key(GREY, "o", f"iteration {last}")],
                  loc="outside lower center", ncols=6, fontsize=7)
    seeds = len({r["seed"] for r in metrics})
    figure.suptitle(f"{title}\nbars: ± SEM over items{_bare(metrics)}"
                    f"{f'; mean of {seeds} seeds' if seeds > 1 else ''}", fontsize=9)
    return figure
