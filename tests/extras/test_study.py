"""Tests of extras/study.py: its numbers equal an independent computation, its rules are followed,
and a killed study continues.

The numbers are checked for a study with made-up results and for the study recorded in docs/.
"""

import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import costs
from PIL import Image

import train
from extras import study
from extras.claims import compare, format_p, holm, spread_of_trees, verdict
from extras.study import BASELINE, CHOICE_SEEDS, DECODERS, EVERYTHING, NOTHING, SEEDS, Study
from grouping import build_tree, check_tree, name_tree, read_tree
from test_table import write_run
from util import write_json

ROOT = Path(__file__).parent.parent.parent
RECORDED = ROOT / "docs/study_rooms.json"
PAGE, FIGURE = ROOT / "docs/STUDY.md", ROOT / "assets/study.png"
FLAGS = study.SETTINGS["rooms"].split()
TASKS = FLAGS[FLAGS.index("--tasks") + 1].split(",")

# For each task: its metric, 1 if higher is better or -1 if lower is better, and a typical value.
METRICS = {"human_parts": ("mIoU", 1, 0.2), "depth": ("rmse", -1, 0.7),
           "normals": ("mean", -1, 22.0), "sal": ("mIoU", 1, 0.4)}

# The names of all ways to divide the four tasks into two groups.
TREES = []
for size in (1, 2, 3):
    for others in itertools.combinations(TASKS[1:], size):
        first = [task for task in TASKS if task not in others]
        TREES.append(f"{'+'.join(first)},{'+'.join(others)}")


# --- a study with made-up results -----------------------------------------------------------------
# The gain of an arm over a typical value: on the choosing seeds, and on the reported seeds.
MADE_UP = {DECODERS: (-0.1, -0.1), EVERYTHING: (-0.03, -0.03), NOTHING: (-0.03, 0.02)}


def made_up(name, flags):
    """A made-up study.json entry for a run, with random numbers seeded by the run's `name`."""
    flags = dict(itertools.zip_longest(flags[::2], flags[1::2]))
    arm, seed = name.split("/")[-2], int(re.search(r"(\d+)(-\w+)?$", name)[1])
    rng, of_arm, of_seed = map(np.random.default_rng, map(zlib.crc32, (
        name.encode(), arm.encode(), bytes([seed]))))
    if arm == "similarity":
        noise = rng.normal(size=(4, 4))
        return {"similarity": (noise + noise.T + np.eye(4)[::-1]).tolist()}
    gain = MADE_UP.get(arm, (0, 0))[seed in SEEDS]
    gain += 0.003 * of_arm.normal() + 0.02 * of_seed.normal()
    if name.startswith("lr "):
        gain -= 0.05 * abs(math.log(float(flags["--lr"]) / 2e-3 * 3 ** of_arm.integers(3)))
    results = {}
    for task in flags.get("--tasks", ",".join(TASKS)).split(","):
        metric, sign, usual = METRICS[task]
        results[task] = {metric: usual * (1 + sign * (gain + 0.006 * rng.normal()))}
    return {"results": results, "trainable": 1000}


def as_text(flags):
    """Flags as text, in which the path of a tree file has lost its folder."""
    return re.sub(r"--tree .*/trees/", "--tree ", " ".join(flags))


@pytest.fixture
def without_training(monkeypatch):
    """Replace training by `made_up`. Returns a dict that collects {wanted run: its flags}."""
    all_wanted = {}

    def complete(self, wanted):
        for name, flags in wanted.items():
            all_wanted[name] = as_text(flags)
            if name not in self.runs:
                self.runs[name] = {"flags": " ".join(flags)} | made_up(name, flags)
        self.machines = self.machines or [study.this_machine("cpu")]
        self.save()

    monkeypatch.setattr(Study, "complete", complete)
    return all_wanted


# --- the study's numbers, computed independently from study.json ----------------------------------
def mean_similarities(tree, sim):
    """Eq. 6: the sum of the tasks' mean similarities (eq. 5) to the others in their group."""
    total = 0
    for group in tree.split(","):
        tasks = [TASKS.index(task) for task in group.split("+")]
        for t in tasks:
            total += sum(sim[t][u] for u in tasks if u != t) / max(1, len(tasks) - 1)
    return total


