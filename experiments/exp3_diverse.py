"""Experiment 3: diverse principles, learned and held out (arXiv 2404.14313, section 4.3; Figures 5, 9; Tables 8, 9).

Does a model that was trained on some principles follow others? Constitutions of two principles are drawn from 15 styles of
summaries, each on either side, against their opposites; 5 styles are kept for evaluation. The paper: llama3-70b, 250 posts,
three iterations with batches doubled; at iteration 3, raw win rates against the base model of 60 % (learned) and 63 % (held
out), with chain of thought 69 and 67 %; 8 x A100 80 GB. `paper` is that setting, without and with chain of thought, with
Table 1's dose and principles in our wording (README, "Faithful, by name"); without chain of thought the authors sampled
with training's short prompt, here with the example of the format.
`mini` keeps the structure with the embedded 135M model and 304 posts of ours. Most of the paper's styles are beyond that
model; these are 7 learned and 4 held-out ones of which it sometimes does either side (`repro probe`), and all have a rule.
Of the 128 held-out posts, answered before training and after the last iteration, 32 are scored too, and answered in
between. Its numbers are its own, never the paper's.

Run: make exp3 [PROFILE=mini|paper] [OUT=runs]; with chain of thought in mini: ARGS=--cot
"""

from dataclasses import replace

from repro.config import DataSpec, Experiment, JudgeSpec, ModelSpec, SamplingSpec, TrainSpec

MINI = Experiment(
    name="exp3_diverse",
    profile="mini",
    task="summary",
    cot=False,
    constitutions="diverse_mini",
    train=TrainSpec(dose="as_printed", optimizer="rmsprop", learning_rate=2e-6, batch_size=8),
    data=DataSpec(source="embedded-tldr", train=112, evaluation=128, scored=32),
    sampling=SamplingSpec(batch_size=128, max_new_tokens=64,
                          drop_phrases=("The assistant", "sorry", "Response", "[insert", "]")),
    judge=JudgeSpec(judges=("rule",)),
    not_run=("judge gpt-4-0613: retired",),
)

PAPER = replace(
    MINI,
    profile="paper",
    constitutions="diverse",
    variant="direct",
    model=ModelSpec(name="meta-llama/Meta-Llama-3-70B", label="llama3-70b", prompt="plain"),
    data=DataSpec(source="tldr", train=7_500, evaluation=250),
    sampling=SamplingSpec(engine="vllm", max_new_tokens=350, spare=1.0, full_stop=True, drop_phrases=(
        "The assistant", "sorry", "Response", "[insert", "[]", "]", "principles", "constitution", "summarization")),
    train=TrainSpec(dose="as_printed", optimizer="rmsprop", learning_rate=5e-7, precision="bf16", batch_size=128,
                    batches=4, batches_increment=4),
)
# Table 1 prints 5e-7 for both; the authors' logs show 1e-6 for the runs with chain of thought that Table 9 holds.
COT = replace(
    PAPER, variant="cot", cot=True, train=replace(PAPER.train, learning_rate=1e-6),
    sampling=replace(PAPER.sampling, drop_phrases=(*PAPER.sampling.drop_phrases, "The post")))

EXPERIMENTS = {"mini": MINI, "paper": (PAPER, COT)}
