"""BDTA + MoTE (Yao et al., AAAI 2026): tasks adapt beside a frozen backbone, not through it.

The backbone runs once, without a gradient, and gives F_1..F_4, its stages' maps before what ends
them. Beside it a bypass carries a map for each task from stage to stage; in stage i, at 1/r of the
channels (hats) and with A' and F' for what a task's own adapter makes of A and F (eq. 3-8):

    G2T    A_g2t = H(A_t, F')    H(q, v): x = q + attention(LN q, LN v),  x + FFN(LN x)
    T2G    F_t2g = H(F, A_g2t')  adapter: v + W_up GELU(W_down v)
    out    A_t   = W_out (A_g2t + F_t2g), then the frozen patch merging, to the next stage

MoTE takes each task's maps for an expert and adds to every task a gated mixture of all (eq. 9-11):

    R_t = A_t + gamma_t * sum_q g_t(q) A_q    g_t = softmax(h_t + N(0, 1) softplus(e_t))

    python train.py --dataset pascal --data-root data --method bdta

Tasks are folded into the batch (T*B, task after task), as groups are elsewhere: only adapters,
experts and heads are a task's own. Nothing flows back into the backbone's blocks, so they keep no
activations; the mergings, frozen too, are crossed by the bypass and pass its gradient on.
Shapes: B batch, T tasks, H W tokens, C channels, c = C / r, h heads, P points.
References: the paper, section 3; deformable attention: arXiv 2010.04159, section 4.1; its use as
here: ViT-Adapter, arXiv 2205.08534; noisy gates: arXiv 1701.06538.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders import make_head

DIRECTIONS = ("g2t", "t2g")


class DeformableAttention(nn.Module):
    """Every query looks at `points` places of the value map a head, and learns where they are.

    Places are offsets, in pixels of the value map, from where the query lies in it; between pixels
    values are interpolated bilinearly, outside they are zero.
    """

    def __init__(self, dim: int, heads: int = 6, points: int = 4):
        super().__init__()
        if dim % heads:
            raise ValueError(f"DeformableAttention: {dim} channels do not divide into {heads} "
                             "heads")
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(dim, heads * points * 2)
        self.attention_weights = nn.Linear(dim, heads * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        for linear in self.children():
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        # At first head i looks into direction i of a circle, 1, 2, ... P pixels far.
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ray = torch.stack([angle.cos(), angle.sin()], 1)        # (h, 2): x, y
        ray = ray / ray.abs().amax(1, keepdim=True)             # to the edge of a square
        distance = torch.arange(1, points + 1)[:, None]         # (P, 1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((ray[:, None] * distance).flatten())

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """query (B, H, W, C), value (B, H', W', C) -> (B, H, W, C)."""
        (H, W), (h, P) = query.shape[1:3], (self.heads, self.points)
        v = self.value_proj(value).unflatten(3, (h, -1))        # (B, H', W', h, C/h)
        v = v.permute(0, 3, 4, 1, 2).flatten(0, 1)              # (B*h, C/h, H', W')
        dx, dy = self.sampling_offsets(query).unflatten(3, (h, P, 2)).unbind(-1)
        weight = self.attention_weights(query).unflatten(3, (h, P)).softmax(-1)  # (B, H, W, h, P)
        # grid_sample's places: -1 is the edge of the first pixel, 1 that of the last. In float32
        # also under autocast, as bfloat16's digits would be half a pixel.
        place = dict(device=query.device, dtype=torch.promote_types(query.dtype, torch.float32))
        y, x = ((2 * torch.arange(n, **place) + 1) / n - 1 for n in (H, W))  # the queries' centres
        grid = torch.stack([x[:, None, None] + dx * (2 / value.shape[2]),
                            y[:, None, None, None] + dy * (2 / value.shape[1])], -1)
        grid = grid.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2)    # (B*h, H*W, P, 2)
        weight = weight.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)   # (B*h, H*W, P)
        v = F.grid_sample(v.to(grid.dtype), grid, align_corners=False)       # (B*h, C/h, H*W, P)
        out = (v * weight[:, None]).sum(-1)                                  # (B*h, C/h, H*W)
        out = out.unflatten(0, (-1, h)).flatten(1, 2).unflatten(2, (H, W))   # (B, C, H, W)
        return self.output_proj(out.permute(0, 2, 3, 1))


class FeedForward(nn.Module):
    """Two linear layers and, between them, a depth-wise 3x3 convolution."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, c) -> (B, H, W, c)."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2))
        return self.fc2(F.gelu(x).permute(0, 2, 3, 1))


