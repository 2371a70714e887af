"""bdta.py: the paper's parameter counts, its equations one by one, and a whole run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import costs, stopped_after_an_epoch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bdta
import cost
import eval
import train
from bdta import BDTA, BDTANet, DeformableAttention, Direction, Router, TaskExperts
from swin import build_swin
from tasks import make_tasks

NAMES = ["semseg", "depth", "normals"]


def network(**switches):
    """A small network, with gamma and offsets that are not those of the start."""
    torch.manual_seed(0)
    model = BDTANet(build_swin("mini", embed_dim=16), make_tasks(NAMES, 6), **switches)
    for name, p in model.named_parameters():
        if "gamma" in name or "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(p, std=0.5)
    return model


# --- parameters and cost --------------------------------------------------------------------------
@pytest.mark.parametrize("flags, count", [
    ("--dataset pascal", 2_358_460), ("--dataset pascal --backbone small", 2_358_460),
    ("--dataset pascal --backbone base", 4_129_008), ("--dataset nyud", 1_999_820)])
def test_parameters_are_the_papers(flags, count):
    """Tables 1 and 2: 2.36 M and 4.13 M on PASCAL; nothing of the backbone is trained."""
    found = costs(*flags.split(), "--method", "bdta")
    assert found["trainable"] == count and found["others"] == 0


@pytest.mark.parametrize("switches, count", [
    ({}, 2_358_460), ({"mixture": False}, 1_961_516), ({"directions": ("g2t",)}, 2_105_902),
    ({"directions": ("t2g",)}, 2_105_902)])
def test_ablations_have_the_papers_parameters(switches, count):
    """Tables 4 and 5: 1.96 M without MoTE, 2.11 M with one direction."""
    tasks = make_tasks(["semseg", "human_parts", "sal", "normals"], 21)
    with torch.device("meta"):
        model = BDTANet(build_swin("tiny"), tasks, **switches)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("switches", [{}, {"mixture": False}])
def test_all_macs_equal_pytorchs_counter(switches):
    """Within 1 %, as for the other methods (PyTorch's leaves out biases)."""
    model = network(**switches)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(torch.randn(1, 3, 112, 112))
    found = cost.count_macs(model, (112, 112))["macs_all"]
    assert found > counter.get_total_flops() / 2 == pytest.approx(found, rel=0.03)
    maps = torch.zeros(3 * 2, 4, 5, 16)  # the mixture: three products an output
    mixed = model.experts[0].product_macs(maps)
    assert mixed == (0 if switches else 3 * (3 * 2 * 4 * 5) * 16)


# --- deformable attention -------------------------------------------------------------------------
def attention(dim=8, heads=4, points=3, dtype=torch.float32):
    """With offsets and weights that depend on the query, some of them beyond the map's edges."""
    torch.manual_seed(0)
    layer = DeformableAttention(dim, heads, points).to(dtype)
    for linear in (layer.sampling_offsets, layer.attention_weights):
        nn.init.normal_(linear.weight, std=0.3)
    return layer


def bilinear(value, y, x):
    """value (H, W, c) at a place in pixels, from the centre of the first; zero outside."""
    found = torch.zeros(value.shape[2])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < value.shape[0] and 0 <= column < value.shape[1]:
                found += (1 - abs(y - row)) * (1 - abs(x - column)) * value[row, column]
    return found


@pytest.mark.parametrize("sizes", [((5, 7), (5, 7)), ((4, 3), (6, 5))])
@torch.no_grad()
def test_attention_equals_a_loop_over_queries_heads_and_points(sizes):
    """To 1e-5, also where the value map has another size than the query's."""
    (H, W), (h, w) = sizes
    layer = attention()
    query, value = torch.randn(2, H, W, 8), torch.randn(2, h, w, 8)
    offsets = layer.sampling_offsets(query).view(2, H, W, 4, 3, 2)
    weights = layer.attention_weights(query).view(2, H, W, 4, 3).softmax(-1)
    values, expected = layer.value_proj(value), torch.zeros(2, H, W, 8)
    outside = 0
    for b, i, j, head, point in torch.cartesian_prod(*map(torch.arange, (2, H, W, 4, 3))).tolist():
        dx, dy = offsets[b, i, j, head, point].tolist()
        y, x = (i + 0.5) * h / H - 0.5 + dy, (j + 0.5) * w / W - 0.5 + dx
        part = slice(2 * head, 2 * head + 2)
        expected[b, i, j, part] += weights[b, i, j, head, point] * bilinear(
            values[b, ..., part], y, x)
        outside += not (0 <= y <= h - 1 and 0 <= x <= w - 1)
    assert outside > 20
    torch.testing.assert_close(layer(query, value), layer.output_proj(expected), rtol=0, atol=1e-5)


def test_attentions_gradients_are_right():
    """Of query, value and every parameter, in float64."""
    layer = attention(4, 2, 2, torch.float64)
    query, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
                    for _ in range(2))
    names, parameters = zip(*layer.named_parameters())

    def run(query, value, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (query, value))
    assert torch.autograd.gradcheck(run, (query, value, *parameters))


