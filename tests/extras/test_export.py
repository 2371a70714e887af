"""Tests of extras/export.py: an exported backbone can be loaded."""

import pytest
import torch

import train
from extras import export
from weights import load_weights
from swin import build_swin

FLAGS = ("--method full --tasks semseg,depth,normals --size 32 --train-rooms 4 --val-rooms 2 "
         "--epochs 1 --batch-size 2 --device cpu").split()


def test_load_weights_reads_an_exported_backbone(tmp_path, capsys):
    """The exported weights are those of the run, rounded to fp16. No file is overwritten.

    Exporting the backbone of a run is an error unless its --method was full.
    """
    train.main([*FLAGS, "--out", str(tmp_path / "full")])
    checkpoint, path = tmp_path / "full/best.pt", tmp_path / "backbone.pth"
    flags = ["--checkpoint", str(checkpoint), "--export-backbone", str(path)]
    export.main(flags)
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    backbone = build_swin("mini")
    load_weights(backbone, str(path), "mini")
    state = torch.load(checkpoint, weights_only=True)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state["model"][f"backbone.{name}"].half().float())
    with pytest.raises(SystemExit, match="error: .*File exists"):
        export.main(flags)
    state["config"]["method"] = "decoders"
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="--method decoders and does not hold the weights"):
        export.export_backbone(checkpoint, tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()
