"""Compare runs: mean and standard deviation over seeds and delta-m, one row a method.

    python -m tools.table runs/table --baseline single      # a method among the runs, or a file:
    python -m tools.table runs/nyud --baseline baselines/nyud.json    # the paper's numbers

Runs lie in FOLDER/METHOD/RUN (docs/RESULTS.md, "A run of runs"). Runs of a method with the same
seed are put together: that is how single-task runs, one a task, make one row.
References: arXiv 2509.19602, section 4.2, eq. 7.
"""

import argparse
import statistics
from pathlib import Path

from tasks import delta_m, make_tasks
from util.checkpoint import read_results
from util.run import one_line_errors


def collect(folder: Path, last: bool = False) -> tuple[dict[str, dict[int, dict]], str | None]:
    """{method: {seed: {"results": {task: {metric: value}}, "trainable": count}}}, and the dataset.

    last: of each run's last evaluation, as the published code reports, not of its best.
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


def spread(values: list[float]) -> str:
    """mean +- sample standard deviation; of one value, the value."""
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def format_rows(methods: dict, baseline: dict | None, epoch: str = "best") -> str:
    """The table as text. baseline: {task: {metric: value}}, None leaves delta-m out."""
    names = list(dict.fromkeys(name for seeds in methods.values() for run in seeds.values()
                               for name in run["results"]))
    tasks = make_tasks(names, 1)
    rows = [["method", "epoch", "seeds", "trained"]
            + [f"{t.name} {t.metric} {'up' if t.higher_is_better else 'down'}" for t in tasks]
            + (["delta-m %"] if baseline else [])]
    for method, seeds in methods.items():
        runs = list(seeds.values())
        row = [method, epoch, str(len(runs)), f"{runs[0]['trainable']:,}"]
        for task in tasks:
            values = [run["results"][task.name][task.metric] for run in runs
                      if task.name in run["results"]]
            row.append(spread(values) if values else "-")
        if baseline:
            complete = [run["results"] for run in runs if set(names) <= set(run["results"])]
            row.append(spread([delta_m(r, baseline) for r in complete]) if complete else "-")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip()
                     for row in rows)


def find_baseline(name: str, methods: dict, dataset: str | None) -> dict:
    """A file's results, or the means over the seeds of a method."""
    if name not in methods:
        found = read_results(Path(name))
        if dataset and found.get("dataset", dataset) != dataset:
            raise ValueError(f"--baseline {name} is of {found['dataset']}, the runs of {dataset}")
        return found["results"]
    values = {}  # {task: {metric: its value in each run}}
    for run in methods[name].values():
        for task, metrics in run["results"].items():
            for metric, value in metrics.items():
                values.setdefault(task, {}).setdefault(metric, []).append(value)
    return {task: {metric: statistics.mean(found) for metric, found in metrics.items()}
            for task, metrics in values.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds METHOD/RUN/metrics.json")
    parser.add_argument("--baseline", help="a METHOD in it, or a JSON file, for delta-m")
    parser.add_argument("--last", action="store_true",
                        help="compare last epochs, as the published code does, not best ones")
    args = parser.parse_args(argv)
    with one_line_errors():
        methods, dataset = collect(args.folder, args.last)
        baseline = find_baseline(args.baseline, methods, dataset) if args.baseline else None
        print(format_rows(methods, baseline, "last" if args.last else "best"))


if __name__ == "__main__":
    main()
