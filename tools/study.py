"""Does similarity-grouped sharing help? Methods x seeds, as ordinary training runs.

    python -m tools.study                        # rooms: every arm, chosen rates, five seeds
    python -m tools.study --quick                # three arms, one seed
    python -m tools.study --dataset nyud --data-root data        # the same with its recipe
    python -m tools.study --table runs/nyud --baseline baselines/nyud.json   # runs that exist

Each arm's learning rate is chosen on seed 0; what is reported are other seeds. Every
finished run is added to OUT/study.json at once: a study that was stopped goes on from that file,
here or elsewhere, with the same command. It ends in a table, the claims, and OUT/study.png.
References: arXiv 2509.19602, section 4.2, eq. 7; docs/STUDY.md.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import train
from data import open_dataset
from flags import Help, parse_arguments, read_results
from grouping import build_tree, name_tree
from tasks import delta_m
from util.checkpoint import write_json
from util.draw import draw_gains
from util.report import collect_runs, find_baseline, format_runs, interval, mean_results
from util.run import one_line_errors, progress, reading

# --- what is asked, fixed before the reported seeds were run --------------------------------------
CHOICE, REPORTED, FEW = (0,), (10, 11, 12, 13, 14), (10, 11)  # seeds; for side questions
SETTINGS = {"rooms": "--tasks semseg,human_parts,sal,depth,normals --batch-size 4 --sim-images 128 "
                     "--train-rooms 300 --epochs 2 --eval-every 2 --val-rooms 256"}
ALONE = ("single-full", "single-lora")  # a network for each task
ARMS: dict[str, Callable[[argparse.Namespace], str]] = {  # the study's flags -> the arm's
    "single-full": lambda c: "--method full",  # the first is delta-m's baseline
    "multi-full": lambda c: "--method full",
    "decoders": lambda c: "--method decoders",
    "single-lora": lambda c: f"--groups 1,1,1,1 --rank {c.rank // len(c.tasks)}",
    "mtl-lora": lambda c: "--groups 1,1,1,1",
    "shared-late": lambda c: f"--groups 1,1,1,{len(c.tasks)}",
    "task-specific": lambda c: "--groups " + ",".join([str(len(c.tasks))] * 4),
    "tglora": lambda c: "",         # the three differ by their trees
    "least-similar": lambda c: "",
    "random": lambda c: "",
    "mtlora": lambda c: "--method mtlora" + " --rank 12" * (c.dataset == "rooms"),  # as many
    "bdta": lambda c: "--method bdta",
}
TREES = {"tglora": lambda sim, seed: sim,           # by the similarity of the same seed
         "least-similar": lambda sim, seed: -sim,   # the least score, at the same groups
         "random": lambda sim, seed: np.random.default_rng(seed).normal(size=sim.shape)}
CLAIMS = (("tglora", "mtl-lora"), ("tglora", "single-lora"), ("tglora", "least-similar"),
          ("tglora", "random"), ("tglora", "multi-full"))  # the first has the higher delta-m
QUICK = ("single-full", "mtl-lora", "tglora")


# --- one run --------------------------------------------------------------------------------------
class Labels(Dataset):
    """`dataset`, with the labels of `tasks` alone."""

    def __init__(self, dataset: Dataset, tasks: Sequence[str]):
        self.dataset, self.kinds = dataset, ("image", *tasks)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample = self.dataset[i]
        return {kind: sample[kind] for kind in self.kinds}


@lru_cache(maxsize=2)
def decoded(split: str, flags: tuple[str, ...]) -> Dataset:
    """A split with the labels of all tasks: rendered or read once a process, not once a run."""
    return open_dataset(parse_arguments(list(flags)), split)


def start_worker(devices: multiprocessing.Queue) -> None:
    """Make this process one for many runs: of one core, or of one GPU."""
    torch.set_num_threads(1)
    device, study = devices.get(), multiprocessing.parent_process()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)  # before anything asks for a GPU
    threading.Thread(target=lambda: (study.join(), os._exit(1)), daemon=True).start()  # end with it


def perform(common: list[str], own: list[str], tree: list | None, out: Path) -> dict:
    """One run of train.py, begun or continued; returns what study.json keeps of it."""
    out.mkdir(parents=True, exist_ok=True)
    flags = [*common, *own, "--out", str(out)] + ["--resume"] * (out / "last.pt").exists()
    if tree:
        write_json(out / "given_tree.json", {"tree": tree})
        flags += ["--tree", str(out / "given_tree.json")]
    config = parse_arguments(flags)

    def open_labels(config: argparse.Namespace, split: str) -> Dataset:
        return (Labels(decoded(split, tuple(common)), config.tasks) if config.cache
                else open_dataset(config, split))

    start, result = time.monotonic(), out / ("tree.json" if config.tree_only else "metrics.json")
    try:
        if not result.exists():
            with open(out / "output.txt", "a") as file, contextlib.redirect_stdout(file):
                train.run(config, open_labels)
        run = json.loads(result.read_text()) if config.tree_only else read_results(result)
    except ValueError as error:  # such as a loss that is not finite
        run = {"failed": str(error)}
    if "last" in run:  # not the best epoch, which the validation images would choose
        run["results"] = run["last"]["results"]
    kept = ("results", "trainable", "tree", "similarity", "standard_error", "failed")
    return {"flags": " ".join(own), "seconds": round(time.monotonic() - start),
            **{key: run[key] for key in kept if key in run}}


# --- many runs ------------------------------------------------------------------------------------
class Study:
    """Runs by name, each in OUT/study.json as soon as it is finished."""

    def __init__(self, out: Path, flags: list[str], jobs: int):
        self.out, self.path, self.flags = out, out / "study.json", flags
        self.config = parse_arguments(flags)
        self.state = {"flags": " ".join(flags), "rates": {}, "runs": {}}
        if self.path.exists():
            with reading(self.path, "a study.json"):
                self.state = json.loads(self.path.read_text())
                self.state["runs"].keys(), self.state["rates"].keys()
                if self.state["flags"] != " ".join(flags):
                    raise ValueError(f"is of a study with {self.state['flags']}: change --out")
        self.runs, self.rates = self.state["runs"], self.state["rates"]
        context = multiprocessing.get_context("spawn")  # a GPU does not survive a fork
        gpus, devices = torch.cuda.device_count(), context.Queue()
        for i in range(jobs):
            devices.put(i % gpus if gpus else None)
        self.pool = ProcessPoolExecutor(jobs, context, start_worker, (devices,))

    def complete(self, wanted: dict[str, tuple[list[str], list | None]]) -> None:
        """Do those of the `wanted` runs, {name: (flags, tree)}, that are not done yet."""
        missing, start = [name for name in wanted if name not in self.runs], time.monotonic()
        running = {self.pool.submit(perform, self.flags, *wanted[name], self.out / name): name
                   for name in missing}
        try:
            for done, future in enumerate(as_completed(running), 1):
                name, run = running[future], future.result()
                if "failed" in run and name.startswith("similarity"):
                    raise ValueError(f"{name}: {run['failed']}")
                self.runs[name] = run
                write_json(self.path, self.state)
                left = (time.monotonic() - start) * (len(missing) / done - 1) / 60
                progress(f"{done} of {len(missing)} runs, last {name}; of these, about "
                         f"{left:.0f} minutes are left", done == len(missing))
        except BrokenProcessPool:
            raise ValueError("a run's process was killed, perhaps for its memory; the same command "
                             "goes on, --jobs 1 with one run at a time") from None
        finally:
            for future in running:
                future.cancel()

    def arm(self, arm: str, seed: int, rate: float | None = None) -> dict:
        """The runs of an arm and a seed, as `complete` wants them; rate: of the grid, or chosen."""
        tasks, where = self.config.tasks, f"at {rate:.4g}/" if rate else ""
        flags = [*f"--seed {seed} --lr {rate or self.rates[arm]:.4g}".split(),
                 *ARMS[arm](self.config).split()]
        if arm in ALONE:
            return {f"{where}{arm}/{seed}-{t}": ([*flags, "--tasks", t], None) for t in tasks}
        tree, similarity = None, self.runs[f"similarity/{seed}"]["similarity"]
        if arm in TREES and similarity:  # there is none where --groups leaves no choice
            sim = TREES[arm](np.array(similarity), seed)
            tree = name_tree(build_tree(sim, self.config.groups), tasks)
        return {f"{where}{arm}/{seed}": (flags, tree)}

    def results(self, arm: str, seed: int, rate: float | None = None) -> dict | None:
        """{"results": {task: {metric: value}}, "trainable": count}; None where a run failed."""
        runs = [self.runs[name] for name in self.arm(arm, seed, rate)]
        if any("failed" in run for run in runs):
            return None
        return {"results": {task: own for run in runs for task, own in run["results"].items()},
                "trainable": sum(run["trainable"] for run in runs)}

    def choose_rates(self, arms: Sequence[str]) -> None:
        """Each arm's rate, by the mean delta-m over the seeds of choice.

        The recipe's and a third of it are tried, then, by factors of 3, whatever lies beyond the
        better end, until it gets worse: the same rule for every arm.
        """
        lr = self.config.lr
        grids, wider = {arm: [lr / 3, lr] for arm in arms}, list(arms)

        def gain(arm: str, rate: float) -> float:
            found = [self.results(arm, seed, rate) for seed in CHOICE]
            return (-math.inf if None in found else
                    statistics.mean(delta_m(run["results"], baseline) for run in found))

        while wider:
            self.complete({name: job for arm in wider for rate in grids[arm] for seed in CHOICE
                           for name, job in self.arm(arm, seed, rate).items()})
            baseline = mean_results([self.results(arms[0], seed, lr) for seed in CHOICE])
            self.rates.update({arm: max(grids[arm], key=partial(gain, arm)) for arm in wider})
            wider = [arm for arm in wider if len(grids[arm]) < 6
                     and self.rates[arm] in (grids[arm][0], grids[arm][-1])]
            for arm in wider:
                factor = 1 / 3 if self.rates[arm] == grids[arm][0] else 3
                grids[arm] = sorted([*grids[arm], factor * self.rates[arm]])
        for arm in arms:
            print(f"{arm:<14}" + "".join(
                f"  {rate:.4g}: {gain(arm, rate):+.2f} %" + " *" * (rate == self.rates[arm])
                for rate in grids[arm]))


def judge(what: str, mean: float, low: float, high: float) -> None:
    """Print whether something is above 0, as its interval says."""
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    print(f"{what}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]: {verdict}")


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's rho with its 95 % interval: Fisher's z, Bonett and Wright's standard error."""
    rho = float(np.corrcoef(*(np.argsort(np.argsort(x)) for x in (a, b)))[0, 1])
    z = math.atanh(max(-0.9999, min(rho, 0.9999)))
    half = 1.96 * math.sqrt((1 + rho ** 2 / 2) / (len(a) - 3))
    return rho, math.tanh(z - half), math.tanh(z + half)


