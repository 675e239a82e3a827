"""What each command of the command line takes: a field is a flag, the text below it its help."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Run:
    """Run an experiment, or what is left of it."""

    experiment: tyro.conf.Positional[str]
    """exp1, ..., or a Python file that holds EXPERIMENTS, a dict of profile -> Experiment."""
    profile: str | None = None
    """The setting: mini (minutes on a CPU; by default) or paper (as published); of a file with a single one, that."""
    out: Path = Path("runs")
    """The run's folder is OUT/<experiment>/<profile>, and one in it for each of several variants."""
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
    """A shipped set (dialogue, dialogue_mini, tldr, tldr_mini, diverse) or a JSON or TOML file of principles. With a
    writer: what the run goes on with where nothing that it writes can be used."""
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
    reasoning: bool = False
    """Let a model reason before it responds, where its chat template has a switch for it; by default that is off where it
    can be. The reasoning is not trained on."""
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
    leave_out: tuple[str, ...] | None = None
    """What the servers of judge and writer are not sent: any of seed, temperature, max_tokens (max_completion_tokens goes
    in its place), or nothing. By default found out by a small request."""
    price: tuple[float, float] | None = None
    """USD per million prompt and completion tokens of judge and writer, where the table does not know the model."""
    max_usd: float = 10.0
    """What the openai judge may cost in a run's folder, earlier runs included, and what the openai writer; never
    exceeded."""
    precision: str | None = None
    """Of training: fp32_master (float32 weights, bf16 products), bf16 (weights too), or fp32."""
    dose: str | None = None
    """as_printed (the paper's Table 1) or as_run (what the authors' code and logs show)."""
    leakage: str | None = None
    """remove takes training queries that are also held out out of training; keep leaves them, as the paper's runs did."""
    pack_tokens: int | None = None
    """Training tokens between two backward passes; fewer take less memory (`repro plan` says how much)."""
    dropout: str | None = None
    """In training: off, or drawn (at the rates of the model's config)."""
    lora: int | None = None
    """Train adapters of this rank instead of all weights (needs the extra `lora`), for one GPU of 24 GB. The run is named
    <experiment>_lora."""
    ranks: int = 1
    """Processes that train (torchrun, FSDP2), one GPU each where there are any; any number gives the same update."""
    nodes: int = 1
    """Machines that train, with that many processes each; the run names the command for the others
    (experiments/README.md)."""
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
    """Tokens of one response, at most (reasoning not counted)."""
    drop_phrases: tuple[str, ...] | None = None
    """A pair of responses does not train where one of them holds one of these texts (none: no such check); by default the
    experiment's."""


@dataclass(frozen=True)
class Plan:
    """Say what an experiment takes before it starts: bytes per GPU, FLOPs, tokens, hours, judge cost; what fits, and the
    change that makes it fit. Needs no weights, no GPU and no network."""

    experiment: tyro.conf.Positional[str]
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
    leave_out: tuple[str, ...] | None = None
    """What the server is not sent: any of seed, temperature, max_tokens (max_completion_tokens goes in its place), or
    nothing. By default found out by a small request."""
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
    out: Path | None = None
    """With --admit: where the record goes; by default results/judges (of the checkout; of a wheel, below the current
    folder), where runs look for it."""


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