class Direction(nn.Module):
    """H of eq. 3: the value, adapted by each task's own adapter, is injected into the query."""

    def __init__(self, dim: int, num_tasks: int):
        super().__init__()
        hidden = dim // 4
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
            for _ in range(num_tasks))
        self.query_norm, self.value_norm, self.ffn_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = DeformableAttention(dim, 4 if dim % 6 else 6)
        self.ffn = FeedForward(dim, hidden)

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """query, value (T*B, H, W, c) -> (T*B, H, W, c)."""
        values = value.unflatten(0, (len(self.adapters), -1))           # (T, B, H, W, c)
        value = torch.cat([v + adapter(v)                               # eq. 4 and 6
                           for adapter, v in zip(self.adapters, values)])
        x = query + self.attention(self.query_norm(query), self.value_norm(value))
        return x + self.ffn(self.ffn_norm(x))                           # eq. 5 and 7


class BDTA(nn.Module):
    """Bi-directional task adaptation of one stage (3.2); directions: those that are there."""

    def __init__(self, dim: int, num_tasks: int, reduction: int = 4,
                 directions: Sequence[str] = DIRECTIONS):
        super().__init__()
        if dim % reduction or dim < 4 * reduction:
            raise ValueError(f"BDTA: a reduction of {reduction} leaves no whole number of channels,"
                             f" 4 or more, of {dim}")
        c = dim // reduction
        self.num_tasks = num_tasks
        self.main_proj, self.bypass_proj = nn.Linear(dim, c), nn.Linear(dim, c)
        self.directions = nn.ModuleDict({name: Direction(c, num_tasks) for name in directions})
        self.output_proj = nn.Linear(c, dim)

    def forward(self, bypass: Tensor, main: Tensor) -> Tensor:
        """bypass (T*B, H, W, C), or (B, H, W, C) one for all tasks; main (B, H, W, C)
        -> (T*B, H, W, C)."""
        task, general = self.bypass_proj(bypass), self.main_proj(main)
        if bypass.shape[0] == main.shape[0]:                            # the first stage
            task = task.repeat(self.num_tasks, 1, 1, 1)
        general = general.repeat(self.num_tasks, 1, 1, 1)
        adapted = []
        if "g2t" in self.directions:
            task = self.directions["g2t"](task, general)
            adapted.append(task)
        if "t2g" in self.directions:
            adapted.append(self.directions["t2g"](general, task))
        return self.output_proj(sum(adapted))                           # eq. 8


class Router(nn.Module):
    """Each task's gates over all tasks, from the main branch (eq. 10)."""

    def __init__(self, dim: int, num_tasks: int):
        super().__init__()
        self.gate, self.noise = (nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim // 16), nn.GELU(), nn.Linear(dim // 16, num_tasks))
            for _ in range(num_tasks)) for _ in range(2))

    def forward(self, main: Tensor) -> Tensor:
        """main (B, H, W, C) -> (B, T, T): row t sums to one, entry q is how much t takes of q."""
        def pooled(mlps: nn.ModuleList) -> Tensor:
            return torch.stack([mlp(main).mean((1, 2)) for mlp in mlps], 1)  # (B, T, T)

        score = pooled(self.gate)
        if self.training:
            score = score + torch.randn_like(score) * F.softplus(pooled(self.noise))
        return score.softmax(-1)


