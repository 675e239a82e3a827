"""A run over 10^4 to 10^6 made queries without a model: CPU seconds and memory of what is not the model's, by stage.

    .venv/bin/python tests/perf/scale.py [--queries 10000 100000 1000000] [--out results/bench/scale.json]
    .venv/bin/python tests/perf/scale.py --rows RUN/responses/evaluation-0.jsonl   # then the page results/scale.md

The whole pipeline (`repro.stages.pipeline.run`) on n queries of a file of ours, three quarters of which train; sampling,
scoring and training are stood in for: a response is eight words of its query, a matrix is drawn, the weights are the initial
model's. So reading and checking inputs, drawing, prompts, files, filtering, the rule judge, metrics and the report are the
shipped code. One iteration, 2 x 2 constitutions: n responses at either evaluation, 0.63 n to train on. Peak memory is the
process's, reset before each stage; that of the imports is in it. Each n in a process of its own.
"""

import argparse
import dataclasses
import json
import os
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


# ---- a million queries, on paper

README = ROOT / "results/scale.md"
MILLION, CONSTITUTIONS, GPUS_USED, USD_A_GPU_HOUR = 10**6, 100, 64, 2.5


def _held(value) -> int:
    """Bytes of a parsed JSON value; its keys and small numbers are shared."""
    own = 0 if isinstance(value, int) and abs(value) < 257 else sys.getsizeof(value)
    return own + (sum(map(_held, value.values())) if isinstance(value, dict) else sum(map(_held, value)) if isinstance(value, list) else 0)


def row_bytes(path: Path) -> dict:
    """Bytes of a response's line in a run's file, and of what is read from it: so many, and so many a token (least squares)."""
    import numpy as np

    lines = path.read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {"n": len(rows)}
    for name, sizes in (("file", [len(line) + 1 for line in lines]), ("memory", list(map(_held, rows)))):
        each, fixed = np.polyfit([row["tokens"] for row in rows], sizes, 1)
        found[name] = [round(float(fixed)), round(float(each), 1)]
    return found


