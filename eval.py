"""Evaluate a checkpoint, or predict any photo.

    python eval.py --checkpoint runs/rooms/best.pt                  # the table, on validation data
    python eval.py --checkpoint runs/nyud/best.pt --native          # at each image's own size
    python eval.py --checkpoint runs/nyud/best.pt --image photo.jpg # draws photo.predicted.png
    python eval.py --checkpoint runs/nyud/best.pt --merge nyud.pt2  # for deployment, verified
    python eval.py --cost --dataset nyud [flags of train.py]        # as cost.py

Images are fed one at a time, so that no result depends on a batch size. A task's metrics are sums
over the whole set, divided once at the end (tasks.py); beside them stands what the best constant
prediction reaches on the same labels.
References: arXiv 2509.19602, section 4.2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

import cost
from data import ToDevice, loader, open_dataset, warp
from tools.export import export_backbone, export_merged, load_run
from util.checkpoint import to_json
from util.draw import draw_photos
from util.report import format_gates, format_table, watch_gates
from util.run import amp_dtype, one_line_errors, pick_device

Predict = Callable[[Tensor], dict[str, Tensor]]  # image (B, 3, H, W) -> {task: prediction}


@torch.no_grad()
def evaluate(predict: Predict, tasks: list, batches: Iterable, size: tuple[int, int] | None,
             gather: Callable[[list], list] = list) -> dict:
    """Metrics of `predict` over `batches` of one collated sample each.

    size: (H, W) to resize to; None: each image's own size. gather: puts the rows of several
    processes in order (util/parallel.py).
    Returns {"results": {task: {metric: value}}, "loss": weighted sum of the tasks' mean losses,
    each the mean over images with valid pixels, "images": their number, "pixels" and "nan": {task:
    number of valid pixels, and of those with a prediction that is not a number}}.
    """
    rows = []  # for each image {task: its counts and sums}
    for batch in batches:
        image, labels = warp(batch, size or batch["size"][0].tolist())  # (1, 3, H, W)
        predictions = predict(image)
        rows.append({task.name: measure(task, predictions[task.name].float(), labels[task.name])
                     for task in tasks})
    rows = gather(rows)

    found = {"results": {}, "loss": 0.0, "images": len(rows), "pixels": {}, "nan": {}}
    for task in tasks:
        total = {key: torch.stack([row[task.name][key] for row in rows]).sum(0)
                 for key in ("labelled", "loss", "pixels", "nan", "sums")}
        found["results"][task.name] = task.metrics(total["sums"])
        mean_loss = total["loss"] / total["labelled"].clamp(min=1)
        found["loss"] += task.weight * mean_loss.item()  # eq. 8
        found["pixels"][task.name] = int(total["pixels"])
        found["nan"][task.name] = int(total["nan"])
    return found


def measure(task, pred: Tensor, label: Tensor) -> dict[str, Tensor]:
    """What one image adds to a task's totals, on the CPU."""
    valid = task.valid(label).reshape(1, *pred.shape[2:])  # (1, H, W)
    row = {"labelled": valid.any(),  # an image without valid pixels has no loss to average
           "loss": task.loss(pred, label),
           "pixels": valid.sum(),
           "nan": (valid & pred.isnan().any(1)).sum(),
           "sums": task.sums(pred, label).flatten()}
    return {key: value.double().cpu() for key, value in row.items()}


def predictor(model: nn.Module, amp: torch.dtype | None) -> Predict:
    """`model` in evaluation mode, under autocast to `amp` if given."""
    model.eval()

    def predict(image: Tensor) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, amp) if amp else nullcontext():
            return model(image)
    return predict


