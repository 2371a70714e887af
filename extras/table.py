"""One table of finished runs: the mean and the standard deviation over seeds, and delta-m.

    python -m extras.table runs/table --baseline single
    python -m extras.table runs/table --baseline baselines/nyud.json --last
    python -m extras.table runs/decoders runs/tglora --picture comparison.png

Each path is the folder of a run, the folder of a method with one folder per run, or a folder of
such methods. Each method gets one row, named after its folder. Runs of the same method and seed
count as one run, so a method may consist of one single-task run per task. docs/RESULTS.md shows how
to train such runs.
Reference: arXiv 2509.19602, eq. 7 (delta-m).
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from data import open_dataset
from eval import load_run, predictor
from report import draw_samples
from tasks import delta_m, make_tasks
from train import check_same_images, described_images, read_results
from util import one_line_errors, reading

Results = dict[str, dict[str, float]]   # {task: {metric: value}}
Run = dict                              # {"results": Results, "trainable": trained parameters}


def find_runs(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(method, metrics.json) of every run in `paths`; see the top of this file."""
    found = []
    for path in paths:
        name = path.absolute().name
        runs = [*path.glob("metrics.json"), *sorted(path.glob("*/metrics.json"))]
        methods = sorted(path.glob("*/*/metrics.json"))
        if not runs + methods:
            raise ValueError(f"no run in {path}; expected a file metrics.json, RUN/metrics.json or "
                             "METHOD/RUN/metrics.json (see docs/RESULTS.md)")
        found += [(name, file) for file in runs]
        found += [(file.parent.parent.name, file) for file in methods]
    return found


def collect_runs(found: Sequence[tuple[str, Path]], last: bool) -> dict[str, dict[int, Run]]:
    """Read the files that `find_runs` found; returns {method: {seed: run}}.

    last: take the results of the last epoch, not of the best one. MTLoRA's published code also
    reports the last epoch.
    """
    methods, expected = {}, None
    for method, path in found:
        run = read_results(path)
        expected = expected or described_images(run)
        check_same_images(run, path, expected, found[0][1])
        with reading(path, "a metrics.json of a run"):
            results = run["last"]["results"] if last else run["results"]
            seeds = methods.setdefault(method, {})
            row = seeds.setdefault(run.get("seed", 0), {"results": {}, "trainable": 0})
            for task in make_tasks(list(results), 1):
                if task.name in row["results"]:
                    raise ValueError(f"another run of {method} with this seed also has results "
                                     f"for {task.name}; keep one run per seed and task")
                row["results"][task.name] = {task.metric: results[task.name][task.metric]}
            row["trainable"] += run["trainable"]
    return methods


def mean_results(runs: Iterable[Run]) -> Results:
    """The mean of each metric over the runs that include its task."""
    values = {}                         # {task: {metric: [its value in each run]}}
    for run in runs:
        for task, metrics in run["results"].items():
            for metric, value in metrics.items():
                values.setdefault(task, {}).setdefault(metric, []).append(value)
    means = {}
    for task, metrics in values.items():
        means[task] = {metric: statistics.mean(metrics[metric]) for metric in metrics}
    return means


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean as text, with "+- sample standard deviation" if there are several values."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.{digits}f}"
    return text


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Turn rows of cells into lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_runs(methods: dict[str, dict[int, Run]], baseline: Results | None, epoch: str) -> str:
    """The table: one row per method, with delta-m if there is a baseline.

    epoch: "best" or "last", the epoch that the results are from.
    """
    names = []                          # names of all tasks, in the order in which they appear
    for seeds in methods.values():
        for run in seeds.values():
            names += [task for task in run["results"] if task not in names]
    tasks = make_tasks(names, 1)
    head = ["method", "epoch", "seeds", "trained"]
    for task in tasks:
        better = "up" if task.higher_is_better else "down"
        head.append(f"{task.name} {task.metric} {better}")
    if baseline:
        head.append("delta-m %")

    rows = [head]
    for method, seeds in methods.items():
        runs = list(seeds.values())
        row = [method, epoch, str(len(runs)), f"{runs[0]['trainable']:,}"]
        for task in tasks:
            with_task = [run for run in runs if task.name in run["results"]]
            values = [run["results"][task.name][task.metric] for run in with_task]
            row.append(spread(values) if values else "-")
        if baseline:
            whole = [run for run in runs if set(run["results"]) == set(names)]
            gains = [delta_m(run["results"], baseline) for run in whole]
            row.append(spread(gains, 2) if gains else "-")
        rows.append(row)
    return aligned(rows)


def print_table(found: Sequence[tuple[str, Path]], baseline: str | None, last: bool) -> None:
    """Print the table of the runs that `find_runs` found.

    baseline: one of the methods, whose mean results are then used, or a JSON file with results.
    """
    methods = collect_runs(found, last)
    results = None
    if baseline in methods:
        results = mean_results(methods[baseline].values())
    elif baseline:
        first = found[0][1]
        run = read_results(Path(baseline))
        check_same_images(run, Path(baseline), described_images(read_results(first)), first)
        results = run["results"]
    print(format_runs(methods, results, "last" if last else "best"))


def draw_picture(path: Path, found: Sequence[tuple[str, Path]], last: bool,
                 images: Sequence[int]) -> None:
    """Draw some validation images: the ground truth above the predictions of each method.

    A method is shown by its first run. Raises ValueError if these runs have other tasks or other
    validation images.
    """
    first = {}                          # {method: its first run's metrics.json}
    for method, file in found:
        first.setdefault(method, file)
    predictors, names = {}, None
    for method, file in first.items():
        model, tasks, config = load_run(file.parent / ("last.pt" if last else "best.pt"))
        names = names or config.tasks
        if config.tasks != names:
            raise ValueError(f"{file.parent} has the tasks {', '.join(config.tasks)}, but "
                             f"{found[0][1].parent} has {', '.join(names)}; --picture needs runs "
                             "with the same tasks")
        predictors[method] = predictor(model, None)
    config.cache = False
    dataset = open_dataset(config, "val")
    draw_samples(path, predictors, tasks, dataset, config.size, torch.device("cpu"), images)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("paths", type=Path, nargs="+", help="a run, a METHOD with its runs, or a "
        "folder with METHOD/RUN in it")
    add("--baseline", help="also show delta-m against this baseline: a METHOD, or a JSON file with "
        "results, such as baselines/nyud.json")
    add("--last", action="store_true", help="show the results of each run's last epoch "
        "instead of its best epoch")
    add("--picture", type=Path, metavar="FILE", help="also draw a PNG of some validation "
        "images, with the ground truth and the predictions of each method's first run")
    add("--images", type=int, nargs="+", default=[0, 1], help="numbers of the validation images in "
        "the picture, from 0 (default: 0 1)")
    args = parser.parse_args(argv)
    with one_line_errors():
        found = find_runs(args.paths)
        print_table(found, args.baseline, args.last)
        if args.picture:
            draw_picture(args.picture, found, args.last, args.images)
            print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
