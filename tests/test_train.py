"""Tests of train.py: a run writes its files, can be resumed, takes correct steps, and refuses bad
input.

Most tests call `train.main` with flags, as a user would, on a few small images of rooms.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eval
import train
from grouping import build_tree
from model import build
from recipes import parse_arguments
from tasks import make_tasks

ROOT = Path(__file__).parent.parent
# A run with these flags trains a small network for two epochs, which takes about two seconds.
SMALL = ["--tasks", "semseg,depth,normals", "--train-rooms", "8", "--val-rooms", "3", "--size",
         "32", "--rank", "6", "--epochs", "2", "--batch-size", "4", "--dropout", "0.1",
         "--drop-path", "0.1", "--device", "cpu", "--log-every", "1"]
ALL = ["semseg", "depth", "normals"]
TREE = [[ALL], [ALL], [["semseg", "depth"], ["normals"]], [[task] for task in ALL]]


def run(*flags):
    return train.main([*SMALL, *map(str, flags)])


def refused(*flags, main=train.main, small=SMALL):
    """Check that `main` with `small` and `flags` exits with a one-line error. Returns the error."""
    with pytest.raises(SystemExit) as stop:
        main([*small, *map(str, flags)])
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run train.py once without interruption. Returns the run's folder and its metrics."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run("--out", out)


@pytest.fixture
def tree_file(tmp_path):
    path = tmp_path / "given_tree.json"
    path.write_text(json.dumps({"tree": TREE}))
    return path


def read(path):
    return torch.load(path, weights_only=True)


def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal(a, b):
    """Whether two nested structures are equal; tensors must be exactly equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(out, other):
    """Check that two runs left equal checkpoints, logs, metrics and trees.

    Also check that the folder `out` holds no temporary file.
    """
    for name in ("last.pt", "best.pt"):
        assert equal(read(out / name), read(other / name)), name
    for name in ("log.jsonl", "metrics.json", "tree.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(out.glob("*.tmp"))


def interrupt_after(monkeypatch, function, calls):
    """Patch train.<function> so that call number `calls` ends with a simulated Ctrl-C."""
    real, count = getattr(train, function), [0]

    def called(*args, **kwargs):
        result = real(*args, **kwargs)
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return result
    monkeypatch.setattr(train, function, called)


# --- the files of a run ---------------------------------------------------------------------------
def test_a_run_leaves_its_results(whole):
    """A run writes metrics, its tree, a log, pictures, and a best.pt without frozen weights."""
    out, returned = whole
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))          # `main` returns the file's content
    for key in ("results", "reference"):
        assert set(metrics[key]) == set(ALL)
        assert 0 < metrics[key]["depth"]["rmse"] < 10
    assert metrics["trainable"] == metrics["adapters"] + metrics["decoders"] + metrics["others"]
    assert metrics["dataset"] == "rooms" and metrics["flags"]["rank"] == 6
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["images"] == 3
    assert [len(stage) for stage in metrics["tree"]] == [1, 1, 2, 3]
    tree = json.loads((out / "tree.json").read_text())
    assert tree["tree"] == metrics["tree"] and np.array(tree["similarity"]).shape == (3, 3)

    lines = log_lines(out)
    evaluations = [line for line in lines if "results" in line]
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
    assert [line["epoch"] for line in evaluations] == [1, 2]
    best = min(evaluations, key=lambda line: line["loss"])
    assert metrics["epoch"] == best["epoch"] and metrics["results"] == best["results"]
    assert metrics["last"] == evaluations[-1]
    for name in ("predictions.png", "curves.png", "tree.png"):
        assert (out / name).stat().st_size > 1000
    names = [name for name in read(out / "best.pt")["model"] if name.startswith("backbone.")]
    assert names and all("lora_" in name for name in names)     # no frozen weights


