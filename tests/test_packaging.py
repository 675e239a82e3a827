"""The distribution, the import directions, and a README that names every source file."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from imports import ROOMS, arrows, circles, modules, room

from repro import cli

ROOT = Path(__file__).resolve().parent.parent
# Files that import torch when they are imported; the others do where they need it.
TORCH = {"core/losses.py", "core/tree.py", "core/logprobs.py", "core/probe.py", "core/memory.py", "core/engines.py", "core/loop.py",
         "core/checkpoints.py", "sampling/greedy.py"}
MOST_ARROWS = 56  # between rooms


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Top-level packages imported by a file: anywhere in it, or only when it is imported."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else (
        node for statement in tree.body if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_down_and_in_no_circle():
    up = [line for (a, b), lines in arrows().items() if ROOMS.index(a) < ROOMS.index(b) for line in lines]
    assert up == [] and circles() == []
    assert {room(m) for m in modules()} - {""} == set(ROOMS)
    assert len(arrows()) <= MOST_ARROWS, "more arrows between rooms: find out whether one of them says that something stands in a wrong place"


def test_files_are_short_and_folders_hold_few():
    for folder in {p.parent for p in (*sources("repro"), *sources("kernels"))}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 11, folder
    assert {str(p.relative_to(ROOT)): n for p in (*sources("repro"), *sources("kernels"))
            if (n := len(p.read_text().splitlines())) > 340} == {}


def test_every_folder_says_what_it_is():
    for path in (ROOT / "repro").rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert path.parent.name == "repro" or len(tree.body) == 1, path


def test_torch_stays_where_it_belongs():
    found = {str(path.relative_to(ROOT / "repro")) for path in sources("repro") if "torch" in imported(path, everywhere=False)}
    assert found == TORCH


@pytest.mark.parametrize("statement", ["import repro", "import kernels", "from repro.base import metrics; from repro.paper import cells, figures; from repro.report import page"])
def test_import_loads_no_torch(statement):
    code = f"{statement}\nimport sys\nassert not {{'torch', 'triton', 'transformers', 'jinja2'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_api_resolves():
    import repro

    for name in repro.__all__:
        assert callable(getattr(repro, name)), name
    with pytest.raises(AttributeError):
        repro.nothing  # noqa: B018


def test_transformers_is_not_confused_by_our_kernels_package():
    """transformers probes for a hub package of that name: the distribution and its version must tell them apart."""
    assert set(packages_distributions()["kernels"]) == {"sami-repro"}
    assert version("sami-repro").startswith("0.1.")
    code = ("from transformers.utils import is_kernels_available\nfrom transformers import LlamaForCausalLM\n"
            "import kernels\nassert not is_kernels_available()\n")
    subprocess.run([sys.executable, "-c", code], check=True)


def tracked(*patterns: str) -> list[str]:
    return subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


def named(tree: str) -> list[str]:
    """The files of a drawn tree, as folder/stem: of a line the words before its #, in the folder that was drawn last."""
    files, folders = [], {}
    for line in tree.splitlines():
        drawn = line.split("#")[0]
        depth = len(drawn) - len(drawn.lstrip())
        folders = {at: name for at, name in folders.items() if at < depth}
        if folder := re.match(r" *(\w+)/", drawn):
            folders[depth] = folder[1]
        files += ["/".join([*folders.values(), name]) for name in re.findall(r"\w+(?![\w/])", drawn)]
    return files


def test_the_readme_names_every_source_file_once_and_nothing_else():
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("```\nexperiments/"):].split("```")[1]
    files = [p.removesuffix(".py") for p in tracked("experiments/*.py", "repro/*.py", "kernels/*.py") if not p.endswith("__init__.py")]
    assert sorted(named(tree)) == sorted(files)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with what the wheel installs, built from a copy of what git tracks (`build/` of a checkout keeps files that are
    long gone, and setuptools packs them)."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out)], cwd=copy, check=True)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as packed:
        for name in packed.namelist():
            packed.extract(name, out / "unpacked")
    return out / "unpacked"


def in_empty_folder(wheel: Path, folder: Path, *argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "repro.cli", *argv], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(wheel)} | env)


SHIPPED = {"experiments/": "repro/experiments/", "results/published/": "repro/published/", "results/judges/": "repro/judged/"}


