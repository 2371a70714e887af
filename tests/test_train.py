"""train.py and eval.py as a user runs them, small; and what they say to bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stopped_after_an_epoch
from PIL import Image, ImageDraw

import eval
import train
from tools.export import load_run
from util.draw import MARGIN, PANEL, draw_curves, draw_tree
from util.parallel import Team

ROOT = Path(__file__).parent.parent
# Two epochs of a small network on a few rooms: seconds.
SMALL = ["--tasks", "semseg,depth,normals", "--train-rooms", "8", "--val-rooms", "4", "--size",
         "56", "--rank", "6", "--epochs", "2", "--batch-size", "4", "--sim-images", "4",
         "--head-epochs", "1", "--dropout", "0.1", "--device", "cpu", "--log-every", "1"]


def run(*flags):
    train.main([*SMALL, *map(str, flags)])


def refused(*flags, by=train):
    """The one-line error of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        by.main([*map(str, flags)] if by is eval else [*SMALL, *map(str, flags)])
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture(scope="module")
def rooms_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("rooms") / "run"
    run("--out", out)
    return out


def test_a_run_leaves_what_the_readme_says(rooms_run):
    """metrics.json, tree.json, one JSON line a step and an evaluation, pictures, checkpoints."""
    metrics = json.loads((rooms_run / "metrics.json").read_text())
    for key in ("results", "reference"):
        assert set(metrics[key]) == {"semseg", "depth", "normals"}
        assert 0 < metrics[key]["depth"]["rmse"] < 10
    assert metrics["trainable"] == metrics["adapters"] + metrics["decoders"] + metrics["others"]
    assert [len(stage) for stage in metrics["tree"]] == [1, 1, 2, 3]
    tree = json.loads((rooms_run / "tree.json").read_text())
    assert tree["tree"] == metrics["tree"] and np.array(tree["similarity"]).shape == (3, 3)
    lines = [json.loads(line) for line in (rooms_run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line and "lr" in line] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines if "results" in line] == [1, 2]
    assert (rooms_run / "predictions.png").stat().st_size > 1000
    assert (rooms_run / "curves.png").stat().st_size > 1000
    assert (rooms_run / "tree.png").stat().st_size > 1000
    best = torch.load(rooms_run / "best.pt", weights_only=True)
    names = [k for k in best["model"] if k.startswith("backbone.")]
    assert names and all("lora_" in k for k in names)  # the frozen backbone stays in its own file


def test_curves_show_losses_and_metrics(tmp_path):
    """A column a task, loss above metric: from the upper left, down where the loss falls, up where
    the metric rises; what is not a number is left out."""
    lines = [{"step": s, "lr": 1, "loss": {"depth": 4.0 - s, "sal": 1.0}} for s in (1, 2, 3)]
    lines += [{"step": s, "results": {"depth": {"rmse": r}, "sal": {"mIoU": m}}}
              for s, r, m in ((2, 0.7, float("nan")), (3, 0.9, 0.5))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl",
                train.make_tasks(["depth", "sal"], 6))
    picture = np.array(Image.open(tmp_path / "curves.png")).astype(int)
    (width, height), blue = PANEL, (picture[..., 2] - picture[..., 0]) > 100
    assert picture.shape == (2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN), 3)

    def curve(row, column):
        top, left = row * (height + 2 * MARGIN), column * (width + 2 * MARGIN)
        panel = blue[top:top + height + 2 * MARGIN, left:left + width + 2 * MARGIN]
        ys, xs = np.nonzero(panel)
        return [(x - MARGIN, y - MARGIN) for x, y in
                ((xs.min(), ys[xs == xs.min()].mean()), (xs.max(), ys[xs == xs.max()].mean()))]

    for (row, column), expected in {
            (0, 0): [(width / 3, 0), (width, height)],
            (0, 1): [(width / 3, height), (width, height)],
            (1, 0): [(width * 2 / 3, height), (width, 0)], (1, 1): [(width, height)] * 2}.items():
        np.testing.assert_allclose(curve(row, column), expected, atol=4)


FIVE = ["depth", "semseg", "normals", "edge", "human_parts"]


@pytest.mark.parametrize("tasks, known", [
    (FIVE, True), (FIVE, False), ([name + "_with_a_long_name_of_its_own" for name in FIVE], True)])
