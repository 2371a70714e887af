"""Rendered rooms: a small ray caster that gives images with exact labels, at any seed and size.

A room contains boxes, spheres, cylinders and sometimes a person made of capsules. Surfaces have
textures and one lamp lights them; the nearest object is the salient one. There is nothing to
download and no label noise, so the whole method can be run, taught and tested on these images.
Room (seed, split, i) is the same on every machine.

    sample = render_room((0, 0, 7), 112, 112)       # the image and all labels

World coordinates are in metres: x and y on the floor, z up. A ray is o + t * d. Each `hit_...`
function takes rays from o (3,) along d (P, 3), and returns t (P,) of the nearest hit, inf if the
ray misses, and the surface normal there (P, 3). P is the number of pixels. The order in which
random numbers are drawn defines a room: changing it changes every image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray as Array
from numpy.random import PCG64, Generator
from torch import Tensor
from torch.utils.data import Dataset

ROOM_CLASSES = ("floor", "ceiling", "wall", "box", "sphere", "cylinder", "person")
FLOOR, CEILING, WALL, BOX, SPHERE, CYLINDER, PERSON = range(7)
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)       # as in PASCAL; 0: none
SALIENT = 0.01                  # a salient object covers at least this share of the image
FOLD = np.cos(np.deg2rad(30))   # where the normals of neighbours differ by more, there is an edge


# --- shapes ---------------------------------------------------------------------------------------
def hit_slabs(o: Array, d: Array, low: Array, high: Array, inside: bool) -> tuple[Array, Array]:
    """An axis-aligned box from `low` to `high`, seen from outside, or from inside (the room)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t0 = (low - o) / d
        t1 = (high - o) / d
    near = np.minimum(t0, t1)                                           # (P, 3), one per axis
    far = np.maximum(t0, t1)
    if inside:
        axis = far.argmin(1)
        t = far.min(1)
        missed = t <= 0
    else:
        axis = near.argmax(1)
        t = near.max(1)
        missed = (t > far.min(1)) | (t <= 0)
    rows = np.arange(len(d))
    normal = np.zeros_like(d)
    normal[rows, axis] = -np.sign(d[rows, axis])
    return np.where(missed, np.inf, t), normal


def hit_sphere(o: Array, d: Array, radius: float) -> tuple[Array, Array]:
    """A sphere around the origin. With o and d projected on a plane, it is an endless cylinder."""
    a = (d * d).sum(1)                                                  # |o + t d|^2 = radius^2
    b = (d * o).sum(1)
    c = (o * o).sum() - radius ** 2
    root = b * b - a * c
    t = (-b - np.sqrt(np.maximum(root, 0))) / a
    hit = (root > 0) & (t > 0)
    t = np.where(hit, t, np.inf)
    point = o + np.where(hit, t, 0)[:, None] * d
    return t, point / radius


def hit_cylinder(o: Array, d: Array, radius: float, height: float) -> tuple[Array, Array]:
    """A cylinder that stands on z = 0 around the z axis, with a lid."""
    flat = np.array([1.0, 1.0, 0.0])
    up = np.array([0.0, 0.0, 1.0])
    t, normal = hit_sphere(o * flat, d * flat + 1e-12, radius)
    z = o[2] + np.where(np.isfinite(t), t, 0) * d[:, 2]
    t = np.where((z < 0) | (z > height), np.inf, t)

    slope = np.where(d[:, 2] == 0, 1e-12, d[:, 2])
    t_lid = (height - o[2]) / slope
    point = o + t_lid[:, None] * d
    on_lid = (t_lid > 0) & ((point[:, :2] ** 2).sum(1) < radius ** 2)
    lid_is_nearer = on_lid & (t_lid < t)
    t = np.where(lid_is_nearer, t_lid, t)
    normal = np.where(lid_is_nearer[:, None], up, normal * flat)
    return t, normal


