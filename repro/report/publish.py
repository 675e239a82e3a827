"""Several runs of an experiment in one folder, and the committed copy of figures, numbers and page, which runs of further
seeds join and from which figures and page can be made again.
"""

from pathlib import Path

from repro.base.records import (
    UserError,
    digest,
    locked,
    make_folder,
    read_json,
    read_jsonl,
    write_bytes,
    write_json,
    write_jsonl,
)
from repro.judges.record import JUDGMENTS, read_judgments
from repro.judges.rule import FOLLOWING
from repro.report.changes import Line, lines, published
from repro.report.figures import SERIES, draw, draw_principles, draw_win_rate, language_models
from repro.report.look import save
from repro.report.page import figure_names, principles_figures, stories_of, write_page
from repro.report.story import constitutions_in, story
from repro.text.principles import Constitutions, constitutions_of


def report_figures(folder: Path) -> list[str]:
    """The files of the figures of a run's report."""
    names = figure_names(list(constitutions_in(folder).kinds), read_json(folder / "metrics.json"))
    return [f"figures/{name}.{kind}" for name in names for kind in ("png", "pdf")]


def _save_figures(metrics: list[dict], config: dict, constitutions: Constitutions, out: Path) -> None:
    """The figures of `metrics`, of runs with such a config and such constitutions, under `out`."""
    mini = config["profile"] == "mini"
    title = f"{config['name']}, mini: {config['model']['label']}, not the paper's run" if mini else config["name"]
    save(draw(metrics, constitutions.count, title), out / "iterations")
    if kinds := {kind: [p.name for p in constitutions.of(kind)] for kind in constitutions.kinds}:
        for name, rows in principles_figures(metrics).items():
            save(draw_principles(rows, kinds, title + (", with CoT" if rows[0]["cot"] else "")), out / name)
    for judge in language_models(metrics):
        save(draw_win_rate(metrics, judge, title), out / f"win_rate-{judge}")


def changed(folders: list[Path]) -> dict[str, list[Line]]:
    """Variant -> what training changed, of runs of one seed; of those of an older version nothing is known."""
    configs = {folder: read_json(folder / "run.json")["config"] for folder in folders if (folder / FOLLOWING).is_file()}
    return {config.get("variant", ""): lines("-".join(filter(None, (config["name"], config.get("variant")))),
                                             {config["seed"]: read_jsonl(folder / FOLLOWING)})
            for folder, config in configs.items()}


def write_report(folder: Path) -> None:
    """figures/ and report.html of one run."""
    metrics = read_json(folder / "metrics.json")
    _save_figures(metrics, read_json(folder / "run.json")["config"], constitutions_in(folder), folder / "figures")
    write_page(folder / "report.html", [story(folder)], metrics, folder / "figures", changed([folder]))


# ---- several runs

def leaves(folder: Path) -> list[Path]:
    """The runs of a folder: itself, or those of the variants that `gather` put together there."""
    variants = read_json(folder / "run.json").get("variants") if (folder / "run.json").is_file() else None
    return [folder / v for v in variants] if variants else [folder]


def standing_alone(folders: list[Path], *, beside_hand: bool = False) -> list[Path]:
    """The runs less those whose writer wrote nothing usable, where one without a writer is among them (or stands beside
    them): theirs are the same results again."""
    def fell_back(folder: Path) -> bool:
        writer = read_json(folder / "run.json")["config"].get("writer")
        return bool(writer) and constitutions_in(folder).writer != writer["label"]

    by_hand = beside_hand or any(not read_json(folder / "run.json")["config"].get("writer") for folder in folders)
    return [folder for folder in folders if not (by_hand and fell_back(folder))]


