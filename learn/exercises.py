"""Seven exercises. Replace a `raise NotImplementedError`, then check your answer:

    python -m pytest tests/test_exercises.py -k yours

Tests of exercises that are not done yet are skipped. docs/LEARN.md says which files to read first.
"""

import numpy as np
from torch import Tensor, nn

from grouping import Partition
from tglora import TGLoRALinear


def two_gradients() -> tuple[Tensor, Tensor]:
    """1. Task2Vec divides each entry of both gradients by the sum of the two absolute values at
    that position before it takes the cosine. Return two gradients (P,) whose similarity is above
    0.9 by this measure, but below 0.1 by eq. 2. No entry may be 0."""
    raise NotImplementedError


def layer_for(layer: TGLoRALinear, partition: Partition, tasks: list[int]) -> nn.Linear | None:
    """2. You ship a product that needs only some of the tasks. `partition` has the groups of the
    layer's stage. Return one nn.Linear that computes the adapted layer's output for these tasks, or
    None if they need more than one. Do not change `layer`, and assume that it has a bias."""
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
    called "person", and a function that makes its label (H, W) from a sample of rooms.render_room:
    1 is a person, 0 is not.

    Only about 10 % of the pixels show a person. Choose a loss for which missing everybody is about
    as bad as seeing a person everywhere (up to a factor of 3). The task has one output, as
    Saliency does, or two. Then choose the task's weight in eq. 8: for a prediction of zeros,
    weight * loss should be between 1 and 5, as it is for human_parts, depth and normals.
    """
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


def another_tree() -> list[list[list[str]]]:
    """7. Choose a tree of the demonstration's four tasks with groups 1,2,2,4. It must differ from
    the cosine's tree, whose stages 2 and 3 have the groups {human_parts, sal} {depth, normals}.
    Return it in the form of "tree" in tree.json: a list of stages, each a list of groups, each a
    list of task names."""
    raise NotImplementedError
