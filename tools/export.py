"""A run's network for elsewhere: as it was trained, merged into one graph, or its backbone alone.

    python -m tools.export --checkpoint runs/nyud/best.pt --merge nyud.pt2
    python -m tools.export --checkpoint runs/backbone/best.pt --export-backbone backbone.pth

The graph needs no code of ours; it is compared with the network on the spot.
References: https://docs.pytorch.org/docs/stable/export.html.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data import CLASSES
from decoders import FUSED
from model import build
from flags import Help, network_flags
from tasks import make_tasks
from tglora import merge
from util.checkpoint import load_trained, read_checkpoint, write_whole
from util.run import one_line_errors, reading


def load_run(path: str | Path,
             weights: str | None = None) -> tuple[nn.Module, list, argparse.Namespace]:
    """The network of a run's folder (its best.pt) or of a checkpoint, its tasks, and those of its
    flags that shape it.

    weights: where the backbone's are now. Raises ValueError.
    """
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    state = read_checkpoint(path)
    with reading(path, "a checkpoint of train.py"):
        older = {"without": [], "frozen": [], "fused": FUSED}  # flags that older runs lack
        config = network_flags({**older, **state["config"]})
        config.weights = weights or config.weights
        tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
        model = build(config, tasks, state["tree"])
    load_trained(model, state, path)
    return model, tasks, config


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists already; choose another name")


def export_merged(model: nn.Module, size: tuple[int, int], path: Path) -> str:
    """Merge the adapters and write the network as one graph that needs no code of ours:

        torch.export.load(path).module()(images)    # (B, 3, H, W), normalised -> predictions

    Images are RGB in 0..1 less data.MEAN, divided by data.STD, of just this size; predictions are
    {task: (B, outputs, H, W)}, as the network's. Read back and compared with the unmerged network
    on the spot; raises ValueError, and leaves no file, where they differ by more than 1e-4 of the
    largest value.
    """
    refuse_existing(path)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(image)
        graph = torch.export.export(merge(model).requires_grad_(False), (image,), dynamic_shapes={
            "image": {0: torch.export.Dim("batch", min=1, max=1024)}})
        write_whole(path, partial(torch.export.save, graph))
        found = torch.export.load(path).module()(image)
    error = max(((found[task] - value).abs().max() / value.abs().max()).item()
                for task, value in expected.items())
    if not error <= 1e-4:
        path.unlink()
        raise ValueError(f"the merged network differs by {error:.1e} from the unmerged one; nothing"
                         " was written")
    return (f"wrote {path}, {path.stat().st_size / 1e6:.0f} MB, for images of {size[0]}x{size[1]}; "
            f"predictions differ from the unmerged ones by at most {error:.1e} of the largest")


def export_backbone(model: nn.Module, config: argparse.Namespace, path: Path) -> str:
    """Write the backbone's weights, fp16, by the names that --weights reads."""
    refuse_existing(path)
    if config.method != "full":
        raise ValueError(f"--export-backbone: the run is of --method {config.method}, whose "
                         "backbone is the one it started from; only --method full trains it")
    weights = {name: value.half() for name, value in model.backbone.state_dict().items()}
    write_whole(path, partial(torch.save, weights))
    return f"wrote {path}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="best.pt or last.pt of a run")
    add("--weights", help="where the backbone's weights are now, if not where they were")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge", type=Path, help="write the network with merged adapters here")
    what.add_argument("--export-backbone", type=Path, help="write the backbone here")
    args = parser.parse_args(argv)
    with one_line_errors():
        model, _, config = load_run(args.checkpoint, args.weights)
        print(export_merged(model, config.size, args.merge) if args.merge else
              export_backbone(model, config, args.export_backbone))


if __name__ == "__main__":
    main()
