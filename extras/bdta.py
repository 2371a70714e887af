"""BDTA + MoTE (Yao et al., AAAI 2026): a trained bypass next to the frozen backbone.

The backbone runs once, without gradients. F is the map of a stage, taken before its patch merging.
The bypass carries one map A_t per task from stage to stage. In every stage it works with 1/r of the
channels and adapts in two directions: from general to task (G2T), and from task to general (T2G).
A prime (') marks a map that has passed through the task's adapter:

    A_g2t = H(A_t, F')              H(q, v): x + FFN(LN x), with x = q + attention(LN q, LN v)
    F_t2g = H(F, A_g2t')            adapter: v + W_up GELU(W_down v)
    A_t   = W_out (A_g2t + F_t2g)   back to all channels; the frozen merging follows     (eq. 3-8)

MoTE treats the tasks' maps as experts, and adds a gated mixture of them all to each task's map:

    R_t = A_t + gamma_t * sum_q g_t(q) A_q,   g_t = softmax(h_t + N(0, 1) softplus(e_t))  (eq. 9-11)

Two small MLPs compute h_t and e_t from F; in evaluation, the noise is left out. At the end, one
matrix W_t per task combines the R_t of all four stages for the task's head.

    python train.py --dataset pascal --data-root data --method bdta

Tasks are folded into the batch (task after task), as groups are in tglora.py. The backbone's blocks
store no activations, because no gradient flows through them. The gradient of the bypass does flow
through the frozen mergings.
Shapes: B batch, T tasks, H W pixels or tokens, h w tokens of a stage, C channels, c = C / r; in the
attention, h heads and P points.
References: the paper, section 3; deformable attention: arXiv 2010.04159, section 4.1, used as in
ViT-Adapter, arXiv 2205.08534; noisy gates: arXiv 1701.06538.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders import make_head

REDUCTION = 4   # r
EPS = 1e-6      # epsilon of the LayerNorms in `Direction`, as in ViT-Adapter


class DeformableAttention(nn.Module):
    """For each query, every head reads the value map at only `points` sampling positions.

    A linear layer computes these positions from the query, as offsets (in pixels of the value map)
    from the query's own position. Values between pixels are interpolated bilinearly, and values
    outside the map are zero. `heads` must divide `dim`.
    """

    def __init__(self, dim: int, heads: int = 6, points: int = 4):
        super().__init__()
        self.heads = heads
        self.points = points
        self.sampling_offsets = nn.Linear(dim, heads * points * 2)
        self.attention_weights = nn.Linear(dim, heads * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights: head i reads in direction i, 1 to P pixels from the query."""
        for linear in self.children():
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)              # (h, 2): x, y
        direction = direction / direction.abs().amax(1, keepdim=True)       # max(|x|, |y|) = 1
        distance = torch.arange(1, self.points + 1)
        offsets = direction[:, None] * distance[:, None]                    # (h, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """query (B, H, W, C), value (B, H', W', C) -> (B, H, W, C)."""
        B, H, W, C = query.shape
        h, P = self.heads, self.points
        v = self.value_proj(value).unflatten(3, (h, -1))                    # (B, H', W', h, C/h)
        v = v.permute(0, 3, 4, 1, 2).flatten(0, 1)                          # (B*h, C/h, H', W')

        offsets = self.sampling_offsets(query)
        dx, dy = offsets.unflatten(3, (h, P, 2)).unbind(-1)                 # (B, H, W, h, P)
        # Positions are float32 even under autocast: on large maps, bfloat16 would round them by a
        # noticeable fraction of a pixel.
        x = centres(W, query.device)[:, None, None]                         # (W, 1, 1)
        y = centres(H, query.device)[:, None, None, None]                   # (H, 1, 1, 1)
        x = x + dx * (2 / value.shape[2])       # grid_sample counts from -1 to 1 along each side
        y = y + dy * (2 / value.shape[1])
        grid = torch.stack([x, y], -1)                                      # (B, H, W, h, P, 2)
        grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(B * h, H * W, P, 2)

        weights = self.attention_weights(query).unflatten(3, (h, P)).softmax(-1)
        weights = weights.permute(0, 3, 1, 2, 4).reshape(B * h, 1, H * W, P)
        samples = F.grid_sample(v, grid, align_corners=False)               # (B*h, C/h, H*W, P)
        out = (samples * weights).sum(-1)                                   # (B*h, C/h, H*W)
        out = out.reshape(B, C, H, W).permute(0, 2, 3, 1)
        return self.output_proj(out)


def centres(n: int, device: torch.device) -> Tensor:
    """The centres of n pixels (n,) in grid_sample's coordinates, where a map spans -1 to 1."""
    return (2 * torch.arange(n, device=device) + 1) / n - 1


