"""The results of a run: a table of metrics, and PNG files of predictions, curves and the tree.

A picture is a tensor (3, H, W) with values from 0 to 1. H and W are in pixels. Each task turns its
own values into colours (`colours` in tasks.py). The PNG files are drawn with Pillow, which
torchvision needs anyway.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import permutations
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
    """The validation loss and each task's main metric in one line, with delta-m if known."""
    parts = [f"validation loss {result['loss']:.4f}"]
    for task in tasks:
        value = result["results"][task.name][task.metric]
        parts.append(f"{task.name} {task.metric} {value:.4f}")
    if "delta_m" in result:
        parts.append(f"delta-m {result['delta_m']:+.2f} %")
    return "  ".join(parts)


def format_table(tasks: Sequence, result: dict, reference: dict,
                 size: tuple[int, int] | None) -> str:
    """The result of `evaluate` as a table: each metric next to the best constant prediction's.

    reference: metrics of the best constant, from eval.reference. size: (H, W) of the images, or
    None if each kept its own size. A star marks the metric that papers compare; up or down says
    which way is better.
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
                        f"{pixels:,} valid pixels, so its metrics are NaN")
        if not pixels:
            rows.append(f"{task.name:<13}no image has a label for this task, so its metrics and "
                        "delta-m are NaN")
    if "delta_m" in result:
        rows.append(f"delta-m {result['delta_m']:+.2f} %")
    return "\n".join(rows)


# --- predictions ----------------------------------------------------------------------------------
def legend(task) -> list[tuple[str, Tensor]]:
    """(caption, colour (3,)) for each entry of `task.marks`, which is {caption: label value}."""
    entries = []
    for caption, value in getattr(task, "marks", {}).items():
        label = torch.tensor(value).view(-1, 1, 1)
        if task.kind == "classes":
            label = label[0]                                # (1, 1)
        entries.append((caption, task.colours(label)[:, 0, 0]))
    return entries


def place_legends(entries: dict[str, list], font: ImageFont.FreeTypeFont, line: int, left: int,
                  right: int) -> list[tuple[float, int, str, Tensor | None]]:
    """Lay out all legends, one below the other: each name, with its captions wrapped next to it.

    entries: {name: [(caption, colour)]}. line: height of a line. left, right: edges of the legends.
    Returns (x, line number, text, colour) for each name and caption. A caption has a square of its
    colour at x; a name has no square, and its colour is None. Both texts start at x + line.
    """
    words, number = [], 0
    indent = left + line + max(font.getlength(name) for name in entries)
    for name, captions in entries.items():
        if not captions:
            continue
        words.append((left - line, number, name, None))
        x = indent
        for caption, colour in captions:
            width = 2 * line + font.getlength(caption)
            if x > indent and x + width > right:
                x, number = indent, number + 1
            words.append((x, number, caption, colour))
            x += width
        number += 1
    return words


def draw_grid(path: Path, titles: Sequence[str],
              rows: Sequence[tuple[str, Sequence[Tensor | None]]], tasks: Sequence,
              striped: bool = False) -> None:
    """Write a PNG with a grid of pictures of equal size, and legends at the bottom.

    titles: one above each column. rows: (name, pictures); the name is written on the left. A
    picture may be None, except the very first, which gives the size. If its longer side is below
    160 pixels, all pictures are enlarged. striped: explain striped pixels in the legend.
    """
    height, width = rows[0][1][0].shape[1:]
    zoom = max(1, 160 / max(height, width))
    height, width = round(zoom * height), round(zoom * width)
    font = ImageFont.load_default(max(13, width // 24))
    line, gap = round(1.5 * font.size), 8
    left = gap + round(max(font.getlength(name) for name, _ in rows)) + gap
    column = gap + max(width, *(round(font.getlength(title)) for title in titles))
    right = left + column * len(titles)
    legend_top = gap + line + (height + gap) * len(rows)
    entries = {f"{task.name}:": legend(task) for task in tasks}
    if striped:
        entries["striped:"] = [("no ground truth", torch.full((3,), 0.5))]
    words = place_legends(entries, font, line, gap, right)
    legend_lines = max((number + 1 for _, number, _, _ in words), default=0)
    bottom = legend_top + line * legend_lines + gap

    picture = Image.new("RGB", (right, bottom), "white")
    pen = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        pen.text((left + i * column, gap), title, "black", font)
    for j, (name, row) in enumerate(rows):
        top = gap + line + j * (height + gap)
        pen.text((gap, top), name, "black", font)
        for i, tile in enumerate(row):
            if tile is not None:
                tile = to_pil_image(tile.cpu().float().clamp(0, 1))
                tile = tile.resize((width, height), Image.Resampling.NEAREST)
                picture.paste(tile, (left + i * column, top))
    for x, number, text, colour in words:
        y = legend_top + number * line
        if colour is not None:
            square = x, y, x + font.size, y + font.size
            pen.rectangle(square, tuple((colour * 255).int().tolist()), outline="gray")
        pen.text((x + line, y), text, "black", font)
    picture.save(path)


@torch.no_grad()
def draw_samples(path: Path, predictors: dict[str, Callable], tasks: Sequence, dataset,
                 size: tuple[int, int], device: torch.device,
                 images: Sequence[int] = (0, 1)) -> None:
    """Draw some samples: the ground truth of each task above its predictions.

    predictors: {name: function from image (1, 3, H, W) to {task: prediction}}; each gets one row
    per sample. images: numbers of the samples; those that the dataset does not have are left out.
    Pixels without ground truth are striped.
    """
    H, W = size
    diagonal = torch.arange(H)[:, None] + torch.arange(W)
    stripes = 0.5 * (diagonal % 8 < 4)                              # (H, W), black and grey
    rows, striped = [], False
    for i in images:
        if i >= len(dataset):
            continue
        batch = collate([dataset[i]])
        image, labels = warp(batch, size, device)
        photo = batch["image"].float() / 255
        truth = [F.interpolate(photo, size, mode="bilinear", antialias=True)[0]]
        for task in tasks:
            label = labels[task.name].cpu()
            valid = task.valid(label).reshape(H, W)
            truth.append(torch.where(valid, task.colours(label[0]), stripes))
            striped = striped or not valid.all()
        rows.append(("ground truth", truth))
        for name, predict in predictors.items():
            predictions = predict(image)
            row = [None]
            for task in tasks:
                row.append(task.colours(predictions[task.name][0].float().cpu()))
            rows.append((name, row))
    draw_grid(path, ["image", *(task.name for task in tasks)], rows, tasks, striped)


def draw_photos(photos: Sequence[Path], folder: Path, predict: Callable, tasks: Sequence,
                size: tuple[int, int] | None, device: torch.device) -> list[Path]:
    """Draw every task's prediction for each photo, as folder/NAME.predicted.png.

    If that file exists, a number is added to the name. Predictions are drawn at the size of the
    photo. A photo above 2048 pixels per side is shrunk first, and a picture below 160 pixels is
    enlarged. size: (H, W) of the network's input; None means the size of the photo. Returns the
    paths. If a photo cannot be read or is too small, the others are still drawn, and then a
    ValueError names that photo.
    """
    errors, paths = [], []
    for photo in photos:
        try:
            paths.append(draw_photo(photo, folder, predict, tasks, size, device))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if errors:
        written = [f"wrote {path}" for path in paths]
        raise ValueError("\n".join(errors + written))
    return paths


@torch.no_grad()
def draw_photo(photo: Path, folder: Path, predict: Callable, tasks: Sequence,
               size: tuple[int, int] | None, device: torch.device) -> Path:
    """Like `draw_photos`, for one photo. Raises ValueError if it cannot be read or is too small."""
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
    draw_grid(path, ["image", *(task.name for task in tasks)], [("", row)], tasks)
    return path


# --- curves ---------------------------------------------------------------------------------------
PLOT = 260, 170         # width and height of a plot's frame, in pixels
MARGIN = 60             # space around the frame for the title and the numbers
SMALL = 13              # font size


def draw_curves(path: Path, log: Path, tasks: Sequence) -> None:
    """Write a PNG from a run's log.jsonl: each task's training loss with its metric below."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last_step = max(line["step"] for line in lines)
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
        direction = "higher" if task.higher_is_better else "lower"
        draw_plot(pen, i * width, 0, f"{task.name}: training loss", losses, last_step)
        title = f"{task.name}: {task.metric} ({direction} is better)"
        draw_plot(pen, i * width, height, title, metrics, last_step)
    picture.save(path)


