"""Records of a comparison of objectives (repro/studies/compare.py), one a seed -> its page (Markdown) and figures.

A value is of one held-out query, over whose items, of a pool, it is averaged.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repro.base import metrics
from repro.base.metrics import Estimate
from repro.base.records import UserError, read_json, write_text
from repro.base.training import OBJECTIVES
from repro.report import look

MEASURES = {  # name -> what it is, in words; the least and the most that a query's value can be
    "bound": ("InfoNCE bound on the mutual information of constitution and response, nats", None),
    "steerability": ("sides of the constitutions followed, by rule, over all constitutions, 0 to 1", (0, 1)),
    "answers": ("responses that answer, over all constitutions, 0 to 1", (0, 1)),
    "following": ("sides followed under the all-positive constitution, 0 to 1", (0, 1)),
    "following_bare": ("the same sides followed without a constitution in the prompt, 0 to 1", (0, 1)),
    "following_contrary": ("the same, under it, where the user's last sentence asks for the opposite, 0 to 1", (0, 1)),
    "length": ("tokens of a response, over all constitutions", None),
    "initial_logprob": ("mean log-prob a token of the responses under the initial model, no constitution, nats", None),
    "distinct_words": ("different words among the words of a response, 0 to 1", (0, 1)),
    "repetition": ("repeated word trigrams among those of a response, 0 to 1", (0, 1)),
    "query_words": ("words taken from the query among the content words of a response, 0 to 1", (0, 1))}
AMONG = "sides followed by a response that answers, on average, 0 to 1: steerability divided by answers"
SHOWN = {"bound": "bound, nats", "steerability": "steerability", "among": "among answers", "answers": "answers",
         "following": "followed", "following_bare": "without it",
         "following_contrary": "against the user", "initial_logprob": "log-prob, initial model", "length": "tokens",
         "distinct_words": "distinct words", "repetition": "repetition", "query_words": "words of the query"}
BASE = "sami"
SPEAKS = 0.75  # of the share of a query's words in the initial model's answers: with less, answers say nothing of it
TOLD = {"steerability": "steerability", "among": "following among responses that answer",
        "following_bare": "following without a constitution",
        "initial_logprob": "log-prob under the initial model", "query_words": "the share of the query's words"}


ALIKE = ("experiment", "profile", "model", "iterations", "counted", "rates", "train", "queries", "constitutions")


def read(folder: Path, stem: str) -> list[dict]:
    """The records of an experiment's seeds. Raises UserError where they are not of one configuration."""
    found = [read_json(path) for path in sorted(folder.glob(f"{stem}-seed-*.json"))]
    for record in found[1:]:
        _alike(found[0], record, folder)
    return found


def _whole(records: list[dict], folder: Path) -> None:
    """Raise UserError where a record lacks a measure, as one of an older version does."""
    for record in records:
        for label in ("initial", *record["objectives"]):
            if missing := MEASURES.keys() - _of(record, label).keys():
                raise UserError(f"{folder}: seed {record['seed']}, {label}: an older version left it without "
                                f"{', '.join(sorted(missing))}; the same `repro compare` adds that from what is there")


def _of(record: dict, label: str) -> dict[str, list[float | None]]:
    """Measure -> a value a query; `initial`: of the initial model."""
    return record["initial"] if label == "initial" else record["objectives"][label]["values"]


def check(folder: Path, about: dict) -> None:
    """Raise UserError where a comparison that is to begin could not stand beside the records that are there."""
    for record in read(folder, about["experiment"]):
        _alike(record, about, folder)


def _alike(record: dict, other: dict, folder: Path) -> None:
    for key in ALIKE:
        if key in other and record.get(key) != other[key]:
            raise UserError(f"{folder}: there is a comparison of {record['experiment']}, seed {record['seed']}, with other "
                            f"{key} ({str(record.get(key))[:60]}, not {str(other[key])[:60]}); choose another --out, or "
                            "delete it")


def estimate(name: str, values: Sequence[Sequence[float]]) -> Estimate:
    """Of one measure the mean over seeds and queries [seed][query]; its interval is about the queries, over whose seeds the
    values are averaged first."""
    if name in MEASURES and MEASURES[name][1]:
        return metrics.share(_over_seeds(values))
    return metrics.mean(_over_seeds(values), most=1 if name == "among" else np.inf)


def difference(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]], *, draws: int = 2000) -> Estimate:
    """Of two objectives [seed][query], on the same queries and seeds: paired bootstrap over queries, whose seeds stay
    together."""
    return metrics.paired_bootstrap(_over_seeds(values), _over_seeds(others), draws=draws)


