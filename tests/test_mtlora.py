"""mtlora.py: the paper's parameter counts, who trains what, and the whole way through train.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import archive, costs, stopped_after_an_epoch
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
    config = SimpleNamespace(method=method, rank=6, dropout=0.0, without=[],
                             fused=(18, 36, 72, 144))
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


# Its tables 2 and 3: trained parameters on PASCAL in millions, as printed (some rounded, some cut
# off), and exactly, by what is left out.
NORMS = "norm1.,norm2.,downsample.norm"


@pytest.mark.parametrize("flags, printed, count", [
    ("--without mlp.fc1", 6.81, 6_816_314), ("--without mlp.fc2", 6.81, 6_816_314),
    ("--without attn.proj", 7.73, 7_733_306), ("--without attn.qkv", 7.21, 7_214_138),
    ("--frozen patch_embed.proj", 8.34, 8_339_930), (f"--frozen {NORMS}", 8.32, 8_321_594),
    ("--frozen position_bias", 8.32, 8_321_312), ("--frozen reduction", 6.80, 6_796_346)])
def test_leaving_something_out_has_the_papers_parameters(flags, printed, count):
    found = costs("--dataset", "pascal", "--method", "mtlora", *flags.split())["trainable"]
    assert found == count and abs(found / 1e6 - printed) < 0.01


@pytest.mark.parametrize("dataset, gmacs", [("pascal", 24.22), ("nyud", 22.60)])
def test_the_frozen_products_are_computed_once(dataset, gmacs):
    """Linear and convolution layers, by hand: all shared, and the tasks' merging and decoders; of
    four stages, three merge 2C to C for each task."""
    found = costs("--dataset", dataset, "--method", "mtlora", "--rank", "64")["macs_linear_conv"]
    assert found / 1e9 == pytest.approx(gmacs, abs=0.005)
    shared = costs("--dataset", dataset, "--groups", "1,1,1,1")["macs_linear_conv"]
    tasks = {"pascal": 4, "nyud": 3}[dataset]
    merging = sum((448 // 2 ** (i + 3)) ** 2 * (4 * c) * (2 * c)
                  for i, c in enumerate((96, 192, 384)))
    assert found == shared + tasks * merging


@pytest.fixture
def published():
    """Random weights, an image, and what the published code computes from them."""
    path = archive("mtlora_published.pt", "weights, input and maps of the published MTLoRA")
    return torch.load(path, weights_only=True)


def test_the_tasks_maps_are_those_of_the_published_code(published):
    """From the same weights: every stage and task to 1e-4, the last, of large numbers, to 1e-3."""
    names = ["semseg", "normals", "sal", "human_parts"]
    backbone = build_swin("tiny", embed_dim=24, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24))
    config = SimpleNamespace(method="mtlora", rank=8, dropout=0.0, without=[],
                             fused=(18, 36, 72, 144))
    backbone = mtlora_net(backbone, make_tasks(names, 21), None, config).eval().backbone

    def our_name(name):
        name = name.replace(".linear.", ".")
        for letter in "AB":
            name = name.replace(f"lora_shared_{letter}", f"lora_{letter}.0")
            for group, task in enumerate(names, 1):
                name = name.replace(f"lora_tasks_{letter}.{task}", f"lora_{letter}.{group}")
        return name

    weights = {our_name(name): value.float() for name, value in published["weights"].items()}
    backbone.load_state_dict(weights)
    with torch.no_grad():
        x = backbone.patch_embed(published["input"].float())
        for i, (stage, maps) in enumerate(zip(backbone.layers, published["maps"], strict=True)):
            x, *own = stage(x).split(1)
            for name, found in zip(names, own):
                expected = maps[name].float()
                error = (found.flatten(0, -2)[::7] - expected).abs().max() / expected.abs().max()
                assert error < (1e-3 if i == 3 else 1e-4), (i, name)


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
    """Groups 1..T are the tasks'. Group 0 is shared, and reaches every task through the frozen
    products that are computed of it; after the last stage's fc2 there is none."""
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
            expected = stage < 3 or "fc2" not in name
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
    """Layer by layer, eq. 2: W x_0 + b of the shared input, gamma B_g A_g x_g of the group's own;
    where groups begin, at the projection, all inputs are the shared one."""
    last = fill(network()).backbone.layers[1].blocks[1]
    for layer, k in ((last.attn.proj, 32), (last.mlp.fc1, 32), (last.mlp.fc2, 128)):
        x = torch.randn(2 if layer is last.attn.proj else 8, 49, k)
        inputs = [x] * 4 if layer is last.attn.proj else x.chunk(4)
        for g, y in enumerate(layer(x).chunk(4)):
            adapter = 4 * inputs[g] @ layer.lora_A[g].T @ layer.lora_B[g].T
            torch.testing.assert_close(y, x[:2] @ layer.weight.T + layer.bias + adapter)
        assert layer.ranks == (6, 4, 4, 4)


