"""A run's files -> its page. No torch, no network. Text of users and models is escaped; responses under a private
antithesis (not harmless) are never shown.
"""

import base64
import html
import math
from pathlib import Path

from repro.base.records import read_json, read_jsonl, write_text
from repro.base.settings import safe_name
from repro.judges.standing import standing
from repro.report.figures import SERIES, language_models, named, select, telling
from repro.report.look import LABELS
from repro.text.principles import ConstitutionSet, Pool, constitutions_of

SHOWN_QUERIES = 12


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


def told(record: dict) -> list[str]:
    """How each model of a run's record is spoken to, in words, for the report and the terminal: what is not as usual."""
    return [f"Chat template of the {role}: {'; '.join(said)}" for role, facts in record.get("spoken", {}).items()
            if (said := _told(facts))]


def _told(facts: dict) -> list[str]:
    said = [f"the system text stands at the {facts['system']}"] if facts["system"] != "turn" else []
    said += [f"content is given as {facts['content']}"] if facts["content"] != "text" else []
    said += [", ".join(f"{k}={v!r}" for k, v in facts["switch"].items()) + " is passed"] if facts["switch"] else []
    said += [f"its today is {facts['date']}"] if facts["date"] else []
    said += [f"it {'reasons' if facts['opened'] else 'may reason'} first, and its response "
             f"{'' if facts['opened'] else 'then '}follows {facts['closing']!r}"] if facts["reasons"] else []
    said += [f"it renders an answer in another way than it is sampled ({facts['unlike']})"] if facts["unlike"] else []
    return said


def _interval(row: dict, digits: int) -> str:
    if row["ci95"] is None:  # one value, or equal ones
        return f"{row['value']:.{digits}f} <span class=note>n {row['n']}</span>"
    return f"{row['value']:.{digits}f} <span class=note>[{row['ci95'][0]:.{digits}f}, {row['ci95'][1]:.{digits}f}]</span>"


def _table(metrics: list[dict], seed: int) -> str:
    rows, mine, tell = [], select(metrics, seed=seed), telling(metrics)
    fields = ("metric", "estimator", "judge", "baseline", "ties", "length", "principle")
    keys = dict.fromkeys(tuple(r.get(f) for f in (*fields, *SERIES))
                         for r in sorted(mine, key=lambda r: list(LABELS).index(r["metric"])))
    iterations = sorted({r["iteration"] for r in mine})
    baselines, policies = {r["baseline"] for r in mine if r["baseline"]}, {r["model"] for r in select(mine, metric="mi")}
    for key in keys:
        found = {r["iteration"]: r for r in mine if key == tuple(r.get(f) for f in (*fields, *SERIES))}
        metric, estimator, judge, baseline, ties, length, principle = key[:len(fields)]
        what = ", ".join(filter(None, (estimator, judge and named(judge), baseline and len(baselines) > 1 and
                                       f"against {baseline}", ties and f"ties {ties}", length, principle)))
        digits = 1 if metric in ("length_tokens", "win_rate") else 3
        cells = "".join(f"<td class=n>{_interval(found[i], digits) if i in found else ''}</td>" for i in iterations)
        first = next(iter(found.values()))
        of = tell(first) if first["model"] in policies else first["model"]
        rows.append(f"<tr><td>{LABELS[metric]}{': ' + html.escape(what) if what else ''}</td>"
                    f"<td>{html.escape(of)}</td>{cells}<td class=n>{first['n']}</td></tr>")
    head = "".join(f"<th>iteration {i}</th>" for i in iterations)
    return f"<table><tr><th>value [95 % interval]</th><th>of</th>{head}<th>n</th></tr>{''.join(rows)}</table>"


def cut_answers(folder: Path) -> list[str]:
    """A line where most of the judged answers of the last iteration end at the cap on their length, not by themselves:
    then length, and what comes late in an answer, cannot be seen."""
    config, constitutions = read_json(folder / "run.json")["config"], _constitutions(folder)
    C = 2 if isinstance(constitutions, Pool) else len(constitutions.constitutions)
    path = folder / f"responses/evaluation-{config['iterations']}.jsonl"
    judged = [row for _, row in read_jsonl(path)][::C]
    cut = sum(not row["finished"] for row in judged)
    return [f"{cut} of {len(judged)} judged answers were cut at {config['sampling']['max_new_tokens']} tokens "
            "(SamplingSpec.max_new_tokens)"] if 2 * cut > len(judged) else []


