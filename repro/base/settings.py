"""What a run is: frozen dataclasses, their checks, and the hash that names a configuration."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from repro.base.checks import _distinct, _not_negative, _positive, choose
from repro.base.records import UserError

EMBEDDED = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The policy. `name`: the embedded LM, a folder, or a hub name. `label`: its name in metrics.json.

    `prompt`: "chat" renders the tokenizer's chat template (instruction-tuned models), "plain" the
    System / Human / Assistant text that base models continue.
    """

    name: str = EMBEDDED
    label: str = EMBEDDED
    prompt: str = "chat"

    def __post_init__(self):
        choose("ModelSpec.prompt", self.prompt, ("chat", "plain"))


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Queries. `source`: as of `load_queries` (repro/text/queries.py). Counts are per subset; no `subsets`: all it has.

    `leakage`: "remove" takes training queries that are also evaluation queries out of training; "keep" is what
    the paper's runs did (about 100 of the 250 HH evaluation queries occur in the training rows).
    `draws`: of a pool of principles, the constitutions that each held-out query is answered under: learned, held out.
    """

    source: str = "embedded"
    subsets: tuple[str, ...] = ()
    train: int = 112
    evaluation: int = 32
    evaluation_split: str = "evaluation"
    leakage: str = "remove"
    truncate: bool = False
    draws: tuple[int, int] = (1, 1)

    def __post_init__(self):
        _positive(self, "train", "evaluation")
        _distinct(self, "subsets")
        if len(self.draws) != 2 or min(self.draws) < 1:
            raise UserError(f"DataSpec.draws: {self.draws!r}; two numbers above 0: learned, held out")
        choose("DataSpec.leakage", self.leakage, ("remove", "keep"))
        choose("DataSpec.evaluation_split", self.evaluation_split, ("evaluation", "development"))


ENGINES = ("transformers", "vllm", "server")


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """Greedy sampling. A pair is dropped if a response holds one of `drop_phrases`, none by default (stages/sample.py
    counts why).

    `engine`: "transformers" samples in this process, `batch_size` prompts at a time; "vllm" and "server" behind an
    OpenAI-compatible server (sampling/launch.py), which gets token ids ("vllm") or text. `dtype`: weights while sampling.
    `spare`: pairs sampled beyond the need, as a share, to make up for drops.
    `full_stop`: drop a pair whose first response does not end in one. `reasoning_tokens`: tokens beyond
    `max_new_tokens` for the reasoning, of a chain of thought or of a model that reasons by itself. `reasoning`: switch that
    on where the chat template can (repro/models/speaker.py); else it is off where it can be.
    """

    engine: str = "transformers"
    max_new_tokens: int = 48
    reasoning_tokens: int = 150
    reasoning: bool = False
    batch_size: int = 32
    dtype: str = "bfloat16"
    spare: float = 0.25
    drop_phrases: tuple[str, ...] = ()
    full_stop: bool = False

    def __post_init__(self):
        _positive(self, "max_new_tokens", "reasoning_tokens", "batch_size")
        _not_negative(self, "spare")
        if not isinstance(self.drop_phrases, tuple) or not all(isinstance(p, str) and p for p in self.drop_phrases):
            raise UserError(f"SamplingSpec.drop_phrases: {self.drop_phrases!r}; must be a tuple of texts, none empty")
        choose("SamplingSpec.engine", self.engine, ENGINES)
        choose("SamplingSpec.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class Update:
    """One optimizer step: how many queries give its gradient, and its share of the learning rate."""

    queries: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Adapters of this `rank` on every linear layer of attention and MLP, their product scaled by `alpha` / `rank`; all
    else is frozen (repro/core/lora.py). A deviation from the paper."""

    rank: int = 16
    alpha: int = 32

    def __post_init__(self):
        _positive(self, "rank", "alpha")


