"""pvt.py against the published equations written plainly, its weights, and every method on it."""

import copy
import http.server
import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import costs, stopped_after_an_epoch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
import eval
import model as model_py
import pvt
import train
from pvt import build_pvt, load_weights
from tglora import TGLoRALinear, merge

SMALL = dict(dims=(8, 16, 40, 64))  # one to eight heads of 8 channels
CLASSIFIER = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
DEPTHS, HEADS, RATIOS = (2, 2, 2, 2), (1, 2, 5, 8), (8, 4, 2, 1)


# --- the published equations, by the official names of weights ------------------------------------
def norm(p, name, x, eps):
    """LayerNorm over the last dimension."""
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps) ** 0.5
    return x * p[name + ".weight"] + p[name + ".bias"]


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def convolution(p, name, x, stride, padding):
    """x (H, W, c) -> (H', W', C): each output pixel is the product of its window and the kernel."""
    weight = p[name + ".weight"]  # (C, c, k, k)
    k = weight.shape[-1]
    x = torch.nn.functional.pad(x, (0, 0, padding, padding, padding, padding))
    rows = [[x[i:i + k, j:j + k].permute(2, 0, 1).flatten() @ weight.flatten(1).T
             for j in range(0, x.shape[1] - k + 1, stride)]
            for i in range(0, x.shape[0] - k + 1, stride)]
    return torch.stack([torch.stack(row) for row in rows]) + p[name + ".bias"]


def attention(p, name, x, heads, ratio):
    """Queries from every token, keys and values from a reduced map; x (H, W, C)."""
    H, W, C = x.shape
    z = x
    if ratio > 1:
        z = norm(p, name + "norm", convolution(p, name + "sr", x, ratio, 0), 1e-5)
    q = linear(p, name + "q", x).view(H * W, heads, -1)
    k, v = linear(p, name + "kv", z).view(z.shape[0] * z.shape[1], 2, heads, -1).unbind(1)
    out = [torch.softmax(q[:, h] @ k[:, h].T / (C / heads) ** 0.5, -1) @ v[:, h]
           for h in range(heads)]
    return linear(p, name + "proj", torch.cat(out, -1)).view(H, W, C)


def mlp(p, name, x):
    x = linear(p, name + "fc1", x)
    H, W, _ = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    weight = p[name + "dwconv.dwconv.weight"]  # (C, 1, 3, 3)
    x = sum(padded[i:i + H, j:j + W] * weight[:, 0, i, j] for i in range(3) for j in range(3))
    x = x + p[name + "dwconv.dwconv.bias"]
    return linear(p, name + "fc2", x * (1 + torch.erf(x / 2 ** 0.5)) / 2)


def published_maps(p, image):
    """What a stage sees first, after stage 1, and stage 4's normed output; image (3, H, W)."""
    x, maps = image.permute(1, 2, 0), []
    for s in range(4):
        x = convolution(p, f"patch_embed{s + 1}.proj", x, (4, 2, 2, 2)[s], (3, 1, 1, 1)[s])
        x = norm(p, f"patch_embed{s + 1}.norm", x, 1e-5)
        maps.append(x)
        for b in range(DEPTHS[s]):
            name = f"block{s + 1}.{b}."
            x = x + attention(p, name + "attn.", norm(p, name + "norm1", x, 1e-6), HEADS[s],
                              RATIOS[s])
            x = x + mlp(p, name + "mlp.", norm(p, name + "norm2", x, 1e-6))
        x = norm(p, f"norm{s + 1}", x, 1e-6)
    return [*maps[1:], x]


# --- weights --------------------------------------------------------------------------------------
def filled(model):
    """Weights large enough that a mistake shows, and norms whose epsilon counts."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.2)
    for name, p in model.named_parameters():
        if name.endswith(("patch_embed.proj.weight", "downsample.proj.weight", "sr.weight")):
            p.data *= 0.02
    return model.eval()


@pytest.fixture(scope="module")
def ours():
    return filled(build_pvt("b0", **SMALL))


def official_layout(state):
    """Our weights by their published names, beside a classifier's."""
    def rename(key):
        key = key.replace("dwconv.", "dwconv.dwconv.").replace("patch_embed.", "patch_embed1.")
        key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 2}", key)
        key = re.sub(r"layers\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", key)
        return re.sub(r"layers\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", key)
    return {**{rename(k): v for k, v in state.items()}, **CLASSIFIER}


