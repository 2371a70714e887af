"""Which tasks share an adapter: partitions, their score, and the task tree.

A group's tasks are scored by their mean similarity to the others in it (eq. 5), a partition by
the sum over all tasks (eq. 6). The last stage takes the best partition into its number of groups;
each earlier stage merges groups of the one after it (Algorithm 1), so the tree is nested: tasks
that part never meet again. Up to 15 tasks the best partition is found exactly, of more nearly.

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

import numpy as np

Partition = list[tuple[int, ...]]
EXACT = 15     # tasks; the exact search takes three times as long for each one more, and memory
RESTARTS = 20  # of the search beyond; 200 tasks into 20 groups take 5 seconds


def score(partition: Partition, sim: np.ndarray) -> float:
    """Affinity of a partition: each task's mean similarity to its group, summed (eq. 5 and 6)."""
    return float(sum(sum(sim[t, u] for t in group for u in group if u != t) / (len(group) - 1)
                     for group in partition if len(group) > 1))


def best_partition(sim: np.ndarray, num_groups: int) -> Partition:
    """The partition of T tasks into `num_groups` with the highest score, exactly.

    sim: (T, T). The paper searches by branch and bound; here, a recursion that remembers: the best
    split of some tasks is some group around the first of them, beside the best split of the tasks
    that are left. About 3^T steps, whatever the similarities: seconds for 15 tasks; of more,
    `near_best`, unless all or none share a group: `search_name` says which.
    Of equal partitions, the first wins that keeps early tasks together. Raises ValueError unless
    1 <= num_groups <= T, and where a pair's similarity is unknown.
    """
    return best_partitions(sim, num_groups, 1)[0]


def search_name(num_tasks: int, num_groups: int) -> str:
    """What `best_partition` finds of so many: "exact" or "near-optimal"."""
    return "exact" if num_tasks <= EXACT or num_groups in (1, num_tasks) else "near-optimal"


def best_partitions(sim: np.ndarray, num_groups: int, how_many: int) -> list[Partition]:
    """The `how_many` best of them, or as many as there are, best first; see `best_partition`.

    Beyond the exact search two at most: the second is the first's best `neighbour`.
    """
    both = pair_sums(sim)
    T = len(both)
    if not 1 <= num_groups <= T:
        raise ValueError(f"{T} tasks do not fit into {num_groups} groups; expected 1 to {T}")
    if search_name(T, num_groups) != "exact":
        label = near_best(both, num_groups)
        found = [label, neighbour(label, both, num_groups)[1]]
        return [to_partition(label) for label in found[:how_many]]
    both_ways = both.tolist()  # Python's numbers: numpy's are slow one at a time

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


def pair_sums(sim: np.ndarray) -> np.ndarray:
    """sim[t, u] + sim[u, t] of every two tasks, (T, T), 0 on the diagonal; checks `sim`."""
    sim = np.asarray(sim, dtype=float)
    if sim.ndim != 2 or len(sim) != sim.shape[1]:
        raise ValueError(f"similarity must be a finite square matrix, got shape {sim.shape}")
    for t, u in np.argwhere(~np.isfinite(sim))[:1]:
        raise ValueError(f"similarity must be a finite square matrix; that of tasks {t} and {u} is "
                         f"{sim[t, u]}: what is unknown is not 0, and no tree follows from it")
    both = sim + sim.T
    np.fill_diagonal(both, 0)
    return both