AS_RUN_QUERIES = 8     # queries whose gradient reached an update in the paper's runs (see `TrainSpec.updates`)
AS_RUN_SCHEDULE = 15   # length in steps of their linear learning-rate schedule


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One SAMI iteration's training (arXiv 2404.14313, Table 1; `dose`: see `updates`).

    `batch_size` queries a step; `batches` steps in iteration 1 and `batches_increment` more in each later one.
    `precision`: "fp32"; "fp32_master" (float32 weights and updates, bf16 products); "bf16" (weights and updates
    in bf16, as Table 1 prints and the authors' code did for mixtral and llama; for mistral-7b it kept float32
    weights: at learning rate 5e-7 most bf16 updates round away).
    `max_grad_norm` None means no clipping. `pack_tokens`: tokens between two backward passes, by default the device's
    (repro/core/loop.py); another number gives the same step up to rounding.
    `lora`: train adapters instead of all weights.
    `dropout`: "off" (what is trained is what is scored; the paper's models have none), or "drawn": at the rates of the
    model's config, a function of iteration, step and pass.
    """

    dose: str = "as_printed"
    optimizer: str = "rmsprop"
    learning_rate: float = 5e-7
    precision: str = "fp32_master"
    batch_size: int = 128
    batches: int = 2
    batches_increment: int = 2
    max_grad_norm: float | None = None
    score_eos: bool = False
    length_normalize: bool = True
    pack_tokens: int | None = None
    lora: LoraSpec | None = None
    dropout: str = "off"

    def updates(self, iteration: int) -> list["Update"]:
        """The optimizer steps of an iteration (1, 2, ...).

        "as_printed": Table 1; each step averages `batch_size` queries at a constant rate; 2, 4, 6 steps.
        "as_run": what the authors' trainer did (their code and logs). Gradients were zeroed before every micro-step,
        so only the last micro-batch of each batch, 8 queries, reached the step; the rate warmed up over one step and
        decayed linearly over 15, so the first step had rate 0; gradients were clipped (repro/core/loop.py).
        """
        steps = self.batches + (iteration - 1) * self.batches_increment
        if self.dose == "as_printed":
            return [Update(self.batch_size, 1.0)] * steps
        queries = min(AS_RUN_QUERIES, self.batch_size)
        return [Update(queries, 0.0 if k == 0 else max(0.0, (AS_RUN_SCHEDULE - k) / (AS_RUN_SCHEDULE - 1)))
                for k in range(steps)]

    def queries_needed(self, iteration: int) -> int:
        return sum(u.queries for u in self.updates(iteration))

    def __post_init__(self):
        optional = [name for name in ("pack_tokens", "max_grad_norm") if getattr(self, name) is not None]
        _positive(self, "batch_size", "batches", *optional)
        _positive(self, "learning_rate", most=0.1)  # about how far a step moves each weight; most are smaller than that
        _not_negative(self, "batches_increment")
        if isinstance(self.lora, dict):  # of a record
            object.__setattr__(self, "lora", LoraSpec(**self.lora))
        choose("TrainSpec.dropout", self.dropout, ("off", "drawn"))
        choose("TrainSpec.dose", self.dose, ("as_printed", "as_run"))
        choose("TrainSpec.optimizer", self.optimizer, ("rmsprop", "adamw"))
        choose("TrainSpec.precision", self.precision, ("fp32", "fp32_master", "bf16"))


JUDGES = ("rule", "likelihood", "openai")
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"  # what may be part of a file's name


def safe_name(model: str) -> str:
    """A model's name without what a file's name cannot hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-.")


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """Judges of win rates against the initial model. "rule" is the headline; "likelihood" is a diagnostic, since it
    restates the training objective. A principle without a rule leaves the rule judge NOT RUN.

    "openai" is the model `model` behind an OpenAI-compatible server (repro/judges/llm.py), known as `name` (by default
    the model's) in records and figures. `answer`: "schema", "text", "logprobs", or "auto": what the server offers of
    the first two. `temperature` None leaves it to the server. Where the server is and what it may cost is no part of
    the configuration (repro/servers/endpoint.py).
    """

    judges: tuple[str, ...] = ("rule", "likelihood")
    model: str = ""
    name: str = ""
    answer: str = "auto"
    max_tokens: int = 300
    temperature: float | None = 0.0

    def __post_init__(self):
        for judge in self.judges:
            choose("JudgeSpec.judges", judge, JUDGES)
        _distinct(self, "judges")
        choose("JudgeSpec.answer", self.answer, ("auto", "schema", "text", "logprobs"))
        _positive(self, "max_tokens")
        if self.temperature is not None:
            _not_negative(self, "temperature")
        if "openai" in self.judges and not self.model:
            raise UserError("JudgeSpec.model: the openai judge needs the name of a model at its server (--judge-model)")
        if self.model and (not re.fullmatch(NAME, self.label) or self.label in JUDGES):
            raise UserError(f"JudgeSpec.name: {self.label!r}; allowed are letters, digits and _ . -, but not "
                            f"{', '.join(JUDGES)}")

    @property
    def label(self) -> str:
        """The LLM judge's name in records, figures and file names."""
        return self.name or safe_name(self.model)


WRITERS = ("local", "openai")


@dataclass(frozen=True, kw_only=True)
class WriterSpec:
    """A language model that writes the principles (repro/stages/write.py). `kind`: "local" runs in this process, "openai"
    behind an OpenAI-compatible server. `label`: its name in records, by default the model's. `asked`: what it is told that
    the model has to do. `temperature`: None leaves it to the writer: 0.7 here, the server's own there."""

    kind: str = "local"
    model: str = EMBEDDED
    label: str = ""
    asked: str = "write a summary of a forum post"
    temperature: float | None = None

    def __post_init__(self):
        choose("WriterSpec.kind", self.kind, WRITERS)
        if self.temperature is not None:
            _not_negative(self, "temperature")
        object.__setattr__(self, "label", self.label or safe_name(Path(self.model).name))
        if not re.fullmatch(NAME, self.label) or self.label == "hand":
            raise UserError(f"WriterSpec.label: {self.label!r} (of the model {self.model!r}); a writer needs a name of "
                            "letters, digits and _ . -, other than hand")


YOUNGER = ("pack_tokens", "lora")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One paper experiment in one profile. `constitutions`: a file of repro/data/ or a path (JSON or TOML).

    `task`: "dialogue" answers queries, "summary" summarises posts (repro/text/prompts.py).
    `writer`: a model that writes the principles; `constitutions` then holds what the run goes on with where nothing that
    it writes can be used, and its rules measure following, since no written principle has one.
    `baseline`: another model that is judged against, beside the initial one.
    `cot`: with chain of thought or without; None where the experiment does not ask. `variant`: what tells this run from
    the others of its experiment and profile; each has a folder of its own.
    """

    name: str
    profile: str
    constitutions: str
    variant: str = ""
    task: str = "dialogue"
    writer: WriterSpec | None = None
    cot: bool | None = None
    iterations: int = 3
    seed: int = 0
    model: ModelSpec = field(default_factory=ModelSpec)
    baseline: ModelSpec | None = None
    data: DataSpec = field(default_factory=DataSpec)
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    judge: JudgeSpec = field(default_factory=JudgeSpec)
    not_run: tuple[str, ...] = ()

    def __post_init__(self):
        _positive(self, "iterations", most=1000)
        for field_name in ("name", "profile", "variant"):
            value = getattr(self, field_name)
            if not re.fullmatch(NAME, value) and (value or field_name != "variant"):
                raise UserError(f"Experiment.{field_name}: {value!r}; allowed are letters, digits and _ . -")
        if self.baseline and self.baseline.label == self.model.label:
            raise UserError(f"Experiment.baseline: its label is the policy's, {self.model.label!r}; give it one of its own")
        choose("Experiment.task", self.task, ("dialogue", "summary"))
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
        data["train"] = {k: v for k, v in data["train"].items() if v is not None or k not in YOUNGER}
        return data

    @classmethod
    def from_json(cls, data: dict) -> "Experiment":
        """The experiment of a run.json; what a record of an older version lacks is at its default."""
        parts = {"model": ModelSpec, "baseline": ModelSpec, "writer": WriterSpec, "data": DataSpec,
                 "sampling": SamplingSpec, "train": TrainSpec, "judge": JudgeSpec}
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
