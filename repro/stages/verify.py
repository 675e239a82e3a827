"""`repro verify RUN`: does a run hold what it says? Its files against their sha256, its configuration against its hash, its
judgments and metrics against what its responses, log-probs and raw answers give now. No model is loaded.

Only then, and only where the models are the paper's by name, its win rates beside the printed cells.
"""

import math
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from repro.base.identity import config_hash
from repro.base.records import MARKER, UserError, digest, file_sha256, read_json, read_jsonl, sealed
from repro.base.settings import Experiment, JudgeSpec
from repro.judges.record import read_judgments
from repro.judges.rule import FOLLOWING
from repro.report.publish import leaves
from repro.servers.endpoint import HOSTED, Endpoint
from repro.stages.evaluate import judged_here, llm_judgments
from repro.stages.folder import BY_HAND
from repro.stages.measure import following, marks_following, records
from repro.stages.run import ANSWERS, Run, open_run
from repro.text.principles import constitutions_of


def verify_run(folder: Path, compare: Callable[..., int], names: dict[str, str], *, strict: bool = False) -> int:
    """Print PASS, FAIL or NOT RUN for each group of checks with its n, then the cells; 1 on a FAIL, of a run that is not
    finished, or on a cell that DIFFERS (strict: where anything was not compared). `compare(folder, strict=...)` holds a run
    against the printed cells; `names`: label -> name of the paper's models."""
    folder, found = Path(folder), []
    if not (folder / "run.json").is_file() and (parts := sorted(folder.glob("*/run.json"))):
        raise UserError(f"{folder}: not the folder of a run, or of several that are not finished; verify one of "
                        f"{', '.join(str(p.parent) for p in parts)}")
    if (folder / "run.json").is_file():
        parts = leaves(folder)
        for leaf in parts:
            found += [(leaf, *row) for row in check_run(leaf)]
        if parts != [folder]:
            found.append((folder, "variants", *_together(folder, parts)))
        for leaf, group, status, n, why in found:
            print(f"{leaf}: {group:<14} {status} (n {n})" + (f": {why}" if why else ""))
        stranger = _stranger([read_json(leaf / "run.json")["config"] for leaf in parts], names)
        if stranger:
            print(f"{folder}: not held against the paper's cells: {stranger}")
    if "the run is not finished" in (why for *_, why in found):
        print(f"{folder}: the run is not finished; run the same command again to finish it first")
        return 1
    failed = any(status == "FAIL" or (strict and status == "NOT RUN") for _, _, status, _, _ in found)
    if found and stranger:
        return int(failed or strict)
    return int(compare(folder, strict=strict) or failed)


def check_run(folder: Path) -> list[tuple[str, str, int, str]]:
    """(group, status, n, what is wrong) of each group of checks of one run."""
    record = read_json(folder / "run.json")
    if "config" not in record or "stages" not in record:
        raise UserError(f"{folder / 'run.json'}: not the record of a run")
    experiment, inputs = Experiment.from_json(record["config"]), record.get("inputs", {})
    wrong = ["run.json: the hash is not that of its config"] if config_hash(
        experiment, inputs) != record["config_hash"] else []
    dates = {facts.get("date") for facts in record.get("spoken", {}).values()} - {None, inputs.get("date")}
    wrong += [f"run.json: a chat template prints {', '.join(map(str, dates))}, not the run's date"] if dates else []
    out = [("config", *_verdict(wrong, 1))]
    out.append(("inputs", *_group(lambda: _inputs(folder, experiment, inputs))))
    out.append(("files", *_group(lambda: _files(folder, record["stages"]))))
    if "metrics" not in record["stages"]:
        return [*out, *((group, "NOT RUN", 0, "the run is not finished") for group in ("judgments", "metrics"))]
    if not (folder / "queries.jsonl").is_file():
        return [*out, *((group, "NOT RUN", 0, "only numbers are here") for group in ("judgments", "metrics"))]
    out.append(("judgments", *_group(lambda: _judgments(folder))))
    out.append(("metrics", *_group(lambda: _metrics(folder))))
    return out


def _verdict(wrong: list[str], n: int, missing: str = "") -> tuple[str, int, str]:
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return ("FAIL", n, wrong[0] + more) if wrong else ("PASS" if n else "NOT RUN", n, missing)


def _group(check: Callable[[], tuple[str, int, str]]) -> tuple[str, int, str]:
    """A check whose files cannot be read, or do not fit together, fails."""
    try:
        return check()
    except UserError as e:
        return "FAIL", 0, str(e)
    except (LookupError, TypeError, ValueError) as e:
        return "FAIL", 0, f"the files do not fit together ({type(e).__name__}: {e})"


def _inputs(folder: Path, experiment: Experiment, inputs: dict) -> tuple[str, int, str]:
    """Queries and constitutions are those that the configuration is bound to."""
    if not (folder / "queries.jsonl").is_file():
        return "NOT RUN", 0, "only numbers are here"
    path = folder / (BY_HAND if experiment.writer else "constitutions.json")
    wrong = []
    if digest(constitutions_of(read_json(path), str(path)).to_json()) != inputs["constitutions"]:
        wrong.append(f"{path.name}: not the constitutions that the run began with")
    queries = [row | {"where": ""} for row in read_jsonl(folder / "queries.jsonl")]
    if digest(queries) != inputs["data.source"]:
        wrong.append("queries.jsonl: not the queries that the run began with")
    return _verdict(wrong, 1 + len(queries))


