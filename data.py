"""From samples to batches, and the one augmentation warp.

A sample is a dict of tensors at the image's own size: image (3, H, W) uint8, and a label for each
task, of which the task's kind says what it is (tasks.py): classes (H, W) with 255 = ignore, or
floats (channels, H, W) with 0 = invalid. `Checked` makes sure of it. `collate` pads a batch to its
largest image; `warp` then cuts, on the training device and with one grid, the image (bilinear) and
all labels (nearest) to the training size, augmented or not. Where samples come from:
datasets/rooms.py renders them, datasets/labels.py reads them, one's own is one more in DATASETS.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.archives import find_dataset
from datasets.classes import SEMSEG
from datasets.labels import Files
from datasets.rooms import ROOM_CLASSES, Rooms
from tasks import IGNORE, TASKS, make_tasks
from util.run import progress

KINDS = ("classes", "values", "distances", "directions")  # of tasks: see tasks.py
OF_A_TASK = ("weight metric higher_is_better outputs valid totals loss sums metrics best_constant "
             "colours").split()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the backbone expects
CLASSES = {"rooms": ROOM_CLASSES, **SEMSEG}  # of semseg, by name


def open_rooms(config, split: str) -> Dataset:
    length = config.train_rooms if split == "train" else config.val_rooms
    return Rooms(split, config.tasks, length, config.size)


def open_files(config, split: str) -> Dataset:
    root = find_dataset(config.dataset, config.data_root, config.download)
    return Files(config.dataset, root, split, config.tasks)


DATASETS = {"rooms": open_rooms, "nyud": open_files, "pascal": open_files}  # (config, split)


def open_dataset(config, split: str) -> Dataset:
    """The "train" or "val" split that `config`'s attributes name, in memory if they ask for it."""
    if config.dataset not in DATASETS:
        raise ValueError(f"unknown dataset {config.dataset!r}; expected one of "
                         f"{', '.join(DATASETS)}, or one that was put into data.DATASETS")
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    dataset = DATASETS[config.dataset](config, split)
    dataset = Checked(f"{config.dataset} {split}", dataset, tasks)
    if not len(dataset):
        raise ValueError(f"{config.dataset}: no image for {split} under {config.data_root}")
    return InMemory(dataset) if config.cache else dataset


class Checked(Dataset):
    """The image and the labels of `tasks` of each sample of `dataset`, called `name` in errors.

    They may come as arrays, and a single channel without its axis; a value that is not finite
    becomes 0, invalid. ValueError where a label is not what its task's kind says.
    """

    def __init__(self, name: str, dataset: Dataset, tasks: list):
        self.name, self.dataset, self.tasks = name, dataset, tasks
        for task in tasks:
            if task.kind not in KINDS:
                raise ValueError(f"task {task.name} is of kind {task.kind!r}; expected one of "
                                 f"{', '.join(KINDS)}")
            shape = "classes" if task.kind == "classes" else "channels"
            if lacks := [part for part in (shape, *OF_A_TASK) if not hasattr(task, part)]:
                raise ValueError(f"task {task.name} has no {', '.join(lacks)}: see tasks.py")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        sample = self.dataset[i]
        missing = {"image", *(task.name for task in self.tasks)} - sample.keys()
        if missing:
            raise ValueError(f"{self.name}: sample {i} has no {', '.join(sorted(missing))}; it has "
                             f"{', '.join(sample)}")
        image = torch.as_tensor(sample["image"])
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"{self.name}: sample {i}: its image is {described(image)}; expected "
                             "(3, H, W) of uint8")
        try:
            labels = {task.name: as_label(task, sample[task.name], image.shape[1:])
                      for task in self.tasks}
        except ValueError as error:
            raise ValueError(f"{self.name}: sample {i}: {error}") from None
        return {"image": image, **labels}


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def as_label(task, label, size: Sequence[int]) -> Tensor:
    """`label` of an image of `size` (H, W), as the kind of `task` has it: see tasks.py."""
    label, size = torch.as_tensor(label), tuple(size)
    floats, classes = label.is_floating_point(), task.kind == "classes"
    if floats and not classes and label.ndim == 2:
        label = label[None]
    shape = size if classes else (task.channels, *size)
    if floats == classes or label.shape != shape:
        raise ValueError(f"its {task.name} is {described(label)}; expected {shape} of "
                         f"{'integers' if classes else 'floats'}, as a task of {task.kind}")
    if not classes:
        return label.float().where(label.isfinite(), 0)
    label = label.long()
    wrong = label[(label != IGNORE) & ((label < 0) | (label >= task.classes))]
    if len(wrong):
        raise ValueError(f"its {task.name} holds class {wrong[0]}; expected 0 to "
                         f"{task.classes - 1}, or {IGNORE} = ignore")
    return label.to(torch.uint8)


