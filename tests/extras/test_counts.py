"""Tests of what the methods and the backbone in extras/ cost: trained parameters and MACs."""

import pytest
from conftest import costs


@pytest.mark.parametrize("flags, trainable, gmacs", [
    ("--dataset pascal --method mtlora --rank 16", 4_953_146, None),
    ("--dataset pascal --method mtlora --rank 32", 6_083_642, None),
    ("--dataset pascal --method mtlora --rank 64", 8_344_634, 24.22),
    ("--dataset nyud --method mtlora --rank 64", 7_810_478, 22.60),
    ("--dataset pascal --method mtlora+ --rank 4", 2_573_114, None),
    ("--dataset pascal --method mtlora+ --rank 8", 3_148_346, 24.22),
    ("--dataset pascal --method mtlora+ --rank 16", 4_298_810, None),
    ("--dataset pascal --method bdta", 2_358_460, None),
    ("--dataset pascal --backbone pvt_v2_b0 --method full", 3_409_760 + 1_462_784, None)])
def test_trained_parameters_and_macs(flags, trainable, gmacs):
    """Trained parameters and GMACs are those in docs/RESULTS.md, which rounds them.

    GMACs are counted as in TGLoRA's table 3. The page has no row for PVT v2 b0. Its count is the
    backbone's parameters plus the decoders'.
    """
    count = costs(*flags.split())
    assert count["trainable"] == trainable
    if gmacs is not None:
        assert count["macs_linear_conv"] / 1e9 == pytest.approx(gmacs, abs=0.005)
