"""Swin Transformer (Liu et al., ICCV 2021), from scratch: the backbone that is adapted.

The image is cut into patches of 4x4 pixels, and each patch becomes a token. Four stages of blocks
follow. A block computes

    x = x + attention(norm1(x))     inside windows of 7x7 tokens, with a bias per relative position
    x = x + mlp(norm2(x))

Every second block shifts its windows by half a window, so that information crosses their borders.
Each of the first three stages ends by merging 2x2 neighbouring tokens and doubling the channels.

For dense prediction the backbone has no final norm and no classifier, and returns one map per
stage. Parameters keep their names from the official checkpoints, so these load without renaming.

    backbone = build_swin("tiny")
    load_weights(backbone, "imagenet")      # weights.py
    maps = backbone(image)                  # (B, 3, H, W) -> 4 maps (B, h, w, c)

The strides of the maps are 8, 16, 32 and 32: each is taken at the end of its stage, which is after
the patch merging in the first three stages.
Shapes: B batch, H W pixels or tokens, C channels, N windows, L tokens per window, h w c height,
width and channels of an output map.
References: arXiv 2103.14030; https://github.com/microsoft/Swin-Transformer (parameter names).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

PRESETS = {
    "mini": dict(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16)),  # ours, for a CPU
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cut a map into windows of w x w tokens, w = `window`: (B, H, W, C) -> (B, N, L, C).

    H and W must be multiples of w.
    """
    x = x.unflatten(2, (-1, window))            # (B, H, W/w, w, C)
    x = x.unflatten(1, (-1, window))            # (B, H/w, w, W/w, w, C)
    x = x.transpose(2, 3)                       # (B, H/w, W/w, w, w, C)
    return x.flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, window: int, H: int, W: int) -> Tensor:
    """The inverse of `to_windows`: (B, N, L, C) -> (B, H, W, C)."""
    x = x.unflatten(2, (window, window))
    x = x.unflatten(1, (H // window, W // window))
    x = x.transpose(2, 3)                       # (B, H/w, w, W/w, w, C)
    return x.flatten(3, 4).flatten(1, 2)


def relative_position_index(window: int) -> Tensor:
    """The row of the bias table for each (query, key) pair of tokens in a window: (L, L) int64."""
    axis = torch.arange(window)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    y, x = y.flatten(), x.flatten()             # (L,)
    dy = y[:, None] - y[None, :]                # (L, L), from -(window - 1) to window - 1
    dx = x[:, None] - x[None, :]
    row = dy + window - 1
    column = dx + window - 1
    return row * (2 * window - 1) + column


def shift_mask(H: int, W: int, window: int, shift: tuple[int, int], device: torch.device) -> Tensor:
    """Additive attention mask (N, L, L) for a map that was rolled by `shift` tokens (y, x).

    It is -100 between tokens that share a window only because the roll wraps around, otherwise 0.
    """
    rows = torch.zeros(H, device=device)
    rows[H - shift[0]:] = 1                     # these rows came from the other side of the map
    columns = torch.zeros(W, device=device)
    columns[W - shift[1]:] = 1
    region = 2 * rows[:, None] + columns        # (H, W), one number per region
    region = to_windows(region[None, :, :, None], window)[0, :, :, 0]   # (N, L)
    different = region[:, :, None] != region[:, None, :]                # (N, L, L)
    return different * -100.0


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learned relative position bias."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("index", relative_position_index(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, L, C), mask (N, L, L) or None -> (B, N, L, C)."""
        B, N, L, C = x.shape
        qkv = self.qkv(x).view(B * N, L, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # (B*N, heads, L, C/heads) each
        bias = self.relative_position_bias_table[self.index]    # (L, L, heads)
        bias = bias.permute(2, 0, 1)[None].to(q.dtype)          # (1, heads, L, L)
        if mask is not None:
            bias = bias + mask[:, None].to(q.dtype)             # (N, heads, L, L)
            bias = bias.repeat(B, 1, 1, 1)                      # (B*N, heads, L, L)
        if bias.requires_grad:
            # Fused attention kernels compute the bias gradient slowly, and crash on some GPUs.
            scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
            x = scores.softmax(-1).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x.transpose(1, 2).reshape(B, N, L, C)
        return self.proj(x)

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k^T and of softmax(q k^T) v, for an input x (B, N, L, C)."""
        B, N, L, C = x.shape
        return 2 * B * N * L * L * C


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention inside windows, then an MLP. `shifted` moves the windows by half their size."""

    def __init__(self, dim: int, num_heads: int, window: int, shifted: bool, drop_path: float):
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Attention inside the windows of a map of any size, (B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        # Pad to whole windows. The zeros take part in the attention, as in the official code for
        # object detection.
        x = F.pad(x, (0, 0, 0, -W % self.window, 0, -H % self.window))
        padded_H, padded_W = x.shape[1:3]
        # Along an axis on which the map fits into one window, there is nothing to shift.
        shift_y = self.shift if padded_H > self.window else 0
        shift_x = self.shift if padded_W > self.window else 0
        mask = None
        if shift_y > 0 or shift_x > 0:
            x = x.roll((-shift_y, -shift_x), (1, 2))
            mask = shift_mask(padded_H, padded_W, self.window, (shift_y, shift_x), x.device)
        x = to_windows(x, self.window)
        x = self.attn(x, mask)
        x = from_windows(x, self.window, padded_H, padded_W)
        if mask is not None:
            x = x.roll((shift_y, shift_x), (1, 2))
        return x[:, :H, :W]


class PatchMerging(nn.Module):
    """Concatenate each 2x2 neighbourhood and project its 4C channels to 2C."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C). A map of odd size is padded with zeros first."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))   # (B, H/2, 2, W/2, 2, C)
        # The official weights expect the four tokens column by column.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)          # (B, H/2, W/2, 4C)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """One token per patch of 4x4 pixels. Leftover pixels at the right and bottom are ignored."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H/4, W/4, C)."""
        x = self.proj(image)
        return self.norm(x.permute(0, 2, 3, 1))


class Stage(nn.Module):
    """One SwinBlock per rate in `drop_path`, every second one shifted.

    The stage ends with patch merging if `merge` is true.
    """

    def __init__(self, dim: int, num_heads: int, window: int, drop_path: list[float], merge: bool):
        super().__init__()
        self.blocks = nn.Sequential()
        for i, rate in enumerate(drop_path):
            shifted = i % 2 == 1
            self.blocks.append(SwinBlock(dim, num_heads, window, shifted, rate))
        self.downsample = PatchMerging(dim) if merge else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class SwinTransformer(nn.Module):
    """The backbone: `patch_embed`, then four stages. `channels` holds each map's channel count.

    The attribute that holds the stages is called `layers`, as in the official checkpoints.
    ADAPTED offers two sets of linear layers to adapt, named by the ends of their paths. OTHERS
    lists the weights that TGLoRA's table 1 calls "others", by parts of their names: patch
    embedding, patch merging, every LayerNorm, and the tables of position biases.
    """

    ADAPTED = {"attn": ("attn.qkv", "attn.proj"),
               "attn+mlp": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    OTHERS = ("patch_embed.", "downsample.", "norm1.", "norm2.", "relative_position_bias_table")

    def __init__(self, embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...],
                 window: int = 7, drop_path: float = 0.0):
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList()
        self.channels = []
        num_blocks = sum(depths)
        rates = [drop_path * i / (num_blocks - 1) for i in range(num_blocks)]  # rises with depth
        last = len(depths) - 1
        for i, depth in enumerate(depths):
            dim = embed_dim * 2 ** i
            merge = i < last
            start = sum(depths[:i])
            stage = Stage(dim, num_heads[i], window, rates[start:start + depth], merge)
            self.layers.append(stage)
            self.channels.append(2 * dim if merge else dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) -> one map (B, h, w, c) per stage, taken at the end of the stage."""
        x = self.patch_embed(image)     # (B, H/4, W/4, embed_dim)
        maps = []
        for stage in self.layers:
            x = stage(x)                # (B, h, w, c)
            maps.append(x)
        return maps


def build_swin(name: str = "tiny", **overrides) -> SwinTransformer:
    """A randomly initialised backbone from `PRESETS`.

    Keyword arguments replace values of the preset or defaults of `SwinTransformer`, as in
    build_swin("tiny", drop_path=0.2). Raises ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(PRESETS)}")
    settings = {**PRESETS[name], **overrides}
    return SwinTransformer(**settings)
