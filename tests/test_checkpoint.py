"""checkpoint.py and resuming: nothing is lost, whenever and however a run ends."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import eval
import train
from tools import export
from util.checkpoint import (RUN_FILES, check_space, load_optimizer, open_log, read_checkpoint,
                             save, write_json)

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


def read_raw(path):
    return torch.load(path, weights_only=True)


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
        with pytest.raises(ValueError, match="cannot write .*last.pt: File too large; the one"):
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


def test_what_will_be_replaced_is_room_for_its_successor(tmp_path, monkeypatch):
    """A run whose checkpoints take 2 of the 3 MB that it needs goes on with 1 MB free."""
    monkeypatch.setattr("util.checkpoint.shutil.disk_usage",
                        lambda _: type("usage", (), {"free": 1_000_000}))
    (tmp_path / "last.pt").write_bytes(bytes(2_000_000))
    check_space(tmp_path, nn.Linear(300, 300))


def test_what_is_not_finite_is_not_written(tmp_path):
    """Not in the weights, not in the moments; what was there stays."""
    path = tmp_path / "last.pt"
    save(path, {"model": {"w": torch.zeros(3)}, "step": 1})
    for spoiled in ({"model": {"w": torch.tensor([0, float("inf")])}},
                    {"optimizer": {"state": {0: {"exp_avg": torch.tensor([float("nan")])}}}}):
        with pytest.raises(ValueError, match="last.pt was not written: .* after step 2"):
            save(path, {**spoiled, "step": 2})
    assert read_raw(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


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
            "found = [net(torch.zeros(n, 3, 32, 32))['depth'] for n in (1, 3)]\n"
            "print([tuple(x.shape) for x in found], any(x.requires_grad for x in found))\n"
            "print('tglora' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.stdout == "[(1, 1, 32, 32), (3, 1, 32, 32)] False\nFalse\n", done.stderr


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


def refused(by, *flags):
    """The one-line error of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        by.main([*map(str, flags)])
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


def moments(state, i=0):
    return state["optimizer"]["state"][i]


SPOILED = {  # what is done to the state in last.pt
    "moments of 8 numbers less": lambda s: moments(s).update(
        exp_avg=moments(s)["exp_avg"].flatten()[8:]),
    "moments of twice as many": lambda s: moments(s).update(
        exp_avg=torch.cat([moments(s)["exp_avg"]] * 2)),
    "moments of double precision": lambda s: moments(s).update(
        exp_avg_sq=moments(s)["exp_avg_sq"].double()),
    "moments without memory": lambda s: moments(s).update(
        exp_avg=moments(s)["exp_avg"].to("meta")),
    "no moments": lambda s: s["optimizer"].update(state={}),
    "the moments of one weight less": lambda s: s["optimizer"]["state"].pop(3),
    "one moment less": lambda s: moments(s).pop("exp_avg_sq"),
    "another optimizer step": lambda s: moments(s)["step"].add_(1),
    "a loss scale in float32": lambda s: s.update(scaler={"scale": 0.0, "_growth_tracker": 0}),
    "a number for a scaler": lambda s: s.update(scaler=5),
    "losses of four tasks": lambda s: s.update(sums=torch.zeros(4)),
    "a word for losses": lambda s: s.update(sums="none"),
    "logged later than the step": lambda s: s.update(since=99),
    "a step beyond the end": lambda s: s.update(step=99),
    "a word for a step": lambda s: s.update(step="two"),
    "a number for the best": lambda s: s.update(best=5),
    "another best": lambda s: s["best"].update(loss=0.5),
    "a number for the latest": lambda s: s.update(latest=5),
    "a latest without its pixels": lambda s: s["latest"].pop("pixels"),
    "a latest without results": lambda s: s["latest"].update(results={"depth": {"rmse": "x"}}),
    "a number for a tree": lambda s: s.update(tree=5),
    "a tree with an empty group": lambda s: s["tree"][0].append(()),
    "a number for the flags": lambda s: s.update(config=5),
    "no flags": lambda s: s.update(config={"tasks": s["config"]["tasks"]}),
    "a list for weights": lambda s: s.update(model=[1]),
    "a number for a weight": lambda s: s["model"].update(dict.fromkeys(list(s["model"])[:1], 5)),
    **{f"no {key}": lambda s, key=key: s.pop(key) for key in (
        "config", "step", "best", "latest", "sums", "since", "tree", "optimizer", "scaler", "model",
        "fingerprint")}}


