"""The multi-task network: backbone stages, the task tree, one decoder a task.

All groups of a stage run the same frozen weights, so a stage with G task groups is fed one batch
of G*B images, group after group. Between two stages the tree says which group each new group
comes from. There is no loop over tasks in the backbone, and the baselines are special trees:
(1, 1, 1, 1) groups share everything, (T, T, T, T) nothing.

    model = MultiTaskNet(backbone, tasks, tree)                # frozen backbone, trained decoders
    model.adapt("attn+mlp", ranks=(63, 63, 63, 63))            # + TGLoRA
    predictions = model(image)                                 # {"semseg": (B, 40, H, W), ...}

Shapes: B batch, G groups, H W pixels, h w c of a map. A tree is a list of one partition a stage.
References: arXiv 2509.19602, section 3 and figure 3.
"""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mtlora
from decoders import Decoder
from grouping import Partition, check_tree, parents
from swin import SwinTransformer, build_swin, load_weights
from tglora import add_adapters, freeze, split_rank


class MultiTaskNet(nn.Module):
    """tasks: objects with `name` and `outputs`; tree: one partition of their indices a stage."""

    def __init__(self, backbone: SwinTransformer, tasks: Sequence, tree: Sequence[Partition]):
        super().__init__()
        check_tree(tree, len(tasks))
        if len(tree) != len(backbone.layers):
            raise ValueError(f"tree: {len(tree)} stages, but the backbone has "
                             f"{len(backbone.layers)}")
        self.backbone, self.tree = backbone, tree
        everything = [tuple(range(len(tasks)))]  # the image, which all groups come from
        self.parents = [parents(a, b) for a, b in zip([everything, *tree], tree)]
        self.group_of = {task.name: [next(i for i, group in enumerate(stage) if t in group)
                                     for stage in tree] for t, task in enumerate(tasks)}
        self.decoders = nn.ModuleDict(
            {task.name: Decoder(backbone.channels, task.outputs) for task in tasks})
        freeze(backbone, None)

    def adapt(self, layers: str, ranks: Sequence[int], dropout: float = 0.05) -> None:
        """Add TGLoRA to each stage; ranks: a stage's combined rank, split by group sizes (4.3)."""
        for stage, partition, rank in zip(self.backbone.layers, self.tree, ranks, strict=True):
            add_adapters(stage, layers, split_rank(rank, [len(g) for g in partition]),
                         dropout=dropout)
        freeze(self.backbone, layers)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (B, 3, H, W), normalised -> each task's prediction, (B, outputs, H, W)."""
        x = self.backbone.patch_embed(image)[None]  # (G, B, h, w, C) with one group
        maps = []
        for stage, parent in zip(self.backbone.layers, self.parents):
            if len(parent) != len(x):  # the tree branches here
                x = torch.stack([x[p] for p in parent])
            x = stage(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))  # (G, B, h, w, c)
            maps.append(x)
        return {name: decoder([m[g] for m, g in zip(maps, self.group_of[name])], image.shape[2:])
                for name, decoder in self.decoders.items()}


def ledger(model: nn.Module) -> dict[str, int]:
    """Parameters that are trained: adapters, decoders, others (of the backbone), and in all."""
    count = {"adapters": 0, "decoders": 0, "others": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = ("adapters" if "lora_" in name else
                    "decoders" if name.startswith("decoders.") else "others")
            count[kind] += p.numel()
    return {**count, "trainable": sum(count.values()),
            "total": sum(p.numel() for p in model.parameters())}


def stage_ranks(config: Namespace) -> list[int]:
    """Each stage's combined rank; with --last-rank the last one's grows with the tasks (4.3)."""
    ranks = [config.rank] * len(config.groups)
    if config.last_rank:
        ranks[-1] = config.last_rank * len(config.tasks)
    return ranks


def build(config: Namespace, tasks: Sequence, tree: Sequence[Partition]) -> MultiTaskNet:
    """The network that train.py's flags describe, the same for the same seed."""
    torch.manual_seed(config.seed)
    backbone = build_swin(config.backbone, drop_path=config.drop_path)
    if config.weights != "none":
        load_weights(backbone, config.weights, config.backbone)
    model = MultiTaskNet(backbone, tasks, tree)
    if config.method == "tglora":
        model.adapt(config.layers, stage_ranks(config), config.dropout)
    elif config.method in mtlora.METHODS:
        mtlora.adapt(model, config.rank, dropout=config.dropout, **mtlora.METHODS[config.method])
    elif config.method == "full":
        backbone.requires_grad_(True)
    return model


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for --amp: auto is bf16 where the GPU has it, else fp16; none on a CPU."""
    if choice == "auto":
        choice = "off" if device.type != "cuda" else (
            "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def pick_device(name: str) -> torch.device:
    """--device as a device that is there. Raises ValueError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here; expected cpu, or cuda on a machine "
                         "with a GPU and its driver") from error
    return device
