"""Tests of model.py: a network with a tree predicts the same as separate networks, and the methods
tglora, full and decoders train the intended parameters."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model import build
from tglora import TGLoRALinear

TASKS = [SimpleNamespace(name=n, outputs=o) for n, o in (("a", 4), ("b", 1), ("c", 3))]
# Some stages list their groups in a shuffled order, so that a wrong index is noticed.
TREE = [[(0, 1, 2)], [(2,), (0, 1)], [(0, 1), (2,)], [(1,), (2,), (0,)]]
SHARED = [[(0, 1, 2)]] * 4


def settings(**changes):
    """The settings of a run that `build` reads, with `changes` applied."""
    config = Namespace(seed=0, backbone="mini", weights="none", drop_path=0.0, method="tglora",
                       layers="attn+mlp", rank=9, last_rank=None, dropout=0.0, fused=(3, 4, 5, 6),
                       groups=(1, 2, 2, 3), tasks=["a", "b", "c"])
    vars(config).update(changes)
    return config


def network(tree=TREE, tasks=TASKS, **changes):
    """A network in eval mode whose adapters are not zero."""
    model = build(settings(**changes), tasks, tree)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.eval()


# --- the tree -------------------------------------------------------------------------------------
def test_the_tree_equals_one_network_per_task():
    """For each task, a network with only that task and the adapters on its path predicts the same
    as the network with the tree."""
    model = network()
    x = torch.randn(2, 3, 56, 84)
    with torch.no_grad():
        together = model(x)
    assert list(together) == ["a", "b", "c"]
    for t, task in enumerate(TASKS):
        single = network([[(0,)]] * 4, [task], rank=1)
        for stage, own_stage, partition in zip(model.backbone.layers, single.backbone.layers, TREE):
            group = next(g for g, tasks in enumerate(partition) if t in tasks)
            for name, layer in own_stage.named_modules():
                if isinstance(layer, TGLoRALinear):
                    A, B = stage.get_submodule(name).adapter(group)
                    layer.lora_A.data, layer.lora_B.data = A, B.T
        single.decoders[task.name].load_state_dict(model.decoders[task.name].state_dict())
        with torch.no_grad():
            prediction = single(x)[task.name]
        assert prediction.shape == (2, task.outputs, 56, 84)
        torch.testing.assert_close(prediction, together[task.name], rtol=1e-4, atol=1e-5)


def test_trees_that_do_not_fit_are_refused():
    """A wrong number of stages and a missing task are errors (more: test_grouping.py)."""
    with pytest.raises(ValueError, match="the tree has 3 stages, but the backbone has 4"):
        build(settings(method="full"), TASKS, TREE[1:])
    with pytest.raises(ValueError, match="each of the 3 tasks exactly once"):
        build(settings(), TASKS, [[(0, 1)]] * 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_network_compiles_without_a_graph_break():
    """torch.compile turns the network into a single graph with the same predictions."""
    model = network()
    x = torch.randn(2, 3, 56, 84)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(x)
        for name, prediction in compiled(x).items():
            torch.testing.assert_close(prediction, expected[name])


# --- methods --------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, layers, adapted, others", [
    ("tglora", "attn", {"attn.qkv", "attn.proj"}, ()),
    ("tglora", "attn+mlp", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}, ()),
    ("tglora", "attn+mlp+others", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
     ("norm", "patch_embed.", "downsample.", "bias_table")),
    ("full", "attn+mlp", set(), ("",)), ("decoders", "attn+mlp", set(), ())])
def test_only_intended_parameters_are_trained(method, layers, adapted, others):
    """Only the layers `adapted` get adapters. Only the decoders, the adapters and the parameters
    whose names contain one of `others` are trained."""
    model = network(SHARED, method=method, layers=layers)
    wrapped = set()
    for name, module in model.backbone.named_modules():
        if isinstance(module, TGLoRALinear):
            wrapped.add(name.split(".", 4)[-1])
    assert wrapped == adapted
    for name, p in model.named_parameters():
        expected = (name.startswith("decoders.") or "lora_" in name
                    or any(part in name for part in others))
        assert p.requires_grad == expected, name


def test_another_seed_gives_other_weights():
    """The initial weights depend on --seed. (test_reference_run.py builds the same network twice.)
    """
    first, other = (build(settings(seed=seed), TASKS, TREE) for seed in (3, 4))
    assert not torch.equal(first.decoders["a"].fuse[0].weight, other.decoders["a"].fuse[0].weight)


def test_pretrained_weights_are_loaded_into_their_backbone(capsys):
    """rooms_mini.pth is loaded into mini. For tiny, an error says that the file only fits mini."""
    random, loaded = (build(settings(weights=w, method="full"), TASKS, SHARED).backbone.state_dict()
                      for w in ("none", "rooms_mini.pth"))
    assert "117 of 117 tensors" in capsys.readouterr().out
    assert not torch.equal(random["patch_embed.proj.weight"], loaded["patch_embed.proj.weight"])
    with pytest.raises(ValueError, match="rooms_mini.pth only fits --backbone mini.* imagenet"):
        build(settings(weights="rooms_mini.pth", backbone="tiny"), TASKS, SHARED)