def test_the_wheel_holds_the_code_and_what_it_reads_and_nothing_else(wheel):
    held = {str(p.relative_to(wheel)) for p in wheel.rglob("*") if p.is_file() and not p.relative_to(wheel).parts[0].endswith(".dist-info")}
    expected = {p for p in tracked("repro", "kernels") if not p.endswith(".md")}
    for ours, theirs in SHIPPED.items():
        found = [p for p in tracked(ours) if not p.endswith(".md")]
        assert found, ours
        expected |= {p.replace(ours, theirs, 1) for p in found if not p.endswith(".md")}
    assert held == expected
    (record,) = wheel.glob("*.dist-info")
    assert (record / "top_level.txt").read_text().split() == ["kernels", "repro"]  # who owns `kernels`: the test above


def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path, capsys):
    code = "import repro, kernels; print(repro.__file__, kernels.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(wheel)})
    assert found.stdout.count(str(wheel)) == 2, found.stdout + found.stderr
    assert in_empty_folder(wheel, tmp_path, "--version").stdout == f"sami-repro {version('sami-repro')}\n"
    planned = in_empty_folder(wheel, tmp_path, "plan", "exp1", "--profile", "mini")
    with pytest.raises(SystemExit):
        cli.main(["plan", "exp1", "--profile", "mini"])
    here = capsys.readouterr().out
    assert planned.stdout == here != "" and planned.returncode == 0, planned.stderr
    (tmp_path / "mine.py").write_text((ROOT / "experiments/exp1_dialogue.py").read_text())
    assert in_empty_folder(wheel, tmp_path, "plan", "mine.py", "--profile", "mini").stdout == here


