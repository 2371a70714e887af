"""extras/study.py: its statistics by hand, the recorded study, and a tiny study that is killed."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from cost import cost
from extras import study
from extras.study import Study
from util import write_json

ROOT = Path(__file__).parent.parent.parent
TASKS = ("semseg", "human_parts", "sal", "depth", "normals")
RECORDED = study.read_study(ROOT / "docs/study_rooms.json")


# --- the table of existing runs -------------------------------------------------------------------
def write_run(folder, seed, dataset="rooms", **results):
    """A metrics.json whose last epoch is 1.5 times its best."""
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
    """Single-task runs of two seeds, and a multi-task method of two seeds."""
    for seed, semseg, depth in ((0, 0.4, 1.0), (1, 0.6, 1.0)):
        write_run(tmp_path / f"single/{seed}-semseg", seed, semseg=semseg)
        write_run(tmp_path / f"single/{seed}-depth", seed, depth=depth)
    write_run(tmp_path / "tglora/0", 0, semseg=0.55, depth=0.9)
    write_run(tmp_path / "tglora/1", 1, semseg=0.6, depth=0.8)
    return tmp_path


def test_the_table_by_hand(runs, capsys):
    """Against the means 0.5 and 1.0 the two seeds gain 10 and 20 %: 15 +- 12.706 * 5."""
    study.main(["--table", str(runs), "--baseline", "single"])
    head, single, ours = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "method" and "depth rmse down" in head and "delta-m %" in head
    assert "2,000" in single and "0.5000 +- 0.1414" in single and "1.0000 +- 0.0000" in single
    assert "1,000" in ours and "0.5750 +- 0.0354" in ours
    assert f"15.0000 +- {math.sqrt(50):.4f}" in ours and "-48.53 to +78.53" in ours


def test_the_last_epochs_can_be_compared_with_a_file(runs, capsys):
    """--last takes each run's last epoch, 1.5 times the best; the file has the same means."""
    path = runs / "paper.json"
    path.write_text(json.dumps({"results": {"semseg": {"mIoU": 0.8625}, "depth": {"rmse": 1.275}}}))
    study.main(["--table", str(runs), "--last", "--baseline", str(path)])
    ours = capsys.readouterr().out.splitlines()[-1]
    assert ours.split()[1] == "last" and "0.8625 +- " in ours and "0.0000 +- " in ours


def test_unusable_files_are_refused(runs):
    """A damaged run is named, and a baseline has the same tasks and the same dataset."""
    path = runs / "baseline.json"
    for content, message in (('{"results": {"semseg": {"mIoU": 0.5}}}', "rmse of depth"),
                             ('{"results": {}, "dataset": "nyud"}', "is on nyud, the runs are on")):
        path.write_text(content)
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            study.main(["--table", str(runs), "--baseline", str(path)])
    damaged = runs / "tglora/0/metrics.json"
    damaged.write_text('{"results": {"depth": {"rmse": 1}}}')
    with pytest.raises(SystemExit, match=f"^error: {damaged}"):
        study.main(["--table", str(runs)])


def test_runs_that_cannot_be_combined_are_refused(runs):
    """Two runs of one seed and task would count twice; two datasets cannot be compared."""
    write_run(runs / "tglora/again", 0, depth=0.1)
    with pytest.raises(SystemExit, match="again.*tglora has depth of this seed already"):
        study.main(["--table", str(runs)])
    write_run(runs / "tglora/again", 2, dataset="nyud", semseg=0.5, depth=0.9)
    with pytest.raises(SystemExit, match="is a run on nyud, other runs are on rooms"):
        study.main(["--table", str(runs)])


def test_a_metric_that_is_null_is_not_a_number(runs, capsys):
    """A run without any label of a task is shown as nan and has no delta-m."""
    path = runs / "tglora/0/metrics.json"
    path.write_text(path.read_text().replace('"rmse": 0.9', '"rmse": null'))
    study.main(["--table", str(runs), "--baseline", "single"])
    assert "0.5750 +- 0.0354  nan +- nan" in capsys.readouterr().out.splitlines()[-1]


