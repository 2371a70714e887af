"""Rendered rooms: a small ray caster, whose images come with exact labels for any seed and size.

A room with boxes, spheres and cylinders, sometimes with a person made of capsules, textured and lit
by one lamp, seen by a camera at eye height; the nearest object is the salient one. It needs no
download and has no label noise, so the whole method can be run, taught and tested on it; room
(seed, split, i) is the same on every machine.

    sample = render_room((0, 0, 7), 112, 112)  # the image and all labels

World: x, y on the floor, z up, metres. A ray is o + t * d; every shape answers with t (P,) of its
nearest hit (inf where it is missed) and the outward normals n there (P, 3), for P pixels. The
order of the random draws is part of what a seed means.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

ROOM_CLASSES = ("floor", "ceiling", "wall", "box", "sphere", "cylinder", "person")
SALIENT = 0.01  # the least share of the picture that a salient object covers
FOLD = np.cos(np.deg2rad(30))  # of two neighbouring normals: where a box has an edge


def hit_slabs(o: np.ndarray, d: np.ndarray, low: np.ndarray, high: np.ndarray, inside: bool):
    """An axis-aligned box, seen from outside, or from inside: the room itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t0, t1 = (low - o) / d, (high - o) / d
    near, far = np.minimum(t0, t1), np.maximum(t0, t1)  # (P, 3)
    axis = far.argmin(1) if inside else near.argmax(1)
    rows = np.arange(len(d))
    t = (far if inside else near)[rows, axis]
    n = np.zeros_like(d)
    n[rows, axis] = -np.sign(d[rows, axis])
    missed = (t <= 0) if inside else (near.max(1) > far.min(1)) | (near.max(1) <= 0)
    return np.where(missed, np.inf, t), n


def hit_sphere(o: np.ndarray, d: np.ndarray, radius: float):
    """A sphere around the origin; the same quadratic in x and y alone is an endless cylinder."""
    a, b, c = (d * d).sum(1), (d * o).sum(1), (o * o).sum() - radius ** 2
    root = b * b - a * c
    t = (-b - np.sqrt(np.maximum(root, 0))) / a
    t = np.where((root > 0) & (t > 0), t, np.inf)
    return t, (o + np.where(np.isfinite(t), t, 0)[:, None] * d) / radius


def hit_cylinder(o: np.ndarray, d: np.ndarray, radius: float, height: float):
    """A cylinder standing on z = 0, with its lid."""
    flat = np.array([1.0, 1.0, 0.0])
    t, n = hit_sphere(o * flat, d * flat + 1e-12, radius)
    z = o[2] + np.where(np.isfinite(t), t, 0) * d[:, 2]
    t = np.where((z < 0) | (z > height), np.inf, t)
    t_lid = (height - o[2]) / np.where(d[:, 2] == 0, 1e-12, d[:, 2])
    on_lid = (t_lid > 0) & (((o + t_lid[:, None] * d)[:, :2] ** 2).sum(1) < radius ** 2)
    lid = on_lid & (t_lid < t)
    return np.where(lid, t_lid, t), np.where(lid[:, None], np.array([0.0, 0.0, 1.0]), n * flat)


def hit_capsule(o: np.ndarray, d: np.ndarray, a: np.ndarray, b: np.ndarray, radius: float):
    """A tube from a to b with round ends: an endless cylinder between two spheres."""
    axis = (b - a) / np.linalg.norm(b - a)
    across = np.eye(3) - np.outer(axis, axis)  # what is left without the part along the axis
    t, n = hit_sphere((o - a) @ across, d @ across, radius)
    along = (o - a + np.where(np.isfinite(t), t, 0)[:, None] * d) @ axis
    t = np.where((along < 0) | (along > np.linalg.norm(b - a)), np.inf, t)
    for end in (a, b):
        t_end, n_end = hit_sphere(o - end, d, radius)
        front = t_end < t
        t, n = np.where(front, t_end, t), np.where(front[:, None], n_end, n)
    return t, n


