"""grouping.py against brute force, and on published similarities."""

import numpy as np
import pytest

from grouping import (EXACT, best_partition, best_partitions, build_tree, check_tree, format_tree,
                      merge_groups, near_best, neighbour, pair_sums, parents, score, to_partition)
from stability import stability

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


def test_stages_may_merge_by_similarities_of_their_own():
    """The last stage by its matrix, then each stage's groups by that stage's."""
    def close(*pairs):
        sim = np.zeros((4, 4))
        for a, b in pairs:
            sim[a, b] = sim[b, a] = 1
        return sim

    sims = [close(), close((2, 3)), close((0, 2)), close((0, 1))]
    tree = build_tree(sims, (1, 2, 3, 4))
    assert tree[1:] == [[(0, 2, 3), (1,)], [(0, 2), (1,), (3,)], [(0,), (1,), (2,), (3,)]]
    assert build_tree(sims, (1, 2, 3, 3))[3] == [(0, 1), (2,), (3,)]
    assert build_tree(sims[2], (1, 2, 3, 4))[2] == tree[2]  # one for all stages
    samples = np.array([sims] * 3)  # three examples which agree
    choices = stability(tree, samples)
    assert [c and tuple(c) for c in choices] == [None, (True, 1.0), (True, 1.0), None]
    assert stability(tree, samples[:, 3])[2] == (False, 0.0)  # one matrix would merge others


# --- many tasks -----------------------------------------------------------------------------------
def near(sim, groups):
    return to_partition(near_best(pair_sums(sim), groups))


def test_the_near_optimum_is_nearly_always_the_optimum():
    """1,000 random matrices of ten tasks: at least 97 % exact, none below 99 % of the score."""
    rng, exact = np.random.default_rng(0), 0
    for i in range(1000):
        sim, groups = rng.normal(-0.5 if i % 3 == 0 else 0.2, 1, (10, 10)), int(rng.integers(2, 10))
        best, found = (score(p, sim) for p in (best_partition(sim, groups), near(sim, groups)))
        exact += found > best - 1e-9
        assert found >= best - 0.01 * abs(best)
    assert exact >= 970


def test_a_neighbour_is_the_best_of_all_moves_and_swaps():
    """Its gain is the difference in score, and by hand none is larger."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        sim, label = rng.normal(size=(7, 7)), np.concatenate([[0, 1, 2], rng.integers(3, size=4)])
        others = []
        for t in range(7):
            for g in set(range(3)) - {label[t]}:
                if (label == label[t]).sum() > 1:
                    others.append(np.where(np.arange(7) == t, g, label))
            for u in np.flatnonzero(label != label[t]):
                others.append(label.copy())
                others[-1][[t, u]] = label[[u, t]]
        gain, better = neighbour(label, pair_sums(sim), 3)
        assert len(set(better)) == 3
        before = score(to_partition(label), sim)
        assert score(to_partition(better), sim) - before == pytest.approx(gain)
        assert gain == pytest.approx(max(score(to_partition(p), sim) for p in others) - before)


def test_many_tasks_get_a_tree_and_are_told_how(capsys):
    """Exactly up to 15 tasks; beyond, 200 into 20 groups, the same each time, better than merging
    alone; and where all or none share, there is nothing to search."""
    sim = np.random.default_rng(2).normal(size=(200, 200))
    tree = build_tree(sim, (1, 5, 10, 20), verbose=True)
    assert capsys.readouterr().out == "tree: last stage near-optimal, earlier ones merged\n"
    check_tree(tree, 200)
    assert [len(p) for p in tree] == [1, 5, 10, 20] and tree[3] == best_partition(sim, 20)
    assert score(tree[3], sim) > 1.1 * score(merge_groups([(t,) for t in range(200)], sim, 20), sim)
    for T, groups, said in ((EXACT, 14, "exact"), (25, 24, "near-optimal"), (25, 25, "exact"),
                            (200, 1, "exact")):
        build_tree(sim[:T, :T], (1, groups), verbose=True)
        assert f"last stage {said}," in capsys.readouterr().out
    assert EXACT == 15
    first, second = best_partitions(sim[:20, :20], 4, 2)
    assert first != second and score(first, sim) > score(second, sim)


@pytest.mark.parametrize("T", [1, 2, 5, 12, 16, 40])
@pytest.mark.parametrize("make", [lambda m: m, lambda m: 0 * m, lambda m: 0 * m + 0.5,
                                  lambda m: -np.abs(m), lambda m: 0 * m - 1],
                         ids=["random", "zero", "constant", "negative", "all -1"])
def test_any_matrix_gives_a_valid_tree(make, T):
    """Whatever the similarities; equal ones in the order of the tasks."""
    sim = make(np.random.default_rng(T).normal(size=(T, T)))
    groups = sorted((1, min(2, T), min(3, T), min(4, T)))
    tree = build_tree(sim, groups)
    check_tree(tree, T)
    assert [len(p) for p in tree] == groups
    assert all(p == sorted(p) and all(g == tuple(sorted(g)) for g in p) for p in tree)


@pytest.mark.parametrize("T", [5, 20])
def test_what_is_unknown_is_not_zero(T):
    """Two tasks that share no example: no tree, whatever the search, and which two is said."""
    sim = np.ones((T, T))
    sim[1, 4] = sim[4, 1] = np.nan
    with pytest.raises(ValueError, match="tasks 1 and 4 is nan"):
        build_tree(sim, (1, 2, 3, 4))


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
