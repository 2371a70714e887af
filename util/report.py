"""What a run shows: its table, predictions beside the truth, a photo's predictions, curves.

A picture is a tensor (3, H, W) in 0..1; a task says itself which colours its values have.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw  # comes with torchvision
from torch import Tensor
from torchvision.utils import make_grid, save_image

from data import ToDevice, collate, warp
from datasets.labels import read_image


# --- text -----------------------------------------------------------------------------------------
def format_line(tasks: list, found: dict) -> str:
    """The validation loss and the compared metrics, and delta-m where there is one, in a line."""
    metrics = [f"{task.name} {task.metric} {found['results'][task.name][task.metric]:.4f}"
               for task in tasks]
    if "delta_m" in found:
        metrics.append(f"delta-m {found['delta_m']:+.2f} %")
    return f"validation loss {found['loss']:.4f}  {'  '.join(metrics)}"


def format_table(tasks: list, found: dict, reference: dict, size: tuple[int, int] | None) -> str:
    """`evaluate`'s answer, a line a metric, beside the best constant's; the compared is starred."""
    where = f"at {size[0]}x{size[1]}" if size else "at their own size"
    rows = [f"{found['images']} images {where}, loss {found['loss']:.4f}",
            f"{'task':<13}{'metric':<12}{'result':>9}{'constant':>10}{'valid pixels':>18}"]
    for task in tasks:
        pixels, nan = found["pixels"][task.name], found["nan"][task.name]
        for metric, value in found["results"][task.name].items():
            row = f"{task.name:<13}{metric:<12}{value:>9.4f}{reference[task.name][metric]:>10.4f}"
            if metric == task.metric:
                row += f" {'*up' if task.higher_is_better else '*down':<5}{pixels:>12,}"
            rows.append(row)
        if nan:
            rows.append(f"{task.name:<13}the prediction is not a number (NaN) at {nan:,} of "
                        f"{pixels:,} valid pixels, and so are the metrics")
    return "\n".join(rows)


# --- pictures -------------------------------------------------------------------------------------
def draw(path: Path, rows: list[list[Tensor]]) -> None:
    """Write a PNG of rows of equally large pictures."""
    save_image(make_grid([p.cpu().float() for row in rows for p in row], nrow=len(rows[0])), path)


@torch.no_grad()
def draw_samples(path: Path, predict, tasks: list, dataset, size: tuple[int, int],
                 device: torch.device, count: int = 4) -> None:
    """Image | truth, prediction of each task | ..., for the first samples of `dataset`."""
    rows = []
    for i in range(min(count, len(dataset))):
        batch = next(iter(ToDevice([collate([dataset[i]])], device)))
        image, labels = warp(batch, size)
        predictions = predict(image)
        photo = F.interpolate(batch["image"].float() / 255, size, mode="bilinear", antialias=True)
        row = [photo[0]]
        for task in tasks:
            row.append(task.colours(labels[task.name][0]))
            row.append(task.colours(predictions[task.name][0]))
        rows.append(row)
    draw(path, rows)


@torch.no_grad()
def draw_photos(photos: list[Path], folder: Path, predict, tasks: list,
                size: tuple[int, int] | None, device: torch.device) -> list[Path]:
    """Draw each photo and every task's prediction, side by side at the photo's size, to
    folder/NAME.predicted.png. Raises ValueError where two would have one name."""
    paths = [folder / f"{photo.stem}.predicted.png" for photo in photos]
    if len(set(paths)) < len(paths):
        raise ValueError("--image: two photos have the same name, and so would their pictures; "
                         "give them one at a time, or rename one")
    for photo, path in zip(photos, paths):
        batch = collate([{"image": torch.from_numpy(read_image(photo)).permute(2, 0, 1)}])
        own_size = batch["size"][0].tolist()
        image, _ = warp(next(iter(ToDevice([batch], device))), size or own_size)
        predictions, row = predict(image), [batch["image"][0] / 255]
        for task in tasks:
            pred = F.interpolate(predictions[task.name].float(), own_size, mode="bilinear")
            row.append(task.colours(pred[0]))
        draw(path, [row])
    return paths


# --- curves ---------------------------------------------------------------------------------------
PANEL = 260, 170  # width and height of one plot, pixels
MARGIN = 42       # around it, for its title and its numbers


def draw_curves(path: Path, log: Path, tasks: list) -> None:
    """Write a PNG: a column for each task, its training loss above its metric, over the steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    width, height = (side + 2 * MARGIN for side in PANEL)
    picture = Image.new("RGB", (len(tasks) * width, 2 * height), "white")
    pen = ImageDraw.Draw(picture)
    for column, task in enumerate(tasks):
        losses = [(x["step"], x["loss"][task.name]) for x in lines if "lr" in x]
        plot(pen, column * width, 0, f"{task.name}: training loss", losses)
        values = [(x["step"], x["results"][task.name][task.metric]) for x in lines
                  if "results" in x]
        better = "up" if task.higher_is_better else "down"
        plot(pen, column * width, height, f"{task.name}: {task.metric}, {better} is better", values)
    picture.save(path)


def plot(pen: ImageDraw.ImageDraw, left: int, top: int, title: str,
         points: list[tuple[float, float]]) -> None:
    """One curve in a frame, with the numbers of its ends on both axes."""
    left, top = left + MARGIN, top + MARGIN
    right, bottom = left + PANEL[0], top + PANEL[1]
    pen.text((left, top - 24), title, fill="black")
    pen.rectangle((left, top, right, bottom), outline="silver")
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return
    xs, ys = zip(*points)
    low, high = min(ys), max(ys)
    shown = [(left + PANEL[0] * x / max(xs), bottom - PANEL[1] * (y - low) / ((high - low) or 1))
             for x, y in points]
    pen.line(shown, fill="royalblue", width=2)
    for x, y in shown if len(shown) < 30 else ():
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="royalblue")
    pen.text((left - 4, top), f"{high:.3g}", fill="gray", anchor="ra")
    pen.text((left - 4, bottom - 12), f"{low:.3g}", fill="gray", anchor="ra")
    pen.text((left, bottom + 4), "step 0", fill="gray")
    pen.text((right, bottom + 4), f"{max(xs)}", fill="gray", anchor="ra")
