"""Swin Transformer (Liu et al., ICCV 2021), from scratch, and its ImageNet weights.

An image becomes 4x4 patches; four stages of blocks attend inside windows of 7x7 tokens, every
second block with the windows shifted by half, so that information crosses their borders; after
each of the first three stages, 2x2 neighbouring tokens are merged and the channels double.
As a backbone for dense prediction it has no final norm and no classifier and returns one map a
stage. Parameter names are those of the official checkpoints, which therefore load as they are.

    backbone = build_swin("tiny")
    load_weights(backbone, "imagenet")
    maps = backbone(image)          # (B,3,H,W) -> 4 maps (B,h,w,c), strides 8, 16, 32, 32

Shapes: B batch, H W pixels or tokens, C channels, N windows, L tokens a window, h heads.
References: arXiv 2103.14030; https://github.com/microsoft/Swin-Transformer (names of weights).
"""

import re
import zipfile
from functools import lru_cache
from hashlib import sha384
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_weight
from torchvision.ops import StochasticDepth

PRESETS = {
    "mini": dict(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16)),  # ours: fits a CPU
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
# ImageNet-1k files at 224x224. torchvision's have a checksum in their names, Microsoft's none.
OFFICIAL_URL = ("https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
                "swin_{name}_patch4_window7_224.pth")
# How that of a file begins; Intel's Open Model Zoo, which mirrors it, publishes it (docs/DATA.md).
SHA384 = {"swin_tiny_patch4_window7_224.pth": "210021216e1f205617d885836b1ac59d725b8c41dbff8dc4"}
TORCHVISION_NAME = {"tiny": "Swin_T_Weights", "small": "Swin_S_Weights", "base": "Swin_B_Weights"}


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window, (L, L) int64."""
    axis = torch.arange(window)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dy = y.flatten()[:, None] - y.flatten()[None]  # (L, L), -window+1 .. window-1
    dx = x.flatten()[:, None] - x.flatten()[None]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


@lru_cache(maxsize=64)
def shift_mask(H: int, W: int, window: int, shift: tuple[int, int], device: torch.device) -> Tensor:
    """Additive mask (N, L, L): -100 between tokens that only the cyclic shift made neighbours."""
    region = torch.zeros(H, W, device=device)
    for axis, (size, s) in enumerate(zip((H, W), shift)):
        if s:
            label = torch.zeros(size, device=device)
            label[size - window:size - s] = 1
            label[size - s:] = 2
            region += label[:, None] * 3 if axis == 0 else label
    region = to_windows(region[None, ..., None], window)[0, ..., 0]  # (N, L)
    different = region[:, :, None] != region[:, None, :]  # (N, L, L)
    return different * -100.0


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, N, L, C); H and W are multiples of the window."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, H/w, w, W/w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, window: int, H: int, W: int) -> Tensor:
    """(B, N, L, C) -> (B, H, W, C): the inverse of `to_windows`."""
    x = x.unflatten(2, (window, window)).unflatten(1, (H // window, W // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learned relative position bias."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("index", relative_position_index(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, L, C), mask (N, L, L) or None -> (B, N, L, C)."""
        B, N, L, C = x.shape
        q, k, v = self.qkv(x).view(B * N, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)  # (h, L, L)
        bias = bias.to(q.dtype)[None]  # one for all windows, or with a mask (B*N, h, L, L)
        if mask is not None:
            bias = (bias + mask[:, None].to(q.dtype)).repeat(B, 1, 1, 1)
        if bias.requires_grad:  # the fused kernels' gradient of a bias is slow, on GPUs not safe
            x = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1).to(v.dtype) @ v
        else:  # the same, fused
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, N, L, C))  # x was (B*N, h, L, C/h)

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k' and its product with v, for an input x (B, N, L, C)."""
        B, N, L, C = x.shape
        return 2 * B * N * L * L * C


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `shifted` displaces the windows by half."""

    def __init__(self, dim: int, num_heads: int, window: int, shifted: bool, drop_path: float):
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))  # (B, H, W, C)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        x = F.pad(x, (0, 0, 0, -W % self.window, 0, -H % self.window))  # zeros take part, as in
        Hp, Wp = x.shape[1:3]                                           # the official detector
        # A single window along an axis has nothing to shift.
        shift = (self.shift if Hp > self.window else 0, self.shift if Wp > self.window else 0)
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            mask = shift_mask(Hp, Wp, self.window, shift, x.device)
        x = from_windows(self.attn(to_windows(x, self.window), mask), self.window, Hp, Wp)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :H, :W]


class PatchMerging(nn.Module):
    """Concatenate each 2x2 neighbourhood and halve the 4C channels; odd maps are zero-padded."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C), columns before rows
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """Image -> tokens of 4x4 pixels; up to three last rows or columns that fill none are unseen."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).permute(0, 2, 3, 1))  # (B, H/4, W/4, C)


class Stage(nn.Module):
    """One block for each rate in `drop_path`, every second one shifted, then the merging."""

    def __init__(self, dim: int, num_heads: int, window: int, drop_path: list[float], merge: bool):
        super().__init__()
        self.blocks = nn.Sequential(*(
            SwinBlock(dim, num_heads, window, shifted=i % 2 == 1, drop_path=rate)
            for i, rate in enumerate(drop_path)))
        self.downsample = PatchMerging(dim) if merge else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class SwinTransformer(nn.Module):
    """The backbone: `patch_embed`, then four `layers`. `channels` are those of its four maps.

    ADAPTED: the linear layers that get adapters, by the ends of their names. OTHERS: parts of the
    names of what "others" means: patch embedding and merging with their norms, every LayerNorm,
    the position-bias tables.
    """

    ADAPTED = {"attn": ("attn.qkv", "attn.proj"),
               "attn+mlp": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    OTHERS = ("patch_embed.", "downsample.", "norm1.", "norm2.", "relative_position_bias_table")

    def __init__(self, embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...],
                 window: int = 7, drop_path: float = 0.0):
        super().__init__()
        rates = iter(drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))  # deeper, more
        last = len(depths) - 1
        self.channels = [embed_dim * 2 ** min(i + 1, last) for i in range(len(depths))]
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList(
            Stage(embed_dim * 2 ** i, num_heads[i], window, list(islice(rates, depth)), i < last)
            for i, depth in enumerate(depths))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) -> each stage's output after its merging, (B, h, w, c)."""
        x = self.patch_embed(image)  # (B, H/4, W/4, embed_dim)
        maps = []
        for stage in self.layers:
            x = stage(x)  # (B, h, w, c)
            maps.append(x)
        return maps


