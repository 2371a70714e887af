"""Solutions of learn/exercises.py. Try the exercises yourself first."""

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouping import Partition, merged, score
from rooms import ROOM_CLASSES
from tasks import Segmentation
from tglora import TGLoRALinear


def elementwise_similarity(g: Tensor, g_other: Tensor) -> Tensor:
    scale = g.abs() + g_other.abs()
    return F.cosine_similarity(g / scale, g_other / scale, dim=0)


def merged_weight(layer: TGLoRALinear, group: int) -> Tensor:
    A, B = layer.adapter(group)
    return layer.weight + layer.scale * B @ A


def algorithm_1_from_zero(partition: Partition, sim: np.ndarray,
                          num_groups: int) -> Partition | None:
    """Returns None, for example, if all similarities are negative: no merge scores above 0."""
    while len(partition) > num_groups:
        best, best_score = None, 0
        for a, b in combinations(partition, 2):
            candidate = merged(partition, a, b)
            if score(candidate, sim) > best_score:
                best, best_score = candidate, score(candidate, sim)
        if best is None:
            return None
        partition = best
    return partition


def extreme_trees(num_tasks: int) -> tuple[list[Partition], list[Partition]]:
    everyone = [tuple(range(num_tasks))]
    alone = [(t,) for t in range(num_tasks)]
    return [everyone] * 4, [alone] * 4


def person_task() -> tuple[object, object]:
    def label(sample: dict[str, Tensor]) -> Tensor:
        return (sample["semseg"] == ROOM_CLASSES.index("person")).to(torch.uint8)
    return Segmentation("person", ("nobody", "person"), weight=1.0), label


class TGLoRAConv2d(nn.Module):
    def __init__(self, conv: nn.Conv2d, ranks: tuple[int, ...], scale: float = 4.0):
        super().__init__()
        self.conv, self.scale = conv.requires_grad_(False), scale
        self.A, self.B = nn.ModuleList(), nn.ModuleList()
        for rank in ranks:
            self.A.append(nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride,
                                    conv.padding, bias=False))
            self.B.append(nn.Conv2d(rank, conv.out_channels, 1, bias=False))
            nn.init.zeros_(self.B[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)                                    # one convolution for all groups
        parts = x.chunk(len(self.A))
        low_rank = [B(A(part)) for A, B, part in zip(self.A, self.B, parts)]
        return y + self.scale * torch.cat(low_rank)
