"""Tests of weights.py: files in the published layouts are loaded completely or not at all.
Downloads come from a local server."""

import argparse
import hashlib
import math
import re

import pytest
import torch
from torchvision.models import Swin_T_Weights
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import weights
from swin import build_swin
from weights import load_weights

SMALL = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def small_swin():
    return build_swin("tiny", **SMALL)


@pytest.fixture(scope="module")
def official():
    """Random weights in the official layout, plus some tensors that load_weights leaves out, which
    belong to the final norm, the classifier and precomputed tables."""
    torch.manual_seed(0)
    state = small_swin().state_dict()
    for key in state:
        state[key] = torch.randn_like(state[key])
    state["norm.weight"] = torch.ones(128)
    state["head.bias"] = torch.zeros(1000)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    return state


def loaded(source, name="tiny"):
    model = small_swin()
    load_weights(model, str(source), name)
    return model.state_dict()


def save(folder, state):
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


def assert_same(state, official):
    for key, value in state.items():
        assert torch.equal(value, official[key]), key


# --- layouts (test_swin.py loads torchvision's) ---------------------------------------------------
@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_official_layout(official, tmp_path, capsys, key):
    """The tensors may be wrapped in a dict, under "model" or "state_dict". The number of loaded
    tensors is printed."""
    path = save(tmp_path, {key: official, "epoch": 3} if key else official)
    assert_same(loaded(path), official)
    count = len(small_swin().state_dict())
    assert f"backbone weights: {count} of {count} tensors loaded from {path}" in (
        capsys.readouterr().out)


def test_timm_layout(official, tmp_path):
    """In timm's layout, patch merging begins a stage, and the classifier has a different name."""
    state = {}
    for key, value in official.items():
        for stage in (0, 1, 2):
            if key.startswith(f"layers.{stage}.downsample"):
                key = key.replace(f"layers.{stage}", f"layers.{stage + 1}")
                break
        state[key.replace("head.", "head.fc.")] = value
    assert_same(loaded(save(tmp_path, state)), official)


# --- errors ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, value, message", [
    ("layers.2.blocks.1.attn.qkv.bias", None, "1 missing: layers.2.blocks.1.attn.qkv.bias"),
    # an unknown name that begins like torchvision's names
    ("features.1", torch.ones(1), "1 unexpected: features.1"),
    ("patch_embed.norm.weight", torch.ones(7),
     r"1 misshapen: patch_embed.norm.weight \(7,\), expected \(16,\)")])
def test_incomplete_weights_are_refused_by_name(official, tmp_path, name, value, message):
    """If one tensor is missing, unexpected or misshapen, the error names it and nothing is loaded.
    """
    state = {**official, name: value}
    if value is None:
        del state[name]
    model = small_swin()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    path = save(tmp_path, state)
    with pytest.raises(ValueError, match=f"weights.pth do not fit this backbone: {message}"):
        load_weights(model, str(path))
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, True, 1, 1j])
def test_only_finite_floating_point_numbers_are_loaded(official, tmp_path, value):
    """NaN, infinity, and tensors of bools, integers or complex numbers are refused by name."""
    name = "patch_embed.norm.weight"
    state = {**official, name: torch.full((16,), value)}
    with pytest.raises(ValueError, match=f"1 not finite floating-point numbers: {name}"):
        loaded(save(tmp_path, state))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone."])
def test_a_prefix_of_all_names_is_named(official, tmp_path, prefix):
    """If all names in a file have a prefix, the error says which one to remove."""
    state = {prefix + key: value for key, value in small_swin().state_dict().items()}
    with pytest.raises(ValueError, match=f"Remove the prefix '{prefix}' from the names"):
        loaded(save(tmp_path, state))


def test_a_file_with_more_than_tensors_says_how_to_mend_it(official, tmp_path):
    """A checkpoint that also holds an object is refused with a line of code that saves its weights.
    """
    path = save(tmp_path, {"model": official, "config": argparse.Namespace(lr=1.0)})
    with pytest.raises(ValueError, match="or holds more than tensors") as error:
        loaded(path)
    code = re.search(r"torch\.save\(.*\)", str(error.value))[0]
    exec(code.replace("'weights.pth'", repr(str(path))))
    assert_same(loaded(path), official)


def test_a_damaged_file_is_refused(official, tmp_path):
    """A file is refused if a bit was flipped, if it is not a checkpoint, or if it holds a list."""
    path = save(tmp_path, official)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    for content in (raw, b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="weights.pth is damaged, or"):
            loaded(path)
    with pytest.raises(ValueError, match="weights.pth holds a list; expected a dict of tensors"):
        loaded(save(tmp_path, [1, 2]))


def test_weights_that_do_not_exist():
    """If a file does not exist, the error lists the allowed sources. If a preset has no published
    weights, the error lists the presets that have some."""
    with pytest.raises(ValueError, match="no file none.pth; expected imagenet, torchvision, or"):
        loaded("none.pth")
    for source in ("imagenet", "torchvision"):
        with pytest.raises(ValueError, match=f"--weights {source} exists only for the backbones "
                                             "tiny, small, base, not for mini"):
            loaded(source, "mini")


# --- downloads ------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Let torch cache downloads in a new folder, and return the path of that folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints"


def test_imagenet_is_downloaded_once(official, monkeypatch, server, cache):
    """The second time, the file comes from torch's cache. The error for a failed download names the
    address."""
    folder, address = server
    path = save(folder, {"model": official}).rename(folder / "swin_tiny.pth")
    monkeypatch.setattr(weights, "OFFICIAL_URL", address + "/swin_{name}.pth")
    assert_same(loaded("imagenet"), official)
    path.unlink()
    assert_same(loaded("imagenet"), official)
    with pytest.raises(ValueError, match=f"cannot download {address}/swin_small.pth: .*404.*"
                                         "--weights PATH, or .* --weights none"):
        loaded("imagenet", "small")


def test_torchvisions_checksum_is_compared(monkeypatch, server, cache):
    """The name of a torchvision file contains the first digits of its checksum. A download with a
    different checksum is not kept, and raises an error."""
    folder, address = server
    path = save(folder, TorchvisionSwin([4, 4], window_size=[7, 7], **SMALL).state_dict())
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(folder / "swin_t-00000000.pth")
    monkeypatch.setattr(Swin_T_Weights, "url", f"{address}/swin_t-00000000.pth")
    with pytest.raises(ValueError, match="swin_t-00000000.pth: invalid hash value"):
        loaded("torchvision")
    assert not list(cache.iterdir())
    path.rename(folder / f"swin_t-{checksum}.pth")
    monkeypatch.setattr(Swin_T_Weights, "url", f"{address}/swin_t-{checksum}.pth")
    loaded("torchvision")


@pytest.mark.parametrize("source, name, url", [
    ("imagenet", "base", "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
                         "swin_base_patch4_window7_224.pth"),
    ("torchvision", "tiny", "https://download.pytorch.org/models/swin_t-704ceda3.pth"),
    ("torchvision", "small", "https://download.pytorch.org/models/swin_s-5e29d889.pth"),
    ("torchvision", "base", "https://download.pytorch.org/models/swin_b-68c6b09e.pth")])
def test_addresses(monkeypatch, source, name, url):
    """Weights are requested from the addresses where they are published."""
    asked = []

    def fetch(url):
        asked.append(url)
        raise ValueError("no network in tests")
    monkeypatch.setattr(weights, "fetch", fetch)
    with pytest.raises(ValueError, match="no network"):
        loaded(source, name)
    assert asked == [url]
