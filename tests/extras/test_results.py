"""Tests of the documentation of extras/: the tables about its methods and backbone in
docs/RESULTS.md, and its commands in README.md, CONTRIBUTING.md and docs/."""

import argparse
import importlib
import re

import pytest
import torch
from conftest import costs
from test_docs import NUMBER, PAGE, check_training_flags, commands
from test_paper_tables import TASKS, check_row, paper_rows

from extras.mtlora import adapt
from swin import build_swin


@pytest.mark.slow
@pytest.mark.parametrize("dataset", TASKS)
def test_rows_of_mtlora_and_bdta_cost_what_their_flags_give(dataset):
    """In the rows of MTLoRA and BDTA, trained parameters and GMACs agree with cost.py."""
    rows = [row for row in paper_rows(dataset) if re.search("mtlora|bdta", row[1])]
    assert len(rows) == {"pascal": 7, "nyud": 1}[dataset]
    for row in rows:
        check_row(dataset, row)


def section(heading):
    """The text of one section of docs/RESULTS.md."""
    return PAGE["RESULTS"].split(f"\n## {heading}\n")[1].partition("\n## ")[0]


# Trained parameters of each row in the section "The ablations of MTLoRA".
ABLATIONS = (8_344_634, 6_816_314, 6_816_314, 7_733_306, 7_214_138, 8_339_930, 8_321_594, 8_321_312,
             6_796_346)


def test_mtloras_ablations_train_what_their_arguments_give():
    """With the arguments in docs/RESULTS.md, `adapt` gives the parameter counts of MTLoRA's paper.

    The paper's tables 2 and 3 include the decoders for PASCAL, which have 1,946,624 parameters.
    """
    rows = re.findall(rf"^\| [^|]+ \| (?:`(\w+)=(.+)`)? ?\| {NUMBER} \| [-+\d.]+, {NUMBER} \|$",
                      section("The ablations of MTLoRA"), re.M)
    for exact, (name, value, trained, papers) in zip(ABLATIONS, rows, strict=True):
        options = {name: re.findall(r'"(.*?)"', value)} if name else {}
        with torch.device("meta"):
            backbone = build_swin("tiny")
            adapt(backbone, backbone.ADAPTED["attn+mlp"], num_tasks=4, rank=64, **options)
        count = 1_946_624 + sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        assert count == exact
        assert trained == f"{count / 1e6:.2f}"
        # Some counts in the paper are cut off after two digits, not rounded.
        assert papers in (trained, f"{int(count / 1e4) / 100:.2f}")


@pytest.mark.slow
def test_rows_of_bdtas_paper_train_what_their_flags_give():
    """In rows with flags, trained parameters agree with cost.py and with BDTA's paper.

    In two rows, full fine-tuning and decoders only, the paper's numbers are different.
    """
    rows = re.findall(rf"`(--method [^`]*)` \| {NUMBER} \| [^|]* \| {NUMBER} \|$",
                      section("The rows of BDTA + MoTE"), re.M)
    assert len(rows) == 11
    for flags, trained, papers in rows:
        count = costs("--dataset", "pascal", *flags.split())["trainable"]
        assert trained == f"{count / 1e6:.2f}", flags
        if flags not in ("--method full", "--method decoders"):
            assert papers == trained, flags


@pytest.mark.slow
def test_other_backbones_cost_what_their_flags_give():
    """For each backbone, its size and the costs of five methods agree with cost.py."""
    methods = ("--method decoders", "--groups 1,1,1,1", "", "--layers attn+mlp+others",
               "--method mtlora --rank 64")
    table = section("Other backbones")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d., |]+) \|$", table, re.M)
    assert [row[0] for row in rows] == ["tiny", "small", "base", "pvt_v2_b2"] * 2
    for i, (backbone, total, cells) in enumerate(rows):
        dataset = "pascal" if i < 4 else "nyud"
        for method, cell in zip(methods, cells.split(" | "), strict=True):
            run = costs("--dataset", dataset, "--backbone", backbone, *method.split())
            values = (run["trainable"] / 1e6, run["macs_linear_conv"] / 1e9, run["macs_all"] / 1e9)
            assert cell == ", ".join(f"{value:.2f}" for value in values), (backbone, method)
            if method == "--method decoders":
                assert total == f"{run['total'] - run['decoders']:,}"


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