def dropped_pairs(folder: Path) -> list[str]:
    """A line that counts the sampled pairs that could not train, by iteration and reason."""
    stages, parts, total = read_json(folder / "run.json")["stages"], [], 0
    for name, facts in stages.items():
        if name.startswith("sample-"):
            iteration, sampled = name.removeprefix("sample-"), facts["responses"] // 2
            dropped, total = stages.get(f"train-{iteration}", {}).get("dropped_pairs") or {}, total + sampled
            if dropped:
                why = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))
                parts.append(f"{sum(dropped.values())} of {sampled} in iteration {iteration} ({why})")
    return [f"pairs dropped before training: {'; '.join(parts) or f'none of {total}'}"] if total else []


FELL = math.log(2)  # nats of a bound: as much as it can rise with two constitutions


def worsened(folder: Path) -> list[str]:
    """A line for a learning rate whose steps are large, and one where training, which raises the bound, has lowered it by
    more than FELL: most often by such a rate."""
    record = read_json(folder / "run.json")
    config, lines = record["config"], [record["large_step"]] if "large_step" in record else []
    rows = select(read_json(folder / "metrics.json"), metric="mi", estimator="infonce", principle=None)
    for start in select(rows, iteration=0):
        fell = [r for r in select(rows, **{k: start[k] for k in SERIES}) if start["value"] - r["value"] > FELL]
        if fell:
            first, low = min(fell, key=lambda r: r["iteration"]), min(fell, key=lambda r: r["value"])
            lines.append(f"training lowered the bound on {start['subset']}, which it is there to raise, from "
                         f"{start['value']:.2f} to {low['value']:.2f} nats (n {low['n']}), first in iteration "
                         f"{first['iteration']}: most often the learning rate, here "
                         f"{config['train']['learning_rate']:g}, is too high for the model; try a tenth of it "
                         "(--learning-rate)")
    return lines


def _private(constitutions: ConstitutionSet | Pool) -> set[str]:
    """The sides, as they stand in a constitution's id, whose responses are not shown."""
    return {f"not_{p.name}" for p in constitutions.principles if p.private}


def _constitutions(folder: Path) -> ConstitutionSet | Pool:
    path = folder / "constitutions.json"
    return constitutions_of(read_json(path), str(path))


def _responses(folder: Path, record: dict) -> str:
    """Side by side for the first held-out items: rows are iterations, columns constitutions. Of a set, queries of its
    first (everyday) subset; of a pool, items of each kind of principles."""
    constitutions, config = _constitutions(folder), record["config"]
    private, pool = _private(constitutions), isinstance(constitutions, Pool)
    C = 2 if pool else len(constitutions.constitutions)
    items = [row for _, row in read_jsonl(folder / "logprobs/evaluation-0.jsonl")]
    queries = {row["id"]: row["text"] for _, row in read_jsonl(folder / "queries.jsonl")}
    answers = [[row for _, row in read_jsonl(folder / f"responses/evaluation-{i}.jsonl")]
               for i in range(config["iterations"] + 1)]
    kinds = constitutions.kinds if pool else [items[0]["subset"]]
    parts, left_out = [], set()
    for kind in kinds:
        chosen = [k for k, row in enumerate(items) if row["subset"] == kind][:SHOWN_QUERIES // len(kinds)]
        for k in chosen:
            columns = [a for a in range(k * C, k * C + C)
                       if not private & set(answers[0][a]["constitution"].split(","))]
            left_out |= {answers[0][a]["constitution"] for a in range(k * C, k * C + C)} - {
                answers[0][a]["constitution"] for a in columns}
            head = "".join(f"<th>{html.escape(answers[0][a]['constitution'])}</th>" for a in columns)
            rows = "".join(
                f"<tr><td>{'initial' if i == 0 else f'iteration {i}'}</td>" + "".join(
                    f"<td>{html.escape(rows[a]['text'] + ('' if rows[a]['finished'] else ' […]'))}</td>" for a in columns)
                + "</tr>" for i, rows in enumerate(answers))
            mark = f" <span class=note>({kind.replace('_', ' ')} principles)</span>" if pool else ""
            parts.append(f"<h3>{html.escape(queries[items[k]['query']])}{mark}</h3>"
                         f"<table class=responses><tr><th></th>{head}</tr>{rows}</table>")
    note = f" {len(left_out)} constitutions are left out: their responses stay in the run directory." if left_out else ""
    return (f"<h2>What each iteration answers</h2><p class=note>Held-out "
            f"{'' if pool else html.escape(kinds[0]) + ' '}queries, greedy, at most "
            f"{config['sampling']['max_new_tokens']} tokens ([…] marks a response cut there).{note}</p>" + "".join(parts))


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:12] + "-dirty" * commit.endswith("-dirty")


