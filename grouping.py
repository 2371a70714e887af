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
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations, zip_longest
from pathlib import Path

import numpy as np

Partition = list[tuple[int, ...]]
MAX_TASKS = 10      # limit of the exact search, which takes half a second for ten tasks


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

    The paper uses branch and bound. For up to ten tasks we can simply try every partition.

    Args:
        sim: (T, T) similarities of tasks.
    Raises:
        ValueError: if num_groups is not between 1 and T; if there are more than ten tasks and
            num_groups is neither 1 nor T; or if sim is not a square matrix of finite numbers.
    """
    check_similarity(sim)
    T = len(sim)
    if not 1 <= num_groups <= T:
        raise ValueError(f"cannot split {T} tasks into {num_groups} groups; expected 1 to {T}")
    if num_groups == 1:
        return [tuple(range(T))]
    if num_groups == T:
        return [(t,) for t in range(T)]
    if T > MAX_TASKS:
        raise ValueError(f"the exact search over partitions handles up to {MAX_TASKS} tasks, got "
                         f"{T}; use extras.budget.near_best_partition, or one group per task in "
                         "the last stage, which needs no search")
    values = np.asarray(sim).tolist()       # lists are faster to read from than arrays
    candidates = [p for p in partitions(range(T)) if len(p) == num_groups]
    return max(candidates, key=lambda p: score(p, values))


def merge_groups(partition: Partition, sim: np.ndarray, num_groups: int) -> Partition:
    """Algorithm 1: repeatedly merge the pair of groups whose union gives the best score.

    Stops when `num_groups` groups are left.

    Trap: the paper's search starts from score 0, so it returns nothing when all similarities are
    negative. `max` has no such limit, and takes the first if several tie. Raises ValueError if
    num_groups is not between 1 and the number of groups, or if sim is not a square matrix of finite
    numbers.
    """
    check_similarity(sim)
    if not 1 <= num_groups <= len(partition):
        raise ValueError(f"cannot merge {len(partition)} groups into {num_groups}; expected 1 to "
                         f"{len(partition)}")
    while len(partition) > num_groups:
        candidates = [merged(partition, a, b) for a, b in combinations(partition, 2)]
        partition = max(candidates, key=lambda p: score(p, sim))
    return partition


def merged(partition: Partition, a: tuple[int, ...], b: tuple[int, ...]) -> Partition:
    """`partition` with its groups `a` and `b` merged into one."""
    others = [group for group in partition if group not in (a, b)]
    union = tuple(sorted(a + b))
    return sorted([*others, union])


def check_similarity(sim: np.ndarray) -> None:
    """Raise ValueError unless `sim` is a square matrix of finite numbers."""
    sim = np.asarray(sim, dtype=float)
    if sim.ndim != 2 or len(sim) != sim.shape[1]:
        raise ValueError(f"similarity: expected a square matrix (T, T), got shape {sim.shape}")
    for t, u in np.argwhere(~np.isfinite(sim)):
        raise ValueError(f"similarity of tasks {t} and {u} is {sim[t, u]}; expected a finite "
                         "number: without it, no tree can be computed")


# --- trees ----------------------------------------------------------------------------------------
def build_tree(sim: np.ndarray, groups_per_stage: Sequence[int],
               search: Callable[[np.ndarray, int], Partition] = best_partition) -> list[Partition]:
    """One partition per stage, computed from the last stage to the first (section 4.4).

    Args:
        sim: (T, T) similarities of tasks.
        groups_per_stage: number of groups, from the first stage to the last; never decreasing,
            because groups only split on the way to the decoders.
        search: finds the last stage's partition; for more than ten tasks, use
            extras.budget.near_best_partition.
    Raises:
        ValueError: if groups_per_stage does not fit the tasks, or if `search` raises it.
    """
    groups = list(groups_per_stage)
    if groups != sorted(groups) or groups[0] < 1 or groups[-1] > len(sim):
        listed = ",".join(map(str, groups))
        raise ValueError(f"groups {listed} do not fit {len(sim)} tasks: expected one number per "
                         f"stage, each from 1 to {len(sim)} and never decreasing")
    partition = search(sim, groups[-1])
    tree = [partition]
    for num_groups in reversed(groups[:-1]):
        partition = merge_groups(partition, sim, num_groups)
        tree.insert(0, partition)
    return tree


def uneven_tree(num_tasks: int, groups_per_stage: Sequence[int]) -> list[Partition]:
    """A tree for counting costs before any similarity is known.

    With G groups, the first T - G + 1 tasks share a group and every other task has its own group.
    """
    tree = []
    for num_groups in groups_per_stage:
        shared = num_tasks - num_groups + 1
        singles = [(t,) for t in range(shared, num_tasks)]
        tree.append([tuple(range(shared)), *singles])
    return tree


def check_tree(tree: Sequence[Partition], num_tasks: int) -> None:
    """Raise ValueError if a stage lacks or repeats a task, has an empty group, or merges groups."""
    for i, partition in enumerate(tree):
        members = sorted(t for group in partition for t in group)
        if members != list(range(num_tasks)) or () in partition:
            raise ValueError(f"tree: stage {i + 1} must hold each of the {num_tasks} tasks exactly "
                             "once, and no empty group")
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
    lines = []
    for i, (stage, choice) in enumerate(zip_longest(name_tree(tree, names), choices)):
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

    Raises a ValueError that names the file if it is missing or its content is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tree: cannot read {path}: there is no such file")
    index = {name: t for t, name in enumerate(names)}
    tree = []
    try:
        # utf-8-sig: some editors on Windows start files with a byte order mark
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        stages = content["tree"] if "tree" in content else None     # None: a TypeError
        for stage in stages:
            partition = [tuple(sorted(index[name] for name in group)) for group in stage]
            tree.append(sorted(partition))
    except KeyError as error:
        raise ValueError(f"{path}: unknown task {error}; expected the tasks {', '.join(names)}"
                         ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{path}: expected {{"tree": [for each stage, [for each group, '
                         "[names of tasks]]]}") from error
    try:
        check_tree(tree, len(names))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tree
