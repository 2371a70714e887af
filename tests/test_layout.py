"""The README promises a core that needs no extras, and files that can be copied."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
COPYABLE = ["tglora", "swin", "weights", "similarity", "grouping", "decoders", "tasks", "rooms",
            "util"]


def imports(path, at_import_time=False):
    """The modules that a file imports. at_import_time leaves out imports inside functions."""
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
    """A method or backbone from extras/ is only imported in the branch that asks for it."""
    assert "extras" not in imports(CORE[name], at_import_time=True)
    if name != "model":
        assert "extras" not in imports(CORE[name])


@pytest.mark.parametrize("name", COPYABLE)
def test_a_file_that_can_be_copied_imports_nothing_of_ours(name):
    """These files import packages only, as the README says."""
    assert not imports(CORE[name]) & CORE.keys()


def test_imports_never_form_a_circle():
    """Repeatedly removing the files that import none of the others removes all of them."""
    left = {name: imports(path) & CORE.keys() for name, path in CORE.items()}
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_networks_and_data_know_no_command_line():
    """These files take settings as arguments or as an object, so none of them imports argparse."""
    for name in (*COPYABLE, "data", "nyud_pascal"):
        assert "argparse" not in imports(CORE[name]), name


@pytest.mark.slow
def test_no_unix_only_module_is_needed(tmp_path):
    """A run and its evaluation work where fcntl and resource do not exist, as on Windows."""
    code = f"""
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import eval, train
train.main("--tasks depth,normals --train-rooms 2 --val-rooms 1 --size 32 --epochs 1 "
           "--batch-size 2 --sim-images 2 --head-epochs 1 --device cpu "
           "--out {tmp_path}/run".split())
eval.main(["--checkpoint", "{tmp_path}/run", "--device", "cpu", "--workers", "0"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
