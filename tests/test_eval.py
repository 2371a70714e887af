"""Tests of eval.py: metrics equal those computed by hand, and the command repeats a run's results.

The command also draws predictions for photos.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eval
import train
from eval import best_constants, evaluate, load_run, predictor, reference
from report import format_table
from tasks import make_tasks

CPU = torch.device("cpu")


def batch(depth):
    """A batch with one image of 4x4 pixels. Only its left half has a depth: `depth` metres."""
    label = torch.zeros(1, 1, 4, 4)
    label[..., :2] = depth
    return {"size": torch.tensor([[4, 4]]),
            "image": torch.full((1, 3, 4, 4), 128, dtype=torch.uint8),
            "depth": label, "semseg": torch.full((1, 4, 4), 2, dtype=torch.uint8)}


def predict_two_metres(image):
    B, _, H, W = image.shape
    return {"depth": torch.full((B, 1, H, W), 2.0), "semseg": torch.zeros(B, 3, H, W)}


def test_the_validation_loss_is_a_mean_over_labelled_images():
    """A task's loss is a mean over images with a label for it. Eq. 8 sums the weighted losses."""
    depth, semseg = tasks = make_tasks(["depth", "semseg"], 3)
    depth.weight, semseg.weight = 4.0, 0.5
    result = evaluate(predict_two_metres, tasks, [batch(3.0), batch(0.0), batch(5.0)], (4, 4), CPU)
    assert result["loss"] == pytest.approx(4 * (1 + 3) / 2 + 0.5 * math.log(3))
    assert result["pixels"] == {"depth": 16, "semseg": 48} and result["images"] == 3
    assert result["results"]["depth"]["rmse"] == pytest.approx(((1 + 9) / 2) ** 0.5)
    assert result["nan"] == {"depth": 0, "semseg": 0}


def test_nan_predictions_are_counted_and_not_averaged_away():
    """NaN predictions at valid pixels make the metric NaN, and the table says how many there are.
    """
    def broken(image):
        predictions = predict_two_metres(image)
        predictions["depth"][0, 0, :3, 0] = math.nan
        predictions["depth"][0, 0, :3, 3] = math.nan            # not valid, so not counted
        return predictions
    tasks = make_tasks(["depth"], 3)
    result = evaluate(broken, tasks, [batch(3.0)], (4, 4), CPU)
    assert result["nan"] == {"depth": 3} and math.isnan(result["results"]["depth"]["rmse"])
    text = format_table(tasks, result, {"depth": {"rmse": 1.0, "abs_rel": 1.0}}, (4, 4))
    assert "not a number (NaN) at 3 of 8 valid pixels" in text


def test_a_task_without_labels_has_no_metric():
    """Without labels, the metrics of the network and of the best constant prediction are NaN.

    The table says why.
    """
    tasks = make_tasks(["depth"], 3)
    result = evaluate(predict_two_metres, tasks, [batch(0.0)], None, CPU)
    constants = reference(tasks, [batch(0.0)], None)
    assert math.isnan(result["results"]["depth"]["rmse"])
    assert math.isnan(constants["depth"]["rmse"]) and result["pixels"] == {"depth": 0}
    assert result["loss"] == 0
    assert "no image has a label for this task" in format_table(tasks, result, constants, None)


def test_the_constant_is_fitted_to_valid_pixels():
    """The best constants are the mean depth and the most common class of the valid pixels."""
    tasks = make_tasks(["depth", "semseg"], 3)
    batches = [batch(3.0), batch(5.0), batch(0.0)]
    constants = best_constants(tasks, batches, (4, 4))
    assert constants["depth"].tolist() == [4.0] and constants["semseg"].tolist() == [0, 0, 1]
    results = reference(tasks, batches, (4, 4))
    assert results["depth"]["rmse"] == pytest.approx(1.0) and results["semseg"]["mIoU"] == 1


def test_few_pixels_of_a_large_image_fit_the_constant():
    """Of the 10,000 valid pixels of an image, every second one counts: 5,000."""
    depth = torch.ones(1, 1, 100, 100)
    depth.view(-1)[1::2] = 3.0                  # none of these count
    depth.view(-1)[::250] = 6.0                 # 40 of those that count
    one = {"size": torch.tensor([[100, 100]]), "depth": depth,
           "image": torch.zeros(1, 3, 100, 100, dtype=torch.uint8)}
    constants = best_constants(make_tasks(["depth"], 3), [one], None)
    assert constants["depth"].tolist() == pytest.approx([(4960 * 1 + 40 * 6) / 5000])


