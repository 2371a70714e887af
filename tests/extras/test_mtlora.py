"""Tests of extras/mtlora.py: the layers compute eq. 2 of the MTLoRA paper, and the feature maps
equal those of its published code."""

import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import costs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from extras.mtlora import SharedProductLinear, adapt, routing
from model import build
from swin import build_swin
from tglora import TGLoRALinear, merge, run_stages

T = 3


def backbone(**options):
    """A small backbone in eval mode. Its adapters have no dropout, and none of them is zero."""
    torch.manual_seed(0)
    model = build_swin("mini", embed_dim=16)
    adapt(model, model.ADAPTED["attn+mlp"], T, rank=6, dropout=0.0, **options)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def task_maps(model, image):
    """For each task, the four maps that its decoder reads."""
    parents, group_of = routing(4, T)
    maps = run_stages(model.layers, model.patch_embed(image), parents)
    return [[m[group] for m, group in zip(maps, groups)] for groups in group_of]


# --- cost and maps of the published code ----------------------------------------------------------
@pytest.mark.parametrize("flags, trainable, gmacs", [
    ("--dataset pascal --method mtlora --rank 64", 8_344_634, 24.22),
    ("--dataset pascal --method mtlora+ --rank 8", 3_148_346, 24.22)])
def test_trained_parameters_and_macs(flags, trainable, gmacs):
    """Trained parameters and GMACs (as in TGLoRA's table 3) are those in docs/RESULTS.md."""
    count = costs(*flags.split())
    assert count["trainable"] == trainable
    assert count["macs_linear_conv"] / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_macs_of_a_layer_equal_pytorchs_counter():
    """Without the bias, a layer's MACs are half of the operations that PyTorch counts."""
    layer = SharedProductLinear(nn.Linear(16, 24), ranks=(6, 4, 4, 4))
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(4 * 2, 7, 16))
    frozen, low_rank = layer.macs(rows=2 * 7)
    assert frozen - 2 * 7 * 24 + low_rank == counter.get_total_flops() / 2


def test_maps_are_those_of_the_published_code():
    """Given the same weights, our maps and those of the published code agree up to rounding."""
    path = Path(os.environ.get("TGLORA_DATA", ""), "mtlora_published.pt")
    if not path.is_file():
        pytest.skip("needs feature maps of MTLoRA's published code: set the environment variable "
                    "TGLORA_DATA to a folder with mtlora_published.pt")
    published = torch.load(path, weights_only=True)
    names = ["semseg", "normals", "sal", "human_parts"]
    model = build_swin("tiny", embed_dim=24, depths=(2, 2, 2, 2))
    adapt(model, model.ADAPTED["attn+mlp"], 4, rank=8)
    weights = {}
    for name, value in published["weights"].items():
        name = name.replace(".linear.", ".")
        for letter in "AB":
            name = name.replace(f"lora_shared_{letter}", f"lora_{letter}.0")
            for group, task in enumerate(names, 1):
                name = name.replace(f"lora_tasks_{letter}.{task}", f"lora_{letter}.{group}")
        weights[name] = value.double()
    for name in model.state_dict():
        if "lora_" in name:                 # our layers hold the adapters of all groups together
            groups = [weights.pop(key) for key in sorted(weights) if key.startswith(f"{name}.")]
            weights[name] = torch.cat([m.T if "lora_B" in name else m for m in groups])
    model.double().load_state_dict(weights)
    model.eval().requires_grad_(False)
    x = model.patch_embed(published["input"].double())
    for i, (stage, maps) in enumerate(zip(model.layers, published["maps"], strict=True)):
        x, *own = stage(x).split(1)
        for name, ours in zip(names, own):
            expected = maps[name].double()
            error = (ours.flatten(0, -2)[::7] - expected).abs().max() / expected.abs().max()
            # With these random weights, rounding errors grow from stage to stage.
            assert error < (1e-5, 1e-5, 1e-4, 2e-3)[i], (i, name)


# --- equation 2 -----------------------------------------------------------------------------------
def low_rank(layer, x, g):
    """The output gamma B_g A_g x of group g's adapter, with gamma = 4."""
    A, B = layer.adapter(g)
    return 4 * x @ A.T @ B.T


def test_a_stage_is_plain_lora_up_to_its_last_projection():
    """The last block branches at `proj`. From there on, each linear layer computes
    W x_0 + b + gamma B_g A_g x_g for group g.

    x_0 are the features of the shared group 0, x_g those of group g.
    """
    stage, x = backbone().layers[0], torch.randn(2, 14, 14, 16)
    outputs, last = stage(x).chunk(4), stage.blocks[1]
    plain = build_swin("mini", embed_dim=16).eval().layers[0].blocks[1]
    plain.load_state_dict(last.state_dict(), strict=False)
    plain.attn.qkv = last.attn.qkv                          # shared by all groups
    x = stage.blocks[0](x)
    middle = []
    for g in range(4):
        proj = last.attn.proj
        A, B = proj.adapter(g)
        plain.attn.proj.weight.data = proj.weight + 4 * B @ A
        middle.append(x + plain.attend(plain.norm1(x)))
    fc1, fc2 = last.mlp.fc1, last.mlp.fc2
    assert fc1.ranks == (6, 4, 4, 4)
    shared = F.linear(plain.norm2(middle[0]), fc1.weight, fc1.bias)
    hidden = [F.gelu(shared + low_rank(fc1, plain.norm2(m), g)) for g, m in enumerate(middle)]
    shared = F.linear(hidden[0], fc2.weight, fc2.bias)
    for g in range(4):
        y = middle[g] + shared + low_rank(fc2, hidden[g], g)
        torch.testing.assert_close(outputs[g], stage.downsample(y), rtol=1e-4, atol=1e-5)


