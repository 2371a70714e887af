"""Tests of the documentation of extras/: the tables about its methods and backbone in
docs/RESULTS.md, and its commands in README.md, CONTRIBUTING.md and docs/."""

import argparse
import ast
import importlib
import re
from itertools import product

import pytest
import torch
from conftest import costs
from test_docs import check_training_flags, commands, read_table
from test_paper_tables import TASKS, check_row

from extras.mtlora import adapt
from swin import build_swin


@pytest.mark.slow
@pytest.mark.parametrize("dataset", TASKS)
def test_rows_of_mtlora_and_bdta_cost_what_their_flags_give(dataset):
    """In the rows of MTLoRA and BDTA, trained parameters and GMACs agree with cost.py."""
    rows = read_table(f"{dataset}: cost")
    rows = [row for row in rows if re.search("mtlora|bdta", row["flags"])]
    assert len(rows) == {"pascal": 7, "nyud": 1}[dataset]
    for row in rows:
        check_row(dataset, row)


# Trained parameters of each row in the section "The ablations of MTLoRA".
ABLATIONS = (8_344_634, 6_816_314, 6_816_314, 7_733_306, 7_214_138, 8_339_930, 8_321_594, 8_321_312,
             6_796_346)


def test_mtloras_ablations_train_what_their_arguments_give():
    """With the arguments in docs/RESULTS.md, `adapt` gives the parameter counts of MTLoRA's paper.

    The paper's tables 2 and 3 include the decoders for PASCAL, which have 1,946,624 parameters.
    """
    for exact, row in zip(ABLATIONS, read_table("ablation"), strict=True):
        options = {}
        if row["argument"]:
            name, value = row["argument"].split("=")
            options[name] = ast.literal_eval(value)
        with torch.device("meta"):
            backbone = build_swin("tiny")
            adapt(backbone, backbone.ADAPTED["attn+mlp"], num_tasks=4, rank=64, **options)
        count = 1_946_624 + sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        assert count == exact
        assert row["trained (M)"] == f"{count / 1e6:.2f}"
        # Some counts in the paper are cut off after two digits, not rounded.
        assert row["paper's trained (M)"] in (row["trained (M)"], f"{int(count / 1e4) / 100:.2f}")
        float(row["paper's delta-m (%)"])


@pytest.mark.slow
def test_rows_of_bdtas_paper_train_what_their_flags_give():
    """In rows with flags, trained parameters agree with cost.py and with BDTA's paper.

    In two rows, full fine-tuning and decoders only, the paper counts 0.60 M more.
    """
    rows = [row for row in read_table("BDTA's paper: cost") if row["here"].startswith("--method")]
    assert len(rows) == 3
    for row in read_table("`--backbone`"):
        row["here"] = f"--method {row['--method']} --backbone {row['--backbone']}"
        rows.append(row)
    assert len(rows) == 9
    for row in rows:
        flags, trained, papers = row["here"], row["trained (M)"], row["paper's trained (M)"]
        count = costs("--dataset", "pascal", *flags.split())["trainable"]
        assert trained == f"{count / 1e6:.2f}", flags
        if flags in ("--method full", "--method decoders"):
            assert float(papers) == pytest.approx(float(trained) + 0.60), flags
        else:
            assert papers == trained, flags


BACKBONES = ["tiny", "small", "base", "pvt_v2_b2"]
METHODS = {"decoders only": "--method decoders", "MTL-LoRA": "--groups 1,1,1,1", "TGLoRA": "",
           "TGLoRA + others": "--layers attn+mlp+others", "MTLoRA": "--method mtlora --rank 64"}


@pytest.mark.slow
def test_backbones_have_the_shown_sizes():
    """The size of each backbone agrees with cost.py."""
    rows = read_table("backbone")
    assert [row["backbone"] for row in rows] == BACKBONES
    for dataset in TASKS:
        for row in rows:
            run = costs("--dataset", dataset, "--backbone", row["backbone"], "--method", "decoders")
            assert row["parameters"] == f"{run['total'] - run['decoders']:,}", row


@pytest.mark.slow
@pytest.mark.parametrize("first, count, unit", [
    ("trained (M)", "trainable", 1e6), ("GMACs as in table 3", "macs_linear_conv", 1e9),
    ("all GMACs", "macs_all", 1e9)])
def test_other_backbones_cost_what_their_flags_give(first, count, unit):
    """For each backbone, the costs of five methods agree with cost.py. A column may show two
    methods that cost the same. The rows of the paper have the costs with the backbone `tiny`."""
    rows = read_table(first)
    assert [(row[first], row["backbone"]) for row in rows] == list(product(TASKS, BACKBONES[1:]))
    for row in rows:
        dataset, backbone = row.pop(first), row.pop("backbone")
        assert ", ".join(row).split(", ") == list(METHODS)
        for methods, cell in row.items():
            for method in methods.split(", "):
                flags = METHODS[method].split()
                run = costs("--dataset", dataset, "--backbone", backbone, *flags)
                assert cell == f"{run[count] / unit:.2f}", (dataset, backbone, method)


def test_commands_of_the_extras_have_real_flags(monkeypatch):
    """Every command of extras/ on the pages can be parsed.

    Flags that a program passes on to train.py must be flags of train.py.
    """
    parse, rest = argparse.ArgumentParser.parse_known_args, []

    def remember(*args, **kwargs):
        known, rest[:] = parse(*args, **kwargs)
        return known, rest

    def stop():
        raise KeyboardInterrupt         # every program calls this after parsing

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", remember)
    runs = commands(r"extras\.\w+")
    assert len({program for program, _ in runs}) >= 4
    for program, flags in runs:
        module = importlib.import_module(program)
        monkeypatch.setattr(module, "one_line_errors", stop)
        with pytest.raises(KeyboardInterrupt):
            module.main(flags)
        check_training_flags(rest)
