"""What README and docs claim: commands run, numbers are what the code prints, links lead there."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import costs
from PIL import Image

import cost
import eval

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
MODULES = {path.relative_to(ROOT).as_posix() for folder in (".", "datasets", "util", "tools")
           for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}


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
    for shown in (r"trained parameters: .*", r"task +metric +result .*",
                  r"metrics\.json, predictions\.png, .*"):
        assert re.search(shown, README)[0] in done.stdout
    assert re.search(r"task +metric +result .*", DOCS["RUNS"])[0] in done.stdout


@pytest.mark.slow
def test_seeds_0_to_4_of_the_demonstration_agree_on_the_tree(tmp_path):
    """README says so. Five minutes."""
    trees = []
    for seed in range(5):
        out = tmp_path / str(seed)
        subprocess.run([sys.executable, ROOT / "train.py", "--tree-only", "--seed", str(seed),
                        "--out", out], cwd=tmp_path, check=True)
        trees.append(json.loads((out / "tree.json").read_text())["tree"])
    assert trees == trees[:1] * 5


OWN = re.search(r"## Your own task.*?(?=^## )", README, re.S | re.M)[0]


@pytest.mark.parametrize("snippet", re.findall(
    r"```python\n(.*?)```", "".join([README.replace(OWN, ""), *DOCS.values()]), re.S))
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_an_own_task_and_an_own_folder_are_trained_and_evaluated(tmp_path):
    """README's file and its two commands as they stand, with ten photos of two sizes."""
    rng = np.random.default_rng(0)
    for kind in ("images", "semseg", "height"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
    for i in range(10):
        size = (40, 56) if i % 2 else (48, 32)
        for kind, value in (("images", rng.integers(256, size=(*size, 3))),
                            ("semseg", rng.choice([0, 1, 2, 255], size=size))):
            Image.fromarray(value.astype(np.uint8)).save(tmp_path / f"photos/{kind}/{i}.png")
        height = rng.uniform(-1, 3, size).astype(np.float32)
        np.save(tmp_path / f"photos/height/{i}.npy", np.where(height > 0, height, np.nan))
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", OWN, re.S)[1])
    commands = re.findall(r"^    (python .*)$", OWN, re.M)
    assert len(commands) == 2
    for command in commands:
        done = subprocess.run(
            [sys.executable, *shlex.split(command, comments=True)[1:]], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^semseg +mIoU .*\d\n", done.stdout, re.M)
        assert re.search(r"^height +error +[\d.]+ +[\d.]+ \*down", done.stdout, re.M)
    metrics = json.loads((tmp_path / "runs/photos/metrics.json").read_text())
    assert metrics["dataset"] == "photos" and metrics["images"] == 2
    assert 0 < metrics["results"]["height"]["error"] < 3
    assert (tmp_path / "runs/photos/predictions.png").is_file()


def test_the_example_of_an_own_backbone_learns_and_merges():
    """At most 40 lines. A loss on one task trains its own groups' adapters; the loss falls; merged,
    the network predicts the same."""
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S)
                   if "VisionTransformer" in block)
    assert len(example.splitlines()) <= 40
    torch.manual_seed(0)
    space = {}
    exec(compile(example.partition("merge(net")[0], "README.md", "exec"), space)
    net, image, label = space["net"], torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(F.cross_entropy(net(image)["semseg"], label))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    trained = {(i // 3, int(name[-1])) for i, block in enumerate(net.vit.encoder.layers)
               for name, p in block.named_parameters()
               if "lora_B" in name and p.grad is not None and p.grad.any()}
    group = space["group_of"][space["names"].index("semseg")]
    assert trained == {(stage, g) for stage, g in enumerate(group)}
    expected = net.eval()(image)
    for name, prediction in space["merge"](net)(image).items():
        torch.testing.assert_close(prediction, expected[name], rtol=1e-4, atol=1e-5)


def test_the_cost_shown_is_the_cost_printed(capsys):
    """By cost.py and by eval.py --cost, the same text."""
    cost.main(["--dataset", "nyud"])
    printed = capsys.readouterr().out
    assert printed and printed in DOCS["RESULTS"]
    eval.main(["--cost", "--dataset", "nyud"])
    assert capsys.readouterr().out == printed


def test_the_sizes_of_files_are_what_is_written():
    """best.pt is its trained parameters, in float32; the shipped backbone lies here."""
    for dataset, size in (("nyud", r"best.pt` \((\d+) MB for `nyud`"),
                          ("pascal", r"(\d+) MB for `pascal`: what was trained")):
        found = 4 * costs("--dataset", dataset)["trainable"] / 1e6
        assert abs(found - int(re.search(size, DOCS["RUNS"])[1])) < 0.5
    shipped = (ROOT / "assets/rooms_mini.pth").stat().st_size / 1e6
    assert f"`assets/rooms_mini.pth` ({shipped:.1f} MB)" in DOCS["DATA"]


NUMBER = r"([\d.]+)"
ROWS = re.findall(rf"^\| ([^|]+) \| (`[^|]*`|) \| {NUMBER} \| {NUMBER}, {NUMBER} \| ([^|]*) \|"
                  rf" {NUMBER} \|", DOCS["RESULTS"], re.M)
NOT_REPRODUCED = {"single-task full", "multi-task full"}


def by_dataset() -> dict[str, list]:
    """ROWS of pascal, then those of nyud, whose table begins with its own single-task full row."""
    second = next(i for i, row in enumerate(ROWS) if row[2].startswith("84"))
    return {"pascal": ROWS[:second], "nyud": ROWS[second:]}


def test_the_papers_rows_are_what_the_flags_give():
    """Parameters and GMACs of every row, summed over the runs of single-task rows."""
    tasks = {"pascal": "semseg human_parts sal normals".split(),
             "nyud": "semseg normals depth".split()}
    assert len(ROWS) == 40
    for dataset, rows in by_dataset().items():
        for name, flags, trained, macs, all_macs, _, paper in rows:
            runs = [flags.strip("`").replace("TASK", task).split() for task in
                    (tasks[dataset] if "TASK" in flags else [""])]
            found = [costs("--dataset", dataset, *run) for run in runs]
            for key, shown, unit in (("trainable", trained, 1e6), ("macs_linear_conv", macs, 1e9),
                                     ("macs_all", all_macs, 1e9)):
                assert f"{sum(f[key] for f in found) / unit:.2f}" == shown, (dataset, name, flags)
            exact = sum(f["trainable"] for f in found) / 1e6
            cut = f"{int(100 * exact) / 100:.2f}"  # the papers cut some off where they round others
            assert paper in (trained, cut) or name in NOT_REPRODUCED, (dataset, name, flags)


def test_the_rows_of_bdtas_paper_are_what_the_flags_give():
    """Parameters of its tables 1, 2 and 5, of three backbones; but for its full and decoders rows.
    """
    rows = re.findall(rf"`(--method [^`]*)` \| {NUMBER} \| [^|]* \| {NUMBER} \|$",
                      DOCS["RESULTS"].partition("BDTA + MoTE's paper")[2], re.M)
    assert len(rows) == 11
    for flags, trained, paper in rows:
        found = costs("--dataset", "pascal", *flags.split())["trainable"]
        assert f"{found / 1e6:.2f}" == trained, flags
        assert paper == trained or flags in ("--method full", "--method decoders"), flags


def test_other_backbones_cost_what_the_flags_give():
    """Their parameters; trained parameters and GMACs of five methods, on both datasets."""
    methods = ("--method decoders", "--groups 1,1,1,1", "", "--layers attn+mlp+others",
               "--method mtlora --rank 64")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d., |]+) \|$", DOCS["RESULTS"], re.M)
    assert [name for name, *_ in rows] == ["tiny", "small", "base", "pvt_v2_b2"] * 2
    for i, (name, own, cells) in enumerate(rows):
        flags = "--dataset", "pascal" if i < 4 else "nyud", "--backbone", name
        found = [costs(*flags, *method.split()) for method in methods]
        assert f"{found[0]['total'] - found[0]['decoders']:,}" == own
        assert cells.split(" | ") == [
            f"{f['trainable'] / 1e6:.2f}, {f['macs_linear_conv'] / 1e9:.2f}, "
            f"{f['macs_all'] / 1e9:.2f}" for f in found], name


