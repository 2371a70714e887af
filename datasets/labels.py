"""Labels on disk: the files of NYUD-v2 and PASCAL-Context as arrays, and as a dataset.

A reader turns a file into an array, (H, W) uint8 of classes with 255 = ignore or (H, W, C) float32
with 0 = invalid, or raises ValueError where it is damaged or cannot be what it should be. LAYOUTS
says which file of a dataset is read how; Files makes samples of them.

    dataset = Files("nyud", find_dataset("nyud", Path("data")), "train", ["semseg", "depth"])
"""

import multiprocessing
import os
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps  # come with torchvision
from torch import Tensor
from torch.utils.data import Dataset

from datasets import archives
from datasets.classes import NYU_CLASSES, PARTS, SEMSEG
from tasks import TASKS
from util.run import progress

SIDE, PHOTO = 4096, 2048  # the longest side, in pixels, of a dataset's image, and of a photo
MAT_MEMORY = 4 << 30  # bytes that the process which reads MATLAB files may take: files inflate


# --- files of any kind ----------------------------------------------------------------------------
def read_image(path: Path, mode: str | None = "RGB", photo: bool = False) -> np.ndarray:
    """Image file -> (H, W, 3) uint8, or with mode None as stored (palette indices stay indices).

    photo: anyone's own, of which no labels exist: turned as its EXIF data say, shrunk to PHOTO.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if photo:
                image = ImageOps.exif_transpose(image)
            elif max(image.size) > SIDE:  # what shares its batch would be padded to it
                raise ValueError(f"it is {width}x{height} pixels, expected at most {SIDE} a side")
            if mode and image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
                image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            image = image.convert(mode) if mode else image
            if photo:
                image.thumbnail((PHOTO, PHOTO))
            if mode and min(image.size) < 4:
                raise ValueError(f"it is {width}x{height} pixels, too few a side for any backbone")
            return np.array(image)
    except Exception as error:  # Pillow raises whatever the broken file led to
        raise ValueError(f"cannot read image {path}: {error}") from error


def read_array(path: Path) -> np.ndarray:
    """.npy file -> float32 array, (H, W) or (H, W, channels). Pickled objects are refused."""
    try:
        array = np.load(path, allow_pickle=False).astype(np.float32)
        if array.ndim not in (2, 3):
            raise ValueError(f"its shape is {array.shape}, expected (H, W) or (H, W, channels)")
        return array
    except Exception as error:  # numpy raises whatever the broken file led to
        raise ValueError(f"cannot read {path}: {error}") from error


def read_mat(path: Path, key: str) -> np.ndarray | dict:
    """Variable `key` of a MATLAB file, structs as dicts."""
    from scipy.io import loadmat  # nothing else here needs scipy
    try:
        content = loadmat(path, simplify_cells=True)
    except MemoryError as error:
        raise ValueError(f"cannot read {path}: it needs more memory than the labels of any image "
                         "do; fetch it again?") from error
    except Exception as error:  # scipy raises whatever the broken file led to
        raise ValueError(f"cannot read {path}: {error}") from error
    if key not in content:
        found = ", ".join(k for k in content if not k.startswith("__")) or "nothing"
        raise ValueError(f"{path} has no variable {key}; it holds {found}")
    return content[key]


def read_ids(path: Path) -> list[str]:
    """The image names of a split, one a line."""
    if not path.is_file():
        raise ValueError(f"no split file {path} (README, Data)")
    try:
        ids = path.read_text("utf-8-sig").split()  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a list of image names: {error}") from error
    if not ids:
        raise ValueError(f"{path} lists no image")
    id, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} lists {id} {times} times, expected each image once")
    return ids


# --- labels of each kind --------------------------------------------------------------------------
def read_nyud_classes(path: Path) -> np.ndarray:
    """0 is void, 1..40 the classes -> 255, 0..39."""
    label = read_image(path, None)
    wrong = label[~np.isin(label, range(len(SEMSEG["nyud"]) + 1))]
    if wrong.size:
        raise ValueError(f"{path} holds class {wrong[0]}, expected 0 (void) to 40")
    return label.astype(np.uint8) - 1  # 0 wraps round to 255


def read_voc_classes(path: Path) -> np.ndarray:
    """0 is background, 1..20 the objects, 255 ignored."""
    label = read_image(path, None)
    wrong = label[~np.isin(label, [*range(len(SEMSEG["pascal"])), 255])]
    if wrong.size:
        raise ValueError(f"{path} holds class {wrong[0]}, expected 0 to 20 or 255")
    return label.astype(np.uint8)


def read_mask(path: Path) -> np.ndarray:
    """Black is 0, white 1; stored as 0 and any other one value, that one is 1."""
    mask = read_image(path, "L")
    greys = len(np.unique(mask[mask > 0])) > 1
    return (mask > (127 if greys else 0)).astype(np.uint8)


def read_edges(path: Path) -> np.ndarray | None:
    """0 and 1 from .npy, black and white from .png; None without any edge: nobody drew them."""
    edges = read_mask(path) if path.suffix == ".png" else read_array(path)
    edges = edges[..., 0] if edges.shape[2:] == (1,) else edges
    edges = (edges > 0.5).astype(np.uint8)
    return edges if edges.any() else None


def read_depth(path: Path) -> np.ndarray:
    """Metres, (H, W, 1); not a number and not positive become 0, invalid."""
    depth = read_array(path)
    depth = depth[..., None] if depth.ndim == 2 else depth
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0)
    if (depth > 0).any() and (middle := np.median(depth[depth > 0])) > 80:
        raise ValueError(f"{path} has a median depth of {middle:.0f}, expected metres; are these "
                         "millimetres?")
    return depth


def read_normals(path: Path) -> np.ndarray:
    """Unit vectors from .npy, or from .png as 2v/255 - 1, where grey and black are no normals."""
    if path.suffix == ".png":
        stored = read_image(path)
        normals = stored * np.float32(2 / 255) - 1
        normals[(stored == 0).all(-1) | (abs(normals) < 0.01).all(-1)] = 0
    else:
        normals = read_array(path)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)  # (H, W, 1)
    given = length > 0
    if given.any() and (abs(length[given] - 1) > 0.1).mean() > 0.1:
        raise ValueError(f"{path} has normals of median length {np.median(length[given]):.2f}, "
                         "expected 1")
    return np.where((length > 0.5) & (length < 1.5), normals / np.maximum(length, 1e-6), 0)


def read_pascal_normals(path: Path, context: Path) -> np.ndarray:
    """Distilled normals, valid on the classes that their teacher, trained on NYU, knows."""
    value, known = read_normals(path), read_image(parsed(context), None)
    if known.shape != value.shape[:2]:
        raise ValueError(f"{context} has shape {known.shape}, expected {value.shape[:2]} as {path}")
    return value * known[..., None]


def read_parts(path: Path) -> np.ndarray | None:
    """0 is background, 1..6 the parts; None where nobody is to be seen."""
    parts = read_image(parsed(path), None)
    return parts if parts.any() else None


# --- PASCAL's MATLAB files ------------------------------------------------------------------------
def as_map(path: Path, name: str, value: object) -> np.ndarray:
    """What a MATLAB file holds as `name`: (H, W) of numbers, not a scalar, a string, a struct."""
    value = np.asarray(value)
    if value.ndim != 2 or value.dtype.kind not in "buif":
        raise ValueError(f"{path}: {name} has shape {value.shape} and type {value.dtype}, expected "
                         "numbers (H, W)")
    return value


def human_parts(path: Path) -> np.ndarray:
    """PASCAL-Part's .mat -> (H, W) uint8, 0 and 1..6; (1, 1) zero where nobody has parts."""
    def listed(value) -> list:  # simplified, MATLAB's array of one struct is the struct
        return [value] if isinstance(value, dict) else list(value)

    label = np.zeros((1, 1), np.uint8)
    try:
        for figure in listed(read_mat(path, "anno")["objects"]):
            for part in listed(figure["parts"]) if figure["class"] == "person" else ():
                name, mask = part["part_name"], as_map(path, "mask", part["mask"]) > 0
                if name not in PARTS:
                    raise ValueError(f"{path}: unknown part {name!r} of a person; expected one of "
                                     f"{', '.join(PARTS)}")
                if label.shape == (1, 1):
                    label = np.zeros(mask.shape, np.uint8)
                if mask.shape != label.shape:
                    raise ValueError(f"{path}: the mask of {name} has shape {mask.shape}, others "
                                     f"{label.shape}")
                label[mask] = PARTS[name]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not an annotation of PASCAL-Part: {error!r}") from error
    return label


