"""Tests of report.py: pictures have the right colours, with texts in the right places.

Delta-m is printed with the results.
"""

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
    """Returns a list that collects every text that is drawn, with its bounding box."""
    drawn, real = [], ImageDraw.ImageDraw.text

    def text(pen, xy, string, fill=None, font=None, anchor=None):
        drawn.append((string, pen.textbbox(xy, string, font, anchor)))
        real(pen, xy, string, fill, font, anchor)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def predict_nothing(tasks):
    return lambda image: {task.name: torch.zeros(1, task.outputs, 4, 4) for task in tasks}


def test_curves_show_losses_and_metrics(tmp_path, texts):
    """Each task has a column, with the curve of its loss above the curve of its metric.

    Points that are NaN or null are left out.
    """
    lines = [{"step": s, "lr": 1, "loss": {"depth": 4.0 - s, "sal": 1.0}} for s in (1, 2, 3)]
    lines[0]["loss"]["sal"] = None
    lines += [{"step": s, "results": {"depth": {"rmse": r}, "sal": {"mIoU": m}}}
              for s, r, m in ((2, 0.7, math.nan), (3, 0.9, 0.5))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl", make_tasks(["depth", "sal"], 6))
    picture = np.array(Image.open(tmp_path / "curves.png")).astype(int)
    strings = [string for string, _ in texts]
    assert {"3", "1", "0.7", "0.9", "0.5"} <= set(strings) and "1.5" not in strings
    width, height = PLOT
    assert picture.shape == (2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN), 3)
    blue = (picture[..., 2] - picture[..., 0]) > 100

    def ends(row, column):
        """The first and the last point (x, y) of a curve, from the top left corner of its frame."""
        top, left = row * (height + 2 * MARGIN), column * (width + 2 * MARGIN)
        ys, xs = np.nonzero(blue[top:top + height + 2 * MARGIN, left:left + width + 2 * MARGIN])
        first, last = xs.min(), xs.max()
        return [(first - MARGIN, ys[xs == first].mean() - MARGIN),
                (last - MARGIN, ys[xs == last].mean() - MARGIN)]

    expected = {(0, 0): [(width / 3, 0), (width, height)],              # the loss falls
                (0, 1): [(width * 2 / 3, height / 2), (width, height / 2)],     # constant loss
                (1, 0): [(width * 2 / 3, height), (width, 0)],          # rmse rises
                (1, 1): [(width, height / 2), (width, height / 2)]}     # mIoU has only one point
    for place, points in expected.items():
        np.testing.assert_allclose(ends(*place), points, atol=4)


FIVE = ["depth", "semseg", "normals", "edge", "human_parts"]


@pytest.mark.parametrize("known, suffix", [
    (True, ""), (True, "_with_a_rather_long_name"), (False, "")])
