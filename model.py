"""The multi-task network: a backbone that branches along the tree of tasks, then the decoders.

All groups of a stage run through the same frozen weights, so a stage with G groups processes one
batch of G*B images, group after group (`tglora.run_stages`). There is no loop over tasks in the
backbone. Two of the baselines differ only in the numbers of groups per stage. For four tasks:

    1,2,3,4    TGLoRA
    1,1,1,1    MTL-LoRA: all tasks share all adapters
    4,4,4,4    single-task LoRA: in the backbone, the tasks share only the frozen weights

    model = build(config, tasks, tree)      # config: from recipes.parse_arguments
    predictions = model(image)              # {"semseg": (B, 40, H, W), ...}

A backbone has `patch_embed`, a list of four stages, and the `channels` of their maps. The list is
called `layers`, because the official checkpoints call it that. The backbone also says which linear
layers are adapted (`ADAPTED`) and which other weights may be trained (`OTHERS`), as in swin.py.

Shapes: B batch, G groups, H W pixels, h w tokens of a map, c channels of a map.
Reference: arXiv 2509.19602, section 3 and figure 3.
"""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decoders import FUSED, Decoder
from grouping import Partition, check_tree, routing
from swin import build_swin
from tglora import add_adapters, freeze, run_stages, split_rank
from weights import load_weights

METHODS = ("tglora", "mtlora", "mtlora+", "bdta", "full", "decoders")


class MultiTaskNet(nn.Module):
    """A backbone that branches between its stages, and one decoder per task.

    tasks: objects with `name` and `outputs`. parents[stage][group]: the group of the previous stage
    that this group continues. group_of[task][stage]: the group whose features the task reads. For a
    tree, grouping.routing computes both. fused: the numbers of channels to which the decoders
    project the four maps.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence, parents: Sequence[Sequence[int]],
                 group_of: Sequence[Sequence[int]], fused: Sequence[int] = FUSED):
        super().__init__()
        if len(parents) != len(backbone.layers):
            raise ValueError(f"the tree has {len(parents)} stages, but the backbone has "
                             f"{len(backbone.layers)}; expected one partition of the tasks per "
                             "stage")
        self.backbone = backbone
        self.parents = parents
        self.group_of = {}
        self.decoders = nn.ModuleDict()
        for task, groups in zip(tasks, group_of, strict=True):
            self.group_of[task.name] = groups
            self.decoders[task.name] = Decoder(backbone.channels, task.outputs, fused)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Normalised image (B, 3, H, W) -> the prediction of each task, (B, outputs, H, W)."""
        x = self.backbone.patch_embed(image)                            # (B, h, w, c)
        maps = run_stages(self.backbone.layers, x, self.parents)        # four (G, B, h, w, c)
        predictions = {}
        for name, decoder in self.decoders.items():
            groups = self.group_of[name]
            task_maps = [x[g] for x, g in zip(maps, groups)]            # four (B, h, w, c)
            predictions[name] = decoder(task_maps, image.shape[2:])     # (B, outputs, H, W)
        return predictions


def build(config: Namespace, tasks: Sequence, tree: Sequence[Partition]) -> nn.Module:
    """Build the network of a run. The same seed gives the same initial weights.

    config: the settings of a run (recipes.py). tasks: see `MultiTaskNet`. tree: one partition of
    the tasks per stage; MTLoRA and BDTA ignore the tree. Raises ValueError if the tree, the rank or
    the pretrained weights do not fit.
    """
    torch.manual_seed(config.seed)
    backbone = build_backbone(config)
    if config.method == "bdta":
        from extras.bdta import BDTANet
        return BDTANet(backbone, tasks)
    if config.method in ("mtlora", "mtlora+"):
        return build_mtlora(backbone, tasks, config)

    check_tree(tree, len(tasks))
    parents, group_of = routing(tree)
    model = MultiTaskNet(backbone, tasks, parents, group_of, config.fused)
    if config.method == "tglora":
        adapt(backbone, tree, config)
    elif config.method == "decoders":
        backbone.requires_grad_(False)
    return model                                    # "full": everything is trained


def build_backbone(config: Namespace) -> nn.Module:
    """The backbone, with pretrained weights unless `config.weights` is "none"."""
    if config.backbone.startswith("pvt_v2_"):
        from extras import pvt
        name = config.backbone.removeprefix("pvt_v2_")
        backbone = pvt.build_pvt(name, drop_path=config.drop_path)
        load = pvt.load_weights
    else:
        name = config.backbone
        backbone = build_swin(name, drop_path=config.drop_path)
        load = load_weights
    if config.weights == "rooms_mini.pth" and config.backbone != "mini":
        raise ValueError("--weights rooms_mini.pth only fits --backbone mini; with --backbone "
                         f"{config.backbone} use --weights imagenet (a download), none (random) "
                         "or the path of a file")
    if config.weights != "none":
        load(backbone, config.weights, name)
    return backbone


def adapt(backbone: nn.Module, tree: Sequence[Partition], config: Namespace) -> None:
    """TGLoRA: give each group of each stage its adapters, and freeze the rest of the backbone.

    If `config.layers` ends in +others, the backbone's OTHERS are trained too.
    """
    layers = config.layers.removesuffix("+others")
    names = backbone.ADAPTED[layers]
    for stage, partition, rank in zip(backbone.layers, tree, stage_ranks(config), strict=True):
        group_sizes = [len(group) for group in partition]
        ranks = split_rank(rank, group_sizes)
        add_adapters(stage, names, ranks, dropout=config.dropout)
    others = backbone.OTHERS if config.layers.endswith("+others") else ()
    freeze(backbone, others)


def stage_ranks(config: Namespace) -> list[int]:
    """For each stage, the combined rank that is split between its groups (section 4.3).

    With --last-rank, the last stage's combined rank is that value times the number of tasks.
    """
    ranks = [config.rank] * len(config.groups)
    if config.last_rank:
        ranks[-1] = config.last_rank * len(config.tasks)
    return ranks


def build_mtlora(backbone: nn.Module, tasks: Sequence, config: Namespace) -> MultiTaskNet:
    """Build MTLoRA or MTLoRA+. Tasks have their own adapters only in the last block of each stage.
    """
    from extras import mtlora
    parents, group_of = mtlora.routing(len(backbone.layers), len(tasks))
    model = MultiTaskNet(backbone, tasks, parents, group_of, config.fused)
    plus = config.method == "mtlora+"
    task_rank = config.rank if plus else 4          # section 4.1 of MTLoRA
    mtlora.adapt(backbone, backbone.ADAPTED["attn+mlp"], num_tasks=len(tasks), rank=config.rank,
                 dropout=config.dropout, task_rank=task_rank, plus=plus)
    return model
