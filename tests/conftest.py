"""Fixtures and helpers for the tests, including small datasets in the layouts of real archives.

Rendered rooms stand in for photos, so the real archives are not needed: a test asks for
`nyud_folder` or `pascal_folder` (a fresh copy, which it may damage) or for `nyud_archive` or
`pascal_archive` (a .tgz). Tests that read a few real images are skipped if their archive
(NYUD_MT_mini.tgz or PASCAL_MT_mini.tgz) is not in the folder that the environment variable
TGLORA_DATA names.
"""

import functools
import os
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Small networks run fastest on one thread, which also fixes the order in which sums are computed.
torch.set_num_threads(1)

# For each image: split, number of the room, (height, width), and the tasks without a label.
NYUD_ROOMS = {
    "433": ("train", 0, (48, 64), ()),
    "834": ("train", 1, (47, 62), ("depth", "normals")),
    "1407": ("train", 2, (42, 56), ("semseg", "edge")),
    "basement_0000": ("train", 3, (48, 64), ("semseg", "edge")),
    "464": ("val", 4, (48, 64), ()),
    "972": ("val", 5, (47, 62), ("depth", "normals")),
}
PASCAL_ROOMS = {
    "2008_000008": ("train", 6, (44, 50), ()),
    "2008_000009": ("train", 5, (37, 50), ("human_parts",)),
    "2008_000019": ("train", 1, (27, 48), ("human_parts",)),
    "2008_000026": ("val", 11, (50, 37), ()),
}
# The class numbers stored on disk for floor, ceiling, wall, box, sphere, cylinder and person.
NYUD_NUMBERS = np.array([2, 22, 1, 29, 40, 38, 31], np.uint8)
PASCAL_NUMBERS = np.array([0, 0, 0, 9, 20, 5, 15], np.uint8)
CONTEXT_NUMBERS = np.array([158, 3, 457, 104, 207, 1, 2], np.uint16)    # NYUD also has the first 4
PART_NAMES = {1: "hair", 2: "torso", 3: "luarm", 4: "rhand", 5: "ruleg", 6: "lfoot"}


@functools.cache
def costs(*flags: str) -> dict:
    """The parameter counts and MACs that cost.py gives for these flags, cached for other tests."""
    from cost import cost
    from recipes import parse_arguments
    return cost(parse_arguments(list(flags)))


def room(number: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A rendered room as arrays (H, W) or (H, W, channels)."""
    from rooms import render_room
    sample = {}
    for name, value in render_room((3, 0, number), *size).items():
        array = value.numpy()
        if array.ndim == 3:
            array = array.transpose(1, 2, 0)
        sample[name] = array[..., 0] if array.shape[2:] == (1,) else array
    return sample


def write(path: Path, value: np.ndarray) -> None:
    """Save an array as .npy or as an image, depending on the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, value)
    else:
        Image.fromarray(value).save(path, quality=95, subsampling=0)


