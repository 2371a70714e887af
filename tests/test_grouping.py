"""Tests of grouping.py: searches are compared with simpler ones, and wrong input is an error."""

import json
from itertools import product

import numpy as np
import pytest

from grouping import (best_partition, build_tree, check_tree, format_tree, merge_groups, name_tree,
                      parents, partitions, read_tree, routing, score, uneven_tree)

# Similarities of five Taskonomy tasks (segmentation, depth, normals, keypoints, edges) from the
# code of Fifty et al., NeurIPS 2021: cosines summed over training, so they may exceed 1.
S, D, N, K, E = range(5)
PUBLISHED = np.zeros((5, 5))
for (a, b), value in {(S, D): .25957, (S, N): .24237, (S, K): .05406, (S, E): .08864,
                      (D, N): .91158, (D, K): .09153, (D, E): .15646, (N, K): .14588,
                      (N, E): .28014, (K, E): 2.96808}.items():
    PUBLISHED[a, b] = PUBLISHED[b, a] = value


def random_matrices(count, seed, tasks=(2, 6)):
    """Yield `count` pairs of a random similarity matrix and a number of groups.

    The matrices are not symmetric, and every third one is mostly negative. tasks: the smallest and
    the largest number of tasks.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        T = int(rng.integers(tasks[0], tasks[1] + 1))
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
    for sim, num_groups in random_matrices(60, seed=0):
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


def test_best_partitions_of_published_similarities():
    """For the similarities of Fifty et al., the best partition into two groups scores 7.3497, and
    the best one into three groups scores 7.7593."""
    two, three = best_partition(PUBLISHED, 2), best_partition(PUBLISHED, 3)
    assert two == [(S, D, N), (K, E)] and score(two, PUBLISHED) == pytest.approx(7.3497, abs=5e-5)
    assert three == [(S,), (D, N), (K, E)]
    assert score(three, PUBLISHED) == pytest.approx(7.7593, abs=5e-5)


def test_merging_equals_algorithm_1():
    """merge_groups gives the same result as a plain greedy search, which merges the best pair of
    groups at each step."""
    for sim, num_groups in random_matrices(60, seed=1):
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


def test_many_tasks_need_another_search():
    """With more than ten tasks, best_partition accepts only one group, or one group per task.
    build_tree can be given a different search for the last stage."""
    sim = np.random.default_rng(0).normal(size=(25, 25))
    assert len(best_partition(sim[:10, :10], 9)) == 9
    with pytest.raises(ValueError, match="up to 10 tasks, got 11; use extras.budget.near_best"):
        best_partition(sim[:11, :11], 2)
    assert best_partition(sim, 1) == [tuple(range(25))]
    tree = build_tree(sim, (1, 20, 25))             # the last stage has one group per task
    check_tree(tree, 25)

    def search(sim, num_groups):
        return uneven_tree(len(sim), [num_groups])[0]
    assert build_tree(sim, (1, 3), search) == [[tuple(range(25))], [tuple(range(23)), (23,), (24,)]]


# --- trees ----------------------------------------------------------------------------------------
def test_a_tree_is_built_from_the_last_stage():
    """The last stage is the best partition, and earlier stages merge its groups. format_tree,
    parents and routing give the expected results for such a tree."""
    sim = np.zeros((4, 4))                      # the best partition splits the most similar pair
    for a, b, value in ((0, 1, 1.0), (0, 2, 0.9), (1, 3, 0.9)):
        sim[a, b] = sim[b, a] = value
    assert build_tree(sim, (1, 2))[-1] == [(0, 2), (1, 3)]
    assert build_tree(sim, (1, 2, 3))[1:] == [[(0, 1), (2, 3)], [(0, 1), (2,), (3,)]]
    tree = build_tree(PUBLISHED, (1, 2, 3, 5))
    text = format_tree(tree, "sdnke", [None, "sure", None, None])
    assert text == ("stage 1   {s, d, n, k, e}\nstage 2   {s, d, n} {k, e}   sure\n"
                    "stage 3   {s} {d, n} {k, e}\nstage 4   {s} {d} {n} {k} {e}")
    assert format_tree(tree, "sdnke") == text.replace("   sure", "")
    assert parents(tree[1], tree[2]) == [0, 0, 1]
    parents_of, group_of = routing(tree)
    assert parents_of == [[0], [0, 0], [0, 0, 1], [0, 1, 1, 2, 2]]
    assert group_of == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]]


def test_the_uneven_tree():
    """In each stage, the first tasks share a group and every other task has its own."""
    tree = uneven_tree(4, (1, 2, 2, 4))
    assert tree == [[(0, 1, 2, 3)], [(0, 1, 2), (3,)], [(0, 1, 2), (3,)], [(0,), (1,), (2,), (3,)]]
    check_tree(tree, 4)


# --- errors ---------------------------------------------------------------------------------------
def test_an_unknown_similarity_is_refused():
    """If a similarity is NaN, no tree or partition can be computed, and the error names the two
    tasks. A matrix that is not square is an error too."""
    sim = np.ones((5, 5))
    sim[1, 4] = np.nan
    singles = [(t,) for t in range(5)]
    for call in (lambda: build_tree(sim, (1, 2, 3, 4)), lambda: best_partition(sim, 5),
                 lambda: merge_groups(singles, sim, 2)):
        with pytest.raises(ValueError, match="tasks 1 and 4 is nan"):
            call()
    with pytest.raises(ValueError, match="expected a square matrix"):
        best_partition(sim[:2], 1)


def test_bad_trees_and_numbers_of_groups_are_refused():
    """Trees must be nested and hold each task once, and numbers of groups must fit the tasks."""
    for groups in ((1, 1, 2, 6), (2, 1, 2, 3), (0, 1, 2, 3)):
        with pytest.raises(ValueError, match="do not fit 5 tasks"):
            build_tree(PUBLISHED, groups)
    with pytest.raises(ValueError, match="not nested: tasks \\(0, 2\\)"):
        check_tree([[(0, 1), (2,)], [(0, 2), (1,)]], 3)
    for stage in ([(0, 1)], [(0, 1), (1, 2)], [(0, 1, 2), ()]):
        with pytest.raises(ValueError, match="stage 2 must hold each of the 3 tasks exactly once"):
            check_tree([[(0, 1, 2)], stage], 3)
    for num_groups in (0, 4):
        with pytest.raises(ValueError, match=f"cannot split 3 tasks into {num_groups} groups"):
            best_partition(np.zeros((3, 3)), num_groups)
        with pytest.raises(ValueError, match=f"cannot merge 3 groups into {num_groups}"):
            merge_groups([(0,), (1,), (2,)], np.zeros((3, 3)), num_groups)


def test_a_tree_is_saved_and_read(tmp_path):
    """read_tree accepts tasks and groups in any order, extra entries, and a byte order mark."""
    path = tmp_path / "tree.json"
    tree = build_tree(PUBLISHED, (1, 2, 3, 5))
    path.write_text(json.dumps({"tree": name_tree(tree, "sdnke"), "more": 1}), "utf-8-sig")
    assert read_tree(path, "sdnke") == tree
    path.write_text('{"tree": [[["é", "a", "b"]], [["b"], ["é", "a"]]]}', "utf-8")
    assert read_tree(path, ["a", "b", "é"]) == [[(0, 1, 2)], [(0, 2), (1,)]]


@pytest.mark.parametrize("text, message", [
    ("{", "expected {.tree.:"), ("[1]", "expected {.tree.:"), ('{"tree": 5}', "expected {.tree.:"),
    ('{"tree": [[[["a"]]]]}', "expected {.tree.:"), ("{}", "expected {.tree.:"),
    ('{"tree": [[["a", "c"], ["b"]]]}', "unknown task 'c'; expected the tasks a, b"),
    ('{"tree": [[["a"]]]}', "each of the 2 tasks exactly once"),
    ('{"tree": [[["a"], ["b"]], [["a", "b"]]]}', "not nested")])
def test_a_bad_tree_file_is_named(tmp_path, text, message):
    """The error for a wrong or missing tree file is one line that names the file and the mistake.
    """
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.json: .*{message}") as error:
        read_tree(path, ["a", "b"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nowhere.json: there is no such file"):
        read_tree(tmp_path / "nowhere.json", ["a", "b"])
