"""Tests of lesson.py, and that similarity.py, grouping.py, model.py and train.py agree with it.

The lesson implements the method without them. To compare numbers to many digits, it runs once in
float64, cell by cell and with little training, and copies of its networks are kept. A second run,
as a reader starts it, shows that training works.
"""

import argparse
import contextlib
import io
import re
import subprocess
import sys
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

pytestmark = pytest.mark.slow        # the lesson itself takes most of a minute
LESSON = Path(__file__).parent.parent / "lesson.py"


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Run the lesson in float64 on fewer rooms and with 8 steps of training.

    Yields all names that it defines, what it prints in `output`, and copies of its networks in
    `copies`, taken after cell 4, and before and after the training in cell 8.
    """
    title, *cells = LESSON.read_text(encoding="utf-8").split("# %% ")
    names = {"__name__": "lesson"}
    copies = {}
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lesson"))      # where it draws its pictures
        torch.set_default_dtype(torch.float64)
        # The lesson and the losses in tasks.py call `Tensor.float`. Here it must give float64.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        with contextlib.redirect_stdout(output):
            for cell in cells:
                if cell.startswith("8."):
                    # The copy is taken just before the adapters are trained.
                    before, training = cell.split("fit(decoders, adapters")
                    exec("# " + before, names)
                    copies["start"] = deepcopy((names["backbone"], names["decoders"]))
                    exec("fit(decoders, adapters" + training, names)
                    copies["trained"] = deepcopy((names["backbone"], names["decoders"]))
                else:
                    exec("# " + cell, names)
                if cell.startswith("Setup"):
                    names.update(TRAIN=16, VAL=4, STEPS=8)
                if cell.startswith("4."):
                    copies["decoded"] = deepcopy((names["backbone"], names["decoders"]))
        yield SimpleNamespace(**names, copies=copies, output=output.getvalue())
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What `python lesson.py` prints, by cell. It also draws three pictures."""
    folder = tmp_path_factory.mktemp("printed")
    run = subprocess.run([sys.executable, LESSON], cwd=folder, capture_output=True, text=True,
                         check=True)
    pictures = sorted(path.name for path in folder.glob("runs/lesson/*.png"))
    assert pictures == ["predictions.png", "rooms.png", "tree.png"]
    return dict(re.findall(r"^(\d)\. (.*?)(?=^\d\. |\Z)", run.stdout, re.M | re.S))


def our_names(backbone, decoders):
    """The state dict of a MultiTaskNet with the weights of the lesson's network."""
    state, weights = {}, backbone.state_dict()
    for name, value in weights.items():
        path, _, last = name.partition(".linear.")
        if last == "weight":                # the lesson has one A and one B per group
            groups = range(sum(key.startswith(f"{path}.A.") for key in weights))
            A = torch.cat([weights[f"{path}.A.{g}"] for g in groups])
            B = torch.cat([weights[f"{path}.B.{g}"].T for g in groups])
            state |= {f"backbone.{path}.lora_A": A, f"backbone.{path}.lora_B": B}
        if ".A." not in name and ".B." not in name:
            state["backbone." + name.replace(".linear.", ".")] = value
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


def test_each_similarity_is_printed_with_its_standard_error(lesson):
    """The printed standard error is that of the mean over images, computed here by NumPy."""
    samples = np.asarray(lesson.samples)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    for t, u in zip(*np.triu_indices(4, 1)):
        tasks = f"{lesson.TASKS[t]:<8} {lesson.TASKS[u]:<8}"
        assert f"{tasks} {samples[:, t, u].mean():6.3f} +- {error[t, u]:.3f}\n" in lesson.output


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

    MultiTaskNet runs all groups of a stage in one batch; the lesson runs one group at a time.
    """
    model, _ = adapted_network(lesson)
    model.load_state_dict(our_names(*lesson.copies["trained"]))
    with torch.no_grad():
        predictions = model.eval()(lesson.image[:4])
    for task in lesson.TASKS:
        theirs = lesson.decoders[task](lesson.maps[task])
        torch.testing.assert_close(predictions[task], theirs, rtol=0, atol=1e-6)


def test_train_py_trains_the_weights_of_the_lesson(lesson):
    """After as many calls of train_step (eq. 8), the weights and losses equal those of the lesson.

    Biases that BatchNorm cancels are not compared.
    """
    model, tasks = adapted_network(lesson)
    model.load_state_dict(our_names(*lesson.copies["start"]))
    adapters = [p for p in model.backbone.parameters() if p.requires_grad]
    groups = [{"params": model.decoders.parameters()}, {"params": adapters}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=8,
                                                   pct_start=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(8):
        rows = slice(4 * (step % 4), 4 * (step % 4) + 4)        # 16 rooms, 4 per batch
        labels = {task: label[rows] for task, label in lesson.labels.items()}
        train.train_step(model, tasks, optimizer, scaler, lesson.image[rows], labels, clip=1e9,
                         amp=None)
        schedule.step()
    start = our_names(*lesson.copies["start"])
    theirs = our_names(*lesson.copies["trained"])
    for name, value in model.state_dict().items():
        if name.endswith("head.0.bias"):
            continue            # BatchNorm cancels it, so its gradient is only rounding error
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)
        if "lora_" in name:
            assert (value - start[name]).abs().max() > 1e-4     # training changed it

    val_labels = {task: label[16:] for task, label in lesson.labels.items()}
    with torch.no_grad():
        predictions = model.eval()(lesson.image[16:])
    for task in tasks:
        loss = task.loss(predictions[task.name], val_labels[task.name])
        assert loss.item() == pytest.approx(lesson.losses[task.name].item(), abs=1e-6)


def test_the_control_differs_only_in_its_adapters(lesson):
    """The control starts from the decoders that are later trained with adapters, and its backbone
    is frozen: trained again with the frozen backbone, these decoders become the control."""
    _, decoders = deepcopy(lesson.copies["start"])
    lesson.fit(decoders, [], lesson.frozen_maps_of, 8)
    for ours, theirs in zip(decoders.state_dict().values(), lesson.control.state_dict().values()):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        maps = lesson.copies["start"][0](lesson.image)          # B is still zero
    for ours, theirs in zip(maps, lesson.frozen_maps):
        torch.testing.assert_close(ours, theirs)


def test_adapters_help(printed):
    """On rooms that neither was trained on, decoders with adapters have a lower loss than decoders
    only, and the training losses of both fall from the first quarter of the steps to the last."""
    only, adapted = (float(x) for x in re.findall(r"total +([\d.]+)", printed["8"]))
    assert adapted < only
    curves = re.findall(r"training loss: +(.*)", printed["8"])
    assert len(curves) == 2
    for curve in curves:
        first, second, _, last = map(float, curve.split())
        assert first > second > last


def test_the_comparison_of_cell_9_is_not_empty(lesson, printed):
    """The printed mean absolute value of B is right and above 0. Folding changes no prediction, but
    the adapters of other groups change the predictions of every task."""
    backbone, _ = lesson.copies["trained"]
    all_B = [B.flatten() for name, B in backbone.named_parameters() if ".B." in name]
    assert f"started at 0: {torch.cat(all_B).abs().mean():.3f}\n" in lesson.output
    assert float(re.search(r"started at 0: (.*)", printed["9"])[1]) > 0
    rows = re.findall(r"(\w+) +(\S+) with folding, (\S+) with the maps of (\w+)", printed["9"])
    assert [task for task, *_ in rows] == lesson.TASKS
    for task, folded, swapped, other in rows:
        assert float(folded) < 1e-10
        assert float(swapped) > 0.1 and task != other
