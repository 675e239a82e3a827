"""PROFILE=paper of all three experiments, end to end and by their commands, with tiny Mistral, Mixtral and Llama models in
the place of the real ones: one override (--models). Two gloo ranks train (of exp1 under torchrun), a real OpenAI-compatible server
samples (`transformers serve`; the run starts and stops it, or it is already there), a judge endpoint judges, the run is
verified. What is checked is the machinery; these models' numbers mean nothing."""

from pathlib import Path

import pytest
from judge_server import JudgeServer
from test_judge_real import SERVING, transformers_serve
from toy_models import save_toy

from repro import cli
from repro.base.records import read_json, read_jsonl, write_json
from repro.models import load
from repro.sampling.local import sample_batch
from repro.servers.endpoint import Endpoint
from repro.stages import draws
from repro.stages.run import Run

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"mistralai/Mistral-7B-v0.1": ("mistral", 5), "mistralai/Mistral-7B-Instruct-v0.1": ("mistral", 1),
         "mistralai/Mixtral-8x7B-v0.1": ("mixtral", 6), "meta-llama/Meta-Llama-3-70B": ("llama", 5)}
SMALL = ("--profile", "paper", "--ranks", "2", "--sampler", "server", "--batch-size", "2", "--learning-rate", "0.01",
         "--max-new-tokens", "24", "--judge", "rules", "openai", "--judge-model", "judge-1")
