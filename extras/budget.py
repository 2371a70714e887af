"""Choose numbers of groups that fit a compute budget, and group hundreds of tasks.

The paper chooses the number of groups per stage by hand. `frontier` starts from the paper's numbers
and lets the stages give up one group each in turn, the most expensive stage first, until all tasks
share everything. The first candidate within the budget wins:

    python -m extras.budget --dataset pascal --budget-gmacs 40      # takes the flags of train.py

The exact search of grouping.py tries all partitions, which is possible for up to ten tasks.
`near_best_partition` improves random partitions step by step; 200 tasks take a few seconds:

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
    trainable: int      # the same for all candidates, because a stage's groups share one rank


def frontier(config: argparse.Namespace) -> list[Candidate]:
    """Numbers of groups for a run, from the paper's choice to 1,1,1,1, the most expensive first.

    config: the settings in recipes.py. The network is only measured once, with 1,1,1,1, because
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
    """The first candidate within the budget. Raises ValueError if even the last one is above it."""
    if not 0 < budget_gmacs < math.inf:
        raise ValueError(f"--budget-gmacs {budget_gmacs}: expected a finite positive number")
    for candidate in candidates:
        if candidate.gmacs <= budget_gmacs:
            return candidate
    raise ValueError(f"--budget-gmacs {budget_gmacs:g}: even if all tasks share everything, the "
                     f"network needs {candidates[-1].gmacs:.2f} GMACs; use a smaller --size or "
                     "--backbone")


def main(argv: list[str] | None = None) -> None:
    """Print the frontier, and the command that trains with the chosen groups."""
    parser = argparse.ArgumentParser(description="Choose the number of task groups per stage that "
                                     "fits a budget. All other flags are those of train.py.",
                                     allow_abbrev=False)
    parser.add_argument("--budget-gmacs", type=float, required=True, help="billions of "
                        "multiply-accumulates per image in linear and convolution layers, counted "
                        "as in table 3")
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
    """A partition into `num_groups` groups that no move of one task and no swap of two improves.

    sim: (T, T) similarities of tasks. The result is the best of RESTARTS local searches that start
    from random partitions. The seed is fixed, so every call gives the same result. For ten tasks
    it is almost always the optimum.
    Raises ValueError if num_groups is not between 1 and T, or if a similarity is not finite.
    """
    check_similarity(sim)
    T = len(sim)
    if not 1 <= num_groups <= T:
        raise ValueError(f"cannot split {T} tasks into {num_groups} groups; expected 1 to {T}")
    both = np.add(sim, np.transpose(sim))       # sim[t, u] + sim[u, t]: the score adds up both
    np.fill_diagonal(both, 0)
    rng = np.random.default_rng(0)
    results = []
    for _ in range(RESTARTS):
        anywhere = rng.integers(num_groups, size=T - num_groups)
        group_of = np.concatenate([np.arange(num_groups), anywhere])    # no group is empty
        group_of = climb(rng.permutation(group_of), both, num_groups)
        results.append(to_partition(group_of))
    values = np.asarray(sim).tolist()           # Python's numbers are faster one at a time
    return max(results, key=lambda partition: score(partition, values))


def climb(group_of: np.ndarray, both: np.ndarray, num_groups: int) -> np.ndarray:
    """Take the best move or swap until none improves the score. group_of (T,) -> (T,)."""
    # A gain below this is a rounding error, and following it could lead in circles.
    rounding = 1e-12 * np.abs(both).sum()
    while True:
        gain, better = best_neighbour(group_of, both, num_groups)
        if gain <= rounding:
            return group_of
        group_of = better


def best_neighbour(group_of: np.ndarray, both: np.ndarray,
                   num_groups: int) -> tuple[float, np.ndarray]:
    """The best partition that is one move or one swap away.

    both: (T, T), the similarities of each pair in both directions added up, 0 on the diagonal.
    Returns (gain in score, group_of (T,)).
    """
    member = np.eye(num_groups)[group_of]                   # (T, G), one-hot
    size = member.sum(0)                                    # (G,)
    links = both @ member                                   # (T, G): of a task to a group
    pairs = (links * member).sum(0) / 2                     # (G,): of all pairs in a group
    old = affinity(pairs, size)                             # (G,)
    own_links = (links * member).sum(1)                     # (T,)
    rest = pairs[group_of] - own_links                      # (T,): pairs of t's group without t

    leave = affinity(rest, size[group_of] - 1) - old[group_of]      # (T,)
    join = affinity(pairs + links, size + 1) - old                  # (T, G)
    move = leave[:, None] + join                                    # (T, G): gain
    move[size[group_of] == 1] = -np.inf                             # no group may become empty
    move[member > 0] = -np.inf                                      # and it must be another group

    replaced = rest[:, None] + links[:, group_of].T - both          # (T, T): u in the place of t
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
    """Scores of groups (eq. 5, summed over their tasks).

    pairs: for each group, the sum of `both` over its pairs of tasks; size: its number of tasks.
    """
    return np.where(size > 1, pairs / np.maximum(size - 1, 1), 0)


def to_partition(group_of: np.ndarray) -> Partition:
    """The group of each task, (T,) -> the groups as sorted tuples of tasks."""
    groups = [np.flatnonzero(group_of == g) for g in np.unique(group_of)]
    return sorted(tuple(group.tolist()) for group in groups)


if __name__ == "__main__":
    main()
