"""From a dataset to training batches: check samples, collate them, and augment with one warp.

A sample is a dict of tensors at the image's own size: "image" (3, H, W) uint8, and one label per
task, whose form depends on the task's kind (tasks.py). `Checked` checks this, `collate` pads the
samples of a batch to a common size, and `warp` resamples images and labels to the training size on
the training device. Image and labels are sampled on one grid, so they stay aligned. The image is
interpolated bilinearly, and a label takes the nearest pixel.

    dataset = open_dataset(config, "train")
    batches = epoch_batches(len(dataset), batch_size=6, epochs=300, seed=0)
    for batch in loader(dataset, batches, workers=4):
        augmentation = draw_augmentation(6, flip=True, scales=(1.0, 1.2, 1.5), rotate=0.0)
        image, labels = warp(batch, (448, 448), "cuda", **augmentation)

rooms.py renders samples, and nyud_pascal.py reads them from files. To add your own dataset, add an
entry to DATASETS, as in examples/own_dataset.py.
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

KINDS = ("classes", "values", "distances", "directions")      # see tasks.py
MEAN = (0.485, 0.456, 0.406)                # of ImageNet, as the pretrained backbone expects
STD = (0.229, 0.224, 0.225)
CLASSES = {"rooms": ROOM_CLASSES, **SEMSEG}                   # semseg's classes: names or number


# --- datasets -------------------------------------------------------------------------------------
def open_rooms(config, split: str) -> Dataset:
    if split == "train":
        return Rooms("train", config.tasks, config.train_rooms, config.size, config.room_seed,
                     config.night)
    return Rooms("val", config.tasks, config.val_rooms, config.size, night=config.night)


def open_files(config, split: str) -> Dataset:
    root = find_dataset(config.dataset, config.data_root, config.download)
    return Files(config.dataset, root, split, config.tasks)


# For each dataset, a function that opens a split of it: (config, "train" or "val") -> Dataset.
DATASETS = {"rooms": open_rooms, "nyud": open_files, "pascal": open_files}


def open_dataset(config, split: str) -> Dataset:
    """The "train" or "val" split of `config.dataset`, whose samples are checked when they are read.

    Uses config.dataset, config.data_root, config.tasks, config.cache, and the settings that this
    dataset needs. Raises ValueError for an unknown dataset or task, missing files, or a split
    without images.
    """
    if config.dataset not in DATASETS:
        raise ValueError(f"unknown dataset {config.dataset!r}; expected one of "
                         f"{', '.join(DATASETS)}, or your own dataset, whose file must be imported "
                         "first (see examples/own_dataset.py)")
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    dataset = DATASETS[config.dataset](config, split)
    if len(dataset) == 0:
        raise ValueError(f"{config.dataset}: the {split} split in {config.data_root} has no images")
    dataset = Checked(f"{config.dataset} {split}", dataset, tasks)
    return InMemory(dataset, f"{config.dataset} {split} images") if config.cache else dataset


class Checked(Dataset):
    """A dataset that checks each sample of `dataset`. A bad sample raises a ValueError naming it.

    Only the image and the labels of `tasks` are kept. Both may be numpy arrays. A float label with
    one channel may be (H, W) instead of (1, H, W). In float labels, NaN and infinity become 0,
    which means "no label" for depth. name: the name of the dataset, for error messages. If the
    dataset has a list `ids` or `names` of its samples' names, error messages contain those too.
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
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())            # on a single line
            raise ValueError(f"{self.sample_name(i)}: {message}") from error
        except Exception as error:                            # a bug keeps its traceback
            error.add_note(self.sample_name(i))
            raise

    def sample_name(self, i: int) -> str:
        """What error messages call sample i: its number, and its name if the dataset tells it."""
        for attribute in ("ids", "names"):
            names = getattr(self.dataset, attribute, None)
            if isinstance(names, Sequence) and len(names) == len(self):
                return f"{self.name}: sample {i} ({names[i]})"
        return f"{self.name}: sample {i}"


def check_sample(sample: dict, tasks: list) -> dict[str, Tensor]:
    """Convert the image and the labels of `tasks` to tensors.

    Raises ValueError if one of them is missing or wrong.
    """
    if not isinstance(sample, dict):
        raise ValueError(f"the sample is a {type(sample).__name__}; expected a dict of image "
                         "and labels")
    tensors = {}
    for name in ("image", *(task.name for task in tasks)):
        if name not in sample:
            raise ValueError(f"the sample has no {name}; it has {', '.join(sample)}")
        tensors[name] = torch.as_tensor(sample[name])
    image = tensors["image"]
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"image is {described(image)}; expected (3, H, W) of uint8")
    checked = {"image": image}
    for task in tasks:
        checked[task.name] = check_label(task, tensors[task.name], tuple(image.shape[1:]))
    return checked


