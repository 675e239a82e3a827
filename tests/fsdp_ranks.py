"""What the ranks of tests/test_fsdp.py do, under torchrun: one launch for all cases, since each costs two imports of torch.

    torchrun --nproc-per-node 2 tests/fsdp_ranks.py CASES.json OUT
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import byte_tokenizer
from fsdp_cases import exported, ragged, spec_of

from repro import distributed, training
from repro.records import UserError, write_json
from repro.steps import StepCheckpoints
from repro.training import train


def work(engine, case: dict, out: Path) -> dict:
    """Train and export as one case says; what it raised, if that was a UserError."""
    training.PACK_TOKENS["cpu"] = case["budget"]
    if case.get("room"):
        distributed.free_bytes = training.free_bytes = lambda device: case["room"]
    spec = spec_of(case)
    steps = StepCheckpoints(Path(case["steps"]), key="k") if case.get("steps") else None
    model = engine.load_model(case["model"], dtype=training.weights_dtype(spec.precision))
    passes, seen = [], []
    deal = distributed.deal
    distributed.deal = lambda *a: passes.append([len(p) for p in deal(*a)]) or deal(*a)
    if "poison" in case:  # this rank's part alone
        symmetric = training.symmetric_infonce
        training.symmetric_infonce = lambda m: symmetric(m) * (torch.nan if engine.rank == case["poison"] else 1)
    objective = {}
    prepare = engine.prepare
    engine.prepare = lambda o: objective.setdefault("it", prepare(o))
    try:
        trace = train(model, byte_tokenizer(), ragged(case["queries"]), spec, 1, backend=case.get("backend", "shared"),
                      steps=steps, engine=engine, on_query=seen.append, asked=list(case.get("asked", [])),
                      save_batch=lambda facts: write_json(out / f"bad-{engine.rank}.json", facts))
        engine.export(objective["it"], lambda plain: exported(plain, out))
        return {"trace": trace, "passes": passes, "seen": sum(seen), "one_reduction": engine.one_reduction}
    except (UserError, SystemExit) as e:
        return {"raised": f"{type(e).__name__}: {e}"}
    finally:
        distributed.deal = deal
        if "poison" in case:
            training.symmetric_infonce = symmetric
