"""Does it help to share adapters by similarity? Methods x seeds, each an ordinary training run.

    python -m extras.study                # rooms: every arm, chosen learning rates, five seeds
    python -m extras.study --quick        # three arms and one seed, next to the recorded values
    python -m extras.study --dataset nyud --data-root data       # the same questions on NYUD-v2
    python -m extras.study --table runs/nyud --baseline baselines/nyud.json    # existing runs only

An arm of the study is a method with its flags. The learning rate of each arm is chosen on one seed,
and the reported results come from other seeds. Every finished run is added to OUT/study.json at
once, so a study that was stopped continues with the same command. In the end it prints a table
and says which claims hold. docs/STUDY.md shows the results on rooms.
References: arXiv 2509.19602, section 4.2 and eq. 7 (delta-m).
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw        # Pillow comes with torchvision

import train
from grouping import build_tree, name_tree
from recipes import parse_arguments
from tasks import delta_m, make_tasks
from util import one_line_errors, progress, reading, write_json

Run = dict              # what study.json keeps of a run: flags, results, trainable, tree, ...
Job = tuple[list[str], list | None]     # a run to do: its flags, and its tree if it is given one
Results = dict[str, dict[str, float]]   # {task: {metric: value}}

# --- the questions, fixed before the reported seeds were run --------------------------------------
CHOICE_SEED = 0                         # chooses the learning rates and is never reported
SEEDS = (10, 11, 12, 13, 14)            # reported
PAIR_SEEDS = (10, 11)                   # of the runs with only two tasks

SETTINGS = {                            # flags of every run, by dataset; other datasets: recipe
    "rooms": "--tasks semseg,human_parts,sal,depth,normals --batch-size 4 --sim-images 128 "
             "--train-rooms 300 --epochs 2 --eval-every 2 --val-rooms 256",
}
ARMS = {                                # flags of each arm. T: number of tasks
    "single-full": "--method full",     # the first arm is the baseline of delta-m
    "multi-full": "--method full",
    "decoders": "--method decoders",
    "single-lora": "--groups 1,1,1,1 --rank {rank_per_task}",
    "mtl-lora": "--groups 1,1,1,1",
    "shared-late": "--groups 1,1,1,{T}",
    "task-specific": "--groups {T},{T},{T},{T}",
    "tglora": "",                       # these three have the same groups and different trees
    "least-similar": "",
    "random": "",
    "mtlora": "--method mtlora",
    "bdta": "--method bdta",
}
SINGLE = ("single-full", "single-lora")         # one network per task
WITH_TREE = ("tglora", "least-similar", "random")
CLAIMS = (                              # the first arm has the higher delta-m
    ("tglora", "mtl-lora"),
    ("tglora", "single-lora"),
    ("tglora", "least-similar"),
    ("tglora", "random"),
    ("tglora", "multi-full"),
)
QUICK_ARMS = ("single-full", "mtl-lora", "tglora")
TOLERANCE = 1.0         # percent; digits differ between CPUs and between versions of PyTorch


def arm_flags(arm: str, config: argparse.Namespace) -> list[str]:
    """The flags of train.py that make a run one of `arm`. config: the study's settings."""
    T = len(config.tasks)
    flags = ARMS[arm].format(T=T, rank_per_task=config.rank // T)
    if arm == "mtlora" and config.dataset == "rooms":
        flags += " --rank 12"           # about as many adapter parameters as the other arms
    return flags.split()


def arm_tree(arm: str, similarity: np.ndarray, groups: Sequence[int], seed: int) -> list:
    """The tree of an arm in WITH_TREE, as partitions of task indices. similarity: (T, T)."""
    if arm == "least-similar":
        similarity = -similarity        # the tree with the lowest score
    if arm == "random":
        similarity = np.random.default_rng(seed).normal(size=similarity.shape)
    return build_tree(similarity, groups)


# --- one run, in a worker process -----------------------------------------------------------------
def start_worker(gpus: multiprocessing.Queue) -> None:
    """Prepare this process for many runs: give it one thread, and one GPU if there are any."""
    torch.set_num_threads(1)
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)   # before CUDA starts in this process
    threading.Thread(target=end_with_the_study, daemon=True).start()


