"""The files of NYUD-v2 and PASCAL-Context: where they are, and how to read them as arrays.

Each dataset has been published as two different archives, in which some files differ in folder or
format, such as .png instead of .npy. LAYOUTS lists the alternatives for each file, and the first
one that exists is read. A reader turns a file into an array. It raises ValueError if the file is
damaged, or if its numbers cannot be right, such as a depth in millimetres.

    root = find_dataset("nyud", Path("data"))     # data/ holds NYUD_MT/, or NYUD_MT.tgz
    dataset = Files("nyud", root, "train", ["semseg", "depth"])
    dataset[0]["image"], dataset[0]["semseg"], dataset[0]["depth"]      # tensors

Classes are (H, W) uint8, where 255 means that the pixel is ignored. Depth and normals are float32,
where 0 means that the pixel was not measured. To read every file once and list everything that is
wrong, run `python -m extras.check --dataset nyud --data-root data`.

References: NYU's 40 classes are from Gupta et al., CVPR 2013. The layouts, the six parts of a
person, and the choice of classes with valid PASCAL normals are from ASTMT (arXiv 1904.08918).
"""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from util import reading

# --- names of classes -----------------------------------------------------------------------------
SEMSEG = {      # {dataset: class names}; the index of a name is its number in our labels
    "nyud": ("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window",
             "bookshelf", "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser",
             "pillow", "mirror", "floor mat", "clothes", "ceiling", "books", "refrigerator",
             "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person",
             "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure",
             "other furniture", "other prop"),
    "pascal": ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
               "chair", "cow", "dining table", "dog", "horse", "motorbike", "person",
               "potted plant", "sheep", "sofa", "train", "tv monitor"),
}

# PASCAL-Part (Chen et al., CVPR 2014) names 24 parts of a person. They become six classes.
PARTS = {
    "head": 1, "hair": 1, "lear": 1, "rear": 1, "leye": 1, "reye": 1, "lebrow": 1, "rebrow": 1,
    "mouth": 1, "nose": 1,
    "torso": 2, "neck": 2,
    "luarm": 3, "ruarm": 3,                                     # upper arms
    "llarm": 4, "rlarm": 4, "lhand": 4, "rhand": 4,             # lower arms
    "luleg": 5, "ruleg": 5,                                     # upper legs
    "llleg": 6, "rlleg": 6, "lfoot": 6, "rfoot": 6,             # lower legs
}

# The numbers of the PASCAL-Context classes (Mottaghi et al., CVPR 2014) that NYUD has as well.
NYU_CLASSES = [
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50,
    51, 53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104,
    105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172,
    174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230,
    232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281,
    283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
    384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432,
    440, 441, 442, 443, 444, 446, 454, 457,
]

# --- finding a dataset ----------------------------------------------------------------------------
SPLITS = {"nyud": "gt_sets", "pascal": "ImageSets/Context"}     # folders of the lists of images
ARCHIVES = {
    "nyud": ("NYUD_MT.tgz", "NYUDv2.tar.gz"),
    "pascal": ("PASCAL_MT.tgz", "PASCALContext.tar.gz"),
}
# These addresses are only used with --download. They may change, so errors also name the PAGES.
ADDRESSES = {
    "nyud": "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz",
    "pascal": "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz",
}
PAGES = ("https://github.com/facebookresearch/astmt or "
         "https://github.com/prismformore/Multi-Task-Transformer")


def find_dataset(name: str, source: str | Path, download: bool = False) -> Path:
    """The folder of dataset `name`.

    source: this folder, a folder at most two levels above it, an archive of the dataset, or a
    folder with an archive in it. download: if no dataset is found, fetch the archive into `source`.
    Raises ValueError if the dataset is not found or several folders hold it, or if the archive is
    damaged or holds something else.
    """
    source = Path(source)
    if source.is_file():
        return find_dataset(name, unpack(name, source))

    folders = []
    for folder in (source, *sorted(source.glob("*/")), *sorted(source.glob("*/*/"))):
        unfinished = ".partial" in (folder.suffix, folder.parent.suffix)
        if (folder / SPLITS[name]).is_dir() and not unfinished:
            folders.append(folder)
    if len(folders) > 1:
        raise ValueError(f"{name}: {source} holds several copies of the dataset: "
                         f"{', '.join(map(str, folders))}. Name one of them with --data-root")
    if folders:
        return folders[0]

    for archive in ARCHIVES[name]:
        if (source / archive).is_file():
            return find_dataset(name, source / archive)
    if download:
        return find_dataset(name, fetch_archive(name, source))
    if source.is_dir():
        problem = f"holds neither {SPLITS[name]}/ nor an archive"
    else:
        problem = "does not exist"
    raise ValueError(f"{name}: {source} {problem}. Give --data-root the dataset's folder or "
                     f"archive ({' or '.join(ARCHIVES[name])}), or add --download. The archives "
                     f"are documented at {PAGES}")


