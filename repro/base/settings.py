"""What a run is: frozen dataclasses, their checks, and the hash that names a configuration."""

import dataclasses
import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from repro.base.checks import distinct, not_negative, only_allowed, positive, setting
from repro.base.records import UserError
from repro.base.training import PARAMETERS, TrainSpec

EMBEDDED = "smollm2-135m-instruct"
GEMMA = "gemma3-270m"  # a base model: it takes the prompt "plain"


def prompt_for(model: str | None, asked: str | None) -> str | None:
    """The form of prompts that is asked for; where none is, and the model is known to be a base one, plain."""
    return "plain" if asked is None and model == GEMMA else asked


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The policy. `label`: its name in metrics.json."""

    name: str = setting(EMBEDDED, "model")
    """The policy: smollm2-135m-instruct (embedded), gemma3-270m (a base model, with --accept-licence), a folder in Hugging
    Face format, or a hub name."""
    label: str = EMBEDDED
    prompt: str = setting("chat", "prompt", allowed=("chat", "plain"))
    """chat: the tokenizer's chat template (instruction-tuned models); plain: the System / Human / Assistant text that base
    models continue."""

    def __post_init__(self):
        only_allowed(self)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Queries (text/queries.py reads them). `draws`: of a pool of principles, the constitutions that each held-out query is
    answered under: learned, held out."""

    source: str = setting("embedded", "queries")
    """embedded, embedded-tldr, hh-rlhf, tldr, a folder with TL;DR's parquet files, or a JSONL file of {"query", "subset"?,
    "split"?, "id"?} rows."""
    subsets: tuple[str, ...] = setting((), "subsets")
    """Which subsets of the queries to use; none named: all that they have."""
    train: int = setting(112, "train_queries")
    """Training queries per subset, at most."""
    evaluation: int = setting(32, "evaluation_queries")
    """Held-out queries per subset, at most."""
    scored: int = setting(0, "scored_queries")
    """Of these per subset, how many get the bound, which takes most of the time, and answers between the first and the last
    iteration too; 0: all."""
    evaluation_split: str = setting("evaluation", "evaluation_split", allowed=("evaluation", "development"))
    """Which queries are held out: evaluation, or development while choosing settings."""
    leakage: str = setting("remove", "leakage", allowed=("remove", "keep"))
    """remove takes training queries that are also held out out of training; keep leaves them, as the paper's runs did
    (about 100 of the 250 HH evaluation queries occur in the training rows)."""
    truncate: bool = setting(False, "truncate")
    """Cut queries that are longer than the context, instead of refusing them."""
    draws: tuple[int, int] = (1, 1)

    def __post_init__(self):
        positive(self, "train", "evaluation")
        not_negative(self, "scored")
        distinct(self, "subsets")
        if len(self.draws) != 2 or min(self.draws) < 1:
            raise UserError(f"DataSpec.draws: {self.draws!r}; two numbers above 0: learned, held out")
        only_allowed(self)


ENGINES = ("transformers", "vllm", "server")


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """Greedy sampling. The engine transformers takes `batch_size` prompts at a time; vllm gets token ids, server text
    (sampling/launch.py). `dtype`: weights while sampling. `spare`: pairs sampled beyond the need, as a share, to make up
    for drops (stages/sample.py counts why). `full_stop`: drop a pair whose first response does not end in one.
    `reasoning_tokens`: beyond `max_new_tokens`, for a chain of thought or a model that reasons by itself."""

    engine: str = setting("transformers", "sampler", allowed=ENGINES)
    """Who samples: transformers (in this process), vllm (a server that the run starts, or one at --sampler-url), or server
    (any OpenAI-compatible one that takes text: transformers serve, or one at --sampler-url)."""
    max_new_tokens: int = setting(48, "max_new_tokens")
    """Tokens of one response, at most (reasoning not counted)."""
    reasoning_tokens: int = 150
    reasoning: bool = setting(False, "reasoning")
    """Let a model reason before it responds, where its chat template has a switch for it; by default that is off where it
    can be. The reasoning is not trained on."""
    batch_size: int = 32
    dtype: str = setting("bfloat16", allowed=("float32", "bfloat16"))
    spare: float = 0.25
    drop_phrases: tuple[str, ...] = setting((), "drop_phrases")
    """A pair of responses does not train where one of them holds one of these texts (none: no such check)."""
    full_stop: bool = False

    def __post_init__(self):
        positive(self, "max_new_tokens", "reasoning_tokens", "batch_size")
        not_negative(self, "spare")
        if not isinstance(self.drop_phrases, tuple) or not all(isinstance(p, str) and p for p in self.drop_phrases):
            raise UserError(f"SamplingSpec.drop_phrases: {self.drop_phrases!r}; must be a tuple of texts, none empty")
        only_allowed(self)


