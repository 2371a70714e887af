"""What a run says: its table, its gates; and what runs say beside one another: means, intervals,
delta-m. Pictures are in draw.py.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from bdta import Router
from flags import read_results
from tasks import delta_m, make_tasks
from util.run import reading


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
        if not pixels:
            rows.append(f"{task.name:<13}no image has a label of it: its metrics, and delta-m, are "
                        "not a number")
    if "delta_m" in found:
        rows.append(f"delta-m {found['delta_m']:+.2f} %")
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


# --- runs beside one another ----------------------------------------------------------------------
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by freedom


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t interval (infinite for a single value)."""
    freedom = len(values) - 1
    if not freedom:
        return values[0], math.inf
    error = np.std(values, ddof=1) / math.sqrt(len(values))  # statistics.stdev knows no NaN
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
        with reading(path, "a metrics.json of a run"):
            seed, results = run.get("seed", 0), (run["last"] if last else run)["results"]
            whole = methods.setdefault(method, {}).setdefault(seed, {"results": {}, "trainable": 0})
            twice = sorted(whole["results"].keys() & results.keys())
            if twice:
                raise ValueError(f"{method} has {', '.join(twice)} of seed {seed} already; keep "
                                 "one run of each seed and task")
            for task in make_tasks(list(results), 1):
                whole["results"][task.name] = {task.metric: results[task.name][task.metric]}
            whole["trainable"] += int(run["trainable"])
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
    with reading(Path(name), "a metrics.json of a run"):
        for run in (run for seeds in methods.values() for run in seeds.values()):
            delta_m(run["results"], found["results"])
    return found["results"]


def format_runs(methods: dict, baseline: dict | None, epoch: str) -> str:
    """The table as text: mean +- sample standard deviation over seeds, delta-m with its interval.

    methods: {name: {seed: {"results", "trainable"}}}; baseline: {task: {metric: value}}, None
    leaves delta-m out.
    """
    def spread(values: list[float]) -> str:
        mean = statistics.mean(values)
        return f"{mean:.4f}" + (f" +- {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")

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
