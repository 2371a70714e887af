"""The multi-task network: backbone stages, the task tree, one decoder a task.

All groups of a stage run the same frozen weights, so a stage with G task groups is fed one batch
of G*B images, group after group. Between two stages the tree says which group each new group
branches off: `tglora.run_stages`. There is no loop over tasks in the backbone, and the baselines
are special trees: (1, 1, 1, 1) groups share everything, (T, T, T, T) nothing.

    model = build(config, tasks, tree)       # config: the knobs of recipes.py, by name
    predictions = model(image)               # {"semseg": (B, 40, H, W), ...}

A backbone offers `patch_embed`, four stages in `layers`, the `channels` of their maps, and says
itself what of it is adapted (`ADAPTED`) and what "others" means (`OTHERS`): see swin.py. A method
is a function of (backbone, tasks, tree, config) that returns a module image -> predictions.
Shapes: B batch, G groups, H W pixels, h w c of a map. A tree is a list of one partition a stage.
References: arXiv 2509.19602, section 3 and figure 3.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtlora
import pvt
from bdta import BDTANet
from decoders import FUSED, Decoder
from grouping import Partition, check_tree, routing
from swin import build_swin, load_weights
from tglora import add_adapters, freeze, run_stages, split_rank


class MultiTaskNet(nn.Module):
    """A backbone whose stages carry groups of tasks, and a decoder for each task.

    tasks: objects with `name` and `outputs`; parents[stage][group]: the group of the stage before
    that it branches off; group_of[task][stage]: whose features the task reads (grouping.routing);
    fused: channels of the decoders.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence, parents: Sequence[Sequence[int]],
                 group_of: Sequence[Sequence[int]], fused: Sequence[int] = FUSED):
        super().__init__()
        if len(parents) != len(backbone.layers):
            raise ValueError(f"tree: {len(parents)} stages, but the backbone has "
                             f"{len(backbone.layers)}")
        self.backbone, self.parents = backbone, parents
        self.group_of = {task.name: groups for task, groups in zip(tasks, group_of)}
        self.decoders = nn.ModuleDict(
            {task.name: Decoder(backbone.channels, task.outputs, fused) for task in tasks})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (B, 3, H, W), normalised -> each task's prediction, (B, outputs, H, W)."""
        x = self.backbone.patch_embed(image)                          # (B, h, w, c)
        maps = run_stages(self.backbone.layers, x, self.parents)      # four (G, B, h, w, c)
        predictions = {}
        for name, decoder in self.decoders.items():
            own = [m[group] for m, group in zip(maps, self.group_of[name])]  # four (B, h, w, c)
            predictions[name] = decoder(own, image.shape[2:])  # (B, outputs, H, W)
        return predictions


# --- methods --------------------------------------------------------------------------------------
def tree_net(backbone: nn.Module, tasks: Sequence, tree: Sequence[Partition],
             fused: Sequence[int] = FUSED) -> MultiTaskNet:
    """Features that branch as the tree does."""
    check_tree(tree, len(tasks))
    return MultiTaskNet(backbone, tasks, *routing(tree), fused)


def decoders_only(backbone: nn.Module, tasks: Sequence, tree: Sequence[Partition],
                  config: Any) -> MultiTaskNet:
    """Nothing of the backbone is trained."""
    backbone.requires_grad_(False)
    return tree_net(backbone, tasks, tree, config.fused)


def full(backbone: nn.Module, tasks: Sequence, tree: Sequence[Partition],
         config: Any) -> MultiTaskNet:
    """Full fine-tuning: everything is trained."""
    return tree_net(backbone, tasks, tree, config.fused)


def tglora(backbone: nn.Module, tasks: Sequence, tree: Sequence[Partition],
           config: Any) -> MultiTaskNet:
    """In each stage a combined rank, split between its groups by their sizes (4.3)."""
    model = tree_net(backbone, tasks, tree, config.fused)
    layers, others, _ = config.layers.partition("+others")
    names = adapted_layers(backbone, layers, config)
    for stage, partition, rank in zip(backbone.layers, tree, stage_ranks(config), strict=True):
        ranks = split_rank(rank, [len(group) for group in partition])
        add_adapters(stage, names, ranks, dropout=config.dropout)
    freeze(backbone, backbone.OTHERS if others else ())
    return model


def mtlora_net(backbone: nn.Module, tasks: Sequence, tree: Sequence[Partition],
               config: Any) -> MultiTaskNet:
    """MTLoRA or MTLoRA+, which have groups of their own."""
    model = MultiTaskNet(backbone, tasks, *mtlora.routing(len(backbone.layers), len(tasks)),
                         config.fused)
    names = adapted_layers(backbone, "attn+mlp", config)
    mtlora.adapt(backbone, names, len(tasks), config.rank, config.dropout,
                 **mtlora.METHODS[config.method])
    return model


def bdta(backbone: nn.Module, tasks: Sequence, tree: Sequence[Partition],
         config: Any) -> BDTANet:
    """BDTA + MoTE, beside a backbone that is not trained and has no groups."""
    return BDTANet(backbone, tasks, config.reduction)


METHODS: dict[str, Callable[..., nn.Module]] = {
    "tglora": tglora, **dict.fromkeys(mtlora.METHODS, mtlora_net), "bdta": bdta,
    "full": full, "decoders": decoders_only}


def adapted_layers(backbone: nn.Module, layers: str, config: Any) -> list[str]:
    """What --layers names, less what --without names."""
    unknown = set(config.without) - set(backbone.ADAPTED[layers])
    if unknown:
        raise ValueError(f"--without {','.join(sorted(unknown))}: expected some of "
                         f"{','.join(backbone.ADAPTED[layers])}")
    return [name for name in backbone.ADAPTED[layers] if name not in config.without]


def stage_ranks(config: Any) -> list[int]:
    """Each stage's combined rank; with --last-rank the last one's grows with the tasks (4.3)."""
    ranks = [config.rank] * len(config.groups)
    if config.last_rank:
        ranks[-1] = config.last_rank * len(config.tasks)
    return ranks


def build(config: Any, tasks: Sequence, tree: Sequence[Partition]) -> nn.Module:
    """The network that the knobs of recipes.py describe, the same for the same seed."""
    torch.manual_seed(config.seed)
    name, make, load = config.backbone, build_swin, load_weights
    if name.startswith("pvt_v2_"):  # as the field names its presets: pvt_v2_b2
        name, make, load = name.removeprefix("pvt_v2_"), pvt.build_pvt, pvt.load_weights
    backbone = make(name, drop_path=config.drop_path)
    if config.weights == "rooms_mini.pth" and name != "mini":
        raise ValueError(f"weights rooms_mini.pth are of --backbone mini; with {config.backbone}, "
                         "give --weights imagenet (a download), none (random) or a file's path")
    if config.weights != "none":
        load(backbone, config.weights, name)
    model = METHODS[config.method](backbone, tasks, tree, config)
    for part in config.frozen:
        matching = [p for name, p in backbone.named_parameters() if part in name]
        if not matching:
            raise ValueError(f"--frozen {part}: no weight of the backbone has that in its name")
        for p in matching:
            p.requires_grad_(False)
    return model
