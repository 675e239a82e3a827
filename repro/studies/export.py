"""A run's trained model as a folder that the hub takes: weights, tokenizer, adapter, and a model card with what came out
and where it comes from. Nothing leaves the machine.
"""

import re
import shutil
import tempfile
from pathlib import Path

from repro.base.records import UserError, first_line, make_folder, read_json, sealed, write_json, write_text
from repro.base.settings import EMBEDDED, GEMMA
from repro.report import look
from repro.report.changes import Line, verdict
from repro.report.page import HEADLINES
from repro.report.publish import changed, leaves
from repro.report.story import story
from repro.stages.folder import checkpoint

KNOWN = {EMBEDDED: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"), GEMMA: ("google/gemma-3-270m", "gemma")}


def export(run: Path, folder: Path, iteration: int | None = None) -> Path:
    """Copy the weights of a finished `run` after an `iteration`, by default its last, to a new `folder`, with README.md,
    the model card. Raises UserError where the run, its weights or a place for them is missing; then nothing is left."""
    if len(leaves(run)) > 1:
        raise UserError(f"{run}: several runs; name one of them: {', '.join(str(leaf) for leaf in leaves(run))}")
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run}: no metrics.json; only a finished run can be exported")
    config = read_json(run / "run.json")["config"]
    iteration = config["iterations"] if iteration is None else iteration
    if not 1 <= iteration <= config["iterations"]:
        raise UserError(f"--iteration {iteration}: 1 to {config['iterations']} (0 would be the initial model)")
    weights = run / checkpoint(iteration)
    if not sealed(weights):
        raise UserError(f"{weights}: not there, or not as it was written; run its command again to train it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already; name a new folder")
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=make_folder(folder.absolute().parent)))
    try:
        shutil.copytree(weights, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("complete.json"))
        write_text(part / "README.md", card(run, iteration))
        for adapter in part.glob("*/adapter_config.json"):  # peft wrote this machine's folder
            write_json(adapter, read_json(adapter) | {"base_model_name_or_path": _base(config)[0]})
        part.chmod(0o755)  # mkdtemp's is the owner's alone
        part.replace(folder)
    except OSError as e:
        raise UserError(f"{folder}: {first_line(e)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _base(config: dict) -> tuple[str, str | None]:
    """The model that training began from, as the hub names it, or by its label; and its licence, where it is known."""
    name, label = config["model"]["name"], config["model"]["label"]
    return KNOWN.get(name, (name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else label, None))


def card(run: Path, iteration: int) -> str:
    """The model card, in the hub's form. The numbers are of the last iteration; of an earlier one it says so."""
    from huggingface_hub import ModelCardData

    config, one, own = read_json(run / "run.json")["config"], story(run), changed([run])
    base, licence = _base(config)
    data = ModelCardData(base_model=base, license=licence, library_name="transformers", pipeline_tag="text-generation",
                         tags=["sami", "alignment", "mutual-information"])
    lines = [line for found in own.values() for line in found]
    last, facts = config["iterations"], (*one["setting"], f"Measured on {one['measured']}; {one['took']}.", one["not_run"],
                                         *one["worsened"])
    principles = [list(map(look.plain, row)) for row in one["principles"][1]]
    earlier = f"The numbers are those of iteration {last}.\n\n" if iteration < last else ""
    terms = ("" if licence else " Its licence is that of the model it was made from.") + (
        " Training began from the weights of its 4-bit package." if config["model"]["name"] in KNOWN else "")
    return f"""---
{data.to_yaml()}
---

# {config['name']}, iteration {iteration}

{base} after {iteration} of {last} iterations of SAMI ([arXiv 2404.14313](https://arxiv.org/abs/2404.14313)):
trained without preference labels so that its responses tell the constitutions they were asked under apart.{terms}

## What training did

{earlier}""" + "\n".join(_told(line) for line in lines) + """
Changes are paired, on held-out queries; in brackets 95 % intervals over queries. A side is followed where a program finds
it and the response still answers. A bound that rises is not yet following.

## Principles

""" + look.table(["name", "principle", "antithesis", "rule"], principles) + """
## Where it comes from

""" + "\n".join(f"- {look.plain(fact)}" for fact in facts) + "\n"


def _told(line: Line) -> str:
    rows = [[m.name, line.ends(m), look.said(line.change(m), max(m.digits, 1), "+"), str(line.change(m).n)]
            for m in HEADLINES if line.known(m)]
    sentences = "".join(f"- {sentence}\n" for sentence in verdict(line))
    subset = look.plain(line.subset.replace("_", " "))
    return f"### {subset} queries\n\n{sentences}\n" + look.table(
        ["measure", "initial -> last", "change", "queries"], rows)
