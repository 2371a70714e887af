"""Tests of data.py: samples are checked, batches are reproducible, and `warp` is correct.

`warp` is compared with rooms rendered by a different camera, and with a plain loop over pixels.
"""

import pickle
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from data import (CLASSES, DATASETS, Checked, collate, draw_augmentation, epoch_batches,
                  loader, open_dataset, warp)
from rooms import Rooms, render_room
from tasks import TASKS, make_tasks

OWN = {
    "things": SimpleNamespace(name="things", kind="classes", classes=7, outputs=7),
    "range": SimpleNamespace(name="range", kind="distances", channels=1, outputs=1),
    "flow": SimpleNamespace(name="flow", kind="directions", channels=3, outputs=3),
    "height": SimpleNamespace(name="height", kind="values", channels=1, outputs=1),
}


@pytest.fixture
def own(monkeypatch):
    """Add the tasks of OWN, one of each kind, to tasks.TASKS, as a user would."""
    for name, task in OWN.items():
        monkeypatch.setitem(TASKS, name, task)


class Photos(Dataset):
    """A user's own dataset of one sample; `sample` may also be an exception to raise instead."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 1

    def __getitem__(self, i):
        if isinstance(self.sample, Exception):
            raise self.sample
        return self.sample


def check(sample, *names):
    """Read `sample` through `Checked`, which keeps only the labels of the tasks called `names`."""
    return Checked("photos val", Photos(sample), make_tasks(names, 7))[0]


# --- samples --------------------------------------------------------------------------------------
def test_labels_may_be_arrays_without_a_channel_axis(own):
    """Arrays become tensors, and a float label (H, W) gets a channel axis.

    In float labels, NaN and infinity become 0. Entries that no task uses are left out.
    """
    height = np.array([[0.25, -1.5, np.nan], [np.inf, 3, 0]])
    things = np.array([[0, 6, 255], [1, 2, 3]])
    image = np.zeros((3, 2, 3), np.uint8)
    sample = check({"image": image, "height": height, "id": "a", "things": things},
                   "height", "things")
    assert list(sample) == ["image", "height", "things"]
    assert sample["height"].tolist() == [[[0.25, -1.5, 0], [0, 3, 0]]]
    assert sample["height"].dtype == torch.float32
    assert sample["things"].tolist() == things.tolist()
    assert sample["things"].dtype == torch.uint8


@pytest.mark.parametrize("name, label, message", [
    ("things", torch.zeros(4, 6), r"\(4, 6\) of float32; expected \(4, 6\) of integers"),
    ("things", torch.zeros(4, 6, 3).byte(), r"\(4, 6, 3\) of uint8; expected \(4, 6\) of integers"),
    ("things", torch.full((4, 6), 7), "contains class 7; expected 0 to 6, or 255 = ignore"),
    ("things", torch.full((4, 6), -1), "contains class -1; expected 0 to 6"),
    ("height", np.full((4, 6), 1800, np.uint16), r"\(4, 6\) of uint16; expected floats.* metres"),
    ("height", torch.zeros(5, 6), r"\(5, 6\) of float32; expected \(1, 4, 6\) of floats"),
    ("image", torch.zeros(4, 6, 3).byte(), r"\(4, 6, 3\) of uint8; expected \(3, H, W\)"),
    ("image", torch.zeros(3, 4).byte(), r"\(3, 4\) of uint8; expected \(3, H, W\)"),
    ("image", torch.zeros(3, 4, 6), r"\(3, 4, 6\) of float32; expected \(3, H, W\) of uint8")])
def test_wrong_samples_are_refused(own, name, label, message):
    """The error names the dataset, the sample, the entry, the mistake and what was expected."""
    sample = {"image": torch.zeros(3, 4, 6).byte(), "things": torch.zeros(4, 6).byte()}
    sample[name] = label
    message = message if message.startswith("contains") else f"is {message}"
    with pytest.raises(ValueError, match=f"^photos val: sample 0: {name} {message}"):
        check(sample, "things" if name == "image" else name)


def test_samples_without_a_label_and_unknown_kinds_are_refused(own, monkeypatch):
    """A sample without the label of a task raises an error that names the task.

    A sample that is a tuple (image, label), as many datasets return it, is refused. So is a task of
    an unknown kind.
    """
    with pytest.raises(ValueError, match="sample 0: the sample has no depth; it has image, a"):
        check({"image": torch.zeros(3, 4, 6).byte(), "a": 1}, "depth")
    with pytest.raises(ValueError, match="^photos val: sample 0: the sample is a tuple; expected"):
        check((1, 2), "depth")
    monkeypatch.setattr(OWN["height"], "kind", "heights")
    with pytest.raises(ValueError, match="height has kind 'heights'; expected one of classes, val"):
        check({}, "height")


@pytest.mark.parametrize("attribute, names, expected", [
    ("ids", ["street"], r"sample 0 \(street\)"), ("names", ("street",), r"sample 0 \(street\)"),
    ("names", ["sky", "tree"], "sample 0"), ("names", len, "sample 0")])
def test_errors_contain_the_name_of_a_sample(attribute, names, expected):
    """An OSError in a user's dataset becomes a one-line ValueError that names the sample.

    A dataset's `ids` or `names` tell the name of a sample if there is one for each sample.
    """
    dataset = Photos(OSError("cannot read\n  a.png"))
    setattr(dataset, attribute, names)
    with pytest.raises(ValueError, match=f"^photos val: {expected}: cannot read a.png$"):
        Checked("photos val", dataset, [])[0]


def test_a_bug_in_a_users_dataset_keeps_its_traceback():
    """A TypeError is passed on, with a note that names the sample."""
    with pytest.raises(TypeError, match="a bug") as raised:
        check(TypeError("a bug"), "depth")
    assert raised.value.__notes__ == ["photos val: sample 0"]


def test_datasets_are_opened_by_name(monkeypatch):
    """A user's own dataset can be opened by its name, with and without --cache.

    An unknown dataset and a split without images are errors.
    """
    config = Namespace(dataset="mine", tasks=["semseg"], cache=False, size=(9, 8), train_rooms=3,
                       val_rooms=2, room_seed=0, night=True, data_root="here")
    with pytest.raises(ValueError, match="unknown dataset 'mine'; expected one of rooms, nyud"):
        open_dataset(config, "val")
    monkeypatch.setitem(DATASETS, "mine", DATASETS["rooms"])
    monkeypatch.setitem(CLASSES, "mine", 7)
    train = open_dataset(config, "train")
    assert len(train) == 3
    val = open_dataset(config, "val")
    for dataset, rooms in ((train, Rooms("train", ["semseg"], 3, (9, 8), night=True)),
                           (val, Rooms("val", ["semseg"], 2, (9, 8), night=True))):
        assert torch.equal(dataset[1]["image"], rooms[1]["image"])
    config.room_seed = 5                                # changes only the training rooms
    assert not torch.equal(open_dataset(config, "train")[0]["image"], train[0]["image"])
    assert torch.equal(open_dataset(config, "val")[0]["image"], val[0]["image"])
    assert len(val) == 2 and list(val[0]) == ["image", "semseg"]
    copied = pickle.loads(pickle.dumps(val))            # as workers on Windows and macOS need it
    assert torch.equal(copied[1]["image"], val[1]["image"])
    config.cache = True
    cached = open_dataset(config, "val")
    assert len(cached) == 2 and torch.equal(cached[1]["image"], val[1]["image"])
    assert cached[1]["image"] is cached[1]["image"]
    assert loader(cached, [[0]], workers=1).num_workers == 0    # workers would only copy samples
    config.val_rooms = 0
    with pytest.raises(ValueError, match="mine: the val split in here has no images"):
        open_dataset(config, "val")
    assert {name: len(classes) for name, classes in CLASSES.items()
            if name != "mine"} == {"rooms": 7, "nyud": 40, "pascal": 21}


# --- batches --------------------------------------------------------------------------------------
def test_the_batches_of_a_run_are_fixed():
    """The order of the samples is fixed, because a resumed run must see the same batches.

    An incomplete last batch is dropped. A dataset smaller than a batch gives batches of its size.
    """
    assert epoch_batches(7, 3, 2, seed=5) == [[1, 4, 2], [3, 6, 5], [4, 2, 0], [6, 5, 3]]
    assert [len(batch) for batch in epoch_batches(2, 3, 2, seed=5)] == [2, 2]


# --- augmentation ---------------------------------------------------------------------------------
def test_augmentation_draws_from_the_whole_range():
    """Flip, scale, angle and centre cover their ranges; flip, angle and centre are uncorrelated.

    The image extends from -1 to 1 in both coordinates of the centre. At a scale of 2, the centre
    stays between -0.5 and 0.5, so an unrotated cut lies inside the image.
    """
    torch.manual_seed(0)
    drawn = draw_augmentation(400, flip=True, scales=(0.8, 2.0), rotate=20.0)
    scale, centre, angle = drawn["scale"], drawn["centre"], drawn["angle"]
    zoomed = scale > 1
    assert set(scale.tolist()) == {torch.tensor(0.8).item(), 2.0} and 150 < zoomed.sum() < 250
    assert 150 < drawn["flip"].sum() < 250
    assert 19 < angle.max() <= 20 and -20 <= angle.min() < -19
    assert (centre[~zoomed] == 0).all()
    for axis in centre[zoomed].T:
        assert -0.5 <= axis.min() < -0.45 and 0.45 < axis.max() <= 0.5
        assert (axis.abs() < 0.25).float().mean() == pytest.approx(0.5, abs=0.1)    # uniform
    together = torch.stack([*centre[zoomed].T, angle[zoomed], drawn["flip"][zoomed]])
    assert (together.corrcoef() - torch.eye(4)).abs().max() < 0.25
    assert not draw_augmentation(50, flip=False, scales=(1.0,), rotate=0.0)["flip"].any()


@pytest.mark.parametrize("angle, flip, zoom", [(-13.0, True, 1.0), (20.0, False, 1.4)])
def test_the_warp_equals_another_camera(angle, flip, zoom):
    """Nearly all warped labels agree with those of a mirrored or rolled camera, or a longer lens.

    Depth is compared after multiplying it by the zoom: `warp` divides depth by the zoom, but a
    longer lens does not change it.
    """
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    if flip:
        axes = np.diag([-1, 1, 1]) @ axes
    room = render_room((0, 0, 0), 160, 120)
    expected = render_room((0, 0, 0), 160, 120, axes=axes, zoom=zoom)
    image, labels = warp(collate([room]), (160, 120), angle=torch.tensor([angle]),
                         flip=torch.tensor([flip]), scale=torch.tensor([zoom]))
    image, labels = image[0], {name: label[0] for name, label in labels.items()}
    inside = labels["semseg"] != 255                # rotation leaves the corners empty
    assert inside.float().mean() > 0.6 and (inside.all() or angle)
    assert (image[:, ~inside] == 0).all() and (labels["depth"][:, ~inside] == 0).all()
    same = inside & (labels["semseg"] == expected["semseg"])
    assert same.sum() > 0.96 * inside.sum()         # classes may differ at object borders
    flat = same & (expected["semseg"] <= 3)         # on curved objects, half a pixel matters
    cosine = (labels["normals"] * expected["normals"]).sum(0)[flat]
    assert (cosine > np.cos(np.deg2rad(2))).float().mean() > 0.98
    ratio = (labels["depth"] * zoom / expected["depth"])[0][same]
    assert ((ratio - 1).abs() < 0.02).float().mean() > 0.95


def warp_plainly(sample, size, flip, scale, centre, angle):
    """Compute `warp` for one sample, pixel by pixel, with labels of all four kinds.

    Positions are complex numbers: the real axis points right, the imaginary axis up. The cut is the
    part of the image that is shown. A point of the image at z, relative to the middle of the cut,
    appears in the cut at mirror(z * e^(i angle)) * scale. Returns the warped image and labels, and
    a mask of the pixels where rounding cannot change which pixel is the nearest.
    """
    H, W = sample["image"].shape[1:]
    h, w = size
    turn = np.exp(1j * np.deg2rad(angle))
    middle = W / 2 * (1 + centre[0]) - 1j * (H / 2 * (1 + centre[1]))
    out = {"image": np.zeros((3, h, w)), "things": np.full((h, w), 255),
           "height": np.zeros((1, h, w)), "range": np.zeros((1, h, w)),
           "flow": np.zeros((3, h, w))}
    clear = np.ones((h, w), bool)
    for i, j in np.ndindex(h, w):
        z = ((j + 0.5) / w - 0.5) * W - 1j * ((i + 0.5) / h - 0.5) * H
        if flip:
            z = -z.conjugate()
        z = z / scale / turn + middle
        x, y = z.real, -z.imag
        clear[i, j] = min(abs(x - round(x)), abs(y - round(y))) > 1e-3
        if not (0 <= x <= W and 0 <= y <= H):
            continue
        row, column = min(int(y), H - 1), min(int(x), W - 1)          # the nearest pixel
        out["things"][i, j] = sample["things"][row, column]
        out["height"][:, i, j] = sample["height"][:, row, column]
        out["range"][:, i, j] = sample["range"][:, row, column] / scale
        nx, ny, nz = sample["flow"][:, row, column]
        n = complex(nx, -ny) * turn
        if flip:
            n = -n.conjugate()
        out["flow"][:, i, j] = n.real, -n.imag, nz
        x = min(max(x - 0.5, 0), W - 1)                               # bilinear
        y = min(max(y - 0.5, 0), H - 1)
        left, top = min(int(x), W - 2), min(int(y), H - 2)
        corners = sample["image"][:, top:top + 2, left:left + 2] / 255
        colour = np.array([1 - (y - top), y - top]) @ corners @ [1 - (x - left), x - left]
        out["image"][:, i, j] = (colour - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return out, clear


def test_the_warp_equals_a_plain_one(own):
    """`warp` and `warp_plainly` agree for random arguments, padded images and each kind of label.
    """
    rng = np.random.default_rng(0)
    samples = []
    for H, W in ((31, 41), (37, 29)) * 3:
        samples.append({"image": rng.integers(256, size=(3, H, W)).astype(np.uint8),
                        "things": rng.integers(7, size=(H, W)).astype(np.uint8),
                        "height": rng.uniform(1, 5, (1, H, W)).astype(np.float32),
                        "range": rng.uniform(1, 5, (1, H, W)).astype(np.float32),
                        "flow": rng.normal(size=(3, H, W)).astype(np.float32)})
    torch.manual_seed(3)
    drawn = draw_augmentation(6, flip=True, scales=(0.75, 1.0, 1.5), rotate=20.0)
    assert {0.75, 1.5} <= set(drawn["scale"].tolist()) and 0 < drawn["flip"].sum() < 6
    tensors = [{name: torch.from_numpy(x) for name, x in sample.items()} for sample in samples]
    image, labels = warp(collate(tensors), (16, 22), "cpu", **drawn)
    assert image.dtype == torch.float32 and labels["things"].dtype == torch.int64
    for b, sample in enumerate(samples):
        how = {name: values[b].numpy() for name, values in drawn.items()}
        expected, clear = warp_plainly(sample, (16, 22), **how)
        assert clear.mean() > 0.98
        for name, value in {"image": image, **labels}.items():
            np.testing.assert_allclose(value[b].numpy()[..., clear], expected[name][..., clear],
                                       atol=2e-3 if name == "image" else 1e-5, err_msg=name)


def test_a_tie_between_pixels_does_not_depend_on_the_padding():
    """At half the size, `warp` keeps every second pixel of a label, with and without padding."""
    depth = torch.arange(1.0, 401).view(1, 20, 20)
    sample = {"image": torch.zeros(3, 20, 20).byte(), "depth": depth}
    larger = {"image": torch.zeros(3, 27, 33).byte(), "depth": torch.zeros(1, 27, 33)}
    for samples in ([sample], [sample, larger]):
        _, labels = warp(collate(samples), (10, 10))
        assert torch.equal(labels["depth"][0], depth[:, 1::2, 1::2])
