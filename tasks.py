"""Dense prediction tasks: each has a loss, metrics, a best constant prediction, and colours.

A label marks its own invalid pixels: class 255, depth 0 or normal (0, 0, 0). Losses and metrics
use valid pixels only. `loss` is a mean over the valid pixels of the batch that it is given, or 0 if
no pixel is valid; the training loss is the sum of weight * loss over the tasks (eq. 8).

A metric is computed from sums over the whole dataset, divided once at the end, so it does not
depend on how the dataset is cut into batches: add up `sums(pred, label)` of all batches, then call
`metrics(total)`. `sums` expects tensors on the CPU, and returns float64. Metrics are NaN if there
is no valid pixel, or if a prediction at a valid pixel is NaN.

    task = make_tasks(["depth"], classes=None)[0]
    task.loss(pred, label).backward()
    task.metrics(task.sums(pred.detach().cpu(), label.cpu()))    # {"rmse": ..., "abs_rel": ...}

Shapes: B batch, H W pixels, C channels. Predictions are (B, outputs, H, W). A task's `kind`
describes its labels, and so decides how data.py augments them:

    classes      (B, H, W) int64, 0 to task.classes - 1, or 255 = ignore
    values       (B, C, H, W) float, C = task.channels; augmentation does not change the values
    distances    like values, but zooming in by s divides them by s; for depth in metres
    directions   like values, but they are vectors (x right, y down, z towards the camera), and
                 flips and rotations of the image change x and y

References: TGLoRA, arXiv 2509.19602, sections 4.2, 4.3 and eq. 7; MTLoRA, arXiv 2403.20320,
section 4.1.
"""

import math
from collections.abc import Sequence
from copy import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255
HUMAN_PARTS = ("background", "head", "torso", "upper arms", "lower arms", "upper legs",
               "lower legs")


