"""Task-Grouped LoRA: one frozen linear layer with a low-rank adapter for each group of tasks.

    y_g = W x_g + gamma B_g A_g x_g        (TGLoRA paper, section 3.2, eq. 4)

The key trick: because all groups share the frozen W, their inputs can travel as one batch, group
after group: x (G*B, ..., k). Norms, activations and attention know nothing about groups. Within a
stage, only this layer takes the batch apart, to add each group's adapter. With one group, the layer
is plain LoRA.

    layer = TGLoRALinear(nn.Linear(96, 288), ranks=(32, 16, 16))    # three groups
    y = layer(x)                                                    # (3*B, L, 96) -> (3*B, L, 288)

To adapt a whole backbone, cut it into stages: `add_adapters` wraps the linear layers of a stage,
and `run_stages` runs the stages in order and branches before each one as the tree of tasks says.

Shapes: B batch, G groups, r rank, k inputs, d outputs, N rows per group (all tokens of B images).
References: arXiv 2509.19602, section 3.2; LoRA, arXiv 2106.09685.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class TGLoRALinear(nn.Module):
    """A frozen linear layer plus one adapter of rank ranks[g] for each group g.

    `weight` and `bias` keep their names, so checkpoints of the original model still load with
    strict=False. All new parameters are called `lora_*`. `scale` is gamma of eq. 4, a constant in
    the paper's recipe. Raises ValueError if `ranks` is empty or contains a rank below 1, or for a
    lazy layer that has no weight yet.
    """

    least_rank = 1  # extras.mtlora allows 0, which means no adapter

    def __init__(self, linear: nn.Linear, ranks: Sequence[int], scale: float = 4.0,
                 dropout: float = 0.05):
        super().__init__()
        if not ranks or min(ranks) < self.least_rank:
            raise ValueError("TGLoRALinear: every group needs a rank of at least "
                             f"{self.least_rank}, got {tuple(ranks)}")
        if isinstance(linear.weight, nn.parameter.UninitializedParameter):
            raise ValueError("TGLoRALinear: a lazy linear layer has no weight yet; run the model "
                             "once before you adapt it")
        d, k = linear.weight.shape
        self.in_features = k
        self.out_features = d
        self.ranks = tuple(ranks)
        self.scale = scale
        self.dropout = dropout
        self.merged = False
        self.called = False  # set by forward, read by `check_called`

        self.weight = linear.weight
        self.bias = linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

        self.lora_A = nn.ParameterList()
        self.lora_B = nn.ParameterList()
        for r in ranks:
            A = self.weight.new_empty(r, k)
            B = self.weight.new_zeros(d, r)  # zero: training starts from the frozen layer
            if r > 0:
                nn.init.kaiming_uniform_(A, a=5 ** 0.5)  # as in nn.Linear and in LoRA
            self.lora_A.append(nn.Parameter(A))
            self.lora_B.append(nn.Parameter(B))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Eq. 4: x (G*B, ..., k), group after group -> (G*B, ..., d)."""
        self.called = True
        G = len(self.ranks)
        if x.shape[0] % G:
            raise ValueError(f"TGLoRALinear: a batch of {x.shape[0]} cannot be split into {G} "
                             "groups of equal size")
        if self.merged:
            return self.forward_merged(x)
        y = F.linear(x, self.weight, self.bias)                       # W x, for all groups at once
        flat_x = self.drop(x).reshape(G, -1, self.in_features)        # (G, N, k)
        flat_y = y.view(G, -1, self.out_features)                     # (G, N, d)
        return self.add_low_rank(flat_y, flat_x).view(y.shape)

    def forward_merged(self, x: Tensor) -> Tensor:
        """`forward` after `merge`, when each group has its own weight: y_g = W_g x_g + bias."""
        x = x.unflatten(0, (len(self.ranks), -1))                     # (G, B, ..., k)
        y = [F.linear(x_g, W_g, self.bias) for x_g, W_g in zip(x, self.weight)]
        return torch.cat(y)                                           # (G*B, ..., d)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on the adapters' input. The frozen product W x is computed without dropout."""
        return F.dropout(x, self.dropout, self.training)

    def add_low_rank(self, y: Tensor, x: Tensor, groups: slice = slice(None)) -> Tensor:
        """Add the adapters' outputs, for all groups or a slice: y_g + gamma B_g A_g x_g (eq. 4).

        y (G, N, d), or (1, N, d) if all groups start from the same y; x (G, N, k) -> (G, N, d).
        With a slice, G is the number of groups in it. Each of the two products is computed for all
        G groups at once: smaller ranks are padded with zeros.
        """
        A = list(self.lora_A)[groups]
        B_transposed = [B.T for B in list(self.lora_B)[groups]]
        A = pad_sequence(A, batch_first=True)                         # (G, r, k)
        B_transposed = pad_sequence(B_transposed, batch_first=True)   # (G, r, d)
        return torch.baddbmm(y, x @ A.mT, B_transposed, alpha=self.scale)

    def macs(self, rows: int) -> tuple[int, int]:
        """Multiply-accumulates for `rows` rows per group: (frozen layer, adapters)."""
        G = len(self.ranks)
        k = self.in_features
        d = self.out_features
        inputs = k if self.bias is None else k + 1
        rank = 0 if self.merged else max(self.ranks)  # smaller ranks are padded to the largest
        return G * rows * inputs * d, G * rows * rank * (k + d)

    @torch.no_grad()
    def merge(self) -> None:
        """Give each group its own weight, with its adapter folded in: W_g = W + gamma B_g A_g.

        `weight` becomes (G, d, k), and the adapters are removed, so inference needs no extra
        products. The weights are computed in float32. Merging cannot be undone; a second call
        raises ValueError.
        """
        if self.merged:
            raise ValueError("TGLoRALinear: this layer is already merged; merge it only once")
        W = self.weight.float()
        merged = []
        for A, B in zip(self.lora_A, self.lora_B):
            W_g = W + self.scale * B.float() @ A.float()
            merged.append(W_g.to(self.weight.dtype))
        self.weight = nn.Parameter(torch.stack(merged), requires_grad=False)
        del self.lora_A, self.lora_B
        self.merged = True

    def extra_repr(self) -> str:
        return (f"{self.in_features} -> {self.out_features}, ranks={self.ranks}, "
                f"scale={self.scale}, merged={self.merged}")


