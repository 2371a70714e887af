"""Tests of whole runs of train.py and eval.py, with every --method except tglora, and with TGLoRA
on PVT v2."""

import json

import pytest
import torch

import eval
import train
from eval import load_run

SMALL = ["--tasks", "semseg,depth,normals", "--train-rooms", "4", "--val-rooms", "2", "--size",
         "32", "--epochs", "2", "--batch-size", "4", "--eval-every", "2", "--device", "cpu"]


def assert_resumes_and_evaluates(flags, out, monkeypatch, capsys):
    """Stop a run after its first epoch, resume it, and compare it with a run that was not stopped.

    Metrics and weights must be equal, and eval.py must give the same results. Returns the metrics.
    """
    metrics = train.main([*SMALL, *flags, "--out", str(out / "whole")])
    save, saved = train.save, []

    def stop(path, state):
        save(path, state)
        saved.append(state["step"])
        if saved[-1] == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", stop)
        with pytest.raises(SystemExit):
            train.main([*SMALL, *flags, "--out", str(out / "again")])
    again = train.main(["--resume", "--out", str(out / "again")])
    assert again == metrics
    first, second = (torch.load(out / name / "last.pt", weights_only=True)["model"]
                     for name in ("whole", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    eval.main(["--checkpoint", str(out / "whole"), "--json", "--device", "cpu", "--workers", "0"])
    assert json.loads(capsys.readouterr().out)["results"] == metrics["results"]
    return metrics


@pytest.mark.parametrize("method", [
    "mtlora", "bdta", *(pytest.param(method, marks=pytest.mark.slow)
                        for method in ("mtlora+", "full", "decoders"))])
def test_every_method_trains_resumes_and_evaluates(method, tmp_path, monkeypatch, capsys):
    """Each method's run can be resumed and evaluated, and trains the right parts of the network."""
    metrics = assert_resumes_and_evaluates(["--method", method], tmp_path, monkeypatch, capsys)
    assert (metrics["others"] > 0) == (method in ("mtlora", "mtlora+", "full"))
    assert (metrics["adapters"] > 0) == (method in ("mtlora", "mtlora+", "bdta"))
    assert metrics["decoders"] > 0


@pytest.mark.slow
def test_another_backbone_trains_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    """A run of TGLoRA on PVT v2 b0 builds its tree from the similarity, resumes and evaluates."""
    flags = ["--backbone", "pvt_v2_b0", "--weights", "none", "--sim-images", "2", "--head-epochs",
             "1", "--rank", "6"]
    metrics = assert_resumes_and_evaluates(flags, tmp_path, monkeypatch, capsys)
    assert [len(stage) for stage in metrics["tree"]] == [1, 1, 2, 3]
    model, _, _ = load_run(tmp_path / "whole")
    assert type(model.backbone).__name__ == "PyramidVisionTransformer"
