"""Which tasks share an adapter: partitions, their score, and the tree of task groups.

A partition splits the tasks into groups. The score of a task is its mean similarity to the other
tasks in its group, and the score of a partition is the sum over its tasks:

    S_t = 1 / (|group| - 1) * sum of sim(t, u) over the other tasks u of the group      (eq. 5)
    S_P = sum of S_t over all tasks; a task that is alone in its group scores 0         (eq. 6)

The tree is built from the last stage to the first. The last stage gets the best partition, and each
earlier stage merges groups of the stage after it (Algorithm 1). So on the way to the decoders,
groups only split.

    tree = build_tree(sim, (1, 1, 2, 3))        # sim: (T, T), from similarity.py
    print(format_tree(tree, ["semseg", "depth", "normals"]))

A tree is a list with one partition per stage. A partition is a list of tuples of task indices: each
tuple is sorted, and the tuples are ordered by their first task. T is the number of tasks.
Reference: arXiv 2509.19602, sections 3.3 and 4.4.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

Partition = list[tuple[int, ...]]


# --- one partition --------------------------------------------------------------------------------
def score(partition: Partition, sim: np.ndarray) -> float:
    """Score of a partition (eq. 5 and 6). sim: (T, T) similarities of tasks."""
    total = 0.0
    for group in partition:
        for t, u in permutations(group, 2):
            total += sim[t][u] / (len(group) - 1)
    return float(total)


def partitions(tasks: Sequence[int]) -> Iterator[Partition]:
    """Every way to split `tasks` into groups: 52 for five tasks, 115,975 for ten."""
    if not tasks:
        yield []
        return
    first, rest = tasks[0], tasks[1:]
    for partition in partitions(rest):
        yield [(first,), *partition]                            # alone
        for i, group in enumerate(partition):                   # or in one of the groups
            yield [(first, *group), *partition[:i], *partition[i + 1:]]


def best_partition(sim: np.ndarray, num_groups: int) -> Partition:
    """The partition into `num_groups` groups with the highest score; if several tie, the first.

    The paper uses branch and bound. Up to ten tasks, we simply try every partition. Above ten
    tasks, the result is only approximate: Algorithm 1, starting from single tasks.

    sim: (T, T) similarities of tasks. Raises ValueError if one of them is not finite.
    """
    if not np.isfinite(sim).all():
        raise ValueError("similarity: every pair of tasks needs a finite number; no tree can be "
                         "computed while a similarity is unknown")
    T = len(sim)
    if T > 10:
        singles = [(t,) for t in range(T)]
        return merge_groups(singles, sim, num_groups)
    candidates = [p for p in partitions(range(T)) if len(p) == num_groups]
    return max(candidates, key=lambda p: score(p, sim))


def merge_groups(partition: Partition, sim: np.ndarray, num_groups: int) -> Partition:
    """Algorithm 1: merge the pair of groups whose union gives the best score, again and again.

    Stops when `num_groups` groups are left. If several pairs tie, the first is merged.

    Pitfall: the paper's listing has two misprints. It starts from score 0, so it finds nothing if
    all similarities are negative; `max` has no such limit. And its line 6 merges groups of P, the
    partition at the start, where Q is meant, the partition after the merges so far. As printed, a
    second merge undoes the first.
    """
    while len(partition) > num_groups:
        candidates = [merged(partition, a, b) for a, b in combinations(partition, 2)]
        partition = max(candidates, key=lambda p: score(p, sim))
    return partition


def merged(partition: Partition, a: tuple[int, ...], b: tuple[int, ...]) -> Partition:
    """`partition` with its groups `a` and `b` merged into one."""
    others = [group for group in partition if group not in (a, b)]
    union = tuple(sorted(a + b))
    return sorted([*others, union])


# --- trees ----------------------------------------------------------------------------------------
def build_tree(sim: np.ndarray, groups_per_stage: Sequence[int]) -> list[Partition]:
    """One partition per stage, computed from the last stage to the first (section 4.4).

    Args:
        sim: (T, T) similarities of tasks.
        groups_per_stage: number of groups, from the first stage to the last; never decreasing,
            because groups only split on the way to the decoders.
    Raises:
        ValueError: if groups_per_stage does not fit the tasks, or a similarity is not finite.
    """
    groups = list(groups_per_stage)
    T = len(sim)
    if groups != sorted(groups) or groups[-1] > T:
        raise ValueError(f"groups {groups} do not fit {T} tasks: expected one number per stage, "
                         f"from 1 to {T} and never decreasing")
    partition = best_partition(sim, groups[-1])
    tree = [partition]
    for num_groups in reversed(groups[:-1]):
        partition = merge_groups(partition, sim, num_groups)
        tree.insert(0, partition)
    return tree


def check_tree(tree: Sequence[Partition], num_tasks: int) -> None:
    """Raise ValueError if a stage lacks or repeats a task, or if groups merge again."""
    for i, partition in enumerate(tree):
        members = sorted(t for group in partition for t in group)
        if members != list(range(num_tasks)):
            raise ValueError(f"tree: stage {i + 1} must hold each of the {num_tasks} tasks exactly "
                             "once")
        if i > 0:
            parents(tree[i - 1], partition)


def parents(before: Partition, after: Partition) -> list[int]:
    """For each group of a stage, the index of the group of the previous stage that contains it.

    Raises ValueError if no group of the previous stage contains a group of this one.
    """
    indices = []
    for group in after:
        containing = [i for i, larger in enumerate(before) if set(group) <= set(larger)]
        if not containing:
            raise ValueError(f"tree: not nested: tasks {group} (numbered from 0) share a group, "
                             "although the stage before separates them; groups may only split from "
                             "stage to stage, never merge")
        indices.append(containing[0])
    return indices


def routing(tree: Sequence[Partition]) -> tuple[list[list[int]], list[list[int]]]:
    """The paths that features take through a tree, as group indices.

    Returns:
        parents: for each stage and each of its groups, the index of the group of the previous
            stage whose features it reads; always 0 in the first stage, which reads the image.
        group_of: for each task and each stage, the index of the task's group.
    """
    num_tasks = sum(len(group) for group in tree[0])
    image = [tuple(range(num_tasks))]
    parents_of, group_of = [], [[] for _ in range(num_tasks)]
    for before, partition in zip([image, *tree], tree):
        parents_of.append(parents(before, partition))
        for g, group in enumerate(partition):
            for task in group:
                group_of[task].append(g)
    return parents_of, group_of


# --- trees as text and as files -------------------------------------------------------------------
def format_tree(tree: Sequence[Partition], names: Sequence[str], choices: Sequence = ()) -> str:
    """One line per stage: `stage 3   {semseg, depth} {normals}`.

    choices: for each stage, the Choice of stability.stability, or None. A Choice is written at the
    end of its stage's line.
    """
    choices = choices or [None] * len(tree)
    lines = []
    for i, (stage, choice) in enumerate(zip(name_tree(tree, names), choices)):
        groups = ["{" + ", ".join(group) + "}" for group in stage]
        line = f"stage {i + 1}   " + " ".join(groups)
        if choice is not None:
            line += f"   {choice}"
        lines.append(line)
    return "\n".join(lines)


def name_tree(tree: Sequence[Partition], names: Sequence[str]) -> list[list[list[str]]]:
    """The tree with task names instead of task indices, as in a saved file."""
    return [[[names[t] for t in group] for group in partition] for partition in tree]


def read_tree(path: str | Path, names: Sequence[str]) -> list[Partition]:
    """Read and check a saved tree: {"tree": [[["semseg", "depth"], ["normals"]], ...]}.

    Raises ValueError, with the path, if the file holds no tree of these tasks.
    """
    names = list(names)
    tree = []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for stage in content["tree"]:
            partition = [tuple(sorted(names.index(name) for name in group)) for group in stage]
            tree.append(sorted(partition))
        check_tree(tree, len(names))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no tree of the tasks {', '.join(names)}: {error}"
                         ) from error
    return tree
