"""tools/bench.py runs; its figures belong to the machine and are no test's business."""

import json

import pytest
import torch

from pvt import build_pvt
from tools import bench


def test_every_part_prints_its_rows(tmp_path, capsys, nyud_archive, monkeypatch):
    """Tiny: each section, sides, work from the cost ledger, a JSON file with the same rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "peak", lambda args, flags: 1.5)  # a process each: slow to start
    bench.main(["--backbone", "mini", "--size", "64", "--batch", "2", "--rounds", "1", "--device",
                "cpu", "--data-root", str(nyud_archive), "--json", "rows.json", "--only",
                "step,backbone,inference,similarity"])
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["section"].split()[0] for row in rows} == {
        "Swin-T", "PVT", "training", "inference", "similarity"}
    found = {(row["section"], row["row"]): row for row in rows}
    steps = {name: row for (section, name), row in found.items() if section == "training step"}
    assert len(steps) == 8 and steps["full"]["peak_gib"] == 1.5
    one, tree = steps["1,1,1,1 (MTL-LoRA)"], steps["1,2,3,4 (TGLoRA)"]
    assert one["ratio"] == 1 and tree["ratio"] == pytest.approx(tree["ms"] / one["ms"])
    assert tree["gmacs"] > 1.5 * one["gmacs"] > 0
    assert "  torchvision" in text and "  search, 15 tasks, 7 groups" in text
    assert all(row["low"] <= row["ms"] <= row["high"] for row in rows)


def test_the_data_part_says_what_a_step_waits(tmp_path, capsys):
    """rooms: images per second of rendering, and the share of a step spent waiting."""
    bench.main(["--only", "data", "--rounds", "1", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "images/s" in text and "a step waits" in text and "rooms in memory" in text


def test_memory_is_that_of_a_process_of_its_own():
    """More tasks in groups of their own need more."""
    args = bench.argparse.Namespace(device=bench.pick_device("cpu"), backbone="mini", size=224,
                                    batch=4, amp="auto")
    small, large = (bench.peak(args, flags) for flags in ("--method decoders", "--groups 4,4,4,4"))
    assert 0 < small < large


def test_plain_loops_compute_the_same():
    """What pvt.py's attention is compared with, with a reduction and without."""
    x = torch.randn(2, 16, 24, 64)
    for ratio in (1, 8):
        attn = build_pvt("b0", dims=(64,) * 4, num_heads=(4,) * 4, ratios=(ratio,) * 4)
        attn = attn.layers[0].blocks[0].attn
        torch.nn.init.normal_(attn.q.weight)
        torch.testing.assert_close(bench.plain_attention(attn, x), attn(x), rtol=1e-4, atol=1e-5)


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "nothing"])
    assert "expected some of step,backbone,inference,data,similarity" in capsys.readouterr().err