def ask_similarity(study: Study, seeds: Sequence[int]) -> None:
    """Is the tree the same whatever is drawn, and does similarity predict what sharing does?"""
    tasks, config = study.config.tasks, study.config

    def tree(name: str) -> list:
        """Its groups, the same for any order of the tasks."""
        return [sorted(map(sorted, stage)) for stage in study.runs[name]["tree"]]

    own = [tree(f"similarity/{seed}") for seed in seeds]
    most = max(own, key=own.count)
    print(f"similarity, {config.sim_images} images: {own.count(most)} of {len(seeds)} seeds have "
          f"the commonest tree; its stage 3: {most[2]}")
    for variant, flags in (("32", "--sim-images 32"), ("all", f"--sim-images {10 ** 6}"),
                           ("order", f"--tasks {','.join(tasks[2:] + tasks[:2])}")):
        study.complete({f"similarity-{variant}/{seed}":
                        (f"--seed {seed} --tree-only {flags}".split(), None) for seed in FEW})
        same = [tree(f"similarity-{variant}/{seed}") == tree(f"similarity/{seed}") for seed in FEW]
        print(f"similarity, {flags}: the seed's own tree again in {sum(same)} of {len(FEW)} seeds")

    pairs, share = list(itertools.combinations(tasks, 2)), config.rank // len(tasks)
    study.complete({f"pair/{t}+{u}/{seed}": (
        f"--seed {seed} --lr {study.rates['mtl-lora']:.4g} --tasks {t},{u} --groups 1,1,1,1 "
        f"--rank {2 * share}".split(), None) for t, u in pairs for seed in FEW})
    similarity = np.mean([study.runs[f"similarity/{seed}"]["similarity"] for seed in seeds], 0)
    alone = mean_results([study.results("single-lora", seed) for seed in FEW])
    gains = [statistics.mean(delta_m(study.runs[f"pair/{t}+{u}/{seed}"]["results"], alone)
                             for seed in FEW) for t, u in pairs]
    values = [similarity[tasks.index(t), tasks.index(u)] for t, u in pairs]
    for (t, u), value, gain in sorted(zip(pairs, values, gains), key=lambda row: -row[1]):
        print(f"  {t + ' + ' + u:<26} similarity {value:.3f}   together, not alone {gain:+.2f} %")
    judge("rank correlation of the two columns", *rank_correlation(values, gains))


