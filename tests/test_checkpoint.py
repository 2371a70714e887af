"""checkpoint.py and resuming: nothing is lost, whenever and however a run ends."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import eval
import train
from tools import export
from util.checkpoint import check_space, open_log, read_checkpoint, save, write_json

ROOT = Path(__file__).parent.parent
TREE = [[["semseg", "depth", "normals"]]] * 2 + [[["semseg", "depth"], ["normals"]],
                                               [["semseg"], ["depth"], ["normals"]]]
FLAGS = ["--tasks", "semseg,depth,normals", "--train-rooms", "8", "--val-rooms", "3", "--size",
         "32", "--rank", "6", "--epochs", "3", "--batch-size", "2", "--dropout", "0.1",
         "--drop-path", "0.1", "--device", "cpu", "--log-every", "3"]
# Children are forked from a server that has imported torch already: 20 runs in seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def child(flags):
    """A run in a process of its own, quiet, on one thread so that it is the same every time."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    train.main(flags)


def start(out, *flags):
    resume = ["--resume"] if (out / "last.pt").exists() else []
    process = FORKS.Process(target=child, args=([*FLAGS, "--out", str(out), *flags, *resume],))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, the seconds it took, and the tree that all runs use."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tree.json").write_text(json.dumps({"tree": TREE}))
    start(folder / "warm", "--tree", str(folder / "tree.json")).join()  # the server is there now
    began = time.monotonic()
    process = start(folder / "run", "--tree", str(folder / "tree.json"))
    process.join()
    assert process.exitcode == 0
    return folder / "run", time.monotonic() - began, str(folder / "tree.json")