def test_a_given_tree_replaces_the_similarity_and_gives_the_same_run(whole, tmp_path, capsys):
    """With a run's tree.json as --tree, no similarity is measured.

    The trained weights are exactly those of that run.
    """
    out, _ = whole
    run("--out", tmp_path / "again", "--tree", out / "tree.json")
    assert "similarity:" not in capsys.readouterr().out
    assert json.loads((tmp_path / "again/tree.json").read_text())["similarity"] is None
    assert read(tmp_path / "again/last.pt")["config"]["groups"] == (1, 1, 2, 3)
    assert equal(read(out / "last.pt")["model"], read(tmp_path / "again/last.pt")["model"])


def test_tree_only_ends_with_the_same_tree(whole, tmp_path):
    """--tree-only writes only tree.png and tree.json. This tree.json equals that of a full run."""
    out, _ = whole
    result = run("--out", tmp_path / "run", "--tree-only")
    again = json.loads((tmp_path / "run/tree.json").read_text())
    assert again == json.loads((out / "tree.json").read_text()) == json.loads(json.dumps(result))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tree.json", "tree.png"]
    message = refused("--out", tmp_path / "run")
    assert "already exists" in message and "--resume" not in message    # no last.pt to resume


def test_a_baseline_gives_delta_m_and_must_be_of_the_same_images(whole, tmp_path, capsys):
    """A run whose baseline is an identical run has a delta-m of 0 (eq. 7).

    A baseline from another dataset, or from other validation images, is an error.
    """
    out, _ = whole
    metrics = run("--out", tmp_path / "run", "--baseline", out / "metrics.json", "--tree",
                  out / "tree.json")
    assert metrics["delta_m"] == pytest.approx(0, abs=1e-9)
    assert "delta-m +0.00 %" in capsys.readouterr().out
    for dataset in ("nyud", "pascal"):
        path = ROOT / f"baselines/{dataset}.json"
        message = refused("--out", tmp_path / "other", "--baseline", path)
        assert f"has dataset {dataset}, but this run has dataset rooms" in message
    for flags, message in ((["--val-rooms", "2"], "number of images 3, but this run has number of"),
                           (["--size", "40"], "has size [32, 32], but this run has size [40, 40]"),
                           (["--no-night"], "has night True, but this run has night False")):
        flags = [*flags, "--out", tmp_path / "other", "--baseline", out / "metrics.json"]
        assert message in refused(*flags)


@pytest.mark.parametrize("rmse", [0, None])
def test_a_baseline_needs_a_number_above_0_for_every_task(rmse, tmp_path):
    """A metric that is 0 or null (NaN) in the baseline is an error that names it."""
    path = tmp_path / "baseline.json"
    results = {"semseg": {"mIoU": 0.5}, "depth": {"rmse": rmse}, "normals": {"mean": 20}}
    path.write_text(json.dumps({"results": results}))
    message = refused("--out", tmp_path / "run", "--baseline", path)
    assert f"--baseline {path} needs depth's rmse, a number above 0" in message


def test_the_best_epoch_is_kept_when_later_ones_are_worse(whole, tmp_path, monkeypatch):
    """If the first epoch has the higher score, best.pt and the results are those of that epoch."""
    monkeypatch.setattr(train, "validation_score", lambda result: -result["epoch"])
    metrics = run("--out", tmp_path / "run", "--tree", whole[0] / "tree.json")
    assert metrics["epoch"] == 1 and metrics["last"]["epoch"] == 2
    assert read(tmp_path / "run/best.pt")["step"] == 2


@pytest.mark.parametrize("delta_m, loss, score", [
    (1.5, 9.0, 1.5), (None, 9.0, -9.0), (math.nan, 9.0, -9.0), (None, math.nan, -math.inf)])
def test_the_validation_score_is_delta_m_or_minus_the_loss(delta_m, loss, score):
    """The score is delta-m. If delta-m is missing or NaN, the score is minus the loss.

    If the loss is NaN too, the score is -inf.
    """
    result = {"loss": loss} if delta_m is None else {"loss": loss, "delta_m": delta_m}
    assert train.validation_score(result) == score