JUDGES = ("rule", "likelihood", "openai")
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"  # what may be part of a file's name


def safe_name(model: str) -> str:
    """A model's name without what a file's name cannot hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-.")


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """Judges of win rates against the initial model. "rule" is the headline; "likelihood" is a diagnostic, since it
    restates the training objective. A principle without a rule leaves the rule judge NOT RUN.

    "openai" is the model `model` behind an OpenAI-compatible server (repro/judges/llm.py). Where the server is and what it
    may cost is no part of the configuration (repro/servers/endpoint.py).
    """

    judges: tuple[str, ...] = setting(("rule", "likelihood"), "judge", allowed=("rules", *JUDGES))
    """Who judges: rules, likelihood, openai (a model behind any OpenAI-compatible server); several at once."""
    model: str = setting("", "judge_model")
    """The judge's model: its name at the server."""
    name: str = ""
    """The judge's name in records and figures; by default the model's."""
    answer: str = setting("auto", "answer", allowed=("auto", "schema", "text", "logprobs"))
    """How the openai judge answers. schema: a JSON object; text: Comparison / Final Response; logprobs: which of A and B is
    likelier (one token); auto: schema where the server keeps to it, else text."""
    max_tokens: int = 300
    """Completion tokens of one answer, at most (a reasoning model needs more)."""
    temperature: float | None = 0.0
    """None leaves it to the server (some models allow no other)."""

    def __post_init__(self):
        only_allowed(self)
        object.__setattr__(self, "judges", tuple("rule" if judge == "rules" else judge for judge in self.judges))
        distinct(self, "judges")
        positive(self, "max_tokens")
        if self.temperature is not None:
            not_negative(self, "temperature")
        if "openai" in self.judges and not self.model:
            raise UserError("JudgeSpec.model: the openai judge needs the name of a model at its server (--judge-model)")
        if self.model and (not re.fullmatch(NAME, self.label) or self.label in JUDGES):
            named = "name" if self.name else "model"
            raise UserError(f"JudgeSpec.{named}: {self.label!r}; allowed are letters, digits and _ . -, but not "
                            f"{', '.join(JUDGES)}")

    @property
    def label(self) -> str:
        """The LLM judge's name in records, figures and file names."""
        return self.name or safe_name(self.model)


WRITERS = ("local", "openai")


@dataclass(frozen=True, kw_only=True)
class WriterSpec:
    """A language model that writes the principles (sampling/writers.py). `kind`: "local" runs in this process, "openai"
    behind an OpenAI-compatible server. `label`: its name in records, by default the model's. `temperature`: None leaves it
    to the writer: 0.7 here, the server's own there."""

    kind: str = setting("local", allowed=WRITERS)
    model: str = setting(EMBEDDED, "writer_model")
    """The writer's model: a folder, a hub name, or its name at the server."""
    label: str = ""
    asked: str = setting("write a summary of a forum post", "asked")
    """What the writer is told that the model has to do, such as "write a summary of a forum post"."""
    temperature: float | None = None

    def __post_init__(self):
        only_allowed(self)
        if self.temperature is not None:
            not_negative(self, "temperature")
        named = "label" if self.label else "model"
        object.__setattr__(self, "label", self.label or safe_name(Path(self.model).name))
        if not re.fullmatch(NAME, self.label) or self.label == "hand":
            raise UserError(f"WriterSpec.{named}: {self.label!r} (of the model {self.model!r}); a writer needs a name of "
                            "letters, digits and _ . -, other than hand")