def _over_seeds(values: Sequence[Sequence[float | None]]) -> np.ndarray:
    """[query], without those of which nothing is known, which are the same of all seeds and objectives."""
    return np.array([np.mean(of) for of in zip(*values) if None not in of])


def _values(records: list[dict], label: str, name: str) -> list[list[float]]:
    """[seed][query]. "among", a ratio of two means, as values whose mean it is; none where no response answers."""
    found = [_of(record, label) for record in records]
    if name != "among":
        return [values[name] for values in found]
    ruled = [q for q, of in enumerate(zip(*(values["steerability"] for values in found))) if None not in of]
    followed, answered = (np.mean([[values[of][q] for q in ruled] for values in found], axis=0)
                          for of in ("steerability", "answers"))
    return [metrics.of_ratio(followed, answered).tolist()] if answered.any() else []


def _difference(records: list[dict], label: str, name: str, base: str = BASE) -> Estimate | None:
    """None where one of the two has no value."""
    ours, theirs = (_values(records, each, name) for each in (label, base))
    return difference(ours, theirs) if ours and theirs else None


def _cell(records: list[dict], label: str, name: str, base: str | None = None) -> str:
    """A value, or its difference to that of `base`, with its interval."""
    values, digits = _values(records, label, name), 1 if name == "length" else 2
    if base is None:
        return look.said(estimate(name, values), digits) if values else "none answers"
    apart = _difference(records, label, name, base)
    return look.said(apart, digits, "+") if apart else "none answers"


def _labels(records: list[dict]) -> list[str]:
    """What all seeds have, in the order of OBJECTIVES. Raises UserError where that is nothing."""
    found = [label for label in records[0]["objectives"] if all(label in r["objectives"] for r in records)]
    if not found:
        raise UserError(f"{records[0]['experiment']}: its seeds have no objective in common, so nothing can be set side "
                        "by side; give the same --objectives for all")
    return sorted(found, key=[*OBJECTIVES, *found].index)


def _apart(records: list[dict], labels: list[str], name: str, base: str) -> str:
    """Of which objectives a measure differs from `base`'s, in words."""
    found = {label: _difference(records, label, name, base) for label in labels}
    found = {label: d for label, d in found.items() if d and not d.ci95[0] <= 0 <= d.ci95[1]}
    ups, downs = (", ".join(f"{label} ({d.value:+.2f})" for label, d in found.items() if (d.value > 0) == up)
                  for up in (True, False))
    said = [f"{word} for {which}" for word, which in (("rises", ups), ("falls", downs)) if which]
    return f"{TOLD[name]} " + (" and ".join(said) if said else "differs for none by more than its 95 % interval") + "."


def in_words(records: list[dict]) -> str:
    """What came out, in one paragraph: which objectives differ from SAMI's in following and at which cost."""
    labels = [label for label in _labels(records) if label != BASE]
    steer = {label: estimate("steerability", _values(records, label, "steerability")) for label in _labels(records)}
    start = estimate("steerability", _values(records, "initial", "steerability"))
    top = max(steer, key=lambda label: steer[label].value)
    parts = [f"The initial model follows {start.value:.2f} of the sides; the highest is {steer[top].value:.2f} ({top})"
             + (f", SAMI's objective has {steer[BASE].value:.2f}." if BASE in steer else "."),
             "Against the initial model, " + _apart(records, [*steer], "steerability", "initial")]
    if BASE in steer and labels:
        parts += [f"Against SAMI's objective, {_apart(records, labels, name, BASE)}" for name in TOLD]
    return " ".join(parts)