def affinities(within: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Eq. 5, summed over a group, of many groups: the sums of their pairs, how many tasks."""
    return np.where(size > 1, within / np.maximum(size - 1, 1), 0)


def merge_groups(partition: Partition, sim: np.ndarray, num_groups: int) -> Partition:
    """Algorithm 1: merge the two groups whose union scores best, until `num_groups` are left.

    The paper's search starts from score 0 and so finds nothing when every similarity is negative;
    this one starts from minus infinity. Of equal pairs the first wins.
    """
    if not 1 <= num_groups <= len(partition):
        raise ValueError(f"{len(partition)} groups cannot be merged into {num_groups}")
    partition, both = list(partition), pair_sums(sim)
    member = np.array([np.isin(range(len(both)), group) for group in partition], float)  # (G, T)
    while len(partition) > num_groups:
        size, between = member.sum(1), member @ both @ member.T
        within = between.diagonal() / 2
        own = affinities(within, size)
        gain = affinities(within[:, None] + within + between, size[:, None] + size)
        gain = np.round(gain - own[:, None] - own, 12)  # in score; equals are equal
        gain[np.tril_indices(len(gain))] = -np.inf  # each pair once
        a, b = divmod(int(gain.argmax()), len(gain))
        partition[a] = tuple(sorted(partition[a] + partition.pop(b)))
        member[a] += member[b]
        member = np.delete(member, b, 0)
    return partition


# --- many tasks -----------------------------------------------------------------------------------
def near_best(both: np.ndarray, num_groups: int) -> np.ndarray:
    """Each task's group, (T,), in a partition that no move of a task and no swap of two improves.

    both: `pair_sums`. Begins with Algorithm 1 from single tasks, then RESTARTS times anywhere, at
    the same places whenever it is asked; of all ends the best.
    """
    T, rng = len(both), np.random.default_rng(0)
    merged = merge_groups([(t,) for t in range(T)], both, num_groups)
    starts = [np.array([next(g for g, group in enumerate(merged) if t in group)
                        for t in range(T)])]
    for _ in range(RESTARTS):  # no group is empty
        anywhere = rng.integers(num_groups, size=T - num_groups)
        starts.append(rng.permutation(np.concatenate([np.arange(num_groups), anywhere])))
    ends = []
    for label in starts:
        gain = np.inf
        while gain > 1e-12 * np.abs(both).sum():  # rounding would go in circles
            end, (gain, label) = label, neighbour(label, both, num_groups)
        ends.append(end)
    return max(ends, key=lambda label: score(to_partition(label), both))


def neighbour(label: np.ndarray, both: np.ndarray, num_groups: int) -> tuple[float, np.ndarray]:
    """The best that moving one task or swapping two makes of a partition: its gain in score, and
    each task's group (T,)."""
    member = np.eye(num_groups)[label]  # (T, G)
    to = both @ member                  # (T, G): of each task and group, the sum of its pairs
    size, within = member.sum(0), (to * member).sum(0) / 2
    old = affinities(within, size)
    left = within[label] - to[np.arange(len(label)), label]  # (T,): what each task leaves behind
    leave = affinities(left, size[label] - 1) - old[label]
    move = leave[:, None] + affinities(within + to, size + 1) - old  # (T, G)
    move[size[label] == 1] = -np.inf    # no group may be empty
    move[member > 0] = -np.inf
    swap = affinities(left[:, None] + to[:, label].T - both, size[label][:, None])
    swap = swap - old[label][:, None]   # (T, T): of row's group, with column's task in its place
    swap = swap + swap.T
    swap[label[:, None] == label] = -np.inf
    better = label.copy()
    if move.max() >= swap.max():
        t, better[t] = divmod(int(move.argmax()), num_groups)
    else:
        t, u = divmod(int(swap.argmax()), len(label))
        better[[t, u]] = label[[u, t]]
    return float(max(move.max(), swap.max())), better


def to_partition(label: np.ndarray) -> Partition:
    """Each task's group (T,) -> the groups."""
    return sorted(tuple(np.flatnonzero(label == g).tolist()) for g in set(label.tolist()))


# --- trees ----------------------------------------------------------------------------------------
def build_tree(sim: np.ndarray, groups_per_stage: Sequence[int],
               verbose: bool = False) -> list[Partition]:
    """One partition a stage, computed from the decoders down (4.4): best, then merged.

    sim: (T, T), or one a stage (S, T, T), by which that stage's groups are chosen;
    groups_per_stage: from the first stage to the last, never decreasing, at most T; verbose: print
    how the last stage's were searched.
    """
    groups = list(groups_per_stage)
    sims = np.broadcast_to(np.asarray(sim, dtype=float), (len(groups), *np.shape(sim)[-2:]))
    T = sims.shape[-1]
    if groups != sorted(groups) or groups[0] < 1 or groups[-1] > T:
        raise ValueError(f"groups {','.join(map(str, groups))} do not fit {T} tasks: expected one "
                         f"number a stage, never decreasing, from 1 to at most {T}")
    tree = [best_partition(sims[-1], groups[-1])]
    for n, own in zip(groups[-2::-1], sims[-2::-1]):
        tree.insert(0, merge_groups(tree[0], own, n))
    if verbose:
        print(f"tree: last stage {search_name(T, groups[-1])}, earlier ones merged")
    return tree


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


def format_tree(tree: Sequence[Partition], names: Sequence[str], choices: Sequence = ()) -> str:
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
