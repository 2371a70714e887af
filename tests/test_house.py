"""The house: who may import whom, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for folder in (".", "datasets", "util", "tools")
               for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py")
NAMES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}


def imports(path):
    """Modules of ours that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & NAMES.keys()


GRAPH = {name: imports(path) for name, path in NAMES.items()}
ALONE = ["tglora", "swin", "pvt", "similarity", "grouping", "decoders", "tasks", "datasets.rooms",
         "util.parallel", "util.run"]


def test_imports_go_in_no_circle():
    """Modules are taken away that import nothing that is left; in the end none is left."""
    left = {name: set(found) for name, found in GRAPH.items()}
    while left:
        free = {name for name, found in left.items() if not found & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: found for name, found in left.items() if name not in free}


def test_what_can_be_copied_alone_imports_nothing_of_ours():
    for name in ALONE:
        assert not GRAPH[name], name


@pytest.mark.parametrize("name, never", [
    ("eval", {"train"}), ("model", {"recipes", "flags", "train", "eval", "data"}),
    ("data", {"train", "eval", "recipes", "flags", "model"}), ("mtlora", {"model", "swin"}),
    ("bdta", {"model", "swin", "tglora"})])
def test_imports_point_down(name, never):
    """What a module is built on never needs it, directly or by others."""
    reached, new = set(), {name}
    while new:
        reached |= new
        new = set().union(*(GRAPH[n] for n in new)) - reached
    assert not reached & never


def test_the_network_and_the_data_know_no_command_line():
    """Concepts and data take their knobs as an object with attributes."""
    for name in [*ALONE, "model", "mtlora", "bdta", "data", "datasets.labels", "datasets.archives"]:
        assert "argparse" not in NAMES[name].read_text(), name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_read_in_one_sitting(path):
    """330 lines of 100 characters at most, train.py 320, eval.py 200."""
    lines = path.read_text().splitlines()
    assert len(lines) <= {"train": 320, "eval": 200}.get(path.stem, 330)
    assert max(map(len, lines)) <= 100
