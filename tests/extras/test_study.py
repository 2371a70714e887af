"""Tests of extras/study.py: its numbers equal an independent computation, its rules are followed,
and a killed study continues.

The numbers are checked for a study with made-up results and for the study recorded in docs/.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from cost import cost
from extras import lookahead, study
from extras.study import Job, Study
from grouping import build_tree, name_tree
from test_table import write_run
from util import write_json

ROOT = Path(__file__).parent.parent.parent
RECORDED = ROOT / "docs/study_rooms.json"
FLAGS = study.SETTINGS["rooms"].split()
TASKS = FLAGS[FLAGS.index("--tasks") + 1].split(",")

# For each task: its metric, 1 if higher is better or -1 if lower is better, and a typical value.
METRICS = {"semseg": ("mIoU", 1, 0.4), "human_parts": ("mIoU", 1, 0.2), "depth": ("rmse", -1, 0.7),
           "normals": ("mean", -1, 22.0), "sal": ("mIoU", 1, 0.4), "edge": ("F", 1, 0.6)}


# --- a study with made-up results -----------------------------------------------------------------
# For each arm: the relative gain of its metrics over their typical values, and the noise. Comparing
# tglora with the other arms gives five different verdicts.
MADE_UP = {"mtl-lora": (0.0, 0.005), "least-similar": (0.0475, 0.0002), "random": (0.05, 0.002),
           "lookahead": (0.049, 0.05), "task-specific": (0.08, 0.001), "tglora": (0.05, 0.0005)}


def made_up(name, job):
    """A made-up study.json entry for a run, with random numbers seeded by the run's `name`."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    run = {"flags": " ".join(job.flags)}
    if "--tree-only" in job.flags:
        noise = rng.normal(size=(len(TASKS), len(TASKS)))
        return run | {"similarity": (noise + noise.T).tolist(), "tree": None}
    if job.tree:
        run["tree"] = job.tree
    gain, noise = MADE_UP.get(name.split("/")[0], (0.01, 0.02))
    results = {}
    for task in job.flags[job.flags.index("--tasks") + 1].split(","):
        metric, sign, usual = METRICS[task]
        results[task] = {metric: usual * (1 + sign * (gain + noise * rng.normal()))}
    return run | {"results": results, "trainable": 1000}


@pytest.fixture
def without_training(monkeypatch):
    """Replace training by `made_up`. Returns a dict that collects all jobs of a study by name."""
    jobs = {}

    def complete(self, wanted):
        jobs.update(wanted)
        for name, job in wanted.items():
            if name not in self.runs:
                self.runs[name] = made_up(name, job)
        self.machines = self.machines or [study.this_machine("cpu")]
        self.save()

    monkeypatch.setattr(Study, "complete", complete)
    return jobs


# --- the study's statistics, computed independently from study.json -------------------------------
def t_probabilities(freedom, steps=100_000):
    """A grid of t, and for each t the probability that Student's t lies between -t and t.

    The density is integrated numerically. With t = sqrt(freedom) * tan(angle), it is proportional
    to cos(angle) ** (freedom - 1).
    """
    angle = np.linspace(0, math.pi / 2, steps + 1)
    middle = (angle[1:] + angle[:-1]) / 2
    area = np.concatenate([[0], np.cumsum(np.cos(middle) ** (freedom - 1))])
    return math.sqrt(freedom) * np.tan(angle[:-1]), area[:-1] / area[-1]


def two_sided(t, freedom):
    return 1 - np.interp(abs(t), *t_probabilities(freedom))


def above(t, freedom):
    """The probability of a value above t."""
    p = two_sided(t, freedom) / 2
    return p if t > 0 else 1 - p


def gain(results, baseline, tasks):
    """Delta-m (eq. 7), averaged only over `tasks`."""
    gains = []
    for task in tasks:
        metric, sign, _ = METRICS[task]
        gains.append(sign * (results[task][metric] / baseline[task][metric] - 1))
    return 100 * np.mean(gains)


