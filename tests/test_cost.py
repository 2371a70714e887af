"""Tests of cost.py: parameters and MACs are compared with the paper's, and MACs also with PyTorch's
FLOP counter."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import costs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
from grouping import build_tree
from model import build
from recipes import parse_arguments
from swin import build_swin
from tasks import make_tasks
from tglora import merge

PASCAL, NYUD = "semseg,human_parts,sal,normals", "semseg,normals,depth"


def parameters(*flags):
    """The parameter counts for these flags, without the MACs, which take longer to compute."""
    config = parse_arguments(list(flags))
    count = cost.ledger(cost.network(config))
    assert config.weights == "imagenet"             # cost.network leaves `config` unchanged
    return count


# --- numbers of the paper -------------------------------------------------------------------------
@pytest.mark.parametrize("dataset, rank, layers, trained", [
    ("pascal", 64, "attn+mlp", 5_288_960), ("pascal", 64, "attn+mlp+others", 6_888_506),
    ("pascal", 64, "attn", 3_200_000), ("pascal", 32, "attn+mlp", 3_814_400),
    ("pascal", 32, "attn+mlp+others", 5_413_946), ("pascal", 32, "attn", 2_647_040),
    ("pascal", 16, "attn+mlp", 3_077_120), ("pascal", 16, "attn+mlp+others", 4_676_666),
    ("pascal", 16, "attn", 2_370_560), ("nyud", 63, "attn+mlp", 5_932_916),
    ("nyud", 63, "attn+mlp+others", 7_532_462), ("nyud", 63, "attn", 3_150_836)])
def test_trained_parameters_are_the_papers(dataset, rank, layers, trained):
    """The counts of trained parameters are those of tables 1, 2, 5 and 6, which give them in
    millions. With --layers attn, the test also checks that --groups 1,1,1,1, where all tasks share
    all adapters, gives the same counts."""
    flags = ["--dataset", dataset, "--layers", layers, "--rank", str(rank)]
    count = parameters(*flags)
    decoders = {"pascal": 1_946_624, "nyud": 1_481_588}[dataset]
    others = 1_599_546 if layers.endswith("others") else 0
    assert (count["trainable"], count["decoders"], count["others"]) == (trained, decoders, others)
    assert count["adapters"] == trained - decoders - others
    assert count["total"] == 27_517_818 + count["adapters"] + decoders
    if layers == "attn":
        assert parameters(*flags, "--groups", "1,1,1,1") == count


@pytest.mark.parametrize("dataset, decoders", [("pascal", 1_946_624), ("nyud", 1_481_588)])
def test_parameters_of_the_baselines(dataset, decoders):
    """--method decoders trains as many parameters as in the paper. --method full trains the
    decoders and the whole backbone."""
    flags = ["--dataset", dataset, "--method"]
    assert parameters(*flags, "decoders")["trainable"] == decoders
    full = parameters(*flags, "full")
    assert full["trainable"] == full["total"] == 27_517_818 + decoders
    assert full["others"] == 27_517_818 and full["adapters"] == 0


@pytest.mark.parametrize("dataset, groups, tasks, ours, papers", [
    ("pascal", "1,1,1,1", "semseg", 18.49, 18.49), ("pascal", "1,1,1,1", PASCAL, 21.45, 21.47),
    ("pascal", "1,2,3,4", PASCAL, 49.94, 49.95), ("pascal", "1,1,2,4", PASCAL, 38.35, 38.37),
    ("pascal", "1,2,2,4", PASCAL, 41.37, 41.38), ("nyud", "1,1,1,1", "semseg", 18.56, 18.56),
    ("nyud", "1,1,1,1", NYUD, 20.52, 20.53), ("nyud", "1,1,2,3", NYUD, 34.64, 34.65)])
def test_macs_are_those_of_table_3_and_section_9(dataset, groups, tasks, ours, papers):
    """GMACs of linear and convolution layers differ from the paper's by at most 0.02."""
    count = costs("--dataset", dataset, "--groups", groups, "--tasks", tasks)
    assert round(count["macs_linear_conv"] / 1e9, 2) == ours
    assert abs(ours - papers) < 0.021


# --- counting -------------------------------------------------------------------------------------
@pytest.mark.parametrize("merged", [False, True])
def test_macs_of_all_products_agree_with_pytorchs_counter(merged):
    """Our count of all MACs is at most 1 % above PyTorch's, which leaves out biases."""
    config = parse_arguments(["--weights", "none", "--rank", "48", "--tasks", "depth,sal,edge"])
    tree = build_tree(np.zeros((3, 3)), config.groups)
    model = build(config, make_tasks(config.tasks, None), tree)
    if merged:
        merge(model)
    model.eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randn(1, 3, 112, 112))
    expected = counter.get_total_flops() / 2        # two FLOPs per MAC
    macs = cost.count_macs(model, (112, 112))
    assert expected < macs["macs_all"] == pytest.approx(expected, rel=0.01)


def test_macs_of_each_module():
    """module_macs agrees with MACs computed by hand for a convolution, a linear layer that runs
    twice, and attention."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2, stride=2, bias=False)
            self.linear = nn.Linear(4, 4)

        def forward(self, image):
            assert not self.training
            x = self.conv(image).permute(0, 2, 3, 1)        # (1, 3, 5, 4)
            return self.linear(self.linear(x))

    model = Net()
    assert cost.module_macs(model, (6, 10)) == {"conv": (3 * 5 * 4 * 3 * 2 * 2, 0),
                                                "linear": (2 * 3 * 5 * 4 * (4 + 1), 0)}
    assert model.training and not model.conv._forward_hooks
    swin = cost.module_macs(build_swin("mini"), (28, 28))   # one window of 7x7 in the first stage
    assert swin["layers.0.blocks.0.attn"] == (0, 2 * 49 * 49 * 32)
    assert swin["layers.0.blocks.0.attn.qkv"] == (49 * 96 * 33, 0)


def test_a_tree_from_a_file_has_its_own_cost(tmp_path):
    """With a tree of equally large groups, the adapters need fewer MACs than with the uneven tree
    that cost.py assumes without --tree. The other costs are equal."""
    stage = [["semseg", "depth"], ["normals", "sal"]]
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": [stage] * 4}))
    flags = ["--tasks", "semseg,depth,normals,sal"]
    assumed, exact = costs(*flags, "--groups", "2,2,2,2"), costs(*flags, "--tree", str(path))
    assert exact["macs_linear_conv"] == assumed["macs_linear_conv"]
    assert exact["trainable"] == assumed["trainable"]
    assert exact["macs_all"] < assumed["macs_all"]


def test_the_command_prints_text_or_json(capsys):
    """The command prints parameters and MACs as text or JSON. A missing tree file is an error."""
    flags = ["--tasks", "depth,sal", "--size", "64x96"]
    cost.main([*flags, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == costs(*flags)
    cost.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[2] == f"{printed['trainable']:,}"
    assert lines[2] == "GMACs for one image of 64x96"
    assert lines[3].split()[-1] == f"{printed['macs_linear_conv'] / 1e9:.2f}"
    assert lines[4].split()[-1] == f"{printed['macs_all'] / 1e9:.2f}"
    with pytest.raises(SystemExit, match="error: .*no.json"):
        cost.main(["--tree", "no.json"])


def test_a_reader_that_stops_gives_no_traceback():
    """If nobody reads the output any more, as after `| head`, the command ends without a word."""
    command = [sys.executable, "cost.py", "--tasks", "depth"]
    with subprocess.Popen(command, cwd=Path(cost.__file__).parent, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
