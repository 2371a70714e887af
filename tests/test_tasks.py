"""tasks.py: losses and metrics against slow, direct definitions."""

import math

import pytest
import torch

from tasks import Depth, Normals, SemSeg, delta_m, make_tasks


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
    task = SemSeg(5)
    label = torch.tensor([[[0, 0, 1, 255]]])
    pred = torch.nn.functional.one_hot(torch.tensor([[[0, 0, 2, 3]]]), 5).movedim(-1, 1).float()
    assert task.metrics(task.sums(pred, label))["mIoU"] == pytest.approx(1 / 3)


def test_best_constants():
    """Majority class, mean depth, and a direction that no other candidate beats."""
    assert SemSeg(3).best_constant(torch.tensor([2, 1, 2, 0])).argmax() == 2
    assert Depth().best_constant(torch.tensor([1.0, 3.0])) == 2
    walls = torch.tensor([[0.0, 0, 1]] * 6 + [[0.0, -1, 0]] * 3)
    found = Normals().best_constant(walls)
    angle = (walls @ found).clamp(-1, 1).acos().mean()
    assert angle <= (walls @ torch.tensor([0.0, 0, 1])).acos().mean() + 0.05


def test_delta_m_is_equation_7():
    """The paper's own table 1: TGLoRA attn+mlp+others against single-task training, +4.50."""
    semseg, normals = SemSeg(21), Normals()
    results = {"semseg": {"mIoU": 70.53}, "normals": {"mean": 16.43}}
    single = {"semseg": {"mIoU": 67.21}, "normals": {"mean": 17.97}}
    expected = 50 * ((70.53 - 67.21) / 67.21 - (16.43 - 17.97) / 17.97)
    assert delta_m(results, single, [semseg, normals]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no mean of normals"):
        delta_m(results, {"semseg": {"mIoU": 1.0}}, [semseg, normals])


def test_unknown_and_repeated_tasks_are_refused():
    with pytest.raises(ValueError, match="unknown task 'semsg'"):
        make_tasks(["semsg"], 6)
    with pytest.raises(ValueError, match="at most once"):
        make_tasks(["depth", "depth"], 6)
