"""tools/study.py: runs that exist, the statistics by hand, and a tiny study that is killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import costs
from PIL import Image

from tasks import delta_m
from tools import study
from util.draw import draw_gains
from util.report import interval, mean_results


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
    study.main(["--table", str(runs), "--baseline", "single"])
    head, single, ours = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "method" and "depth rmse down" in head and "delta-m %" in head
    assert "2,000" in single and "0.5000 +- 0.1414" in single and "1.0000 +- 0.0000" in single
    assert "1,000" in ours and "0.5750 +- 0.0354" in ours
    assert f"15.0000 +- {math.sqrt(50):.4f}" in ours


def test_a_file_can_be_the_baseline(runs, tmp_path, capsys):
    path = tmp_path / "paper.json"
    path.write_text(json.dumps({"results": {"semseg": {"mIoU": 0.575}, "depth": {"rmse": 0.85}}}))
    study.main(["--table", str(runs), "--baseline", str(path)])
    assert "0.0000 +- " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("content, message", [
    ("{", "is not a metrics.json"), ('{"results": 3}', "is not a metrics.json"),
    ('{"results": {"semseg": {"mIoU": 0.5}}}', "baseline: no rmse of depth")])
def test_bad_baselines_are_refused(runs, tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        study.main(["--table", str(runs), "--baseline", str(path)])


@pytest.mark.parametrize("content", [
    "5", "[" * 100_000, '{"results": {"depth": {}}, "trainable": 1}',
    '{"results": {"depth": {"rmse": "x"}}, "trainable": 1}',
    '{"results": {"depth": {"rmse": []}}, "trainable": 1}',
    '{"results": {"depth": 1}, "trainable": 1}', '{"results": {"deep": {}}, "trainable": 1}',
    '{"results": {"depth": {"rmse": 1}}}',
    '{"results": {"depth": {"rmse": 1}}, "trainable": "x"}',
    '{"results": {"depth": {"rmse": 1}}, "trainable": 1, "seed": {}}',
    '{"results": {"depth": {"rmse": 1}}, "trainable": 1, "last": 5}'])
def test_runs_of_wrong_types_are_refused_by_name(runs, content):
    path = runs / "tglora/7/metrics.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(SystemExit, match=f"error: {path}"):
        study.main(["--table", str(runs)])


def test_a_metric_that_is_null_is_not_a_number(runs, capsys):
    """A run without labels of a task is shown as such, and has no delta-m."""
    path = runs / "tglora/0/metrics.json"
    path.write_text(path.read_text().replace('"rmse": 0.9', '"rmse": null'))
    study.main(["--table", str(runs), "--baseline", "single"])
    assert "0.5750 +- 0.0354  nan +- nan" in capsys.readouterr().out.splitlines()[-1]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no .*METHOD/RUN/metrics.json"):
        study.main(["--table", str(tmp_path)])


def test_the_last_epochs_can_be_compared(runs, capsys):
    study.main(["--table", str(runs), "--last"])
    head, _, ours = capsys.readouterr().out.splitlines()
    assert head.split()[1] == "epoch" and ours.split()[1] == "last"
    assert f"{0.575 * 1.5:.4f} +- " in ours


def test_a_baseline_method_may_lack_a_task(runs, capsys):
    """Single-task runs of one task alone: an error that names the other, not a trace."""
    for seed in (0, 1):
        (runs / f"single/{seed}-depth/metrics.json").unlink()
    with pytest.raises(SystemExit, match="error: baseline: no rmse of depth"):
        study.main(["--table", str(runs), "--baseline", "single"])
    (runs / "single/0-semseg/metrics.json").unlink()
    write_run(runs / "single/0-depth2", 0, depth=1.0)  # seed 0 has depth, seed 1 semseg
    study.main(["--table", str(runs), "--baseline", "single"])
    assert "tglora" in capsys.readouterr().out


def test_two_runs_of_one_seed_are_refused(runs):
    """They would count twice, and one of them not at all."""
    write_run(runs / "tglora/again", 0, semseg=0.1, depth=0.1)
    with pytest.raises(SystemExit, match="again.*tglora has depth, semseg of seed 0 already"):
        study.main(["--table", str(runs)])


def test_datasets_are_not_mixed(runs, tmp_path):
    """Neither among the runs nor with a baseline's."""
    path = tmp_path / "paper.json"
    path.write_text(json.dumps({"dataset": "nyud", "results": {"semseg": {"mIoU": 0.5},
                                                               "depth": {"rmse": 0.5}}}))
    with pytest.raises(SystemExit, match="paper.json is of nyud, the runs of rooms"):
        study.main(["--table", str(runs), "--baseline", str(path)])
    write_run(runs / "tglora/2", 2, dataset="nyud", semseg=0.5, depth=0.9)
    with pytest.raises(SystemExit, match="is of nyud, other runs are of rooms"):
        study.main(["--table", str(runs)])