def sizes(tree):
    return sorted(group.count("+") for group in tree.split(","))


class Recomputed:
    """The numbers of a study, computed from the content of its study.json."""

    def __init__(self, saved):
        self.claims = saved["claims"]
        self.results, self.longer = {}, {}      # {arm: {seed: {task: {metric: value}}}}
        self.cosine, self.scores = {}, {}       # {seed: tree}, {seed: score of each tree}
        for name, run in saved["runs"].items():
            match = re.fullmatch(r"(4 epochs/)?([^/]+)/(\d+)(-\w+)?", name)
            if match and match[2] == "similarity":
                seed, sim = int(match[3]), run["similarity"]
                groups = build_tree(np.array(sim), (1, 2, 2, 4))[1]
                self.cosine[seed] = ",".join("+".join(TASKS[t] for t in group) for group in groups)
                self.scores[seed] = [mean_similarities(tree, sim) for tree in TREES]
            elif match:                         # no match: a run that tried a learning rate
                seeds = (self.longer if match[1] else self.results).setdefault(match[2], {})
                seeds.setdefault(int(match[3]), {}).update(run["results"])

    def gain(self, arm, seed, seeds, tasks=TASKS, longer=False):
        """Delta-m (eq. 7) over `tasks`. The baseline is its mean over those of `seeds` it has."""
        results, gains = (self.longer if longer else self.results)[arm][seed], []
        for task in tasks:
            metric, sign, _ = METRICS[task]
            baseline = [self.results[BASELINE][seed][task][metric]
                        for seed in seeds if seed in self.results[BASELINE]]
            gains.append(sign * (results[task][metric] / np.mean(baseline) - 1))
        return 100 * np.mean(gains)

    def leads(self, seeds, *how):
        """{rival: the leads of the cosine's tree, one per seed}"""
        leads = {name: [] for name, _ in self.claims["than"]}
        for seed in seeds:
            ours = self.cosine[seed]
            rivals = {name: [name] for name in leads}
            rivals["mean of the other trees"] = [tree for tree in TREES if tree != ours]
            rivals["the same, of its shape"] = [tree for tree in TREES if tree != ours
                                                and sizes(tree) == sizes(ours)]
            for name in leads:
                rival = np.mean([self.gain(arm, seed, seeds, *how) for arm in rivals[name]])
                leads[name].append(self.gain(ours, seed, seeds, *how) - rival)
        return leads


# --- what the study prints ------------------------------------------------------------------------
def table(text, first):
    """The rows of cells below the first header that starts with `first`."""
    lines = text[text.index(first):].splitlines()[1:]
    return [re.split("  +", line) for line in itertools.takewhile(lambda x: "  " in x, lines)]


def mean_and_deviation(values, digits):
    mean = np.mean(values).round(9) + 0.0           # not -0.0
    return f"{mean:.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


