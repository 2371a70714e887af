"""rooms.py: the same rooms everywhere, and labels that agree with geometry and with each other."""

import pytest
import torch
import torch.nn.functional as F

from rooms import ROOM_CLASSES, Rooms, render_room


@pytest.fixture(scope="module")
def rooms():
    return [render_room((0, 0, i), 64, 64) for i in range(30)]


def test_a_room_is_the_same_on_every_machine():
    """Room 0 of the training split, pinned to numbers."""
    room = render_room((0, 0, 0), 24, 32)
    assert room["image"].shape == (3, 24, 32)
    assert room["image"].dtype == room["semseg"].dtype == torch.uint8
    assert room["semseg"].flatten().bincount().tolist() == [98, 0, 336, 66, 14, 168, 86]
    assert room["human_parts"].flatten().bincount().tolist() == [682, 9, 27, 9, 7, 19, 15]
    assert (room["sal"].sum(), room["edge"].sum()) == (36, 312)
    assert room["depth"].mean().item() == pytest.approx(2.73069, abs=1e-4)
    colours = room["image"].float().mean((1, 2)).tolist()
    assert colours == pytest.approx([107.249, 101.221, 125.171], abs=0.02)


def test_a_dataset_of_rooms():
    """Splits, seeds and indices give different rooms; samples have the labels that were asked for.
    """
    train = Rooms("train", ["depth", "sal"], 4, (24, 32))
    assert len(train) == 4 and list(train[0]) == ["image", "depth", "sal"]
    assert torch.equal(train[3]["image"], render_room((0, 0, 3), 24, 32)["image"])
    val = Rooms("val", ["depth"], 4, (24, 32), seed=5)
    assert torch.equal(val[2]["image"], render_room((5, 1, 2), 24, 32)["image"])
    different = [train[0], train[1], val[0], Rooms("val", [], 4, (24, 32))[0]]
    assert len({sample["image"].float().mean().item() for sample in different}) == 4
    with pytest.raises(ValueError, match="no labels for height; they have semseg, depth, normals"):
        Rooms("val", ["height"], 4, (24, 32))[0]


def test_depth_and_normals_agree():
    """Neighbouring points of a surface, placed by their depth, lie in the plane of its normal."""
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
        assert (off_plane[flat] < 1e-4).float().mean() > 0.9     # the rest are borders of objects


def test_people_have_six_parts(rooms):
    """Parts are where the class is person; a room without a person is ignored for human_parts."""
    seen = [set(room["human_parts"].unique().tolist()) for room in rooms]
    assert {0, 1, 2, 3, 4, 5, 6} in seen
    assert seen.count({255}) == 19                          # about half of the rooms
    for room in rooms:
        part = (room["human_parts"] > 0) & (room["human_parts"] < 255)
        assert torch.equal(part, room["semseg"] == ROOM_CLASSES.index("person"))


def test_the_salient_object_is_the_nearest(rooms):
    """It is one object, not too small, and no other large object is clearly nearer."""
    shares = []
    for room in rooms:
        salient = room["sal"] == 1
        shares.append(salient.float().mean())
        classes = room["semseg"][salient].unique()
        assert len(classes) == 1 and classes[0] > 2         # none of floor, ceiling and wall
        depth = room["depth"][0]
        for other in range(3, 7):
            others = room["semseg"] == other
            if others.float().mean() > 0.05:
                assert depth[salient].mean() < depth[others].mean() + 0.2
    assert 0.01 <= min(shares) < 0.025 and max(shares) < 0.5


def test_edges_are_where_surfaces_meet(rooms):
    """At every border of two classes and at every fold, but not on flat or round surfaces."""
    for room in rooms[:6]:
        edge, label, n = room["edge"] == 1, room["semseg"], room["normals"]
        border = label[:, 1:] != label[:, :-1]
        assert edge[:, 1:][border].all() and edge[:, :-1][border].all()
        fold = (n[:, 1:] * n[:, :-1]).sum(0) < 0.5          # 60 degrees: corners of boxes and rooms
        assert edge[1:][fold].all() and edge[:-1][fold].all() and fold.any()
        assert 0.03 < edge.float().mean() < 0.3
        near_edge = F.max_pool2d(edge[None].float(), 3, 1, 1)[0] > 0
        bend = (n[:, :, 1:] - n[:, :, :-1]).norm(dim=0)
        assert bend[~near_edge[:, 1:]].max() < 0.53         # a chord of 30 degrees has 0.52