def known_to_nyu(path: Path) -> np.ndarray:
    """PASCAL-Context's .mat -> (H, W) uint8, 1 on the classes in NYU_CLASSES."""
    label = as_map(path, "LabelMap", read_mat(path, "LabelMap"))
    return np.isin(label, NYU_CLASSES).astype(np.uint8)


PARSERS = {"human_parts": human_parts, "trainval": known_to_nyu}  # by the .mat file's folder


def parsed(path: Path) -> Path:
    """What a .mat file says, as a small png, computed once, outside the dataset."""
    parse = PARSERS[path.parent.name]
    folder, key = archives.CACHE / parse.__name__, archives.fingerprint(path)
    png = folder / f"{path.stem}-{key}.png"
    if not png.is_file():
        png.parent.mkdir(parents=True, exist_ok=True)
        partial = png.with_suffix(f".{os.getpid()}.tmp")
        Image.fromarray(in_another_process(parse, path)).save(partial, "png")
        os.replace(partial, png)
    return png


@lru_cache(maxsize=None)
def other_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), resource.setrlimit,
                               (resource.RLIMIT_DATA, (MAT_MEMORY, MAT_MEMORY)))


def in_another_process(read: Callable[[Path], np.ndarray], path: Path) -> np.ndarray:
    """read(path): a damaged MATLAB file can crash scipy, and the process that it runs in."""
    try:
        return other_process().submit(read, path.resolve()).result()
    except BrokenProcessPool as error:
        other_process.cache_clear()
        raise ValueError(f"cannot read {path}: its reader crashes") from error