class Recomputed:
    """The numbers of a study, computed from the content of its study.json."""

    def __init__(self, saved):
        self.runs, self.claims = saved["runs"], saved["claims"]
        self.results = {}               # {arm: {seed: {task: {metric: value}}}}
        for name, run in self.runs.items():
            match = re.fullmatch(r"([\w-]+)/(\d+)(-\w+)?", name)
            if match and "results" in run:
                arm = self.results.setdefault(match[1], {})
                arm.setdefault(int(match[2]), {}).update(run["results"])
        self.tasks = list(self.results["tglora"][10])
        single = list(self.results["single-full"].values())
        self.baseline = {}
        for task in self.tasks:
            metric = METRICS[task][0]
            self.baseline[task] = {metric: np.mean([r[task][metric] for r in single])}

    def differences(self, better, worse, tasks):
        seeds = sorted(self.results[better].keys() & self.results[worse].keys())
        return np.array([gain(self.results[better][seed], self.baseline, tasks)
                         - gain(self.results[worse][seed], self.baseline, tasks) for seed in seeds])

    def claim(self, better, worse, tasks):
        """Mean difference, half the width of its interval, number of pairs, p, p of equivalence."""
        d = self.differences(better, worse, tasks)
        n, margin = len(d), self.claims["margin"]
        error = d.std(ddof=1) / n ** 0.5
        t, probability = t_probabilities(n - 1)
        half = error * np.interp(0.95, probability, t)
        p_equivalent = max(above((d.mean() + margin) / error, n - 1),
                           above((margin - d.mean()) / error, n - 1))
        return d.mean(), half, n, two_sided(d.mean() / error, n - 1), p_equivalent

    def verdicts(self):
        """Returns {claim: (p after Holm's correction, verdict)}.

        Holm's correction of p: multiply each p-value q up to p by the number of p-values that are
        at least q, and take the largest product.
        """
        rows = {tuple(c): self.claim(*c, self.tasks) for c in self.claims["better"]}
        answers = {}
        for claim, (mean, _, _, p, p_equivalent) in rows.items():
            smaller = [row[3] for row in rows.values() if row[3] <= p]
            multiples = [q * sum(row[3] >= q for row in rows.values()) for q in smaller]
            p_holm = min(1, max(multiples))
            words = []
            if p_holm < 0.05:
                words.append("holds" if mean > 0 else "does not hold")
            if p_equivalent < 0.05 and list(claim) in self.claims["equivalent"]:
                words.append("but within 0.5 points" if words else "equivalent")
            answers[claim] = p_holm, ", ".join(words) or "undecided"
        return answers

    def pairs(self):
        """The pairs of tasks, and three arrays (seeds, pairs): benefit, cosine and affinity."""
        names = list(itertools.combinations(self.tasks, 2))
        seeds = sorted({int(name.split("/")[2]) for name in self.runs if name[:5] == "pair/"})
        benefit, cosine, affinity = (np.zeros((len(seeds), len(names))) for _ in range(3))
        for s, seed in enumerate(seeds):
            alone = self.results["single-lora"][seed]
            for i, (t, u) in enumerate(names):
                benefit[s, i] = gain(self.runs[f"pair/{t}+{u}/{seed}"]["results"], alone, (t, u))
                place = self.tasks.index(t), self.tasks.index(u)
                cosine[s, i] = np.array(self.runs[f"similarity/{seed}"]["similarity"])[place]
                affinity[s, i] = np.array(self.runs[f"affinity/{seed}"]["similarity"])[place]
        return names, benefit, cosine, affinity


def spearman(a, b):
    """Spearman's rank correlation of values without ties, from the differences of their ranks."""
    d = np.argsort(np.argsort(a)) - np.argsort(np.argsort(b))
    return 1 - 6 * (d ** 2).sum() / (len(a) * (len(a) ** 2 - 1))


