"""Layouts and texts of packed trees, for tests."""

import random

from kernels.attention import Layout


def grouped(groups) -> Layout:
    """(tokens of a prefix, tokens of each tail) of each group: two levels."""
    branches = []
    for prefix, (first, *others) in groups:
        root = len(branches)
        branches += [(prefix + first, -1, 0), *((tail, root, prefix) if prefix else (tail, -1, 0) for tail in others)]
    return Layout(tuple(branches))


def drawn(seed: int, branches: int, longest: int = 9) -> Layout:
    """A tree of that many branches, each from any place of any earlier one, or a text of its own."""
    draw, found = random.Random(seed), []
    for k in range(branches):
        parent = draw.randrange(-1, k) if k else -1
        found.append((draw.randint(1, longest), parent, draw.randint(1, found[parent][0]) if parent >= 0 else 0))
    return Layout(tuple(found))
