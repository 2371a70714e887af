"""Multi-scale fusion and an HRNet-style head: what turns a task's four maps into its prediction.

Each map is projected by a bias-free 1x1 convolution, brought to the first map's size (stride 8)
and concatenated; a 1x1 convolution, BatchNorm, ReLU and a last 1x1 convolution give the outputs,
which are resized to the image. Every task has its own, trained with the adapters.

References: MTLoRA, arXiv 2403.20320, sections 3.3 and 4.1; HRNet, arXiv 1908.07919.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED = (18, 36, 72, 144)  # HRNet-W18's channels; together 270, and 4 * 270 hidden ones


class Decoder(nn.Module):
    """in_channels of the four maps, projected to `fused` -> `outputs` at the image's size."""

    def __init__(self, in_channels: Sequence[int], outputs: int, fused: Sequence[int] = FUSED):
        super().__init__()
        width = sum(fused)
        self.fuse = nn.ModuleList(nn.Conv2d(c, f, 1, bias=False)
                                  for c, f in zip(in_channels, fused, strict=True))
        self.head = make_head(width, outputs)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """maps: four (B, h, w, c); size: (H, W) of the image -> (B, outputs, H, W)."""
        fused = [conv(x.permute(0, 3, 1, 2)) for conv, x in zip(self.fuse, maps)]  # (B, f, h, w)
        first = fused[0].shape[-2:]                 # h, w of stride 8
        fused = [F.interpolate(x, first, mode="bilinear") for x in fused]
        x = self.head(torch.cat(fused, 1))          # (B, outputs, h, w)
        return F.interpolate(x, tuple(size), mode="bilinear")  # (B, outputs, H, W)


def make_head(width: int, outputs: int) -> nn.Sequential:
    """(B, width, h, w) -> (B, outputs, h, w), through four times as many channels."""
    return nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width),
                         nn.ReLU(inplace=True), nn.Conv2d(4 * width, outputs, 1))
