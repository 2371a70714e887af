"""Rendered rooms: a small ray caster that makes images of any size, with exact labels.

A room contains a person made of capsules, and up to seven objects: spheres, cylinders, and
furniture made of boxes. Surfaces have textures, and one lamp lights them. The nearest object or
person is the salient one. A camera photographs the room by day, or at night: dark and with sensor
noise. There is nothing to download and no label noise, so the whole method can be run, taught and
tested on these images. Room (seed, split, i) is the same on every machine, up to rounding.

    sample = render_room((0, 0, 7), 112, 112)                   # the image and all labels
    dark = render_room((0, 0, 7), 112, 112, night=True)         # same labels, other image

World coordinates are in metres: x and y on the floor, z up. A ray is o + t * d. Each `hit_...`
function takes P rays from o (3,) along d (P, 3), and returns two arrays: t (P,) of the nearest hit,
or inf if the ray misses, and the surface normal (P, 3) at the hit. The order in which random
numbers are drawn defines a room: changing the order changes the images.
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
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)       # 0: no person
SALIENT = 0.01                  # a salient object covers at least this share of the image
HIDDEN = 0.3                    # an object may hide at most this share of the person's visible
                                # pixels that are near the object in the image
FOLD = np.cos(np.deg2rad(30))   # neighbouring normals more than 30 degrees apart make an edge
NIGHT_LIGHT = 0.35              # brightness at night, as a share of the brightness by day
NIGHT_NOISE = 14                # standard deviation of the night camera's noise; white is 255


# --- shapes ---------------------------------------------------------------------------------------
def dot(a: Array, b: Array) -> Array:
    """The dot product of each row of a (P, 3) with the same row of b: (P,)."""
    return np.einsum("pc,pc->p", a, b)


def hit_slabs(o: Array, d: Array, low: Array, high: Array, inside: bool) -> tuple[Array, Array]:
    """Intersect rays with an axis-aligned box between the corners `low` and `high`.

    inside: whether the box is seen from inside, as the room is.
    """
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
    """Intersect rays with a sphere around the origin.

    If o and d are first projected onto a plane through the origin, the shape is an infinite
    cylinder whose axis is perpendicular to that plane.
    """
    a = dot(d, d)                                                       # |o + t d|^2 = radius^2
    b = d @ o
    c = o @ o - radius ** 2
    root = b * b - a * c
    t = (-b - np.sqrt(np.maximum(root, 0))) / a
    hit = (root > 0) & (t > 0)
    t = np.where(hit, t, np.inf)
    point = o + np.where(hit, t, 0)[:, None] * d
    return t, point / radius


def hit_cylinder(o: Array, d: Array, radius: float, height: float) -> tuple[Array, Array]:
    """Intersect rays with a cylinder around the z axis, from z = 0 to a lid at z = `height`."""
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
    """Intersect rays with a tube from a to b with round ends.

    The tube consists of a section of an infinite cylinder and two spheres.
    """
    length = np.linalg.norm(b - a)
    axis = (b - a) / length
    across = np.eye(3) - np.outer(axis, axis)       # projects onto the plane across the axis
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
    """A person standing at the origin, as capsules: (part, one end, the other end, radius)."""
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
    """The camera's position (3,), its yaw in radians (positive: turned left), and its axes (3, 3).

    The rows of the axes point right, down and forward, as seen in the picture.
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


def rays_near(eye: Array, rays: Array, centre: Array, radius: float) -> Array:
    """The indices of the rays that meet a sphere. No other ray can hit a shape inside it."""
    to_centre = centre - eye
    beyond = to_centre @ to_centre - radius ** 2
    if beyond <= 0:                                 # the eye is inside the sphere
        return np.arange(len(rays))
    along = rays @ to_centre
    return np.flatnonzero((along > 0) & (along ** 2 >= beyond * dot(rays, rays)))


def cover(view: dict[str, Array], pixels: Array, t: Array, normal: Array, **labels: int) -> None:
    """Draw a shape at `pixels` of the view, where it is nearer than everything drawn before."""
    nearer = t < view["t"][pixels]
    pixels = pixels[nearer]
    view["t"][pixels] = t[nearer]
    view["normal"][pixels] = normal[nearer]
    for name, value in labels.items():
        view[name][pixels] = value


def view_room(eye: Array, rays: Array, room: Array) -> dict[str, Array]:
    """A view of the empty room: arrays with one entry per ray, (P,) or, for "normal", (P, 3).

    t: where the ray o + t * d hits. semseg: the class. part: the body part of the person, 0
    elsewhere. number: the number of the object or person, -1 for the room itself.
    """
    t, normal = hit_slabs(eye, rays, np.zeros(3), room, inside=True)
    semseg = np.full(len(rays), WALL)
    semseg[normal[:, 2] > 0.5] = FLOOR
    semseg[normal[:, 2] < -0.5] = CEILING
    return {"t": t, "normal": normal, "semseg": semseg, "part": np.zeros_like(semseg),
            "number": np.full_like(semseg, -1)}


