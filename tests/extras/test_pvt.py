"""Tests of extras/pvt.py: maps equal the published equations, published weights can be loaded, and
MTLoRA and BDTA run on this backbone."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from extras import bdta, mtlora, pvt
from extras.pvt import build_pvt, load_weights
from tglora import run_stages

SMALL = dict(dims=(8, 16, 40, 64))      # one to eight heads of 8 channels
DEPTHS, HEADS, RATIOS = (2, 2, 2, 2), (1, 2, 5, 8), (8, 4, 2, 1)


def small_pvt():
    """A small PVT. Its weights are large enough for mistakes to show.

    Some norms get inputs so small that their epsilon matters.
    """
    torch.manual_seed(0)
    model = build_pvt("b0", **SMALL).eval()
    for name, p in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        nn.init.normal_(p, mean=1.0 if is_scale else 0.0, std=0.2)
        if name.endswith(("patch_embed.proj.weight", "downsample.proj.weight", "sr.weight")):
            p.data *= 0.02
    return model


def official_layout(state):
    """Rename our weights to their names in the published files."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("dwconv.", "dwconv.dwconv.").replace("patch_embed.", "patch_embed1.")
        for i in range(4):
            key = key.replace(f"layers.{i}.downsample", f"patch_embed{i + 2}")
            key = key.replace(f"layers.{i}.blocks", f"block{i + 1}")
            key = key.replace(f"layers.{i}.norm", f"norm{i + 1}")
        renamed[key] = value
    return renamed


# --- the published equations; p: {official name: weight} ------------------------------------------
def norm(p, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], eps)


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def convolution(p, name, x, stride=1, padding=0, groups=1):
    """Convolve x (B, H, W, c) -> (B, H', W', C)."""
    x = F.conv2d(x.permute(0, 3, 1, 2), p[name + ".weight"], p[name + ".bias"], stride, padding,
                 groups=groups)
    return x.permute(0, 2, 3, 1)


def attention(p, name, x, heads, ratio):
    """Attend from every token of x (B, H, W, C) to a map whose sides are `ratio` times shorter."""
    z = x
    if ratio > 1:
        z = norm(p, name + "norm", convolution(p, name + "sr", x, ratio), 1e-5)
    q = linear(p, name + "q", x).flatten(1, 2)
    k, v = linear(p, name + "kv", z).flatten(1, 2).chunk(2, -1)
    out = []
    for q1, k1, v1 in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        weights = torch.softmax(q1 @ k1.mT / q1.shape[-1] ** 0.5, -1)
        out.append(weights @ v1)
    return linear(p, name + "proj", torch.cat(out, -1)).view_as(x)


def mlp(p, name, x):
    x = linear(p, name + "fc1", x)
    x = convolution(p, name + "dwconv.dwconv", x, padding=1, groups=x.shape[-1])
    return linear(p, name + "fc2", F.gelu(x))


def published_maps(p, image):
    """The inputs of stages 2 to 4, and the output of stage 4 after its norm; image (B, 3, H, W)."""
    x, maps = image.permute(0, 2, 3, 1), []
    for s in range(4):
        x = convolution(p, f"patch_embed{s + 1}.proj", x, (4, 2, 2, 2)[s], (3, 1, 1, 1)[s])
        x = norm(p, f"patch_embed{s + 1}.norm", x, 1e-5)
        maps.append(x)
        for b in range(DEPTHS[s]):
            name = f"block{s + 1}.{b}."
            normed = norm(p, name + "norm1", x, 1e-6)
            x = x + attention(p, name + "attn.", normed, HEADS[s], RATIOS[s])
            x = x + mlp(p, name + "mlp.", norm(p, name + "norm2", x, 1e-6))
        x = norm(p, f"norm{s + 1}", x, 1e-6)
    return [*maps[1:], x]


@torch.no_grad()
def test_maps_equal_the_published_equations():
    """In float64, the maps agree with the published equations. Both sides of the image are odd."""
    model = small_pvt().double()
    image = torch.randn(2, 3, 45, 77).double()
    p = official_layout(model.state_dict())
    maps, expected = model(image), published_maps(p, image)
    for a, b in zip(maps, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


# --- presets, cost, start -------------------------------------------------------------------------
# Number of parameters without the classifier. Then the published numbers: millions of parameters
# with the classifier, and GMACs at 224x224.
PUBLISHED = {
    "b0": (3_409_760, 3.67, 0.57), "b1": (13_496_000, 14.01, 2.1),
    "b2": (24_849_856, 25.36, 4.04), "b3": (44_725_696, 45.24, 6.9),
    "b4": (62_043_072, 62.56, 10.1), "b5": (81_443_008, 81.96, 11.8)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs(name):
    """Each preset has the published number of parameters, and the published GMACs within 2 %."""
    from cost import count_macs
    parameters, millions, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        model = build_pvt(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    classifier = 1000 * (model.channels[-1] + 1)
    assert round((parameters + classifier) / 1e6, 2) == millions
    macs = count_macs(model, (224, 224))["macs_all"]
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.02)


def test_an_unknown_preset_is_an_error():
    """The message lists the presets."""
    with pytest.raises(ValueError, match="unknown backbone 'b6'; expected one of b0, b1, b2"):
        build_pvt("b6")


def test_all_macs_equal_pytorchs_counter():
    """For a network without biases, `macs_all` equals PyTorch's count, which leaves biases out."""
    from cost import count_macs
    model = small_pvt().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.bias = None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 113, 130))
    assert count_macs(model, (113, 130))["macs_all"] == counter.get_total_flops() / 2


