"""Tests of extras/table.py: a table equals one computed by hand, and runs that do not belong
together are refused."""

import json

import pytest
import torch
from PIL import Image

import train
from eval import load_run
from extras import table


def write_run(folder, seed, more=(), **results):
    """Write a metrics.json with `results` {task: value} for the best epoch, and what is in `more`.

    The last epoch's values are 1.5 times as large.
    """
    best, last = {}, {}
    for task, value in results.items():
        metric = {"semseg": "mIoU", "depth": "rmse"}[task]
        best[task], last[task] = {metric: value}, {metric: 1.5 * value}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({
        "results": best, "last": {"results": last}, "seed": seed, "trainable": 1000,
        "dataset": "rooms", "images": 64, "flags": {"size": [112, 112], "night": True},
        **dict(more)}))


@pytest.fixture
def runs(tmp_path):
    """A folder with runs of a single-task and a multi-task method, with two seeds each."""
    folder = tmp_path / "runs"
    for seed, semseg, depth in ((0, 0.4, 1.0), (1, 0.6, 1.0)):
        write_run(folder / f"single/{seed}-semseg", seed, semseg=semseg)
        write_run(folder / f"single/{seed}-depth", seed, depth=depth)
    write_run(folder / "tglora/0", 0, semseg=0.55, depth=0.9)
    write_run(folder / "tglora/1", 1, semseg=0.6, depth=0.8)
    return folder


def test_the_table_by_hand(runs, capsys):
    """tglora's two seeds gain 10 and 20 % on the baseline's mean, so delta-m is 15 +- sqrt(50)."""
    table.main([str(runs), "--baseline", "single"])
    head, single, ours = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "method" and "depth rmse down" in head and "delta-m %" in head
    assert "2,000" in single and "0.5000 +- 0.1414" in single and "1.0000 +- 0.0000" in single
    assert "1,000" in ours and "0.5750 +- 0.0354" in ours
    assert ours.endswith("  15.00 +- 7.07")


def test_the_last_epochs_can_be_compared_with_a_file(runs, capsys):
    """--last takes each run's last epoch, and a baseline may be a file."""
    path = runs / "paper.json"
    path.write_text(json.dumps({"results": {"semseg": {"mIoU": 0.8625}, "depth": {"rmse": 1.275}}}))
    table.main([str(runs), "--last", "--baseline", str(path)])
    ours = capsys.readouterr().out.splitlines()[-1]
    assert ours.split()[1] == "last" and "0.8625 +- " in ours and "0.00 +- 7.23" in ours


def test_folders_of_runs_are_methods(tmp_path, capsys):
    """A path may be a run, which has the name of its method, or a method with its runs.

    In the other tests, it is a folder of methods.
    """
    write_run(tmp_path / "a/decoders only", 0, depth=1.0)
    write_run(tmp_path / "b/decoders only", 1, depth=3.0)
    write_run(tmp_path / "more/tglora/0", 0, depth=1.5)
    folders = ["a/decoders only", "b/decoders only", "more/tglora"]
    table.main([*(str(tmp_path / name) for name in folders), "--baseline", "decoders only"])
    _, decoders, ours = capsys.readouterr().out.splitlines()
    assert decoders.startswith("decoders only  ") and "  2.0000 +- 1.4142  " in decoders
    assert ours.startswith("tglora  ") and ours.endswith("  25.00")


def test_unusable_files_are_refused(runs):
    """A folder without runs, a baseline without one of the tasks and an incomplete metrics.json are
    errors."""
    with pytest.raises(SystemExit, match=f"^error: no run in {runs / 'none'}; expected"):
        table.main([str(runs), str(runs / "none")])
    path = runs / "baseline.json"
    path.write_text('{"results": {"semseg": {"mIoU": 0.5}}}')
    with pytest.raises(SystemExit, match="^error: .*rmse of depth"):
        table.main([str(runs), "--baseline", str(path)])
    damaged = runs / "tglora/0/metrics.json"
    damaged.write_text('{"results": {"depth": {"rmse": 1}}}')
    with pytest.raises(SystemExit, match=f"^error: {damaged}"):
        table.main([str(runs)])


def test_runs_that_cannot_be_combined_are_refused(runs):
    """Two runs of one method with the same seed and task are refused."""
    write_run(runs / "tglora/again", 0, depth=0.1)
    with pytest.raises(SystemExit, match="again.* run of tglora with this seed also has .*depth"):
        table.main([str(runs)])


def test_runs_on_other_images_are_refused(runs, tmp_path):
    """A run or a baseline from other validation images is an error that names both files.

    test_train.py tests which settings are compared.
    """
    first = runs / "single/0-depth/metrics.json"
    other = tmp_path / "other"
    write_run(other, 0, {"images": 8}, semseg=0.5, depth=0.9)
    message = (f"^error: {other / 'metrics.json'} has number of images 8, but {first} has number "
               "of images 64; compare")
    with pytest.raises(SystemExit, match=message):
        table.main([str(runs), str(other)])
    with pytest.raises(SystemExit, match=message):
        table.main([str(runs), "--baseline", str(other / "metrics.json")])


def test_the_picture_shows_every_methods_predictions(tmp_path, monkeypatch):
    """Each row is drawn by the network of its run. Runs with other tasks are refused."""
    small = ["--train-rooms", "2", "--val-rooms", "2", "--size", "32", "--epochs", "1",
             "--batch-size", "2", "--method", "decoders", "--device", "cpu", "--tasks", "sal,depth"]
    for name, lr in (("low", "1e-4"), ("high", "1e-2")):
        train.main([*small, "--lr", lr, "--out", str(tmp_path / name)])
    drawn, draw = {}, table.draw_samples

    def draw_samples(path, predictors, *rest):
        drawn.update(predictors)
        draw(path, predictors, *rest)
    monkeypatch.setattr(table, "draw_samples", draw_samples)
    path = tmp_path / "picture.png"
    low, high = str(tmp_path / "low"), str(tmp_path / "high")
    table.main([low, high, "--picture", str(path)])
    assert Image.open(path).height > 6 * 160                    # two samples of three rows each
    table.main([low, high, "--picture", str(path), "--images", "1", "5"])   # there is no image 5
    assert 3 * 160 < Image.open(path).height < 6 * 160
    image = torch.rand(1, 3, 32, 32)
    for name, predict in drawn.items():
        model, _, _ = load_run(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(predict(image)["depth"], model.eval()(image)["depth"])
    state = torch.load(f"{high}/best.pt", weights_only=True)
    state["config"]["tasks"] = ("depth", "sal")
    torch.save(state, f"{high}/best.pt")
    with pytest.raises(SystemExit, match=f"{high} has the tasks depth, sal, but {low} has sal, de"):
        table.main([low, high, "--picture", str(path)])


def test_a_metric_that_is_null_is_not_a_number(runs, capsys):
    """A metric that is null in metrics.json, for lack of labels, makes the task's mean nan."""
    path = runs / "tglora/0/metrics.json"
    path.write_text(path.read_text().replace('"rmse": 0.9', '"rmse": null'))
    table.main([str(runs), "--baseline", "single"])
    assert "0.5750 +- 0.0354  nan +- nan" in capsys.readouterr().out.splitlines()[-1]
