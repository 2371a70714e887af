"""Tests of similarity.py: the results equal direct computations on a small network."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from similarity import (Similarity, finetune_decoders, format_similarity, fresh_decoders,
                        gradient_similarity, task_similarity)

NAMES = ["one", "two", "three"]


class Backbone(nn.Module):
    """A backbone that gives two maps, with one parameter that it does not use.

    BatchNorm and dropout change its maps in train mode, so a forgotten eval mode is noticed.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.5), nn.GELU())
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, image):
        first = self.first(image)
        return [first, self.second(first)]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, maps, size):
        assert tuple(size) == (6, 6)
        return self.head(self.norm(torch.cat(maps, 1)))


class Net(nn.Module):
    def __init__(self, names=NAMES):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        self.decoders = nn.ModuleDict({name: Decoder() for name in names})

    def forward(self, image):
        maps = self.backbone(image)
        return {name: decoder(maps, image.shape[2:]) for name, decoder in self.decoders.items()}


class Task:
    def __init__(self, name, weight):
        self.name, self.weight = name, weight

    def valid(self, label):
        return label.isfinite()

    def loss(self, prediction, label):
        return F.mse_loss(prediction, label)


def make_tasks():
    return [Task("one", 1.0), Task("two", 0.3), Task("three", 5.0)]


def example(seed, without=()):
    """A random image and labels computed from it; tasks in `without` have no valid label."""
    image = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    labels = {"one": image[:, :1], "two": image[:, 1:2].abs(), "three": image.sum(1, keepdim=True)}
    for name in without:
        labels[name] = torch.full_like(labels[name], torch.nan)
    return image, labels


def load(batches):
    """For each list of seeds in `batches`, yield the images and labels of those examples."""
    for batch in batches:
        images, labels = zip(*map(example, batch))
        yield torch.cat(images), {k: torch.cat([x[k] for x in labels]) for k in labels[0]}


# --- eq. 2 ----------------------------------------------------------------------------------------
def test_the_similarity_is_the_cosine():
    """The similarity is the cosine of the two gradients, which does not change if both are divided
    by the sum of their norms as in eq. 2."""
    g, h = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([100.0, -1.0, 0.0])
    assert gradient_similarity(g, h).item() == pytest.approx(9999 / 10001)
    assert gradient_similarity(g / 201, h / 201).item() == pytest.approx(9999 / 10001)
    assert gradient_similarity(1e-15 * g, h).item() == pytest.approx(9999 / 10001)
    assert gradient_similarity(g, -g).item() == pytest.approx(-1)
    assert gradient_similarity(g, 0 * g) == 0


def test_gradients_of_any_precision_but_one_shape():
    """In float16, whose squares overflow, equal gradients have similarity 1. In float64, nothing is
    lost. Gradients of different shapes are an error, even if they could be broadcast."""
    g = torch.full((100,), 300.0)
    assert gradient_similarity(g.half(), g.half()) == 1
    assert gradient_similarity(g.double(), g.double() + 1e-12).dtype is torch.float64
    with pytest.raises(ValueError, match=r"the shapes \(100,\) and \(1,\); expected equal"):
        gradient_similarity(g, g[:1])


