"""eval.py's averages and cost.py's counts, each on a case that can be done by hand."""

import pytest
import torch
from torch import nn

from cost import count_macs
from eval import evaluate, predictor
from swin import WindowAttention
from tasks import make_tasks
from tglora import TGLoRALinear

GREY = torch.full((3, 4, 4), 128, dtype=torch.uint8)


def batch(depth):
    """One image of 4x4 whose left half is `depth` metres away, if any; the rest is not measured."""
    label = torch.zeros(1, 4, 4)
    label[..., :2] = depth
    return {"size": torch.tensor([[4, 4]]), "image": GREY[None], "depth": label[None],
            "semseg": torch.full((1, 4, 4), 2, dtype=torch.uint8)}


def test_the_validation_loss_is_of_labelled_images():
    """Their mean a task, weighted; an image without any depth is none; pixels are counted."""
    depth, semseg = tasks = make_tasks(["depth", "semseg"], 3)
    depth.weight, semseg.weight = 4.0, 0.5
    found = evaluate(lambda image: {"depth": torch.full((1, 1, 4, 4), 2.0),
                                    "semseg": torch.zeros(1, 3, 4, 4)},
                     tasks, [batch(3.0), batch(0.0), batch(5.0)], (4, 4))
    assert found["loss"] == pytest.approx(4 * (1 + 3) / 2 + 0.5 * torch.tensor(3.0).log().item())
    assert found["pixels"] == {"depth": 16, "semseg": 48} and found["images"] == 3
    assert found["results"]["depth"]["rmse"] == pytest.approx(((1 + 9) / 2) ** 0.5)


def test_size_none_means_the_images_own():
    """--native: predicted and compared as large as it is."""
    shapes = []

    def predict(image):
        shapes.append(tuple(image.shape))
        return {"depth": torch.ones(1, 1, *image.shape[2:])}
    for size in (None, (32, 40)):
        evaluate(predict, make_tasks(["depth"], 3), [batch(1.0)], size)
    assert shapes == [(1, 3, 4, 4), (1, 3, 32, 40)]


def test_predictions_are_made_in_evaluation_mode_under_autocast():
    """No dropout, running statistics; --amp bf16 computes in bf16."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 2, 1)).train()
    image = torch.ones(1, 3, 4, 4)
    predict = predictor(model, None)
    assert torch.equal(predict(image), predict(image)) and not model.training
    assert predictor(model, torch.bfloat16)(image).dtype is torch.bfloat16


def test_macs_by_hand():
    """A product a weight, a bias counts as one more; adapters padded to the largest rank."""
    def both(net):
        return tuple(count_macs(nn.Sequential(net), (8, 8)).values())
    assert both(nn.Conv2d(3, 4, 3, padding=1)) == (8 * 8 * 4 * (27 + 1),) * 2
    assert both(nn.Conv2d(3, 4, 3, padding=1, bias=False)) == (8 * 8 * 4 * 27,) * 2
    assert both(nn.Linear(8, 5)) == (24 * 5 * (8 + 1),) * 2
    adapted = TGLoRALinear(nn.Linear(8, 5), (3,))
    assert both(adapted) == (24 * 5 * 9, 24 * 5 * 9 + 24 * 3 * (8 + 5))
    folded = TGLoRALinear(nn.Linear(8, 5, bias=False), (3, 1))
    assert folded.macs(rows=10) == (2 * 10 * 5 * 8, 2 * 10 * 3 * (8 + 5))
    folded.merge()
    assert folded.macs(rows=10) == (2 * 10 * 5 * 8, 0)
    windows = torch.zeros(2, 3, 49, 16)
    assert WindowAttention(16, 2, 7).product_macs(windows) == 2 * (2 * 3) * 49 * 49 * 16
