"""parallel.py: two processes on the CPU do what one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_checkpoint import assert_same_run

import train
from util.parallel import Team

ROOT = Path(__file__).parent.parent
FLAGS = ["--tasks", "semseg,depth,normals", "--train-rooms", "16", "--val-rooms", "5", "--size",
         "56", "--epochs", "2", "--batch-size", "4", "--log-every", "1", "--groups", "1,1,1,3",
         "--device", "cpu", "--lr", "1e-4"]
ONE, TWO = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node=2"]


def shell(command, *flags):
    """Run a script as a user does; one thread a process, so that sums are made in one order."""
    done = subprocess.run([*command, ROOT / flags[0], *map(str, flags[1:])], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [list(line["loss"].values()) for line in lines if "lr" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in one process and in two."""
    out = tmp_path_factory.mktemp("parallel")
    shell(ONE, "train.py", *FLAGS, "--out", out / "one")
    text = shell(TWO, "train.py", *FLAGS, "--out", out / "two")
    return out / "one", out / "two", text


def test_two_processes_have_the_losses_of_one(runs):
    """Every step's losses, to 1e-4: the same images, gradients and BatchNorm over all of them."""
    one, two, _ = runs
    assert len(losses(one)) == 8
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-4,
                               atol=1e-5)


ONE_STEP = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, train
from util.parallel import Team
from test_train import OneConvolution, saliency_batch
torch.manual_seed(0)
image, depth = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8) + 1
depth[0, :, 2:] = 0  # one process sees fewer valid pixels
team, net = Team(torch.device("cpu")), OneConvolution()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", enabled=False)
image, labels = team.share(image), {{"depth": team.share(depth)}}
losses = team.sum(train.train_step(team.wrap(net), train.make_tasks(["depth"], 6), optimizer,
                                   scaler, image, labels, 1, 1e9, None, team))
print("answer", *losses.tolist(), *net.conv.weight.flatten().tolist())

net = OneConvolution("sal")
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
image, labels = saliency_batch()
losses = team.sum(train.train_step(team.wrap(net), train.make_tasks(["sal"], 6), optimizer, scaler,
                                   team.share(image), {{"sal": team.share(labels["sal"])}}, 1, 1e9,
                                   None, team))
print("saliency", *losses.tolist(), *net.conv.weight.flatten().tolist())

image = torch.randn(4, 3, 2, 2) * torch.tensor([1., 2, 3]).view(3, 1, 1) + 5
image[1::2] += 1  # one process's images are brighter
net = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
trained = team.wrap(net)
for _ in range(2):
    (trained(team.share(image)) ** 3).mean().backward()
norm = net[0]
print("norm", *norm.running_mean.tolist(), *norm.running_var.tolist(), *norm.weight.grad.tolist(),
      *norm.bias.grad.tolist(), norm.num_batches_tracked.item())
team.close()
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What ONE_STEP prints in one process and in two."""
    path = tmp_path_factory.mktemp("step") / "step.py"
    path.write_text(ONE_STEP.format(root=str(ROOT), tests=str(ROOT / "tests")))
    return [shell(command, path) for command in (ONE, TWO)]


def test_a_step_of_two_processes_is_that_of_one(steps):
    """Plain SGD, so that a gradient of another size would show (Adam hides it): the mean over all
    valid pixels, though one process has fewer of them."""
    one, two = (re.search("answer (.*)", text)[1].split() for text in steps)
    torch.testing.assert_close(torch.tensor([*map(float, two)]), torch.tensor([*map(float, one)]))


def test_saliency_is_balanced_over_all_processes(steps):
    """Its classes weigh as in the whole batch, though the processes' shares differ."""
    one, two = (re.search("saliency (.*)", text)[1].split() for text in steps)
    torch.testing.assert_close(torch.tensor([*map(float, two)]), torch.tensor([*map(float, one)]))


def test_batchnorm_of_two_processes_is_pytorchs_on_the_whole_batch(steps):
    """Running mean and unbiased variance with momentum 0.1, gradients, and the count of steps; 16
    numbers a channel, so that n / (n - 1) shows."""
    one, two = (torch.tensor([*map(float, re.search("norm (.*)", text)[1].split())])
                for text in steps)
    assert len(one) == 13 and one[-1] == 2
    torch.testing.assert_close(two, one)


