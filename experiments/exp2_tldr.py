"""Experiment 2: summaries of TL;DR posts (arXiv 2404.14313, section 4.2; Figures 3, 4; Tables 4 to 7).

Does it matter who writes the principles? A weak writer (mistral-7b-instruct) and a strong one (claude-3-opus) wrote two
principles, concise and comprehensive, with antitheses. The paper: mistral-7b and mixtral-8x7b, 250 held-out posts, three
iterations; at iteration 3, raw win rates against the own base model of 71 and 62 % (weak writer), 70 and 62 % (strong);
against mistral-7b-instruct 47 and 65 %, 44 and 68 %; 8 x A100 80 GB. `paper` is that setting, with Table 1's
dose (README, "Faithful, by name") and the weak writer. The strong one is retired: ARGS='--name exp2_strong --writer openai
--writer-model NAME' has another model write.
`mini` keeps the structure with the embedded 135M model, which is also its weak writer, and 304 posts of ours; beside it
stand two principles written by hand (`hand`, never "strong") that this model can follow. Of the 128 held-out posts,
answered before training and after the last iteration, 32 are scored too, and answered in between. Its numbers are its own,
never the paper's.

Run: make exp2 [PROFILE=mini|paper] [OUT=runs] [ARGS='--variant hand']
"""

from dataclasses import replace

from repro.config import DataSpec, Experiment, JudgeSpec, ModelSpec, SamplingSpec, TrainSpec, WriterSpec

HAND = Experiment(
    name="exp2_tldr",
    profile="mini",
    variant="hand",
    task="summary",
    constitutions="tldr_mini",
    train=TrainSpec(dose="as_printed", optimizer="rmsprop", learning_rate=1e-6, batch_size=8),
    data=DataSpec(source="embedded-tldr", train=112, evaluation=128, scored=32),
    sampling=SamplingSpec(batch_size=128, drop_phrases=("The assistant", "sorry", "Response", "[insert", "]")),
    judge=JudgeSpec(judges=("rule",)),
    not_run=("baseline mistral-7b-instruct: no counterpart of the embedded model", "judge gpt-4-0613: retired",
             "writer claude-3-opus: retired"),
)
WEAK = replace(HAND, variant="weak", writer=WriterSpec())

INSTRUCT = "mistralai/Mistral-7B-Instruct-v0.1"
MISTRAL = replace(
    WEAK,
    profile="paper",
    constitutions="tldr",
    variant="mistral-7b",
    writer=WriterSpec(model=INSTRUCT, label="mistral-7b-instruct"),
    model=ModelSpec(name="mistralai/Mistral-7B-v0.1", label="mistral-7b", prompt="plain"),
    baseline=ModelSpec(name=INSTRUCT, label="mistral-7b-instruct"),
    data=DataSpec(source="tldr", train=5_000, evaluation=250),
    sampling=SamplingSpec(engine="vllm", max_new_tokens=350, spare=1.0, full_stop=True,
                          drop_phrases=("[insert", "]", "Response")),
    train=TrainSpec(dose="as_printed", optimizer="adamw", learning_rate=5e-7, precision="fp32_master", batch_size=128),
    not_run=("judge gpt-4-0613: retired", "writer claude-3-opus: retired", "MI of mistral-7b-instruct"),
)
MIXTRAL = replace(
    MISTRAL,
    variant="mixtral-8x7b",
    model=ModelSpec(name="mistralai/Mixtral-8x7B-v0.1", label="mixtral-8x7b", prompt="plain"),
    train=replace(MISTRAL.train, optimizer="rmsprop", precision="bf16"),
)

EXPERIMENTS = {"mini": (WEAK, HAND), "paper": (MISTRAL, MIXTRAL)}