# --- interruptions --------------------------------------------------------------------------------
def test_an_interrupted_run_ends_as_an_uninterrupted_one(whole, tmp_path, monkeypatch, capsys):
    """A run that is interrupted in its second epoch and then resumed equals an uninterrupted run.

    Checkpoints must be equal exactly. Log lines of steps after the step of last.pt are dropped.
    """
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, "train_step", 3)
        with pytest.raises(SystemExit) as stop:
            run("--out", out)
    assert stop.value.code == 130               # as a shell does after Ctrl-C
    assert f"interrupted; --out {out} --resume continues" in capsys.readouterr().err
    assert len(log_lines(out)) == 3 and read(out / "last.pt")["step"] == 2
    (out / "tree.json").unlink()                # as if the run had stopped before writing the tree
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lost": true}\n{"step": 4, "cut of')
    train.main(["--resume", "--out", str(out)])                 # last.pt holds the other flags
    assert_same_run(out, whole[0])


def test_a_resumed_run_needs_no_file_but_its_own(whole, tmp_path, monkeypatch, capsys):
    """Baseline and tree come from last.pt, so a resumed run does not read their files again."""
    baseline, tree = tmp_path / "baseline.json", tmp_path / "tree.json"
    shutil.copy(whole[0] / "metrics.json", baseline)
    shutil.copy(whole[0] / "tree.json", tree)
    flags = ["--baseline", baseline, "--tree", tree]
    expected = run("--out", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "train_step", 3)
        with pytest.raises(SystemExit):
            run("--out", tmp_path / "run", *flags)
    baseline.unlink()
    tree.unlink()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == expected
    assert "continuing after epoch 1\n" in capsys.readouterr().out
    assert "delta_m" in expected["last"]


def test_a_run_can_be_resumed_with_another_precision(whole):
    """A run without a loss scaler can go on with one, as after a move to an older GPU."""
    saved = read(whole[0] / "last.pt")
    assert saved["scaler"] == {}
    config = parse_arguments(SMALL)
    model = build(config, make_tasks(config.tasks, 7), saved["tree"])
    state = train.State(config, model, saved["tree"], {}, None)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state.load(saved, whole[0] / "last.pt")
    assert state.step == 4 and state.scaler.get_scale() == 8.0


@pytest.mark.parametrize("write", [3, 4])
def test_a_kill_while_a_checkpoint_is_written_keeps_the_old_one(whole, write, tmp_path,
                                                                monkeypatch):
    """A run can be resumed if it stops just before a temporary file is renamed to a checkpoint.

    The resumed run equals an uninterrupted one.
    """
    out, replace, count = tmp_path / "run", os.replace, [0]

    def killed(source, target):
        count[0] += str(target).endswith(".pt")
        if count[0] == write:
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            run("--out", out)
    assert len(list(out.glob("*.tmp"))) == 1
    run("--out", out, "--resume")
    assert_same_run(out, whole[0])


