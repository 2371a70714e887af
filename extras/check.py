"""Check all files of NYUD-v2 or PASCAL-Context before you spend days training on them.

    python -m extras.check --dataset nyud --data-root data        # exit code 0: the data are usable

The command first prints numbers for you to judge: image sizes, the share of valid pixels, the
frequency of each class, the range of depth, and the mean normal. Then it lists the faults: files
that are missing or damaged, labels whose size differs from that of their image, classes that do not
exist, depth that seems to be in millimetres, files with many normals whose length is not 1, images
that are in both splits, and tasks without any valid pixel in a split. An image without labels for a
task is not a fault, because the task's loss ignores it. The number of such images is printed for
each task, with the names of the first six.

If an image cannot be read, its labels are not read either, so repair the image and check again.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from nyud_pascal import LAYOUTS, SEMSEG, Files, find_dataset
from tasks import make_tasks
from util import one_line_errors, progress


class Summary:
    """Statistics of one task's labels, collected image by image."""

    def __init__(self, task):
        self.task = task
        self.pixels = self.valid = 0
        self.empty = []             # names of images without a valid pixel
        self.total = 0.0            # pixels per class (classes,), or sum of values (channels,)
        self.smallest, self.largest = np.inf, -np.inf

    def add(self, label: np.ndarray, id: str) -> None:
        """Add the label of the image `id`: (H, W) classes or (H, W, channels) floats."""
        batch = torch.from_numpy(np.ascontiguousarray(label))[None]
        if self.task.kind == "classes":
            batch = batch.long()
        else:
            batch = batch.permute(0, 3, 1, 2)
        valid = self.task.valid(batch).reshape(label.shape[:2]).numpy()
        self.pixels += valid.size
        self.valid += valid.sum()
        if not valid.any():
            self.empty.append(id)
            return
        values = label[valid]       # (N,) or (N, channels)
        if self.task.kind == "classes":
            self.total += np.bincount(values, minlength=self.task.classes)
        else:
            self.total += values.sum(axis=0, dtype=np.float64)
        self.smallest = min(self.smallest, values.min())
        self.largest = max(self.largest, values.max())

    def __str__(self) -> str:
        text = f"  {self.task.name:<12} valid {self.valid / max(1, self.pixels):6.1%}"
        if self.valid:
            text += "   " + self.values()
        if self.empty:
            text += (f"\n{'':<15}images without a valid pixel: {len(self.empty)} "
                     f"({shortened(self.empty)})")
        return text

    def values(self) -> str:
        mean = self.total / self.valid
        if self.task.kind == "classes":
            shares = [f"{c}: {share:.1%}" for c, share in enumerate(mean) if share]
            return "classes " + "  ".join(shares)
        numbers = " ".join(f"{x:+.2f}" for x in mean)
        if self.task.kind == "directions":
            return f"mean (x right, y down, z to the camera) {numbers}"
        return f"{self.smallest:.2f} to {self.largest:.2f} m, mean {mean[0]:.2f}"


def shortened(ids: list[str]) -> str:
    """The first six names as text, with "..." if there are more."""
    return ", ".join(ids[:6]) + (" ..." if len(ids) > 6 else "")


def check_split(name: str, root: Path, split: str) -> tuple[list[str], str, list[str]]:
    """Read the images and labels of one split.

    Returns the faults (one line each), a summary, and the names of the split's images.
    """
    known = [task for task in LAYOUTS[name] if task != "image"]
    tasks = make_tasks(known, SEMSEG[name])
    dataset = Files(name, root, split, known, complete=False)
    summaries = {task.name: Summary(task) for task in tasks}
    faults, sizes = [], []
    for id in progress(dataset.ids, f"{split} images"):
        try:
            size = dataset.read("image", id).shape[:2]
        except ValueError as error:
            faults.append(str(error))
            continue                        # a label is checked against the image's size
        sizes.append(size)
        for task in known:
            try:
                label = dataset.read(task, id, size)
            except ValueError as error:
                faults.append(str(error))
                continue
            summaries[task].add(label, id)
    for task, summary in summaries.items():
        if not summary.valid:
            faults.append(f"{name} {split}: {task} has no valid pixel in any image")
    text = f"{split}: {len(sizes)} of {len(dataset)} images readable"
    if sizes:
        smallest, largest = min(sizes), max(sizes)
        text += f", {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]}"
    return faults, "\n".join([text, *map(str, summaries.values())]), dataset.ids


def main(argv: list[str] | None = None) -> None:
    """Check both splits of a dataset. Exits with an error if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--dataset", choices=sorted(LAYOUTS), required=True)
    parser.add_argument("--data-root", default="data", help="folder of the dataset, or its archive")
    args = parser.parse_args(argv)
    with one_line_errors():
        root = find_dataset(args.dataset, args.data_root)
        faults, train_text, train_ids = check_split(args.dataset, root, "train")
        val_faults, val_text, val_ids = check_split(args.dataset, root, "val")
    faults += val_faults
    both = sorted(set(train_ids) & set(val_ids))
    if both:
        faults.append(f"{args.dataset}: images that are in both train and val: {len(both)} "
                      f"({shortened(both)})")
    print(train_text, val_text, *faults, sep="\n")
    if faults:
        raise SystemExit(f"{root} is not usable; number of faults listed above: {len(faults)}")
    print(f"{root} is usable")


if __name__ == "__main__":
    main()