class FeedForward(nn.Module):
    """Two linear layers with a depth-wise 3x3 convolution and a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, c) -> (B, H, W, c)."""
        x = self.fc1(x).permute(0, 3, 1, 2)
        x = F.gelu(self.dwconv(x))
        return self.fc2(x.permute(0, 2, 3, 1))


def make_mlps(count: int, dim: int, hidden: int, outputs: int) -> nn.ModuleList:
    """`count` MLPs with one hidden layer each."""
    mlps = nn.ModuleList()
    for _ in range(count):
        mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        mlps.append(mlp)
    return mlps


class Direction(nn.Module):
    """One direction, G2T or T2G: each task's adapter changes its value map, then H is applied."""

    def __init__(self, dim: int, num_tasks: int):
        super().__init__()
        hidden = dim // 4
        self.adapters = make_mlps(num_tasks, dim, hidden, dim)
        self.query_norm = nn.LayerNorm(dim, eps=EPS)
        self.value_norm = nn.LayerNorm(dim, eps=EPS)
        self.ffn_norm = nn.LayerNorm(dim, eps=EPS)
        heads = 6 if dim % 6 == 0 else 4
        self.attention = DeformableAttention(dim, heads)
        self.ffn = FeedForward(dim, hidden)

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """query, value (T*B, H, W, c) -> (T*B, H, W, c)."""
        values = value.unflatten(0, (len(self.adapters), -1))           # (T, B, H, W, c)
        adapted = []
        for v, adapter in zip(values, self.adapters):
            adapted.append(v + adapter(v))                              # eq. 4 and 6
        value = torch.cat(adapted)
        x = query + self.attention(self.query_norm(query), self.value_norm(value))
        x = x + self.ffn(self.ffn_norm(x))                              # eq. 5 and 7
        return x


class BDTA(nn.Module):
    """Bi-directional task adaptation in one stage (section 3.2).

    directions: "g2t", "t2g" or both. With only one (an ablation, table 5), the result of that
    direction replaces the sum in eq. 8. T2G without G2T reads the bypass instead of G2T's result.
    """

    def __init__(self, dim: int, num_tasks: int, directions: Sequence[str] = ("g2t", "t2g")):
        super().__init__()
        c = dim // REDUCTION
        self.num_tasks = num_tasks
        self.main_proj = nn.Linear(dim, c)
        self.bypass_proj = nn.Linear(dim, c)
        self.directions = nn.ModuleDict()
        for name in directions:
            self.directions[name] = Direction(c, num_tasks)
        self.output_proj = nn.Linear(c, dim)

    def forward(self, bypass: Tensor, main: Tensor) -> Tensor:
        """bypass (T*B, H, W, C), main (B, H, W, C) -> (T*B, H, W, C).

        In the first stage, where all tasks start from the same map, bypass is (B, H, W, C).
        """
        task = self.bypass_proj(bypass)
        general = self.main_proj(main)
        if task.shape[0] == general.shape[0]:
            task = task.repeat(self.num_tasks, 1, 1, 1)
        general = general.repeat(self.num_tasks, 1, 1, 1)               # (T*B, H, W, c)
        adapted = []
        if "g2t" in self.directions:
            task = self.directions["g2t"](task, general)
            adapted.append(task)
        if "t2g" in self.directions:
            adapted.append(self.directions["t2g"](general, task))
        return self.output_proj(sum(adapted))                           # eq. 8


class Router(nn.Module):
    """Computes each task's gates, one per expert, from the backbone's map (eq. 10).

    Noise is added only in training.
    """

    def __init__(self, dim: int, num_tasks: int):
        super().__init__()
        hidden = dim // 16
        self.gate = make_mlps(num_tasks, dim, hidden, num_tasks)
        self.noise = make_mlps(num_tasks, dim, hidden, num_tasks)

    def forward(self, main: Tensor) -> Tensor:
        """main (B, H, W, C) -> (B, T, T). Entry (b, t, q) is task t's gate for expert q."""
        score = self.pooled(self.gate, main)                            # h_t
        if self.training:
            deviation = F.softplus(self.pooled(self.noise, main))       # softplus(e_t)
            score = score + torch.randn_like(score) * deviation
        return score.softmax(-1)

    def pooled(self, mlps: nn.ModuleList, main: Tensor) -> Tensor:
        """The outputs of each MLP, averaged over all tokens: (B, T, T)."""
        scores = [mlp(main).mean((1, 2)) for mlp in mlps]
        return torch.stack(scores, 1)