def build_swin(name: str = "tiny", **overrides) -> SwinTransformer:
    """A randomly initialised backbone from `PRESETS`; keywords override a preset's values."""
    if name not in PRESETS:
        raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(PRESETS)}")
    return SwinTransformer(**{**PRESETS[name], **overrides})


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's or timm's backbone weights to the official layout; drop the rest.

    Dropped are the classifier, the final norm, and tables that can be computed.
    """
    def rename(key: str) -> str:
        if key.startswith("features.0."):  # torchvision: features.0 is the patch embedding,
            return key.replace("features.0.0", "patch_embed.proj").replace(
                "features.0.2", "patch_embed.norm")
        if key.startswith("features."):  # 1, 3, 5, 7 the stages and 2, 4, 6 the mergings
            _, i, rest = key.split(".", 2)
            if int(i) % 2 == 0:
                return f"layers.{int(i) // 2 - 1}.downsample.{rest}"
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            return f"layers.{int(i) // 2}.blocks.{rest}"
        if timm:  # recent timm merges at the start of the next stage
            return re.sub(r"^layers\.(\d+)\.downsample",
                          lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        return key

    timm = not any(k.startswith("layers.0.downsample") for k in state)
    derived = ("relative_position_index", "attn_mask")
    return {rename(k): v for k, v in state.items()
            if not k.startswith(("norm.", "head.")) and not k.endswith(derived)}


def read_weights(source: str, name: str) -> dict[str, Tensor]:
    """Weights of preset `name`: "imagenet", "torchvision" (cached) or a file, also of assets/."""
    if source in ("imagenet", "torchvision") and name not in TORCHVISION_NAME:
        raise ValueError(f"weights: there are none from {source} for backbone {name}")
    how = dict(map_location="cpu", weights_only=True)
    try:
        if source == "imagenet":
            url = OFFICIAL_URL.format(name=name)
            torch.hub.load_state_dict_from_url(url, **how)
            source = f"{torch.hub.get_dir()}/checkpoints/{Path(url).name}"  # where it is now
        elif source == "torchvision":
            weights = get_weight(f"{TORCHVISION_NAME[name]}.IMAGENET1K_V1")
            return weights.get_state_dict(check_hash=True, **how)
    except (OSError, RuntimeError) as error:  # no connection, or a wrong checksum
        raise ValueError(f"weights: cannot download {source}'s for {name}: {error}; fetch the file "
                         "by hand and give its path (README, Data)") from error
    places = (Path(source), Path(__file__).parent / "assets" / source)
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise ValueError(f"weights: no file {source}; expected imagenet, torchvision, or the path "
                         "of a Swin checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare its checksums
            broken = zipfile.ZipFile(path).testzip()
        else:  # the format before PyTorch 1.6 has none
            known = SHA384.get(path.name, "")
            broken = not sha384(path.read_bytes()).hexdigest().startswith(known)
            if not known:
                print(f"note: {path} is of a format without checksums: damage would go unnoticed")
        if broken:
            raise ValueError("checksum")
        return torch.load(path, **how)
    except Exception as error:  # torch.load documents no exception types for a damaged file
        raise ValueError(f"weights: {source} is not a readable PyTorch checkpoint, or is damaged "
                         f"({type(error).__name__})") from error


def load_weights(swin: SwinTransformer, source: str, name: str = "tiny") -> dict:
    """Load pretrained weights into `swin`, completely or not at all.

    source: "imagenet" (Microsoft's ImageNet-1k file), "torchvision" (IMAGENET1K_V1), or a path to
    a file in the official, torchvision or timm layout; name: the preset, for a download.
    Returns {"source", "matched", "total"} and prints it. Raises ValueError that lists every
    missing, unexpected or misshapen weight, or says what could not be fetched or read.
    """
    state = read_weights(source, name)
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    state, own = official_names(state), swin.state_dict()
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
    swin.load_state_dict(state)
    print(f"backbone weights: {len(state)} of {len(own)} tensors matched, from {source}")
    return {"source": source, "matched": len(state), "total": len(own)}
