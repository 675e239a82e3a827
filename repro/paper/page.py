"""The page for readers that `repro verify` writes, in Markdown: what was found, in words."""

import numpy as np

from repro.base.metrics import normal_interval
from repro.paper.archive import ITEMS, KEYS
from repro.paper.beyond import TOLERANCE


def _grid(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines) + "\n"


def _interval(e: dict) -> str:
    return f"{e['value']:.1f} " + (f"[{e['ci95'][0]:.1f}, {e['ci95'][1]:.1f}]" if e["ci95"] else "[few]")


def _side(ci95) -> str:
    if ci95 is None:
        return "no interval"
    return "above" if ci95[0] > 50 else "below" if ci95[1] < 50 else "around"


def _key(row: dict) -> tuple:
    return tuple(row[k] for k in ("table", *KEYS))


def _subset(row: dict) -> str:
    cot = {True: " with CoT", False: " without CoT"}.get(row.get("cot"), "")
    return row["subset"].replace("_", "-") + cot


def _series(row: dict) -> str:
    return f"{row['model']}, {_subset(row)}"


def _cell(row: dict) -> str:
    return f"Table {row['table']}, {_series(row)}, iteration {row['iteration']}"


def page(result: dict) -> str:
    """The readers' page (Markdown) from what `published.verify` found; its numbers are taken from there."""
    record, cells = result["record"], result["cells"]
    return "\n".join([_summary(result), _tables(result), _rules(result), _fit_page(record["logistic_fit"]),
                      _claims(result["claims"], cells), _place_and_ties(record), _length_and_mi(record),
                      _ablation_page(record["ablation"]), _power_page(record, len(cells))])


def _summary(result: dict) -> str:
    cells, sums = result["cells"], result["arithmetic"]
    raw, fitted = ([c for c in cells if (c["estimator"] == "logistic") is f] for f in (False, True))

    def count(rows, status):
        return sum(r["status"] == status for r in rows)

    off = [r for r in sums if r["status"] == "DIFFERS"]
    worst = max((max(map(abs, r["deviation"])) for r in off), default=0)
    odd = [c for c in cells if c["status"] != "PASS"]
    return f"""# The published win rates, recomputed from the authors' own record

Made by `repro verify`. The authors of arXiv 2404.14313 keep in public what the judge (gpt-4-0613) said
about every single item: a score and both lengths, 250 items for each of the {len(cells)} cells of Tables
2-9. That record is the reason why anything on this page can be said at all. Few papers can be checked to
the digit; this one can.

| | cells | PASS | ERRATUM | NOT REPRODUCED | FAIL | NOT RUN |
| --- | --- | --- | --- | --- | --- | --- |
""" + "".join(f"| {label} | {len(rows)} | " + " | ".join(str(count(rows, s)) for s in (
        "PASS", "ERRATUM", "NOT REPRODUCED", "FAIL", "NOT RUN")) + " |\n" for label, rows in (
            ("Tables 4-9, to the printed decimal", raw),
            (f"Tables 2-3, within {TOLERANCE:g} point, by our fit of an unpublished code", fitted))) + """
PASS: the record gives what is printed. ERRATUM: it gives something else, and where the printed value comes
from is known. NOT REPRODUCED: our fit misses the tolerance. FAIL: no explanation. NOT RUN: no file.

## Where print and record differ

""" + _grid(["cell", "printed", "record", "status", "why"],
            [[_cell(c), f"{c['published']:.2f}", "-" if c["recomputed"] is None else f"{c['recomputed']:.2f}",
              c["status"], c["why"] or "-"] for c in odd]) + f"""
The interval p ± 1.96 sqrt(p (1 - p) / n), t = (p - 50) / SEM and the class of the p-value follow from the
printed win rate and n alone in {count(sums, 'PASS')} of {len(sums)} rows, to rounding. {len(off)} rows, all
of Table 8, are off by up to {worst:.2f}; their p-values stay in the printed class. {count(sums, 'FAIL')}
rows fail.
"""


