"""Tests that similarity.py, grouping.py, model.py and train.py agree with lesson.py.

The lesson implements the method without them. It runs once, cell by cell, and copies of its
networks are kept for comparison.
"""

import argparse
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from grouping import best_partition, build_tree, partitions, routing, score
from model import MultiTaskNet, adapt
from similarity import task_similarity
from tasks import make_tasks

pytestmark = pytest.mark.slow        # the lesson itself takes half a minute
SOURCE = (Path(__file__).parent.parent / "lesson.py").read_text()


@pytest.fixture(scope="module")
def lesson():
    """Run the lesson; yield all names that it defines, and copies of its networks in `copies`.

    The copies are taken after cell 4, and before and after the training in cell 8.
    """
    title, *cells = SOURCE.split("# %% ")
    names = {"__name__": "lesson"}
    copies = {}
    with pytest.MonkeyPatch.context() as patch:
        # The lesson computes in float64, but the losses in tasks.py call `Tensor.float`. To compare
        # results to many digits, `float` must not convert to float32 here.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for cell in cells:
            if cell.startswith("8."):
                # The cell's first lines prepare training; the copy is taken before the first step.
                before, loop = cell.split('print("\\n8. Training')
                exec("# " + before, names)
                copies["start"] = deepcopy((names["backbone"], names["decoders"]))
                exec('print("\\n8. Training' + loop, names)
                copies["trained"] = deepcopy((names["backbone"], names["decoders"]))
            else:
                exec("# " + cell, names)
            if cell.startswith("4."):
                copies["decoded"] = deepcopy((names["backbone"], names["decoders"]))
        yield SimpleNamespace(**names, copies=copies)
    torch.set_default_dtype(torch.float32)


def our_names(backbone, decoders):
    """The state dict of a MultiTaskNet with the weights of the lesson's network."""
    state = {}
    for name, value in backbone.state_dict().items():
        name = name.replace(".linear.", ".").replace(".A.", ".lora_A.").replace(".B.", ".lora_B.")
        state[f"backbone.{name}"] = value
    for name, value in decoders.state_dict().items():
        state[f"decoders.{name}"] = value
    return state


def our_network(lesson, tree):
    """A MultiTaskNet with this tree and random weights, and its tasks."""
    from swin import build_swin
    tasks = make_tasks(lesson.TASKS, 7)
    return MultiTaskNet(build_swin("mini"), tasks, *routing(tree), (6, 12, 24, 48)), tasks


def adapted_network(lesson):
    """A MultiTaskNet with the lesson's tree and ranks but random weights, and its tasks."""
    model, tasks = our_network(lesson, lesson.tree)
    settings = dict(layers="attn+mlp", rank=lesson.RANK, last_rank=None, groups=(1, 2, 3, 4),
                    dropout=0.0, tasks=lesson.TASKS)
    adapt(model.backbone, lesson.tree, argparse.Namespace(**settings))
    return model, tasks


def test_similarity_py_gives_the_similarities_of_the_lesson(lesson):
    """similarity.py and the lesson agree on eq. 1 to 3, both for each image and for the mean over
    images."""
    model, tasks = our_network(lesson, [[(0, 1, 2, 3)]] * 4)
    model.load_state_dict(our_names(*lesson.copies["decoded"]))
    examples = []
    for i in range(lesson.N):
        labels = {task: label[i:i + 1] for task, label in lesson.labels.items()}
        examples.append((lesson.image[i:i + 1], labels))
    similarity = task_similarity(model, tasks, examples)
    np.testing.assert_allclose(similarity.samples, lesson.samples, atol=1e-6)
    np.testing.assert_allclose(similarity.mean, lesson.similarity, atol=1e-6)


def test_grouping_py_gives_the_tree_of_the_lesson(lesson):
    """grouping.py and the lesson agree on scores (eq. 5, 6), the best two groups and the tree."""
    sim = lesson.similarity.numpy()
    assert build_tree(sim, (1, 2, 3, 4)) == lesson.tree
    ours, theirs = list(partitions(range(4))), list(lesson.partitions((0, 1, 2, 3)))
    assert len(ours) == 15 and sorted(ours) == sorted(theirs)
    for partition in ours:
        assert score(partition, sim) == pytest.approx(lesson.score(partition), abs=1e-6)
    best = max(lesson.two_groups, key=lesson.score)
    assert best_partition(sim, 2) == sorted(best)


def test_the_folded_network_predicts_what_each_path_of_the_lesson_does(lesson):
    """With the lesson's trained weights, MultiTaskNet gives the lesson's predictions (eq. 4).

    MultiTaskNet runs all groups of a stage in one batch; the lesson runs one task at a time.
    """
    model, _ = adapted_network(lesson)
    model.load_state_dict(our_names(*lesson.copies["trained"]))
    with torch.no_grad():
        predictions = model.eval()(lesson.image[:4])
    for task in lesson.TASKS:
        torch.testing.assert_close(predictions[task], lesson.one_by_one[task], rtol=0, atol=1e-6)


def test_train_py_trains_the_weights_of_the_lesson(lesson):
    """After ten calls of train_step (eq. 8), the weights and losses equal those of the lesson.

    Biases that BatchNorm cancels are not compared.
    """
    model, tasks = adapted_network(lesson)
    model.load_state_dict(our_names(*lesson.copies["start"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(10):
        losses = train.train_step(model, tasks, optimizer, scaler, lesson.image, lesson.labels,
                                  clip=1e9, amp=None)
    assert losses.tolist() == pytest.approx([x.item() for x in lesson.losses.values()], abs=1e-6)
    start = our_names(*lesson.copies["start"])
    theirs = our_names(*lesson.copies["trained"])
    for name, value in model.state_dict().items():
        if name.endswith("head.0.bias"):
            continue            # BatchNorm cancels it, so its gradient is only rounding error
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)
        if "lora_" in name:
            assert (value - start[name]).abs().max() > 1e-4     # training changed it
