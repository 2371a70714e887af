"""Choose numbers of groups that fit a compute budget, and group hundreds of tasks.

The paper lets a compute budget decide the number of groups per stage, but does not say how. Here,
`frontier` starts from the paper's numbers of groups, the first candidate. Then the stages take
turns giving up one group each, the most expensive stage first, until every stage has one group.
Each step gives another candidate, and `choose` takes the first candidate within the budget. The
command also takes the flags of train.py, except those that choose the groups, the tree or another
method:

    python -m extras.budget --dataset pascal --budget-gmacs 40

The exact search of grouping.py tries all partitions, which is feasible for up to ten tasks.
For more tasks, `near_best_partition` improves random partitions step by step. It takes a few
seconds for 200 tasks:

    tree = build_tree(sim, (1, 5, 10, 20), search=near_best_partition)

Shapes: T tasks, G groups.
References: arXiv 2509.19602, section 3.3 (partitions) and table 3 (MACs).
"""

import argparse
import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cost import ledger, module_macs, network
from grouping import Partition, check_similarity, score
from recipes import paper_groups, parse_arguments
from util import one_line_errors

RESTARTS = 20       # random partitions that the local search starts from


# --- a budget -------------------------------------------------------------------------------------
class Candidate(NamedTuple):
    """A number of groups for each stage, and the cost of a network with these groups."""

    groups: tuple[int, ...]
    gmacs: float        # for one image, as table 3 counts them
    trainable: int      # the same for all candidates: the groups of a stage split one rank


def frontier(config: argparse.Namespace) -> list[Candidate]:
    """All candidates for a run, the most expensive first: the paper's groups down to 1,1,1,1.

    config: the settings of a run (recipes.py). The MACs are only counted once, for 1,1,1,1, because
    a stage with G groups costs G times as much as with one group.
    """
    config = copy.copy(config)
    config.groups = (1, 1, 1, 1)
    model = network(config)
    trainable = ledger(model)["trainable"]
    outside, stages = 0, [0, 0, 0, 0]
    for path, (macs, _) in module_macs(model, config.size).items():
        if path.startswith("backbone.layers."):
            stages[int(path.split(".")[2])] += macs
        else:                                           # patch embedding and decoders
            outside += macs

    def candidate(groups: Sequence[int]) -> Candidate:
        macs = outside + np.dot(groups, stages)
        return Candidate(tuple(groups), float(macs) / 1e9, trainable)

    groups = list(paper_groups(len(config.tasks)))
    candidates = [candidate(groups)]
    dearest_first = sorted(range(4), key=stages.__getitem__, reverse=True)
    while max(groups) > 1:
        for stage in dearest_first:
            if groups[stage] > 1:
                groups[stage] -= 1
                candidates.append(candidate(groups))
    return candidates


def choose(candidates: Sequence[Candidate], budget_gmacs: float) -> Candidate:
    """The first candidate within the budget.

    Raises ValueError if the budget is not a positive finite number, or if every candidate costs
    more.
    """
    if not 0 < budget_gmacs < math.inf:
        raise ValueError(f"--budget-gmacs {budget_gmacs}: expected a finite positive number")
    for candidate in candidates:
        if candidate.gmacs <= budget_gmacs:
            return candidate
    raise ValueError(f"--budget-gmacs {budget_gmacs:g}: even with one group in every stage, the "
                     f"network needs {candidates[-1].gmacs:.2f} GMACs; raise the budget, or use a "
                     "smaller --size or --backbone")


