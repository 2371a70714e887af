"""Tests that need a GPU: mixed precision and compilation work, and a step never waits for the GPU.

    python -m pytest tests/test_gpu.py      # about three minutes on one H100
"""

import math

import numpy as np
import pytest
import torch

import train
from data import CLASSES, collate, draw_augmentation, warp
from grouping import build_tree
from model import build
from recipes import parse_arguments
from rooms import Rooms
from tasks import make_tasks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(),
                                reason="needs a GPU: torch.cuda.is_available() is False")
DEVICE = torch.device("cuda")


class Trainer:
    """Trains a network for three tasks on 32 images of rooms (112x112 pixels), in batches of 8.

    step(i) makes one update of the weights and returns the losses.
    """

    def __init__(self, amp=None, compiled=False, flags=()):
        config = parse_arguments(["--tasks", "semseg,depth,normals", "--batch-size", "8", "--lr",
                                  "1e-3", *flags])
        self.config, self.amp = config, amp
        self.tasks = make_tasks(config.tasks, CLASSES["rooms"])
        tree = build_tree(np.zeros((3, 3)), config.groups)
        self.model = build(config, self.tasks, tree).to(DEVICE).train()
        if compiled:
            self.model.compile(dynamic=False, fullgraph=True)
        self.optimizer = train.make_optimizer(self.model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
        rooms = Rooms("train", config.tasks, 32, config.size)
        self.batches = []
        for i in range(0, 32, 8):
            batch = collate([rooms[j] for j in range(i, i + 8)])
            self.batches.append({name: x.to(DEVICE) for name, x in batch.items()})

    def step(self, i):
        torch.manual_seed(i)
        config = self.config
        drawn = draw_augmentation(8, config.flip, config.scales, config.rotate)
        image, labels = warp(self.batches[i % 4], config.size, DEVICE, **drawn)
        return train.train_step(self.model, self.tasks, self.optimizer, self.scaler, image, labels,
                                config.clip, self.amp)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("layers", ["attn", "attn+mlp", "attn+mlp+others"])
def test_every_choice_of_layers_trains(amp, layers):
    """With every choice of --layers and every precision, the losses of four steps are finite."""
    trainer = Trainer(amp, flags=["--layers", layers, "--dropout", "0.1", "--drop-path", "0.1"])
    for i in range(4):
        assert trainer.step(i).isfinite().all()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_100_steps(amp):
    """In 100 steps of mixed precision, each task's loss stays finite and falls by over 20 %."""
    trainer = Trainer(amp)
    losses = torch.stack([trainer.step(i) for i in range(100)]).cpu()
    assert losses.isfinite().all()
    assert (losses[-8:].mean(0) < 0.8 * losses[:8].mean(0)).all()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_gpu(amp):
    """PyTorch detects no GPU synchronisation in a step, from `warp` to the optimizer."""
    trainer = Trainer(amp, flags=["--dropout", "0.1"])
    trainer.step(0), trainer.step(1)        # fill the caches and create the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_losses_are_the_eager_ones():
    """A compiled network has the same losses as the eager one, up to bf16's accuracy.

    It compiles without graph breaks.
    """
    eager, compiled = Trainer(torch.bfloat16), Trainer(torch.bfloat16, compiled=True)
    for i in range(10):
        torch.testing.assert_close(compiled.step(i), eager.step(i), rtol=0.05, atol=0.02)


def test_a_run_and_its_evaluation(tmp_path):
    """train.py runs on the GPU by default, and its validation loss is finite."""
    metrics = train.main(["--out", str(tmp_path / "run"), "--epochs", "1", "--train-rooms", "16",
                          "--val-rooms", "4", "--sim-images", "4", "--head-epochs", "1"])
    assert math.isfinite(metrics["loss"]) and metrics["flags"]["device"] == "cuda"
