"""How a run shows its results: the table of metrics, predictions as pictures, curves, the tree.

A picture is a tensor (3, H, W) with values from 0 to 1. Each task knows the colours of its own
values (`colours` in tasks.py). Drawing is Pillow's, which comes with torchvision.
Shapes: H W pixels.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data import collate, warp
from nyud_pascal import read_photo


# --- text -----------------------------------------------------------------------------------------
def format_line(tasks: Sequence, result: dict) -> str:
    """The validation loss and each task's main metric in one line; delta-m if it is known."""
    parts = [f"validation loss {result['loss']:.4f}"]
    for task in tasks:
        value = result["results"][task.name][task.metric]
        parts.append(f"{task.name} {task.metric} {value:.4f}")
    if "delta_m" in result:
        parts.append(f"delta-m {result['delta_m']:+.2f} %")
    return "  ".join(parts)


def format_table(tasks: Sequence, result: dict, reference: dict,
                 size: tuple[int, int] | None) -> str:
    """The answer of `evaluate`, one metric per line, next to the best constant prediction's.

    The star marks the metric that papers compare; up or down says which way is better.
    """
    where = f"at {size[0]}x{size[1]}" if size else "at their own size"
    rows = [f"{result['images']} images {where}, loss {result['loss']:.4f}",
            f"{'task':<13}{'metric':<12}{'result':>9}{'constant':>10}{'valid pixels':>18}"]
    for task in tasks:
        pixels, nan = result["pixels"][task.name], result["nan"][task.name]
        for metric, value in result["results"][task.name].items():
            constant = reference[task.name][metric]
            row = f"{task.name:<13}{metric:<12}{value:>9.4f}{constant:>10.4f}"
            if metric == task.metric:
                direction = "*up" if task.higher_is_better else "*down"
                row += f" {direction:<5}{pixels:>12,}"
            rows.append(row)
        if nan:
            rows.append(f"{task.name:<13}the prediction is not a number (NaN) at {nan:,} of "
                        f"{pixels:,} valid pixels, so its metrics are not numbers either")
        if not pixels:
            rows.append(f"{task.name:<13}no image has a label for this task, so its metrics and "
                        "delta-m are not numbers")
    if "delta_m" in result:
        rows.append(f"delta-m {result['delta_m']:+.2f} %")
    return "\n".join(rows)


# --- predictions ----------------------------------------------------------------------------------
def legend(task) -> list[tuple[str, Tensor]]:
    """(caption, colour (3,)) of a task's classes, or of its marked values."""
    entries = []
    for i, name in enumerate(getattr(task, "names", ())):
        entries.append((name, task.colours(torch.tensor([[i]]))[:, 0, 0]))
    for mark in getattr(task, "marks", ()):
        entries.append((f"{mark} m", task.colours(torch.full((1, 1, 1), float(mark)))[:, 0, 0]))
    return entries


