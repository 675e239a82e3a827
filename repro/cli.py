"""The command line: `repro run | plan | judge | publish | verify | figures`. The Makefile calls it.

Every setting beyond these flags is Python or a file. Exit codes: 0 done; 1 a check failed (verify); 2 an input that
cannot be used (one line says which); 130 and 143 stopped by a signal.
"""

import dataclasses
import difflib
import functools
import importlib.util
import io
import operator
import os
import re
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from repro import config
from repro.config import JUDGES, NAME, WRITERS, Experiment, JudgeSpec, LoraSpec, WriterSpec, choose
from repro.datasets import SOURCES
from repro.endpoint import Endpoint
from repro.records import UserError, first_line, read_json
from repro.report import cut_answers, leaves
from repro.run_figures import select, series, telling

LORA_RATE = 1e-4  # of adapters, whose second factor starts at zero
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@dataclass(frozen=True)
class Run:
    """Run an experiment, or what is left of it."""

    experiment: tyro.conf.Positional[str]
    """exp1, ..., or a Python file that holds EXPERIMENTS, a dict of profile -> Experiment."""
    profile: str = "mini"
    """The setting: mini (minutes on a CPU) or paper (as published)."""
    out: Path = Path("runs")
    """The run's folder is OUT/<experiment>/<profile>."""
    name: str | None = None
    """Another name than the experiment's own, so that a variant keeps its own folder."""
    seed: int | None = None
    """Seed of the order of queries, pairs and principles."""
    model: str | None = None
    """The policy: smollm2-135m-instruct (embedded), a folder in Hugging Face format, or a hub name."""
    prompt: str | None = None
    """chat: the tokenizer's chat template; plain: the text that base models continue."""
    queries: str | None = None
    """embedded, embedded-tldr, hh-rlhf, tldr, a folder with TL;DR's parquet files, or a JSONL file of {"query", "subset"?,
    "split"?, "id"?} rows."""
    subsets: tuple[str, ...] | None = None
    """Which subsets of the queries to use; of a JSONL file, by default all."""
    train_queries: int | None = None
    """Training queries per subset, at most."""
    evaluation_queries: int | None = None
    """Held-out queries per subset, at most."""
    evaluation_split: str | None = None
    """evaluation, or development while choosing settings."""
    variant: str | None = None
    """Of an experiment of several runs (exp2: weak, hand), only this one."""
    constitutions: str | None = None
    """A shipped set (dialogue, dialogue_mini, tldr, diverse) or a JSON or TOML file of principles. With a writer: what the
    run goes on with where nothing that it writes can be used."""
    task: str | None = None
    """What the model does with a query: dialogue (answers it) or summary (summarises it)."""
    writer: str | None = None
    """Who writes the principles: hand (the file of --constitutions), local (a model on this machine, by default the
    embedded one) or openai (one behind an OpenAI-compatible server)."""
    writer_model: str | None = None
    """The writer's model: a folder, a hub name, or its name at the server."""
    writer_url: str | None = None
    """The openai writer's server; by default the hosted one."""
    asked: str | None = None
    """What the writer is told that the model has to do, such as "write a summary of a forum post"."""
    cot: bool = False
    """Chain of thought: samples reason first; the reasoning is not trained on. The run is named <experiment>_cot. (In
    profile paper exp3 has a variant of its own for it.)"""
    truncate: bool = False
    """Cut queries that are longer than the context, instead of refusing them."""
    judge: tuple[str, ...] | None = None
    """Who judges: rules, likelihood, openai (a model behind any OpenAI-compatible server); several at once."""
    judge_model: str | None = None
    """The model's name at the openai judge's server."""
    base_url: str | None = None
    """The openai judge's server, such as http://127.0.0.1:8000/v1; by default the hosted one."""
    answer: str | None = None
    """How that judge answers: schema, text, logprobs, or auto."""
    price: tuple[float, float] | None = None
    """USD per million prompt and completion tokens of judge and writer, where the table does not know the model."""
    max_usd: float = 10.0
    """What the openai judge may cost in a run's folder, earlier runs included, and what the openai writer; never
    exceeded."""
    pack_tokens: int | None = None
    """Training tokens between two backward passes; fewer take less memory (`repro plan` says how much)."""
    lora: int | None = None
    """Train adapters of this rank instead of all weights (needs the extra `lora`), for one GPU of 24 GB. The run is named
    <experiment>_lora."""
    ranks: int = 1
    """Processes that train (torchrun, FSDP2), one GPU each where there are any; any number gives the same update."""
    nodes: int = 1
    """Machines that train, with that many processes each; the run names the command for the others (README)."""
    models: Path | None = None
    """A JSON file of {name: folder}: models to put in the place of those that the experiment names (policy, baseline,
    writer), all at once. They keep their folders' names in the records."""
    sampler: str | None = None
    """Who samples: transformers (in this process), vllm (a server that the run starts, or one at --sampler-url), or server
    (any OpenAI-compatible one that takes text: transformers serve, or one at --sampler-url)."""
    sampler_url: str | None = None
    """A server to sample from that is already there, such as http://127.0.0.1:8000/v1. Where it has to serve other weights,
    the run stops and says which."""
    tensor_parallel: int | None = None
    """GPUs that hold one copy of the model together in the vllm server that the run starts (by default all); the others
    hold further copies."""
    iterations: int | None = None
    """SAMI iterations."""
    batch_size: int | None = None
    """Queries of one training step."""
    learning_rate: float | None = None
    """Of training; by default the experiment's, with --lora 1e-4."""
    max_new_tokens: int | None = None
    """Tokens of one response, at most (the reasoning of a chain of thought not counted)."""


