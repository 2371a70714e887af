"""Datasets (rooms, nyud) and the one augmentation warp.

A sample is a dict of tensors at the image's own size: image (3, H, W) uint8 and the labels
that the tasks ask for: semseg (H, W) uint8 with 255 = ignore, depth (1, H, W) float32 metres with
0 = invalid, normals (3, H, W) float32 (x right, y down, z to the camera) with 0, 0, 0 = invalid.
`collate` pads a batch to its largest image; `warp` then cuts, on the training device and with one
grid, the image (bilinear) and all labels (nearest) to the training size, augmented or not.

rooms is rendered on the fly (rooms.py) and needs no files. nyud reads NYUD-v2 in
either published archive, `NYUD_MT.tgz` (jpg, npy) or `NYUDv2.tar.gz` (png), told apart by what is
on disk. Data: README, Data.
"""

import shutil
import sys
import tarfile
import urllib.error
import urllib.request
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

from rooms import ROOM_CLASSES, render_room

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the backbone expects

# --- rooms ----------------------------------------------------------------------------------------
class Rooms(Dataset):
    """`length` rendered rooms; room i of a split and seed is the same on every machine."""

    classes = len(ROOM_CLASSES)

    def __init__(self, split: str, tasks: Sequence[str], length: int, size: Sequence[int],
                 seed: int = 0):
        self.key, self.size, self.tasks = (seed, split == "val"), tuple(size), list(tasks)
        self.ids = [f"{split}{i:05d}" for i in range(length)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample = render_room((*self.key, i), *self.size)
        return {k: sample[k] for k in ("image", *self.tasks)}


# --- nyud: files --------------------------------------------------------------------------------
# Public copies move and die: one table, tried only on request, named in the error otherwise.
NYUD_URL = "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz"
NYUD_DOCUMENTED = ("NYUD_MT.tgz: https://github.com/facebookresearch/astmt; NYUDv2.tar.gz: "
                   "https://github.com/prismformore/Multi-Task-Transformer")
NYUD_ARCHIVES = ("NYUD_MT.tgz", "NYUDv2.tar.gz")


def read_image(path: Path, mode: str | None = "RGB") -> np.ndarray:
    """Image file -> (H, W, 3) uint8, or with mode None as stored (palette indices stay indices)."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except FileNotFoundError:
        raise ValueError(f"no image file {path}") from None
    except Exception as error:  # Pillow raises whatever the broken file led to
        raise ValueError(f"cannot read image {path}: {error}") from error


class NYUD(Dataset):
    """NYU Depth v2 for multi-task learning: `images segmentation depth normals gt_sets`.

    root: the folder that holds these. Every file of the split must exist; a size that differs from
    the image's is an error. On disk semseg 0 is void and 1..40 are the classes.
    """

    classes = 40
    folders = {"image": "images", "semseg": "segmentation", "depth": "depth", "normals": "normals"}

    def __init__(self, root: Path, split: str, tasks: Sequence[str]):
        self.root = Path(root)
        listing = self.root / "gt_sets" / f"{split}.txt"
        if not listing.is_file():
            raise ValueError(f"NYUD: no file gt_sets/{split}.txt under {self.root}; expected the "
                             "layout of NYUD_MT.tgz or NYUDv2.tar.gz (README, Data)")
        self.ids = listing.read_text().split()
        self.files = [{k: self.find(k, id) for k in ("image", *tasks)} for id in self.ids]
        if not self.ids:
            raise ValueError(f"NYUD: {listing} lists no image")

    def find(self, kind: str, id: str) -> Path:
        names = {"image": (".jpg", ".png"), "semseg": (".png",), "depth": (".npy",),
                 "normals": (".npy", ".png")}[kind]
        paths = [self.root / self.folders[kind] / (id + ext) for ext in names]
        for path in paths:
            if path.is_file():
                return path
        raise ValueError(f"NYUD: no file {self.folders[kind]}/{id}{' or '.join(names)} under "
                         f"{self.root}; expected the layout of NYUD_MT.tgz (README, Data)")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample = {kind: self.read(kind, path) for kind, path in self.files[i].items()}
        for kind, value in sample.items():
            channels = {"image": 3, "semseg": 1, "depth": 1, "normals": 3}[kind]
            expected = (*sample["image"].shape[:2], channels)
            if value.shape != expected:
                raise ValueError(f"NYUD: {self.files[i][kind]} has shape {value.shape}, expected "
                                 f"{expected} as its image has")
        sample = {k: torch.from_numpy(v).permute(2, 0, 1).contiguous() for k, v in sample.items()}
        if "semseg" in sample:
            sample["semseg"] = sample["semseg"][0]
        return sample

    def read(self, kind: str, path: Path) -> np.ndarray:
        """One file as (H, W, channels), in the sample's encoding."""
        if path.suffix == ".npy":
            try:
                value = np.load(path, allow_pickle=False).astype(np.float32)
            except Exception as error:
                raise ValueError(f"NYUD: cannot read {path}: {error}") from error
            value = value[..., None] if value.ndim == 2 else value
        else:
            value = read_image(path, None if kind == "semseg" else "RGB")
            value = value[..., None] if value.ndim == 2 else value
            if kind == "normals":
                value = value.astype(np.float32) * (2 / 255) - 1
        if kind == "semseg":
            if value.max() > self.classes:
                raise ValueError(f"NYUD: {path} holds class {value.max()}, expected 0 (void) to "
                                 f"{self.classes}")
            value = value.astype(np.uint8) - 1  # 0 wraps round to 255 = ignore
        if kind == "depth":
            value = np.where(np.isfinite(value) & (value > 0), value, 0)
        if kind == "normals":  # unit length where measured; grey or black pixels in a png are not
            length = np.linalg.norm(value, axis=-1, keepdims=True)
            value = np.where((length > 0.5) & (length < 1.5), value / np.maximum(length, 1e-6), 0)
        return value


def find_nyud(source: Path, download_it: bool = False) -> Path:
    """The dataset's folder, given itself, the folder around it, or an archive of it."""
    source = Path(source)
    if download_it and not source.exists():
        source.mkdir(parents=True)
    if download_it and not any((source / name).exists() for name in NYUD_ARCHIVES):
        download(NYUD_URL, source / NYUD_ARCHIVES[0])
    if source.is_file():
        return find_nyud(unpack(source))
    for folder in (source, *sorted(source.glob("*/"))):
        if (folder / "gt_sets").is_dir():
            return folder
    for name in NYUD_ARCHIVES:
        if (source / name).is_file():
            return find_nyud(unpack(source / name))
    state = "holds neither gt_sets/ nor an archive" if source.is_dir() else "does not exist"
    raise ValueError(f"NYUD: {source} {state}; give the dataset's folder or archive "
                     f"({' or '.join(NYUD_ARCHIVES)}) as --data-root, or add --download. Where to "
                     f"get it: {NYUD_DOCUMENTED}")


def unpack(archive: Path, into: Path = Path("data")) -> Path:
    """Unpack a tar archive once, to into/NAME-KEY (KEY: of its path, size and date), whole or not.

    Raises ValueError for a damaged archive, or one with links or paths that lead outside.
    """
    stat = archive.stat()
    key = zlib.crc32(f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    folder = into / f"{archive.name.split('.')[0]}-{key:08x}"
    if folder.is_dir():
        return folder
    print(f"unpacking {archive} ({stat.st_size / 1e6:.0f} MB) to {folder}", flush=True)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")  # refuses what leads outside the folder
        if not any(partial.glob("*/gt_sets/*.txt")):
            raise ValueError("it holds no gt_sets/*.txt")
        partial.rename(folder)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise ValueError(f"cannot unpack {archive}: {error}; fetch it again? "
                         f"({NYUD_DOCUMENTED})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def download(url: str, path: Path) -> None:
    """Fetch url to path with progress; an interrupted download continues from `path.part`."""
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            if "html" in reply.headers.get("Content-Type", ""):
                raise ValueError("the server sent a web page, not the file")
            start = start if reply.status == 206 else 0  # 200: the server cannot continue
            total = start + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if start else "wb") as file:
                while block := reply.read(1 << 20):
                    file.write(block)
                    progress(f"{path.name}: {file.tell() / 1e6:.0f} of {total / 1e6:.0f} MB",
                             file.tell() >= total)
        if part.stat().st_size < total:
            raise ValueError("the connection ended early")
    except (urllib.error.URLError, OSError, ValueError) as error:
        kept = f"; {part} is kept, run again to continue" if part.exists() else ""
        raise ValueError(f"download of {url} failed: {error}{kept}. Other sources: "
                         f"{NYUD_DOCUMENTED}") from error
    part.rename(path)


def progress(text: str, last: bool) -> None:
    """One line that is overwritten on a terminal; elsewhere only the last state is printed."""
    if sys.stdout.isatty():
        print(f"\r{text} ", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


# --- batches ------------------------------------------------------------------------------------
class InMemory(Dataset):
    """Every sample of `dataset`, decoded once and kept; workers share it by forking."""

    def __init__(self, dataset: Dataset):
        self.classes, self.ids, self.samples = dataset.classes, dataset.ids, []
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
    invalid = {"semseg": 255}
    return {"size": size} | {
        k: torch.stack([F.pad(s[k], (0, W - s[k].shape[-1], 0, H - s[k].shape[-2]),
                              value=invalid.get(k, 0)) for s in samples])
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


def in_order(length: int, batch_size: int) -> list[list[int]]:
    return [list(range(i, min(i + batch_size, length))) for i in range(0, length, batch_size)]


# --- the warp -----------------------------------------------------------------------------------
def draw_augmentation(B: int, flip: bool, scales: Sequence[float]) -> dict[str, Tensor]:
    """Random flips, zooms (one of `scales`) and places of the crop for a batch, as `warp` takes."""
    scale = torch.tensor(scales)[torch.randint(len(scales), (B,))]
    flipped = (torch.rand(B) < 0.5) & flip
    place = torch.rand(B, 2) * 2 - 1
    centre = place * (1 - 1 / scale.clamp(min=1))[:, None]
    return {"flip": flipped, "scale": scale, "centre": centre}


def warp(batch: dict[str, Tensor], size: Sequence[int], flip: Tensor | None = None,
         scale: Tensor | None = None, centre: Tensor | None = None) -> tuple[Tensor, dict]:
    """Cut a batch to (h, w), one sampling grid for the image and all labels.

    flip (B,) bool mirrors left and right and negates normals' x; scale (B,) zooms in and divides
    depth, as walking closer would; centre (B, 2) is the middle of the cut, x and y in -1..1 of the
    image. Without them, a plain resize. What lies outside the image is black and invalid.
    Returns the image (B, 3, h, w), normalised, and the labels, as tasks.py wants them.
    """
    device, B = batch["image"].device, len(batch["image"])
    own = batch["size"].to(device).flip(1).float()  # (B, 2): W, H
    padded = torch.tensor(batch["image"].shape[:1:-1], device=device)
    mirror = torch.ones(B, 2, device=device)
    zoom = torch.ones(B, device=device) if scale is None else scale.to(device)
    if flip is not None:
        mirror[:, 0] = 1 - 2 * flip.to(device).float()
    y, x = (torch.arange(n, device=device).add(0.5).mul(2 / n).sub(1) for n in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (h, w, 2): x, y in -1..1
    grid = grid * (mirror / zoom[:, None])[:, None, None]  # (B, h, w, 2)
    if centre is not None:
        grid = grid + centre.to(device)[:, None, None]
    inside = grid.abs().amax(-1) <= 1  # (B, h, w)
    pixel = (grid + 1) / 2 * own[:, None, None]  # in the image's own pixels, centres at .5
    pixel = pixel.clamp(min=0.5).minimum(own[:, None, None] - 0.5)  # never blend with padding
    grid = pixel / padded * 2 - 1
    nearest = (pixel.floor() + 0.5) / padded * 2 - 1  # at centres: no rounding depends on padding

    image = F.grid_sample(batch["image"].float() / 255, grid, align_corners=False)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    image = (image - mean) / std * inside[:, None]
    labels = {}
    for name in batch.keys() - {"image", "size"}:
        label = batch[name].float()
        label = label if label.ndim == 4 else 255 - label[:, None]  # so that 0 is invalid
        label = F.grid_sample(label, nearest, mode="nearest", align_corners=False) * inside[:, None]
        if name == "semseg":
            label = (255 - label[:, 0]).long()
        elif name == "depth":
            label = label / zoom[:, None, None, None]
        elif name == "normals":
            label[:, 0] *= mirror[:, :1, None]
        labels[name] = label
    return image, labels


class ToDevice:
    """`batches`, re-iterable as they are, with their tensors on `device`."""

    def __init__(self, batches: Iterable, device: torch.device):
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}


# --- by name ------------------------------------------------------------------------------------
DATASETS = {"rooms": Rooms, "nyud": NYUD}


def open_dataset(config: Namespace, split: str) -> Dataset:
    """The "train" or "val" split that train.py's flags name, in memory if they ask for it."""
    if config.dataset == "rooms":
        length = config.train_rooms if split == "train" else config.val_rooms
        dataset = Rooms(split, config.tasks, length, config.size)
    else:
        dataset = NYUD(find_nyud(config.data_root, config.download), split, config.tasks)
    return InMemory(dataset) if config.cache else dataset
