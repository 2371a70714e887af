"""Tests of extras/lookahead.py: on a linear network, affinities equal a computation in numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from extras import lookahead
from extras.lookahead import lookahead_affinity
from grouping import read_tree

SLOPES = {"one": 1.0, "two": -2.0, "three": 0.5}


class Net(nn.Module):
    """A linear backbone (3 inputs, 2 outputs) and one linear decoder per task, all in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 2, bias=False)
        self.decoders = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in SLOPES})
        self.double()

    def forward(self, image):
        features = self.backbone(image)
        return {name: decoder(features)[:, 0] for name, decoder in self.decoders.items()}


class Task:
    def __init__(self, name):
        self.name = name

    def valid(self, label):
        return label.isfinite()

    def loss(self, prediction, label):
        return F.mse_loss(prediction, label)


def make_batches(number=3):
    """Batches of four examples, with one label per task and example."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(number):
        image = torch.randn(4, 3, generator=rng, dtype=torch.float64)
        noise = torch.randn(3, 4, generator=rng, dtype=torch.float64)
        labels = {name: slope * image[:, 0] + noise[i]
                  for i, (name, slope) in enumerate(SLOPES.items())}
        yield image, labels


def by_hand(model, lr):
    """Compute the affinities (T, T) in numpy, with gradients derived by hand.

    Also returns the gradients (T, P) and the losses (T,) of the last batch.
    """
    W = model.backbone.weight.detach().numpy()
    heads = [decoder.weight.detach().numpy()[0] for decoder in model.decoders.values()]
    samples = []

    def losses(W, x, ys):
        return np.array([np.mean((x @ W.T @ a - y) ** 2) for a, y in zip(heads, ys)])

    for image, labels in make_batches():
        x, ys = image.numpy(), [label.numpy() for label in labels.values()]
        before = losses(W, x, ys)
        gradients = []
        Z = np.zeros((3, 3))
        for i in range(3):
            error = x @ W.T @ heads[i] - ys[i]
            gradients.append(2 / len(x) * np.outer(heads[i], error @ x))
            Z[i] = 1 - losses(W - lr * gradients[i], x, ys) / before
        np.fill_diagonal(Z, 1)
        samples.append((Z + Z.T) / 2)
    return np.mean(samples, 0), np.array(gradients).reshape(3, -1), before


TASKS = [Task(name) for name in SLOPES]


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_the_affinity_is_the_one_computed_by_hand(lr):
    """`lookahead_affinity` agrees with numpy for a small and for a large learning rate."""
    model = Net()
    expected, _, _ = by_hand(model, lr)
    affinity = lookahead_affinity(model, TASKS, make_batches(), lr)
    assert affinity.mean == pytest.approx(expected, rel=1e-9)
    assert affinity.count.tolist() == [[3] * 3] * 3


def test_to_first_order_it_is_a_dot_product_of_gradients():
    """For a tiny step, the affinity is the mean of lr * <g_i, g_j> / L_j over both directions."""
    model, lr = Net(), 1e-7
    _, gradients, losses = by_hand(model, lr)
    batch = list(make_batches())[-1:]
    first_order = lr * gradients @ gradients.T / losses         # [i, j]: i -> j
    np.fill_diagonal(first_order, 1)
    affinity = lookahead_affinity(model, TASKS, batch, lr)
    assert affinity.mean == pytest.approx((first_order + first_order.T) / 2, rel=1e-4)


def test_the_model_is_left_as_it_was():
    """Measuring the affinity does not change weights, `grad`, train mode or requires_grad."""
    model = Net()
    model.backbone.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lookahead_affinity(model, TASKS, make_batches(), 0.3)
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert model.training and not model.backbone.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_without_labels_of_a_task_does_not_count():
    """A pair's affinity is the mean over the batches with labels for both tasks.

    If no batch has labels for both, an error names the two tasks.
    """
    batches = list(make_batches())
    batches[0][1]["two"][:] = torch.nan
    affinity = lookahead_affinity(Net(), TASKS, batches, 0.1)
    assert affinity.count.tolist() == [[3, 2, 3], [2, 2, 2], [3, 2, 3]]
    rest = lookahead_affinity(Net(), TASKS, batches[1:], 0.1)
    assert affinity.mean[0, 1] == pytest.approx(rest.mean[0, 1])
    with pytest.raises(ValueError, match="no example has valid labels for both one and two"):
        lookahead_affinity(Net(), TASKS, batches[:1], 0.1)


def test_a_loss_that_is_not_finite_is_an_error():
    """A step so large that a loss overflows is an error; it does not count as a missing label."""
    with pytest.raises(ValueError, match="the loss of one is not finite after a step for one"):
        lookahead_affinity(Net(), TASKS, make_batches(), 1e200)


def test_the_command_writes_a_tree_that_train_py_reads(tmp_path):
    """`read_tree` reads the tree that the command writes.

    In its third stage, the two tasks that share a group are the pair with the highest affinity.
    """
    flags = ("--tasks semseg,depth,normals --size 32 --train-rooms 4 --batch-size 2 --sim-images 4 "
             "--head-epochs 1 --device cpu").split()
    saved = lookahead.main([*flags, "--out", str(tmp_path / "run")])
    tree = read_tree(tmp_path / "run/tree.json", saved["tasks"])
    assert [len(partition) for partition in tree] == [1, 1, 2, 3]
    together = max(tree[2], key=len)
    pairs = {(t, u): saved["similarity"][t][u] for t, u in ((0, 1), (0, 2), (1, 2))}
    assert together == max(pairs, key=pairs.get)
    assert np.array(saved["similarity"]).shape == (3, 3)
    with pytest.raises(SystemExit, match="already exists"):
        lookahead.main([*flags, "--out", str(tmp_path / "run")])