def test_the_tree_is_drawn_with_its_similarities(known, suffix, tmp_path, texts):
    """In the picture, texts do not overlap, and tasks of a group are next to each other.

    A negative similarity is red, a positive one blue, and the strongest one has the strongest
    colour. The diagonal is blank. Unknown similarities are not drawn.
    """
    tasks = [name + suffix for name in FIVE]
    depth, semseg, normals, edge, parts = tasks
    halves = [[semseg, edge, parts], [depth, normals]]
    sim = np.eye(5)
    sim[[0, 2], [2, 0]], sim[[1, 3], [3, 1]] = 0.3456, -0.1234
    error = np.where(sim == 0, None, 0.0121)
    (tmp_path / "tree.json").write_text(json.dumps({
        "tasks": tasks, "similarity": sim.tolist() if known else None,
        "standard_error": error.tolist(),
        "choices": [None, {"decided": False}, {"decided": True}, None],
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
    top = {string: box[1] for string, box in texts}
    assert top["stage 2"] < top["not decided"] < top["stage 3"] < top["decided"] < top["stage 4"]
    order = sorted(tasks, key=place.get)
    assert set(order[:3]) == set(halves[0]) or set(order[:2]) == set(halves[1])
    numbers = {string: picture.getpixel((box[0] - 2, box[1] - 2)) for string, box in texts
               if "." in string}
    assert bool(numbers) == known
    if known:
        assert set(numbers) == {"0.346 ± 0.012", "-0.123 ± 0.012", "0.000"}
        assert numbers["0.346 ± 0.012"] == (135, 135, 255)
        pale = round(255 - 120 * 0.1234 / 0.3456)
        assert numbers["-0.123 ± 0.012"] == (255, pale, pale)


@pytest.mark.parametrize("dataset, names, words", [
    ("nyud", ["semseg", "depth"], ["wall", "floor mat", "other prop", "1 m", "10 m", "depth:"]),
    ("pascal", ["semseg", "human_parts", "sal"], ["background", "tv monitor", "torso", "salient"]),
    ("rooms", ["semseg", "normals"], ["floor", "cylinder", "facing left", "the camera"])])
def test_pictures_say_what_is_in_them(tmp_path, texts, dataset, names, words):
    """Columns have titles, every task has a legend, and no text is cut off.

    Only a picture with pixels without ground truth explains their stripes.
    """
    words = ["image", *names, *words]
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "photo.png")
    tasks = make_tasks(names, CLASSES[dataset])
    draw_photos([tmp_path / "photo.png"], tmp_path, predict_nothing(tasks), tasks, (32, 32), CPU)
    check_texts(texts, words, tmp_path / "photo.predicted.png")
    sample = {"image": torch.full((3, 4, 4), 128, dtype=torch.uint8)}
    for task in tasks:
        shape = (4, 4) if task.kind == "classes" else (task.channels, 4, 4)
        sample[task.name] = torch.ones(shape)
    predictors = {"decoders only": predict_nothing(tasks), "TGLoRA": predict_nothing(tasks)}
    words += ["ground truth", *predictors]
    path = tmp_path / "samples.png"
    for striped in (False, True):
        if striped:
            first, last = sample[names[0]], sample[names[-1]]
            first[..., 0, 0], last[..., 0, 0] = 255, 0
            words += ["striped:", "no ground truth"]
        draw_samples(path, predictors, tasks, [sample], (32, 32), CPU)
        assert ("no ground truth" in {string for string, _ in texts}) == striped
        check_texts(texts, words, path)


def check_texts(texts, words, path):
    """Check that all `words` are drawn and that no text is cut off. Empties `texts`."""
    picture = Image.open(path)
    assert set(words) <= {string for string, _ in texts}
    for string, (left, top, right, bottom) in texts:
        assert left >= 0 and top >= 0, string
        assert right <= picture.width and bottom <= picture.height, string
    texts.clear()


def test_samples_show_predictions_under_their_ground_truth(tmp_path):
    """The ground truth (1 m above 2 m) is drawn above the predictions (4 m, then 6 m)."""
    task = make_tasks(["depth"], 6)[0]
    depth = torch.full((1, 8, 8), 2.0)
    depth[:, :4] = 1.0
    sample = {"image": torch.full((3, 8, 8), 128, dtype=torch.uint8), "depth": depth}
    predictors = {"first": lambda image: {"depth": torch.full((1, 1, 8, 8), 4.0)},
                  "second": lambda image: {"depth": torch.full((1, 1, 8, 8), 6.0)}}
    draw_samples(tmp_path / "samples.png", predictors, [task], [sample], (8, 8), CPU)
    picture = np.array(Image.open(tmp_path / "samples.png")).astype(int)
    rows = {}
    for metres in (1.0, 2.0, 4.0, 6.0):
        colour = (task.colours(torch.full((1, 1, 1), metres))[:, 0, 0] * 255).int().numpy()
        same = (abs(picture - colour) <= 1).all(2)
        rows[metres] = np.flatnonzero(same.sum(1) == 160)       # excludes the legend's squares
    assert [len(rows[metres]) for metres in rows] == [80, 80, 160, 160]     # 8 pixels became 160
    order = [y for metres in rows for y in rows[metres]]
    assert order == sorted(order)


def test_pixels_without_ground_truth_are_striped(tmp_path):
    """In a label of saliency, only pixels without ground truth are black and grey stripes."""
    task = make_tasks(["sal"], 6)[0]
    label = torch.zeros(160, 160)
    label[:, 80:] = 255
    sample = {"image": torch.full((3, 160, 160), 128, dtype=torch.uint8), "sal": label}
    draw_samples(tmp_path / "samples.png", {}, [task], [sample], (160, 160), CPU)
    picture = np.array(Image.open(tmp_path / "samples.png"))
    tile = picture[28:188, -168:-8, 0]
    known, unknown = tile[:, :80], tile[:, 80:]
    assert (known == 0).all()
    for stripes in (*unknown, *unknown.T):
        values, counts = np.unique(stripes, return_counts=True)
        assert values.tolist() == [0, 127] and counts.min() == counts.max()


def test_a_legend_has_the_colours_of_the_picture():
    """Legends name classes, depths in metres and directions of normals, in the task's colours."""
    semseg, depth = make_tasks(["semseg", "depth"], CLASSES["nyud"])
    assert [name for name, _ in legend(semseg)] == list(CLASSES["nyud"])
    name, colour = legend(semseg)[3]
    assert name == "bed"
    assert torch.equal(colour, semseg.colours(torch.full((1, 1), 3))[:, 0, 0])
    name, colour = legend(depth)[2]
    assert name == "2 m"
    assert torch.equal(colour, depth.colours(torch.full((1, 1, 1), 2.0))[:, 0, 0])
    assert [name for name, _ in legend(make_tasks(["semseg"], 3)[0])] == ["0", "1", "2"]
    sal, normals = make_tasks(["sal", "normals"], 3)
    assert [(name, colour.tolist()) for name, colour in legend(sal)] == [
        ("salient", [1, 1, 1]), ("not salient", [0, 0, 0])]
    directions = dict(legend(normals))
    assert directions["right"].tolist() == [1, 0.5, 0.5]            # x right, y down, z to camera
    assert directions["up"].tolist() == [0.5, 0, 0.5]
    assert directions["the camera"].tolist() == [0.5, 0.5, 1]


def test_delta_m_is_shown_when_it_is_known():
    """If delta-m is known, it ends the line of an epoch and is the last line of the table."""
    tasks = make_tasks(["depth"], 3)
    result = {"loss": 1.5, "delta_m": -2.345, "images": 1, "pixels": {"depth": 4},
              "nan": {"depth": 0}, "results": {"depth": {"rmse": 0.5}}}
    line = report.format_line(tasks, result)
    assert line == "validation loss 1.5000  depth rmse 0.5000  delta-m -2.35 %"
    table = report.format_table(tasks, result, {"depth": {"rmse": 1.0}}, (4, 4))
    assert table.splitlines()[-1] == "delta-m -2.35 %"