def write_page(folder: Path, stem: str) -> Path:
    """`folder`/<stem>.md and its figures, of all seeds there."""
    records = read(folder, stem)
    _whole(records, folder)
    first, labels = records[0], _labels(records)
    rows = [[label, *(_cell(records, label, name) for name in SHOWN)] for label in ("initial", *labels)]
    apart = {base: [[label, *(_cell(records, label, name, base) for name in SHOWN)] for label in labels if label != base]
             for base in ("initial", BASE) if base in ("initial", *labels)}
    tries = [[label, f"{rate:g}", *(", ".join("failed" if t is None else f"{t[name]:.2f}"
                                              for t in _tries(records, label, rate)) for name in TRIED),
              f"{sum(r['objectives'][label]['learning_rate'] == rate for r in records)} of {len(records)}"]
             for label in labels for rate in first["rates"]]
    seeds = ", ".join(str(r["seed"]) for r in records)
    queries, constitutions, tuned = len(first["queries"]), first["constitutions"], first["initial_development"]["n"]
    grid, own = ", ".join(f"{r:g}" for r in first["rates"]), " in iteration 1, on its own later" * (first["iterations"] > 1)
    best = ", ".join(f"{whose} ({drift:.2f}, {steer:.2f})" for drift, steer, whose in _frontier(records))
    ends = {first["rates"][0], first["rates"][-1]} if len(first["rates"]) > 1 else ()
    edges = {label: sum(r["objectives"][label]["learning_rate"] in ends for r in records) for label in labels}
    beyond = ", ".join(f"{label} ({count})" for label, count in edges.items() if count)
    beyond = f" At an edge of the grid, beyond which a better rate may lie (in how many seeds): {beyond}." if beyond else ""
    fewer = [[label, f"{k} of {first['train']['batches']}", *(", ".join(f"{t[name]:.2f}" for t in tries) for name in TRIED)]
             for label in labels for k, tries in _steps(records, label)]
    text = f"""# Objectives on the same pairs: {stem}

{in_words(records)}

![Steerability against the log-prob of the text under the initial model; following among responses that answer against how
many do; following against the user against following without a constitution]({stem}.png)

Seeds: {seeds}. Held-out queries: {queries}, under {constitutions} constitutions. Iterations: {first['iterations']}.
All objectives train on the same sampled pairs{own}, from the same weights, for the same steps. The learning rate
of each was chosen among {grid} by steerability on {tuned} development queries, among those whose answers keep
{SPEAKS:.0%} of the share of the query's words in the initial model's. In brackets 95 % intervals over queries, whose seeds
are averaged first. What counts: {first.get('counted', 'sides followed by rule alone, whether or not the text answers')}.
Model {first['model']}, profile {first['profile']}.

""" + look.table(["objective", *SHOWN.values()], rows) + """
""" + "".join(
        f"- {SHOWN[name]}: {MEASURES[name][0] if name in MEASURES else AMONG}\n" for name in SHOWN) + "".join(f"""
## Differences to {"the initial model" if base == "initial" else base}

On the same queries and seeds, by paired bootstrap over queries; no correction for the number of comparisons.

""" + look.table(["objective", *SHOWN.values()], lines) for base, lines in apart.items() if lines) + f"""
## Every try

Development queries, one number a seed. The frontier, what nothing else beats in both, the likelihood of the text under
the initial model and steerability: {best}.{beyond}

![Bound, steerability and log-prob under the initial model against the learning rate; steerability against that log-prob,
from the initial model on, with the frontier]({stem}-dose.png)

""" + look.table(["objective", "learning rate", *(SHOWN[name] for name in TRIED), "chosen"], tries)
    if fewer:
        text += """
## Fewer steps

The chosen rate again, trained for fewer steps; development queries, one number a seed.

""" + look.table(["objective", "steps", *(SHOWN[name] for name in TRIED)], fewer)
    write_text(folder / f"{stem}.md", text)
    look.save(_overview(records), folder / stem)
    look.save(_dose(records), folder / f"{stem}-dose")
    return folder / f"{stem}.md"


TRIED = ("bound", "steerability", "initial_logprob", "query_words")


def _tries(records: list[dict], label: str, rate: float) -> list[dict | None]:
    """Of each seed; None for one that failed."""
    return [None if "failed" in t else t for r in records for t in r["objectives"][label]["tries"]
            if t["learning_rate"] == rate]


def _steps(records: list[dict], label: str) -> list[tuple[int, list[dict]]]:
    """(fewer steps than all, its values of each seed), where every seed has them."""
    paths = [[t for t in r["objectives"][label].get("path", ()) if "failed" not in t] for r in records]
    return [(tries[0]["steps"], list(tries)) for tries in zip(*paths)]


def _frontier(records: list[dict]) -> list[tuple[float, float, str]]:
    """(log-prob under the initial model, steerability, whose), means over the seeds, of the initial model and the tries:
    those than which no other has more of one and as much of the other; most likely text first."""
    each = {"the initial model": [r["initial_development"] for r in records]}
    for label in _labels(records):
        each |= {f"{label} at {rate:g}": _tries(records, label, rate) for rate in records[0]["rates"]}
    points = [(*(sum(t[name] for t in tries) / len(tries) for name in ("initial_logprob", "steerability")), whose)
              for whose, tries in each.items() if None not in tries]
    return [(x, y, whose) for x, y, whose in sorted(points, reverse=True)
            if not any(a >= x and b >= y and (a, b) != (x, y) for a, b, _ in points)]


