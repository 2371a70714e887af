"""What a configuration costs: trained parameters, and multiply-accumulates (MACs) of one image.

    python cost.py --dataset nyud                    # any flags of train.py
    python cost.py --dataset pascal --method mtlora --rank 32 --json
    python cost.py --dataset pascal --budget-gmacs 42    # the groups that fit

Nothing is loaded or trained: the network is built without weights (on the meta device) and counts
while one image runs through. Table 3 of the paper counts linear layers and convolutions with their
biases, without attention's products and without adapters; the true cost stands beside it.
References: arXiv 2509.19602, sections 4.3 and 4.5, table 3.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import CLASSES
from grouping import build_tree, read_tree, score
from model import build
from flags import parse_arguments
from recipes import paper_groups
from tasks import make_tasks
from tglora import TGLoRALinear
from util.run import one_line_errors


def ledger(model: nn.Module) -> dict[str, int]:
    """Parameters that are trained: adapters (or what else a method adds), decoders, others (of the
    backbone), and in all."""
    count = {"adapters": 0, "decoders": 0, "others": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = ("decoders" if name.startswith("decoders.") else
                    "others" if name.startswith("backbone.") and "lora_" not in name else
                    "adapters")
            count[kind] += p.numel()
    return {**count, "trainable": sum(count.values()),
            "total": sum(p.numel() for p in model.parameters())}


@torch.no_grad()
def module_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """{module's path: MACs of one image of (H, W)}, counted while it runs through.

    First what table 3 counts, which is (without norms and activations) linear layers and
    convolutions alone; then what it leaves out, attention's and the adapters' products.
    """
    macs = {}

    def count(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dense, extra = 0, 0
        if hasattr(module, "product_macs"):  # attention, beside its linear layers
            extra = module.product_macs(*inputs[:1])
        elif isinstance(module, nn.Conv2d):
            dense = output.numel() * (module.weight[0].numel() + (module.bias is not None))
        elif isinstance(module, TGLoRALinear):
            dense, extra = module.macs(output[..., 0].numel() // len(module.ranks))
        else:
            dense = output.numel() * (module.in_features + (module.bias is not None))
        before = macs.get(name, (0, 0))  # a decoder's part may run more than once
        macs[name] = before[0] + dense, before[1] + extra

    hooks = [module.register_forward_hook(partial(count, name))
             for name, module in model.named_modules()
             if isinstance(module, (nn.Linear, nn.Conv2d, TGLoRALinear))
             or hasattr(module, "product_macs")]
    training = model.training
    model.eval()(torch.zeros(1, 3, *size, device=next(model.parameters()).device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return macs


def count_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """MACs of one image of (H, W): macs_linear_conv as table 3 counts them, macs_all of every
    matrix product."""
    dense, extra = (sum(column) for column in zip(*module_macs(model, size).values()))
    return {"macs_linear_conv": dense, "macs_all": dense + extra}


def network(config: argparse.Namespace) -> nn.Module:
    """The network of these flags, without weights.

    Costs depend on how many groups a stage has and, as adapters are padded to the largest one's
    rank, on how uneven they are: without a tree, as uneven as can be.
    """
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    tree = (read_tree(config.tree, config.tasks) if config.tree else
            build_tree(np.zeros((len(tasks), len(tasks))), config.groups))
    with torch.device("meta"):
        return build(argparse.Namespace(**{**vars(config), "weights": "none"}), tasks, tree)


def cost(config: argparse.Namespace) -> dict[str, int]:
    """Trained parameters and MACs of the run that train.py would start with these flags."""
    model = network(config)
    return {**ledger(model), **count_macs(model, config.size)}


# --- a budget -------------------------------------------------------------------------------------
class Candidate(NamedTuple):
    """What so many groups a stage cost."""

    groups: tuple[int, ...]
    gmacs: float    # as table 3 counts them
    trainable: int  # the same for all: groups split a stage's rank, they do not add to it


def frontier(config: argparse.Namespace) -> list[Candidate]:
    """From the paper's groups to one for all: by turns, the dearest stage first, each stage gives
    one group away. The network runs once: a stage with G groups costs G times what it does there.
    """
    shared = network(argparse.Namespace(**{**vars(config), "groups": (1, 1, 1, 1)}))
    trainable, once, stages = ledger(shared)["trainable"], 0, [0, 0, 0, 0]
    for name, (macs, _) in module_macs(shared, config.size).items():
        if name.startswith("backbone.layers."):
            stages[int(name.split(".")[2])] += macs
        else:  # the image's patches, the decoders
            once += macs
    groups = list(paper_groups(len(config.tasks)))
    steps = [tuple(groups)]
    while max(groups) > 1:
        for i in sorted(range(4), key=lambda i: -stages[i]):
            if groups[i] > 1:
                groups[i] -= 1
                steps.append(tuple(groups))
    return [Candidate(step, (once + sum(n * macs for n, macs in zip(step, stages))) / 1e9,
                      trainable) for step in steps]


def fit_budget(config: argparse.Namespace) -> list[Candidate]:
    """The frontier, if there is a budget; config.groups becomes its first that is within it."""
    if not (config.budget_gmacs or config.budget_params):
        return []
    candidates = frontier(config)
    least = candidates[-1]
    if least.gmacs > (config.budget_gmacs or math.inf):
        raise ValueError(f"--budget-gmacs {config.budget_gmacs:g}: the least possible is "
                         f"{least.gmacs:.2f}, where all tasks share every stage")
    if least.trainable > (config.budget_params or math.inf):
        raise ValueError(f"--budget-params {config.budget_params:,.0f}: {least.trainable:,} are "
                         "trained whatever the groups, which split a rank and do not add to it; "
                         "choose a smaller --rank, or --layers attn")
    config.groups = next(c.groups for c in candidates
                         if c.gmacs <= (config.budget_gmacs or math.inf))
    return candidates


def format_frontier(candidates: Sequence[Candidate], config: argparse.Namespace,
                    found: dict | None = None) -> str:
    """A line a candidate; found: what tree.json says of the similarities, for the trees' scores,
    which is eq. 6 summed over the four stages."""
    sim = (found or {}).get("stage_similarity" if config.stage_similarity else "similarity")
    width = len(",".join(map(str, candidates[0].groups))) + 2
    lines = [f"{'groups':<{width}}   GMACs     trained" + "     score" * bool(sim)]
    for groups, gmacs, trainable in candidates:
        line = f"{','.join(map(str, groups)):<{width}}{gmacs:>8.2f}{trainable:>12,}"
        if sim:
            sims = np.broadcast_to(sim, (4, *np.shape(sim)[-2:]))
            line += f"{sum(map(score, build_tree(sims, groups), sims)):>10.4f}"
        lines.append(line + "  <- chosen" * (groups == config.groups))
    return "\n".join(lines)


def format_cost(costs: dict[str, int], size: tuple[int, int]) -> str:
    """`cost`'s answer as text."""
    linear_conv, everything = costs["macs_linear_conv"] / 1e9, costs["macs_all"] / 1e9
    return "\n".join([
        f"trained parameters   {costs['trainable']:>12,}   adapters {costs['adapters']:,}, "
        f"decoders {costs['decoders']:,}, others {costs['others']:,}",
        f"all parameters       {costs['total']:>12,}",
        f"GMACs, one image of {size[0]}x{size[1]}",
        f"  linear and convolution layers, no adapters (table 3)   {linear_conv:8.2f}",
        f"  all matrix products: + attention, + adapters           {everything:8.2f}"])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        config = parse_arguments([flag for flag in argv if flag != "--json"])
        candidates = fit_budget(config)
        costs = {**cost(config), **({"groups": config.groups} if candidates else {})}
    if "--json" in argv:
        return print(json.dumps(costs))
    if candidates:
        print(format_frontier(candidates, config))
    print(format_cost(costs, config.size))


if __name__ == "__main__":
    main()
