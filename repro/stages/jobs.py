"""An iteration's training as a job in the run folder: done here, or by torchrun's workers (rank.py), who also score
held-out responses where a model needs more than one of them.
The pipeline holds their stdin: a line on it asks them to stop after the current step, its end says that the pipeline is
gone, and they end at once, so that none writes into a folder that another run may have taken. What they tell on stdout is
one JSON object a line.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from repro.base.records import UserError, digest, loads, read_json, remove_folder, write_json
from repro.base.training import TrainSpec
from repro.core import lora
from repro.models import load

ATTACHED = "SAMI_ATTACHED"  # set where stdin is the pipeline's


def check_ranks(ranks: int, nodes: int = 1) -> None:
    """Raise UserError for a number of ranks that this machine cannot have."""
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: must be 1 or more")
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be 1 or more")
    if ranks > 1:
        import torch

        if torch.cuda.is_available() and ranks > torch.cuda.device_count():
            raise UserError(f"--ranks {ranks}: this machine has {torch.cuda.device_count()} GPUs, and each rank needs one")
        if not torch.cuda.is_available() and ranks > (most := max(2, os.cpu_count() or 1)):
            raise UserError(f"--ranks {ranks}: without a GPU each rank needs a core, and this machine has "
                            f"{os.cpu_count()}; at most {most}")


def job_file(iteration: int) -> str:
    return f"checkpoints/iteration-{iteration}.job.json"


def steps_folder(iteration: int) -> str:
    return f"checkpoints/iteration-{iteration}.steps"


def train(folder: Path, iteration: int, ranks: int, *, on_query: Callable[[int], None], nodes: int = 1) -> list[dict]:
    """Do the job in `folder`, which leaves its weights in Hugging Face format; returns the trace of its steps. On each of
    `nodes` machines `ranks` processes train."""
    if ranks * nodes > 1:
        return launch(folder, job_file(iteration), ranks, on_query=on_query, nodes=nodes)
    from repro.core.engines import OneProcess

    load.release()  # before there are weights to train
    return work(folder, iteration, OneProcess(), on_query)


def clear(folder: Path, iteration: int) -> None:
    """Remove what a finished iteration needs no longer."""
    remove_folder(folder / steps_folder(iteration))
    (folder / job_file(iteration)).unlink(missing_ok=True)


def write_job(folder: Path, iteration: int, *, model: str, pairs: list, spec: TrainSpec, backend: str, key: str,
              out: str, seed: int) -> None:
    """All that the workers of an iteration need: `model` a name or place, `pairs` TrainingPairs, `key` of its step
    checkpoints, `out` the folder below `folder` for the weights, `seed` of fresh adapters."""
    write_json(folder / job_file(iteration), {
        "iteration": iteration, "model": model, "train": asdict(spec), "key": key, "backend": backend, "out": out,
        "seed": digest([seed, iteration]), "pairs": [asdict(pair) for pair in pairs]})


def score(folder: Path, name: str, ranks: int, *, model: str, pairs: list, spec: TrainSpec, backend: str,
          on_query: Callable[[int], None]) -> list:
    """Summed log-probs [C][R] of each of `pairs` under `model`, computed by `ranks` workers."""
    job = folder / f"logprobs/{name}.job.json"
    write_json(job, {"model": model, "train": asdict(spec), "backend": backend, "pairs": [asdict(pair) for pair in pairs]})
    try:
        return launch(folder, str(job.relative_to(folder)), ranks, on_query=on_query)
    finally:
        job.unlink(missing_ok=True)


# ---- in the pipeline

def torchrun(folder: Path, job: str, ranks: int, nodes: int, node: int) -> list[str]:
    """The module that starts the workers of one node, with its arguments. Nodes meet at MASTER_ADDR:MASTER_PORT, which is
    node 0, by default this machine and port 29500; who is early waits a day."""
    address, port = os.environ.get("MASTER_ADDR") or socket.gethostname(), os.environ.get("MASTER_PORT") or "29500"
    where = ["--standalone"] if nodes == 1 else [
        f"--nnodes={nodes}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}",
        "--rdzv-conf=timeout=86400"]
    return ["torch.distributed.run", *where, f"--nproc-per-node={ranks}", "-m", "repro.stages.rank", str(folder), job]


def launch(folder: Path, job: str, ranks: int, *, on_query: Callable[[int], None], nodes: int = 1) -> list:
    """Have `ranks` workers (on each of `nodes`) do the job of a file in `folder`; returns its rows: the trace of steps, or
    matrices.

    Raises UserError with the workers' reason, or with the rank that was lost. SystemExit and KeyboardInterrupt (a signal)
    are raised on once the workers have saved their step; a second one ends them at once.
    """
    load.release()  # the sampling model's memory is the workers' now
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    folder = folder.absolute()
    for node in range(1, nodes):
        argv = " ".join(torchrun(folder, job, ranks, nodes, node))
        print(f"waiting for node {node}; start there: {sys.executable} -m {argv}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *torchrun(folder, job, ranks, nodes, 0)], text=True, errors="replace",
        start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {ATTACHED: "1", "OMP_NUM_THREADS": str(max(1, cores // ranks)), "PYTHONUNBUFFERED": "1"})
    heard = {"queries": [], "row": [], "done": [], "error": [], "failed": [], "other": deque(maxlen=200)}
    listener = threading.Thread(target=_listen, args=(process.stdout, heard, on_query), daemon=True)
    listener.start()
    try:
        process.wait()
    except (KeyboardInterrupt, SystemExit):
        if heard["queries"] and "out" in read_json(folder / job):  # in training: else there is nothing to save
            print("stopping after this step; once more to stop at once", file=sys.stderr)
            with suppress(BrokenPipeError):
                print("stop", file=process.stdin, flush=True)
            process.wait()
        raise
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        if process.poll() is None:
            process.kill()
            process.wait()
        listener.join(10)
        process.stdout.close()
    if process.returncode == 0 and heard["done"] == [len(heard["row"])]:
        return heard["row"]
    name = Path(job).name.split(".")[0]
    raise UserError(heard["error"][0] if heard["error"] else f"{name} on {ranks * nodes} ranks stopped: {_lost(heard)}; "
                    "what is saved stays: run the same command to go on")


def _listen(stream, heard: dict, on_query: Callable[[int], None]) -> None:
    for line in stream:
        try:
            (kind, value), = loads(line).items()
            heard[kind].append(value)
        except (ValueError, KeyError, AttributeError):
            heard["other"].append(line)
        else:
            if kind == "queries":
                on_query(value)


def _lost(heard: dict) -> str:
    """Which rank ended first and how, in torchrun's words or the rank's own."""
    ends = re.findall(r"^ +rank +: (\d+).*\n +exitcode +: (-?\d+)", "".join(heard["other"]), flags=re.M)
    killed = [(rank, -int(code)) for rank, code in ends if int(code) < 0 and -int(code) != signal.SIGTERM]
    if killed:
        return f"rank {killed[0][0]} was lost (killed by signal {killed[0][1]})"
    if heard["failed"]:
        return heard["failed"][0]
    print("".join(heard["other"]), file=sys.stderr)
    return "its workers ended without a word (the end of torchrun's is above)"


def read_job(folder: Path, name: str):
    """A job's file, its TrainSpec and its pairs."""
    from repro.core.engines import TrainingPair
    from repro.core.tree import Sampled

    job = read_json(folder / name)
    pairs = [TrainingPair(p["query"], tuple(p["prompts"]), tuple(
        r if isinstance(r, str) else tuple(r) if isinstance(r, list) else
        Sampled(tuple(r["ids"]), tuple(r["lead"]), r["end"], r["finished"]) for r in p["responses"]),
        p["initial"] and tuple(map(tuple, p["initial"]))) for p in job["pairs"]]
    return job, TrainSpec(**job["train"]), pairs


def work(folder: Path, iteration: int, engine, on_query: Callable[[int], None], asked: list[int] | None = None) -> list:
    """This rank's part of an iteration's training; returns the trace."""
    from repro.core import engines, loop
    from repro.core.checkpoints import StepCheckpoints

    job, spec, pairs = read_job(folder, job_file(iteration))
    tokenizer = load.load_tokenizer(job["model"])
    model = engine.load_model(job["model"], dtype=engines.weights_dtype(spec))
    if spec.lora:
        lora.put_into(model, spec.lora, half=spec.precision == "bf16", seed=job["seed"])

    def save_batch(facts):
        path = folder / "not_finite.json"
        if engine.rank == 0:
            write_json(path, facts)
        return path

    trace = loop.train(
        model, tokenizer, pairs, spec, iteration, backend=job["backend"], engine=engine, asked=asked, save_batch=save_batch,
        steps=StepCheckpoints(folder / steps_folder(iteration), job["key"]), on_query=on_query)
    save = partial(lora.save, base=job["model"]) if spec.lora else load.save_model
    engine.export(lambda plain: save(plain, tokenizer, folder / job["out"]))
    return trace
