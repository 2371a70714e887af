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


def test_random_start():
    """In a new network, weights of linear layers and bias tables have a standard deviation of 0.02,
    biases are 0, and there is no drop path."""
    torch.manual_seed(0)
    block = build_swin("mini").layers[3].blocks[1]
    for weight in (block.attn.qkv.weight, block.mlp.fc2.weight,
                   block.attn.relative_position_bias_table):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attn.qkv.bias.any() and block.drop_path.p == 0