def _tables(result: dict) -> str:
    by_key, sums = ({_key(r): r for r in result[part]} for part in ("common_rule", "arithmetic"))
    parts = ["""## Tables side by side

`printed` and `record` share the estimator and tie rule of the table. The three columns to the right put all
tables under one rule, ties as half wins: raw, stratified by longer / not longer than the baseline's
response (the rule of the paper's headline), and the logistic correction. 95 % intervals in brackets;
`[few]`: fewer than 10 items on one side, hence no interval.
"""]
    for table in sorted({c["table"] for c in result["cells"]}):
        rows = []
        for c in (c for c in result["cells"] if c["table"] == table):
            low, high = sums[_key(c)]["printed"]["ci95"]
            common = by_key.get(_key(c))
            rows.append([_series(c), c["iteration"], f"{c['published']:.2f} [{low:.2f}, {high:.2f}]",
                         "-" if c["recomputed"] is None else f"{c['recomputed']:.2f}", c["status"],
                         *(_interval(common[k]) if common else "-"
                           for k in ("raw_half", "stratified_half", "logistic_half"))])
        baseline = "mistral-7b-instruct" if "instruct" in c["baseline"] else "the model's own base"
        ties = "half wins" if c["ties"] == "half" else "losses"
        header = ["series", "iteration", "printed", "record", "status", "raw", "stratified", "logistic"]
        parts.append(f"### Table {table}: against {baseline}, principles by {c['writer']}\n\n"
                     f"Printed under: {c['estimator']}, ties as {ties}.\n\n" + _grid(header, rows))
    return "\n".join(parts)


def _rules(result: dict) -> str:
    sums, changed = {_key(r): r for r in result["arithmetic"]}, {"raw_half": [], "stratified_half": []}
    status = {_key(c): c["status"] for c in result["cells"]}
    for r in result["common_rule"]:
        printed = _side(sums[_key(r)]["printed"]["ci95"])
        for k, rows in changed.items():
            if (now := _side(r[k]["ci95"])) != printed:
                note = " (erratum: another file)" if status[_key(r)] == "ERRATUM" else ""
                rows.append([_cell(r) + note, f"{r['published']:.2f}", printed, _interval(r[k]), now])
    header = ["cell", "printed", "printed interval and 50", "common rule", "its interval and 50"]
    most = max(result["common_rule"], key=lambda r: r["ties_count"], default=None)
    worst = max((abs(r["logistic_half"]["value"] - r["published"]) for r in result["common_rule"]
                 if r["estimator"] == "logistic"), default=0)
    most = most and f"It matters most for {_cell(most)}: {most['ties_count']} of {most['n']} scores are ties."
    return f"""## Which rule each table used, and what changes under one

| tables | ties and unparsed verdicts | length control |
| --- | --- | --- |
| 2, 3 (Figure 8) | losses | logistic |
| 4, 5, 6, 7 (Figure 4) | losses | none |
| 8, 9 (Figure 5) | half wins | none |
| headline of experiment 1 (Figure 2b) | half wins | stratified |
| Figure 7 | half wins as drawn here; the paper does not say | none |

The tie rules are inferred: in Tables 4-9 the other rule misses the printed number wherever a file holds
ties, in Tables 2-3 it misses by up to {worst:.1f} points. With ties as losses two equal models score below
50, so that Tables 2-7 are strict with the tuned model. {most}

Cells whose interval lies otherwise relative to 50 under ties half, raw. For Tables 2 and 3 this takes away the
length control as well, and in the rows marked as errata the file differs, not the rule:

{_grid(header, changed['raw_half'])}
The same under ties half, stratified by length. The paper controls for length in experiment 1 alone, where
the tuned model writes longer responses. In experiment 2 it writes shorter summaries, which one of the two
principles asks for, so that this control takes away part of what was asked; it answers another question,
and is no better answer:

{_grid(header, changed['stratified_half'])}"""


def _fit_page(fit: dict) -> str:
    residuals, ridged = (np.abs(fit.get(k) or [0.0]) for k in ("residuals", "residuals_with_ridge"))
    return f"""## Tables 2 and 3: the logistic correction

Our fit, by maximum likelihood; it has no free parameter, but its form is the one among several that comes near
these very cells: {fit['fit']}. Tolerance: {fit['tolerance']:g}
point; {fit['reason']}. The largest residual is {residuals.max():.2f}, the next
{np.sort(residuals)[-2:][0]:.2f}, the median {np.median(residuals):.2f}. A lead for whoever has the code: a
ridge of {fit.get('ridge_of_least_median_residual')} on the slope, chosen on these very cells and hence no
test, brings the median to {np.median(ridged):.2f} and leaves the same one cell {ridged.max():.1f} points
away.
"""


