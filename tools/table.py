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


def collect(folder: Path) -> dict[str, dict[int, dict]]:
    """{method: {seed: {"results": {task: {metric: value}}, "trainable": count}}}."""
    methods = {}
    for path in sorted(folder.glob("*/*/metrics.json")):
        run = read_results(path)
        seeds = methods.setdefault(path.parent.parent.name, {})
        whole = seeds.setdefault(run.get("seed", 0), {"results": {}, "trainable": 0})
        whole["results"] |= run["results"]
        whole["trainable"] += run["trainable"]
    if not methods:
        raise ValueError(f"no {folder}/METHOD/RUN/metrics.json; see docs/RESULTS.md, A run of runs")
    return methods


def spread(values: list[float]) -> str:
    """mean +- sample standard deviation; of one value, the value."""
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def format_rows(methods: dict, baseline: dict | None) -> str:
    """The table as text. baseline: {task: {metric: value}}, None leaves delta-m out."""
    names = list(dict.fromkeys(name for seeds in methods.values() for run in seeds.values()
                               for name in run["results"]))
    tasks = make_tasks(names, 1)
    rows = [["method", "seeds", "trained"]
            + [f"{t.name} {t.metric} {'up' if t.higher_is_better else 'down'}" for t in tasks]
            + (["delta-m %"] if baseline else [])]
    for method, seeds in methods.items():
        runs = list(seeds.values())
        row = [method, str(len(runs)), f"{runs[0]['trainable']:,}"]
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


def find_baseline(name: str, methods: dict) -> dict:
    """A file's results, or the means over the seeds of a method."""
    if name not in methods:
        return read_results(Path(name))["results"]
    runs = [run["results"] for run in methods[name].values()]
    return {task: {metric: statistics.mean(run[task][metric] for run in runs) for metric in values}
            for task, values in runs[0].items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds METHOD/RUN/metrics.json")
    parser.add_argument("--baseline", help="a METHOD in it, or a JSON file, for delta-m")
    args = parser.parse_args(argv)
    with one_line_errors():
        methods = collect(args.folder)
        baseline = find_baseline(args.baseline, methods) if args.baseline else None
        print(format_rows(methods, baseline))


if __name__ == "__main__":
    main()
