"""Tests of extras/table.py: a table equals one computed by hand, and runs that do not belong
together are refused."""

import json

import pytest

from extras import table


def write_run(folder, seed, dataset="rooms", **results):
    """Write a metrics.json with `results` {task: value} for the best epoch.

    The last epoch's values are 1.5 times as large.
    """
    best, last = {}, {}
    for task, value in results.items():
        metric = {"semseg": "mIoU", "depth": "rmse"}[task]
        best[task], last[task] = {metric: value}, {metric: 1.5 * value}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({
        "results": best, "last": {"results": last}, "seed": seed, "trainable": 1000,
        "dataset": dataset}))


@pytest.fixture
def runs(tmp_path):
    """A folder with runs of a single-task and a multi-task method, with two seeds each."""
    for seed, semseg, depth in ((0, 0.4, 1.0), (1, 0.6, 1.0)):
        write_run(tmp_path / f"single/{seed}-semseg", seed, semseg=semseg)
        write_run(tmp_path / f"single/{seed}-depth", seed, depth=depth)
    write_run(tmp_path / "tglora/0", 0, semseg=0.55, depth=0.9)
    write_run(tmp_path / "tglora/1", 1, semseg=0.6, depth=0.8)
    return tmp_path


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


def test_unusable_files_are_refused(runs):
    """A baseline without one of the tasks or from another dataset is an error.

    An incomplete metrics.json is an error, too.
    """
    path = runs / "baseline.json"
    for content, message in (('{"results": {"semseg": {"mIoU": 0.5}}}', "rmse of depth"),
                             ('{"results": {}, "dataset": "nyud"}', "on nyud, but the runs are")):
        path.write_text(content)
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            table.main([str(runs), "--baseline", str(path)])
    damaged = runs / "tglora/0/metrics.json"
    damaged.write_text('{"results": {"depth": {"rmse": 1}}}')
    with pytest.raises(SystemExit, match=f"^error: {damaged}"):
        table.main([str(runs)])


def test_runs_that_cannot_be_combined_are_refused(runs):
    """Two runs of one method with the same seed and task are refused, as are two datasets in one
    folder."""
    write_run(runs / "tglora/again", 0, depth=0.1)
    with pytest.raises(SystemExit, match="again.* run of tglora with this seed also has .*depth"):
        table.main([str(runs)])
    write_run(runs / "tglora/again", 2, dataset="nyud", semseg=0.5, depth=0.9)
    with pytest.raises(SystemExit, match="is a run on nyud, but other runs here are on rooms"):
        table.main([str(runs)])


def test_a_metric_that_is_null_is_not_a_number(runs, capsys):
    """A metric that is null in metrics.json, for lack of labels, makes the task's mean nan."""
    path = runs / "tglora/0/metrics.json"
    path.write_text(path.read_text().replace('"rmse": 0.9', '"rmse": null'))
    table.main([str(runs), "--baseline", "single"])
    assert "0.5750 +- 0.0354  nan +- nan" in capsys.readouterr().out.splitlines()[-1]