def _marks(labels: list[str]) -> dict[str, dict]:
    """How each is drawn: open markers where the colours begin again."""
    colours, markers = (*look.COLOURS, look.SKY, look.AMBER, "black"), (*look.MARKERS, "v", "P", "X", "*", "<", ">")
    return {label: {"color": colours[k % len(colours)], "marker": markers[k % len(markers)], "linewidth": 1}
            | ({"markerfacecolor": "white"} if k >= len(colours) else {}) for k, label in enumerate(labels)}


DRAWN = {"bound": "bound (nats)", "steerability": "steerability",
         "initial_logprob": "log-prob a token,\ninitial model (nats)", "following_bare": "followed without a constitution",
         "following_contrary": "followed against the user", "answers": "responses that answer",
         "among": "followed, of responses that answer"}


@look.style()
def _overview(records: list[dict]):
    labels = _labels(records)
    figure, ((text, answers), (asked, corner)) = look.subplots(2, 2, (7.6, 6.4))
    for axes, (x, y) in ((text, ("initial_logprob", "steerability")), (answers, ("answers", "among")),
                         (asked, ("following_bare", "following_contrary"))):
        for label, mark in ({"initial": {"color": look.GREY, "marker": "o"}} | _marks(labels)).items():
            if not all(_values(records, label, name) for name in (x, y)):
                continue
            a, b = (estimate(name, _values(records, label, name)) for name in (x, y))
            bars = [None if e.ci95 is None else [[e.value - e.ci95[0]], [e.ci95[1] - e.value]] for e in (a, b)]
            axes.errorbar([a.value], [b.value], xerr=bars[0], yerr=bars[1], **mark | {"linestyle": "", "elinewidth": 0.6},
                          label="initial model" if label == "initial" else label, capsize=0)
        axes.set(xlabel=DRAWN[x], ylabel=DRAWN[y])
    corner.axis("off")
    corner.legend(*text.get_legend_handles_labels(), loc="center", ncols=1 + (len(labels) > 6), fontsize=8)
    figure.suptitle(f"bars: 95 % intervals over {len(records[0]['queries'])} held-out queries; seeds averaged: "
                    f"{len(records)}", fontsize=9)
    return figure


@look.style()
def _dose(records: list[dict]):
    labels, rates = _labels(records), records[0]["rates"]
    figure, (over, (by_rate, by_step, corner)) = look.subplots(2, 3, (8.4, 5.4))

    def means(name: str, tries: list[list[dict]]) -> list[float]:
        return [sum(t[name] for t in seeds) / len(seeds) for seeds in tries]

    start = [[r["initial_development"] for r in records]]
    for label, mark in _marks(labels).items():
        whole = [rate for rate in rates if None not in _tries(records, label, rate)]
        tries = [_tries(records, label, rate) for rate in whole]
        for axes, name in zip(over, TRIED):
            axes.plot(whole, means(name, tries), label=label, **mark)
        chosen = [next(t for t in found["tries"] if t["learning_rate"] == found["learning_rate"])
                  for found in (r["objectives"][label] for r in records)]
        steps = [at for _, at in _steps(records, label)]
        for axes, path in ((by_rate, start + tries), (by_step, start + steps + [chosen])):
            axes.plot(means("initial_logprob", path), means("steerability", path), **mark)
    for axes, name in zip(over, TRIED):
        axes.axhline(means(name, start)[0], color=look.GREY, linestyle=":")
        axes.set(xscale="log", xlabel="learning rate", ylabel=DRAWN[name])
        axes.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    over[1].set_title("dotted: initial model")
    figure.suptitle(f"{records[0]['initial_development']['n']} development queries; seeds averaged: {len(records)}",
                    fontsize=9)
    front = _frontier(records)
    by_rate.plot([x for x, *_ in front], [y for _, y, _ in front], color=look.GREY, linestyle="--", drawstyle="steps-post",
                 zorder=0)
    for axes, title in ((by_rate, "over rates; dashed: the frontier"), (by_step, "over steps, chosen rate")):
        axes.set(xlabel=DRAWN["initial_logprob"], ylabel="steerability", title=title)
    by_step.set_visible(any(_steps(records, label) for label in labels))
    corner.axis("off")
    corner.legend(*over[0].get_legend_handles_labels(), loc="center", ncols=1 + (len(labels) > 6), fontsize=8)
    return figure