# --- batches --------------------------------------------------------------------------------------
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
    size = torch.tensor([sample["image"].shape[1:] for sample in samples])
    H, W = size.amax(0).tolist()

    def padded(x: Tensor) -> Tensor:  # which `warp` never looks at
        return F.pad(x, (0, W - x.shape[-1], 0, H - x.shape[-2]))

    batch = {k: torch.stack([padded(sample[k]) for sample in samples]) for k in samples[0]}
    return {"size": size, **batch}


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


class ToDevice:
    """`batches`, re-iterable as they are, with their tensors on `device`."""

    def __init__(self, batches: Iterable, device: torch.device):
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}


# --- the warp -------------------------------------------------------------------------------------
def draw_augmentation(B: int, flip: bool, scales: Sequence[float],
                      rotate: float) -> dict[str, Tensor]:
    """Random flips, zooms (one of `scales`), turns up to +-`rotate` degrees and places of the cut
    for a batch, as `warp` takes them."""
    scale = torch.tensor(scales)[torch.randint(len(scales), (B,))]
    flipped = (torch.rand(B) < 0.5) & flip
    place = torch.rand(B, 2) * 2 - 1
    centre = place * (1 - 1 / scale.clamp(min=1))[:, None]  # the cut stays in the image
    angle = (torch.rand(B) * 2 - 1) * rotate
    return {"flip": flipped, "scale": scale, "centre": centre, "angle": angle}


def warp(batch: dict[str, Tensor], size: Sequence[int], flip: Tensor | None = None,
         scale: Tensor | None = None, centre: Tensor | None = None,
         angle: Tensor | None = None) -> tuple[Tensor, dict]:
    """Cut a batch to (h, w), one sampling grid for the image and all labels.

    flip (B,) bool mirrors left and right; scale (B,) zooms in; centre (B, 2) is the middle of
    the cut, x and y in -1..1 of the image; angle (B,), in degrees, turns the picture counter-
    clockwise. Values change as their task's kind says. Without them, a plain resize. What lies
    outside the image is invalid, and 0 in the normalised image.
    Returns the image (B, 3, h, w), normalised, and the labels, as tasks.py wants them.
    """
    image, B = batch["image"], len(batch["image"])

    def on_device(numbers) -> Tensor:  # the CPU does not wait for a GPU to take them
        return torch.as_tensor(numbers).to(image.device, non_blocking=True)

    zero = torch.zeros(B, device=image.device)
    zoom = zero + 1 if scale is None else on_device(scale)
    mirror = 1 - 2 * (zero if flip is None else on_device(flip).float())
    centre = zero[:, None, None] if centre is None else on_device(centre)[:, None]
    angle = zero if angle is None else on_device(angle).deg2rad()
    cos, sin = angle.cos(), angle.sin()

    # x, y in -1..1 of the cut -> pixels of the image, centres at .5: turn, zoom, move.
    y, x = ((torch.arange(n, device=image.device) + 0.5) * (2 / n) - 1 for n in size)
    cut = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)  # (h*w, 2): x, y
    half = batch["size"].flip(1).float()[:, None] / 2                    # (B, 1, 2): x, y
    turn = torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).view(B, 2, 2)
    pixel = (cut * half) @ turn.mT / zoom[:, None, None] + half * (1 + centre)  # (B, h*w, 2)
    pixel = pixel.view(B, *size, 2)

    # Outside the image is nothing, neither its last pixel nor the padding of the batch.
    end = 2 * half[:, None]
    inside = ((pixel >= 0) & (pixel <= end)).all(-1)                     # (B, h, w)
    pixel = pixel.clamp(min=0.5).minimum(end - 0.5)  # never blend with padding
    padded = on_device(image.shape[:1:-1])                               # W, H of the batch
    bilinear = pixel / padded * 2 - 1                                    # as grid_sample wants it
    nearest = (pixel.floor() + 0.5) / padded * 2 - 1  # at centres: no rounding depends on padding

    image = F.grid_sample(image.float() / 255, bilinear, align_corners=False)
    mean, std = on_device(MEAN)[:, None, None], on_device(STD)[:, None, None]
    image = (image - mean) / std * inside[:, None]
    labels = {}
    for name in batch.keys() - {"image", "size"}:
        label, kind = batch[name].float(), TASKS[name].kind
        if kind == "classes":
            label = IGNORE - label[:, None]  # so that 0 is invalid in all of them
        label = F.grid_sample(label, nearest, mode="nearest", align_corners=False)
        label = label * inside[:, None]
        if kind == "classes":
            label = (IGNORE - label[:, 0]).round().long()
        elif kind == "distances":
            label = label / zoom[:, None, None, None]
        elif kind == "directions":  # x and y turn the other way: from the image to the cut
            xy = torch.einsum("bij,bihw->bjhw", turn, label[:, :2])
            label = torch.cat([xy, label[:, 2:]], 1)
        labels[name] = label
    return image, labels
