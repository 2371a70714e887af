"""Damaged files of every kind: a one-line error or a correct result, never anything else."""

import json
import os
import random
import signal
import tarfile
from argparse import Namespace
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from datasets import labels
from datasets.archives import unpack
from datasets.labels import in_another_process, read_image
from datasets.rooms import render_room
from grouping import check_tree, read_tree
from flags import read_baseline
from swin import build_swin, load_weights
from tasks import make_tasks
from util.checkpoint import read_checkpoint, save

CASES = 32  # of each kind; 13 kinds
TASKS = ["semseg", "depth", "normals"]
ROOM = render_room((0, 0, 7), 24, 32)
SWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


def damage(raw: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a piece cut out, cut off, blanked or repeated, or nothing but noise."""
    raw, i = bytearray(raw), rng.randrange(len(raw))
    n = rng.randint(1, max(1, len(raw) // 4))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[i:i + n]
    elif kind == 2:
        del raw[i:]
    elif kind == 3:
        raw[i:i + n] = bytes(len(raw[i:i + n]))
    elif kind == 4:
        raw[i:i] = raw[i:i + n]
    else:
        raw[i:i + n] = rng.randbytes(n)
    return bytes(raw)


@contextmanager
def no_hang(seconds=20):
    def late(*_):
        raise AssertionError(f"still at it after {seconds} seconds")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write_png(path):
    Image.fromarray(ROOM["semseg"].numpy()).save(path)


def write_photo(path):
    Image.fromarray(ROOM["image"].permute(1, 2, 0).numpy()).save(path, quality=90)


def write_parts(path):
    part = {"part_name": "head", "mask": np.eye(6, dtype=np.uint8)}
    scipy.io.savemat(path, {"anno": {"objects": [{"class": "person", "parts": [part, part]}]}})


def write_archive(path):
    folder = path.parent / "NYUD_MT/gt_sets"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text("\n".join(map(str, range(200))))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder.parent, "NYUD_MT")


def read_archive(path):
    folder = unpack("nyud", path, path.parent / f"into{path.stat().st_mtime_ns}")
    return {p.name: p.read_text() for p in sorted(folder.rglob("*.txt"))}


def read_weights(path):
    swin = build_swin(**SWIN)
    load_weights(swin, str(path))
    return swin.state_dict()


def classes(limit):
    return lambda x: x.dtype == np.uint8 and ((x < limit) | (x == 255)).all()


def unit_or_nothing(x):
    length = np.linalg.norm(x, axis=-1)
    return np.isfinite(x).all() and ((length == 0) | (abs(length - 1) < 1e-3)).all()


def good_tree(tree):
    check_tree(tree, 3)
    return True


def good_baseline(found):
    return all(0 < found[t.name][t.metric] < np.inf for t in make_tasks(TASKS, 6))


TREE = {"tree": [[["semseg", "depth", "normals"]], [["semseg", "depth"], ["normals"]]]}
BASELINE = {"results": {"semseg": {"mIoU": 0.5}, "depth": {"rmse": 0.7}, "normals": {"mean": 20}}}
SAME = "the same as from the whole file"  # the format has checksums
KINDS = {  # file name: (how it is written, how it is read, what a result without error must be)
    "photo.jpg": (write_photo, read_image, lambda x: x.dtype == np.uint8 and x.shape[2] == 3),
    "photo.png": (write_photo, read_image, lambda x: x.dtype == np.uint8 and x.shape[2] == 3),
    "nyud.png": (write_png, labels.read_nyud_classes, classes(40)),
    "voc.png": (write_png, labels.read_voc_classes, classes(21)),
    "sal.png": (write_png, labels.read_mask, classes(2)),
    "depth.npy": (lambda p: np.save(p, ROOM["depth"][0].numpy()), labels.read_depth,
                  lambda x: np.isfinite(x).all() and (x >= 0).all()),
    "normals.npy": (lambda p: np.save(p, ROOM["normals"].permute(1, 2, 0).numpy()),
                    labels.read_normals, unit_or_nothing),
    "parts.mat": (write_parts, partial(in_another_process, labels.human_parts), classes(7)),
    "context.mat": (lambda p: scipy.io.savemat(p, {"LabelMap": np.arange(42).reshape(6, 7)}),
                    partial(in_another_process, labels.known_to_nyu),
                    lambda x: set(np.unique(x)) <= {0, 1}),
    "best.pt": (lambda p: save(p, {"model": {"w": torch.arange(99.0)}, "config": {"tasks": ["sal"]},
                                   "tree": [[(0,)]], "fingerprint": "0"}), read_checkpoint, SAME),
    "swin.pth": (lambda p: torch.save(build_swin(**SWIN).state_dict(), p), read_weights, SAME),
    "NYUD_MT.tgz": (write_archive, read_archive, SAME),
    "tree.json": (lambda p: p.write_text(json.dumps(TREE)), lambda p: read_tree(p, TASKS),
                  good_tree),
    "metrics.json": (lambda p: p.write_text(json.dumps(BASELINE)),
                     lambda p: read_baseline(Namespace(baseline=[str(p)], dataset="rooms"),
                                             make_tasks(TASKS, 6)), good_baseline),
}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_one_line_or_a_correct_result(name, tmp_path):
    """Seeded; the error names the file and fits one line; what is read is what it says it is."""
    write, read, valid = KINDS[name]
    path, refused = tmp_path / name, 0
    write(path)
    raw, whole = path.read_bytes(), read(path)
    assert valid is SAME or valid(whole)
    rng = random.Random(name)
    for case in range(CASES):
        path.write_bytes(damage(raw, rng))
        with no_hang():
            try:
                found = read(path)
            except ValueError as error:
                text = str(error).strip().splitlines()[-1]  # as train.py and eval.py print it
                assert name in text, f"case {case}: {error}"
                refused += 1
                continue
        assert same(found, whole) if valid is SAME else valid(found), f"case {case}"
    assert refused, "no damage was noticed at all"


@pytest.mark.parametrize("photo", [False, True])
def test_a_pipe_is_not_waited_for(tmp_path, photo):
    os.mkfifo(tmp_path / "a.png")
    with no_hang(5), pytest.raises(ValueError, match="no image file .*a.png"):
        read_image(tmp_path / "a.png", photo=photo)
