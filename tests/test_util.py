"""Tests of util.py: files are written completely or not at all, and errors are one line long.

A checkpoint is loaded only if it fits the network, and progress is shown.
"""

import json
import math
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import util
from util import (all_finite, amp_dtype, fingerprint, load_trained, one_line_errors,
                  pick_device, progress, read_checkpoint, reading, save, to_json, trained_state,
                  write_whole)


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    """If the disk is full, the error names the file, and the old file is kept.

    The temporary file is removed.
    """
    path = tmp_path / "last.pt"
    write_whole(path, b"first")

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write .*last.pt: No space left on device"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_never_saved(bad, tmp_path):
    """`save` refuses NaN and infinity in the weights and in the optimizer's nested state."""
    good = {"step": 3, "model": {"w": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(1)}}}
    assert all_finite(good)
    for where in (good["model"], good["optimizer"]["state"]):
        key, value = next(iter(where.items()))
        where[key] = torch.tensor([1.0, bad])
        with pytest.raises(ValueError, match="not finite after step 3"):
            save(tmp_path / "last.pt", good)
        where[key] = value
    assert not list(tmp_path.iterdir())


def test_json_is_strict():
    """`to_json` writes a number that is not finite as null."""
    text = to_json({"a": math.nan, "b": [math.inf, 1.5]})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


def test_a_checkpoint_runs_no_code(tmp_path):
    """`read_checkpoint` refuses any object but tensors and plain data: it might run code."""
    torch.save({"model": Namespace()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt is damaged, or is not a checkpoint"):
        read_checkpoint(tmp_path / "last.pt")


def test_a_checkpoint_only_fits_its_own_backbone():
    """`load_trained` replaces the trained weights.

    It refuses a model with different frozen weights, and trained weights of the wrong shape.
    """
    def network():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.BatchNorm1d(1))
        model[0].requires_grad_(False)
        return model

    model = network()
    state = {"model": trained_state(model), "fingerprint": fingerprint(model), "config": {}}
    assert set(state["model"]) == {"1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean",
                                   "2.running_var", "2.num_batches_tracked"}
    other = network()
    other[1].weight.data += 1
    assert fingerprint(other) == state["fingerprint"]
    load_trained(other, state, Path("best.pt"))
    assert torch.equal(other[1].weight, model[1].weight)
    other[0].weight.data[0, 0] += 1e-6
    with pytest.raises(ValueError, match="best.pt was trained on a different backbone"):
        load_trained(other, state, Path("best.pt"))
    state["model"]["1.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="1 weights are missing, unknown or have the wrong shape"):
        load_trained(model, state, Path("best.pt"))


def test_errors_while_reading_name_the_file(tmp_path):
    """`reading` puts the file's name in front of a ValueError's message.

    Any other error becomes one line with the file's name and the error's type.
    """
    path = tmp_path / "tree.json"
    with pytest.raises(ValueError, match="no file .*tree.json; expected a tree"):
        with reading(path, "a tree"):
            pass
    path.write_text("")
    with pytest.raises(ValueError, match="tree.json: has no stages"):
        with reading(path, "a tree"):
            raise ValueError("has no stages")
    with pytest.raises(ValueError) as error:
        with reading(path, "a tree"):
            raise KeyError("tree\nsecond line")
    assert "is damaged, or is not a tree (KeyError" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_input_ends_a_program_without_a_traceback():
    """For bad input, only the message is printed, even if the error comes from a data worker.

    An error of another type is a bug and keeps its traceback.
    """
    with pytest.raises(SystemExit, match="^error: no such task$"):
        with one_line_errors():
            raise ValueError("no such task")
    worker = ("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent "
              "call last):\n  File x\nValueError: sample 3: bad depth\nin metres")
    with pytest.raises(SystemExit, match="^error: sample 3: bad depth\nin metres$"):
        with one_line_errors():
            raise ValueError(worker)
    with pytest.raises(TypeError):
        with one_line_errors():
            raise TypeError("a bug")


def test_progress_yields_everything_and_shows_the_time_left(capsys, monkeypatch):
    """If stdout is not a terminal, `progress` prints a line at most every 5 seconds and at the end.

    Work that takes less than 5 seconds prints nothing.
    """
    now = [0.0]
    monkeypatch.setattr(util.time, "monotonic", lambda: now[0])
    seen = []
    for item in progress(iter(range(4)), "gradients", total=4):
        seen.append(item)
        now[0] += 4
    assert seen == [0, 1, 2, 3]
    assert capsys.readouterr().out.splitlines() == [
        "gradients: 2 of 4, 0:00:08 left", "gradients: 4 of 4, 0:00:00 left"]
    list(progress([1, 2], "short"))
    assert capsys.readouterr().out == ""


def test_devices_and_precisions():
    """If a device cannot be used, the error names it. On a CPU, --amp auto means float32."""
    cpu = pick_device("cpu")
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used"):
            pick_device(name)
    assert amp_dtype("auto", cpu) is None and amp_dtype("off", cpu) is None
    assert amp_dtype("bf16", cpu) is torch.bfloat16 and amp_dtype("fp16", cpu) is torch.float16


@pytest.mark.parametrize("emulated, expected", [(True, torch.float16), (False, torch.bfloat16)])
def test_auto_uses_bf16_only_on_a_gpu_that_has_it(monkeypatch, emulated, expected):
    """--amp auto picks bf16 on a GPU that supports it, and fp16 on one that would emulate it."""
    def supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert amp_dtype("auto", torch.device("cuda")) is expected
