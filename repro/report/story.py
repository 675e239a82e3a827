"""What a run's page says besides numbers and figures, from the run's files: what was trained on what, what went wrong, what
the model says. It is JSON, which the page carries (page.py). No torch, no network.

Responses under a private antithesis (not harmless) are never in it.
"""

import math
from pathlib import Path

from repro.base.records import read_json, read_jsonl
from repro.judges.rule import FOLLOWING
from repro.report.figures import SERIES, select
from repro.text.principles import Constitutions, constitutions_of

CARRIED_ITEMS = 20  # of each kind of principles or queries: so many are in the page


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


def _sampled(record: dict) -> list[str]:
    """Which server sampled, where one did, and how its answers were others than the weights'."""
    facts = record.get("sampled_by")
    if not facts:
        return []
    name = " ".join(filter(None, ({"vllm": "vLLM"}.get(facts["engine"], "a server of text"), facts.get("version"))))
    differs = "; ".join(facts.get("differs", ()))
    return [f"Responses were sampled by {name}" + (f", taken as it is: {differs}" if differs else "")]


def cut_answers(folder: Path) -> list[str]:
    """A line where most of the judged answers of the last iteration end at the cap on their length, not by themselves:
    then length, and what comes late in an answer, cannot be seen."""
    config, constitutions = read_json(folder / "run.json")["config"], constitutions_in(folder)
    C = constitutions.count
    path = folder / f"responses/evaluation-{config['iterations']}.jsonl"
    judged = read_jsonl(path)[::C]
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


def constitutions_in(folder: Path) -> Constitutions:
    path = folder / "constitutions.json"
    return constitutions_of(read_json(path), str(path))


def _responses(folder: Path, record: dict) -> tuple[str, list[dict]]:
    """What the responses are, in words, and those to the first held-out items that every iteration answers: of our own
    queries all subsets, of others the first (everyday) one; of a pool, items of each kind of principles. `answers` and
    `marks` (what following.jsonl says of each) have a row for every iteration, a column for every constitution that may
    be shown."""
    constitutions, config = constitutions_in(folder), record["config"]
    private, C = constitutions.private_sides, constitutions.count
    items = read_jsonl(folder / "logprobs/evaluation-0.jsonl")
    queries = {row["id"]: row["text"] for row in read_jsonl(folder / "queries.jsonl")}
    answers = [read_jsonl(folder / f"responses/evaluation-{i}.jsonl") for i in range(config["iterations"] + 1)]
    marks = read_jsonl(folder / FOLLOWING) if (folder / FOLLOWING).is_file() else []
    ours = config["data"]["source"].startswith("embedded")  # harmless queries of others may be offensive
    kinds = constitutions.kinds or list(dict.fromkeys(row["subset"] for row in items))[:None if ours else 1]
    carried, left_out = [], set()
    for kind in kinds:
        for k in [k for k, row in enumerate(items) if row["subset"] == kind][:CARRIED_ITEMS]:
            ids = [row["constitution"] for row in answers[0][k * C:k * C + C]]
            shown = [c for c, of in enumerate(ids) if not private & set(of.split(","))]
            left_out |= {of for c, of in enumerate(ids) if c not in shown}
            one = {"id": items[k]["query"], "subset": kind, "query": queries[items[k]["query"]],
                   "constitutions": [ids[c] for c in shown],
                   "answers": [[rows[k * C + c]["text"] + ("" if rows[k * C + c]["finished"] else " […]") for c in shown]
                               for rows in answers]}
            if marks:
                one["marks"] = [[marks[k]["sides"][str(i)][c] for c in shown] for i in range(len(answers))]
            carried.append(one)
    note = f" {len(left_out)} constitutions are left out: their responses stay in the run directory." if left_out else ""
    of = "" if constitutions.kinds else f"{' and '.join(kinds)} "
    return (f"The first {len(carried)} of the held-out {of}queries that are put to every iteration, greedy, at most "
            f"{config['sampling']['max_new_tokens']} tokens ([…] marks a response cut there).{note}"), carried


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:12] + "-dirty" * commit.endswith("-dirty")


def _setting(record: dict, writer_of: str) -> list[str]:
    """What every run of a variant has in common, whatever its seed."""
    config, train = record["config"], record["config"]["train"]
    writer = config.get("writer")
    names = Path(config["constitutions"]).name
    steps = ", ".join(str(train["batches"] + k * train["batches_increment"]) for k in range(config["iterations"]))
    by = f"constitutions {names}, by {writer_of}" if not writer else (
        f"principles by {writer_of}; {writer['label']} was asked for some for a model that has to {writer['asked']}, "
        f"and win rates by rule and following, in figures and values, are by the rules of {names}, not of its own")
    return [
        f"Model {config['model']['label']}; {by}; queries {Path(config['data']['source']).name}.",
        f"Training: {train['dose']}, {train['optimizer']}, learning rate {train['learning_rate']:g}, "
        f"{train['batch_size']} queries a step, {steps} steps by iteration, {train['precision']}"
        + (f", LoRA adapters of rank {train['lora']['rank']}, all other weights frozen." if train.get("lora") else ".")]


def sentences(one: dict) -> dict[str, str]:
    """Of a story: a side of a constitution -> its sentence."""
    rows = one["principles"][1]
    return {name: text for name, text, *_ in rows} | {f"not_{name}": antithesis for name, _, antithesis, _ in rows}


def story(folder: Path) -> dict:
    """What a page says of a run besides its numbers and figures, as JSON: so that a page, which carries it, can be made
    again, and runs of other seeds join it, where the run's folder is gone."""
    record, constitutions = read_json(folder / "run.json"), constitutions_in(folder)
    config, by = record["config"], constitutions.writer if "written" in read_json(folder / "constitutions.json") else ""
    note, items = _responses(folder, record)
    return {
        "name": config["name"], "profile": config["profile"], "variant": config.get("variant", ""), "seed": config["seed"],
        "kinds": list(constitutions.kinds), "setting": _setting(record, constitutions.writer),
        "measured": f"{record['device']}, {record['threads']} threads, torch {record['packages']['torch']}, commit "
                    f"{_short(record['commit'])}",
        "took": f"seed {config['seed']}: {sum(s['seconds'] for s in record['stages'].values()) / 60:.1f} min, config "
                f"{record['config_hash'][:12]}",
        "not_run": f"NOT RUN: {'; '.join(record['not_run']) or 'nothing'}.",
        "worsened": [line + "." for line in worsened(folder)],
        "notes": [line + "." for line in (*told(record), *_sampled(record), *cut_answers(folder))],
        "principles": [by, [[p.name, p.text, p.antithesis, p.rule or "none"] for p in constitutions.principles]],
        "note": note, "items": items}