def furniture(rng: Generator) -> list[tuple[Array, Array]]:
    """A plain box, a table or an armchair on the floor, as boxes: (lowest corner, highest corner).
    """
    width, depth, height = rng.uniform((0.3, 0.3, 0.3), (1.2, 0.9, 1.5))
    plain, table = rng.random(2) < 0.5
    corner = np.array([width / 2, depth / 2, height])
    on_floor = np.array([-1, -1, 0])
    if plain:
        return [(corner * on_floor, corner)]
    if table:
        leg = corner * [0.2, 0.2, 1]
        top = np.array([0, 0, 0.9 * height])
        return [(corner * on_floor + top, corner), (leg * on_floor, leg)]
    seat = corner * [1, 1, 0.45]
    back = corner * [1, -0.6, 1]
    return [(seat * on_floor, seat), (corner * on_floor, back)]


def add_object(rng: Generator, view: dict[str, Array], eye: Array, rays: Array, room: Array,
               number: int) -> None:
    """Place a random object on the floor, unless it would hide too much of the person."""
    shape = BOX + int(rng.integers(3))
    to_object = rotation(rng.uniform(0, np.pi))     # from world to object coordinates
    x = rng.uniform(0.1, 0.9) * room[0]
    y = rng.uniform(0.35, 0.95) * room[1]
    position = np.array([x, y, 0.0])
    pixels = rays_near(eye, rays, position, 2.0)
    o = to_object @ (eye - position)
    d = rays[pixels] @ to_object.T
    if shape == BOX:
        hits = [hit_slabs(o, d, low, high, inside=False) for low, high in furniture(rng)]
    elif shape == SPHERE:
        radius = rng.uniform(0.15, 0.6)
        hits = [hit_sphere(o - [0, 0, radius], d, radius)]
    else:
        radius, height = rng.uniform((0.15, 0.3), (0.45, 1.5))
        hits = [hit_cylinder(o, d, radius, height)]

    nearest = np.min([t for t, _ in hits], axis=0)
    person = view["semseg"][pixels] == PERSON
    hidden = person & (nearest < view["t"][pixels])
    if hidden.sum() > HIDDEN * person.sum():
        return
    for t, normal in hits:
        cover(view, pixels, t, normal @ to_object, semseg=shape, part=0, number=number)


def add_person(rng: Generator, view: dict[str, Array], eye: Array, rays: Array, room: Array,
               yaw: float, number: int) -> None:
    """Place a person on the floor in front of the camera."""
    to_person = rotation(rng.uniform(0, 2 * np.pi))
    ahead = rotation(yaw + rng.uniform(-0.35, 0.35)) @ [0, 1, 0]
    position = eye + ahead * rng.uniform(1.5, 2.4)
    position[:2] = np.clip(position[:2], 0.4, room[:2] - 0.4)           # not inside a wall
    position[2] = 0
    o = to_person @ (eye - position)
    d = rays @ to_person.T
    for part, a, b, radius in pose_person(rng):
        pixels = rays_near(o, d, (a + b) / 2, np.linalg.norm(b - a) / 2 + radius)
        t, normal = hit_capsule(o, d[pixels], a, b, radius)
        cover(view, pixels, t, normal @ to_person, semseg=PERSON, part=part, number=number)


