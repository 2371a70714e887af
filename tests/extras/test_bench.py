"""Tests of extras/bench.py: the rows of its tables and how numbers are computed, but no times."""

from argparse import Namespace

import pytest
import torch

from extras import bench

TINY = ["--backbone", "mini", "--size", "64", "--rounds", "1", "--device", "cpu"]


def test_sides_take_turns_and_the_first_round_is_not_counted():
    """Two sides of a comparison run in turn for three rounds. The first round is not counted."""
    calls = []
    args = Namespace(device=torch.device("cpu"), rounds=2)
    seconds = bench.take_turns(args, {"a": lambda: calls.append("a"),
                                      "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_a_row_by_hand():
    """Side b has a median of 3 s, quartiles of 2 and 4 s, and a median ratio of 2 to side a."""
    seconds = {"a": [1.0, 2.0, 1.0, 2.0, 1.0], "b": [1.0, 2.0, 3.0, 4.0, 5.0]}
    first, second = bench.make_rows("step", seconds, {"b": 6.0}, {"b": 1.5})
    assert first["ratio"] == 1 and first["gmacs"] is None and first["peak_gib"] is None
    assert (second["low"], second["ms"], second["high"]) == (2000, 3000, 4000)
    assert second["ratio"] == 2
    line = bench.format_row(second, peak_rate=8.0)
    assert line.split() == ["b", "3000.0", "2000.0-4000.0", "2.000", "6.0", "2", "25%", "1.50"]
    assert bench.format_row(first, 8.0).split() == ["a", "1000.0", "1000.0-2000.0", "1.000"]


@pytest.mark.parametrize("flags, backbone_factor, decoder_factor", [
    ("--method full", 3, 3), ("--groups 1,1,1,1", 2, 2), ("--method decoders", 1, 3)])
def test_the_work_of_a_step(flags, backbone_factor, decoder_factor):
    """A step's GMACs are estimated as 3 forward passes, or as 2 with frozen weights and adapters.

    With --method decoders, the backbone counts as one forward pass, and the decoders as 3.
    """
    args = Namespace(device=torch.device("cpu"), backbone="mini", size=32, batch=2, amp="off")
    _, gmacs = bench.step_of(args, flags)
    model, _, _ = bench.network(args, flags)
    whole = bench.count_macs(model, (32, 32))["macs_all"]
    backbone = bench.count_macs(model.backbone, (32, 32))["macs_all"]
    expected = backbone_factor * backbone + decoder_factor * (whole - backbone)
    assert 0 < backbone < whole and gmacs == pytest.approx(2 * expected / 1e9)


@pytest.mark.slow
def test_every_section_prints_its_rows(capsys):
    """Every section runs on a CPU and prints its rows, with each median between its quartiles."""
    rows = {}
    for row in bench.main(TINY):
        rows[row["section"], row["row"]] = row
    printed = capsys.readouterr().out
    for (section, name), row in rows.items():
        assert f"\n{section}\n" in printed and f"\n  {name}" in printed
        assert row["low"] <= row["ms"] <= row["high"]
        assert row["peak_gib"] is None
    one = rows["training step", "1,1,1,1 (MTL-LoRA)"]
    tree = rows["training step", "1,2,3,4 (TGLoRA)"]
    assert one["ratio"] == 1 and tree["ratio"] == pytest.approx(tree["ms"] / one["ms"])
    assert tree["gmacs"] > 1.5 * one["gmacs"]
    assert ("backbone, forward + backward", "Swin-T, torchvision") in rows
    assert ("inference MTLoRA, batch 2", "merged") in rows
    assert ("similarity", "search, 200 tasks, 20 groups") in rows
    assert "images/s" in rows["rooms, one image", "one process"]["note"]
    assert "of a step" in rows["rooms in memory, batch 8", "fetch"]["note"]


def test_the_rows_of_a_training_step(monkeypatch):
    """One row adds up the GMACs of four single-task networks. --compile adds another row."""
    compiled = []                       # real compilation would take minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **how: compiled.append(model))
    monkeypatch.setattr(bench, "TRAINED", {"decoders": "--method decoders"})
    args = Namespace(device=torch.device("cpu"), backbone="mini", size=32, batch=1, amp="off",
                     rounds=1, compile=True)
    rows = {row["row"]: row for row in bench.step(args)}
    assert list(rows) == ["decoders", "one LoRA network per task", "1,2,3,4, compiled"]
    assert len(compiled) == 1
    four = [bench.step_of(args, f"--tasks {task} --rank 16")[1]
            for task in ("semseg", "human_parts", "sal", "normals")]
    assert rows["one LoRA network per task"]["gmacs"] == pytest.approx(sum(four))


def test_the_data_section(nyud_archive, monkeypatch):
    """The times are faked: reading all four images, fetching, and training take 8 s each.

    One image then takes 2 s, and fetching is half of a step, which is fetching plus training.
    """
    def take_turns(args, sides):
        for side in sides.values():
            side()
        return {name: [8.0] for name in sides}

    monkeypatch.setattr(bench, "take_turns", take_turns)
    args = Namespace(device=torch.device("cpu"), rounds=0, amp="off")
    flags = f"--data-root {nyud_archive} --backbone mini --size 64 --batch-size 2"
    rows = {row["row"]: row for row in bench.measure_data(args, "nyud", flags)}
    assert list(rows) == ["one process", "fetch", "step"]
    assert rows["one process"]["ms"] == 2000 and rows["one process"]["note"] == "0.5 images/s"
    assert rows["step"]["ms"] == 8000 and rows["fetch"]["note"] == "50.00% of a step"