def test_dropout_is_the_published_codes():
    """One mask for all groups where they begin; later the tasks' inputs are not dropped."""
    last = fill(network()).backbone.layers[1].blocks[1].train()
    for layer in (last.attn.proj, last.mlp.fc1):
        layer.dropout, layer.ranks = 0.5, (4, 4, 4, 4)
        for matrices in (layer.lora_A, layer.lora_B):
            for p in matrices[1:]:
                p.data = matrices[1].data
            matrices[0].data = matrices[1].data
    dropped = last.attn.proj(torch.ones(2, 49, 32)).chunk(4)
    assert all(torch.equal(y, dropped[0]) for y in dropped)
    shared, *tasks = last.mlp.fc1(torch.ones(8, 49, 32)).chunk(4)
    assert not torch.equal(shared, tasks[0]) and all(torch.equal(y, tasks[0]) for y in tasks)
    assert torch.equal(tasks[0], last.mlp.fc1.eval()(torch.ones(8, 49, 32))[2:4])


@pytest.mark.parametrize("method", mtlora.METHODS)
def test_merged_equals_unmerged(method):
    model, x = fill(network(method)), torch.randn(2, 3, 64, 64)
    expected = model(x)
    for name, pred in merge(model)(x).items():
        assert (pred - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


def test_a_layer_without_adapters_shares_its_product():
    """`--without mlp.fc1`: every group gets W x_0 + b there, nothing of it is trained."""
    config = SimpleNamespace(method="mtlora", rank=6, dropout=0.1, fused=(18, 36, 72, 144),
                             without=["mlp.fc1", "attn.proj"])
    model = fill(mtlora_net(build_swin("mini", embed_dim=16), make_tasks(NAMES, 6), SHARED, config))
    fc1, x = model.backbone.layers[0].blocks[1].mlp.fc1, torch.randn(8, 5, 16)
    for y in fc1(x).chunk(4):
        torch.testing.assert_close(y, F.linear(x[:2], fc1.weight, fc1.bias))
    sum(pred.mean() for pred in model(torch.randn(1, 3, 64, 64)).values()).backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    assert not [name for name in trained if "fc1" in name or "proj.lora" in name]
    with pytest.raises(ValueError, match="--without mlp.fc3: expected some of attn.qkv,attn.proj"):
        costs("--method", "mtlora", "--without", "mlp.fc3")
    with pytest.raises(ValueError, match="--frozen norm3: no weight"):
        costs("--method", "mtlora", "--frozen", "norm3")


@pytest.mark.parametrize("flags", [
    "--method mtlora --layers attn", "--method mtlora --groups 1,2,3,4",
    "--method full --groups 1,2,3,4", "--method decoders --groups 1,1,1,3",
    "--method mtlora+ --tree tree.json", "--method full --layers attn"])
def test_flags_that_a_method_would_ignore_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--dataset", "pascal", *flags.split()])
    assert "go with --method tglora" in capsys.readouterr().err.replace("goes", "go")


SMALL = ["--rank", "6", "--epochs", "2", "--device", "cpu", "--log-every", "1", "--dropout", "0.1"]
ROOMS = [*SMALL, "--tasks", "semseg,depth,normals", "--train-rooms", "8", "--val-rooms", "3",
         "--size", "56", "--batch-size", "4"]


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
    """No word of MTLoRA in swin.py, pvt.py and tglora.py."""
    for name in ("swin.py", "pvt.py", "tglora.py"):
        assert "mtlora" not in (Path(mtlora.__file__).parent / name).read_text().lower()
