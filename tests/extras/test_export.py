"""Tests of extras/export.py: an exported backbone can be loaded."""

import pytest
import torch

import train
from extras import export
from weights import load_weights
from swin import build_swin

FLAGS = ("--tasks semseg,depth,normals --size 32 --train-rooms 4 --val-rooms 2 --epochs 1 "
         "--batch-size 2 --device cpu --method").split()


def test_load_weights_reads_an_exported_backbone(tmp_path, capsys):
    """The exported weights are those of the run, rounded to fp16. No file is overwritten."""
    train.main([*FLAGS, "full", "--out", str(tmp_path / "full")])
    checkpoint, path = tmp_path / "full/best.pt", tmp_path / "backbone.pth"
    flags = ["--checkpoint", str(checkpoint), "--export-backbone", str(path)]
    export.main(flags)
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    backbone = build_swin("mini")
    load_weights(backbone, str(path), "mini")
    trained = torch.load(checkpoint, weights_only=True)["model"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, trained[f"backbone.{name}"].half().float())
    with pytest.raises(SystemExit, match="error: .*File exists"):
        export.main(flags)


def test_a_frozen_backbone_is_not_exported(tmp_path):
    """Exporting the backbone of a run is an error unless its --method was full."""
    train.main([*FLAGS, "decoders", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--method decoders and does not hold the weights"):
        export.export_backbone(tmp_path / "run/best.pt", tmp_path / "backbone.pth")
    assert not (tmp_path / "backbone.pth").exists()
