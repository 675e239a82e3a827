"""A run's files -> its figure (in the manner of the paper's Figure 2) and its page; and the committed copy of both.

No torch, no network, nothing but the files of the run: a report can be made again at any time. Text of users and
models is escaped. Responses under a private antithesis (not harmless) are never shown.
"""

import base64
import html
import io
import math
import textwrap
from pathlib import Path

from repro.admission import standing
from repro.records import UserError, make_folder, read_json, read_jsonl, write_bytes, write_json, write_text

SHOWN_QUERIES = 12
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = ("o", "s", "^", "D")


def select(metrics: list[dict], **fixed) -> list[dict]:
    return [r for r in metrics if all(r.get(k) == v for k, v in fixed.items())]


def judges(metrics: list[dict]) -> list[str]:
    """The judges that gave a win rate."""
    return list(dict.fromkeys(r["judge"] for r in metrics if r["metric"] == "win_rate"))


def language_models(metrics: list[dict]) -> list[str]:
    return [j for j in judges(metrics) if j not in ("rule", "likelihood")]


def _named(judge: str) -> str:
    return f"{judge} judge" if judge in ("rule", "likelihood") else f"judge {judge}"


# ---- figure

def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.frameon": False, "svg.hashsalt": "repro"})
    return plt


def draw_win_rate(metrics: list[dict], judge: str, title: str):
    """One panel: an LLM judge's win rate by iteration (ties half, raw, mean of both orders), with its standing."""
    figure, axis = _pyplot().subplots(figsize=(5.6, 4.2), layout="constrained")
    rows = select(metrics, metric="win_rate", judge=judge, ties="half", length="raw")
    for k, subset in enumerate(dict.fromkeys(r["subset"] for r in rows)):
        for seed in sorted({r["seed"] for r in rows}):
            points = sorted((r["iteration"], r["value"], r["sem"] or 0) for r in select(rows, subset=subset, seed=seed))
            x, y, e = zip((0, 50, 0), *points)
            axis.errorbar([i + 0.04 * k for i in x], y, e, color=COLOURS[k % 4], marker=MARKERS[k % 4], ms=4, capsize=2,
                          label=f"{subset} queries, n {select(rows, subset=subset, seed=seed)[0]['n']}, seed {seed}")
    axis.axhline(50, color="0.4", ls=":", lw=1)
    axis.set(title=f"Win rate, judge {judge}, both orders", xlabel="iteration (0 = initial model)", ylim=(0, 103), xticks=x,
             ylabel="against the initial model (%), ties half")
    axis.legend(loc="best", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("\n".join(textwrap.wrap(standing(judge), 95)), fontsize=7)
    return figure


def draw(metrics: list[dict], constitutions: int, title: str):
    """Four panels by iteration: MI, length, win rate against the initial model, following. Bars: ± SEM over queries.

    With several seeds each is a thin line, their mean a thick one with the mean of their bars.
    """
    plt = _pyplot()
    subsets = list(dict.fromkeys(r["subset"] for r in metrics))
    seeds = sorted({r["seed"] for r in metrics})
    iterations = sorted({r["iteration"] for r in metrics})
    principles = list(dict.fromkeys(
        r["principle"] for r in select(metrics, metric="following") if not r["principle"].startswith("not_")))
    found = judges(metrics)
    judge = next((j for j in ("rule", *found) if j in found and j != "likelihood"), "likelihood")
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")

    def lines(axis, colour, marker, style="-", label=None, anchor=None, scale=1.0, shift=0.0, **fixed):
        found = select(metrics, **fixed)
        if not found:
            return
        start = {} if anchor is None else {iterations[0]: (anchor, 0)}
        if len(seeds) > 1:
            for seed in seeds:
                points = start | {r["iteration"]: (scale * r["value"], 0) for r in select(found, seed=seed)}
                axis.plot(*zip(*((i, y) for i, (y, _) in sorted(points.items()))), color=colour, lw=0.8, ls=style,
                          alpha=0.4)
        points = dict(start)
        for i in {r["iteration"] for r in found}:
            rows = select(found, iteration=i)
            points[i] = tuple(scale * sum(r[k] or 0 for r in rows) / len(rows) for k in ("value", "sem"))
        x = sorted(points)
        axis.errorbar([i + shift for i in x], [points[i][0] for i in x], [points[i][1] for i in x], color=colour,
                      marker=marker, ms=4, lw=1.6, ls=style, capsize=2, label=label)

    for k, subset in enumerate(subsets):
        aside = 0.04 * (k - (len(subsets) - 1) / 2)  # so that bars do not hide each other
        look = {"colour": COLOURS[k], "marker": MARKERS[k], "label": f"{subset} queries", "shift": aside}
        lines(axes[0], **look, metric="mi", estimator="infonce", subset=subset)
        lines(axes[1], **look, metric="length_tokens", subset=subset)
        lines(axes[2], **look, anchor=50, metric="win_rate", judge=judge, ties="half", length="raw",
              subset=subset)
        for p, principle in enumerate(principles):
            lines(axes[3], COLOURS[k], MARKERS[k], ("-", "--", ":", "-.")[p % 4], f"{principle}, {subset}", scale=100,
                  shift=aside + 0.08 * (p - (len(principles) - 1) / 2), metric="following", principle=principle,
                  subset=subset)
    limit = math.log(constitutions)
    axes[0].axhline(limit, color="0.4", ls=":", lw=1)
    axes[0].text(iterations[0], limit, f" log {constitutions} (the most possible)", va="bottom", fontsize=8, color="0.3")
    axes[0].set(title="Mutual information", ylabel="InfoNCE lower bound (nats)", ylim=(0, limit * 1.12))
    axes[1].set(title="Length", ylabel="response length (tokens)")
    axes[1].set_ylim(bottom=0)
    axes[2].axhline(50, color="0.4", ls=":", lw=1)
    axes[2].set(title=f"Win rate, {_named(judge)}", ylabel="against the initial model (%), ties half", ylim=(0, 103))
    axes[3].set(title="Following, all-positive constitution", ylabel="responses that follow the principle (%)",
                ylim=(0, 103))
    if judge in language_models(metrics):
        axes[2].text(0.02, 0.02, "\n".join(textwrap.wrap(standing(judge), 52)), fontsize=6, transform=axes[2].transAxes)
    for axis in axes:
        axis.set_xticks(iterations)
        axis.set_xlabel("iteration (0 = initial model)")
    axes[0].legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    if principles:
        axes[3].legend(loc="best", fontsize=7, handlelength=3.2)
    else:
        axes[3].text(0.5, 0.5, "NOT RUN: the principles have no rule", ha="center", transform=axes[3].transAxes)
    bars = "bars: ± SEM over queries"
    if len(seeds) > 1:
        bars += f"; thin: each of {len(seeds)} seeds, thick: their mean"
    figure.suptitle(f"{title} ({bars})", fontsize=10)
    return figure


def save_figure(figure, folder: Path, name: str = "iterations") -> None:
    """folder/<name>.png and .pdf, byte-stable for the same numbers and matplotlib."""
    import matplotlib.pyplot as plt

    for kind in ("png", "pdf"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150,
                       metadata={"CreationDate": None} if kind == "pdf" else {"Software": None})
        write_bytes(folder / f"{name}.{kind}", buffer.getvalue())
    plt.close(figure)


# ---- page

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0; width: 100% }}
th, td {{ border-bottom: 1px solid #ddd; padding: .35em .6em; text-align: left; vertical-align: top }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.responses td {{ font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }}
.responses {{ table-layout: fixed }} .responses th:first-child {{ width: 6em }} img {{ max-width: 100% }}
.note {{ color: #555 }}</style>
<h1>{title}</h1>{body}</html>
"""


def _interval(row: dict, digits: int) -> str:
    if row["ci95"] is None:
        return f"{row['value']:.{digits}f}"
    return f"{row['value']:.{digits}f} <span class=note>[{row['ci95'][0]:.{digits}f}, {row['ci95'][1]:.{digits}f}]</span>"


LABELS = {"mi": "MI (nats)", "accuracy_row": "accuracy, rows", "accuracy_col": "accuracy, columns",
          "length_tokens": "length (tokens)", "following": "following", "win_rate": "win rate (%)",
          "hack_constitution_overlap": "words taken from the constitution",
          "hack_query_overlap": "words taken from the query",
          "hack_repetition": "repeated trigrams",
          "position_rate": "answers that prefer the first response", "flip_rate": "verdicts that flip with the order",
          "parsed_share": "items with a verdict"}


def _table(metrics: list[dict], seed: int) -> str:
    rows, mine = [], select(metrics, seed=seed)
    fields = ("metric", "subset", "estimator", "judge", "ties", "length", "principle")
    keys = dict.fromkeys(tuple(r.get(f) for f in fields)
                         for r in sorted(mine, key=lambda r: list(LABELS).index(r["metric"])))
    iterations = sorted({r["iteration"] for r in mine})
    for metric, subset, estimator, judge, ties, length, principle in keys:
        key = (metric, subset, estimator, judge, ties, length, principle)
        found = {r["iteration"]: r for r in mine if key == tuple(r.get(f) for f in fields)}
        what = ", ".join(filter(None, (estimator, judge and _named(judge), ties and f"ties {ties}", length, principle)))
        digits = 1 if metric in ("length_tokens", "win_rate") else 3
        cells = "".join(f"<td class=n>{_interval(found[i], digits) if i in found else ''}</td>" for i in iterations)
        n = next(iter(found.values()))["n"]
        rows.append(f"<tr><td>{LABELS[metric]}{': ' + html.escape(what) if what else ''}</td><td>{html.escape(subset)}"
                    f"</td>{cells}<td class=n>{n}</td></tr>")
    head = "".join(f"<th>iteration {i}</th>" for i in iterations)
    return f"<table><tr><th>value [95 % interval]</th><th>queries</th>{head}<th>n</th></tr>{''.join(rows)}</table>"


def _responses(folder: Path, record: dict) -> str:
    """Side by side for the first everyday held-out queries: rows are iterations, columns constitutions."""
    constitutions = read_json(folder / "constitutions.json")
    shown = [c["id"] for c in constitutions["constitutions"] if not c["private"]]
    everyday = record["config"]["data"]["subsets"][0]
    queries = [row for _, row in read_jsonl(folder / "queries.jsonl")
               if row["split"] == record["config"]["data"]["evaluation_split"] and row["subset"] == everyday]
    texts = {}
    for iteration in range(record["config"]["iterations"] + 1):
        for _, row in read_jsonl(folder / f"responses/evaluation-{iteration}.jsonl"):
            mark = "" if row["finished"] else " […]"
            texts[row["query"], row["constitution"], iteration] = row["text"] + mark
    parts = []
    for query in queries[:SHOWN_QUERIES]:
        head = "".join(f"<th>{html.escape(id)}</th>" for id in shown)
        rows = "".join(
            f"<tr><td>{'initial' if i == 0 else f'iteration {i}'}</td>"
            + "".join(f"<td>{html.escape(texts[query['id'], id, i])}</td>" for id in shown) + "</tr>"
            for i in range(record["config"]["iterations"] + 1))
        parts.append(f"<h3>{html.escape(query['text'])}</h3><table class=responses><tr><th></th>{head}</tr>{rows}</table>")
    left_out = len(constitutions["constitutions"]) - len(shown)
    note = f" {left_out} constitutions are left out: their responses stay in the run directory." if left_out else ""
    return (f"<h2>What each iteration answers</h2><p class=note>Held-out {html.escape(everyday)} queries, greedy, at most "
            f"{record['config']['sampling']['max_new_tokens']} tokens ([…] marks a response cut there).{note}</p>"
            + "".join(parts))


def _facts(records: list[dict]) -> str:
    record = records[0]
    config, train = record["config"], record["config"]["train"]
    seconds = ", ".join(f"seed {r['config']['seed']}: {sum(s['seconds'] for s in r['stages'].values()) / 60:.1f} min"
                        for r in records)
    lines = [
        f"Model {config['model']['label']}; constitutions {config['constitutions']} ({config['writer']}-written); "
        f"queries {Path(config['data']['source']).name}.",
        f"Training: {train['dose']}, {train['optimizer']}, learning rate {train['learning_rate']:g}, "
        f"{train['batch_size']} queries a step, {train['batches']} steps in iteration 1 and "
        f"{train['batches_increment']} more in each later one, {train['precision']}.",
        f"Measured on {record['device']}, {record['threads']} threads, torch {record['packages']['torch']}; {seconds}; "
        f"config {record['config_hash'][:12]}, commit {(record['commit'] or 'unknown')[:12]}.",
        "NOT RUN: " + ("; ".join(record["not_run"]) or "nothing") + "."]
    if config["profile"] == "mini":
        lines.insert(0, "A mini run: its own model, principles and queries. None of these numbers is the paper's.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _principles(folder: Path) -> str:
    rows = "".join(f"<tr><td>{html.escape(p['name'])}</td><td>{html.escape(p['text'])}</td>"
                   f"<td>{html.escape(p['antithesis'])}</td><td>{html.escape(p['rule'] or 'none')}</td></tr>"
                   for p in read_json(folder / "constitutions.json")["principles"])
    return f"<table><tr><th></th><th>principle</th><th>antithesis (not_...)</th><th>rule</th></tr>{rows}</table>"


def _page_judges(metrics: list[dict], figures: Path) -> str:
    """Each LLM judge's figure, with its standing beneath."""
    return "".join(
        f'<p><img alt="win rate by iteration, judge {html.escape(j)}" style="max-width:36em" src="data:image/png;base64,'
        f'{base64.b64encode((figures / f"win_rate-{j}.png").read_bytes()).decode()}"></p>'
        f"<p class=note>{html.escape(standing(j))}</p>" for j in language_models(metrics))


def write_page(path: Path, folders: list[Path], metrics: list[dict], image: Path) -> None:
    """The page of one run, or of the same experiment under several seeds (responses of the first)."""
    records = [read_json(folder / "run.json") for folder in folders]
    config = records[0]["config"]
    title = f"{config['name']}, profile {config['profile']}"
    data = base64.b64encode(image.read_bytes()).decode()
    body = [_facts(records), _principles(folders[0]), f'<p><img alt="MI, length, win rate and following by iteration" '
            f'src="data:image/png;base64,{data}"></p>', _page_judges(metrics, image.parent)]
    body.append(_responses(folders[0], records[0]))
    body.append("<h2>Every value</h2>")
    for record in records:
        seed = record["config"]["seed"]
        body.append(f"<details{' open' if len(records) == 1 else ''}><summary>seed {seed}</summary>"
                    f"{_table(metrics, seed)}</details>")
    write_text(path, PAGE.format(title=html.escape(title), body="".join(body)))


def report_figures(folder: Path) -> list[str]:
    """The figures of a run's report: one of all measures, one of each LLM judge's win rate."""
    names = ["iterations", *(f"win_rate-{j}" for j in language_models(read_json(folder / "metrics.json")))]
    return [f"figures/{name}.{kind}" for name in names for kind in ("png", "pdf")]


def _save_figures(metrics: list[dict], constitutions: int, title: str, folder: Path) -> None:
    save_figure(draw(metrics, constitutions, title), folder)
    for judge in language_models(metrics):
        save_figure(draw_win_rate(metrics, judge, title), folder, f"win_rate-{judge}")


def write_report(folder: Path) -> None:
    """figures/ and report.html of one run."""
    metrics, record = read_json(folder / "metrics.json"), read_json(folder / "run.json")
    count = len(read_json(folder / "constitutions.json")["constitutions"])
    config = record["config"]
    title = f"{config['name']}, {config['profile']}: {config['model']['label']}, not the paper's run" \
        if config["profile"] == "mini" else f"{config['name']}: {config['model']['label']}"
    _save_figures(metrics, count, title, folder / "figures")
    write_page(folder / "report.html", [folder], metrics, folder / "figures/iterations.png")


def _without_places(record: dict) -> dict:
    """The record with the names, not the folders, of the files it read: those are one machine's."""
    config = record["config"]
    return record | {"config": config | {
        "constitutions": Path(config["constitutions"]).name,
        "data": config["data"] | {"source": Path(config["data"]["source"]).name},
        "model": config["model"] | {"name": config["model"]["label"]}}}


def publish(folders: list[Path], results: Path, *, page: bool = True) -> Path:
    """Copy runs of one experiment (one seed each) to results/<experiment>/<profile>: numbers, figure, page.

    `page` False leaves out the page, which shows responses: for queries that are not ours to print.
    Raises UserError where runs differ in more than their seed, or one is unfinished.
    """
    records, metrics = [], []
    for folder in folders:
        if not (folder / "metrics.json").is_file():
            raise UserError(f"{folder}: no metrics.json; only a finished run can be published")
        records.append(read_json(folder / "run.json"))
        metrics += read_json(folder / "metrics.json")
    first = records[0]["config"]
    for folder, record in zip(folders, records):
        if record["config"] | {"seed": None} != first | {"seed": None} or record["inputs"] != records[0]["inputs"]:
            raise UserError(f"{folder}: its config differs from {folders[0]}'s in more than the seed")
    if len({r["config"]["seed"] for r in records}) < len(records):
        raise UserError("the runs to publish must have different seeds")
    out = make_folder(results / first["name"] / first["profile"])
    count = len(read_json(folders[0] / "constitutions.json")["constitutions"])
    title = f"{first['name']}, {first['profile']}: {first['model']['label']}"
    _save_figures(metrics, count, title + (", not the paper's run" if first["profile"] == "mini" else ""), out / "figures")
    write_json(out / "metrics.json", metrics)
    write_json(out / "constitutions.json", read_json(folders[0] / "constitutions.json"))
    for record in records:
        write_json(out / f"run-seed-{record['config']['seed']}.json", _without_places(record))
    if page:
        write_page(out / "report.html", folders, metrics, out / "figures/iterations.png")
    return out
