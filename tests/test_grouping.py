"""Tests of grouping.py: searches are compared with simpler ones, and wrong input is an error."""

import json
from itertools import product

import numpy as np
import pytest

from grouping import (best_partition, build_tree, check_tree, format_tree, merge_groups, name_tree,
                      parents, partitions, read_tree, routing, score)

TREE = [[(0, 1, 2, 3, 4)], [(0, 1, 2), (3, 4)], [(0,), (1, 2), (3, 4)],
        [(0,), (1,), (2,), (3,), (4,)]]


def random_matrices(count, seed):
    """Yield `count` pairs of a random similarity matrix and a number of groups.

    The matrices are not symmetric, and every third one is mostly negative.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        T = int(rng.integers(2, 7))
        sim = rng.normal(-0.5 if i % 3 == 0 else 0.2, 1, (T, T))
        yield sim, int(rng.integers(1, T + 1))


def direct_score(groups, sim):
    """The score of a partition (eq. 5 and 6), computed one task at a time."""
    total = 0
    for group in groups:
        for t in group:
            others = [sim[t, u] for u in group if u != t]
            total += np.mean(others) if others else 0
    return total


# --- partitions -----------------------------------------------------------------------------------
def test_partitions_lists_every_split_once():
    """Every partition of T tasks is listed once, so the number of partitions is a Bell number.

    The tasks of each group are in ascending order, and the groups are ordered by their first task.
    """
    for T, bell in enumerate((1, 1, 2, 5, 15, 52, 203)):
        listed = list(partitions(range(T)))
        assert len(listed) == len(set(map(tuple, listed))) == bell
        for partition in listed:
            assert sorted(t for group in partition for t in group) == list(range(T))
            assert partition == sorted(tuple(sorted(group)) for group in partition)


def test_the_best_partition_equals_brute_force():
    """The result of best_partition scores as high as the best assignment of tasks to groups."""
    for sim, num_groups in random_matrices(30, seed=0):
        T = len(sim)
        scores = []
        for label in product(range(num_groups), repeat=T):
            if len(set(label)) == num_groups:
                groups = [[t for t in range(T) if label[t] == g] for g in range(num_groups)]
                scores.append(direct_score(groups, sim))
        partition = best_partition(sim, num_groups)
        assert len(partition) == num_groups
        assert score(partition, sim) == pytest.approx(direct_score(partition, sim))
        assert score(partition, sim) == pytest.approx(max(scores))


def test_merging_equals_algorithm_1():
    """merge_groups gives the same result as a plain greedy search, which merges the best pair of
    groups at each step."""
    for sim, num_groups in random_matrices(30, seed=1):
        groups = {frozenset([t]) for t in range(len(sim))}
        while len(groups) > num_groups:
            best = -np.inf
            for a in groups:
                for b in groups - {a}:
                    candidate = groups - {a, b} | {a | b}
                    if direct_score(candidate, sim) > best + 1e-12:
                        best, chosen = direct_score(candidate, sim), candidate
            groups = chosen
        singles = [(t,) for t in range(len(sim))]
        assert merge_groups(singles, sim, num_groups) == sorted(tuple(sorted(g)) for g in groups)


def test_the_first_of_equal_candidates_is_taken():
    """If all candidates tie, best_partition and merge_groups take the first, in which tasks 0 and 1
    share a group."""
    assert merge_groups([(0,), (1,), (2,)], np.zeros((3, 3)), 2) == [(0, 1), (2,)]
    assert best_partition(np.zeros((3, 3)), 2) == [(0, 1), (2,)]


def test_more_than_ten_tasks_are_merged():
    """For ten tasks, best_partition is exact. For eleven, it is Algorithm 1 from single tasks."""
    sim = np.random.default_rng(0).normal(size=(11, 11))
    singles = [(t,) for t in range(11)]
    assert best_partition(sim, 4) == merge_groups(singles, sim, 4)
    greedy = merge_groups(singles[:10], sim, 4)
    assert score(best_partition(sim[:10, :10], 4), sim) > score(greedy, sim)


# --- trees ----------------------------------------------------------------------------------------
def test_a_tree_is_built_from_the_last_stage():
    """The last stage is the best partition, and earlier stages merge its groups. format_tree,
    parents and routing give the expected results for such a tree."""
    sim = np.zeros((4, 4))                      # the best partition splits the most similar pair
    for a, b, value in ((0, 1, 1.0), (0, 2, 0.9), (1, 3, 0.9)):
        sim[a, b] = sim[b, a] = value
    assert build_tree(sim, (1, 2))[-1] == [(0, 2), (1, 3)]
    assert build_tree(sim, (1, 2, 3))[1:] == [[(0, 1), (2, 3)], [(0, 1), (2,), (3,)]]
    text = format_tree(TREE, "sdnke", [None, "sure", None, None])
    assert text == ("stage 1   {s, d, n, k, e}\nstage 2   {s, d, n} {k, e}   sure\n"
                    "stage 3   {s} {d, n} {k, e}\nstage 4   {s} {d} {n} {k} {e}")
    assert format_tree(TREE, "sdnke") == text.replace("   sure", "")
    assert parents(TREE[1], TREE[2]) == [0, 0, 1]
    parents_of, group_of = routing(TREE)
    assert parents_of == [[0], [0, 0], [0, 0, 1], [0, 1, 1, 2, 2]]
    assert group_of == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]]


# --- errors ---------------------------------------------------------------------------------------
def test_bad_similarities_trees_and_numbers_of_groups_are_refused():
    """Similarities must be finite, numbers of groups must fit the tasks, and trees must be nested
    and hold each task once."""
    with pytest.raises(ValueError, match="every pair of tasks needs a finite number"):
        build_tree(np.array([[1, np.nan], [0, 1]]), (1, 1, 2, 2))
    for groups in ((1, 1, 2, 6), (2, 1, 2, 3)):
        with pytest.raises(ValueError, match="do not fit 5 tasks"):
            build_tree(np.ones((5, 5)), groups)
    with pytest.raises(ValueError, match="not nested: tasks \\(0, 2\\)"):
        check_tree([[(0, 1), (2,)], [(0, 2), (1,)]], 3)
    for stage in ([(0, 1)], [(0, 1), (1, 2)]):
        with pytest.raises(ValueError, match="stage 2 must hold each of the 3 tasks exactly once"):
            check_tree([[(0, 1, 2)], stage], 3)


def test_a_tree_is_saved_and_read(tmp_path):
    """read_tree reads what name_tree saves, and accepts tasks and groups in any order."""
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": name_tree(TREE, "sdnke"), "more": 1}))
    assert read_tree(path, "sdnke") == TREE
    path.write_text('{"tree": [[["é", "a", "b"]], [["b"], ["é", "a"]]]}', "utf-8")
    assert read_tree(path, ["a", "b", "é"]) == [[(0, 1, 2)], [(0, 2), (1,)]]


@pytest.mark.parametrize("text, message", [
    ("{", "Expecting property name"), ("[1]", "list indices"), ("{}", "'tree'"),
    ('{"tree": [[["a", "c"], ["b"]]]}', "'c' is not in list"),
    ('{"tree": [[["a"]]]}', "each of the 2 tasks exactly once")])
def test_a_bad_tree_file_is_named(tmp_path, text, message):
    """The error for a wrong tree file is one line that names the file and the mistake."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.json holds no tree of the tasks a, b: .*{message}"):
        read_tree(path, ["a", "b"])