def test_random_start():
    """Weights start with the right standard deviation, and biases at zero.

    The standard deviation is 0.02 for linear layers and sqrt(2 / fan-out) for convolutions.
    """
    torch.manual_seed(0)
    block = build_pvt("b0").layers[1].blocks[0]
    for weight, std in ((block.mlp.fc1.weight, 0.02), (block.attn.sr.weight, (2 / 1024) ** 0.5),
                        (block.mlp.dwconv.weight, (2 / 9) ** 0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not block.attn.kv.bias.any() and not block.mlp.dwconv.bias.any()


def test_drop_path_grows_with_depth():
    """The drop-path rate rises from block to block in equal steps, from 0 to the given rate.

    A block whose attention and MLP are dropped is the identity.
    """
    model = build_pvt("b0", drop_path=0.7, **SMALL)
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    block, x = model.layers[0].blocks[0].train(), torch.randn(1, 8, 8, 8)
    block.drop_path.p = 1.0
    assert torch.equal(block(x), x)


# --- weights --------------------------------------------------------------------------------------
def assert_equal_weights(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("layout", ["timm", "ours"])
def test_a_file_with_other_names(tmp_path, layout):
    """A file in timm's layout, or with our names, as extras/export.py writes it, is loaded."""
    state = small_pvt().state_dict()
    renamed = dict(state)
    if layout == "timm":                # timm's stages begin with a patch embedding
        renamed = {}
        for key, value in state.items():
            if "downsample" in key:
                key = re.sub(r"\d", lambda number: str(int(number[0]) + 1), key, count=1)
            renamed[key.replace("layers.", "stages.")] = value
    torch.save(renamed, tmp_path / "weights.pth")
    model = build_pvt("b0", **SMALL)
    load_weights(model, str(tmp_path / "weights.pth"))
    assert_equal_weights(model, state)


def test_the_published_file(tmp_path, monkeypatch):
    """"imagenet" downloads the official file, for b2 by default, and leaves out its classifier."""
    asked = []

    def fetch(url):
        asked.append(url)
        return tmp_path / "pvt_v2_b2.pth"
    monkeypatch.setattr(pvt, "fetch", fetch)
    state = small_pvt().state_dict()
    published = {**official_layout(state), "head.bias": torch.zeros(1000)}
    torch.save(published, tmp_path / "pvt_v2_b2.pth")
    model = build_pvt("b0", **SMALL)
    load_weights(model, "imagenet")
    assert asked == ["https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth"]
    assert_equal_weights(model, state)


# --- methods on this backbone ---------------------------------------------------------------------
def test_others_and_adapted_layers():
    """Each weight matches exactly one of OTHERS, the adapted layers and the reductions (`attn.sr`).
    """
    model, adapted = small_pvt(), set()
    for name, _ in model.named_parameters():
        layer = name.rpartition(".")[0]
        is_other = any(part in name for part in model.OTHERS)
        is_adapted = layer.endswith(model.ADAPTED["attn+mlp"])
        assert is_other + is_adapted + (layer.endswith("attn.sr")) == 1, name
        if is_adapted:
            assert isinstance(model.get_submodule(layer), nn.Linear)
            adapted.add(".".join(layer.split(".")[4:]))
    assert adapted == {"attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert model.ADAPTED["attn"] == ("attn.q", "attn.kv", "attn.proj")


@torch.no_grad()
def test_mtlora_starts_as_the_frozen_backbone():
    """MTLoRA's adapters start at zero, so at first every task gets the frozen backbone's maps."""
    model, plain, image = small_pvt(), small_pvt(), torch.randn(2, 3, 64, 96)
    mtlora.adapt(model, model.ADAPTED["attn+mlp"], 2, rank=3)
    parents, group_of = mtlora.routing(4, 2)
    maps = run_stages(model.layers, model.patch_embed(image), parents)
    for groups in group_of:
        for m, group, expected in zip(maps, groups, plain(image), strict=True):
            torch.testing.assert_close(m[group], expected, rtol=1e-3, atol=1e-4)


def test_bdta_runs_on_this_backbone():
    """BDTA's predictions have the size of the image, and all weights but the backbone's get
    gradients."""
    tasks = [SimpleNamespace(name="a", outputs=4), SimpleNamespace(name="b", outputs=1)]
    model = bdta.BDTANet(build_pvt("b0"), tasks)
    predictions = model(torch.randn(2, 3, 64, 93))
    assert predictions["a"].shape == (2, 4, 64, 93)
    sum(x.square().mean() for x in predictions.values()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("backbone."), name
