"""Which tasks share an adapter: partitions, their score, and the task tree.

A group's tasks are scored by their mean similarity to the others in it (eq. 5), a partition by
the sum over all tasks (eq. 6). The last stage takes the best partition into its number of groups;
each earlier stage merges groups of the one after it (Algorithm 1), so the tree is nested: tasks
that part never meet again.

    tree = build_tree(sim, (1, 1, 2, 3))    # sim: (T, T) similarities; one partition a stage
    print(format_tree(tree, ["semseg", "depth", "normals"]))

A partition is a list of tuples of task indices, each sorted, ordered by their first task.
References: arXiv 2509.19602, sections 3.3 and 4.4.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

Partition = list[tuple[int, ...]]


def score(partition: Partition, sim: np.ndarray) -> float:
    """Affinity of a partition: each task's mean similarity to its group, summed (eq. 5 and 6)."""
    return float(sum(sum(sim[t, u] for t in group for u in group if u != t) / (len(group) - 1)
                     for group in partition if len(group) > 1))


def best_partition(sim: np.ndarray, num_groups: int) -> Partition:
    """The partition of T tasks into `num_groups` with the highest score, exactly.

    sim: (T, T). The paper searches by branch and bound; here, a recursion that remembers: the best
    split of some tasks is some group around the first of them, beside the best split of the tasks
    that are left. About 3^T steps, whatever the similarities: seconds for 15 tasks.
    Of equal partitions, the first wins that keeps early tasks together. Raises ValueError unless
    1 <= num_groups <= T.
    """
    return best_partitions(sim, num_groups, 1)[0]


def best_partitions(sim: np.ndarray, num_groups: int, how_many: int) -> list[Partition]:
    """The `how_many` best of them, or as many as there are, best first; see `best_partition`."""
    sim = np.asarray(sim, dtype=float)
    T = len(sim)
    if sim.shape != (T, T) or not np.isfinite(sim).all():
        raise ValueError(f"similarity must be a finite square matrix, got shape {sim.shape}")
    if not 1 <= num_groups <= T:
        raise ValueError(f"{T} tasks do not fit into {num_groups} groups; expected 1 to {T}")
    both_ways = (sim + sim.T).tolist()  # Python's numbers: numpy's are slow one at a time

    @lru_cache(maxsize=None)
    def affinity(group: tuple[int, ...]) -> float:
        """Eq. 5, summed over the tasks of a group."""
        if len(group) == 1:
            return 0.0
        return sum(both_ways[t][u] for t, u in combinations(group, 2)) / (len(group) - 1)

    @lru_cache(maxsize=None)
    def best(tasks: tuple[int, ...], num_groups: int) -> list[tuple[float, tuple]]:
        """(score, groups) of the best splits of `tasks` into `num_groups`."""
        if num_groups == 1:
            return [(affinity(tasks), (tasks,))]
        first, rest = tasks[:1], tasks[1:]
        top = []
        for size in range(len(rest) - num_groups + 1, -1, -1):  # how many join the first task
            joining = combinations(rest, size)
            # In the opposite order, combinations list what each choice leaves.
            leaving = reversed(list(combinations(rest, len(rest) - size)))
            for joined, left in zip(joining, leaving):
                for score_left, groups_left in best(left, num_groups - 1):
                    total = affinity(first + joined) + score_left  # eq. 6
                    if len(top) < how_many or total > top[-1][0]:
                        top.append((total, (first + joined, *groups_left)))
                        top.sort(key=itemgetter(0), reverse=True)  # stable: the first of equals
                        del top[how_many:]
        return top

    return [list(groups) for _, groups in best(tuple(range(T)), num_groups)]


def merge_groups(partition: Partition, sim: np.ndarray, num_groups: int) -> Partition:
    """Algorithm 1: merge the two groups whose union scores best, until `num_groups` are left.

    The paper's search starts from score 0 and so finds nothing when every similarity is negative;
    this one starts from minus infinity. Of equal pairs the first wins.
    """
    if not 1 <= num_groups <= len(partition):
        raise ValueError(f"{len(partition)} groups cannot be merged into {num_groups}")
    partition = list(partition)
    while len(partition) > num_groups:
        partition = max(merged_pairs(partition), key=lambda p: score(p, sim))  # the first of equals
    return partition


def merged_pairs(partition: Partition) -> list[Partition]:
    """What `partition` becomes when two of its groups are merged, each two in turn."""
    return [sorted([g for g in partition if g not in (a, b)] + [tuple(sorted(a + b))])
            for a, b in combinations(partition, 2)]


def build_tree(sim: np.ndarray, groups_per_stage: Sequence[int]) -> list[Partition]:
    """One partition a stage, computed from the decoders down (4.4): best, then merged.

    groups_per_stage: from the first stage to the last, never decreasing, at most T.
    """
    sim, groups = np.asarray(sim, dtype=float), list(groups_per_stage)
    if groups != sorted(groups) or groups[0] < 1 or groups[-1] > len(sim):
        raise ValueError(f"groups {','.join(map(str, groups))} do not fit {len(sim)} tasks: "
                         "expected one number a stage, never decreasing, from 1 to at most "
                         f"{len(sim)}")
    tree = [best_partition(sim, groups[-1])]
    for n in reversed(groups[:-1]):
        tree.insert(0, merge_groups(tree[0], sim, n))
    return tree


# --- how sure a tree is ---------------------------------------------------------------------------
class Choice(NamedTuple):
    """How sure a stage's partition is: see `stability`."""

    decided: bool
    agreement: float  # share of the resamples with the same partition

    def __str__(self) -> str:
        share = f"{100 * self.agreement:.0f} % of resamples agree"
        return share if self.decided else f"undecided: {share}"