def test_the_tree_is_drawn_with_its_similarities(tasks, known, tmp_path, monkeypatch):
    """Every number and name, none over another or outside, those of a group side by side; red is
    below 0; without similarities the tree alone."""
    depth, semseg, normals, edge, parts = tasks
    halves = [[semseg, edge, parts], [depth, normals]]
    sim, error = np.eye(5), np.full((5, 5), 0.0121)
    sim[[0, 2], [2, 0]], sim[[1, 3], [3, 1]] = 0.3456, -0.1234
    error = np.where(sim == 0, None, error)
    (tmp_path / "tree.json").write_text(json.dumps({
        "tasks": tasks, "similarity": sim.tolist() if known else None,
        "standard_error": error.tolist(),
        "tree": [[tasks], halves, halves, [[name] for name in tasks]]}))
    texts, pen = [], ImageDraw.ImageDraw

    def text(self, xy, string, fill, font, anchor):
        texts.append((string, self.textbbox(xy, string, font, anchor)))
        write(self, xy, string, fill, font, anchor=anchor)

    write = pen.text
    monkeypatch.setattr(pen, "text", text)
    draw_tree(tmp_path / "tree.png", tmp_path / "tree.json")
    picture = Image.open(tmp_path / "tree.png").convert("RGB")
    strings = [string for string, _ in texts]
    for i, (string, (left, top, right, bottom)) in enumerate(texts):
        assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height
        for _, (other_left, other_top, other_right, other_bottom) in texts[:i]:
            assert (right < other_left or other_right < left
                    or bottom < other_top or other_bottom < top), string
    assert [strings.count(name) for name in tasks] == [6 if known else 4] * 5  # 4 stages, 2 heads
    x = {string: box[0] + box[2] for string, box in texts}
    sides = sorted(tasks, key=x.get)
    assert set(sides[:3]) == set(halves[0]) or set(sides[:2]) == set(halves[1])
    numbers = {string: picture.getpixel((box[0] - 2, box[1] - 2)) for string, box in texts
               if "." in string}
    if known:
        assert set(numbers) == {"1.000 ± 0.012", "0.346 ± 0.012", "-0.123 ± 0.012", "0.000"}
        red, _, blue = numbers["-0.123 ± 0.012"]
        assert red > blue and numbers["0.346 ± 0.012"][2] > numbers["0.346 ± 0.012"][0]
    assert bool(numbers) == known


def test_evaluation_of_a_checkpoint_repeats_the_runs_numbers(rooms_run, capsys):
    """eval.py prints the results of metrics.json again; --native works on the same data."""
    capsys.readouterr()
    eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--json", "--device", "cpu"])
    again = json.loads(capsys.readouterr().out)
    metrics = json.loads((rooms_run / "metrics.json").read_text())
    for task, values in metrics["results"].items():
        assert again["results"][task] == values
        assert again["reference"][task] == metrics["reference"][task]
    eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--native", "--device", "cpu"])
    assert "4 images" in capsys.readouterr().out


def test_the_table_says_what_its_numbers_are_of(rooms_run, capsys):
    """How many images, at which size, which metric is compared, over how many valid pixels."""
    eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--device", "cpu"])
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("4 images at 56x56, loss ")
    assert head.split() == ["task", "metric", "result", "constant", "valid", "pixels"]
    starred = [row.split() for row in rows if "*" in row]
    assert [(r[0], r[1], r[4], r[5]) for r in starred] == [
        ("semseg", "mIoU", "*up", f"{4 * 56 * 56:,}"), ("depth", "rmse", "*down", "12,544"),
        ("normals", "mean", "*down", "12,544")]


def test_nan_predictions_are_counted_and_not_averaged_away(rooms_run, capsys, monkeypatch):
    """Seven pixels of one image: the metric is NaN, the table says how many, the rest stands."""
    predictor = eval.predictor

    def spoiled(*a):
        predict, calls = predictor(*a), []

        def broken(image):
            found = predict(image)
            if not calls:
                found["depth"][0, 0, 3, :7] = float("nan")
            calls.append(image)
            return found
        return broken
    monkeypatch.setattr(eval, "predictor", spoiled)
    eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "the prediction is not a number (NaN) at 7 of 12,544 valid pixels" in text
    values = {tuple(row.split()[:2]): row.split()[2] for row in text.splitlines()[2:]}
    assert values["depth", "rmse"] == "nan" and float(values["normals", "mean"]) > 0


