"""util.py: files are whole or absent, errors are one line, progress is shown."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import util
from util import (all_finite, amp_dtype, fingerprint, load_optimizer, load_trained, one_line_errors,
                  pick_device, progress, read_checkpoint, reading, save, to_json, trained_state,
                  write_whole)


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    """On a full disk, the error names the file, and no temporary file stays behind."""
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
    """Weights and the optimizer's nested state are both checked."""
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
    """A number that is not finite becomes null."""
    text = to_json({"a": math.nan, "b": [math.inf, 1.5]})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    """Only tensors and plain data are read from a checkpoint."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "last.pt")
    with pytest.raises(ValueError, match="last.pt is damaged, or is not a checkpoint"):
        read_checkpoint(Path("last.pt"))
    assert not Path("trap").exists()


def test_a_checkpoint_only_fits_its_own_backbone():
    """The fingerprint covers names and values of frozen weights, and not the trained ones."""
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
    with pytest.raises(ValueError, match="1 weights are missing, unknown or of another shape"):
        load_trained(model, state, Path("best.pt"))


def test_an_optimizer_of_another_shape_is_refused():
    """Moments must have the shapes of the parameters; AdamW itself does not check that."""
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p])
    p.sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    load_optimizer(torch.optim.AdamW([nn.Parameter(torch.ones(4))]), saved, Path("last.pt"))
    with pytest.raises(ValueError, match="last.pt: the optimizer's exp_avg number 0"):
        load_optimizer(torch.optim.AdamW([nn.Parameter(torch.ones(5))]), saved, Path("last.pt"))


def test_errors_while_reading_name_the_file(tmp_path):
    """Our own messages are kept, and any other error becomes one line with its type."""
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


def test_a_program_ends_with_one_line_on_bad_input():
    """An error from a data worker loses its traceback, and a bug keeps it."""
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
    """In a log file, a line appears every 5 seconds and at the end."""
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
    """The error names a missing device; a CPU uses mixed precision only if asked to."""
    cpu = pick_device("cpu")
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used"):
            pick_device(name)
    assert amp_dtype("auto", cpu) is None and amp_dtype("off", cpu) is None
    assert amp_dtype("bf16", cpu) is torch.bfloat16 and amp_dtype("fp16", cpu) is torch.float16