def draw_grid(path: Path, titles: Sequence[str], rows: Sequence[Sequence[Tensor]],
              tasks: Sequence) -> None:
    """Write a PNG of equally large pictures: a title above each column, legends at the bottom."""
    height, width = rows[0][0].shape[1:]
    font = ImageFont.load_default(max(11, width // 24))
    line = round(1.5 * font.size)
    column = 8 + max(width, *(round(font.getlength(title)) for title in titles))
    total_width = column * len(titles)
    top_of_legend = line + (height + 2) * len(rows)

    words = []                                  # (x, y, text, colour) of the legends
    x, y = 0, top_of_legend
    for task in tasks:
        entries = legend(task)
        if not entries:
            continue
        for text, colour in [(f"{task.name}:", torch.ones(3)), *entries]:
            wide = 2 * line + font.getlength(text)
            if x + wide > total_width:
                x, y = line, y + line
            words.append((x, y, text, colour))
            x += wide
        x, y = 0, y + line

    picture = Image.new("RGB", (total_width, y + line // 2), "white")
    pen = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        pen.text((i * column, 0), title, "black", font)
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            image = to_pil_image(image.cpu().float().clamp(0, 1))
            picture.paste(image, (i * column, line + j * (height + 2)))
    for x, y, text, colour in words:
        red, green, blue = (colour * 255).int().tolist()
        pen.rectangle((x, y, x + font.size, y + font.size), (red, green, blue))
        pen.text((x + line, y), text, "black", font)
    picture.save(path)


@torch.no_grad()
def draw_samples(path: Path, predict: Callable, tasks: Sequence, dataset, size: tuple[int, int],
                 device: torch.device, count: int = 4) -> None:
    """Draw the first samples of `dataset`: the image, then ground truth and prediction per task."""
    titles = ["image"]
    for task in tasks:
        titles += [f"{task.name}: ground truth", f"{task.name}: prediction"]
    rows = []
    for i in range(min(count, len(dataset))):
        batch = collate([dataset[i]])
        image, labels = warp(batch, size, device)
        predictions = predict(image)
        photo = batch["image"].float() / 255
        row = [F.interpolate(photo, size, mode="bilinear", antialias=True)[0]]
        for task in tasks:
            row.append(task.colours(labels[task.name][0].cpu()))
            row.append(task.colours(predictions[task.name][0].float().cpu()))
        rows.append(row)
    draw_grid(path, titles, rows, tasks)


def draw_photos(photos: Sequence[Path], folder: Path, predict: Callable, tasks: Sequence,
                size: tuple[int, int] | None, device: torch.device) -> list[Path]:
    """Draw every task's prediction for each photo, at the photo's size, as
    folder/NAME.predicted.png. Returns the paths.

    A photo that cannot be read does not stop the others: ValueError names it at the end.
    """
    errors, paths = [], []
    for photo in photos:
        try:
            paths.append(draw_photo(photo, folder, predict, tasks, size, device))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if errors:
        written = [f"wrote {path}" for path in paths]
        raise ValueError("; ".join(errors + written))
    return paths


@torch.no_grad()
def draw_photo(photo: Path, folder: Path, predict: Callable, tasks: Sequence,
               size: tuple[int, int] | None, device: torch.device) -> Path:
    pixels = torch.from_numpy(read_photo(photo)).permute(2, 0, 1)       # (3, H, W)
    own_size = tuple(pixels.shape[1:])
    if min(own_size) < 4:
        raise ValueError(f"{photo} has {own_size[0]}x{own_size[1]} pixels; expected at least 4x4")
    image, _ = warp(collate([{"image": pixels}]), size or own_size, device)
    predictions = predict(image)
    row = [pixels / 255]
    for task in tasks:
        prediction = F.interpolate(predictions[task.name].float(), own_size, mode="bilinear")
        row.append(task.colours(prediction[0].cpu()))

    path, copy = folder / f"{photo.stem}.predicted.png", 2
    while path.exists():                        # never overwrite an earlier prediction
        path = folder / f"{photo.stem}.predicted-{copy}.png"
        copy += 1
    draw_grid(path, ["image", *(task.name for task in tasks)], [row], tasks)
    return path


# --- curves ---------------------------------------------------------------------------------------
PLOT = 260, 170         # width and height of one plot, in pixels
MARGIN = 42             # space around it for the title and the numbers


def draw_curves(path: Path, log: Path, tasks: Sequence) -> None:
    """Write a PNG from log.jsonl: for each task, its training loss and its metric over the steps.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    width, height = PLOT[0] + 2 * MARGIN, PLOT[1] + 2 * MARGIN
    picture = Image.new("RGB", (len(tasks) * width, 2 * height), "white")
    pen = ImageDraw.Draw(picture)
    for i, task in enumerate(tasks):
        losses, metrics = [], []
        for line in lines:
            if "results" in line:
                metrics.append((line["step"], line["results"][task.name][task.metric]))
            else:
                losses.append((line["step"], line["loss"][task.name]))
        better = "up" if task.higher_is_better else "down"
        draw_plot(pen, i * width, 0, f"{task.name}: training loss", losses)
        draw_plot(pen, i * width, height, f"{task.name}: {task.metric}, {better} is better", metrics)
    picture.save(path)


def draw_plot(pen: ImageDraw.ImageDraw, x: int, y: int, title: str,
              points: Sequence[tuple[float, float | None]]) -> None:
    """One curve in a frame with its top left corner at (x, y), with the ends of both axes."""
    left, top = x + MARGIN, y + MARGIN
    right, bottom = left + PLOT[0], top + PLOT[1]
    pen.text((left, top - 24), title, fill="black")
    pen.rectangle((left, top, right, bottom), outline="silver")
    points = [(step, value) for step, value in points
              if value is not None and math.isfinite(value)]
    if not points:
        return
    steps, values = zip(*points)
    low, high = min(values), max(values)
    spread = (high - low) or 1
    curve = []
    for step, value in points:
        curve.append((left + PLOT[0] * step / max(steps), bottom - PLOT[1] * (value - low) / spread))
    pen.line(curve, fill="royalblue", width=2)
    if len(curve) < 30:
        for px, py in curve:
            pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill="royalblue")
    pen.text((left - 4, top), f"{high:.3g}", fill="gray", anchor="ra")
    pen.text((left - 4, bottom - 12), f"{low:.3g}", fill="gray", anchor="ra")
    pen.text((left, bottom + 4), "step 0", fill="gray")
    pen.text((right, bottom + 4), f"{max(steps)}", fill="gray", anchor="ra")


# --- the tree -------------------------------------------------------------------------------------
ROW = 30                # height of a row, in pixels


def draw_tree(path: Path, source: Path) -> None:
    """Write a PNG of a tree.json: the similarities with their standard errors, and the tree.

    Tasks are columns, in an order that keeps groups together. Each stage is a row, each group a
    box.
    """
    saved = json.loads(source.read_text())
    tasks, tree, similarity = saved["tasks"], saved["tree"], saved.get("similarity")
    order = sorted(tasks, key=lambda task: [[task not in group for group in stage]
                                            for stage in tree])
    font = ImageFont.load_default(13)
    wide = round(24 + max(font.getlength(text) for text in ["-0.123 ± 0.123", *tasks]))
    top = ROW * (len(tasks) + 2) if similarity else ROW // 2            # of the tree
    picture = Image.new("RGB", (wide * (len(tasks) + 1), top + 2 * ROW * len(tree)), "white")
    pen = ImageDraw.Draw(picture)

    def box(column: int, y: int, texts: Sequence[str], **colours) -> None:
        """A box around `texts`, one per column; the first column of the picture is number -1."""
        left, right = wide * (column + 1), wide * (column + 1 + len(texts))
        pen.rounded_rectangle((left + 4, y + 2, right - 4, y + ROW - 2), 6, **colours)
        for i, text in enumerate(texts):
            pen.text((left + wide * (i + 0.5), y + ROW / 2), text, "black", font, anchor="mm")

    if similarity:
        for i, task in enumerate(order):
            box(i, 0, [task])
            box(-1, ROW * (i + 1), [task])
            for j, other in enumerate(order):
                t, u = tasks.index(task), tasks.index(other)
                value, error = similarity[t][u], saved["standard_error"][t][u]
                text = f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"
                pale = round(255 - 120 * abs(value) ** 0.5)
                colour = (pale, pale, 255) if value > 0 else (255, pale, pale)
                box(j, ROW * (i + 1), [text], fill=colour)
    for i, stage in enumerate(tree):
        y = top + 2 * ROW * i
        box(-1, y, [f"stage {i + 1}"])
        for group in stage:
            first = min(order.index(task) for task in group)
            middle = wide * (first + 1 + len(group) / 2)
            box(first, y, order[first:first + len(group)], outline="royalblue", width=2)
            line_top = y + 2 - (ROW + 4 if i > 0 else 0)
            pen.line((middle, line_top, middle, y + 2), "royalblue", 2)
    picture.save(path)
