"""Tests of extras/bdta.py: parameter counts and equations are those of the BDTA paper."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from extras.bdta import BDTA, BDTANet, DeformableAttention, Direction, TaskExperts
from swin import build_swin

TASKS = [SimpleNamespace(name=name, outputs=outputs)
         for name, outputs in (("semseg", 6), ("depth", 1), ("normals", 3))]
OUTPUTS = {"pascal": (21, 7, 1, 3), "nyud": (40, 1, 3)}


def network(**options):
    """A small network with random gammas, sampling offsets and attention weights."""
    torch.manual_seed(0)
    model = BDTANet(build_swin("mini", embed_dim=16), TASKS, **options)
    for name, p in model.named_parameters():
        if "gamma" in name or "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(p, std=0.5)
    return model


# --- parameters and cost --------------------------------------------------------------------------
@pytest.mark.parametrize("dataset, name, options, count", [
    ("pascal", "tiny", {}, 2_358_460), ("pascal", "base", {}, 4_129_008),
    ("nyud", "tiny", {}, 1_999_820),
    ("pascal", "tiny", dict(mixture=False), 1_961_516),
    ("pascal", "tiny", dict(directions=("g2t",)), 2_105_902),
    ("pascal", "tiny", dict(directions=("t2g",)), 2_105_902)])
def test_parameters_are_those_of_the_paper(dataset, name, options, count):
    """The numbers of trained parameters match tables 1, 2, 4 and 5 of BDTA's paper.

    The backbone is not trained. The paper has no NYUD row; that number only guards against changes.
    """
    tasks = [SimpleNamespace(name=str(i), outputs=n) for i, n in enumerate(OUTPUTS[dataset])]
    with torch.device("meta"):
        model = BDTANet(build_swin(name), tasks, **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_all_macs_are_near_pytorchs_counter():
    """`macs_all` is at most 3 % above PyTorch's count, which leaves out the biases.

    The multiply-accumulates of eq. 11 are also compared with a count by hand.
    """
    from cost import count_macs
    model = network().eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randn(1, 3, 112, 112))
    macs = count_macs(model, (112, 112))["macs_all"]
    assert macs > counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.03)
    products = model.experts[0].product_macs(torch.zeros(3 * 2, 4, 5, 16))
    assert products == 3 * (3 * 2 * 4 * 5) * 16


# --- deformable attention -------------------------------------------------------------------------
def attention(dim=8, heads=4, points=3):
    """Deformable attention whose sampling positions and weights depend on the query.

    Some sampling positions are outside the map.
    """
    torch.manual_seed(0)
    layer = DeformableAttention(dim, heads, points)
    for linear in (layer.sampling_offsets, layer.attention_weights):
        nn.init.normal_(linear.weight, std=0.3)
    return layer


def bilinear(value, y, x):
    """Interpolate value (H, W, c) at (y, x), in pixels from the first pixel's centre.

    Values outside the map are zero.
    """
    total = torch.zeros(value.shape[2])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < value.shape[0] and 0 <= column < value.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * value[row, column]
    return total


@torch.no_grad()
def test_attention_equals_a_loop_over_queries_heads_and_points():
    """Deformable attention equals a plain loop. The value map is larger than the query map."""
    H, W, h, w = 4, 3, 6, 5
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
        sample = bilinear(values[b, ..., part], y, x)
        expected[b, i, j, part] += weights[b, i, j, head, point] * sample
        outside += not (0 <= y <= h - 1 and 0 <= x <= w - 1)
    assert outside > 20
    torch.testing.assert_close(layer(query, value), layer.output_proj(expected), rtol=0, atol=1e-5)


def test_attention_starts_as_in_deformable_detr():
    """Initially, head i reads in the i-th direction from every query, 1, 2, 3 and 4 pixels away.

    The value and output projections start with Xavier initialisation.
    """
    layer = DeformableAttention(8, heads=4)
    rays = torch.tensor([[1., 0], [0, 1], [-1, 0], [0, -1]])
    start = layer.sampling_offsets.bias.view(4, 4, 2)
    for point in range(4):
        torch.testing.assert_close(start[:, point], (point + 1) * rays, atol=1e-6, rtol=0)
    diagonal = DeformableAttention(8, heads=8).sampling_offsets.bias.view(8, 4, 2)[1, 0]
    torch.testing.assert_close(diagonal, torch.ones(2))
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()
    for linear in (layer.value_proj, layer.output_proj):
        assert 0.7 < linear.weight.abs().max() / (6 / 16) ** 0.5 <= 1 and not linear.bias.any()


def test_sampling_positions_are_exact_under_autocast():
    """Under autocast, each of 200 queries reads its own pixel, not a mix of two.

    Sampling positions in bfloat16 would be too imprecise for this.
    """
    layer = DeformableAttention(4, heads=1, points=1)
    nn.init.zeros_(layer.sampling_offsets.bias)
    nn.init.eye_(layer.value_proj.weight)
    nn.init.eye_(layer.output_proj.weight)
    value = torch.randint(2, (1, 1, 200, 4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(value, value).float(), value, atol=1e-2, rtol=0)


# --- the equations --------------------------------------------------------------------------------
def mlp(module, x):
    """Apply the module's two linear layers with a GELU between them."""
    return module[2](F.gelu(module[0](x)))


def norm(module, x):
    """LayerNorm with ViT-Adapter's epsilon."""
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, eps=1e-6)


