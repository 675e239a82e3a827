"""A setting is written once: the command line has its name, type, default and allowed values from the field that holds it."""

import dataclasses
import re
import sys

import pytest

from repro import cli, flags
from repro.base import commandline
from repro.base.records import UserError
from repro.base.settings import PARTS, Experiment
from repro.base.training import LoraSpec
from repro.experiment import configure, load_experiment
from repro.servers.endpoint import Endpoint

# Flag, type and default of each command, as they were when each was written by hand; ? is "or None", by default None.
SPELLED = {
    "run": """experiment:str profile:str? out:Path=runs name:str? seed:int? model:str? prompt:str? queries:str? subsets:str...?
        train_queries:int? evaluation_queries:int? evaluation_split:str? variant:str? constitutions:str? task:str? writer:str?
        writer_model:str? writer_url:str? asked:str? cot:bool=False reasoning:bool=False truncate:bool=False judge:str...?
        judge_model:str? base_url:str? answer:str? leave_out:str...? price:float,float? max_usd:float=10.0 precision:str?
        dose:str? leakage:str? pack_tokens:int? dropout:str? lora:int? ranks:int=1 nodes:int=1 models:Path? sampler:str?
        sampler_url:str? sampler_as_is:bool=False tensor_parallel:int? iterations:int? batch_size:int? learning_rate:float? max_new_tokens:int?
        drop_phrases:str...? score_eos:bool=False objective:str? beta:float? contrast_temperature:float? margin:float? anchor:float?
        scored_queries:int? accept_licence:str?""",
    "compare": """experiment:str objectives:str...=() rates:float...=() path:bool=False seeds:int...=() profile:str? variant:str? iterations:int?
        model:str? out:Path=runs accept_licence:str?""",
    "probe": """principles:str probe_queries:int=16 out:Path=runs/probe accept_licence:str? model:str=smollm2-135m-instruct prompt:str?
        task:str=dialogue queries:str? max_new_tokens:int=48""",
    "plan": """experiment:str profile:str? variant:str? gpus:int? gpu_memory:float? gpu:str? fraction:float=0.4 model:str?
        config:Path? lora:int=0 response_tokens:float? judge_model:str? price:float,float? usd_per_gpu_hour:float? out:Path? objective:str?""",
    "judge": """run:Path? admit:bool=False model:str= name:str= base_url:str? key_env:str=OPENAI_API_KEY answer:str=auto
        leave_out:str...? max_tokens:int=300 temperature:float?=0.0 price:float,float? max_usd:float=10.0 concurrency:int=8
        deadline:float=120.0 attempts:int=5 dry_run:bool=False reparse:bool=False strict:bool=False files:str...=() items:int=100
        archive:Path? work:Path=runs/judges out:Path?""",
    "show": "run:Path answers:int=2",
    "watch": "run:Path every:float=5.0 trackio:str?",
    "export": "run:Path folder:Path iteration:int?",
    "publish": "runs:Path...=() results:Path=results numbers_only:bool=False",
    "verify": "run:Path? archive:Path? out:Path=results/verify strict:bool=False responses:bool=False",
    "figures": "archive:Path? out:Path=results/figures run:Path...=()",
}
PLACES = {"run": ["experiment"], "compare": ["experiment"], "probe": ["principles"], "plan": ["experiment"], "judge": ["run"], "show": ["run"], "watch": ["run"], "export": ["run", "folder"], "publish": ["runs"], "verify": ["run"], "figures": []}
COMMANDS = {kind.__name__.lower(): kind for kind in cli.COMMANDS}
SETTINGS = [f for f in dataclasses.fields(flags.Run) if f.metadata.get("at") is not None]


def written(f) -> str:
    kind, one, more = commandline._kinds(f)
    name = f"{f.name}:{one.__name__}" + ("..." if ... in more else "".join(f",{m.__name__}" for m in more)) + "?" * (kind != f.type)
    return name if f.default in (dataclasses.MISSING, None) else f"{name}={f.default}"


