"""Several runs of an experiment in one folder, and the committed copy of figures, numbers and page."""

from pathlib import Path

from repro.base.records import (
    UserError,
    digest,
    locked,
    make_folder,
    read_json,
    write_bytes,
    write_json,
    write_jsonl,
)
from repro.judges.record import JUDGMENTS, read_judgments
from repro.judges.rule import FOLLOWING
from repro.report.figures import draw, draw_principles, draw_win_rate, language_models
from repro.report.look import save
from repro.report.page import constitutions_in, figure_names, principles_figures, write_page


def report_figures(folder: Path) -> list[str]:
    """The files of the figures of a run's report."""
    names = figure_names(folder, read_json(folder / "metrics.json"))
    return [f"figures/{name}.{kind}" for name in names for kind in ("png", "pdf")]


def _save_figures(metrics: list[dict], folder: Path, out: Path) -> None:
    """The figures of `metrics`, of runs like the one in `folder`, under `out`."""
    config, constitutions = read_json(folder / "run.json")["config"], constitutions_in(folder)
    mini = config["profile"] == "mini"
    title = f"{config['name']}, mini: {config['model']['label']}, not the paper's run" if mini else config["name"]
    save(draw(metrics, constitutions.count, title), out / "iterations")
    if kinds := {kind: [p.name for p in constitutions.of(kind)] for kind in constitutions.kinds}:
        for name, rows in principles_figures(metrics).items():
            save(draw_principles(rows, kinds, title + (", with CoT" if rows[0]["cot"] else "")), out / name)
    for judge in language_models(metrics):
        save(draw_win_rate(metrics, judge, title), out / f"win_rate-{judge}")


def write_report(folder: Path) -> None:
    """figures/ and report.html of one run."""
    metrics = read_json(folder / "metrics.json")
    _save_figures(metrics, folder, folder / "figures")
    write_page(folder / "report.html", [[folder]], metrics, folder / "figures")


# ---- several runs

def leaves(folder: Path) -> list[Path]:
    """The runs of a folder: itself, or those of the variants that `gather` put together there."""
    variants = read_json(folder / "run.json").get("variants") if (folder / "run.json").is_file() else None
    return [folder / v for v in variants] if variants else [folder]


def _standing_alone(folders: list[Path]) -> list[Path]:
    """The runs less those whose writer wrote nothing usable, where one without a writer is among them: theirs are the
    same results again."""
    def fell_back(folder: Path) -> bool:
        writer = read_json(folder / "run.json")["config"].get("writer")
        return bool(writer) and constitutions_in(folder).writer != writer["label"]

    by_hand = any(not read_json(folder / "run.json")["config"].get("writer") for folder in folders)
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
        metrics = [r for folder in _standing_alone(folders) for r in read_json(folder / "metrics.json")]
        for name, folder in zip(names, folders):
            for path in sorted((folder / "responses").glob("*.jsonl")):
                write_bytes(make_folder(out / "responses") / f"{name}-{path.name}", path.read_bytes())
        write_jsonl(out / JUDGMENTS, [row | {"variant": name} for name, folder in zip(names, folders)
                                      for row in read_judgments(folder)])
        write_json(out / "metrics.json", metrics)
        write_json(out / "constitutions.json", {"variants": {
            name: read_json(folder / "constitutions.json") for name, folder in zip(names, folders)}})
        _save_figures(metrics, folders[0], out / "figures")
        write_page(out / "report.html", [[folder] for folder in folders], metrics, out / "figures")
        write_json(out / "run.json", {k: first[k] for k in (
            "commit", "packages", "python", "device", "threads", "seeds", "values")} | {
            "variants": names, "config": {name: r["config"] for name, r in zip(names, records)},
            "config_hash": digest([r["config_hash"] for r in records]),
            "not_run": list(dict.fromkeys(text for r in records for text in r["not_run"])),
            "stages": {f"{name}/{stage}": facts for name, r in zip(names, records)
                       for stage, facts in r["stages"].items()}})
    return out


def _without_places(record: dict) -> dict:
    """The record with the names, not the folders, of the files it read: those are one machine's."""
    config = record["config"]
    labelled = {k: config[k] | {name: config[k]["label"]} for k, name in (
        ("model", "name"), ("baseline", "name"), ("writer", "model")) if isinstance(config.get(k), dict)}
    return record | {"config": config | labelled | {
        "constitutions": Path(config["constitutions"]).name,
        "data": config["data"] | {"source": Path(config["data"]["source"]).name}}}


def publish(folders: list[Path], results: Path, *, page: bool = True) -> Path:
    """Copy runs of one experiment (one seed each) to results/<experiment>/<profile>: numbers, figures, page, and what
    principle writers wrote.

    `page` False leaves out the page, which shows responses: for queries that are not ours to print.
    Raises UserError where runs differ in more than their seed and variant, or one is unfinished.
    """
    groups: dict[str, list[Path]] = {}
    for folder in [leaf for named_one in folders for leaf in leaves(named_one)]:
        if not (folder / "metrics.json").is_file():
            raise UserError(f"{folder}: no metrics.json; only a finished run can be published")
        groups.setdefault(read_json(folder / "run.json")["config"].get("variant", ""), []).append(folder)
    for runs in groups.values():
        records = [read_json(run / "run.json") for run in runs]
        for run, record in zip(runs, records):
            if record["config"] | {"seed": None} != records[0]["config"] | {"seed": None} or \
                    record["inputs"] != records[0]["inputs"]:
                raise UserError(f"{run}: its config differs from {runs[0]}'s in more than the seed")
        if len({r["config"]["seed"] for r in records}) < len(records):
            raise UserError("the runs to publish must have different seeds")
    every = list(groups.values())
    first = read_json(every[0][0] / "run.json")["config"]
    if any(read_json(runs[0] / "run.json")["config"][k] != first[k] for runs in every for k in ("name", "profile")):
        raise UserError("the runs to publish must be of one experiment and profile")
    alone = _standing_alone([run for runs in every for run in runs])
    metrics = [r for run in alone for r in read_json(run / "metrics.json")]
    out = make_folder(results / first["name"] / first["profile"])
    _save_figures(metrics, every[0][0], out / "figures")
    write_json(out / "metrics.json", metrics)
    for variant, runs in groups.items():
        for run in runs:
            record = read_json(run / "run.json")
            stem = "-".join(filter(None, (variant, f"seed-{record['config']['seed']}")))
            write_json(out / f"run-{stem}.json", _without_places(record))
            if (run / FOLLOWING).is_file():
                write_bytes(out / f"following-{stem}.jsonl", (run / FOLLOWING).read_bytes())
            if (run / "writing.jsonl").is_file():
                write_bytes(out / f"writing-{stem}.jsonl", (run / "writing.jsonl").read_bytes())
                write_json(out / f"constitutions-{stem}.json", read_json(run / "constitutions.json"))
    by_file = next((runs[0] for runs in every if not (runs[0] / "writing.jsonl").is_file()), None)
    if by_file:
        write_json(out / "constitutions.json", read_json(by_file / "constitutions.json"))
    if page:
        write_page(out / "report.html", every, metrics, out / "figures")
    return out
