"""Tests of the exercises in learn/: they check our solutions, and yours once they exist."""

import numpy as np
import pytest
import torch
from torch import nn

from grouping import check_tree
from learn import exercises, solutions
from rooms import render_room
from similarity import gradient_similarity
from tglora import TGLoRALinear


@pytest.fixture(params=["yours", "ours"])
def answers(request):
    """The answers to check, yours or ours. If an exercise is not done yet, its test is skipped."""
    module = {"yours": exercises, "ours": solutions}[request.param]

    class Answers:
        def __getattr__(self, name):
            def call(*args):
                try:
                    return getattr(module, name)(*args)
                except NotImplementedError:
                    pytest.skip(f"learn/exercises.py: {name} is not done yet")
            return call
    return Answers()


def test_1_elementwise_similarity(answers):
    """The answer equals a computation entry by entry, and differs from the cosine."""
    torch.manual_seed(0)
    g, g_other = torch.randn(1000), torch.randn(1000)
    value = answers.elementwise_similarity(g, g_other)
    dot = norm = norm_other = 0.0
    for a, b in zip(g.tolist(), g_other.tolist()):
        a, b = a / (abs(a) + abs(b)), b / (abs(a) + abs(b))
        dot, norm, norm_other = dot + a * b, norm + a * a, norm_other + b * b
    assert value.item() == pytest.approx(dot / (norm * norm_other) ** 0.5, abs=1e-4)
    assert abs(value - gradient_similarity(g, g_other)) > 1e-3


def test_2_merged_weight(answers):
    """For each group, a linear layer with the merged weight gives the adapted layer's output."""
    torch.manual_seed(0)
    layer = TGLoRALinear(nn.Linear(6, 5), (2, 3), dropout=0.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2 * 4, 6)
    for g in range(2):
        weight = answers.merged_weight(layer, g)
        y = nn.functional.linear(x[4 * g:4 * g + 4], weight, layer.bias)
        torch.testing.assert_close(y, layer(x)[4 * g:4 * g + 4])


def test_3_algorithm_1_from_zero(answers):
    """The answer merges the two most similar tasks, or is None if all similarities are negative."""
    sim = np.array([[1, .5, .1], [.5, 1, .2], [.1, .2, 1]])
    singles = [(0,), (1,), (2,)]
    assert answers.algorithm_1_from_zero(singles, sim, 2) == [(0, 1), (2,)]
    assert answers.algorithm_1_from_zero(singles, -sim, 2) is None


def test_4_extreme_trees(answers):
    """All four stages have one group in the first tree, and one group per task in the second."""
    shared, separate = answers.extreme_trees(5)
    for tree, groups in ((shared, 1), (separate, 5)):
        check_tree(tree, 5)
        assert [len(partition) for partition in tree] == [groups] * 4


def test_5_person_task(answers):
    """The label is 1 exactly where the class map shows a person, and the loss can be computed."""
    task, label_of = answers.person_task()
    for i in range(6):
        sample = render_room((0, 0, i), 32, 32)
        label = label_of(sample)
        assert torch.equal(label == 1, sample["semseg"] == 6) and label.max() <= 1
    assert task.name == "person" and task.outputs == 2 and task.kind == "classes"
    assert task.loss(torch.zeros(1, 2, 32, 32), label[None].long()).item() > 0


def test_6_adapter_for_convolutions(answers):
    """A new layer equals the frozen convolution, and an adapter affects only its own group."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    layer = answers.TGLoRAConv2d(conv, (2, 4))
    x = torch.randn(2 * 2, 3, 9, 9)
    torch.testing.assert_close(layer(x), conv(x))
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == (2 + 4) * (3 * 9 + 8)
    for p in trained:
        if p.shape[2:] == (1, 1) and p.shape[1] == 4:       # B of the second group
            nn.init.normal_(p)
    difference = (layer(x) - conv(x)).abs().amax((1, 2, 3))
    assert difference[:2].max() == 0 and difference[2:].min() > 0
