"""How reliable is the tree? Different example images would give different similarities, and perhaps
different groups.

The similarities are means over N examples. To imitate a new set of images, the bootstrap draws N of
these examples with replacement (a resample), recomputes the means and rebuilds the tree. The
agreement of a stage is the share of resamples in which the stage keeps its groups.

    for choice in stability(tree, similarity.samples):      # from similarity.task_similarity
        print(choice)                                       # decided (99.8 % of resamples agree)

A stage is called decided if at least 99.5 % of the resamples agree, and every pair of tasks has at
least 10 examples. In simulations, fewer than one tree in twenty had a decided stage that was wrong
(docs/CHOICES.md has the table). The bootstrap is our addition to the paper. It does not show how
much the tree depends on the decoders; for that, try other seeds.

N is the number of examples, T the number of tasks. A tree is a list with one partition per stage
(grouping.py).
Reference: Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grouping import Partition, build_tree

DECIDED = 0.995         # share of the resamples that must agree
MIN_EXAMPLES = 10       # for each pair of tasks; with fewer, resamples may agree by chance


class Choice(NamedTuple):
    """The verdict on the groups of one stage; see `stability`."""

    decided: bool
    agreement: float        # share of the resamples in which the stage keeps its groups

    def __str__(self) -> str:
        if self.decided:
            return f"decided ({100 * self.agreement:.1f} % of resamples agree)"
        if self.agreement >= DECIDED:
            return f"not decided (some pair of tasks has fewer than {MIN_EXAMPLES} examples)"
        return f"not decided ({100 * self.agreement:.1f} % of resamples agree)"


def stability(tree: Sequence[Partition], samples: np.ndarray,
              resamples: int = 400) -> list[Choice | None]:
    """One Choice for each stage of the tree, or None for a stage that had no choice.

    A stage has no choice if it has one group, or as many groups as the next stage (for the last
    stage: as many groups as there are tasks). For a given N, the random draws are the same in every
    call, whatever the order of the tasks.

    Args:
        tree: the tree that `build_tree` gives for the mean of `samples`.
        samples: (N, T, T), the similarities of each example; NaN where a label is missing.
        resamples: number of resamples. For five tasks, each takes about a millisecond.
    """
    N = len(samples)
    groups = [len(partition) for partition in tree]
    count = (~np.isnan(samples)).sum(0)
    mean = np.nansum(samples, 0) / count
    enough = count.min() >= MIN_EXAMPLES

    rng = np.random.default_rng(0)
    agreeing = [0] * len(tree)
    for _ in range(resamples):
        drawn = samples[rng.integers(N, size=N)]
        drawn_count = (~np.isnan(drawn)).sum(0)
        drawn_mean = np.nansum(drawn, 0) / np.maximum(drawn_count, 1)
        # A pair of tasks without an example in this resample keeps its mean over all examples.
        drawn_mean = np.where(drawn_count > 0, drawn_mean, mean)
        for i, partition in enumerate(build_tree(drawn_mean, groups)):
            if partition == tree[i]:
                agreeing[i] += 1

    available = [*groups[1:], len(mean)]    # groups that a stage can merge; in the last one, tasks
    choices = []
    for num_groups, at_most, agree in zip(groups, available, agreeing):
        choice = None
        if 1 < num_groups < at_most:
            agreement = agree / resamples
            choice = Choice(bool(enough and agreement >= DECIDED), agreement)
        choices.append(choice)
    return choices
