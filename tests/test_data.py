"""data.py, datasets/rooms.py, datasets/labels.py: both NYUD layouts, and the warp."""

import os
import shutil
import zlib
from argparse import Namespace
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image

from data import (CLASSES, DATASETS, OF_A_TASK, Checked, Files, Rooms, collate, draw_augmentation,
                  epoch_batches, loader, open_dataset, warp)
from datasets import labels
from datasets.archives import find_dataset
from datasets.labels import NYU_CLASSES, PARTS
from datasets.rooms import render_room
from tasks import TASKS as KNOWN
from tasks import make_tasks

TASKS = ["semseg", "depth", "normals"]
PASCAL = ["semseg", "human_parts", "sal", "normals"]


def NYUD(root, split="train"):
    return Files("nyud", root, split, TASKS)


# --- rooms ---
def test_rooms_are_the_same_everywhere():
    """Room 0 of the training split, pinned to numbers; splits and indices differ."""
    room = render_room((0, 0, 0), 24, 32)
    assert room["image"].shape == (3, 24, 32) and room["image"].dtype == torch.uint8
    assert room["semseg"].flatten().bincount(minlength=7).tolist() == [98, 0, 336, 66, 14, 168, 86]
    assert room["human_parts"].flatten().bincount().tolist() == [682, 9, 27, 9, 7, 19, 15]
    assert room["depth"].mean().item() == pytest.approx(2.73069, abs=1e-4)
    assert room["image"].float().mean().item() == pytest.approx(111.214, abs=0.02)
    train, val = (Rooms(s, TASKS, 4, (24, 32)) for s in ("train", "val"))
    assert torch.equal(train[0]["image"], room["image"])
    assert not torch.equal(val[0]["image"], room["image"])


def test_depth_and_normals_of_a_room_agree():
    """Neighbouring points of a surface, placed by depth, lie in the plane of the normal."""
    H = W = 64
    for i in range(5):
        room = render_room((1, 0, i), H, W)
        f = 0.8 * W
        y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
        ray = torch.stack([(x - W / 2) / f, (y - H / 2) / f, torch.ones(H, W)])
        points = ray * room["depth"] * torch.tensor([1.0, 1, -1])[:, None, None]  # z to the camera
        n = room["normals"]
        torch.testing.assert_close(n.norm(dim=0), torch.ones(H, W))
        step = points[:, :, 1:] - points[:, :, :-1]
        flat = (n[:, :, 1:] - n[:, :, :-1]).norm(dim=0) < 1e-6
        off_plane = (step * n[:, :, 1:]).sum(0).abs()
        assert (off_plane[flat] < 1e-4).float().mean() > 0.9  # the rest are edges between objects
        assert ((n * ray * torch.tensor([1.0, 1, -1])[:, None, None]).sum(0) < 1e-6).all()


def test_people_and_salient_objects():
    """All six parts occur, on persons only; the salient thing is one object."""
    rooms = [render_room((0, 0, i), 64, 64) for i in range(30)]
    seen = [set(r["human_parts"].unique().tolist()) for r in rooms]
    assert {255} in seen and {0, 1, 2, 3, 4, 5, 6} in seen  # a room without a person is ignored
    for room in rooms:
        person = (room["human_parts"] > 0) & (room["human_parts"] < 7)
        assert torch.equal(person, room["semseg"] == 6)
        found = room["sal"] == 1
        if found.any():
            assert found.float().mean() >= 0.01 and len(room["semseg"][found].unique()) == 1
            assert (room["semseg"][found] > 2).all()
            for kind in range(3, 7):  # nothing large is nearer
                others = room["semseg"] == kind
                if others.float().mean() > 0.05:
                    assert room["depth"][0][found].mean() < room["depth"][0][others].mean() + 0.2
    assert 0.6 < sum((r["sal"] == 1).any().item() for r in rooms) / 30 <= 1


def test_edges_lie_where_surfaces_meet():
    """Every border of two classes is one; flat ground has none; so has a box, and a room's corner.
    """
    for i in range(6):
        room = render_room((0, 0, i), 64, 64)
        edge, label, n = room["edge"] == 1, room["semseg"].int(), room["normals"]
        across = label[:, 1:] != label[:, :-1]
        assert edge[:, 1:][across].all() and edge[:, :-1][across].all()
        fold = (n[:, 1:] * n[:, :-1]).sum(0) < 0.5  # 60 degrees: the corners of boxes and rooms
        assert edge[1:][fold].all() and edge[:-1][fold].all() and fold.any()
        assert 0.03 < edge.float().mean() < 0.3
        inner = ~F.max_pool2d(edge[None].float(), 3, 1, 1)[0].bool()
        assert (n[:, :, 1:] - n[:, :, :-1]).norm(dim=0)[inner[:, 1:]].max() < 0.53  # of 30 degrees


