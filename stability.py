"""How sure is a task tree? The similarities are means over examples: others would give others.

    for choice in stability(tree, found.samples):      # found: similarity.task_similarity's
        print(choice)                                  # "undecided: 62 % of resamples agree"

Shapes: N examples, S stages, T tasks. A tree is a list of one partition a stage (grouping.py).
References: Efron, Bootstrap Methods, 1979; docs/CHOICES.md, choice 4.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from grouping import Partition, best_partitions, build_tree, merge_groups, score


class Choice(NamedTuple):
    """How sure a stage's partition is: see `stability`."""

    decided: bool
    agreement: float  # share of the resamples with the same partition

    def __str__(self) -> str:
        share = f"{100 * self.agreement:.0f} % of resamples agree"
        return share if self.decided else f"undecided: {share}"


def merged_pairs(partition: Partition) -> list[Partition]:
    """What `partition` becomes when two of its groups are merged, each two in turn."""
    return [sorted([g for g in partition if g not in (a, b)] + [tuple(sorted(a + b))])
            for a, b in combinations(partition, 2)]


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
              resamples: int | None = None) -> list[Choice | None]:
    """For each stage of build_tree(mean of `samples`), how sure its partition is.

    samples: (N, T, T), each example's similarities, NaN where it says nothing of a pair; or, where
    stages have their own, (N, S, T, T). A bootstrap over examples: N are drawn with replacement,
    the same draws whenever N is the same, and the tree is built again from their mean. `agreement`
    is the share of draws that give the stage the same partition. It is `decided` when its score
    leads that of the next best by more than two standard errors of the lead, its deviation over the
    draws (one would call decided what other images and decoders change, on five tasks of rooms in a
    seed of ten); never where a pair has a single example. None for a stage that had no choice.
    """
    N, S, T = len(samples), len(tree), samples.shape[-1]
    resamples = resamples or (200 if T <= 10 else 20)  # each is a search, of seconds for 15 tasks
    samples = samples.reshape(N, -1, T, T)  # of the one matrix, or of each stage's
    known = ~np.isnan(samples)
    sim = np.nansum(samples, 0) / known.sum(0)
    times = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), resamples)  # (draws, N)
    counts = np.tensordot(times, known, 1)  # (draws, 1 or S, T, T)
    sims = np.tensordot(times, np.nan_to_num(samples), 1) / counts.clip(1)
    sims = np.where(counts, sims, sim)  # a pair that a draw has no example of keeps its mean
    trees = [build_tree(s, [len(partition) for partition in tree]) for s in sims]
    found = []
    for stage, chosen in enumerate(tree):
        own = np.broadcast_to([sim, *sims], (1 + resamples, S, T, T))[:, stage]
        other = next_best(tree, stage, own[0])
        if other is None:
            found.append(None)
            continue
        leads = [score(chosen, s) - score(other, s) for s in own]
        error = np.std(leads[1:]) if known.sum(0).min() > 1 else np.inf
        found.append(Choice(bool(leads[0] > 2 * error),
                            float(np.mean([t[stage] == chosen for t in trees]))))
    return found