# --- statistics -----------------------------------------------------------------------------------
def test_intervals_are_students():
    """1, 2, 3, 4, 5: mean 3, deviation 1.5811, t of four degrees 2.776; one value has none."""
    assert interval([1, 2, 3, 4, 5]) == (3, pytest.approx(2.776 * 1.5811 / 5 ** 0.5, abs=1e-3))
    assert interval([1.0, 3.0]) == (2, pytest.approx(12.706, abs=1e-3))
    assert interval([7.0]) == (7, math.inf)


def test_the_table_has_the_interval(runs, capsys):
    """Gains of 10 and 20 %: 15 +- 12.706 * 7.0711 / sqrt(2)."""
    study.main(["--table", str(runs), "--baseline", "single"])
    assert "-48.53 to +78.53" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("low, high, verdict", [
    (0.1, 2.0, "holds"), (-0.1, 2.0, "undecided"), (-2.0, 0.1, "undecided"),
    (-2.0, -0.1, "does not hold")])
def test_a_claim_holds_only_where_its_interval_does(low, high, verdict, capsys):
    study.judge("a > b", (low + high) / 2, low, high)
    assert capsys.readouterr().out.endswith(f"[{low:+.2f}, {high:+.2f}]: {verdict}\n")


def test_rank_correlation():
    """Spearman's: 1 in the same order, -1 in the opposite; 0.9 after one swap of neighbours."""
    a = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert study.rank_correlation(a, [1, 10, 100, 1000, 10000])[0] == pytest.approx(1)
    assert study.rank_correlation(a, [5, 4, 3, 2, 1])[0] == pytest.approx(-1)
    rho, low, high = study.rank_correlation(a, [1, 2, 3, 5, 4])
    half = 1.96 * math.sqrt((1 + 0.405) / 2)  # of atanh(rho) = 1.4722
    assert rho == pytest.approx(0.9)
    assert (low, high) == (pytest.approx(math.tanh(1.4722 - half), abs=1e-3),
                           pytest.approx(math.tanh(1.4722 + half), abs=1e-3))


def test_the_picture_has_every_seed(tmp_path):
    """An orange dot a seed, where its delta-m is; a row a method."""
    draw_gains(tmp_path / "p.png", {"a": [0.0, 4.0], "b": [2.0]})
    orange = (np.array(Image.open(tmp_path / "p.png")) == (255, 165, 0)).all(-1)
    assert [orange[top:top + 26].any() for top in (34, 60)] == [True, True]
    columns = np.flatnonzero(orange[34:60].any(0))
    assert columns.max() - columns.min() > 520 * 4 / 6  # -1 to 5 is 520 pixels wide


# --- the study ------------------------------------------------------------------------------------
def test_what_was_asked():
    """Fixed before the reported seeds: no seed chooses and reports, a claim compares two arms."""
    assert not set(study.CHOICE) & set(study.REPORTED) and set(study.FEW) <= set(study.REPORTED)
    assert len(study.REPORTED) >= 5 and study.REPORTED[0] == 10
    assert study.CLAIMS == (("tglora", "mtl-lora"), ("tglora", "single-lora"),
                            ("tglora", "least-similar"), ("tglora", "random"),
                            ("tglora", "multi-full"))
    sim = np.array([[1, .3, .1], [.3, 1, .2], [.1, .2, 1]])
    trees = {name: study.build_tree(of(sim, 10), (1, 1, 2, 3)) for name, of in study.TREES.items()}
    assert trees["tglora"][2] == [(0, 1), (2,)] and trees["least-similar"][2] == [(0, 2), (1,)]
    drawn = [study.TREES["random"](sim, seed).tolist() for seed in study.REPORTED]
    assert all(drawn.count(one) == 1 for one in drawn)


def test_arms_have_one_budget():
    """Every arm with adapters has as many of their parameters as TGLoRA, MTLoRA within 5 %; BDTA
    as many as its paper's r = 4 gives, which is the nearest."""
    flags = study.SETTINGS["rooms"].split() + ["--weights", "none"]
    config, counts = study.parse_arguments(flags), {}
    for arm, own in study.ARMS.items():
        tasks = ["--tasks", "semseg"] if arm in study.ALONE else []
        cost = costs(*flags, *own(config).split(), *tasks)
        counts[arm] = cost["adapters"] * (len(config.tasks) if arm in study.ALONE else 1)
    assert counts.pop("mtlora") == pytest.approx(counts["tglora"], rel=0.05)
    assert counts.pop("bdta") == 291_744
    assert [counts.pop(arm) for arm in ("single-full", "multi-full", "decoders")] == [0, 0, 0]
    assert set(counts.values()) == {307_200}
    whole = costs(*flags, "--method", "full")["trainable"]
    assert costs(*flags)["trainable"] < 0.25 * whole