# --- statistics -----------------------------------------------------------------------------------
def test_intervals_are_students():
    """1 to 5: mean 3, deviation 1.5811, t of four degrees of freedom 2.776; one value has none."""
    assert study.interval([1, 2, 3, 4, 5]) == (3, pytest.approx(1.9629, abs=1e-3))
    assert study.interval([1.0, 3.0]) == (2, pytest.approx(12.706, abs=1e-3))
    assert study.interval([7.0]) == (7, math.inf)


@pytest.mark.parametrize("low, high, answer", [
    (0.1, 2.0, "holds"), (-0.1, 2.0, "undecided"), (-2.0, -0.1, "does not hold")])
def test_a_claim_holds_only_if_its_interval_is_above_zero(low, high, answer):
    """An interval that contains 0 decides nothing."""
    line = study.verdict("a > b", 0.5, low, high)
    assert line == f"a > b: +0.50 [{low:+.2f}, {high:+.2f}]: {answer}"


def test_rank_correlation():
    """Spearman's rho: -1 in the opposite order, 0.9 after one swap of neighbours."""
    a = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert study.rank_correlation(a, [5, 4, 3, 2, 1])[0] == pytest.approx(-1)
    rho, low, high = study.rank_correlation(a, [1, 2, 3, 5, 4])
    half = 1.96 * math.sqrt((1 + 0.405) / 2)            # of atanh(0.9) = 1.4722
    assert rho == pytest.approx(0.9)
    assert low == pytest.approx(math.tanh(1.4722 - half), abs=1e-3)
    assert high == pytest.approx(math.tanh(1.4722 + half), abs=1e-3)


# --- the design -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_arms_have_the_same_number_of_adapter_parameters():
    """MTLoRA's differ by less than 5 %; BDTA's are those that r = 4 of its paper gives."""
    flags = RECORDED["flags"].split() + ["--weights", "none"]
    config = study.parse_arguments(flags)
    counts = {}
    for arm in study.ARMS:
        arm_flags, num_networks = study.arm_flags(arm, config), 1
        if arm in study.SINGLE:
            arm_flags, num_networks = [*arm_flags, "--tasks", "semseg"], len(config.tasks)
        count = cost(study.parse_arguments([*flags, *arm_flags]))
        counts[arm] = num_networks * count["adapters"]
    assert counts.pop("mtlora") == pytest.approx(counts["tglora"], rel=0.05)
    assert counts.pop("bdta") == 291_744
    assert [counts.pop(arm) for arm in ("single-full", "multi-full", "decoders")] == [0, 0, 0]
    assert set(counts.values()) == {307_200}


# --- runs -----------------------------------------------------------------------------------------
COMMON = ["--tasks", "depth,semseg"]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "last.pt", "metrics.json"])
def test_a_run_is_started_resumed_or_only_read(tmp_path, monkeypatch, there):
    """It depends on how far the run of an earlier, killed study came."""
    folder, calls = tmp_path / "arm/10", []

    def fake_run(argv):
        assert folder.exists() == (there == "last.pt")          # train.py makes new folders itself
        calls.append(argv)
        write_run(folder, 10, depth=0.5)

    monkeypatch.setattr(study, "parse_arguments", lambda argv: argv)
    monkeypatch.setattr(train, "run", fake_run)
    if there != "nothing":
        folder.mkdir(parents=True)
    if there == "last.pt":
        (folder / "last.pt").touch()
    if there == "metrics.json":
        write_run(folder, 10, depth=0.5)
    run = study.perform(COMMON, (["--lr", "0.1"], [[["depth", "semseg"]]] * 4), folder)

    tree_file = tmp_path / "arm/10.tree.json"
    if there == "last.pt":
        assert calls == [["--out", str(folder), "--resume"]]
    elif there == "metrics.json":
        assert calls == []
    else:
        assert calls == [[*COMMON, "--lr", "0.1", "--out", str(folder), "--tree", str(tree_file)]]
    assert json.loads(tree_file.read_text())["tree"][0] == [["depth", "semseg"]]
    assert run["results"] == {"depth": {"rmse": 0.75}}          # of the last epoch
    assert run["flags"] == "--lr 0.1" and run["trainable"] == 1000