def fetch_archive(name: str, folder: Path) -> Path:
    """Download the archive of dataset `name` into `folder`. Raises ValueError if that fails."""
    archive = folder / ARCHIVES[name][0]
    print(f"downloading {ADDRESSES[name]} to {archive}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(ADDRESSES[name], str(archive))
    except Exception as error:      # torch does not document what it raises
        raise ValueError(f"the download of {ADDRESSES[name]} failed: {error}. Put the archive into "
                         f"{folder} yourself; it is documented at {PAGES}") from error
    return archive


def unpack(name: str, archive: Path) -> Path:
    """Unpack an archive of dataset `name` into a folder next to it, unless that was done before.

    NYUD_MT.tgz is unpacked to NYUD_MT.tgz.partial, which is renamed to NYUD_MT.tgz.unpacked when it
    is complete. Raises ValueError if the archive is damaged or holds something else. Returns the
    folder.
    """
    folder = archive.with_name(archive.name + ".unpacked")
    if folder.is_dir():
        return folder
    partial = archive.with_name(archive.name + ".partial")
    print(f"unpacking {archive} to {folder}", flush=True)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise ValueError(f"{partial} exists: either another run is unpacking the archive, or a run "
                         "was killed while it did. Wait for that run, or delete the folder"
                         ) from error
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")      # refuses paths that lead out of the folder
            while tar.fileobj.read(1 << 20):            # gzip's checksum comes at the very end
                pass
        if not any(partial.rglob(SPLITS[name])):
            raise ValueError(f"{archive} holds no {SPLITS[name]}/, so it is not an archive of "
                             f"{name}; see {PAGES}")
        partial.rename(folder)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} is damaged, or is not an archive of {name} "
                         f"({type(error).__name__}); delete it and fetch it again, see {PAGES}"
                         ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)      # after the rename, it does not exist
    return folder


# --- files of any kind ----------------------------------------------------------------------------
def read_image(path: Path, mode: str = "RGB") -> np.ndarray:
    """An image of a dataset -> (H, W, 3) uint8, or (H, W) uint8 if `mode` is "L" (grey).

    Raises ValueError if the image's EXIF data ask for a turn: then the image that people see and
    the stored image differ, and the labels may fit either.
    """
    with reading(path, "an image"):
        with Image.open(path) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 1:
                raise ValueError("its EXIF data ask for a turn, so it may not fit its labels; save "
                                 "it without EXIF data, turned like its labels")
            check_bits(image)
            return np.array(image.convert(mode))


def read_photo(path: Path) -> np.ndarray:
    """Any photo that Pillow can open -> (H, W, 3) uint8.

    The photo is turned upright according to its EXIF data, and shrunk to at most 2048 pixels per
    side.
    """
    with reading(path, "a photo that Pillow can open"):
        with Image.open(path) as image:
            check_bits(image)
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((2048, 2048))
            return np.array(image)


def check_bits(image: Image.Image) -> None:
    """Raise ValueError if a grey has 16 or 32 bits. Pillow would clip it to 0..255."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError("stores greys in 16 or 32 bits; save it as 8 bit")


def read_class_map(path: Path, classes: Sequence[int]) -> np.ndarray:
    """An image file that stores the class of each pixel, in 8 or 16 bits -> (H, W) uint8.

    classes: the numbers that may occur. Raises ValueError if there is any other number.
    """
    with reading(path, "an image of classes"):
        with Image.open(path) as image:
            label = np.array(image)
        wrong = label[~np.isin(label, classes)]
        if wrong.size:
            raise ValueError(f"holds class {wrong[0]}, expected a number in {classes}")
    return label.astype(np.uint8)


def read_array(path: Path, integers: bool = False) -> np.ndarray:
    """A .npy file of floats -> float32 of the stored shape. Pickled objects are refused.

    integers: accept integers as well. By default they are an error, because integers are often
    millimetres, which would be taken for metres.
    """
    with reading(path, "a .npy file of numbers"):
        array = np.load(path, allow_pickle=False)
        if not integers and array.dtype.kind != "f":
            raise ValueError(f"holds {array.dtype}, expected floats; if these are millimetres, "
                             "divide by 1000 and save them as float32")
    return array.astype(np.float32)


def read_mat(path: Path, variable: str) -> np.ndarray | dict:
    """One variable of a MATLAB file: an array, or a struct as a dict.

    Inside a struct, an array of several structs becomes a list of dicts.
    """
    from scipy.io import loadmat        # scipy is needed only for MATLAB files
    return loadmat(path, simplify_cells=True)[variable]


def read_ids(path: Path) -> list[str]:
    """Read the names of a split's images, one per line."""
    with reading(path, "a text file with one image name per line"):
        ids = path.read_text("utf-8-sig").split()       # with or without a byte order mark
        for id in ids:
            if "/" in id or "\\" in id or ".." in id:
                raise ValueError(f"lists image {id!r}; the name of an image must not contain a "
                                 "slash or '..'")
    return ids