class TaskExperts(nn.Module):
    """MoTE's part of one stage (3.3), up to its share of the concatenation's product with W_t."""

    def __init__(self, dim: int, width: int, num_tasks: int, bias: bool, mixture: bool):
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(dim, width) for _ in range(num_tasks))
        self.fuse = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(num_tasks))
        if mixture:
            self.router = Router(dim, num_tasks)
            self.gamma = nn.Parameter(torch.zeros(num_tasks, 1, 1, 1, width))
        self.mixture = mixture

    def forward(self, bypass: Tensor, main: Tensor) -> Tensor:
        """bypass (T*B, h, w, C), main (B, h, w, C) -> (T*B, h, w, C_1)."""
        maps = bypass.unflatten(0, (len(self.project), -1))                 # (T, B, h, w, C)
        x = torch.stack([f(m) for f, m in zip(self.project, maps)])         # eq. 9, own size
        if self.mixture:
            mixed = torch.einsum("btq,qbhwc->tbhwc", self.router(main), x)
            x = x + self.gamma * mixed                                      # eq. 11
        return torch.cat([f(m) for f, m in zip(self.fuse, x)])

    def product_macs(self, bypass: Tensor) -> int:
        """Multiply-accumulates of eq. 11's sum, for the bypass's maps."""
        T = len(self.project)
        return self.mixture * T * bypass[..., 0].numel() * self.project[0].out_features


class BDTANet(nn.Module):
    """A frozen backbone, the bypass, the experts and a head for each task.

    tasks: objects with `name` and `outputs`; reduction: r; directions: of DIRECTIONS, one or both;
    mixture: whether experts are mixed (MoTE), else a task keeps to its own.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence, reduction: int = 4,
                 directions: Sequence[str] = DIRECTIONS, mixture: bool = True):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        dims = [backbone.patch_embed.proj.out_channels, *backbone.channels[:-1]]  # C of each stage
        T, width = len(tasks), dims[0]
        self.bypass = nn.ModuleList(BDTA(dim, T, reduction, directions) for dim in dims)
        self.experts = nn.ModuleList(
            TaskExperts(dim, width, T, bias=i == 0, mixture=mixture)  # W_t has one bias
            for i, dim in enumerate(dims))
        self.decoders = nn.ModuleDict({task.name: make_head(width, task.outputs) for task in tasks})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (B, 3, H, W), normalised -> each task's prediction, (B, outputs, H, W)."""
        with torch.no_grad():
            main = self.backbone.patch_embed(image)         # (B, h, w, C_1), eq. 1
        bypass, fused = main, 0                             # eq. 2
        for stage, adapt, experts in zip(self.backbone.layers, self.bypass, self.experts):
            with torch.no_grad():
                main = stage.blocks(main)                   # F_i (B, h, w, C)
            bypass = adapt(bypass, main)                    # A_t^i (T*B, h, w, C)
            # 1x1 products and mixing commute with the upsampling, which therefore comes last.
            x = experts(bypass, main).permute(0, 3, 1, 2)   # (T*B, C_1, h, w)
            fused = x if stage is self.backbone.layers[0] else fused + F.interpolate(
                x, fused.shape[2:], mode="bilinear")        # (T*B, C_1, H/4, W/4)
            with torch.no_grad():
                main = end_stage(stage, main)
            bypass = end_stage(stage, bypass)
        maps = fused.unflatten(0, (len(self.decoders), -1))
        return {name: F.interpolate(head(x), image.shape[2:], mode="bilinear")
                for (name, head), x in zip(self.decoders.items(), maps)}


def end_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """What a stage does after its blocks: Swin's patch merging. (B, h, w, C) -> (B, h', w', C')."""
    for name, child in stage.named_children():
        if name != "blocks":
            x = child(x)
    return x