def _claims(claims: list[dict], cells: list[dict]) -> str:
    rows, unlike = [], []
    for c in claims:
        what = f", iteration {c['iteration']}" if "iteration" in c else f": {c['metric'].replace('_', ' ')}"
        values = [] if c["recomputed"] is None else np.atleast_1d(c["recomputed"])
        got = ", ".join(f"{v:.2f}" for v in values) or "-"
        writer = f" ({c['writer']})" if c["subset"] == "tldr" else ""
        cell = next((x for x in cells if all(x[k] == c.get(k) for k in KEYS if k != "experiment")), None)
        printed = f"{cell['published']:.2f} ({cell['estimator']}, {cell['ties']})" if cell else "-"
        above = c["printed"].startswith(">")
        if cell and above and normal_interval(cell["published"], cell["n"])[1][0] <= 50:
            note = " (erratum)" if cell["status"] == "ERRATUM" else ""
            unlike.append(f"{_cell(cell)}: {cell['published']:.2f}{note}")
        rows.append([c["where"], f"{c['model']}{writer}, {_subset(c)}{what}"
                     + (f", vs {c['baseline']}" if "baseline" in c else ""), c["printed"], got,
                     c["estimator"] + (f", ties {c['ties']}" if "ties" in c else ""),
                     printed, c["status"] + (f" ({c['note']})" if c["note"] else "")])
    return f"""## What abstract and text say

A number passes if the record rounds or truncates to it. The last column but one shows what the tables print
for the same comparison under their own rule: in experiment 1 the text is stratified, the tables are
logistic. The text puts some comparisons above chance whose printed interval in the tables is not above 50; in
experiment 1 the text's own rule is the stratified one, under which the claim holds:
{'; '.join(unlike) or 'none'}.

""" + _grid(["where", "what", "printed", "record", "rule", "cell in the tables", "status"], rows)


def _place_and_ties(record: dict) -> str:
    position, ties = record["position"], record["ties"]
    known = [t for t in ties if t["identical"] is not None]
    n, same, both = (sum(t[k] for t in known) for k in ("ties", "identical", "both"))
    text = f"""## What the record says beyond the paper

### The judge prefers a place

The order of the two responses is **inferred** from public code: {position['order']}. The tuned model's win
rate where its response came first minus where it came second, mean over the files, in points:

""" + _grid(["experiment", "files", "first minus second", "files where first is higher",
             "sd under 200 other random orders", "largest effect of the uneven draw on a cell"],
            [[k, v["files"], f"{v['gap_first_minus_second']:+.1f}", v["files_with_higher_rate_first"],
              f"{v['sd_of_gap_under_200_other_orders']:.1f}", f"{v['largest_shift_if_balanced']:.2f}"]
             for k, v in position.items() if isinstance(v, dict)]) + f"""
The gap is far outside what other orders give, which supports the inference. Its sign differs between
experiment 1 and the others: their judge prompts differ, or their code reads the draw the other way round.
The order was random, so the bias moves a cell by less than a point; judging both orders would remove it.

### Ties

{sum(t['ties'] for t in ties)} of {ITEMS * len(ties)} scores are 0.5, for a tie or an unparsed answer.
Experiment 1's responses were withheld on purpose, so that its ties stay unexplained. """
    if not known:
        return text + "Which are identical texts was NOT RUN: the responses were not fetched.\n"
    return text + f"""In experiments 2 and 3, {both} of {n} are
pairs of identical texts (both models decode greedily); {same - both} more identical pairs got a verdict for
one side. The other {n - both} are not explained. (Experiment 3, learned principles: the public base
responses fit the judged lengths only loosely, so that identical pairs may be missed there.) Cells with ten
ties or an identical pair:

""" + _grid(["cell", "scores of 0.5", "identical texts", "both"],
            [[_cell(t), t["ties"], t["identical"], t["both"]] for t in known
             if t["ties"] >= 10 or t["identical"]])