# --- labels ---------------------------------------------------------------------------------------
def read_nyud_classes(path: Path) -> np.ndarray:
    """NYUD's classes. The stored 0 (void) becomes 255, and the stored 1 to 40 become 0 to 39."""
    return read_class_map(path, range(41)) - 1      # 0 wraps around to 255


def read_voc_classes(path: Path) -> np.ndarray:
    """PASCAL's classes as they are stored: 0 = background, 1 to 20 = objects, 255 = ignore."""
    return read_class_map(path, [*range(21), 255])


def read_mask(path: Path) -> np.ndarray:
    """A black-and-white image -> (H, W) uint8 of 0 and 1. Greys above half of white become 1.

    If the image has only one value besides 0, that value becomes 1, however dark it is.
    """
    grey = read_image(path, mode="L")
    values = np.unique(grey[grey > 0])
    threshold = 127 if len(values) > 1 else 0
    return (grey > threshold).astype(np.uint8)


def read_edges(path: Path) -> np.ndarray | None:
    """Edges from .npy (0 and 1) or .png (black and white) -> (H, W) uint8 of 0 and 1.

    Returns None if there is no edge at all: such an image is taken to have no edge labels.
    """
    if path.suffix == ".png":
        edges = read_mask(path)
    else:
        edges = read_array(path, integers=True)
    if edges.ndim == 3 and edges.shape[2] == 1:
        edges = edges[..., 0]
    edges = (edges > 0.5).astype(np.uint8)
    return edges if edges.any() else None


def read_depth(path: Path) -> np.ndarray:
    """Depth in metres -> (H, W, 1) float32. Values that are not finite or not positive become 0.

    Raises ValueError if the median depth is above 80, which can hardly be metres.
    """
    depth = read_array(path)
    if depth.ndim == 2:
        depth = depth[..., None]
    valid = np.isfinite(depth) & (depth > 0)
    if valid.any():
        median = np.median(depth[valid])
        if median > 80:
            raise ValueError(f"{path} has a median depth of {median:.0f}, expected metres; if "
                             "these are millimetres, divide by 1000")
    return np.where(valid, depth, 0)


def read_normals(path: Path) -> np.ndarray:
    """Unit vectors (x right, y down, z to the camera) -> (H, W, 3) float32, (0, 0, 0) = invalid.

    A .npy file holds the vectors v as they are. A .png file holds (v + 1) * 255 / 2, and grey or
    black where no normal is known. Vectors that are 0.5 to 1.5 long are normalised, and others are
    invalid. Raises ValueError if more than 10 % of the lengths above 0 differ from 1 by over 0.1.
    """
    if path.suffix == ".png":
        stored = read_image(path)
        normals = stored * np.float32(2 / 255) - 1
        black = (stored == 0).all(-1)
        grey = (abs(normals) < 0.01).all(-1)
        normals[black | grey] = 0
    else:
        normals = read_array(path)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)        # (H, W, 1)
    lengths = length[length > 0]
    if lengths.size and (abs(lengths - 1) > 0.1).mean() > 0.1:
        raise ValueError(f"{path} has normals of median length {np.median(lengths):.2f}, expected "
                         "1; save them as unit vectors")
    valid = (length > 0.5) & (length < 1.5)
    return np.where(valid, normals / np.maximum(length, 1e-6), 0)


def read_pascal_normals(path: Path, context: Path) -> np.ndarray:
    """PASCAL's normals -> (H, W, 3) float32, set to (0, 0, 0) on classes that NYUD does not have.

    The normals were predicted by a network that was trained on NYUD, so they count only where
    PASCAL-Context's .mat file `context` (variable LabelMap) has one of NYU_CLASSES.
    """
    normals = read_normals(path)
    with reading(context, "an annotation of PASCAL-Context"):
        known = np.isin(read_mat(context, "LabelMap"), NYU_CLASSES)
        return normals * known[..., None]


