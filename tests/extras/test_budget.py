"""Tests of extras/budget.py: a budget leads to the paper's numbers of groups."""

import pytest
from conftest import costs

from extras import budget
from recipes import parse_arguments


@pytest.fixture(scope="module")
def pascal():
    return budget.frontier(parse_arguments(["--dataset", "pascal"]))


def test_the_frontier_of_pascal(pascal):
    """The frontier starts with the paper's three choices (section 9) and ends with one group.

    The costs of the first and the last candidate are compared with those of whole networks.
    """
    assert [groups for groups, _ in pascal] == [
        (1, 2, 3, 4), (1, 2, 2, 4), (1, 1, 2, 4), (1, 1, 2, 3), (1, 1, 1, 3), (1, 1, 1, 2),
        (1, 1, 1, 1)]
    for groups, gmacs in (pascal[0], pascal[-1]):
        count = costs("--dataset", "pascal", "--groups", ",".join(map(str, groups)))
        assert gmacs * 1e9 == pytest.approx(count["macs_linear_conv"], rel=1e-9)


def test_the_papers_budgets_give_the_papers_groups(pascal):
    """Budgets just above the GMACs in section 9 and table 3 give the paper's groups.

    So does a budget that is exactly the cost of these groups. The error for a budget that is too
    small says how much the smallest network needs.
    """
    for gmacs, groups in ((50, (1, 2, 3, 4)), (41.4, (1, 2, 2, 4)), (38.4, (1, 1, 2, 4)),
                          (38.3, (1, 1, 2, 3))):
        assert budget.choose(pascal, gmacs) == groups
        assert budget.choose(pascal, dict(pascal)[groups]) == groups
    with pytest.raises(ValueError, match="--budget-gmacs 21.4: .* needs 21.45 GMACs"):
        budget.choose(pascal, 21.4)


def test_the_command_marks_the_first_groups_within_the_budget(capsys):
    """The command prints all candidates as flags for train.py. It accepts the flags of a run."""
    budget.main(["--budget-gmacs", "30", "--dataset", "nyud"])
    assert capsys.readouterr().out.splitlines() == [
        "--groups 1,1,2,3    34.64 GMACs",
        "--groups 1,1,1,3    26.07 GMACs   <- first within the budget",
        "--groups 1,1,1,2    23.29 GMACs",
        "--groups 1,1,1,1    20.52 GMACs"]
