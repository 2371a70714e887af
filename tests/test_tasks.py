"""Tests of tasks.py: losses and metrics are compared with slow, direct definitions."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tasks import TASKS, Depth, Edge, Normals, Saliency, Segmentation, delta_m, make_tasks

BASELINES = Path(__file__).parent.parent / "baselines"


def random_example(name, B=3, H=5, W=6):
    """The task `name`, a random prediction, a random label, and the mask (B, H, W) of the label's
    valid pixels. Image 1 has no valid pixel."""
    task = make_tasks([name], classes=4)[0]
    g = torch.Generator().manual_seed(0)
    valid = torch.rand(B, H, W, generator=g) > 0.3
    valid[1] = False
    pred = torch.randn(B, task.outputs, H, W, generator=g)
    if task.kind == "classes":
        label = torch.randint(task.classes, (B, H, W), generator=g)
        return task, pred, label.where(valid, 255), valid
    label = torch.rand(B, task.channels, H, W, generator=g) + 0.5
    if name == "normals":
        label = F.normalize(label - 1, dim=1)
    return task, pred, label * valid[:, None], valid


def check_metrics(task, pred, label, expected):
    """Check the metrics of the batch, computed at once and from sums added up image by image."""
    parts = [task.sums(pred[i:i + 1], label[i:i + 1]) for i in reversed(range(len(pred)))]
    for sums in (task.sums(pred, label), sum(parts)):
        metrics = task.metrics(sums)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def mean(values):
    return sum(values) / len(values)


# --- definitions ----------------------------------------------------------------------------------
def test_segmentation_equals_its_definition():
    """Mean IoU, accuracy and cross-entropy equal their definitions, applied to the valid pixels
    only."""
    task, pred, label, valid = random_example("semseg")
    true = label[valid]
    logits = pred.movedim(1, -1)[valid]                     # (N, classes)
    guess = logits.argmax(1)
    ious = []
    for c in range(4):
        both = (true == c) & (guess == c)
        either = (true == c) | (guess == c)
        ious.append(both.sum().item() / either.sum().item())
    accuracy = (true == guess).float().mean().item()
    check_metrics(task, pred, label, {"mIoU": mean(ious), "accuracy": accuracy})
    error = -logits.log_softmax(1)[range(len(true)), true]
    torch.testing.assert_close(task.loss(pred, label), error.mean())


def test_a_class_that_never_occurs_does_not_count():
    """The mean IoU leaves out classes that are neither true nor predicted at any valid pixel."""
    task = Segmentation("semseg", 5, 1.0)
    label = torch.tensor([[[0, 0, 1, 255]]])
    pred = F.one_hot(torch.tensor([[[0, 0, 2, 3]]]), 5).movedim(-1, 1).float()
    sums = task.sums(pred, label)
    assert sums[1, 2] == 1 and sums[2, 1] == 0              # rows are true classes
    assert task.metrics(sums)["mIoU"] == pytest.approx(1 / 3)


def test_depth_equals_its_definition():
    """The metrics are the RMSE and the mean relative error, and the loss is L1."""
    task, pred, label, valid = random_example("depth")
    error = (pred - label)[:, 0][valid]
    relative = error.abs() / label[:, 0][valid]
    check_metrics(task, pred, label, {"rmse": error.square().mean().sqrt().item(),
                                      "abs_rel": relative.mean().item()})
    torch.testing.assert_close(task.loss(pred, label), error.abs().mean())


def test_normals_equal_their_definition():
    """The metrics are the mean and root mean square angle; the loss is L1 between unit vectors."""
    task, pred, label, valid = random_example("normals")
    true = label.movedim(1, -1)[valid]
    guess = pred.movedim(1, -1)[valid]
    unit = guess / guess.square().sum(1, keepdim=True).sqrt()
    angles = [math.degrees(math.acos(cosine)) for cosine in (true * unit).sum(1).tolist()]
    rmse = math.sqrt(mean([angle * angle for angle in angles]))
    check_metrics(task, pred, label, {"mean": mean(angles), "rmse": rmse})
    torch.testing.assert_close(task.loss(pred, label), (true - unit).abs().mean())


def test_normals_have_three_limits():
    """Angles just below and above 11.25, 22.5 and 30 degrees are told apart."""
    angle = torch.tensor([11.2, 11.3, 22.4, 22.6, 29.9, 30.1]).deg2rad()
    pred = torch.stack([angle.sin(), 0 * angle, angle.cos()]).view(1, 3, 1, 6)
    label = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 6)
    check_metrics(Normals(), pred, label, {"<11.25": 1 / 6, "<22.5": 3 / 6, "<30": 5 / 6})


def test_values_that_count_as_valid():
    """A depth is valid if it is above 0, and a normal if its length is above 0.5."""
    depth = torch.tensor([-1.0, 0.0, 0.001]).view(1, 1, 1, 3)
    assert Depth().valid(depth).flatten().tolist() == [False, False, True]
    normals = torch.tensor([0.0, 0.45, 0.55]) * torch.tensor([[0.6], [0.0], [-0.8]])
    assert Normals().valid(normals.view(1, 3, 1, 3)).flatten().tolist() == [False, False, True]


def test_saliency_equals_its_definition():
    """The mIoU is the mean of the images' IoUs at the best threshold. An image has IoU 1 if no
    pixel is salient and none is predicted to be."""
    task, pred, label, valid = random_example("sal", B=5)
    label[2] = label[2].where(label[2] != 1, 0)
    pred = pred + 2 * (label[:, None] == 1)
    pred[2] = -9
    scores = []
    for k in range(15):
        ious = []
        for i in (0, 2, 3, 4):                              # image 1 has no valid pixel
            true = (label[i] == 1)[valid[i]]
            guess = (pred[i, 0].sigmoid() >= 0.20 + 0.05 * k)[valid[i]]
            either = (true | guess).sum().item()
            ious.append((true & guess).sum().item() / either if either else 1)
        scores.append(mean(ious))
    check_metrics(task, pred, label, {"mIoU": max(scores)})


def test_edges_equal_their_definition():
    """A predicted edge pixel is correct, and a true one is recalled, if the other map has an edge
    pixel within reach, which is one pixel here. All images share one threshold."""
    g = torch.Generator().manual_seed(5)
    label = (torch.rand(2, 9, 140, generator=g) < 0.02).long()   # diagonal 140, so reach is 1
    label[torch.rand(2, 9, 140, generator=g) < 0.1] = 255
    pred = torch.randn(2, 1, 9, 140, generator=g) + 2 * (label[:, None] == 1)

    def pixels(mask):
        return {tuple(pixel) for pixel in mask.nonzero().tolist()}

    def near(pixels):
        return {(b, y + dy, x + dx) for b, y, x in pixels for dy in (-1, 0, 1) for dx in (-1, 0, 1)}

    true = pixels(label == 1)
    scores = []
    for k in range(1, 20):
        guess = pixels((pred[:, 0].sigmoid() >= k / 20) & (label != 255))
        precision = len(guess & near(true)) / max(1, len(guess))
        recall = len(true & near(guess)) / len(true)
        f = 2 * precision * recall / max(precision + recall, 1e-9)
        scores.append((f, precision, recall))
    check_metrics(Edge(), pred, label, dict(zip(("F", "precision", "recall"), max(scores))))


@pytest.mark.parametrize("width, offset, correct", [(140, 1, True), (140, 2, False),
                                                    (340, 3, True), (460, 4, False)])
def test_the_reach_of_an_edge_grows_with_the_image(width, offset, correct):
    """An edge may be off by 0.0075 of the image's diagonal, rounded to whole pixels: by 1 pixel if
    the diagonal is 140, and by 3 if it is 340 or 460."""
    label = torch.zeros(1, 9, width).long()
    pred = torch.full((1, 1, 9, width), -9.0)
    label[:, :, 50] = 1
    pred[..., 50 + offset] = 9
    check_metrics(Edge(), pred, label, {"F": float(correct)})


@pytest.mark.parametrize("name, high, low, perfect", [
    ("sal", 0.22, 0.18, True), ("sal", 0.92, 0.88, True),
    ("sal", 0.19, 0.11, False), ("sal", 0.99, 0.91, False),
    ("edge", 0.07, 0.03, True), ("edge", 0.97, 0.93, True)])
def test_first_and_last_thresholds(name, high, low, perfect):
    """Thresholds run from 0.20 to 0.90 for saliency, and from 0.05 to 0.95 for edges."""
    task = TASKS[name]
    chance = torch.full((1, 1, 3, 40), 0.001)
    chance[..., 1, 10], chance[..., 1, 30] = high, low
    label = torch.zeros(1, 3, 40).long()
    label[:, 1, 10] = 1
    score = task.metrics(task.sums(chance.logit(), label))[task.metric]
    assert (score == pytest.approx(1)) == perfect


@pytest.mark.parametrize("name", ["sal", "edge"])
def test_binary_losses_equal_their_definition(name):
    """The saliency loss weights each class by the other class's share of the valid pixels. In the
    edge loss, an edge pixel has weight 0.95, and any other pixel 0.05."""
    task, pred, label, valid = random_example(name)
    chance, true = pred[:, 0][valid].sigmoid(), label[valid]
    positive = 0.95 if name == "edge" else (true == 0).float().mean()
    error = torch.where(true == 1, -positive * chance.log(), (positive - 1) * (1 - chance).log())
    torch.testing.assert_close(task.loss(pred, label), error.mean())


# --- every task -----------------------------------------------------------------------------------
def test_constants_of_the_tasks():
    """Loss weights are those of MTLoRA (of MTI-Net for edges), and each task has the expected
    `outputs` and `higher_is_better`."""
    expected = {"semseg": (1, 40, True), "human_parts": (2, 7, True), "sal": (5, 1, True),
                "edge": (50, 1, True), "depth": (1, 1, False), "normals": (10, 3, False)}
    tasks = make_tasks(list(expected), 40)
    assert {task.name: (task.weight, task.outputs, task.higher_is_better)
            for task in tasks} == expected


@pytest.mark.parametrize("name", TASKS)
def test_nothing_valid_and_nan_predictions_give_nan(name):
    """All metrics are NaN if no pixel is valid, or if the prediction at a valid pixel is NaN; a NaN
    at an invalid pixel does not matter."""
    task, pred, label, _ = random_example(name)
    label[0, ..., 0, 0] = 1 if task.kind == "classes" else 0.6
    metrics = task.metrics(task.sums(pred, label))
    assert math.isfinite(metrics[task.metric])
    pred[1, 0, 0, 0] = math.nan                             # image 1 has no valid pixel
    assert task.metrics(task.sums(pred, label)) == metrics
    nothing = task.metrics(task.sums(pred[1:2], label[1:2]))
    pred[0, 0, 0, 0] = math.nan
    for broken in (nothing, task.metrics(task.sums(pred, label))):
        assert all(math.isnan(value) for value in broken.values())


@pytest.mark.parametrize("name", TASKS)
def test_losses_use_valid_pixels_only(name):
    """Valid pixels get a gradient, and invalid ones do not. If no pixel is valid, the loss is 0 but
    can still be differentiated. For a float16 prediction, the loss is float32."""
    task, pred, label, valid = random_example(name)
    pred.requires_grad_()
    task.loss(pred, label).backward()
    assert torch.equal(pred.grad.abs().amax(1) > 0, valid)
    nothing = task.loss(pred[1:2], label[1:2])
    assert nothing == 0 and nothing.requires_grad
    assert task.loss(pred.half(), label).dtype == torch.float32    # pred is half under autocast


def test_best_constants():
    """The best constant predictions are the most frequent class, the mean depth, "salient", and a
    direction with a small mean angle to the normals."""
    assert Segmentation("semseg", 3, 1.0).best_constant(torch.tensor([2, 1, 2, 0])).argmax() == 2
    assert Depth().best_constant(torch.tensor([1.0, 1.0, 4.0])).tolist() == [2]
    assert Saliency().best_constant(torch.tensor([0, 1])).sigmoid() > 0.99
    wall, ground = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, -1.0, 0.0])
    values = torch.stack([wall] * 6 + [ground] * 3)
    angle = (values @ Normals().best_constant(values)).acos().mean()
    assert angle <= math.pi / 2 / 3 + 0.05      # the wall's normal has a mean angle of pi / 6
    assert torch.allclose(Normals().best_constant(ground[None]), ground)


def test_colours():
    """Invalid pixels are black, and classes differ in colour."""
    semseg = Segmentation("semseg", 40, 1.0)
    rgb = semseg.colours(torch.tensor([[*range(40), 255]]))[:, 0]
    assert torch.pdist(rgb.T).min() > 0.02 and rgb[:, 40].sum() == 0
    pred = F.one_hot(torch.tensor([[3]]), 40).movedim(-1, 0)
    assert torch.equal(semseg.colours(pred)[:, 0, 0], rgb[:, 3])
    normal = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])[:, None]
    assert Normals().colours(normal)[:, 0].T.tolist() == [[0.5, 0.5, 1], [0, 0, 0]]
    assert rgb[:, 0].tolist() == pytest.approx([0.35] * 3)             # class 0 is grey
    assert Saliency().colours(torch.tensor([[1, 0, 255]]))[0, 0].tolist() == [1, 0, 0]


def test_far_depths_are_darker():
    """Luminance falls with every centimetre from 0 to 10 m, where it is above that of black, which
    marks invalid pixels. Depths beyond that range look like 0 or 10 m."""
    depth = torch.linspace(0.01, 10, 1000)
    rgb = Depth().colours(depth.view(1, 1, -1))[:, 0]                  # (3, 1000)
    luminance = torch.tensor([0.2126, 0.7152, 0.0722]) @ rgb ** 2.2
    assert (luminance.diff() < 0).all() and luminance[0] > 0.9 and luminance[-1] > 0.01
    near, far, invalid = Depth().colours(torch.tensor([[[-1.0, 99.0, 0.0]]]))[:, 0].T
    assert torch.equal(far, rgb[:, -1]) and invalid.sum() == 0
    torch.testing.assert_close(near, rgb[:, 0], atol=0.01, rtol=0)


# --- tables ---------------------------------------------------------------------------------------
def test_the_papers_tables_give_their_delta_m():
    """From the paper's metrics and baselines/, `delta_m` gives the paper's +4.50 on PASCAL (table
    1) and +0.24 on NYUD (table 2). A baseline without a usable value is an error."""
    pascal = json.loads((BASELINES / "pascal.json").read_text())["results"]
    results = {"semseg": {"mIoU": 0.7053}, "human_parts": {"mIoU": 0.6096},
               "sal": {"mIoU": 0.6612}, "normals": {"mean": 16.43}}
    assert delta_m(results, pascal) == pytest.approx(4.50, abs=0.01)
    nyud = json.loads((BASELINES / "nyud.json").read_text())["results"]
    results = {"semseg": {"mIoU": 0.4184}, "normals": {"mean": 24.38}, "depth": {"rmse": 0.6177}}
    assert delta_m(results, nyud) == pytest.approx(0.24, abs=0.03)
    for bad in ({}, {"mIoU": 0}, {"mIoU": None}):
        with pytest.raises(ValueError, match="mIoU of semseg is missing, or is not a number"):
            delta_m(results, {**nyud, "semseg": bad})


@pytest.mark.parametrize("names, classes, message", [
    (["semsg"], 6, "unknown task 'semsg'; expected some of semseg, .*your own"),
    ([], 6, "at least one task, and each task only once"),
    (["depth", "depth"], 6, "at least one task, and each task only once"),
    (["depth", "semseg"], None, "semseg: the number of classes is unknown"),
    (["semseg"], 459, "at most 255 classes, got 459")])
def test_wrong_lists_of_tasks_are_refused(names, classes, message):
    """An unknown task, a repeated task and an empty list are errors. So is semseg if the number of
    classes is unknown or too large."""
    with pytest.raises(ValueError, match=message):
        make_tasks(names, classes)


def test_your_own_task_needs_one_entry(monkeypatch):
    """Once your task is in TASKS, make_tasks and delta_m find it by its name. Changing a task that
    make_tasks returned does not change TASKS. A name that no module can have is refused."""
    monkeypatch.setitem(TASKS, "ground", Segmentation("ground", 3, 1.0))
    for _ in range(2):
        ground, semseg = make_tasks(["ground", "semseg"], ("floor", "wall"))
        assert (ground.outputs, ground.weight, semseg.names) == (3, 1.0, ("floor", "wall"))
        ground.weight = 7.0
    assert delta_m({"ground": {"mIoU": 0.6}}, {"ground": {"mIoU": 0.5}}) == pytest.approx(20)
    for name in ("type", "keys", "a.b"):
        monkeypatch.setitem(TASKS, name, Segmentation(name, 3, 1.0))
        with pytest.raises(ValueError, match=f"a task cannot be called '{name}'"):
            make_tasks([name], 6)