@pytest.mark.parametrize("command", SPELLED)
def test_every_flag_keeps_its_spelling_type_and_default(command, capsys):
    assert sorted(map(written, dataclasses.fields(COMMANDS[command]))) == sorted(SPELLED[command].split())
    with pytest.raises(SystemExit) as stop:
        cli.parse([command, "--help"])
    said = capsys.readouterr().out
    names = [item.split(":")[0] for item in SPELLED[command].split()]
    switches = [item.split(":")[0] for item in SPELLED[command].split() if ":bool" in item]
    assert stop.value.code == 0 and set(re.findall(r"^  (--[a-z-]+)", said, flags=re.M)) == {
        "--" + name.replace("_", "-") for name in names if name not in PLACES[command]}
    assert set(re.findall(r"--no-[a-z-]+", said)) == {"--no-" + name.replace("_", "-") for name in switches}
    assert all(f" {name.upper()}" in said or f"[{name.upper()}" in said for name in PLACES[command])
    flat = " ".join(said.split())
    for f in dataclasses.fields(COMMANDS[command]):
        of, name = f.metadata.get("of", (COMMANDS[command], f.name))
        text = commandline._texts(of.__module__)[of.__name__, name]
        assert len(text) > 5 and text[:20].split()[0] in flat and (f.default in (dataclasses.MISSING, None, False, "", ())
                                                                   or f"(default: {f.default})" in flat)


def test_every_setting_with_a_flag_has_it():
    wanted = {f.metadata["flag"]: (kind, f.name) for kind in (Experiment, LoraSpec, *PARTS.values())
              for f in dataclasses.fields(kind) if f.metadata.get("flag")}
    assert {f.name: f.metadata["of"] for f in SETTINGS} == wanted and len(wanted) > 25
    server = {f.metadata["flag"]: f.name for f in dataclasses.fields(Endpoint) if f.metadata.get("flag")}
    assert {f.name: f.metadata["of"][1] for f in dataclasses.fields(flags.Judge) if f.metadata.get("of", (None,))[0] is Endpoint} == server


SAMPLES = {"constitutions": "dialogue", "task": "dialogue", "judge": ("likelihood", "rules"), "judge_model": "m", "prompt": "plain", "lora": 4, "model": "a/b", "seed": 5,
           "writer_model": "c/d", "asked": "sing", "queries": "mine.jsonl", "subsets": ("x",), "drop_phrases": ("no",), "pack_tokens": 99}
ALSO = {"model": {"model.label": "b"}, "writer_model": {"writer.label": "d"}, "cot": {"name": "exp2_tldr_cot"},
        "beta": {"train.objective": "nca"}, "margin": {"train.objective": "conspo_rows"},
        "lora": {"name": "exp2_tldr_lora", "train.learning_rate": 1e-4, "train.lora": {"rank": 4, "alpha": 8}}}


def flat(data: dict, of: str = "") -> dict:
    return {k: v for key, value in data.items() for k, v in (
        flat(value, f"{of}{key}.") if isinstance(value, dict) and key != "lora" else {of + key: value}).items()}


@pytest.mark.parametrize("f", SETTINGS, ids=lambda f: f.name)
def test_a_flag_changes_its_setting_and_no_other(f):
    (base,) = [e for e in load_experiment("exp2", "mini") if e.variant == "weak"]
    kind, one, _ = commandline._kinds(f)
    allowed = f.metadata["allowed"]
    value = SAMPLES.get(f.name, allowed[-1] if allowed else {bool: True, int: 7, float: 0.01}.get(one))
    words = [] if value is True else value if isinstance(value, tuple) else [str(value)]
    objective = ALSO.get(f.name, {}).get("train.objective")
    args = cli.parse(["run", "exp2", "--variant", "weak", commandline.spelled(f), *words, *(["--objective", objective] if objective else [])])
    assert getattr(args, f.name) == value
    (made,) = configure(args)
    before, after = flat(base.to_json()), flat(made.to_json())
    changed = {k: v for k, v in after.items() if before.get(k, ...) != v}
    own = ".".join(filter(None, (f.metadata["at"], f.metadata["of"][1])))
    expected = {own: ["likelihood", "rule"] if f.name == "judge" else list(value) if isinstance(value, tuple) else value} if f.name != "lora" else {}
    assert changed == {k: v for k, v in (expected | ALSO.get(f.name, {})).items() if before.get(k, ...) != v} != {}


