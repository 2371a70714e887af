"""Does sharing adapters by similarity help? This study trains 13 arms with several seeds each.

    python -m extras.study                # train all arms on rooms, then print the verdicts
    python -m extras.study --quick        # three arms and one seed, compared with recorded values
    python -m extras.study --dataset nyud --data-root data       # all arms on NYUD-v2

An arm of the study is a method with its flags. The learning rate of each arm is chosen on one seed,
and the reported results come from other seeds. The claims are written to OUT/study.json before the
first run, and every finished run is added there at once, so a study that was stopped continues with
the same command. docs/STUDY.md explains the design and shows the results on rooms.
References: arXiv 2509.19602, section 4.2 and eq. 7 (delta-m); extras/lookahead.py.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import rooms
import train
from extras import lookahead
from extras.claims import Judged, draw_claims, format_claims, judge
from extras.intervals import (bootstrap_interval, compare, correlation_of_means,
                              split_half_reliability)
from extras.table import aligned, format_runs, mean_results, spread
from grouping import build_tree, name_tree
from recipes import UNUSED, parse_arguments
from tasks import delta_m, make_tasks
from util import VERSIONS, one_line_errors, progress, reading, write_json

Run = dict                              # a run's entry in study.json: its flags, results, tree, ...

# --- the questions, fixed before the reported seeds were run --------------------------------------
CHOICE_SEED = 0                         # the seed for choosing learning rates; not reported
SEEDS = list(range(10, 23))             # the reported seeds; an arm uses the first 13, 6 or 5
PAIR_SEEDS = 6                          # number of seeds for the runs with only two tasks

CLAIMS = {                              # copied to study.json when a study starts
    "date": "2026-11-26",
    "seeds": SEEDS,
    "level": 0.05,
    "margin": 0.5,                      # margin of equivalence, in points of delta-m
    "better": [                         # claims: the first arm has the higher delta-m
        ["tglora", "mtl-lora"],
        ["tglora", "single-lora"],
        ["tglora", "multi-full"],
        ["tglora", "least-similar"],
        ["tglora", "random"],
        ["tglora", "lookahead"],
        ["tglora", "task-specific"],
    ],
    "equivalent": [                     # pairs that are also tested for equivalence
        ["tglora", "least-similar"],
        ["tglora", "random"],
        ["tglora", "lookahead"],
        ["tglora", "task-specific"],
    ],
}
SETTINGS = {                            # {dataset: flags of every run}; others use their recipe
    "rooms": "--tasks human_parts,sal,depth,normals --groups 1,2,2,4 --rank 8 --batch-size 4 "
             "--train-rooms 300 --epochs 4 --eval-every 4 --val-rooms 256 --amp bf16",
}
MTLORA_RANK = {"rooms": 2}              # gives as many adapter parameters as in the LoRA arms

ARMS = {                                # {arm: (number of seeds, flags)}; T: number of tasks
    "single-full": (5, "--method full"),        # the first arm is the baseline of delta-m
    "multi-full": (5, "--method full"),
    "decoders": (5, "--method decoders"),
    "single-lora": (6, "--groups 1,1,1,1 --rank {rank_per_task}"),
    "mtl-lora": (13, "--groups 1,1,1,1"),
    "shared-late": (5, "--groups 1,1,1,{T}"),
    "task-specific": (13, "--groups {T},{T},{T},{T}"),
    "tglora": (13, ""),                 # these four differ only in how the tree is chosen
    "least-similar": (13, ""),
    "random": (13, ""),
    "lookahead": (13, ""),
    "mtlora": (5, "--method mtlora --rank {mtlora_rank}"),
    "bdta": (5, "--method bdta"),
}
SINGLE = ("single-full", "single-lora")         # one network per task
WITH_TREE = ("tglora", "least-similar", "random", "lookahead")
QUICK_ARMS = ("single-full", "mtl-lora", "tglora")
TOLERANCE = 1.0         # percent; --quick marks larger differences from the recorded values


def run_flags(flags: Sequence[str], own: Sequence[str]) -> list[str]:
    """All flags of a run: the study's `flags`, then the run's `own` flags, which override them.

    Flags of the study that the run's method does not use are left out, each with its value.
    """
    method = own[own.index("--method") + 1] if "--method" in own else "tglora"
    left_out = {"--" + name.replace("_", "-") for name in UNUSED[method]}
    left_out |= {flag for flag in own if flag.startswith("--")}
    kept = []
    for i, flag in enumerate(flags):
        if flag not in left_out and (i == 0 or flags[i - 1] not in left_out):
            kept.append(flag)
    return [*kept, *own]


def chosen_with(arm: str) -> str:
    """The arm whose learning rate `arm` uses: arms that differ only in their tree share a rate."""
    return "tglora" if arm in WITH_TREE else arm


def arm_tree(arm: str, similarity: np.ndarray, groups: Sequence[int], seed: int) -> list:
    """The tree of an arm in WITH_TREE, as partitions of task indices.

    similarity: (T, T) similarities, or affinities for the arm lookahead.
    """
    if arm == "least-similar":
        return build_tree(-similarity, groups)
    tree = similar = build_tree(similarity, groups)
    rng = np.random.default_rng(seed)
    while arm == "random" and tree == similar:
        tree = build_tree(rng.normal(size=similarity.shape), groups)
    return tree


# --- one run, in a worker process -----------------------------------------------------------------
class Job(NamedTuple):
    """A run that is to be done."""

    flags: list[str]                    # of train.py, without --out
    tree: list | None = None            # the tree for --tree, as names of tasks
    program: Callable = train.run       # or lookahead.run


def start_worker(gpus: multiprocessing.Queue) -> None:
    """Prepare this process for many runs on one thread and, if the machine has GPUs, on one GPU."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():   # on a CPU, flash attention's bf16 gradient is slow
        torch.backends.cuda.enable_flash_sdp(False)
    rooms.render_room = lru_cache(2000)(rooms.render_room)  # all runs of a seed use the same rooms
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)   # before CUDA starts in this process
    threading.Thread(target=end_with_the_study, daemon=True).start()