def in_child(flags):
    """Run train.py with one thread and without output. A separate process calls this."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(flags)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(tree_file, tmp_path):
    """A run that is killed ten times, at random moments, ends as an uninterrupted run does."""
    context = multiprocessing.get_context("spawn")
    flags = [*SMALL, "--tree", str(tree_file), "--epochs", "6"]

    def start(out):
        more = ["--resume", "--out", str(out)] if (out / "last.pt").exists() else [
            *flags, "--out", str(out)]
        process = context.Process(target=in_child, args=(more,))
        process.start()
        return process

    start(tmp_path / "whole").join()
    generator, out, kills = random.Random(0), tmp_path / "run", 0
    while kills < 10:
        process = start(out)
        deadline = time.monotonic() + 60
        while not (out / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 7))
        process.kill()
        process.join()
        kills += 1
    process = start(out)
    process.join()
    assert process.exitcode == 0
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_run(whole, tmp_path):
    """With --workers 2 and --no-cache, a run ends with the same weights as without them."""
    run("--out", tmp_path / "run", "--workers", "2", "--no-cache")
    assert equal(read(tmp_path / "run/last.pt")["model"], read(whole[0] / "last.pt")["model"])


# --- steps ----------------------------------------------------------------------------------------
class Point(nn.Module):
    """A network whose only parameter is the depth that it predicts everywhere."""

    def __init__(self):
        super().__init__()
        self.depth = nn.Parameter(torch.zeros(1, 1, 1, 1))

    def forward(self, image):
        return {"depth": self.depth.expand(len(image), 1, *image.shape[2:])}


def step_of_point(clip=5.0, scale=None, parts=1, label=3.0):
    """Train a Point for one step of SGD (learning rate 1) on images with depth `label` everywhere.

    scale: the GradScaler's loss scale; None turns the scaler off. parts: the batch is processed in
    up to this many parts (--accumulate). Returns the Point's new depth and the losses.
    """
    net = Point()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    labels = {"depth": torch.tensor(label).expand(4, 1, 4, 4)}
    losses = train.train_step(net, make_tasks(["depth"], 7), optimizer, scaler,
                              torch.zeros(4, 3, 4, 4), labels, clip, None, parts)
    return net.depth.item(), losses.tolist()


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("clip, moved", [(0.25, 0.25), (5.0, 1.0)])
def test_a_step_follows_the_clipped_gradient(clip, moved, scale, parts):
    """A step moves the depth by min(1, clip), because the gradient of the L1 loss has norm 1.

    Neither the loss scale nor splitting the batch into parts makes a difference.
    """
    depth, losses = step_of_point(clip, scale, parts)
    assert depth == pytest.approx(moved) and losses == pytest.approx([3.0])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_part_of_a_batch_counts_by_its_valid_pixels(parts):
    """--accumulate does not change the loss of a batch in which only some pixels have labels."""
    net = Point()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    label = torch.zeros(4, 1, 4, 4)
    label[1, :, 0, :2] = 3.0                    # two pixels of one image
    label[2, :, 0, 0] = 6.0                     # one pixel of another
    losses = train.train_step(net, make_tasks(["depth"], 7), optimizer,
                              torch.amp.GradScaler("cpu", enabled=False), torch.zeros(4, 3, 4, 4),
                              {"depth": label}, 5.0, None, parts)
    assert losses.tolist() == pytest.approx([4.0]) and net.depth.item() == pytest.approx(1.0)


def test_the_total_loss_weights_the_tasks():
    """A task with weight 10 in the total loss (eq. 8) gets a gradient ten times as large."""
    task = make_tasks(["depth"], 7)[0]
    task.weight, net = 10.0, Point()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    labels = {"depth": torch.full((1, 1, 4, 4), 30.0)}
    train.train_step(net, [task], optimizer, torch.amp.GradScaler("cpu", enabled=False),
                     torch.zeros(1, 3, 4, 4), labels, 100.0, None)
    assert net.depth.item() == pytest.approx(10)


def test_the_optimizer_is_adamw_without_decay_on_norms_and_biases():
    """AdamW has PyTorch's default betas and eps.

    1-D weights and position-bias tables have no weight decay.
    """
    config = parse_arguments([*SMALL, "--layers", "attn+mlp+others", "--weights", "none"])
    tasks = make_tasks(config.tasks, 7)
    model = build(config, tasks, build_tree(np.zeros((3, 3)), config.groups))
    optimizer = train.make_optimizer(model, 1e-4, 0.05)
    assert type(optimizer) is torch.optim.AdamW
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    decayed, plain = optimizer.param_groups
    for group, decay in ((decayed, 0.05), (plain, 0)):
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert group["lr"] == 1e-4 and group["weight_decay"] == decay
    assert all(p.ndim == 1 or "bias_table" in names[id(p)] for p in plain["params"])
    assert all(p.ndim > 1 and "bias_table" not in names[id(p)] for p in decayed["params"])
    assert len(plain["params"]) + len(decayed["params"]) == len(names)


def test_the_schedule_begins_above_zero_and_ends_at_zero():
    """With 20 warm-up steps, the learning rate starts at 1/21 of its peak and peaks at step 20.

    It ends at 0. Without warm-up, it starts at its peak.
    """
    rates = [train.learning_rate(step, 300, 1e-4, 20 / 300) for step in range(301)]
    assert rates[0] == pytest.approx(1e-4 / 21) and rates[9] == pytest.approx(1e-4 * 10 / 21)
    assert rates[20] == pytest.approx(1e-4) == max(rates)
    assert rates[90] == pytest.approx(1e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[300] == pytest.approx(0, abs=1e-18)
    assert train.learning_rate(0, 300, 1e-4, 0) == pytest.approx(1e-4)


def test_logged_losses_leave_out_batches_without_labels(capsys):
    """A logged loss is the mean over the steps that have labels for its task.

    If no step has such labels, the loss is None.
    """
    depth, semseg = tasks = make_tasks(["depth", "semseg"], 3)
    log = train.LossLog(tasks, 4, 10, torch.device("cpu"))
    ignored = torch.full((1, 2, 2), 255)
    log.add(torch.tensor([3.0, 0.0]), {"depth": torch.ones(1, 1, 2, 2), "semseg": ignored})
    log.add(torch.tensor([0.0, 0.0]), {"depth": torch.zeros(1, 1, 2, 2), "semseg": ignored})
    assert log.report(12, 20) == {"depth": 3.0, "semseg": None}
    assert "step 12/20  depth 3.000  semseg -" in capsys.readouterr().out
    log.add(torch.tensor([1.0, 2.0]), {"depth": torch.ones(1, 1, 2, 2), "semseg": ignored * 0})
    assert log.report(13, 20) == {"depth": 1.0, "semseg": 2.0}      # the mean starts again


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_gradient_that_is_not_finite_is_never_saved(tree_file, tmp_path, monkeypatch, log_every):
    """An infinite gradient in the last step of a run is an error.

    last.pt and best.pt are then from the end of the first epoch, and the run can be resumed.
    """
    step, count = train.train_step, [0]

    def broken(model, *args):
        count[0] += 1
        if count[0] == 4:
            p = next(p for p in model.parameters() if p.requires_grad)
            p.register_hook(lambda g: g * math.inf)
        return step(model, *args)
    flags = ["--out", tmp_path / "run", "--tree", tree_file, "--log-every", log_every]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", broken)
        assert "is not finite between steps" in refused(*flags)
    for name in ("last.pt", "best.pt"):
        state = read(tmp_path / "run" / name)
        assert state["step"] == 2
        assert all(value.isfinite().all() for value in state["model"].values())
    train.main(["--out", str(tmp_path / "run"), "--resume"])


def test_a_loss_that_is_not_finite_names_its_task(tree_file, tmp_path, monkeypatch):
    """A NaN loss stops the run at the next log line, and the error names the task.

    last.pt still holds the weights from before the first step.
    """
    monkeypatch.setattr("tasks.Depth.loss", lambda self, pred, label: pred.sum() * math.nan)
    message = refused("--out", tmp_path / "run", "--tree", tree_file)
    assert "the loss of depth, or its gradient, is not finite between steps 0 and 1" in message
    assert read(tmp_path / "run/last.pt")["step"] == 0


def test_decoders_that_diverge_are_reported(tmp_path, monkeypatch):
    """If the similarity's decoders end up with NaN, the error suggests a lower --head-lr."""
    def broken(model, *args, **kwargs):
        next(model.decoders.parameters()).data.fill_(math.nan)
    monkeypatch.setattr(train, "finetune_decoders", broken)
    message = refused("--out", tmp_path / "run")
    assert "finite" in message and "--head-lr" in message


