"""Tests that the Python snippets in README.md and the examples in examples/ work."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval
import recipes
import tasks

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_of_the_readme_run(snippet):
    """Each snippet runs by itself, with its own imports."""
    exec(snippet, {})


def test_the_example_of_your_own_backbone_runs(capsys):
    """The loss falls, and every task has ten logits per image."""
    from examples.own_backbone import main
    predictions = main()
    assert {name: tuple(x.shape) for name, x in predictions.items()} == {
        "shape": (8, 10), "colour": (8, 10), "texture": (8, 10)}
    losses = re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)
    assert len(losses) == 20
    assert float(losses[-1]) < float(losses[0])


# --- examples/own_dataset.py ----------------------------------------------------------------------
NAMES = ("null accessories bag belt blazer blouse bodysuit boots bra bracelet cape cardigan clogs "
         "coat dress earrings flats glasses gloves hair hat heels hoodie intimate jacket jeans "
         "jumper leggings loafers necklace panties pants pumps purse ring romper sandals scarf "
         "shirt shoes shorts skin skirt sneakers socks stockings suit sunglasses sweater "
         "sweatshirt swimwear t-shirt tie tights top vest wallet watch wedges").split()
HAIR, JEANS, SHIRT = map(NAMES.index, ("hair", "jeans", "shirt"))
OTHER = NAMES.index("accessories")          # a label that semseg ignores


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


@pytest.fixture
def example(registries):
    """The module examples/own_dataset.py."""
    import examples.own_dataset
    return examples.own_dataset


def savemat(path, variables):
    pytest.importorskip("scipy.io").savemat(path, variables)


def enlarged(x):
    """Every pixel of (H, W, ...) becomes 2x2 pixels."""
    return x.repeat(2, axis=0).repeat(2, axis=1)


def write_names(root):
    """label_list.mat: a 1 x 59 cell array of strings, as in the published dataset."""
    root.mkdir(exist_ok=True)
    cells = np.empty((1, len(NAMES)), object)
    cells[0] = NAMES
    savemat(root / "label_list.mat", {"label_list": cells})


def write_sample(root, name, label, pixels=None, variable="groundtruth"):
    """Write a photo and its label map (H, W). pixels: (H, W, 3), black by default."""
    label = np.asarray(label, np.uint8)
    if pixels is None:
        pixels = np.zeros((*label.shape, 3), np.uint8)
    (root / "photos").mkdir(exist_ok=True)
    (root / "annotations/pixel-level").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / f"photos/{name}.jpg", quality=100, subsampling=0)
    savemat(root / f"annotations/pixel-level/{name}.mat", {variable: label})


def open_photos(example, root, split="val", size=(6, 5)):
    return example.Photos(SimpleNamespace(data_root=str(root), size=size), split)


def test_labels_of_the_photos_are_made_from_the_label_map(tmp_path, example):
    """A photo of 12x10 pixels, shrunk to 6x5: its image and four labels, written by hand."""
    label = np.array([[0, 0, 0, 0, 0],
                      [0, HAIR, HAIR, 0, 0],
                      [0, SHIRT, SHIRT, SHIRT, 0],
                      [0, JEANS, OTHER, 0, 0],
                      [0, 0, 0, 0, 0],
                      [0, 0, 0, 0, 0]])
    pixels = np.where(label[..., None] > 0, (200, 100, 20), (0, 50, 150)).astype(np.uint8)
    write_names(tmp_path)
    write_sample(tmp_path, "0001", enlarged(label), enlarged(pixels))
    sample = open_photos(example, tmp_path)[0]

    assert sample["image"].dtype == np.uint8
    error = sample["image"].astype(int) - pixels.transpose(2, 0, 1)
    assert np.abs(error).max() <= 10                        # JPEG changes colours a little
    assert sample["semseg"].tolist() == [[0, 0, 0, 0, 0],
                                         [0, 2, 2, 0, 0],
                                         [0, 3, 3, 3, 0],
                                         [0, 4, 255, 0, 0],
                                         [0, 0, 0, 0, 0],
                                         [0, 0, 0, 0, 0]]
    assert sample["sal"].tolist() == [[0, 0, 0, 0, 0],
                                      [0, 1, 1, 0, 0],
                                      [0, 1, 1, 1, 0],
                                      [0, 1, 1, 0, 0],
                                      [0, 0, 0, 0, 0],
                                      [0, 0, 0, 0, 0]]
    assert sample["edge"].tolist() == [[0, 1, 1, 0, 0],
                                       [1, 1, 1, 1, 0],
                                       [1, 1, 1, 1, 1],
                                       [1, 1, 1, 1, 0],
                                       [0, 1, 1, 0, 0],
                                       [0, 0, 0, 0, 0]]
    rows = np.array([0, 5 / 6, 3 / 6, 1 / 6, 0, 0])
    assert sample["height"].dtype == np.float32
    assert np.allclose(sample["height"], rows[:, None] * (label > 0), atol=1e-6)


def test_the_labels_of_the_photos_become_seven_classes(tmp_path, example):
    """Every name in CLOTHES exists, and the other labels are ignored. A missing file of names is an
    error."""
    with pytest.raises(ValueError, match="label_list.mat; expected the label names of https"):
        open_photos(example, tmp_path)
    write_names(tmp_path)
    classes = example.read_classes(tmp_path / "label_list.mat")
    found = dict(zip(NAMES, classes.tolist()))
    assert len(data.CLASSES["clothes"]) == 7
    assert [NAMES[i] for i in np.flatnonzero(classes == 255)] == [
        "accessories", "bag", "belt", "bodysuit", "bra", "bracelet", "earrings", "glasses",
        "gloves", "hat", "intimate", "necklace", "panties", "purse", "ring", "scarf", "socks",
        "suit", "sunglasses", "swimwear", "tie", "wallet", "watch"]
    for name, number in {"null": 0, "skin": 1, "hair": 2, "coat": 3, "t-shirt": 3, "jeans": 4,
                         "skirt": 4, "dress": 5, "romper": 5, "boots": 6, "wedges": 6}.items():
        assert found[name] == number, name
    assert np.bincount(classes).tolist()[:7] == [1, 1, 1, 14, 7, 2, 10]


def test_every_sixth_photo_is_for_validation(tmp_path, example):
    """Photo 0536 is left out, because its label map is empty."""
    write_names(tmp_path)
    for i in range(530, 543):
        write_sample(tmp_path, f"{i:04}", [[OTHER]])
    assert open_photos(example, tmp_path, "val").names == ["0530", "0537"]
    train_names = open_photos(example, tmp_path, "train").names
    assert train_names == [f"{i:04}" for i in (531, 532, 533, 534, 535, 538, 539, 540, 541, 542)]


@pytest.mark.parametrize("label, variable, message", [
    (np.full((6, 5), HAIR), "labels", "0001.mat is damaged, or is not a label map.*groundtruth"),
    (np.full((5, 6), HAIR), "groundtruth", r"0001.mat: has shape \(5, 6\), but its photo has \(6"),
    (np.full((6, 5), 59), "groundtruth", "0001.mat: holds label 59, which has no name"),
    (np.zeros((6, 5)), "groundtruth", "0001.mat: labels nobody"),
])
def test_a_bad_label_map_is_an_error_that_names_its_file(tmp_path, example, label, variable,
                                                         message):
    write_names(tmp_path)
    write_sample(tmp_path, "0001", label, np.zeros((6, 5, 3), np.uint8), variable)
    with pytest.raises(ValueError, match=message):
        open_photos(example, tmp_path)[0]


def test_height_counts_only_the_person(example):
    """Loss, sums, metric, best constant and colours, with numbers worked out by hand."""
    task = example.Height()
    label = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]]]])
    pred = torch.tensor([[[[9.0, 0.75], [0.25, 0.5]]]])     # errors: not counted, 1/4, 0 and 1/2
    assert task.valid(label).tolist() == [[[[False, True], [True, True]]]]
    assert task.loss(pred, label).item() == 0.25
    assert task.sums(pred, label).tolist() == [3, 0.75]
    assert task.metrics(task.sums(pred, label) * 2) == {"error": 0.25}
    assert task.best_constant(torch.tensor([0.1, 0.9, 0.2])).tolist() == pytest.approx([0.2])
    assert task.colours(pred[0])[:, 0].tolist() == [[1.0, 0.75]] * 3

    nobody = torch.zeros(1, 1, 2, 2)
    assert task.loss(pred, nobody).item() == 0
    assert np.isnan(task.metrics(task.sums(pred, nobody))["error"])


def test_the_example_of_your_own_dataset_trains(tmp_path, registries, monkeypatch, capsys):
    """Its command trains for four steps, and eval.py finds the metrics of the run again."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_names(tmp_path / "photos")
    for i in range(1, 11):
        label = np.zeros((40, 30), np.uint8)
        left, top = rng.integers(2, 12, 2)
        for row, number in enumerate((HAIR, SHIRT, JEANS)):
            label[top + 8 * row:top + 8 * row + 8, left:left + 12] = number
        pixels = np.stack([6 * label, 255 - 5 * label, label], axis=-1)
        write_sample(tmp_path / "photos", f"{i:04}", label, pixels)
    flags = ["--size", "64x48", "--epochs", "2", "--batch-size", "4", "--head-epochs", "1",
             "--sim-images", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["own_dataset.py", *flags])
    runpy.run_module("examples.own_dataset", run_name="__main__")

    metrics = json.loads((tmp_path / "runs/clothes/metrics.json").read_text())
    assert list(metrics["results"]) == ["semseg", "sal", "edge", "height"]
    assert metrics["last"]["step"] == 4 and metrics["images"] == 2
    assert [len(stage) for stage in metrics["tree"]] == [1, 2, 3, 4]
    assert (tmp_path / "runs/clothes/predictions.png").is_file()
    capsys.readouterr()
    eval.main(["--checkpoint", "runs/clothes/best.pt", "--json", "--workers", "0", "--device",
               "cpu"])
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["results"] == metrics["results"]
    assert evaluated["reference"] == metrics["reference"]