def end_with_the_study() -> None:
    """End this worker when the study is killed; otherwise it would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def perform(job: Job, folder: Path) -> Run:
    """Train in `folder`, or finish the run that is there; returns the run's entry in study.json.

    If the run diverges (a number in it is not finite), the entry has the error message under
    "failed" instead of results. Other errors are raised.
    """
    run = {"flags": " ".join(job.flags)}
    argv = [*job.flags, "--out", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if job.tree:
        run["tree"] = job.tree
        tree_file = folder.parent / f"{folder.name}.tree.json"
        write_json(tree_file, {"tree": job.tree})
        argv += ["--tree", str(tree_file)]
    if (folder / "last.pt").exists():
        argv = ["--out", str(folder), "--resume"]
    elif folder.exists() and not any(folder.iterdir()):
        folder.rmdir()                  # the run was killed before it wrote any file

    tree_only = "--tree-only" in job.flags
    result = folder / ("tree.json" if tree_only else "metrics.json")
    if not result.exists():
        try:
            with open(folder.parent / f"{folder.name}.log", "a") as log, redirect_stdout(log):
                job.program(parse_arguments(argv))
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            return run | {"failed": str(error)}
    if tree_only:
        measured = json.loads(result.read_text())
        return run | {"similarity": measured["similarity"], "tree": measured["tree"]}
    metrics = train.read_results(result)
    # Report the last epoch. The best epoch would be chosen on the validation images.
    return run | {"results": metrics["last"]["results"], "trainable": metrics["trainable"]}


# --- many runs ------------------------------------------------------------------------------------
class Study:
    """The finished runs of a study, by name. They are also saved in OUT/study.json."""

    def __init__(self, out: Path, flags: list[str], jobs: int):
        """Start a study in the folder `out`, or continue the study that is there.

        flags: flags of train.py for every run. jobs: number of runs that are trained at the same
        time. Raises ValueError if the study in `out` has different flags or claims, or if the
        flags leave no choice of tree.
        """
        self.out, self.jobs = out, jobs
        self.path = out / "study.json"
        self.flags = flags
        self.config = parse_arguments(flags)
        if train.known_tree(self.config):
            raise ValueError("the study compares different trees, but these flags leave no choice "
                             "of tree; leave out --tree, and give at least one stage in --groups "
                             "more than one group, but fewer groups than there are tasks")
        self.machines = []              # machines that have worked on this study
        self.rates = {}                 # {arm: chosen learning rate}
        self.runs = {}                  # {name: run}
        if self.path.exists():
            saved = read_study(self.path)
            if saved["flags"] != " ".join(flags):
                raise ValueError(f"{self.path} belongs to a study with the flags {saved['flags']}; "
                                 "choose another --out, or repeat the command that started it")
            if saved.get("claims") != CLAIMS:
                raise ValueError(f"{self.path} belongs to a study whose claims are not those in "
                                 "extras/study.py, and a study's claims may not change after its "
                                 "start; choose another --out")
            self.machines, self.rates = saved["machines"], saved["rates"]
            self.runs = saved["runs"]

    def save(self) -> None:
        state = {"claims": CLAIMS, "machines": self.machines, "flags": " ".join(self.flags),
                 "rates": self.rates, "runs": self.runs}
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.path, state)

    def complete(self, wanted: dict[str, Job]) -> None:
        """Do the `wanted` runs that are not finished yet, several at the same time."""
        missing = [name for name in wanted if name not in self.runs]
        if not missing:
            return
        here = this_machine(self.config.device)
        if here not in self.machines:
            self.machines.append(here)
        self.save()
        context = multiprocessing.get_context("spawn")      # CUDA does not survive a fork
        num_gpus = torch.cuda.device_count()
        gpus = context.Queue()
        for i in range(self.jobs):
            gpus.put(i % num_gpus if num_gpus else None)
        pool = ProcessPoolExecutor(self.jobs, context, start_worker, (gpus,))
        names = {}                      # {future: name of its run}
        try:
            for name in missing:
                names[pool.submit(perform, wanted[name], self.out / name)] = name
            for future in progress(as_completed(names), "runs", len(missing)):
                self.runs[names[future]] = future.result()
                self.save()
        except BrokenProcessPool:
            raise ValueError("a training process was killed, perhaps because it ran out of memory. "
                             "To continue the study, give the same command again; --jobs 1 needs "
                             "the least memory") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def job(self, seed: int, own: str, tree: list | None = None,
            program: Callable = train.run) -> Job:
        """A run with this seed and with the flags `own` in addition to the study's.

        On rooms, each seed trains on different rooms.
        """
        own += f" --seed {seed}"
        if self.config.dataset == "rooms":
            own += f" --room-seed {seed}"
        return Job(run_flags(self.flags, own.split()), tree, program)

    def measuring_jobs(self, arms: Sequence[str], seed: int) -> dict[str, Job]:
        """The runs that measure similarity and, if lookahead is one of the arms, affinity."""
        jobs = {f"similarity/{seed}": self.job(seed, "--tree-only")}
        if "lookahead" in arms:
            jobs[f"affinity/{seed}"] = self.job(seed, "--tree-only", program=lookahead.run)
        return jobs

    def arm_jobs(self, arm: str, seed: int, rate: float | None = None) -> dict[str, Job]:
        """The runs of an arm with one seed: a single run, or one per task for an arm in SINGLE.

        rate: learning rate to try; None for the one that was chosen for the arm.
        """
        tasks = self.config.tasks
        name = f"{arm}/{seed}"
        if rate is None:
            rate = self.rates[chosen_with(arm)]
        else:
            name = f"at {rate:.4g}/{name}"
        T = len(tasks)
        own = ARMS[arm][1].format(
            T=T, rank_per_task=self.config.rank // T,
            mtlora_rank=MTLORA_RANK.get(self.config.dataset, self.config.rank))
        own += f" --lr {rate:.4g}"
        if arm in SINGLE:
            return {f"{name}-{task}": self.job(seed, f"{own} --tasks {task}") for task in tasks}

        tree = None
        if arm in WITH_TREE:
            measure = "affinity" if arm == "lookahead" else "similarity"
            matrix = np.array(self.runs[f"{measure}/{seed}"]["similarity"])
            tree = name_tree(arm_tree(arm, matrix, self.config.groups, seed), tasks)
        return {name: self.job(seed, own, tree)}

    def pair_jobs(self, seed: int) -> dict[str, Job]:
        """For each pair of tasks, a run in which the two tasks share all adapters.

        The rank per task is that of the arm single-lora.
        """
        tasks = self.config.tasks
        rank, rate = 2 * (self.config.rank // len(tasks)), self.rates["mtl-lora"]
        jobs = {}
        for t, u in combinations(tasks, 2):
            own = f"--groups 1,1,1,1 --rank {rank} --lr {rate:.4g} --tasks {t},{u}"
            jobs[f"pair/{t}+{u}/{seed}"] = self.job(seed, own)
        return jobs

    def result(self, jobs: Iterable[str]) -> Run:
        """Combine finished runs, such as one run per task, into one: {"results", "trainable"}.

        Raises ValueError if one of the runs failed.
        """
        results, trainable = {}, 0
        for name in jobs:
            run = self.runs[name]
            if "failed" in run:
                raise ValueError(f"the run {name} failed: {run['failed']}")
            results |= train.as_numbers(run["results"])
            trainable += run["trainable"]
        return {"results": results, "trainable": trainable}

    def choose_rates(self, arms: Sequence[str]) -> None:
        """Choose the learning rate of each arm by its delta-m on CHOICE_SEED.

        The rule is the same for every arm: try the study's --lr and a third of it. As long as the
        best rate is the lowest or the highest so far, try the next one in that direction, a factor
        of 3 away. Stop after 6 rates.
        """
        lr = self.config.lr
        unfinished = list(dict.fromkeys(chosen_with(arm) for arm in arms))
        grids = {arm: [lr / 3, lr] for arm in unfinished}
        while unfinished:
            wanted = {}
            for arm in unfinished:
                for rate in grids[arm]:
                    wanted |= self.arm_jobs(arm, CHOICE_SEED, rate)
            self.complete(wanted)

            baseline = self.result(self.arm_jobs(chosen_with(arms[0]), CHOICE_SEED, lr))["results"]
            still_unfinished = []
            for arm in unfinished:
                grid, gains = grids[arm], {}
                for rate in grid:
                    jobs = self.arm_jobs(arm, CHOICE_SEED, rate)
                    gains[rate] = -math.inf
                    if not any("failed" in self.runs[name] for name in jobs):
                        gains[rate] = delta_m(self.result(jobs)["results"], baseline)
                best = max(grid, key=gains.get)
                self.rates[arm] = best
                if len(grid) < 6 and best in (grid[0], grid[-1]):
                    wider = best / 3 if best == grid[0] else best * 3
                    grids[arm] = sorted([*grid, wider])
                    still_unfinished.append(arm)
            unfinished = still_unfinished


def read_study(path: Path) -> dict:
    """The content of a study.json: claims, machines, flags, rates {arm: rate}, runs {name: run}."""
    with reading(path, "a study.json"):
        saved = json.loads(path.read_text())
        if not {"flags", "rates", "runs"} <= saved.keys():
            raise ValueError("is not a study.json: it needs flags, rates and runs")
    return saved


def this_machine(device: str) -> dict:
    """The processor and the version of PyTorch, on which the last digits of results depend."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")     # on Linux, platform.processor() is often empty
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"]
        name = models[0].partition(": ")[2] if models else name
    return {"processor": name, "torch": VERSIONS["torch"], "threads per run": 1}


