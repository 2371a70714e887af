"""What a run shows: predictions beside the truth, a photo's predictions, curves; a study's gains.

A picture is a tensor (3, H, W) in 0..1; a task says itself which colours its values have.
"""

import json
import math
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # come with torchvision
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data import ToDevice, collate, warp
from datasets.labels import read_image
from util.report import interval
from util.run import reading


# --- pictures -------------------------------------------------------------------------------------
def legend(task) -> list[tuple[str, Tensor]]:
    """What a task's colours mean: captions, each with its colour (3,); none where they say it."""
    if names := getattr(task, "names", ()):
        return list(zip(names, task.colours(torch.arange(len(names))[None])[:, 0].T))
    marks = getattr(task, "marks", ())
    return [(f"{mark} m", task.colours(torch.full((1, 1, 1), mark))[:, 0, 0]) for mark in marks]


def draw(path: Path, titles: list[str], rows: list[list[Tensor]], tasks: list) -> None:
    """Write a PNG: equally large pictures, a title above each column, the tasks' legends below."""
    height, width = rows[0][0].shape[1:]
    font = ImageFont.load_default(max(11, width // 24))
    line = round(1.5 * font.size)
    column = 2 + max(width, *(round(font.getlength(title)) for title in titles))
    right, y, words = column * len(titles), line + (height + 2) * len(rows), []
    for task in tasks:
        x, entries = right, [(f"{task.name}:", torch.ones(3)), *legend(task)]
        for text, colour in entries if len(entries) > 1 else ():
            end = x + 2 * line + font.getlength(text)
            if end > right:  # a new line, under the task's name
                x, y, end = 0, y + line, 2 * line + font.getlength(text)
            words.append((x, y, text, tuple((colour * 255).int().tolist())))
            x = end
    picture = Image.new("RGB", (right, y + line), "white")
    pen = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        pen.text((i * column, 0), title, "black", font)
        for j, row in enumerate(rows):
            picture.paste(to_pil_image(row[i].cpu().float().clamp(0, 1)),
                          (i * column, line + j * (height + 2)))
    for x, y, text, colour in words:
        pen.rectangle((x, y, x + font.size, y + font.size), colour)
        pen.text((x + line, y), text, "black", font)
    picture.save(path)


@torch.no_grad()
def draw_samples(path: Path, predict, tasks: list, dataset, size: tuple[int, int],
                 device: torch.device, count: int = 4) -> None:
    """Image | truth, prediction of each task | ..., for the first samples of `dataset`."""
    rows = []
    titles = ["image", *(f"{t.name}: {what}" for t in tasks for what in ("true", "found"))]
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
    draw(path, titles, rows, tasks)


def draw_photos(photos: list[Path], folder: Path, predict, tasks: list,
                size: tuple[int, int] | None, device: torch.device) -> list[Path]:
    """Draw each photo and every task's prediction, side by side at the photo's size, to
    folder/NAME.predicted.png; NAME.predicted-2.png where that exists. What is wrong with a photo
    does not stop the others: in the end ValueError says it, and what was written."""
    errors, paths = [], []
    for photo in photos:
        try:
            paths.append(draw_photo(photo, folder, predict, tasks, size, device))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors + [f"wrote {path}" for path in paths]))
    return paths


@torch.no_grad()
def draw_photo(photo: Path, folder: Path, predict, tasks: list, size: tuple[int, int] | None,
               device: torch.device) -> Path:
    batch = collate([{"image": torch.from_numpy(read_image(photo, photo=True)).permute(2, 0, 1)}])
    own_size = batch["size"][0].tolist()
    image, _ = warp(next(iter(ToDevice([batch], device))), size or own_size)
    predictions, row = predict(image), [batch["image"][0] / 255]
    for task in tasks:
        pred = F.interpolate(predictions[task.name].float(), own_size, mode="bilinear")
        row.append(task.colours(pred[0]))
    names = (f"{photo.stem}.predicted{n}.png" for n in chain([""], count(-2, -1)))
    path = next(folder / name for name in names if not (folder / name).exists())
    draw(path, ["image", *(task.name for task in tasks)], [row], tasks)
    return path


# --- curves ---------------------------------------------------------------------------------------
PANEL = 260, 170  # width and height of one plot, pixels
MARGIN = 42       # around it, for its title and its numbers