def pose_person(rng: np.random.Generator) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
    """Capsules of a person standing at the origin: (part 1..6, end, end, radius), in metres.

    Parts as in PASCAL: head, torso, upper arms, lower arms, upper legs, lower legs.
    """
    def limb(start: np.ndarray, length: float, spread: float) -> np.ndarray:
        swing, out = rng.uniform(-0.6, 0.6), spread * rng.uniform(0.1, 0.6)
        down = np.array([np.sin(out), np.sin(swing), -np.cos(swing) * np.cos(out)])
        return start + length * down / np.linalg.norm(down)

    hips, neck = np.array([0, 0, 0.95]), np.array([0, 0, 1.42])
    parts = [(1, neck + [0, 0, 0.15], neck + [0, 0, 0.2], 0.11),
             (2, hips, neck - [0, 0, 0.1], 0.15)]
    for side in (-1, 1):
        shoulder, hip = neck + [0.21 * side, 0, -0.06], hips + [0.1 * side, 0, -0.05]
        elbow = limb(shoulder, 0.3, side)
        parts += [(3, shoulder, elbow, 0.055),
                  (4, elbow, limb(elbow, 0.28, 0.2 * side), 0.8 * 0.055)]
        knee = limb(hip, 0.42, 0.3 * side)
        parts += [(5, hip, knee, 0.085),
                  (6, knee, limb(knee, 0.42, 0.2 * side), 0.8 * 0.085)]
    return parts


def rotation(angle: float) -> np.ndarray:
    """Matrix that turns x toward y by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def place_camera(rng: np.random.Generator, room: np.ndarray) -> tuple:
    """Where the camera stands (3,), its turn to the left, and its axes: right, down, forward."""
    eye = np.array([rng.uniform(0.3, 0.7) * room[0], rng.uniform(0.4, 1.0), rng.uniform(1.4, 1.6)])
    yaw, pitch = rng.uniform(-0.5, 0.5), rng.uniform(0.15, 0.3)
    forward = rotation(yaw) @ [0, np.cos(pitch), -np.sin(pitch)]
    right = rotation(yaw) @ [1, 0, 0]
    return eye, yaw, np.stack([right, np.cross(forward, right), forward])


def cover(view: dict[str, np.ndarray], t: np.ndarray, n: np.ndarray, **labels: int) -> None:
    """Put one more shape into the view, where it is nearer than what is seen there."""
    nearer = t < view["t"]
    view["n"] = np.where(nearer[:, None], n, view["n"])
    for name, value in {"t": t, **labels}.items():
        view[name] = np.where(nearer, value, view[name])


def trace(rng: np.random.Generator, room, eye, yaw: float, rays, n_objects: int) -> dict:
    """Furnish the room; what each ray (P, 3) meets first: t, n, and its labels, each (P,).

    label: the class; part: of a person, else 0; number: of the object, -1 for the room itself.
    """
    t, n = hit_slabs(eye, rays, np.zeros(3), room, inside=True)
    label = np.where(n[:, 2] > 0.5, 0, np.where(n[:, 2] < -0.5, 1, 2))  # floor, ceiling, wall
    view = {"t": t, "n": n, "label": label, "part": np.zeros_like(label),
            "number": np.full_like(label, -1)}
    for i in range(n_objects):
        kind = int(rng.integers(3))
        to_object = rotation(rng.uniform(0, np.pi))  # from the world's axes to the object's
        size = rng.uniform((0.3, 0.3, 0.3), (1.2, 0.9, 1.5))
        at = np.array([rng.uniform(0.1, 0.9) * room[0], rng.uniform(0.35, 0.95) * room[1], 0.0])
        o, d = to_object @ (eye - at), rays @ to_object.T
        if kind == 0:
            half = np.array([size[0] / 2, size[1] / 2, 0])
            t, n = hit_slabs(o, d, -half, half + [0, 0, size[2]], inside=False)
        elif kind == 1:
            t, n = hit_sphere(o - [0, 0, size[0] / 2], d, size[0] / 2)
        else:
            t, n = hit_cylinder(o, d, size[1] / 2, size[2])
        cover(view, t, n @ to_object, label=3 + kind, number=i)
    if rng.random() < 0.5:  # a person, in front of the camera
        to_person = rotation(rng.uniform(0, 2 * np.pi))
        ahead = rotation(yaw + rng.uniform(-0.35, 0.35)) @ [0, 1, 0]
        at = eye * [1, 1, 0] + ahead * rng.uniform(1.8, 3.2)
        o, d = to_person @ (eye - at), rays @ to_person.T
        for part, a, b, radius in pose_person(rng):
            t, n = hit_capsule(o, d, a, b, radius)
            cover(view, t, n @ to_person, label=6, part=part, number=n_objects)
    return view


def nearest_object(t: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The salient pixels (P,): the object of the least mean depth that is large enough."""
    nearest, salient = np.inf, np.zeros_like(number)
    for i in range(number.max() + 1):
        mask = number == i
        if mask.mean() >= SALIENT and t[mask].mean() < nearest:
            nearest, salient = t[mask].mean(), mask
    return salient


