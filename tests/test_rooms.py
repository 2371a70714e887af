"""Tests of rooms.py: a room has the statistics recorded here, and labels agree with the geometry
and with each other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rooms as rooms_module
from rooms import ROOM_CLASSES, Rooms, nearest_object, render_room


@pytest.fixture(scope="module")
def rooms():
    return [render_room((0, 0, i), 64, 64) for i in range(30)]


def test_a_room_is_the_same_on_every_machine():
    """Room 0 of the training split has the pixel counts and means that are recorded here."""
    room = render_room((0, 0, 0), 24, 32)
    assert room["image"].shape == (3, 24, 32)
    assert room["image"].dtype == room["semseg"].dtype == torch.uint8
    assert room["semseg"].flatten().bincount().tolist() == [104, 0, 399, 100, 0, 33, 132]
    assert room["human_parts"].flatten().bincount().tolist() == [636, 18, 50, 24, 7, 27, 6]
    assert (room["sal"].sum(), room["edge"].sum()) == (132, 343)
    assert room["depth"].mean().item() == pytest.approx(2.78582, abs=1e-4)
    colours = room["image"].float().mean((1, 2)).tolist()
    assert colours == pytest.approx([168.591, 165.283, 182.376], abs=0.02)


def test_a_night_camera_changes_the_image_but_no_label():
    """At night, a room has 0.35 of its brightness by day, and noise of standard deviation 14.

    The noise depends on the room's seed only.
    """
    day = render_room((0, 0, 0), 112, 112)
    night = render_room((0, 0, 0), 112, 112, night=True)
    assert all(torch.equal(day[name], night[name]) for name in day if name != "image")
    noise = night["image"].float() - 0.35 * day["image"]
    bright = day["image"] > 120                         # there, no value is cut off at 0
    assert bright.sum() > 1000
    assert noise[bright].mean().abs() < 1               # rounding down makes it about -0.3
    assert noise[bright].std() == pytest.approx(14, abs=0.5)
    assert (night["image"][~bright] == 0).any()
    other = render_room((0, 0, 1), 112, 112, night=True)["image"].float()
    other -= 0.35 * render_room((0, 0, 1), 112, 112)["image"]
    assert np.corrcoef(noise.flatten(), other.flatten())[0, 1] < 0.1


def test_a_dataset_of_rooms():
    """Different splits, seeds and indices give different rooms. Samples have the requested labels,
    and requesting a label that rooms do not have is an error."""
    train = Rooms("train", ["depth", "sal"], 4, (24, 32))
    assert len(train) == 4 and list(train[0]) == ["image", "depth", "sal"]
    assert torch.equal(train[3]["image"], render_room((0, 0, 3), 24, 32)["image"])
    val = Rooms("val", ["depth"], 4, (24, 32), seed=5)
    assert torch.equal(val[2]["image"], render_room((5, 1, 2), 24, 32)["image"])
    dark = Rooms("val", ["depth"], 4, (24, 32), seed=5, night=True)
    assert torch.equal(dark[2]["image"], render_room((5, 1, 2), 24, 32, night=True)["image"])
    different = [train[0], train[1], val[0], Rooms("val", [], 4, (24, 32))[0]]
    assert len({sample["image"].float().mean().item() for sample in different}) == 4
    with pytest.raises(ValueError, match="no labels for height; they have semseg, depth, normals"):
        Rooms("val", ["height"], 4, (24, 32))[0]


def test_depth_and_normals_agree():
    """All normals have length 1 and face the camera.

    Two adjacent pixels of a row with equal normals lie on the same plane in over 90 % of cases: the
    line between their 3-D points is perpendicular to the normal.
    """
    H = W = 64
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    focal = 0.8 * W
    ray = torch.stack([(x - W / 2) / focal, (y - H / 2) / focal, -torch.ones(H, W)])
    for i in range(5):
        room = render_room((1, 0, i), H, W)
        points = ray * room["depth"]                        # x right, y down, z towards the camera
        n = room["normals"]
        torch.testing.assert_close(n.norm(dim=0), torch.ones(H, W))
        assert ((n * ray).sum(0) < 1e-6).all()              # every visible surface faces the camera
        step = points[:, :, 1:] - points[:, :, :-1]
        flat = (n[:, :, 1:] - n[:, :, :-1]).norm(dim=0) < 1e-6
        off_plane = (step * n[:, :, 1:]).sum(0).abs()
        assert (off_plane[flat] < 1e-4).float().mean() > 0.9     # the rest span two surfaces


def test_every_room_shows_a_person(rooms):
    """In each of 30 rooms, a person is visible at a mean depth of 1.4 to 2.8 m. The person covers
    3 to 25 % of the image and shows at least four of the six parts."""
    shares, parts, distances = [], [], []
    for room in rooms:
        person = room["semseg"] == ROOM_CLASSES.index("person")
        assert torch.equal(room["human_parts"] > 0, person)
        shares.append(person.float().mean().item())
        parts.append(len(room["human_parts"].unique()) - 1)
        distances.append(room["depth"][0][person].mean().item())
    # The sum would be lower if furniture hid more of the people.
    assert sum(shares) == pytest.approx(2.6567, abs=0.002)
    assert 0.03 < min(shares) < 0.06 and 0.1 < max(shares) < 0.25
    assert min(parts) >= 4 and parts.count(6) > 20
    assert 1.4 < min(distances) < 1.8 and 2.2 < max(distances) < 2.8


def test_shortcuts_of_the_renderer_change_nothing(monkeypatch):
    """The renderer skips rays that cannot hit a shape (`rays_near`). Keeping all rays gives the
    same images and labels."""
    fast = [render_room((0, 0, i), 48, 48) for i in range(12)]
    monkeypatch.setattr(rooms_module, "rays_near", lambda eye, rays, centre, radius:
                        np.arange(len(rays)))
    for i, room in enumerate(fast):
        for name, value in render_room((0, 0, i), 48, 48).items():
            assert torch.equal(value, room[name]), name


def test_an_object_of_a_few_pixels_is_not_salient():
    """The nearest object covers only 0.5 % of the image, so the next one, with 1 %, is salient.

    Another one has a nearer pixel, but its mean depth is larger. The room itself does not count.
    """
    number = np.array([0] + [1] * 2 + [2] * 97 + [-1] * 100)
    t = np.array([1.0] + [2.0] * 2 + [1.5] + [3.0] * 96 + [0.5] * 100)
    assert nearest_object(t, number).nonzero()[0].tolist() == [1, 2]


def test_edges_are_where_surfaces_meet(rooms):
    """Pixels on both sides of a border between classes, or of a sharp fold, are edges. Away from
    edges, normals turn by at most 30 degrees from pixel to pixel."""
    for room in rooms[:6]:
        edge, label, n = room["edge"] == 1, room["semseg"], room["normals"]
        border = label[:, 1:] != label[:, :-1]
        assert edge[:, 1:][border].all() and edge[:, :-1][border].all()
        fold = (n[:, 1:] * n[:, :-1]).sum(0) < 0.5      # over 60 degrees, as at corners
        assert edge[1:][fold].all() and edge[:-1][fold].all() and fold.any()
        assert 0.03 < edge.float().mean() < 0.3
        near_edge = F.max_pool2d(edge[None].float(), 3, 1, 1)[0] > 0
        bend = (n[:, :, 1:] - n[:, :, :-1]).norm(dim=0)
        assert bend[~near_edge[:, 1:]].max() < 0.53         # normals 30 degrees apart: 0.52
