"""The documentation: README of a page, links that lead somewhere, targets and flags that exist, a table that the records give."""

import dataclasses
import posixpath
import re
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from torch.distributed.run import get_args_parser

from repro import flags
from repro.studies import steered

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"run": flags.Run, "compare": flags.Compare, "probe": flags.Probe, "plan": flags.Plan, "judge": flags.Judge, "show": flags.Show, "watch": flags.Watch, "export": flags.Export, "publish": flags.Publish, "verify": flags.Verify, "figures": flags.Figures}
TORCHRUN = {option for action in get_args_parser()._actions for option in action.option_strings}
FOREIGN = {"--help", "--version", "--exclude", "--no-deps", "--constraint"} | TORCHRUN  # every command's; `hf download`'s; pip's; torchrun's
TARGET = re.compile(r"(?:^|[\s`(])make ([a-z][a-z0-9-]*)(?=[\s`),.;:]|$)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# A command up to the end of its line or span, or to what ends it in a shell; one that `make` calls has its flags in ARGS.
CALL = re.compile(r"\brepro (run|compare|plan|judge|show|watch|export|publish|verify|figures)\b([^`\n;|#]*)|\bmake (exp[123]|compare|verify|figures)\b[^`\n#]*?ARGS='?([^'`\n]*)")


def tracked(pattern: str) -> list[str]:
    return subprocess.run(["git", "ls-files", pattern], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def texts(pattern: str) -> dict[str, str]:
    return {path: (ROOT / path).read_text() for path in tracked(pattern)}


READMES = texts("*README.md") | texts("CHANGELOG.md")


def prose(text: str) -> str:
    """A page without its fenced blocks and code spans, in which nothing is a link or a heading."""
    return re.sub(r"`[^`\n]*`", lambda span: span[0].strip("`") if "](" not in span[0] else "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings: lower case, spaces as hyphens, no punctuation, -1, -2 for the same again."""
    found: dict[str, int] = {}
    out = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        out.add(slug + (f"-{found[slug]}" if slug in found else ""))
        found[slug] = found.get(slug, 0) + 1
    return out


def dead_links(pages: dict[str, str], files: list[str]) -> list[str]:
    """Of the relative links of these pages (path -> text) those that lead to no tracked file, folder or heading."""
    there = set(files) | {str(parent) for file in files for parent in PurePosixPath(file).parents}
    dead = []
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(PurePosixPath(page).parent / path) if path else page
            if target not in there or (anchor and anchor not in anchors(pages.get(target, ""))):
                dead.append(f"{page}: {link}")
    return dead


def flags_of(command: type) -> set[str]:
    """A command's flags, as the command line spells them: those of yes and no have a --no- form too."""
    names = {f.name.replace("_", "-"): f.type is bool for f in dataclasses.fields(command)}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name, switch in names.items() if switch}


def unknown_targets(pages: dict[str, str], makefile: str) -> list[str]:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, flags=re.M))
    code = {page: "\n".join(re.findall(r"^ *```.*?^ *```|`[^`\n]+`", text, flags=re.M | re.S)) for page, text in pages.items()}
    return [f"{page}: make {name}" for page, text in code.items() for name in TARGET.findall(text) if name not in targets]


def unknown_flags(pages: dict[str, str], scripts: str) -> list[str]:
    """Flags that no command has, and flags of a command line that are another command's. Of our scripts those that they define."""
    every = set().union(*map(flags_of, COMMANDS.values())) | FOREIGN | set(re.findall(r"add_argument\(\"(--[a-z-]+)\"", scripts))
    wrong = [f"{page}: {flag}" for page, text in pages.items() for flag in FLAG.findall(text) if flag not in every]
    for page, text in pages.items():
        for command, rest, target, arguments in CALL.findall(text):
            kind = COMMANDS[command or (target if target in COMMANDS else "run")]
            wrong += [f"{page}: repro {kind.__name__.lower()} {flag}" for flag in FLAG.findall(rest + arguments) if flag not in flags_of(kind) | {"--help"}]
    return wrong