def draw_curves(path: Path, log: Path, tasks: list) -> None:
    """Write a PNG: a column for each task, its training loss above its metric, over the steps."""
    width, height = (side + 2 * MARGIN for side in PANEL)
    picture = Image.new("RGB", (len(tasks) * width, 2 * height), "white")
    pen = ImageDraw.Draw(picture)
    with reading(log, "a log of train.py"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for column, task in enumerate(tasks):
            losses = [(x["step"], x["loss"][task.name]) for x in lines if "lr" in x]
            plot(pen, column * width, 0, f"{task.name}: training loss", losses)
            values = [(x["step"], x["results"][task.name][task.metric]) for x in lines
                      if "results" in x]
            plot(pen, column * width, height, f"{task.name}: {task.metric}, "
                 f"{'up' if task.higher_is_better else 'down'} is better", values)
    picture.save(path)


def plot(pen: ImageDraw.ImageDraw, left: int, top: int, title: str,
         points: list[tuple[float, float]]) -> None:
    """One curve in a frame, with the numbers of its ends on both axes."""
    left, top = left + MARGIN, top + MARGIN
    right, bottom = left + PANEL[0], top + PANEL[1]
    pen.text((left, top - 24), title, fill="black")
    pen.rectangle((left, top, right, bottom), outline="silver")
    points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
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


# --- the tree ------------------------------------------------------------------------------------
def draw_tree(path: Path, source: Path) -> None:
    """Write a PNG of a tree.json: similarities +- standard errors, where it has any, and the tree.

    A column a task, in an order in which groups stand together; a row a stage, a box a group."""
    saved, row, font = json.loads(source.read_text()), 30, ImageFont.load_default(13)
    tasks, tree, sim = saved["tasks"], saved["tree"], saved["similarity"]
    order = sorted(tasks, key=lambda t: [[t not in group for group in stage] for stage in tree])
    wide = max(map(font.getlength, ["-0.123 ± 0.123", *tasks])) + 24
    top = row * (len(tasks) + 2) if sim else row // 2  # of the tree
    size = round(wide * (len(tasks) + 1)), top + row * 2 * len(tree)
    pen = ImageDraw.Draw(picture := Image.new("RGB", size, "white"))

    def box(column: int, y: float, texts: Sequence[str], **colours) -> None:
        left, right = wide * (column + 1), wide * (column + 1 + len(texts))  # -1 is the margin
        pen.rounded_rectangle((left + 4, y + 2, right - 4, y + row - 2), 6, **colours)
        for i, text in enumerate(texts):
            pen.text((left + wide * (i + 0.5), y + row / 2), text, "black", font, anchor="mm")

    for i, t in enumerate(map(tasks.index, order if sim else ())):
        box(i, 0, [tasks[t]])
        box(-1, row * (i + 1), [tasks[t]])
        for j, u in enumerate(map(tasks.index, order)):
            value, error = sim[t][u], saved["standard_error"][t][u]
            text = f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"  # none on the diagonal
            dim = round(255 - 120 * abs(value) ** 0.5)
            box(j, row * (i + 1), [text], fill=(dim, dim, 255) if value > 0 else (255, dim, dim))
    for i, stage in enumerate(tree):
        y = top + 2 * row * i
        box(-1, y, [f"stage {i + 1}"])
        for group in stage:
            first = min(map(order.index, group))
            middle = wide * (first + 1 + len(group) / 2)
            box(first, y, order[first:first + len(group)], outline="royalblue", width=2)
            pen.line((middle, y + 2 - (row + 4) * (i > 0), middle, y + 2), "royalblue", 2)
    picture.save(path)


# --- gains ---------------------------------------------------------------------------------------
def draw_gains(path: Path, gains: dict[str, list[float]]) -> None:
    """Write a PNG: delta-m of each method, a dot a seed, its mean and the 95 % interval."""
    left, top, width, row = 130, 34, 520, 26
    everything = [value for values in gains.values() for value in values]
    low, high = math.floor(min(everything)) - 1, math.ceil(max(everything)) + 1
    picture = Image.new("RGB", (left + width + 30, top + row * len(gains) + 34), "white")
    pen = ImageDraw.Draw(picture)

    def x(value: float) -> float:
        return left + width * (min(max(value, low), high) - low) / (high - low)

    bottom = top + row * len(gains)
    for tick in range(low, high + 1, max(1, (high - low) // 10)):
        pen.line((x(tick), top, x(tick), bottom), fill="silver" if tick else "black")
        pen.text((x(tick), bottom + 4), f"{tick:+d}" if tick else "0", fill="gray", anchor="ma")
    pen.text((left, 10), "delta-m, % (dot: a seed; bar: mean and 95 % interval)", fill="black")
    for i, (method, values) in enumerate(gains.items()):
        y = top + row * i + row / 2
        mean, half = interval(values)
        pen.text((left - 8, y), method, fill="black", anchor="rm")
        pen.line((x(mean - half), y, x(mean + half), y), fill="royalblue", width=3)
        pen.line((x(mean), y - 8, x(mean), y + 8), fill="royalblue", width=3)
        for value in values:
            pen.ellipse((x(value) - 3, y - 3, x(value) + 3, y + 3), outline="black", fill="orange")
    picture.save(path)