class Segmentation:
    """One class per pixel. The metric is the mean intersection over union of the classes."""

    kind = "classes"
    metric = "mIoU"
    higher_is_better = True

    def __init__(self, name: str, classes: int | Sequence[str], weight: float):
        """classes: the names or the number of the classes; empty if the dataset defines them."""
        if isinstance(classes, int):
            classes = [str(i) for i in range(classes)]
        if len(classes) > IGNORE:
            raise ValueError(f"{name}: expected at most {IGNORE} classes, got {len(classes)}")
        self.name = name
        self.weight = weight
        self.names = tuple(classes)
        self.marks = {name: i for i, name in enumerate(self.names)}     # for a picture's legend
        self.classes = len(self.names)
        self.outputs = self.classes

    def valid(self, label: Tensor) -> Tensor:
        return label != IGNORE                                        # (B, H, W)

    def loss(self, pred: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy, averaged over the valid pixels."""
        error = F.cross_entropy(pred.float(), label, ignore_index=IGNORE, reduction="sum")
        pixels = self.valid(label).sum()
        return error / pixels.clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """The confusion matrix (classes, classes): rows are true classes, columns predicted."""
        valid = self.valid(label)
        true = label[valid]
        predicted = pred.argmax(1)[valid]
        pairs = true * self.classes + predicted
        counts = torch.bincount(pairs, minlength=self.classes ** 2).double()
        counts = counts + nan_if_any(pred.isnan().any(1) & valid)
        return counts.view(self.classes, self.classes)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Mean IoU of the classes that occur in a label or a prediction, and pixel accuracy."""
        sums = sums.view(self.classes, self.classes)
        hits = sums.diag()
        union = sums.sum(0) + sums.sum(1) - hits
        occurs = union != 0
        iou = hits[occurs] / union[occurs]
        accuracy = hits.sum() / sums.sum()
        return {"mIoU": iou.mean().item(), "accuracy": accuracy.item()}

    def best_constant(self, values: Tensor) -> Tensor:
        """Labels of valid pixels (N,) -> the most frequent class as logits (outputs,)."""
        return F.one_hot(values.mode().values, self.classes).float()

    def colours(self, x: Tensor) -> Tensor:
        """Prediction (outputs, H, W) or label (H, W) -> RGB (3, H, W) in 0..1.

        Ignored pixels are black, and class 0, which is often the background, is grey.
        """
        label = x if x.ndim == 2 else x.argmax(0)
        turn = label * 0.61803399 % 1       # golden-ratio hues: consecutive classes look different
        hue = torch.stack([turn, turn + 1 / 3, turn + 2 / 3]) * (2 * math.pi)
        brightness = 0.55 + 0.2 * (label % 3)
        colour = (0.5 + 0.5 * hue.cos()) * brightness
        return torch.where(label == 0, 0.35, colour) * (label != IGNORE)


class Saliency:
    """Does this pixel belong to the salient object? Labels are 1 or 0, and predictions are logits.

    The metric is the mean IoU over images at the best of 15 thresholds, as in MTLoRA's code.
    """

    name = "sal"
    kind = "classes"
    classes = 2
    outputs = 1
    weight = 5.0
    metric = "mIoU"
    higher_is_better = True
    thresholds = torch.arange(4, 19) / 20                             # 0.20, 0.25 ... 0.90
    marks = {"salient": 1, "not salient": 0}

    def valid(self, label: Tensor) -> Tensor:
        return label != IGNORE                                        # (B, H, W)

    def class_weights(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """(weight of salient pixels, weight of the others); the rarer class weighs more.

        Each weight is the other class's share of the valid pixels.
        """
        pixels = self.valid(label).sum().clamp(min=1)
        salient = (label == 1).sum()
        return (pixels - salient) / pixels, salient / pixels

    def loss(self, pred: Tensor, label: Tensor) -> Tensor:
        """Binary cross-entropy with class weights, averaged over the valid pixels."""
        valid = self.valid(label)
        true = label == 1
        positive, negative = self.class_weights(label)
        weight = torch.where(true, positive, negative)
        error = F.binary_cross_entropy_with_logits(pred[:, 0].float(), true.float(),
                                                   reduction="none")
        return (error * weight * valid).sum() / valid.sum().clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """(16,): number of images with valid pixels, then the sum of their IoUs at each threshold.

        An image without a salient pixel has IoU 1 if none is predicted, otherwise 0.
        """
        valid = self.valid(label)
        true = label == 1
        thresholds = self.thresholds[:, None, None, None]
        predicted = (pred[:, 0].sigmoid() >= thresholds) & valid      # (15, B, H, W)
        hits = (predicted & true).sum((2, 3)).double()                # (15, B)
        union = (predicted | true).sum((2, 3)).double()
        iou = torch.where(union > 0, hits / union.clamp(min=1), 1.0)
        has_label = valid.any(2).any(1).double()                      # (B,)
        images = has_label.sum()
        sums = torch.cat([images[None], (iou * has_label).sum(1)])
        return sums + nan_if_any(pred[:, 0].isnan() & valid)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        images, iou = sums[0], sums[1:]
        return {"mIoU": (iou / images).max().item()}

    def best_constant(self, values: Tensor) -> Tensor:
        """A logit (1,) that predicts 1 everywhere.

        Predicting 0 everywhere scores higher only if many images have no salient pixel.
        """
        return torch.tensor([10.0])

    def colours(self, x: Tensor) -> Tensor:
        """Prediction (1, H, W) or label (H, W) -> grey RGB (3, H, W); white is 1."""
        grey = x.sigmoid()[0] if x.ndim == 3 else (x == 1).float()
        return grey.expand(3, -1, -1)


class Edge(Saliency):
    """Is this pixel on an edge? Like Saliency, but with fixed class weights and another metric.

    The metric is F at the threshold that is best for the whole dataset. A predicted edge pixel is
    correct if a true edge pixel is near: in both x and y, at most 0.75 % of the image diagonal away
    (rounded, at least 1 pixel). A true edge pixel is recalled if a predicted one is that near. Do
    not compare this F with the odsF of the BSDS benchmark, which thins predictions and matches
    pixels one to one.
    """

    name = "edge"
    weight = 50.0                                                     # as in MTI-Net
    metric = "F"
    thresholds = torch.arange(1, 20) / 20                             # 0.05, 0.10 ... 0.95
    marks = {"edge": 1, "no edge": 0}

    def class_weights(self, label: Tensor) -> tuple[float, float]:
        """Edges are rare: an edge pixel weighs 0.95, any other 0.05."""
        return 0.95, 0.05

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """(4 * 19,): numbers of predicted, correct, true and recalled edge pixels per threshold."""
        valid = self.valid(label)
        true = label == 1
        thresholds = self.thresholds[:, None, None, None]
        predicted = (pred[:, 0].sigmoid() >= thresholds) & valid      # (19, B, H, W)
        H, W = label.shape[1:]
        reach = max(1, round(0.0075 * math.hypot(H, W)))
        correct = predicted & widened(true, reach)
        recalled = true & widened(predicted, reach)
        masks = torch.stack([predicted, correct, true.expand_as(predicted), recalled])
        counts = masks.sum((2, 3, 4)).double()                        # (4, 19)
        return counts.flatten() + nan_if_any(pred[:, 0].isnan() & valid)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """F at the best threshold, and the precision and recall at that threshold."""
        predicted, correct, true, recalled = sums.view(4, -1)
        if not true[0] > 0:                               # no edge in any label, or sums are NaN
            return {"F": math.nan, "precision": math.nan, "recall": math.nan}
        precision = correct / predicted.clamp(min=1)
        recall = recalled / true
        f = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        best = f.argmax()
        return {"F": f[best].item(), "precision": precision[best].item(),
                "recall": recall[best].item()}


class Depth:
    """Depth along the optical axis in metres. The metric is the root mean square error."""

    name = "depth"
    kind = "distances"
    channels = 1
    outputs = 1
    weight = 1.0
    metric = "rmse"
    higher_is_better = False
    marks = {f"{metres} m": float(metres) for metres in (0.5, 1, 2, 3, 4, 6, 8, 10)}

    def valid(self, label: Tensor) -> Tensor:
        return label > 0                                              # (B, 1, H, W)

    def loss(self, pred: Tensor, label: Tensor) -> Tensor:
        """L1 in metres, averaged over the valid pixels."""
        valid = self.valid(label)
        error = (pred.float() - label).abs() * valid
        return error.sum() / valid.sum().clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """(3,): number of valid pixels, sum of squared errors, sum of relative errors."""
        valid = self.valid(label)
        true = label[valid].double()
        error = pred[valid].double() - true
        square = error ** 2
        relative = error.abs() / true
        return torch.stack([valid.sum().double(), square.sum(), relative.sum()])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """rmse in metres; abs_rel is the mean absolute error relative to the true depth."""
        pixels, square, relative = sums
        rmse = (square / pixels).sqrt()
        return {"rmse": rmse.item(), "abs_rel": (relative / pixels).item()}

    def best_constant(self, values: Tensor) -> Tensor:
        """Depths of valid pixels (N,) -> their mean (1,), which has the least squared error."""
        return values.mean()[None]

    def colours(self, x: Tensor) -> Tensor:
        """Metres (1, H, W) -> RGB (3, H, W): near is light, 10 m is dark, and invalid is black.

        The colours are much like those of matplotlib's colour map magma.
        """
        anchors = torch.tensor([[252, 253, 191], [252, 137, 97], [183, 55, 121], [81, 18, 124],
                                [40, 16, 84]], device=x.device) / 255   # 0, 2.5, 5, 7.5, 10 m
        colour = anchors[0].view(3, 1, 1)
        for i, (near, far) in enumerate(pairwise(anchors)):
            share = (x / 2.5 - i).clamp(0, 1)                       # 0 at `near`, 1 at `far`
            colour = colour + share * (far - near).view(3, 1, 1)
        return colour * (x != 0)


class Normals:
    """Surface normals. The metric is the mean angle between prediction and ground truth in degrees.

    Pitfall: papers on multi-task learning often report this mean angle under the name "rmse".
    """

    name = "normals"
    kind = "directions"
    channels = 3
    outputs = 3
    weight = 10.0
    metric = "mean"
    higher_is_better = False
    marks = {"facing left": (-1.0, 0.0, 0.0), "right": (1.0, 0.0, 0.0), "up": (0.0, -1.0, 0.0),
             "down": (0.0, 1.0, 0.0), "the camera": (0.0, 0.0, 1.0)}

    def valid(self, label: Tensor) -> Tensor:
        return label.norm(dim=1) > 0.5                    # (B, H, W); length 1, or 0 if invalid

    def loss(self, pred: Tensor, label: Tensor) -> Tensor:
        """L1 between unit vectors, averaged over valid pixels and the three coordinates."""
        valid = self.valid(label)
        unit = F.normalize(pred.float(), dim=1)
        error = (unit - label).abs() * valid[:, None]
        return error.sum() / (3 * valid.sum()).clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """(6,): number of valid pixels, sum of angles, sum of squared angles, and numbers of pixels
        with an angle below 11.25, 22.5 and 30 degrees."""
        valid = self.valid(label)
        cosine = F.cosine_similarity(pred.double(), label.double(), dim=1)
        angle = cosine[valid].clamp(-1, 1).acos().rad2deg()
        within = [(angle < limit).sum().double() for limit in (11.25, 22.5, 30)]
        sums = torch.stack([valid.sum().double(), angle.sum(), (angle ** 2).sum(), *within])
        return sums + nan_if_any(angle.isnan())

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """The mean and the true rmse of the angle in degrees, and the shares of pixels with an
        angle below 11.25, 22.5 and 30 degrees."""
        pixels = sums[0]
        mean, mean_square, *within = sums[1:] / pixels
        return {"mean": mean.item(), "rmse": mean_square.sqrt().item(),
                "<11.25": within[0].item(), "<22.5": within[1].item(), "<30": within[2].item()}

    def best_constant(self, values: Tensor) -> Tensor:
        """Normals of valid pixels (N, 3) -> a direction (3,) whose mean angle to them is small.

        It is the best of 501 candidates: the mean of the normals, and 500 directions that cover the
        sphere evenly.
        """
        i = torch.arange(500) + 0.5                                   # a Fibonacci spiral
        z = 1 - 2 * i / 500
        radius = (1 - z ** 2).sqrt()
        turn = math.pi * (1 + 5 ** 0.5) * i
        sphere = torch.stack([radius * turn.cos(), radius * turn.sin(), z], 1)
        mean = F.normalize(values.mean(0)[None], dim=1)
        directions = torch.cat([mean, sphere])                        # (501, 3)
        every = max(1, len(values) // 20000)
        sample = F.normalize(values[::every], dim=1)
        angle = (sample @ directions.T).clamp(-1, 1).acos()           # (N, 501)
        return directions[angle.mean(0).argmin()]

    def colours(self, x: Tensor) -> Tensor:
        """Normals (3, H, W) -> RGB (3, H, W), the usual (n + 1) / 2; invalid is black."""
        exists = x.norm(dim=0) > 1e-6
        return (F.normalize(x, dim=0) + 1) / 2 * exists


def nan_if_any(mask: Tensor) -> Tensor:
    """NaN if an element of `mask` is true, else 0. Added to sums, NaN makes all metrics NaN."""
    return torch.where(mask.any(), math.nan, 0.0).double()


def widened(mask: Tensor, reach: int) -> Tensor:
    """Grow every true pixel of (..., B, H, W) by `reach` pixels in each direction, to a square."""
    return F.max_pool2d(mask.float(), 2 * reach + 1, stride=1, padding=reach) > 0


# To add your own task, add an entry before make_tasks is called, as in examples/own_dataset.py.
TASKS = {
    "semseg": Segmentation("semseg", (), weight=1.0),                 # classes: see data.CLASSES
    "human_parts": Segmentation("human_parts", HUMAN_PARTS, weight=2.0),
    "sal": Saliency(),
    "edge": Edge(),
    "depth": Depth(),
    "normals": Normals(),
}


def make_tasks(names: Sequence[str], classes: int | Sequence[str] | None) -> list:
    """The tasks with these names, in this order.

    classes: semseg's classes in this dataset, as names or as a number.
    Raises ValueError for an unknown or repeated name, for no names, for semseg without classes, or
    for a name that no module can have, such as "a.b" or "type".
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks {','.join(names)!r}: expected at least one task, and each task "
                         "only once")
    tasks = []
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; expected some of {', '.join(TASKS)}, or your "
                             "own task, whose file must be imported first (see "
                             "examples/own_dataset.py)")
        if "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"a task cannot be called {name!r}, because a module cannot have this "
                             "name; choose another one, without a dot")
        task = copy(TASKS[name])
        if not task.outputs:
            if not classes:
                raise ValueError(f"{name}: the number of classes is unknown; add the dataset to "
                                 "data.CLASSES, or import the file that does so")
            task = Segmentation(name, classes, task.weight)
        tasks.append(task)
    return tasks


def delta_m(results: dict, baseline: dict) -> float:
    """Mean relative gain over a baseline in percent (eq. 7); positive is better.

    results, baseline: {task: {metric: value}}. Raises ValueError if the baseline lacks a task's
    main metric, or if the value of that metric is not a finite number above 0.
    """
    gains = []
    for task in make_tasks(list(results), classes=1):
        value = results[task.name][task.metric]
        try:
            base = float(baseline[task.name][task.metric])
        except (KeyError, TypeError, ValueError):
            base = math.nan
        if not 0 < base < math.inf:
            raise ValueError(f"baseline: {task.metric} of {task.name} is missing, or is not a "
                             'number above 0; expected {"results": {task: {metric: value}}}')
        gain = (value - base) / base
        gains.append(gain if task.higher_is_better else -gain)
    return 100 * sum(gains) / len(gains)
