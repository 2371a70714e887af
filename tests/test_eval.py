"""eval.py's averages and cost.py's counts, each on a case that can be done by hand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from cost import count_macs
from data import CLASSES
from eval import evaluate, predictor
from swin import WindowAttention
from tasks import make_tasks
from tglora import TGLoRALinear
from util.draw import draw_photos, draw_samples, legend

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


# --- photos ---
def predict_nothing(tasks):
    return lambda image: {task.name: torch.zeros(1, task.outputs, 4, 4) for task in tasks}


def draw_these(folder, photos, tasks):
    return draw_photos(photos, folder, predict_nothing(tasks), tasks, (32, 32),
                       torch.device("cpu"))


def test_a_picture_is_never_overwritten(tmp_path):
    """Drawn again, and of photos with the same name from two folders: they are numbered."""
    photos = [tmp_path / "a/photo.png", tmp_path / "b/photo.png"]
    for photo in photos:
        photo.parent.mkdir()
        Image.new("RGB", (40, 30)).save(photo)
    tasks = make_tasks(["depth"], 3)
    names = [path.name for path in draw_these(tmp_path, photos, tasks)]
    assert names == ["photo.predicted.png", "photo.predicted-2.png"]
    before = (tmp_path / names[0]).read_bytes()
    assert draw_these(tmp_path, photos[:1], tasks) == [tmp_path / "photo.predicted-3.png"]
    assert (tmp_path / names[0]).read_bytes() == before


def test_every_fault_of_a_photo_is_named_and_the_rest_is_drawn(tmp_path):
    """One of 1 pixel height, one that is none, one of 8000x4000 that is drawn smaller."""
    Image.new("RGB", (640, 1)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (8000, 4000)).save(tmp_path / "huge.png")
    photos = [tmp_path / name for name in ("thin.png", "text.png", "huge.png")]
    with pytest.raises(ValueError, match="thin.png: it is 640x1 pixels, .*; cannot read image "
                       ".*text.png: .*; wrote .*huge.predicted.png$"):
        draw_these(tmp_path, photos, make_tasks(["depth"], 3))
    assert Image.open(tmp_path / "huge.predicted.png").width == 2 * (2048 + 2)


@pytest.mark.parametrize("dataset, tasks, words", [
    ("nyud", ["semseg", "depth"], ["wall", "floor mat", "other prop", "1 m", "10 m", "depth:"]),
    ("pascal", ["semseg", "human_parts", "sal"], ["background", "tv monitor", "torso", "sal"]),
    ("rooms", ["semseg", "normals"], ["floor", "cylinder", "normals"])])
def test_pictures_say_what_is_in_them(tmp_path, monkeypatch, dataset, tasks, words):
    """Each column its task, each class and some depths their colours: of a photo, of samples."""
    written, text = [], ImageDraw.ImageDraw.text

    def note(pen, place, words, *args):
        written.append(words)
        text(pen, place, words, *args)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "photo.png")
    tasks = make_tasks(tasks, CLASSES[dataset])
    path, = draw_these(tmp_path, [tmp_path / "photo.png"], tasks)
    assert written[:2] == ["image", tasks[0].name] and set(words) <= set(written)
    assert (np.array(Image.open(path))[20:40, 5:35] == (200, 0, 0)).all()  # below its title
    label = {"normals": torch.zeros(3, 4, 4), "depth": torch.zeros(1, 4, 4)}
    sample = {task.name: label.get(task.name, torch.zeros(4, 4)) for task in tasks}
    written.clear()
    draw_samples(tmp_path / "samples.png", predict_nothing(tasks), tasks,
                 [{"image": GREY, **sample}], (32, 32), torch.device("cpu"))
    assert written[:3] == ["image", f"{tasks[0].name}: true", f"{tasks[0].name}: found"]
    assert set(words) - {"sal", "normals"} <= set(written)


def test_a_legend_has_the_colours_of_the_picture():
    """Of NYU's 40 classes and of depths; a network's own classes have numbers."""
    semseg, depth = make_tasks(["semseg", "depth"], CLASSES["nyud"])
    assert [name for name, _ in legend(semseg)] == list(CLASSES["nyud"]) and semseg.outputs == 40
    name, colour = legend(semseg)[3]
    assert name == "bed" and torch.equal(colour, semseg.colours(torch.full((1, 1), 3))[:, 0, 0])
    name, colour = legend(depth)[1]
    assert name == "2 m" and torch.equal(colour, depth.colours(torch.full((1, 1, 1), 2.0))[:, 0, 0])
    assert [name for name, _ in legend(make_tasks(["semseg"], 3)[0])] == ["0", "1", "2"]
    assert legend(make_tasks(["normals"], 3)[0]) == []


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