# Settings that are younger than the first runs: left out of a config where they are at their default, so that the hashes
# of those stay what they are.
YOUNGER = {"train": {"pack_tokens": None, "lora": None, "objective": "sami", **dict.fromkeys(PARAMETERS)},
           "data": {"scored": 0}}
PARTS = {"model": ModelSpec, "data": DataSpec, "sampling": SamplingSpec, "train": TrainSpec, "judge": JudgeSpec,
         "writer": WriterSpec}  # of an Experiment: field -> class


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One paper experiment in one profile. `writer`: a model that writes the principles; the rules of `constitutions` then
    measure following, since no written principle has one. `baseline`: another model that is judged against, beside the
    initial one. `cot` None: the experiment does not ask. `variant`: what tells this run from the others of its experiment
    and profile; each has a folder of its own."""

    name: str
    profile: str
    constitutions: str = setting(MISSING, "constitutions")
    """A shipped set (dialogue, dialogue_mini, tldr, tldr_mini, diverse, diverse_mini) or a JSON or TOML file of
    principles. With a writer: what the run goes on with where nothing that it writes can be used."""
    variant: str = ""
    task: str = setting("dialogue", "task", allowed=("dialogue", "summary"))
    """What the model does with a query: dialogue (answers it) or summary (summarises it)."""
    writer: WriterSpec | None = None
    cot: bool | None = setting(None, "cot")
    """Chain of thought: samples reason first; the reasoning is not trained on. The run is named <experiment>_cot. (In
    profile paper exp3 has a variant of its own for it.)"""
    iterations: int = setting(3, "iterations")
    """SAMI iterations."""
    seed: int = setting(0, "seed")
    """Seed of the order of queries, pairs and principles."""
    model: ModelSpec = field(default_factory=ModelSpec)
    baseline: ModelSpec | None = None
    data: DataSpec = field(default_factory=DataSpec)
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    judge: JudgeSpec = field(default_factory=JudgeSpec)
    not_run: tuple[str, ...] = ()

    def __post_init__(self):
        positive(self, "iterations", most=1000)
        for field_name in ("name", "profile", "variant"):
            value = getattr(self, field_name)
            if not re.fullmatch(NAME, value) and (value or field_name != "variant"):
                raise UserError(f"Experiment.{field_name}: {value!r}; allowed are letters, digits and _ . -")
        if self.baseline and self.baseline.label == self.model.label:
            raise UserError(f"Experiment.baseline: its label is the policy's, {self.model.label!r}; give it one of its own")
        only_allowed(self)
        if self.cot and (self.task, self.model.prompt) == ("dialogue", "plain"):
            raise UserError("Experiment.cot: chain of thought in a dialogue needs a chat template (--prompt chat)")
        if self.sampling.reasoning and (self.cot or self.model.prompt == "plain"):
            raise UserError("SamplingSpec.reasoning: a model that reasons by itself needs a chat template (--prompt chat) "
                            "and is not asked for a chain of thought too (--reasoning without --cot)")

    @property
    def path(self) -> str:
        """Where its run lies under OUT."""
        return "/".join(filter(None, (self.name, self.profile, self.variant)))

    def to_json(self) -> dict:
        """Plain JSON data (tuples as lists). A setting that is younger than the first runs is left out where it is not
        used, so that their hashes stay what they are."""
        data = _plain(dataclasses.asdict(self))
        for part, younger in YOUNGER.items():
            data[part] = {k: v for k, v in data[part].items() if k not in younger or v != younger[k]}
        return data

    @classmethod
    def from_json(cls, data: dict) -> "Experiment":
        """The experiment of a run.json; what a record of an older version lacks is at its default."""
        parts = PARTS | {"baseline": ModelSpec}
        try:
            return cls(**{k: parts[k](**_tuples(v)) if k in parts and v is not None else v
                          for k, v in _tuples(data).items()})
        except (TypeError, AttributeError) as e:
            raise UserError(f"config: not that of a run of this version: {e}") from None


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _tuples(fields: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