def next_best(tree: Sequence[Partition], stage: int, sim: np.ndarray) -> Partition | None:
    """What the search would have taken, had there not been tree[stage]; None without a choice.

    In the last stage the second best partition. Earlier, Algorithm 1's best end when it begins
    with any other pair: for one merge, the pair that scores second.
    """
    chosen = tree[stage]
    if stage == len(tree) - 1:
        others = best_partitions(sim, len(chosen), 2)
    else:
        others = [merge_groups(p, sim, len(chosen)) for p in merged_pairs(tree[stage + 1])
                  if len(p) >= len(chosen)]
    return max((p for p in others if p != chosen), key=lambda p: score(p, sim), default=None)


def stability(tree: Sequence[Partition], samples: np.ndarray,
              resamples: int = 200) -> list[Choice | None]:
    """For each stage of build_tree(mean of `samples`), how sure its partition is.

    samples: (N, T, T), each example's similarities, NaN where it says nothing of a pair. A
    bootstrap over examples: N are drawn with replacement, the same draws whenever N is the same,
    and the tree is built again from their mean. `agreement` is the share of draws that give the
    stage the same partition. It is `decided` when its score leads that of the next best by more
    than two standard errors of the lead, its deviation over the draws (one would call decided what
    other images and decoders change, on five tasks of rooms in a seed of ten); never where a pair
    has a single example. None for a stage that had no choice.
    """
    N, known = len(samples), ~np.isnan(samples)
    sim = np.nansum(samples, 0) / known.sum(0)
    times = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), resamples)  # (draws, N)
    counts = np.tensordot(times, known, 1)  # (draws, T, T)
    sims = np.tensordot(times, np.nan_to_num(samples), 1) / counts.clip(1)
    sims = np.where(counts, sims, sim)  # a pair that a draw has no example of keeps its mean
    trees = [build_tree(s, [len(partition) for partition in tree]) for s in sims]
    found = []
    for stage, chosen in enumerate(tree):
        other = next_best(tree, stage, sim)
        if other is None:
            found.append(None)
            continue
        leads = [score(chosen, s) - score(other, s) for s in (sim, *sims)]
        error = np.std(leads[1:]) if known.sum(0).min() > 1 else np.inf
        found.append(Choice(bool(leads[0] > 2 * error),
                            float(np.mean([t[stage] == chosen for t in trees]))))
    return found


# --- trees: checked, followed, written ------------------------------------------------------------
def check_tree(tree: Sequence[Partition], num_tasks: int) -> None:
    """Raise ValueError unless every stage covers all tasks once and lies inside the one before."""
    for i, partition in enumerate(tree, 1):
        if (sorted(t for group in partition for t in group) != list(range(num_tasks))
                or () in partition):
            raise ValueError(f"tree: stage {i} must hold each of the {num_tasks} tasks exactly "
                             "once, and no empty group")
        if i > 1:
            parents(tree[i - 2], partition)


def parents(before: Partition, after: Partition) -> list[int]:
    """For each group of a stage, the index of the group of the stage before that contains it."""
    index = []
    for group in after:
        containing = [i for i, larger in enumerate(before) if set(group) <= set(larger)]
        if not containing:
            raise ValueError(f"tree: not nested: tasks {group} share a group, but did not in the "
                             "stage before; groups may split from stage to stage and never merge")
        index += containing
    return index


def routing(tree: Sequence[Partition]) -> tuple[list[list[int]], list[list[int]]]:
    """How features travel through a tree: `parents` and `group_of`.

    parents[stage][group] is the group of the stage before that it branches off (0, the image, in
    the first stage); group_of[task][stage] is the group whose features the task's decoder reads.
    """
    tasks = sorted(task for group in tree[0] for task in group)
    stages = [[tuple(tasks)], *tree]
    return ([parents(before, after) for before, after in zip(stages, tree)],
            [[next(g for g, group in enumerate(partition) if task in group) for partition in tree]
             for task in tasks])


def format_tree(tree: Sequence[Partition], names: Sequence[str],
                choices: Sequence[Choice | None] = ()) -> str:
    """The tree as text, a line a stage: `stage 3   {semseg, depth} {normals}   98 % of ...`."""
    lines = []
    for i, (partition, choice) in enumerate(zip_longest(tree, choices), 1):
        groups = " ".join("{" + ", ".join(names[t] for t in g) + "}" for g in partition)
        lines.append(f"stage {i}   {groups}" + (f"   {choice}" if choice else ""))
    return "\n".join(lines)


def name_tree(tree: Sequence[Partition], names: Sequence[str]) -> list[list[list[str]]]:
    """The tree with tasks' names for their indices, as it is saved."""
    return [[[names[t] for t in group] for group in partition] for partition in tree]


def read_tree(path: str | Path, names: Sequence[str]) -> list[Partition]:
    """The tree of a file {"tree": [[["semseg", "depth"], ["normals"]], ...]}, checked."""
    if not Path(path).is_file():  # nor a FIFO, which would be waited for
        raise ValueError(f"tree: cannot read {path}: there is no such file")
    try:
        stages = json.loads(Path(path).read_text())["tree"]
        index = {name: t for t, name in enumerate(names)}
        unknown = {name for stage in stages for group in stage for name in group} - set(index)
        tree = [sorted(tuple(sorted(index[name] for name in group if name in index))
                       for group in stage) for stage in stages]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'tree: {path} is not {{"tree": [for each stage, [for each group, [names '
                         'of tasks]]]}') from error
    if unknown:
        raise ValueError(f"tree: {path} is for other tasks: {', '.join(sorted(map(str, unknown)))} "
                         f"not among {', '.join(names)}")
    try:
        check_tree(tree, len(names))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tree
