"""The distribution, the import directions, and a README that names every source file."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from imports import ROOMS, arrows, circles, modules, room

ROOT = Path(__file__).resolve().parent.parent
# Files that import torch when they are imported; the others do where they need it.
TORCH = {"core/losses.py", "core/tree.py", "core/logprobs.py", "core/probe.py", "core/memory.py", "core/engines.py", "core/loop.py",
         "core/checkpoints.py"}
MOST_ARROWS = 50  # between rooms


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
    code = f"{statement}\nimport sys\nassert not {{'torch', 'triton', 'transformers'}} & set(sys.modules)"
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


UNSAFE = re.compile(r"\b(?:yaml\.\w*load|pickle|dill|joblib|shelve|marshal|torch\.load|allow_pickle|trust_remote_code(?!=False)|tarfile"
                    r"|extract\(|extractall|unpack_archive|shell=True|os\.system|os\.popen)|(?<![\w.])(?:eval|exec)\(")
WRITING = re.compile(r"(?<!records)\.write_text\(|(?<!records)\.write_bytes\(|\.write\(|open\([^)]*[\"'][wax]b?\+?[\"']")


def test_no_unsafe_loading():
    for path in tracked("repro/*.py", "kernels/*.py", "experiments/*.py", "results/*.py"):
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
