"""The decoder of a task: it turns the four maps of the backbone into the task's prediction.

Each map is projected by a bias-free 1x1 convolution, resized to the size of the first map (stride
8) and concatenated with the others. A head in the style of HRNet (1x1 convolution, BatchNorm, ReLU,
1x1 convolution) computes the outputs, which are resized to the size of the image. Every task has
its own decoder.

    decoder = Decoder(backbone.channels, outputs=40)
    prediction = decoder(maps, image.shape[2:])         # four (B, h, w, c) -> (B, 40, H, W)

Shapes: B batch, H W pixels, h w tokens of a map, c channels of a map.
References: MTLoRA, arXiv 2403.20320, sections 3.3 and 4.1; HRNet, arXiv 1908.07919.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED = (18, 36, 72, 144)   # channels of the four projections: the widths of HRNet-W18


class Decoder(nn.Module):
    """Projects map i from in_channels[i] to fused[i] channels; a head computes the outputs."""

    def __init__(self, in_channels: Sequence[int], outputs: int, fused: Sequence[int] = FUSED):
        super().__init__()
        self.fuse = nn.ModuleList()
        for channels, width in zip(in_channels, fused, strict=True):
            self.fuse.append(nn.Conv2d(channels, width, 1, bias=False))
        self.head = make_head(sum(fused), outputs)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """maps: four (B, h, w, c); size: the image's (H, W) -> (B, outputs, H, W)."""
        first = maps[0].shape[1:3]                              # height and width at stride 8
        projected = []
        for conv, x in zip(self.fuse, maps):
            x = conv(x.permute(0, 3, 1, 2))                     # (B, width, h, w)
            x = F.interpolate(x, first, mode="bilinear")
            projected.append(x)
        x = self.head(torch.cat(projected, 1))                  # (B, outputs, h, w)
        return F.interpolate(x, tuple(size), mode="bilinear")


def make_head(width: int, outputs: int) -> nn.Sequential:
    """A decoder's head: (B, width, h, w) -> (B, outputs, h, w), with 4 * width hidden channels."""
    hidden = 4 * width
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 1),
    )
