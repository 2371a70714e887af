"""Tests of stability.py: its results equal those of a direct bootstrap, and stages are rarely
called decided if all tasks are equally similar."""

import numpy as np
import pytest

from grouping import build_tree
from stability import stability


def symmetric(x):
    """Mirror the upper triangles of x (..., T, T) across the diagonals, which are set to 0."""
    upper = np.triu(x, 1)
    return upper + upper.swapaxes(-1, -2)


def noisy(similarity, N, seed, deviation=0.15):
    """Similarities (N, T, T) of N examples: `similarity` (T, T) plus normally distributed noise."""
    rng = np.random.default_rng(seed)
    T = len(similarity)
    return symmetric(similarity + deviation * rng.standard_normal((N, T, T)))


def without_labels(samples, task, share, seed):
    """A copy of `samples` in which all similarities of `task` are NaN in a fraction `share` of the
    examples (on average), as if they had no label for it."""
    samples = samples.copy()
    missing = np.random.default_rng(seed).random(len(samples)) < share
    samples[missing, task] = samples[missing, :, task] = np.nan
    return samples


def test_agreement_equals_a_direct_bootstrap():
    """Agreements equal those of a plain bootstrap, which rebuilds the tree from each resample."""
    true = np.random.default_rng(5).uniform(0, 0.3, (5, 5))
    for seed, groups in enumerate([(1, 2, 4, 5), (2, 3, 3, 5)]):
        samples = without_labels(noisy(true, 30, seed), task=2, share=0.3, seed=seed)
        tree = build_tree(np.nanmean(samples, 0), groups)
        rng = np.random.default_rng(0)
        same = []
        for _ in range(400):
            drawn = [samples[i] for i in rng.integers(30, size=30)]
            again = build_tree(np.nanmean(drawn, 0), groups)
            same.append([again[stage] == tree[stage] for stage in range(4)])
        for stage, choice in enumerate(stability(tree, samples)):
            if choice is not None:
                assert choice.agreement == np.mean(same, 0)[stage]
                assert choice.decided == (choice.agreement >= 0.995)


def test_only_stages_with_a_choice_are_judged():
    """A stage is not judged if it has one group, one group per task, or as many groups as the next
    stage."""
    samples = noisy(np.zeros((5, 5)), 30, seed=0)
    for groups, judged in (((1, 2, 4, 5), [0, 1, 1, 0]), ((1, 2, 2, 5), [0, 0, 1, 0]),
                           ((1, 1, 2, 3), [0, 0, 1, 1]), ((2, 5, 5, 5), [1, 0, 0, 0]),
                           ((3, 3, 3, 3), [0, 0, 0, 1]), ((1, 1, 1, 1), [0, 0, 0, 0])):
        tree = build_tree(samples.mean(0), groups)
        choices = stability(tree, samples, resamples=3)
        assert [choice is not None for choice in choices] == [bool(x) for x in judged]


def test_a_pair_that_a_resample_lacks_keeps_its_mean():
    """If no example in a resample is labelled for both tasks of a pair, the pair keeps its mean
    over all examples."""
    samples = np.full((500, 3, 3), 0.1)
    samples[:, [0, 1], [1, 0]] = np.nan
    samples[3:13, [0, 1], [1, 0]] = 0.5
    tree = build_tree(np.nanmean(samples, 0), (1, 1, 2, 3))
    assert tree[2] == [(0, 1), (2,)]
    assert stability(tree, samples)[2] == (True, 1.0)
    samples[4:13, [0, 1], [1, 0]] = np.nan              # 37 % of the resamples lack the pair now
    assert stability(tree, samples)[2] == (False, 1.0)


def test_few_examples_decide_nothing():
    """If a pair has fewer than ten examples, stages are undecided even if all resamples agree."""
    true = np.zeros((3, 3))
    true[0, 1] = 1
    samples = noisy(true, 30, seed=0, deviation=0.01)
    tree = build_tree(samples.mean(0), (1, 1, 2, 3))
    for count, decided in ((10, True), (9, False)):
        samples[count:, [1, 2], [2, 1]] = np.nan
        choice = stability(tree, samples)[2]
        assert choice == (decided, 1.0)
    assert str(choice) == "not decided (some pair of tasks has fewer than 10 examples)"


def test_the_limit_is_99_5_percent():
    """A stage is decided at an agreement of exactly 99.5 %, and not at 99.0 %."""
    true = np.zeros((3, 3))
    true[0, 1] = 0.1
    for seed, words in ((0, "decided (99.5 % of resamples agree)"),
                        (8, "not decided (99.0 % of resamples agree)")):
        samples = noisy(true, 20, seed)
        tree = build_tree(samples.mean(0), (1, 1, 2, 3))
        assert str(stability(tree, samples, resamples=200)[2]) == words


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(1, 3, 4, 5), (1, 1, 2, 3)])
def test_equal_tasks_are_rarely_decided(groups):
    """If all true similarities are equal, at most 5 of 100 trees have a decided stage."""
    T, trees, wrong = groups[-1], 100, 0
    for seed in range(trees):
        samples = noisy(np.full((T, T), 0.2), 16, seed)
        choices = stability(build_tree(samples.mean(0), groups), samples)
        wrong += any(choice is not None and choice.decided for choice in choices)
    assert wrong <= 0.05 * trees
