"""A run over 10^4 to 10^6 made queries without a model: CPU seconds and memory of what is not the model's, by stage.

    .venv/bin/python tests/perf/scale.py [--queries 10000 100000 1000000] [--out results/bench/scale.json]

The whole pipeline (`repro.stages.pipeline.run`) on n queries of a file of ours, three quarters of which train; sampling,
scoring and training are stood in for: a response is eight words of its query, a matrix is drawn, the weights are the initial
model's. So reading and checking inputs, drawing, prompts, files, filtering, the rule judge, metrics and the report are the
shipped code. One iteration, 2 x 2 constitutions: n responses at either evaluation, 0.63 n to train on. Peak memory is the
process's, reset before each stage; that of the imports is in it. Each n in a process of its own.
"""

import argparse
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RECORD = ROOT / "results/bench/scale.json"
WORDS = ("river stone garden winter letter engine bread window market harbour story music teacher forest island kitchen doctor "
         "bridge village summer morning question answer simple reason travel money paper colour animal friend family").split()


def write_queries(path: Path, n: int) -> None:
    """n different texts of about 25 words, every fourth held out."""
    with open(path, "w") as f:
        for k in range(n):
            rng = random.Random(k)
            text = f"How do I find number {k} of " + " ".join(rng.choices(WORDS, k=20)) + "?"
            f.write(json.dumps({"query": text, "subset": "own", "split": "train" if k % 4 else "evaluation"}) + "\n")


def _peak_mib() -> float:
    """The most memory since the last call (Linux: the high-water mark is set back)."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return round(peak, 1)


def stand_in(tiny: Path) -> None:
    """Put made responses, matrices and weights in the model's place."""
    from repro.models import load
    from repro.stages import evaluate, jobs, sample

    def sampled(run, iteration, texts, done, name, *_):
        size = 1000
        for k in range(0, len(texts), size):
            batch, answers = list(range(k, min(k + size, len(texts)))), []
            for i in batch:
                rng = random.Random(i + iteration)
                words = rng.choices(texts[i].split(), k=8)
                answers.append({"text": " ".join(words) + ".", "ids": [rng.randrange(3, 200) for _ in range(10)], "tokens": 10, "finished": True})
            yield batch, answers

    def scored(run, iteration, pairs, name, label):
        rng, found = random.Random(iteration), []
        for pair in pairs:
            C, R = len(pair.prompts), len(pair.responses)
            found.append(([[-20 - 10 * rng.random() + 3 * (r == c) for r in range(R)] for c in range(C)], [10] * R))
        return found

    def trained(folder, iteration, ranks, *, on_query, nodes=1):
        shutil.copytree(tiny, folder / f"checkpoints/iteration-{iteration}", dirs_exist_ok=True)
        job = json.loads((folder / jobs.job_file(iteration)).read_text())
        batch = job["train"]["batch_size"]
        steps = len(job["pairs"]) // batch
        return [{"step": k + 1, "loss": 1.0, "queries": batch, "rate": 1.0, "grad_norm": 1.0} for k in range(steps)]

    sample._sampled_here, sample.score_pairs, evaluate.score_pairs = sampled, scored, scored
    jobs.train, load.release = trained, lambda: None


def one(n: int, work: Path) -> dict:
    """Stage -> {cpu_seconds, peak_mib}, of a whole run over n queries."""
    from conftest import save_tiny
    from test_experiments import small

    from repro.base.settings import DataSpec, JudgeSpec
    from repro.experiment import load_experiment
    from repro.stages.pipeline import run
    from repro.stages.run import Run

    tiny = save_tiny(work / "tiny")
    write_queries(work / "queries.jsonl", n)
    stand_in(tiny)
    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    batch = 64 if n >= 10**4 else 4
    experiment = dataclasses.replace(
        experiment, iterations=1, data=DataSpec(source=str(work / "queries.jsonl"), subsets=("own",), train=n, evaluation=n, scored=0),
        train=dataclasses.replace(experiment.train, batch_size=batch, batches=n // 4 // batch, batches_increment=0),
        judge=JudgeSpec(judges=("rule", "likelihood")))
    found, state = {}, {"at": time.process_time()}

    def close(name: str) -> None:
        found[name] = {"cpu_seconds": round(time.process_time() - state["at"], 2), "peak_mib": _peak_mib()}
        state["at"] = time.process_time()
        print(f"{n}: {name}: {found[name]}", flush=True)

    stage, finish = Run.stage, Run.finish

    def staged(self, name, *args, **how):
        if "inputs" not in found:
            close("inputs")
        return stage(self, name, *args, **how)

    def finished(self, name, *args, **facts):
        finish(self, name, *args, **facts)
        close(name)

    Run.stage, Run.finish = staged, finished
    started = _peak_mib()
    folder = run(experiment, work / "runs", say=lambda line: None)
    files = {str(p.relative_to(folder)): round(p.stat().st_size / 2**20, 1) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {"queries": n, "imports_mib": started, "stages": found, "file_mib": {k: v for k, v in files.items() if v >= 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory(prefix="scale-") as work:
            args.one.write_text(json.dumps(one(args.queries[0], Path(work))))
        return
    from check import processor

    from repro.base.identity import commit

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for n in args.queries:
            into = Path(scratch) / f"{n}.json"
            subprocess.run([sys.executable, __file__, "--queries", str(n), "--one", str(into)], check=True)
            rows.append(json.loads(into.read_text()))
            args.out.write_text(json.dumps({"processor": processor(), "python": sys.version.split()[0], "commit": commit(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