def test_a_failed_run_keeps_its_message(tmp_path, monkeypatch):
    """A diverged run is recorded, and the study names its arm; another error ends the study."""
    messages = ["the loss of depth is not finite", "the disk is full"]

    def fail(config):
        raise ValueError(messages[0])

    monkeypatch.setattr(train, "run", fail)
    run = study.perform([], (["--lr", "1"], None), tmp_path / "mtl-lora/10")
    assert run == {"flags": "--lr 1", "failed": "the loss of depth is not finite"}

    def complete(self, wanted):
        for name in wanted:
            self.runs[name] = {"similarity": None} if name.startswith("similarity") else run

    monkeypatch.setattr(Study, "complete", complete)
    here = Study(tmp_path, RECORDED["flags"].split(), jobs=1)
    with pytest.raises(ValueError, match="a run of mtl-lora failed: .*study.json"):
        study.run_study(here, ["mtl-lora"], [10], {"mtl-lora": 1.0})
    del messages[0]
    with pytest.raises(ValueError, match="the disk is full"):
        study.perform([], (["--lr", "1"], None), tmp_path / "mtl-lora/11")


@pytest.mark.parametrize("peak, lowest, tried", [
    (0.002, 0, 3), (0.0000741, 0, 5), (1e-9, 0, 6), (0.054, 0, 6), (0.002, 0.001, 3)])
def test_rates_are_tried_beyond_the_better_end_until_it_gets_worse(tmp_path, monkeypatch, peak,
                                                                   lowest, tried):
    """In factors of 3 from the recipe's rate and a third of it, six at most; a failed run loses."""
    def complete(self, wanted):
        for name, (flags, _) in wanted.items():
            assert flags[:2] == ["--seed", "0"]
            rate = float(flags[flags.index("--lr") + 1])
            quality = 1 / (1 + abs(math.log(rate / peak)))
            self.runs[name] = {"results": {"semseg": {"mIoU": quality}}, "trainable": 1}
            if not lowest < rate < 0.1:
                self.runs[name] = {"failed": "not finite"}

    monkeypatch.setattr(Study, "complete", complete)
    here = Study(tmp_path, RECORDED["flags"].split(), jobs=1)
    here.runs["similarity/0"] = {"similarity": None}
    here.choose_rates(["mtl-lora"])
    rates = [float(name.split("/")[0][3:]) for name in here.runs if name.startswith("at ")]
    assert len(rates) == tried
    finished = [rate for rate in rates if lowest < rate < 0.1]
    best = min(finished, key=lambda rate: abs(math.log(rate / peak)))
    assert here.rates["mtl-lora"] == pytest.approx(best, rel=1e-3)


