"""Your own dataset with your own task: photos of fields with a class map and a moisture map.

    photos/images/1.png        the picture
    photos/semseg/1.png        one class per pixel, 0 to 2; 255 means "ignore this pixel"
    photos/moisture/1.npy      float, 0 to 1; 0 or NaN means "not measured"

Every fifth image is for validation. Run the example from the folder that holds train.py:

    python -m examples.own_dataset --data-root photos
    python -c "import examples.own_dataset, eval; eval.main()" --checkpoint runs/fields/best.pt

The run uses the recipe for NYUD-v2 (Swin-Tiny with ImageNet weights, 448x448, 300 epochs).
A dry run, which takes about a minute and downloads nothing (--data-root is "photos" by default):

    python -m examples.own_dataset --weights none --backbone mini --size 112 --epochs 2
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import train
from data import CLASSES, DATASETS
from nyud_pascal import read_array, read_image
from recipes import RECIPES
from tasks import TASKS


class Moisture:
    """Share of water in the ground, 0 to 1; the metric is the mean absolute error."""

    name = "moisture"
    kind = "values"             # one number per pixel; a flip or zoom moves it but keeps its value
    channels = 1                # numbers per pixel in the label
    outputs = 1                 # numbers per pixel in the prediction
    weight = 10.0               # weight of this task's loss in the total loss (eq. 8)
    metric, higher_is_better = "error", False

    def valid(self, label: Tensor) -> Tensor:
        """A mask (B, 1, H, W) of the measured pixels."""
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
    """Samples at the image's own size: image (3, H, W) uint8, and one label per task."""

    def __init__(self, config, split: str):
        """config: the settings of the run. split: "train" or "val"."""
        self.root = Path(config.data_root)
        names = sorted(path.stem for path in self.root.glob("images/*.png"))
        validation = names[::5]
        if split == "val":
            self.names = validation
        else:
            self.names = [name for name in names if name not in validation]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        name = self.names[i]
        image = read_image(self.root / f"images/{name}.png")
        return {
            "image": image.transpose(2, 0, 1),
            "semseg": read_image(self.root / f"semseg/{name}.png", None),
            "moisture": read_array(self.root / f"moisture/{name}.npy"),
        }


# A second class map, such as one of materials, needs the line TASKS["material"] =
# Segmentation("material", 3, weight=1.0), its name in "tasks" below, a file for each image, and an
# entry in __getitem__. Segmentation is in tasks.py.
TASKS["moisture"] = Moisture()
DATASETS["fields"] = Photos
CLASSES["fields"] = ("soil", "crop", "weed")            # classes of semseg
RECIPES["fields"] = {**RECIPES["nyud"], "tasks": "semseg,moisture", "data_root": "photos"}

if __name__ == "__main__":
    import sys
    train.main(["--dataset", "fields", *sys.argv[1:]])
