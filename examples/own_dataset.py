"""Your own dataset with a task of your own: street photographs of people and their clothes.

    git clone https://github.com/bearpaw/clothing-co-parsing photos     # 135 MB to download
    python -m examples.own_dataset --data-root photos                   # 4 minutes of one CPU core
    python -c "import examples.own_dataset, eval; eval.main()" --checkpoint runs/clothes/best.pt

1,004 of the photographs come with a label map. These files are read:

    photos/label_list.mat                       label_list: 59 names, such as null, hair and jeans
    photos/photos/0001.jpg                      the photo
    photos/annotations/pixel-level/0001.mat     groundtruth: for each pixel, an index into the names

All four tasks are made from the label map: seven classes (semseg), the person (sal), the borders
between labels (edge), and a task that is new in this file, the height of a pixel on the person.
The backbone ships with this repository. It was trained on rendered rooms and has never seen a
photograph.

To use your own photos, copy this file. Change `Photos`, which finds and reads the files, and the
four entries at the end. If you need no new task, delete `Height`.

The dataset is from Yang, Luo and Lin, "Clothing Co-Parsing by Joint Image Segmentation and
Labeling", CVPR 2014. The rights in the photos stay with their owners.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import train
from data import CLASSES, DATASETS
from nyud_pascal import read_image, read_mat
from recipes import RECIPES
from tasks import IGNORE, TASKS
from util import reading

# Our classes, and the dataset's labels that each of them combines. All other labels, such as bag
# and suit, are ignored by semseg.
CLOTHES = {
    "background": "null",
    "skin": "skin",
    "hair": "hair",
    "upper": "blazer blouse cape cardigan coat hoodie jacket jumper shirt sweater sweatshirt "
             "t-shirt top vest",
    "lower": "jeans leggings pants shorts skirt stockings tights",
    "dress": "dress romper",
    "shoes": "boots clogs flats heels loafers pumps sandals shoes sneakers wedges",
}
UNLABELLED = ("0536",)      # photos to leave out, because their label map is empty


class Height:
    """How high on the person is this pixel? It is 1 at the top of the head and 0 at the feet.

    The metric is the mean absolute error. Pixels outside the person have no label: they are 0.
    """

    name = "height"
    kind = "values"             # one number per pixel; a flip or zoom moves it but keeps its value
    channels = 1                # numbers per pixel in the label
    outputs = 1                 # numbers per pixel in the prediction
    weight = 10.0               # weight of this task's loss in the total loss (eq. 8)
    metric, higher_is_better = "error", False
    marks = {"feet": 0.1, "hips": 0.5, "head": 1.0}     # captions in the picture of predictions

    def valid(self, label: Tensor) -> Tensor:
        """A mask (B, 1, H, W) of the person's pixels."""
        return label > 0

    def loss(self, pred: Tensor, label: Tensor) -> Tensor:
        """Mean absolute error over the valid pixels of a batch."""
        valid = self.valid(label)
        error = (pred.float() - label).abs() * valid
        return error.sum() / valid.sum().clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """Number of valid pixels and sum of errors; eval.py adds these up over all images."""
        error = (pred - label).abs()[self.valid(label)]
        return torch.tensor([len(error), error.sum()], dtype=torch.float64)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        pixels, error = sums.tolist()
        return {"error": error / pixels if pixels else float("nan")}

    def best_constant(self, values: Tensor) -> Tensor:
        """The best constant prediction (outputs,) for these valid labels (N,)."""
        return values.median()[None]

    def colours(self, x: Tensor) -> Tensor:
        """A label or a prediction (1, H, W) as a grey picture (3, H, W)."""
        return x.clamp(0, 1).expand(3, -1, -1)


