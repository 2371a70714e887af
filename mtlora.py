"""MTLoRA and MTLoRA+ (Agiza et al., CVPR 2024): shared adapters, and each task's own at stage ends.

In a stage's blocks all tasks share plain LoRA of rank r, up to the attention of its last block.
From `proj` on that block carries 1 + T groups: group 0 keeps the shared adapter and goes on to the
next stage; groups 1..T have the tasks' adapters, pass the same patch merging, and go to the tasks'
decoders alone. In these layers (section 3.2, eq. 2, figure 3) the frozen product is that of the
shared features x_0, computed once; only a task's adapter reads the task's own features x_t:

    y_0 = W x_0 + b + gamma B_0 A_0 x_0        y_t = W x_0 + b + gamma B_t A_t x_t

The backbone's "others" are trained too. MTLoRA+ freezes the merging's reduction and gives it a
shared adapter instead, and its tasks rank r.

    parents, group_of = routing(num_stages=4, num_tasks=4)
    adapt(backbone, backbone.ADAPTED["attn+mlp"], num_tasks=4, rank=64)

Built from TGLoRA's layer: a batch of 1 + T groups is group-major, as everywhere here.
Shapes: B batch, G = 1 + T groups, T tasks, H W tokens, C channels, k inputs, d outputs, N rows.
References: arXiv 2403.20320; https://github.com/scale-lab/MTLoRA (what "x" is in eq. 2; dropout).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tglora import TGLoRALinear, add_adapters, freeze

OWN = ("attn.proj", "mlp.fc1", "mlp.fc2")  # in a stage's last block: an adapter for each task
METHODS = {"mtlora": dict(task_rank=4, plus=False), "mtlora+": dict(task_rank=None, plus=True)}


class SharedProductLinear(TGLoRALinear):
    """1 + T groups around one frozen product, that of group 0. Rank 0: no adapter at all."""

    least_rank = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (G*B, ..., k), the shared group first -> (G*B, ..., d)."""
        G = len(self.ranks)
        shared, tasks = x.unflatten(0, (G, -1)).split((1, G - 1))  # (1, B, ..., k), (T, B, ..., k)
        return self.outputs(shared[0], self.drop(shared[0]), tasks)  # tasks' input is not dropped

    def outputs(self, shared: Tensor, dropped: Tensor, tasks: Tensor) -> Tensor:
        """shared, dropped (B, ..., k); tasks (T, B, ..., k) -> (G*B, ..., d)."""
        T, (d, k) = len(self.ranks) - 1, self.weight.shape
        y = F.linear(shared, self.weight, self.bias)                # (B, ..., d), for all groups
        flat = y.view(1, -1, d)                                     # (1, N, d)
        y_0 = self.add_low_rank(flat, dropped.reshape(1, -1, k), slice(1))
        y_t = self.add_low_rank(flat.expand(T, -1, -1), tasks.reshape(T, -1, k), slice(1, None))
        return torch.cat([y_0, y_t]).view(-1, *y.shape[1:])

    def merge(self) -> None:
        """Nothing is folded: W + gamma B_t A_t would be a product a group instead of one."""

    def macs(self, rows: int) -> tuple[int, int]:
        d, k = self.weight.shape
        return rows * d * (k + (self.bias is not None)), rows * sum(self.ranks) * (k + d)


class BranchingLinear(SharedProductLinear):
    """The layer where groups begin: all of them read the same input."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., k) -> (G*B, ..., d)."""
        dropped = self.drop(x)
        T = len(self.ranks) - 1
        return self.outputs(x, dropped, dropped.expand(T, *dropped.shape))


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


def adapt(backbone: nn.Module, names: Sequence[str], num_tasks: int, rank: int,
          dropout: float = 0.05, task_rank: int | None = 4, plus: bool = False) -> None:
    """Turn a backbone into MTLoRA's, in place.

    names: of the layers that get adapters, shared ones and the tasks' (table 2 leaves some out);
    rank: of the shared adapters; task_rank: of the tasks' (None: the same); plus: MTLoRA+.
    """
    ranks = rank, *[task_rank or rank] * num_tasks
    for i, stage in enumerate(backbone.layers):
        *blocks, last = stage.blocks
        for block in blocks:
            add_adapters(block, names, (rank,), dropout=dropout)
        add_adapters(last, set(names) - set(OWN), (rank,), dropout=dropout)  # qkv
        for name in OWN:
            kind = BranchingLinear if name == OWN[0] else SharedProductLinear
            own = ranks if name in names else (0,) * len(ranks)
            parent, _, leaf = name.rpartition(".")
            linear = last.get_submodule(name)
            setattr(last.get_submodule(parent), leaf, kind(linear, own, dropout=dropout))
        if plus and hasattr(stage.downsample, "reduction"):  # Swin's, where a stage follows
            add_adapters(stage, ("downsample.reduction",), (rank,), dropout=dropout)
        backbone.layers[i] = BranchingStage(stage)
    freeze(backbone, backbone.OTHERS)
    for module in backbone.modules():
        if isinstance(module, TGLoRALinear):  # "others" hold the reduction, which may be one now
            module.weight.requires_grad_(False)
