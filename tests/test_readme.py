"""The README's claims: its commands run, its numbers are what the code prints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import costs

import eval

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_command_trains_and_really_learns(tmp_path):
    """`python train.py` on rooms it never saw: far better than any constant, in every task."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--out", tmp_path / "run"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    result, constant = metrics["results"], metrics["reference"]
    assert result["depth"]["rmse"] <= 0.6 * constant["depth"]["rmse"]
    assert result["normals"]["mean"] <= 0.6 * constant["normals"]["mean"]
    assert result["semseg"]["mIoU"] >= max(0.35, 3 * constant["semseg"]["mIoU"])
    for shown in (r"trained parameters: .*", r"task +metric +result .*"):
        assert re.search(shown, README)[0] in done.stdout


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_cost_shown_is_the_cost_printed(capsys):
    eval.main(["--cost", "--dataset", "nyud"])
    assert capsys.readouterr().out in README


def test_the_sizes_of_files_are_what_is_written():
    """best.pt is its trained parameters, in float32; the shipped backbone lies here."""
    for dataset, size in (("nyud", r"best.pt` \((\d+) MB for `nyud`"),
                          ("pascal", r"(\d+) MB for `pascal`: what was trained")):
        found = 4 * costs("--dataset", dataset)["trainable"] / 1e6
        assert abs(found - int(re.search(size, README)[1])) < 0.5
    shipped = (ROOT / "rooms_mini.pth").stat().st_size / 1e6
    assert f"`rooms_mini.pth` ({shipped:.1f} MB)" in README


NUMBER = r"([\d.]+)"
ROWS = re.findall(rf"^\| ([^|]+) \| (`[^|]*`|) \| {NUMBER} \| {NUMBER}, {NUMBER} \| [^|]* \|"
                  rf" {NUMBER} \|", README, re.M)
NOT_REPRODUCED = {"single-task full", "multi-task full"}


def test_the_papers_rows_are_what_the_flags_give():
    """Parameters and GMACs of every row, summed over the runs of single-task rows."""
    dataset, tasks = "pascal", "semseg human_parts sal normals".split()
    assert len(ROWS) == 39
    for name, flags, trained, macs, all_macs, paper in ROWS:
        if name == "single-task full" and trained.startswith("84"):
            dataset, tasks = "nyud", "semseg normals depth".split()
        runs = [flags.strip("`").replace("TASK", task).split() for task in
                (tasks if "TASK" in flags else [""])]
        found = [costs("--dataset", dataset, *run) for run in runs]
        for key, shown, unit in (("trainable", trained, 1e6), ("macs_linear_conv", macs, 1e9),
                                 ("macs_all", all_macs, 1e9)):
            assert f"{sum(f[key] for f in found) / unit:.2f}" == shown, (dataset, name, flags)
        exact = sum(f["trainable"] for f in found) / 1e6
        cut = f"{int(100 * exact) / 100:.2f}"  # the papers cut some off where they round others
        assert paper in (trained, cut) or name in NOT_REPRODUCED, (dataset, name, flags)


def test_the_list_of_files_is_complete_and_its_sizes_are_right():
    """Every module is in the reading order, with its length to the nearest ten lines."""
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert set(listed) == {path.name for path in ROOT.glob("*.py")}
    for name, lines in listed.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 10, name


def test_bad_input_exits_with_one_line_and_an_error_code():
    """As a shell sees it: nothing but the error, and a status that is not 0."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--dataset", "nyud", "--data-root",
                           "nowhere"], capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nyud: nowhere does not exist")
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "tests/runs").exists()
