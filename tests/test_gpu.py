"""What only a GPU can show: mixed precision, compilation, and a step that never waits for it."""

import json
import math

import numpy as np
import pytest
import torch

import train
from data import CLASSES, Rooms, collate, draw_augmentation, warp
from grouping import build_tree
from model import build
from util.parallel import Team
from tasks import make_tasks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(),
                                reason="needs a GPU: torch.cuda.is_available() is False")
DEVICE = torch.device("cuda")


class Trainer:
    """rooms at 112x112 with the demonstration's network; step() returns the losses."""

    def __init__(self, amp=None, compiled=False, flags=()):
        config = train.parse_arguments(["--tasks", "semseg,depth,normals", "--batch-size", "8",
                                        "--lr", "1e-3", *flags])
        self.config, self.amp, self.team = config, amp, Team(DEVICE)
        self.tasks = make_tasks(config.tasks, CLASSES["rooms"])
        tree = build_tree(np.zeros((3, 3)), config.groups)
        self.model = build(config, self.tasks, tree).to(DEVICE).train()
        if compiled:
            self.model.compile(dynamic=False, fullgraph=True)
        self.optimizer = train.make_optimizer(self.model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
        rooms = Rooms("train", config.tasks, 32, config.size)
        batches = [collate([rooms[i] for i in range(j, j + 8)]) for j in range(0, 32, 8)]
        self.batches = [{k: v.to(DEVICE) for k, v in b.items()} for b in batches]

    def step(self, i):
        torch.manual_seed(i)
        config = self.config
        image, labels = warp(self.batches[i % 4], config.size, **draw_augmentation(
            8, config.flip, config.scales, config.rotate))
        return train.train_step(self.model, self.tasks, self.optimizer, self.scaler, image, labels,
                                1, config.clip, self.amp, self.team)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("layers", ["attn", "attn+mlp", "attn+mlp+others"])
def test_every_choice_of_layers_trains(amp, layers):
    """A trained bias table over frozen q, k and v among them."""
    trainer = Trainer(amp, flags=["--layers", layers, "--dropout", "0.1", "--drop-path", "0.1"])
    assert all(trainer.step(i).isfinite().all() for i in range(4))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_200_steps(amp):
    """Losses stay finite and fall, and the network predicts no NaN."""
    trainer = Trainer(amp)
    losses = torch.stack([trainer.step(i) for i in range(200)]).cpu()
    assert losses.isfinite().all()
    assert (losses[-8:].mean(0) < 0.7 * losses[:8].mean(0)).all()


def test_a_step_never_waits_for_the_gpu():
    """Warp, forward, losses, backward and optimizer with every synchronisation an error."""
    for amp in (torch.bfloat16, torch.float16):
        trainer = Trainer(amp, flags=["--dropout", "0.1"])
        trainer.step(0), trainer.step(1)  # caches are filled, the optimizer has its state
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_losses_are_the_eager_ones():
    """20 steps in bf16: the curves agree to mixed-precision accuracy, without a graph break."""
    eager, compiled = (Trainer(torch.bfloat16, compiled) for compiled in (False, True))
    for i in range(20):
        torch.testing.assert_close(compiled.step(i), eager.step(i), rtol=0.05, atol=0.02)


def test_the_demonstration_runs(tmp_path):
    """train.py and its evaluation on the GPU, in the precision that --amp auto picks."""
    train.main(["--out", str(tmp_path / "run"), "--epochs", "1", "--train-rooms", "16",
                "--val-rooms", "4", "--sim-images", "4", "--head-epochs", "1"])
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(last["loss"])