def test_the_wheel_reads_inside_and_writes_below_the_current_folder(wheel, tmp_path):
    """The published tables, pins and admissions are the package's; an admission made here is looked into first."""
    code = ("from repro.paper import archive, cells; from repro.judges import standing\n"
            "assert archive.load_manifest() and archive.load_cells()\n"
            "judge = next(standing.JUDGES.glob('*.json')).stem\n"
            "assert 'NOT admitted' in standing.standing(judge), standing.standing(judge)\n"
            "from repro.base.records import read_json, write_json\n"
            "record = read_json(standing.JUDGES / f'{judge}.json')\n"
            "write_json(standing.ADMISSIONS / f'{judge}.json', record | {'admitted': True})\n"
            "assert ': admitted;' in standing.standing(judge)")
    before = {p: p.stat().st_mtime_ns for p in wheel.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(wheel)})
    assert [str(p.relative_to(tmp_path).parent) for p in tmp_path.rglob("*.json")] == ["results/judges"]
    assert before == {p: p.stat().st_mtime_ns for p in wheel.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_an_installation_without_its_experiments_says_how_to_mend_it(wheel, tmp_path):
    broken = shutil.copytree(wheel, tmp_path / "broken")
    shutil.rmtree(broken / "repro/experiments")
    for argv in (["run", "exp1"], ["plan", "all"], ["run", "exp9"]):
        done = in_empty_folder(broken, tmp_path, *argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "is broken, it holds no experiments; install it anew" in done.stderr and "allowed" not in done.stderr
    (tmp_path / "mine.py").write_text((ROOT / "experiments/exp1_dialogue.py").read_text())
    assert in_empty_folder(broken, tmp_path, "plan", "mine.py", "--profile", "mini").returncode == 0  # one's own file needs none of them


def test_the_commit_is_ours_or_none(wheel, tmp_path):
    """Of a git address the one that pip noted; of a wheel none, though its environment lies in another repository."""
    for argv in (["init", "-q"], ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", *argv], cwd=tmp_path, check=True)
    installed = shutil.copytree(wheel, tmp_path / "site-packages")
    plain = f"sami-repro {version('sami-repro')}"
    assert in_empty_folder(installed, tmp_path, "--version").stdout == plain + "\n"
    (record,) = installed.glob("*.dist-info")
    (record / "direct_url.json").write_text('{"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "0123abcd"}}')
    assert in_empty_folder(installed, tmp_path, "--version").stdout == plain + ", commit 0123abcd\n"


@pytest.mark.parametrize("there, taken", [
    (("3.11", "3.12", "3.13", "3.14"), "3.14"), (("3.11",), "3.11"), (("3.10", "3.11", "3.12"), "3.12"), (("3.10",), None), ((), None)])
def test_make_takes_the_newest_python_that_starts(tmp_path, there, taken):
    """With stand-ins for the Pythons, and for pip in the environment that they make. One that does not start (a version
    manager's empty name) is passed over."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for tool in ("sh", "make", "uname", "touch", "mkdir", "cat", "chmod"):
        (bin / tool).symlink_to(shutil.which(tool))
    for name in {"3.11", "3.12", "3.13", "3.14", "", *there}:
        old = "1" if name == "3.10" else "0"
        stand_in = (f"#!{shutil.which('sh')}\ncase $1 in -c) exit {old};; --version) echo Python {name};;\n-m) mkdir -p .venv/bin\n"
                    f"echo '#!{shutil.which('sh')}' > .venv/bin/python; chmod +x .venv/bin/python;; esac\n")
        path = bin / f"python{name or 3}"
        path.write_text(stand_in if name in there else f"#!{shutil.which('sh')}\nexit 127\n")
        path.chmod(0o755)
    done = subprocess.run(["make", "setup"], cwd=tmp_path, env={"PATH": str(bin)}, capture_output=True, text=True)
    if taken:
        assert done.returncode == 0 and done.stdout == (
            f"setting up .venv with Python {taken} (once: 2.7 GB, a few minutes)\n  1 of 2: torch\n  2 of 2: the other packages\n"), done.stdout + done.stderr
    else:
        assert done.returncode == 2 and done.stdout == ("make: none of python3.14 python3.13 python3.12 python3.11 python3 is Python 3.11 or newer "
                                                        "with venv and takes torch 2.13.0; pass PYTHON=...\n"), done.stdout + done.stderr


def test_what_begins_with_an_underscore_stays_in_its_file():
    for path in (*sources("repro"), *sources("kernels"), *sources("experiments"), *sources("tests/studies")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("repro", "kernels"):
                assert not [a.name for a in node.names if a.name.startswith("_")], path


def test_results_hold_no_code():
    assert not tracked("results/*.py")


@pytest.mark.parametrize("path", tracked("tests/studies/*.py"))
def test_a_study_finds_what_it_imports(path):
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


UNSAFE = re.compile(r"\b(?:yaml\.\w*load|pickle|dill|joblib|shelve|marshal|torch\.load|allow_pickle|trust_remote_code(?!=False)|tarfile"
                    r"|extract\(|extractall|unpack_archive|shell=True|os\.system|os\.popen)|(?<![\w.])(?:eval|exec)\(")
WRITING = re.compile(r"(?<!records)\.write_text\(|(?<!records)\.write_bytes\(|\.write\(|open\([^)]*[\"'][wax]b?\+?[\"']")


def test_no_unsafe_loading():
    for path in tracked("repro/*.py", "kernels/*.py", "experiments/*.py", "tests/studies/*.py"):
        assert not UNSAFE.findall((ROOT / path).read_text()), path


def test_files_are_written_through_records_only():
    """Anything else could be left half-written."""
    for path in (*sources("repro"), *sources("kernels"), *sources("experiments")):
        if path.stem not in ("records", "archive"):
            assert not WRITING.search(path.read_text()), path.name


@pytest.mark.parametrize("line, rule", [
    ("import pickle\npickle.loads(x)", "S301"), ("import marshal\nmarshal.loads(x)", "S302"), ("eval(x)", "S307"), ("exec(x)", "S102"),
    ("import yaml\nyaml.load(x)", "S506"), ("import tarfile\ntarfile.open(x).extractall()", "S202"),
    ("import subprocess\nsubprocess.run(x, shell=True)", "S602"), ("import os\nos.system(x)", "S605"),
    ("torch.load(x)", None), ("numpy.load(x, allow_pickle=True)", None), ("AutoModel.from_pretrained(x, trust_remote_code=True)", None),
    ("zipfile.ZipFile(x).extractall()", None), ("shutil.unpack_archive(x)", None), ("dill.load(x)", None), ("joblib.load(x)", None)])
def test_unsafe_loading_would_be_found(line, rule):
    """By lint, where it has a rule, and by the test above."""
    assert UNSAFE.search(line)
    if rule:
        done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", str(ROOT / "repro/x.py"), "-"], input=line,
                              capture_output=True, text=True, cwd=ROOT)
        assert rule in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("line", ['open(path, "w")', "open(path, 'ab')", 'open(path, mode="x")', "path.write_text(text)", "f.write(text)"])
def test_a_write_past_records_would_be_found(line):
    assert WRITING.search(line)