def reliability(benefit):
    """The mean correlation over all halvings of the seeds, with the Spearman-Brown correction."""
    n, correlations = len(benefit), []
    for half in itertools.combinations(range(n), n // 2):
        chosen = np.isin(np.arange(n), half)
        a, b = benefit[chosen].mean(0), benefit[~chosen].mean(0)
        a, b = a - a.mean(), b - b.mean()
        correlations.append((a @ b) / math.sqrt((a @ a) * (b @ b)))
    r = np.mean(correlations)
    return 2 * r / (1 + r)


# --- what the study prints ------------------------------------------------------------------------
def numbers(text):
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)]


def table(text, first):
    """The table whose header starts with `first`, as {first cell of a row: its other cells}."""
    block = next(b for b in text.split("\n\n") if b.startswith(first))
    rows = [re.split(r"  +", line) for line in block.splitlines() if "  " in line]
    return {row[0]: row[1:] for row in rows[1:]}


def close(printed, exact):
    """Whether numbers printed with two decimals equal the exact ones, up to rounding."""
    return printed == pytest.approx(exact, abs=0.00501)


def check_the_report(saved, printed):
    """Compare printed numbers with recomputed ones, in all tables except the one about trees.

    The numbers of trained parameters are not compared either.
    """
    ours = Recomputed(saved)
    rows = table(printed, "method")
    assert set(rows) == set(study.ARMS)
    for arm, seeds in ours.results.items():
        gains = [gain(results, ours.baseline, ours.tasks) for results in seeds.values()]
        assert rows[arm][1] == str(len(gains))
        assert close(numbers(rows[arm][-1]), [np.mean(gains), np.std(gains, ddof=1)])
        for task, cell in zip(ours.tasks, rows[arm][3:-1], strict=True):
            values = [results[task][METRICS[task][0]] for results in seeds.values()]
            expected = [np.mean(values), np.std(values, ddof=1)]
            assert numbers(cell) == pytest.approx(expected, abs=6e-5)

    rows, verdicts = table(printed, "claim"), ours.verdicts()
    assert list(rows) == [" > ".join(claim) for claim in saved["claims"]["better"]]
    for claim, (p_holm, answer) in verdicts.items():
        mean, half, n, p, p_equivalent = ours.claim(*claim, ours.tasks)
        cells = rows[" > ".join(claim)]
        assert close(numbers(" ".join(cells[:2])), [mean, mean - half, mean + half])
        assert cells[2] == str(n) and cells[6] == answer
        tested = list(claim) in saved["claims"]["equivalent"]
        for cell, exact in zip(cells[3:6], (p, p_holm, p_equivalent if tested else None)):
            if exact is None:
                assert cell == "-"
            elif exact < 0.00009:
                assert cell == "<0.0001"
            else:
                assert float(cell.strip("<")) == pytest.approx(exact, abs=6e-5)

    rows = table(printed, "difference")
    for better, worse in saved["claims"]["better"]:
        for task, cell in zip(ours.tasks, rows[f"{better} - {worse}"], strict=True):
            rest = [other for other in ours.tasks if other != task]
            mean, half, *_ = ours.claim(better, worse, rest)
            assert close(numbers(cell), [mean, mean - half, mean + half])

    rows = table(printed, "pair")
    names, benefit, cosine, affinity = ours.pairs()
    for i, pair in enumerate(names):
        expected = [cosine[:, i].mean(), 1000 * affinity[:, i].mean(), benefit[:, i].mean(),
                    benefit[:, i].std(ddof=1)]
        assert close(numbers(" ".join(rows[" + ".join(pair)])), expected)
    line = re.search(r"reliability of the benefits, (\d+) seeds: (.*)", printed)
    assert int(line[1]) == len(benefit)
    assert close(float(line[2]), reliability(benefit))
    drawn = np.random.default_rng(0).integers(len(benefit), size=(2000, len(benefit)))
    for name, measured in (("cosine", cosine), ("affinity", affinity)):
        rhos = [spearman(benefit[i].mean(0), measured[i].mean(0)) for i in drawn]
        expected = [spearman(benefit.mean(0), measured.mean(0)), *np.quantile(rhos, (0.025, 0.975))]
        line = re.search(f"rank correlation of benefit and {name}: (.*)", printed)
        assert close(numbers(line[1]), expected)