@dataclass(frozen=True)
class Plan:
    """Say what an experiment takes before it starts: bytes per GPU, FLOPs, tokens, hours, judge cost; what fits, and the
    change that makes it fit. Needs no weights, no GPU and no network."""

    experiment: tyro.conf.Positional[str]
    """exp1, ..., a Python file that holds EXPERIMENTS, or all: the three experiments."""
    profile: str = "paper"
    """The setting: paper (as published) or mini."""
    variant: str | None = None
    """Of an experiment of several runs (exp2: mistral-7b, mixtral-8x7b), only this one."""
    gpus: int | None = None
    """How many GPUs there are; by default 8. With `all` and no GPU flag: 8 x 80 GB, 1 x 141 GB and 1 x 24 GB."""
    gpu_memory: float | None = None
    """GB of a GPU; by default the named GPU's, or 80."""
    gpu: str | None = None
    """Whose speed counts: a100, h100, h200, a10, rtx3090, rtx4090; by default a usual one of that memory."""
    fraction: float = 0.4
    """Share of that GPU's rates that is reached: an assumption."""
    model: str | None = None
    """Another model: a folder, or a hub name."""
    config: Path | None = None
    """The config.json of a model that is not on this machine."""
    lora: int = 0
    """Train LoRA adapters of this rank on frozen bf16 weights; 0 trains all weights."""
    response_tokens: float | None = None
    """Mean tokens of a response; by default what the authors' record holds of the paper's runs, else the cap."""
    judge_model: str | None = None
    """The LLM judge whose cost is told; by default the experiment's, or gpt-4.1-mini."""
    price: tuple[float, float] | None = None
    """USD per million prompt and completion tokens of a judge that the table does not know."""
    usd_per_gpu_hour: float | None = None
    """What a GPU costs, to tell the run's cost."""
    out: Path | None = None
    """Also write the plan to this file (Markdown)."""