def test_merging_changes_no_map():
    """`merge` changes no map of MTLoRA+. (Layers with a shared product are not merged.)"""
    model, image = backbone(plus=True, task_rank=6), torch.randn(2, 3, 64, 64)
    before = task_maps(model, image)
    after = task_maps(merge(model), image)
    for own, merged in zip(before, after):
        for a, b in zip(own, merged):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_acts_as_in_the_published_code():
    """At `attn.proj`, all groups share one dropout mask. At `mlp.fc1`, only the shared adapter has
    dropout."""
    last = backbone(task_rank=6).layers[1].blocks[1].train()
    for layer in (last.attn.proj, last.mlp.fc1):
        layer.dropout = 0.5
        for p in (layer.lora_A, layer.lora_B):      # give all four groups the same adapter
            p.data = p.data[:6].repeat(4, 1)
    shared, *tasks = last.attn.proj(torch.ones(2, 49, 32)).chunk(4)
    assert all(torch.equal(y, shared) for y in tasks)
    assert not torch.equal(shared, last.attn.proj.eval()(torch.ones(2, 49, 32))[:2])
    shared, *tasks = last.mlp.fc1(torch.ones(8, 49, 32)).chunk(4)
    expected = last.mlp.fc1.eval()(torch.ones(8, 49, 32))[:2]
    assert not torch.equal(shared, expected)
    assert all(torch.equal(y, expected) for y in tasks)


def test_a_bfloat16_layer_keeps_its_type():
    """The adapters of a bfloat16 layer are float32, and the layer's output is bfloat16."""
    layer = SharedProductLinear(nn.Linear(16, 24).bfloat16(), ranks=(6, 4, 4, 4))
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.float32}
    assert layer(torch.randn(8, 7, 16).bfloat16()).dtype is torch.bfloat16


def test_drop_path_of_the_branching_block():
    """In the last stage, each group's output is the stage's input if attention and MLP are dropped.
    """
    stage, x = backbone().layers[3].train(), torch.randn(2, 7, 7, 128)
    for block in stage.blocks:
        block.drop_path.p = 1.0
    assert torch.equal(stage(x), x.repeat(4, 1, 1, 1))


@pytest.mark.parametrize("options, dropout", [({}, 0.05), (dict(dropout=0.2, plus=True), 0.2)])
def test_dropout_reaches_every_adapter(options, dropout):
    """Every adapted layer gets the given dropout rate, which is 0.05 by default."""
    model = build_swin("mini", embed_dim=16)
    adapt(model, model.ADAPTED["attn+mlp"], T, 6, **options)
    layers = [module for module in model.modules() if isinstance(module, TGLoRALinear)]
    assert {layer.dropout for layer in layers} == {dropout}
    assert len(layers) == 8 * 4 + 3 * ("plus" in options)


# --- training -------------------------------------------------------------------------------------
def test_a_task_trains_its_own_and_the_shared_adapters():
    """A task's loss reaches the shared adapters and its own, but not those of other tasks."""
    model = backbone()
    maps = task_maps(model, torch.randn(1, 3, 64, 64))[1]
    sum(m.square().mean() for m in maps).backward()
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = model.layers[1].blocks[1].get_submodule(name)
        reached = [bool(grad.any()) for grad in layer.lora_B.grad.split(layer.ranks)]
        assert reached == [True, False, True, False], name


def test_a_layer_without_adapters_shares_its_product():
    """A layer without adapters gives every group the shared product W x_0 + b, and is not trained.

    Weights named in `frozen` are not trained either.
    """
    model = backbone(without=["mlp.fc1"], frozen=["norm1"])
    fc1, x = model.layers[0].blocks[1].mlp.fc1, torch.randn(8, 5, 16)
    for y in fc1(x).chunk(4):
        torch.testing.assert_close(y, F.linear(x[:2], fc1.weight, fc1.bias))
    for name, p in model.named_parameters():
        if "fc1" in name or "norm1" in name:
            assert not p.requires_grad or p.numel() == 0, name


def test_names_that_do_not_occur_are_refused():
    """A name in `without` that matches nothing is an error, so typos are noticed."""
    with pytest.raises(ValueError, match="`without` names 'mlp.fc3'.* some of attn.qkv, attn.proj"):
        backbone(without=["mlp.fc3"])


def test_the_settings_of_a_run_arrive():
    """model.build gives MTLoRA on PVT v2 the run's ranks, dropout and drop path, and its decoders'
    channels."""
    config = Namespace(seed=0, method="mtlora", backbone="pvt_v2_b0", weights="none",
                       drop_path=0.3, rank=6, dropout=0.2, fused=(3, 4, 5, 6))
    tasks = [SimpleNamespace(name=name, outputs=1) for name in "abc"]
    model = build(config, tasks, tree=None)
    assert [conv.out_channels for conv in model.decoders["b"].fuse] == [3, 4, 5, 6]
    last = model.backbone.layers[3].blocks[-1]
    assert last.drop_path.p == 0.3
    assert last.attn.proj.dropout == last.attn.q.dropout == 0.2
    assert last.attn.proj.ranks == (6, 4, 4, 4) and last.attn.q.ranks == (6,)