def read_parts(path: Path) -> np.ndarray | None:
    """PASCAL-Part's .mat file -> (H, W) uint8, 0 for the background and 1 to 6 for body parts.

    Returns None if no body part is labelled, as in an image without people.
    """
    parts = None
    with reading(path, "an annotation of PASCAL-Part"):
        for figure in as_list(read_mat(path, "anno")["objects"]):
            if figure["class"] != "person":
                continue
            for part in as_list(figure["parts"]):
                mask = np.asarray(part["mask"]) > 0
                if parts is None:
                    parts = np.zeros(mask.shape, np.uint8)
                parts[mask] = PARTS[part["part_name"]]
    return parts if parts is not None and parts.any() else None


def as_list(value: dict | np.ndarray | list) -> list:
    """A list of structs. (scipy simplifies an array that holds one struct to the struct itself.)"""
    return [value] if isinstance(value, dict) else list(value)


# --- the datasets ---------------------------------------------------------------------------------
# {dataset: {image or task: (reader, files, ...)}}. Each list of files is one argument of the
# reader, which gets the first file that exists. {} stands for the image's name.
LAYOUTS = {
    "nyud": {
        "image": (read_image, ["images/{}.jpg", "images/{}.png"]),
        "semseg": (read_nyud_classes, ["segmentation/{}.png"]),
        "depth": (read_depth, ["depth/{}.npy"]),
        "normals": (read_normals, ["normals/{}.npy", "normals/{}.png"]),
        "edge": (read_edges, ["edge/{}.npy", "edge/{}.png"]),
    },
    "pascal": {
        "image": (read_image, ["JPEGImages/{}.jpg"]),
        "semseg": (read_voc_classes, ["semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"]),
        "human_parts": (read_parts, ["human_parts/{}.mat"]),
        "sal": (read_mask, ["sal_distill/{}.png"]),
        "normals": (read_pascal_normals, ["normals_distill/{}.png"],
                    ["pascal-context/trainval/{}.mat"]),
    },
}
CHANNELS = {"image": (3,), "depth": (1,), "normals": (3,)}      # other labels are (H, W)


class Files(Dataset):
    """One split of NYUD-v2 or PASCAL-Context, read from the folder `root`.

    A sample holds "image" (3, H, W) uint8 and the labels of `tasks`: (H, W) uint8 or
    (channels, H, W) float32. Reading a sample raises ValueError if a label's size differs from its
    image's. complete: raise ValueError at once if any file is missing. (extras.check turns this
    off, to list all missing files.)
    """

    def __init__(self, name: str, root: Path, split: str, tasks: Sequence[str],
                 complete: bool = True):
        self.name, self.root = name, Path(root)
        self.layout = {}
        for task in ("image", *tasks):
            if task not in LAYOUTS[name]:
                known = [task for task in LAYOUTS[name] if task != "image"]
                raise ValueError(f"{name} has no labels for {task}; it has {', '.join(known)}")
            self.layout[task] = LAYOUTS[name][task]
        self.ids = read_ids(self.root / SPLITS[name] / f"{split}.txt")
        if complete:
            for id in self.ids:
                for task in self.layout:
                    self.paths(task, id)

    def paths(self, task: str, id: str) -> list[Path]:
        """The files of a task's label (or of "image"). Raises ValueError if one is missing."""
        paths = []
        for alternatives in self.layout[task][1:]:
            names = [pattern.format(id) for pattern in alternatives]
            existing = [name for name in names if (self.root / name).is_file()]
            if not existing:
                raise ValueError(f"{self.name}: no file {' or '.join(names)} in {self.root}; "
                                 f"expected the layout of {ARCHIVES[self.name][0]}, see "
                                 "docs/DATA.md")
            paths.append(self.root / existing[0])
        return paths

    def read(self, task: str, id: str, size: tuple[int, ...] | None = None) -> np.ndarray:
        """Read a task's label (or "image"): (H, W) or (H, W, channels).

        size: the (H, W) of the image, which a label must have.
        """
        paths = self.paths(task, id)
        reader = self.layout[task][0]
        value = reader(*paths)
        if value is None:               # nothing was labelled: ignore all pixels
            value = np.full(size, 255, np.uint8)
        if size is None:
            size = value.shape[:2]
        expected = size + CHANNELS.get(task, ())
        if value.shape != expected:
            raise ValueError(f"{self.name}: {paths[0]} has shape {value.shape}, expected "
                             f"{expected}, as its image has {size[0]}x{size[1]} pixels")
        return value

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample, size = {}, None
        for task in self.layout:        # the image comes first
            value = self.read(task, self.ids[i], size)
            size = value.shape[:2]
            if value.ndim == 3:
                value = value.transpose(2, 0, 1)
            sample[task] = torch.from_numpy(np.ascontiguousarray(value))
        return sample