def main(argv: list[str] | None = None) -> None:
    """Print all candidates, and the command that trains with the chosen groups."""
    parser = argparse.ArgumentParser(description="Choose a number of task groups for each "
                                     "stage, so that the network fits a compute budget. All flags "
                                     "of train.py are accepted except --groups, --tree and "
                                     "--method.",
                                     allow_abbrev=False)
    parser.add_argument("--budget-gmacs", type=float, required=True, help="billions of "
                        "multiply-accumulates that one image may need in linear and convolution "
                        "layers (counted as in table 3 of arXiv 2509.19602)")
    parser.add_argument("--groups", help=argparse.SUPPRESS)
    parser.add_argument("--tree", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args(argv)
    with one_line_errors():
        config = parse_arguments(flags)
        if options.groups or options.tree or config.method != "tglora":
            raise ValueError("a budget chooses the groups of --method tglora; leave out --groups, "
                             "--tree and --method")
        candidates = frontier(config)
        chosen = choose(candidates, options.budget_gmacs)
    print(f"{'groups':<12}{'GMACs':>8}{'trained':>14}")
    for candidate in candidates:
        groups, gmacs, trainable = candidate
        mark = "  <- chosen" if candidate == chosen else ""
        print(f"{listed(groups):<12}{gmacs:8.2f}{trainable:14,}{mark}")
    print("python train.py " + " ".join([*flags, "--groups", listed(chosen.groups)]))


def listed(groups: Sequence[int]) -> str:
    return ",".join(map(str, groups))


# --- many tasks -----------------------------------------------------------------------------------
def near_best_partition(sim: np.ndarray, num_groups: int) -> Partition:
    """A partition into `num_groups` groups that no move of a task or swap of two tasks improves.

    sim: (T, T) similarities of tasks. The result is the best of RESTARTS local searches that start
    from random partitions. The seed is fixed, so the same arguments always give the same result. A
    test with seven tasks checks that at least 99 of 100 results are optimal.
    Raises ValueError if num_groups is not between 1 and T, or if sim is not a square matrix of
    finite numbers.
    """
    check_similarity(sim)
    T = len(sim)
    if not 1 <= num_groups <= T:
        raise ValueError(f"cannot split {T} tasks into {num_groups} groups; expected 1 to {T}")
    both = np.add(sim, np.transpose(sim))       # the score adds up sim[t, u] and sim[u, t]
    np.fill_diagonal(both, 0)
    rng = np.random.default_rng(0)
    results = []
    for _ in range(RESTARTS):
        anywhere = rng.integers(num_groups, size=T - num_groups)
        group_of = np.concatenate([np.arange(num_groups), anywhere])    # no group starts empty
        group_of = climb(rng.permutation(group_of), both, num_groups)
        results.append(to_partition(group_of))
    values = np.asarray(sim).tolist()           # lists are faster to read from than arrays
    return max(results, key=lambda partition: score(partition, values))


def climb(group_of: np.ndarray, both: np.ndarray, num_groups: int) -> np.ndarray:
    """Make the best move or swap, again and again, until none improves the score.

    group_of: (T,), the group of each task. both: see `best_neighbour`. Returns the new group_of.
    """
    # A smaller gain may be a rounding error, and following it could lead to an endless loop.
    rounding = 1e-12 * np.abs(both).sum()
    while True:
        gain, better = best_neighbour(group_of, both, num_groups)
        if gain <= rounding:
            return group_of
        group_of = better


def best_neighbour(group_of: np.ndarray, both: np.ndarray,
                   num_groups: int) -> tuple[float, np.ndarray]:
    """The best partition that is one move of a task, or one swap of two tasks, away from group_of.

    group_of: (T,), the group of each task.
    both: (T, T), the sum of `sim` and its transpose, with 0 on the diagonal.
    Returns the gain in score and the new group_of (T,).
    """
    member = np.eye(num_groups)[group_of]                   # (T, G), one-hot
    size = member.sum(0)                                    # (G,)
    # links[t, g] sums both[t, u] over the tasks u of group g; pairs[g] sums `both` over g's pairs.
    links = both @ member                                   # (T, G)
    pairs = (links * member).sum(0) / 2                     # (G,)
    old = affinity(pairs, size)                             # (G,): score of each group
    own_links = (links * member).sum(1)                     # (T,)
    rest = pairs[group_of] - own_links                      # (T,): `pairs` of t's group without t

    leave = affinity(rest, size[group_of] - 1) - old[group_of]      # (T,)
    join = affinity(pairs + links, size + 1) - old                  # (T, G)
    move = leave[:, None] + join                                    # (T, G): gain
    move[size[group_of] == 1] = -np.inf                             # no group may become empty
    move[member > 0] = -np.inf                                      # a move must change the group

    # replaced[t, u]: the value of `pairs` for t's group after u has taken the place of t.
    replaced = rest[:, None] + links[:, group_of].T - both          # (T, T)
    swap = affinity(replaced, size[group_of][:, None]) - old[group_of][:, None]
    swap = swap + swap.T                                            # (T, T): gain
    swap[group_of[:, None] == group_of] = -np.inf

    better = group_of.copy()
    if move.max() >= swap.max():
        task, group = np.unravel_index(move.argmax(), move.shape)
        better[task] = group
    else:
        task, other = np.unravel_index(swap.argmax(), swap.shape)
        better[task], better[other] = group_of[other], group_of[task]
    return float(max(move.max(), swap.max())), better


def affinity(pairs: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The score of each group: eq. 5, summed over the group's tasks.

    pairs: for each group, the sum of sim[t, u] + sim[u, t] over its pairs of tasks. size: the
    number of tasks in each group.
    """
    return np.where(size > 1, pairs / np.maximum(size - 1, 1), 0)


def to_partition(group_of: np.ndarray) -> Partition:
    """Convert `group_of` (T,), each task's group number, to a sorted list of sorted tuples."""
    groups = [np.flatnonzero(group_of == g) for g in np.unique(group_of)]
    return sorted(tuple(group.tolist()) for group in groups)


if __name__ == "__main__":
    main()