# --- what a result has to beat --------------------------------------------------------------------
def best_constants(tasks: list, batches: Iterable, size: tuple[int, int] | None) -> dict:
    """Per task, the constant prediction (outputs,) that fits these very labels best.

    From at most about 4000 evenly spread valid pixels an image; none where no pixel is valid.
    """
    pool = {task.name: [] for task in tasks}
    for batch in batches:
        _, labels = warp(batch, size or batch["size"][0].tolist())
        for task in tasks:
            label = labels[task.name]  # (1, H, W), or (1, channels, H, W)
            valid = task.valid(label).reshape(len(label), *label.shape[-2:])
            values = (label.movedim(1, -1) if label.ndim == 4 else label)[valid]
            every = max(1, len(values) // (4000 * len(label)))
            pool[task.name].append(values[::every].cpu())
    return {task.name: task.best_constant(torch.cat(pool[task.name]).squeeze(-1))
            for task in tasks if any(len(values) for values in pool[task.name])}


def reference(tasks: list, batches: Iterable, size: tuple[int, int] | None) -> dict:
    """{task: {metric: value}} of the best constant prediction.

    Fitted to the evaluated labels themselves, so it flatters the constant; NaN where a task has no
    valid label at all. Goes through `batches` (re-iterable) twice.
    """
    constants = best_constants(tasks, batches, size)

    def predict(image: Tensor) -> dict[str, Tensor]:
        predictions = {}
        for task in tasks:
            constant = constants.get(task.name, torch.zeros(task.outputs)).to(image.device)
            predictions[task.name] = constant[:, None, None].expand(
                len(image), -1, *image.shape[2:])  # (B, outputs, H, W)
        return predictions

    return evaluate(predict, tasks, batches, size)["results"]


# --- the command ----------------------------------------------------------------------------------
def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="With --cost, all other flags are those of train.py (train.py --help).")

    add = parser.add_argument_group("what to do", "as in the lines above").add_argument
    add("--checkpoint", type=Path, help="best.pt or last.pt of a run")
    add("--image", type=Path, nargs="+", help="predict these photos instead of evaluating")
    add("--native", action="store_true", help="at each image's own size: sharper, slower")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--merge", type=Path, help="write the network with merged adapters, as a graph that needs "
        "no code of ours (torch.export), and stop")
    add("--export-backbone", type=Path, help="write the backbone (fp16, official names) and stop; "
        "for runs of --method full")
    add("--cost", action="store_true", help="print parameters and MACs of a configuration")

    add = parser.add_argument_group(
        "this machine", "as in: --data-root /data/nyud --workers 8   where files are, how fast to "
        "read them").add_argument
    add("--data-root", help="folder of the dataset, or its archive; else the recipe's")
    add("--weights", help="where the backbone's weights are now, if not where they were")
    add("--workers", type=int, default=min(4, os.cpu_count()), help="processes that load data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    args, args.cost_flags = parser.parse_known_args(argv)
    if args.cost:
        if args.checkpoint or args.image:
            parser.error("--cost goes with flags of train.py, not with --checkpoint or --image")
    elif args.json and (args.image or args.merge or args.export_backbone):
        parser.error("--json goes with the table of metrics, or with --cost")
    elif args.cost_flags or not args.checkpoint:
        parser.error(f"unknown arguments: {' '.join(args.cost_flags)}" if args.cost_flags else
                     "give --checkpoint FILE, or --cost and flags of train.py")
    return args


def evaluate_checkpoint(args: argparse.Namespace) -> str:
    """What --checkpoint and the other flags ask for, as the text to print."""
    model, tasks, config = load_run(args.checkpoint, args.weights)
    config.data_root, config.cache = args.data_root or config.data_root, False  # the recipe's
    if args.export_backbone:
        return export_backbone(model, config, args.export_backbone)
    if args.merge:
        return export_merged(model, config.size, args.merge)
    device = pick_device(args.device)
    predict = predictor(model.to(device), amp_dtype(config.amp, device))
    size = None if args.native else config.size
    if args.image:
        paths = draw_photos(args.image, args.checkpoint.parent, predict, tasks, size, device)
        return "\n".join(f"wrote {path}" for path in paths)
    dataset = open_dataset(config, "val")
    batches = ToDevice(loader(dataset, [[i] for i in range(len(dataset))], args.workers), device)
    gates = watch_gates(model)  # none but of bdta
    outcome = evaluate(predict, tasks, batches, size)
    outcome["reference"] = reference(tasks, batches, size)
    outcome["gates"] = [torch.stack(seen).mean(0).tolist() for seen in gates]  # of each stage
    if args.json:
        return to_json(outcome)
    return (format_table(tasks, outcome, outcome["reference"], size)
            + format_gates(config.tasks, outcome["gates"]))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.cost:
        return cost.main(args.cost_flags + ["--json"] * args.json)
    with one_line_errors(), redirect_stdout(sys.stderr):  # notes on the way; the answer alone
        text = evaluate_checkpoint(args)                  # is for stdout
    print(text)


if __name__ == "__main__":
    main()
