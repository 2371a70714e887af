"""Tests of examples/several_gpus.py: two processes on a CPU train as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval
import train

ROOT = Path(__file__).parent.parent
FLAGS = ["--tasks", "depth,normals", "--train-rooms", "8", "--val-rooms", "3", "--size", "32",
         "--epochs", "1", "--batch-size", "2", "--no-flip", "--device", "cpu", "--log-every", "1"]


def torchrun(*flags):
    """Run the example in two processes of one thread each. Returns exit code, stdout, stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "examples.several_gpus", *FLAGS, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_train_as_two_parts_of_a_batch(tmp_path, capsys):
    """Two processes end with the same weights as one process with --accumulate 2, up to rounding.

    eval.py reads the checkpoint. A batch that two processes cannot share evenly is refused, and so
    are flags without a known tree.
    """
    train.main([*FLAGS, "--groups", "1,1,2,2", "--accumulate", "2", "--out", str(tmp_path / "one")])
    tree = tmp_path / "one/tree.json"
    code, text, error = torchrun("--tree", tree, "--out", tmp_path / "two")
    assert code == 0, error
    assert text.count("step 4/4") == text.count("best.pt") == 1
    one = torch.load(tmp_path / "one/last.pt", weights_only=True)["model"]
    two = torch.load(tmp_path / "two/best.pt", weights_only=True)["model"]
    for name, value in two.items():
        # Three kinds of values may differ. BatchNorm cancels the bias of the layer before it, so
        # the gradient of that bias is only rounding error. BatchNorm's statistics and counter cover
        # both parts of a batch with one process, but only the first process's part with two.
        if not any(part in name for part in ("head.0.bias", "running", "num_batches")):
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-5, msg=name)
    capsys.readouterr()
    eval.main(["--checkpoint", str(tmp_path / "two/best.pt"), "--device", "cpu"])
    assert capsys.readouterr().out.startswith("3 images at 32x32")

    code, _, error = torchrun("--tree", tree, "--out", tmp_path / "odd", "--batch-size", "3")
    assert code != 0 and "a batch of 3 images cannot be shared evenly by 2 processes" in error
    code, _, error = torchrun("--out", tmp_path / "unknown", "--tasks",
                              "depth,normals,sal", "--groups", "1,1,2,3")
    assert code != 0 and "the tree must be known" in error
