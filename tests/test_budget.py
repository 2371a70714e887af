"""How many groups a budget buys: cost.py's frontier, and what a run does with it."""

import json

import numpy as np
import pytest
from conftest import costs

import cost
import train
from grouping import build_tree, check_tree, score
from flags import parse_arguments


def fit(*flags):
    config = parse_arguments(list(flags))
    candidates = cost.fit_budget(config)
    return config.groups, candidates


@pytest.mark.parametrize("dataset, gmacs, groups", [
    ("pascal", "50", (1, 2, 3, 4)), ("pascal", "41.4", (1, 2, 2, 4)),
    ("pascal", "38.4", (1, 1, 2, 4)), ("pascal", "1e9", (1, 2, 3, 4)),
    ("nyud", "34.7", (1, 1, 2, 3))])
def test_the_papers_trees_at_the_papers_budgets(dataset, gmacs, groups):
    """Table 3 and section 9."""
    assert fit("--dataset", dataset, "--budget-gmacs", gmacs)[0] == groups


def test_each_candidate_costs_what_its_network_does():
    """The whole frontier, from one network, against a network each; dearer ones first."""
    _, candidates = fit("--dataset", "pascal", "--budget-gmacs", "40")
    assert [c.groups for c in candidates] == [(1, 2, 3, 4), (1, 2, 2, 4), (1, 1, 2, 4),
                                              (1, 1, 2, 3), (1, 1, 1, 3), (1, 1, 1, 2),
                                              (1, 1, 1, 1)]
    for groups, gmacs, trainable in candidates:
        found = costs("--dataset", "pascal", "--groups", ",".join(map(str, groups)))
        assert gmacs * 1e9 == pytest.approx(found["macs_linear_conv"], rel=1e-9)
        assert trainable == found["trainable"]
    assert candidates == sorted(candidates, key=lambda c: -c.gmacs)


@pytest.mark.parametrize("backbone", ["mini", "pvt_v2_b0"])
@pytest.mark.parametrize("tasks", ["depth", "depth,sal", "depth,sal,edge,normals,human_parts"])
def test_any_tasks_and_backbone_have_a_frontier(backbone, tasks):
    """From the paper's groups to all shared, and a tree exists for each."""
    flags = ["--tasks", tasks, "--backbone", backbone, "--weights", "none", "--budget-gmacs", "1e9"]
    groups, candidates = fit(*flags)
    T = len(tasks.split(","))
    assert groups == candidates[0].groups == (1, max(1, T - 2), max(1, T - 1), T)
    assert candidates[-1].groups == (1, 1, 1, 1) and len(candidates) == sum(groups) - 3
    for candidate in candidates:
        tree = build_tree(np.eye(T), candidate.groups)
        check_tree(tree, T)
        exactly = str(candidate.gmacs + 1e-12)
        assert fit(*flags[:-1], exactly)[0] == candidate.groups


def test_a_budget_that_cannot_be_is_refused():
    """Less than the all-shared network, with the least possible; parameters, which groups do not
    change; and two who choose the groups."""
    with pytest.raises(ValueError, match="--budget-gmacs 21.4: the least possible is 21.45"):
        fit("--dataset", "pascal", "--budget-gmacs", "21.4")
    with pytest.raises(ValueError, match="5,288,960 are trained whatever the groups.*smaller --ra"):
        fit("--dataset", "pascal", "--budget-params", "5288959")
    assert fit("--dataset", "pascal", "--budget-params", "5288960")[0] == (1, 2, 3, 4)
    both = ["--dataset", "pascal", "--budget-params", "6e6", "--budget-gmacs", "40"]
    assert fit(*both)[0] == (1, 1, 2, 4)
    assert fit("--dataset", "pascal")[1] == []  # no budget, nothing is counted
    for flags in (["--groups", "1,1,1,3"], ["--tree", "tree.json"], ["--method", "full"]):
        with pytest.raises(SystemExit):
            parse_arguments(["--dataset", "pascal", "--budget-gmacs", "40", *flags])


def test_cost_prints_the_frontier(capsys):
    """Marked where it chose; without similarities there is no score."""
    cost.main(["--dataset", "nyud", "--budget-gmacs", "30"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["groups      GMACs     trained", "1,1,2,3     34.64   5,932,916",
                         "1,1,1,3     26.07   5,932,916  <- chosen"]
    assert lines[-2].endswith("26.07")
    cost.main(["--dataset", "nyud", "--budget-gmacs", "30", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == [1, 1, 1, 3] and found["macs_linear_conv"] < 30e9


SMALL = ["--tasks", "semseg,depth,normals,sal", "--train-rooms", "6", "--val-rooms", "2", "--size",
         "56", "--sim-images", "6", "--head-epochs", "2", "--rank", "8", "--epochs", "1",
         "--batch-size", "2"]


@pytest.mark.parametrize("own", [[], ["--stage-similarity"]])
def test_a_run_within_a_budget(tmp_path, capsys, own):
    """Groups are chosen, the tree follows from its similarities, the frontier says both; resumed
    with the same flags it goes on."""
    _, candidates = fit(*SMALL, "--budget-gmacs", "1e9")
    budget = ["--budget-gmacs", str(candidates[1].gmacs + 1e-9)]
    flags = [*SMALL, *budget, *own, "--out", str(tmp_path)]
    train.main(flags)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "tree.json").read_text())
    by_stage = np.array(found["stage_similarity"])
    assert by_stage.shape == (4, 4, 4) and "tree: last stage exact" in printed
    sims = by_stage if own else np.array([found["similarity"]] * 4)
    tree = build_tree(sims, candidates[1].groups)
    names = SMALL[1].split(",")
    assert found["tree"] == [[[names[t] for t in g] for g in p] for p in tree]
    total = sum(score(p, sim) for p, sim in zip(tree, sims))
    chosen, = [line for line in printed.splitlines() if line.endswith("<- chosen")]
    assert chosen.startswith(",".join(map(str, candidates[1].groups)))
    assert f"{total:.4f}" in chosen
    (tmp_path / "metrics.json").unlink()
    train.main([*flags, "--resume"])
    assert (tmp_path / "metrics.json").exists()