@pytest.fixture
def copied(whole, tmp_path):
    """The whole run, in a folder that a test may spoil, and the flags that resume it."""
    run, _, tree = whole
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", [*FLAGS, "--out", str(tmp_path / "run"), "--tree", tree, "--resume"]


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_last_pt_is_refused_in_one_line(copied, what):
    """Fused AdamW would write past the end of its moments' memory, and everything else would end in
    a trace or in a wrong result."""
    out, flags = copied
    state = read_raw(out / "last.pt")
    SPOILED[what](state)
    torch.save(state, out / "last.pt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "last.pt" in refused(train, *flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_fp16_goes_on_after_steps_that_it_left_out():
    """Its scaler skips a step whose gradient overflows, so that the optimizer counts fewer; without
    a scaler that is another run's."""
    def fresh():
        net = nn.Linear(3, 3)
        return net, train.make_optimizer(net, 0.1, 0.0), torch.amp.GradScaler("cpu", 1e38)
    net, optimizer, scaler = fresh()
    for _ in range(2):
        scaler.scale(1e3 * net(torch.ones(3)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": 2}
    assert {float(kept["step"]) for kept in optimizer.state.values()} <= {0.0}
    _, optimizer, scaler = fresh()
    load_optimizer(optimizer, scaler, state)
    assert scaler.state_dict() == state["scaler"] and scaler.get_scale() < 1e38
    with pytest.raises(ValueError, match="optimizer or loss scale"):
        load_optimizer(optimizer, scaler, {**state, "scaler": {}})


@pytest.mark.parametrize("what, change", [
    ("--seed 1, not 0", lambda s: s["config"].update(seed=1)),
    ("--tree", lambda s: s["tree"].__setitem__(2, s["tree"][1])),
    ("another backbone", lambda s: s.update(fingerprint="0" * 16)),
    ("is not the one it knows", lambda s: s.update(step=s["step"] + 4)),
    ("is not the one it knows", lambda s: s["best"].update(loss=0.1)),
    ("1 weights are missing", lambda s: s["model"].popitem()),
    ("no file", None)])
def test_another_runs_best_pt_is_refused(copied, what, change):
    """At the start, not when its weights stand under this run's numbers."""
    out, flags = copied
    if change:
        state = read_raw(out / "best.pt")
        change(state)
        torch.save(state, out / "best.pt")
    else:
        (out / "best.pt").unlink()
    message = refused(train, *flags)
    assert what in message and "best.pt" in message


def test_a_run_goes_on_with_its_own_tree_alone(copied, tmp_path):
    """--resume --tree another.json is no wish to be ignored; without --tree it takes its own."""
    out, flags = copied
    own = tmp_path / "other.json"
    own.write_text(json.dumps({"tree": [TREE[0], TREE[0], [["semseg", "normals"], ["depth"]],
                                        TREE[3]]}))
    at = flags.index("--tree")
    assert "--tree" in refused(train, *flags[:at + 1], own, "--resume")
    train.main([*flags[:at], "--resume"])  # its number of groups is the default's


@pytest.mark.parametrize("name", RUN_FILES)
def test_any_file_of_a_run_is_reason_to_refuse(tmp_path, name):
    """Also where last.pt, which --resume needs, is gone."""
    (tmp_path / name).write_text("precious")
    assert f"already holds a run ({name})" in refused(train, *FLAGS, "--out", tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_two_runs_never_share_a_folder(whole, tmp_path):
    """Neither begun nor resumed beside one that is at work; killed, it leaves no lock behind, even
    while its loader's processes still live."""
    out, flags = tmp_path / "run", ["--tree", whole[2], "--workers", "1", "--epochs", "50"]
    process = start(out, *flags)
    while not (out / "log.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)  # at work, but writing nothing now
    flags += ["--out", out]
    assert "another run is at work" in refused(train, *FLAGS, *flags, "--resume")
    assert "already holds a run" in refused(train, *FLAGS, *flags)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    assert "another run is at work" in refused(train, *FLAGS, *flags)
    process.kill()
    process.join()
    second = start(out, *flags[:-2])
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert second.is_alive()
        time.sleep(0.02)
    second.kill()
    second.join()


@pytest.mark.parametrize("line", ["5", "{}", '{"step": "x"}', "[" * 100_000, "nonsense"])
def test_a_spoiled_log_is_named(copied, line):
    """Not cut where it is spoiled: what follows is kept."""
    out, flags = copied
    log = line + "\n" + (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(log)
    assert "log.jsonl" in refused(train, *flags)
    assert (out / "log.jsonl").read_text() == log


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_refused(whole, tmp_path):
    """20 MB of zeros, compressed to nothing, are never unpacked."""
    state = read_raw(whole[0] / "best.pt")
    torch.save({**state, "zeros": torch.zeros(5_000_000)}, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, \
            zipfile.ZipFile(tmp_path / "best.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    read_checkpoint(tmp_path / "stored.pt")
    message = refused(eval, "--checkpoint", tmp_path / "best.pt")
    assert "best.pt: is damaged, or unpacks to more than it is" in message


STEERING = {
    "val_rooms": 10 ** 12, "rank": 10 ** 9, "last_rank": 10 ** 9, "size": (10 ** 6, 10 ** 6),
    "seed": 10 ** 30, "fused": (10 ** 9,) * 4, "dataset": "/etc", "tasks": "depth", "method": 5,
    "groups": (1, 1), "backbone": "huge", "weights": "/dev/zero", "layers": "all", "amp": None}


@pytest.mark.parametrize("name", STEERING)
def test_the_flags_in_a_checkpoint_are_checked_as_typed_ones(whole, tmp_path, name):
    """Absurd, mistyped or missing: one line that names the file, before anything is built."""
    for value in (STEERING[name], "no such", None):
        state = read_raw(whole[0] / "best.pt")
        state["config"][name] = value
        if value is None:
            del state["config"][name]
        torch.save(state, tmp_path / "bad.pt")
        message = refused(eval, "--checkpoint", tmp_path / "bad.pt", "--device", "cpu")
        assert message.startswith(f"error: {tmp_path / 'bad.pt'}")


def test_a_checkpoint_does_not_steer_the_machine(whole, tmp_path, monkeypatch):
    """Its folder, download, cache and workers are not looked at: they are eval.py's own flags."""
    state = read_raw(whole[0] / "best.pt")
    state["config"].update(data_root=str(tmp_path / "made"), download=True, cache=True,
                           workers=100_000, device="meta", compile=True)
    torch.save(state, tmp_path / "best.pt")
    asked, loader, open_dataset = [], eval.loader, eval.open_dataset

    def load(dataset, batches, workers):
        asked.append((type(dataset).__name__, workers))
        return loader(dataset, batches, 0)

    def open_it(config, split):
        asked.append((config.data_root, config.download))
        return open_dataset(config, split)
    monkeypatch.setattr(eval, "loader", load)
    monkeypatch.setattr(eval, "open_dataset", open_it)
    eval.main(["--checkpoint", str(tmp_path / "best.pt"), "--workers", "3", "--device", "cpu"])
    assert asked == [("data", False), ("Checked", 3)]
    assert not (tmp_path / "made").exists()
