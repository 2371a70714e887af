"""From a dataset to training batches: check samples, collate them, and augment with one warp.

A sample is a dict of tensors at the image's own size: "image" (3, H, W) uint8, and one label per
task, as the task's kind says (tasks.py). `Checked` makes sure of that, `collate` pads a batch to
its largest image, and `warp` cuts image and labels to the training size on the training device.
All of them go through one sampling grid, so they stay aligned: the image is interpolated
bilinearly, and a label takes the nearest pixel.

    dataset = open_dataset(config, "train")
    batches = epoch_batches(len(dataset), batch_size=6, epochs=300, seed=0)
    for batch in loader(dataset, batches, workers=4):
        augmentation = draw_augmentation(6, flip=True, scales=(1.0, 1.2, 1.5), rotate=0.0)
        image, labels = warp(batch, (448, 448), "cuda", **augmentation)

rooms.py renders samples, nyud_pascal.py reads them. Your own dataset is one more entry in DATASETS.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nyud_pascal import SEMSEG, Files, find_dataset
from rooms import ROOM_CLASSES, Rooms
from tasks import IGNORE, TASKS, make_tasks
from util import progress

KINDS = ("classes", "values", "distances", "directions")      # of labels: see tasks.py
MEAN = (0.485, 0.456, 0.406)                # of ImageNet, as the pretrained backbone expects
STD = (0.229, 0.224, 0.225)
CLASSES = {"rooms": ROOM_CLASSES, **SEMSEG}                   # of semseg, per dataset


# --- datasets -------------------------------------------------------------------------------------
def open_rooms(config, split: str) -> Dataset:
    length = config.train_rooms if split == "train" else config.val_rooms
    return Rooms(split, config.tasks, length, config.size)


def open_files(config, split: str) -> Dataset:
    root = find_dataset(config.dataset, config.data_root, config.download)
    return Files(config.dataset, root, split, config.tasks)


# A dataset is opened by a function of (config, "train" or "val").
DATASETS = {"rooms": open_rooms, "nyud": open_files, "pascal": open_files}


def open_dataset(config, split: str) -> Dataset:
    """The "train" or "val" split of `config.dataset`, checked. Raises ValueError.

    Reads these attributes of config: dataset, tasks, cache, and those that the dataset needs.
    """
    if config.dataset not in DATASETS:
        raise ValueError(f"unknown dataset {config.dataset!r}; expected one of "
                         f"{', '.join(DATASETS)}, or your own, added to data.DATASETS")
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    dataset = DATASETS[config.dataset](config, split)
    if len(dataset) == 0:
        raise ValueError(f"{config.dataset}: the {split} split has no images")
    dataset = Checked(f"{config.dataset} {split}", dataset, tasks)
    return InMemory(dataset) if config.cache else dataset


class Checked(Dataset):
    """The image and the labels of `tasks` of each sample, or a ValueError that names the sample.

    Labels may be numpy arrays, and (H, W) instead of (1, H, W). A value that is not finite becomes
    0, which is invalid. name: the dataset's, for error messages.
    """

    def __init__(self, name: str, dataset: Dataset, tasks: list):
        for task in tasks:
            if task.kind not in KINDS:
                raise ValueError(f"task {task.name} has kind {task.kind!r}; expected one of "
                                 f"{', '.join(KINDS)}")
        self.name = name
        self.dataset = dataset
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        try:
            return check_sample(self.dataset[i], self.tasks)
        except StopIteration as error:                        # a loader would take it for the end
            raise RuntimeError(f"{self.name}: sample {i}: StopIteration") from error
        except (ValueError, OSError) as error:
            message = " ".join((str(error) or repr(error)).split())     # all of its lines, on one
            raise ValueError(f"{self.name}: sample {i}: {message}") from error
        except Exception as error:                            # a bug, which keeps its traceback
            error.add_note(f"{self.name}: sample {i}")
            raise


def check_sample(sample: dict, tasks: list) -> dict[str, Tensor]:
    """The sample's image and labels as tensors. Raises ValueError if one is missing or wrong."""
    if not isinstance(sample, dict):
        raise ValueError(f"it is a {type(sample).__name__}; expected a dict of image and labels")
    tensors = {}
    for name in ("image", *(task.name for task in tasks)):
        if name not in sample:
            raise ValueError(f"it has no {name}; it has {', '.join(sample)}")
        try:
            tensors[name] = torch.as_tensor(sample[name]).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"its {name} cannot become a tensor: {error}") from error
    image = tensors["image"]
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or image.numel() == 0:
        raise ValueError(f"its image is {described(image)}; expected (3, H, W) of uint8")
    checked = {"image": image}
    for task in tasks:
        checked[task.name] = check_label(task, tensors[task.name], tuple(image.shape[1:]))
    return checked