def test_a_made_up_study_is_reported_correctly(tmp_path, without_training, capsys):
    """The tables agree with the independent computation. A second call prints the same."""
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "study.json").read_text())
    check_the_report(saved, printed)
    verdicts = {answer for _, answer in Recomputed(saved).verdicts().values()}
    assert verdicts == {"holds", "does not hold", "equivalent", "undecided",
                        "holds, but within 0.5 points"}
    assert saved["claims"] == study.CLAIMS and saved["machines"][0].keys() == {
        "processor", "torch", "threads per run"}
    study.main(["--out", str(tmp_path)])        # no run is left to do; prints the same again
    assert capsys.readouterr().out == printed


def test_the_recorded_study_says_what_its_page_says(tmp_path, without_training, capsys):
    """The study needs exactly the recorded runs. It prints the tables in docs/STUDY.md and draws
    assets/study.png. The numbers in the page's answer and in README.md are the recomputed ones."""
    recorded = json.loads(RECORDED.read_text())
    (tmp_path / "study.json").write_text(RECORDED.read_text())
    study.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "study.json").read_text()) == recorded
    assert without_training.keys() == recorded["runs"].keys()
    for name, job in without_training.items():
        run = recorded["runs"][name]
        assert " ".join(job.flags) == run["flags"]
        assert "--tree-only" in job.flags or job.tree == run.get("tree")
    check_the_report(recorded, printed)

    page = (ROOT / "docs/STUDY.md").read_text()
    answer = " ".join(page.partition("## The answer")[2].partition("##")[0].split())
    ours = Recomputed(recorded)
    for worse in ("mtl-lora", "least-similar", "random", "lookahead", "task-specific"):
        mean, half, *_ = ours.claim("tglora", worse, ours.tasks)
        assert f"{mean:.2f} " in answer and f"{mean - half:.2f} to {mean + half:.2f})" in answer
    mean, half, *_ = ours.claim("tglora", "mtl-lora", ours.tasks)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{mean:.1f} points of delta-m better than sharing everything (95 % interval " \
           f"{mean - half:.1f} to {mean + half:.1f})" in readme

    shown = "\n".join(page.split("```")[1::2])
    lines = [line for line in printed.splitlines() if line and not line.startswith("wrote")]
    assert [line for line in lines if line not in shown.splitlines()] == []
    drawn = np.array(Image.open(tmp_path / "study.png"))
    shipped = np.array(Image.open(ROOT / "assets/study.png"))
    for colour in ((255, 165, 0), (65, 105, 225)):         # the dots, and the means with their bars
        pixels = (drawn == colour).all(-1)
        assert pixels.any() and (pixels == (shipped == colour).all(-1)).all()


# --- the design -----------------------------------------------------------------------------------
def test_every_seed_has_rooms_of_its_own_and_the_stated_seeds(tmp_path, without_training):
    """Arms have 13, 6 or 5 seeds, each with its own training rooms. Runs have at least 256
    validation rooms."""
    study.main(["--out", str(tmp_path)])
    seeds = {}
    for name, job in without_training.items():
        config = train.parse_arguments(job.flags)
        assert config.room_seed == config.seed and config.val_rooms >= 256
        kind = name.split("/")[0]
        if config.seed != study.CHOICE_SEED:
            seeds.setdefault(kind, set()).add(config.seed)
        else:
            assert kind in ("similarity", "affinity") or kind.startswith("at ")
    many = {"tglora", "random", "least-similar", "lookahead", "mtl-lora", "task-specific",
            "similarity", "affinity"}
    for kind, its in seeds.items():
        number = 13 if kind in many else 6 if kind in ("single-lora", "pair") else 5
        assert its == set(range(10, 10 + number)), kind
    assert seeds.keys() == study.ARMS.keys() | {"similarity", "affinity", "pair"}


