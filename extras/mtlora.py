"""MTLoRA and MTLoRA+ (Agiza et al., CVPR 2024): shared and task-specific adapters.

Within a stage, all tasks share plain LoRA adapters of rank r, up to the attention of the last
block. At `proj`, the output projection of that attention, the batch branches into 1 + T groups.
Group 0 keeps the shared adapter and goes on to the next stage. Groups 1 to T use the tasks' own
adapters, pass through the stage's patch merging too, and then go only to the decoders. From `proj`
to the end of the block, each linear layer computes its frozen product once, from the shared
features x_0. Only the task's adapter reads the task's own features x_t (at `proj`, x_t = x_0):

    y_0 = W x_0 + b + gamma B_0 A_0 x_0
    y_t = W x_0 + b + gamma B_t A_t x_t             (MTLoRA, section 3.2, eq. 2 and figure 3)

The backbone's "others" (patch layers, norms and position biases) are trained too. MTLoRA+ freezes
the linear layer of the patch merging and gives it a shared adapter instead. The task-specific
adapters of MTLoRA+ have rank r; those of MTLoRA have rank 4.

    parents, group_of = routing(num_stages=4, num_tasks=4)
    adapt(backbone, backbone.ADAPTED["attn+mlp"], num_tasks=4, rank=64)
    model = MultiTaskNet(backbone, tasks, parents, group_of)

    python train.py --dataset pascal --data-root data --method mtlora

Shapes: B batch, G = 1 + T groups (group after group, as in tglora.py), T tasks, H W tokens,
C channels, k inputs, d outputs, N rows per group.
References: arXiv 2403.20320; https://github.com/scale-lab/MTLoRA (for the inputs of eq. 2, and
for where dropout is applied).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tglora import TGLoRALinear, add_adapters, freeze, parameters_with

# In a stage's last block, every task has its own adapter in these linear layers.
TASK_SPECIFIC = ("attn.proj", "mlp.fc1", "mlp.fc2")


class SharedProductLinear(TGLoRALinear):
    """A linear layer with 1 + T groups, which all use the product W x_0 of group 0.

    Only their adapters read each group's own features. The adapters of the T tasks all have the
    same rank. A rank of 0 means no adapter.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (G*B, ..., k), the shared group first -> (G*B, ..., d)."""
        G = len(self.ranks)
        x = x.unflatten(0, (G, -1))
        shared, tasks = x[0], x[1:]                 # (B, ..., k) and (T, B, ..., k)
        # As in the published code, only the shared adapter's input gets dropout in this layer.
        dropped = F.dropout(shared, self.dropout, self.training)
        return self.outputs(shared, dropped, tasks)

    def outputs(self, shared: Tensor, dropped: Tensor, tasks: Tensor) -> Tensor:
        """Compute eq. 2: shared, dropped (B, ..., k); tasks (T, B, ..., k) -> (G*B, ..., d).

        shared: x_0. dropped: x_0 after dropout, the input of the shared adapter. tasks: all x_t,
        the inputs of the tasks' adapters.
        """
        r, *task_ranks = self.ranks
        A, A_tasks = self.lora_A.to(shared.dtype).split([r, sum(task_ranks)])
        B, B_tasks = self.lora_B.to(shared.dtype).split([r, sum(task_ranks)])   # transposed
        product = F.linear(shared, self.weight, self.bias)      # W x_0 + b, (B, ..., d)
        y_0 = product + self.scale * dropped @ A.T @ B

        A_tasks = A_tasks.unflatten(0, (len(task_ranks), -1))   # (T, r, k)
        B_tasks = B_tasks.unflatten(0, (len(task_ranks), -1))   # (T, r, d)
        flat = tasks.flatten(1, -2)                             # (T, N, k)
        low_rank = flat @ A_tasks.mT @ B_tasks                  # (T, N, d)
        y_tasks = product + self.scale * low_rank.view(-1, *product.shape)  # (T, B, ..., d)
        return torch.cat([y_0, y_tasks.flatten(0, 1)])

    def merge(self) -> None:
        """Do nothing: with adapters folded into W, each group would need its own product."""

    def macs(self, rows: int) -> tuple[int, int]:
        """Multiply-accumulates for `rows` rows per group: (frozen layer, adapters).

        W is applied only once, to the rows of group 0.
        """
        d, k = self.weight.shape
        frozen = rows * d * k
        if self.bias is not None:
            frozen += rows * d
        return frozen, rows * sum(self.ranks) * (k + d)


class BranchingLinear(SharedProductLinear):
    """The linear layer at which the batch branches: all groups read the same input."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., k) -> (G*B, ..., d)."""
        T = len(self.ranks) - 1
        dropped = F.dropout(x, self.dropout, self.training)
        return self.outputs(x, dropped, dropped.expand(T, *dropped.shape))