def check_label(task, label: Tensor, size: tuple[int, int]) -> Tensor:
    """One label as (H, W) uint8 of classes or (C, H, W) float32. Raises ValueError."""
    problem = f"its {task.name} is {described(label)}; expected"
    if task.kind == "classes":
        if label.is_floating_point() or label.shape != size:
            raise ValueError(f"{problem} {size} of integers, the classes")
        label = label.long()
        wrong = label[(label != IGNORE) & ((label < 0) | (label >= task.classes))]
        if len(wrong):
            raise ValueError(f"its {task.name} contains class {wrong[0]}; expected 0 to "
                             f"{task.classes - 1}, or {IGNORE} = ignore")
        return label.to(torch.uint8)

    if not label.is_floating_point():       # depth in millimetres must not pass as metres
        raise ValueError(f"{problem} floats; if these are millimetres, convert them to metres: "
                         "label.astype(numpy.float32) / 1000")
    if label.ndim == 2:
        label = label[None]
    if label.shape != (task.channels, *size):
        raise ValueError(f"{problem} {(task.channels, *size)} of floats, as its image is {size}")
    return label.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


class InMemory(Dataset):
    """All samples of `dataset`, read once and kept in memory (--cache)."""

    def __init__(self, dataset: Dataset):
        self.samples = []
        for i in progress(range(len(dataset)), "reading into memory"):
            self.samples.append(dataset[i])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.samples[i]


# --- batches --------------------------------------------------------------------------------------
def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples, padded at the right and bottom to the largest.

    "size" (B, 2) keeps each image's own H, W, so that `warp` never looks at the padding.
    """
    size = torch.tensor([sample["image"].shape[1:] for sample in samples])
    H, W = size.amax(0).tolist()
    batch = {"size": size}
    for name in samples[0]:
        padded = []
        for sample in samples:
            x = sample[name]
            padded.append(F.pad(x, (0, W - x.shape[-1], 0, H - x.shape[-2])))
        batch[name] = torch.stack(padded)
    return batch


def epoch_batches(length: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The sample indices of every batch of a run. An incomplete last batch of an epoch is dropped.

    Each epoch is shuffled by (seed, epoch). Step i sees the same images in every run with this
    seed, so resuming a run means slicing this list.
    """
    batch_size = min(batch_size, length)
    batches = []
    for epoch in range(epochs):
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = generator.permutation(length).tolist()
        for i in range(0, length - batch_size + 1, batch_size):
            batches.append(order[i:i + batch_size])
    return batches


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0) -> DataLoader:
    """Collated batches in the given order, read by `workers` processes (0: by this one).

    Samples contain no randomness, so the number of workers never changes a result.
    """
    if isinstance(dataset, InMemory):
        workers = 0                         # each would get its own copy, and has nothing to read
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available())


# --- the warp -------------------------------------------------------------------------------------
def draw_augmentation(B: int, flip: bool, scales: Sequence[float],
                      rotate: float) -> dict[str, Tensor]:
    """Random arguments of `warp` for B images: half of them flipped (if `flip`), zoomed by one of
    `scales`, turned by up to `rotate` degrees either way, and cut out anywhere in the image."""
    scale = torch.tensor(scales)[torch.randint(len(scales), (B,))]
    flipped = (torch.rand(B) < 0.5) & flip
    place = torch.rand(B, 2) * 2 - 1
    reach = 1 - 1 / scale.clamp(min=1)                        # as far as the cut fits the image
    centre = place * reach[:, None]
    angle = (torch.rand(B) * 2 - 1) * rotate
    return {"flip": flipped, "scale": scale, "centre": centre, "angle": angle}