def check_the_report(saved, printed):
    """Compare everything that a study prints, except trained parameters, with recomputed text.

    The functions of claims.py are used here. They have their own tests.
    """
    ours = Recomputed(saved)
    expected = []
    for arm in (*study.ARMS, *TREES):
        seeds = [seed for seed in SEEDS if seed in ours.results[arm]]
        row = [arm, "last", str(len(seeds))]
        for task in TASKS:
            values = [ours.results[arm][seed][task][METRICS[task][0]] for seed in seeds]
            row.append(mean_and_deviation(values, 4))
        row.append(mean_and_deviation([ours.gain(arm, seed, SEEDS) for seed in seeds], 2))
        expected.append(row)
    rows = table(printed.replace("  -0.00 +-", "  0.00 +-"), "method")
    rows = [row[:3] + row[4:] for row in rows]
    assert sorted(rows) == sorted(expected)

    expected = []
    leads, longer = ours.leads(CHOICE_SEEDS), ours.leads(CHOICE_SEEDS[:1], TASKS, True)
    for name in leads:
        expected.append([name, *(f"{lead:+.2f}" for lead in leads[name] + longer[name])])
    full = [ours.gain(BASELINE, seed, CHOICE_SEEDS) - ours.gain(DECODERS, seed, CHOICE_SEEDS)
            for seed in CHOICE_SEEDS]
    expected.append(["single-task full against decoders only", *(f"{x:+.2f}" for x in full), "-"])
    assert table(printed, "the cosine's tree against") == expected

    margin = min(np.mean(leads[EVERYTHING]), np.mean(leads[NOTHING])) / 2
    margin = margin if margin > 0 else math.nan
    claims = printed[printed.index("margin of equivalence"):]
    assert claims.startswith(f"margin of equivalence: {margin:.2f}\n")
    expected, by_task, leads = [], [], ours.leads(SEEDS)
    compared = [compare(leads[name], by, margin, 0.05 / 5) for name, by in ours.claims["than"]]
    p_values = holm([c.p for c in compared])
    for (name, by), c, p in zip(ours.claims["than"], compared, p_values):
        tested = name in ours.claims["equivalent"]
        expected.append([name, str(by), str(c), format_p(p), f"{c.low90:+.2f} to {c.high90:+.2f}",
                         format_p(c.p_equivalent) if tested else "-", f"{c.detectable:.2f}",
                         verdict(c, by, p, tested)])
        by_task.append([name, *(str(compare(ours.leads(SEEDS, [t])[name])) for t in TASKS)])
    assert table(claims, "the cosine's tree against") == expected
    assert table(claims, "lead by task") == by_task

    gains = np.array([[ours.gain(tree, seed, SEEDS) for tree in TREES] for seed in SEEDS])
    scores = np.mean([ours.scores[seed] for seed in SEEDS], axis=0)
    chosen = [TREES.index(ours.cosine[seed]) for seed in SEEDS]
    expected = []
    for i in np.argsort(-gains.mean(0)):
        expected.append([TREES[i], str(chosen.count(i)), f"{scores[i]:.3f}",
                         f"{gains[:, i].mean():+.2f}"])
    assert table(claims, "tree  ") == expected
    s = spread_of_trees(gains)
    ranks = [str(1 + sum(row > row[i])) for row, i in zip(gains, chosen)]
    order = np.argsort(np.argsort([scores, gains.mean(0)]))
    correlation = 1 - 6 * ((order[0] - order[1]) ** 2).sum() / (7 * 48)     # Spearman's
    assert (f"\nstandard deviation between trees {s.trees:.2f} ({s.low:.2f} to {s.high:.2f}), p "
            f"{format_p(s.p)}; between seeds {s.seeds:.2f}; noise of one run {s.rest:.2f}\n"
            f"rank of the cosine's tree among 7, by seed: {', '.join(ranks)}\n"
            f"rank correlation of score and delta-m over the 7 trees: {correlation:+.2f}\n"
            ) in claims


def test_a_made_up_study_is_reported_correctly(tmp_path, monkeypatch, without_training, capsys):
    """Tables and figure agree with the independent computation. A second call prints the same."""
    drawn, draw_rows = [], study.draw_rows
    monkeypatch.setattr(study, "draw_rows", lambda *args: drawn.append(args) or draw_rows(*args))
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "study.json").read_text())
    check_the_report(saved, printed)
    for answer in ("holds", "does not hold", "equivalent", "undecided"):
        assert f"  {answer}\n" in printed
    assert saved["claims"] == study.CLAIMS and saved["machines"][0].keys() == {
        "processor", "torch", "threads per run", "instructions"}

    [(path, _, rows, marked)], ours = drawn, Recomputed(saved)
    assert path == tmp_path / "study.png" and path.is_file()
    means = [np.mean(values) for values in rows.values()]
    assert set(rows) == {EVERYTHING, NOTHING, *TREES} and means == sorted(means, reverse=True)
    for arm, values in rows.items():
        gains = [[ours.gain(name, seed, SEEDS) for name in [arm, *TREES]] for seed in SEEDS]
        assert values == pytest.approx([own - np.mean(trees) for own, *trees in gains])
    chosen = [ours.cosine[seed] for seed in SEEDS]
    assert marked == statistics.mode(chosen) != chosen[0]
    assert {str(sizes(tree)) for tree in chosen} == {"[0, 2]", "[1, 1]"}

    study.main(["--out", str(tmp_path)])        # no run is left to do
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "study.json").read_text()) == saved


