"""Tests of extras/bench.py: what it counts, and the rows of its tables, but no times."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import costs
from torch import nn

from extras import bench
from extras.bench import Row
from model import build
from recipes import parse_arguments, uneven_tree
from tasks import make_tasks


def test_views_and_empty_memory_are_not_counted():
    """Reshaping a transposed matrix is one operation, a copy. In-place operations count too."""
    x = torch.randn(2, 3)
    with bench.OperationCounter() as counter:
        torch.empty(3)
        torch.empty_like(x)
        x.detach().view(-1)[None].t()
        assert counter.count == 0
        x.t().reshape(-1)
        assert counter.count == 1
        x.add_(1)
    assert counter.count == 2


def test_the_work_of_a_small_network_by_hand():
    """The forward pass has five operations: linear, ReLU and linear, then a mean and a sum.

    The backward pass has eight: two for the mean, one for the ReLU, a weight gradient and a bias
    gradient for each linear layer, and an input gradient for the second. Repeating the count gives
    the same numbers, although gradients exist by then. If the first layer is frozen, nothing before
    the second one needs a gradient.
    """
    first, second = nn.Linear(2, 3), nn.Linear(3, 4)
    model, x = nn.Sequential(first, nn.ReLU(), second), torch.randn(5, 2)
    macs = 5 * 2 * 3, 5 * 3 * 4
    for _ in range(2):
        assert bench.count_operations(model, x) == (3 + 2, 2 + 1 + 2 * 2 + 1)
        assert bench.count_gmacs(model, x) * 1e9 == pytest.approx(2 * macs[0] + 3 * macs[1])
    first.requires_grad_(False)
    assert bench.count_operations(model, x) == (3 + 2, 2 + 2)
    assert bench.count_gmacs(model, x) * 1e9 == pytest.approx(macs[0] + 2 * macs[1])


class Attention(nn.Module):
    """One linear layer, and attention with a fused kernel. Four tokens with eight channels."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 8)

    def forward(self, x):
        x = self.qkv(x)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("groups, most", [("1,2,3,4", 1650), ("1,1,1,1", 1450)])
def test_adapters_need_few_operations(groups, most):
    """A training step of TGLoRA and of MTL-LoRA needs few operations: 1,534 and 1,332 with PyTorch
    2.14. Other versions may need a few more, but not twice as many."""
    config = parse_arguments(["--dataset", "pascal", "--weights", "none", "--groups", groups])
    tasks = make_tasks(config.tasks, 21)
    model = build(config, tasks, uneven_tree(config)).train()
    assert sum(bench.count_operations(model, torch.randn(1, 3, 112, 112))) <= most


def test_the_products_of_a_fused_attention_kernel_are_counted():
    """Attention has two products, and each needs two more in the backward pass."""
    x = torch.randn(1, 1, 4, 8)
    products = 2 * 4 * 8 * 8 + 6 * 4 * 4 * 8
    assert bench.count_gmacs(Attention(), x) * 1e9 == pytest.approx(products)


def test_rows_take_turns_and_the_first_round_is_not_counted():
    """Two rows run in turn for three rounds. The first round is not counted."""
    calls = []
    rows = {name: Row(lambda name=name: calls.append(name), 0, (0, 0)) for name in "ab"}
    seconds = bench.take_turns(Namespace(device=torch.device("cpu"), rounds=2), rows)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_a_row_by_hand():
    """A row has a median of 3 s, quartiles of 2 and 4 s, and a median ratio of 2 to the first row.
    """
    seconds, first = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 1.0, 2.0, 1.0]
    line = bench.format_row("name", Row(None, 6.0, (10, 2000), 1.5), seconds, first)
    assert line.split() == ["name", "3000.0", "2000.0-4000.0", "2.00", "6.00", "10", "2,000",
                            "1.50"]


@pytest.mark.slow
def test_the_tables(monkeypatch, capsys):
    """Both tables are printed, with a row for each method and each backbone.

    Full fine-tuning computes nearly every product three times: forward, for the gradient of the
    input, and for that of the weight. cost.py also counts biases.
    """
    monkeypatch.setattr(bench, "METHODS", {"full": "--method full --backbone mini",
                                           "bdta": "--method bdta --backbone mini"})
    bench.main("--size 64 --batch 2 --rounds 1 --device cpu".split())
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:24].strip() for line in lines] == [
        "training step", "full", "bdta", "forward and backward", "Swin-T, torchvision",
        "Swin-T, ours"]
    _, _, ratio, gmacs, forward, backward = lines[1][24:].split()
    macs = costs(*"--dataset pascal --method full --backbone mini --size 64".split())["macs_all"]
    assert ratio == "1.00" and float(gmacs) == pytest.approx(2 * 3 * macs / 1e9, rel=0.03)
    assert int(forward) > 100 and int(backward) > 100