def warp(batch: dict[str, Tensor], size: Sequence[int], device: torch.device | str = "cpu",
         flip: Tensor | None = None, scale: Tensor | None = None, centre: Tensor | None = None,
         angle: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Move a batch to `device`, and cut it to size (h, w) through one grid for image and labels.

    flip: (B,) bool, mirror left and right.
    scale: (B,), zoom in by this factor, which divides distances by it.
    centre: (B, 2), the middle of the cut, x and y in -1..1 of the image.
    angle: (B,), degrees by which the image turns counter-clockwise; directions turn with it.
    Without them this is a plain resize. Outside the image, labels are invalid and the image is 0.
    Returns the normalised image (B, 3, h, w), and the labels in the form tasks.py expects.
    """
    B, _, H, W = batch["image"].shape
    h, w = size
    flip = torch.zeros(B) if flip is None else flip
    scale = torch.ones(B) if scale is None else scale
    centre = torch.zeros(B, 2) if centre is None else centre
    angle = torch.zeros(B) if angle is None else angle

    def send(x) -> Tensor:                  # non_blocking: the CPU does not wait for the GPU
        return torch.as_tensor(x).to(device, non_blocking=True)

    mirror = 1 - 2 * send(flip).float()
    zoom = send(scale)[:, None, None]
    centre = send(centre)[:, None]
    angle = send(angle).deg2rad()

    # Each pixel's place in the cut, x and y in -1..1, pixel centres at .5.
    x = (torch.arange(w, device=device) + 0.5) * (2 / w) - 1
    y = (torch.arange(h, device=device) + 0.5) * (2 / h) - 1
    cut = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)      # (h*w, 2)

    # The same place in pixels of the image: flip and turn, zoom, move.
    half = send(batch["size"]).flip(1).float()[:, None] / 2   # (B, 1, 2): half of W and H
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).view(B, 2, 2)
    pixel = (cut * half) @ turn.mT / zoom + half * (1 + centre)                 # (B, h*w, 2)
    pixel = pixel.view(B, h, w, 2)

    # Outside the image there is nothing: neither its border repeated, nor the batch's padding.
    end = 2 * half[:, None]
    inside = ((pixel >= 0) & (pixel <= end)).all(-1)          # (B, h, w)
    pixel = pixel.clamp(min=0.5).minimum(end - 0.5)           # never interpolate with padding

    # grid_sample counts in -1..1 of the padded batch.
    padded = send([W, H])
    bilinear = pixel / padded * 2 - 1
    nearest = (pixel.floor() + 0.5) / padded * 2 - 1          # at pixel centres: rounds nowhere

    image = send(batch["image"]).float() / 255
    image = F.grid_sample(image, bilinear, align_corners=False)
    mean = send(MEAN)[:, None, None]
    std = send(STD)[:, None, None]
    image = (image - mean) / std * inside[:, None]

    labels = {}
    for name, label in batch.items():
        if name not in ("image", "size"):
            kind = TASKS[name].kind
            labels[name] = warp_label(kind, send(label).float(), nearest, inside, zoom, turn)
    return image, labels


def warp_label(kind: str, label: Tensor, grid: Tensor, inside: Tensor, zoom: Tensor,
               turn: Tensor) -> Tensor:
    """`warp` for labels of one kind: (B, H, W) or (B, C, H, W) -> (B, h, w) or (B, C, h, w)."""
    if kind == "classes":
        label = F.grid_sample(label[:, None], grid, mode="nearest", align_corners=False)
        return torch.where(inside, label[:, 0], float(IGNORE)).long()

    label = F.grid_sample(label, grid, mode="nearest", align_corners=False)
    label = label * inside[:, None]
    if kind == "distances":
        label = label / zoom[:, None]
    if kind == "directions":                # turn^T, because `turn` leads from the cut to the image
        xy = torch.einsum("bij,bihw->bjhw", turn, label[:, :2])
        label = torch.cat([xy, label[:, 2:]], 1)
    return label
