"""exp1 on a base model, Gemma 3 270M, whose pairs can seldom train: under both constitutions of a pair it says the same, or it
fills in a placeholder of the prompt. So seven times as many are sampled as an iteration trains on.

Run: .venv/bin/python tests/studies/base_model.py QUERIES.jsonl OUT [SEED]
QUERIES.jsonl holds the held-out queries of exp1, and at least 712 training ones, all with subset "helpful". Before it:
.venv/bin/repro probe dialogue_mini --model gemma3-270m --accept-licence gemma
"""

import sys
from dataclasses import replace
from pathlib import Path

from repro.base.settings import GEMMA, ModelSpec
from repro.experiment import load_experiment
from repro.stages.pipeline import run

SPARE = 6.0  # pairs to spare for one that trains


def main(queries: Path, out: Path, seed: int) -> None:
    (exp1,) = load_experiment("exp1", "mini")
    experiment = replace(
        exp1, name="exp1_dialogue_base", seed=seed, model=ModelSpec(name=GEMMA, label=GEMMA, prompt="plain"),
        sampling=replace(exp1.sampling, spare=SPARE),
        data=replace(exp1.data, source=str(queries), subsets=("helpful",), train=10**9))
    print(run(experiment, out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
