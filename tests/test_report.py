"""report.py: pictures hold the right colours at the right places."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import report
from data import CLASSES
from report import MARGIN, PLOT, draw_curves, draw_photos, draw_samples, draw_tree, legend
from tasks import make_tasks

CPU = torch.device("cpu")


@pytest.fixture
def texts(monkeypatch):
    """Every text that is drawn, with the box it fills."""
    drawn, real = [], ImageDraw.ImageDraw.text

    def text(pen, xy, string, fill=None, font=None, anchor=None):
        drawn.append((string, pen.textbbox(xy, string, font, anchor)))
        real(pen, xy, string, fill, font, anchor)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def predict_nothing(tasks):
    return lambda image: {task.name: torch.zeros(1, task.outputs, 4, 4) for task in tasks}


def test_curves_show_losses_and_metrics(tmp_path):
    """One column per task, the loss above the metric; what is not a number is left out."""
    lines = [{"step": s, "lr": 1, "loss": {"depth": 4.0 - s, "sal": 1.0}} for s in (1, 2, 3)]
    lines[0]["loss"]["sal"] = None
    lines += [{"step": s, "results": {"depth": {"rmse": r}, "sal": {"mIoU": m}}}
              for s, r, m in ((2, 0.7, math.nan), (3, 0.9, 0.5))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl", make_tasks(["depth", "sal"], 6))
    picture = np.array(Image.open(tmp_path / "curves.png")).astype(int)
    width, height = PLOT
    assert picture.shape == (2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN), 3)
    blue = (picture[..., 2] - picture[..., 0]) > 100

    def ends(row, column):
        """First and last point of a curve, relative to the corner of its frame."""
        top, left = row * (height + 2 * MARGIN), column * (width + 2 * MARGIN)
        ys, xs = np.nonzero(blue[top:top + height + 2 * MARGIN, left:left + width + 2 * MARGIN])
        first, last = xs.min(), xs.max()
        return [(first - MARGIN, ys[xs == first].mean() - MARGIN),
                (last - MARGIN, ys[xs == last].mean() - MARGIN)]

    expected = {(0, 0): [(width / 3, 0), (width, height)],              # the loss falls
                (0, 1): [(width * 2 / 3, height), (width, height)],
                (1, 0): [(width * 2 / 3, height), (width, 0)],          # rmse rises
                (1, 1): [(width, height), (width, height)]}
    for place, points in expected.items():
        np.testing.assert_allclose(ends(*place), points, atol=4)


FIVE = ["depth", "semseg", "normals", "edge", "human_parts"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("suffix", ["", "_with_a_rather_long_name"])
def test_the_tree_is_drawn_with_its_similarities(known, suffix, tmp_path, texts):
    """Every name and number, none over another; groups stand together; below zero is red."""
    tasks = [name + suffix for name in FIVE]
    depth, semseg, normals, edge, parts = tasks
    halves = [[semseg, edge, parts], [depth, normals]]
    sim = np.eye(5)
    sim[[0, 2], [2, 0]], sim[[1, 3], [3, 1]] = 0.3456, -0.1234
    error = np.where(sim == 0, None, 0.0121)
    (tmp_path / "tree.json").write_text(json.dumps({
        "tasks": tasks, "similarity": sim.tolist() if known else None,
        "standard_error": error.tolist(),
        "tree": [[tasks], halves, halves, [[name] for name in tasks]]}))
    draw_tree(tmp_path / "tree.png", tmp_path / "tree.json")
    picture = Image.open(tmp_path / "tree.png").convert("RGB")
    for i, (string, (left, top, right, bottom)) in enumerate(texts):
        assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height
        for _, (left2, top2, right2, bottom2) in texts[:i]:
            apart = right < left2 or right2 < left or bottom < top2 or bottom2 < top
            assert apart, string
    strings = [string for string, _ in texts]
    assert [strings.count(name) for name in tasks] == [6 if known else 4] * 5
    place = {string: box[0] for string, box in texts}
    order = sorted(tasks, key=place.get)
    assert set(order[:3]) == set(halves[0]) or set(order[:2]) == set(halves[1])
    numbers = {string: picture.getpixel((box[0] - 2, box[1] - 2)) for string, box in texts
               if "." in string}
    assert bool(numbers) == known
    if known:
        assert set(numbers) == {"1.000 ± 0.012", "0.346 ± 0.012", "-0.123 ± 0.012", "0.000"}
        red, _, blue = numbers["-0.123 ± 0.012"]
        assert red > blue and numbers["0.346 ± 0.012"][2] > numbers["0.346 ± 0.012"][0]


@pytest.mark.parametrize("dataset, names, words", [
    ("nyud", ["semseg", "depth"], ["wall", "floor mat", "other prop", "1 m", "10 m", "depth:"]),
    ("pascal", ["semseg", "human_parts", "sal"], ["background", "tv monitor", "torso"]),
    ("rooms", ["semseg", "normals"], ["floor", "cylinder"])])
def test_pictures_say_what_is_in_them(tmp_path, texts, dataset, names, words):
    """A title above each column, and a legend with the classes and some depths."""
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "photo.png")
    tasks = make_tasks(names, CLASSES[dataset])
    draw_photos([tmp_path / "photo.png"], tmp_path, predict_nothing(tasks), tasks, (32, 32), CPU)
    strings = [string for string, _ in texts]
    assert strings[:2] == ["image", names[0]] and set(words) <= set(strings)
    texts.clear()
    sample = {"image": torch.full((3, 4, 4), 128, dtype=torch.uint8)}
    for task in tasks:
        shape = (4, 4) if task.kind == "classes" else (task.channels, 4, 4)
        sample[task.name] = torch.zeros(shape)
    draw_samples(tmp_path / "samples.png", predict_nothing(tasks), tasks, [sample], (32, 32), CPU)
    strings = [string for string, _ in texts]
    assert strings[:3] == ["image", f"{names[0]}: ground truth", f"{names[0]}: prediction"]
    assert set(words) <= set(strings)


def test_a_legend_has_the_colours_of_the_picture():
    """NYU's 40 classes by name, depths in metres; normals explain themselves."""
    semseg, depth = make_tasks(["semseg", "depth"], CLASSES["nyud"])
    assert [name for name, _ in legend(semseg)] == list(CLASSES["nyud"])
    name, colour = legend(semseg)[3]
    assert name == "bed"
    assert torch.equal(colour, semseg.colours(torch.full((1, 1), 3))[:, 0, 0])
    name, colour = legend(depth)[1]
    assert name == "2 m"
    assert torch.equal(colour, depth.colours(torch.full((1, 1, 1), 2.0))[:, 0, 0])
    assert [name for name, _ in legend(make_tasks(["semseg"], 3)[0])] == ["0", "1", "2"]
    assert legend(make_tasks(["normals"], 3)[0]) == []


def test_delta_m_is_shown_when_it_is_known():
    """In the line of an epoch and under the table."""
    tasks = make_tasks(["depth"], 3)
    result = {"loss": 1.5, "delta_m": -2.345, "images": 1, "pixels": {"depth": 4},
              "nan": {"depth": 0}, "results": {"depth": {"rmse": 0.5}}}
    line = report.format_line(tasks, result)
    assert line == "validation loss 1.5000  depth rmse 0.5000  delta-m -2.35 %"
    table = report.format_table(tasks, result, {"depth": {"rmse": 1.0}}, (4, 4))
    assert table.splitlines()[-1] == "delta-m -2.35 %"
