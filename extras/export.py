"""Write the backbone of a --method full run to a file, in fp16, for --weights of another run.

    python -m extras.export --checkpoint runs/full/best.pt --export-backbone backbone.pth

An existing file is not overwritten.
"""

import argparse
from pathlib import Path

import torch

from util import one_line_errors, read_checkpoint


def export_backbone(checkpoint: Path, path: Path) -> None:
    """Raises ValueError if the run did not train its backbone, and OSError if `path` exists."""
    state = read_checkpoint(checkpoint)
    method = state["config"]["method"]
    if method != "full":
        raise ValueError(f"{checkpoint} was trained with --method {method} and does not hold the "
                         "weights of a whole backbone; expected a run with --method full")
    weights = {}
    for name, value in state["model"].items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value.half()
    with open(path, "xb") as file:
        torch.save(weights, file)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt or last.pt")
    parser.add_argument("--export-backbone", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    with one_line_errors():
        export_backbone(args.checkpoint, args.export_backbone)
    print(f"wrote {args.export_backbone}")


if __name__ == "__main__":
    main()