# --- what the results say -------------------------------------------------------------------------
Gains = dict[str, dict[int, float]]     # {arm: {seed: delta-m}}


def gains_by_seed(results: dict[str, dict[int, Run]], tasks: Sequence[str]) -> Gains:
    """Delta-m of every arm and seed over `tasks`. The baseline is the first arm's mean over seeds.
    """
    baseline = mean_results(next(iter(results.values())).values())
    gains = {}
    for arm, runs in results.items():
        gains[arm] = {}
        for seed, run in runs.items():
            chosen = {task: run["results"][task] for task in tasks}
            gains[arm][seed] = delta_m(chosen, baseline)
    return gains


def paired(gains: Gains, better: str, worse: str) -> list[float]:
    """The differences in delta-m between two arms, one for each seed that both arms have."""
    first, second = gains.get(better, {}), gains.get(worse, {})
    return [first[seed] - second[seed] for seed in first if seed in second]


def format_without_tasks(results: dict[str, dict[int, Run]], judged: Sequence[Judged],
                         tasks: Sequence[str]) -> str:
    """A table of the claims' differences, with each task in turn left out of delta-m.

    The table shows whether a claim rests on a single task.
    """
    rows = [["difference"] + [f"without {task}" for task in tasks]]
    rows += [[f"{claim.better} - {claim.worse}"] for claim in judged]
    for left_out in tasks:
        gains = gains_by_seed(results, [task for task in tasks if task != left_out])
        for row, claim in zip(rows[1:], judged):
            c = compare(paired(gains, claim.better, claim.worse), CLAIMS["margin"])
            row.append(str(c))
    return aligned(rows)