def test_nothing_is_equivalent_without_a_margin(tmp_path, monkeypatch, without_training, capsys):
    """If sharing nothing is better on the choosing seeds, there is no margin."""
    monkeypatch.setitem(MADE_UP, NOTHING, (0.1, 0.02))
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "margin of equivalence: nan\n" in printed and "  equivalent\n" not in printed
    check_the_report(json.loads((tmp_path / "study.json").read_text()), printed)


def test_the_recorded_study_says_what_its_page_says(tmp_path, without_training, capsys):
    """The study needs exactly the recorded runs. It prints the code blocks of docs/STUDY.md and
    draws assets/study.png."""
    recorded = json.loads(RECORDED.read_text())
    (tmp_path / "study.json").write_text(RECORDED.read_text())
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "study.json").read_text()) == recorded
    asked = {name: as_text([run["flags"]]) for name, run in recorded["runs"].items()}
    for arm in ("multi-task full", "mtlora", "bdta"):
        del asked[f"{arm}/0"]           # copied when the rate was chosen, but not needed later
    assert without_training == asked
    check_the_report(recorded, printed)

    shown = "\n".join(PAGE.read_text().split("```")[1::2]).splitlines()
    lines = [line for line in printed.splitlines() if not line.startswith("wrote")]
    assert [line for line in lines if line not in shown] == []
    assert [line for line in shown if line not in lines] == []
    drawn, shipped = np.array(Image.open(tmp_path / "study.png")), np.array(Image.open(FIGURE))
    for colour in ((255, 140, 0), (65, 105, 225)):             # the marked row, and the others
        pixels = (drawn == colour).all(-1)
        assert pixels.any() and (pixels == (shipped == colour).all(-1)).all()


# --- the design -----------------------------------------------------------------------------------
@pytest.mark.parametrize("num_tasks, groups, shapes", [
    (4, (1, 2, 2, 4), [[2, 2]] * 3 + [[3, 1]] * 4), (4, (1, 1, 3, 4), [[2, 1, 1]] * 6),
    (3, (1, 1, 2, 3), [[2, 1]] * 3), (5, (2, 2, 5, 5), [[3, 2]] * 10 + [[4, 1]] * 5)])
