"""Pyramid Vision Transformer v2 (Wang et al., 2022), from scratch, and its ImageNet weights.

An image becomes overlapping patches of 7x7 pixels, 4 apart; each of four stages attends over its
whole map, to keys and values of a map that a convolution has made 8, 4, 2 or 1 times smaller:

    attention(x) = softmax(q(x) k(z)' / sqrt(C / h)) v(z),   z = norm(conv(x)), of R x R tokens

and between the layers of its MLP a depth-wise 3x3 convolution looks at the neighbours; its zero
padding also tells a token where it is, so there is no position embedding and no window. A stage
ends, as in swin.py, with what makes the next one's tokens: overlapping patches of 3x3, 2 apart.

    backbone = build_pvt("b2")
    load_weights(backbone, "imagenet", "b2")
    maps = backbone(image)          # (B,3,H,W) -> 4 maps (B,h,w,c), strides 8, 16, 32, 32

Shapes: B batch, H W pixels or tokens, C channels, N = H W queries, R reduction, h heads.
References: arXiv 2106.13797, section 3; https://github.com/whai362/PVT (epsilons, initial weights).
"""

import re
import zipfile
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

WIDE = (64, 128, 320, 512)
PRESETS = {  # table 1; heads and reductions are the same in all
    "b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "b1": dict(dims=WIDE, depths=(2, 2, 2, 2)),
    "b2": dict(dims=WIDE, depths=(3, 4, 6, 3)),
    "b3": dict(dims=WIDE, depths=(3, 4, 18, 3)),
    "b4": dict(dims=WIDE, depths=(3, 8, 27, 3)),
    "b5": dict(dims=WIDE, depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
# ImageNet-1k files at 224x224; no checksum is published.
OFFICIAL_URL = "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_{name}.pth"
# How names of the official and timm's files begin, what to add to their stage's number, and ours.
LAYOUTS = (
    (r"patch_embed([234])\.", -2, "layers.{}.downsample."),  # official; it counts from 1
    (r"block(\d+)\.", -1, "layers.{}.blocks."),
    (r"norm(\d+)\.", -1, "layers.{}.norm."),
    (r"stages\.(\d+)\.downsample\.", -1, "layers.{}.downsample."),  # timm: of the stage it begins
    (r"stages\.(\d+)\.", 0, "layers.{}."),
)


class Attention(nn.Module):
    """Multi-head attention of all tokens to those of a map that is `ratio` times smaller."""

    def __init__(self, dim: int, num_heads: int, ratio: int):
        super().__init__()
        self.num_heads, self.ratio = num_heads, ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)  # eps 1e-5 here, unlike the blocks' norms

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        q = self.q(x).view(B, H * W, self.num_heads, -1).transpose(1, 2)  # (B, h, N, C/h)
        z = x
        if self.ratio > 1:  # rows and columns that fill no R x R are unseen
            z = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H/R, W/R, C)
        k, v = self.kv(z).view(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, C/h)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k' and its product with v, for an input x (B, H, W, C)."""
        B, H, W, C = x.shape
        return 2 * B * H * W * (H // self.ratio) * (W // self.ratio) * C


class Mlp(nn.Module):
    """Two linear layers, and a depth-wise convolution before the activation between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, hidden)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, ratio: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))  # (B, H, W, C)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x)


class PatchEmbed(nn.Module):
    """Overlapping patches: a convolution whose kernel is larger than its stride, and a norm."""

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(inputs, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, as the reduction's

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).permute(0, 2, 3, 1))  # (B, H/4, W/4, C), rounded up


class Downsample(PatchEmbed):
    """The next stage's patches, of a map (B, H, W, C) -> (B, H/2, W/2, C'), rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """One block for each rate in `drop_path`, the norm of the stage, the patches of the next."""

    def __init__(self, dim: int, next_dim: int | None, num_heads: int, ratio: int, mlp_ratio: int,
                 drop_path: list[float]):
        super().__init__()
        self.blocks = nn.Sequential(*(
            Block(dim, num_heads, ratio, mlp_ratio, rate) for rate in drop_path))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.downsample = Downsample(dim, next_dim, 3, 2) if next_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.norm(self.blocks(x)))


