"""Task-Grouped LoRA: one frozen linear layer, one low-rank adapter for each group of tasks.

    y_g = W x_g + gamma B_g A_g x_g        (TGLoRA paper, section 3.2, eq. 4)

All groups share the frozen W, so their inputs travel as one batch, group after group:
x (G*B, ..., k). Only this layer unfolds the groups; whatever stands around it (norms, attention,
activations) needs no change. One group is plain LoRA.

    layer = TGLoRALinear(nn.Linear(96, 288), ranks=(32, 16, 16))    # three groups
    y = layer(x)                                                    # (3*B, L, 96) -> (3*B, L, 288)

A backbone is cut into stages: `add_adapters` wraps the layers of each, `run_stages` branches
between them. README, Use a module in your own project, has an example.
Shapes: B batch, G groups, k inputs, d outputs, r rank, N rows of a group.
References: arXiv 2509.19602, section 3.2; LoRA, arXiv 2106.09685.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# They read weights of their linear layers and do not call these, the second one in eval mode
# without gradients: adapters would be ignored there, silently.
BYPASSING = nn.MultiheadAttention, nn.TransformerEncoderLayer


class TGLoRALinear(nn.Module):
    """`linear` frozen, plus one adapter of rank ranks[g] for each group g.

    Keeps the names `weight` and `bias`, so checkpoints of the wrapped model still fit; everything
    that is added is named `lora_*`. scale is gamma of eq. 4, constant as in the paper's recipe.
    """

    least_rank = 1

    def __init__(self, linear: nn.Linear, ranks: Sequence[int], scale: float = 4.0,
                 dropout: float = 0.05):
        super().__init__()
        if not ranks or min(ranks) < self.least_rank:
            raise ValueError(f"TGLoRALinear: every group needs a rank of at least 1, got {ranks}")
        d, k = self.out_features, self.in_features = linear.weight.shape
        self.ranks, self.scale, self.merged = tuple(ranks), scale, False
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        new = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A = nn.ParameterList(torch.empty(r, k, **new) for r in ranks)
        self.lora_B = nn.ParameterList(torch.zeros(d, r, **new) for r in ranks)  # starts as W x
        for A in filter(len, self.lora_A):
            nn.init.kaiming_uniform_(A, a=5 ** 0.5)  # as nn.Linear does, and LoRA with it
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (G*B, ..., k), groups one after another -> (G*B, ..., d)."""
        if x.shape[0] % len(self.ranks):
            raise ValueError(f"TGLoRALinear: a batch of {x.shape[0]} does not divide into "
                             f"{len(self.ranks)} groups")
        G, d, k = len(self.ranks), self.out_features, self.in_features
        if self.merged:  # y_g = W_g x_g + bias
            x = x.unflatten(0, (G, -1))
            y = [F.linear(x[g], self.weight[g], self.bias) for g in range(G)]
            return torch.cat(y) if G > 1 else y[0]
        y = F.linear(x, self.weight, self.bias)
        x = self.drop(x).reshape(G, -1, k)
        return self.add_low_rank(y.view(G, -1, d), x).view(y.shape)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, of the adapters' input alone."""
        if self.training and self.dropout:  # nn.Dropout would keep a mask of floats on the CPU
            x = torch.native_dropout(x, self.dropout, True)[0]
        return x

    def add_low_rank(self, y: Tensor, x: Tensor, groups: slice = slice(None)) -> Tensor:
        """y (G, N, d), or one for all groups (1, N, d); x (G, N, k) -> y_g + gamma B_g A_g x_g."""
        # All groups in one product: ranks that differ are padded with zeros.
        A = pad_sequence(list(self.lora_A)[groups], batch_first=True)  # (G, r, k)
        B = pad_sequence([B.T for B in list(self.lora_B)[groups]], batch_first=True)  # (G, r, d)
        return torch.baddbmm(y, x @ A.mT, B, alpha=self.scale)  # eq. 4

    def macs(self, rows: int) -> tuple[int, int]:
        """Multiply-accumulates for `rows` inputs of each group: of W and bias, of the adapters."""
        G, d, k = len(self.ranks), self.out_features, self.in_features
        padded = 0 if self.merged else max(self.ranks)
        return G * rows * d * (k + (self.bias is not None)), G * rows * padded * (k + d)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters into one weight a group, (G, d, k): W_g = W + gamma B_g A_g.

        In float32, once, and never undone: for inference without a word of LoRA.
        """
        if self.merged:
            raise ValueError("TGLoRALinear: already merged")
        W = self.weight.float()
        self.weight = nn.Parameter(torch.stack([
            (W + self.scale * B.float() @ A.float()).to(self.weight.dtype)
            for A, B in zip(self.lora_A, self.lora_B)]), requires_grad=False)
        del self.lora_A, self.lora_B
        self.merged = True

    def extra_repr(self) -> str:
        return (f"{self.in_features} -> {self.out_features}, ranks={self.ranks}, "
                f"scale={self.scale}, merged={self.merged}")


def split_rank(rank: int, group_sizes: Sequence[int]) -> tuple[int, ...]:
    """Share a layer's combined rank between its groups, in proportion to their tasks (4.3).

    The ranks sum to `rank` exactly and none is below 1. Raises ValueError when that cannot be.
    """
    if rank < len(group_sizes):
        raise ValueError(f"rank {rank} is smaller than the number of task groups, "
                         f"{len(group_sizes)}; every group needs a rank of at least 1")
    share = [rank * size / sum(group_sizes) for size in group_sizes]
    ranks = [max(1, int(s)) for s in share]
    while sum(ranks) != rank:  # by the largest remainder
        step = 1 if sum(ranks) < rank else -1
        able = [i for i in range(len(ranks)) if ranks[i] + step >= 1]
        best = max(able, key=lambda i: step * (share[i] - ranks[i]))
        ranks[best] += step
    return tuple(ranks)


def add_adapters(module: nn.Module, names: Sequence[str], ranks: Sequence[int],
                 scale: float = 4.0, dropout: float = 0.05) -> None:
    """Wrap, in place, each linear layer in `module` whose path ends in one of `names`.

    names: of whole modules, as ("attn.qkv", "mlp.fc1") for Swin's stages, ("mlp.0", "mlp.3") for
    torchvision's ViT; ranks: one for each group. Raises ValueError for a name that no linear layer
    has, and for a layer whose weight torch would read without calling it.
    """
    linears = {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear)}
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in linears):
            raise ValueError(f"add_adapters: no linear layer's path ends in {name!r}; there are "
                             f"{', '.join(linears) or 'none'}")
    for path, linear in linears.items():
        if f".{path}".endswith(tuple(f".{name}" for name in names)):
            parent, _, name = path.rpartition(".")
            parent = module.get_submodule(parent)
            if isinstance(parent, BYPASSING):
                raise ValueError(f"add_adapters: {path} lies in nn.{type(parent).__name__}, which "
                                 "may use its weight without calling it; adapt other layers")
            setattr(parent, name, TGLoRALinear(linear, ranks, scale, dropout))


def run_stages(stages: Iterable[nn.Module], x: Tensor, parents: Sequence[Sequence[int]]
               ) -> list[Tensor]:
    """Run x through the stages of a backbone, branching before each as the task tree does.

    x (B, ...), what the first stage reads; parents[stage][group]: the group of the stage before
    that this group branches off, all 0 in the first (of a tree: grouping.routing). A stage is fed
    one batch (G*B, ...), group after group, and may be any module that treats its examples alike.
    Returns each stage's output, (G, B, ...): a task reads that of its own group.
    """
    x, maps = x[None], []  # (1, B, ...): one group, all tasks
    for stage, parent in zip(stages, parents, strict=True):
        if list(parent) != list(range(len(x))):  # the tree branches here
            x = torch.stack([x[p] for p in parent])  # (G, B, ...)
        x = stage(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))  # (G*B, ...) -> (G, B, ...)
        maps.append(x)
    return maps


def freeze(backbone: nn.Module, others: Sequence[str] = ()) -> None:
    """Train the adapters alone, and parameters whose name contains one of `others`."""
    for name, p in backbone.named_parameters():
        p.requires_grad_("lora_" in name or any(part in name for part in others))


def merge(model: nn.Module) -> nn.Module:
    """Merge every TGLoRALinear of `model`, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, TGLoRALinear):
            module.merge()
    return model
