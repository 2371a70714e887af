"""The cost of a configuration: trained parameters, and multiply-accumulates (MACs) per image.

    python cost.py --dataset nyud                                   # takes the flags of train.py
    python cost.py --dataset pascal --method mtlora --rank 32 --json

No weights are loaded, and nothing is trained. The network is built on the meta device, which knows
shapes but stores no numbers, and the MACs are counted while one image runs through it. Table 3 of
the paper counts linear and convolution layers with their biases, but neither the matrix products
inside attention nor the adapters. We print that count, and a second one that includes both.

Reference: arXiv 2509.19602, sections 4.3 and 4.5, table 3.
"""

import argparse
import copy
import json
from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn

from data import CLASSES
from model import build
from recipes import known_tree, parse_arguments, uneven_tree
from tasks import make_tasks
from tglora import TGLoRALinear
from util import one_line_errors


def ledger(model: nn.Module) -> dict[str, int]:
    """Count parameters: the trained ones by part, their sum ("trainable"), and all ("total").

    "others" are trained weights of the backbone itself. "adapters" are all other trained weights
    outside the decoders.
    """
    count = {"adapters": 0, "decoders": 0, "others": 0, "trainable": 0, "total": 0}
    for name, p in model.named_parameters():
        count["total"] += p.numel()
        if not p.requires_grad:
            continue
        count["trainable"] += p.numel()
        if name.startswith("decoders."):
            count["decoders"] += p.numel()
        elif name.startswith("backbone.") and "lora_" not in name:
            count["others"] += p.numel()
        else:
            count["adapters"] += p.numel()
    return count


@torch.no_grad()
def module_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The MACs of each module for one image of size (H, W), counted in a forward pass.

    Returns {path of the module: (MACs that table 3 counts, other MACs)}. Table 3 counts linear and
    convolution layers with their biases. The other MACs are the matrix products inside attention
    and in the adapters. Norms, activations and interpolation are not counted.
    """
    macs = {}

    def count(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dense, extra = 0, 0
        if isinstance(module, TGLoRALinear):
            rows = output.numel() // output.shape[-1]
            dense, extra = module.macs(rows // len(module.ranks))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            products = module.weight[0].numel()     # for each output value
            if module.bias is not None:
                products += 1
            dense = output.numel() * products
        else:
            extra = module.product_macs(inputs[0])
        dense_before, extra_before = macs.get(path, (0, 0))     # a module may run more than once
        macs[path] = (dense_before + dense, extra_before + extra)

    handles = []
    for path, module in model.named_modules():
        is_counted = isinstance(module, (nn.Linear, nn.Conv2d, TGLoRALinear))
        if is_counted or hasattr(module, "product_macs"):
            handles.append(module.register_forward_hook(partial(count, path)))
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    model(torch.zeros(1, 3, *size, device=device))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return macs


def count_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Count the MACs for an image of size (H, W).

    macs_linear_conv is what table 3 counts. macs_all also includes attention and adapters.
    """
    linear_conv, everything = 0, 0
    for dense, extra in module_macs(model, size).values():
        linear_conv += dense
        everything += dense + extra
    return {"macs_linear_conv": linear_conv, "macs_all": everything}


def network(config: Namespace) -> nn.Module:
    """The network that train.py would build, on the meta device and without pretrained weights.

    The number of trained parameters does not depend on the tree, and table 3's MACs depend only on
    its number of groups in each stage. The adapter MACs also depend on the group sizes, because
    adapters are padded to the largest rank. Without `config.tree`, equal similarities are assumed:
    Algorithm 1 then makes the groups as uneven as possible, which costs the most.
    """
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    tree = known_tree(config) or uneven_tree(config)
    config = copy.copy(config)
    config.weights = "none"
    with torch.device("meta"):
        return build(config, tasks, tree)


def cost(config: Namespace) -> dict[str, int]:
    """Parameters (`ledger`) and MACs (`count_macs`) of the network that train.py would build."""
    model = network(config)
    return {**ledger(model), **count_macs(model, config.size)}


def format_cost(costs: dict[str, int], size: tuple[int, int]) -> str:
    """The result of `cost` as text."""
    height, width = size
    linear_conv = costs["macs_linear_conv"] / 1e9
    everything = costs["macs_all"] / 1e9
    return "\n".join([
        f"trained parameters   {costs['trainable']:>12,}   adapters {costs['adapters']:,}, "
        f"decoders {costs['decoders']:,}, others {costs['others']:,}",
        f"all parameters       {costs['total']:>12,}",
        f"GMACs for one image of {height}x{width}",
        f"  linear and convolution layers, no adapters (table 3)   {linear_conv:8.2f}",
        f"  all matrix products: also attention and adapters       {everything:8.2f}"])


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="All other flags are those of train.py.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not text")
    args, flags = parser.parse_known_args(argv)
    with one_line_errors():
        config = parse_arguments(flags)
        costs = cost(config)
        print(json.dumps(costs) if args.json else format_cost(costs, config.size), flush=True)


if __name__ == "__main__":
    main()
