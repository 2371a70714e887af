"""Datasets (rooms, nyud, pascal), batches, and the one augmentation warp.

A sample is a dict of tensors at the image's own size: image (3, H, W) uint8 and the labels that the
tasks ask for: semseg, human_parts and sal (H, W) uint8 with 255 = ignore, depth (1, H, W) float32
metres with 0 = invalid, normals (3, H, W) float32 (x right, y down, z to the camera) with 0, 0, 0
= invalid. `collate` pads a batch to its largest image; `warp` then cuts, on the training device
and with one grid, the image (bilinear) and all labels (nearest) to the training size, augmented or
not. Rendering is in rooms.py, archives and file formats are in files.py. Data: README, Data.

    python data.py --check --dataset nyud --data-root data     # read every file once (check.py)
"""

import os
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image  # comes with torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import files
from files import apart, find_dataset, progress, read_array, read_ids, read_image, read_mat
from rooms import ROOM_CLASSES, render_room

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the backbone expects
CLASSES = {"rooms": len(ROOM_CLASSES), "nyud": 40, "pascal": 21}  # of semseg


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
        return {k: sample[k] for k in ("image", *self.tasks)}


# --- labels on disk -------------------------------------------------------------------------------
def read_nyud_classes(path: Path) -> np.ndarray:
    """0 is void, 1..40 the classes -> 255, 0..39."""
    value = read_image(path, None)
    if value.max() > CLASSES["nyud"]:
        raise ValueError(f"{path} holds class {value.max()}, expected 0 (void) to 40")
    return value.astype(np.uint8) - 1  # 0 wraps round to 255


def read_voc_classes(path: Path) -> np.ndarray:
    """0 is background, 1..20 the objects, 255 ignored."""
    value = read_image(path, None)
    if ((value >= CLASSES["pascal"]) & (value != 255)).any():
        raise ValueError(f"{path} holds class {value[value != 255].max()}, expected 0 to 20 or 255")
    return value.astype(np.uint8)


def read_saliency(path: Path) -> np.ndarray:
    return (read_image(path, "L") > 127).astype(np.uint8)


def read_depth(path: Path) -> np.ndarray:
    """Metres; not a number and not positive become 0, invalid."""
    value = read_array(path)
    value = value[..., None] if value.ndim == 2 else value
    value = np.where(np.isfinite(value) & (value > 0), value, 0)
    if (value > 0).any() and (middle := np.median(value[value > 0])) > 80:
        raise ValueError(f"{path} has a median depth of {middle:.0f}, expected metres; are these "
                         "millimetres?")
    return value


def read_normals(path: Path) -> np.ndarray:
    """Unit vectors from .npy, or from .png as 2v/255 - 1, where grey and black are no normals."""
    png = path.suffix == ".png"
    value = read_image(path).astype(np.float32) * (2 / 255) - 1 if png else read_array(path)
    length = np.linalg.norm(value, axis=-1, keepdims=True)
    there = (length > 0.05) & (length < 1.7)  # neither (0, 0, 0) nor a black pixel
    if there.any() and (abs(length[there] - 1) > 0.1).mean() > 0.1:
        raise ValueError(f"{path} has normals of median length {np.median(length[there]):.2f}, "
                         "expected 1")
    return np.where((length > 0.5) & (length < 1.5), value / np.maximum(length, 1e-6), 0)


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


# PASCAL-Part's names of a person's parts, as six.
PARTS = {name: i for i, names in enumerate((
    "head hair lear rear leye reye lebrow rebrow mouth nose", "torso neck", "luarm ruarm",
    "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot"), 1)
    for name in names.split()}
# PASCAL-Context's classes that NYU has too.
NYU_CLASSES = [int(n) for n in """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65
    66 68 69 72 73 78 83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146
    150 154 157 158 159 165 172 174 181 183 184 191 193 195 197 199 202 213 215 216 219 220 223 225
    228 230 232 233 238 239 242 243 246 250 251 252 255 260 261 263 269 272 273 275 281 283 284 285
    286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329 330 331 336 342 345 349 350
    351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413 414 417 419
    421 423 427 429 430 432 440 441 442 443 444 446 454 457""".split()]


def human_parts(path: Path) -> np.ndarray:
    """PASCAL-Part's .mat -> (H, W) uint8, 0 and 1..6; (1, 1) zero where nobody has parts."""
    def listed(value) -> list:  # simplified, MATLAB's array of one struct is the struct
        return [value] if isinstance(value, dict) else list(value)

    target = np.zeros((1, 1), np.uint8)
    try:
        for thing in listed(read_mat(path, "anno")["objects"]):
            for part in listed(thing["parts"]) if thing["class"] == "person" else ():
                name, mask = part["part_name"], part["mask"] > 0
                if name not in PARTS:
                    raise ValueError(f"{path}: unknown part {name!r} of a person; expected one of "
                                     f"{', '.join(PARTS)}")
                if target.shape == (1, 1):
                    target = np.zeros(mask.shape, np.uint8)
                if mask.shape != target.shape:
                    raise ValueError(f"{path}: the mask of {name} has shape {mask.shape}, others "
                                     f"{target.shape}")
                target[mask] = PARTS[name]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not an annotation of PASCAL-Part: {error!r}") from error
    return target


