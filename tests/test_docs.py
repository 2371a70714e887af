"""README and docs: links work, commands exist, and the output shown is what the code prints."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import cost
import eval
import train
from recipes import RECIPES, make_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = {path.stem: path.read_text(encoding="utf-8") for path in PAGES}
NUMBER = r"([\d.]+)"


# --- links ----------------------------------------------------------------------------------------
def anchors(path):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(page):
    """Every relative link and picture exists, and so does the heading it points to."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):       # another website
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not heading or heading in anchors(path), target


# --- numbers --------------------------------------------------------------------------------------
def test_the_printed_cost_is_that_of_cost_py(capsys):
    """docs/RESULTS.md shows the output of `python cost.py --dataset nyud`."""
    cost.main(["--dataset", "nyud"])
    assert capsys.readouterr().out in PAGE["RESULTS"]


@pytest.mark.slow
def test_the_demonstration_gives_the_shown_results(tmp_path):
    """`python train.py` with seed 0 gives the tree in docs/RUNS.md, and its table within 2 %."""
    metrics = train.main(["--out", str(tmp_path / "run")])
    shown = re.findall(rf"^(\w+) +([a-zA-Z<][\w.]*) +{NUMBER} +{NUMBER}(?: |$)", PAGE["RUNS"], re.M)
    assert len(shown) == 10
    for task, metric, result, constant in shown:
        assert metrics["results"][task][metric] == pytest.approx(float(result), rel=0.02)
        assert metrics["reference"][task][metric] == pytest.approx(float(constant), abs=1e-4)
    for i, stage in enumerate(metrics["tree"], 1):
        groups = " ".join("{" + ", ".join(group) + "}" for group in stage)
        assert f"stage {i}   {groups}" in PAGE["RUNS"]


# --- commands and snippets ------------------------------------------------------------------------
def commands(pattern):
    """(file, flags) of each command in the pages' code blocks whose file matches `pattern`."""
    runs = []
    for text in PAGE.values():
        for line in text.replace("\\\n", " ").splitlines():
            match = re.match(rf"\s*(?:python|torchrun .*?) (?:-m )?({pattern})(?: (.*)|$)", line)
            if match:
                flags = match[2] or ""
                runs.append((match[1], shlex.split(flags.replace("$", ""), comments=True)))
    return runs


def check_training_flags(flags):
    """Parse flags of train.py, without reading a run's files for --resume."""
    first = argparse.ArgumentParser(allow_abbrev=False)
    first.add_argument("--dataset", choices=RECIPES, default="rooms")
    dataset = first.parse_known_args(flags)[0].dataset
    make_parser(RECIPES[dataset], dataset).parse_args(flags)


def test_commands_of_the_core_have_real_flags():
    """Each command's flags are known to the program that it starts."""
    runs = commands(r"train\.py|eval\.py|cost\.py")
    assert {program for program, _ in runs} == {"train.py", "eval.py", "cost.py"}
    for program, flags in runs:
        if program == "eval.py":
            eval.parse_arguments(flags)
        else:
            check_training_flags([flag for flag in flags if flag != "--json"])


def test_snippets_import_names_that_exist():
    """Every Python block parses, and every name that it imports from outside extras/ exists."""
    for text in PAGE.values():
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and not node.module.startswith("extras"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
