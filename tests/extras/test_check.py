"""Tests of extras/check.py: faults of several kinds are listed, and usable datasets pass."""

import numpy as np
from PIL import Image

from extras import check


def run_check(capsys, folder, dataset="nyud"):
    """Run extras.check. Returns its output, and its error message or 0."""
    error = 0
    try:
        check.main(["--dataset", dataset, "--data-root", str(folder)])
    except SystemExit as exit:
        error = exit.code
    return capsys.readouterr().out, error


def test_a_generated_dataset_is_usable(nyud_folder, capsys):
    """A correct dataset passes. Printed numbers equal those computed here from its files."""
    text, error = run_check(capsys, nyud_folder)
    lines = text.splitlines()
    assert error == 0 and lines[-1] == f"{nyud_folder} is usable"
    assert "train: 4 of 4 images readable, 42x56 to 48x64" in lines
    depth = np.concatenate([np.load(nyud_folder / f"depth/{id}.npy").ravel()
                            for id in ("433", "834", "1407", "basement_0000")])
    valid = depth[depth > 0]
    assert (f"  depth        valid {len(valid) / len(depth):6.1%}   {valid.min():.2f} to "
            f"{valid.max():.2f} m, mean {valid.mean():.2f}") in lines
    assert f"  normals      valid {len(valid) / len(depth):6.1%}   mean (x right" in text
    assert lines.count(f"{'':<15}images without a valid pixel: 1 (834)") == 2   # depth, normals
    stored = np.concatenate([np.array(Image.open(nyud_folder / f"segmentation/{id}.png")).ravel()
                             for id in ("464", "972")])
    semseg = next(line for line in lines[lines.index("val: 2 of 2 images readable, 47x62 to 48x64")
                                         :] if line.startswith("  semseg"))
    assert semseg.startswith(f"  semseg       valid {(stored > 0).mean():6.1%}   classes 0: ")
    assert f"  30: {(stored == 31).sum() / (stored > 0).sum():.1%}" in semseg
    x, y, z = np.load(nyud_folder / "normals/464.npy").mean((0, 1))
    assert f"mean (x right, y down, z to the camera) {x:+.2f} {y:+.2f} {z:+.2f}" in text


def test_pascal_is_usable_too(pascal_folder, capsys):
    """PASCAL images without a person are listed, but they are not a fault."""
    text, error = run_check(capsys, pascal_folder, "pascal")
    assert error == 0
    assert "images without a valid pixel: 2 (2008_000009, 2008_000019)" in text


def test_every_fault_is_listed(nyud_folder, capsys):
    """One run lists all nine faults of a damaged dataset, and ends with an error."""
    folder = nyud_folder
    np.save(folder / "normals/464.npy", np.load(folder / "normals/464.npy") * 0.5)
    np.save(folder / "depth/464.npy", np.load(folder / "depth/464.npy") * 1000)
    np.save(folder / "depth/1407.npy", np.load(folder / "depth/1407.npy")[:10])
    (folder / "normals/1407.npy").unlink()
    Image.new("L", (56, 42), 41).save(folder / "segmentation/1407.png")
    (folder / "images/basement_0000.jpg").write_bytes(b"no image")
    (folder / "gt_sets/val.txt").write_text("464\n972\n834\n")
    text, error = run_check(capsys, folder)
    faults = text.splitlines()[-9:]
    expected = [
        "segmentation/1407.png: holds class 41, expected a number in range(0, 41)",
        "depth/1407.npy has shape (10, 56, 1), expected (42, 56, 1), as its image has",
        "no file normals/1407.npy or normals/1407.png in",
        "images/basement_0000.jpg is damaged, or is not an image",
        "depth/464.npy has a median depth of ",
        "normals/464.npy has normals of median length 0.50, expected 1",
        "nyud val: depth has no valid pixel in any image",
        "nyud val: normals has no valid pixel in any image",
        "nyud: images that are in both train and val: 1 (834)"]
    for fault, message in zip(faults, expected, strict=True):
        assert message in fault
    assert error == f"{folder} is not usable; number of faults listed above: 9"
    assert "train: 3 of 4 images readable" in text
