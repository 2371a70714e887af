"""Tests of the core's imports.

Importing the core does not import extras/, the files that README.md offers for copying need no
other file of the repository, no imports are circular, and no Unix-only module is needed.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
COPYABLE = ["tglora", "swin", "weights", "similarity", "grouping", "decoders", "tasks", "rooms",
            "util"]


def imports(path, at_import_time=False):
    """The modules that a file imports. at_import_time: only those of its top-level statements."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_import_time else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_no_extras(name):
    """Importing a core file does not import extras/. In model.py, some functions import it when
    they are called; no other core file does that."""
    assert "extras" not in imports(CORE[name], at_import_time=True)
    if name != "model":
        assert "extras" not in imports(CORE[name])


@pytest.mark.parametrize("name", COPYABLE)
def test_a_file_that_can_be_copied_imports_nothing_of_ours(name):
    """The files that the README offers for copying import nothing from this repository."""
    assert not imports(CORE[name]) & CORE.keys()


def test_imports_never_form_a_circle():
    """Repeatedly removing the files that import no remaining file leaves no file in the end."""
    left = {name: imports(path) & CORE.keys() for name, path in CORE.items()}
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"circular imports among {sorted(left)}"
        for name in free:
            del left[name]


def test_networks_and_data_know_no_command_line():
    """The copyable files, data.py and nyud_pascal.py do not import argparse.

    They take their settings as arguments or as an object.
    """
    for name in (*COPYABLE, "data", "nyud_pascal"):
        assert "argparse" not in imports(CORE[name]), name


def test_no_unix_only_module_is_needed():
    """The core does not import fcntl and resource, which Windows does not have."""
    for name, path in CORE.items():
        assert not imports(path) & {"fcntl", "resource"}, name