def hit_capsule(o: Array, d: Array, a: Array, b: Array, radius: float) -> tuple[Array, Array]:
    """A tube from a to b with round ends: part of an endless cylinder, and two spheres."""
    length = np.linalg.norm(b - a)
    axis = (b - a) / length
    across = np.eye(3) - np.outer(axis, axis)       # projects on the plane perpendicular to axis
    t, normal = hit_sphere((o - a) @ across, d @ across, radius)
    along = (o - a + np.where(np.isfinite(t), t, 0)[:, None] * d) @ axis
    t = np.where((along < 0) | (along > length), np.inf, t)
    for end in (a, b):
        t_end, normal_end = hit_sphere(o - end, d, radius)
        nearer = t_end < t
        t = np.where(nearer, t_end, t)
        normal = np.where(nearer[:, None], normal_end, normal)
    return t, normal


# --- the scene ------------------------------------------------------------------------------------
def rotation(angle: float) -> Array:
    """The matrix that turns x towards y by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def pose_limb(rng: Generator, start: Array, length: float, spread: float) -> Array:
    """The lower end of a limb that hangs from `start` and swings at random."""
    swing = rng.uniform(-0.6, 0.6)
    out = spread * rng.uniform(0.1, 0.6)
    down = np.array([np.sin(out), np.sin(swing), -np.cos(swing) * np.cos(out)])
    return start + length * down / np.linalg.norm(down)


def pose_person(rng: Generator) -> list[tuple[int, Array, Array, float]]:
    """A person standing at the origin, as capsules: (part, one end, other end, radius)."""
    hips = np.array([0, 0, 0.95])
    neck = np.array([0, 0, 1.42])
    capsules = [
        (HEAD, neck + [0, 0, 0.15], neck + [0, 0, 0.2], 0.11),
        (TORSO, hips, neck - [0, 0, 0.1], 0.15),
    ]
    for side in (-1, 1):
        shoulder = neck + [0.21 * side, 0, -0.06]
        elbow = pose_limb(rng, shoulder, 0.3, side)
        hand = pose_limb(rng, elbow, 0.28, 0.2 * side)
        hip = hips + [0.1 * side, 0, -0.05]
        knee = pose_limb(rng, hip, 0.42, 0.3 * side)
        foot = pose_limb(rng, knee, 0.42, 0.2 * side)
        capsules.append((UPPER_ARM, shoulder, elbow, 0.055))
        capsules.append((LOWER_ARM, elbow, hand, 0.8 * 0.055))
        capsules.append((UPPER_LEG, hip, knee, 0.085))
        capsules.append((LOWER_LEG, knee, foot, 0.8 * 0.085))
    return capsules


def place_camera(rng: Generator, room: Array) -> tuple[Array, float, Array]:
    """The camera's position (3,), its turn to the left in radians, and its axes (3, 3).

    The axes' rows point right, down and forward in the picture.
    """
    x = rng.uniform(0.3, 0.7) * room[0]
    y = rng.uniform(0.4, 1.0)
    z = rng.uniform(1.4, 1.6)                                           # eye height
    yaw = rng.uniform(-0.5, 0.5)
    pitch = rng.uniform(0.15, 0.3)
    forward = rotation(yaw) @ [0, np.cos(pitch), -np.sin(pitch)]
    right = rotation(yaw) @ [1, 0, 0]
    down = np.cross(forward, right)
    return np.array([x, y, z]), yaw, np.stack([right, down, forward])


def cover(view: dict[str, Array], t: Array, normal: Array, **labels: int) -> None:
    """Draw one more shape into the view, where it is nearer than everything so far."""
    nearer = t < view["t"]
    view["t"] = np.where(nearer, t, view["t"])
    view["normal"] = np.where(nearer[:, None], normal, view["normal"])
    for name, value in labels.items():
        view[name] = np.where(nearer, value, view[name])


def view_room(eye: Array, rays: Array, room: Array) -> dict[str, Array]:
    """The empty room, as every ray sees it: arrays (P,), except normal (P, 3).

    t: the distance along the ray. semseg: the class. part: of a person, 0 elsewhere.
    number: which object it is, -1 for the room itself.
    """
    t, normal = hit_slabs(eye, rays, np.zeros(3), room, inside=True)
    semseg = np.full(len(rays), WALL)
    semseg[normal[:, 2] > 0.5] = FLOOR
    semseg[normal[:, 2] < -0.5] = CEILING
    return {"t": t, "normal": normal, "semseg": semseg, "part": np.zeros_like(semseg),
            "number": np.full_like(semseg, -1)}


def add_object(rng: Generator, view: dict[str, Array], eye: Array, rays: Array, room: Array,
               number: int) -> None:
    """Place a random box, sphere or cylinder on the floor."""
    shape = BOX + int(rng.integers(3))
    to_object = rotation(rng.uniform(0, np.pi))     # from the world's axes to the object's
    size = rng.uniform((0.3, 0.3, 0.3), (1.2, 0.9, 1.5))
    x = rng.uniform(0.1, 0.9) * room[0]
    y = rng.uniform(0.35, 0.95) * room[1]
    o = to_object @ (eye - np.array([x, y, 0.0]))
    d = rays @ to_object.T
    if shape == BOX:
        low = np.array([-size[0] / 2, -size[1] / 2, 0])
        high = np.array([size[0] / 2, size[1] / 2, size[2]])
        t, normal = hit_slabs(o, d, low, high, inside=False)
    elif shape == SPHERE:
        radius = size[0] / 2
        t, normal = hit_sphere(o - [0, 0, radius], d, radius)
    else:
        t, normal = hit_cylinder(o, d, size[1] / 2, size[2])
    cover(view, t, normal @ to_object, semseg=shape, number=number)


def add_person(rng: Generator, view: dict[str, Array], eye: Array, rays: Array, yaw: float,
               number: int) -> None:
    """Place a person on the floor in front of the camera."""
    to_person = rotation(rng.uniform(0, 2 * np.pi))
    ahead = rotation(yaw + rng.uniform(-0.35, 0.35)) @ [0, 1, 0]
    position = eye * [1, 1, 0] + ahead * rng.uniform(1.8, 3.2)
    o = to_person @ (eye - position)
    d = rays @ to_person.T
    for part, a, b, radius in pose_person(rng):
        t, normal = hit_capsule(o, d, a, b, radius)
        cover(view, t, normal @ to_person, semseg=PERSON, part=part, number=number)


# --- labels and colours ---------------------------------------------------------------------------
def nearest_object(t: Array, number: Array) -> Array:
    """The salient pixels (P,): those of the object with the smallest mean depth.

    Objects that cover less than SALIENT of the image do not count.
    """
    smallest = np.inf
    salient = np.zeros_like(number)
    for i in range(number.max() + 1):
        pixels = number == i
        if pixels.mean() >= SALIENT and t[pixels].mean() < smallest:
            smallest = t[pixels].mean()
            salient = pixels
    return salient


def find_edges(surface: Array, normal: Array) -> Array:
    """Pixels (H, W) on either side of a border between surfaces (H, W), or of a fold in one."""
    edge = np.zeros(surface.shape, bool)
    below, above = np.s_[1:], np.s_[:-1]
    right, left = np.s_[:, 1:], np.s_[:, :-1]
    for a, b in ((below, above), (right, left)):
        border = surface[a] != surface[b]
        fold = (normal[a] * normal[b]).sum(-1) < FOLD
        edge[a] |= border | fold
        edge[b] |= border | fold
    return edge


def shade(rng: Generator, room: Array, point: Array, normal: Array, surface: Array,
          num_surfaces: int) -> Array:
    """The colours (P, 3) of points (P, 3), lit by one lamp; 1 is white. surface: which one (P,).

    Each surface has a base colour and a texture: the product of two waves through space, which is
    smooth on some surfaces and a checkerboard on others.
    """
    base = rng.uniform(0.25, 0.9, (num_surfaces, 3))
    tint = rng.uniform(-0.35, 0.35, (num_surfaces, 3))
    direction = rng.normal(0, 1, (2, num_surfaces, 3))
    frequency = direction * rng.uniform(2, 12, (1, num_surfaces, 1))
    checker = rng.random(num_surfaces) < 0.4
    wave_0 = np.sin((point * frequency[0, surface]).sum(1))
    wave_1 = np.sin((point * frequency[1, surface]).sum(1))
    wave = wave_0 * wave_1
    wave = np.where(checker[surface], np.sign(wave), wave)
    colour = base[surface] + wave[:, None] * tint[surface]

    lamp = room * rng.uniform((0.3, 0.2, 0.8), (0.7, 0.6, 0.95))
    to_lamp = lamp - point
    distance = np.linalg.norm(to_lamp, axis=1)
    facing = np.maximum(0, (normal * to_lamp).sum(1) / distance)        # Lambert's cosine law
    light = facing / (1 + 0.08 * distance ** 2)
    return colour * (0.35 + 0.9 * light)[:, None]


def as_map(x: Array, height: int, width: int, dtype: type) -> Tensor:
    """Values of the pixels (P,) or (P, C) -> a tensor (1 or C, H, W)."""
    x = x.reshape(height, width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=dtype))


def render_room(seed: Sequence[int], height: int, width: int, axes: Array | None = None,
                zoom: float = 1.0) -> dict[str, Tensor]:
    """One room as a sample: "image" (3, H, W) uint8 and the labels of all tasks.

    seed: any integers; the same ones give the same room at every size. zoom: multiplies the focal
    length. axes (3, 3): the picture's right, down and forward in the camera's own axes, to mirror
    or roll the camera.
    """
    rng = Generator(PCG64(list(seed)))
    room = rng.uniform((3.5, 4.0, 2.4), (6.0, 7.0, 3.2))
    eye, yaw, frame = place_camera(rng, room)
    if axes is not None:
        frame = axes @ frame

    # One ray per pixel. They reach one metre forward each, so t is the depth.
    focal = 0.8 * max(height, width) * zoom
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    right = (x - width / 2) / focal
    down = (y - height / 2) / focal
    rays = np.stack([right, down, np.ones_like(x)], -1).reshape(-1, 3) @ frame      # (P, 3)

    num_objects = int(rng.integers(3, 8))
    view = view_room(eye, rays, room)
    for i in range(num_objects):
        add_object(rng, view, eye, rays, room, number=i)
    if rng.random() < 0.5:
        add_person(rng, view, eye, rays, yaw, number=num_objects)
    t, normal, number, part = view["t"], view["normal"], view["number"], view["part"]

    # Surfaces with textures of their own: floor, ceiling, walls, the objects, a person's six parts.
    object_surface = 3 + number + np.maximum(part - 1, 0)
    surface = np.where(number < 0, view["semseg"], object_surface)
    point = eye + t[:, None] * rays
    colour = shade(rng, room, point, normal, surface, 3 + num_objects + 6)
    edge = find_edges(surface.reshape(height, width), normal.reshape(height, width, 3))
    camera_normal = normal @ frame.T * [1, 1, -1]                       # x right, y down, z to us
    if not part.any():
        part = part + 255               # without a person, human_parts is ignored, as in PASCAL

    return {
        "image": as_map(colour.clip(0, 1) * 255, height, width, np.uint8),
        "semseg": as_map(view["semseg"], height, width, np.uint8)[0],
        "depth": as_map(t, height, width, np.float32),
        "normals": as_map(camera_normal, height, width, np.float32),
        "human_parts": as_map(part, height, width, np.uint8)[0],
        "sal": as_map(nearest_object(t, number), height, width, np.uint8)[0],
        "edge": as_map(edge, height, width, np.uint8)[0],
    }


class Rooms(Dataset):
    """`length` rendered rooms of a split ("train" or "val") with the labels of `tasks`.

    size: (H, W) of the images. Room i of a split and seed is the same on every machine.
    """

    def __init__(self, split: str, tasks: Sequence[str], length: int, size: Sequence[int],
                 seed: int = 0):
        self.split = split
        self.tasks = list(tasks)
        self.length = length
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        room = render_room((self.seed, self.split == "val", i), *self.size)
        sample = {"image": room.pop("image")}
        for task in self.tasks:
            if task not in room:
                raise ValueError(f"rooms have no labels for {task}; they have {', '.join(room)}")
            sample[task] = room[task]
        return sample
