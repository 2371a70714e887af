"""Does it matter which tasks share their adapters? This study trains every possible tree.

    python -m extras.study                # train everything on rooms, then print the verdicts
    python -m extras.study --quick        # four runs of one seed, compared with recorded results
    python -m extras.study --dataset nyud --data-root data       # the same questions on NYUD-v2

Some stages of the tree divide the tasks into k groups. With four tasks and k = 2 there are exactly
seven ways to do so, and the study trains all seven trees, next to sharing everything, sharing
nothing, and training no adapters. Learning rates and the setting were chosen on seeds that are not
reported. The claims are written to OUT/study.json before the first run, and each finished run is
added there at once, so a study that was stopped continues with the same command.
docs/STUDY.md explains the design and shows the results on rooms.
References: arXiv 2509.19602, sections 3.3 and 4.2, table 4, eq. 6 and 7.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import train
from extras.claims import LEVEL, compare, draw_rows, format_p, holm, spread_of_trees, verdict
from extras.table import aligned, format_runs, mean_results
from grouping import Partition, build_tree, name_tree, partitions, score
from recipes import parse_arguments
from tasks import delta_m, make_tasks
from util import VERSIONS, one_line_errors, progress, reading, write_json

ROOT = Path(__file__).parent.parent
Run = dict                              # a run's entry in study.json: its flags, results, ...
Gains = dict[str, dict[int, float]]     # {arm: {seed: delta-m}}

# --- the questions, fixed before the reported seeds were run --------------------------------------
CHOICE_SEEDS = [0, 1]                   # for choosing rates (the first) and checks; not reported
SEEDS = list(range(10, 19))             # reported; an arm with fewer seeds uses the first of these

EVERYTHING, NOTHING, DECODERS = "everything shared", "nothing shared", "decoders only"
COSINE, OTHERS, SHAPE = "the cosine's tree", "mean of the other trees", "the same, of its shape"
CLAIMS = {                              # copied to study.json when a study starts
    "date": "2026-11-30",
    "seeds": SEEDS,
    "level": LEVEL,                     # after Holm's correction for the number of claims
    "better": COSINE,
    # [the cosine's tree has a higher delta-m than this, by more than so many points]
    "than": [[EVERYTHING, 0], [NOTHING, 0], [DECODERS, 10], [OTHERS, 0], [SHAPE, 0]],
    "equivalent": [OTHERS, SHAPE],      # these are also tested for equivalence
    "margin": "half the mean lead of the cosine's tree over the nearer of everything shared and "
              "nothing shared, on the choosing seeds",
}
SETTINGS = {                            # {dataset: flags of every run}; others use their recipe
    "rooms": "--tasks human_parts,sal,depth,normals --batch-size 4 --train-rooms 600 --epochs 2 "
             "--eval-every 1000 --val-rooms 192",
}
GROUPS = {4: (1, 2, 2, 4)}              # {number of tasks: groups}; otherwise the paper's
MTLORA_RANK = {"rooms": 14}              # gives as many adapter parameters as in the LoRA arms

BASELINE = "single-task full"           # of delta-m
TREE = "tree"                           # stands for all trees, which share one learning rate
ARMS = {                                # {arm: (number of seeds, flags)}; T: number of tasks
    BASELINE: (5, "--method full"),                 # one network per task
    "multi-task full": (5, "--method full"),
    DECODERS: (9, "--method decoders"),
    EVERYTHING: (9, "--groups 1,1,1,1"),
    NOTHING: (9, "--groups T,T,T,T"),
    "mtlora": (5, "--method mtlora"),
    "bdta": (5, "--method bdta"),
}
TOLERANCE = 1.0         # percent; --quick marks larger differences from the recorded values


def all_trees(num_tasks: int, groups: Sequence[int]) -> list[list[Partition]]:
    """Every tree with these numbers of groups, as partitions of task indices.

    Raises ValueError unless all stages that neither share everything nor nothing have the same
    number of groups: the tree then depends on a single partition.
    """
    T = num_tasks
    middle = set(groups) - {1, T}
    if len(middle) != 1 or list(groups) != sorted(groups):
        raise ValueError(f"the study needs groups such as 1,2,2,{T}: stages with one group, then "
                         f"stages with the same number of groups, then stages with {T} groups; "
                         f"got {','.join(map(str, groups))}")
    k = middle.pop()
    trees = []
    for partition in partitions(tuple(range(T))):
        if len(partition) == k:
            stages = {1: [tuple(range(T))], k: sorted(partition), T: [(t,) for t in range(T)]}
            trees.append([stages[count] for count in groups])
    return sorted(trees, key=lambda tree: (shape(tree), tree))


def shape(tree: Sequence[Partition]) -> list[list[int]]:
    """The sizes of the groups in each stage, largest first."""
    return [sorted(map(len, partition), reverse=True) for partition in tree]


def distinguishing_partition(tree: Sequence[Partition], num_tasks: int) -> Partition:
    """The partition of the stages that neither share everything nor nothing (see `all_trees`)."""
    return next(partition for partition in tree if 1 < len(partition) < num_tasks)


def tree_name(tree: Sequence[Partition], tasks: Sequence[str]) -> str:
    """The groups of the stage that distinguishes the tree, such as "sal+depth,normals"."""
    partition = distinguishing_partition(tree, len(tasks))
    return ",".join("+".join(tasks[t] for t in group) for group in partition)


# --- the runs -------------------------------------------------------------------------------------
class Study:
    """The finished runs of a study, by name. They are also saved in OUT/study.json."""

    def __init__(self, out: Path, flags: list[str], jobs: int):
        """Start a study in the folder `out`, or continue the study that is there.

        flags: flags of train.py for every run. jobs: number of runs that are trained at the same
        time. Raises ValueError if the study in `out` has different flags or claims.
        """
        self.out, self.flags, self.jobs = out, flags, jobs
        self.path = out / "study.json"
        self.config = parse_arguments(flags)
        self.tasks = self.config.tasks
        self.groups = GROUPS.get(len(self.tasks), self.config.groups)
        self.trees = {}                 # {name: tree}
        for tree in all_trees(len(self.tasks), self.groups):
            self.trees[tree_name(tree, self.tasks)] = tree
        self.machines = []              # machines that have worked on this study
        self.rates = {}                 # {arm: chosen learning rate}
        self.runs = {}                  # {name: run}
        if self.path.exists():
            saved = read_study(self.path)
            if saved["flags"] != " ".join(flags) or saved["claims"] != CLAIMS:
                raise ValueError(f"{self.path} belongs to a study with other flags or claims, and "
                                 "neither may change after its start; choose another --out, or "
                                 "repeat the command that started it")
            self.machines, self.rates = saved["machines"], saved["rates"]
            self.runs = saved["runs"]

    def save(self) -> None:
        state = {"claims": CLAIMS, "machines": self.machines, "flags": " ".join(self.flags),
                 "rates": self.rates, "runs": self.runs}
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.path, state)

    def complete(self, wanted: dict[str, list[str]]) -> None:
        """Do those of the `wanted` runs, {name: flags}, that are not finished yet."""
        missing = [name for name in wanted if name not in self.runs]
        if not missing:
            return
        here = this_machine(self.config.device)
        if here not in self.machines:
            self.machines.append(here)
        self.save()
        for name, tree in self.trees.items():
            self.tree_file(name).parent.mkdir(exist_ok=True)
            write_json(self.tree_file(name), {"tree": name_tree(tree, self.tasks)})
        pool = ThreadPoolExecutor(self.jobs)
        names = {}                      # {future: name of its run}
        try:
            for name in missing:
                names[pool.submit(self.train, name, wanted[name])] = name
            for future in progress(as_completed(names), "runs", len(missing)):
                self.runs[names[future]] = future.result()
                self.save()
        finally:
            pool.shutdown(cancel_futures=True)

    def train(self, name: str, flags: list[str]) -> Run:
        """Run train.py in OUT/name, or finish the run that is there; returns its entry.

        If the run diverges (a number in it is not finite), the entry has the error message under
        "failed" instead of results. Any other error raises ValueError.
        """
        folder = self.out / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.parent / f"{folder.name}.log"
        tree_only = "--tree-only" in flags
        entry = {"flags": " ".join(flags)}
        result_file = folder / ("tree.json" if tree_only else "metrics.json")
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()              # the run was killed before it wrote any file
        all_flags = ["--resume"] if (folder / "last.pt").exists() else [*self.flags, *flags]
        if not result_file.exists():
            with open(log, "a") as file:
                code = subprocess.run([sys.executable, str(ROOT / "train.py"), *all_flags, "--out",
                                       str(folder)], stdout=file, stderr=file,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
            if code != 0:
                message = ["no message", *log.read_text().splitlines()][-1]
                if "not finite" not in message:
                    raise ValueError(f"the run {name} failed: {message} (see {log})")
                return entry | {"failed": message}
        if tree_only:
            return entry | {"similarity": json.loads(result_file.read_text())["similarity"]}
        # Report the last epoch. The best epoch would be chosen on the validation images.
        metrics = train.read_results(result_file)
        return entry | {"results": metrics["last"]["results"], "trainable": metrics["trainable"]}

    def tree_file(self, name: str) -> Path:
        return self.out / "trees" / f"{name}.json"

    def seed_flags(self, seed: int) -> list[str]:
        """The seed. On rooms, each seed also trains on different rooms."""
        flags = ["--seed", str(seed)]
        if self.config.dataset == "rooms":
            flags += ["--room-seed", str(seed)]
        return flags

    def similarity_run(self, seed: int) -> dict[str, list[str]]:
        """The run that measures the similarities with which the cosine's tree is chosen."""
        groups = ",".join(map(str, self.groups))
        return {f"similarity/{seed}": ["--groups", groups, "--tree-only", *self.seed_flags(seed)]}

    def arm_runs(self, arm: str, seed: int, rate: float | None = None,
                 epochs: int | None = None) -> dict[str, list[str]]:
        """The runs of an arm with one seed: a single run, or one per task for the baseline.

        arm: a name in ARMS or in self.trees. rate: learning rate to try; None for the one that was
        chosen. epochs: None for the study's own.
        """
        name = f"{arm}/{seed}"
        if rate is None:
            rate = self.rates[TREE if arm in self.trees else arm]
        else:
            name = f"lr {rate:.4g}/{name}"
        if arm in self.trees:
            flags = ["--tree", str(self.tree_file(arm))]
        else:
            flags = ARMS[arm][1].replace("T", str(len(self.tasks))).split()
        if arm == "mtlora" and self.config.dataset in MTLORA_RANK:
            flags += ["--rank", str(MTLORA_RANK[self.config.dataset])]
        flags += ["--lr", f"{rate:.4g}", *self.seed_flags(seed)]
        if epochs:
            name = f"{epochs} epochs/{name}"
            flags += ["--epochs", str(epochs)]
        if arm == BASELINE:
            return {f"{name}-{task}": [*flags, "--tasks", task] for task in self.tasks}
        return {name: flags}

    def result(self, names: Iterable[str]) -> Run:
        """Combine finished runs, such as one run per task, into one: {"results", "trainable"}.

        Raises ValueError if one of the runs failed.
        """
        results, trainable = {}, 0
        for name in names:
            run = self.runs[name]
            if "failed" in run:
                raise ValueError(f"the run {name} failed: {run['failed']}")
            results |= train.as_numbers(run["results"])
            trainable += run["trainable"]
        return {"results": results, "trainable": trainable}

    def cosine_tree(self, seed: int) -> str:
        """The name of the tree that Algorithm 1 builds from the seed's own similarities."""
        similarity = np.array(self.runs[f"similarity/{seed}"]["similarity"])
        return tree_name(build_tree(similarity, self.groups), self.tasks)

    def scores(self, seed: int) -> dict[str, float]:
        """Eq. 6 for the partition of each tree: {name: score}."""
        similarity = np.array(self.runs[f"similarity/{seed}"]["similarity"])
        scores = {}
        for name, tree in self.trees.items():
            partition = distinguishing_partition(tree, len(self.tasks))
            scores[name] = score(partition, similarity)
        return scores

    def choose_rates(self) -> None:
        """Choose the learning rate of each arm by its delta-m on the first choosing seed.

        The rule is the same for every arm: try the recipe's rate and a third of it. As long as the
        best rate is the lowest or the highest so far, try the next one in that direction, a factor
        of 3 away. Stop after 6 rates. All trees share the rate that suits the cosine's tree.
        """
        seed, lr = CHOICE_SEEDS[0], self.config.lr
        arms = {arm: arm for arm in ARMS} | {TREE: self.cosine_tree(seed)}
        grids = {arm: [lr / 3, lr] for arm in arms}
        unfinished = list(arms)
        while unfinished:
            wanted = {}
            for arm in unfinished:
                for rate in grids[arm]:
                    wanted |= self.arm_runs(arms[arm], seed, rate)
            self.complete(wanted)
            baseline = self.result(self.arm_runs(BASELINE, seed, lr))["results"]
            widened = []
            for arm in unfinished:
                gains = {}
                for rate in grids[arm]:
                    names = self.arm_runs(arms[arm], seed, rate)
                    gains[rate] = -math.inf
                    if not any("failed" in self.runs[name] for name in names):
                        gains[rate] = delta_m(self.result(names)["results"], baseline)
                low, high = grids[arm][0], grids[arm][-1]
                best = self.rates[arm] = max(gains, key=gains.get)
                if len(gains) < 6 and best in (low, high):
                    wider = low / 3 if best == low else high * 3
                    grids[arm] = sorted([*grids[arm], wider])
                    widened.append(arm)
            unfinished = widened
        for arm, name in arms.items():          # these runs need not be repeated at the chosen rate
            for run, tried in zip(self.arm_runs(name, seed),
                                  self.arm_runs(name, seed, self.rates[arm])):
                self.runs[run] = self.runs[tried]

    def gains(self, arms: Iterable[str], seeds: Sequence[int], tasks: Sequence[str] | None = None,
              epochs: int | None = None) -> Gains:
        """Delta-m of every arm and seed, over all tasks or the given ones.

        The baseline is the mean of single-task full fine-tuning over its seeds among `seeds`.
        Seeds with which an arm was not trained are left out.
        """
        baseline = [self.result(self.arm_runs(BASELINE, seed)) for seed in seeds
                    if self.finished(BASELINE, seed)]
        baseline = mean_results(baseline)
        gains = {}
        for arm in arms:
            gains[arm] = {}
            for seed in seeds:
                if self.finished(arm, seed, epochs):
                    results = self.result(self.arm_runs(arm, seed, epochs=epochs))["results"]
                    chosen = {task: results[task] for task in tasks or self.tasks}
                    gains[arm][seed] = delta_m(chosen, baseline)
        return gains

    def finished(self, arm: str, seed: int, epochs: int | None = None) -> bool:
        return all(name in self.runs for name in self.arm_runs(arm, seed, epochs=epochs))


