"""model.py: the folded tree equals separate networks; the paper's parameters and MACs, exactly."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval
import train
from model import MultiTaskNet, ledger
from swin import build_swin

TREE = [[(0, 1, 2)], [(0, 1), (2,)], [(0, 1), (2,)], [(0,), (1,), (2,)]]
TASKS = [SimpleNamespace(name=n, outputs=o) for n, o in (("a", 4), ("b", 1), ("c", 3))]


def network(tree=TREE, tasks=TASKS, rank=9, layers="attn+mlp"):
    """A small network whose adapters are not zero."""
    torch.manual_seed(0)
    model = MultiTaskNet(build_swin("mini", embed_dim=16), tasks, tree)
    model.adapt(layers, [rank] * 4, dropout=0.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_the_tree_equals_one_network_a_task():
    """Each task alone, with the adapters of its path through the tree, predicts the same."""
    model, x = network(), torch.randn(2, 3, 56, 84)
    together = model(x)
    for task in TASKS:
        alone = network([[(0,)]] * 4, [task], rank=1)
        for s, stage in enumerate(alone.backbone.layers):
            group = model.group_of[task.name][s]
            for name, module in stage.named_modules():
                if hasattr(module, "lora_A"):
                    path = model.backbone.layers[s].get_submodule(name)
                    module.lora_A[0].data = path.lora_A[group].data
                    module.lora_B[0].data = path.lora_B[group].data
        alone.decoders[task.name].load_state_dict(model.decoders[task.name].state_dict())
        torch.testing.assert_close(alone(x)[task.name], together[task.name], rtol=1e-4, atol=1e-5)


def test_a_task_reaches_only_the_adapters_on_its_path():
    """The loss of task c trains no adapter of a group without c, and no frozen weight."""
    model = network()
    model(torch.randn(1, 3, 56, 56))["c"].square().mean().backward()
    for name, p in model.named_parameters():
        touched = p.grad is not None and p.grad.abs().max() > 0
        if "lora_" in name:
            stage, group = int(name.split(".")[2]), int(name.split(".")[-1])
            assert touched == (2 in TREE[stage][group]), name
        else:
            assert touched == name.startswith("decoders.c."), name


@pytest.mark.parametrize("layers, other", [("attn", False), ("attn+mlp+others", True)])
def test_only_intended_parameters_are_trained(layers, other):
    """attn adapts two linear layers a block; others unfreezes norms, patches, mergings, tables."""
    model = network(layers=layers)
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    adapted = {n.split(".lora_")[0].split(".", 4)[-1] for n in trained if "lora_" in n}
    assert adapted == ({"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} if other else
                       {"attn.qkv", "attn.proj"})
    rest = {n for n in trained if "lora_" not in n}
    expected = {n for n, _ in model.backbone.named_parameters() if "lora_" not in n and any(
        part in n for part in ("norm", "patch_embed", "downsample", "bias_table"))}
    assert rest == (expected if other else set())


def costs(*flags):
    return eval.cost(train.parse_arguments(list(flags)))


@pytest.mark.parametrize("layers, trained", [
    ("attn+mlp", 5_932_916), ("attn+mlp+others", 7_532_462), ("attn", 3_150_836)])
def test_nyud_parameters_equal_the_paper(layers, trained):
    """Tables 2 and 6, and the same for everything shared (MTL-LoRA)."""
    for groups in ("1,1,2,3", "1,1,1,1"):
        found = costs("--dataset", "nyud", "--layers", layers, "--groups", groups)
        assert found["trainable"] == trained
        assert found["decoders"] == 1_481_588
        assert found["others"] == (1_599_546 if "others" in layers else 0)


@pytest.mark.parametrize("groups, tasks, gmacs", [
    ("1,1,2,3", "semseg,normals,depth", 34.65), ("1,1,1,1", "semseg,normals,depth", 20.53),
    ("1,1,1,1", "semseg", 18.56)])
def test_nyud_macs_equal_table_3(groups, tasks, gmacs):
    """Linear and convolution layers without adapters, within 0.3 %."""
    found = costs("--dataset", "nyud", "--groups", groups, "--tasks", tasks, "--rank", "63")
    assert found["macs_linear_conv"] / 1e9 == pytest.approx(gmacs, rel=0.003)


def test_all_macs_equal_pytorchs_counter():
    """The true cost agrees with torch's FLOP counter (2 FLOPs a MAC; it leaves out biases)."""
    model, x = network(), torch.randn(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    found = eval.count_macs(model, (112, 112))["macs_all"]
    assert found == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert found > counter.get_total_flops() / 2


def test_ledger_sums_up():
    """Adapters, decoders and others are all that is trained."""
    model = network(layers="attn+mlp+others")
    counts = ledger(model)
    assert counts["trainable"] == counts["adapters"] + counts["decoders"] + counts["others"]
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_tree_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="3 stages, but the backbone has 4"):
        MultiTaskNet(build_swin("mini"), TASKS, TREE[1:])
