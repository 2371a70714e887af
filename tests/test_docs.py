"""Tests of README.md, CONTRIBUTING.md and docs/.

Relative links have a target, the commands for train.py, eval.py and cost.py can be parsed, Python
blocks import names that exist, and the printed costs and demonstration results are up to date.
"""

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


def read_table(first):
    """Read the table in docs/RESULTS.md whose first column has the head `first`.

    Returns one dict per row, from the head of each column to the cell, without backticks.
    """
    text = PAGE["RESULTS"]
    lines = text[text.index(f"\n| {first} |"):].strip().partition("\n\n")[0].splitlines()
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    heads, _, *rows = cells
    return [dict(zip(heads, row, strict=True)) for row in rows]


# --- links ----------------------------------------------------------------------------------------
def anchors(path):
    """The anchors that GitHub makes from the headings of a page, for links such as #results."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(page):
    """Relative links and pictures point to files and headings that exist."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
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
    """`python train.py` gives the parameter counts and results in README.md, and RUNS.md's tree.

    Results of constant predictions agree to 1e-4. Those of the network depend on the processor, so
    they only agree to 10 %.
    """
    metrics = train.main(["--out", str(tmp_path / "run")])
    row = re.compile(rf"^(\w+) +([a-zA-Z<][\w.]*) +{NUMBER} +{NUMBER}(?: |$)", re.M)
    shown = row.findall(PAGE["README"])
    assert len(shown) == 4
    for task, metric, result, constant in shown:
        assert metrics["results"][task][metric] == pytest.approx(float(result), rel=0.1)
        assert metrics["reference"][task][metric] == pytest.approx(float(constant), abs=1e-4)
    for i, stage in enumerate(metrics["tree"], 1):
        groups = " ".join("{" + ", ".join(group) + "}" for group in stage)
        assert f"stage {i}   {groups}" in PAGE["RUNS"]
    counts = [f"{metrics[name]:,}" for name in ("adapters", "decoders", "trainable", "total")]
    assert re.search("adapters {} .*decoders {} .*= {} of {}".format(*counts), PAGE["README"])


def test_the_lengths_of_files_are_right():
    """README.md shows the number of lines of every core file."""
    shown = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", PAGE["README"], re.M))
    lengths = {path.name: str(len(path.read_text(encoding="utf-8").splitlines()))
               for path in ROOT.glob("*.py")}
    assert shown == lengths


# --- commands and snippets ------------------------------------------------------------------------
def commands(pattern):
    """Find the commands in the pages that run a file whose name matches the regex `pattern`.

    Only commands on a line of their own are found. Returns a list of (file, flags).
    """
    runs = []
    for text in PAGE.values():
        for line in text.replace("\\\n", " ").splitlines():
            match = re.match(rf"\s*(?:python|torchrun .*?) (?:-m )?({pattern})(?: (.*)|$)", line)
            if match:
                flags = match[2] or ""
                flags = flags.replace("$seed", "0").replace("$", "")
                runs.append((match[1], shlex.split(flags, comments=True)))
    return runs


def check_training_flags(flags):
    """Parse flags with train.py's parser. With --resume, the run's checkpoint is not read."""
    first = argparse.ArgumentParser(allow_abbrev=False)
    first.add_argument("--dataset", choices=RECIPES, default="rooms")
    dataset = first.parse_known_args(flags)[0].dataset
    make_parser(RECIPES[dataset], dataset).parse_args(flags)


def test_commands_of_the_core_have_real_flags():
    """The flags in the commands for train.py, eval.py and cost.py exist and have valid values."""
    runs = commands(r"train\.py|eval\.py|cost\.py")
    assert {program for program, _ in runs} == {"train.py", "eval.py", "cost.py"}
    for program, flags in runs:
        if program == "eval.py":
            eval.parse_arguments(flags)
        else:
            check_training_flags([flag for flag in flags if flag != "--json"])


def test_snippets_import_names_that_exist():
    """Every Python block parses, and every name in its `from` imports exists.

    Imports from extras/ are not checked.
    """
    for text in PAGE.values():
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and not node.module.startswith("extras"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
