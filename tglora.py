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

Shapes: B batch, G groups, r rank, R sum of all ranks, k inputs, d outputs, N rows per group (all
tokens of B images).
References: arXiv 2509.19602, section 3.2; LoRA, arXiv 2106.09685.
"""

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
    strict=False. The adapters of all groups are rows of two parameters: `lora_A` holds the rows of
    A_1, A_2, ..., and `lora_B` those of the transposed B_1, B_2, ... `scale` is gamma of eq. 4, a
    constant in the paper's recipe.

    The adapters are at least float32, even if the layer is bfloat16: there, most of an optimizer's
    small steps would be rounded away. Their products are computed in the layer's type, like W x.
    """

    def __init__(self, linear: nn.Linear, ranks: Sequence[int], scale: float = 4.0,
                 dropout: float = 0.05):
        super().__init__()
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

        R = sum(ranks)
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        bound = k ** -0.5  # A starts as the weight of nn.Linear(k, r) does
        A = self.weight.new_empty(R, k, dtype=precision).uniform_(-bound, bound)
        B = self.weight.new_zeros(R, d, dtype=precision)  # so training starts from W x + b
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        # The numbers of each group's rows, (G, r). Smaller ranks are filled up with row R.
        rows = torch.arange(R, device=self.weight.device).split(self.ranks)
        rows = pad_sequence(rows, batch_first=True, padding_value=R)
        self.register_buffer("rows", rows, persistent=False)
        self.train(linear.training)

    def adapter(self, g: int) -> tuple[Tensor, Tensor]:
        """A_g (r, k) and B_g (d, r) of eq. 4, as views of the parameters."""
        A = self.lora_A.split(self.ranks)[g]
        B_transposed = self.lora_B.split(self.ranks)[g]
        return A, B_transposed.T

    def forward(self, x: Tensor) -> Tensor:
        """Eq. 4: x (G*B, ..., k), group after group -> (G*B, ..., d)."""
        self.called = True
        G = len(self.ranks)
        grouped_x = x.unflatten(0, (G, -1))                           # (G, B, ..., k)
        if self.merged:
            y = [F.linear(x_g, W_g, self.bias) for x_g, W_g in zip(grouped_x, self.weight)]
            return torch.cat(y)                                       # (G*B, ..., d)
        y = F.linear(x, self.weight, self.bias)                       # W x, for all groups at once
        # Dropout acts on the adapters' input. W x is computed without dropout.
        dropped_x = F.dropout(grouped_x, self.dropout, self.training)
        flat_x = dropped_x.flatten(1, -2)                             # (G, N, k)
        flat_y = y.view(G, -1, self.out_features)                     # (G, N, d)
        return self.add_low_rank(flat_y, flat_x).view(y.shape)

    def add_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the adapters' outputs: y_g + gamma B_g A_g x_g. y (G, N, d), x (G, N, k).

        Each of the two products is computed for all groups at once.
        """
        A = self.by_group(self.lora_A)                                # (G, r, k)
        B_transposed = self.by_group(self.lora_B)                     # (G, r, d)
        low_rank_x = x @ A.mT.to(x.dtype)                             # (G, N, r)
        return torch.baddbmm(y, low_rank_x, B_transposed.to(x.dtype), alpha=self.scale)

    def by_group(self, rows: Tensor) -> Tensor:
        """The rows of each group: (R, n) -> (G, r, n), smaller ranks padded with zeros.

        On a GPU, the time of a training step depends on the number of operations. Here, there are
        few: equal ranks need only a view, and other ranks one gather for all groups.
        """
        if len(set(self.ranks)) == 1:
            return rows.unflatten(0, (len(self.ranks), -1))
        with_zeros = F.pad(rows, (0, 0, 0, 1))                        # row R is zero
        return F.embedding(self.rows, with_zeros)

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
        products. The weights are computed in at least float32, even inside autocast. Merging cannot
        be undone or repeated.
        """
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        W = self.weight.to(precision)
        merged = []
        with torch.autocast(W.device.type, enabled=False):
            for g in range(len(self.ranks)):
                A, B = self.adapter(g)
                W_g = W + self.scale * B.to(precision) @ A.to(precision)
                merged.append(W_g.to(self.weight.dtype))
        self.weight = nn.Parameter(torch.stack(merged), requires_grad=False)
        del self.lora_A, self.lora_B
        self.merged = True


def split_rank(rank: int, group_sizes: Sequence[int]) -> tuple[int, ...]:
    """Divide a combined rank among groups in proportion to their numbers of tasks (section 4.3).

    The result sums to `rank` exactly. Every group starts with 1, and the rest is given out one by
    one, each time to the group furthest below its share. Raises ValueError if `rank` is smaller
    than the number of groups.
    """
    if rank < len(group_sizes):
        raise ValueError(f"rank {rank} is smaller than the number of task groups, "
                         f"{len(group_sizes)}; every group needs a rank of at least 1")
    shares = [rank * size / sum(group_sizes) for size in group_sizes]
    ranks = [1] * len(group_sizes)
    while sum(ranks) < rank:
        missing = [share - r for share, r in zip(shares, ranks)]
        ranks[missing.index(max(missing))] += 1
    return tuple(ranks)