def split_rank(rank: int, group_sizes: Sequence[int]) -> tuple[int, ...]:
    """Divide a combined rank among groups in proportion to their numbers of tasks (section 4.3).

    The result sums to `rank` exactly, and every group gets at least 1. The shares are rounded down,
    and the remainder goes to the groups furthest below their share. Raises ValueError if `rank` is
    smaller than the number of groups.
    """
    if rank < len(group_sizes):
        raise ValueError(f"rank {rank} is smaller than the number of task groups, "
                         f"{len(group_sizes)}; every group needs a rank of at least 1")
    shares = [rank * size / sum(group_sizes) for size in group_sizes]
    ranks = [max(1, int(share)) for share in shares]
    while sum(ranks) < rank:
        missing = [share - r for share, r in zip(shares, ranks)]
        ranks[missing.index(max(missing))] += 1
    while sum(ranks) > rank:  # small groups were raised to 1: take the excess from larger ones
        excess = [r - share if r > 1 else -math.inf for share, r in zip(shares, ranks)]
        ranks[excess.index(max(excess))] -= 1
    return tuple(ranks)


def add_adapters(module: nn.Module, names: Sequence[str], ranks: Sequence[int],
                 scale: float = 4.0, dropout: float = 0.05) -> None:
    """Wrap, in place, every linear layer in `module` whose path ends in one of `names`.

    names: whole components at the end of a path, such as ("attn.qkv", "mlp.fc1") in Swin or
    ("mlp.0", "mlp.3") in torchvision's ViT. ranks: one per group. A layer that appears under two
    such paths is wrapped once, so both paths share its adapters.

    Raises ValueError if one of `names` matches no linear layer. Some modules read the weights of
    their linear layers without calling the layers, so an adapter would silently do nothing. The
    attention of torchvision's Swin and nn.MultiheadAttention always do this, and
    nn.TransformerEncoderLayer may do it in eval mode, unless you call
    torch.backends.mha.set_fastpath_enabled(False). Therefore, each forward pass of `module` checks
    that all adapted layers were called, and raises ValueError if not (except under torch.compile
    and torch.export). If your model skips whole blocks at random, call add_adapters once per block
    instead.
    """
    linears = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, nn.Linear):
            linears[path] = child
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in linears):
            raise ValueError(f"add_adapters: no linear layer's path ends in {name!r}; the linear "
                             f"layers are: {', '.join(linears) or 'none'}")

    endings = tuple(f".{name}" for name in names)
    paths = [path for path in linears if f".{path}".endswith(endings)]
    adapted = {}
    for path in paths:
        linear = linears[path]
        if linear not in adapted:
            adapted[linear] = TGLoRALinear(linear, ranks, scale, dropout)
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, adapted[linear])
    module.register_forward_hook(partial(check_called, paths))


