"""mtlora.py: the paper's parameter counts, who trains what, and the whole way through train.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import costs, stopped_after_an_epoch
from PIL import Image

import eval
import mtlora
import train
from model import decoders_only, mtlora_net
from swin import build_swin
from tasks import make_tasks
from tglora import merge

NAMES = ["semseg", "depth", "normals"]
SHARED = [[(0, 1, 2)]] * 4


def network(method="mtlora", adapters=True):
    """A small network, in evaluation mode; its B are zero, as at the start of training."""
    torch.manual_seed(0)
    config = SimpleNamespace(method=method, rank=6, dropout=0.0)
    method = mtlora_net if adapters else decoders_only
    return method(build_swin("mini", embed_dim=16), make_tasks(NAMES, 6), SHARED, config).eval()


def fill(model):
    """Adapters that are not zero."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("dataset, method, rank, count", [
    ("pascal", "mtlora", 16, 4_953_146), ("pascal", "mtlora", 32, 6_083_642),
    ("pascal", "mtlora", 64, 8_344_634), ("nyud", "mtlora", 64, 7_810_478),
    ("pascal", "mtlora+", 4, 2_573_114), ("pascal", "mtlora+", 8, 3_148_346),
    ("pascal", "mtlora+", 16, 4_298_810)])
def test_parameters_are_the_papers(dataset, method, rank, count):
    assert costs("--dataset", dataset, "--method", method,
                 "--rank", str(rank))["trainable"] == count


@pytest.mark.parametrize("method", mtlora.METHODS)
def test_with_zero_adapters_every_task_sees_the_frozen_backbone(method):
    """Exactly: its prediction is that of the network without adapters."""
    plain, adapted = network(adapters=False), network(method)
    adapted.decoders.load_state_dict(plain.decoders.state_dict())
    x = torch.randn(2, 3, 64, 96)
    for name, pred in plain(x).items():
        torch.testing.assert_close(adapted(x)[name], pred, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", mtlora.METHODS)
@pytest.mark.parametrize("task", NAMES)
def test_a_task_trains_its_own_and_the_shared_adapters(method, task):
    """Groups 1..T are the tasks'. Group 0 is shared; in the last stage nothing comes after it."""
    model = fill(network(method))
    model(torch.randn(1, 3, 64, 64))[task].square().mean().backward()
    seen = set()
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert p.requires_grad or p.grad is None, name
            continue
        stage, group = int(name.split(".")[2]), int(name.split(".")[-1])
        ends = name.split(".")[4] == "1" and "qkv" not in name  # proj, fc1, fc2 of a last block
        if not ends:
            expected = True
        elif group == 0:
            expected = stage < 3
        else:
            expected = NAMES[group - 1] == task
        assert (p.grad is not None and p.grad.abs().max() > 0) == expected, name
        seen.add((ends, group))
    assert seen == {(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)}


def test_what_is_trained_beside_the_adapters():
    """Others in both; the merging's reduction in MTLoRA, its adapter instead in MTLoRA+."""
    for method, trained in (("mtlora", True), ("mtlora+", False)):
        model = network(method)
        for name, p in model.backbone.named_parameters():
            if "lora_" not in name:
                other = any(part in name for part in ("norm", "patch_embed", "bias_table"))
                assert p.requires_grad == (other or "reduction" in name and trained), name
        reduction = model.backbone.layers[0].downsample.reduction
        assert hasattr(reduction, "lora_A") != trained


def test_task_outputs_leave_the_shared_adapter_out():
    """Layer by layer: the branching projection is W x + gamma B_g A_g x for each group."""
    proj = fill(network()).backbone.layers[1].blocks[1].attn.proj
    x = torch.randn(2, 3, 49, 32)
    for g, y in enumerate(proj(x).chunk(4)):
        expected = x @ proj.weight.T + proj.bias + 4 * x @ proj.lora_A[g].T @ proj.lora_B[g].T
        torch.testing.assert_close(y, expected)
    assert proj.ranks == (6, 4, 4, 4)


@pytest.mark.parametrize("method", mtlora.METHODS)
def test_merged_equals_unmerged(method):
    model, x = fill(network(method)), torch.randn(2, 3, 64, 64)
    expected = model(x)
    for name, pred in merge(model)(x).items():
        assert (pred - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


SMALL = ["--rank", "6", "--epochs", "2", "--device", "cpu", "--log-every", "1", "--dropout", "0.1"]
ROOMS = [*SMALL, "--train-rooms", "8", "--val-rooms", "3", "--size", "56", "--batch-size", "4"]


@pytest.mark.parametrize("method", mtlora.METHODS)
def test_the_whole_way_on_rooms(method, tmp_path, monkeypatch, capsys):
    """Train, stop after an epoch, resume to the same end; predict a photo; merge; evaluate."""
    flags = [*ROOMS, "--method", method, "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    with stopped_after_an_epoch(monkeypatch):
        train.main([*flags, str(tmp_path / "run")])
    train.main([*flags, str(tmp_path / "run"), "--resume"])
    first, again = (torch.load(tmp_path / p / "last.pt", weights_only=True)["model"]
                    for p in ("whole", "run"))
    assert all(torch.equal(first[k], again[k]) for k in first)
    Image.new("RGB", (70, 50), "red").save(tmp_path / "photo.png")
    best = str(tmp_path / "run/best.pt")
    eval.main(["--checkpoint", best, "--image", str(tmp_path / "photo.png"), "--device", "cpu"])
    assert (tmp_path / "run/photo.predicted.png").is_file()
    eval.main(["--checkpoint", best, "--merge", str(tmp_path / "m.pt2"), "--device", "cpu"])
    capsys.readouterr()
    eval.main(["--checkpoint", best, "--json", "--device", "cpu"])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert json.loads(capsys.readouterr().out)["results"] == metrics["results"]


@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_it_trains_on_real_images(dataset, request, tmp_path, monkeypatch):
    """From the mini archives to finite metrics; the loss falls."""
    archive = request.getfixturevalue(f"{dataset}_archive")
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--dataset", dataset, "--data-root", str(archive), "--weights", "none",
                "--backbone", "mini", "--method", "mtlora", "--batch-size", "4", "--size", "96",
                "--lr", "1e-3", "--epochs", "8", "--eval-every", "8", "--out", "run"])
    lines = [json.loads(x)["loss"] for x in open("run/log.jsonl") if '"lr"' in x]
    assert all(0 < lines[-1][task] < lines[0][task] for task in ("semseg", "normals"))


def test_the_backbone_and_the_layer_know_nothing_of_it():
    """No word of MTLoRA in swin.py and tglora.py."""
    for name in ("swin.py", "tglora.py"):
        assert "mtlora" not in (Path(mtlora.__file__).parent / name).read_text().lower()
