"""swin.py against torchvision's Swin, and its loading of published weight layouts."""

import hashlib
import http.server
import threading

import pytest
import torch
import torchvision

import swin
from swin import PRESETS, SHA384, build_swin, load_weights


@pytest.fixture(scope="module")
def theirs():
    """torchvision's Swin-T with random weights, large enough that a mistake shows."""
    torch.manual_seed(0)
    model = torchvision.models.swin_t(weights=None).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module")
def official(theirs):
    """The same weights, in the layout of the official checkpoint, classifier included."""
    state = build_swin().state_dict()
    for key, value in theirs.state_dict().items():
        part = key.split(".")
        if part[0] != "features" or "index" in key:
            continue
        i, rest = int(part[1]), ".".join(part[2:])
        if i == 0:
            name = {"0": "patch_embed.proj.", "2": "patch_embed.norm."}[part[2]] + part[3]
        elif i % 2:
            name = f"layers.{i // 2}.blocks." + rest.replace("mlp.0", "mlp.fc1").replace(
                "mlp.3", "mlp.fc2")
        else:
            name = f"layers.{i // 2 - 1}.downsample.{rest}"
        assert name in state
        state[name] = value.clone()
    extra = {"norm.weight": torch.ones(768), "norm.bias": torch.zeros(768),
             "head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000),
             "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
             "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    return {**state, **extra}


def timm_layout(official):
    """timm keeps the names, but merges patches at the start of the next stage."""
    return {(f"layers.{int(k.split('.')[1]) + 1}." + k.split(".", 2)[2] if "downsample" in k else
             k.replace("head.", "head.fc.")): v for k, v in official.items()}


def loaded(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = build_swin().eval()
    report = load_weights(model, str(path))
    assert report["matched"] == report["total"] == len(model.state_dict())
    return model


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (480, 640), (225, 337)])
def test_features_equal_torchvision(theirs, official, tmp_path, size):
    """All four maps agree to 1e-4, padded windows and odd maps included."""
    model = loaded(tmp_path, official)
    torch.manual_seed(1)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        ours, theirs_x = model(x), x
        expected = []
        for i, layer in enumerate(theirs.features):
            theirs_x = layer(theirs_x)
            if i in (2, 4, 6, 7):
                expected.append(theirs_x)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_gradients_equal_torchvision(theirs, official, tmp_path):
    """The backward pass agrees too, for a weight of the first and of the last stage."""
    model = loaded(tmp_path, official)
    x = torch.randn(1, 3, 112, 140)
    model(x)[-1].square().mean().backward()
    theirs.features(x).square().mean().backward()
    for ours, name in ((model.layers[0].blocks[1].attn.relative_position_bias_table,
                        "features.1.1.attn.relative_position_bias_table"),
                       (model.layers[3].blocks[0].mlp.fc1.weight, "features.7.0.mlp.0.weight")):
        g = theirs.get_parameter(name).grad
        assert (ours.grad - g).abs().max() <= 1e-3 * g.abs().max()


def test_three_layouts_load_to_the_same_model(theirs, official, tmp_path):
    """Official (with its wrapper), torchvision and timm files give equal state dicts."""
    models = [loaded(tmp_path, state) for state in
              ({"model": official}, theirs.state_dict(), timm_layout(official))]
    for other in models[1:]:
        for key, value in models[0].state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("layers.2.blocks.3.attn.qkv.bias"),
     "1 missing: layers.2.blocks.3.attn.qkv.bias"),
    (lambda s: s.update(surplus=torch.ones(1)), "1 unexpected: surplus"),
    (lambda s: s.update({"patch_embed.norm.weight": torch.ones(7)}),
     r"1 misshapen: patch_embed.norm.weight \(7,\), expected \(96,\)"),
])
def test_incomplete_weights_are_refused_by_name(official, tmp_path, change, message):
    """One tensor missing, extra or misshapen: nothing is loaded and the name is told."""
    state = dict(official)
    change(state)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = build_swin()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, str(path))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_files_without_checksums_are_compared_or_named(official, tmp_path, monkeypatch, capsys):
    """The format before PyTorch 1.6: a file of the official name has its hash, or a flipped bit has
    it refused; of any other a note says that damage would not be seen."""
    path = tmp_path / "swin_tiny_patch4_window7_224.pth"
    torch.save({"model": official}, path, _use_new_zipfile_serialization=False)
    digest = hashlib.sha384(path.read_bytes()).hexdigest()
    monkeypatch.setattr(swin, "SHA384", {path.name: digest[:48]})
    load_weights(build_swin(), str(path))
    assert "note" not in capsys.readouterr().out
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="or is damaged"):
        load_weights(build_swin(), str(path))
    load_weights(build_swin(), str(path.rename(tmp_path / "other.pth")))
    assert "other.pth is of a format without checksums" in capsys.readouterr().out
    assert SHA384 == {path.name: "210021216e1f205617d885836b1ac59d725b8c41dbff8dc4"}


def test_imagenet_is_downloaded_once_and_cached(official, tmp_path, monkeypatch):
    """"imagenet" fetches the release file by HTTP; the second time needs no server."""
    torch.save({"model": official}, tmp_path / "swin_tiny.pth")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {
        "log_message": lambda *a: None,
        "__init__": lambda self, *a: http.server.SimpleHTTPRequestHandler.__init__(
            self, *a, directory=str(tmp_path))})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/swin_{{name}}.pth"
        monkeypatch.setattr(swin, "OFFICIAL_URL", url)
        load_weights(build_swin(), "imagenet")
        server.shutdown()
    model = build_swin()
    load_weights(model, "imagenet")
    with pytest.raises(ValueError, match="cannot download imagenet's for small"):
        load_weights(build_swin("small"), "imagenet", "small")
    assert torch.equal(model.patch_embed.norm.weight, official["patch_embed.norm.weight"])


def test_parameters_and_strides():
    """Swin-Tiny without norm and classifier has 27,517,818 parameters; the presets all run."""
    assert sum(p.numel() for p in build_swin("tiny").parameters()) == 27_517_818
    for name in PRESETS:
        with torch.device("meta"):
            model = build_swin(name)
        maps = model(torch.zeros(2, 3, 128, 160, device="meta"))
        assert [m.shape[1:3] for m in maps] == [(16, 20), (8, 10), (4, 5), (4, 5)]
        assert [m.shape[3] for m in maps] == model.channels
    with pytest.raises(ValueError, match="unknown backbone 'huge'"):
        build_swin("huge")