def test_trees_and_ranks_of_the_arms(tmp_path, without_training):
    """tglora's tree is built from the similarity, and lookahead's tree from the affinity.

    Runs with only two of the T tasks have 2/T of the rank.
    """
    study.main(["--out", str(tmp_path)])
    runs = study.read_study(tmp_path / "study.json")["runs"]
    config = train.parse_arguments(FLAGS)
    for seed in study.SEEDS:
        for arm, measure in (("tglora", "similarity"), ("lookahead", "affinity")):
            matrix = np.array(runs[f"{measure}/{seed}"]["similarity"])
            tree = name_tree(build_tree(matrix, config.groups), config.tasks)
            assert without_training[f"{arm}/{seed}"].tree == tree
    assert without_training["affinity/10"].program == lookahead.run
    for name, job in without_training.items():
        if name.startswith("pair/"):
            pair = train.parse_arguments(job.flags)
            assert pair.rank == 2 * config.rank / len(TASKS) and pair.groups == (1, 1, 1, 1)
            assert "+".join(pair.tasks) == name.split("/")[1]


def test_a_random_tree_is_never_the_similar_one():
    """Random and least-similar trees differ from tglora's.

    Among the random trees of 100 seeds, each of the seven possible trees occurs.
    """
    groups = (1, 2, 2, 4)
    others = set()
    for seed in range(100):
        noise = np.random.default_rng(1000 + seed).normal(size=(4, 4))
        matrix = noise + noise.T
        similar, least, random = (study.arm_tree(arm, matrix, groups, seed)
                                  for arm in ("tglora", "least-similar", "random"))
        assert random != similar and least != similar
        assert random == study.arm_tree("random", matrix, groups, seed)
        others.add(str(random))
    assert len(others) == 7             # all ways to split four tasks into two groups


def test_flags_that_an_arm_has_no_use_for_are_left_out():
    """Flags that the arm's method does not use are dropped, and the arm's own flags win."""
    flags = "--groups 1,2,2,4 --rank 8 --no-flip --size 64".split()
    assert study.run_flags(flags, ["--method", "decoders"]) == [
        "--no-flip", "--size", "64", "--method", "decoders"]
    assert study.run_flags(flags, ["--rank", "2"]) == [
        "--groups", "1,2,2,4", "--no-flip", "--size", "64", "--rank", "2"]


def test_flags_without_a_choice_of_tree_are_refused(tmp_path):
    """Groups that allow only one tree are an error, because the study compares trees."""
    with pytest.raises(SystemExit, match="these flags leave no choice"):
        study.main(["--groups", "1,1,1,4", "--out", str(tmp_path)])


@pytest.mark.slow
def test_arms_have_the_same_number_of_adapter_parameters(tmp_path):
    """All LoRA arms, MTLoRA included, have the same number of adapter parameters."""
    here = Study(tmp_path, FLAGS, jobs=1)
    here.rates = dict.fromkeys(study.ARMS, 1e-3)
    here.runs["similarity/10"] = here.runs["affinity/10"] = {
        "similarity": np.eye(len(TASKS)).tolist()}
    counts = {}
    for arm in study.ARMS:
        jobs = here.arm_jobs(arm, 10).values()
        costs = [cost(study.parse_arguments([*job.flags, "--weights", "none"])) for job in jobs]
        counts[arm] = sum(one["adapters"] for one in costs)
    assert [counts[arm] for arm in ("single-full", "multi-full", "decoders")] == [0, 0, 0]
    same = {"single-lora", "mtl-lora", "shared-late", "task-specific", "mtlora", *study.WITH_TREE}
    assert len({counts[arm] for arm in same}) == 1