def check_called(paths: Sequence[str], module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of `add_adapters`: checks that every adapted layer in `paths` was called.

    The check runs after every forward pass, not only the first, because torch's encoder layer may
    call its linear layers in train mode but not in eval mode. The hook stores paths, not layers, so
    it also works for a copy of the module. Raises ValueError if a layer was not called.
    """
    if torch.compiler.is_compiling():  # also true under torch.export
        return
    idle = []
    for path, layer in module.named_modules():
        if path in paths and isinstance(layer, TGLoRALinear):
            if not layer.called:
                idle.append(path)
            layer.called = False
    if idle:
        raise ValueError(f"add_adapters: {len(idle)} of {len(paths)} adapted layers were not "
                         f"called in the forward pass, for example {idle[0]}: the model may "
                         "read their weights directly, which ignores the adapters; adapt other "
                         "layers, or call torch.backends.mha.set_fastpath_enabled(False) if the "
                         "model is a torch encoder in eval mode")


def run_stages(stages: Iterable[nn.Module], x: Tensor, parents: Sequence[Sequence[int]]
               ) -> list[Tensor]:
    """Run x through the stages of a backbone and branch before each stage as the tree says.

    x (B, ...): the first stage's input. parents[stage][group]: the group of the previous stage
    that this group continues, always 0 in the first stage (grouping.routing computes `parents` from
    a tree). Each stage gets one batch (G*B, ...), group after group. A stage may be any module that
    does not mix the examples of a batch. Returns a list with each stage's output, (G, B, ...).
    """
    x = x[None]                                       # (1, B, ...): one group with all tasks
    maps = []
    for stage, parent in zip(stages, parents, strict=True):
        if list(parent) != list(range(len(x))):       # if nothing branches, no copy is needed
            x = torch.stack([x[p] for p in parent])   # (G, B, ...)
        B = x.shape[1]
        x = stage(x.flatten(0, 1))                    # (G*B, ...)
        x = x.unflatten(0, (-1, B))                   # (G, B, ...)
        maps.append(x)
    return maps


def freeze(backbone: nn.Module, others: Sequence[str] = ()) -> None:
    """Freeze all parameters except the adapters and those whose names contain one of `others`."""
    for name, p in backbone.named_parameters():
        is_other = any(part in name for part in others)
        p.requires_grad_("lora_" in name or is_other)


def merge(model: nn.Module) -> nn.Module:
    """Merge every TGLoRALinear of `model`, in place, and return the model."""
    for module in model.modules():
        if isinstance(module, TGLoRALinear):
            module.merge()
    return model