def read_study(path: Path) -> dict:
    """The content of a study.json: claims, machines, flags, rates {arm: rate}, runs {name: run}."""
    with reading(path, "a study.json"):
        return json.loads(path.read_text())


def this_machine(device: str) -> dict:
    """The processor and the version of PyTorch, on which the last digits of results depend."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")     # on Linux, platform.processor() is often empty
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"]
        name = models[0].partition(": ")[2] if models else name
    return {"processor": name, "torch": VERSIONS["torch"], "threads per run": 1,
            "instructions": torch.backends.cpu.get_cpu_capability()}


# --- what the results say -------------------------------------------------------------------------
def leads(study: Study, seeds: Sequence[int], tasks: Sequence[str] | None = None,
          epochs: int | None = None) -> dict[str, list[float]]:
    """For each claim, the lead of the cosine's tree in delta-m: one number per seed.

    tasks: average delta-m over these tasks only. epochs: of runs that were trained for longer.
    """
    gains = study.gains([*study.trees, EVERYTHING, NOTHING, DECODERS], seeds, tasks, epochs)
    differences = {name: [] for name, _ in CLAIMS["than"]}
    for seed in seeds:
        cosine = study.cosine_tree(seed)
        others = [tree for tree in study.trees if tree != cosine]
        cosine_shape = shape(study.trees[cosine])
        alike = [tree for tree in others if shape(study.trees[tree]) == cosine_shape]
        rivals = {EVERYTHING: [EVERYTHING], NOTHING: [NOTHING], DECODERS: [DECODERS],
                  OTHERS: others, SHAPE: alike}
        for name in differences:
            rival = np.mean([gains[arm][seed] for arm in rivals[name]])
            differences[name].append(float(gains[cosine][seed] - rival))
    return differences


def equivalence_margin(study: Study) -> float:
    """The margin that CLAIMS describes, in points of delta-m; NaN if there is no lead to halve."""
    lead = leads(study, CHOICE_SEEDS)
    nearer = min(np.mean(lead[EVERYTHING]), np.mean(lead[NOTHING]))
    return float(nearer) / 2 if nearer > 0 else math.nan


def format_checks(study: Study) -> str:
    """The leads on the choosing seeds, and with twice as many steps on the first of them."""
    first = CHOICE_SEEDS[0]
    lead = leads(study, CHOICE_SEEDS)
    longer = leads(study, [first], epochs=2 * study.config.epochs)
    rows = [[f"{COSINE} against", *(f"seed {seed}" for seed in CHOICE_SEEDS),
             f"seed {first}, steps x 2"]]
    for name in lead:
        rows.append([name, *(f"{x:+.2f}" for x in lead[name] + longer[name])])
    gains = study.gains([BASELINE, DECODERS], CHOICE_SEEDS)
    row = [f"{BASELINE} against {DECODERS}"]
    for seed in CHOICE_SEEDS:
        row.append(f"{gains[BASELINE][seed] - gains[DECODERS][seed]:+.2f}")
    rows.append([*row, "-"])
    return aligned(rows)


def format_claims(study: Study, seeds: Sequence[int]) -> str:
    """The verdict on each claim, and its differences task by task."""
    margin = equivalence_margin(study)
    level = LEVEL / len(CLAIMS["than"])
    lead = leads(study, seeds)
    compared = {name: compare(lead[name], by, margin, level) for name, by in CLAIMS["than"]}
    adjusted = holm([c.p for c in compared.values()])
    rows = [[f"{COSINE} against", "by more than", "mean lead (95 %)", "p, Holm", "90 % interval",
             "p, equivalence", "detectable", "verdict"]]
    for (name, by), p in zip(CLAIMS["than"], adjusted):
        c, tested = compared[name], name in CLAIMS["equivalent"]
        rows.append([name, f"{by:g}", str(c), format_p(p), f"{c.low90:+.2f} to {c.high90:+.2f}",
                     format_p(c.p_equivalent) if tested else "-", f"{c.detectable:.2f}",
                     verdict(c, by, p, tested)])
    by_task = [["lead by task", *study.tasks]] + [[name] for name in compared]
    for task in study.tasks:
        for row, differences in zip(by_task[1:], leads(study, seeds, [task]).values()):
            row.append(str(compare(differences)))
    return f"margin of equivalence: {margin:.2f}\n{aligned(rows)}\n\n{aligned(by_task)}"


def format_trees(study: Study, seeds: Sequence[int]) -> str:
    """How much delta-m differs between trees, and whether the score of eq. 6 predicts it."""
    gains = study.gains(study.trees, seeds)
    table = np.array([[gains[tree][seed] for tree in study.trees] for seed in seeds])
    scores = np.array([list(study.scores(seed).values()) for seed in seeds])    # (seeds, trees)
    chosen = [study.cosine_tree(seed) for seed in seeds]
    rows = [["tree", "seeds that choose it", "score, eq. 6", "delta-m"]]
    for i in np.argsort(-table.mean(0)):
        name = list(study.trees)[i]
        rows.append([name, str(chosen.count(name)), f"{scores[:, i].mean():.3f}",
                     f"{table[:, i].mean():+.2f}"])
    ranks = []
    for seed, tree in zip(seeds, chosen):
        ranks.append(sum(gains[other][seed] > gains[tree][seed] for other in study.trees) + 1)
    s = spread_of_trees(table)
    correlation = stats.spearmanr(scores.mean(0), table.mean(0)).statistic
    return (f"{aligned(rows)}\n"
            f"standard deviation between trees {s.trees:.2f} ({s.low:.2f} to {s.high:.2f}), "
            f"p {format_p(s.p)}; between seeds {s.seeds:.2f}; noise of one run {s.rest:.2f}\n"
            f"rank of the cosine's tree among {len(study.trees)}, by seed: "
            f"{', '.join(map(str, ranks))}\n"
            f"rank correlation of score and delta-m over the {len(study.trees)} trees: "
            f"{correlation:+.2f}")


def draw_trees(path: Path, study: Study, seeds: Sequence[int]) -> None:
    """Draw the delta-m of each tree and of the two extremes, minus the mean of the seed's trees.

    The marked tree is the one that the cosine gives for most seeds.
    """
    gains = study.gains([*study.trees, EVERYTHING, NOTHING], seeds)
    rows = {}
    for arm in sorted(gains, key=lambda arm: -np.mean(list(gains[arm].values()))):
        rows[arm] = []
        for seed in seeds:
            mean = np.mean([gains[tree][seed] for tree in study.trees])
            rows[arm].append(gains[arm][seed] - mean)
    title = "delta-m minus the mean of the seven trees, in points; orange: the cosine's tree"
    draw_rows(path, title, rows, statistics.mode(map(study.cosine_tree, seeds)))


def print_results(study: Study, seeds: Sequence[int]) -> None:
    """Print the results of all reported runs and the verdicts, and draw OUT/study.png."""
    results = {}                                # {arm: {seed: {"results", "trainable"}}}
    for arm in (*ARMS, *study.trees):
        finished = [seed for seed in seeds if study.finished(arm, seed)]
        results[arm] = {seed: study.result(study.arm_runs(arm, seed)) for seed in finished}
    print(format_runs(results, mean_results(results[BASELINE].values()), "last"))
    print(f"\nThe setting, on seeds that are not reported:\n{format_checks(study)}")
    print(f"\n{format_claims(study, seeds)}\n\n{format_trees(study, seeds)}")
    draw_trees(study.out / "study.png", study, seeds)
    print(f"\nwrote {study.path} and {study.out / 'study.png'}")


# --- the study ------------------------------------------------------------------------------------
def run_study(study: Study) -> None:
    """Do all runs that are not finished yet: first those of the choosing seeds."""
    wanted = {}
    for seed in CHOICE_SEEDS:
        wanted |= study.similarity_run(seed)
    study.complete(wanted)
    study.choose_rates()

    wanted = {}
    extremes = DECODERS, EVERYTHING, NOTHING
    for arm in (BASELINE, *extremes, *study.trees):
        for seed in CHOICE_SEEDS:
            wanted |= study.arm_runs(arm, seed)
    for arm in (*extremes, *study.trees):
        wanted |= study.arm_runs(arm, CHOICE_SEEDS[0], epochs=2 * study.config.epochs)
    study.complete(wanted)
    print(f"The setting, on seeds that are not reported:\n{format_checks(study)}\n", flush=True)

    for i, seed in enumerate(SEEDS):            # one seed after the other
        wanted = study.similarity_run(seed)
        for arm, (count, _) in ARMS.items():
            if i < count:
                wanted |= study.arm_runs(arm, seed)
        for tree in study.trees:
            wanted |= study.arm_runs(tree, seed)
        study.complete(wanted)


def run_quick(study: Study, recorded: dict) -> None:
    """Repeat a few runs of the first seed, and compare them with the recorded ones."""
    if recorded["flags"] != " ".join(study.flags):
        raise ValueError("--quick compares with a study that was recorded with the flags "
                         f"{recorded['flags']}; leave out all other flags of train.py")
    seed = SEEDS[0]
    study.rates = recorded["rates"]
    study.complete(study.similarity_run(seed))
    wanted = {}
    for arm in (DECODERS, EVERYTHING, study.cosine_tree(seed)):
        wanted |= study.arm_runs(arm, seed)
    study.complete(wanted)
    rows = [["run", "task", "metric", "recorded", "here", "difference"]]
    outside = 0
    for name in wanted:
        before, now = recorded["runs"][name]["results"], study.result([name])["results"]
        for task in make_tasks(list(now), 1):
            old, new = before[task.name][task.metric], now[task.name][task.metric]
            difference = f"{100 * (new - old) / old:+.2f} %"
            if not abs(new - old) <= TOLERANCE / 100 * old:     # also marks NaN
                outside += 1
                difference += " !"
            rows.append([name, task.name, task.metric, f"{old:.4f}", f"{new:.4f}", difference])
    compared = len(rows) - 1
    print(f"{aligned(rows)}\n{compared - outside} of {compared} values agree to {TOLERANCE:g} % "
          "with the recorded ones. Results depend slightly on the CPU and the PyTorch version.\n"
          f"recorded on: {recorded['machines']}\nthis machine: {study.machines}")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="All other flags are passed to train.py for every run.")
    add = parser.add_argument
    add("--quick", action="store_true", help="train only three arms with one seed, at the "
        "learning rates recorded in docs/, and compare the results with the recorded ones")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the study and its runs")
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    add("--jobs", type=int, default=jobs, help="number of runs that are trained at the same "
        "time; default: one per CPU core, or one if there is a GPU")
    args, flags = parser.parse_known_args(argv)
    with one_line_errors():
        dataset = parse_arguments(flags).dataset
        flags = SETTINGS.get(dataset, "").split() + flags
        study = Study(args.out, flags, args.jobs)
        if args.quick:
            run_quick(study, read_study(ROOT / f"docs/study_{dataset}.json"))
        else:
            run_study(study)
            print_results(study, SEEDS)


if __name__ == "__main__":
    main()