def test_metrics_of_two_processes_are_exactly_those_of_one(runs):
    """eval.py alone repeats, to the last bit, what two processes found in five images."""
    again = json.loads(shell(ONE, "eval.py", "--checkpoint", runs[1] / "best.pt", "--json",
                             "--device", "cpu"))
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    for key in ("results", "reference", "images", "pixels", "loss"):
        assert again[key] == metrics[key]


def test_only_the_leader_writes(runs):
    """One table on the screen, one line a step in the log, one tree."""
    _, two, text = runs
    assert text.count("best epoch") == 1
    assert len((two / "log.jsonl").read_text().splitlines()) == 8 + 2


def test_a_run_of_one_process_goes_on_in_two(runs, tmp_path):
    """last.pt does not know how many wrote it."""
    one, _, _ = runs
    out = tmp_path / "run"
    stop = ("import sys, train; save = train.save\n"
            "def once(path, state):\n"
            "    save(path, state)\n"
            "    if path.name == 'last.pt' and state['step']: sys.exit()\n"
            "train.save = once; train.main(sys.argv[1:])")
    subprocess.run([sys.executable, "-c", stop, *FLAGS, "--out", out], cwd=ROOT, check=True,
                   capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert len(losses(out)) == 4
    shell(TWO, "train.py", *FLAGS, "--out", out, "--resume")
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(one)), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.slow
def test_two_processes_killed_five_times_end_as_if_nothing_had_happened(tmp_path):
    """SIGKILL for torchrun and all that it started, at ever later lines of the log, also in the
    midst of an epoch; resumed each time, in two processes again: the same to the last bit."""
    flags = [*FLAGS, "--epochs", "5", "--dropout", "0.1"]
    shell(TWO, "train.py", *flags, "--out", tmp_path / "whole")
    out = tmp_path / "run"
    for lines in (2, 7, 11, 18, 22):  # of 25: four steps and an evaluation an epoch
        resume = ["--resume"] * (out / "last.pt").exists()
        team = subprocess.Popen([*TWO, ROOT / "train.py", *map(str, flags), "--out", out, *resume],
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((out / "log.jsonl").exists()
                   and (out / "log.jsonl").read_text().count("\n") >= lines):
            assert team.poll() is None
            time.sleep(0.01)
        children = subprocess.run(["pgrep", "-P", str(team.pid)], capture_output=True, text=True)
        for pid in [team.pid, *map(int, children.stdout.split())]:
            os.kill(pid, signal.SIGKILL)
        team.wait()
    shell(TWO, "train.py", *flags, "--out", out, "--resume")
    assert_same_run(out, tmp_path / "whole")


def test_a_team_of_one_never_touches_torch_distributed(tmp_path, monkeypatch):
    """`python train.py` runs with every function of torch.distributed broken."""
    for name in ("init_process_group", "all_reduce", "all_gather_object", "barrier",
                 "broadcast_object_list", "destroy_process_group"):
        monkeypatch.delattr(f"torch.distributed.{name}")
    train.main([*FLAGS, "--epochs", "1", "--out", str(tmp_path / "run")])


def test_shares_are_dealt_out_and_put_together(monkeypatch):
    """Rank 1 of 3 gets every third item from the second on."""
    monkeypatch.setattr("util.parallel.dist.init_process_group", lambda *a, **k: None)
    monkeypatch.setattr("sys.stdout", sys.stdout)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    team = Team(torch.device("cpu"))
    monkeypatch.setattr("util.parallel.dist.all_gather_object",
                        lambda parts, mine: parts.__setitem__(slice(None), [[0, 3], mine, [2]]))
    assert team.share(list(range(5))) == [1, 4] and team.gather([1, 4]) == [0, 1, 2, 3, 4]
    assert not team.leads


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    """Three images among two processes: an error that names both numbers."""
    done = subprocess.run([*TWO, ROOT / "train.py", *FLAGS, "--batch-size", "3", "--out",
                           tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "a batch of 3 images cannot be shared evenly by 2 processes" in done.stderr
