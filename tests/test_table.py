"""tools/table.py on runs of known results."""

import json
import math

import pytest

from tools import table


def write_run(folder, seed, dataset="rooms", **results):
    folder.mkdir(parents=True)
    metric = {"semseg": "mIoU", "depth": "rmse"}
    best, last = ({"results": {task: {metric[task]: value * factor}
                               for task, value in results.items()}} for factor in (1, 1.5))
    (folder / "metrics.json").write_text(json.dumps(
        {"seed": seed, "trainable": 1000, "dataset": dataset, "last": last, **best}))


@pytest.fixture
def runs(tmp_path):
    """Single-task runs of two seeds, one a task, and a multi-task method of two seeds."""
    for seed, semseg, depth in ((0, 0.4, 1.0), (1, 0.6, 1.0)):
        write_run(tmp_path / f"single/{seed}-semseg", seed, semseg=semseg)
        write_run(tmp_path / f"single/{seed}-depth", seed, depth=depth)
    write_run(tmp_path / "tglora/0", 0, semseg=0.55, depth=0.9)
    write_run(tmp_path / "tglora/1", 1, semseg=0.6, depth=0.8)
    return tmp_path


def test_means_deviations_and_delta_m(runs, capsys):
    """Against the single-task means 0.5 and 1.0: gains of 10 % and 20 % each, so 10 and 20."""
    table.main([str(runs), "--baseline", "single"])
    head, single, ours = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "method" and "depth rmse down" in head and "delta-m %" in head
    assert "2,000" in single and "0.5000 +- 0.1414" in single and "1.0000 +- 0.0000" in single
    assert "1,000" in ours and "0.5750 +- 0.0354" in ours
    assert f"15.0000 +- {math.sqrt(50):.4f}" in ours


def test_a_file_can_be_the_baseline(runs, tmp_path, capsys):
    path = tmp_path / "paper.json"
    path.write_text(json.dumps({"results": {"semseg": {"mIoU": 0.575}, "depth": {"rmse": 0.85}}}))
    table.main([str(runs), "--baseline", str(path)])
    assert "0.0000 +- " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("content, message", [
    ("{", "is not a metrics.json"), ('{"results": 3}', "is not a metrics.json"),
    ('{"results": {"semseg": {"mIoU": 0.5}}}', "baseline: no rmse of depth")])
def test_bad_baselines_are_refused(runs, tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        table.main([str(runs), "--baseline", str(path)])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no .*METHOD/RUN/metrics.json"):
        table.main([str(tmp_path)])


def test_the_last_epochs_can_be_compared(runs, capsys):
    table.main([str(runs), "--last"])
    head, _, ours = capsys.readouterr().out.splitlines()
    assert head.split()[1] == "epoch" and ours.split()[1] == "last"
    assert f"{0.575 * 1.5:.4f} +- " in ours


def test_a_baseline_method_may_lack_a_task(runs, capsys):
    """Single-task runs of one task alone: an error that names the other, not a trace."""
    for seed in (0, 1):
        (runs / f"single/{seed}-depth/metrics.json").unlink()
    with pytest.raises(SystemExit, match="error: baseline: no rmse of depth"):
        table.main([str(runs), "--baseline", "single"])
    (runs / "single/0-semseg/metrics.json").unlink()
    write_run(runs / "single/0-depth2", 0, depth=1.0)  # seed 0 has depth, seed 1 semseg
    table.main([str(runs), "--baseline", "single"])
    assert "tglora" in capsys.readouterr().out


def test_two_runs_of_one_seed_are_refused(runs):
    """They would count twice, and one of them not at all."""
    write_run(runs / "tglora/again", 0, semseg=0.1, depth=0.1)
    with pytest.raises(SystemExit, match="again.*tglora has depth, semseg of seed 0 already"):
        table.main([str(runs)])


def test_datasets_are_not_mixed(runs, tmp_path):
    """Neither among the runs nor with a baseline's."""
    path = tmp_path / "paper.json"
    path.write_text(json.dumps({"dataset": "nyud", "results": {"semseg": {"mIoU": 0.5},
                                                               "depth": {"rmse": 0.5}}}))
    with pytest.raises(SystemExit, match="paper.json is of nyud, the runs of rooms"):
        table.main([str(runs), "--baseline", str(path)])
    write_run(runs / "tglora/2", 2, dataset="nyud", semseg=0.5, depth=0.9)
    with pytest.raises(SystemExit, match="is of nyud, other runs are of rooms"):
        table.main([str(runs)])
