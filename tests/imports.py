"""Who imports whom: the rooms of the house, bottom up, and the arrows between them (`make imports` prints it).

A folder of repro/ is one room, a file at its top another, kernels/ the lowest, experiments/ the highest. Imports inside
functions count.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Bottom up: a room imports only what stands before it.
ROOMS = ("kernels", "base", "config", "models", "servers", "text", "core", "sampling", "judges",
         "report", "paper", "plan", "stages", "studies", "flags", "experiment", "cli", "experiments")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything under kernels/, repro/ and experiments/."""
    found = {}
    for path in sorted(p for top in ("kernels", "repro", "experiments") for p in (ROOT / top).rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """The room of a module; "" for the package repro itself."""
    parts = module.split(".")
    return parts[0] if parts[0] != "repro" else parts[1] if len(parts) > 1 else ""


def imports() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, anywhere in it."""
    known, found = modules(), defaultdict(set)
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [full if (full := f"{node.module}.{a.name}") in known else node.module for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            else:
                continue
            found[module] |= {name for name in names if name in known and name != module}
    return found


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the imports, as "module -> module"."""
    found = defaultdict(list)
    for module, others in imports().items():
        for other in sorted(others):
            if "" not in (room(module), room(other)) and room(module) != room(other):
                found[room(module), room(other)].append(f"{module} -> {other}")
    return found


def circles() -> list[list[str]]:
    """Modules that import each other, directly or by way of others: one list a circle."""
    graph, reach = imports(), {}

    def reached(module: str) -> set[str]:
        if module not in reach:
            seen, todo = set(), list(graph[module])
            while todo:
                if (at := todo.pop()) not in seen:
                    seen.add(at)
                    todo += graph[at]
            reach[module] = seen
        return reach[module]

    known = list(modules())
    return sorted({tuple(sorted(m for m in reached(a) if a in reached(m))) for a in known if a in reached(a)})


def main() -> None:
    found = arrows()
    for name in ROOMS:
        files = [p for m, p in modules().items() if room(m) == name]
        lines = sum(len(p.read_text().splitlines()) for p in files)
        print(f"{name:<12} {len(files):>2} files {lines:>5} lines   imports "
              + (", ".join(b for b in ROOMS if (name, b) in found) or "nothing of ours"))
    print(f"{len(found)} arrows between rooms, {len(circles())} circles between files")


if __name__ == "__main__":
    main()
