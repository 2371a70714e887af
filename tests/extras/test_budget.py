"""Tests of extras/budget.py: a budget leads to the right groups, and the local search for many
tasks finds good partitions."""

import math

import numpy as np
import pytest
from conftest import costs

from extras.budget import (RESTARTS, best_neighbour, choose, frontier, main, near_best_partition,
                           to_partition)
from grouping import best_partition, build_tree, check_tree, score, uneven_tree
from recipes import paper_groups, parse_arguments


# --- a budget -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def candidates():
    return {name: frontier(parse_arguments(["--dataset", name])) for name in ("pascal", "nyud")}


@pytest.mark.parametrize("dataset, gmacs, groups", [
    ("pascal", 50, (1, 2, 3, 4)), ("pascal", 41.4, (1, 2, 2, 4)), ("pascal", 38.4, (1, 1, 2, 4)),
    ("pascal", 1e9, (1, 2, 3, 4)), ("nyud", 34.7, (1, 1, 2, 3)), ("nyud", 30, (1, 1, 1, 3))])
def test_the_papers_budgets_give_the_papers_groups(candidates, dataset, gmacs, groups):
    """A budget just above the GMACs in the paper's table 3 or section 9 gives the paper's groups.

    A much larger budget also gives the paper's groups. A budget of 30 on NYUD gives fewer groups.
    """
    assert choose(candidates[dataset], gmacs).groups == groups


def test_each_candidate_costs_as_much_as_its_network(candidates):
    """Three of PASCAL's seven candidates cost as much as the networks that are built for them.

    The candidates are sorted by GMACs, the most expensive first.
    """
    assert [c.groups for c in candidates["pascal"]] == [
        (1, 2, 3, 4), (1, 2, 2, 4), (1, 1, 2, 4), (1, 1, 2, 3), (1, 1, 1, 3), (1, 1, 1, 2),
        (1, 1, 1, 1)]
    for groups, gmacs, trainable in candidates["pascal"][::3]:
        count = costs("--dataset", "pascal", "--groups", ",".join(map(str, groups)))
        assert gmacs * 1e9 == pytest.approx(count["macs_linear_conv"], rel=1e-9)
        assert trainable == count["trainable"]
    gmacs = [c.gmacs for c in candidates["pascal"]]
    assert gmacs == sorted(gmacs, reverse=True)


@pytest.mark.parametrize("flags", ["--tasks depth,sal,edge,normals,human_parts",
                                   "--tasks depth --backbone pvt_v2_b0 --weights none"])
def test_any_tasks_and_backbone_have_a_frontier(flags):
    """A frontier goes from `paper_groups` to 1,1,1,1, with one group fewer in each step.

    If the budget equals the cost of a candidate, that candidate is chosen.
    """
    config = parse_arguments(flags.split())
    before = config.groups
    candidates = frontier(config)
    T = len(config.tasks)
    assert config.groups == before
    assert candidates[0].groups == paper_groups(T) and candidates[-1].groups == (1, 1, 1, 1)
    assert len(candidates) == sum(paper_groups(T)) - 3
    for candidate in candidates:
        check_tree(uneven_tree(T, candidate.groups), T)
        assert choose(candidates, candidate.gmacs) == candidate


@pytest.mark.parametrize("budget, message", [
    (0, "finite positive number"), (math.inf, "finite positive number"),
    (21.4, "--budget-gmacs 21.4: .* needs 21.45")])
def test_impossible_budgets_are_refused(candidates, budget, message):
    """A budget must be finite, positive, and enough for one group in each stage."""
    with pytest.raises(ValueError, match=message):
        choose(candidates["pascal"], budget)