def end_with_the_study() -> None:
    """End this worker when the study is killed; otherwise it would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def perform(common: list[str], job: Job, folder: Path) -> Run:
    """Train in `folder`, or finish the run that is there; returns what study.json keeps of it.

    common: the flags that all runs of the study share. If the loss becomes infinite or NaN, which
    counts as a result of the learning rate, "failed" holds the message. Other errors are raised.
    """
    flags, tree = job
    run = {"flags": " ".join(flags)}
    argv = [*common, *flags, "--out", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if tree:
        tree_file = folder.parent / f"{folder.name}.tree.json"
        write_json(tree_file, {"tree": tree})
        argv += ["--tree", str(tree_file)]
    if (folder / "last.pt").exists():
        argv = ["--out", str(folder), "--resume"]
    elif folder.exists() and not any(folder.iterdir()):
        folder.rmdir()                  # killed before its first file; train.py makes it anew

    tree_only = "--tree-only" in flags
    result = folder / ("tree.json" if tree_only else "metrics.json")
    if not result.exists():
        try:
            with open(folder.parent / f"{folder.name}.log", "a") as log, redirect_stdout(log):
                train.run(parse_arguments(argv))
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            return run | {"failed": str(error)}
    if tree_only:
        metrics = json.loads(result.read_text())
    else:
        metrics = train.read_results(result)
        # The last epoch, not the best one: the validation images would have chosen that.
        metrics["results"] = metrics["last"]["results"]
    for key in ("results", "trainable", "tree", "similarity", "standard_error"):
        if key in metrics:
            run[key] = metrics[key]
    return run


# --- many runs ------------------------------------------------------------------------------------
class Study:
    """All runs of a study by name. OUT/study.json holds those that are finished."""

    def __init__(self, out: Path, flags: list[str], jobs: int):
        """flags: of train.py, for every run. jobs: how many runs are trained at the same time."""
        self.out, self.jobs = out, jobs
        self.path = out / "study.json"
        self.flags = flags
        self.config = parse_arguments(flags)
        self.rates = {}                 # {arm: chosen learning rate}
        self.runs = {}                  # {name: run}
        if self.path.exists():
            saved = read_study(self.path)
            if saved["flags"] != " ".join(flags):
                raise ValueError(f"{self.path} belongs to a study with the flags {saved['flags']}; "
                                 "choose another --out")
            self.rates, self.runs = saved["rates"], saved["runs"]

    def save(self) -> None:
        state = {"flags": " ".join(self.flags), "rates": self.rates, "runs": self.runs}
        write_json(self.path, state)

    def complete(self, wanted: dict[str, Job]) -> None:
        """Do those of the `wanted` runs that are not finished yet, several at a time."""
        missing = [name for name in wanted if name not in self.runs]
        if not missing:
            return
        context = multiprocessing.get_context("spawn")      # CUDA does not survive a fork
        num_gpus = torch.cuda.device_count()
        gpus = context.Queue()
        for i in range(self.jobs):
            gpus.put(i % num_gpus if num_gpus else None)
        pool = ProcessPoolExecutor(self.jobs, context, start_worker, (gpus,))
        names = {}                      # {future: name of its run}
        try:
            for name in missing:
                future = pool.submit(perform, self.flags, wanted[name], self.out / name)
                names[future] = name
            for future in progress(as_completed(names), "runs", len(missing)):
                self.runs[names[future]] = future.result()
                self.save()
        except BrokenProcessPool:
            raise ValueError("a training process was killed, perhaps because the memory was full. "
                             "The same command continues; --jobs 1 trains one run at a time"
                             ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def arm_jobs(self, arm: str, seed: int, rate: float | None = None) -> dict[str, Job]:
        """The runs of an arm: one, or one per task. rate: None for the chosen learning rate."""
        tasks = self.config.tasks
        name = f"{arm}/{seed}"
        if rate is None:
            rate = self.rates[arm]
        else:
            name = f"at {rate:.4g}/{name}"
        flags = ["--seed", str(seed), "--lr", f"{rate:.4g}", *arm_flags(arm, self.config)]
        if arm in SINGLE:
            return {f"{name}-{task}": ([*flags, "--tasks", task], None) for task in tasks}

        tree = None
        similarity = self.runs[f"similarity/{seed}"]["similarity"]
        if arm in WITH_TREE and similarity:     # null if the numbers of groups leave no choice
            tree = arm_tree(arm, np.array(similarity), self.config.groups, seed)
            tree = name_tree(tree, tasks)
        return {name: (flags, tree)}

    def arm_result(self, arm: str, seed: int, rate: float | None = None) -> Run | None:
        """{"results", "trainable"} of an arm's finished runs together; None if one failed."""
        results, trainable = {}, 0
        for name in self.arm_jobs(arm, seed, rate):
            run = self.runs[name]
            if "failed" in run:
                return None
            results |= train.as_numbers(run["results"])
            trainable += run["trainable"]
        return {"results": results, "trainable": trainable}

    def choose_rates(self, arms: Sequence[str]) -> None:
        """Choose the learning rate of each arm by its delta-m on CHOICE_SEED.

        The same rule for every arm: try the recipe's rate and a third of it, then go on in steps of
        3 beyond the better end until the result gets worse, with at most 6 rates.
        """
        lr = self.config.lr
        grids = {arm: [lr / 3, lr] for arm in arms}
        gains = {arm: {} for arm in arms}               # {arm: {rate: delta-m}}
        unfinished = list(arms)
        while unfinished:
            wanted = {}
            for arm in unfinished:
                for rate in grids[arm]:
                    wanted |= self.arm_jobs(arm, CHOICE_SEED, rate)
            self.complete(wanted)

            baseline = self.arm_result(arms[0], CHOICE_SEED, lr)
            if baseline is None:
                raise ValueError(f"the baseline {arms[0]} failed: see \"failed\" in {self.path}")
            still_unfinished = []
            for arm in unfinished:
                grid = grids[arm]
                for rate in grid:
                    result = self.arm_result(arm, CHOICE_SEED, rate)
                    gains[arm][rate] = -math.inf
                    if result is not None:
                        gains[arm][rate] = delta_m(result["results"], baseline["results"])
                best = max(grid, key=gains[arm].get)
                self.rates[arm] = best
                if len(grid) < 6 and best in (grid[0], grid[-1]):
                    wider = best / 3 if best == grid[0] else best * 3
                    grids[arm] = sorted([*grid, wider])
                    still_unfinished.append(arm)
            unfinished = still_unfinished

        for arm in arms:
            line = f"{arm:<14}"
            for rate in grids[arm]:
                line += f"  {rate:.4g}: {gains[arm][rate]:+.2f} %"
                if rate == self.rates[arm]:
                    line += " *"
            print(line)


