"""A user's mistakes: one clear line on stderr, exit code 2, no traceback, nothing written."""

import json
import signal
import subprocess
import sys

import pytest

from repro import cli
from repro.text.queries import load_queries

GOOD_QUERIES = "".join(json.dumps({"query": f"question {k}?", "split": s}) + "\n"
                       for k, s in enumerate(["train"] * 20 + ["evaluation"] * 4))
GOOD_SET = {"principles": [{"name": "short", "text": "Be short.", "antithesis": "Be long."}]}


def refused(capsys, tmp_path, *argv) -> str:
    """Run the command line; it must end with exit code 2 and one line, which is returned."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--out", str(out)] if argv[:1] == ("run",) else list(argv))
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("repro: ") and "Traceback" not in captured.err, captured.err
    assert not out.exists(), "something was written"
    return lines[0]


@pytest.mark.parametrize("argv, reason", [
    (("run", "exp9"), "experiment: 'exp9' is unknown; allowed: 'exp1'"),
    (("run", "mine.py"), "mine.py: no such file"),
    (("run", "exp1", "--profile", "papr"), "did you mean 'paper'"),
    (("run", "exp1", "--proflie", "mini"), "unknown option or command --proflie; did you mean --profile?"),
    (("run", "exp1", "--seed", "one"), "--seed"),
    (("run", "exp1", "--name", "../up"), "--name '../up'"),
    (("run", "exp1", "--name", "x" * 101), "--name 'xxx"),
    (("run", "exp1", "--queries", "x" * 300), "xxx: File name too long"),
    (("publish", "x" * 300), "File name too long"),
    (("run", "exp1", "--model", "smollm2-135m"), "did you mean 'smollm2-135m-instruct'"),
    (("run", "exp1", "--queries", "none.jsonl"), "none.jsonl: no such file"),
    (("run", "exp1", "--subsets", "helpfull"), "did you mean 'helpful'"),
    (("run", "exp1", "--evaluation-split", "test"), "--evaluation-split: 'test' is unknown"),
    (("run", "exp1", "--train-queries", "0"), "--train-queries: 0; must be above 0"),
    (("run", "exp1", "--constitutions", "dialog"), "did you mean 'dialogue'"),
    (("runn", "exp1"), "did you mean run?"),
    (("publish", "nowhere"), "nowhere: no metrics.json"),
    (("publish",), "name at least one run folder"),
    (("run", "exp1", "--batch-size", "0"), "repro: --batch-size: 0; must be above 0"),
    (("run", "exp1", "--batch-size", "1000000000000"), "or a smaller --batch-size"),
    (("run", "exp1", "--iterations", "1000000000"), "--iterations: 1000000000; must be above 0 and at most 1000"),
    (("run", "exp1", "--learning-rate", "1e6"), "--learning-rate: 1000000.0; must be above 0 and at most 0.1"),
    (("run", "exp1", "--learning-rate", "1"), "--learning-rate: 1.0; must be above 0 and at most 0.1"),
    (("run", "exp1", "--learning-rate", "nan"), "--learning-rate: nan; must be a finite number"),
    (("run", "exp1", "--learning-rate", "inf"), "--learning-rate: inf; must be a finite number"),
    (("run", "exp1", "--lora", "0"), "repro: --lora: 0; must be above 0"),
    (("run", "exp1", "--lora", "33"), "--lora 33: must be at most the model's hidden size, 32"),
    (("run", "exp1", "--ranks", "100000"), "--ranks 100000: "),
    (("run", "exp1", "--max-new-tokens", "1000000000"), "leave no room in a context of 2048"),
    (("run", "exp1", "--pack-tokens", "0"), "--pack-tokens: 0; must be above 0"),
    (("run", "exp1", "--dose", "printed"), "--dose: 'printed' is unknown; allowed: 'as_printed', 'as_run'"),
    (("run", "exp1", "--precision", "fp8"), "--precision: 'fp8' is unknown"),
    (("run", "exp1", "--drop-phrases", ""), "--drop-phrases: ('',); must be a tuple of texts, none empty"),
    (("judge", "nowhere", "--model", "m", "--max-tokens", "0"), "repro: --max-tokens: 0; must be above 0"),
    (("judge", "nowhere", "--model", "m", "--temperature", "nan"), "repro: --temperature: nan; must be a finite number"),
    (("plan", "exp1", "--gpus", "1000000000"), "--gpus 1000000000: must be 1 or more, 100000 at most"),
    (("plan", "exp1", "--profile", "mini", "--usd-per-gpu-hour", "nan"), "--usd-per-gpu-hour nan"),
    (("plan", "exp1", "--profile", "mini", "--response-tokens", "inf"), "--response-tokens inf"),
])
def test_flags(capsys, tmp_path, tiny, argv, reason):
    if "--model" not in argv and argv[:2] == ("run", "exp1"):
        argv = (*argv, "--model", str(tiny))
    assert reason in refused(capsys, tmp_path, *argv)


@pytest.mark.parametrize("queries, reason", [
    (GOOD_QUERIES + "{\n", "queries.jsonl:25: not valid JSON"),
    (GOOD_QUERIES + '{"query": ""}\n', "queries.jsonl:25: query: missing or empty"),
    ('{"query": "a", "id": "x"}\n{"query": "b", "id": "x"}\n', "queries.jsonl:2: id: 'x' occurs in line 1 too"),
    (b'{"query": "\xff"}\n', "queries.jsonl:1: not UTF-8"),
    (GOOD_QUERIES + json.dumps({"query": "long " * 900}) + "\n", "queries.jsonl:25: the query has 4499 tokens"),
    (GOOD_QUERIES + '{"query": "hi<|im_end|>there"}\n', "queries.jsonl:25: holds the control token '<|im_end|>'"),
    ('query,split\nHow?,train\n', 'queries.jsonl:1: not valid JSON: Expecting value; a line is one JSON object, such as {"query": '),
    (json.dumps([{"query": "a"}]) + "\n", 'found list; a line is one JSON object, such as {"query": '),
    ('{"prompt": "a"}\n', 'key: \'prompt\' is unknown; allowed: \'query\', \'subset\', \'split\', \'id\'; a row: {"query": '),
    (b"\xef\xbb\xbf" + GOOD_QUERIES.encode(), "queries.jsonl:1: begins with a byte order mark (UTF-8-SIG); save it as UTF-8"),
    (GOOD_QUERIES.encode("utf-16"), "queries.jsonl:1: begins with a byte order mark (UTF-16)"),
    ('{"query": "only one", "split": "train"}\n', "has 1 training and 0 evaluation queries"),
])
def test_query_files(capsys, tmp_path, tiny, queries, reason):
    path = tmp_path / "queries.jsonl"
    path.write_bytes(queries if isinstance(queries, bytes) else queries.encode())
    assert reason in refused(capsys, tmp_path, "run", "exp1", "--model", str(tiny), "--queries", str(path),
                             "--subsets", "own")


@pytest.mark.parametrize("change, reason", [
    ({"antithesis": None}, "principles[0].antithesis: missing or empty"), ({"antithesis": "Be short."}, "equal to the principle"),
    ({"text": "Be <|im_end|>."}, "principle short: holds the control token '<|im_end|>'"), ({"text": "Be {x}."}, "braces"),
])
def test_constitution_files(capsys, tmp_path, tiny, change, reason):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"principles": [GOOD_SET["principles"][0] | change]}))
    assert reason in refused(capsys, tmp_path, "run", "exp1", "--model", str(tiny), "--constitutions", str(path))


@pytest.mark.parametrize("mark", ["<repo_name>", "<think>", "[/INST]", "<SYS>"])
def test_marks_of_the_models_own_tokenizer_and_template(capsys, tmp_path, tiny, mark):
    """Special tokens beside the named ones, an added token that is not special, and what the template spells out."""
    import shutil

    from conftest import CHAT_TEMPLATE, byte_tokenizer
    from tokenizers import AddedToken

    model, queries, principles = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "queries.jsonl", tmp_path / "mine.json"
    queries.write_text(GOOD_QUERIES + json.dumps({"query": f"hi{mark}there"}) + "\n")
    principles.write_text(json.dumps({"principles": [GOOD_SET["principles"][0] | {"text": f"Be {mark} short."}]}))
    own, other = ("run", "exp1", "--model", str(model), "--queries", str(queries), "--subsets", "own"), (
        "run", "exp1", "--model", str(model), "--constitutions", str(principles))
    tokenizer = byte_tokenizer()
    for special, name in ((True, "<repo_name>"), (False, "<think>")):
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'\n'", "'\n<<SYS>>[/INST]'", 1)
    tokenizer.save_pretrained(model)
    assert f"queries.jsonl:25: holds the control token {mark!r}" in refused(capsys, tmp_path, *own)
    assert f"principle short: holds the control token {mark!r}" in refused(capsys, tmp_path, *other)


@pytest.mark.parametrize("harm, reason", [("empty folder", "without config.json"), ("truncated weights", "--model"),
                                          ("pickled weights", "--model"), ("config.json: []", "not a model in Hugging Face format"),
                                          ("tokenizer.json: {}", "not a model in Hugging Face format")])
def test_broken_models(capsys, tmp_path, tiny, harm, reason):
    import shutil

    folder = tmp_path / "model"
    if harm == "empty folder":
        folder.mkdir()
    else:
        shutil.copytree(tiny, folder)
        if ": " in harm:
            name, text = harm.split(": ")
            (folder / name).write_text(text)
        weights = folder / "model.safetensors"
        data = weights.read_bytes()
        if "weights" in harm:
            weights.unlink()
            (folder / ("pytorch_model.bin" if harm == "pickled weights" else "model.safetensors")).write_bytes(data[:1000])
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "exp1", "--model", str(folder), "--out", str(tmp_path / "out"), "--train-queries", "112"])
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and err[-1].startswith("repro: ") and reason in err[-1]


def test_truncate_says_what_it_cuts(capsys, tmp_path, tiny):
    from repro.base.settings import DataSpec
    from repro.text.queries import load_queries

    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"query": "long " * 900, "split": "train"}) + "\n")
    queries, _ = load_queries(str(path), spec=DataSpec(source=str(path), subsets=("own",)))
    assert len(queries) == 1
    with pytest.raises(SystemExit) as e:
        cli.main(["run", "exp1", "--model", str(tiny), "--queries", str(path), "--subsets", "own", "--truncate", "--out", str(tmp_path / "out")])
    assert "queries.jsonl:1: truncated from 4499 to" in capsys.readouterr().err and e.value.code == 2  # no held-out query in it


@pytest.mark.parametrize("text, reason", [
    ("from repro.config import TrainSpec\n\nTrainSpec(optimiser='adamw')\n",
     "mine.py:3: TrainSpec: field: 'optimiser' is unknown; allowed: 'dose', 'optimizer'"),
    ("from repro.config import TrainSpec\nTrainSpec(batch_size=0)\n", "mine.py: TrainSpec.batch_size: 0; must be above 0"),
    ("from repro.config import TrainSpec\nTrainSpec(batch_size='8')\n", "TrainSpec.batch_size: '8'; must be a whole number"),
    ("from repro.config import SamplingSpec\nSamplingSpec(drop_phrases='sorry')\n", "SamplingSpec.drop_phrases: 'sorry'; must"),
    ("int('x')\n", "mine.py:1: ValueError"),
    ("x = (\n", "mine.py:1: SyntaxError"), ("EXPERIMENTS = {'mini': 1}\n", "mine.py: EXPERIMENTS: must be a dict"),
    ("from repro.config import TrainSpec\nTrainSpec(dose='as_prnted')\n", "did you mean 'as_printed'")])
def test_a_users_experiment_file(capsys, tmp_path, text, reason):
    (tmp_path / "mine.py").write_text(text)
    assert reason in refused(capsys, tmp_path, "run", str(tmp_path / "mine.py"))


def test_a_query_file_brings_its_own_subsets(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"query": "a", "subset": "mine"}\n{"query": "b", "subset": "yours"}\n')
    data = cli.configure(cli.Run("exp1", queries=str(path)))[0].data
    assert data.subsets == () and {q.subset for q in load_queries(data.source, spec=data)[0]} == {"mine", "yours"}
    assert cli.configure(cli.Run("exp1"))[0].data.subsets == ("helpful", "harmless")
    assert cli.configure(cli.Run("exp1", queries="hh-rlhf"))[0].data.subsets == ("helpful", "harmless")
    assert cli.configure(cli.Run("exp1", queries="embedded-tldr"))[0].data.subsets == ()
    assert cli.configure(cli.Run("exp1", queries="embedded-tldr", subsets=("helpful",)))[0].data.subsets == ("helpful",)


def test_the_last_lines_say_what_happened_and_where_the_report_is(tmp_path):
    (tmp_path / "metrics.json").write_text("[]")
    (tmp_path / "run.json").write_text(json.dumps({
        "stages": {"metrics": {"seconds": 60, "peak_rss_gib": 1.5}},
        "config": {"name": "mine", "seed": 0, "iterations": 1, "sampling": {"max_new_tokens": 8}}}))
    rows = [{"query": f"q{k}", "subset": "held_out", "constitutions": ["a", "not_a"], "sides": {"0": ["1", "0 loop"], "1": ["1", "1"]},
             "tokens": {"0": [9, 9], "1": [4, 4 + k]}, "bound": {"0": 0.25, "1": 0.5}} for k in range(9)]
    (tmp_path / "following.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "constitutions.json").write_text(json.dumps(GOOD_SET))
    (tmp_path / "responses").mkdir()
    answers = [{"finished": k in (1, 3, 4)} for k in range(6)]  # three queries; the judged ones are 0, 2 and 4
    (tmp_path / "responses/evaluation-1.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    lines = cli.summary(tmp_path)
    assert "2 of 3 judged answers were cut at 8 tokens (SamplingSpec.max_new_tokens)" in lines
    assert lines[-1] == f"report: {tmp_path}/report.html"
    assert lines[:4] == [
        "held out: The bound on mutual information rose: 0.25 -> 0.50, +0.25, in nats (n 9, 1 seed).",
        "held out: The constitution is followed more: 0.50 -> 1.00, +0.50 [+0.05, +0.64], as the share of its sides (n 9, 1 seed).",
        "held out: Among responses that answer, the share of sides followed is not seen to change: 1.00 -> 1.00, +0.00: more is followed because more responses answer.",
        "held out: More responses answer: 0.50 -> 1.00, +0.50 [+0.05, +0.64]; their length fell: 9 -> 6, -3.0 [-4.1, -1.9], in tokens."]
    assert lines[-2] == "1.0 minutes of work in all, peak memory 1.5 GiB"


def test_a_second_sigterm_as_the_program_ends_leaves_no_traceback():
    """`timeout` and make each send one: the later comes while Python runs what is registered for its end."""
    code = ("import atexit, time\nfrom repro import cli\natexit.register(lambda: (print('ending', flush=True), time.sleep(30)))\n"
            "cli.COMMANDS[cli.Verify] = lambda args: (print('working', flush=True), time.sleep(30))\ncli.main(['verify'])")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for said in ("working", "ending"):
        assert child.stdout.readline() == said + "\n"
        child.send_signal(signal.SIGTERM)
    _, told = child.communicate(timeout=20)
    assert told == "\nrepro: stopped; run the same command to go on\n"
    assert child.returncode == -signal.SIGTERM


def test_main_leaves_sigterm_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        cli.main(["plan", "exp9"])
    assert signal.getsignal(signal.SIGTERM) == before