@pytest.mark.parametrize("kind, name", [(kind, f.name) for kind in (Experiment, LoraSpec, *PARTS.values())
                                        for f in dataclasses.fields(kind) if f.metadata.get("allowed")])
def test_what_a_setting_may_be_stands_at_its_field(kind, name):
    """The class holds every one against it, and a flag's line names the flag and the values."""
    (f,) = [f for f in dataclasses.fields(kind) if f.name == name]
    needed = {"name": "n", "profile": "p", "constitutions": "dialogue"} if kind is Experiment else {}
    several = isinstance(f.default, tuple)
    for value in f.metadata["allowed"]:
        kind(**needed | {name: (value,) if several else value} | ({"model": "m"} if value == "openai" and several else {}))
    said = f"'zzz' is unknown; allowed: {', '.join(map(repr, f.metadata['allowed']))}"
    with pytest.raises(UserError, match=f"^{kind.__name__}.{name}: {re.escape(said)}$"):
        kind(**needed | {name: ("zzz",) if several else "zzz"})
    if flag := f.metadata["flag"]:
        with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')}: {re.escape(said)}$"):
            configure(cli.parse(["run", "exp1", "--" + flag, "zzz"]))


@pytest.mark.parametrize("line, given", [
    ("run --seed 3 exp1", {"seed": 3}), ("run exp1 --seed=-3", {"seed": -3}), ("run exp1 --train_queries 4", {"train_queries": 4}),
    ("run exp1 --seed 3 --seed 4", {"seed": 4}), ("run exp1 --seed None", {}), ("run exp1 --subsets None", {}),
    ("run exp1 --subsets", {"subsets": ()}), ("run exp1 --subsets a b --seed 1", {"subsets": ("a", "b"), "seed": 1}),
    ("run exp1 --subsets=a b", {"subsets": ("a", "b")}), ("run exp1 --price=1 2", {"price": (1.0, 2.0)}),
    ("run exp1 --cot", {"cot": True}), ("run exp1 --cot --no-cot", {}), ("run exp1 --prompt=", {"prompt": ""}),
    ("run exp1 --learning-rate -1e-3", {"learning_rate": -0.001}), ("run exp1 --price -1 2", {"price": (-1.0, 2.0)}),
    ("run -- exp1", {}), ("judge", {}), ("judge f --model m --temperature None", {"model": "m", "temperature": None, "run": "f"}),
    ("judge --files a b --model m", {"files": ("a", "b"), "model": "m"}), ("publish --numbers-only a b", {"numbers_only": True, "runs": ("a", "b")}),
    ("publish", {}), ("figures --run a b", {"run": ("a", "b")}), ("verify f --strict", {"run": "f", "strict": True})])
def test_words_of_a_command_line(line, given):
    args = cli.parse(line.split())
    found = {f.name: v for f in dataclasses.fields(args) if f.name != "experiment" and (v := getattr(args, f.name)) != f.default}
    plain = {k: tuple(map(str, v)) if k in ("runs", "run") and isinstance(v, tuple) else str(v) if k == "run" else v for k, v in found.items()}
    assert plain == given and type(args) is COMMANDS[line.split()[0]]


