"""Solutions of learn/exercises.py. Try the exercises yourself first."""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from grouping import Partition, merged, score
from rooms import ROOM_CLASSES
from tasks import Saliency
from tglora import TGLoRALinear


def two_gradients() -> tuple[Tensor, Tensor]:
    """The tasks agree on all weights but one, and that one has by far the largest gradient.

    It decides the cosine. Element by element, each weight counts about the same.
    """
    g, g_other = torch.ones(1000), torch.ones(1000)
    g[0], g_other[0] = 100, -100
    return g, g_other


def layer_for(layer: TGLoRALinear, partition: Partition, tasks: list[int]) -> nn.Linear | None:
    groups = [g for g, group in enumerate(partition) if set(group) & set(tasks)]
    if len(groups) > 1:
        return None
    A, B = layer.adapter(groups[0])
    linear = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        linear.weight.copy_(layer.weight + layer.scale * B @ A)
        linear.bias.copy_(layer.bias)
    return linear


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


class Person(Saliency):
    """Saliency's loss balances the two classes, but it is small: 0.12 for a prediction of zeros."""

    name = "person"
    weight = 20.0
    marks = {"person": 1, "nobody": 0}


def person_task() -> tuple[object, object]:
    def label(sample: dict[str, Tensor]) -> Tensor:
        return (sample["semseg"] == ROOM_CLASSES.index("person")).to(torch.uint8)
    return Person(), label


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


def another_tree() -> list[list[list[str]]]:
    everyone = ["human_parts", "sal", "depth", "normals"]
    pairs = [["human_parts", "depth"], ["sal", "normals"]]
    alone = [[name] for name in everyone]
    return [[everyone], pairs, pairs, alone]
