"""Where the tests find small real data: TGLORA_DATA names a folder with NYUD_MT_mini.tgz."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nyud_archive() -> Path:
    folder = os.environ.get("TGLORA_DATA")
    archive = Path(folder or "") / "NYUD_MT_mini.tgz"
    if not folder or not archive.is_file():
        pytest.skip("needs real data: set TGLORA_DATA to a folder that holds NYUD_MT_mini.tgz "
                    "(a few NYUD-v2 images in the layout of NYUD_MT.tgz)")
    return archive


@pytest.fixture
def nyud_folder(nyud_archive, tmp_path) -> Path:
    """A fresh unpacked copy that a test may damage."""
    from data import unpack
    return next(unpack(nyud_archive, tmp_path / "unpacked").glob("*/gt_sets")).parent