# --- runs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "last.pt", "metrics.json"])
def test_a_run_is_started_resumed_or_only_read(tmp_path, monkeypatch, there):
    """A run starts if its folder is missing or empty, and resumes if the folder holds a last.pt. If
    the folder holds a metrics.json, nothing is trained."""
    folder, calls = tmp_path / "arm/10", []

    def fake_run(argv):
        assert folder.exists() == (there == "last.pt")          # train.py makes new folders itself
        calls.append(argv)
        write_run(folder, 10, depth=0.5)

    monkeypatch.setattr(study, "parse_arguments", lambda argv: argv)
    if there != "nothing":
        folder.mkdir(parents=True)
    if there == "last.pt":
        (folder / "last.pt").touch()
    if there == "metrics.json":
        write_run(folder, 10, depth=0.5)
    run = study.perform(Job(["--lr", "0.1"], [[["depth", "semseg"]]] * 4, fake_run), folder)

    tree_file = tmp_path / "arm/10.tree.json"
    if there == "last.pt":
        assert calls == [["--out", str(folder), "--resume"]]
    elif there == "metrics.json":
        assert calls == []
    else:
        assert calls == [["--lr", "0.1", "--out", str(folder), "--tree", str(tree_file)]]
    assert json.loads(tree_file.read_text())["tree"][0] == [["depth", "semseg"]]
    assert run == {"flags": "--lr 0.1", "tree": [[["depth", "semseg"]]] * 4, "trainable": 1000,
                   "results": {"depth": {"rmse": 0.75}}}        # the last epoch's


def test_a_failed_run_keeps_its_message(tmp_path):
    """A diverged run is recorded, and asking for its result is an error that names the run.

    Any other error of a run is raised at once.
    """
    def fail(config):
        raise ValueError(f"the loss of depth is {config.lr}")

    with pytest.raises(ValueError, match="the loss of depth is 1.0"):
        study.perform(Job(["--lr", "1"], None, fail), tmp_path / "mtl-lora/11")

    def diverge(config):
        raise ValueError("the loss of depth is not finite")

    run = study.perform(Job(["--lr", "1"], None, diverge), tmp_path / "mtl-lora/10")
    assert run == {"flags": "--lr 1", "failed": "the loss of depth is not finite"}
    here = Study(tmp_path, FLAGS, jobs=1)
    here.runs["mtl-lora/10"] = run
    with pytest.raises(ValueError, match="the run mtl-lora/10 failed: the loss of depth is not"):
        here.result(["mtl-lora/10"])


@pytest.mark.parametrize("peak, lowest, tried", [
    (0.002, 0, 3), (0.0000741, 0, 5), (1e-9, 0, 6), (0.054, 0, 6), (0.002, 0.001, 3)])
def test_rates_are_tried_beyond_the_better_end_until_it_gets_worse(tmp_path, monkeypatch, peak,
                                                                   lowest, tried):
    """Learning rates a factor of 3 apart are tried until delta-m gets worse, but at most six.

    A rate with a diverged run is never chosen.
    """
    def complete(self, wanted):
        for name, job in wanted.items():
            config = study.parse_arguments(job.flags)
            assert config.seed == config.room_seed == 0
            quality = 1 / (1 + abs(math.log(config.lr / peak)))
            self.runs[name] = {"results": {"semseg": {"mIoU": quality}}, "trainable": 1}
            if not lowest < config.lr < 0.1:
                self.runs[name] = {"failed": "not finite"}

    monkeypatch.setattr(Study, "complete", complete)
    here = Study(tmp_path, FLAGS, jobs=1)
    here.choose_rates(["mtl-lora"])
    rates = [float(name.split("/")[0][3:]) for name in here.runs]
    assert len(rates) == tried
    finished = [rate for rate in rates if lowest < rate < 0.1]
    best = min(finished, key=lambda rate: abs(math.log(rate / peak)))
    assert here.rates["mtl-lora"] == pytest.approx(best, rel=1e-3)


