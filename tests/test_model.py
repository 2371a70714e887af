"""model.py: the folded tree equals separate networks; the paper's parameters and MACs, exactly."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import costs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
import train
from cost import ledger
from grouping import routing
from model import mtlora_net, tglora, tree_net
from swin import build_swin
from tglora import merge

TREE = [[(0, 1, 2)], [(0, 1), (2,)], [(0, 1), (2,)], [(0,), (1,), (2,)]]
TASKS = [SimpleNamespace(name=n, outputs=o) for n, o in (("a", 4), ("b", 1), ("c", 3))]


def network(tree=TREE, tasks=TASKS, rank=9, layers="attn+mlp"):
    """A small network whose adapters are not zero."""
    torch.manual_seed(0)
    config = SimpleNamespace(layers=layers, rank=rank, last_rank=None, groups=(1,) * 4, dropout=0.0,
                             without=[], fused=(18, 36, 72, 144))
    model = tglora(build_swin("mini", embed_dim=16), tasks, tree, config)
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


def test_the_order_of_groups_in_a_tree_does_not_matter():
    """As many groups as before, in another order: each task still follows its own."""
    torch.manual_seed(1)
    model, x = network([[(0,), (1,), (2,)]] * 4), torch.randn(1, 3, 56, 56)
    before = model(x)
    for i, stage in enumerate(model.backbone.layers):
        if i % 2:  # the stages' adapters are reordered as their groups are
            for module in stage.modules():
                if hasattr(module, "lora_A"):
                    for matrices in (module.lora_A, module.lora_B):
                        values = [matrices[g].data.clone() for g in (2, 0, 1)]
                        for g, value in enumerate(values):
                            matrices[g].data = value
    order = [[(0,), (1,), (2,)], [(2,), (0,), (1,)]] * 2
    model.parents, group_of = routing(order)
    model.group_of = dict(zip(model.group_of, group_of))
    for name, pred in model(x).items():
        torch.testing.assert_close(pred, before[name])


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


PASCAL, NYUD = "semseg,human_parts,sal,normals", "semseg,normals,depth"
# Tables 1, 2, 5 and 6: dataset, --rank, --layers, trained parameters; the rank of the single-task
# runs, one a task, that together have as many adapters, and their trained parameters.
ROWS = [
    ("pascal", 64, "attn+mlp", 5_288_960, 16, 5_288_960),
    ("pascal", 64, "attn+mlp+others", 6_888_506, 16, 11_687_144),
    ("pascal", 64, "attn", 3_200_000, 16, 3_200_000),
    ("pascal", 32, "attn+mlp", 3_814_400, 8, 3_814_400),
    ("pascal", 32, "attn+mlp+others", 5_413_946, 8, 10_212_584),
    ("pascal", 32, "attn", 2_647_040, 8, 2_647_040),
    ("pascal", 16, "attn+mlp", 3_077_120, 4, 3_077_120),
    ("pascal", 16, "attn+mlp+others", 4_676_666, 4, 9_475_304),
    ("pascal", 16, "attn", 2_370_560, 4, 2_370_560),
    ("nyud", 63, "attn+mlp", 5_932_916, 21, 5_932_916),
    ("nyud", 63, "attn+mlp+others", 7_532_462, 21, 10_731_554),
    ("nyud", 63, "attn", 3_150_836, 21, 3_150_836)]


@pytest.mark.parametrize("dataset, rank, layers, trained, single_rank, single", ROWS)
def test_parameters_equal_the_papers_rows(dataset, rank, layers, trained, single_rank, single):
    """TGLoRA and MTL-LoRA (everything shared) are equal; single-task LoRA, summed over its runs."""
    flags = ["--dataset", dataset, "--layers", layers]
    for groups in ([], ["--groups", "1,1,1,1"]):
        found = costs(*flags, "--rank", str(rank), *groups)
        assert found["trainable"] == trained
        assert found["decoders"] == {"pascal": 1_946_624, "nyud": 1_481_588}[dataset]
        assert found["others"] == (1_599_546 if "others" in layers else 0)
    tasks = {"pascal": PASCAL, "nyud": NYUD}[dataset].split(",")
    assert single == sum(costs(*flags, "--rank", str(single_rank), "--tasks", task)["trainable"]
                         for task in tasks)


def test_full_and_decoder_only_rows():
    """Decoders only: 1.94 M and 1.48 M, as printed. Full: the sums, which the paper's are not."""
    assert costs("--dataset", "pascal", "--method", "decoders")["trainable"] == 1_946_624
    assert costs("--dataset", "nyud", "--method", "decoders")["trainable"] == 1_481_588
    full = costs("--dataset", "pascal", "--method", "full")
    assert full["trainable"] == full["total"] == 27_517_818 + 1_946_624