def _files(folder: Path, stages: dict) -> tuple[str, int, str]:
    """Every file that a stage has left has its sha256; a checkpoint, those of its marker."""
    wrong, n, gone = [], 0, 0
    for name, facts in stages.items():
        for output, sha256 in facts["outputs"].items():
            path = folder / output
            if not path.exists() and (output.startswith("checkpoints/") or not (folder / "queries.jsonl").is_file()):
                gone += 1  # weights are often not kept, and a published folder holds numbers alone
                continue
            n += 1
            if path.is_dir():
                same = sealed(path) and file_sha256(path / MARKER) == sha256
            else:
                same = path.is_file() and file_sha256(path) == sha256
            if not same:
                wrong.append(f"{output} (of {name}): {'altered' if path.exists() else 'missing'}")
    return _verdict(wrong, n, f"{gone} not kept here" if gone else "")


def _address(host: str) -> str:
    """A server's address as far as stored answers depend on it: whether it is the hosted one. Nothing is asked of it."""
    return HOSTED if host == urlsplit(HOSTED).hostname else f"http://{f'[{host}]' if ':' in host else host}/v1"


def _judgments(folder: Path) -> tuple[str, int, str]:
    """Each judge's stored judgments against those that the responses, log-probs and raw answers give now."""
    run = open_run(folder, lambda line: None)
    kept = read_judgments(folder)
    wrong = []
    for name in dict.fromkeys(row["judge"] for row in kept):
        facts = run.record.get("judges", {}).get(name)
        if facts:
            run.endpoint = Endpoint(model=facts["model"], base_url=_address(facts["host"]),
                                    leave_out=tuple(facts.get("left_out", ())))
            again = llm_judgments(run, JudgeSpec(judges=("openai",), name=name, **{
                k: facts[k] for k in ("model", "answer", "max_tokens", "temperature")}), reparse=True)
        else:
            again = judged_here(run, name)
        theirs = [row for row in kept if row["judge"] == name]
        off = [a for a, b in zip(theirs, again) if not _same(a, b)]
        if off or len(theirs) != len(again):
            wrong.append(f"judge {name}: {len(off)} of {len(theirs)} judgments differ" + (
                f", the first on query {off[0].get('query')}" if off else f"; {len(again)} are due"))
    return _verdict(wrong, len(kept))


YOUNGER = ("steerability", "steerability_change", "answered")  # metrics that an older run has not, or otherwise


def _metrics(folder: Path) -> tuple[str, int, str]:
    run = open_run(folder, lambda line: None)
    kept, again = read_json(folder / "metrics.json"), list(records(run))
    if run.record.get("counted") != ANSWERS:
        kept, again = ([row for row in rows if row.get("metric") not in YOUNGER] for rows in (kept, again))
    off = [a for a, b in zip(kept, again) if not _same(a, b)]
    wrong = [f"metrics.json: {a.get('metric')} of {a.get('subset')} at iteration {a.get('iteration')}: {a.get('value')}"
             for a in off]
    if len(kept) != len(again):
        wrong.append(f"metrics.json: {len(kept)} records; {len(again)} are due")
    return _verdict(wrong + _marks(run) + _lengths(folder), len(again))


def _marks(run: Run) -> list[str]:
    """What is wrong with following.jsonl, which an older run may have without lengths and bounds, or, where a model wrote
    the principles, not at all."""
    path = run.folder / FOLLOWING
    if not marks_following(run) or (run.experiment.writer and not path.is_file()):
        return []
    kept, due = read_jsonl(path), following(run)
    if kept and not {"tokens", "bound"} & kept[0].keys():
        due = [{k: v for k, v in row.items() if k not in ("tokens", "bound")} for row in due]
    return [] if _same(kept, due) else [f"{FOLLOWING}: not what the responses give"]


def _lengths(folder: Path) -> list[str]:
    """Responses whose length is not that of their token ids, and log-probs of another number of tokens. (Runs made before
    ids were kept have none.)"""
    wrong, eos = [], Experiment.from_json(read_json(folder / "run.json")["config"]).train.score_eos
    for path in sorted((folder / "responses").glob("*.jsonl")):
        rows = read_jsonl(path)
        wrong += [f"responses/{path.name}: {row['query']}: {len(row['ids'])} token ids, not {row['tokens']}"
                  for row in rows if row.get("ids") is not None and len(row["ids"]) != row["tokens"]]
        scored = folder / "logprobs" / path.name
        counts = [n for row in read_jsonl(scored) for n in row["tokens"]] if scored.is_file() else []
        wrong += [f"logprobs/{path.name}: {n} tokens of the response to {row['query']}, which has {len(row['ids'])}"
                  for row, n in zip(rows, counts) if row.get("ids") and n - len(row["ids"]) != (eos and row["finished"])]
    return wrong


def _together(folder: Path, parts: list[Path]) -> tuple[str, int, str]:
    """Each record of a folder of several runs is one of theirs."""
    kept = read_json(folder / "metrics.json")
    theirs = [row for leaf in parts for row in read_json(leaf / "metrics.json")]
    return _verdict([f"metrics.json: record {k} is of none of the runs" for k, row in enumerate(kept) if row not in theirs],
                    len(kept))


def _same(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return None not in (a, b) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def _stranger(configs: list[dict], names: dict[str, str]) -> str:
    """What makes a run none of the paper's, in words: its profile, or a model that is not the published one by name."""
    for config in configs:
        if config["profile"] != "paper":
            return f"its profile is {config['profile']}"
        for part in ("model", "baseline"):
            spec = config.get(part)
            if spec and names.get(spec["label"]) != spec["name"]:
                return f"its {part} is {spec['name']}, none of the paper's ({', '.join(sorted(set(names.values())))})"
    return ""
