"""Tests of swin.py: its maps equal those of torchvision's Swin Transformer, an independent
implementation."""

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from swin import PRESETS, build_swin
from weights import official_names

SMALL = dict(embed_dim=16, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8))


def networks():
    """torchvision's Swin Transformer and ours, with equal weights. The weights are so large that
    mistakes show in the maps."""
    torch.manual_seed(0)
    theirs = TorchvisionSwin([4, 4], window_size=[7, 7], **SMALL).eval()
    for p in theirs.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1)
        else:
            nn.init.normal_(p, mean=1.0, std=0.2)
    ours = build_swin("tiny", **SMALL).eval()
    ours.load_state_dict(official_names(theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize("size, trained", [
    ((224, 224), True), ((225, 337), False), ((50, 121), True), ((50, 121), False)])
def test_maps_equal_torchvisions(size, trained):
    """Our maps equal torchvision's, even for padded windows and odd sizes. This holds for trained
    and for frozen bias tables, which use different attention code."""
    theirs, ours = networks()
    ours.requires_grad_(trained)
    image = torch.randn(2, 3, *size)
    expected, x = [], image
    for i, layer in enumerate(theirs.features):
        x = layer(x)
        if i in (2, 4, 6, 7):           # the three mergings and the last stage
            expected.append(x)
    for ours_map, theirs_map in zip(ours(image), expected, strict=True):
        torch.testing.assert_close(ours_map, theirs_map, rtol=1e-3, atol=1e-4)


def test_the_presets_are_the_published_ones():
    """Widths, depths and heads are those of table 7 in Swin's paper; mini is ours."""
    published = {"tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
                 "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
                 "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
                 "mini": (32, (2, 2, 2, 2), (2, 4, 8, 16))}
    assert {name: tuple(values.values()) for name, values in PRESETS.items()} == published
    with pytest.raises(ValueError, match="unknown backbone 'huge'; expected one of mini, tiny"):
        build_swin("huge")


def test_swin_tiny_has_its_published_parameters():
    """Swin-Tiny has 27,517,818 parameters. OTHERS names 1,599,546 of them, and the rest are in
    layers that get adapters. Its maps have the expected shapes."""
    with torch.device("meta"):
        model = build_swin("tiny")
        maps = model(torch.zeros(2, 3, 128, 160))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (16, 20, 192), (8, 10, 384), (4, 5, 768), (4, 5, 768)]
    assert model.channels == [192, 384, 768, 768]
    assert sum(p.numel() for p in model.parameters()) == 27_517_818
    others = 0
    for name, p in model.named_parameters():
        layer = name.rpartition(".")[0]
        if any(part in name for part in model.OTHERS):
            others += p.numel()
        else:
            assert layer.endswith(model.ADAPTED["attn+mlp"]), name
    assert others == 1_599_546
    assert model.ADAPTED["attn"] == ("attn.qkv", "attn.proj")


def test_random_start():
    """In a new network, weights of linear layers and bias tables have a standard deviation of 0.02,
    and biases are 0."""
    torch.manual_seed(0)
    block = build_swin("mini").layers[3].blocks[1]
    for weight in (block.attn.qkv.weight, block.mlp.fc2.weight,
                   block.attn.relative_position_bias_table):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attn.qkv.bias.any()


def test_drop_path_grows_with_depth_and_drops_both_branches():
    """The blocks' drop path rates rise from 0 to the given rate in equal steps. A block that drops
    both its branches is the identity."""
    model = build_swin("mini", drop_path=0.7)
    blocks = [block for stage in model.layers for block in stage.blocks]
    rates = [block.drop_path.p for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert build_swin("mini").layers[3].blocks[1].drop_path.p == 0
    block, x = blocks[0].train(), torch.randn(1, 14, 14, 32)
    block.drop_path.p = 1.0
    assert torch.equal(block(x), x)
    block.drop_path.p = 0.5
    outputs = block(x.repeat(64, 1, 1, 1)).round(decimals=3)
    assert len(outputs.unique(dim=0)) == 4      # each image keeps or drops each of the branches