def format_trees(study: Study, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """A table of the arms in WITH_TREE: the number of different trees among the arm's seeds, and
    the number of seeds for which the tree is the same as tglora's.
    """
    rows = [["trees", "seeds", "different", "same as tglora's"]]
    similar = [study.runs[f"tglora/{seed}"]["tree"] for seed in seeds]
    for arm in WITH_TREE:
        if arm in arms:
            trees = [study.runs[f"{arm}/{seed}"]["tree"] for seed in seeds]
            different = len(set(map(str, trees)))
            same = sum(tree == other for tree, other in zip(trees, similar))
            rows.append([arm, str(len(seeds)), str(different), str(same)])
    return aligned(rows)


def format_pairs(study: Study, seeds: Sequence[int]) -> str:
    """A table of pairs of tasks: does similarity predict which pairs gain from sharing?

    The gain of a pair, called its benefit, is its delta-m against single-lora with the same seed.
    """
    tasks = study.config.tasks
    pairs = list(combinations(range(len(tasks)), 2))
    columns = {"benefit": [], "cosine": [], "affinity": []}     # each: one row per seed
    for seed in seeds:
        single = study.result(study.arm_jobs("single-lora", seed))["results"]
        jobs = study.pair_jobs(seed)                            # in the order of `pairs`
        columns["benefit"].append([delta_m(study.result([job])["results"], single) for job in jobs])
        for name, measure in (("cosine", "similarity"), ("affinity", "affinity")):
            matrix = study.runs[f"{measure}/{seed}"]["similarity"]
            columns[name].append([matrix[t][u] for t, u in pairs])
    benefit = np.array(columns["benefit"])                      # (seeds, pairs)

    rows = [["pair", "cosine", "affinity x 1000", "benefit %"]]
    for i in np.argsort(-benefit.mean(0)):
        t, u = pairs[i]
        cosine, affinity = (np.mean(columns[name], axis=0)[i] for name in ("cosine", "affinity"))
        rows.append([f"{tasks[t]} + {tasks[u]}", f"{cosine:+.3f}", f"{1000 * affinity:+.3f}",
                     spread(benefit[:, i], 2)])
    lines = [aligned(rows), f"reliability of the benefits, {len(seeds)} seeds: "
                            f"{split_half_reliability(benefit):+.2f}"]
    for name in ("cosine", "affinity"):
        measured = np.array(columns[name])
        rho = correlation_of_means(benefit, measured)
        low, high = bootstrap_interval(correlation_of_means, benefit, measured)
        lines.append(f"rank correlation of benefit and {name}: {rho:+.2f} ({low:+.2f} to "
                     f"{high:+.2f})")
    return "\n".join(lines)


# --- the study ------------------------------------------------------------------------------------
def run_study(study: Study, arms: Sequence[str], seeds: Sequence[int],
              rates: dict[str, float] | None) -> None:
    """Train every arm with its seeds, then print the results and verdicts, and draw the verdicts.

    rates: {arm: learning rate} as recorded in docs/; None to choose them on CHOICE_SEED.
    """
    complete = set(arms) == set(ARMS)           # the pairs need single-lora and both measures
    arm_seeds = {arm: seeds[:ARMS[arm][0]] for arm in arms}
    wanted = {}
    for seed in (*seeds, CHOICE_SEED):
        if seed in seeds or rates is None:
            wanted |= study.measuring_jobs(arms, seed)
    study.complete(wanted)
    if rates is None:
        study.choose_rates(arms)
    else:
        study.rates.update(rates)

    wanted = {}
    for seed in seeds:
        for arm in arms:
            if seed in arm_seeds[arm]:
                wanted |= study.arm_jobs(arm, seed)
        if complete and seed in seeds[:PAIR_SEEDS]:
            wanted |= study.pair_jobs(seed)
    study.complete(wanted)

    results = {}                                # {arm: {seed: {"results", "trainable"}}}
    for arm in arms:
        results[arm] = {}
        for seed in arm_seeds[arm]:
            results[arm][seed] = study.result(study.arm_jobs(arm, seed))
    tasks = study.config.tasks
    print(format_runs(results, mean_results(results[arms[0]].values()), "last"))
    gains = gains_by_seed(results, tasks)
    differences = {tuple(claim): paired(gains, *claim) for claim in CLAIMS["better"]}
    judged = judge(differences, CLAIMS)
    if not judged:
        print("no claim is judged: a claim needs both of its arms, with two seeds in common")
        return
    print(f"\n{format_claims(judged)}\n\n{format_without_tasks(results, judged, tasks)}")
    print(f"\n{format_trees(study, arms, seeds)}")
    if complete:
        print(f"\n{format_pairs(study, seeds[:PAIR_SEEDS])}")
    draw_claims(study.out / "study.png", judged, CLAIMS["margin"])
    print(f"\nwrote {study.path} and {study.out / 'study.png'}")


def compare_with_recorded(study: Study, recorded: dict, wanted: Iterable[str]) -> None:
    """Print the results of the `wanted` runs next to those of the recorded study."""
    rows = [["run", "task", "metric", "recorded", "here", "difference"]]
    outside = 0
    for name in wanted:
        before, now = recorded["runs"][name], study.runs[name]
        if before.get("tree") != now.get("tree"):
            print(f"the tree of {name} differs from the recorded one")
        for task in make_tasks(list(now["results"]), 1):
            old = before["results"][task.name][task.metric]
            new = now["results"][task.name][task.metric]
            difference = f"{100 * (new - old) / old:+.2f} %"
            if not abs(new - old) <= TOLERANCE / 100 * old:     # also marks NaN
                outside += 1
                difference += " !"
            rows.append([name, task.name, task.metric, f"{old:.4f}", f"{new:.4f}", difference])
    compared = len(rows) - 1
    print(f"\n{aligned(rows)}\n{compared - outside} of {compared} values agree to {TOLERANCE:g} % "
          "with the recorded ones. Results depend slightly on the CPU and the PyTorch version.")
    print(f"recorded on: {recorded['machines']}\nthis machine: {study.machines}")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="All other flags are passed to train.py for every run.")
    add = parser.add_argument
    jobs = torch.cuda.device_count() or os.cpu_count()
    add("--quick", action="store_true", help="train only three arms with one seed, at the "
        "learning rates recorded in docs/, and compare the results with the recorded ones")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the study and its runs")
    add("--jobs", type=int, default=jobs, help="number of runs that are trained at the same "
        "time; default: one per GPU, or one per CPU core if there is no GPU")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of the reported "
        "runs; an arm with fewer seeds uses the first of these; default: 10 to 22")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to train; the "
        "first is the baseline of delta-m; default: all")
    args, flags = parser.parse_known_args(argv)
    with one_line_errors():
        dataset = parse_arguments(flags).dataset
        flags = SETTINGS.get(dataset, "").split() + flags
        if not args.quick:
            run_study(Study(args.out, flags, args.jobs), args.arms, args.seeds, None)
            return
        recorded = read_study(Path(__file__).parent.parent / f"docs/study_{dataset}.json")
        study = Study(args.out, flags, args.jobs)
        run_study(study, QUICK_ARMS, SEEDS[:1], recorded["rates"])
        if recorded["flags"] != " ".join(flags):
            print("the recorded study used different flags, so its values are not compared")
            return
        names = []
        for arm in QUICK_ARMS:
            names += study.arm_jobs(arm, SEEDS[0])
        compare_with_recorded(study, recorded, names)


if __name__ == "__main__":
    main()
