"""What a dense prediction task is: outputs, loss, metrics, what no learning scores, colours.

A label says itself which of its pixels are valid: a class of 255 is ignored, a depth of 0 and a
normal of (0, 0, 0) were not measured. Losses and metrics look at valid pixels only. Metrics are
sums: `sums(pred, label)` of any batches add up, and `metrics(sums)` divides once, so that it does
not matter how a set was cut into batches. Without any valid pixel, and where a prediction is NaN,
metrics are NaN. A loss is a mean over the valid pixels of a batch. Where the batch is computed in
parts, `totals` of the whole of it, passed to each part's `loss`, make the parts' losses add up to
the batch's.

A task's `kind` says how data.py checks and warps its labels; with it go `classes` or `channels`:
classes      (H, W) integers below `classes`, or 255
values       (channels, H, W) floats, as of the next two; a warp moves them
distances    from the camera, as depth in metres; a zoom divides them, as walking closer would
directions   as normals, x right, y down, z to the camera; x and y turn and flip with the picture
Of a batch, labels are (B, H, W) int64 or (B, channels, H, W), predictions (B, outputs, H, W).
References: arXiv 2509.19602, sections 4.2, 4.3 and eq. 7; MTLoRA, arXiv 2403.20320, section 4.1.
"""

import math
from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
PARTS = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")