pytestmark = pytest.mark.skipif(not SERVING, reason="NOT RUN: transformers' serving extra is not installed; make setup installs it")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """The one override: a file that names the models in the place of the paper's."""
    folder = tmp_path_factory.mktemp("toys")
    write_json(folder / "models.json", {name: str(save_toy(folder / f"toy-{name.split('/')[1]}", kind, seed))
                                        for name, (kind, seed) in NAMES.items()})
    return folder / "models.json"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-tests")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def judge():
    with JudgeServer(offers=(), flips=4).serve() as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`transformers serve` that was there before the run and loads what it is asked for, by path."""
    with transformers_serve(tmp_path_factory.mktemp("serve") / "log", "--dtype", "bfloat16") as url:
        yield url


def repro(capsys, *argv) -> tuple[str, str]:
    """What the command says in this process, which has imported all that it needs: (stdout, stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        cli.main([*map(str, argv)])
    said = capsys.readouterr()
    assert e.value.code == 0, said.out[-2000:] + said.err[-4000:]
    return said


def verified(folder: Path, runs: int, said: str) -> None:
    """`repro verify RUN` recomputes everything, and calls no number of a toy the paper's."""
    assert said.count(" PASS ") == 5 * runs + (runs > 1) and "FAIL" not in said and "NOT RUN" not in said
    assert "not held against the paper's cells: its model is " in said and "Table" not in said


def check(folder: Path, iterations: int, model: str, *, started_here: bool) -> None:
    """What every run leaves."""
    record, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
    assert record["config"]["profile"] == "paper" and record["config"]["sampling"]["engine"] == "server"
    for k in range(1, iterations + 1):
        assert record["stages"][f"train-{k}"]["ranks"] == 2 and (folder / f"checkpoints/iteration-{k}/config.json").is_file()
    assert {r["model"] for r in metrics if r["metric"] == "mi"} == {f"toy-{model}"}
    assert {r["iteration"] for r in metrics} == set(range(iterations + 1))
    assert record["sampled_by"] == {"engine": "server", "version": None, "started_here": started_here}
    wins = [r for r in metrics if r["metric"] == "win_rate" and r["judge"] == "judge-1"]
    assert wins and all(r["n"] for r in wins)
    assert (folder / "figures/iterations.png").is_file() and (folder / "report.html").is_file()
    assert not list((folder / "responses").glob("*.partial.jsonl"))


def prompts(folder: Path, argv, iteration: int) -> tuple[Run, list[str]]:
    """The prompts that an iteration sampled with."""
    experiment = next(e for e in cli.configure(cli.parse(["run", *map(str, argv)])) if folder.match(e.path))
    nobody = "http://127.0.0.1:9/v1"
    run = Run(experiment, folder, lambda line: None, sampler_url=nobody, endpoint=Endpoint(model="judge-1", base_url=nobody))
    run.check()
    jobs = [(q, c) for q, pair in run.training_plan(iteration) for c in pair]
    texts = [draws.prompt(run.voice, c, q, experiment.seed, iteration, "sample", c.id, sample=True) for q, c in jobs]
    return run, [text + " " + run.voice.form.opening if run.voice.form.opening else text for text in texts]


def said_by(place: str, run: Run, texts: list[str]) -> list[str]:
    """What a model says to each prompt in this process, one at a time as the server does."""
    model = load.load_model(place, dtype="bfloat16")
    return [run.voice.form.response(run.voice.form.opening + sample_batch(model, run.voice.tokenizer, [text], max_new_tokens=24)[0]["text"])
            for text in texts]


def test_exp1_paper_with_servers_that_the_run_starts(toys, judge, tmp_path, capsys, served_scoring):
    argv = ("exp1", *SMALL, "--models", toys, "--queries", "embedded", "--train-queries", 20, "--evaluation-queries", 2,
            "--iterations", 2, "--base-url", judge, "--out", tmp_path)
    said = repro(capsys, "run", *argv).err
    folder = tmp_path / "exp1_dialogue/paper"
    check(folder, 2, "Mistral-7B-v0.1", started_here=True)
    started = [line for line in said.splitlines() if line.startswith("starting transformers serve with")]
    places = [line.split(" with ")[1].split(";")[0] for line in started]
    base, tuned = read_json(toys), [str(folder / f"checkpoints/iteration-{k}") for k in (1, 2)]
    base = [base["mistralai/Mistral-7B-v0.1"], base["mistralai/Mistral-7B-Instruct-v0.1"]]
    assert places == [base[0], base[1], base[0], tuned[0], tuned[0], tuned[1]]  # evaluate, baseline, sample and evaluate twice
    # iteration 2 is sampled from the weights of iteration 1, and those are others than the initial ones
    run, texts = prompts(folder, argv, 2)
    rows = [row["text"] for row in read_jsonl(folder / "responses/training-2.jsonl")]
    assert len(rows) == len(texts) >= 20
    assert rows == said_by(tuned[0], run, texts)
    assert sum(a != b for a, b in zip(rows, said_by(base[0], run, texts))) > len(rows) / 2
    verified(folder, 1, repro(capsys, "verify", folder).out)
    again = repro(capsys, "run", *argv).err
    assert "starting" not in again and again.count("done before, skipped") == 11


@pytest.mark.parametrize("name, folder, variants, iterations", [
    ("exp2", "exp2_tldr", {"mistral-7b": "Mistral-7B-v0.1", "mixtral-8x7b": "Mixtral-8x7B-v0.1"}, 1),
    ("exp3", "exp3_diverse", {"direct": "Meta-Llama-3-70B", "cot": "Meta-Llama-3-70B"}, 1)])
def test_exp2_and_exp3_paper_with_a_server_that_is_there(name, folder, variants, iterations, toys, judge, server, tmp_path, capsys, unrendered,
                                                        served_ranks):
    argv = (name, *SMALL, "--models", toys, "--queries", "embedded-tldr", "--train-queries", 40, "--evaluation-queries", 2,
            "--iterations", iterations, "--base-url", judge, "--sampler-url", server, "--out", tmp_path)
    assert "starting" not in repro(capsys, "run", *argv).err
    together = tmp_path / folder / "paper"
    for variant, model in variants.items():
        check(together / variant, iterations, model, started_here=False)
    assert (together / "report.html").is_file()
    verified(together, len(variants), repro(capsys, "verify", together).out)
