"""similarity.py against a direct computation, example by example."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grouping import build_tree
from model import tree_net
from similarity import finetune_decoders, gradient_similarity, task_similarity
from swin import build_swin
from tasks import make_tasks

NAMES = ["semseg", "depth", "normals"]


def example(seed, without=()):
    """One image with random labels; none valid for the tasks in `without`."""
    g = torch.Generator().manual_seed(seed)
    labels = {"semseg": torch.randint(4, (1, 28, 28), generator=g),
              "depth": torch.rand(1, 1, 28, 28, generator=g) + 1,
              "normals": F.normalize(torch.randn(1, 3, 28, 28, generator=g), dim=1)}
    for name in without:
        labels[name] = torch.full_like(labels[name], 255 if name == "semseg" else 0)
    return torch.randn(1, 3, 28, 28, generator=g), labels


def network(tasks, seed=0):
    torch.manual_seed(seed)
    everything = [tuple(range(len(tasks)))]
    return tree_net(build_swin("mini", embed_dim=16, drop_path=0.5), tasks, [everything] * 4)


@pytest.mark.parametrize("normalize", ["elementwise", "none"])
def test_equals_direct_autograd(normalize):
    """.backward() for each task and example, and eq. 2 written out in numpy."""
    tasks = make_tasks(NAMES, 4)
    model, examples = network(tasks), [example(s) for s in range(3)]
    sim = task_similarity(model, tasks, examples, normalize)
    expected = np.zeros((3, 3))
    model.eval()
    model.backbone.requires_grad_(True)
    for image, labels in examples:
        g = []
        for task in tasks:
            model.zero_grad()
            task.loss(model(image)[task.name], labels[task.name]).backward()
            g.append(np.concatenate([p.grad.double().numpy().ravel()
                                     for p in model.backbone.parameters()]))
        for t in range(3):
            for u in range(3):
                a, b = g[t], g[u]
                if normalize == "elementwise":
                    scale = np.abs(a) + np.abs(b)
                    a, b = (np.divide(v, scale, out=np.zeros_like(v), where=scale > 0)
                            for v in (a, b))
                expected[t, u] += a @ b / np.linalg.norm(a) / np.linalg.norm(b) / 3
    np.testing.assert_allclose(sim, expected, atol=1e-5)
    np.testing.assert_allclose(np.diag(sim), 1, atol=1e-6)
    assert np.array_equal(sim, sim.T)


def test_normalisation_is_elementwise_and_not_by_norm():
    """By norm it would do nothing; element by element one large weight no longer decides."""
    g, h = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([100.0, -1.0, 0.0])
    assert gradient_similarity(g, h, "none") > 0.99
    assert gradient_similarity(g, h).abs() < 1e-6
    assert gradient_similarity(g, g) == pytest.approx(1)
    with pytest.raises(ValueError, match="expected elementwise or none"):
        gradient_similarity(g, h, "l2")


def test_the_same_seed_gives_the_same_matrix():
    """Decoders' training included; drop path is off all the while."""
    tasks, found = make_tasks(NAMES, 4), []
    for other_seed in range(2):
        model = network(tasks)
        torch.manual_seed(other_seed)  # nothing random may be left
        finetune_decoders(model, tasks, [example(s) for s in range(4)], lr=1e-3)
        found.append(task_similarity(model, tasks, [example(s) for s in range(3)]))
    assert np.array_equal(*found)
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_decoders_learn_and_the_backbone_stays():
    """Fine-tuning changes decoders only, and lowers the loss."""
    tasks = make_tasks(NAMES, 4)
    model = network(tasks)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    image, labels = example(0)

    def loss():
        return sum(t.weight * t.loss(model.train()(image)[t.name], labels[t.name]) for t in tasks)
    model.backbone.eval()
    first = loss().item()
    finetune_decoders(model, tasks, [(image, labels)] * 10, lr=1e-2)
    assert loss().item() < first
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_a_copy_of_a_task_is_its_nearest_and_shares_its_group():
    """depth, twice, among three tasks: highest similarity, one group."""
    tasks = make_tasks(NAMES, 4)
    twin = make_tasks(["depth"], 4)[0]
    twin.name = "twin"
    tasks.append(twin)
    model = network(tasks)
    model.decoders["twin"].load_state_dict(model.decoders["depth"].state_dict())
    examples = []
    for s in range(2):
        image, labels = example(s)
        examples.append((image, {**labels, "twin": labels["depth"]}))
    sim = task_similarity(model, tasks, examples)
    off_diagonal = sim - 2 * np.eye(4)
    assert off_diagonal.argmax() in (1 * 4 + 3, 3 * 4 + 1)
    assert (1, 3) in build_tree(sim, (1, 1, 3, 4))[2]


def test_missing_labels_are_left_out_of_their_pairs():
    """An example without depth counts for the other pair; a pair with no example is an error."""
    tasks = make_tasks(NAMES, 4)
    model = network(tasks)
    full, partial = example(0), example(1, without=["depth"])
    alone, both = (task_similarity(model, tasks, e) for e in ([full], [full, partial]))
    assert both[0, 1] == alone[0, 1] and both[0, 2] != alone[0, 2]
    with pytest.raises(ValueError, match="both semseg and depth"):
        task_similarity(model, tasks, [partial])
