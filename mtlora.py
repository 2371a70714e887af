"""MTLoRA and MTLoRA+ (Agiza et al., CVPR 2024): shared adapters, and each task's own at stage ends.

In a stage's blocks all tasks share plain LoRA of rank r, up to the attention of its last block.
From `proj` on that block carries 1 + T groups: group 0 keeps the shared adapter and goes on to the
next stage; groups 1..T have the tasks' adapters, pass the same patch merging, and go to the tasks'
decoders alone. A task's output of these layers is W x + gamma B_t A_t x, without the shared
adapter (equation 2; section 3.2, figure 3). "Others" (tglora.OTHERS) are trained too. MTLoRA+
freezes the merging's reduction and gives it a shared adapter instead, and its tasks rank r.

    model = MultiTaskNet(backbone, tasks, shared_tree)    # all tasks in one group
    adapt(model, rank=64)                                 # the tasks' adapters have rank 4

Built from TGLoRA's layer: a batch of 1 + T groups is group-major, as everywhere here.
Shapes: B batch, G = 1 + T groups, T tasks, H W tokens, C channels.
References: arXiv 2403.20320.
"""

from torch import Tensor, nn

from swin import SwinBlock
from tglora import TGLoRALinear, add_adapters, freeze

METHODS = {"mtlora": dict(task_rank=4, plus=False), "mtlora+": dict(task_rank=None, plus=True)}


class BranchingLinear(TGLoRALinear):
    """The layer where groups begin: all of them read the same input."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., k) -> (G*B, ..., d)."""
        return super().forward(x.repeat(len(self.ranks), *[1] * (x.ndim - 1)))


class BranchingBlock(SwinBlock):
    """A Swin block whose attn.proj is a BranchingLinear: (B, H, W, C) -> (G*B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        update = self.drop_path(self.attend(self.norm1(x)))  # (G*B, H, W, C)
        x = (x + update.unflatten(0, (-1, x.shape[0]))).flatten(0, 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def adapt(model: nn.Module, rank: int, task_rank: int | None = 4, plus: bool = False,
          dropout: float = 0.05) -> None:
    """Turn a MultiTaskNet that shares everything into MTLoRA, in place.

    rank: of the shared adapters; task_rank: of the tasks' (None: the same); plus: MTLoRA+.
    """
    T = len(model.group_of)
    ranks = rank, *[task_rank or rank] * T
    for stage in model.backbone.layers:
        *blocks, last = stage.blocks
        for block in blocks:
            add_adapters(block, "attn+mlp", (rank,), dropout=dropout)
        last.attn.qkv = TGLoRALinear(last.attn.qkv, (rank,), dropout=dropout)
        last.attn.proj = BranchingLinear(last.attn.proj, ranks, dropout=dropout)
        last.mlp.fc1 = TGLoRALinear(last.mlp.fc1, ranks, dropout=dropout)
        last.mlp.fc2 = TGLoRALinear(last.mlp.fc2, ranks, dropout=dropout)
        last.__class__ = BranchingBlock  # the same modules and names, another forward
        if plus and hasattr(stage.downsample, "reduction"):
            stage.downsample.reduction = TGLoRALinear(stage.downsample.reduction, (rank,),
                                                      dropout=dropout)
    freeze(model.backbone, "attn+mlp+others")
    for module in model.modules():
        if isinstance(module, TGLoRALinear):
            module.weight.requires_grad_(False)  # "others" hold the reduction, which has one now
    model.parents = [[0]] * len(model.parents)  # only group 0 goes on to the next stage
    model.group_of = {name: [1 + t] * len(model.parents) for t, name in enumerate(model.group_of)}
