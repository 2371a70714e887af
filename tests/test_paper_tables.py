"""Tests of the tables in docs/RESULTS.md and README.md: the parameters and GMACs in the rows of the
paper are those that cost.py computes for the flags shown."""

import re

import pytest
from conftest import costs
from test_docs import NUMBER, PAGE, read_table

TASKS = {"pascal": ("semseg", "human_parts", "sal", "normals"),
         "nyud": ("semseg", "normals", "depth")}


def find_row(first, name):
    """The row that starts with `name`, in the table whose first column has the head `first`."""
    return next(row for row in read_table(first) if row[first] == name)


def check_row(dataset, row):
    """Compare a row of costs with cost.py. A row with TASK in its flags shows the sum over one run
    per task."""
    flags, trained, papers = row["flags"], row["trained (M)"], row["paper's trained (M)"]
    runs = []
    for task in TASKS[dataset] if "TASK" in flags else ("",):
        runs.append(costs("--dataset", dataset, *flags.replace("TASK", task).split()))
    exact = sum(run["trainable"] for run in runs) / 1e6
    assert trained == f"{exact:.2f}", row
    table_3 = sum(run["macs_linear_conv"] for run in runs) / 1e9
    assert row["GMACs as in table 3"] == f"{table_3:.2f}", row
    everything = sum(run["macs_all"] for run in runs) / 1e9
    assert row["all GMACs"] == f"{everything:.2f}", row
    cut_off = f"{int(100 * exact) / 100:.2f}"  # some counts in the papers are cut off, not rounded
    if "--method full" in flags:    # docs/RESULTS.md names the counts that differ
        assert papers == trained or f"{papers} M" in PAGE["RESULTS"], row
    else:
        assert papers in (trained, cut_off), row


@pytest.mark.slow
@pytest.mark.parametrize("dataset, count", [("pascal", 20), ("nyud", 12)])
def test_rows_of_the_paper_cost_what_their_flags_give(dataset, count):
    """Trained parameters and GMACs agree with cost.py. The rows of MTLoRA and BDTA need extras/, so
    tests/extras/test_results.py checks them."""
    rows = read_table(f"{dataset}: cost")
    rows = [row for row in rows if not re.search("mtlora|bdta", row["flags"])]
    assert len(rows) == count
    for row in rows:
        check_row(dataset, row)


@pytest.mark.parametrize("dataset", TASKS)
def test_accuracies_have_the_rows_of_the_costs(dataset):
    """The two tables of a dataset have the same rows, and every accuracy is a number. The paper has
    no accuracies for the rows with a budget, only delta-m."""
    costs_of, accuracies = read_table(f"{dataset}: cost"), read_table(f"{dataset}: accuracy")
    names = [row[f"{dataset}: cost"] for row in costs_of]
    assert len(set(names)) == len(names)
    assert [row.pop(f"{dataset}: accuracy") for row in accuracies] == names
    for name, row in zip(names, accuracies, strict=True):
        float(row.pop("delta-m (%)"))       # an error unless the cell is one number
        for cell in row.values():
            if name.startswith("budget"):
                assert cell == ""
            else:
                float(cell)


def test_rows_of_the_readme_are_those_of_the_results():
    """The README's rows show the same numbers as docs/RESULTS.md. TGLoRA's row is also compared
    with cost.py."""
    cells = rf"{NUMBER} \| {NUMBER} \| ([-+\d.]+)"
    rows = re.findall(rf"^\| ([^|:]+)[^|]* \| {cells} \| {cells} \|", PAGE["README"], re.M)
    assert len(rows) == 6
    for name, *shown in rows:
        expected = []
        for dataset in TASKS:
            cost = find_row(f"{dataset}: cost", name)
            accuracy = find_row(f"{dataset}: accuracy", name)
            expected += [cost["trained (M)"], cost["GMACs as in table 3"], accuracy["delta-m (%)"]]
            if name == "TGLoRA":
                check_row(dataset, cost)
        assert shown == expected, name