# --- labels and colours ---------------------------------------------------------------------------
def nearest_object(t: Array, number: Array) -> Array:
    """A mask (P,) of the salient object: the object or person with the smallest mean depth.

    An object or person that covers less than the share SALIENT of the image does not count.
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
    """A mask (H, W) of the pixels on both sides of each border between surfaces, and of each fold.

    surface (H, W): the number of the surface. At a fold, `normal` (H, W, 3) turns by more than 30
    degrees.
    """
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
    """The colours (P, 3) of points (P, 3), lit by one lamp; 1 is white.

    surface (P,): the number of each point's surface. Each surface has a base colour and is plain,
    striped, chequered, or covered with smooth waves. Stripes are made from one sine wave through
    space, and the other two patterns from the product of two such waves.
    """
    base = rng.uniform(0.3, 0.85, (num_surfaces, 1)) + rng.uniform(-0.25, 0.25, (num_surfaces, 3))
    tint = rng.uniform(-0.3, 0.3, (num_surfaces, 1)) + rng.uniform(-0.15, 0.15, (num_surfaces, 3))
    direction = rng.normal(0, 1, (2, num_surfaces, 3))
    frequency = direction * rng.uniform(2, 12, (1, num_surfaces, 1))
    pattern = rng.integers(4, size=num_surfaces)[surface]
    wave = np.sin(dot(point, frequency[0, surface]))
    waves = wave * np.sin(dot(point, frequency[1, surface]))
    texture = np.choose(pattern, [0 * wave, np.sign(wave), np.sign(waves), waves])
    colour = base[surface] + texture[:, None] * tint[surface]

    lamp = room * rng.uniform((0.3, 0.2, 0.8), (0.7, 0.6, 0.95))
    lamp_colour = rng.uniform(0.75, 1.05, 3)
    ambient = rng.uniform(0.25, 0.45)               # light from all directions
    to_lamp = lamp - point
    distance = np.sqrt(dot(to_lamp, to_lamp))
    facing = np.maximum(0, dot(normal, to_lamp) / distance)             # Lambert's cosine law
    light = facing / (1 + 0.08 * distance ** 2)
    return colour * (ambient + light[:, None] * lamp_colour)


def photograph(rng: Generator, colour: Array, night: bool) -> Array:
    """The pixel values (P, 3), from 0 to 255, that a camera records for colours (P, 3)."""
    pixels = colour.clip(0, 1) * 255
    if not night:
        return pixels
    noisy = NIGHT_LIGHT * pixels + rng.normal(0, NIGHT_NOISE, pixels.shape)
    return noisy.clip(0, 255)


def as_map(x: Array, height: int, width: int, dtype: type) -> Tensor:
    """Pixel values (P,) or (P, C) -> a tensor (1, H, W) or (C, H, W)."""
    x = x.reshape(height, width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=dtype))


def render_room(seed: Sequence[int], height: int, width: int, axes: Array | None = None,
                zoom: float = 1.0, night: bool = False) -> dict[str, Tensor]:
    """One room as a sample: "image" (3, H, W) uint8 and the labels of all tasks.

    seed: integers, at least 0. They give the same room at every size, with one exception: an object
    that hides about as much of the person as HIDDEN allows may be left out at one size and not at
    another. night: use a night camera, which changes the image but no label. zoom: multiplies the
    focal length. axes (3, 3): mirrors or rolls the camera. Its rows are the camera's new right,
    down and forward directions, in the original camera's coordinates.
    """
    rng = Generator(PCG64(list(seed)))
    room = rng.uniform((3.5, 4.0, 2.4), (6.0, 7.0, 3.2))
    eye, yaw, frame = place_camera(rng, room)
    if axes is not None:
        frame = axes @ frame

    # One ray per pixel. The forward component of each is one metre, so t is the depth.
    focal = 0.8 * max(height, width) * zoom
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    right = (x - width / 2) / focal
    down = (y - height / 2) / focal
    rays = np.stack([right, down, np.ones_like(x)], -1).reshape(-1, 3) @ frame      # (P, 3)

    num_objects = int(rng.integers(3, 8))
    view = view_room(eye, rays, room)
    add_person(rng, view, eye, rays, room, yaw, number=num_objects)
    for i in range(num_objects):
        add_object(rng, view, eye, rays, room, number=i)
    t, normal, number, part = view["t"], view["normal"], view["number"], view["part"]

    # The surfaces, each with its own texture: the floor, the ceiling, all walls together, each
    # object, and each body part of the person.
    object_surface = 3 + number + np.maximum(part - 1, 0)
    surface = np.where(number < 0, view["semseg"], object_surface)
    point = eye + t[:, None] * rays
    colour = shade(rng, room, point, normal, surface, 3 + num_objects + 6)
    edge = find_edges(surface.reshape(height, width), normal.reshape(height, width, 3))
    camera_normal = normal @ frame.T * [1, 1, -1]                       # z towards the camera

    return {
        "image": as_map(photograph(rng, colour, night), height, width, np.uint8),
        "semseg": as_map(view["semseg"], height, width, np.uint8)[0],
        "depth": as_map(t, height, width, np.float32),
        "normals": as_map(camera_normal, height, width, np.float32),
        "human_parts": as_map(part, height, width, np.uint8)[0],
        "sal": as_map(nearest_object(t, number), height, width, np.uint8)[0],
        "edge": as_map(edge, height, width, np.uint8)[0],
    }


class Rooms(Dataset):
    """`length` rendered rooms of a split ("train" or "val"), with the labels of `tasks`.

    size: (H, W) of the images. night: whether the camera is a night camera. Room i of a seed and
    split is the same on every machine, up to rounding. Reading a room raises ValueError if rooms
    have no labels for one of the tasks.
    """

    def __init__(self, split: str, tasks: Sequence[str], length: int, size: Sequence[int],
                 seed: int = 0, night: bool = False):
        self.split = split
        self.tasks = list(tasks)
        self.length = length
        self.size = size
        self.seed = seed
        self.night = night

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        room = render_room((self.seed, self.split == "val", i), *self.size, night=self.night)
        labels = [name for name in room if name != "image"]
        for task in self.tasks:
            if task not in labels:
                raise ValueError(f"rooms have no labels for {task}; they have {', '.join(labels)}")
        return {name: room[name] for name in ("image", *self.tasks)}