def check_label(task, label: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert a label to classes (H, W) uint8, or to values (C, H, W) float32.

    size: (H, W) of the image. Raises ValueError if the shape, data type or classes are wrong.
    """
    problem = f"{task.name} is {described(label)}; expected"
    if task.kind == "classes":
        if label.is_floating_point() or label.shape != size:
            raise ValueError(f"{problem} {size} of integers (classes)")
        label = label.long()
        wrong = label[(label != IGNORE) & ((label < 0) | (label >= task.classes))]
        if len(wrong):
            raise ValueError(f"{task.name} contains class {wrong[0]}; expected 0 to "
                             f"{task.classes - 1}, or {IGNORE} = ignore")
        return label.to(torch.uint8)

    if not label.is_floating_point():       # depth in millimetres must not pass as metres
        raise ValueError(f"{problem} floats; if these are millimetres, convert them to metres: "
                         "label.astype(numpy.float32) / 1000")
    if label.ndim == 2:
        label = label[None]
    if label.shape != (task.channels, *size):
        raise ValueError(f"{problem} {(task.channels, *size)} of floats, because the image is "
                         f"{size}")
    return label.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


class InMemory(Dataset):
    """All samples of `dataset`, read once and kept in memory (--cache).

    label: the text of the progress line.
    """

    def __init__(self, dataset: Dataset, label: str):
        self.samples = []
        for i in progress(range(len(dataset)), label):
            self.samples.append(dataset[i])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.samples[i]


# --- batches --------------------------------------------------------------------------------------
def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples, padded at the right and bottom to the largest height and width.

    "size" (B, 2) holds each image's own H, W, so that `warp` never uses the padding.
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

    The shuffling of an epoch depends only on the seed and the epoch's number. Step i therefore sees
    the same images in every run with these arguments, and a run is resumed by slicing this list.
    If `length` is less than batch_size, each batch holds all samples.
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
    """Collated batches in the given order, read by `workers` processes (0: by this process).

    A sample of our datasets depends only on its index, so the number of workers changes no result.
    """
    if isinstance(dataset, InMemory):
        workers = 0                         # workers would only copy samples that are in memory
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available())


def single_images(dataset: Dataset, workers: int = 0) -> DataLoader:
    """Batches of one image each, in the dataset's order, as evaluation needs them."""
    return loader(dataset, [[i] for i in range(len(dataset))], workers)


# --- the warp -------------------------------------------------------------------------------------
def draw_augmentation(B: int, flip: bool, scales: Sequence[float],
                      rotate: float) -> dict[str, Tensor]:
    """Random arguments of `warp` for B images.

    Each image is flipped with probability 1/2 (if `flip`), zoomed by one of `scales`, and turned by
    up to `rotate` degrees either way. If it is zoomed in, the part that is kept (the cut) may lie
    anywhere in the image.
    """
    scale = torch.tensor(scales)[torch.randint(len(scales), (B,))]
    flipped = (torch.rand(B) < 0.5) & flip
    place = torch.rand(B, 2) * 2 - 1
    reach = 1 - 1 / scale.clamp(min=1)                        # keeps an unrotated cut in the image
    centre = place * reach[:, None]
    angle = (torch.rand(B) * 2 - 1) * rotate
    return {"flip": flipped, "scale": scale, "centre": centre, "angle": angle}


def warp(batch: dict[str, Tensor], size: Sequence[int], device: torch.device | str = "cpu",
         flip: Tensor | None = None, scale: Tensor | None = None, centre: Tensor | None = None,
         angle: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Move a batch to `device`, and resample image and labels to size (h, w) on one grid.

    flip: (B,) bool, mirror left and right; directions are mirrored too.
    scale: (B,), zoom in by this factor; distances are divided by it.
    centre: (B, 2), x and y of the middle of the cut (the part of the image that is shown), from -1
        to 1 across the image.
    angle: (B,), degrees by which the image is turned counter-clockwise before it is mirrored;
        directions turn with it.

    Without the last four arguments, `warp` is a plain resize. Returns the normalised image
    (B, 3, h, w), and the labels in the form that tasks.py expects. Outside the original image,
    classes are IGNORE, and everything else is 0.
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

    # The position of the centre of each new pixel: x and y from -1 to 1.
    x = (torch.arange(w, device=device) + 0.5) * (2 / w) - 1
    y = (torch.arange(h, device=device) + 0.5) * (2 / h) - 1
    position = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)     # (h*w, 2)

    # The same position in pixels of the image.
    height_width = send(batch["size"]).float()
    half = height_width[:, [1, 0]][:, None] / 2               # (B, 1, 2): x comes first
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).view(B, 2, 2)
    turned = (position * half) @ turn.mT                      # mirror and rotate: (B, h*w, 2)
    pixel = turned / zoom + half * (1 + centre)               # zoom, then move
    pixel = pixel.view(B, h, w, 2)

    # Mask everything outside the image, so that neither padding nor a repeated border shows.
    end = 2 * half[:, None]
    inside = ((pixel >= 0) & (pixel <= end)).all(-1)          # (B, h, w)
    pixel = pixel.clamp(min=0.5).minimum(end - 0.5)           # never interpolate with padding

    # grid_sample expects positions from -1 to 1 across the padded images.
    padded = send([W, H])
    bilinear = pixel / padded * 2 - 1
    nearest = (pixel.floor() + 0.5) / padded * 2 - 1          # at pixel centres: no ties

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
    """Warp labels of one kind: (B, H, W) or (B, C, H, W) -> (B, h, w) or (B, C, h, w)."""
    if kind == "classes":
        label = F.grid_sample(label[:, None], grid, mode="nearest", align_corners=False)
        return torch.where(inside, label[:, 0], float(IGNORE)).long()

    label = F.grid_sample(label, grid, mode="nearest", align_corners=False)
    label = label * inside[:, None]
    if kind == "distances":
        label = label / zoom[:, None]
    if kind == "directions":                # turn^T, because `turn` maps the cut to the image
        xy = torch.einsum("bij,bihw->bjhw", turn, label[:, :2])
        label = torch.cat([xy, label[:, 2:]], 1)
    return label
