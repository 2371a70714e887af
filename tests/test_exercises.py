"""Tests of the exercises in learn/: they check our solutions, and yours once they exist."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from grouping import check_tree
from learn import exercises, solutions
from recipes import known_tree, parse_arguments
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


def test_1_two_gradients(answers):
    """The two gradients are similar element by element, but not by eq. 2."""
    g, g_other = answers.two_gradients()
    size = g.abs() + g_other.abs()
    assert nn.functional.cosine_similarity(g / size, g_other / size, dim=0) > 0.9
    assert gradient_similarity(g, g_other) < 0.1


def test_2_layer_for_some_tasks(answers):
    """One linear layer replaces the adapted layer for tasks of one group, but not of two groups."""
    torch.manual_seed(0)
    layer = TGLoRALinear(nn.Linear(6, 5), (2, 3), dropout=0.0)
    nn.init.normal_(layer.lora_B)
    partition = [(0, 3), (1, 2)]
    x = torch.randn(2 * 4, 6)
    x_of_group = x.chunk(2)
    y_of_group = layer(x).chunk(2)
    for tasks, g in (([2], 1), ([3], 0), ([0, 3], 0)):
        linear = answers.layer_for(layer, partition, tasks)
        assert type(linear) is nn.Linear
        torch.testing.assert_close(linear(x_of_group[g]), y_of_group[g])
    assert answers.layer_for(layer, partition, [0, 1]) is None


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
    """The label shows the persons. The loss does not neglect them, and has a fitting weight."""
    task, label_of = answers.person_task()
    assert task.name == "person" and task.kind == "classes"
    labels = []
    for i in range(6):
        sample = render_room((0, 0, i), 32, 32)
        label = label_of(sample)
        assert torch.equal(label == 1, sample["semseg"] == 6) and label.max() <= 1
        labels.append(label.long())

    def loss(person):
        """The loss if the logit of "person" is the same at all pixels of all rooms."""
        logits = torch.zeros(6, task.outputs, 32, 32)
        logits[:, -1] = person
        return task.loss(logits, torch.stack(labels)).item()

    nobody, everywhere = loss(-4), loss(4)
    assert 1 / 3 < nobody / everywhere < 3
    assert 1 < task.weight * loss(0) < 5


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


def test_7_another_tree(answers, tmp_path):
    """train.py accepts the tree. It has groups 1,2,2,4 and is not the cosine's."""
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": answers.another_tree()}))
    config = parse_arguments(["--tree", str(path)])
    assert config.groups == (1, 2, 2, 4)
    human_parts, sal, depth, normals = range(4)
    assert known_tree(config)[1] != [(human_parts, sal), (depth, normals)]
