"""From samples to batches, and the one augmentation warp.

A sample is a dict of tensors at the image's own size: image (3, H, W) uint8 and the labels that the
tasks ask for: semseg, human_parts and sal (H, W) uint8 with 255 = ignore, depth (1, H, W) float32
metres with 0 = invalid, normals (3, H, W) float32 (x right, y down, z to the camera) with 0, 0, 0
= invalid. `collate` pads a batch to its largest image; `warp` then cuts, on the training device
and with one grid, the image (bilinear) and all labels (nearest) to the training size, augmented or
not. Where samples come from: datasets/rooms.py renders them, datasets/labels.py reads them.
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
from util.run import progress

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the backbone expects
CLASSES = {"rooms": ROOM_CLASSES, **SEMSEG}  # of semseg, by name


def open_dataset(config, split: str) -> Dataset:
    """The "train" or "val" split that `config`'s attributes name, in memory if they ask for it."""
    if config.dataset == "rooms":
        length = config.train_rooms if split == "train" else config.val_rooms
        dataset = Rooms(split, config.tasks, length, config.size)
    else:
        root = find_dataset(config.dataset, config.data_root, config.download)
        dataset = Files(config.dataset, root, split, config.tasks)
    return InMemory(dataset) if config.cache else dataset


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

    def padded(x: Tensor) -> Tensor:  # only classes have no channels
        return F.pad(x, (0, W - x.shape[-1], 0, H - x.shape[-2]), value=255 if x.ndim == 2 else 0)

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

    flip (B,) bool mirrors left and right; scale (B,) zooms in and divides depth, as walking closer
    would; centre (B, 2) is the middle of the cut, x and y in -1..1 of the image; angle (B,), in
    degrees, turns the picture counter-clockwise. Normals turn and flip with it. Without them, a
    plain resize. What lies outside the image is invalid, and 0 in the normalised image.
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
            xy = torch.einsum("bij,bihw->bjhw", turn, label[:, :2])
            label = torch.cat([xy, label[:, 2:]], 1)
        labels[name] = label
    return image, labels
