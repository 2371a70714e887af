"""MTLoRA and MTLoRA+ (Agiza et al., CVPR 2024): shared adapters, and each task's own at stage ends.

In a stage's blocks all tasks share plain LoRA of rank r, up to the attention of its last block.
From `proj` on that block carries 1 + T groups: group 0 keeps the shared adapter and goes on to the
next stage; groups 1..T have the tasks' adapters, pass the same patch merging, and go to the tasks'
decoders alone. A task's output of these layers is W x + gamma B_t A_t x, without the shared
adapter (equation 2; section 3.2, figure 3). The backbone's "others" are trained too. MTLoRA+
freezes the merging's reduction and gives it a shared adapter instead, and its tasks rank r.

    parents, group_of = routing(num_stages=4, num_tasks=4)
    adapt(backbone, num_tasks=4, rank=64)                 # the tasks' adapters have rank 4

Built from TGLoRA's layer: a batch of 1 + T groups is group-major, as everywhere here.
Shapes: B batch, G = 1 + T groups, T tasks, H W tokens, C channels.
References: arXiv 2403.20320.
"""

from torch import Tensor, nn

from tglora import TGLoRALinear, add_adapters, freeze

OWN = ("attn.proj", "mlp.fc1", "mlp.fc2")  # in a stage's last block: an adapter for each task
METHODS = {"mtlora": dict(task_rank=4, plus=False), "mtlora+": dict(task_rank=None, plus=True)}


class BranchingLinear(TGLoRALinear):
    """The layer where groups begin: all of them read the same input."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., k) -> (G*B, ..., d)."""
        return super().forward(x.repeat(len(self.ranks), *[1] * (x.ndim - 1)))


class BranchingStage(nn.Module):
    """A backbone's stage, its modules and their names, in whose last block 1 + T groups begin."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        for name, child in stage.named_children():  # the blocks, and what ends the stage
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C), of group 0 -> (G*B, h, w, c)."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        update = last.drop_path(last.attend(last.norm1(x)))  # (G*B, H, W, C), from `proj` on
        x = (x + update.unflatten(0, (-1, x.shape[0]))).flatten(0, 1)
        x = x + last.drop_path(last.mlp(last.norm2(x)))
        for name, child in self.named_children():
            if name != "blocks":  # Swin's patch merging
                x = child(x)
        return x


def routing(num_stages: int, num_tasks: int) -> tuple[list[list[int]], list[list[int]]]:
    """`parents` and `group_of` of model.MultiTaskNet: only group 0 goes on, task t has group 1 + t.
    """
    return [[0]] * num_stages, [[1 + t] * num_stages for t in range(num_tasks)]


def adapt(backbone: nn.Module, num_tasks: int, rank: int, dropout: float = 0.05,
          task_rank: int | None = 4, plus: bool = False) -> None:
    """Turn a backbone into MTLoRA's, in place.

    rank: of the shared adapters; task_rank: of the tasks' (None: the same); plus: MTLoRA+.
    """
    ranks = rank, *[task_rank or rank] * num_tasks
    adapted = backbone.ADAPTED["attn+mlp"]
    for i, stage in enumerate(backbone.layers):
        *blocks, last = stage.blocks
        for block in blocks:
            add_adapters(block, adapted, (rank,), dropout=dropout)
        add_adapters(last, set(adapted) - set(OWN), (rank,), dropout=dropout)  # qkv
        last.attn.proj = BranchingLinear(last.attn.proj, ranks, dropout=dropout)
        add_adapters(last, OWN[1:], ranks, dropout=dropout)
        if plus:
            add_adapters(stage, ("downsample.reduction",), (rank,), dropout=dropout)
        backbone.layers[i] = BranchingStage(stage)
    freeze(backbone, backbone.OTHERS)
    for module in backbone.modules():
        if isinstance(module, TGLoRALinear):  # "others" hold the reduction, which may be one now
            module.weight.requires_grad_(False)