def test_a_quick_study_is_compared_with_the_recorded_values(tmp_path, monkeypatch,
                                                            without_training, capsys):
    """--quick marks values that differ by more than 1 % from the recorded ones.

    It also names every run whose tree differs from the recorded one.
    """
    study.main(["--out", str(tmp_path / "full")])
    recorded = study.read_study(tmp_path / "full/study.json")
    without_training.clear()
    monkeypatch.setattr(study, "read_study", lambda path: recorded)
    runs = recorded["runs"]
    runs["mtl-lora/10"]["results"]["depth"]["rmse"] *= 1.009
    runs["mtl-lora/10"]["results"]["sal"]["mIoU"] *= 1.011
    runs["tglora/10"]["tree"] = []
    capsys.readouterr()
    study.main(["--quick", "--out", str(tmp_path / "quick")])
    lines = capsys.readouterr().out.splitlines()
    assert without_training.keys() == {"similarity/10", "mtl-lora/10", "tglora/10",
                                       *(f"single-full/10-{task}" for task in TASKS)}
    assert any(line.startswith("11 of 12 values agree to 1 %") for line in lines)
    marked = [line.split() for line in lines if line.endswith("!")]
    assert [words[:2] for words in marked] == [["mtl-lora/10", "sal"]]
    assert "the tree of tglora/10 differs from the recorded one" in lines


@pytest.mark.parametrize("key, value, message", [
    ("flags", "--epochs 1", "study with the flags --epochs 1; choose another --out"),
    ("claims", {**study.CLAIMS, "margin": 1.0}, "study whose claims are not those")])
def test_another_study_in_the_folder_is_refused(tmp_path, key, value, message):
    """A folder whose study has different flags or claims is refused."""
    Study(tmp_path, FLAGS, jobs=1).save()
    Study(tmp_path, FLAGS, jobs=1)              # the same flags and claims: no error
    saved = json.loads((tmp_path / "study.json").read_text())
    write_json(tmp_path / "study.json", saved | {key: value})
    with pytest.raises(ValueError, match=message):
        Study(tmp_path, FLAGS, jobs=1)


def test_arms_that_were_left_out_count_in_holms_correction(tmp_path, without_training, capsys):
    """With only two arms, one claim is judged, but its p-value is still multiplied by seven."""
    study.main(["--out", str(tmp_path), "--arms", "mtl-lora", "tglora", "--seeds", "10", "11"])
    row = table(capsys.readouterr().out, "claim")["tglora > mtl-lora"]
    p, p_holm = map(float, row[3:5])
    assert p_holm == pytest.approx(min(1, 7 * p), abs=4e-4)


# --- a tiny study, killed and continued -----------------------------------------------------------
TINY = ("--tasks semseg,depth,normals --groups 1,1,2,3 --rank 6 --size 32 --train-rooms 6 "
        "--val-rooms 2 --epochs 1 --batch-size 2 --sim-images 3 --head-epochs 1 --device cpu "
        "--arms mtl-lora tglora lookahead --seeds 10 11").split()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs process groups, which Windows does not have")
def test_a_killed_study_continues_and_leaves_no_process(tmp_path):
    """A killed study leaves no process behind. The same command then does the unfinished runs."""
    out = tmp_path / "study"
    command = [sys.executable, "-m", "extras.study", *TINY, "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("at */mtl-lora/0/last.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):     # raised once the worker has ended
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    before = study.read_study(out / "study.json")["runs"]
    assert {"similarity/0", "affinity/11"} <= before.keys()

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = study.read_study(out / "study.json")["runs"]
    assert before.items() <= after.items()
    for seed in (10, 11):
        assert {f"mtl-lora/{seed}", f"tglora/{seed}", f"lookahead/{seed}"} <= after.keys()
    assert "tglora > lookahead" in done.stdout and (out / "study.png").is_file()