def test_attention_starts_as_deformable_detrs():
    """Head i looks in direction i, point p at p pixels' distance (on a square), evenly weighted."""
    layer = DeformableAttention(8, heads=4, points=2)
    rays = torch.tensor([[1., 0], [0, 1], [-1, 0], [0, -1]])
    start = layer.sampling_offsets.bias.view(4, 2, 2)
    torch.testing.assert_close(start[:, 0], rays, atol=1e-6, rtol=0)
    torch.testing.assert_close(start[:, 1], 2 * rays, atol=1e-6, rtol=0)
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()
    for linear in (layer.value_proj, layer.output_proj):
        assert 0.7 < linear.weight.abs().max() / (6 / 16) ** 0.5 <= 1 and not linear.bias.any()
    with pytest.raises(ValueError, match="8 channels do not divide into 6 heads"):
        DeformableAttention(8)


def test_places_are_exact_under_autocast():
    """Half precision for the products alone: at the far end of a row of 200 pixels, a value taken
    where the query is."""
    layer = DeformableAttention(4, heads=1, points=1)
    with torch.no_grad():
        layer.sampling_offsets.bias.zero_()
        layer.value_proj.weight.copy_(torch.eye(4))
        layer.output_proj.weight.copy_(torch.eye(4))
    value = torch.randint(2, (1, 1, 200, 4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(value, value).float(), value, atol=1e-2, rtol=0)


# --- the equations --------------------------------------------------------------------------------
@torch.no_grad()
def test_a_direction_is_equations_4_and_5():
    """Task by task, from its parts."""
    torch.manual_seed(0)
    module, T = Direction(8, 2), 2
    query, value = torch.randn(T * 3, 4, 5, 8), torch.randn(T * 3, 4, 5, 8)
    for t, found in enumerate(module(query, value).chunk(T)):
        q, v = query.chunk(T)[t], value.chunk(T)[t]
        down, _, up = module.adapters[t]
        v = up(nn.functional.gelu(down(v))) + v
        x = q + module.attention(module.query_norm(q), module.value_norm(v))
        torch.testing.assert_close(found, x + module.ffn(module.ffn_norm(x)))


@torch.no_grad()
def test_a_module_is_equations_3_and_8():
    """T2G's value is what G2T made; without one direction the other's output goes on alone."""
    torch.manual_seed(0)
    module, T = BDTA(16, 2), 2
    bypass, main = torch.randn(T * 3, 4, 5, 16), torch.randn(3, 4, 5, 16)
    task, general = module.bypass_proj(bypass), module.main_proj(main).repeat(T, 1, 1, 1)
    g2t, t2g = module.directions["g2t"], module.directions["t2g"]
    expected = g2t(task, general) + t2g(general, g2t(task, general))
    torch.testing.assert_close(module(bypass, main), module.output_proj(expected))
    del module.directions["g2t"]
    torch.testing.assert_close(module(bypass, main), module.output_proj(t2g(general, task)))
    module.directions = nn.ModuleDict({"g2t": g2t})
    torch.testing.assert_close(module(bypass, main), module.output_proj(g2t(task, general)))


@torch.no_grad()
def test_a_tasks_g2t_is_independent_of_the_others_adapters():
    """Another task's adapter changes that task's part of the batch alone."""
    torch.manual_seed(0)
    module, query, value = Direction(8, 3), torch.randn(6, 4, 4, 8), torch.randn(6, 4, 4, 8)
    before = module(query, value).chunk(3)
    nn.init.normal_(module.adapters[1][2].weight)
    for t, (old, new) in enumerate(zip(before, module(query, value).chunk(3))):
        assert torch.equal(old, new) == (t != 1)


def test_gates_sum_to_one_and_are_noisy_in_training_alone():
    """Of every task, over all tasks; equal weights of noise give softplus(e) of deviation."""
    torch.manual_seed(0)
    router, main = Router(16, 3), torch.randn(5, 4, 6, 16)
    for mode in (True, False):
        gates = router.train(mode)(main)
        assert gates.shape == (5, 3, 3)
        torch.testing.assert_close(gates.sum(2), torch.ones(5, 3))
        assert torch.equal(gates, router(main)) != mode
    score = torch.stack([mlp(main).mean((1, 2)) for mlp in router.gate], 1)
    torch.testing.assert_close(gates, score.softmax(2))
    noisy = torch.stack([router.train()(main).log() for _ in range(2000)])  # up to a constant
    scale = torch.stack([nn.functional.softplus(mlp(main).mean((1, 2))) for mlp in router.noise], 1)
    difference = (noisy[..., 0] - noisy[..., 1]).std(0)
    expected = (scale[..., 0] ** 2 + scale[..., 1] ** 2).sqrt()
    torch.testing.assert_close(difference, expected, rtol=0.1, atol=0)


@torch.no_grad()
def test_gamma_zero_adds_exactly_nothing_and_else_equation_11():
    """At the start every task keeps to its own expert, to the last bit."""
    torch.manual_seed(0)
    module, T = TaskExperts(16, 8, 3, bias=True, mixture=True).eval(), 3
    bypass, main = torch.randn(T * 2, 4, 5, 16), torch.randn(2, 4, 5, 16)
    assert not module.gamma.any()
    mixed = module(bypass, main)
    module.mixture = False
    assert torch.equal(mixed, module(bypass, main))
    module.mixture = True
    nn.init.normal_(module.gamma)
    experts = [f(x) for f, x in zip(module.project, bypass.chunk(T))]
    gates = module.router(main)
    for t, found in enumerate(module(bypass, main).chunk(T)):
        mixture = sum(gates[:, t, q, None, None, None] * experts[q] for q in range(T))
        own = experts[t] + module.gamma[t] * mixture
        torch.testing.assert_close(found, module.fuse[t](own))


@torch.no_grad()
def test_the_network_is_the_papers_in_the_papers_order():
    """Upsampled first and concatenated (eq. 9), then mixed, then W_t: the same predictions."""
    model, image = network().eval(), torch.randn(2, 3, 72, 100)
    T = len(NAMES)
    main = model.backbone.patch_embed(image)
    bypass, size, mixtures = main.repeat(T, 1, 1, 1), main.shape[1:3], []
    for i, (stage, experts) in enumerate(zip(model.backbone.layers, model.experts)):
        main = stage.blocks(main)                                        # before the merging
        bypass = model.bypass[i](bypass, main)
        maps = [f(x) for f, x in zip(experts.project, bypass.chunk(T))]
        maps = [nn.functional.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear")
                for x in maps]
        gates, gamma = experts.router(main), experts.gamma.view(T, -1, 1, 1)
        mixtures.append([maps[t] + gamma[t] * sum(
            gates[:, t, q, None, None, None] * maps[q] for q in range(T)) for t in range(T)])
        main, bypass = stage.downsample(main), stage.downsample(bypass)
    found = model(image)
    for t, name in enumerate(NAMES):
        W = torch.cat([experts.fuse[t].weight for experts in model.experts], 1)  # (C_1, 4 C_1)
        fused = torch.cat([m[t] for m in mixtures], 1).permute(0, 2, 3, 1) @ W.T
        fused = (fused + model.experts[0].fuse[t].bias).permute(0, 3, 1, 2)
        expected = nn.functional.interpolate(model.decoders[name](fused), (72, 100),
                                             mode="bilinear")
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


# --- the frozen backbone --------------------------------------------------------------------------
def test_nothing_flows_through_the_backbone():
    """Its blocks see no graph and its weights get no gradient; everything else is trained."""
    model, seen = network(), []
    for stage in model.backbone.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda block, inputs, x: seen.append(x.requires_grad))
    predictions = model(torch.randn(2, 3, 64, 64))
    sum(pred.square().mean() for pred in predictions.values()).backward()
    assert seen == [False] * 8
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith("backbone."), name
        assert (p.grad is not None) == p.requires_grad, name