def _facts(folders: list[Path], writer_of: str) -> str:
    records = [read_json(folder / "run.json") for folder in folders]
    record = records[0]
    config, train = record["config"], record["config"]["train"]
    seconds = ", ".join(f"seed {r['config']['seed']}: {sum(s['seconds'] for s in r['stages'].values()) / 60:.1f} min"
                        for r in records)
    writer = config.get("writer")
    by = f"by {writer_of}" if not writer else (
        f"whose rules measure following; the principles of this run: {writer['label']} was asked for some to "
        f"{writer['asked']}, and they are by {writer_of}")
    lines = [
        f"Model {config['model']['label']}; constitutions {Path(config['constitutions']).name}, {by}; "
        f"queries {Path(config['data']['source']).name}.",
        f"Training: {train['dose']}, {train['optimizer']}, learning rate {train['learning_rate']:g}, "
        f"{train['batch_size']} queries a step, {train['batches']} steps in iteration 1 and "
        f"{train['batches_increment']} more in each later one, {train['precision']}"
        + (f", LoRA adapters of rank {train['lora']['rank']}, all other weights frozen." if train.get("lora") else "."),
        f"Measured on {record['device']}, {record['threads']} threads, torch {record['packages']['torch']}; {seconds}; "
        f"config {record['config_hash'][:12]}, commit {_short(record['commit'])}.",
        "NOT RUN: " + ("; ".join(record["not_run"]) or "nothing") + ".",
        *(line + "." for folder in folders for line in worsened(folder)),
        *(line + "." for line in told(record)),
        *(line + "." for line in cut_answers(folders[0]))]
    if config["profile"] == "mini":
        lines.insert(0, "A mini run: its own model, principles and queries. None of these numbers is the paper's.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _principles(folders: list[Path]) -> str:
    """The principles of each seed's run; once, where they are the same."""
    tables = {}
    for folder in folders:
        constitutions, data = _constitutions(folder), read_json(folder / "constitutions.json")
        rows = "".join(f"<tr><td>{html.escape(p.name)}</td><td>{html.escape(p.text)}</td><td>{html.escape(p.antithesis)}"
                       f"</td><td>{html.escape(p.rule or 'none')}</td></tr>" for p in constitutions.principles)
        by = f"<p>Written by {html.escape(constitutions.writer)}:</p>" if "written" in data else ""
        head = "<tr><th></th><th>principle</th><th>antithesis (not_...)</th><th>rule</th></tr>"
        tables[f"{by}<table>{head}{rows}</table>"] = True
    return "".join(tables)


def _image(path: Path, alt: str, style: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(alt)}"{style} src="data:image/png;base64,{data}"></p>'


def write_page(path: Path, groups: list[list[Path]], metrics: list[dict], figures: Path) -> None:
    """The page of one run, or of an experiment: `groups` has a list for each variant, with a run of each seed (responses of
    the first)."""
    first = read_json(groups[0][0] / "run.json")["config"]
    body = []
    for name in figure_names(groups[0][0], metrics):
        style = ' style="max-width:36em"' if name.startswith("win_rate-") else ""
        body.append(_image(figures / f"{name}.png", f"{name} by iteration", style))
        if name.startswith("win_rate-"):
            body.append(f"<p class=note>{html.escape(standing(name.removeprefix('win_rate-')))}</p>")
    for folders in groups:
        records = [read_json(folder / "run.json") for folder in folders]
        variant = records[0]["config"].get("variant")
        body += [f"<h2>{html.escape(variant)}</h2>" if len(groups) > 1 else "",
                 _facts(folders, _constitutions(folders[0]).writer), _principles(folders),
                 _responses(folders[0], records[0])]
    body.append("<h2>Every value</h2>")
    seeds = sorted({r["seed"] for r in metrics})
    for seed in seeds:
        body.append(f"<details{' open' if len(seeds) == 1 else ''}><summary>seed {seed}</summary>"
                    f"{_table(metrics, seed)}</details>")
    title = f"{first['name']}, profile {first['profile']}"
    write_text(path, PAGE.format(title=html.escape(title), body="".join(body)))


def figure_names(folder: Path, metrics: list[dict]) -> list[str]:
    """One figure of all measures, one of a pool's principles, one of each LLM judge's win rate."""
    pool = isinstance(_constitutions(folder), Pool)
    return ["iterations", *(_principles_figures(metrics) if pool else ()),
            *(f"win_rate-{j}" for j in language_models(metrics))]


def _principles_figures(metrics: list[dict]) -> dict[str, list[dict]]:
    """Name -> records of a figure of every principle: one for each model and kind of sampling."""
    found: dict[tuple, list[dict]] = {}
    for r in metrics:
        found.setdefault((r["model"], r["writer"], r["cot"]), []).append(r)
    found = {key: rows for key, rows in found.items() if select(rows, metric="mi")}  # less a baseline's
    if len(found) == 1:
        return {"principles": next(iter(found.values()))}
    return {safe_name(f"principles-{model}{'-cot' if cot else ''}"): rows for (model, _, cot), rows in found.items()}