def run_study(study: Study, arms: Sequence[str], seeds: Sequence[int], rates: Path | None) -> None:
    """The runs, then what they say."""
    study.complete({f"similarity/{seed}": (f"--seed {seed} --tree-only".split(), None)
                    for seed in (seeds if rates else (*CHOICE, *seeds))})
    if rates:
        with reading(rates, "a study.json"):
            study.rates.update(json.loads(rates.read_text())["rates"])
    else:
        study.choose_rates(arms)
    study.complete({name: job for seed in seeds for arm in arms
                    for name, job in study.arm(arm, seed).items()})
    found = {arm: {seed: study.results(arm, seed) for seed in seeds} for arm in arms}
    failed = [arm for arm in arms if None in found[arm].values()]
    if failed:
        raise ValueError(f"runs of {', '.join(failed)} failed: see \"failed\" in {study.path}")
    baseline = mean_results(found[arms[0]].values())
    gains = {arm: [delta_m(run["results"], baseline) for run in by_seed.values()]
             for arm, by_seed in found.items()}
    print(format_runs(found, baseline, "last"))
    draw_gains(study.out / "study.png", gains)
    for better, worse in CLAIMS:
        if len(seeds) > 1 and {better, worse} <= set(arms):
            mean, half = interval([a - b for a, b in zip(gains[better], gains[worse])])
            judge(f"{better} > {worse}", mean, mean - half, mean + half)
    if len(seeds) == 1:
        print("one seed decides nothing")
    elif set(arms) == set(ARMS):
        ask_similarity(study, seeds)
    print(f"wrote {study.path} and {study.out / 'study.png'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False,
                                     epilog="Other flags go to train.py, for every run.")
    add = parser.add_argument
    add("--quick", action="store_true", help="three arms, one seed, the rates of docs/")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the study and its runs")
    add("--jobs", type=int, default=torch.cuda.device_count() or os.cpu_count(),
        help="runs at a time; default: one a GPU, or one a core")
    add("--seeds", type=int, nargs="+", default=REPORTED, help="that are reported")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the first is the baseline")
    add("--rates", type=Path, help="a study.json: its learning rates, instead of choosing any")
    add("--table", type=Path, metavar="FOLDER", help="train nothing: compare FOLDER/METHOD/RUN")
    add("--baseline", help="with --table: a METHOD in it, or a JSON file, for delta-m")
    add("--last", action="store_true", help="with --table: last epochs, not best ones")
    args, flags = parser.parse_known_args(argv)
    with one_line_errors():
        if args.table:
            methods, dataset = collect_runs(args.table, args.last)
            baseline = find_baseline(args.baseline, methods, dataset) if args.baseline else None
            return print(format_runs(methods, baseline, "last" if args.last else "best"))
        dataset = parse_arguments(flags).dataset
        if args.quick:
            args.arms, args.seeds = QUICK, REPORTED[:1]
            args.rates = Path(__file__).parent.parent / f"docs/study_{dataset}.json"
        flags = SETTINGS.get(dataset, "").split() + flags
        run_study(Study(args.out, flags, args.jobs), args.arms, args.seeds, args.rates)


if __name__ == "__main__":
    main()
