"""Tests of decoders.py: the output equals that of plain matrix products. test_cost.py compares the
parameter counts with those of the papers."""

import torch
import torch.nn.functional as F

from decoders import Decoder


def test_a_decoder_is_projection_fusion_and_head():
    """A decoder gives the same result as its steps written out, with matrix products in place of
    1x1 convolutions. By default, the widths of its projections are those of HRNet-W18."""
    torch.manual_seed(0)
    decoder = Decoder((8, 16), 5, fused=(2, 4)).eval()
    maps = [torch.randn(2, 9, 7, 8), torch.randn(2, 4, 3, 16)]
    a, b = (x @ conv.weight.flatten(1).T for x, conv in zip(maps, decoder.fuse))
    b = F.interpolate(b.permute(0, 3, 1, 2), (9, 7), mode="bilinear").permute(0, 2, 3, 1)
    hidden, norm, _, last = decoder.head
    norm.running_mean.normal_()
    x = torch.cat([a, b], -1) @ hidden.weight.flatten(1).T + hidden.bias
    x = (x - norm.running_mean) / (norm.running_var + 1e-5) ** 0.5
    x = x.clamp(min=0) @ last.weight.flatten(1).T + last.bias
    expected = F.interpolate(x.permute(0, 3, 1, 2), (70, 61), mode="bilinear")
    assert hidden.out_channels == 4 * (2 + 4)
    torch.testing.assert_close(decoder(maps, (70, 61)), expected)
    default = Decoder((8, 8, 8, 8), 5)
    assert [conv.out_channels for conv in default.fuse] == [18, 36, 72, 144]