def warped(room, size, **how):
    image, labels = warp(collate([room]), size, **{k: torch.tensor(v) for k, v in how.items()})
    return image[0], {k: v[0] for k, v in labels.items()}


def test_flip_equals_rendering_the_mirrored_view():
    """Exactly, pixel for pixel: image, classes, depth and normals."""
    room = render_room((0, 0, 1), 40, 56)
    mirror = render_room((0, 0, 1), 40, 56, axes=np.diag([-1.0, 1, 1]))
    image, labels = warped(room, (40, 56), flip=[True])
    expected_image, expected = warped(mirror, (40, 56))
    torch.testing.assert_close(image, expected_image, atol=0.03, rtol=0)
    for name in ("human_parts", "sal", "edge", *TASKS):
        torch.testing.assert_close(labels[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("angle, flip", [(20.0, False), (-13.0, False), (20.0, True)])
def test_turning_equals_rendering_with_a_rolled_camera(angle, flip):
    """The same classes, and normals within 2 degrees, where the turned picture has content."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    if flip:
        axes = np.diag([-1, 1, 1]) @ axes
    for i in (0, 6):
        room = render_room((0, 0, i), 320, 240)  # large: half a pixel of a small ball is degrees
        rolled = render_room((0, 0, i), 320, 240, axes=axes)
        image, labels = warped(room, (320, 240), angle=[angle], flip=[flip])
        inside = labels["semseg"] != 255
        assert 0.6 < inside.float().mean() < 0.99 and (image[:, ~inside] == 0).all()
        assert (labels["semseg"] == rolled["semseg"])[inside].float().mean() > 0.96
        same = inside & (labels["semseg"] == rolled["semseg"])
        cosine = (labels["normals"] * rolled["normals"]).sum(0)[same]
        turned = cosine.clamp(-1, 1).acos().rad2deg()
        flat = labels["semseg"][same] <= 3  # balls and people curve within half a pixel
        assert turned.mean() < 2 and (turned[flat] < 2).float().mean() > 0.98
        torch.testing.assert_close(labels["depth"][0][same].median(),
                                   rolled["depth"][0][same].median(), rtol=0.02, atol=0)


@pytest.mark.parametrize("scale", [1.2, 1.5])
def test_zoom_equals_rendering_with_a_longer_lens(scale):
    """The zoomed view with depth / s; nearest sampling may differ along edges only."""
    room = render_room((0, 0, 2), 96, 96)
    lens = render_room((0, 0, 2), 96, 96, zoom=scale)
    _, labels = warped(room, (96, 96), scale=[scale])
    same = labels["semseg"] == lens["semseg"]
    assert same.float().mean() > 0.97
    error = (labels["depth"] - lens["depth"] / scale).abs()[0][same]
    assert error.median() < 0.01
    angle = (labels["normals"] * lens["normals"]).sum(0)[same].clamp(-1, 1).acos()
    assert (angle < 0.05).float().mean() > 0.95
    torch.testing.assert_close(labels["normals"].norm(dim=0), torch.ones(96, 96))


def test_what_is_outside_the_image_is_invalid():
    """Zoomed out, the border is black, ignored, and has neither depth nor normal."""
    room = render_room((0, 0, 2), 40, 40)
    image, labels = warped(room, (40, 40), scale=[0.5])
    assert (labels["semseg"][:9] == 255).all() and (labels["semseg"][12:28, 12:28] != 255).all()
    for value in (image, labels["depth"], labels["normals"]):
        assert (value[:, :9] == 0).all() and (value[:, 12:28, 12:28] != 0).any()


def test_images_of_different_sizes_share_a_batch():
    """Padding never shows: each equals itself warped alone."""
    rooms = [render_room((0, 0, 1), 40, 56), render_room((0, 0, 2), 64, 32)]
    image, labels = warp(collate(rooms), (48, 48))
    for i, room in enumerate(rooms):
        alone_image, alone = warped(room, (48, 48))
        torch.testing.assert_close(image[i], alone_image, atol=1e-4, rtol=0)
        for name in TASKS:
            torch.testing.assert_close(labels[name][i], alone[name])


def test_borders_do_not_fade_into_padding():
    """Enlarged, a white image stays white to its last pixel, alone and in a padded batch."""
    white = {"image": torch.full((3, 20, 20), 255, dtype=torch.uint8)}
    for batch in ([white], [white, {"image": torch.zeros(3, 30, 40, dtype=torch.uint8)}]):
        image, _ = warp(collate(batch), (64, 64))
        assert (image[0].amax((1, 2)) - image[0].amin((1, 2))).max() < 1e-5


def test_augmentation_draws_what_it_says():
    """Scales from the list, about half of the images flipped, and the cut inside the image."""
    torch.manual_seed(0)
    drawn = draw_augmentation(400, flip=True, scales=(1.0, 1.5), rotate=20.0)
    assert set(drawn["scale"].tolist()) == {1.0, 1.5}
    assert 120 < drawn["flip"].sum() < 280
    assert (drawn["centre"].abs().amax(1) + 1 / drawn["scale"] <= 1 + 1e-6).all()
    assert 15 < drawn["angle"].abs().max() <= 20 and drawn["angle"].mean().abs() < 3
    assert not draw_augmentation(50, flip=False, scales=(1.0,), rotate=0.0)["flip"].any()


def test_cuts_are_anywhere_in_the_image():
    """Off-centre to all four sides, x apart from y, as far as the zoom allows; flips apart too."""
    torch.manual_seed(0)
    drawn = draw_augmentation(400, flip=True, scales=(0.8, 2.0), rotate=20.0)
    centre, zoomed = drawn["centre"], drawn["scale"] > 1
    assert (centre[~zoomed] == 0).all()
    for axis in centre[zoomed].T:
        assert axis.min() < -0.45 and axis.max() > 0.45 and axis.mean().abs() < 0.1
        assert (axis.abs() < 0.25).float().mean() == pytest.approx(0.5, abs=0.1)  # evenly
    together = torch.stack([*centre[zoomed].T, drawn["angle"][zoomed], drawn["flip"][zoomed]])
    assert (together.corrcoef() - torch.eye(4)).abs().max() < 0.25


@pytest.mark.parametrize("centre, x, y", [
    ((0.5, 0.0), 75, 30), ((-0.5, 0.0), 25, 30), ((0.0, 0.5), 50, 45), ((0.2, -0.5), 60, 15)])
def test_a_cut_is_where_its_centre_says(centre, x, y):
    """Depth that is the pixel's place: the middle of the cut, x to the right and y down."""
    there = torch.stack([torch.arange(100.0).expand(60, 100),
                         torch.arange(60.0)[:, None].expand(60, 100)]) + 0.5
    for value, expected in zip(there, (x, y)):
        room = {"image": torch.zeros(3, 60, 100, dtype=torch.uint8), "depth": value[None]}
        _, labels = warped(room, (30, 50), scale=[2.0], centre=[centre])
        assert labels["depth"].mean().item() * 2 == pytest.approx(expected, abs=0.6)


def warp_plainly(sample, size, flip, zoom, centre, angle):
    """`warp` of one sample, pixel by pixel: where it comes from, and what is there.

    Points of the picture are complex numbers, x to the right and i up. What stood at z, seen from
    the middle of the cut, stands in the cut at mirror(z * e^(i angle)) * zoom.
    """
    H, W = sample["image"].shape[1:]
    h, w = size
    turn = np.exp(1j * np.deg2rad(angle))
    middle = W / 2 * (1 + centre[0]) - 1j * (H / 2 * (1 + centre[1]))
    found = {"image": np.zeros((3, h, w)), "semseg": np.full((h, w), 255),
             "depth": np.zeros((1, h, w)), "normals": np.zeros((3, h, w))}
    clear = np.ones((h, w), bool)  # where rounding cannot have chosen another pixel
    for i in range(h):
        for j in range(w):
            z = ((j + 0.5) / w - 0.5) * W - 1j * ((i + 0.5) / h - 0.5) * H
            z = (-z.conjugate() if flip else z) / zoom / turn + middle
            x, y = z.real, -z.imag
            clear[i, j] = min(abs(v - round(v)) for v in (x, y)) > 1e-3
            if not (0 <= x <= W and 0 <= y <= H):
                continue
            r, c = min(int(y), H - 1), min(int(x), W - 1)  # nearest
            found["semseg"][i, j] = sample["semseg"][r, c]
            found["depth"][:, i, j] = sample["depth"][:, r, c] / zoom
            nx, ny, nz = sample["normals"][:, r, c]
            n = complex(nx, -ny) * turn
            n = -n.conjugate() if flip else n
            found["normals"][:, i, j] = n.real, -n.imag, nz
            x, y = min(max(x - 0.5, 0), W - 1), min(max(y - 0.5, 0), H - 1)  # bilinear
            c, r = min(int(x), W - 2), min(int(y), H - 2)
            for row, share in ((r, 1 - (y - r)), (r + 1, y - r)):
                found["image"][:, i, j] += share * (
                    (1 - (x - c)) * sample["image"][:, row, c]
                    + (x - c) * sample["image"][:, row, c + 1])
            found["image"][:, i, j] = (found["image"][:, i, j] / 255 - (0.485, 0.456, 0.406)) / (
                0.229, 0.224, 0.225)
    return found, clear


def test_the_warp_equals_a_plain_one():
    """Of random draws for a padded batch: image, classes, depth and normals, pixel by pixel."""
    rng = np.random.default_rng(0)
    samples = []
    for H, W in ((31, 41), (37, 29)) * 3:
        n = rng.normal(size=(3, H, W))
        samples.append({"image": rng.integers(256, size=(3, H, W)).astype(np.uint8),
                        "semseg": rng.integers(40, size=(H, W)).astype(np.uint8),
                        "depth": rng.uniform(1, 5, (1, H, W)).astype(np.float32),
                        "normals": (n / np.linalg.norm(n, axis=0)).astype(np.float32)})
    torch.manual_seed(3)
    drawn = draw_augmentation(6, flip=True, scales=(0.75, 1.0, 1.5), rotate=20.0)
    assert {0.75, 1.5} <= set(drawn["scale"].tolist()) and 0 < drawn["flip"].sum() < 6
    batch = collate([{k: torch.from_numpy(v) for k, v in sample.items()} for sample in samples])
    image, labels = warp(batch, (24, 36), **drawn)
    for b, sample in enumerate(samples):
        sample = {k: v.astype(float) for k, v in sample.items()}
        expected, clear = warp_plainly(sample, (24, 36), *(drawn[k][b].numpy() for k in (
            "flip", "scale", "centre", "angle")))
        assert clear.mean() > 0.98
        for name, value in {"image": image, **labels}.items():
            np.testing.assert_allclose(value[b].numpy()[..., clear], expected[name][..., clear],
                                       atol=2e-3 if name == "image" else 1e-5, err_msg=name)


# --- tasks and datasets of one's own ---
OWN = {name: SimpleNamespace(**{**dict.fromkeys(OF_A_TASK), "name": name, **own}) for name, own in {
    "things": dict(kind="classes", classes=7, outputs=7),
    "range": dict(kind="distances", channels=1, outputs=1),
    "flow": dict(kind="directions", channels=3, outputs=3),
    "height": dict(kind="values", channels=1, outputs=1)}.items()}


@pytest.fixture
def own(monkeypatch):
    for name, task in OWN.items():
        monkeypatch.setitem(KNOWN, name, task)


def test_a_labels_kind_alone_says_how_it_is_warped(own):
    """Other names, same kinds, same labels; plain values only move; in a padded batch."""
    rooms = [render_room((0, 0, i), 40, 40 + 8 * i) for i in range(4)]
    torch.manual_seed(0)
    drawn = draw_augmentation(4, True, (0.75, 1.5), 20.0)
    _, expected = warp(collate(rooms), (32, 48), **drawn)
    _, labels = warp(collate([{
        "image": room["image"], "things": room["semseg"], "range": room["depth"],
        "flow": room["normals"], "height": room["depth"]} for room in rooms]), (32, 48), **drawn)
    for name, like in (("things", "semseg"), ("range", "depth"), ("flow", "normals")):
        assert torch.equal(labels[name], expected[like]), name
    scale = drawn["scale"][:, None, None, None]
    torch.testing.assert_close(labels["height"], expected["depth"] * scale)


def samples_of(sample, *names):
    """The first sample of a dataset that consists of it, checked."""
    tasks = make_tasks(list(names), 7)
    return Checked("mine", [sample], tasks)[0]


def test_a_label_may_come_as_an_array_and_a_single_channel_without_its_axis(own):
    """Values stay what they are, but for those that are not finite: these were not measured."""
    height = np.array([[0.25, -1.5, np.nan], [np.inf, 3, 0]])
    things = np.array([[0, 6, 255], [1, 2, 3]], np.int64)
    found = samples_of({"image": np.zeros((3, 2, 3), np.uint8), "height": height, "id": "a",
                        "things": things}, "height", "things")
    assert found["height"].tolist() == [[[0.25, -1.5, 0], [0, 3, 0]]]
    assert found["height"].dtype == torch.float32
    assert found["things"].tolist() == things.tolist() and found["things"].dtype == torch.uint8
    assert set(found) == {"image", "height", "things"}


@pytest.mark.parametrize("name, label, message", [
    ("things", torch.zeros(4, 6), r"things is \(4, 6\) of float32; expected \(4, 6\) of integers"),
    ("things", torch.zeros(4, 6, 3).byte(), r"things is \(4, 6, 3\) of uint8; expected \(4, 6\)"),
    ("things", torch.full((4, 6), 7), "things holds class 7; expected 0 to 6, or 255"),
    ("things", torch.full((4, 6), -1), "things holds class -1; expected 0 to 6, or 255"),
    ("semseg", torch.full((4, 6), 9), "semseg holds class 9; expected 0 to 6, or 255"),
    ("height", torch.zeros(4, 6).int(), r"height is \(4, 6\) of int32; expected \(1, 4, 6\) of fl"),
    ("height", torch.zeros(5, 6), r"height is \(1, 5, 6\) of float32; expected \(1, 4, 6\)"),
    ("flow", torch.zeros(4, 6, 3), r"flow is \(4, 6, 3\) of float32; expected \(3, 4, 6\) of fl"),
    ("flow", torch.zeros(4, 6), r"flow is \(1, 4, 6\) of float32; expected \(3, 4, 6\) of fl"),
    ("image", torch.zeros(4, 6, 3).byte(), r"image is \(4, 6, 3\) of uint8; expected \(3, H, W\)"),
    ("edge", None, "has no edge; it has image, things")])
def test_a_label_that_its_kind_does_not_allow_is_refused(own, name, label, message):
    """Its sample, its task, what it is and what it should be, in one line."""
    sample = {"image": torch.zeros(3, 4, 6).byte(), "things": torch.zeros(4, 6).byte()}
    sample |= {} if label is None else {name: label}
    with pytest.raises(ValueError, match=f"^mine: sample 0.*{message}"):
        samples_of(sample, "things" if name == "image" else name)


def test_datasets_are_opened_by_name(own, monkeypatch):
    """One's own is one more; what is unknown, empty, or has no such label or kind is said."""
    config = Namespace(dataset="mine", tasks=["semseg"], cache=True, data_root="here", size=(8, 8),
                       train_rooms=1, val_rooms=1)
    with pytest.raises(ValueError, match="unknown dataset 'mine'; expected one of rooms, nyud, "):
        open_dataset(config, "val")
    monkeypatch.setitem(DATASETS, "mine",
                        lambda config, split: Rooms(split, config.tasks, 2, (9, 9)))
    monkeypatch.setitem(CLASSES, "mine", 7)
    assert len(open_dataset(config, "val")) == 2
    monkeypatch.setitem(DATASETS, "mine", lambda config, split: [])
    with pytest.raises(ValueError, match="mine: no image for val under here"):
        open_dataset(config, "val")
    config.dataset, config.tasks = "rooms", ["semseg", "height"]
    with pytest.raises(ValueError, match="rooms has no labels for height; it has semseg, depth"):
        open_dataset(config, "val")
    monkeypatch.setattr(OWN["height"], "kind", "heights")
    with pytest.raises(ValueError, match="task height is of kind 'heights'; expected one of cl"):
        open_dataset(config, "val")


@pytest.mark.parametrize("name, part", [("height", "channels"), ("things", "classes"), *(
    ("height", part) for part in ("weight", "metric", "higher_is_better", "outputs", "valid",
                                  "totals", "loss", "sums", "metrics", "best_constant", "colours"))])
def test_an_own_task_is_looked_at_before_it_is_trained(name, part):
    """What it lacks is said by name, not by a trace after the first epoch."""
    task = copy(OWN[name])
    setattr(task, part, None)
    Checked("mine", [], [task])
    delattr(task, part)
    with pytest.raises(ValueError, match=f"^task {name} has no {part}: see tasks.py$"):
        Checked("mine", [], [task])


# --- batches ---
def test_batches_depend_on_seed_and_epoch_alone():
    """Every image once an epoch, another order the next; workers change nothing."""
    batches = epoch_batches(10, 3, 2, seed=5)
    assert len(batches) == 6 and batches == epoch_batches(10, 3, 2, seed=5)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert len(set(first)) == 9 and first != second
    rooms = Rooms("train", TASKS, 10, (16, 16))
    for a, b in zip(loader(rooms, batches), loader(rooms, batches, workers=2), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


# --- nyud ---
def test_real_images_of_three_sizes(nyud_archive, tmp_path, monkeypatch):
    """The archive and the folder give the same samples; encodings are as published."""
    monkeypatch.chdir(tmp_path)
    root = find_dataset("nyud", nyud_archive)
    assert find_dataset("nyud", root) == find_dataset("nyud", root.parent) == root
    train, val = NYUD(root), NYUD(root, "val")
    assert train.ids == ["433", "834", "1407", "basement_0000"] and val.ids == ["464", "972"]
    sizes = {s["image"].shape[1:] for s in train}
    assert sizes == {(480, 640), (468, 625), (425, 560)}
    raw = np.array(Image.open(root / "segmentation/433.png"))
    sample = train[0]
    assert (sample["semseg"].numpy()[raw > 0] == raw[raw > 0] - 1).all()
    assert (sample["semseg"].numpy()[raw == 0] == 255).all() and (raw == 0).any()
    np.testing.assert_array_equal(sample["depth"][0], np.load(root / "depth/433.npy"))
    np.testing.assert_allclose(sample["normals"].permute(1, 2, 0),
                               np.load(root / "normals/433.npy"), atol=1e-5)
    assert not train[1]["depth"].any() and (train[2]["semseg"] == 255).all()
    edges = Files("nyud", root, "train", ["edge"])
    np.testing.assert_array_equal(edges[0]["edge"], np.load(root / "edge/433.npy"))
    assert (edges[2]["edge"] == 255).all()  # nobody drew any


def test_the_png_archive_gives_the_same_samples(nyud_folder):
    """NYUDv2.tar.gz keeps images and normals as png: read to 8-bit accuracy, gaps kept as gaps."""
    before = NYUD(nyud_folder)[0]
    for path in nyud_folder.glob("normals/*.npy"):
        normals = np.load(path)
        Image.fromarray(((normals + 1) * 127.5).round().astype(np.uint8)).save(
            path.with_suffix(".png"))
        path.unlink()
    for path in nyud_folder.glob("images/*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    after = NYUD(nyud_folder)[0]
    assert torch.equal(after["image"], before["image"])
    exists = before["normals"].norm(dim=0) > 0.5
    assert torch.equal(after["normals"].norm(dim=0) > 0.5, exists)
    assert (after["normals"] - before["normals"]).abs().max() < 0.02


def break_label_shape(root):
    np.save(root / "depth/433.npy", np.ones((7, 9), np.float32))


def truncate_image(root):
    image = (root / "images/433.jpg").read_bytes()
    (root / "images/433.jpg").write_bytes(image[:len(image) // 2])


@pytest.mark.parametrize("damage, message", [
    (lambda root: (root / "depth/433.npy").unlink(), "no file depth/433.npy"),
    (lambda root: shutil.rmtree(root / "gt_sets"), "gt_sets/train.txt"),
    (lambda root: np.save(root / "normals/433.npy", 2 * np.load(root / "normals/433.npy")),
     "433.npy has normals of median length 2.00, expected 1"),
    (lambda root: Image.new("RGB", (640, 1)).save(root / "images/433.jpg"),
     "433.jpg: it is 640x1 pixels"),
    (truncate_image, "cannot read image .*433.jpg: .*truncated"),
    (break_label_shape, r"depth/433.npy has shape \(7, 9, 1\), expected \(480, 640, 1\)"),
    (lambda root: (root / "normals/433.npy").write_bytes(b"\x93NUMPY"), "cannot read .*433.npy"),
    (lambda root: Image.new("L", (640, 480), 41).save(root / "segmentation/433.png"),
     "433.png holds class 41"),
])
def test_damaged_files_are_named(nyud_folder, damage, message):
    damage(nyud_folder)
    with pytest.raises(ValueError, match=message):
        NYUD(nyud_folder)[0]


def test_nothing_there_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist.*NYUD_MT.tgz.*https://github.com"):
        find_dataset("nyud", tmp_path / "nowhere")


# --- pascal ---
def test_pascal_is_read_as_published(pascal_folder):
    """Four tasks of real images; parts of people only; normals where NYU knows the class."""
    train, val = (Files("pascal", pascal_folder, split, PASCAL) for split in ("train", "val"))
    assert train.ids == ["2008_000008", "2008_000009", "2008_000019"] and len(val) == 1
    person, cow, dogs = train
    assert person["image"].shape == (3, 442, 500)
    assert set(person["semseg"].unique().tolist()) == {0, 13, 15}
    assert set(person["human_parts"].unique().tolist()) == {0, 1, 2, 3, 4, 5, 6}
    assert (cow["human_parts"] == 255).all() and (dogs["human_parts"] == 255).all()
    assert set(val[0]["human_parts"].unique().tolist()) == {0, 1, 2, 3, 4, 5}  # no lower leg
    assert set(dogs["semseg"].unique().tolist()) == {0, 12}  # from semseg/pascal-context
    assert set(cow["sal"].unique().tolist()) == {0, 1}
    mat = scipy.io.loadmat(pascal_folder / "human_parts/2008_000008.mat")["anno"][0, 0]
    for part in mat["objects"][0, 0]["parts"][0]:  # the rider, read the hard way
        name, mask = part["part_name"][0], part["mask"].astype(bool)
        values = person["human_parts"][torch.from_numpy(mask)]
        assert (values == PARTS[name]).float().mean() > 0.5 or name in ("lear", "leye", "lebrow")
    context = scipy.io.loadmat(pascal_folder / "pascal-context/trainval/2008_000008.mat")
    valid = person["normals"].norm(dim=0) > 0.5
    png = np.array(Image.open(pascal_folder / "normals_distill/2008_000008.png")) / 127.5 - 1
    label = torch.from_numpy(context["LabelMap"].astype(int))
    assert len(set(NYU_CLASSES)) == 170
    assert valid[label == 158].all() and not valid[label == 207].any()  # 158 is NYU's too
    normal = png / np.linalg.norm(png, axis=-1, keepdims=True)
    np.testing.assert_allclose(person["normals"].permute(1, 2, 0)[valid], normal[valid], atol=1e-5)


def test_matlab_files_are_parsed_once_and_kept_elsewhere(pascal_folder, monkeypatch, capsys):
    """The second time nothing is parsed, unless a file changed; the dataset stays as it is."""
    before = sorted(pascal_folder.rglob("*"))
    first = Files("pascal", pascal_folder, "train", PASCAL)[0]
    assert "6 of 6 MATLAB files" in capsys.readouterr().out
    assert sorted(pascal_folder.rglob("*")) == before
    monkeypatch.setattr("datasets.labels.in_another_process",
                        lambda *a: pytest.fail("parsed again"))
    again = Files("pascal", pascal_folder, "train", PASCAL)[0]
    assert all(torch.equal(first[k], again[k]) for k in first)
    mat = pascal_folder / "human_parts/2008_000008.mat"
    before = mat.stat()
    for change in (mat.touch, lambda: mat.write_bytes(mat.read_bytes() + b"more")):
        change()
        os.utime(mat, ns=(0, before.st_mtime_ns - (change == mat.touch)))  # older, or as large
        with pytest.raises(pytest.fail.Exception, match="parsed again"):
            Files("pascal", pascal_folder, "train", PASCAL)


def save_mat(path, **content):
    scipy.io.savemat(path, content)


def person(*parts):
    """A person's annotation with parts of (name, mask)."""
    parts = np.array([(name, mask) for name, mask in parts],
                     dtype=[("part_name", "O"), ("mask", "O")])
    return {"objects": {"class": "person", "class_ind": 15, "parts": parts}}


ONES = np.ones((442, 500), np.uint8)


@pytest.mark.parametrize("name, damage, message", [
    ("human_parts", lambda p: p.unlink(), "no file human_parts/2008_000008.mat"),
    ("human_parts", lambda p: save_mat(p, other=1), "has no variable anno; it holds other"),
    ("human_parts", lambda p: save_mat(p, anno=3), "not an annotation of PASCAL-Part"),
    ("human_parts", lambda p: save_mat(p, anno=person(("tail", ONES))), "unknown part 'tail'"),
    ("human_parts", lambda p: save_mat(p, anno=person(("head", ONES), ("nose", ONES[1:]))),
     r"the mask of nose has shape \(441, 500\), others \(442, 500\)"),
    ("human_parts", lambda p: save_mat(p, anno=person(("head", ONES[1:]))),
     r"has shape \(441, 500\), expected \(442, 500\) as its image has"),
    ("human_parts", lambda p: save_mat(p, anno=person(("head", 1))), "mask has shape \\(\\)"),
    ("human_parts", lambda p: save_mat(p, anno=person(("head", "m"))), "mask has .* type <U1"),
    ("human_parts", lambda p: p.write_bytes(p.read_bytes()[:3000]), "cannot read .*000008.mat"),
    ("pascal-context/trainval", lambda p: save_mat(p, LabelMap=3), "LabelMap has shape \\(\\)"),
    ("pascal-context/trainval", lambda p: save_mat(p, LabelMap="map"), "LabelMap has .* type <U3"),
    ("pascal-context/trainval", lambda p: save_mat(p, LabelMap={"a": 1}), "LabelMap has .* object"),
    ("pascal-context/trainval", lambda p: save_mat(p, LabelMap=ONES[1:]),
     r"has shape \(441, 500\), expected \(442, 500\)"),
    ("pascal-context/trainval", lambda p: save_mat(p, Labels=ONES), "has no variable LabelMap"),
])
def test_damaged_matlab_files_are_named(pascal_folder, name, damage, message):
    damage(pascal_folder / name / "2008_000008.mat")
    with pytest.raises(ValueError, match=message):
        Files("pascal", pascal_folder, "train", PASCAL)[0]


def test_bad_splits_and_classes_are_named(pascal_folder):
    listing = pascal_folder / "ImageSets/Context/train.txt"
    listing.write_text("2008_000008\n2009_999999\n")
    with pytest.raises(ValueError, match="no file JPEGImages/2009_999999.jpg"):
        Files("pascal", pascal_folder, "train", PASCAL)
    listing.write_text("")
    with pytest.raises(ValueError, match="train.txt lists no image"):
        Files("pascal", pascal_folder, "train", PASCAL)
    with pytest.raises(ValueError, match="pascal has no labels for depth; it has semseg, human_pa"):
        Files("pascal", pascal_folder, "val", ["depth"])
    Image.new("L", (500, 375), 33).save(pascal_folder / "semseg/VOC12/2008_000026.png")
    with pytest.raises(ValueError, match="holds class 33, expected 0 to 20 or 255"):
        Files("pascal", pascal_folder, "val", PASCAL)[0]


def test_a_matlab_file_may_not_inflate_without_limit(tmp_path, monkeypatch):
    """300,000,000 zeros in a file of 1.3 MB; of a limit of 1 GiB, Python and torch take most."""
    n = 300_000_000
    numbers = np.array([6, 8, 6, 0, 5, 8, n // 1000, 1000, 1, 8], "<u4").tobytes() + b"LabelMap"
    packer = zlib.compressobj(1)
    packed = packer.compress(np.array([14, n + 64], "<u4").tobytes() + numbers)
    packed += packer.compress(np.array([2, n], "<u4").tobytes())
    packed += b"".join(packer.compress(bytes(n // 100)) for _ in range(100)) + packer.flush()
    path = tmp_path / "bomb.mat"
    path.write_bytes(b"MATLAB 5.0".ljust(124) + b"\0\1IM"
                     + np.array([15, len(packed)], "<u4").tobytes() + packed)
    monkeypatch.setattr(labels, "MAT_MEMORY", 1 << 30)
    labels.other_process.cache_clear()
    with pytest.raises(ValueError, match="bomb.mat: it needs more memory than"):
        labels.in_another_process(labels.known_to_nyu, path)
    labels.other_process.cache_clear()


# --- what a file can be instead of what it should be ---
@pytest.mark.parametrize("content, message", [
    (b"433\n834\n433\n", "train.txt lists 433 2 times"),
    ("433\n834\n".encode("utf-16"), "train.txt is not a list of image names"),
    (b"433\n\xe4\n", "train.txt is not a list of image names")])
def test_bad_lists_of_images_are_named(nyud_folder, content, message):
    """An image twice, another encoding; with a byte order mark the names are what they are."""
    listing = nyud_folder / "gt_sets/train.txt"
    listing.write_bytes(b"\xef\xbb\xbf433\n834\n")
    assert NYUD(nyud_folder).ids == ["433", "834"]
    listing.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        NYUD(nyud_folder)


@pytest.mark.parametrize("value", [-5, 3.5, np.nan, 300])
def test_classes_that_no_class_can_be_are_refused(tmp_path, value):
    """A TIFF by content holds negative numbers and fractions, whatever its name says."""
    Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    for read in (labels.read_nyud_classes, labels.read_voc_classes):
        with pytest.raises(ValueError, match=f"a.png holds class {float(value)}, expected 0"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("length", [0.04, 0.5, 1.8, 2, 255])
def test_normals_of_another_length_are_refused(tmp_path, length):
    """Whichever it is, with invalid pixels or without; a few are allowed, and left out."""
    normals = np.zeros((8, 8, 3), np.float32)
    normals[2:, :, 2] = length
    np.save(tmp_path / "a.npy", normals)
    with pytest.raises(ValueError, match=f"a.npy has normals of median length {length:.2f}, exp"):
        labels.read_normals(tmp_path / "a.npy")
    normals[3:, :, 2] = -1
    normals[2, 3:] = 0
    np.save(tmp_path / "a.npy", normals)
    read = labels.read_normals(tmp_path / "a.npy")
    assert (read[3:] == (0, 0, -1)).all() and not read[:3].any()


def test_normals_in_a_png_are_none_where_black_or_grey(tmp_path):
    """Both greys, and black, whose vector has a length of 1.73; a blue one points to the camera."""
    pixels = np.zeros((5, 8, 3), np.uint8)
    pixels[1], pixels[2], pixels[3:] = 127, 128, (128, 127, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = labels.read_normals(tmp_path / "a.png")
    assert not read[:3].any() and (abs(read[3:] - (0, 0, 1)) < 0.01).all()


@pytest.mark.parametrize("white", [1, 38, 255])
def test_masks_may_be_stored_as_0_and_1(tmp_path, white):
    """Or as any two values; where there are more, a map of greys, its half is the border."""
    truth = np.eye(8, dtype=np.uint8)
    Image.fromarray(truth * white).save(tmp_path / "a.png")
    assert (labels.read_mask(tmp_path / "a.png") == truth).all()
    assert (labels.read_edges(tmp_path / "a.png") == truth).all()
    Image.fromarray(np.array([[0, 1, 127, 128]] * 4, np.uint8)).save(tmp_path / "a.png")
    assert labels.read_mask(tmp_path / "a.png").tolist() == [[0, 0, 0, 1]] * 4


@pytest.mark.parametrize("size", [(60000, 4), (4, 60000), (640, 1), (3, 3)])
def test_images_of_absurd_sizes_are_refused(tmp_path, size):
    """A batch is padded to its largest image, and backbones begin with patches of 4 pixels."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"cannot read image .*a.png: it is {size[0]}x{size[1]} p"):
        labels.read_image(tmp_path / "a.png")


def test_a_photo_is_read_as_it_is_looked_at(tmp_path):
    """Turned as its EXIF data say, 16 bits of grey not clipped to 8, a huge one shrunk."""
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :6] = 200  # bright at the left as stored, at the top as seen
    Image.fromarray(pixels).save(path, exif=exif)
    assert labels.read_image(path).shape == (8, 12, 3)  # a label would lie on this one
    assert labels.read_image(path, photo=True).tolist() == pixels.transpose(1, 0, 2).tolist()
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(path)
    for photo in (False, True):
        assert (np.diff(labels.read_image(path, photo=photo)[..., 0].ravel().astype(int)) > 0).all()
    Image.new("L", (8000, 4000)).save(path)
    assert labels.read_image(path, photo=True).shape == (1024, 2048, 3)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4, 5)])
def test_arrays_of_other_dimensions_are_named(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.ones(shape, np.float32))
    for read in (labels.read_normals, labels.read_depth, labels.read_edges):
        with pytest.raises(ValueError, match="cannot read .*a.npy: its shape is"):
            read(tmp_path / "a.npy")