@pytest.mark.parametrize("amp, expected", [
    ("off", None), ("bf16", torch.bfloat16), ("fp16", None)])
def test_decoders_are_trained_without_fp16(amp, expected, monkeypatch):
    """The decoders for the similarity have no loss scaler, so fp16 is replaced by float32."""
    seen = []
    monkeypatch.setattr(train, "finetune_decoders", lambda *args, **kwargs: seen.append(args[5]))
    config = parse_arguments(SMALL)
    config.amp = amp
    tasks = make_tasks(config.tasks, 7)
    train.train_decoders(config, tasks, range(8), torch.device("cpu"))
    assert seen == [expected]


# --- photographs ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("dataset, tasks", [
    ("nyud", "semseg,normals,depth,edge"), ("pascal", "semseg,human_parts,sal,normals")])
@pytest.mark.parametrize("source", ["", "real_"])
def test_files_in_the_published_layouts_train(dataset, tasks, source, request, tmp_path,
                                              monkeypatch):
    """Training on an archive gives finite results, and the losses of semseg and normals fall.

    eval.py can then evaluate the run.
    """
    archive = request.getfixturevalue(f"{source}{dataset}_archive")
    monkeypatch.chdir(tmp_path)
    metrics = train.main(["--dataset", dataset, "--data-root", str(archive), "--weights", "none",
                          "--backbone", "mini", "--tasks", tasks, "--epochs", "6", "--batch-size",
                          "1", "--size", "96", "--head-epochs", "1", "--device", "cpu", "--lr",
                          "1e-3", "--eval-every", "6", "--log-every", "1"])
    assert all(math.isfinite(value) for task in metrics["results"].values()
               for value in task.values())
    assert [len(stage) for stage in metrics["tree"]] == [1, 2, 3, 4]
    lines = [line["loss"] for line in log_lines(tmp_path / "runs" / dataset) if "lr" in line]
    third = len(lines) // 3
    for task in ("semseg", "normals"):
        first = [line[task] for line in lines[:third] if line[task] is not None]
        final = [line[task] for line in lines[-third:] if line[task] is not None]
        assert np.mean(final) < np.mean(first)
    assert eval.main(["--checkpoint", f"runs/{dataset}", "--native", "--workers", "0"]) is None