@dataclass(frozen=True)
class Judge:
    """Judge a finished run's stored responses with an LLM, in both orders; or (--admit) hold a judge against the archive.

    Every answer is kept and none is asked for twice: the same command goes on where it stopped.
    """

    run: tyro.conf.Positional[Path | None] = None
    """A run folder."""
    admit: bool = False
    """Instead: judge archived responses and planted injections, and write results/judges/<judge>.json."""
    model: str = ""
    """The model's name at its server."""
    name: str = ""
    """The judge's name in records and figures; by default the model's."""
    base_url: str | None = None
    """Any OpenAI-compatible server, such as http://127.0.0.1:8000/v1; by default the hosted one."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    answer: str = "auto"
    """schema: a JSON object; text: Comparison / Final Response; logprobs: which of A and B is likelier (one token);
    auto: schema where the server keeps to it, else text."""
    max_tokens: int = 300
    """Completion tokens of one answer, at most (a reasoning model needs more)."""
    temperature: float | None = 0.0
    """None leaves it to the server (some models allow no other)."""
    price: tuple[float, float] | None = None
    """USD per million prompt and completion tokens; by default a dated table, and 0 for a server on this machine."""
    max_usd: float = 10.0
    """What this judge may cost in this folder, earlier runs included; never exceeded."""
    concurrency: int = 8
    """Requests in flight, at most."""
    deadline: float = 120.0
    """Seconds for one whole request."""
    attempts: int = 5
    """Tries of one request whose server fails, per run of this command."""
    dry_run: bool = False
    """Say what it would ask and cost; needs no key and no server."""
    reparse: bool = False
    """Read the stored answers again and ask nothing."""
    strict: bool = False
    """Exit with 1 if a verdict is missing (failed or unparsed)."""
    files: tuple[str, ...] = ()
    """With --admit: archived comparisons, or all; by default four of them."""
    items: int = 100
    """With --admit: items of each."""
    archive: Path | None = None
    """With --admit: the authors' record; by default ../shared/archive, else a pinned download."""
    work: Path = Path("runs/judges")
    """With --admit: where the raw answers go, in a folder of the judge's name."""
    out: Path = Path("results/judges")
    """With --admit: where the record goes."""


@dataclass(frozen=True)
class Publish:
    """Copy finished runs (one experiment, one seed each) to results/: numbers, figure and page only."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    results: Path = Path("results")
    """Where to."""
    numbers_only: bool = False
    """Leave out the page, which shows responses: for queries that are not ours to print."""


@dataclass(frozen=True)
class Verify:
    """Recompute the paper's tables from the authors' record; or a run's numbers from what it keeps, and hold those of a run
    of the paper's models against the printed cells."""

    run: tyro.conf.Positional[Path | None] = None
    """A run folder (or a published one); without it the paper itself is verified."""
    archive: Path | None = None
    """The authors' record as <repo>/<path>; by default ../shared/archive, else a pinned download."""
    out: Path = Path("results/verify")
    """Where verify.json and the page for readers go."""
    strict: bool = False
    """Exit with 1 for NOT RUN too (with a run: unless every cell is PASS)."""
    responses: bool = False
    """Download the archived responses too (20 MB), which tell identical texts among the ties."""


@dataclass(frozen=True)
class Figures:
    """Redraw the paper's figures from the authors' record."""

    archive: Path | None = None
    """The authors' record as <repo>/<path>; by default ../shared/archive, else a pinned download."""
    out: Path = Path("results/figures")
    """Where the .pdf, .png and .csv files go."""
    run: tuple[Path, ...] = ()
    """Folders of our own runs to draw in the same panels."""


def load_experiment(name: str, profile: str) -> tuple[Experiment, ...]:
    """The runs of a shipped experiment or a user's Python file, in a profile: one, or one of each variant."""
    shipped = {p.stem: p for p in sorted(EXPERIMENTS.glob("exp*.py"))}
    short = {stem.split("_")[0]: stem for stem in shipped}
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise UserError(f"experiment {name}: no such file")
    else:
        path = shipped[short.get(name) or choose("experiment", name, (*short, *shipped))]
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
    found = runs[choose("--profile", profile, tuple(runs))]
    if len({e.path for e in found}) < len(found) or (len(found) > 1 and not all(e.variant for e in found)):
        raise UserError(f"{path}: EXPERIMENTS[{profile!r}]: each of several runs needs a variant of its own")
    if len({(e.name, e.profile) for e in found}) > 1:
        raise UserError(f"{path}: EXPERIMENTS[{profile!r}]: the runs must have one name and profile")
    return found