def write_splits(folder: Path, rooms: dict) -> None:
    """Write each split's list of images, with the byte order mark that some editors add."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        ids = [id for id, (its_split, *_) in rooms.items() if its_split == split]
        (folder / f"{split}.txt").write_text("\n".join(ids) + "\n", "utf-8-sig")


def write_nyud(root: Path) -> None:
    """Write NYUD_ROOMS in the layout of NYUD_MT.tgz. A missing label is written as all zeros."""
    write_splits(root / "gt_sets", NYUD_ROOMS)
    for id, (_, number, size, missing) in NYUD_ROOMS.items():
        sample = room(number, size)
        classes = NYUD_NUMBERS[sample["semseg"]]
        classes[:2] = 0                     # void
        labels = {"semseg": classes, "depth": sample["depth"], "normals": sample["normals"],
                  "edge": sample["edge"].astype(np.float32)}
        for task in missing:
            labels[task] = np.zeros_like(labels[task])
        write(root / f"images/{id}.jpg", sample["image"])
        write(root / f"segmentation/{id}.png", labels["semseg"])
        for task in ("depth", "normals", "edge"):
            write(root / f"{task}/{id}.npy", labels[task])


def write_pascal(root: Path) -> None:
    """Write PASCAL_ROOMS in the layout of PASCAL_MT.tgz, including its MATLAB files."""
    savemat = pytest.importorskip("scipy.io").savemat
    write_splits(root / "ImageSets/Context", PASCAL_ROOMS)
    for id, (_, number, size, missing) in PASCAL_ROOMS.items():
        sample = room(number, size)
        classes = PASCAL_NUMBERS[sample["semseg"]]
        classes[:2] = 255                   # ignored
        source = "pascal-context" if id == "2008_000019" else "VOC12"
        normals = ((sample["normals"] + 1) * 127.5).round().astype(np.uint8)
        write(root / f"JPEGImages/{id}.jpg", sample["image"])
        write(root / f"semseg/{source}/{id}.png", classes)
        write(root / f"normals_distill/{id}.png", normals)
        write(root / f"sal_distill/{id}.png", sample["sal"] * 255)
        for folder in ("human_parts", "pascal-context/trainval"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        if "human_parts" in missing:
            sample["human_parts"][:] = 255      # as if nobody were there
        savemat(root / f"human_parts/{id}.mat", {"anno": annotation(sample["human_parts"])})
        context = {"LabelMap": CONTEXT_NUMBERS[sample["semseg"]]}
        savemat(root / f"pascal-context/trainval/{id}.mat", context)


def annotation(parts: np.ndarray) -> dict:
    """A PASCAL-Part annotation of an image with a cow and a person.

    parts: (H, W), the person's body parts; if all values are 255, the image has no person.
    """
    head = {"part_name": "head", "mask": np.ones_like(parts)}
    objects = [{"class": "cow", "parts": structs([head])}]
    masks = []
    for number, name in PART_NAMES.items():
        masks.append({"part_name": name, "mask": (parts == number) * 1})
    if (parts != 255).any():
        objects.append({"class": "person", "parts": structs(masks)})
    return {"imname": "a room", "objects": structs(objects)}


def structs(rows: list[dict]) -> np.ndarray:
    """Dicts with the same keys -> the array that savemat writes as a MATLAB array of structs."""
    fields = [(name, object) for name in rows[0]]
    return np.array([tuple(row.values()) for row in rows], dtype=fields)


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.fixture(scope="session")
def nyud_original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nyud_original") / "NYUD_MT"
    write_nyud(root)
    return root


@pytest.fixture(scope="session")
def pascal_original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pascal_original") / "PASCAL_MT"
    write_pascal(root)
    return root


@pytest.fixture
def nyud_folder(nyud_original, tmp_path) -> Path:
    """A fresh copy of the small NYUD dataset, which a test may damage."""
    return shutil.copytree(nyud_original, tmp_path / "NYUD_MT")


@pytest.fixture
def pascal_folder(pascal_original, tmp_path) -> Path:
    """A fresh copy of the small PASCAL dataset, which a test may damage."""
    return shutil.copytree(pascal_original, tmp_path / "PASCAL_MT")


@pytest.fixture(scope="session")
def nyud_archive(nyud_original, tmp_path_factory) -> Path:
    return pack(nyud_original, tmp_path_factory.mktemp("nyud") / "NYUD_MT.tgz")


@pytest.fixture(scope="session")
def pascal_archive(pascal_original, tmp_path_factory) -> Path:
    return pack(pascal_original, tmp_path_factory.mktemp("pascal") / "PASCAL_MT.tgz")


@pytest.fixture
def server(tmp_path):
    """Serve a new folder over HTTP. Yields the folder and the server's address."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def copy_of_real(name: str, folder: Path) -> Path:
    """Copy an archive of real images to `folder`, where it can be unpacked.

    Skips the test if the archive is missing.
    """
    path = Path(os.environ.get("TGLORA_DATA", ""), name)
    if not path.is_file():
        pytest.skip("needs real images (see docs/RUNS.md): set the environment variable "
                    f"TGLORA_DATA to a folder with {name}, an archive of a few images in the "
                    f"layout of {name.replace('_mini', '')}")
    return Path(shutil.copy2(path, folder))


@pytest.fixture(scope="session")
def real_nyud_archive(tmp_path_factory) -> Path:
    return copy_of_real("NYUD_MT_mini.tgz", tmp_path_factory.mktemp("real_nyud"))


@pytest.fixture(scope="session")
def real_pascal_archive(tmp_path_factory) -> Path:
    return copy_of_real("PASCAL_MT_mini.tgz", tmp_path_factory.mktemp("real_pascal"))