def known_to_nyu(path: Path) -> np.ndarray:
    """PASCAL-Context's .mat -> (H, W) uint8, 1 on the classes in NYU_CLASSES."""
    return np.isin(read_mat(path, "LabelMap"), NYU_CLASSES).astype(np.uint8)


PARSERS = {"human_parts": human_parts, "trainval": known_to_nyu}  # by the .mat file's folder


def parsed(path: Path) -> Path:
    """What a .mat file says, as a small png, computed once, outside the dataset."""
    make = PARSERS[path.parent.name]
    key = zlib.crc32(str(path.parent.resolve()).encode())
    kept = files.CACHE / f"{make.__name__}-{key:08x}" / f"{path.stem}.png"
    if not kept.is_file() or kept.stat().st_mtime < path.stat().st_mtime:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        Image.fromarray(apart(make, path)).save(temporary, "png")
        os.replace(temporary, kept)
    return kept


# --- files of nyud and pascal ---------------------------------------------------------------------
# For each kind of file its reader, and the path or the alternatives of each of the reader's
# arguments. Both published versions of an archive are here: they share names, not contents.
LAYOUTS = {
    "nyud": dict(splits="gt_sets", files={
        "image": (read_image, ("images/{}.jpg", "images/{}.png")),
        "semseg": (read_nyud_classes, ("segmentation/{}.png",)),
        "depth": (read_depth, ("depth/{}.npy",)),
        "normals": (read_normals, ("normals/{}.npy", "normals/{}.png"))}),
    "pascal": dict(splits="ImageSets/Context", files={
        "image": (read_image, ("JPEGImages/{}.jpg",)),
        "semseg": (read_voc_classes, ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png")),
        "human_parts": (read_parts, ("human_parts/{}.mat",)),
        "sal": (read_saliency, ("sal_distill/{}.png",)),
        "normals": (read_pascal_normals, ("normals_distill/{}.png",),
                    ("pascal-context/trainval/{}.mat",))}),
}


class Files(Dataset):
    """NYUD-v2 or PASCAL-Context from the folder `root`, as LAYOUTS[name] describes it.

    Every file of the split must exist, and a label must have its image's size (ValueError).
    complete=False leaves the first to check.py.
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
        if not complete:
            return
        paths = [path for id in self.ids for kind in self.readers for path in self.find(kind, id)]
        mats = [path for path in paths if path.suffix == ".mat"]
        for i, path in enumerate(mats, 1):  # these are slow: now and once
            parsed(path)
            progress(f"{name} {split}: {i} of {len(mats)} MATLAB files", i == len(mats))

    def find(self, kind: str, id: str) -> list[Path]:
        """The files that `kind` of image `id` is read from."""
        found = []
        for alternatives in self.readers[kind][1:]:
            paths = [self.root / pattern.format(id) for pattern in alternatives]
            found += [path for path in paths if path.is_file()][:1]
            if not any(path in found for path in paths):
                raise ValueError(f"{self.name}: no file {' or '.join(alternatives).format(id, id)} "
                                 f"under {self.root}; expected the layout of "
                                 f"{files.SOURCES[self.name]['archives'][0]} (README, Data)")
        return found

    def read(self, kind: str, id: str, size: tuple[int, ...] | None = None) -> np.ndarray:
        """`kind` of image `id`, (H, W) or (H, W, C); size: the (H, W) that it must have."""
        paths = self.find(kind, id)
        value = self.readers[kind][0](*paths)
        if value is None:  # not labelled at all
            value = np.full(size, 255, np.uint8)
        shape = (size or value.shape[:2]) + {"image": (3,), "normals": (3,),
                                             "depth": (1,)}.get(kind, ())
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


# --- batches ------------------------------------------------------------------------------------
class InMemory(Dataset):
    """Every sample of `dataset`, decoded once and kept; workers share it by forking."""

    def __init__(self, dataset: Dataset):
        self.samples = []
        for i in range(len(dataset)):
            self.samples.append(dataset[i])
            progress(f"in memory: {i + 1} of {len(dataset)} samples", i == len(dataset) - 1)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.samples[i]


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples, padded at the right and bottom to the largest; "size" (B, 2) keeps H, W."""
    size = torch.tensor([s["image"].shape[1:] for s in samples])
    H, W = size.amax(0).tolist()
    return {"size": size} | {
        k: torch.stack([F.pad(s[k], (0, W - s[k].shape[-1], 0, H - s[k].shape[-2]),
                              value=255 if s[k].ndim == 2 else 0) for s in samples])
        for k in samples[0]}


def epoch_batches(length: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """All batches of a run: epoch e is shuffled by (seed, e), and short last batches are left out.

    Step i of any run with this seed sees the same images, so resuming is slicing the list.
    """
    batch_size = min(batch_size, length)
    batches = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length).tolist()
        batches += [order[i:i + batch_size] for i in range(0, length - batch_size + 1, batch_size)]
    return batches


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0) -> DataLoader:
    """Collated batches, in order. Samples hold no randomness, so neither do the workers."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available())


# --- the warp -----------------------------------------------------------------------------------
def draw_augmentation(B: int, flip: bool, scales: Sequence[float],
                      rotate: float) -> dict[str, Tensor]:
    """Random flips, zooms (one of `scales`), turns up to +-`rotate` degrees and places of the cut
    for a batch, as `warp` takes them."""
    scale = torch.tensor(scales)[torch.randint(len(scales), (B,))]
    flipped = (torch.rand(B) < 0.5) & flip
    place = torch.rand(B, 2) * 2 - 1
    centre = place * (1 - 1 / scale.clamp(min=1))[:, None]
    angle = (torch.rand(B) * 2 - 1) * rotate
    return {"flip": flipped, "scale": scale, "centre": centre, "angle": angle}


def warp(batch: dict[str, Tensor], size: Sequence[int], flip: Tensor | None = None,
         scale: Tensor | None = None, centre: Tensor | None = None,
         angle: Tensor | None = None) -> tuple[Tensor, dict]:
    """Cut a batch to (h, w), one sampling grid for the image and all labels.

    flip (B,) bool mirrors left and right; scale (B,) zooms in and divides depth, as walking closer
    would; centre (B, 2) is the middle of the cut, x and y in -1..1 of the image; angle (B,), in
    degrees, turns the picture counter-clockwise. Normals turn and flip with it. Without them, a
    plain resize. What lies outside the image is black and invalid.
    Returns the image (B, 3, h, w), normalised, and the labels, as tasks.py wants them.
    """
    device, B = batch["image"].device, len(batch["image"])

    def there(values) -> Tensor:
        """A few numbers, on the device; the CPU does not wait for a GPU to take them."""
        return torch.as_tensor(values).to(device, non_blocking=True)

    own = batch["size"].flip(1).float()  # (B, 2): W, H
    padded = there(batch["image"].shape[:1:-1])
    zoom = torch.ones(B, device=device) if scale is None else there(scale)
    turn = torch.eye(2, device=device).repeat(B, 1, 1)  # from the cut to the image
    if angle is not None:
        c, s = (f(there(angle).deg2rad()) for f in (torch.cos, torch.sin))
        turn = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
    if flip is not None:
        turn[:, :, 0] *= (1 - 2 * there(flip).float())[:, None]
    y, x = (torch.arange(n, device=device).add(0.5).mul(2 / n).sub(1) for n in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (h, w, 2): x, y in -1..1
    half = own[:, None, None] / 2
    pixel = (grid * half) @ turn[:, None].mT / zoom[:, None, None, None]  # (B, h, w, 2)
    pixel = pixel + half * (1 if centre is None else 1 + there(centre)[:, None, None])
    inside = ((pixel >= 0) & (pixel <= 2 * half)).all(-1)  # (B, h, w), centres of pixels at .5
    pixel = pixel.clamp(min=0.5).minimum(2 * half - 0.5)  # never blend with padding
    grid = pixel / padded * 2 - 1
    nearest = (pixel.floor() + 0.5) / padded * 2 - 1  # at centres: no rounding depends on padding

    image = F.grid_sample(batch["image"].float() / 255, grid, align_corners=False)
    mean, std = (there(v)[:, None, None] for v in (MEAN, STD))
    image = (image - mean) / std * inside[:, None]
    labels = {}
    for name in batch.keys() - {"image", "size"}:
        label = batch[name].float()
        classes = label.ndim == 3
        label = 255 - label[:, None] if classes else label  # so that 0 is invalid in all of them
        label = F.grid_sample(label, nearest, mode="nearest", align_corners=False)
        label = label * inside[:, None]
        if classes:
            label = (255 - label[:, 0]).round().long()
        elif name == "depth":
            label = label / zoom[:, None, None, None]
        elif name == "normals":  # x and y turn the other way: from the image to the cut
            label = torch.cat([torch.einsum("bij,bihw->bjhw", turn, label[:, :2]), label[:, 2:]], 1)
        labels[name] = label
    return image, labels


class ToDevice:
    """`batches`, re-iterable as they are, with their tensors on `device`."""

    def __init__(self, batches: Iterable, device: torch.device):
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}


def open_dataset(config: Namespace, split: str) -> Dataset:
    """The "train" or "val" split that train.py's flags name, in memory if they ask for it."""
    if config.dataset == "rooms":
        length = config.train_rooms if split == "train" else config.val_rooms
        dataset = Rooms(split, config.tasks, length, config.size)
    else:
        root = find_dataset(config.dataset, config.data_root, config.download)
        dataset = Files(config.dataset, root, split, config.tasks)
    return InMemory(dataset) if config.cache else dataset


if __name__ == "__main__":
    from check import main
    main()
