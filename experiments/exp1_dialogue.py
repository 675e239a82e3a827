"""Experiment 1: dialogue on HH-RLHF (arXiv 2404.14313, section 4.1; Figures 2, 7, 8; Tables 2, 3).

A base model learns to follow helpful / harmless constitutions written for it, with no preference labels.
The paper: mistral-7b, 250 held-out queries per subset, three iterations; at iteration 3 the length-corrected win rate
against the base model is 66 % (helpful) and 77 % (harmless); 8 x A100 80 GB. `paper` is that setting, with
Table 1's dose, principles in our wording, and no training query that is held out too (README, "Faithful, by name").
Table 1 prints bf16; the authors' code kept float32 weights for mistral-7b, and so does `paper` (`fp32_master`).
`mini` keeps the structure (2 x 2 constitutions, three iterations that restart from the initial weights, two alternating
halves of the queries, growing batches) with the embedded 135M model, embedded queries and two principles that it can
follow; minutes on 2 CPU cores. Of the 128 held-out queries of a subset, answered before training and after the last
iteration, 32 are scored too, and answered in between. Its numbers are its own, never the paper's.

Run: make exp1 [PROFILE=mini|paper] [OUT=runs]
"""

from repro.config import DataSpec, Experiment, ModelSpec, SamplingSpec, TrainSpec

DROPPED = ("The assistant", "sorry", "Response", "[insert", "]")  # a pair with one of these in a response does not train

MINI = Experiment(
    name="exp1_dialogue",
    profile="mini",
    constitutions="dialogue_mini",
    train=TrainSpec(dose="as_printed", optimizer="rmsprop", learning_rate=1e-6, batch_size=8),
    data=DataSpec(source="embedded", subsets=("helpful", "harmless"), train=112, evaluation=128, scored=32),
    sampling=SamplingSpec(batch_size=128, drop_phrases=DROPPED),
    not_run=("baseline mistral-7b-instruct: no counterpart of the embedded model", "judge gpt-4-0613: retired"),
)

PAPER = Experiment(
    name="exp1_dialogue",
    profile="paper",
    constitutions="dialogue",
    model=ModelSpec(name="mistralai/Mistral-7B-v0.1", label="mistral-7b", prompt="plain"),
    data=DataSpec(source="hh-rlhf", subsets=("helpful", "harmless"), train=10_000, evaluation=250),
    sampling=SamplingSpec(engine="vllm", max_new_tokens=350, drop_phrases=DROPPED),
    train=TrainSpec(dose="as_printed", optimizer="adamw", learning_rate=5e-7, precision="fp32_master", batch_size=128),
    baseline=ModelSpec(name="mistralai/Mistral-7B-Instruct-v0.1", label="mistral-7b-instruct"),
    not_run=("judge gpt-4-0613: retired", "MI of mistral-7b-instruct"),
)

EXPERIMENTS = {"mini": MINI, "paper": PAPER}