def planned(rows: dict) -> tuple[list[list[str]], dict]:
    """The table of the plan, and what its text needs: Llama-3-70B on HH-RLHF's queries, each sampled and trained on once, under
    two of the constitutions or under all of them."""
    from repro.base.settings import ModelSpec
    from repro.experiment import load_experiment
    from repro.plan.estimate import FRACTION, first_step, sampling, seconds, training
    from repro.plan.gpus import gpu_of, matrix_flops, matrix_tokens, settle, shape_of
    from repro.plan.judge import judge_of
    from repro.plan.texts import texts_of

    spec = load_experiment("exp1", "paper")[0]
    spec = dataclasses.replace(
        spec, model=ModelSpec(name="meta-llama/Meta-Llama-3-70B", label="llama3-70b", prompt="plain"), iterations=1,
        data=dataclasses.replace(spec.data, train=MILLION, evaluation=1),
        train=dataclasses.replace(spec.train, batch_size=1024, batches=MILLION // 1024, batches_increment=0))
    gpu, shape, texts = gpu_of("h100", None), shape_of("meta-llama/Meta-Llama-3-70B"), texts_of(spec)
    P, L, common = texts.prompt[0], texts.response[0], texts.common[0]
    step, _ = settle(shape, first_step(spec, texts, GPUS_USED), gpu.gb * 10**9)
    _, sampled = sampling(shape, spec, texts, gpu, GPUS_USED, FRACTION)
    trained = training(shape, spec, texts, gpu, FRACTION, step, True)
    queries = spec.train.queries_needed(1)
    judge = judge_of(spec, texts, None, None)
    found = []
    for C in (2, CONSTITUTIONS):
        responses = queries * C * (1.25 if C == 2 else 1.0)
        layers, head = (queries * f for f in matrix_flops(shape, C, C, P, L, common, training=True))
        hours = trained.hours if C == 2 else seconds(gpu, step.precision, FRACTION, GPUS_USED, layers * 4 / 3, head) / 3600
        bytes_of, held = (responses * (rows[name][0] + rows[name][1] * L) for name in ("file", "memory"))
        sampling_hours = sampled.hours * responses / (queries * 2.5)
        found.append({"C": C, "responses": responses, "sampling": sampling_hours, "tokens": queries * matrix_tokens(C, C, P, L, common),
                      "training": hours, "bytes": bytes_of, "held": held, "job": queries * C * (L + P) * 5.0,
                      "usd": GPUS_USED * USD_A_GPU_HOUR * (sampling_hours + hours)})
    per = judge.usd / judge.requests
    table = [["responses", *(f"{f['responses'] / 1e6:,.1f} million" for f in found)],
             ["sampling, hours", *(f"{f['sampling']:,.0f}" for f in found)],
             ["tokens of the matrices", *(f"{f['tokens'] / 1e9:,.1f} billion" for f in found)],
             ["training, hours", *(f"{f['training']:,.0f}" for f in found)],
             [f"GPU dollars at {USD_A_GPU_HOUR:.2f} an hour and GPU", *(f"{f['usd']:,.0f}" for f in found)],
             ["response files, and what they are in Python's memory", *(f"{f['bytes'] / 1e9:,.1f} GB, {f['held'] / 1e9:,.0f} GB" for f in found)],
             ["an LLM judge over every response, both orders", *(f"{2 * f['responses'] * per:,.0f} USD" for f in found)]]
    return table, {"P": P, "L": L, "found": found, "usd": per, "model": judge.model, "fraction": FRACTION}


def page(record: dict) -> str:
    """results/scale.md."""
    rows, names = record["rows"], list(record["rows"][0]["stages"])
    table, facts = planned(record["row_bytes"])
    last, first = rows[-1], rows[0]
    most = max(last["stages"], key=lambda name: last["stages"][name]["peak_mib"])
    each = (last["stages"][most]["peak_mib"] - first["stages"][most]["peak_mib"]) * 2**20 / (last["queries"] - first["queries"])
    two, every = facts["found"]
    lines = ["# A million queries", "", "Made by `tests/perf/scale.py`: measured where no model is needed, computed where one is.", "",
             "## Measured: what is not the model's", "",
             f"The shipped pipeline on n made queries, three quarters of which train; sampling, log-probs and training are stood in for. {record['processor']}, "
             "one thread: CPU seconds, and the most memory of the process in that stage (that of its imports, "
             f"{first['imports_mib'] / 1024:.1f} GiB, included). Responses have 10 tokens.", "",
             "| stage | " + " | ".join(f"n = {r['queries']:,}" for r in rows) + " |", "|---|" + "---|" * len(rows)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{r['stages'][name]['cpu_seconds']:,.0f} s, {r['stages'][name]['peak_mib'] / 1024:.2f} GiB" for r in rows) + " |")
    lines.append("| in all | " + " | ".join(f"{sum(x['cpu_seconds'] for x in r['stages'].values()) / 60:,.1f} min, "
                                            f"{max(x['peak_mib'] for x in r['stages'].values()) / 1024:.2f} GiB" for r in rows) + " |")
    lines += ["", f"Memory grows by {each / 1024:.1f} KiB a query in `{most}`, the stage that takes most. It is bounded by n, not by a constant: a stage reads its "
              "files whole.", "",
              f"## Computed: a million queries, {CONSTITUTIONS} constitutions, Llama-3-70B", "",
              f"{GPUS_USED} x H100 at {facts['fraction']:.0%} of their rate (an assumption, as all of `repro plan`); prompts of {facts['P']:.0f} tokens, responses of "
              f"{facts['L']:.0f}; one iteration, each query once. NOT RUN.", "",
              f"| | two of the {CONSTITUTIONS} a query | all {CONSTITUTIONS} a query |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in table), "",
              "## What breaks first, and what of the design would change", "",
              f"1. **The matrix.** All {CONSTITUTIONS} constitutions a query are {CONSTITUTIONS**2:,} pairs: {every['tokens'] / two['tokens']:,.0f} times the tokens of two. Exp3's answer is "
              "the one that scales: draw for each query a constitution and its opposite from the pool. Between the two lie a response and k drawn negatives, a "
              "rectangular matrix that losses and kernels take, and the pipeline does not yet draw.",
              f"2. **The judge's budget.** At {facts['usd'] * 2:.5f} USD a comparison ({facts['model']}, both orders) judging all of it costs what is in the table: judge "
              "a sample, which is what the held-out queries are.",
              f"3. **Files of JSON lines, read whole.** Two a query are {two['bytes'] / 1e9:.0f} GB of files and {two['held'] / 1e9:.0f} GB once they are read; the training job "
              f"is one JSON object on top (about {two['job'] / 1e9:.0f} GB), written and read at once. A node of such a machine has the memory; a smaller one has not. Shards of, say, 10,000 "
              f"queries, each with its own check, read one at a time, would make memory a constant. At all {CONSTITUTIONS}, {every['held'] / 1e12:.1f} TB in memory, there is no other way.",
              "4. **One process that samples.** Requests go out from one process with 256 in flight: enough for one server, not for "
              f"{GPUS_USED // 4} copies. Shards make it many processes, too.",
              "5. **What does not change**: randomness is a function of a query's position, so any machine draws its shard alone; a query's update needs no "
              "other query's matrix, so training shards as it does; metrics are means over queries, whose sums can be merged."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--rows", type=Path, help="of a run, a file of responses: what a line takes, into the record; and the page")
    parser.add_argument("--page", action="store_true", help="write results/scale.md from the record, run nothing")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows or args.page:
        record = json.loads(args.out.read_text())
        if args.rows:
            record["row_bytes"] = row_bytes(args.rows)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        README.write_text(page(record))
        return
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
            subprocess.run([sys.executable, __file__, "--queries", str(n), "--one", str(into)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            rows.append(json.loads(into.read_text()))
            args.out.write_text(json.dumps({"processor": processor(), "python": sys.version.split()[0], "commit": commit(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