TINY = ("--tasks semseg,depth,normals --size 32 --train-rooms 6 --val-rooms 2 --epochs 2 "
        "--batch-size 2 --sim-images 3 --head-epochs 1 --eval-every 2").split()


def small_study(out, *flags):
    root = Path(__file__).parent.parent
    return [sys.executable, "-m", "tools.study", *TINY, "--out", str(out), "--jobs", "1",
            "--arms", "single-full", "tglora", "random", "--seeds", "10", "11", *flags], root


def numbers(out):
    runs = json.loads((out / "study.json").read_text())["runs"]
    return {name: {k: v for k, v in run.items() if k != "seconds"} for name, run in runs.items()}


def test_a_killed_study_goes_on(tmp_path):
    """Killed after its third run, then continued: the numbers of one that was left alone."""
    command, root = small_study(tmp_path / "killed")
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    state = tmp_path / "killed/study.json"
    while not state.exists() or len(json.loads(state.read_text())["runs"]) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = numbers(tmp_path / "killed")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    after = numbers(tmp_path / "killed")
    assert after.items() >= before.items() and 3 <= len(before) < len(after)
    reported = [name for name in after if not name.startswith("at ")]
    assert len(reported) == 3 + 2 * 5  # similarities; three networks, and one, and one
    rates = json.loads(state.read_text())["rates"]
    assert rates.keys() == {"single-full", "tglora", "random"}
    for arm, rate in rates.items():  # neighbours by factors of 3 were tried, on seed 0
        tried = {float(name.split("/")[0][3:]) for name in after if f"/{arm}/0" in name}
        assert {float(f"{rate * factor:.4g}") for factor in (1 / 3, 1, 3)} <= tried or (
            len(tried) == 6)
    assert "tglora > random: " in done.stdout and (tmp_path / "killed/study.png").is_file()
    for seed in (10, 11):  # an arm is what its flags say, by train.py alone
        run = after[f"tglora/{seed}"]
        assert f"--lr {rates['tglora']:.4g}" in run["flags"] and f"--seed {seed}" in run["flags"]
    again = tmp_path / "again"
    flags = json.loads(state.read_text())["flags"] + " " + after["tglora/10"]["flags"]
    subprocess.run([sys.executable, Path(study.train.__file__), *flags.split(), "--out", again],
                   check=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((again / "metrics.json").read_text())
    assert found["tree"] == after["tglora/10"]["tree"]
    assert found["last"]["results"] == after["tglora/10"]["results"]  # to the last digit
    with pytest.raises(SystemExit, match="is of a study with"):
        study.main(["--out", str(tmp_path / "killed"), "--epochs", "1"])
    baseline = mean_results([{"results": {
        task: after[f"single-full/{seed}-{task}"]["results"][task]
        for task in ("semseg", "depth", "normals")}} for seed in (10, 11)])
    mean, half = interval([delta_m(after[f"tglora/{seed}"]["results"], baseline)
                           - delta_m(after[f"random/{seed}"]["results"], baseline)
                           for seed in (10, 11)])
    assert f"tglora > random: {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" in done.stdout


def test_a_run_that_fails_is_told(tmp_path, capsys):
    """Its message is kept, the study names the arm."""
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"rates": {"mtl-lora": 1e30}}))
    with pytest.raises(SystemExit, match="runs of mtl-lora failed"):
        study.main([*TINY, "--out", str(tmp_path / "s"), "--arms", "mtl-lora", "--seeds", "10",
                    "--rates", str(rates), "--jobs", "1"])
    assert "not finite" in numbers(tmp_path / "s")["mtl-lora/10"]["failed"]


# --- docs/STUDY.md --------------------------------------------------------------------------------
def test_the_page_says_what_its_runs_say(tmp_path, capsys):
    """Every line that `tools.study` prints of docs/study_rooms.json is in docs/STUDY.md."""
    docs = Path(__file__).parent.parent / "docs"
    state = (docs / "study_rooms.json").read_text()
    (tmp_path / "study.json").write_text(state)
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    page = (docs / "STUDY.md").read_text().splitlines()
    assert len(printed) > 40 and printed[-1].startswith("wrote")
    assert [line for line in printed[:-1] if line not in page] == []
    assert (tmp_path / "study.json").read_text() == state  # nothing had to be run
    drawn = [(np.array(Image.open(path)) == (255, 165, 0)).all(-1)
             for path in (tmp_path / "study.png", docs.parent / "assets/study.png")]
    assert (drawn[0] == drawn[1]).all() and drawn[0].any()
    best = json.loads(state)["rates"]
    assert set(best) == set(study.ARMS)