@torch.no_grad()
def test_direction_equals_equations_4_and_5():
    """`Direction` equals eq. 4 and 5 for each task, on inputs so small that LayerNorm's epsilon
    matters."""
    torch.manual_seed(0)
    module = Direction(8, 2)
    queries, values = torch.randn(2, 3, 4, 5, 8) * 2e-3, torch.randn(2, 3, 4, 5, 8) * 2e-3
    outputs = module(queries.flatten(0, 1), values.flatten(0, 1)).chunk(2)
    for t in range(2):
        q = queries[t]
        v = values[t] + mlp(module.adapters[t], values[t])
        x = q + module.attention(norm(module.query_norm, q), norm(module.value_norm, v))
        hidden = module.ffn.fc1(norm(module.ffn_norm, x)).permute(0, 3, 1, 2)
        hidden = F.gelu(module.ffn.dwconv(hidden)).permute(0, 2, 3, 1)
        torch.testing.assert_close(outputs[t], x + module.ffn.fc2(hidden), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_bdta_equals_equations_3_and_8():
    """T2G (task-to-general) reads the result of G2T (general-to-task).

    The sum of both results is projected, or the single result if only one direction is used.
    """
    torch.manual_seed(0)
    module = BDTA(16, 2)
    bypass, main = torch.randn(2 * 3, 4, 5, 16), torch.randn(3, 4, 5, 16)
    task, general = module.bypass_proj(bypass), module.main_proj(main).repeat(2, 1, 1, 1)
    g2t, t2g = module.directions["g2t"], module.directions["t2g"]
    expected = g2t(task, general) + t2g(general, g2t(task, general))
    torch.testing.assert_close(module(bypass, main), module.output_proj(expected))
    module.directions = nn.ModuleDict({"t2g": t2g})
    torch.testing.assert_close(module(bypass, main), module.output_proj(t2g(general, task)))
    module.directions = nn.ModuleDict({"g2t": g2t})
    torch.testing.assert_close(module(bypass, main), module.output_proj(g2t(task, general)))


@torch.no_grad()
def test_gates_equal_equation_10():
    """In eval mode, gates are the softmax of the pooled scores; gamma starts at 0.

    In training, the noise added to a score has the standard deviation softplus(e).
    """
    torch.manual_seed(0)
    experts = TaskExperts(32, 8, 3, bias=True, mixture=True).eval()
    router, main = experts.router, torch.randn(2, 4, 6, 32)
    h, e = (torch.stack([mlp(module, main).mean((1, 2)) for module in modules], 1)
            for modules in (router.gate, router.noise))             # (B, T, T)
    torch.testing.assert_close(router(main), h.softmax(2))
    assert not experts.gamma.any()

    deviation = F.softplus(e)
    router.train()
    gates = router(main.repeat(2000, 1, 1, 1)).unflatten(0, (2000, 2))
    torch.testing.assert_close(gates.sum(-1), torch.ones(2000, 2, 3))
    scores = gates.log()                                            # up to a constant per row
    difference = (scores[..., 0] - scores[..., 1]).std(0)
    expected = (deviation[..., 0] ** 2 + deviation[..., 1] ** 2).sqrt()
    torch.testing.assert_close(difference, expected, rtol=0.1, atol=0)


@torch.no_grad()
def test_predictions_equal_those_of_the_papers_order():
    """Predictions equal those in the paper's order: upsample (eq. 9), mix (eq. 11), apply W_t.

    `BDTANet` upsamples after it has applied W_t. The width of the image is odd.
    """
    model, image, T = network().eval(), torch.randn(2, 3, 72, 101), 3
    main = model.backbone.patch_embed(image)
    bypass, size, mixtures = main.repeat(T, 1, 1, 1), main.shape[1:3], []
    for i, (stage, experts) in enumerate(zip(model.backbone.layers, model.experts)):
        main = stage.blocks(main)                                       # no patch merging yet
        bypass = model.bypass[i](bypass, main)
        maps = []
        for project, x in zip(experts.project, bypass.chunk(T)):
            maps.append(F.interpolate(project(x).permute(0, 3, 1, 2), size, mode="bilinear"))
        gates, gamma = experts.router(main), experts.gamma.view(T, -1, 1, 1)
        mixed = []
        for t in range(T):
            mixture = sum(gates[:, t, q, None, None, None] * maps[q] for q in range(T))
            mixed.append(maps[t] + gamma[t] * mixture)
        mixtures.append(mixed)
        main, bypass = stage.downsample(main), stage.downsample(bypass)
    predictions = model(image)
    for t, task in enumerate(TASKS):
        W = torch.cat([experts.fuse[t].weight for experts in model.experts], 1)  # (C_1, 4 C_1)
        fused = torch.cat([m[t] for m in mixtures], 1).permute(0, 2, 3, 1) @ W.T
        fused = (fused + model.experts[0].fuse[t].bias).permute(0, 3, 1, 2)
        expected = F.interpolate(model.decoders[task.name](fused), (72, 101), mode="bilinear")
        assert expected.shape == (2, task.outputs, 72, 101)
        torch.testing.assert_close(predictions[task.name], expected, rtol=1e-4, atol=1e-4)


# --- the frozen backbone --------------------------------------------------------------------------
def test_gradients_pass_the_mergings_and_nothing_else_of_the_backbone():
    """Gradients reach the first stage's bypass even if only the last stage's experts are used.

    The backbone's blocks run without gradients, and none of its weights gets a gradient.
    """
    model, seen = network(), []
    for stage in model.backbone.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda block, inputs, x: seen.append(x.requires_grad))
    for experts in model.experts[:3]:
        for fuse in experts.fuse:
            nn.init.zeros_(fuse.weight)
    predictions = model(torch.randn(2, 3, 64, 64))
    sum(pred.square().mean() for pred in predictions.values()).backward()
    assert seen == [False] * 8
    assert model.bypass[0].output_proj.weight.grad.any()
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith("backbone."), name
        assert (p.grad is not None) == p.requires_grad, name
