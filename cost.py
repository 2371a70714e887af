"""What a configuration costs: trained parameters, and multiply-accumulates (MACs) of one image.

    python cost.py --dataset nyud                    # any flags of train.py
    python cost.py --dataset pascal --method mtlora --rank 32 --json

Nothing is loaded or trained: the network is built without weights (on the meta device) and counts
while one image runs through. Table 3 of the paper counts linear layers and convolutions with their
biases, without attention's products and without adapters; the true cost stands beside it.
References: arXiv 2509.19602, sections 4.3 and 4.5, table 3.
"""

import argparse
import json
import sys

import numpy as np
import torch
from torch import Tensor, nn

from data import CLASSES
from grouping import build_tree, read_tree
from model import build
from recipes import parse_arguments
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
def count_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """MACs of one image of (H, W), counted while it runs through.

    macs_linear_conv: linear layers and convolutions alone, which is (without norms and activations)
    what table 3 counts; macs_all: every matrix product, with attention and adapters.
    """
    macs = {"macs_linear_conv": 0, "macs_all": 0}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dense, extra = 0, 0
        if hasattr(module, "product_macs"):  # attention, beside its linear layers
            extra = module.product_macs(*inputs[:1])
        elif isinstance(module, nn.Conv2d):
            dense = output.numel() * (module.weight[0].numel() + (module.bias is not None))
        elif isinstance(module, TGLoRALinear):
            dense, extra = module.macs(output[..., 0].numel() // len(module.ranks))
        else:
            dense = output.numel() * (module.in_features + (module.bias is not None))
        macs["macs_linear_conv"] += dense
        macs["macs_all"] += dense + extra

    hooks = [module.register_forward_hook(count) for module in model.modules()
             if isinstance(module, (nn.Linear, nn.Conv2d, TGLoRALinear))
             or hasattr(module, "product_macs")]
    training = model.training
    model.eval()(torch.zeros(1, 3, *size, device=next(model.parameters()).device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return macs


def cost(config: argparse.Namespace) -> dict[str, int]:
    """Trained parameters and MACs of the run that train.py would start with these flags."""
    tasks = make_tasks(config.tasks, CLASSES[config.dataset])
    # Costs depend on how many groups a stage has and, as adapters are padded to the largest one's
    # rank, on how uneven they are: without a tree, as uneven as can be.
    tree = (read_tree(config.tree, config.tasks) if config.tree else
            build_tree(np.zeros((len(tasks), len(tasks))), config.groups))
    config = argparse.Namespace(**{**vars(config), "weights": "none"})
    with torch.device("meta"):
        model = build(config, tasks, tree)
    return {**ledger(model), **count_macs(model, config.size)}


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
        costs = cost(config)
    print(json.dumps(costs) if "--json" in argv else format_cost(costs, config.size))


if __name__ == "__main__":
    main()
