"""An experiment's file and the flags of `repro run` -> the Experiments to run."""

import dataclasses
import importlib.util
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repro.base import settings
from repro.base.checks import choose
from repro.base.places import EXPERIMENTS
from repro.base.records import UserError, first_line, read_json
from repro.base.settings import JUDGES, NAME, WRITERS, Experiment, LoraSpec, WriterSpec
from repro.flags import Run
from repro.text.queries import SOURCES

FLAGS = {"DataSpec.source": "queries", "DataSpec.subsets": "subsets", "DataSpec.train": "train_queries",
         "DataSpec.evaluation": "evaluation_queries", "DataSpec.evaluation_split": "evaluation_split",
         "DataSpec.leakage": "leakage", "SamplingSpec.engine": "sampler", "SamplingSpec.max_new_tokens": "max_new_tokens",
         "SamplingSpec.drop_phrases": "drop_phrases", "TrainSpec.batch_size": "batch_size", "LoraSpec.rank": "lora",
         "TrainSpec.learning_rate": "learning_rate", "TrainSpec.precision": "precision", "TrainSpec.dose": "dose",
         "TrainSpec.dropout": "dropout", "TrainSpec.pack_tokens": "pack_tokens", "ModelSpec.prompt": "prompt",
         "JudgeSpec.judges": "judge", "JudgeSpec.model": "judge_model", "JudgeSpec.name": "judge_model",
         "JudgeSpec.answer": "answer", "WriterSpec.label": "writer_model", "Experiment.iterations": "iterations",
         "Experiment.task": "task", "Experiment.cot": "cot"}
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
    kind = found and getattr(settings, found[1], None)
    if not dataclasses.is_dataclass(kind):
        return None
    try:
        choose(f"{found[1]}: field", found[2], [f.name for f in dataclasses.fields(kind)])
    except UserError as e:
        return str(e)


def configure(args: Run) -> tuple[Experiment, ...]:
    """The experiment's runs with the flags laid over each. What is wrong with a field that a flag has set is told in the
    flag's name."""
    with told_of(args, FLAGS):
        return _configured(args)


@contextmanager
def told_of(args, flags: dict[str, str]) -> Iterator[None]:
    """A UserError about a field of base/settings.py, as one about the flag that holds it (`flags`: field -> attribute of
    `args`), where that was given."""
    try:
        yield
    except UserError as e:
        field, colon, what = str(e).partition(":")
        if not colon or field not in flags or getattr(args, flags[field]) is None:
            raise
        raise UserError(f"--{flags[field].replace('_', '-')}:{what}") from None


def _configured(args: Run) -> tuple[Experiment, ...]:
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
        return spec if folder is None else dataclasses.replace(
            spec, **{field: folder, "label": Path(folder).name if label is None else label})

    local = base.writer and base.writer.kind == "local"
    return dataclasses.replace(base, model=other(base.model), baseline=other(base.baseline),
                               writer=other(base.writer, "model", "") if local else base.writer)


def over(spec, **changes):
    return dataclasses.replace(spec, **{k: v for k, v in changes.items() if v is not None})


def _with_flags(base: Experiment, args: Run) -> Experiment:
    subsets = args.subsets
    if subsets is None and args.queries is not None and not set(base.data.subsets) <= set(SOURCES.get(args.queries, ())):
        subsets = ()  # all that these queries have
    data = over(base.data, source=args.queries, subsets=subsets, train=args.train_queries,
                 evaluation=args.evaluation_queries, evaluation_split=args.evaluation_split,
                 leakage=args.leakage, truncate=args.truncate or None)
    label = None if args.model is None else Path(args.model).name
    named = args.judge and tuple("rule" if j == "rules" else choose("--judge", j, ("rules", *JUDGES)) for j in args.judge)
    judge = over(base.judge, judges=named, model=args.judge_model, answer=args.answer)
    name = base.name + "_cot" * bool(args.cot and not base.cot) + "_lora" * (args.lora is not None)
    lora = None if args.lora is None else LoraSpec(rank=args.lora, alpha=2 * args.lora)
    rate = LORA_RATE if lora and args.learning_rate is None else args.learning_rate
    return dataclasses.replace(
        over(base, name=args.name or name, seed=args.seed, constitutions=args.constitutions, task=args.task,
              cot=args.cot or None, data=data, judge=judge, iterations=args.iterations,
              sampling=over(base.sampling, engine=args.sampler, max_new_tokens=args.max_new_tokens,
                            drop_phrases=args.drop_phrases, reasoning=args.reasoning or None),
              train=over(base.train, batch_size=args.batch_size, learning_rate=rate, precision=args.precision,
                          dose=args.dose, dropout=args.dropout, pack_tokens=args.pack_tokens, lora=lora),
              model=over(base.model, name=args.model, label=label, prompt=args.prompt)),
        writer=_writer(base.writer, args))


def _writer(base: WriterSpec | None, args: Run) -> WriterSpec | None:
    kind = args.writer and choose("--writer", args.writer, ("hand", *WRITERS))
    if kind == "hand" or (kind is None and base is None):
        if args.writer_model or args.writer_url or args.asked:
            raise UserError("--writer-model, --writer-url and --asked need --writer local or openai")
        return None
    base = base or WriterSpec()
    if kind == "openai" and not args.writer_model:
        raise UserError("--writer openai needs the name of a model at its server: --writer-model")
    if args.writer_url and (kind or base.kind) != "openai":
        raise UserError("--writer-url needs --writer openai")
    return over(base, kind=kind, model=args.writer_model, label=args.writer_model and "", asked=args.asked)