def test_without_a_size_images_keep_their_own():
    """If no size is given, as with --native, the network gets each image at its own size."""
    shapes = []

    def predict(image):
        shapes.append(tuple(image.shape))
        return predict_two_metres(image)
    for size in (None, (32, 40)):
        evaluate(predict, make_tasks(["depth"], 3), [batch(1.0)], size, CPU)
    assert shapes == [(1, 3, 4, 4), (1, 3, 32, 40)]


def test_predictions_are_made_in_evaluation_mode_under_autocast():
    """`predictor` turns dropout off, and its predictions have the data type of autocast."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 2, 1)).train()
    image = torch.ones(1, 3, 4, 4)
    predict = predictor(model, None)
    assert torch.equal(predict(image), predict(image)) and not model.training
    assert predictor(model, torch.bfloat16)(image).dtype is torch.bfloat16


# --- the command ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train for one step. Returns the folder and the metrics of the run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    metrics = train.main([
        "--tasks", "semseg,depth,normals", "--train-rooms", "4", "--val-rooms", "3", "--size",
        "32", "--epochs", "1", "--batch-size", "4", "--groups", "1,1,1,3", "--device", "cpu",
        "--out", str(out)])
    return out, metrics


def test_evaluating_a_checkpoint_repeats_the_results_of_its_run(trained, capsys):
    """--json prints the same results as the run. --native evaluates images at their own size."""
    out, metrics = trained
    capsys.readouterr()
    flags = ["--device", "cpu", "--workers", "0"]
    eval.main(["--checkpoint", str(out / "best.pt"), "--json", *flags])
    again = json.loads(capsys.readouterr().out)
    assert again["results"] == metrics["results"] and again["reference"] == metrics["reference"]
    eval.main(["--checkpoint", str(out), "--native", *flags])
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("3 images at their own size, loss ")
    assert head.split() == ["task", "metric", "result", "constant", "valid", "pixels"]
    starred = [row.split() for row in rows if "*" in row]
    pixels = f"{3 * 32 * 32:,}"
    assert [(row[0], row[1], row[4], row[5]) for row in starred] == [
        ("semseg", "mIoU", "*up", pixels), ("depth", "rmse", "*down", pixels),
        ("normals", "mean", "*down", pixels)]


def test_a_checkpoint_is_evaluated_in_its_precision(trained, monkeypatch, capsys):
    """A run in bf16 is evaluated in bf16."""
    state = torch.load(trained[0] / "best.pt", weights_only=True)
    state["config"]["amp"] = "bf16"
    torch.save(state, trained[0] / "bf16.pt")
    seen = []
    monkeypatch.setattr(eval, "predictor", lambda model, amp: seen.append(amp) or
                        predictor(model, amp))
    eval.main(["--checkpoint", str(trained[0] / "bf16.pt"), "--device", "cpu", "--workers", "0"])
    assert seen == [torch.bfloat16]


def test_a_trained_network_can_be_used_from_python(trained):
    """load_run returns the network, its tasks and its settings."""
    model, tasks, config = load_run(trained[0])
    with torch.no_grad():
        predictions = model.eval()(torch.zeros(2, 3, 48, 40))
    assert {name: tuple(x.shape) for name, x in predictions.items()} == {
        "semseg": (2, 7, 48, 40), "depth": (2, 1, 48, 40), "normals": (2, 3, 48, 40)}
    assert [task.name for task in tasks] == list(config.tasks) and config.rank == 20


def test_photos_are_drawn_into_the_folder_of_the_run(trained, tmp_path, capsys):
    """No picture is overwritten, and a photo that cannot be read does not stop the others.

    --image cannot be combined with --json.
    """
    out, _ = trained
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not an image")
    flags = ["--checkpoint", str(out), "--device", "cpu", "--image"]
    eval.main([*flags, str(tmp_path / "good.png")])
    assert capsys.readouterr().out == f"wrote {out / 'good.predicted.png'}\n"
    picture = np.array(Image.open(out / "good.predicted.png"))
    assert (picture[40:140, 20:170] == (200, 0, 0)).all()       # the photo, enlarged to 120x160
    before = (out / "good.predicted.png").read_bytes()
    with pytest.raises(SystemExit) as stop:
        eval.main([*flags, str(tmp_path / "text.png"), str(tmp_path / "good.png")])
    first, second = stop.value.code.splitlines()        # one line per photo
    assert "text.png" in first and second == f"wrote {out / 'good.predicted-2.png'}"
    assert (out / "good.predicted.png").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        eval.main(["--checkpoint", str(out), "--json", "--image", "photo.jpg"])
    assert stop.value.code == 2