def borders(surface: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The pixels (H, W) beside a border of surfaces (H, W), or a fold of normals n (H, W, 3)."""
    edge = np.zeros(surface.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (surface[a] != surface[b]) | ((n[a] * n[b]).sum(-1) < FOLD)
        edge[a] |= differ
        edge[b] |= differ
    return edge


def shade(rng: np.random.Generator, room, point, n, surface, n_surfaces: int) -> np.ndarray:
    """Colours (P, 3) of points (P, 3) with normals n on numbered surfaces, lit by one lamp.

    Solid textures: a product of two waves through space, soft or as a checker, on a base colour.
    """
    base, tint = rng.uniform(0.25, 0.9, (n_surfaces, 3)), rng.uniform(-0.35, 0.35, (n_surfaces, 3))
    waves = rng.normal(0, 1, (2, n_surfaces, 3)) * rng.uniform(2, 12, (1, n_surfaces, 1))
    hard = rng.random(n_surfaces) < 0.4
    wave = np.prod([np.sin((point * k[surface]).sum(1)) for k in waves], axis=0)
    wave = np.where(hard[surface], np.sign(wave), wave)
    lamp = room * rng.uniform((0.3, 0.2, 0.8), (0.7, 0.6, 0.95))
    to_lamp = lamp - point
    distance = np.linalg.norm(to_lamp, axis=1)
    lambert = np.maximum(0, (n * to_lamp).sum(1) / distance) / (1 + 0.08 * distance ** 2)
    return (base[surface] + wave[:, None] * tint[surface]) * (0.35 + 0.9 * lambert)[:, None]


def render_room(seed: Sequence[int], height: int, width: int, axes: np.ndarray | None = None,
                zoom: float = 1.0) -> dict[str, Tensor]:
    """A furnished room seen by a camera: the image and its exact labels, as one sample.

    seed: integers; the same ones give the same room at any size. axes (3, 3): the picture's right,
    down and forward in the camera's own, to turn or mirror the view; zoom: of the focal length.
    """
    rng = np.random.Generator(np.random.PCG64(list(seed)))
    room = rng.uniform((3.5, 4.0, 2.4), (6.0, 7.0, 3.2))
    eye, yaw, frame = place_camera(rng, room)
    if axes is not None:
        frame = axes @ frame
    focal = 0.8 * max(height, width) * zoom
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    plane = np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)
    rays = plane.reshape(-1, 3) @ frame  # (P, 3); one metre forward each, so t is the depth

    n_objects = int(rng.integers(3, 8))
    t, n, label, part, number = trace(rng, room, eye, yaw, rays, n_objects).values()
    # A texture for each surface: the room's three, one an object, and a person's six.
    surface = np.where(number < 0, label, 3 + number + np.maximum(part - 1, 0))
    colour = shade(rng, room, eye + t[:, None] * rays, n, surface, 3 + n_objects + 6)

    def as_map(a: np.ndarray, dtype: type) -> Tensor:
        a = a.reshape(height, width, -1).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(a, dtype=dtype))

    return {"image": as_map(colour.clip(0, 1) * 255, np.uint8),
            "semseg": as_map(label, np.uint8)[0],
            "depth": as_map(t, np.float32),
            "normals": as_map(n @ frame.T * [1, 1, -1], np.float32),
            "human_parts": as_map(part if part.any() else part + 255, np.uint8)[0],
            "sal": as_map(nearest_object(t, number), np.uint8)[0],
            "edge": as_map(borders(surface.reshape(height, width), n.reshape(height, width, 3)),
                           np.uint8)[0]}


class Rooms(Dataset):
    """`length` rendered rooms; room i of a split and seed is the same on every machine."""

    def __init__(self, split: str, tasks: Sequence[str], length: int, size: Sequence[int],
                 seed: int = 0):
        self.key, self.size, self.tasks = (seed, split == "val"), tuple(size), list(tasks)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample = render_room((*self.key, i), *self.size)
        if unknown := [task for task in self.tasks if task not in sample]:
            raise ValueError(f"rooms has no labels for {', '.join(unknown)}; it has "
                             f"{', '.join(kind for kind in sample if kind != 'image')}")
        return {kind: sample[kind] for kind in ("image", *self.tasks)}