class Segmentation:
    """One class a pixel, of so many (None: the dataset says); mean intersection over union."""

    kind, metric, higher_is_better = "classes", "mIoU", True

    def __init__(self, name: str, classes: int | Sequence[str] | None, weight: float):
        names = map(str, range(classes)) if isinstance(classes, int) else classes or ()
        self.name, self.weight, self.names = name, weight, tuple(names)
        self.classes = self.outputs = len(self.names) or None

    def valid(self, label: Tensor) -> Tensor:
        return label != IGNORE  # (B, H, W)

    def totals(self, label: Tensor) -> Tensor:
        return self.valid(label).sum()[None]

    def loss(self, pred: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
        """Cross-entropy, mean over valid pixels (0 when there are none)."""
        pixels, = self.totals(label) if totals is None else totals
        error = F.cross_entropy(pred.float(), label, ignore_index=IGNORE, reduction="sum")
        return error / pixels.clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """Confusion matrix, (classes, classes): rows are true, columns predicted."""
        valid, C = self.valid(label), self.outputs
        pairs = label[valid] * C + pred.argmax(1)[valid]
        counts = torch.bincount(pairs, minlength=C * C).reshape(C, C).double()
        return counts + nan_if(pred.isnan().any(1) & valid)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """mIoU over the classes that occur in truth or prediction, and pixel accuracy."""
        sums = sums.reshape(self.outputs, self.outputs)
        hit = sums.diag()
        union = sums.sum(0) + sums.sum(1) - hit
        occurs = union != 0
        return {"mIoU": (hit[occurs] / union[occurs]).mean().item(),
                "accuracy": (hit.sum() / sums.sum()).item()}

    def best_constant(self, values: Tensor) -> Tensor:
        """values: valid labels (N,) -> the majority class as logits (outputs,)."""
        return F.one_hot(values.mode().values, self.outputs).float()

    def colours(self, x: Tensor) -> Tensor:
        """Prediction (outputs, H, W) or label (H, W) -> (3, H, W) in 0..1; ignored is black."""
        label = x if x.ndim == 2 else x.argmax(0)
        turn = label * 0.61803399 % 1  # golden-ratio hues: neighbouring classes look different
        hue = torch.stack([turn, turn + 1 / 3, turn + 2 / 3]) * (2 * math.pi)
        level = 0.55 + 0.2 * (label % 3)
        return (0.5 + 0.5 * hue.cos()) * level * (label != IGNORE)


class Saliency:
    """What catches the eye: 1 or 0 a pixel; IoU and F of the best of 15 thresholds."""

    name, weight, metric, higher_is_better = "sal", 5.0, "mIoU", True
    kind, classes, outputs = "classes", 2, 1
    thresholds = torch.arange(4, 19) / 20  # 0.20, 0.25 ... 0.90

    def valid(self, label: Tensor) -> Tensor:
        return label != IGNORE  # (B, H, W)

    def totals(self, label: Tensor) -> Tensor:
        return torch.stack([self.valid(label).sum(), (label == 1).sum()])

    def loss(self, pred: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
        """Balanced cross-entropy: each side weighted by the other's share of the valid pixels."""
        pixels, positive = self.totals(label) if totals is None else totals
        pixels = pixels.clamp(min=1)
        balance = torch.where(label == 1, pixels - positive, positive) / pixels
        error = F.binary_cross_entropy_with_logits(pred[:, 0].float(), (label == 1).float(),
                                                   reduction="none")
        return (error * balance * self.valid(label)).sum() / pixels

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """Images with valid pixels, then per threshold IoU, precision and recall, (1 + 3 * 15).

        Against an empty truth an empty prediction scores 1 in all three, any other 0 but a recall
        of 1; an empty prediction of something scores 0.
        """
        thresholds = self.thresholds.to(pred)[:, None, None, None]
        valid, true = self.valid(label), label == 1  # (B, H, W)
        found = (pred[:, 0].sigmoid() >= thresholds) & valid  # (15, B, H, W)
        n_found = found.sum((2, 3)).double()  # pixels of each image, (15, B)
        n_hit = (found & true).sum((2, 3)).double()
        n_true = true.sum((1, 2)).double().expand_as(n_hit)

        def ratio(a: Tensor, b: Tensor, empty: Tensor | float) -> Tensor:
            return torch.where(b > 0, a / b.clamp(min=1), empty)

        iou = ratio(n_hit, n_found + n_true - n_hit, 1.0)
        precision = ratio(n_hit, n_found, (n_true == 0).double())
        recall = ratio(n_hit, n_true, 1.0)
        counts = valid.any((1, 2)).double()  # (B,)
        scores = torch.stack([iou, precision, recall]) * counts  # (3, 15, B)
        sums = torch.cat([counts.sum()[None], scores.sum(2).flatten()])
        return sums + nan_if(pred[:, 0].isnan() & valid)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """mIoU: the best threshold's mean over images; maxF: the best F (beta^2 = 0.3) of means."""
        iou, precision, recall = (sums[1:] / sums[0]).reshape(3, -1)
        f = 1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-9)
        return {"mIoU": iou.max().item(), "maxF": f.max().item()}

    def best_constant(self, values: Tensor) -> Tensor:
        """Everything salient, as a logit (1,): with a constant, IoU has no better choice."""
        return torch.tensor([10.0])

    def colours(self, x: Tensor) -> Tensor:
        """Prediction (1, H, W) or label (H, W) -> grey (3, H, W), white is salient."""
        grey = x.sigmoid()[0] if x.ndim == 3 else (x == 1).float()
        return grey.expand(3, -1, -1)


class Edge:
    """Borders of surfaces: 1 or 0 a pixel; F of the best threshold, the same for all images.

    A pixel is right where the other map has one within 0.0075 of the diagonal. Unlike the odsF of
    the boundary benchmark, predictions are not thinned and several may meet the same true pixel.
    """

    name, weight, metric, higher_is_better = "edge", 50.0, "F", True  # weight: MTI-Net's
    kind, classes, outputs, positive = "classes", 2, 1, 0.95  # edges are few: one weighs 0.95
    thresholds = torch.arange(1, 20) / 20  # 0.05, 0.10 ... 0.95
    valid, best_constant, colours = Saliency.valid, Saliency.best_constant, Saliency.colours
    totals = Segmentation.totals

    def loss(self, pred: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
        """Cross-entropy with fixed weights, mean over valid pixels (0 when there are none)."""
        pixels, = self.totals(label) if totals is None else totals
        true = (label == 1).float()
        error = F.binary_cross_entropy_with_logits(pred[:, 0].float(), true, reduction="none")
        balance = torch.where(label == 1, self.positive, 1 - self.positive)
        return (error * balance * self.valid(label)).sum() / pixels.clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """Per threshold: predicted pixels, those that are right, true ones, those found, (4*19)."""
        reach = max(1, round(0.0075 * math.hypot(*label.shape[1:])))

        def near(x: Tensor) -> Tensor:  # (..., B, H, W) -> where x is true within reach
            return F.max_pool2d(x.float(), 2 * reach + 1, stride=1, padding=reach) > 0

        valid, true = self.valid(label), label == 1  # (B, H, W)
        thresholds = self.thresholds.to(pred)[:, None, None, None]
        found = (pred[:, 0].sigmoid() >= thresholds) & valid  # (19, B, H, W)
        right, met = found & near(true), true & near(found)
        true = true.expand_as(found)
        sums = torch.stack([x.sum((1, 2, 3)).double() for x in (found, right, true, met)])
        return sums.flatten() + nan_if(pred[:, 0].isnan() & valid)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """F of the best threshold, with its precision and recall."""
        found, right, true, met = sums.reshape(4, -1)
        if not true[0] > 0:  # no label, or NaN
            return dict.fromkeys(("F", "precision", "recall"), math.nan)
        precision, recall = right / found.clamp(min=1), met / true
        f = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        best = f.argmax()
        return {"F": f[best].item(), "precision": precision[best].item(),
                "recall": recall[best].item()}


class Depth:
    """Depth along the optical axis, in metres; root mean square error over pixels."""

    name, weight, metric, higher_is_better = "depth", 1.0, "rmse", False
    kind, channels, outputs = "distances", 1, 1
    marks = (1, 2, 3, 4, 6, 8, 10)  # metres, whose colours a legend shows

    def valid(self, label: Tensor) -> Tensor:
        return label > 0  # (B, 1, H, W)

    def totals(self, label: Tensor) -> Tensor:
        return self.valid(label).sum()[None]

    def loss(self, pred: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
        """L1 in metres, mean over valid pixels (0 when there are none)."""
        pixels, = self.totals(label) if totals is None else totals
        return ((pred.float() - label).abs() * self.valid(label)).sum() / pixels.clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """Pixels, squared error, relative error."""
        valid = self.valid(label)
        pred, label = pred[valid].double(), label[valid].double()
        error = pred - label
        return torch.stack([valid.sum().double(), (error ** 2).sum(), (error.abs() / label).sum()])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """rmse in metres; abs_rel: mean absolute error relative to the true depth."""
        n, square, relative = sums.tolist()
        return {"rmse": math.sqrt(square / n) if n else math.nan,
                "abs_rel": relative / n if n else math.nan}

    def best_constant(self, values: Tensor) -> Tensor:
        """values: valid depths (N,) -> the one depth with the least squared error, (1,)."""
        return values.mean()[None]

    def colours(self, x: Tensor) -> Tensor:
        """(1, H, W) in metres -> (3, H, W): near is yellow, 10 m dark blue; invalid is black."""
        t = (x[0] / 10).clamp(0, 1).sqrt()
        rgb = torch.stack([1.6 - 2.0 * t, 1.3 - 1.4 * t, 0.15 + 1.2 * t * (1 - t) + 0.25 * t])
        return rgb.clamp(0, 1) * (x[0] > 0)


class Normals:
    """Surface normals; the angle between prediction and truth in degrees.

    What this literature prints as "rmse" of normals is the mean angle: compare `mean` with it.
    """

    name, weight, metric, higher_is_better = "normals", 10.0, "mean", False
    kind, channels, outputs = "directions", 3, 3

    def valid(self, label: Tensor) -> Tensor:
        return label.norm(dim=1) > 0.5  # (B, H, W)

    def totals(self, label: Tensor) -> Tensor:
        return self.valid(label).sum()[None]

    def loss(self, pred: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
        """L1 between unit vectors, mean over valid pixels and their 3 coordinates."""
        pixels, = self.totals(label) if totals is None else totals
        error = (F.normalize(pred.float(), dim=1) - label).abs() * self.valid(label)[:, None]
        return error.sum() / (3 * pixels).clamp(min=1)

    def sums(self, pred: Tensor, label: Tensor) -> Tensor:
        """Pixels, angles, squared angles, pixels within 11.25, 22.5 and 30 degrees."""
        valid = self.valid(label)
        cosine = F.cosine_similarity(pred.double(), label.double(), dim=1)[valid]
        angle = cosine.clamp(-1, 1).acos().rad2deg()
        within = [(angle < limit).sum().double() for limit in (11.25, 22.5, 30)]
        sums = torch.stack([valid.sum().double(), angle.sum(), (angle ** 2).sum(), *within])
        return sums + nan_if(angle.isnan())

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """mean and true rmse of the angle in degrees, and the shares within three limits."""
        n, angle, square, *within = sums.tolist()
        if not n:
            return dict.fromkeys(("mean", "rmse", "<11.25", "<22.5", "<30"), math.nan)
        return {"mean": angle / n, "rmse": math.sqrt(square / n), "<11.25": within[0] / n,
                "<22.5": within[1] / n, "<30": within[2] / n}

    def best_constant(self, values: Tensor) -> Tensor:
        """values: valid normals (N, 3) -> the direction of 500, or the mean, nearest to them."""
        i = torch.arange(500) + 0.5  # a Fibonacci spiral covers the sphere evenly
        z, turn = 1 - 2 * i / 500, math.pi * (1 + 5 ** 0.5) * i
        r = (1 - z ** 2).sqrt()
        sphere = torch.stack([r * turn.cos(), r * turn.sin(), z], 1)  # (500, 3)
        sphere = torch.cat([F.normalize(values.mean(0)[None], dim=1), sphere])
        values = values[::max(1, len(values) // 20000)]
        angle = (F.normalize(values, dim=1) @ sphere.T).clamp(-1, 1).acos()  # (N, 501)
        return sphere[angle.mean(0).argmin()]

    def colours(self, x: Tensor) -> Tensor:
        """(3, H, W) -> (3, H, W) in 0..1, the usual (n + 1) / 2; invalid is black."""
        exists = x.norm(dim=0) > 1e-6
        return (F.normalize(x, dim=0) + 1) / 2 * exists


def nan_if(mask: Tensor) -> Tensor:
    """NaN where any of `mask` is true, else 0: a broken prediction must not look like a number."""
    return torch.where(mask.any(), math.nan, 0.0).double()


TASKS = {task.name: task for task in (Saliency(), Edge(), Depth(), Normals(), Segmentation(
    "semseg", None, 1.0), Segmentation("human_parts", PARTS, 2.0))}


def make_tasks(names: list[str], classes: int | Sequence[str] | None) -> list:
    """The tasks called `names`, in that order; classes: the dataset's of semseg, or how many."""
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(TASKS)}, or "
                         "your own, imported first (README, Your own task)")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks {','.join(names)!r}: expected each at most once, and at least one")
    if classes is None and None in [TASKS[name].outputs for name in names]:
        raise ValueError("semseg: how many classes? Put it into data.CLASSES")
    return [copy(task) if task.outputs else Segmentation(task.name, classes, task.weight)
            for task in map(TASKS.get, names)]


def delta_m(results: dict, baseline: dict) -> float:
    """Mean relative gain over a baseline, in percent (eq. 7); better is positive.

    results, baseline: {task: {metric: value}}. ValueError where the baseline lacks one of results'.
    """
    gains = []
    for task in make_tasks(list(results), classes=1):
        try:
            base = float(baseline[task.name][task.metric])
            if not 0 < base < math.inf:
                raise ValueError
            gain = (results[task.name][task.metric] - base) / base
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"baseline: no {task.metric} of {task.name}, or not a number above 0; "
                             'expected {"results": {task: {metric: value}}}') from None
        gains.append(gain if task.higher_is_better else -gain)
    return 100 * sum(gains) / len(gains)