def test_a_quick_study_is_compared_with_the_recorded_values(tmp_path, monkeypatch, capsys):
    """Values within 1 % agree; others are marked, and so is another tree."""
    names = set()

    def complete(self, wanted):
        for name in wanted:
            names.add(name)
            run = json.loads(json.dumps(RECORDED["runs"][name]))
            if name == "mtl-lora/10":
                run["results"]["depth"]["rmse"] *= 1.009
                run["results"]["semseg"]["mIoU"] *= 0.989
            if name == "tglora/10":
                run["tree"][1] = []
            self.runs[name] = run

    monkeypatch.setattr(Study, "complete", complete)
    study.main(["--quick", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert names == {"similarity/10", "mtl-lora/10", "tglora/10",
                     *(f"single-full/10-{task}" for task in TASKS)}
    assert "one seed decides nothing" in lines
    assert lines[-1].startswith("14 of 15 values agree to 1 % with the recorded ones")
    marked = [line.split() for line in lines if line.endswith("!")]
    assert [(words[0], words[1], words[-3]) for words in marked] == [
        ("mtl-lora/10", "semseg", "-1.10")]
    depth = next(line for line in lines if line.startswith("mtl-lora/10") and "depth" in line)
    assert depth.endswith("+0.90 %")
    assert [line.split()[0] for line in lines if "another tree" in line] == ["tglora/10"]


def test_another_study_in_the_folder_is_refused(tmp_path):
    """A folder with runs of other flags cannot be continued."""
    write_json(tmp_path / "study.json", {"flags": "--epochs 1", "rates": {}, "runs": {}})
    with pytest.raises(ValueError, match="study with the flags --epochs 1; choose another --out"):
        Study(tmp_path, ["--epochs", "2"], jobs=1)


def test_the_recorded_study_says_what_its_page_says(tmp_path, monkeypatch, capsys):
    """It asks for the recorded runs, prints the lines of its page and draws the page's picture.

    The page also shows how stable the tree was, which another version printed. Two rates were
    recorded for which the rule does not ask.
    """
    complete, names = Study.complete, set()

    def complete_recorded(self, wanted):
        for name, (flags, tree) in wanted.items():
            recorded = RECORDED["runs"][name]
            assert " ".join(flags) == recorded["flags"]
            if tree is not None:
                assert tree == recorded["tree"]
            assert (tree is not None) == (name.split("/")[-2] in study.WITH_TREE)
        names.update(wanted)
        complete(self, wanted)

    monkeypatch.setattr(Study, "complete", complete_recorded)
    text = (ROOT / "docs/study_rooms.json").read_text()
    (tmp_path / "study.json").write_text(text)
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs/STUDY.md").read_text().split("```")
    shown = "".join(page[1::2]).splitlines()
    assert printed[-1].startswith("wrote")
    assert printed[:-1] == [line for line in shown if line and not line.startswith("similarity, ")]
    assert (tmp_path / "study.json").read_text() == text
    never_asked = {name for name in RECORDED["runs"].keys() - names
                   if not name.startswith("similarity-")}
    assert never_asked == {"at 0.006/multi-full/0", *(
        f"at 0.006/single-full/0-{task}" for task in TASKS)}
    drawn = np.array(Image.open(tmp_path / "study.png"))
    shipped = np.array(Image.open(ROOT / "assets/study.png"))
    for colour in ((255, 165, 0), (65, 105, 225)):         # the dots, and the means with their bars
        pixels = (drawn == colour).all(-1)
        assert pixels.any() and (pixels == (shipped == colour).all(-1)).all()


# --- a tiny study, killed and continued -----------------------------------------------------------
TINY = ("--tasks semseg,depth,normals --size 32 --train-rooms 6 --val-rooms 2 --epochs 1 "
        "--batch-size 2 --sim-images 3 --head-epochs 1 --device cpu").split()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="asks the process group, which Windows does not have")
def test_a_killed_study_continues_and_leaves_no_process(tmp_path):
    """The finished runs are kept, and the same command does the others."""
    out = tmp_path / "study"
    command = [sys.executable, "-m", "extras.study", "--quick", *TINY, "--out", str(out),
               "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (out / "mtl-lora/10/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):     # the worker ends with its study
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    before = study.read_study(out / "study.json")["runs"]
    assert "similarity/10" in before

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = study.read_study(out / "study.json")["runs"]
    assert before.items() <= after.items()
    assert after.keys() == {"similarity/10", "mtl-lora/10", "tglora/10", "single-full/10-semseg",
                            "single-full/10-depth", "single-full/10-normals"}
    assert (out / "study.png").is_file()
