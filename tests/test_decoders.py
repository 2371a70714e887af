"""Tests of decoders.py: parameter counts agree with the papers, and the output equals that of plain
matrix products."""

import pytest
import torch
import torch.nn.functional as F

from decoders import FUSED, Decoder


@pytest.mark.parametrize("outputs, count", [((21, 7, 1, 3), 1_946_624), ((40, 1, 3), 1_481_588)])
def test_parameters_are_the_papers(outputs, count):
    """On Swin-Tiny, the decoders of PASCAL-Context's four tasks have 1,946,624 parameters in total
    (1.94 million in the papers), and those of NYUD's three tasks have 1,481,588 (1.48 million)."""
    parameters = 0
    for n in outputs:
        decoder = Decoder((192, 384, 768, 768), n)
        parameters += sum(p.numel() for p in decoder.parameters())
    assert parameters == count and FUSED == (18, 36, 72, 144)


def test_a_decoder_is_projection_fusion_and_head():
    """A decoder gives the same result as its steps written out, with matrix products in place of
    1x1 convolutions."""
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