def add_adapters(module: nn.Module, names: Sequence[str], ranks: Sequence[int],
                 scale: float = 4.0, dropout: float = 0.05) -> None:
    """Wrap, in place, every linear layer in `module` whose path ends in one of `names`.

    names: whole components at the end of a path, such as ("attn.qkv", "mlp.fc1") in Swin or
    ("mlp.0", "mlp.3") in torchvision's ViT. ranks: one per group. A layer that appears under two
    such paths is wrapped once, so both paths share its adapters.

    Raises ValueError if `names` is a string or empty, if one of them matches no linear layer, or if
    a layer does more than W x + b, because the rest would be lost: it must be an nn.Linear itself,
    not of a subclass, with a Parameter as its weight and without hooks.

    Some modules read the weights of their linear layers without calling the layers, so an adapter
    would silently do nothing. The attention of torchvision's Swin always does this, and
    nn.TransformerEncoderLayer may do it in eval mode, unless you call
    torch.backends.mha.set_fastpath_enabled(False). Therefore, each forward pass of `module` checks
    that all adapted layers were called, and raises ValueError if not. If your model skips whole
    blocks at random, call add_adapters once per block instead.
    """
    refuse_string(names)
    if not names:
        raise ValueError("add_adapters: `names` is empty, so no layer would be adapted")
    linears = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, nn.Linear):
            linears[path] = child
    paths = []
    for name in names:
        matching = [path for path in linears if f".{path}".endswith(f".{name}")]
        if not matching:
            raise ValueError(f"add_adapters: no linear layer's path ends in {name!r}; the linear "
                             f"layers are: {', '.join(linears) or 'none'}")
        paths += matching
    for path in paths:
        if not is_plain(linears[path]):
            raise ValueError(f"add_adapters: {path} is not a plain nn.Linear (it is a subclass, or "
                             "it has hooks, or its weight is not a Parameter), and everything but "
                             "W x + b would be lost; adapt other layers, or make this one plain")

    adapted = {}
    for path in paths:
        linear = linears[path]
        if linear not in adapted:
            adapted[linear] = TGLoRALinear(linear, ranks, scale, dropout)
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, adapted[linear])
    layers = {path: adapted[linears[path]] for path in paths}
    module.register_forward_pre_hook(partial(forget_calls, layers))
    module.register_forward_hook(partial(check_called, layers))


def refuse_string(names: Sequence[str]) -> None:
    """Raise ValueError for a string, because its letters would be taken for names."""
    if isinstance(names, str):
        raise ValueError(f"expected a list of names, got the string {names!r}; write [{names!r}]")


def is_plain(linear: nn.Linear) -> bool:
    """Whether the layer computes W x + b and does nothing else."""
    has_hooks = any(value for name, value in vars(linear).items() if name.endswith("_hooks"))
    return type(linear) is nn.Linear and isinstance(linear.weight, nn.Parameter) and not has_hooks


def forget_calls(layers: dict[str, TGLoRALinear], module: nn.Module, inputs: Any) -> None:
    """Hook before each forward pass. torch.utils.checkpoint calls layers during a backward pass."""
    for layer in layers.values():
        layer.called = False


def check_called(layers: dict[str, TGLoRALinear], module: nn.Module, inputs: Any,
                 output: Any) -> None:
    """Hook after each forward pass: raises ValueError if an adapted layer was not called.

    One check is not enough, because torch's encoder layer may call its linear layers in train mode
    but not in eval mode.
    """
    idle = [path for path, layer in layers.items() if not layer.called]
    if idle:
        raise ValueError(f"add_adapters: {len(idle)} of {len(layers)} adapted layers were not "
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
    """Freeze all parameters except the adapters and those whose names contain one of `others`.

    Raises ValueError as `parameters_with` does.
    """
    trained = parameters_with(backbone, others)
    for name, p in backbone.named_parameters():
        p.requires_grad_("lora_" in name)
    for p in trained:
        p.requires_grad_(True)


def parameters_with(module: nn.Module, parts: Sequence[str]) -> list[nn.Parameter]:
    """The parameters whose names contain one of `parts`.

    Raises ValueError if `parts` is a string, or if no parameter's name contains one of them.
    """
    refuse_string(parts)
    parameters = []
    for part in parts:
        matching = [p for name, p in module.named_parameters() if part in name]
        if not matching:
            raise ValueError(f"no parameter of the {type(module).__name__} has {part!r} in its "
                             "name")
        parameters += matching
    return parameters


def merge(model: nn.Module) -> nn.Module:
    """Merge every TGLoRALinear of `model`, in place, and return the model."""
    for module in model.modules():
        if isinstance(module, TGLoRALinear):
            module.merge()
    return model