def test_the_rows_of_the_readme_are_those_of_the_results():
    """README's short table repeats the first row of that name of each dataset."""
    table = re.findall(rf"^\| ([^|]+) \| {NUMBER}, {NUMBER} \| ([-+\d.]+) \| {NUMBER}, {NUMBER} "
                       r"\| ([-+\d.]+) \| not run \|$", README, re.M)
    assert len(table) == 6
    for name, *shown in table:
        found = []
        for rows in by_dataset().values():
            _, _, trained, macs, _, accuracies, _ = next(row for row in rows if row[0] == name)
            found += [trained, macs, accuracies.rpartition(", ")[2]]
        assert shown == found, name


def test_the_list_of_files_is_complete_and_its_sizes_are_right():
    """Every module is in the reading order, with its length to the nearest ten lines."""
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M))
    assert set(listed) == MODULES
    for name, lines in listed.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 10, name


def test_a_file_that_can_be_copied_alone_imports_nothing_of_ours():
    """Those that README names for other projects; imports inside functions count too."""
    named = re.search(r"## Use a module.*?import nothing", README, re.S)[0]
    ours = {name.removesuffix(".py").split("/")[0] for name in MODULES}
    for name in re.findall(r"`([\w/]+\.py)`", named):
        nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import)
                 for alias in node.names}
        found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {module.split(".")[0] for module in found} & ours, name


def test_the_readme_stays_short():
    """A first page, read in one sitting; everything else is in docs/."""
    assert len(README.splitlines()) <= 265
    assert len(README.split()) <= 2400


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in sorted(DOCS))])
def test_links_lead_to_files_and_headings_that_exist(page):
    """Every relative link and picture; `#part` is a heading there, as GitHub names it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, part = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.is_file(), (page, target)
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if part else []
        names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not part or part in names, (page, target)


def test_bad_input_exits_with_one_line_and_an_error_code():
    """As a shell sees it: nothing but the error, and a status that is not 0."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--dataset", "nyud", "--data-root",
                           "nowhere", "--weights", "none"], capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nyud: nowhere does not exist")
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "tests/runs").exists()
