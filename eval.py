"""Evaluate a checkpoint on validation images, or draw its predictions for your own photos.

    python eval.py --checkpoint runs/rooms/best.pt                   # the table of metrics
    python eval.py --checkpoint runs/nyud/best.pt --native           # at each image's own size
    python eval.py --checkpoint runs/nyud/best.pt --image photo.jpg  # runs/nyud/photo.predicted.png

Images go through the network one at a time, so no result depends on a batch size. A task's metrics
come from sums over the whole set, divided once at the end (tasks.py). Next to each metric, the
table shows its value for the best constant prediction (see `reference`). A network that is no
better than a constant has not learned the task.

Shapes: B batch, C channels, H W pixels, N valid pixels.
References: arXiv 2509.19602, section 4.2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from data import CLASSES, open_dataset, single_images, warp
from model import build
from recipes import integer
from report import draw_photos, format_table
from tasks import make_tasks
from util import (amp_dtype, load_trained, one_line_errors, pick_device, progress, read_checkpoint,
                  to_json)

Predict = Callable[[Tensor], dict[str, Tensor]]     # image (B, 3, H, W) -> {task: prediction}


def predictor(model: nn.Module, amp: torch.dtype | None) -> Predict:
    """Switch `model` to eval mode and return a function that calls it.

    The function uses autocast if `amp` is given.
    """
    model.eval()

    def predict(image: Tensor) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, amp) if amp else nullcontext():
            return model(image)
    return predict


@torch.no_grad()
def evaluate(predict: Predict, tasks: Sequence, batches: Iterable, size: tuple[int, int] | None,
             device: torch.device) -> dict:
    """Measure the predictions of `predict` on `batches` of one image each (see data.collate).

    size: (H, W) that images and labels are resized to; None keeps each image's own size.

    Returns a dict:
        results: {task: {metric: value}}
        loss: weighted sum of the tasks' losses (eq. 8). A task's loss is a mean over the images
            that have a label for it.
        images: number of images
        pixels: {task: number of valid pixels}
        nan: {task: number of valid pixels at which the prediction is NaN}
    """
    names = [task.name for task in tasks]
    totals = {name: dict.fromkeys(("labelled", "loss", "pixels", "nan", "sums"), 0)
              for name in names}
    images = 0
    for batch in batches:
        image, labels = warp(batch, size or batch["size"][0].tolist(), device)   # (1, 3, H, W)
        predictions = predict(image)
        images += 1
        for task in tasks:
            row = measure(task, predictions[task.name].float(), labels[task.name])
            for key, value in row.items():
                totals[task.name][key] = totals[task.name][key] + value

    result = {"results": {}, "loss": 0.0, "images": images, "pixels": {}, "nan": {}}
    for task in tasks:
        total = totals[task.name]
        mean_loss = total["loss"] / max(1, total["labelled"])
        result["loss"] += task.weight * mean_loss
        result["results"][task.name] = task.metrics(total["sums"])
        result["pixels"][task.name] = total["pixels"]
        result["nan"][task.name] = total["nan"]
    return result


def measure(task, pred: Tensor, label: Tensor) -> dict:
    """One image's contribution to a task's totals. "sums" is float64, on the CPU."""
    loss = task.loss(pred, label).item()
    pred, label = pred.cpu(), label.cpu()
    valid = task.valid(label).reshape(1, *pred.shape[2:])       # (1, H, W)
    return {
        "labelled": int(valid.any()),
        "loss": loss,
        "pixels": int(valid.sum()),
        "nan": int((valid & pred.isnan().any(1)).sum()),
        "sums": task.sums(pred, label).flatten().double(),
    }


# --- the best constant ----------------------------------------------------------------------------
def best_constants(tasks: Sequence, batches: Iterable,
                   size: tuple[int, int] | None) -> dict[str, Tensor]:
    """For each task, the constant prediction (outputs,) that its `best_constant` picks.

    Each image contributes at most 8,000 of its valid pixels, evenly spread. A task without any
    valid pixel is left out.
    """
    values = {task.name: [] for task in tasks}
    for batch in batches:
        _, labels = warp(batch, size or batch["size"][0].tolist())
        for task in tasks:
            label = labels[task.name]                           # (1, H, W) or (1, C, H, W)
            valid = task.valid(label).reshape(1, *label.shape[-2:])
            if label.ndim == 4:
                label = label.movedim(1, -1)                    # (1, H, W, C)
            label = label[valid]                                # (N,) or (N, C)
            every = max(1, len(label) // 4000)                  # rounded down: N / every < 8,000
            values[task.name].append(label[::every])
    constants = {}
    for task in tasks:
        label = torch.cat(values[task.name])
        if len(label):
            constants[task.name] = task.best_constant(label.squeeze(-1))
    return constants


def reference(tasks: Sequence, batches: Iterable, size: tuple[int, int] | None) -> dict:
    """Evaluate the best constant prediction of each task: {task: {metric: value}}.

    Most tasks fit their constant to these same labels, so this baseline is slightly optimistic; sal
    and edge always predict 1. Metrics are NaN for a task without any label. Goes through `batches`
    twice.
    """
    constants = best_constants(tasks, batches, size)

    def predict(image: Tensor) -> dict[str, Tensor]:
        predictions = {}
        for task in tasks:
            constant = constants.get(task.name, torch.zeros(task.outputs))
            predictions[task.name] = constant.view(1, -1, 1, 1).expand(-1, -1, *image.shape[2:])
        return predictions

    return evaluate(predict, tasks, batches, size, torch.device("cpu"))["results"]


# --- the command ----------------------------------------------------------------------------------
def load_run(path: str | Path, weights: str | None = None
             ) -> tuple[nn.Module, list, argparse.Namespace]:
    """The trained network of a checkpoint, its tasks and its settings.

    The network is on the CPU and in train mode: call its eval() before you predict.

    path: a checkpoint, or the folder of a run, whose best.pt is then used. weights: the file of the
    backbone's pretrained weights, if it has moved since training. Raises ValueError if the
    checkpoint or the pretrained weights cannot be read, or do not fit each other.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    state = read_checkpoint(path)
    config = argparse.Namespace(**state["config"])
    config.weights = weights or config.weights
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    model = build(config, tasks, state["tree"])
    load_trained(model, state, path)
    return model, tasks, config


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True,
        help="a checkpoint, or the folder of a run, whose best.pt is then used")
    add("--image", type=Path, nargs="+",
        help="photos to draw predictions for, instead of evaluating; the pictures are written "
        "to the run's folder")
    add("--native", action="store_true",
        help="keep each image's own size instead of resizing it to the training size")
    add("--json", action="store_true", help="print the metrics as JSON instead of a table")
    add("--data-root", help="folder of the dataset, or its archive (default: as in training)")
    add("--weights",
        help="file of the backbone's pretrained weights, if it has moved since training")
    add("--workers", type=integer(0, 256), default=min(4, os.cpu_count() or 1),
        help="number of processes that load data (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to run on, such as cpu or cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.json and args.image:
        parser.error("--json prints metrics, so it cannot be combined with --image")
    return args


def run(args: argparse.Namespace) -> str:
    """Do what the flags ask for and return the text to print."""
    model, tasks, config = load_run(args.checkpoint, args.weights)
    device = pick_device(args.device)
    predict = predictor(model.to(device), amp_dtype(config.amp, device))
    size = None if args.native else config.size
    if args.image:
        is_folder = args.checkpoint.is_dir()
        folder = args.checkpoint if is_folder else args.checkpoint.parent
        paths = draw_photos(args.image, folder, predict, tasks, size, device)
        return "\n".join(f"wrote {path}" for path in paths)

    config.data_root = args.data_root or config.data_root
    config.cache = False
    dataset = open_dataset(config, "val")
    batches = single_images(dataset, args.workers)
    result = evaluate(predict, tasks, progress(batches, "evaluation"), size, device)
    result["reference"] = reference(tasks, batches, size)
    if args.json:
        return to_json(result)
    return format_table(tasks, result, result["reference"], size)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        # Progress and notes go to stderr, so that only the result goes to stdout.
        with redirect_stdout(sys.stderr):
            text = run(args)
        print(text, flush=True)


if __name__ == "__main__":
    main()