def test_millions_of_small_terms_add_up():
    """In float32, the cosine of gradients with two million entries is correct to 1e-6, even if a
    few entries are much larger than the rest."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=2_000_003) * np.where(rng.random(2_000_003) < 1e-5, 1e3, 1e-3)
    b = a * 0.1 + rng.normal(size=len(a)) * 1e-3
    exact = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    g, h = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    assert gradient_similarity(g, h).item() == pytest.approx(exact, abs=1e-6)


# --- eq. 3 ----------------------------------------------------------------------------------------
def test_similarities_equal_direct_autograd():
    """Similarities, their means and standard errors equal those of a direct computation, with one
    backward pass per task and example."""
    tasks, model = make_tasks(), Net()
    examples = [example(0), example(1, ["two"]), example(2), example(3)]
    similarity = task_similarity(model, tasks, examples)
    samples = np.full((4, 3, 3), np.nan)
    model.eval()
    for n, (image, labels) in enumerate(examples):
        gradients = {}
        for t, task in enumerate(tasks):
            if labels[task.name].isfinite().all():
                model.zero_grad()
                task.loss(model(image)[task.name], labels[task.name]).backward()
                grads = [p.grad.flatten() for p in model.backbone.parameters()
                         if p.grad is not None]
                gradients[t] = torch.cat(grads).double()
        for t in gradients:
            for u in gradients:
                cosine = F.cosine_similarity(gradients[t], gradients[u], dim=0)
                samples[n, t, u] = cosine.item()
    np.testing.assert_allclose(similarity.samples, samples, atol=1e-5)
    error = np.nanstd(samples, 0, ddof=1) / np.isfinite(samples).sum(0) ** 0.5
    np.testing.assert_allclose(similarity.mean, np.nanmean(samples, 0), atol=1e-5)
    np.testing.assert_allclose(similarity.error, error, atol=1e-5)


def test_a_pair_needs_an_example_with_both_labels():
    """One such example has no standard error. If no example is labelled for both tasks of a pair,
    that is an error."""
    assert np.isnan(task_similarity(Net(), make_tasks(), [example(0)]).error).all()
    with pytest.raises(ValueError, match="no example has valid labels for both one and two; use"):
        task_similarity(Net(), make_tasks(), [example(1, without=["two"])])


def test_a_gradient_that_is_not_finite_is_an_error():
    """NaN weights in a decoder raise an error. They are not mistaken for missing labels."""
    model = Net()
    nn.init.constant_(model.decoders["two"].head.weight, torch.nan)
    with pytest.raises(ValueError, match="gradient of one or two is not finite; lower the learn"):
        task_similarity(model, make_tasks(), [example(0)])


def test_similarities_are_printed():
    """format_similarity aligns its columns, also for a task with a long name."""
    mean, error = np.full((2, 2), -0.01234), np.array([[0.0, 0.0121], [0.0121, np.nan]])
    similarity = Similarity(mean, error, np.empty(0))
    assert format_similarity(similarity, ["a", "a_longer_name"]) == (
        "                               a      a_longer_name\n"
        "a                              1  -0.0123 +- 0.0121\n"
        "a_longer_name  -0.0123 +- 0.0121                  1")


# --- decoders -------------------------------------------------------------------------------------
def plain_training(model, tasks, batches, lr):
    """Train the decoders as finetune_decoders does, but with torch's own scheduler, and recompute
    the maps for each batch."""
    model.eval()
    model.decoders.train()
    optimizer = torch.optim.AdamW(model.decoders.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, len(batches), power=1)
    for image, labels in load(batches):
        with torch.no_grad():
            maps = model.backbone(image)
        losses = [task.weight * task.loss(model.decoders[task.name](maps, image.shape[2:]),
                                          labels[task.name]) for task in tasks]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        scheduler.step()


def test_decoders_equal_a_plain_training_loop():
    """The decoders are trained with AdamW, weighted losses and a learning rate that falls to 0;
    the backbone does not change."""
    model, tasks = Net(), make_tasks()
    # AdamW's steps hardly depend on the scale of the loss, so only a weight of 0 shows.
    tasks[1].weight = 0.0
    expected = copy.deepcopy(model)
    batches = [[0, 3], [4, 1], [2, 0], [1, 3]] * 5
    plain_training(expected, tasks, batches, lr=0.1)
    finetune_decoders(model, tasks, load([[0, 1], [2, 3], [4]]), iter(batches), lr=0.1, steps=20)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_maps_are_computed_once_in_the_type_of_amp():
    """Each image passes through the backbone once. With amp=torch.bfloat16, this happens in
    bfloat16."""
    model = Net()
    images, dtypes = [], set()
    model.backbone.register_forward_pre_hook(lambda _, x: images.append(len(x[0])))
    model.decoders["one"].register_forward_pre_hook(lambda _, x: dtypes.add(x[0][0].dtype))
    batches = [[0, 2], [1, 0]] * 4
    finetune_decoders(model, make_tasks(), load([[0, 1], [2]]), batches, 0.01, torch.bfloat16)
    assert images == [2, 1] and dtypes == {torch.bfloat16}


def test_fresh_decoders_depend_on_the_seed_and_the_name():
    """The weights of a fresh decoder depend on the seed and on the task's name, but not on the
    other tasks: here, the task comes second."""
    model = Net(["three", "one"])
    decoder = model.decoders["one"]
    nn.init.constant_(decoder.norm.bias, 7)
    fresh_decoders(model, 5)
    assert decoder.norm.bias.count_nonzero() == 0
    torch.manual_seed(2331783222)       # zlib.crc32(b"5 one"), for seed 5 and task "one"
    assert torch.equal(nn.Conv2d(16, 1, 1).weight, decoder.head.weight)


@pytest.mark.parametrize("failing", [False, True])
def test_modes_and_flags_are_restored(failing):
    """finetune_decoders and task_similarity restore train/eval mode and requires_grad, even after
    an error, and leave no gradient behind."""
    model, tasks = Net(), make_tasks()
    model.backbone.first.requires_grad_(False).eval()
    model.decoders["two"].head.requires_grad_(False)

    def state():
        modes = [module.training for module in model.modules()]
        return modes, [(p.requires_grad, p.grad is None) for p in model.parameters()]

    def fail(*args):
        raise RuntimeError("a mistake in the user's own code")
    before = state()
    if failing:
        tasks[1].loss = fail
    for call in (lambda: finetune_decoders(model, tasks, load([[0, 1]]), [[0, 1]], lr=1e-3),
                 lambda: task_similarity(model, tasks, [example(0)])):
        with pytest.raises(RuntimeError, match="mistake") if failing else nullcontext():
            call()
        assert state() == before