@pytest.mark.parametrize("dataset, groups, tasks, gmacs", [
    ("nyud", "1,1,2,3", NYUD, 34.65), ("nyud", "1,1,1,1", NYUD, 20.53),
    ("nyud", "1,1,1,1", "semseg", 18.56), ("pascal", "1,1,1,1", "semseg", 18.49),
    ("pascal", "1,1,1,1", PASCAL, 21.47), ("pascal", "1,2,3,4", PASCAL, 49.95),
    ("pascal", "1,1,2,4", PASCAL, 38.37), ("pascal", "1,2,2,4", PASCAL, 41.38)])
def test_macs_equal_table_3_and_section_9(dataset, groups, tasks, gmacs):
    """Linear and convolution layers without adapters, within 0.3 %."""
    found = costs("--dataset", dataset, "--groups", groups, "--tasks", tasks)
    assert found["macs_linear_conv"] / 1e9 == pytest.approx(gmacs, rel=0.003)


def test_the_papers_group_counts_are_the_default():
    """Section 4.4: task-specific last, one group less a stage before, first stage shared."""
    assert train.parse_arguments(["--dataset", "pascal"]).groups == (1, 2, 3, 4)
    assert train.parse_arguments(["--dataset", "nyud"]).groups == (1, 1, 2, 3)
    assert train.parse_arguments(["--tasks", "depth"]).groups == (1, 1, 1, 1)
    assert train.parse_arguments(["--tasks", "a,b,c,d,e"]).groups == (1, 3, 4, 5)
    assert train.parse_arguments(["--method", "full"]).groups == (1, 1, 1, 1)
    assert train.parse_arguments([]).groups == (1, 2, 2, 5)  # the demonstration's own choice


def test_a_tree_from_a_file_has_its_cost(tmp_path):
    """Table 4's swapped groups, by name, in whatever order the tasks are."""
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": [
        [["depth", "semseg", "normals"]], [["depth", "semseg", "normals"]],
        [["normals"], ["depth", "semseg"]], [["normals"], ["depth"], ["semseg"]]]}))
    found = costs("--dataset", "nyud", "--tree", str(path))
    assert found == costs("--dataset", "nyud")


def mtlora_network():
    config = SimpleNamespace(method="mtlora", rank=48, dropout=0.0, without=[],
                             fused=(18, 36, 72, 144))
    return mtlora_net(build_swin("mini", embed_dim=16), TASKS, None, config).eval()


@pytest.mark.parametrize("model", [lambda: network(), lambda: network(rank=48), mtlora_network,
                                   lambda: merge(network(rank=48))])
def test_all_macs_equal_pytorchs_counter(model):
    """The true cost agrees with torch's FLOP counter (2 FLOPs a MAC; it leaves out biases), also
    where ranks differ much."""
    model, x = model(), torch.randn(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    found = cost.count_macs(model, (112, 112))["macs_all"]
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
        tree_net(build_swin("mini"), TASKS, TREE[1:])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_network_compiles_without_a_graph_break():
    """torch.compile's tracing alone (no C++ compiler): one graph, and the same predictions."""
    model, x = network(), torch.randn(2, 3, 56, 84)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for name, pred in compiled(x).items():
        torch.testing.assert_close(pred, model(x)[name])
