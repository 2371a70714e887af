"""Six exercises. Replace a `raise NotImplementedError`, then check your answer:

    python -m pytest tests/test_exercises.py -k yours

Tests of exercises that are not done yet are skipped. docs/LEARN.md says which files to read first.
"""

import numpy as np
from torch import Tensor, nn

from grouping import Partition
from tglora import TGLoRALinear


def elementwise_similarity(g: Tensor, g_other: Tensor) -> Tensor:
    """1. Eq. 2 with Task2Vec's normalisation: divide each entry of both gradients (P,) by the sum
    of the two absolute values at that position, and take the cosine of the results. (Assume
    that no entry is 0.)"""
    raise NotImplementedError


def merged_weight(layer: TGLoRALinear, group: int) -> Tensor:
    """2. The single weight (d, k) that replaces W and the adapter of this group."""
    raise NotImplementedError


def algorithm_1_from_zero(partition: Partition, sim: np.ndarray,
                          num_groups: int) -> Partition | None:
    """3. Algorithm 1 as the paper prints it: the best score starts from 0, not from minus infinity.
    Return None if no merge scores above 0. When does that happen?"""
    raise NotImplementedError


def extreme_trees(num_tasks: int) -> tuple[list[Partition], list[Partition]]:
    """4. Two trees of four stages: in the first, all tasks share all adapters; in the second, no
    two tasks share an adapter."""
    raise NotImplementedError


def person_task() -> tuple[object, object]:
    """5. A seventh task for rooms: is there a person at this pixel? Return a task (as in tasks.py)
    called "person" with two classes, and a function that makes its label (H, W) from a sample of
    rooms.render_room."""
    raise NotImplementedError


class TGLoRAConv2d(nn.Module):
    """6. A frozen convolution with an adapter per group: y_g = conv(x_g) + scale * B_g(A_g(x_g)).

    A_g is a convolution with the kernel size, stride and padding of `conv`, and with ranks[g]
    output channels. B_g is a 1x1 convolution that starts at zero. Neither has a bias. The batch
    holds one group after another, as in TGLoRALinear.
    """

    def __init__(self, conv: nn.Conv2d, ranks: tuple[int, ...], scale: float = 4.0):
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (G*B, C, H, W), group after group -> (G*B, C', H', W')."""
        raise NotImplementedError