# --- the datasets ---------------------------------------------------------------------------------
# For each kind of file its reader, and the path or the alternatives of each of the reader's
# arguments. Both published versions of an archive are here: they share names, not contents.
LAYOUTS = {
    "nyud": dict(splits="gt_sets", files={
        "image": (read_image, ("images/{}.jpg", "images/{}.png")),
        "semseg": (read_nyud_classes, ("segmentation/{}.png",)),
        "depth": (read_depth, ("depth/{}.npy",)),
        "normals": (read_normals, ("normals/{}.npy", "normals/{}.png")),
        "edge": (read_edges, ("edge/{}.npy", "edge/{}.png"))}),
    "pascal": dict(splits="ImageSets/Context", files={
        "image": (read_image, ("JPEGImages/{}.jpg",)),
        "semseg": (read_voc_classes, ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png")),
        "human_parts": (read_parts, ("human_parts/{}.mat",)),
        "sal": (read_mask, ("sal_distill/{}.png",)),
        "normals": (read_pascal_normals, ("normals_distill/{}.png",),
                    ("pascal-context/trainval/{}.mat",))}),
}
CHANNELS = {"image": (3,), **{name: (task.channels,) for name, task in TASKS.items()
                              if task.kind != "classes"}}  # which have none


class Files(Dataset):
    """NYUD-v2 or PASCAL-Context from the folder `root`, as LAYOUTS[name] describes it.

    Every file of the split must exist, and a label must have its image's size (ValueError).
    complete=False leaves the first to tools/check.py.
    """

    def __init__(self, name: str, root: Path, split: str, tasks: Sequence[str],
                 complete: bool = True):
        self.name, self.root, layout = name, Path(root), LAYOUTS[name]
        unknown = [task for task in tasks if task not in layout["files"]]
        if unknown:
            raise ValueError(f"{name} has no labels for {', '.join(unknown)}; it has "
                             f"{', '.join(k for k in layout['files'] if k != 'image')}")
        self.ids = read_ids(self.root / layout["splits"] / f"{split}.txt")
        self.readers = {kind: layout["files"][kind] for kind in ("image", *tasks)}
        if complete:
            paths = [p for id in self.ids for kind in self.readers for p in self.find(kind, id)]
            mats = [path for path in paths if path.suffix == ".mat"]
            for i, path in enumerate(mats, 1):  # these are slow: now and once
                parsed(path)
                progress(f"{name} {split}: {i} of {len(mats)} MATLAB files", i == len(mats))

    def find(self, kind: str, id: str) -> list[Path]:
        """The files that `kind` of image `id` is read from."""
        paths = []
        for alternatives in self.readers[kind][1:]:
            names = [pattern.format(id) for pattern in alternatives]
            found = [name for name in names if (self.root / name).is_file()]
            if not found:
                raise ValueError(f"{self.name}: no file {' or '.join(names)} under {self.root}; "
                                 "expected the layout of "
                                 f"{archives.SOURCES[self.name]['archives'][0]} (README, Data)")
            paths.append(self.root / found[0])
        return paths

    def read(self, kind: str, id: str, size: tuple[int, ...] | None = None) -> np.ndarray:
        """`kind` of image `id`, (H, W) or (H, W, C); size: the (H, W) that it must have."""
        paths = self.find(kind, id)
        value = self.readers[kind][0](*paths)
        if value is None:  # not labelled at all
            value = np.full(size, 255, np.uint8)
        shape = (size or value.shape[:2]) + CHANNELS.get(kind, ())
        if value.shape != shape:
            raise ValueError(f"{self.name}: {paths[0]} has shape {value.shape}, expected {shape} "
                             "as its image has")
        return value

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample, size = {}, None
        for kind in self.readers:  # the image first
            value = self.read(kind, self.ids[i], size)
            size = value.shape[:2]
            value = value.transpose(2, 0, 1) if value.ndim == 3 else value
            sample[kind] = torch.from_numpy(np.ascontiguousarray(value))
        return sample
