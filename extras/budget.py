"""Numbers of task groups that fit a compute budget (section 9 of the paper).

    python -m extras.budget --dataset pascal --budget-gmacs 40      # also takes train.py's flags

More groups cost more compute, not more parameters: a stage with G groups costs G times as much as
with one group, and its groups split one rank. The paper trades groups for compute, but does not
say how it chooses them. Here, the list starts with the paper's groups. Then the stages take turns
giving up one group each, the most expensive stage first, until every stage has one group. For
PASCAL, this gives the paper's own three choices first: 1,2,3,4, then 1,2,2,4 and 1,1,2,4.

Reference: arXiv 2509.19602, sections 4.4 and 9.
"""

import argparse
import copy

from cost import module_macs, network
from recipes import paper_groups, parse_arguments
from util import one_line_errors

Groups = tuple[int, ...]        # number of groups in each stage


def frontier(config: argparse.Namespace) -> list[tuple[Groups, float]]:
    """Numbers of groups and the GMACs that one image costs, the most expensive first.

    config: the settings of a run (recipes.py). GMACs are counted as in table 3.
    """
    config = copy.copy(config)
    config.groups = (1, 1, 1, 1)
    stage_macs = [0, 0, 0, 0]   # of each stage, with one group
    other_macs = 0              # of the patch embedding and the decoders
    for path, (macs, _) in module_macs(network(config), config.size).items():
        if path.startswith("backbone.layers."):
            stage = int(path.split(".")[2])
            stage_macs[stage] += macs
        else:
            other_macs += macs

    groups = list(paper_groups(len(config.tasks)))
    candidates = [tuple(groups)]
    most_expensive_first = sorted(range(4), key=lambda i: stage_macs[i], reverse=True)
    while max(groups) > 1:
        for stage in most_expensive_first:
            if groups[stage] > 1:
                groups[stage] -= 1
                candidates.append(tuple(groups))

    points = []
    for candidate in candidates:
        total = other_macs + sum(G * macs for G, macs in zip(candidate, stage_macs))
        points.append((candidate, total / 1e9))
    return points


def choose(points: list[tuple[Groups, float]], budget_gmacs: float) -> Groups:
    """The first groups within the budget. Raises ValueError if all cost more."""
    for groups, gmacs in points:
        if gmacs <= budget_gmacs:
            return groups
    raise ValueError(f"--budget-gmacs {budget_gmacs:g}: even with one group in every stage, the "
                     f"network needs {gmacs:.2f} GMACs; raise the budget, or use a smaller --size "
                     "or --backbone")


def main(argv: list[str] | None = None) -> None:
    """Print all candidates, and the flag for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--budget-gmacs", type=float, required=True, help="billions of "
                        "multiply-accumulates that one image may cost, counted as in table 3")
    args, flags = parser.parse_known_args(argv)
    with one_line_errors():
        points = frontier(parse_arguments(flags))
        chosen = choose(points, args.budget_gmacs)
    for groups, gmacs in points:
        mark = "   <- first within the budget" if groups == chosen else ""
        print(f"--groups {','.join(map(str, groups))}   {gmacs:6.2f} GMACs{mark}")


if __name__ == "__main__":
    main()
