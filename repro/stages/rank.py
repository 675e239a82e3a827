"""The worker's side of a job.

    torchrun --nproc-per-node RANKS -m repro.stages.rank RUN JOB

On several nodes, which must see the run's folder under the same path, each has a torchrun of its own; the pipeline's is
node 0 and says what to start on the others.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from repro.base.records import UserError, dumps, first_line, read_json
from repro.models import load
from repro.stages.jobs import ATTACHED, read_job, work


def _tell(**what) -> None:
    """One line, in one write and short enough to stay whole among those of other ranks."""
    print(f"{dumps(what)}\n", end="", flush=True)  # print would write the end of a line by itself


def _heed(asked: list[int]) -> None:
    while os.read(0, 64):
        asked.append(signal.SIGTERM)
    os._exit(1)


def work_scores(folder: Path, name: str, engine, on_query: Callable[[int], None]) -> list:
    """This rank's part of the scoring; returns all matrices."""
    from repro.core import engines, loop
    from repro.core.tree import packed_tokens

    job, spec, pairs = read_job(folder, name)
    tokenizer = load.load_tokenizer(job["model"])
    model = engine.load_model(job["model"], dtype=engines.weights_dtype(spec)).requires_grad_(False)
    module = engine.prepare(engines.Scorer(model, spec, engine.settle(model, job["backend"])))
    ids = engines.ids_of(tokenizer, pairs, score_eos=spec.score_eos)
    budget = spec.pack_tokens or loop.PACK_TOKENS["cuda" if model.device.type == "cuda" else "cpu"]
    found = {}
    with engines.matmul_precision(model, spec.precision):
        for chosen, counted in engine.passes(list(map(packed_tokens, ids)), budget):
            matrices = module([ids[q] for q in chosen]).tolist()
            found |= dict(zip(chosen[:counted], matrices))
            on_query(int(sum(n for n, in engine.gather(counted))))
    everything = {q: matrix for part in engine.together(lambda: found) for q, matrix in part.items()}
    return [everything[q] for q in range(len(pairs))]


def main() -> None:
    folder, job, asked = Path(sys.argv[1]), sys.argv[2], []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get(ATTACHED):
        threading.Thread(target=_heed, args=(asked,), daemon=True).start()
    rank = os.environ.get("RANK", "0")
    try:
        from repro.core.engines import sharded

        with sharded() as engine:
            def tell(n: int) -> None:
                engine.rank or _tell(queries=n)

            iteration = read_json(folder / job).get("iteration")
            rows = work(folder, iteration, engine, tell, asked) if iteration else work_scores(folder, job, engine, tell)
            if engine.rank == 0:
                for row in rows:
                    _tell(row=row)
                _tell(done=len(rows))
    except UserError as e:
        _tell(error=str(e))
        raise SystemExit(2) from None
    except (KeyboardInterrupt, SystemExit):
        raise SystemExit(0) from None  # asked to stop, and its step is saved
    except Exception as e:
        _tell(failed=f"rank {rank}: {type(e).__name__}: {first_line(e)}")
        raise


if __name__ == "__main__":
    main()
