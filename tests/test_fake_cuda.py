"""Tests on fake CUDA tensors, which hold no numbers (torch's FakeTensorMode) and need no GPU.

An operation that mixes devices is an error in this mode, so these tests find tensors that were left
on the CPU. Backward passes need a real GPU: see test_gpu.py.
"""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data import CLASSES, draw_augmentation, warp
from grouping import build_tree
from model import build
from recipes import parse_arguments
from tasks import make_tasks

CUDA = torch.device("cuda")
EXTRAS = importlib.util.find_spec("extras") is not None
ALL = "semseg,human_parts,sal,edge,depth,normals"


@pytest.fixture
def fake(monkeypatch):
    """Run the test on fake tensors, without random initial values and without loading weights."""
    if torch.__version__ < "2.6":
        pytest.skip("needs torch 2.6 or later to make fake CUDA tensors without a GPU")
    for name in ("trunc_normal_", "normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
    with FakeTensorMode():
        yield


def fake_batch(B=2, size=(40, 48)):
    """A batch of zeros on the CPU, in the form that the loader returns."""
    batch = {"size": torch.tensor([size] * B), "image": torch.zeros(B, 3, *size, dtype=torch.uint8)}
    for task in make_tasks(ALL.split(","), CLASSES["rooms"]):
        if task.kind == "classes":
            batch[task.name] = torch.zeros(B, *size, dtype=torch.uint8)
        else:
            batch[task.name] = torch.zeros(B, task.channels, *size)
    return batch


SLOW = pytest.mark.slow
NEEDS_EXTRAS = pytest.mark.skipif(not EXTRAS, reason="needs extras/")


@pytest.mark.parametrize("flags", [
    "--layers attn+mlp+others",
    pytest.param("--layers attn", marks=SLOW),
    pytest.param("--method mtlora+", marks=[SLOW, NEEDS_EXTRAS]),
    pytest.param("--method bdta", marks=[SLOW, NEEDS_EXTRAS]),
    pytest.param("--backbone pvt_v2_b0", marks=[SLOW, NEEDS_EXTRAS])])
def test_a_step_leaves_no_tensor_on_the_cpu(fake, flags):
    """With each of these flags, the warp, the forward pass and the losses stay on the GPU."""
    config = parse_arguments(["--tasks", ALL, "--weights", "none", *flags.split()])
    config.dropout = config.drop_path = 0.1
    tasks = make_tasks(config.tasks, CLASSES["rooms"])
    tree = build_tree(np.zeros((6, 6)), config.groups)
    with CUDA:                  # build on the GPU, because fake weights cannot be moved to it later
        model = build(config, tasks, tree).train()
    drawn = draw_augmentation(2, True, (1.0, 1.5), 20.0)
    image, labels = warp(fake_batch(), (64, 64), CUDA, **drawn)
    assert image.device.type == "cuda" and image.shape == (2, 3, 64, 64)
    predictions = model(image)
    for task in tasks:
        loss = task.loss(predictions[task.name], labels[task.name])
        assert loss.device.type == "cuda" and loss.shape == () and loss.dtype is torch.float32
        assert task.valid(labels[task.name]).device.type == "cuda"