# --- reading results ------------------------------------------------------------------------------
def read_study(path: Path) -> dict:
    """The content of a study.json: {"flags": text, "rates": {arm: rate}, "runs": {name: run}}.

    It may also have a "note" for whoever compares with it.
    """
    with reading(path, "a study.json"):
        saved = json.loads(path.read_text())
        content = {key: saved[key] for key in ("flags", "rates", "runs")}
        return content | {"note": saved.get("note")}


def collect_runs(folder: Path, last: bool) -> tuple[dict[str, dict[int, Run]], str | None]:
    """Read FOLDER/METHOD/RUN/metrics.json; returns {method: {seed: run}} and the dataset.

    Runs of the same method and seed are put together, so that single-task runs, one per task, make
    one row of the table. last: take the last epoch, as the published code reports, not the best.
    """
    methods, dataset = {}, None
    for path in sorted(folder.glob("*/*/metrics.json")):
        method, run = path.parent.parent.name, train.read_results(path)
        with reading(path, "a metrics.json of a run"):
            dataset = dataset or run.get("dataset")
            if run.get("dataset", dataset) != dataset:
                raise ValueError(f"is a run on {run['dataset']}, other runs are on {dataset}")
            results = run["last"]["results"] if last else run["results"]
            seeds = methods.setdefault(method, {})
            row = seeds.setdefault(run.get("seed", 0), {"results": {}, "trainable": 0})
            for task in make_tasks(list(results), 1):
                if task.name in row["results"]:
                    raise ValueError(f"{method} has {task.name} of this seed already; keep one "
                                     "run per seed and task")
                row["results"][task.name] = {task.metric: results[task.name][task.metric]}
            row["trainable"] += run["trainable"]
    if not methods:
        raise ValueError(f"no {folder}/METHOD/RUN/metrics.json; docs/RESULTS.md says how to lay "
                         "out the runs")
    return methods, dataset