def test_the_bypass_is_trained_through_the_mergings():
    """What the last stage's experts alone ask for reaches the first stage's module."""
    model = network()
    for experts in model.experts[:3]:
        for fuse in experts.fuse:
            nn.init.zeros_(fuse.weight)
    model(torch.randn(2, 3, 64, 64))["depth"].square().mean().backward()
    assert model.bypass[0].output_proj.weight.grad.abs().max() > 0


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_backbone():
    """Ten more blocks in stage three: the saved tensors are as large as before."""
    def saved(depths):
        model = BDTANet(build_swin("mini", embed_dim=16, depths=depths), make_tasks(NAMES, 6))
        kept, own = {}, {p.data_ptr() for p in model.parameters()}

        def pack(x):
            if x.data_ptr() not in own:
                kept[x.data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            predictions = model(torch.randn(1, 3, 64, 64))
        assert predictions
        return sum(kept.values())
    assert saved((2, 2, 12, 2)) == pytest.approx(saved((2, 2, 2, 2)), rel=0.01)


def test_a_tasks_loss_trains_its_own_experts_and_the_mixture_those_of_others():
    """Without MoTE a task's loss reaches no adapter of another; with it, all experts."""
    for mixture in (False, True):
        model = network(mixture=mixture)
        model(torch.randn(1, 3, 64, 64))["depth"].square().mean().backward()
        for name, p in model.named_parameters():
            parts = name.split(".")
            for kind in ("adapters", "project"):
                if kind in parts:
                    own = parts[parts.index(kind) + 1] == "1"
                    assert (p.grad.abs().max() > 0) == (own or mixture), name


@pytest.mark.parametrize("size", [(225, 337), (64, 97)])
def test_images_of_any_size(size):
    """Maps of odd sizes; predictions as large as the image; no task's prediction is another's."""
    found = network().eval()(torch.randn(1, 3, *size))
    assert {name: tuple(pred.shape) for name, pred in found.items()} == {
        "semseg": (1, 6, *size), "depth": (1, 1, *size), "normals": (1, 3, *size)}
    assert all(pred.isfinite().all() for pred in found.values())


def test_an_image_does_not_depend_on_its_batch():
    """Tasks are folded into the batch and taken apart again in the same order."""
    model, images = network().eval(), torch.randn(3, 3, 64, 64)
    together = model(images)
    for i in range(3):
        for name, pred in model(images[i:i + 1]).items():
            torch.testing.assert_close(together[name][i:i + 1], pred, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_network_compiles_without_a_graph_break():
    """torch.compile's tracing alone: one graph, and the same predictions."""
    model, x = network().eval(), torch.randn(2, 3, 56, 84)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for name, pred in compiled(x).items():
        torch.testing.assert_close(pred, model(x)[name])


# --- flags and recipe -----------------------------------------------------------------------------
@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_the_recipe_is_the_papers(dataset):
    """Section 4.1, for --method bdta alone; on rooms the demonstration's own."""
    config = train.parse_arguments(["--dataset", dataset, "--method", "bdta"])
    assert (config.lr, config.weight_decay, config.batch_size) == (4e-4, 1e-4, 8)
    assert config.epochs == 300
    assert (config.warmup, config.dropout, config.drop_path, config.reduction) == (0, 0, 0, 4)
    assert config.backbone == "tiny" and config.size == (448, 448)
    other = train.parse_arguments(["--dataset", dataset])
    assert other.weight_decay == 0.05 and other.drop_path == 0.2
    rooms = train.parse_arguments(["--method", "bdta"])
    assert (rooms.lr, rooms.batch_size, rooms.epochs) == (2e-3, 8, 4)


def test_reduction_arrives():
    """--reduction 8 halves the bypass's channels of --reduction 4."""
    for reduction in (4, 8):
        config = train.parse_arguments(["--method", "bdta", "--reduction", str(reduction)])
        model = train.build(argparse_with(config, weights="none"), make_tasks(NAMES, 7), None)
        assert [x.output_proj.in_features for x in model.bypass] == [
            c // reduction for c in (32, 64, 128, 256)]


def argparse_with(config, **changes):
    return SimpleNamespace(**{**vars(config), **changes})


@pytest.mark.parametrize("flags, name", [
    ("--method bdta --rank 16", "--rank"), ("--method bdta --layers attn", "--layers"),
    ("--method bdta --groups 1,2,3,4", "--groups"), ("--method bdta --tree tree.json", "--tree"),
    ("--method bdta --dropout 0.1", "--dropout"), ("--method bdta --last-rank 2", "--last-rank"),
    ("--method bdta --without mlp.fc1", "--without"), ("--method bdta --frozen norm", "--frozen"),
    ("--method bdta --fused 1,2,3,4", "--fused"),
    ("--reduction 8", "--reduction"), ("--method mtlora --reduction 2", "--reduction"),
    ("--method bdta --reduction 0", "--reduction")])
def test_flags_that_do_not_fit_are_refused_by_name(flags, name, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--dataset", "pascal", *flags.split()])
    assert name in capsys.readouterr().err.splitlines()[-1]


def test_a_reduction_that_leaves_no_whole_number_is_refused():
    with pytest.raises(ValueError, match="a reduction of 5 leaves no whole number of channels"):
        costs("--dataset", "pascal", "--method", "bdta", "--reduction", "5")


# --- runs -----------------------------------------------------------------------------------------
SMALL = ["--method", "bdta", "--epochs", "2", "--device", "cpu", "--log-every", "1"]
ROOMS = [*SMALL, "--tasks", "semseg,depth,normals", "--train-rooms", "8", "--val-rooms", "3",
         "--size", "56", "--batch-size", "4"]


def test_the_whole_way_on_rooms(tmp_path, monkeypatch, capsys):
    """Train, stop after an epoch, resume to the same end; predict a photo; export; evaluate, with
    the gates of every stage."""
    train.main([*ROOMS, "--out", str(tmp_path / "whole")])
    with stopped_after_an_epoch(monkeypatch):
        train.main([*ROOMS, "--out", str(tmp_path / "run")])
    train.main([*ROOMS, "--out", str(tmp_path / "run"), "--resume"])
    first, again = (torch.load(tmp_path / p / "last.pt", weights_only=True)["model"]
                    for p in ("whole", "run"))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(name.startswith("backbone.") for name in first)
    Image.new("RGB", (70, 50), "red").save(tmp_path / "photo.png")
    best = str(tmp_path / "run/best.pt")
    eval.main(["--checkpoint", best, "--image", str(tmp_path / "photo.png"), "--device", "cpu"])
    assert (tmp_path / "run/photo.predicted.png").is_file()
    eval.main(["--checkpoint", best, "--merge", str(tmp_path / "m.pt2"), "--device", "cpu"])
    graph = torch.export.load(tmp_path / "m.pt2").module()
    assert graph(torch.randn(3, 3, 56, 56))["depth"].shape == (3, 1, 56, 56)
    capsys.readouterr()
    eval.main(["--checkpoint", best, "--json", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["results"] == metrics["results"]
    gates = torch.tensor(found["gates"])
    torch.testing.assert_close(gates.sum(2), torch.ones(4, 3))
    eval.main(["--checkpoint", best, "--device", "cpu"])
    *_, head, semseg, depth, normals = capsys.readouterr().out.splitlines()
    assert head.split() == ["gates", "4", *NAMES]
    for name, row, line in zip(NAMES, found["gates"][3], (semseg, depth, normals)):
        assert line.split() == [name, *(f"{gate:.4f}" for gate in row)]


@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_it_trains_on_real_images(dataset, request, tmp_path, monkeypatch):
    """From the mini archives to finite metrics; the loss falls."""
    archive = request.getfixturevalue(f"{dataset}_archive")
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--dataset", dataset, "--data-root", str(archive), "--weights", "none",
                "--backbone", "mini", "--batch-size", "4", "--size", "96",
                "--lr", "1e-3", "--epochs", "8", "--eval-every", "8", "--out", "run"])
    lines = [json.loads(x)["loss"] for x in open("run/log.jsonl") if '"lr"' in x]
    assert all(0 < lines[-1][task] < lines[0][task] for task in ("semseg", "normals"))
    results = json.loads(Path("run/metrics.json").read_text())["results"]
    assert all(math.isfinite(value) for task in results.values() for value in task.values())


@pytest.mark.slow
def test_two_images_are_learned_by_heart(nyud_folder, tmp_path):
    """Overfitting: depth rmse under 0.35 m and semseg accuracy over 0.85 on two real images."""
    for split in ("train", "val"):
        (nyud_folder / f"gt_sets/{split}.txt").write_text("433\n464\n")
    train.main(["--dataset", "nyud", "--method", "bdta", "--data-root", str(nyud_folder),
                "--weights", "none", "--size", "224", "--batch-size", "2", "--epochs", "150",
                "--lr", "2e-3", "--no-flip", "--scales", "1", "--cache", "--workers", "0",
                "--eval-every", "50", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run/metrics.json").read_text())["results"]
    assert results["depth"]["rmse"] < 0.35 and results["semseg"]["accuracy"] > 0.85


def test_the_backbone_knows_nothing_of_it():
    """No word of BDTA in swin.py."""
    assert "bdta" not in (Path(bdta.__file__).parent / "swin.py").read_text().lower()