@pytest.mark.slow
def test_two_images_can_be_learned_by_heart(real_nyud_archive, tmp_path):
    """On two real images, a run reaches a depth rmse below 0.35 m and semseg accuracy above 0.85.
    """
    from nyud_pascal import find_dataset
    folder = find_dataset("nyud", real_nyud_archive)
    images = tmp_path / "NYUD_MT"
    for path in folder.rglob("*"):
        if path.is_file() and path.stem in ("433", "464"):
            target = images / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (images / "gt_sets").mkdir()
    for split in ("train", "val"):
        (images / f"gt_sets/{split}.txt").write_text("433\n464\n")
    metrics = train.main(["--dataset", "nyud", "--data-root", str(images), "--weights", "none",
                          "--backbone", "mini", "--size", "128", "--batch-size", "2", "--epochs",
                          "90", "--lr", "3e-3", "--drop-path", "0", "--dropout", "0", "--no-flip",
                          "--scales", "1", "--cache", "--workers", "0", "--eval-every", "45",
                          "--layers", "attn+mlp+others", "--head-epochs", "1", "--out",
                          str(tmp_path / "run")])
    assert metrics["results"]["depth"]["rmse"] < 0.35
    assert metrics["results"]["semseg"]["accuracy"] > 0.85


# --- bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    (["--tasks", "semseg,dept"], "unknown task 'dept'"),
    (["--groups", "1,1,2,4"], "do not fit 3 tasks"),
    (["--groups", "1,2,1,3"], "never decreasing"),
    (["--rank", "2"], "rank 2 is smaller than the number of task groups, 3"),
    (["--backbone", "huge", "--weights", "none"], "unknown backbone 'huge'"),
    (["--weights", "nowhere.pth"], "nowhere.pth"),
    (["--weights", "nowhere.pth", "--groups", "1,1,1,1"], "nowhere.pth"),
    (["--tree", "nowhere.json"], "nowhere.json"),
    (["--baseline", "nowhere.json"], "no file nowhere.json"),
    (["--dataset", "nyud", "--weights", "imagenet", "--data-root", "nowhere"],
     "nowhere does not exist"),                                 # fails before any download
    (["--device", "gpu"], "--device gpu cannot be used"),
    (["--weights", "imagenet"], "mini"),
    (["--backbone", "tiny"], "rooms_mini.pth"),
])
def test_wrong_settings_end_in_one_line(flags, message, tmp_path):
    """The error is one line about the wrong setting, and the run's folder is not created."""
    small = [] if "--dataset" in flags else SMALL       # SMALL has flags of rooms
    assert message in refused(*flags, "--out", tmp_path / "run", small=small)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_exists_is_never_used(whole, tmp_path):
    """A new run refuses a folder that exists, even if another run has just created it."""
    out, _ = whole
    before = (out / "last.pt").read_bytes()
    assert "already exists" in refused("--out", out)
    assert (out / "last.pt").read_bytes() == before
    train.make_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot create .*run: File exists"):
        train.make_folder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "already exists" in refused("--out", tmp_path / "file")