def print_table(folder: Path, baseline: str | None, last: bool) -> None:
    """Print the table of existing runs. baseline: a method, whose means are taken, or a file."""
    methods, dataset = collect_runs(folder, last)
    results = None
    if baseline in methods:
        results = mean_results(methods[baseline].values())
    elif baseline:
        saved = train.read_results(Path(baseline))
        results = saved["results"]
        if saved.get("dataset", dataset) != dataset:
            raise ValueError(f"--baseline {baseline} is on {saved['dataset']}, the runs are on "
                             f"{dataset}")
    print(format_runs(methods, results, "last" if last else "best"))


# --- statistics -----------------------------------------------------------------------------------
# Student's t for a 95 % interval, by degrees of freedom.
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % t interval, which is infinite for one value."""
    freedom = len(values) - 1
    if freedom == 0:
        return values[0], math.inf
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    t = T95[min(freedom, len(T95) - 1)]         # for more seeds, a slightly wider interval
    return statistics.mean(values), t * error


def mean_results(runs: Iterable[Run]) -> Results:
    """Each metric's mean over those runs that have its task."""
    values, means = {}, {}              # values: {task: {metric: [its value in each run]}}
    for run in runs:
        for task, metrics in run["results"].items():
            for metric, value in metrics.items():
                values.setdefault(task, {}).setdefault(metric, []).append(value)
    for task, metrics in values.items():
        means[task] = {metric: statistics.mean(metrics[metric]) for metric in metrics}
    return means


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's rho of two columns, and both ends of its 95 % interval.

    The interval is Fisher's z with the standard error of Bonett and Wright (Psychometrika 2000).
    """
    ranks_a, ranks_b = np.argsort(np.argsort(a)), np.argsort(np.argsort(b))
    rho = float(np.corrcoef(ranks_a, ranks_b)[0, 1])
    z = math.atanh(max(-0.9999, min(rho, 0.9999)))
    half = 1.96 * math.sqrt((1 + rho ** 2 / 2) / (len(a) - 3))
    return rho, math.tanh(z - half), math.tanh(z + half)


def verdict(claim: str, mean: float, low: float, high: float) -> str:
    """One line that says whether a difference is above 0, judged by its 95 % interval."""
    if low > 0:
        answer = "holds"
    elif high < 0:
        answer = "does not hold"
    else:
        answer = "undecided"
    return f"{claim}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]: {answer}"


# --- the table and the picture --------------------------------------------------------------------
def spread(values: Sequence[float]) -> str:
    """Mean +- sample standard deviation."""
    text = f"{statistics.mean(values):.4f}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.4f}"
    return text


def format_runs(methods: dict[str, dict[int, Run]], baseline: Results | None, epoch: str) -> str:
    """The table: one row per method, with delta-m and its 95 % interval if there is a baseline."""
    names = []                          # of all tasks, in the order of their first appearance
    for seeds in methods.values():
        for run in seeds.values():
            names += [task for task in run["results"] if task not in names]
    tasks = make_tasks(names, 1)
    head = ["method", "epoch", "seeds", "trained"]
    for task in tasks:
        better = "up" if task.higher_is_better else "down"
        head.append(f"{task.name} {task.metric} {better}")
    if baseline:
        head += ["delta-m %", "95 % interval"]

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
            row += [spread(gains) if gains else "-", "-"]
            if len(gains) > 1:
                mean, half = interval(gains)
                row[-1] = f"{mean - half:+.2f} to {mean + half:+.2f}"
        rows.append(row)

    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw_gains(path: Path, gains: dict[str, list[float]]) -> None:
    """Write a PNG of each arm's delta-m: a dot per seed, the mean and its 95 % interval."""
    left, top, width, row = 130, 34, 520, 26            # pixels
    all_gains = [gain for values in gains.values() for gain in values]
    low, high = math.floor(min(all_gains)) - 1, math.ceil(max(all_gains)) + 1
    bottom = top + row * len(gains)
    picture = Image.new("RGB", (left + width + 30, bottom + 34), "white")
    pen = ImageDraw.Draw(picture)

    def position(gain: float) -> float:
        inside = min(max(gain, low), high)
        return left + width * (inside - low) / (high - low)

    pen.text((left, 10), "delta-m, % (dot: one seed; bar: mean and 95 % interval)", fill="black")
    for tick in range(low, high + 1, max(1, (high - low) // 10)):
        x = position(tick)
        pen.line((x, top, x, bottom), fill="silver" if tick else "black")
        pen.text((x, bottom + 4), f"{tick:+d}" if tick else "0", fill="gray", anchor="ma")
    y = top + row / 2
    for arm, values in gains.items():
        mean, half = interval(values)
        pen.text((left - 8, y), arm, fill="black", anchor="rm")
        pen.line((position(mean - half), y, position(mean + half), y), fill="royalblue", width=3)
        pen.line((position(mean), y - 8, position(mean), y + 8), fill="royalblue", width=3)
        for gain in values:
            x = position(gain)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline="black", fill="orange")
        y += row
    picture.save(path)


# --- the study ------------------------------------------------------------------------------------
def run_study(study: Study, arms: Sequence[str], seeds: Sequence[int],
              rates: dict[str, float] | None) -> None:
    """Train every arm with every seed; print the table and the claims.

    rates: {arm: learning rate} as recorded in docs/; None to choose them on CHOICE_SEED.
    """
    wanted = {}
    for seed in (*seeds, CHOICE_SEED):
        if seed in seeds or rates is None:
            wanted[f"similarity/{seed}"] = (["--seed", str(seed), "--tree-only"], None)
    study.complete(wanted)
    if rates is None:
        study.choose_rates(arms)
    else:
        study.rates.update(rates)

    wanted = {}
    for seed in seeds:
        for arm in arms:
            wanted |= study.arm_jobs(arm, seed)
    study.complete(wanted)
    results = {}                        # {arm: {seed: {"results", "trainable"}}}
    for arm in arms:
        results[arm] = {seed: study.arm_result(arm, seed) for seed in seeds}
        if None in results[arm].values():
            raise ValueError(f"a run of {arm} failed: see \"failed\" in {study.path}")

    baseline = mean_results(results[arms[0]].values())
    gains = {}                          # {arm: [delta-m of each seed]}
    for arm in arms:
        gains[arm] = [delta_m(run["results"], baseline) for run in results[arm].values()]
    print(format_runs(results, baseline, "last"))
    draw_gains(study.out / "study.png", gains)
    if len(seeds) == 1:
        print("one seed decides nothing")
    else:
        print_claims(gains)
        if set(arms) == set(ARMS):
            compare_pairs(study, seeds)
    print(f"wrote {study.path} and {study.out / 'study.png'}")


def print_claims(gains: dict[str, list[float]]) -> None:
    """Print which claims hold. Differences are paired by seed."""
    for better, worse in CLAIMS:
        if better in gains and worse in gains:
            differences = np.subtract(gains[better], gains[worse]).tolist()
            mean, half = interval(differences)
            print(verdict(f"{better} > {worse}", mean, mean - half, mean + half))


def compare_pairs(study: Study, seeds: Sequence[int]) -> None:
    """Print whether similar tasks gain more from sharing: pairs against each task by itself."""
    tasks = study.config.tasks
    pairs = list(combinations(tasks, 2))
    rank = 2 * (study.config.rank // len(tasks))        # as much per task as single-lora has
    rate = study.rates["mtl-lora"]
    wanted = {}
    for t, u in pairs:
        for seed in PAIR_SEEDS:
            flags = (f"--seed {seed} --lr {rate:.4g} --tasks {t},{u} --groups 1,1,1,1 "
                     f"--rank {rank}")
            wanted[f"pair/{t}+{u}/{seed}"] = (flags.split(), None)
    study.complete(wanted)

    matrices = [study.runs[f"similarity/{seed}"]["similarity"] for seed in seeds]
    mean_similarity = np.mean(matrices, axis=0)         # (T, T)
    single = mean_results(study.arm_result("single-lora", seed) for seed in PAIR_SEEDS)
    rows = []                           # (similarity, gain, both tasks)
    for t, u in pairs:
        gains = []
        for seed in PAIR_SEEDS:
            run = study.runs[f"pair/{t}+{u}/{seed}"]
            gains.append(delta_m(train.as_numbers(run["results"]), single))
        similarity = mean_similarity[tasks.index(t), tasks.index(u)]
        rows.append((similarity, statistics.mean(gains), f"{t} + {u}"))
    for similarity, gain, pair in sorted(rows, reverse=True):
        print(f"  {pair:<26} similarity {similarity:.3f}   together, not alone {gain:+.2f} %")
    similarities, gains, _ = zip(*rows)
    print(verdict("rank correlation of the two columns", *rank_correlation(similarities, gains)))


def compare_with_recorded(study: Study, recorded: dict, wanted: Iterable[str]) -> None:
    """Print the results of the `wanted` runs next to those that an earlier study recorded."""
    print(f"{'run':<28}{'task':<13}{'metric':<8}{'recorded':>10}{'here':>10}  difference")
    compared, outside = 0, 0
    for name in wanted:
        before, now = recorded["runs"][name], study.runs[name]
        if before["tree"] != now["tree"]:
            print(f"{name:<28}has another tree than the recorded run")
        for task in make_tasks(list(now["results"]), 1):
            old = before["results"][task.name][task.metric]
            new = now["results"][task.name][task.metric]
            difference = 100 * (new - old) / old
            compared += 1
            mark = ""
            if not abs(difference) <= TOLERANCE:
                outside += 1
                mark = " !"
            print(f"{name:<28}{task.name:<13}{task.metric:<8}{old:>10.4f}{new:>10.4f}  "
                  f"{difference:+.2f} %{mark}")
    print(f"{compared - outside} of {compared} values agree to {TOLERANCE:g} % with the recorded "
          "ones. Digits differ between CPUs and between versions of PyTorch.")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="All other flags go to train.py, for every run.")
    add = parser.add_argument
    jobs = torch.cuda.device_count() or os.cpu_count()
    add("--quick", action="store_true", help="three arms and one seed at the rates in docs/, "
        "compared with the values in docs/")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the study and its runs")
    add("--jobs", type=int, default=jobs, help="runs at the same time; default: one per GPU, or "
        "one per core")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="the reported seeds")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the first is the baseline")
    add("--table", type=Path, metavar="FOLDER", help="train nothing; print the table of the runs "
        "in FOLDER/METHOD/RUN")
    add("--baseline", help="with --table: a METHOD in FOLDER, or a JSON file, for delta-m")
    add("--last", action="store_true", help="with --table: each run's last epoch, not its best")
    args, flags = parser.parse_known_args(argv)
    with one_line_errors():
        if args.table:
            print_table(args.table, args.baseline, args.last)
        else:
            train_and_report(args, flags)


def train_and_report(args: argparse.Namespace, flags: list[str]) -> None:
    dataset = parse_arguments(flags).dataset
    flags = SETTINGS.get(dataset, "").split() + flags
    rates = None
    if args.quick:
        recorded = read_study(Path(__file__).parent.parent / f"docs/study_{dataset}.json")
        if recorded["note"]:
            print(recorded["note"])
        rates = recorded["rates"]
        args.arms, args.seeds = QUICK_ARMS, SEEDS[:1]
    study = Study(args.out, flags, args.jobs)
    run_study(study, args.arms, args.seeds, rates)
    if args.quick and recorded["flags"] == " ".join(flags):
        names = []
        for arm in args.arms:
            names += study.arm_jobs(arm, args.seeds[0])
        compare_with_recorded(study, recorded, names)


if __name__ == "__main__":
    main()