def timm_layout(state):
    """timm's stages begin with their patch embedding."""
    def rename(key):
        key = re.sub(r"layers\.(\d)\.downsample",
                     lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
        return key.replace("layers.", "stages.")
    return {**{rename(k): v for k, v in state.items()}, **CLASSIFIER}


@pytest.mark.parametrize("layout", [
    lambda state: {"model": official_layout(state)}, timm_layout,
    lambda state: {k: v.half() for k, v in state.items()}])
def test_every_layout_loads_to_the_same_model(ours, tmp_path, layout):
    """Official (in a wrapper), timm's, and what tools/export.py writes, in fp16."""
    torch.save(layout(ours.state_dict()), tmp_path / "weights.pth")
    model = build_pvt("b0", **SMALL)
    report = load_weights(model, str(tmp_path / "weights.pth"))
    assert report["matched"] == report["total"] == len(model.state_dict())
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("block3.1.attn.kv.bias"), "1 missing: layers.2.blocks.1.attn.kv.bias"),
    (lambda s: s.pop("norm2.weight"), "1 missing: layers.1.norm.weight"),
    (lambda s: s.update(surplus=torch.ones(1)), "1 unexpected: surplus"),
    (lambda s: s.update({"patch_embed2.norm.weight": torch.ones(7)}),
     r"1 misshapen: layers.0.downsample.norm.weight \(7,\), expected \(16,\)")])