def equal(a, b):
    """The same plain data and bit-identical tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(out, whole):
    """Weights, optimizer, log and metrics, to the last bit."""
    first, again = (torch.load(p / "last.pt", weights_only=True) for p in (whole, out))
    for state in (first, again):
        del state["config"]["out"]
    assert equal(first, again)
    for name in ("log.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    best = [torch.load(p / "best.pt", weights_only=True)["model"] for p in (whole, out)]
    assert equal(*best)
    assert not list(out.glob("*.tmp"))


def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(whole, tmp_path):
    """SIGKILL at 20 random moments, in epochs, evaluations and writes, then resumed each time."""
    run, seconds, tree = whole
    generator, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        out, runs = tmp_path / str(runs), runs + 1
        while True:
            process = start(out, "--tree", tree)
            if kills < 20:
                process.join(generator.uniform(0.1, seconds))
            else:
                process.join()
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0
        assert_same_run(out, run)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(whole, tmp_path, monkeypatch):
    """Half a file beside the name, then nothing: the run goes on from the checkpoint before."""
    run, _, tree = whole
    out, writes = tmp_path / "run", []

    def half(state, file, *a):
        writes.append(file)
        if len(writes) == 5:  # the first epoch's best.pt and last.pt are whole
            file.write(b"half")
            file.flush()
            raise KeyboardInterrupt  # like a kill, nothing is tidied up
        return torch_save(state, file, *a)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", half)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--out", str(out), "--tree", tree])
    torch.set_num_threads(threads)
    assert list(out.glob("*.tmp")) and read_checkpoint(out / "last.pt")["step"] == 4
    start(out, "--tree", tree).join()
    assert_same_run(out, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_signal_finishes_the_step_and_saves(whole, tmp_path, number, workers):
    """The message says how far it came; resumed, also with its loader in a process of its own, the
    run ends as if nothing had happened: the losses since the last log line are kept too."""
    run, _, tree = whole
    out = tmp_path / "run"
    command = ("import signal, sys, torch, train\n"
               "torch.set_num_threads(1)\n"
               "step = train.train_step\n"
               "def noticed(*a):\n"
               "    noticed.count += 1\n"
               f"    if noticed.count == 5: signal.raise_signal({int(number)})\n"
               "    return step(*a)\n"
               "noticed.count = 0\n"
               "train.train_step = noticed\n"
               "train.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", command, *FLAGS, "--out", out, "--tree", tree,
                           "--workers", workers], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"stopped by {signal.Signals(number).name} after step 5 of 12" in done.stderr
    assert done.stderr.count("\n") == 1
    assert read_checkpoint(out / "last.pt")["step"] == 5
    start(out, "--tree", tree).join()
    first, again = (torch.load(p / "last.pt", weights_only=True) for p in (run, out))
    assert equal(first["model"], again["model"]) and equal(first["optimizer"], again["optimizer"])
    assert (out / "log.jsonl").read_text() == (run / "log.jsonl").read_text()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_same_command_gives_the_same_run_for_any_number_of_workers(whole, tmp_path, workers):
    """To the last bit, on the CPU."""
    run, _, tree = whole
    start(tmp_path / "run", "--tree", tree, "--workers", workers).join()
    assert (tmp_path / "run/log.jsonl").read_text() == (run / "log.jsonl").read_text()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A write that fails half way: one sentence, the file before it untouched, nothing beside."""
    path = tmp_path / "last.pt"
    save(path, {"x": torch.zeros(10)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel refuses more
    try:
        with pytest.raises(ValueError, match="cannot write .*last.pt.*the one before is as it was"):
            save(path, {"x": torch.zeros(10 ** 6)})
        with pytest.raises(ValueError, match="cannot write .*other.json") as error:
            write_json(tmp_path / "other.json", {"x": "y" * 10 ** 6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_too_little_space_is_said_before_training(tmp_path, monkeypatch):
    """Both numbers are named; nothing of the run is there."""
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("util.checkpoint.shutil.disk_usage",
                        lambda _: type("usage", (), {"free": 1_000_000, "total": usage.f_blocks}))
    with pytest.raises(ValueError, match="1 MB free, the checkpoints need 3 MB"):
        check_space(tmp_path, nn.Linear(300, 300))
    with pytest.raises(SystemExit, match="make room or choose another --out"):
        train.main([*FLAGS, "--out", str(tmp_path / "run"), "--groups", "1,1,1,3"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_unwritable_folder_is_said_before_training(tmp_path):
    """--out inside something that is no folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: .*file"):
        train.main([*FLAGS, "--out", str(tmp_path / "file" / "run"), "--groups", "1,1,1,3"])


def test_a_log_is_cut_where_the_run_goes_on(tmp_path):
    """Later lines, and one that a crash cut short, are gone; earlier ones stay as they are."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    open_log(path, 3).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    open_log(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_a_checkpoint_holds(whole):
    """Trained weights, flags, tree, versions, fingerprint; only last.pt has the optimizer."""
    best, last = (read_checkpoint(whole[0] / name) for name in ("best.pt", "last.pt"))
    assert best["config"]["tasks"] == ["semseg", "depth", "normals"] and len(best["tree"]) == 4
    assert best["versions"]["torch"] == torch.__version__ and len(best["fingerprint"]) == 16
    assert "optimizer" not in best and "optimizer" in last
    assert not [k for k in best["model"] if k.endswith("qkv.weight")]


class Hostile:
    """Unpickling runs a command."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch):
    """It is refused before any of its code runs."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Hostile(), "config": {}, "tree": [], "fingerprint": ""}, "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is not a checkpoint"):
        read_checkpoint(Path("bad.pt"))
    assert not Path("hacked").exists()


def test_a_merged_model_needs_no_code_of_ours(whole, tmp_path, capsys):
    """eval.py --merge: a graph that a process without this repository runs, for any batch."""
    path = tmp_path / "merged.pt2"
    eval.main(["--checkpoint", str(whole[0] / "best.pt"), "--merge", str(path)])
    assert "differ from the unmerged ones by at most" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="merged.pt2 exists already"):
        eval.main(["--checkpoint", str(whole[0] / "best.pt"), "--merge", str(path)])
    code = ("import sys, torch\n"
            f"net = torch.export.load({str(path)!r}).module()\n"
            "print([tuple(net(torch.zeros(n, 3, 32, 32))['depth'].shape) for n in (1, 3)])\n"
            "print('tglora' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.stdout == "[(1, 1, 32, 32), (3, 1, 32, 32)]\nFalse\n", done.stderr


def test_a_wrong_merge_is_noticed(whole, tmp_path, monkeypatch):
    """Verified on the spot: an error with the difference, and no file."""
    merge = export.merge

    def wrong(model):
        model.backbone.layers[0].blocks[0].mlp.fc1.scale = 3.0
        return merge(model)
    monkeypatch.setattr(export, "merge", wrong)
    with pytest.raises(SystemExit, match="the merged network differs by"):
        eval.main(["--checkpoint", str(whole[0] / "best.pt"), "--merge", str(tmp_path / "m.pt2")])
    assert not (tmp_path / "m.pt2").exists()