def gather(folders: list[Path]) -> Path:
    """Put the finished runs of an experiment's variants, which lie in <folder>/<variant>, together in <folder>, with the
    files of any run. One run stays as it is. Returns the folder."""
    if len(folders) == 1:
        return folders[0]
    out, names = folders[0].parent, [folder.name for folder in folders]
    records = [read_json(folder / "run.json") for folder in folders]
    first = records[0]
    with locked(out):
        alone = standing_alone(folders)
        metrics = [r for folder in alone for r in read_json(folder / "metrics.json")]
        for name, folder in zip(names, folders):
            for path in sorted((folder / "responses").glob("*.jsonl")):
                write_bytes(make_folder(out / "responses") / f"{name}-{path.name}", path.read_bytes())
        write_jsonl(out / JUDGMENTS, [row | {"variant": name} for name, folder in zip(names, folders)
                                      for row in read_judgments(folder)])
        write_json(out / "metrics.json", metrics)
        write_json(out / "constitutions.json", {"variants": {
            name: read_json(folder / "constitutions.json") for name, folder in zip(names, folders)}})
        _save_figures(metrics, first["config"], constitutions_in(folders[0]), out / "figures")
        write_page(out / "report.html", list(map(story, folders)), metrics, out / "figures", changed(alone))
        write_json(out / "run.json", {k: first[k] for k in (
            "commit", "packages", "python", "device", "threads", "seeds", "values")} | {
            "variants": names, "config": {name: r["config"] for name, r in zip(names, records)},
            "config_hash": digest([r["config_hash"] for r in records]),
            "not_run": list(dict.fromkeys(text for r in records for text in r["not_run"])),
            "stages": {f"{name}/{stage}": facts for name, r in zip(names, records)
                       for stage, facts in r["stages"].items()}})
    return out


def without_places(record: dict) -> dict:
    """The record with the names, not the folders, of the files it read: those are one machine's."""
    config = record["config"]
    labelled = {k: config[k] | {name: config[k]["label"]} for k, name in (
        ("model", "name"), ("baseline", "name"), ("writer", "model")) if isinstance(config.get(k), dict)}
    return record | {"config": config | labelled | {
        "constitutions": Path(config["constitutions"]).name,
        "data": config["data"] | {"source": Path(config["data"]["source"]).name}}}


UNFINISHED = "unfinished.json"  # in a published folder: runs whose publishing has not come to its end


def _run(record: dict) -> tuple[str, int]:
    return record["config"].get("variant", ""), record["config"]["seed"]


def _stem(run: tuple[str, int]) -> str:
    return "-".join(filter(None, (run[0], f"seed-{run[1]}")))


def _alike(record: dict, other: dict, said: str) -> None:
    """Raises UserError where two runs of a variant differ in more than their seed."""
    a, b = (without_places(r)["config"] | {"seed": None} for r in (record, other))
    if differ := [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]:
        raise UserError(f"{said} differs in more than the seed: {', '.join(differ)}")
    if record.get("counted") != other.get("counted"):
        raise UserError(f"{said} differs in more than the seed: what counts as followed")
    if record["inputs"] != other["inputs"]:
        raise UserError(f"{said} differs in more than the seed: what it read")


def publish(folders: list[Path], results: Path, *, page: bool = True) -> Path:
    """Copy runs of one experiment (one seed each) to results/<experiment>/<profile>: numbers, figures, page, and what
    principle writers wrote. Runs that are published there already stay, but those of the same variant and seed.

    `page` False leaves out the page, which shows responses: for queries that are not ours to print.
    Raises UserError where runs differ in more than their seed and variant, from those published too, or one is unfinished.
    """
    runs = [leaf for named_one in folders for leaf in leaves(named_one)]
    for run in runs:
        if not (run / "metrics.json").is_file():
            raise UserError(f"{run}: no metrics.json; only a finished run can be published")
    records = [read_json(run / "run.json") for run in runs]
    first = records[0]["config"]
    if any(r["config"][k] != first[k] for r in records for k in ("name", "profile")):
        raise UserError("the runs to publish must be of one experiment and profile")
    if len(set(map(_run, records))) < len(records):
        raise UserError("the runs to publish must have different seeds")
    for run, record in zip(runs, records):
        _alike(record, next(r for r in records if _run(r)[0] == _run(record)[0]), f"{run}: its config")
    out = results / first["name"] / first["profile"]
    with locked(out):
        kept, metrics, stories = _kept(out, set(map(_run, records)), page=page)
        for run, record in zip(runs, records):
            for other in (r for r in kept if _run(r)[0] == _run(record)[0]):
                _alike(record, other, f"{run}: from what is published in {out} (to publish it anew, move that away) it")
        alone = standing_alone(runs, beside_hand=any(not r["config"].get("writer") for r in kept))
        new = [r for run in alone for r in read_json(run / "metrics.json")]
        own = {_line(r) for r in new if r["metric"] == "mi"}  # a policy's; a baseline may be another variant's policy
        metrics = [r for r in metrics if _line(r) not in own] + new
        stories |= {_run(record): story(run) for run, record in zip(runs, records)} if page else {}
        write_json(out / UNFINISHED, sorted(_stem(_run(record)) for record in records))
        for run, record in zip(runs, records):
            stem = _stem(_run(record))
            write_json(out / f"run-{stem}.json", without_places(record))
            if run in alone and (run / FOLLOWING).is_file():
                write_bytes(out / f"following-{stem}.jsonl", (run / FOLLOWING).read_bytes())
            if (run / "writing.jsonl").is_file():
                write_bytes(out / f"writing-{stem}.jsonl", (run / "writing.jsonl").read_bytes())
                write_json(out / f"constitutions-{stem}.json", read_json(run / "constitutions.json"))
            else:
                write_json(out / "constitutions.json", read_json(run / "constitutions.json"))
        write_json(out / "metrics.json", sorted(metrics, key=lambda r: r["seed"]))
        _draw_published(out, list(stories.values()))
        (out / UNFINISHED).unlink()
    return out


