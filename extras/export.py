"""Export the network of a run: as one graph with merged adapters, or only its backbone.

    python -m extras.export --checkpoint runs/nyud/best.pt --merge nyud.pt2
    python -m extras.export --checkpoint runs/full/best.pt --export-backbone backbone.pth

The merged graph only needs PyTorch, not this repository:

    network = torch.export.load("nyud.pt2").module()
    predictions = network(images)       # (B, 3, H, W) -> {task: (B, outputs, H, W)}, B up to 1024

Images must have the size that the network was trained with. Their RGB values, from 0 to 1, must be
normalised: subtract data.MEAN, then divide by data.STD. An existing file is never overwritten.
Reference: https://docs.pytorch.org/docs/stable/export.html
"""

import argparse
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from eval import load_run
from tglora import merge
from util import one_line_errors, write_whole

TOLERANCE = 1e-4        # largest allowed error of merged predictions, see `largest_difference`


def refuse_existing(path: Path) -> None:
    """Raise ValueError if `path` exists."""
    if path.exists():
        raise ValueError(f"{path} already exists; choose another name")


def largest_difference(predictions: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst task's largest error, relative to the task's largest expected absolute value."""
    worst = 0.0
    for task, value in expected.items():
        error = (predictions[task] - value).abs().max() / value.abs().max()
        if not error.item() <= worst:           # also true for NaN
            worst = error.item()
    return worst


def export_merged(model: nn.Module, size: tuple[int, int], path: Path) -> str:
    """Merge the adapters into the weights, in place, and write one torch.export graph.

    Before the file is written, the graph is loaded from memory, and its predictions are compared
    with those of the unmerged network. MTLoRA's task-specific layers keep their adapters. Returns a
    message to print.

    size: (H, W) of the images. Raises ValueError and writes nothing if `path` exists, or if the
    predictions differ by more than TOLERANCE.
    """
    refuse_existing(path)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        expected = model.eval()(image)
        merged = merge(model).requires_grad_(False)
        graph = torch.export.export(merged, (image,), dynamic_shapes={"image": {0: batch}})
        file = io.BytesIO()
        torch.export.save(graph, file)
        file.seek(0)
        predictions = torch.export.load(file).module()(image)
    difference = largest_difference(predictions, expected)
    if not difference <= TOLERANCE:
        raise ValueError(f"{path} was not written: the merged network's predictions differ from "
                         f"the unmerged ones by {difference:.1e} of the largest one, which is more "
                         "than rounding explains; please report this")
    write_whole(path, file.getvalue())
    return (f"wrote {path}, {path.stat().st_size / 1e6:.0f} MB, for images of {size[0]}x{size[1]}; "
            f"its predictions differ from the unmerged ones by at most {difference:.1e} of the "
            "largest one")


def export_backbone(model: nn.Module, method: str, path: Path) -> str:
    """Write the backbone's weights in fp16, in a format that train.py --weights can read.

    method: the run's --method. Raises ValueError if it is not "full", or if `path` exists.
    """
    refuse_existing(path)
    if method != "full":
        raise ValueError(f"--export-backbone: the run used --method {method}, which does not train "
                         "the whole backbone; only --method full does")
    weights = {}
    for name, value in model.backbone.state_dict().items():
        weights[name] = value.half() if value.is_floating_point() else value
    file = io.BytesIO()
    torch.save(weights, file)
    write_whole(path, file.getvalue())
    return f"wrote {path}"


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="best.pt or last.pt of a run; or the "
        "folder of the run, whose best.pt is then used")
    add("--weights", help="file of the pretrained backbone that the run used, if it has moved")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--merge", type=Path, help="merge the adapters into the network's "
                        "weights, and write the network to this file as a torch.export graph")
    output.add_argument("--export-backbone", type=Path, help="write the backbone's weights to "
                        "this file, for train.py --weights; only for runs with --method full")
    args = parser.parse_args(argv)
    with one_line_errors():
        model, _, config = load_run(args.checkpoint, args.weights)
        if args.merge:
            print(export_merged(model, config.size, args.merge))
        else:
            print(export_backbone(model, config.method, args.export_backbone))


if __name__ == "__main__":
    main()