class BranchingStage(nn.Module):
    """A stage of the backbone whose last block branches into 1 + T groups.

    The stage's modules keep their names, so the names of the weights do not change.
    """

    def __init__(self, stage: nn.Module):
        super().__init__()
        for name, child in stage.named_children():      # `blocks` and the modules after them
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C), the features of group 0 -> (G*B, h, w, c)."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        update = last.drop_path(last.attend(last.norm1(x)))     # (G*B, H, W, C): `proj` branches
        update = update.unflatten(0, (-1, x.shape[0]))          # (G, B, H, W, C)
        x = (x + update).flatten(0, 1)
        x = x + last.drop_path(last.mlp(last.norm2(x)))
        for name, child in self.named_children():
            if name != "blocks":                                # such as Swin's patch merging
                x = child(x)
        return x


def routing(num_stages: int, num_tasks: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return `parents` and `group_of`, which model.MultiTaskNet needs.

    Only group 0 of a stage goes on to the next stage, and task t reads group 1 + t of every stage.
    """
    parents = [[0]] * num_stages
    group_of = [[1 + task] * num_stages for task in range(num_tasks)]
    return parents, group_of


def adapt(backbone: nn.Module, names: Sequence[str], num_tasks: int, rank: int,
          dropout: float = 0.05, task_rank: int = 4, plus: bool = False,
          without: Sequence[str] = (), frozen: Sequence[str] = ()) -> None:
    """Turn a backbone into MTLoRA's backbone, in place.

    names: the linear layers that get adapters, such as the backbone's ADAPTED["attn+mlp"].
    rank, task_rank: the ranks of the shared and of the task-specific adapters.
    plus: also adapt the patch merging. MTLoRA+ does this, with task_rank = rank.
    without: for the ablation of table 2, entries of `names` that get no adapter after all.
    frozen: for the ablation of table 3, substrings of weight names. A weight of the backbone whose
        name contains one of them is not trained.
    Raises ValueError if an entry of `without` is not in `names`, and as tglora.parameters_with does
    for `frozen`.
    """
    for name in without:
        if name not in names:
            raise ValueError(f"adapt: `without` names {name!r}, which is not an adapted layer; "
                             f"expected some of {', '.join(names)}")
    names = [name for name in names if name not in without]
    for i, stage in enumerate(backbone.layers):
        for block in stage.blocks[:-1]:
            add_adapters(block, names, (rank,), dropout=dropout)
        adapt_last_block(stage.blocks[-1], names, num_tasks, rank, dropout, task_rank)
        if plus and hasattr(stage.downsample, "reduction"):     # Swin's patch merging
            add_adapters(stage.downsample, ("reduction",), (rank,), dropout=dropout)
        backbone.layers[i] = BranchingStage(stage)
    freeze(backbone, backbone.OTHERS)
    for module in backbone.modules():
        if isinstance(module, TGLoRALinear):    # OTHERS also matches adapted merging layers
            module.weight.requires_grad_(False)
    for p in parameters_with(backbone, frozen):
        p.requires_grad_(False)


def adapt_last_block(block: nn.Module, names: Sequence[str], num_tasks: int, rank: int,
                     dropout: float, task_rank: int) -> None:
    """Give the last block of a stage its shared and task-specific adapters, in place."""
    shared_only = [name for name in names if name not in TASK_SPECIFIC]     # qkv, or PVT's q and kv
    if shared_only:
        add_adapters(block, shared_only, (rank,), dropout=dropout)
    for name in TASK_SPECIFIC:
        ranks = (rank, *[task_rank] * num_tasks)
        if name not in names:
            ranks = (0,) * (1 + num_tasks)
        linear = block.get_submodule(name)
        if name == "attn.proj":
            layer = BranchingLinear(linear, ranks, dropout=dropout)
        else:
            layer = SharedProductLinear(linear, ranks, dropout=dropout)
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, layer)
