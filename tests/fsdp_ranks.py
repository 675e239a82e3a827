"""The cases of tests/test_fsdp.py, done by one process in the test or by the ranks of one torchrun (a launch costs two
imports of torch, so there is one for all cases):

    torchrun --nproc-per-node 2 tests/fsdp_ranks.py CASES.json OUT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from conftest import byte_tokenizer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from repro.base.records import UserError, write_json
from repro.base.training import NEEDS_INITIAL, TrainSpec
from repro.core import engines, loop, memory
from repro.core.checkpoints import StepCheckpoints
from repro.core.engines import TrainingPair
from repro.stages import rank

REDUCE = "reduce_scatter_single"  # what FSDP calls


def ragged(n: int) -> list[TrainingPair]:
    """Queries whose prompts and responses differ widely in length."""
    return [TrainingPair(f"q{k}", (f"Be short. Question {k}{'?' * (5 * k % 13)}\n", f"Be long, as long as it takes. Question {k}?\n"),
                         (f"yes {k}{'y' * (k % 3)}", f"yes, and then much more of {k}{' and' * (7 * k % 5)}"))
            for k in range(n)]


def with_initial(pairs: list[TrainingPair]) -> list[TrainingPair]:
    """As of an initial model, whose log-probs tell the queries apart."""
    return [replace(p, initial=((-20.0 - k, -30.0), (-25.0, -20.0 + k))) for k, p in enumerate(pairs)]


def run_case(engine, case: dict, out: Path) -> dict:
    """Train as `case` says and leave the weights in `out`; returns what was seen, or what was raised."""
    spec = TrainSpec(**{"batch_size": 5, "batches": 3, "learning_rate": 1e-3, "precision": "fp32", "optimizer": "adamw"} | case.get("spec", {}))
    steps = StepCheckpoints(Path(case["steps"]), "key", worth=0) if "steps" in case else None
    seen, passes, tight, reductions, objective = [], [], [], [], engines.objective
    enable, before_backward, reduce = (PreTrainedModel.activation_checkpointing_enable, engine.before_backward,
                                       getattr(dist, REDUCE))

    def note(module, *, last):
        passes.append(1)
        before_backward(module, last=last)

    patches = [mock.patch.dict(loop.PACK_TOKENS, cpu=case.get("budget", 300)),
               mock.patch.object(engine, "before_backward", note),
               mock.patch.object(dist, REDUCE, lambda *a, **k: reductions.append(str(k["input"].dtype)) or reduce(*a, **k)),
               mock.patch.object(PreTrainedModel, "activation_checkpointing_enable",
                                 lambda self, *a, **k: tight.append(1) or enable(self, *a, **k))]
    if "room" in case:  # bytes of the machine: too few to keep activations
        patches += [mock.patch.object(module, "usable_bytes", lambda device: case["room"]) for module in (memory, engines)]
    if "poison" in case:  # on this rank alone
        patches.append(mock.patch.object(engines, "objective", lambda *given, **more: objective(*given, **more) * (
            torch.nan if engine.rank == case["poison"] else 1)))
    for patch in patches:
        patch.start()
    try:
        if "score" in case:
            return {"matrices": rank.work_scores(Path(case["score"]), "job.json", engine, seen.append), "queries": sum(seen)}
        model = engine.load_model(case["model"], dtype=engines.weights_dtype(spec))
        pairs = ragged(case.get("queries", 15))
        trace = loop.train(model, byte_tokenizer(), with_initial(pairs) if spec.objective in NEEDS_INITIAL else pairs, spec, 1,
                               engine=engine, steps=steps, on_query=seen.append, asked=list(case.get("asked", [])),
                               save_batch=lambda facts: write_json(out / f"{case['name']}-{engine.rank}.json", facts))
        engine.export(lambda plain: save_file({k: v.contiguous() for k, v in plain.state_dict().items() if k != "lm_head.weight"
                                               or not plain.config.tie_word_embeddings}, out / f"{case['name']}.safetensors"))
        return {"trace": trace, "queries": sum(seen), "passes": len(passes), "checkpointed": len(tight),
                "reductions": reductions}
    except (UserError, SystemExit) as e:
        return {"raised": f"{type(e).__name__}: {e}"}
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with engines.sharded() as engine:
        for case in cases:
            results = engine.together(lambda: run_case(engine, case, out))  # noqa: B023
            if engine.rank == 0:
                write_json(out / f"{case['name']}.json", results)


if __name__ == "__main__":
    main()
