"""Read every file of a dataset once and say what is wrong with it, before days are spent on it.

    python -m tools.check --dataset nyud --data-root data       # exit code 0: usable

Named one by one: files that are missing or cannot be read, or of another size than their image;
class numbers that cannot be; depth that looks like millimetres, normals that are not of length 1;
images in both splits; a task without any valid pixel in a split. Noted: single labels without one,
which training simply skips. Then numbers that a person can judge: image sizes, the share of valid
pixels, how often each class is there, the range of depth, the mean normal.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from datasets.archives import find_dataset
from datasets.classes import SEMSEG
from datasets.labels import LAYOUTS, Files
from flags import Help
from tasks import make_tasks
from util.run import one_line_errors, progress


class Summary:
    """What one task's labels hold, image by image: pixels, valid pixels, and the values."""

    def __init__(self, task):
        self.task, self.pixels, self.valid, self.empty = task, 0, 0, []
        self.sums, self.least, self.most = 0.0, np.inf, -np.inf

    def add(self, value: np.ndarray, id: str) -> None:  # (H, W), or (H, W, channels)
        label = torch.from_numpy(np.ascontiguousarray(value))
        classes = self.task.kind == "classes"
        label = (label.long() if classes else label.permute(2, 0, 1))[None]
        valid = self.task.valid(label).reshape(value.shape[:2]).numpy()
        self.pixels += valid.size
        self.valid += int(valid.sum())
        if not valid.any():
            self.empty.append(id)
            return
        values = value[valid]  # (N,) classes, or (N, channels)
        self.sums += (np.bincount(values, minlength=self.task.classes) if classes else
                      values.sum(0, dtype=float))
        self.least, self.most = min(self.least, values.min()), max(self.most, values.max())

    def __str__(self) -> str:
        text = f"  {self.task.name:<12} valid {self.valid / max(1, self.pixels):6.1%}"
        if self.valid:
            text += "   " + self.values(self.sums / self.valid)
        if self.empty:
            text += (f"\n{'':<15}no valid pixel in {len(self.empty)} images: "
                     f"{', '.join(self.empty[:6])}{' ...' if len(self.empty) > 6 else ''}")
        return text

    def values(self, mean: np.ndarray) -> str:
        """mean: of the valid pixels (channels,), or each class's part of them (classes,)."""
        if self.task.kind == "classes":
            return "classes " + "  ".join(f"{c}: {part:.1%}" for c, part in enumerate(mean) if part)
        if self.task.kind == "directions":
            return "mean (x right, y down, z to the camera) " + " ".join(f"{x:+.2f}" for x in mean)
        unit = " m" if self.task.kind == "distances" else ""
        return (f"{self.least:.2f} to {self.most:.2f}{unit}, mean "
                + " ".join(f"{x:.2f}" for x in mean))


def check_split(name: str, root: Path, split: str, tasks: list) -> tuple[list[str], str, list[str]]:
    """Read one split. Returns what is wrong, one sentence each, the summary, and the images."""
    dataset = Files(name, root, split, [task.name for task in tasks], complete=False)
    wrong, sizes, summaries = [], [], {task.name: Summary(task) for task in tasks}
    for i, id in enumerate(dataset.ids, 1):
        size = None
        for kind in dataset.readers:  # the image first
            try:
                value = dataset.read(kind, id, size)
            except ValueError as error:
                wrong.append(str(error))
                if kind == "image":  # there is nothing to compare its labels with
                    break
                continue
            if kind == "image":
                size = value.shape[:2]
                sizes.append(size)
            else:
                summaries[kind].add(value, id)
        progress(f"{name} {split}: {i} of {len(dataset)} images, {len(wrong)} wrong",
                 i == len(dataset))
    wrong += [f"{name} {split}: {kind} has no valid pixel in any image"
              for kind, summary in summaries.items() if not summary.valid]
    text = f"{split}: {len(sizes)} of {len(dataset)} images readable"
    if sizes:
        text += ", {}x{} to {}x{}".format(*min(sizes), *max(sizes))
    return wrong, "\n".join([text, *map(str, summaries.values())]), dataset.ids


def main(argv: list[str] | None = None) -> None:
    """Check both splits of the dataset that the flags name; prints, and exits with a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--dataset", choices=sorted(LAYOUTS), required=True, help="which one")
    parser.add_argument("--data-root", default="data", help="folder of the dataset, or its archive")
    args = parser.parse_args(argv)
    kinds = [kind for kind in LAYOUTS[args.dataset]["files"] if kind != "image"]
    tasks = make_tasks(kinds, SEMSEG[args.dataset])
    with one_line_errors():
        root = find_dataset(args.dataset, args.data_root)
        faults, texts, ids = zip(*(check_split(args.dataset, root, split, tasks)
                                   for split in ("train", "val")))
    wrong, both = sum(faults, []), sorted(set(ids[0]) & set(ids[1]))
    if both:
        wrong.append(f"{args.dataset}: {len(both)} images are in train and in val: "
                     f"{', '.join(both[:6])}")
    print("\n".join([*texts, *wrong]))
    if wrong:
        raise SystemExit(f"{root} is not usable: {len(wrong)} faults, named above")
    print(f"{root} is usable")


if __name__ == "__main__":
    main()
