"""Where the tests find small real data: TGLORA_DATA names a folder of mini archives."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

import train
from cost import cost
from datasets.archives import find_dataset, unpack

COSTS = {}


def costs(*flags: str) -> dict:
    """What `eval.py --cost` counts for these flags; each configuration is built once."""
    config = train.parse_arguments(list(flags))
    key = (config.dataset, config.method, *config.tasks, config.groups, config.rank, config.layers,
           config.backbone, config.size, config.reduction, config.fused, config.tree,
           *config.without, "frozen", *config.frozen)
    if key not in COSTS:
        COSTS[key] = cost(config)
    return COSTS[key]


@contextmanager
def stopped_after_an_epoch(monkeypatch):
    """Runs inside end, as by Ctrl-C, as soon as the last.pt of an epoch is written."""
    save = train.save

    def save_and_stop(path, state):
        save(path, state)
        if path.name == "last.pt" and state["step"]:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_and_stop)
        with pytest.raises(SystemExit, match="continue with --resume"):
            yield


def archive(name: str, what: str) -> Path:
    folder = os.environ.get("TGLORA_DATA")
    path = Path(folder or "") / name
    if not folder or not path.is_file():
        pytest.skip(f"needs real data: set TGLORA_DATA to a folder that holds {name} ({what})")
    return path


@pytest.fixture(scope="session")
def nyud_archive() -> Path:
    return archive("NYUD_MT_mini.tgz", "a few NYUD-v2 images in the layout of NYUD_MT.tgz")


@pytest.fixture(scope="session")
def pascal_archive() -> Path:
    return archive("PASCAL_MT_mini.tgz", "a few PASCAL images in the layout of PASCAL_MT.tgz")


@pytest.fixture
def nyud_folder(nyud_archive, tmp_path) -> Path:
    """A fresh unpacked copy that a test may damage."""
    return find_dataset("nyud", unpack("nyud", nyud_archive, tmp_path / "unpacked"))


@pytest.fixture
def pascal_folder(pascal_archive, tmp_path, monkeypatch) -> Path:
    """The same for PASCAL; what is parsed from it is kept in the test's folder."""
    monkeypatch.setattr("datasets.archives.CACHE", tmp_path / "cache")
    return find_dataset("pascal", unpack("pascal", pascal_archive, tmp_path / "unpacked"))