def test_images_without_any_label_are_no_number(rooms_run, tmp_path, monkeypatch, capsys):
    """A task that no image labels has null, for the constant too, and 0 valid pixels; the table
    says why, of the delta-m too."""
    monkeypatch.setattr(eval, "open_dataset", without_depth(eval.open_dataset))
    eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["results"]["depth"]["rmse"] is None and found["pixels"]["depth"] == 0
    assert found["reference"]["depth"]["rmse"] is None and np.isfinite(found["loss"])
    assert found["results"]["semseg"]["mIoU"] > 0
    eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--device", "cpu"])
    assert "depth        no image has a label of it" in capsys.readouterr().out


def without_depth(open_data, split="val"):
    """open_dataset, but that no image of the split has a label of depth."""
    def opened(config, name):
        dataset = open_data(config, name)
        samples = [dataset[i] for i in range(len(dataset))]
        return [{**sample, "depth": sample["depth"] * (name != split)} for sample in samples]
    return opened


def test_without_validation_labels_the_best_is_by_the_loss(rooms_run, tmp_path, monkeypatch,
                                                           capsys):
    """There is no delta-m then, and JSON says null; the run resumes, and is read as a baseline."""
    flags = ["--out", tmp_path / "run", "--baseline", rooms_run / "metrics.json"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", partial(train.run, open_data=without_depth(train.open_dataset)))
        with stopped_after_an_epoch(monkeypatch):
            run(*flags)
        run(*flags, "--resume")
    text = (tmp_path / "run/metrics.json").read_text()
    metrics = json.loads(text, parse_constant=pytest.fail)
    assert metrics["delta_m"] is None and metrics["results"]["depth"]["rmse"] is None
    lines = [json.loads(line, parse_constant=pytest.fail)
             for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = {line["epoch"]: line["loss"] for line in lines if "results" in line}
    assert metrics["epoch"] == min(losses, key=losses.get) == 2  # not the first
    shown = capsys.readouterr().out
    assert "no image has a label of it: its metrics, and delta-m, are not a number" in shown
    assert "no rmse of depth" in refused("--out", tmp_path / "other", "--baseline",
                                         tmp_path / "run/metrics.json")


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    """Two runs that differ in nothing else but it evaluate the same weights to the last bit."""
    run("--out", tmp_path / "run", "--method", "decoders", "--epochs", "1")
    found = []
    for batch_size in (1, 3):
        state = torch.load(tmp_path / "run/best.pt", weights_only=True)
        state["config"]["batch_size"] = batch_size
        torch.save(state, tmp_path / "other.pt")
        args = eval.parse_arguments(["--checkpoint", str(tmp_path / "other.pt"), "--json"])
        found.append(eval.evaluate_checkpoint(args))
    assert found[0] == found[1]


def test_a_photo_that_fails_does_not_stop_the_others(rooms_run, tmp_path, capsys):
    """The next is drawn; one line names both, and the exit code is not 0. No table as JSON."""
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    message = refused("--checkpoint", rooms_run / "best.pt", "--image", tmp_path / "missing.jpg",
                      tmp_path / "good.png", by=eval)
    written = rooms_run / "good.predicted.png"
    assert message == f"error: no image file {tmp_path / 'missing.jpg'}; wrote {written}"
    written.unlink()
    with pytest.raises(SystemExit) as stop:
        eval.main(["--checkpoint", str(rooms_run / "best.pt"), "--json", "--image", "photo.jpg"])
    assert stop.value.code == 2


def test_a_saved_tree_replaces_the_similarity_and_gives_the_same_run(rooms_run, tmp_path, capsys):
    """--tree FILE: nothing is computed, and the training is bit for bit the same."""
    run("--out", tmp_path / "again", "--tree", rooms_run / "tree.json")
    assert "similarity:" not in capsys.readouterr().out
    assert json.loads((tmp_path / "again/tree.json").read_text())["similarity"] is None
    first, again = (torch.load(p / "best.pt", weights_only=True)["model"]
                    for p in (rooms_run, tmp_path / "again"))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_resumed_run_ends_as_an_uninterrupted_one(rooms_run, tmp_path, monkeypatch):
    """Stopped after its first epoch and continued: the same weights and the same log, and a tree,
    where it was removed."""
    out = tmp_path / "run"
    with stopped_after_an_epoch(monkeypatch):
        run("--out", out)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lost": true}\n')  # a step that came after the checkpoint
    (out / "tree.json").unlink()
    run("--out", out, "--resume")
    assert json.loads((out / "tree.json").read_text())["tree"] and (out / "tree.png").exists()
    first, again = (torch.load(p / "last.pt", weights_only=True) for p in (rooms_run, out))
    assert all(torch.equal(first["model"][k], again["model"][k]) for k in first["model"])
    assert (rooms_run / "log.jsonl").read_text() == (out / "log.jsonl").read_text()


class OneConvolution(torch.nn.Module):
    """The least that train_step can train, for a task of one channel."""

    def __init__(self, task="depth"):
        super().__init__()
        self.task, self.conv = task, torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return {self.task: self.conv(x)}


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    """Without BatchNorm's coupling a batch in two parts, of which one has fewer valid pixels, takes
    the same step as in one."""
    torch.manual_seed(0)
    tasks = train.make_tasks(["depth"], 6)
    image, labels = torch.randn(4, 1, 8, 8), {"depth": torch.rand(4, 1, 8, 8) + 1}
    labels["depth"][:2, :, 3:] = 0
    after = []
    for parts in (1, 2):
        torch.manual_seed(1)
        net = OneConvolution()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses = train.train_step(net, tasks, optimizer, scaler, image, labels, parts, 5.0,
                                  None, Team(torch.device("cpu")))
        after.append((losses, net.conv.weight.detach()))
    torch.testing.assert_close(after[0], after[1])


def saliency_batch():
    """Four images, of which the first two are mostly salient, the others hardly."""
    torch.manual_seed(0)
    label = (torch.rand(4, 8, 8) < torch.tensor([0.9, 0.8, 0.1, 0.0])[:, None, None]).long()
    label[0, :3] = 255
    return torch.randn(4, 1, 8, 8), {"sal": label}


def test_saliency_in_parts_has_the_gradient_of_the_whole_batch():
    """Its balance is of the whole batch, though the parts differ much."""
    after = []
    for parts in (1, 2, 4):
        torch.manual_seed(1)
        net = OneConvolution("sal")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses = train.train_step(net, train.make_tasks(["sal"], 6), optimizer, scaler,
                                  *saliency_batch(), parts, 5.0, None, Team(torch.device("cpu")))
        after.append((losses, net.conv.weight.detach()))
    torch.testing.assert_close(after[1], after[0])
    torch.testing.assert_close(after[2], after[0])


@pytest.mark.parametrize("log_every, last_step", [("1", True), ("100", True), ("100", False)])
def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, log_every, last_step):
    """With finite losses, on an epoch's last step or at a signal between log lines: an error; what
    is on disk is of before, and the run goes on from there."""
    step, count = train.train_step, [0]

    def broken(model, *a):
        count[0] += 1
        p = next(p for p in model.parameters() if p.requires_grad)
        if count[0] == (4 if last_step else 3):
            hook = p.register_hook(lambda g: g * float("inf"))
            if not last_step:
                signal.raise_signal(signal.SIGTERM)
            losses = step(model, *a)
            hook.remove()
            return losses
        return step(model, *a)
    flags = ["--out", tmp_path / "run", "--groups", "1,1,1,3", "--log-every", log_every]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", broken)
        message = refused(*flags)
    assert "is not finite between" in message if last_step else "was not written" in message
    assert "the checkpoints are from before" in message
    for name in ("last.pt", "best.pt"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        assert state["step"] == 2
        assert all(v.isfinite().all() for v in state["model"].values())
    run(*flags, "--resume")


def test_metrics_say_what_they_are_of(rooms_run):
    """Dataset, flags, versions, seed; the best evaluation and the last one."""
    metrics = json.loads((rooms_run / "metrics.json").read_text())
    assert metrics["dataset"] == "rooms" and metrics["flags"]["rank"] == 6
    assert metrics["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (rooms_run / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "results" in line]
    assert metrics["last"] == evaluations[-1] and metrics["last"]["epoch"] == 2
    best = min(evaluations, key=lambda found: found["loss"])
    assert metrics["epoch"] == best["epoch"] and metrics["results"] == best["results"]


def test_a_baseline_of_another_dataset_is_refused(tmp_path):
    """The paper's NYUD numbers say nothing about rooms; the shipped files say what they are of."""
    message = refused("--out", tmp_path / "run", "--baseline", ROOT / "baselines/nyud.json")
    assert "nyud.json is of nyud, not rooms" in message
    message = refused("--out", tmp_path / "run", "--baseline", ROOT / "baselines/pascal.json")
    assert "pascal.json is of pascal, not rooms" in message


def test_schedule_and_decay():
    """Warm-up to the peak, cosine to zero; norms, biases and bias tables do not decay."""
    rates = [train.learning_rate(s, 300, 1.0, 20 / 300) for s in range(300)]
    assert max(rates) == pytest.approx(1) and rates.index(max(rates)) == 20
    assert rates[0] < 0.1 and rates[-1] < 1e-3 and rates[160] == pytest.approx(0.5)
    config = train.parse_arguments(["--tasks", "semseg,depth,normals", "--layers",
                                    "attn+mlp+others"])
    tasks = train.make_tasks(config.tasks, 6)
    model = train.build(config, tasks, train.build_tree(np.zeros((3, 3)), config.groups))
    decayed, plain = (g["params"] for g in train.make_optimizer(model, 1.0, 0.05).param_groups)
    ids = {id(p): n for n, p in model.named_parameters()}
    assert all("norm" in ids[id(p)] or "bias" in ids[id(p)] or p.ndim == 1 for p in plain)
    assert all(p.ndim > 1 and "bias_table" not in ids[id(p)] for p in decayed)
    assert len(plain) + len(decayed) == sum(p.requires_grad for p in model.parameters())


def test_best_is_by_delta_m_where_a_baseline_is_given(rooms_run, tmp_path, capsys):
    """Against its own metrics a run ends at the delta-m that eq. 7 gives."""
    run("--out", tmp_path / "run", "--baseline", rooms_run / "metrics.json")
    assert "delta-m +0.00 %" in capsys.readouterr().out


def test_a_backbone_can_be_exported_and_used(tmp_path):
    """--method full trains it, --export-backbone writes it, --weights loads it."""
    run("--method", "full", "--tasks", "semseg", "--out", tmp_path / "full")
    eval.main(["--checkpoint", str(tmp_path / "full/best.pt"),
               "--export-backbone", str(tmp_path / "backbone.pth")])
    run("--weights", tmp_path / "backbone.pth", "--out", tmp_path / "run")
    message = refused("--out", tmp_path / "run", "--resume", "--weights", "none")
    assert "backbone.pth, not none" in message
    for name in ("backbone.pth", "full/best.pt"):  # not even itself
        before = (tmp_path / name).read_bytes()
        message = refused("--checkpoint", tmp_path / "full/best.pt", "--export-backbone",
                          tmp_path / name, by=eval)
        assert f"{name} exists already" in message
        assert (tmp_path / name).read_bytes() == before


def test_real_images_train_evaluate_and_predict(nyud_archive, tmp_path, monkeypatch, capsys):
    """NYUD-v2 from the archive: Swin-Tiny, some labels missing, loss falls, photo predicted."""
    monkeypatch.chdir(tmp_path)
    train.main(["--dataset", "nyud", "--data-root", str(nyud_archive), "--weights", "none",
                "--epochs", "2", "--batch-size", "1", "--size", "224", "--head-epochs", "1",
                "--device", "cpu", "--log-every", "1"])
    lines = [json.loads(line) for line in open("runs/nyud/log.jsonl")]
    weighted = [sum({"semseg": 1, "depth": 1, "normals": 10}[k] * v for k, v in x["loss"].items())
                for x in lines if "lr" in x]
    assert len(weighted) == 8 and sum(weighted[4:]) < sum(weighted[:4])
    metrics = json.loads(open("runs/nyud/metrics.json").read())
    assert metrics["images"] == 2 and metrics["trainable"] == 5_932_916
    photo = next(tmp_path.glob("data/*/NYUD_MT/images/464.jpg"))
    eval.main(["--checkpoint", "runs/nyud/best.pt", "--image", str(photo), "--device", "cpu"])
    width, height = Image.open("runs/nyud/464.predicted.png").size
    assert width == 4 * (640 + 2) and 480 < height < 800  # captions and legends


def test_pascal_trains_all_four_tasks(pascal_archive, tmp_path, monkeypatch):
    """From the archive: two of three images have no person, and still count for the rest."""
    monkeypatch.chdir(tmp_path)
    train.main(["--dataset", "pascal", "--data-root", str(pascal_archive), "--weights", "none",
                "--backbone", "mini", "--epochs", "6", "--batch-size", "1", "--size", "96",
                "--head-epochs", "1", "--device", "cpu", "--lr", "1e-3", "--eval-every", "6"])
    metrics = json.loads(open("runs/pascal/metrics.json").read())
    assert set(metrics["results"]) == {"semseg", "human_parts", "sal", "normals"}
    assert all(np.isfinite(v) for r in metrics["results"].values() for v in r.values())
    assert [len(stage) for stage in metrics["tree"]] == [1, 2, 3, 4]
    lines = [json.loads(line)["loss"] for line in open("runs/pascal/log.jsonl") if '"lr"' in line]
    assert all(lines[-1][task] < lines[0][task] for task in ("semseg", "normals"))


def test_five_tasks_in_one_command(tmp_path, capsys):
    """Similarity, tree, training; then the same with a deliberately bad tree from a file."""
    five = ["semseg", "depth", "normals", "human_parts", "sal"]
    flags = ["--tasks", ",".join(five), "--rank", "10", "--epochs", "1"]
    run(*flags, "--out", tmp_path / "run")
    saved = json.loads((tmp_path / "run/tree.json").read_text())
    assert [len(stage) for stage in saved["tree"]] == [1, 3, 4, 5]
    assert np.array(saved["similarity"]).shape == (5, 5)
    assert "stage 4   {semseg} {depth} {normals} {human_parts} {sal}" in capsys.readouterr().out
    bad = [[five], [["semseg", "normals"], ["depth", "human_parts", "sal"]],
           [["semseg", "normals"], ["depth"], ["human_parts", "sal"]], [[t] for t in five]]
    path = write_tree(tmp_path / "bad.json", bad)
    run(*flags, "--out", tmp_path / "bad", "--tree", path)
    metrics = json.loads((tmp_path / "bad/metrics.json").read_text())
    assert metrics["tree"] == bad and set(metrics["results"]) == set(five)
    assert "stage 3   {semseg, normals} {depth} {human_parts, sal}" in capsys.readouterr().out


def test_a_run_begins_with_its_settings(rooms_run, tmp_path, capsys):
    """What it is of, with what, how long, and where to, before any work."""
    run("--out", tmp_path / "run", "--tree", rooms_run / "tree.json", "--epochs", "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "tglora on rooms: semseg, depth, normals; groups 1,1,2,3; seed 0",
        "backbone mini, weights rooms_mini.pth, rank 6, attn+mlp, images of 56x56",
        f"1 epochs, batches of 4, learning rate 0.002, on cpu, to {tmp_path / 'run'}"]


@pytest.mark.parametrize("flags", [
    ["--seed", "5", "--lr", "0.003", "--no-flip", "--without", "mlp.fc1", "--scales", "1,1.5"],
    ["--method", "bdta", "--reduction", "2", "--drop-path", "0.1", "--accumulate", "2"],
    ["--budget-gmacs", "0.2", "--stage-similarity", "--eval-every", "2"],
    ["--tree", "TREE", "--layers", "attn+mlp+others", "--amp", "bf16"]])
def test_resume_alone_takes_every_flag(flags, rooms_run, tmp_path, monkeypatch):
    """To the weights of a run that was left alone; a flag of the machine may be another, one of the
    run is refused by name."""
    flags = [str(rooms_run / "tree.json") if flag == "TREE" else flag for flag in flags]
    small = [f for f in SMALL if not ("bdta" in flags and f in ("--rank", "6", "--dropout", "0.1"))]
    train.main([*small, *flags, "--out", str(tmp_path / "whole")])
    with stopped_after_an_epoch(monkeypatch):
        train.main([*small, *flags, "--out", str(tmp_path / "run")])
    resume = ["--resume", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="--epochs 2, not 3.*the same flags"):
        train.main([*resume, "--epochs", "3"])
    train.main([*resume, "--log-every", "7"])
    whole, other = (torch.load(tmp_path / name / "last.pt", weights_only=True)
                    for name in ("whole", "run"))
    assert whole["model"].keys() == other["model"].keys()
    assert all(x.equal(other["model"][name]) for name, x in whole["model"].items())
    unequal = {k for k, v in whole["config"].items() if other["config"][k] != v}
    assert unequal == {"out", "log_every"} | ({"tree"} if "--tree" in flags else set())


def test_a_run_is_loaded_in_python(rooms_run):
    """By its folder or a checkpoint: the network of best.pt, its tasks, its flags."""
    model, tasks, config = load_run(str(rooms_run))
    again, _, _ = load_run(rooms_run / "best.pt")
    image = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        found, other = model.eval()(image), again.eval()(image)
    assert [task.name for task in tasks] == config.tasks == ["semseg", "depth", "normals"]
    assert found.keys() == set(config.tasks) and config.rank == 6
    assert all(found[name].equal(other[name]) for name in found)
    saved = torch.load(rooms_run / "best.pt", weights_only=True)["model"]
    assert all(model.state_dict()[name].equal(x) for name, x in saved.items())


@pytest.mark.parametrize("flags, message", [
    (["--weights", "nowhere.pth"], "nowhere.pth"), (["--tree", "nowhere.json"], "nowhere.json"),
    (["--baseline", "nowhere.json"], "nowhere.json"), ([], "already holds a run")])
def test_wrong_files_are_said_before_any_data(flags, message, tmp_path):
    """Weights, tree, baseline and --out: nothing is rendered or unpacked first."""
    def never(config, split):
        raise AssertionError("data was opened")

    (tmp_path / "used").mkdir()
    (tmp_path / "used/log.jsonl").touch()
    out = tmp_path / ("run" if flags else "used")
    with pytest.raises(ValueError, match=message):
        train.run(train.parse_arguments([*SMALL, *flags, "--out", str(out)]), never)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["train.py", "eval.py", "-m tools.bench", "-m tools.check",
                                     "-m tools.study", "-m tools.export"])
def test_help_teaches(program):
    """Flags under headings with an example each, or the program's examples above few flags."""
    done = subprocess.run([sys.executable, *program.split(), "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    if program == "train.py":
        assert len(re.findall(r"^  as in: --", done.stdout, re.M)) == 7
        assert "(default: 0.002)" in done.stdout
    else:
        assert f"\n    python {program} --" in done.stdout or "python -m tools." in done.stdout
        assert "\n  --" in done.stdout and done.returncode == 0


@pytest.mark.slow
def test_two_images_are_learned_by_heart(nyud_folder, tmp_path):
    """Overfitting: depth rmse under 0.35 m and semseg accuracy over 0.85 on two real images."""
    for split in ("train", "val"):
        (nyud_folder / f"gt_sets/{split}.txt").write_text("433\n464\n")
    train.main(["--dataset", "nyud", "--data-root", str(nyud_folder), "--weights", "none",
                "--size", "224", "--batch-size", "2", "--epochs", "150", "--lr", "2e-3",
                "--drop-path", "0", "--dropout", "0", "--no-flip", "--scales", "1", "--cache",
                "--workers", "0", "--eval-every", "50", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run/metrics.json").read_text())["results"]
    assert results["depth"]["rmse"] < 0.35 and results["semseg"]["accuracy"] > 0.85


# --- bad input ---
def write_tree(path, stages):
    path.write_text(json.dumps({"tree": stages}))
    return path


ALL = ["semseg", "depth", "normals"]


@pytest.mark.parametrize("flags, message", [
    (["--tasks", "semseg,dept"], "unknown task 'dept'"),
    (["--groups", "1,1,2,4"], "groups 1,1,2,4 do not fit 3 tasks"),
    (["--groups", "1,2,1,3"], "never decreasing"),
    (["--rank", "2"], "rank 2 is smaller than the number of task groups, 3"),
    (["--backbone", "huge"], "unknown backbone 'huge'"),
    (["--weights", "nowhere.pth"], "no file nowhere.pth"),
    (["--tree", "nowhere.json"], "cannot read nowhere.json"),
    (["--baseline", "nowhere.json"], "nowhere.json"),
    (["--dataset", "nyud", "--weights", "none", "--data-root", "nowhere"],
     "nyud: nowhere does not exist"),
    (["--device", "gpu"], "--device gpu cannot be used here"),
    (["--device", "meta"], "--device meta cannot be used here"),
    (["--weights", "imagenet"], "none from imagenet for backbone mini"),
    (["--dataset", "nyud", "--weights", "none", "--data-root", __file__], "cannot unpack"),
    (["--backbone", "tiny"], "of --backbone mini; with tiny, give --weights imagenet (a download), "
     "none (random)"),
])
def test_bad_flags_are_one_line_errors(tmp_path, flags, message):
    assert message in refused(*flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("flag, value", [
    ("--size", "abc"), ("--size", "0"), ("--lr", "-1"), ("--dropout", "1.5"), ("--rank", "0"),
    ("--groups", "1,2"), ("--groups", "a"), ("--scales", "0"), ("--scales", "a:b"),
    ("--epochs", "0")])
def test_impossible_values_are_usage_errors(flag, value, capsys):
    """argparse's usage, naming the flag; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train.main([f"{flag}={value}"])
    assert stop.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("--out", tmp_path / "file")


@pytest.mark.parametrize("stages, message", [
    ([[ALL], [["semseg", "depth"], ["normals"]], [["semseg", "normals"], ["depth"]],
      [[t] for t in ALL]], "not nested"),
    ([[ALL], [ALL], [["semseg"], ["depth"]], [[t] for t in ALL]], "each of the 3 tasks exactly"),
    ([[ALL], [ALL], [["semseg", "depth"], ["edges"]], [[t] for t in ALL]],
     "is for other tasks: edges not among"),
    ([[ALL], [ALL]], "2 stages, but the backbone has 4"),
    ([[ALL], [ALL, []], [ALL], [[t] for t in ALL]], "and no empty group"),
    (3, "is not {"),
])
def test_bad_trees_are_refused(tmp_path, stages, message):
    """Not nested, a task missing or unknown, too few stages, not a tree at all."""
    path = write_tree(tmp_path / "tree.json", stages)
    assert message in refused("--tree", path, "--out", tmp_path / "run")


@pytest.mark.parametrize("flag", ["--tree", "--baseline"])
def test_files_of_flags_are_files_of_some_depth(tmp_path, flag):
    """JSON of 100,000 brackets, a FIFO that nobody writes to, a folder: one line that names it."""
    (tmp_path / "deep").write_text('{"tree": ' + "[" * 100_000)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("deep", "folder", "fifo"):
        assert str(tmp_path / name) in refused(flag, tmp_path / name, "--out", tmp_path / "run")


class Deadly:
    """Samples of which the third kills the process that reads it."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.samples[i]


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    """As where the memory does not suffice."""
    monkeypatch.setattr(train, "run", partial(
        train.run, open_data=lambda *a: Deadly(train.open_dataset(*a))))
    assert "DataLoader worker" in refused("--out", tmp_path / "run", "--workers", "1", "--groups",
                                          "1,1,1,1")


def test_a_run_is_never_overwritten(rooms_run):
    before = (rooms_run / "last.pt").read_bytes()
    assert "already holds a run" in refused("--out", rooms_run)
    assert (rooms_run / "last.pt").read_bytes() == before


def test_resuming_with_another_configuration_is_refused(rooms_run):
    before = (rooms_run / "last.pt").read_bytes()
    message = refused("--out", rooms_run, "--resume", "--rank", "12")
    assert "--rank 6, not 12" in message
    assert (rooms_run / "last.pt").read_bytes() == before


def test_bad_checkpoints_are_refused(rooms_run, tmp_path):
    """Missing, cut short, not ours, from another backbone, with a weight missing."""
    assert "no file" in refused("--checkpoint", tmp_path / "none.pt", by=eval)
    assert "no file" in refused("--checkpoint", tmp_path, by=eval)
    assert "only --method full" in refused("--checkpoint", rooms_run / "best.pt",
                                           "--export-backbone", tmp_path / "b.pth", by=eval)
    good = rooms_run / "best.pt"
    bad = tmp_path / "bad.pt"
    bad.write_bytes(good.read_bytes()[:5000])
    assert "is damaged" in refused("--checkpoint", bad, by=eval)
    torch.save({"weights": 1}, bad)
    assert "not a checkpoint of train.py" in refused("--checkpoint", bad, by=eval)
    assert "another backbone" in refused("--checkpoint", good, "--weights", "none", by=eval)
    state = torch.load(good, weights_only=True)
    state["model"].pop(next(iter(state["model"])))
    torch.save(state, bad)
    assert "1 weights are missing" in refused("--checkpoint", bad, by=eval)
    shutil.copy(bad, tmp_path / "last.pt")
    shutil.copy(good, tmp_path / "best.pt")
    assert "1 weights are missing" in refused("--resume", "--out", tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_task(tmp_path, monkeypatch):
    loss = train.make_tasks(["depth"], 6)[0].__class__.loss
    monkeypatch.setattr("tasks.Depth.loss", lambda *a: loss(*a) * float("nan"))
    message = refused("--out", tmp_path / "run", "--groups", "1,1,1,1")
    assert "the loss of depth is not finite between steps 0 and 1" in message
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 0