def test_the_command_prints_the_frontier_and_how_to_train(capsys):
    """The command marks the chosen groups, and prints how to train with them and the given flags.

    Flags that choose the groups, the tree or another method are an error.
    """
    main(["--budget-gmacs", "30", "--dataset", "nyud", "--rank", "60"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["groups", "GMACs", "trained"], ["1,1,2,3", "34.64", "5,720,948"],
        ["1,1,1,3", "26.07", "5,720,948", "<-", "chosen"]]
    assert lines[-1] == "python train.py --dataset nyud --rank 60 --groups 1,1,1,3"
    for flags in (["--groups", "1,1,1,3"], ["--tree", "tree.json"], ["--method", "full"]):
        with pytest.raises(SystemExit, match="error: a budget chooses the groups"):
            main(["--dataset", "nyud", "--budget-gmacs", "30", *flags])


# --- many tasks -----------------------------------------------------------------------------------
def test_a_neighbour_is_the_best_of_all_moves_and_swaps():
    """`best_neighbour` finds the largest gain in score among all moves of a task and all swaps."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        sim = rng.normal(size=(7, 7))
        both = sim + sim.T
        np.fill_diagonal(both, 0)
        group_of = np.concatenate([[0, 1, 2], rng.integers(3, size=4)])
        others = []
        for t in range(7):
            for g in range(3):
                moved = group_of.copy()
                moved[t] = g
                others.append(moved)
            for u in range(7):
                swapped = group_of.copy()
                swapped[[t, u]] = group_of[[u, t]]
                others.append(swapped)
        before = score(to_partition(group_of), sim)
        gains = [score(to_partition(other), sim) - before for other in others
                 if len(set(other)) == 3 and (other != group_of).any()]
        gain, better = best_neighbour(group_of, both, 3)
        assert gain == pytest.approx(max(gains))
        assert score(to_partition(better), sim) - before == pytest.approx(gain)


def test_the_local_search_nearly_always_finds_the_optimum():
    """For 100 random similarity matrices of seven tasks, at most one score is below the optimum.

    No score is more than 1 % below the optimum.
    """
    rng = np.random.default_rng(0)
    worse = 0
    for i in range(100):
        mean = -0.5 if i % 3 == 0 else 0.2
        sim = rng.normal(mean, 1, (7, 7))
        num_groups = int(rng.integers(1, 8))
        best = score(best_partition(sim, num_groups), sim)
        partition = near_best_partition(sim, num_groups)
        assert len(partition) == num_groups
        check_tree([partition], 7)
        worse += score(partition, sim) < best - 1e-9
        assert score(partition, sim) >= best - 0.01 * abs(best)
    assert worse <= 1 and RESTARTS == 20


def test_many_tasks_get_a_tree():
    """For 60 tasks in 8 clusters, the groups in the last stage of the tree are these clusters.

    Another call of the search gives the same partition, and `sim` is not changed.
    """
    rng = np.random.default_rng(2)
    cluster = rng.permutation(np.arange(60) % 8)
    same = cluster[:, None] == cluster
    sim = np.where(same, 0.8, 0.1) + rng.normal(0, 0.2, (60, 60))
    before = sim.copy()
    tree = build_tree(sim, (1, 3, 5, 8), search=near_best_partition)
    check_tree(tree, 60)
    assert [len(partition) for partition in tree] == [1, 3, 5, 8]
    assert tree[3] == to_partition(cluster) == near_best_partition(sim, 8)
    assert (sim == before).all()


def test_the_local_search_ends_where_nothing_improves():
    """No move or swap improves the result of the search. Another call gives the same partition."""
    sim = np.random.default_rng(3).normal(size=(40, 40))
    partition = near_best_partition(sim, 6)
    assert partition == near_best_partition(sim, 6)
    group_of = np.zeros(40, int)
    for g, group in enumerate(partition):
        group_of[list(group)] = g
    both = sim + sim.T
    np.fill_diagonal(both, 0)
    assert best_neighbour(group_of, both, 6)[0] < 1e-9


def test_bad_input_is_refused():
    """An impossible number of groups and a similarity that is not finite are errors."""
    with pytest.raises(ValueError, match="cannot split 3 tasks into 4 groups"):
        near_best_partition(np.zeros((3, 3)), 4)
    with pytest.raises(ValueError, match="expected a finite number"):
        near_best_partition(np.full((2, 2), np.nan), 1)
