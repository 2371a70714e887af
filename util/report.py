"""What a run shows: its table, predictions beside the truth, a photo's predictions, curves, its
tree; and what runs show beside one another: means, intervals, delta-m.

A picture is a tensor (3, H, W) in 0..1; a task says itself which colours its values have.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from bdta import Router
from data import ToDevice, collate, warp
from datasets.labels import read_image
from tasks import delta_m, make_tasks
from util.checkpoint import read_results


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


def watch_gates(model: nn.Module) -> list[list[Tensor]]:
    """A list for each of MoTE's routers, to which every image from now on adds its gates (T, T)."""
    watched = []
    for router in model.modules():
        if isinstance(router, Router):
            seen = []
            router.register_forward_hook(
                lambda module, inputs, gates, seen=seen: seen.extend(gates.detach().cpu()))
            watched.append(seen)
    return watched


def format_gates(names: list[str], stages: list[list[list[float]]]) -> str:
    """Lines to add to the table: each stage's mean gates, what a row's task takes of each expert.
    """
    rows = []
    for i, gates in enumerate(stages, 1):
        rows.append(f"{f'gates {i}':<13}" + "".join(f"{name:>13}" for name in names))
        rows += [f"{name:<13}" + "".join(f"{gate:>13.4f}" for gate in row)
                 for name, row in zip(names, gates)]
    return "".join(f"\n{row}" for row in rows)


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
            text = f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"
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


# --- runs beside one another ----------------------------------------------------------------------
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by freedom


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t interval (infinite for a single value)."""
    freedom = len(values) - 1
    if not freedom:
        return values[0], math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T95[min(freedom, len(T95) - 1)] * error


def mean_results(runs: Iterable[dict]) -> dict:
    """{task: {metric: its mean over the runs that have the task}}."""
    values = {}  # {task: {metric: its value in each run}}
    for run in runs:
        for task, metrics in run["results"].items():
            for metric, value in metrics.items():
                values.setdefault(task, {}).setdefault(metric, []).append(value)
    return {task: {metric: statistics.mean(found) for metric, found in metrics.items()}
            for task, metrics in values.items()}


def collect_runs(folder: Path, last: bool = False) -> tuple[dict[str, dict[int, dict]], str | None]:
    """The runs in FOLDER/METHOD/RUN as {method: {seed: {"results", "trainable"}}}; the dataset.

    Those of a method and a seed, one a task, are put together. last: of each run's last evaluation,
    as the published code reports, not of its best.
    """
    methods, dataset = {}, None
    for path in sorted(folder.glob("*/*/metrics.json")):
        run, method = read_results(path), path.parent.parent.name
        dataset = dataset or run.get("dataset")
        if run.get("dataset") not in (dataset, None):
            raise ValueError(f"{path} is of {run['dataset']}, other runs are of {dataset}")
        seed = run.get("seed", 0)
        whole = methods.setdefault(method, {}).setdefault(seed, {"results": {}, "trainable": 0})
        results = run["last"]["results"] if last else run["results"]
        twice = sorted(whole["results"].keys() & results.keys())
        if twice:
            raise ValueError(f"{path}: {method} has {', '.join(twice)} of seed {seed} already; "
                             "keep one run of each seed and task")
        whole["results"] |= results
        whole["trainable"] += run["trainable"]
    if not methods:
        raise ValueError(f"no {folder}/METHOD/RUN/metrics.json; see docs/RESULTS.md, A run of runs")
    return methods, dataset


def find_baseline(name: str, methods: dict, dataset: str | None) -> dict:
    """A file's results, or the means over the seeds of a method."""
    if name in methods:
        return mean_results(methods[name].values())
    found = read_results(Path(name))
    if dataset and found.get("dataset", dataset) != dataset:
        raise ValueError(f"--baseline {name} is of {found['dataset']}, the runs of {dataset}")
    return found["results"]


def format_runs(methods: dict, baseline: dict | None, epoch: str) -> str:
    """The table as text: mean +- sample standard deviation over seeds, delta-m with its interval.

    methods: {name: {seed: {"results", "trainable"}}}; baseline: {task: {metric: value}}, None
    leaves delta-m out.
    """
    def spread(values: list[float]) -> str:
        mean = statistics.mean(values)
        return f"{mean:.4f}" + (f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    names = list(dict.fromkeys(name for seeds in methods.values() for run in seeds.values()
                               for name in run["results"]))
    tasks = make_tasks(names, 1)
    rows = [["method", "epoch", "seeds", "trained"]
            + [f"{t.name} {t.metric} {'up' if t.higher_is_better else 'down'}" for t in tasks]
            + (["delta-m %", "95 % interval"] if baseline else [])]
    for method, seeds in methods.items():
        runs = list(seeds.values())
        row = [method, epoch, str(len(runs)), f"{runs[0]['trainable']:,}"]
        for task in tasks:
            values = [run["results"][task.name][task.metric] for run in runs
                      if task.name in run["results"]]
            row.append(spread(values) if values else "-")
        if baseline:
            gains = [delta_m(run["results"], baseline) for run in runs
                     if set(names) <= set(run["results"])]
            mean, half = interval(gains) if len(gains) > 1 else (0, math.inf)
            row += [spread(gains) if gains else "-",
                    f"{mean - half:+.2f} to {mean + half:+.2f}" if half < math.inf else "-"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip()
                     for row in rows)


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