@pytest.mark.parametrize("argv, said", [
    ([], "a command is missing: one of run, compare, probe, plan, judge, show, watch, export, publish, verify, figures; see repro --help"),
    ([""], "unknown option or command ''; see repro --help"), (["foo"], "unknown option or command foo; see repro --help"),
    (["--seed", "3", "run", "exp1"], "unknown option or command --seed; it is a flag of repro run"),
    (["run"], "the following arguments are required: EXPERIMENT; see repro run --help"),
    (["run", "exp1", "extra"], "unknown option or command extra; see repro run --help"),
    (["run", "exp1", "a\nb"], r"unknown option or command 'a\nb'; see repro run --help"),
    (["run", "exp1", "--gpus", "3"], "unknown option or command --gpus; it is a flag of repro plan"),
    (["run", "exp1", "--judge-modle", "m"], "unknown option or command --judge-modle; did you mean --judge-model?"),
    (["run", "exp1", "--see", "3"], "unknown option or command --see; did you mean --seed?"),  # no flag is taken for half its name
    (["run", "exp1", "--cot", "yes"], "unknown option or command yes; see repro run --help"),
    (["run", "exp1", "--seed", "one"], "--seed: 'one'; must be a whole number"), (["run", "exp1", "--seed", ""], "--seed: ''; must be a whole number"),
    (["run", "exp1", "--seed", "9" * 5000], f"--seed: '{'9' * 5000}'; must be a whole number"),
    (["run", "exp1", "--lora", "16.0"], "--lora: '16.0'; must be a whole number"),
    (["run", "exp1", "--price", "1"], "--price: '1'; must be 2 numbers"), (["run", "exp1", "--price", "1", "b"], "--price: '1 b'; must be 2 numbers"),
    (["run", "exp1", "--price", "None", "1"], "--price: 'None 1'; must be 2 numbers"),
    (["run", "exp1", "--model"], "--model: expected one argument; see repro run --help"),
    (["plan", "exp1", "--gpu-memory", "80GB"], "--gpu-memory: '80GB'; must be a number")])
def test_a_mistake_is_one_line(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", {kind: lambda args: pytest.fail(f"taken: {args}") for kind in cli.COMMANDS})
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err == f"repro: {said}\n" and not captured.out


def test_a_line_names_a_flag_only_where_it_was_given(tmp_path):
    """What is wrong with a setting of the experiment's own is told in the setting's name."""
    for argv, said in ((["--cot", "--prompt", "plain"], "--cot: chain of thought"), (["--judge", "openai"], "JudgeSpec.model: the openai"),
                       (["--judge", "rules", "rule"], "--judge: rule, rule; each at most once"),
                       (["--judge", "openai", "--judge-model", "rule"], "--judge-model: 'rule'; allowed are"),
                       (["--reasoning", "--prompt", "plain"], "--reasoning: a model that reasons"), (["--lora", "-1"], "--lora: -1; must be"),
                       (["--seed", "0", "--iterations", "0"], "--iterations: 0; must be above 0")):
        with pytest.raises(UserError, match="^" + re.escape(said)):
            configure(cli.parse(["run", "exp1", *argv]))
    (tmp_path / "mine.py").write_text("import dataclasses\nfrom repro.experiment import load_experiment\n"
                                      "EXPERIMENTS = {'mini': dataclasses.replace(load_experiment('exp1', 'mini')[0], cot=True)}\n")
    with pytest.raises(UserError, match="^Experiment.cot: chain of thought"):
        configure(cli.parse(["run", str(tmp_path / "mine.py"), "--prompt", "plain"]))


def test_help_is_read_from_the_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "made", type(sys)("made"))
    monkeypatch.setattr("inspect.getsource", lambda module: 'class A:\n    "doc"\n    a: int = 1\n    """The\n    a."""\n    b: int = 2\n    c = 3\n    """no"""\n')
    assert commandline._texts("made") == {("A", "a"): "The a."}


def test_every_command_has_two_examples_that_are_read_and_shown(capsys):
    from repro import cli

    for name, kind in ((kind.__name__.lower(), kind) for kind in cli.COMMANDS):
        assert len(kind.examples) == 2
        for example in kind.examples:
            assert example.startswith(f"repro {name}") and type(cli.parse(example.split()[1:])) is kind
        with pytest.raises(SystemExit):
            cli.parse([name, "--help"])
        assert capsys.readouterr().out.endswith("examples:\n  " + "\n  ".join(kind.examples) + "\n")
