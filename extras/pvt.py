"""Pyramid Vision Transformer v2 (Wang et al., 2022), from scratch: another backbone to adapt.

An image becomes overlapping patches of 7x7 pixels with a stride of 4. In each of the four stages,
every token attends to the whole map. To keep this affordable, keys and values come from a smaller
map: a convolution divides height and width by R, with R = 8, 4, 2 and 1 in the four stages:

    attention(x) = softmax(q(x) k(z)' / sqrt(C / h)) v(z),    z = norm(conv(x)), or x if R = 1

In the MLP, a depth-wise 3x3 convolution looks at each token's neighbours. Its zero padding also
tells a token where it is, so position embeddings are not needed. As in swin.py, a stage ends with
the layer that makes the tokens of the next one: overlapping patches of 3x3 tokens, with stride 2.

    backbone = build_pvt("b2")
    load_weights(backbone, "imagenet", "b2")
    maps = backbone(image)                  # (B, 3, H, W) -> 4 maps (B, h, w, c)

    python train.py --dataset nyud --data-root data --backbone pvt_v2_b2

The strides of the maps are 8, 16, 32 and 32.
Shapes: B batch, H W pixels or tokens, C channels, h w c of an output map; in the attention, N = H W
queries, R reduction, h heads.
References: arXiv 2106.13797, section 3; https://github.com/whai362/PVT (epsilons, initial weights).
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from weights import fetch, find_file, load_all, read_file

PRESETS = {     # table 1 of the paper
    "b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "b1": dict(dims=(64, 128, 320, 512), depths=(2, 2, 2, 2)),
    "b2": dict(dims=(64, 128, 320, 512), depths=(3, 4, 6, 3)),
    "b3": dict(dims=(64, 128, 320, 512), depths=(3, 4, 18, 3)),
    "b4": dict(dims=(64, 128, 320, 512), depths=(3, 8, 27, 3)),
    "b5": dict(dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
# The official weights were trained on ImageNet-1k with images of 224x224 pixels.
OFFICIAL_URL = "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_{name}.pth"


class Attention(nn.Module):
    """Multi-head attention from all tokens to a map whose sides are `ratio` times shorter."""

    def __init__(self, dim: int, num_heads: int, ratio: int):
        super().__init__()
        self.num_heads = num_heads
        self.ratio = ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)  # "spatial reduction"
            self.norm = nn.LayerNorm(dim)   # epsilon 1e-5; `Block` uses 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        z = x
        if self.ratio > 1:      # rows and columns that do not fill a patch of R x R are ignored
            z = self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)      # (B, H/R, W/R, C)
            z = self.norm(z)
        q = self.q(x).view(B, H * W, self.num_heads, -1)
        q = q.transpose(1, 2)                                           # (B, h, N, C/h)
        kv = self.kv(z).view(B, -1, 2, self.num_heads, C // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)                                # (B, h, N/R/R, C/h) each
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, h, N, C/h)
        x = x.transpose(1, 2).reshape(B, H, W, C)
        return self.proj(x)

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k' and of softmax(q k') v, for an input x (B, H, W, C)."""
        B, H, W, C = x.shape
        keys = (H // self.ratio) * (W // self.ratio)
        return 2 * B * H * W * keys * C


class Mlp(nn.Module):
    """Two linear layers with a depth-wise convolution and a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = self.fc1(x).permute(0, 3, 1, 2)             # (B, hidden, H, W)
        x = self.dwconv(x).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """Attention, then an MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, dim: int, num_heads: int, ratio: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def attend(self, x: Tensor) -> Tensor:
        """The block's attention only. mtlora.py calls `attend` on the blocks of both backbones."""
        return self.attn(x)


class PatchEmbed(nn.Module):
    """Overlapping patches: a convolution whose kernel is larger than its stride, and a norm."""

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(inputs, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)       # epsilon 1e-5, as in `Attention`

    def forward(self, image: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, H/stride, W/stride, C), rounded up."""
        x = self.proj(image)
        return self.norm(x.permute(0, 2, 3, 1))


class Downsample(PatchEmbed):
    """The patch embedding of the next stage: (B, H, W, C) -> (B, H/2, W/2, C'), rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """One block for each rate in `drop_path`, a norm, and the patch embedding of the next stage.

    The last stage has no patch embedding after it.
    """

    def __init__(self, dim: int, next_dim: int | None, num_heads: int, ratio: int, mlp_ratio: int,
                 drop_path: list[float]):
        super().__init__()
        self.blocks = nn.Sequential()
        for rate in drop_path:
            self.blocks.append(Block(dim, num_heads, ratio, mlp_ratio, rate))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.downsample = nn.Identity()
        if next_dim is not None:
            self.downsample = Downsample(dim, next_dim, kernel=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.norm(self.blocks(x)))


class PyramidVisionTransformer(nn.Module):
    """The backbone: `patch_embed`, then four stages. `channels` holds each map's channel count.

    It has the same attributes as swin.SwinTransformer, so the stages are called `layers`. OTHERS
    names the patch embeddings, every LayerNorm, and the depth-wise convolutions, which take the
    place of Swin's position biases.
    """

    ADAPTED = {"attn": ("attn.q", "attn.kv", "attn.proj"),
               "attn+mlp": ("attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    OTHERS = ("patch_embed.", "downsample.", "norm", "dwconv.")

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...],
                 num_heads: tuple[int, ...] = (1, 2, 5, 8), ratios: tuple[int, ...] = (8, 4, 2, 1),
                 mlp_ratios: tuple[int, ...] = (8, 8, 4, 4), drop_path: float = 0.0):
        super().__init__()
        self.channels = [*dims[1:], dims[-1]]
        self.patch_embed = PatchEmbed(3, dims[0], kernel=7, stride=4)
        self.layers = nn.ModuleList()
        num_blocks = sum(depths)
        rates = [drop_path * i / (num_blocks - 1) for i in range(num_blocks)]  # grows with depth
        for i, depth in enumerate(depths):
            next_dim = dims[i + 1] if i + 1 < len(dims) else None
            start = sum(depths[:i])
            stage = Stage(dims[i], next_dim, num_heads[i], ratios[i], mlp_ratios[i],
                          rates[start:start + depth])
            self.layers.append(stage)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                # As in the official code: fan-out is kernel area x output channels / groups.
                fan_out = module.weight[:, 0].numel() / module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W), at least 29x29 -> one map (B, h, w, c) per stage."""
        x = self.patch_embed(image)     # (B, H/4, W/4, C)
        maps = []
        for stage in self.layers:
            x = stage(x)                # (B, h, w, c)
            maps.append(x)
        return maps


def build_pvt(name: str = "b2", **overrides) -> PyramidVisionTransformer:
    """A randomly initialised backbone from `PRESETS`.

    Keyword arguments replace values of the preset or defaults of `PyramidVisionTransformer`. Raises
    ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(PRESETS)}")
    settings = {**PRESETS[name], **overrides}
    return PyramidVisionTransformer(**settings)


def load_weights(backbone: nn.Module, source: str, name: str = "b2") -> None:
    """Load published weights, completely or not at all, as weights.load_weights does for Swin.

    source: "imagenet" (the official file, downloaded once), or the path of a file whose weights are
    named as in the official code, in timm or in this module. name: the preset whose weights are
    downloaded. Raises ValueError if the weights cannot be downloaded or read, or do not fit the
    backbone.
    """
    if source == "imagenet":
        path = fetch(OFFICIAL_URL.format(name=name))
    else:
        path = find_file(source)
    state = {}
    for key, value in read_file(path).items():
        if not key.startswith("head."):     # the classifier
            state[our_name(key)] = value
    load_all(backbone, state, path)


def our_name(key: str) -> str:
    """Translate a weight's name from the official code or timm to ours; our own names are kept."""
    key = re.sub(r"^patch_embed1\.", "patch_embed.", key)
    key = key.replace("dwconv.dwconv.", "dwconv.")
    for i in range(4):
        # The official code counts stages from 1. Its patch embedding 2 is the end of our stage 0.
        key = re.sub(rf"^patch_embed{i + 2}\.", f"layers.{i}.downsample.", key)
        key = re.sub(rf"^block{i + 1}\.", f"layers.{i}.blocks.", key)
        key = re.sub(rf"^norm{i + 1}\.", f"layers.{i}.norm.", key)
        # timm counts stages from 0, and puts a patch embedding at the start of its stage.
        key = re.sub(rf"^stages\.{i + 1}\.downsample\.", f"layers.{i}.downsample.", key)
        key = re.sub(rf"^stages\.{i}\.", f"layers.{i}.", key)
    return key
