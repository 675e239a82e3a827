"""How an iteration trains: the objective, the dose, the optimizer."""

from dataclasses import dataclass

from repro.base.checks import not_negative, only_allowed, positive, setting
from repro.base.records import UserError

# Objective -> the parameters that it takes, with their defaults (core/losses.py has the functions and their sources).
CONTRAST = {"temperature": 1.0, "anchor": 0.0}
OBJECTIVES = {
    "sami": CONTRAST, "sami_rows": CONTRAST, "sami_columns": CONTRAST, "sami_sum": CONTRAST,
    "mipo": {"beta": 0.1, "anchor": 0.0}, "nca": {"beta": 0.1, "anchor": 0.0},
    "conspo_rows": {"margin": 0.5, **CONTRAST}, "sft": {}, "distil": {}}
NEEDS_INITIAL = ("mipo", "nca")  # the log-probs under the initial model too
WITHOUT_CONSTITUTION = ("distil",)  # of the positive response, under a prompt without any


class NotTrainable(UserError):
    """The settings of an iteration leave nothing to train on, or a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Update:
    """One optimizer step: how many queries give its gradient, and its share of the learning rate."""

    queries: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """LoRA: adapters of this `rank` on every linear layer of attention and MLP, their product scaled by `alpha` / `rank`;
    all else is frozen (repro/core/lora.py). A deviation from the paper."""

    rank: int = setting(16, "lora")
    """Train adapters of this rank instead of all weights (needs the extra `lora`), for one GPU of 24 GB. The run is named
    <experiment>_lora."""
    alpha: int = 32

    def __post_init__(self):
        positive(self, "rank", "alpha")


AS_RUN_QUERIES = 8     # queries whose gradient reached an update in the paper's runs (see `TrainSpec.updates`)
AS_RUN_SCHEDULE = 15   # length in steps of their linear learning-rate schedule


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One SAMI iteration's training (arXiv 2404.14313, Table 1; `dose`: see `updates`).

    `batches` steps in iteration 1 and `batches_increment` more in each later one. `max_grad_norm` None means no clipping.
    `precision`: Table 1 prints bf16, and the authors' code did so for mixtral and llama; for mistral-7b it kept float32
    weights: at learning rate 5e-7 most bf16 updates round away. `pack_tokens`: by default the device's (core/loop.py);
    another number gives the same step up to rounding. `dropout` "off": what is trained is what is scored (the paper's
    models have none); "drawn": a function of iteration, step and pass. `lora`: adapters instead of all weights.
    """

    dose: str = setting("as_printed", "dose", allowed=("as_printed", "as_run"))
    """as_printed (the paper's Table 1) or as_run (what the authors' code and logs show)."""
    optimizer: str = setting("rmsprop", allowed=("rmsprop", "adamw"))
    learning_rate: float = setting(5e-7, "learning_rate")
    """Of training; by default the experiment's, with --lora 1e-4."""
    precision: str = setting("fp32_master", "precision", allowed=("fp32", "fp32_master", "bf16"))
    """Of training: fp32_master (float32 weights and updates, bf16 products), bf16 (weights and updates too), or fp32."""
    batch_size: int = setting(128, "batch_size")
    """Queries of one training step."""
    batches: int = 2
    batches_increment: int = 2
    max_grad_norm: float | None = None
    score_eos: bool = setting(False, "score_eos")
    """Score the token that ends a response too, but of one that the cap on its length cut; the paper's runs did not."""
    length_normalize: bool = True
    objective: str = setting("sami", "objective", allowed=tuple(OBJECTIVES))
    """What is trained: sami (the paper's), one half of it (sami_rows, sami_columns), it on sums (sami_sum), or a rival on
    the same pairs: mipo, nca, conspo_rows, sft, distil."""
    beta: float | None = setting(None, "beta")
    """Of mipo and nca: the weight of a log-ratio to the initial model; by default 0.1."""
    temperature: float | None = setting(None, "contrast_temperature")
    """Of sami and its kin: what scores are divided by; by default 1."""
    margin: float | None = setting(None, "margin")
    """Of conspo_rows: the margin of the last step, to which it grows step by step; by default 0.5."""
    anchor: float | None = setting(None, "anchor")
    """The weight of the own responses' mean negative log-prob per token, added to the objective; by default 0."""
    pack_tokens: int | None = setting(None, "pack_tokens")
    """Training tokens between two backward passes; fewer take less memory (`repro plan` says how much)."""
    lora: LoraSpec | None = None
    dropout: str = setting("off", "dropout", allowed=("off", "drawn"))
    """In training: off, or drawn (at the rates of the model's config)."""

    @property
    def parameters(self) -> dict[str, float]:
        """Those of the objective, with its defaults for what is not given."""
        return {name: default if getattr(self, name) is None else getattr(self, name)
                for name, default in OBJECTIVES[self.objective].items()}

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
        positive(self, "batch_size", "batches", *optional)
        positive(self, "learning_rate", most=0.1)  # about how far a step moves each weight; most are smaller than that
        not_negative(self, "batches_increment")
        if isinstance(self.lora, dict):  # of a record
            object.__setattr__(self, "lora", LoraSpec(**self.lora))
        only_allowed(self)
        for name in (name for name in PARAMETERS if getattr(self, name) is not None):
            if name not in OBJECTIVES[self.objective]:
                raise UserError(f"TrainSpec.{name}: {getattr(self, name)!r}; {self.objective!r} takes none, but "
                                + ", ".join(k for k, takes in OBJECTIVES.items() if name in takes) + " do")
            (positive if name in ("beta", "temperature") else not_negative)(self, name)

PARAMETERS = ("beta", "temperature", "margin", "anchor")
