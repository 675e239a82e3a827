"""An experiment's file and the flags of `repro run` -> the Experiments to run."""

import collections
import dataclasses
import importlib.util
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repro.base import settings, training
from repro.base.checks import choose
from repro.base.places import EXPERIMENTS
from repro.base.records import UserError, first_line, read_json
from repro.base.settings import NAME, WRITERS, Experiment, WriterSpec, prompt_for
from repro.base.training import LoraSpec
from repro.text.queries import SOURCES

LORA_RATE = 1e-4  # of adapters, whose second factor starts at zero


def shipped() -> dict[str, Path]:
    """The experiments that come with the project: stem of the file -> file, in order. UserError where there are none."""
    if found := {p.stem: p for p in sorted(EXPERIMENTS.glob("exp*.py"))}:
        return found
    raise UserError(f"{EXPERIMENTS}: this installation of sami-repro is broken, it holds no experiments; install it anew, "
                    "from a wheel made by `pip wheel --no-deps .` in a whole checkout, or by `pip install -e .` there")


def load_experiment(name: str, profile: str | None, default: str = "mini") -> tuple[Experiment, ...]:
    """The runs of a shipped experiment or a user's Python file, in a profile: one, or one of each variant. No `profile`:
    `default`, or the only one that a file has."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise UserError(f"experiment {name}: no such file")
    else:
        known = shipped()
        short = {stem.split("_")[0]: stem for stem in known}
        path = known[short.get(name) or choose("experiment", name, (*short, *known))]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except Exception as e:  # the user's own Python: name the line, not our stack
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        line = getattr(e, "lineno", None) or (lines[-1] if lines else 1)
        raise UserError(f"{path}:{line}: {_unknown_field(e) or f'{type(e).__name__}: {first_line(e)}'}") from e
    profiles = getattr(module, "EXPERIMENTS", None)
    if not isinstance(profiles, dict) or not profiles:
        raise UserError(f"{path}: EXPERIMENTS: must be a dict of profile -> Experiment, or a tuple of them")
    runs = {k: v if isinstance(v, tuple) else (v,) for k, v in profiles.items()}
    if not all(each and all(isinstance(e, Experiment) for e in each) for each in runs.values()):
        raise UserError(f"{path}: EXPERIMENTS: must be a dict of profile -> Experiment, or a tuple of them")
    if profile is None:
        profile = next(iter(runs)) if len(runs) == 1 else default
        if profile not in runs:
            raise UserError(f"{path}: give --profile: one of {', '.join(map(repr, runs))}")
    found = runs[choose("--profile", profile, tuple(runs))]
    if len({e.path for e in found}) < len(found) or (len(found) > 1 and not all(e.variant for e in found)):
        raise UserError(f"{path}: EXPERIMENTS[{profile!r}]: each of several runs needs a variant of its own")
    if len({(e.name, e.profile) for e in found}) > 1:
        raise UserError(f"{path}: EXPERIMENTS[{profile!r}]: the runs must have one name and profile")
    return found


def paper_models() -> dict[str, str]:
    """Label -> name of the models of the paper's runs."""
    specs = [spec for name in shipped() for e in load_experiment(name, "paper")
             for spec in (e.model, e.baseline) if spec]
    return {spec.label: spec.name for spec in specs}


def _unknown_field(error: Exception) -> str | None:
    """What is wrong with a field that a dataclass of repro/base/settings.py does not have; None for any other error."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = found and (getattr(settings, found[1], None) or getattr(training, found[1], None))
    if not dataclasses.is_dataclass(kind):
        return None
    try:
        choose(f"{found[1]}: field", found[2], [f.name for f in dataclasses.fields(kind)])
    except UserError as e:
        return str(e)


@contextmanager
def told_of(args) -> Iterator[None]:
    """A UserError about a setting, as one about the flag that it was given by (repro/flags.py)."""
    try:
        yield
    except UserError as e:
        named, colon, what = str(e).partition(":")
        for f in dataclasses.fields(args):
            of, name = f.metadata.get("of", (None, None))
            if colon and of and named == f"{of.__name__}.{name}" and getattr(args, f.name) != f.default:
                raise UserError(f"--{f.name.replace('_', '-')}:{what}") from None
        raise


def configure(args) -> tuple[Experiment, ...]:
    """The experiment's runs with the flags of `repro run` (`args`, a repro.flags.Run) laid over each. What is wrong with a
    setting that a flag has given is told in the flag's name."""
    with told_of(args):
        return _configured(args)


