"""decoders.py: the papers' number of parameters, and the decoder written as plain equations."""

import pytest
import torch
import torch.nn.functional as F

from decoders import FUSED, Decoder


@pytest.mark.parametrize("outputs, count", [((21, 7, 1, 3), 1_946_624), ((40, 1, 3), 1_481_588)])
def test_parameters_are_the_papers(outputs, count):
    """The counts agree for the tasks of PASCAL-Context and of NYUD on Swin-Tiny."""
    parameters = 0
    for n in outputs:
        decoder = Decoder((192, 384, 768, 768), n)
        parameters += sum(p.numel() for p in decoder.parameters())
    assert parameters == count and FUSED == (18, 36, 72, 144)


def test_it_is_projection_fusion_and_head():
    """A decoder equals its equations, with matrix products in place of 1x1 convolutions."""
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