class Photos(Dataset):
    """Samples at the size of the network's input: image (3, H, W) uint8, and one label per task.

    Your dataset may return samples at each photo's own size, because batches are resized later.
    Here that would lose most pixels of thin edges: the photos are five times as high and wide as
    the input. So they are shrunk as they are read, before the edges are found.
    """

    def __init__(self, config, split: str):
        """config: the settings of the run. split: "train" or "val"."""
        self.root = Path(config.data_root)
        self.size = config.size
        self.class_of_label = read_classes(self.root / "label_list.mat")
        files = self.root.glob("annotations/pixel-level/*.mat")
        names = sorted(file.stem for file in files if file.stem not in UNLABELLED)
        validation = names[::6]
        if split == "val":
            self.names = validation
        else:
            self.names = [name for name in names if name not in validation]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        photo, label = self.read(self.names[i])
        person = label > 0                                  # 0 is null, the background
        return {
            "image": photo.transpose(2, 0, 1),
            "semseg": self.class_of_label[label],
            "sal": person.astype(np.uint8),
            "edge": borders(label),
            "height": height_on_person(person),
        }

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A photo (H, W, 3) and its label map (H, W), shrunk. A bad file raises ValueError."""
        photo = read_image(self.root / f"photos/{name}.jpg")
        file = self.root / f"annotations/pixel-level/{name}.mat"
        with reading(file, "a label map: a MATLAB file with the variable groundtruth"):
            label = read_mat(file, "groundtruth")
            if label.shape != photo.shape[:2]:
                raise ValueError(f"has shape {label.shape}, but its photo has {photo.shape[:2]}")
            if label.max() >= len(self.class_of_label):
                raise ValueError(f"holds label {label.max()}, which has no name in label_list.mat")
            if not label.any():
                raise ValueError("labels nobody; add the photo to UNLABELLED")
        height, width = self.size
        photo = Image.fromarray(photo).resize((width, height), Image.Resampling.BOX)
        label = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
        return np.array(photo), np.array(label)


def read_classes(file: Path) -> np.ndarray:
    """For each of the dataset's labels, the index of its class in CLOTHES, or IGNORE."""
    with reading(file, "the label names of https://github.com/bearpaw/clothing-co-parsing"):
        labels = read_mat(file, "label_list").tolist()
        classes = np.full(len(labels), IGNORE, np.uint8)
        for number, names in enumerate(CLOTHES.values()):
            for name in names.split():
                classes[labels.index(name)] = number
    return classes


def borders(label: np.ndarray) -> np.ndarray:
    """1 at the pixels on both sides of each border between two labels, 0 elsewhere: (H, W)."""
    edge = np.zeros(label.shape, np.uint8)
    beside = label[:, 1:] != label[:, :-1]
    below = label[1:] != label[:-1]
    edge[:, 1:] |= beside
    edge[:, :-1] |= beside
    edge[1:] |= below
    edge[:-1] |= below
    return edge


def height_on_person(person: np.ndarray) -> np.ndarray:
    """The mask of a person (H, W) -> the label of `Height` (H, W) float32, 0 outside the person."""
    rows = np.flatnonzero(person.any(axis=1))
    top, bottom = rows[0], rows[-1] + 1
    middle = np.arange(len(person)) + 0.5                   # y of the middle of each row
    height = (bottom - middle) / (bottom - top)
    return (height[:, None] * person).astype(np.float32)


# A second class map, such as one of materials, needs the line TASKS["material"] =
# Segmentation("material", 3, weight=1.0), its name in "tasks" below, and an entry in __getitem__.
# Segmentation is in tasks.py. To train Swin-Tiny on a GPU, start from RECIPES["nyud"] instead.
TASKS["height"] = Height()
DATASETS["clothes"] = Photos
CLASSES["clothes"] = tuple(CLOTHES)                         # classes of semseg
RECIPES["clothes"] = {**RECIPES["rooms"], "tasks": "semseg,sal,edge,height",
                      "data_root": "photos", "size": "168x112", "epochs": 3, "lr": 4e-3}

if __name__ == "__main__":
    import sys
    train.main(["--dataset", "clothes", *sys.argv[1:]])