def lost_paths(pages: dict[str, str], files: list[str]) -> list[str]:
    """Files of ours that these pages name and that are not there, as paths from the top or as modules."""
    there = set(files)
    return [f"{page}: {path}" for page, text in pages.items()
            for path in re.findall(r"(?<![\w/.])((?:repro|kernels|tests|experiments|findings)/[\w/]+\.(?:py|sh|md|json|jsonl))\b", text) if path not in there] + [
        f"{page}: {name}" for page, text in pages.items()
        for name in re.findall(r"(?:-m |from |import )((?:repro|kernels)(?:\.\w+)*)", text)
        if not there & {f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"}]


def test_the_readme_is_a_page():
    assert len(READMES["README.md"].splitlines()) <= 180


def test_the_changelog_and_the_citation_name_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version and cited["license"] == "MIT" and cited["authors"] and len(cited["references"][0]["authors"]) == 6
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", texts("CHANGELOG.md")["CHANGELOG.md"], flags=re.M)


def test_every_link_leads_somewhere():
    pages = texts("*.md")
    assert sum(len(re.findall(r"\]\(", text)) for text in pages.values()) > 40
    assert dead_links(pages, tracked("*")) == []


def test_files_and_modules_that_are_named_are_there():
    pages = {page: text for page, text in texts("*.md").items() if page != "results/LOG.md"}  # which is history
    assert lost_paths(pages | texts("repro/*.py") | texts("kernels/*.py"), tracked("*")) == []
    order = re.findall(r"`(\w+/\w+)`", re.search(r"^Read in this order: .*$", READMES["README.md"], flags=re.M)[0])
    assert len(order) == 6 and all(f"{p}.py" in tracked("*") or f"repro/{p}.py" in tracked("*") for p in order)


def test_a_lost_file_or_module_is_found():
    page = {"p": "`repro/probe.py`, repro/core/probe.py; python -m repro.worker RUN\nfrom repro.core.probe import x\nfrom repro import y"}
    assert lost_paths(page, ["repro/__init__.py", "repro/core/probe.py"]) == ["p: repro/probe.py", "p: repro.worker"]


@pytest.mark.parametrize("link", ["nothing.md", "a/../../a.md", "b#no-heading", "a.md#no-heading", "#no-heading", "a/b.md#what-it-is-1"])
def test_a_dead_link_is_found(link):
    pages = {"a.md": f"# What `it` is\n[x]({link})", "a/b.md": "# What it is (again)\n## 95 % of it\n```\n# No heading\n[x](no.md)\n```"}
    assert dead_links(pages, [*pages, "c/d.py"]) == [f"a.md: {link}"]
    for alive in ("a/b.md", "#what-it-is", "a/b.md#95--of-it", "a", "c/d.py", "https://x.org/y", "a/../c"):
        assert dead_links(pages | {"a.md": f"# What `it` is\n[x]({alive})"}, [*pages, "c/d.py"]) == []


def test_every_target_and_flag_exists():
    makefile, scripts = (ROOT / "Makefile").read_text(), "\n".join(texts("tests/*.py").values())
    assert len(TARGET.findall("\n".join(READMES.values()))) > 20 and len(CALL.findall("\n".join(READMES.values()))) > 20
    assert unknown_targets(READMES, makefile) == [] and unknown_flags(READMES, scripts) == []


@pytest.mark.parametrize("text, found", [
    ("`make exp4`", ["p: make exp4"]), ("```\nmake setups   # x\n```", ["p: make setups"]), ("`make exp1 ARGS='--lora 8'` and make sure", []),
    ("`--no-such 8`", ["p: --no-such"]), ("`--lora 8`, `--no-cot`, `--rdzv-conf=timeout=1`, `--made`", []),
    ("`repro judge RUN --lora 8`", ["p: repro judge --lora"]), ("`make exp1 ARGS='--seed 1 --admit'`", ["p: repro run --admit"]),
    ("```\nmake verify ARGS='--archive F --seed'\n```", ["p: repro verify --seed"])])
def test_a_wrong_target_or_flag_is_found(text, found):
    assert unknown_targets({"p": text}, "exp1: x\nverify: x\n") + unknown_flags({"p": text}, 'add_argument("--made")') == found


def test_the_readmes_table_is_what_the_records_hold(tmp_path):
    """results/steered.md is what its command makes of the published runs, and README has its first table."""
    for path in (p for p in tracked("results/*") if re.search(r"/(following|run)-[^/]*$|/mini/(metrics|constitutions)\.json$", p)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    steered.write(tmp_path / "results")
    page = (ROOT / "results/steered.md").read_text()
    assert (tmp_path / "results/steered.md").read_text() == page
    rows = page.split("\n| run, subset |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 2 and [line for line in READMES["README.md"].splitlines() if re.match(r"\| exp\d_\w+(-\w+)*, ", line)] == rows