def test_resuming_with_other_settings_is_refused(whole, capsys):
    """--resume refuses a new value of --rank, but not of --log-every, which is in MAY_CHANGE.

    It accepts a flag that repeats the run's value, and refuses a folder without a last.pt.
    """
    out, _ = whole
    with pytest.raises(SystemExit):
        train.main(["--out", str(out), "--resume", "--rank", "12"])
    assert "--rank 12: the run in" in capsys.readouterr().err
    train.main(["--out", str(out), "--resume", "--log-every", "7", "--rank", "6"])
    message = refused("--resume", "--out", out / "missing", small=[])
    assert "nothing to resume: no file" in message and "last.pt" in message


def test_resuming_without_what_it_needs_fails_at_once(whole, tmp_path):
    """--resume needs best.pt, a last.pt that is not a copy of best.pt, and an undamaged log."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "best.pt").unlink()
    assert "best.pt" in refused("--resume", "--out", out, small=[])
    shutil.copy(whole[0] / "best.pt", out / "last.pt")
    assert "is it a copy of best.pt?" in refused("--resume", "--out", out, small=[])
    shutil.copy(whole[0] / "best.pt", out / "best.pt")
    shutil.copy(whole[0] / "last.pt", out / "last.pt")
    (out / "log.jsonl").write_text('{"step": 1}\n{"step"\n')
    assert "log.jsonl is damaged" in refused("--resume", "--out", out, small=[])


def test_checkpoints_that_do_not_fit_are_refused(whole, tmp_path):
    """eval.py refuses a checkpoint that is damaged, lacks a weight, or fits a different backbone.

    It also refuses a file that is not a checkpoint of train.py.
    """
    good, bad = whole[0] / "best.pt", tmp_path / "bad.pt"

    def message(path, *flags):
        return refused("--checkpoint", path, *flags, main=eval.main, small=[])
    bad.write_bytes(good.read_bytes()[:5000])
    assert "is damaged" in message(bad)
    data = bytearray(good.read_bytes())
    weight = max(read(good)["model"].values(), key=torch.numel)
    data[data.find(weight.numpy().tobytes())] ^= 1              # flip one bit of one weight
    bad.write_bytes(data)
    assert "is damaged" in message(bad)
    torch.save({"weights": 1}, bad)
    assert "is not a checkpoint of this version of train.py" in message(bad)
    assert "was trained on a different backbone" in message(good, "--weights", "none")
    state = read(good)
    state["model"].pop(next(iter(state["model"])))
    torch.save(state, bad)
    assert "1 weights are missing" in message(bad)
