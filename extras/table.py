"""One table of finished runs: the mean and the standard deviation over seeds, and delta-m.

    python -m extras.table runs/table --baseline single
    python -m extras.table runs/table --baseline baselines/nyud.json --last

The runs are in FOLDER/METHOD/RUN, and each METHOD gets one row. Runs of the same method and seed
count as one run, so a method may consist of one single-task run per task. docs/RESULTS.md shows how
to train such runs.
Reference: arXiv 2509.19602, eq. 7 (delta-m).
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tasks import delta_m, make_tasks
from train import read_results
from util import one_line_errors, reading

Results = dict[str, dict[str, float]]   # {task: {metric: value}}
Run = dict                              # {"results": Results, "trainable": trained parameters}


def collect_runs(folder: Path, last: bool) -> tuple[dict[str, dict[int, Run]], str | None]:
    """Read FOLDER/METHOD/RUN/metrics.json; returns {method: {seed: run}} and the dataset.

    last: take the results of the last epoch, not of the best one. MTLoRA's published code also
    reports the last epoch.
    """
    methods, dataset = {}, None
    for path in sorted(folder.glob("*/*/metrics.json")):
        method, run = path.parent.parent.name, read_results(path)
        with reading(path, "a metrics.json of a run"):
            dataset = dataset or run.get("dataset")
            if run.get("dataset", dataset) != dataset:
                raise ValueError(f"is a run on {run['dataset']}, but other runs here are on "
                                 f"{dataset}; use one folder per dataset")
            results = run["last"]["results"] if last else run["results"]
            seeds = methods.setdefault(method, {})
            row = seeds.setdefault(run.get("seed", 0), {"results": {}, "trainable": 0})
            for task in make_tasks(list(results), 1):
                if task.name in row["results"]:
                    raise ValueError(f"another run of {method} with this seed also has results "
                                     f"for {task.name}; keep one run per seed and task")
                row["results"][task.name] = {task.metric: results[task.name][task.metric]}
            row["trainable"] += run["trainable"]
    if not methods:
        raise ValueError(f"no runs in {folder}; expected files METHOD/RUN/metrics.json in it (see "
                         "docs/RESULTS.md)")
    return methods, dataset


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


def print_table(folder: Path, baseline: str | None, last: bool) -> None:
    """Print the table of the runs in `folder`.

    baseline: a method in the folder, whose mean results are then used, or a JSON file with results.
    """
    methods, dataset = collect_runs(folder, last)
    results = None
    if baseline in methods:
        results = mean_results(methods[baseline].values())
    elif baseline:
        saved = read_results(Path(baseline))
        results = saved["results"]
        if saved.get("dataset", dataset) != dataset:
            raise ValueError(f"--baseline {baseline} has results on {saved['dataset']}, but the "
                             f"runs are on {dataset}; both must use the same dataset")
    print(format_runs(methods, results, "last" if last else "best"))


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="folder of the runs, with files METHOD/RUN/metrics.json")
    add("--baseline", help="also show delta-m against this baseline: a METHOD in the folder, or a "
        "JSON file with results, such as baselines/nyud.json")
    add("--last", action="store_true", help="show the results of each run's last epoch "
        "instead of its best epoch")
    args = parser.parse_args(argv)
    with one_line_errors():
        print_table(args.folder, args.baseline, args.last)


if __name__ == "__main__":
    main()
