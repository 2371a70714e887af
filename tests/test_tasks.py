"""tasks.py: losses and metrics against slow, direct definitions."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tasks import TASKS, Depth, Edge, Normals, Saliency, Segmentation, delta_m, make_tasks


def random_labels(seed, B=3, H=5, W=6, classes=4):
    """Predictions and labels with some pixels invalid; the second image has no valid one."""
    g = torch.Generator().manual_seed(seed)
    off = torch.rand(B, H, W, generator=g) < 0.3
    off[1] = True
    semseg = torch.randint(classes, (B, H, W), generator=g).masked_fill(off, 255)
    depth = (torch.rand(B, 1, H, W, generator=g) + 0.5).masked_fill(off[:, None], 0)
    normals = torch.nn.functional.normalize(torch.randn(B, 3, H, W, generator=g), dim=1)
    labels = {"semseg": semseg, "depth": depth,
              "normals": normals.masked_fill(off[:, None], 0)}
    preds = {"semseg": torch.randn(B, classes, H, W, generator=g),
             "depth": torch.rand(B, 1, H, W, generator=g) * 2,
             "normals": torch.randn(B, 3, H, W, generator=g)}
    return preds, labels, ~off


def test_metrics_equal_their_definitions():
    """Pixel by pixel, in plain Python."""
    preds, labels, valid = random_labels(0)
    true, guess = [], []
    square, relative, angles = [], [], []
    for b, y, x in valid.nonzero().tolist():
        true.append(int(labels["semseg"][b, y, x]))
        guess.append(int(preds["semseg"][b, :, y, x].argmax()))
        d, p = float(labels["depth"][b, 0, y, x]), float(preds["depth"][b, 0, y, x])
        square.append((p - d) ** 2)
        relative.append(abs(p - d) / d)
        n, m = labels["normals"][b, :, y, x].tolist(), preds["normals"][b, :, y, x].tolist()
        length = math.sqrt(sum(v * v for v in m))
        angles.append(math.degrees(math.acos(sum(a * b for a, b in zip(n, m)) / length)))
    ious = []
    for c in range(4):
        hit = sum(t == g == c for t, g in zip(true, guess))
        ious.append(hit / sum(t == c or g == c for t, g in zip(true, guess)))
    n = len(true)
    expected = {
        "semseg": {"mIoU": sum(ious) / 4, "accuracy": sum(t == g for t, g in zip(true, guess)) / n},
        "depth": {"rmse": math.sqrt(sum(square) / n), "abs_rel": sum(relative) / n},
        "normals": {"mean": sum(angles) / n, "rmse": math.sqrt(sum(a * a for a in angles) / n),
                    "<11.25": sum(a < 11.25 for a in angles) / n,
                    "<22.5": sum(a < 22.5 for a in angles) / n,
                    "<30": sum(a < 30 for a in angles) / n}}
    for task in make_tasks(["semseg", "depth", "normals"], classes=4):
        whole = task.sums(preds[task.name], labels[task.name])
        pieces = sum(task.sums(preds[task.name][i:i + 1], labels[task.name][i:i + 1])
                     for i in (2, 0, 1))
        assert task.metrics(whole) == pytest.approx(expected[task.name], rel=1e-4)
        assert task.metrics(pieces) == pytest.approx(task.metrics(whole), rel=1e-12)


def saliency_directly(preds, labels):
    """Image by image and threshold by threshold, with sets of pixels."""
    ious, fs = [], []
    for k in range(15):
        scores = []
        for pred, label in zip(preds, labels):
            pixels = [(y, x) for y in range(5) for x in range(6) if label[y, x] != 255]
            if not pixels:
                continue
            found = {p for p in pixels if 1 / (1 + math.exp(-pred[0][p])) >= 0.2 + 0.05 * k}
            truth = {p for p in pixels if label[p] == 1}
            both = len(found & truth)
            scores.append((both / len(found | truth) if found | truth else 1,
                           both / len(found) if found else float(not truth),
                           both / len(truth) if truth else 1))
        iou, precision, recall = (sum(s[i] for s in scores) / len(scores) for i in range(3))
        ious.append(iou)
        fs.append(1.3 * precision * recall / (0.3 * precision + recall))
    return {"mIoU": max(ious), "maxF": max(fs)}


def test_saliency_equals_its_definition():
    """Best threshold of the mean IoU of images; one has no truth, one no valid pixel."""
    g = torch.Generator().manual_seed(3)
    label = (torch.rand(5, 5, 6, generator=g) < 0.4).long()
    label[torch.rand(5, 5, 6, generator=g) < 0.2] = 255
    label[1] = 255
    label[2][label[2] == 1] = 0
    pred = torch.randn(5, 1, 5, 6, generator=g) + 2 * (label[:, None] == 1)
    pred[2] = -9
    task = Saliency()
    expected = saliency_directly(pred.numpy(), label.numpy())
    assert task.metrics(task.sums(pred, label)) == pytest.approx(expected, rel=1e-5)
    pieces = sum(task.sums(pred[i:i + 1], label[i:i + 1]) for i in (3, 1, 4, 0, 2))
    assert task.metrics(pieces) == pytest.approx(expected, rel=1e-5)
    total = 0
    n, positive = int((label != 255).sum()), int((label == 1).sum())
    for p, y in zip(pred[label[:, None] != 255].tolist(), label[label != 255].tolist()):
        q = 1 / (1 + math.exp(-p))
        total -= (n - positive) / n * math.log(q) if y else positive / n * math.log(1 - q)
    assert task.loss(pred, label).item() == pytest.approx(total / n, rel=1e-4)


def test_edges_equal_their_definition():
    """Pixel by pixel: a hit has a pixel of the other map within reach; one threshold for all."""
    g = torch.Generator().manual_seed(5)
    label = (torch.rand(2, 9, 140, generator=g) < 0.02).long()  # a diagonal of 140: reach is 1
    label[torch.rand(2, 9, 140, generator=g) < 0.1] = 255
    pred = torch.randn(2, 1, 9, 140, generator=g) + 2 * (label[:, None] == 1)
    task, scores = Edge(), []
    for k in range(1, 20):
        found, true = ({tuple(p) for p in mask.nonzero().tolist()} for mask in (
            (pred[:, 0].sigmoid() >= k / 20) & (label != 255), label == 1))
        near = [{(b, y + dy, x + dx) for b, y, x in pixels
                 for dy in (-1, 0, 1) for dx in (-1, 0, 1)} for pixels in (found, true)]
        precision = len(found & near[1]) / max(1, len(found))
        recall = len(true & near[0]) / len(true)
        scores.append((2 * precision * recall / max(precision + recall, 1e-9), precision, recall))
    expected = dict(zip(("F", "precision", "recall"), max(scores)))
    assert task.metrics(task.sums(pred, label)) == pytest.approx(expected, rel=1e-5)
    pieces = sum(task.sums(pred[i:i + 1], label[i:i + 1]) for i in (1, 0))
    assert task.metrics(pieces) == pytest.approx(expected, rel=1e-5)
    chance = pred[:, 0].sigmoid()[label != 255].tolist()
    error = [-0.95 * math.log(q) if y else -0.05 * math.log(1 - q)
             for q, y in zip(chance, label[label != 255].tolist())]
    assert task.loss(pred, label).item() == pytest.approx(sum(error) / len(error), rel=1e-4)
    thick = F.max_pool2d((label[:1, None] == 1).float(), 5, 1, 2)[:, 0]  # two pixels off is wrong
    found = task.metrics(task.sums(20 * thick[:, None] - 10, label[:1]))
    assert found["recall"] == 1 and found["precision"] < 0.7
    assert task.weight == 50


def test_empty_masks_have_defined_scores():
    """Nothing to find and nothing found is 1; something found then, or something missed, is 0."""
    task, empty = Saliency(), torch.zeros(1, 4, 4, dtype=torch.long)
    low, high = torch.full((1, 1, 4, 4), -9.0), torch.full((1, 1, 4, 4), 9.0)
    assert task.metrics(task.sums(low, empty)) == {"mIoU": 1, "maxF": pytest.approx(1)}
    assert task.metrics(task.sums(high, empty))["mIoU"] == 0
    assert task.metrics(task.sums(low, empty + 1)) == {"mIoU": 0, "maxF": 0}
    assert task.metrics(task.sums(high, empty + 1)) == {"mIoU": 1, "maxF": pytest.approx(1)}


@pytest.mark.parametrize("name", TASKS)
def test_nothing_valid_and_predictions_of_nan_give_nan(name):
    """Never a number that looks like a result; a NaN under an invalid pixel does not matter."""
    task = make_tasks([name], 4)[0]
    classes = task.kind == "classes"
    label = (torch.ones(2, 4, 4, dtype=torch.long) if classes else
             torch.ones(2, task.channels, 4, 4))  # as the task's kind says
    invalid = 255 if classes else 0
    label[1] = invalid
    pred = torch.randn(2, task.outputs, 4, 4)
    sums = task.sums(pred, label)
    nothing = task.metrics(task.sums(pred, torch.full_like(label, invalid)))
    pred[1, 0, 0, 0] = math.nan
    assert task.metrics(task.sums(pred, label)) == task.metrics(sums)
    pred[0, 0, 0, 0] = math.nan
    for found in (nothing, task.metrics(task.sums(pred, label))):
        assert all(math.isnan(value) for value in found.values())


def test_losses_look_at_valid_pixels_only():
    """Equal to the mean over valid pixels; 0, and no gradient, when there are none."""
    preds, labels, valid = random_labels(1)
    semseg, depth, normals = make_tasks(["semseg", "depth", "normals"], classes=4)
    log_p = preds["semseg"].log_softmax(1).movedim(1, -1)[valid]
    unit = torch.nn.functional.normalize(preds["normals"], dim=1)
    expected = {
        "semseg": -log_p.gather(1, labels["semseg"][valid][:, None]).mean(),
        "depth": (preds["depth"] - labels["depth"]).abs()[:, 0][valid].mean(),
        "normals": (unit - labels["normals"]).abs().movedim(1, -1)[valid].mean()}
    for task in (semseg, depth, normals):
        pred, label = preds[task.name].clone().requires_grad_(), labels[task.name]
        loss = task.loss(pred, label)
        torch.testing.assert_close(loss, expected[task.name])
        loss.backward()
        assert pred.grad[1].abs().max() == 0  # the image without labels
        nothing = task.loss(pred[1:2], label[1:2])
        assert nothing == 0 and nothing.requires_grad


def test_a_class_that_never_occurs_does_not_count():
    """mIoU is over classes in truth or prediction; one predicted wrongly everywhere counts as 0."""
    task = Segmentation("semseg", 5, 1.0)
    label = torch.tensor([[[0, 0, 1, 255]]])
    pred = torch.nn.functional.one_hot(torch.tensor([[[0, 0, 2, 3]]]), 5).movedim(-1, 1).float()
    assert task.metrics(task.sums(pred, label))["mIoU"] == pytest.approx(1 / 3)


def test_best_constants():
    """Majority class, mean depth, and a direction that no other candidate beats."""
    assert Segmentation("semseg", 3, 1.0).best_constant(torch.tensor([2, 1, 2, 0])).argmax() == 2
    assert Depth().best_constant(torch.tensor([1.0, 3.0])) == 2
    walls = torch.tensor([[0.0, 0, 1]] * 6 + [[0.0, -1, 0]] * 3)
    found = Normals().best_constant(walls)
    angle = (walls @ found).clamp(-1, 1).acos().mean()
    assert angle <= (walls @ torch.tensor([0.0, 0, 1])).acos().mean() + 0.05


def test_delta_m_is_equation_7():
    """The mean of relative gains, better up or down, over the tasks that there are."""
    results = {"semseg": {"mIoU": 70.53}, "normals": {"mean": 16.43}}
    single = {"semseg": {"mIoU": 67.21}, "normals": {"mean": 17.97}}
    expected = 50 * ((70.53 - 67.21) / 67.21 - (16.43 - 17.97) / 17.97)
    assert delta_m(results, single) == pytest.approx(expected)
    assert delta_m({"semseg": {"mIoU": 70.53}}, single) == pytest.approx(332 / 67.21)
    with pytest.raises(ValueError, match="no mean of normals"):
        delta_m(results, {"semseg": {"mIoU": 1.0}})
    for bad in (0, "x", None):
        with pytest.raises(ValueError, match="no mIoU of semseg, or not a number"):
            delta_m(results, {**single, "semseg": {"mIoU": bad}})


def test_the_papers_own_table_gives_its_delta_m():
    """Table 1 against the baseline that is shipped: +4.50 for TGLoRA, all four tasks."""
    baseline = json.loads((Path(__file__).parent.parent / "baselines/pascal.json").read_text())
    ours = {"semseg": {"mIoU": 0.7053}, "human_parts": {"mIoU": 0.6096}, "sal": {"mIoU": 0.6612},
            "normals": {"mean": 16.43}}
    assert delta_m(ours, baseline["results"]) == pytest.approx(4.50, abs=0.01)
    baseline = json.loads((Path(__file__).parent.parent / "baselines/nyud.json").read_text())
    ours = {"semseg": {"mIoU": 0.4184}, "normals": {"mean": 24.38}, "depth": {"rmse": 0.6177}}
    assert delta_m(ours, baseline["results"]) == pytest.approx(0.24, abs=0.03)


def test_unknown_and_repeated_tasks_are_refused():
    """And semseg, where nothing says of how many classes."""
    with pytest.raises(ValueError, match="unknown task 'semsg'; expected some of .* or your own"):
        make_tasks(["semsg"], 6)
    with pytest.raises(ValueError, match="at most once"):
        make_tasks(["depth", "depth"], 6)
    with pytest.raises(ValueError, match="how many classes"):
        make_tasks(["depth", "semseg"], None)
    assert make_tasks(["human_parts"], None)[0].outputs == 7


def test_a_task_of_ones_own_is_one_more_in_the_table(monkeypatch):
    """By its name in results and baselines, too; what is made of the table leaves it as it is."""
    monkeypatch.setitem(TASKS, "ground", Segmentation("ground", 3, 1.0))
    for _ in range(2):
        ground, semseg = make_tasks(["ground", "semseg"], 40)
        assert (ground.outputs, ground.weight, semseg.outputs, semseg.classes) == (3, 1.0, 40, 40)
        ground.weight = 7.0
    assert make_tasks(["semseg"], 21)[0].outputs == 21
    assert delta_m({"ground": {"mIoU": 0.6}}, {"ground": {"mIoU": 0.5}}) == pytest.approx(20)