class PyramidVisionTransformer(nn.Module):
    """The backbone: `patch_embed`, then four `layers`. `channels` are those of its four maps.

    ADAPTED: the linear layers that get adapters, by the ends of their names. OTHERS: parts of the
    names of what "others" means: patch embeddings, every LayerNorm, and the depth-wise
    convolutions, which hold the positions that Swin has in bias tables.
    """

    ADAPTED = {"attn": ("attn.q", "attn.kv", "attn.proj"),
               "attn+mlp": ("attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    OTHERS = ("patch_embed.", "downsample.", "norm", "dwconv.")

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...],
                 num_heads: tuple[int, ...] = (1, 2, 5, 8), ratios: tuple[int, ...] = (8, 4, 2, 1),
                 mlp_ratios: tuple[int, ...] = (8, 8, 4, 4), drop_path: float = 0.0):
        super().__init__()
        rates = iter(drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))  # deeper, more
        self.channels = [*dims[1:], dims[-1]]
        self.patch_embed = PatchEmbed(3, dims[0], 7, 4)
        self.layers = nn.ModuleList(
            Stage(dim, next_dim, heads, ratio, mlp_ratio, list(islice(rates, depth)))
            for dim, next_dim, heads, ratio, mlp_ratio, depth in zip(
                dims, (*dims[1:], None), num_heads, ratios, mlp_ratios, depths, strict=True))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() / module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) of at least 29x29 -> each stage's output, (B, h, w, c)."""
        x = self.patch_embed(image)  # (B, H/4, W/4, C)
        maps = []
        for stage in self.layers:
            x = stage(x)  # (B, h, w, c)
            maps.append(x)
        return maps


def build_pvt(name: str = "b2", **overrides) -> PyramidVisionTransformer:
    """A randomly initialised backbone from `PRESETS`; keywords override a preset's values."""
    if name not in PRESETS:
        raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(PRESETS)}")
    return PyramidVisionTransformer(**{**PRESETS[name], **overrides})


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official or timm's weights to the names here; drop the classifier."""
    def rename(key: str) -> str:
        key = re.sub(r"^patch_embed1\.", "patch_embed.", key).replace("dwconv.dwconv.", "dwconv.")
        for pattern, shift, name in LAYOUTS:
            if found := re.match(pattern, key):
                return name.format(int(found[1]) + shift) + key[found.end():]
        return key

    return {rename(k): v for k, v in state.items() if not k.startswith("head.")}


def read_weights(source: str, name: str) -> dict[str, Tensor]:
    """Weights of preset `name`: "imagenet" (cached) or a file, which may lie in assets/ here."""
    how = dict(map_location="cpu", weights_only=True)
    if source == "imagenet":
        try:
            url = OFFICIAL_URL.format(name=name)
            torch.hub.load_state_dict_from_url(url, **how)
        except (OSError, RuntimeError) as error:  # no connection, or what came is no checkpoint
            raise ValueError(f"weights: cannot download {source}'s for {name}: {error}; fetch the "
                             "file by hand and give its path (README, Data)") from error
        source = f"{torch.hub.get_dir()}/checkpoints/{Path(url).name}"  # where it is now
    places = (Path(source), Path(__file__).parent / "assets" / source)
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise ValueError(f"weights: no file {source}; expected imagenet, or the path of a PVT v2 "
                         "checkpoint (torchvision has none)")
    try:
        if zipfile.is_zipfile(path) and (broken := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {broken}")  # torch.load does not compare it
        if not zipfile.is_zipfile(path):
            print(f"note: {path} is of a format without checksums: damage would go unnoticed")
        return torch.load(path, **how)
    except Exception as error:  # torch.load documents no exception types for a damaged file
        raise ValueError(f"weights: {source} is not a readable PyTorch checkpoint, or is damaged "
                         f"({type(error).__name__})") from error


def load_weights(pvt: PyramidVisionTransformer, source: str, name: str = "b2") -> dict:
    """Load pretrained weights into `pvt`, completely or not at all.

    source: "imagenet" (the ImageNet-1k file of the official release), or a path to a file in the
    official layout, timm's, or this file's; name: the preset, for a download.
    Returns {"source", "matched", "total"} and prints it. Raises ValueError that lists every
    missing, unexpected or misshapen weight, or says what could not be fetched or read.
    """
    state = read_weights(source, name)
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    state, own = our_names(state), pvt.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "misshapen": [f"{k} {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
                      for k in own if k in state and state[k].shape != own[k].shape],
    }
    if any(problems.values()):
        raise ValueError(f"weights {source} do not fit this backbone: " + "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            for kind, names in problems.items() if names))
    pvt.load_state_dict(state)
    report = {"source": source, "matched": len(state), "total": len(own)}
    print(f"backbone weights: {len(state)} of {len(own)} tensors matched, from {source}")
    return report