def _length_and_mi(record: dict) -> str:
    return f"""### Length

First and last iteration: mean tokens (Mistral-7B-v0.1 tokenizer; for experiment 3 not certain), how many of
{ITEMS} are longer than the baseline's, and the win rate (ties half) among those and among the rest:

""" + _grid(["cell", "tokens", "baseline", "longer", "win rate, longer", "win rate, rest"],
            [[_cell(x), f"{x['tokens']:.1f}", f"{x['tokens_baseline']:.1f}", x["longer"],
              f"{x['win_rate_longer']:.1f}", f"{x['win_rate_not_longer']:.1f}"]
             for x in record["length"] if x["iteration"] in (0, 3)]) + """
### What the plotted mutual information is

Figures 2, 3 and 9 plot a mean of logs, of summed token log-probs. InfoNCE, the bound that the paper
derives, is a log of means and cannot exceed log C, 1.39 nats for four constitutions and 0.69 for two. The
plotted number is never below InfoNCE, has no ceiling and grows with the length of the response: a contrast
of log-probs, and no lower bound on the information. Which files Figure 9 shows is inferred.

""" + _grid(["series", "iteration", "mean", "median", "max", "log C", "items above log C", "items below 0"],
            [[f"{x['model']} ({x['writer'] or 'claude-opus'}), {_subset(x)}", x["iteration"],
              f"{x['mean']:.3f}", f"{x['median']:.2f}", f"{x['max']:.1f}", f"{x['log_c']:.2f}",
              f"{100 * x['share_above_log_c']:.0f} %", f"{100 * x['share_negative']:.0f} %"]
             for x in record["mi"]])


def _ablation_page(ablation: dict) -> str:
    names = {"both": "both halves (the paper's)", "row": "row: over responses", "col": "col: over constitutions"}
    if not ablation["rows"]:
        return "### One half of the loss\n\nNOT RUN: no file of the authors' ablation is in the record.\n"
    return """### One half of the loss

The authors' development repository holds six more files of verdicts, which feed no table: exp 1 on HH-RLHF,
iteration 2 against the base model, trained with both halves of the loss, with `row` only and with `col` only.
The names are the files' own. In the trainer of that repository a row is normalised over the responses at a
fixed constitution, a column over the constitutions at a fixed response, which is the half that bounds the
information (Eq. 1). Win rates in percent, ties as half:

""" + _grid(["subset", "loss", "stratified by length", "raw", "mean tokens"],
            [[r["subset"], names[r["loss"]], _interval(r["stratified"]), _interval(r["raw"]), f"{r['tokens']:.0f}"]
             for r in ablation["rows"]]) + """
Differences in points on the same 250 queries, by paired bootstrap over them:

""" + _grid(["subset", "difference", "stratified by length", "raw"],
            [[d["subset"], f"{d['first']} - {d['second']}", *(
                f"{d[k]['value']:+.1f} [{d[k]['ci95'][0]:+.1f}, {d[k]['ci95'][1]:+.1f}]" for k in ("stratified", "raw"))]
             for d in ablation["differences"]]) + """
One run each: no interval here covers what another run of the training would give.
"""


def _power_page(record: dict, cells: int) -> str:
    power = record["power"]
    return f"""### What {power['n']} items can tell

A true win rate must reach {power['detectable_rate_80']:.1f} % to be told from 50 with 80 % power, and two
independent cells must differ by {power['detectable_difference_80']:.1f} points.
{power['cells_whose_interval_holds_50']} of {cells} intervals (raw, ties half) hold 50. On the same items
against the same baseline, iteration 3 minus iteration 1 (raw, ties half, paired bootstrap over items):

""" + _grid(["series", "change in points"],
            [[f"Table {p['table']}, {_series(p)}",
              f"{p['value']:+.1f} [{p['ci95'][0]:+.1f}, {p['ci95'][1]:+.1f}]"]
             for p in record["paired"]]) + """
Each model was trained once: no interval here covers what another run of the training would give.
"""