class TaskExperts(nn.Module):
    """MoTE in one stage (section 3.3): project, mix, then multiply by this stage's columns of W_t.

    The paper applies the matrix W_t to the concatenated maps of all stages. Here each stage applies
    its own columns of W_t (`fuse`), and BDTANet adds up the results.

    width: C_1, the number of channels in the first stage.
    bias: whether `fuse` has a bias. W_t has a single bias, so only one stage gets it.
    mixture: if False, each task uses only its own expert (table 4).
    """

    def __init__(self, dim: int, width: int, num_tasks: int, bias: bool, mixture: bool):
        super().__init__()
        self.mixture = mixture
        self.project = nn.ModuleList()
        for _ in range(num_tasks):
            self.project.append(nn.Linear(dim, width))
        self.fuse = nn.ModuleList()
        for _ in range(num_tasks):
            self.fuse.append(nn.Linear(width, width, bias=bias))
        if mixture:
            self.router = Router(dim, num_tasks)
            self.gamma = nn.Parameter(torch.zeros(num_tasks, 1, 1, 1, width))

    def forward(self, bypass: Tensor, main: Tensor) -> Tensor:
        """bypass (T*B, h, w, C), main (B, h, w, C) -> (T*B, h, w, C_1)."""
        maps = bypass.unflatten(0, (len(self.project), -1))             # (T, B, h, w, C)
        # eq. 9 without its upsampling, which follows in BDTANet
        experts = [project(x) for project, x in zip(self.project, maps)]
        x = torch.stack(experts)                                        # (T, B, h, w, C_1)
        if self.mixture:
            gates = self.router(main)                                   # (B, T, T)
            mixed = torch.einsum("btq,qbhwc->tbhwc", gates, x)
            x = x + self.gamma * mixed                                  # eq. 11
        fused = [fuse(r) for fuse, r in zip(self.fuse, x)]
        return torch.cat(fused)

    def product_macs(self, bypass: Tensor) -> int:
        """Multiply-accumulates of the sum in eq. 11, for bypass (T*B, h, w, C)."""
        if not self.mixture:
            return 0
        num_tasks = len(self.project)
        tokens = bypass.shape[0] * bypass.shape[1] * bypass.shape[2]    # of all tasks
        return num_tasks * tokens * self.project[0].out_features


class BDTANet(nn.Module):
    """The frozen backbone, the bypass, the experts, and one head per task.

    tasks: objects with `name` and `outputs`. directions and mixture: for the paper's ablations, see
    `BDTA` and `TaskExperts`.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence,
                 directions: Sequence[str] = ("g2t", "t2g"), mixture: bool = True):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        first = backbone.patch_embed.proj.out_channels
        dims = [first, *backbone.channels[:-1]]         # C of each stage, before its merging
        num_tasks = len(tasks)
        self.bypass = nn.ModuleList()
        for dim in dims:
            self.bypass.append(BDTA(dim, num_tasks, directions))
        self.experts = nn.ModuleList()
        for i, dim in enumerate(dims):
            self.experts.append(TaskExperts(dim, first, num_tasks, bias=i == 0, mixture=mixture))
        self.decoders = nn.ModuleDict()
        for task in tasks:
            self.decoders[task.name] = make_head(first, task.outputs)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """image (B, 3, H, W), normalised -> each task's prediction (B, outputs, H, W)."""
        with torch.no_grad():
            main = self.backbone.patch_embed(image)     # eq. 1, (B, H/4, W/4, C_1)
        bypass = main                                   # eq. 2
        size = main.shape[1:3]
        fused = 0
        for stage, adapt, experts in zip(self.backbone.layers, self.bypass, self.experts):
            with torch.no_grad():
                main = stage.blocks(main)               # F of this stage (B, h, w, C)
            bypass = adapt(bypass, main)                # A_t of this stage (T*B, h, w, C)
            # The paper upsamples before it mixes. Here upsampling comes after the mixing and after
            # W_t. The result is the same, and these two steps cost less on the small maps.
            x = experts(bypass, main).permute(0, 3, 1, 2)               # (T*B, C_1, h, w)
            fused = fused + F.interpolate(x, size, mode="bilinear")     # (T*B, C_1, H/4, W/4)
            with torch.no_grad():
                main = end_stage(stage, main)
            bypass = end_stage(stage, bypass)
        maps = fused.unflatten(0, (len(self.decoders), -1))             # (T, B, C_1, H/4, W/4)
        predictions = {}
        for (name, head), x in zip(self.decoders.items(), maps):
            predictions[name] = F.interpolate(head(x), image.shape[2:], mode="bilinear")
        return predictions


def end_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """Run the modules that follow a stage's blocks, such as Swin's patch merging.

    (B, h, w, C) -> (B, h', w', C').
    """
    for name, child in stage.named_children():
        if name != "blocks":
            x = child(x)
    return x