def test_incomplete_weights_are_refused_by_name(ours, tmp_path, change, message):
    """One tensor missing, extra or misshapen: nothing is loaded and the name is told."""
    state = official_layout(ours.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    model = build_pvt("b0", **SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, str(tmp_path / "weights.pth"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    """torchvision, which has none; a file that is not there, is damaged, or holds another thing."""
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 no more")
    torch.save([1, 2], tmp_path / "list.pth")
    for source, message in (("torchvision", "torchvision has none"), ("none.pth", "no file none"),
                            (tmp_path / "broken.pth", "not a readable PyTorch checkpoint"),
                            (tmp_path / "list.pth", "176 missing: patch_embed.proj.weight")):
        with pytest.raises(ValueError, match=message):
            load_weights(build_pvt("b0", **SMALL), str(source), "b0")


def test_imagenet_is_downloaded_once_and_cached(ours, tmp_path, monkeypatch):
    """"imagenet" fetches the release file by HTTP; the second time needs no server."""
    assert pvt.OFFICIAL_URL.format(name="b2") == (
        "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth")
    torch.save(official_layout(ours.state_dict()), tmp_path / "pvt_v2_b0.pth")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {
        "log_message": lambda *a: None,
        "__init__": lambda self, *a: http.server.SimpleHTTPRequestHandler.__init__(
            self, *a, directory=str(tmp_path))})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(pvt, "OFFICIAL_URL",
                            f"http://127.0.0.1:{server.server_port}/pvt_v2_{{name}}.pth")
        load_weights(build_pvt("b0", **SMALL), "imagenet", "b0")
        server.shutdown()
    model = build_pvt("b0", **SMALL)
    load_weights(model, "imagenet", "b0")
    assert torch.equal(model.layers[3].norm.weight, ours.layers[3].norm.weight)
    with pytest.raises(ValueError, match="cannot download imagenet's for b3"):
        load_weights(model, "imagenet", "b3")


# --- the network ----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(64, 96), (45, 77)])
def test_maps_equal_the_published_equations(ours, size):
    """All four, from the official names of weights, odd maps included: exactly in float64, to 1e-5
    in float32."""
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    p = official_layout(copy.deepcopy(ours).double().state_dict())
    with torch.no_grad():
        expected = [torch.stack(maps) for maps in zip(*(published_maps(p, x.double())
                                                        for x in image))]
        found, exact = ours(image), copy.deepcopy(ours).double()(image.double())
    for a, b, c in zip(found, exact, expected, strict=True):
        assert a.shape == b.shape == c.shape
        assert (b - c).abs().max() <= 1e-9 * c.abs().max()
        assert (a - c).abs().max() <= 1e-5 * c.abs().max()


def test_gradients_equal_those_of_the_equations(ours):
    """The backward pass agrees too, for every weight."""
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    net = copy.deepcopy(ours).double()
    p = {k: v.clone().requires_grad_() for k, v in official_layout(net.state_dict()).items()}
    for maps in (net(image), published_maps(p, image[0])):
        sum(x.square().sum() for x in maps).backward()
    found = official_layout({k: w.grad for k, w in net.named_parameters()})
    assert found.keys() == p.keys()
    for name, g in found.items():
        if name not in CLASSIFIER:
            assert (g - p[name].grad).abs().max() <= 1e-9 * g.abs().max(), name


@pytest.mark.parametrize("name, backbone, published", [  # published: M, with the classifier
    ("b0", 3_409_760, 3.67), ("b1", 13_496_000, 14.01), ("b2", 24_849_856, 25.36),
    ("b3", 44_725_696, 45.24), ("b4", 62_043_072, 62.56), ("b5", 81_443_008, 81.96)])
def test_parameters_and_strides(name, backbone, published):
    """Every preset's parameters; strides 8, 16, 32, 32 rounded up, also of odd images."""
    with torch.device("meta"):
        model = build_pvt(name)
    assert sum(p.numel() for p in model.parameters()) == backbone
    with_classifier = backbone + (model.channels[-1] + 1) * 1000
    assert round(with_classifier / 1e6, 2) == published
    maps = model(torch.zeros(2, 3, 129, 161, device="meta"))
    assert [m.shape[1:3] for m in maps] == [(17, 21), (9, 11), (5, 6), (5, 6)]
    assert [m.shape[3] for m in maps] == model.channels


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown backbone 'b6'; expected one of b0, b1, b2"):
        build_pvt("b6")


def test_what_is_random_at_the_start():
    """Linear layers by 0.02; convolutions by the outputs that read a weight; all as published."""
    torch.manual_seed(0)
    block = build_pvt("b0").layers[1].blocks[0]
    for weight, std in ((block.mlp.fc1.weight, 0.02), (block.attn.sr.weight, (2 / 1024) ** 0.5),
                        (block.mlp.dwconv.weight, (2 / 9) ** 0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not block.attn.kv.bias.any() and not block.mlp.dwconv.bias.any()


# --- every method on it ---------------------------------------------------------------------------
TREE = [[(0, 1, 2)], [(0, 1), (2,)], [(0, 1), (2,)], [(0,), (1,), (2,)]]
TASKS = [SimpleNamespace(name=n, outputs=o) for n, o in (("a", 4), ("b", 1), ("c", 3))]
METHODS = ["tglora", "mtlora", "mtlora+", "bdta", "full", "decoders"]


def network(method="tglora", tree=TREE, tasks=TASKS, rank=9, layers="attn+mlp", seed=0):
    """A small network whose adapters are not zero."""
    torch.manual_seed(seed)
    config = SimpleNamespace(method=method, layers=layers, rank=rank, last_rank=None,
                             groups=(1,) * 4, dropout=0.0, without=[], reduction=2,
                             fused=(18, 36, 72, 144))
    model = model_py.METHODS[method](filled(build_pvt("b0", **SMALL)), tasks, tree, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_folded_groups_equal_separate_networks():
    """Each task alone, with the adapters of its path through the tree, predicts the same."""
    model, x = network(), torch.randn(2, 3, 49, 75)
    together = model(x)
    for task in TASKS:
        alone = network(tree=[[(0,)]] * 4, tasks=[task], rank=1)
        for s, stage in enumerate(alone.backbone.layers):
            group = model.group_of[task.name][s]
            for name, module in stage.named_modules():
                if hasattr(module, "lora_A"):
                    path = model.backbone.layers[s].get_submodule(name)
                    module.lora_A[0].data = path.lora_A[group].data
                    module.lora_B[0].data = path.lora_B[group].data
        alone.decoders[task.name].load_state_dict(model.decoders[task.name].state_dict())
        torch.testing.assert_close(alone(x)[task.name], together[task.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged(method):
    """Predictions of every method, adapters folded into the weights; without any, nothing to do."""
    model, x = network(method), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before, after = model(x), merge(model)(x)
    for task in before:
        torch.testing.assert_close(after[task], before[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mtlora", "mtlora+"])
def test_mtlora_with_zero_adapters_is_the_frozen_backbone(method):
    """Groups that begin in a stage's last block pass its norm and the next stage's patches."""
    plain, adapted, x = network("decoders"), network(method), torch.randn(2, 3, 64, 96)
    adapted.decoders.load_state_dict(plain.decoders.state_dict())
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    for task, pred in plain(x).items():
        torch.testing.assert_close(adapted(x)[task], pred, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_all_macs_equal_pytorchs_counter(method):
    """The true cost is that of torch's FLOP counter, which counts two a MAC and leaves out biases.
    """
    model, x = network(method, rank=48), torch.randn(1, 3, 113, 130)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, TGLoRALinear)):
            module.bias = None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    assert cost.count_macs(model, (113, 130))["macs_all"] == counter.get_total_flops() / 2


@pytest.mark.parametrize("name, gmacs", [
    ("b0", 0.57), ("b1", 2.1), ("b2", 4.04), ("b3", 6.9), ("b4", 10.1), ("b5", 11.8)])
def test_macs_are_the_published_ones(name, gmacs):
    """At 224x224, with attention's products; what the paper and the public code print."""
    with torch.device("meta"):
        model = build_pvt(name)
    found = cost.count_macs(model, (224, 224))["macs_all"] / 1e9
    assert found == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize("layers, adapted", [
    ("attn", {"attn.q", "attn.kv", "attn.proj"}),
    ("attn+mlp+others", {"attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"})])
def test_only_intended_parameters_are_trained(layers, adapted):
    """Others: patch embeddings, norms and depth-wise convolutions; never the reductions."""
    model = network(layers=layers)
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0].split(".", 4)[-1] for n in trained if "lora_" in n} == adapted
    others = {n for n, _ in model.backbone.named_parameters() if "lora_" not in n and not any(
        part in n for part in ("attn.q", "attn.kv", "attn.proj", "attn.sr", "fc1", "fc2"))}
    assert {n for n in trained if "lora_" not in n} == (others if "others" in layers else set())


def test_mtlora_plus_trains_the_patches_between_stages():
    """They are convolutions, which get no adapter: trained, as in MTLoRA."""
    for name, p in network("mtlora+").backbone.named_parameters():
        if "downsample" in name:
            assert p.requires_grad and "lora_" not in name


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_network_compiles_without_a_graph_break():
    """torch.compile's tracing alone (no C++ compiler): one graph, and the same predictions."""
    model, x = network(), torch.randn(2, 3, 56, 84)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for name, pred in compiled(x).items():
        torch.testing.assert_close(pred, model(x)[name])


# --- through train.py and eval.py -----------------------------------------------------------------
FLAGS = ["--backbone", "pvt_v2_b0", "--batch-size", "4", "--sim-images", "4", "--head-epochs",
         "1", "--device", "cpu", "--log-every", "1"]
ROOMS = [*FLAGS, "--tasks", "semseg,depth,normals", "--size", "32", "--train-rooms", "4",
         "--val-rooms", "2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A file of the official layout that --weights can name."""
    path = tmp_path_factory.mktemp("weights") / "pvt_v2_b0.pth"
    torch.save(official_layout(build_pvt("b0").state_dict()), path)
    return ["--weights", str(path)]


def test_a_run_stops_resumes_merges_and_evaluates(start, tmp_path, monkeypatch, capsys):
    """TGLoRA: similarities, tree, cost, one merged graph, the same results again."""
    best, flags = str(tmp_path / "best.pt"), [*ROOMS, *start, "--epochs", "2"]
    with stopped_after_an_epoch(monkeypatch):
        train.main([*flags, "--out", str(tmp_path)])
    train.main([*flags, "--out", str(tmp_path), "--resume"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [len(stage) for stage in metrics["tree"]] == [1, 1, 2, 3]
    assert metrics["trainable"] == costs(*flags)["trainable"]
    eval.main(["--checkpoint", best, "--merge", str(tmp_path / "m.pt2"), "--device", "cpu"])
    assert "differ from the unmerged ones by at most" in capsys.readouterr().out
    eval.main(["--checkpoint", best, "--json", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["results"] == metrics["results"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_method_trains_on_rooms(start, method, tmp_path):
    """To a checkpoint that is evaluated; what `full` trains can be another run's start."""
    best = str(tmp_path / "best.pt")
    train.main([*ROOMS, *start, "--method", method, "--epochs", "1", "--out", str(tmp_path)])
    eval.main(["--checkpoint", best, "--device", "cpu"])
    if method == "full":
        eval.main(["--checkpoint", best, "--export-backbone", str(tmp_path / "trained.pth")])
        load_weights(build_pvt("b0"), str(tmp_path / "trained.pth"))


@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_it_trains_on_real_images(dataset, request, tmp_path, monkeypatch):
    """From the mini archives, with four tasks or three; the loss falls."""
    archive = request.getfixturevalue(f"{dataset}_archive")
    monkeypatch.chdir(tmp_path)
    train.main([*FLAGS, "--dataset", dataset, "--data-root", str(archive), "--weights", "none",
                "--size", "64", "--workers", "0", "--lr", "3e-3", "--epochs", "5", "--eval-every",
                "5", "--out", "run"])
    lines = [json.loads(x)["loss"] for x in open("run/log.jsonl") if '"lr"' in x]
    assert all(0 < lines[-1][task] < lines[0][task] for task in ("semseg", "normals"))


@pytest.mark.parametrize("flags, message", [
    (["--weights", "torchvision"], "torchvision has none"),
    (["--weights", "imagenet"], "cannot download imagenet's for b0"),
    (["--weights", "none", "--backbone", "pvt_v2_b7"], "unknown backbone 'b7'; expected one of b0")])
def test_a_wrong_choice_ends_in_one_line(flags, message, tmp_path, monkeypatch):
    """What the flags ask for and is not there is said before any work."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pvt, "OFFICIAL_URL", "http://127.0.0.1:9/{name}.pth")
    with pytest.raises(SystemExit) as stop:
        train.main([*ROOMS, *flags, "--out", str(tmp_path / "run")])
    assert message in stop.value.code and "\n" not in stop.value.code
