"""Tests of extras/export.py: a merged graph runs without this repository, and an exported backbone
can be loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from extras import export
from weights import load_weights
from swin import build_swin

FLAGS = ("--tasks semseg,depth,normals --size 32 --train-rooms 4 --val-rooms 2 --epochs 1 "
         "--batch-size 2 --device cpu").split()


def trained(folder: Path, *flags: str) -> Path:
    """Train a tiny network with FLAGS and these flags. Returns the path of its best.pt."""
    train.main([*FLAGS, *flags, "--out", str(folder)])
    return folder / "best.pt"


@pytest.mark.slow
def test_a_merged_network_runs_without_this_repository(tmp_path, capsys):
    """The graph runs in another folder, on a batch of one image and on a batch of three.

    Its predictions for the three images are compared with those of the run's network.
    """
    checkpoint = trained(tmp_path / "run", "--groups", "1,1,1,3")
    path = tmp_path / "merged.pt2"
    export.main(["--checkpoint", str(checkpoint), "--merge", str(path)])
    assert "32x32; its predictions differ from the unmerged ones" in capsys.readouterr().out
    code = (
        "import sys, torch\n"
        f"network = torch.export.load({str(path)!r}).module()\n"
        "image = torch.linspace(-1, 1, 3 * 3 * 32 * 32).view(3, 3, 32, 32)\n"
        "for B in (1, 3):\n"
        "    predictions = network(image[:B])\n"
        "    assert not predictions['depth'].requires_grad\n"
        "assert 'tglora' not in sys.modules\n"
        f"torch.save(predictions, {str(tmp_path / 'predictions.pt')!r})\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    model, tasks, _ = export.load_run(checkpoint)
    image = torch.linspace(-1, 1, 3 * 3 * 32 * 32).view(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(image)
    predictions = torch.load(tmp_path / "predictions.pt")
    assert predictions.keys() == {task.name for task in tasks}
    for name in expected:
        torch.testing.assert_close(predictions[name], expected[name], rtol=1e-3, atol=1e-4)


class Doubling(torch.nn.Module):
    """A network that predicts `factor` times its input."""

    factor = 2.0

    def forward(self, image):
        return {"depth": self.factor * image}


@pytest.mark.parametrize("factor", [2.001, float("nan")])
def test_a_wrong_merge_is_noticed_and_leaves_no_file(tmp_path, monkeypatch, factor):
    """If merging changes the predictions or makes them NaN, the export fails and leaves no file."""
    def wrong(model):
        model.factor = factor
        return model

    monkeypatch.setattr(export, "merge", wrong)
    with pytest.raises(ValueError, match="the merged network's predictions differ from"):
        export.export_merged(Doubling(), (8, 8), tmp_path / "merged.pt2")
    assert not list(tmp_path.iterdir())


def test_the_difference_is_the_worst_task_relative_to_its_largest_value():
    """An error of 0.5 in 10 is 5 %, and one of 0.2 in 2 is 10 %. The larger one, 10 %, counts."""
    expected = {"a": torch.tensor([10.0, -1.0]), "b": torch.tensor([1.0, -2.0])}
    predictions = {"a": torch.tensor([10.0, -0.5]), "b": torch.tensor([1.2, -2.0])}
    assert export.largest_difference(predictions, expected) == pytest.approx(0.1)


def test_a_backbone_is_exported_under_the_names_that_weights_reads(tmp_path):
    """`load_weights` reads an exported backbone: the run's weights, rounded to fp16."""
    checkpoint = trained(tmp_path / "full", "--method", "full")
    path = tmp_path / "backbone.pth"
    export.main(["--checkpoint", str(checkpoint), "--export-backbone", str(path)])
    model, _, config = export.load_run(checkpoint)
    copy = build_swin(config.backbone)
    load_weights(copy, str(path), config.backbone)
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(copy.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_frozen_backbone_is_not_exported(tmp_path):
    """Exporting the backbone of a run is an error unless its --method was full."""
    with pytest.raises(ValueError, match="--method tglora, which does not train the whole"):
        export.export_backbone(None, "tglora", tmp_path / "backbone.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export.export_merged, export.export_backbone])
def test_no_file_is_overwritten(tmp_path, write):
    """Exporting to a file that exists is an error, and the file keeps its content."""
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ValueError, match="file already exists; choose another name"):
        write(None, "full", path)
    assert path.read_text() == "precious"