def draw_plot(pen: ImageDraw.ImageDraw, x: int, y: int, title: str,
              points: Sequence[tuple[float, float | None]], last_step: int) -> None:
    """Draw one plot, whose top left corner is at (x, y): a frame with a margin on all sides.

    points: (step, value); a value that is None or not finite is left out. The axes are labelled
    with the lowest and highest value, and with step 0 and the last step.
    """
    font = ImageFont.load_default(SMALL)
    left, top = x + MARGIN, y + MARGIN
    right, bottom = left + PLOT[0], top + PLOT[1]
    pen.text((left, top - 24), title, "black", font)
    pen.rectangle((left, top, right, bottom), outline="silver")
    points = [(step, value) for step, value in points
              if value is not None and math.isfinite(value)]
    if not points:
        return
    values = [value for _, value in points]
    low, high = min(values), max(values)
    if low == high:                                 # draw a constant in the middle
        low, high = low - 1, high + 1

    def height(value: float) -> float:
        return bottom - PLOT[1] * (value - low) / (high - low)

    curve = [(left + PLOT[0] * step / last_step, height(value)) for step, value in points]
    pen.line(curve, fill="royalblue", width=2)
    if len(curve) < 30:
        for px, py in curve:
            pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill="royalblue")
    for value in {min(values), max(values)}:
        pen.text((left - 6, height(value)), f"{value:.3g}", "dimgray", font, anchor="rm")
    pen.text((left, bottom + 6), "0", "dimgray", font, anchor="ma")
    pen.text(((left + right) / 2, bottom + 6), "step", "dimgray", font, anchor="ma")
    pen.text((right, bottom + 6), f"{last_step}", "dimgray", font, anchor="ma")