def _kept(out: Path, named: set[tuple], *, page: bool) -> tuple[list[dict], list[dict], dict[tuple, dict]]:
    """Of what is published in a folder, less the runs that are `named` now: records, metrics, stories. Raises UserError
    where it was published otherwise, or not to its end."""
    _whole(out, set(map(_stem, named)))
    known = {_run(record): record for path in sorted(out.glob("run-*.json")) for record in [read_json(path)]}
    kept = {key: record for key, record in known.items() if key not in named}
    path = out / "report.html"
    if not kept:  # all are published anew: of what an earlier try left nothing is taken over
        if not page:
            path.unlink(missing_ok=True)
        return [], [], {}
    if page != path.is_file():
        raise UserError(f"{out}: its runs were published {'without a page' if page else 'with one'}; publish these "
                        f"{'with' if page else 'without'} --numbers-only, or move that folder away")
    stories = {(s["variant"], s["seed"]): s for s in (stories_of(path) if page else ())}
    metrics = [r for r in read_json(out / "metrics.json") if any(_belongs(r, record["config"]) for record in kept.values())]
    return list(kept.values()), metrics, {key: s for key, s in stories.items() if key in kept}


def _whole(out: Path, named: set[str]) -> None:
    """Raises UserError where a run's publishing did not come to its end that is not `named` now."""
    left = read_json(out / UNFINISHED) if (out / UNFINISHED).is_file() else []
    if lost := [stem for stem in left if stem not in named]:
        raise UserError(f"{out}: to publish {lost[0]} did not come to its end; name that run again, too")


def _belongs(row: dict, config: dict) -> bool:
    """Whether a row of metrics is of a run with this config, or of its baseline."""
    models = [config[k]["label"] for k in ("model", "baseline") if config.get(k)]
    writers = ["hand", *([config["writer"]["label"]] if config.get("writer") else [])]
    same = (row["seed"], row["cot"]) == (config["seed"], config["cot"])
    return same and row["model"] in models and row["writer"] in writers


def _line(row: dict) -> tuple:
    return row["seed"], *(row[k] for k in SERIES if k != "subset")


def again(out: Path) -> Path:
    """Figures and page of a published folder, made from what it holds."""
    with locked(out):
        _whole(out, set())
        _draw_published(out, stories_of(out / "report.html") if (out / "report.html").is_file() else [])
    return out


def _draw_published(out: Path, stories: list[dict]) -> None:
    """Figures and page of what is published in a folder: variants in their order, of each the runs by seed, of the first
    of which the page has responses."""
    if not (paths := sorted(out.glob("constitutions*.json"), key=lambda path: len(path.name))):
        raise UserError(f"{out}: no constitutions.json; it can only be published anew, from its runs")
    metrics, record, path = read_json(out / "metrics.json"), read_json(sorted(out.glob("run-*.json"))[0]), paths[0]
    _save_figures(metrics, record["config"], constitutions_of(read_json(path), str(path)), out / "figures")
    order = list(dict.fromkeys(one["variant"] for one in stories))
    stories = sorted(stories, key=lambda one: (order.index(one["variant"]), one["seed"]))
    for before, one in zip(stories, stories[1:]):
        if before["variant"] == one["variant"]:
            one["items"] = []
    if stories:
        own = {variant: published(out, variant) for variant in order}
        write_page(out / "report.html", stories, metrics, out / "figures", own)


def is_published(folder: Path) -> bool:
    return not (folder / "run.json").is_file() and any(folder.glob("run-*.json"))