def _unknown_field(error: Exception) -> str | None:
    """What is wrong with a field that a dataclass of repro/config.py does not have; None for any other error."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = found and getattr(config, found[1], None)
    if not dataclasses.is_dataclass(kind):
        return None
    try:
        choose(f"{found[1]}: field", found[2], [f.name for f in dataclasses.fields(kind)])
    except UserError as e:
        return str(e)


def configure(args: Run) -> tuple[Experiment, ...]:
    """The experiment's runs with the flags laid over each."""
    runs = load_experiment(args.experiment, args.profile)
    if args.models:
        runs = tuple(_with_models(e, args.models) for e in runs)
    runs = _variants(runs, args.variant, args.experiment)
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


def _variants(runs: tuple[Experiment, ...], variant: str | None, name: str) -> list[Experiment]:
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


def _over(spec, **changes):
    return dataclasses.replace(spec, **{k: v for k, v in changes.items() if v is not None})


def _with_flags(base: Experiment, args: Run) -> Experiment:
    subsets = args.subsets
    if subsets is None and args.queries is not None and not set(base.data.subsets) <= set(SOURCES.get(args.queries, ())):
        subsets = ()  # all that these queries have
    data = _over(base.data, source=args.queries, subsets=subsets, train=args.train_queries,
                 evaluation=args.evaluation_queries, evaluation_split=args.evaluation_split,
                 truncate=args.truncate or None)
    label = None if args.model is None else Path(args.model).name
    named = args.judge and tuple("rule" if j == "rules" else choose("--judge", j, ("rules", *JUDGES)) for j in args.judge)
    judge = _over(base.judge, judges=named, model=args.judge_model, answer=args.answer)
    name = base.name + "_cot" * bool(args.cot and not base.cot) + "_lora" * (args.lora is not None)
    lora = None if args.lora is None else LoraSpec(rank=args.lora, alpha=2 * args.lora)
    rate = LORA_RATE if lora and args.learning_rate is None else args.learning_rate
    return dataclasses.replace(
        _over(base, name=args.name or name, seed=args.seed, constitutions=args.constitutions, task=args.task,
              cot=args.cot or None, data=data, judge=judge, iterations=args.iterations,
              sampling=_over(base.sampling, engine=args.sampler, max_new_tokens=args.max_new_tokens),
              train=_over(base.train, batch_size=args.batch_size, learning_rate=rate, pack_tokens=args.pack_tokens,
                          lora=lora),
              model=_over(base.model, name=args.model, label=label, prompt=args.prompt)),
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
    return _over(base, kind=kind, model=args.writer_model, label=args.writer_model and "", asked=args.asked)


def summary(folder: Path) -> list[str]:
    """The last lines of a run: where the page is, and what happened to MI, length and following."""
    metrics = read_json(folder / "metrics.json")
    first, last = 0, max(r["iteration"] for r in metrics)
    tell, models = telling(metrics), {line["model"] for line in series(metrics)}

    def change(label, digits, **fixed):
        found = {}
        for row in select(metrics, **fixed):
            if row["iteration"] in (first, last) and row["model"] in models:  # not a baseline's
                found.setdefault(tell(row), {})[row["iteration"]] = row
        parts = [f"{key} {a[first]['value']:.{digits}f} -> {a[last]['value']:.{digits}f} "
                 f"(±{a[last]['sem'] or 0:.{digits}f})" for key, a in found.items() if {first, last} <= a.keys()]
        return f"{label}: " + ", ".join(parts) if parts else f"{label}: NOT RUN"

    lines = [change("InfoNCE bound, nats", 3, metric="mi", estimator="infonce", principle=None),
             change("length, tokens", 1, metric="length_tokens"),
             change("following, by rule", 2, metric="following", principle=None)]
    lines += [(f"{leaf.name}: " if leaf != folder else "") + line for leaf in leaves(folder) for line in cut_answers(leaf)]
    stages = [s for leaf in leaves(folder) for s in read_json(leaf / "run.json")["stages"].values()]
    lines.append(f"{sum(s['seconds'] for s in stages) / 60:.1f} minutes of work in all, peak memory "
                 f"{max(s['peak_rss_gib'] for s in stages):.1f} GiB")

    (line, *others) = series(metrics)

    def ends(digits, **fixed):
        found = [select(metrics, iteration=i, principle=None, **line, **fixed) for i in (first, last)]
        return " -> ".join(f"{rows[0]['value']:.{digits}f}" for rows in found) if all(found) else "NOT RUN"

    of = f" of {tell(line)}" if others else ""
    lines.append(f"report: {folder / 'report.html'} (iterations 0 -> {last}{of}: "
                 f"bound {ends(2, metric='mi', estimator='infonce')} nats, "
                 f"length {ends(0, metric='length_tokens')} tokens, following {ends(2, metric='following')})")
    return lines


def run_command(args: Run) -> None:
    from repro.pipeline import check_together, run
    from repro.report import gather

    runs = configure(args)
    limits = {"price": args.price, "max_usd": args.max_usd}
    servers = [{"endpoint": Endpoint(model=e.judge.model, base_url=args.base_url, **limits),
                "writer_endpoint": e.writer and Endpoint(model=e.writer.model, base_url=args.writer_url, **limits),
                "sampler_url": args.sampler_url} for e in runs]
    if len(runs) > 1:
        check_together(runs, args.out, servers)
    folders = []
    for experiment, known in zip(runs, servers):
        if len(runs) > 1:
            print(f"--- {experiment.path}", file=sys.stderr)
        folders.append(run(experiment, args.out, ranks=args.ranks, nodes=args.nodes, tensor_parallel=args.tensor_parallel,
                           **known))
    for line in summary(gather(folders)):
        print(line)


PLANNED = ((8, "a100"), (1, "h200"), (1, "rtx4090"))  # what `repro plan all` is made for: GPUs and their kind


def plan_command(args: Plan) -> None:
    from repro import plan_page
    from repro.plan import plan
    from repro.records import write_text
    from repro.sizes import gpu_of

    names = [p.stem for p in sorted(EXPERIMENTS.glob("exp*.py"))] if args.experiment == "all" else [args.experiment]
    settings = [(8 if args.gpus is None else args.gpus, gpu_of(args.gpu, args.gpu_memory))]
    if args.experiment == "all" and (args.gpus, args.gpu, args.gpu_memory) == (None, None, None):
        settings = [(count, gpu_of(kind, None)) for count, kind in PLANNED]
    runs = [e for name in names for e in _variants(load_experiment(name, args.profile), args.variant, name)]
    runs = [dataclasses.replace(e, model=_over(e.model, name=args.model, label=args.model)) for e in runs]
    plans = [plan(e, gpu, count, fraction=args.fraction, config=args.config, lora=args.lora, price=args.price,
                  judge_model=args.judge_model, response_tokens=args.response_tokens)
             for count, gpu in settings for e in runs]
    text = plan_page.document(plans, args.usd_per_gpu_hour)
    print(text, end="")
    if args.out:
        write_text(args.out, text)


def judge_command(args: Judge) -> int:
    from repro import admission, pipeline
    from repro.report import gather

    if args.admit == (args.run is not None):
        raise UserError("judge: give the folder of a finished run, or --admit")
    if not args.model:
        raise UserError("judge: --model is missing: the model's name at its server")
    spec = JudgeSpec(judges=("openai",), model=args.model, name=args.name, answer=args.answer, max_tokens=args.max_tokens,
                     temperature=args.temperature)
    endpoint = Endpoint(model=args.model, base_url=args.base_url, key_env=args.key_env, price=args.price,
                        max_usd=args.max_usd, concurrency=args.concurrency, deadline_s=args.deadline,
                        attempts=args.attempts)
    how = {"dry_run": args.dry_run, "reparse": args.reparse}
    if args.admit:
        record = admission.admit(spec, endpoint, archive=args.archive, wanted=args.files, count=args.items, work=args.work,
                                 out=args.out, **how)
        for line in admission.plain_words(record) if record else ():
            print(line)
        missing = record["parsed_share"]["value"] < 1 or record["attacks"]["missing"] > 0 if record else False
    else:
        rows = [row for leaf in leaves(args.run) for row in pipeline.judge_run(leaf, spec, endpoint, **how)]
        missing = not args.dry_run and any(row["score"] is None for row in rows)
        together = args.run if len(leaves(args.run)) > 1 else args.run.absolute().parent
        if not args.dry_run and len(leaves(together)) > 1:  # a run of several, or all of them
            gather(leaves(together))
        if not args.dry_run:
            print(f"judge {spec.label}: {args.run / 'judgments.jsonl'}, {args.run / 'report.html'}")
            print(admission.standing(spec.label))
    return int(args.strict and missing)


def publish_command(args: Publish) -> None:
    from repro.report import publish

    if not args.runs:
        raise UserError("publish: name at least one run folder")
    print(f"published in {publish(list(args.runs), args.results, page=not args.numbers_only)}")


def verify_command(args: Verify) -> int:
    from repro import checking, published

    if args.run is not None:
        return checking.verify_run(args.run, strict=args.strict)
    return published.verify(args.archive, args.out, strict=args.strict, responses=args.responses)


def figures_command(args: Figures) -> None:
    from repro.figures import draw

    written = draw(args.archive, args.out, list(args.run))
    print(f"{len(written)} files in {args.out}")


COMMANDS = {Run: run_command, Plan: plan_command, Judge: judge_command, Publish: publish_command, Verify: verify_command,
            Figures: figures_command}
Command = functools.reduce(operator.or_, (
    Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in COMMANDS))


def parse(argv: list[str]):
    """The command of `argv`. tyro explains a mistake in a box; here it becomes one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box), redirect_stdout(io.StringIO()) as out:
            return tyro.cli(Command, prog="repro", args=argv, use_underscores=False)
    except SystemExit as e:
        if not e.code:
            print(out.getvalue(), end="")
            raise
        raise UserError(_one_line(box.getvalue())) from None


def _one_line(box: str) -> str:
    """What is wrong, out of tyro's box: the unknown option with the nearest valid one, or the value that fails."""
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{5,}", " ", box).split())
    if unknown := re.search(r"Unrecognized options: (\S+?),? ", words + " "):
        known = sorted({"--" + f.name.replace("_", "-") for kind in COMMANDS for f in dataclasses.fields(kind)}
                       | {kind.__name__.lower() for kind in COMMANDS})
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.4)
        return f"unknown option or command {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "; see repro --help")
    return re.sub(r"(Value error |Missing value |Parsing error )", "", words.split("Argument helptext")[0]
                  ).split(" For full helptext")[0]


def _terminate(signum, frame):
    raise SystemExit(128 + signum)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `repro` command."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale of ASCII alone ends no run at its last line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's own threads warn after a fork
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        raise SystemExit(COMMANDS[type(args)](args) or 0)
    except UserError as e:
        print(f"repro: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as e:  # a path that the system does not take
        if e.filename is None:
            raise
        print(f"repro: {e.filename}: {e.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nrepro: stopped; run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as e:
        if e.code == 143:
            print("\nrepro: stopped; run the same command to go on", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