# --- the tree -------------------------------------------------------------------------------------
ROW = 30                # height of a row, in pixels


def draw_tree(path: Path, source: Path) -> None:
    """Write a PNG from a tree.json: the tree and, above it, the similarities if the file has them.

    Tasks are columns, in an order that keeps groups together. Each stage is a row, and each group
    is a box.
    """
    saved = json.loads(source.read_text())
    tasks, tree, similarity = saved["tasks"], saved["tree"], saved.get("similarity")
    choices = saved.get("choices") or [None] * len(tree)
    order = sorted(tasks, key=lambda task: [[task not in group for group in stage]
                                            for stage in tree])
    font = ImageFont.load_default(SMALL)
    wide = round(24 + max(font.getlength(text) for text in ["-0.123 ± 0.123", *tasks]))
    width = wide * (len(tasks) + 1)
    tree_top = ROW * (len(tasks) + 3) if similarity else 0
    picture = Image.new("RGB", (width, tree_top + ROW * (2 * len(tree) + 1)), "white")
    pen = ImageDraw.Draw(picture)

    def title(y: int, text: str) -> None:
        pen.text((10, y + ROW / 2), text, "black", font, anchor="lm")

    def box(column: int, y: int, texts: Sequence[str], **colours) -> None:
        """Draw one box from `column` on, with one text in each of the columns that it spans.

        Column -1 is to the left of the tasks.
        """
        left, right = wide * (column + 1), wide * (column + 1 + len(texts))
        pen.rounded_rectangle((left + 4, y + 2, right - 4, y + ROW - 2), 6, **colours)
        for i, text in enumerate(texts):
            pen.text((left + wide * (i + 0.5), y + ROW / 2), text, "black", font, anchor="mm")

    if similarity:
        title(0, "Similarity of the tasks' gradients ± standard error")
        strongest = max(abs(similarity[t][u]) for t, u in permutations(range(len(tasks)), 2))
        for i, task in enumerate(order):
            y = ROW * (i + 2)
            box(i, ROW, [task])
            box(-1, y, [task])
            for j, other in enumerate(order):
                if task == other:
                    continue
                t, u = tasks.index(task), tasks.index(other)
                value, error = similarity[t][u], saved["standard_error"][t][u]
                text = f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"
                pale = round(255 - 120 * abs(value) / strongest)
                colour = (pale, pale, 255) if value > 0 else (255, pale, pale)
                box(j, y, [text], fill=colour)
    title(tree_top, "The tree: tasks in one box share their adapters")
    for i, (stage, choice) in enumerate(zip(tree, choices)):
        y = tree_top + ROW * (2 * i + 1)
        box(-1, y, [f"stage {i + 1}"])
        if choice:
            words = "decided" if choice["decided"] else "not decided"
            pen.text((wide / 2, y + ROW), words, "dimgray", font, anchor="mm")
        for group in stage:
            first = min(order.index(task) for task in group)
            middle = wide * (first + 1 + len(group) / 2)
            box(first, y, order[first:first + len(group)], outline="royalblue", width=2)
            line_top = y + 2 - (ROW + 4 if i > 0 else 0)
            pen.line((middle, line_top, middle, y + 2), "royalblue", 2)
    picture.save(path)
