"""tools/check.py: data that lies is found and named; real data passes."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tools import check


def scan(capsys, folder, dataset="nyud"):
    """What `python -m tools.check` prints, and its exit status."""
    code = 0
    try:
        check.main(["--dataset", dataset, "--data-root", str(folder)])
    except SystemExit as stop:
        code = stop.code
    return capsys.readouterr().out, code


def test_real_nyud_is_usable(nyud_folder, capsys):
    """Its numbers: readable images, sizes, classes, metres, the normals' mean toward the camera."""
    text, code = scan(capsys, nyud_folder)
    assert code == 0 and text.splitlines()[-1] == f"{nyud_folder} is usable"
    assert "train: 4 of 4 images readable, 425x560 to 480x640" in text
    assert "depth        valid  58.1%   1.39 to 9.48 m, mean 3.75" in text
    assert "semseg       valid  91.5%   classes 0: 30.4%  1: 17.0%" in text
    assert "no valid pixel in 1 images: 972" in text  # noted, not a fault


def test_real_pascal_is_usable(pascal_folder, capsys):
    text, code = scan(capsys, pascal_folder, "pascal")
    assert code == 0 and "train: 3 of 3 images readable" in text
    assert "sal          valid 100.0%   classes 0: 69.9%  1: 30.1%" in text


def spoil(folder):
    """One fault in each of many files; returns what the scan has to say of each."""
    normals = np.load(folder / "normals/464.npy")
    np.save(folder / "normals/464.npy", normals * 0.5)
    np.save(folder / "depth/464.npy", np.load(folder / "depth/464.npy") * 1000)
    np.save(folder / "depth/1407.npy", np.load(folder / "depth/1407.npy")[:100])
    (folder / "normals/1407.npy").unlink()
    Image.new("L", (560, 425), 41).save(folder / "segmentation/1407.png")
    raw = (folder / "images/433.jpg").read_bytes()
    (folder / "images/433.jpg").write_bytes(raw[:2000])
    listing = folder / "gt_sets/val.txt"
    listing.write_text(listing.read_text() + "\n834\n")
    return ["464.npy has normals of median length 0.50, expected 1",
            "464.npy has a median depth of 2965, expected metres; are these millimetres?",
            "1407.npy has shape (100, 560, 1), expected (425, 560, 1) as its image has",
            "no file normals/1407.npy or normals/1407.png under",
            "1407.png holds class 41, expected 0 (void) to 40", "cannot read image",
            "1 images are in train and in val: 834"]


def test_every_fault_is_named(nyud_folder, capsys):
    """All of them in one scan, by file; the exit status says that it is not usable."""
    expected = spoil(nyud_folder)
    text, code = scan(capsys, nyud_folder)
    for message in expected:
        assert message in text, message
    assert "433.jpg" in text and "is not usable: " in code
    assert "train: 3 of 4 images readable" in text


@pytest.mark.parametrize("length", [0.04, 0.5, 2, 255])
def test_normals_of_any_other_length_are_named(nyud_folder, capsys, length):
    """None passes for an image without normals."""
    for path in nyud_folder.glob("normals/*.npy"):
        np.save(path, np.load(path) * length)
    text, code = scan(capsys, nyud_folder)
    for name in (433, 464, 1407):
        assert f"{name}.npy has normals of median length {length:.2f}, expected 1" in text
    assert "is not usable" in code


def test_a_task_without_any_label_in_a_split_is_a_fault(nyud_folder, capsys):
    """Its metrics would be no numbers, and nothing would be learnt."""
    for path in nyud_folder.glob("depth/*.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    text, code = scan(capsys, nyud_folder)
    assert "nyud train: depth has no valid pixel in any image" in text
    assert "nyud val: depth has no valid pixel in any image" in text and "2 faults" in code


def test_an_image_listed_twice_is_a_fault(nyud_folder, capsys):
    (nyud_folder / "gt_sets/val.txt").write_text("464\n972\n464\n")
    assert "val.txt lists 464 2 times, expected each image once" in scan(capsys, nyud_folder)[1]


@pytest.mark.parametrize("what", ["gt_sets/val.txt", "gt_sets"])
def test_without_splits_there_is_nothing_to_check(nyud_folder, capsys, what):
    path = nyud_folder / what
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert scan(capsys, nyud_folder)[1].startswith("error: ")
