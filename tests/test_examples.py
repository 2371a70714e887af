"""Tests that the Python snippets in README.md and the examples in examples/ work."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import eval
import recipes
import tasks
import train

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_of_the_readme_run(snippet):
    """Each snippet runs by itself, with its own imports."""
    exec(snippet, {})


def test_the_example_of_your_own_backbone_runs(capsys):
    """The loss falls to less than a tenth, and every task has ten logits per image."""
    from examples.own_backbone import main
    predictions = main()
    assert {name: tuple(x.shape) for name, x in predictions.items()} == {
        "shape": (8, 10), "colour": (8, 10), "texture": (8, 10)}
    losses = re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)
    assert float(losses[-1]) < 0.1 * float(losses[0])


@pytest.fixture
def registries():
    """After the test, undo the changes that examples/own_dataset.py makes to the registries."""
    tables = [data.DATASETS, data.CLASSES, recipes.RECIPES, tasks.TASKS]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)
    sys.modules.pop("examples.own_dataset", None)


def test_the_example_of_your_own_dataset_trains(tmp_path, registries, monkeypatch):
    """The example learns its two tasks from generated photos, and eval.py reads its checkpoint."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("images", "semseg", "moisture"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
    for i in range(10):
        label = np.zeros((40, 48), np.uint8)
        label[:, rng.integers(10, 38):] = 1
        pixels = np.where(label[..., None] == 1, (30, 90, 40), (150, 110, 70)).astype(np.uint8)
        moisture = np.where(label == 1, 0.8, 0.3).astype(np.float32)
        moisture[0] = np.nan
        Image.fromarray(pixels).save(f"photos/images/{i}.png")
        Image.fromarray(label).save(f"photos/semseg/{i}.png")
        np.save(f"photos/moisture/{i}.npy", moisture)
    import examples.own_dataset  # noqa: F401
    metrics = train.main(["--dataset", "fields", "--weights", "rooms_mini.pth", "--backbone",
                          "mini", "--size", "64", "--epochs", "30", "--batch-size", "4",
                          "--workers", "0", "--lr", "3e-3", "--head-epochs", "1",
                          "--sim-images", "4", "--drop-path", "0", "--eval-every", "30",
                          "--device", "cpu", "--fused", "6,12,24,48"])
    constant = metrics["reference"]["moisture"]["error"]
    assert metrics["results"]["moisture"]["error"] < 0.7 * constant
    assert metrics["results"]["semseg"]["mIoU"] > 0.6
    eval.main(["--checkpoint", "runs/fields", "--workers", "0", "--device", "cpu"])