def test_all_trees(num_tasks, groups, shapes):
    """Every tree with these groups occurs once, sorted by shape."""
    trees = study.all_trees(num_tasks, groups)
    middle = next(i for i, count in enumerate(groups) if 1 < count < num_tasks)
    for tree in trees:
        check_tree(tree, num_tasks)
        assert tuple(map(len, tree)) == groups
        assert all(len(p) != groups[middle] or p == tree[middle] for p in tree)
    assert [study.shape(tree)[middle] for tree in trees] == shapes
    assert len({str(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize("groups", [(1, 1, 1, 4), (1, 2, 3, 4), (1, 4, 2, 2), (4, 4, 4, 4)])
def test_groups_that_do_not_leave_one_partition_to_choose_are_refused(groups):
    with pytest.raises(ValueError, match=f"needs groups such as 1,2,2,4: .*; got {groups[0]},"):
        study.all_trees(4, groups)


def test_arms_have_the_stated_seeds_and_flags(tmp_path, without_training):
    """Each run has its seed's rooms and its arm's flags and learning rate. All trees share one.

    Seeds 0 and 1 are for choosing. Nine other seeds are reported, or five for some arms.
    """
    study.main(["--out", str(tmp_path)])
    rates = study.read_study(tmp_path / "study.json")["rates"]
    mtlora = f"--method mtlora --rank {study.MTLORA_RANK['rooms']}"
    arms = {BASELINE: (5, "--method full"), "multi-task full": (5, "--method full"),
            "mtlora": (5, mtlora), "bdta": (5, "--method bdta")}
    checked = {DECODERS: (9, "--method decoders"), EVERYTHING: (9, "--groups 1,1,1,1"),
               NOTHING: (9, "--groups 4,4,4,4"), **{t: (9, f"--tree {t}.json") for t in TREES}}
    expected = {}
    for seed in (0, 1, *range(10, 19)):
        seeded = f"--seed {seed} --room-seed {seed}"
        expected[f"similarity/{seed}"] = f"--groups 1,2,2,4 --tree-only {seeded}"
        for arm, (count, own) in (arms | checked).items():
            flags = f"{own} --lr {rates.get(arm, rates['tree']):.4g} {seeded}"
            if seed == 0 and arm in checked:
                expected[f"4 epochs/{arm}/0"] = f"{flags} --epochs 4"
            if 10 + count <= seed or (seed < 10 and arm not in {BASELINE, *checked}):
                continue
            expected[f"{arm}/{seed}"] = flags
            if arm == BASELINE:                 # one run per task
                del expected[f"{arm}/{seed}"]
                for task in TASKS:
                    expected[f"{arm}/{seed}-{task}"] = f"{flags} --tasks {task}"
    tried = {name for name in without_training if name.startswith("lr ")}
    assert {name: without_training[name] for name in without_training.keys() - tried} == expected
    assert rates.keys() == {*study.ARMS, "tree"} and len(set(rates.values())) > 1
    assert len({name.split("/")[1] for name in tried}) == len(study.ARMS) + 1      # one tree
    for name in tried:
        rate, arm, seed = name.split("/")
        flags = expected[f"{arm}/{seed}"] if f"{arm}/{seed}" in expected else without_training[name]
        assert seed[0] == "0"
        assert without_training[name] == re.sub("--lr [^ ]+", f"--{rate}", flags)


def test_other_datasets_have_the_papers_groups_and_no_rooms(tmp_path):
    """On NYUD-v2, there are three trees of three tasks."""
    here = Study(tmp_path, ["--dataset", "nyud"], jobs=1)
    here.rates = dict.fromkeys(study.ARMS, 1e-4)
    assert here.groups == (1, 1, 2, 3)
    assert set(here.trees) == {"semseg,normals+depth", "semseg+normals,depth",
                               "semseg+depth,normals"}
    wanted = here.similarity_run(10) | here.arm_runs(NOTHING, 10) | here.arm_runs("mtlora", 10)
    assert {name: " ".join(flags) for name, flags in wanted.items()} == {
        "similarity/10": "--groups 1,1,2,3 --tree-only --seed 10",
        f"{NOTHING}/10": "--groups 3,3,3,3 --lr 0.0001 --seed 10",
        "mtlora/10": "--method mtlora --lr 0.0001 --seed 10"}
    assert Study(tmp_path, ["--dataset", "pascal"], jobs=1).groups == (1, 2, 2, 4)


@pytest.mark.slow
def test_arms_have_the_same_number_of_adapter_parameters(tmp_path):
    """All LoRA arms and MTLoRA have the same number of adapter parameters."""
    here = Study(tmp_path, FLAGS, jobs=1)
    here.rates = dict.fromkeys([*study.ARMS, "tree"], 1e-3)
    (tmp_path / "trees").mkdir()
    for name, tree in here.trees.items():
        write_json(here.tree_file(name), {"tree": name_tree(tree, TASKS)})
    counts = {}
    for arm in (*study.ARMS, *TREES):
        runs = here.arm_runs(arm, 10).values()
        counts[arm] = sum(costs(*FLAGS, *flags)["adapters"] for flags in runs)
    assert counts[BASELINE] == counts["multi-task full"] == counts[DECODERS] == 0
    same = {arm: counts[arm] for arm in (EVERYTHING, NOTHING, "mtlora", *TREES)}
    assert same == dict.fromkeys(same, counts[EVERYTHING]) and counts[EVERYTHING] > 0


@pytest.mark.parametrize("peak, lowest, tried", [
    (0.002, 0, 3), (0.0000741, 0, 5), (1e-9, 0, 6), (0.054, 0, 6), (0.002, 0.001, 3)])
def test_rates_are_tried_beyond_the_better_end_until_it_gets_worse(tmp_path, monkeypatch, peak,
                                                                   lowest, tried):
    """Learning rates a factor of 3 apart are tried until delta-m gets worse, but at most six.

    A rate with a diverged run is never chosen. `peak` is the best rate of the cosine's tree, which
    all trees get. All other arms have their best rate at 0.002.
    """
    tree = "human_parts+normals,sal+depth"

    def complete(self, wanted):
        for name, flags in wanted.items():
            rate = float(flags[flags.index("--lr") + 1])
            quality = 1 / (1 + abs(math.log(rate / (peak if f"/{tree}/" in name else 0.002))))
            self.runs[name] = {"results": {"sal": {"mIoU": quality}}, "trainable": 1}
            if not lowest < rate < 0.1:
                self.runs[name] = {"failed": "not finite"}

    monkeypatch.setattr(Study, "complete", complete)
    here = Study(tmp_path, FLAGS, jobs=1)
    here.runs["similarity/0"] = {"similarity": np.eye(4)[::-1].tolist()}
    here.choose_rates()
    rates = [float(name.split("/")[0][3:]) for name in here.runs if f"/{tree}/" in name]
    chosen = here.arm_runs(tree, 0)
    assert chosen.keys() <= here.runs.keys()            # not to be repeated at the chosen rate
    assert len(rates) == tried
    finished = [rate for rate in rates if lowest < rate < 0.1]
    best = min(finished, key=lambda rate: abs(math.log(rate / peak)))
    assert here.rates.pop("tree") == pytest.approx(best, rel=1e-3)
    assert here.rates == dict.fromkeys(study.ARMS, 0.002)


# --- runs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "last.pt", "metrics.json"])
def test_a_run_is_started_resumed_or_only_read(tmp_path, monkeypatch, there):
    """A run starts if its folder is missing or empty, and resumes if the folder holds a last.pt. If
    the folder holds a metrics.json, nothing is trained. The last epoch is reported."""
    folder, calls = tmp_path / "arm/10", []

    def fake_run(command, env, **_):
        assert folder.exists() == (there == "last.pt")          # train.py makes new folders itself
        calls.append(command[1:])
        assert env["OMP_NUM_THREADS"] == "1"
        write_run(folder, 10, depth=0.5)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    if there != "nothing":
        folder.mkdir(parents=True)
    if there == "last.pt":
        (folder / "last.pt").touch()
    if there == "metrics.json":
        write_run(folder, 10, depth=0.5)
    run = Study(tmp_path, FLAGS, jobs=1).train("arm/10", ["--lr", "0.1"])
    flags = ["--resume"] if there == "last.pt" else [*FLAGS, "--lr", "0.1"]
    started = [[str(ROOT / "train.py"), *flags, "--out", str(folder)]]
    assert calls == ([] if there == "metrics.json" else started)
    assert run == {"flags": "--lr 0.1", "trainable": 1000, "results": {"depth": {"rmse": 0.75}}}


def test_a_failed_run_keeps_its_message(tmp_path, monkeypatch):
    """A diverged run is recorded, and asking for its result is an error that names the run.

    Any other error of a run is raised and names the log.
    """
    here, written = Study(tmp_path, FLAGS, jobs=1), []

    def fake_run(command, stdout, **_):
        stdout.write(written.pop())
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fake_run)
    for text, message in (("", "no message"), ("step 1\nerror: wrong\n", "error: wrong")):
        written.append(text)
        with pytest.raises(ValueError, match=f"the run arm/10 failed: {message} .see .*10.log"):
            here.train("arm/10", [])
    written.append("step 1\nerror: the loss is not finite\n")
    here.runs["arm/11"] = here.train("arm/11", ["--lr", "1"])
    assert here.runs["arm/11"] == {"flags": "--lr 1", "failed": "error: the loss is not finite"}
    with pytest.raises(ValueError, match="the run arm/11 failed: error: the loss is not finite"):
        here.result(["arm/11"])


def test_unfinished_runs_are_done_and_saved_one_by_one(tmp_path, monkeypatch):
    """If a run fails, the runs before it are saved. Claims and trees are written before any run."""
    done = []

    def fake_train(self, name, flags):
        for tree, partitions in self.trees.items():
            assert read_tree(self.tree_file(tree), TASKS) == partitions
        assert json.loads(self.path.read_text())["claims"] == study.CLAIMS
        if name == "c/0":
            raise ValueError("c failed")
        done.append((name, flags))
        return {"results": {}}

    monkeypatch.setattr(Study, "train", fake_train)
    here = Study(tmp_path / "new", FLAGS, jobs=1)
    here.complete({"a/0": ["x"]})
    with pytest.raises(ValueError, match="c failed"):
        here.complete({"a/0": ["x"], "b/0": ["y"], "c/0": []})
    assert done == [("a/0", ["x"]), ("b/0", ["y"])]
    again = Study(tmp_path / "new", FLAGS, jobs=1)
    assert again.runs == {"a/0": {"results": {}}, "b/0": {"results": {}}}
    assert again.machines == [study.this_machine("cpu")]


@pytest.mark.parametrize("key, value", [
    ("flags", "--epochs 1"), ("claims", {**study.CLAIMS, "seeds": [0]})])
def test_another_study_in_the_folder_is_refused(tmp_path, key, value):
    """A folder whose study has different flags or claims is refused."""
    Study(tmp_path, FLAGS, jobs=1).save()
    Study(tmp_path, FLAGS, jobs=1)              # the same flags and claims: no error
    saved = json.loads((tmp_path / "study.json").read_text())
    write_json(tmp_path / "study.json", saved | {key: value})
    with pytest.raises(ValueError, match="belongs to a study with other flags or claims"):
        Study(tmp_path, FLAGS, jobs=1)


def test_a_quick_study_is_compared_with_the_recorded_values(tmp_path, monkeypatch,
                                                            without_training, capsys):
    """--quick repeats four runs of the first reported seed, with their recorded flags.

    It marks values that differ by more than 1 % from the recorded ones. Other flags are refused.
    """
    study.main(["--out", str(tmp_path / "full")])
    recorded = study.read_study(tmp_path / "full/study.json")
    full = dict(without_training)
    without_training.clear()
    monkeypatch.setattr(study, "read_study", lambda path: recorded)
    results = recorded["runs"][f"{EVERYTHING}/10"]["results"]
    results["depth"]["rmse"] *= 1.009
    results["sal"]["mIoU"] *= 1.011
    capsys.readouterr()
    study.main(["--quick", "--out", str(tmp_path / "quick")])
    printed = capsys.readouterr().out
    arms = ["similarity", DECODERS, EVERYTHING, Recomputed(recorded).cosine[10]]
    assert without_training == {f"{arm}/10": full[f"{arm}/10"] for arm in arms}
    assert "\n11 of 12 values agree to 1 % with the recorded ones" in printed
    marked = [re.split("  +", line) for line in printed.splitlines() if line.endswith("!")]
    assert [row[:3] + row[5:] for row in marked] == [
        [f"{EVERYTHING}/10", "sal", "mIoU", "-1.09 % !"]]
    with pytest.raises(SystemExit, match="leave out all other flags"):
        study.main(["--quick", "--epochs", "1", "--out", str(tmp_path / "other")])


# --- a tiny study, killed and continued -----------------------------------------------------------
TINY = ("--tasks semseg,depth,normals --size 32 --train-rooms 6 --val-rooms 2 "
        "--batch-size 2 --device cpu").split()
DRIVER = """
from extras import study

def run_study(tiny):
    tiny.complete(tiny.similarity_run(10))
    tiny.rates = dict.fromkeys([*study.ARMS, study.TREE], 1e-3)
    wanted = {}
    for arm in (study.EVERYTHING, tiny.cosine_tree(10), study.DECODERS):
        wanted |= tiny.arm_runs(arm, 10)
    tiny.complete(wanted)

study.run_study, study.print_results = run_study, lambda *_: print("done")
study.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills a group of processes, which Windows lacks")
def test_a_killed_study_continues(tmp_path):
    """The same command does the unfinished runs of a killed study, and resumes the started one.

    Its results are those of train.py.
    """
    out = tmp_path / "study"
    command = [sys.executable, "-c", DRIVER, *TINY, "--jobs", "1", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (out / EVERYTHING / "10/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = study.read_study(out / "study.json")["runs"]
    assert before.keys() == {"similarity/10"}

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = study.read_study(out / "study.json")["runs"]
    assert runs.pop("similarity/10") == before["similarity/10"] and len(runs) == 3
    for name, run in runs.items():
        flags = [*FLAGS, *TINY, *run["flags"].split(), "--out", str(tmp_path / name)]
        assert train.main(flags)["last"]["results"] == run["results"]
