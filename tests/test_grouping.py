"""grouping.py against brute force, and on published similarities."""

import numpy as np
import pytest

from grouping import (best_partition, build_tree, check_tree, format_tree, merge_groups, parents,
                      score)

# Gradient cosines on Taskonomy, five tasks: s d n k e.
S, D, N, K, E = range(5)
PUBLISHED = np.zeros((5, 5))
for (a, b), value in {(S, D): .25957, (S, N): .24237, (S, K): .05406, (S, E): .08864,
                      (D, N): .91158, (D, K): .09153, (D, E): .15646, (N, K): .14588,
                      (N, E): .28014, (K, E): 2.96808}.items():
    PUBLISHED[a, b] = PUBLISHED[b, a] = value


def partitions(items):
    """All set partitions, the slow and obvious way."""
    if not items:
        yield []
        return
    head, *tail = items
    for rest in partitions(tail):
        yield [[head], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [head, *rest[i]], *rest[i + 1:]]


def random_matrices(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        T = int(rng.integers(1, 8))
        m = rng.normal(-0.5 if i % 3 == 0 else 0.2, 1, (T, T))
        yield (m + m.T) / 2, int(rng.integers(1, T + 1))


def test_best_partition_equals_brute_force():
    """200 random symmetric matrices, up to 7 tasks, negative similarities included."""
    for sim, groups in random_matrices(200, seed=0):
        found = best_partition(sim, groups)
        best = max(score(p, sim) for p in partitions(list(range(len(sim)))) if len(p) == groups)
        assert len(found) == groups
        assert sorted(sum(found, ())) == list(range(len(sim)))
        assert score(found, sim) == pytest.approx(best)


def test_published_matrix():
    """Into 2: {s,d,n}{k,e}, 7.3497; into 3: {s}{d,n}{k,e}, 7.7593."""
    two, three = best_partition(PUBLISHED, 2), best_partition(PUBLISHED, 3)
    assert two == [(S, D, N), (K, E)] and score(two, PUBLISHED) == pytest.approx(7.3497, abs=5e-5)
    assert three == [(S,), (D, N), (K, E)]
    assert score(three, PUBLISHED) == pytest.approx(7.7593, abs=5e-5)


def test_merging_works_with_negative_similarities():
    """Algorithm 1 as printed would return nothing here; ours always returns a partition."""
    for sim, groups in random_matrices(50, seed=1):
        sim = -np.abs(sim)
        merged = merge_groups([(t,) for t in range(len(sim))], sim, groups)
        assert len(merged) == groups and sorted(sum(merged, ())) == list(range(len(sim)))


def test_merging_takes_the_best_pair_and_the_first_of_equals():
    """Greedy by score; a tie goes to the first pair in order."""
    singles = [(t,) for t in range(5)]
    assert merge_groups(singles, PUBLISHED, 4) == [(S,), (D,), (N,), (K, E)]
    assert merge_groups(singles, PUBLISHED, 3) == [(S,), (D, N), (K, E)]
    assert merge_groups([(0,), (1,), (2,)], np.zeros((3, 3)), 2) == [(0, 1), (2,)]
    assert best_partition(np.zeros((3, 3)), 2) == [(0, 1), (2,)]


def test_trees_are_nested_and_read_as_text():
    """From the decoders down, each stage inside the one before."""
    for sim, _ in random_matrices(30, seed=2):
        T = len(sim)
        tree = build_tree(sim, sorted((1, 1, min(2, T), T)))
        check_tree(tree, T)
        assert [len(p) for p in tree] == sorted((1, 1, min(2, T), T))
    tree = build_tree(PUBLISHED, (1, 2, 3, 5))
    assert format_tree(tree, "sdnke") == ("stage 1   {s, d, n, k, e}\nstage 2   {s, d, n} {k, e}\n"
                                          "stage 3   {s} {d, n} {k, e}\n"
                                          "stage 4   {s} {d} {n} {k} {e}")
    assert parents(tree[1], tree[2]) == [0, 0, 1]


@pytest.mark.parametrize("groups", [(1, 1, 2, 6), (2, 1, 2, 3), (0, 1, 2, 3)])
def test_groups_that_do_not_fit_are_refused(groups):
    """More groups than tasks, groups that merge again, no group at all."""
    with pytest.raises(ValueError, match="do not fit 5 tasks"):
        build_tree(PUBLISHED, groups)


def test_bad_trees_and_matrices_are_refused():
    """Not nested, not covering, a task twice; a similarity that is not a number."""
    with pytest.raises(ValueError, match="not nested"):
        check_tree([[(0, 1), (2,)], [(0, 2), (1,)]], 3)
    for stage in ([(0, 1)], [(0, 1), (1, 2)]):
        with pytest.raises(ValueError, match="each of the 3 tasks exactly once"):
            check_tree([stage], 3)
    with pytest.raises(ValueError, match="finite square"):
        best_partition(np.full((2, 2), np.nan), 1)
    with pytest.raises(ValueError, match="3 tasks do not fit into 4 groups"):
        best_partition(np.zeros((3, 3)), 4)
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_groups([(0,), (1,)], np.zeros((2, 2)), 3)