def _configured(args) -> tuple[Experiment, ...]:
    runs = load_experiment(args.experiment, args.profile)
    if args.models:
        runs = tuple(_with_models(e, args.models) for e in runs)
    runs = only_variant(runs, args.variant, args.experiment)
    if args.name is not None and not re.fullmatch(NAME, args.name):
        raise UserError(f"--name {args.name!r}: allowed are letters, digits and _ . -")
    asked_of_writer = args.writer in WRITERS or args.writer_model or args.writer_url or args.asked
    if asked_of_writer and len(runs) > 1:  # of several runs, those with a writer
        if not any(e.writer for e in runs):
            raise UserError("--writer: no run of this experiment has a writer; choose one with --variant")
        return tuple(_with_flags(e, args if e.writer else dataclasses.replace(
            args, writer=None, writer_model=None, writer_url=None, asked=None)) for e in runs)
    if args.cot and any(e.cot for e in runs):
        raise UserError("--cot: this profile has runs with chain of thought; choose one with --variant")
    return tuple(_with_flags(e, args) for e in runs)


def only_variant(runs: tuple[Experiment, ...], variant: str | None, name: str) -> list[Experiment]:
    """All runs of an experiment, or the one that is asked for."""
    if variant is not None and not runs[0].variant:
        raise UserError(f"--variant {variant}: {name} has one run in profile {runs[0].profile}")
    return [e for e in runs if variant in (None, e.variant)] or [choose("--variant", variant, [e.variant for e in runs])]


def _with_models(base: Experiment, path: Path) -> Experiment:
    """The experiment with other models in the place of those that the file at `path` names. Each takes its folder's name:
    what is measured of it is never put down to the model that it stands for."""
    folders = read_json(path)
    if not isinstance(folders, dict) or not all(isinstance(v, str) and v for v in folders.values()):
        raise UserError(f"--models {path}: must be an object of {{name: folder}}")

    def other(spec, field="name", label=None):
        folder = spec and folders.get(getattr(spec, field))
        if folder is None:
            return spec
        form = {"prompt": prompt_for(folder, None) or spec.prompt} if field == "name" else {}
        return dataclasses.replace(spec, **{field: folder, "label": Path(folder).name if label is None else label}, **form)

    local = base.writer and base.writer.kind == "local"
    return dataclasses.replace(base, model=other(base.model), baseline=other(base.baseline),
                               writer=other(base.writer, "model", "") if local else base.writer)


def _with_flags(base: Experiment, args) -> Experiment:
    given = collections.defaultdict(dict)
    for f in dataclasses.fields(args):
        if f.metadata.get("at") is not None and (value := getattr(args, f.name)) != f.default:
            given[f.metadata["at"]][f.metadata["of"][1]] = value
    source, subsets = args.queries, set(base.data.subsets)
    if args.subsets is None and source is not None and not subsets <= set(SOURCES.get(source, ())):
        given["data"]["subsets"] = ()  # all that these queries have
    if args.model is not None:
        given["model"]["label"] = Path(args.model).name
        if prompt := prompt_for(args.model, args.prompt):
            given["model"]["prompt"] = prompt
    if lora := given.pop("lora", None):
        given["train"] = {"learning_rate": LORA_RATE, "lora": LoraSpec(**lora, alpha=2 * args.lora)} | given["train"]
    name = base.name + "_cot" * bool(args.cot and not base.cot) + "_lora" * bool(lora)
    own = given.pop("", {}) | {"name": args.name or name, "writer": _writer(base.writer, args, given.pop("writer", {}))}
    return dataclasses.replace(base, **own | {part: dataclasses.replace(getattr(base, part), **changes)
                                              for part, changes in given.items()})


def _writer(base: WriterSpec | None, args, changes: dict) -> WriterSpec | None:
    kind = args.writer and choose("--writer", args.writer, ("hand", *WRITERS))
    if kind == "hand" or (kind is None and base is None):
        if changes or args.writer_url:
            raise UserError("--writer-model, --writer-url and --asked need --writer local or openai")
        return None
    base = base or WriterSpec()
    if kind == "openai" and not args.writer_model:
        raise UserError("--writer openai needs the name of a model at its server: --writer-model")
    if args.writer_url and (kind or base.kind) != "openai":
        raise UserError("--writer-url needs --writer openai")
    label = "" if "model" in changes else base.label
    return dataclasses.replace(base, **{"kind": kind or base.kind, "label": label} | changes)
