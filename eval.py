"""Evaluate a checkpoint, predict any photo, and count what a configuration costs.

    python eval.py --checkpoint runs/rooms/best.pt                  # the table, on validation data
    python eval.py --checkpoint runs/nyud/best.pt --native          # at each image's own size
    python eval.py --checkpoint runs/nyud/best.pt --image photo.jpg # draws photo.predicted.png
    python eval.py --checkpoint runs/nyud/best.pt --merge nyud.pt2  # for deployment, verified
    python eval.py --cost --dataset nyud [flags of train.py] [--json]

Metrics are sums over the whole set, divided once (tasks.py). Costs are those of one image.
References: arXiv 2509.19602, sections 4.2 and 4.5, table 3.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from checkpoint import load_trained, read_checkpoint, write_whole
from data import CLASSES, ToDevice, collate, loader, open_dataset, warp
from files import read_image
from grouping import build_tree, read_tree
from model import amp_dtype, build, ledger, pick_device
from swin import WindowAttention
from tasks import make_tasks
from tglora import TGLoRALinear, merge


@torch.no_grad()
def evaluate(predict, tasks: list, batches: Iterable, size: tuple[int, int] | None,
             gather=list) -> dict:
    """Metrics of `predict(image) -> {task: prediction}` over `batches` of one collated sample each.

    One image at a time: a result then depends on no batch size. size: (H, W) to resize to; None:
    each image's own size. gather: puts rows of several processes in order (parallel.py).
    Returns {"results": {task: {metric: value}}, "loss": weighted sum of the tasks' mean losses,
    each the mean over images with valid pixels, "images": their number, "pixels" and "nan": {task:
    number of valid pixels, and of those with a prediction that is not a number}}.
    """
    rows = []  # for each image and task: labelled?, loss, valid pixels, NaN among them, sums
    for batch in batches:
        image, labels = warp(batch, size or batch["size"][0].tolist())
        predictions = predict(image)
        rows.append([])
        for task in tasks:
            pred, label = predictions[task.name].float(), labels[task.name]
            valid = task.valid(label).reshape(len(image), *image.shape[2:])
            counts = [valid.any(), task.loss(pred, label), valid.sum(),
                      (valid & pred.isnan().any(1)).sum()]
            sums = task.sums(pred, label).flatten()
            rows[-1].append(torch.cat([torch.stack([c.double() for c in counts]), sums]).cpu())
    rows = gather(rows)
    found = {"results": {}, "loss": 0.0, "images": len(rows), "pixels": {}, "nan": {}}
    for task, column in zip(tasks, zip(*rows)):
        labelled, loss, pixels, nan, *sums = torch.stack(column).sum(0)
        found["results"][task.name] = task.metrics(torch.stack(sums))
        found["loss"] += task.weight * (loss / labelled.clamp(min=1)).item()
        found["pixels"][task.name], found["nan"][task.name] = int(pixels), int(nan)
    return found


def best_constants(tasks: list, batches: Iterable, size: tuple[int, int] | None) -> dict:
    """Per task, the constant prediction (outputs,) that fits these very labels best.

    From at most about 4000 evenly spread valid pixels an image.
    """
    pool = {task.name: [] for task in tasks}
    for batch in batches:
        _, labels = warp(batch, size or batch["size"][0].tolist())
        for task in tasks:
            label = labels[task.name]
            channels_last = label.movedim(1, -1) if label.ndim == 4 else label
            values = channels_last[task.valid(label).reshape(label.shape[0], *label.shape[-2:])]
            pool[task.name].append(values[::max(1, len(values) // (4000 * len(label)))].cpu())
    return {task.name: task.best_constant(torch.cat(pool[task.name]).squeeze(-1))
            for task in tasks if any(len(v) for v in pool[task.name])}


def reference(tasks: list, batches: Iterable, size: tuple[int, int] | None) -> dict:
    """{task: {metric: value}} of the best constant prediction: what a result has to beat.

    Fitted to the evaluated labels themselves, so it flatters the constant; NaN where a task has no
    valid label at all. Goes through `batches` (re-iterable) twice.
    """
    constants = best_constants(tasks, batches, size)

    def predict(image: Tensor) -> dict[str, Tensor]:
        return {task.name: constants.get(task.name, torch.zeros(task.outputs))
                .to(image.device)[:, None, None].expand(len(image), -1, *image.shape[2:])
                for task in tasks}

    return evaluate(predict, tasks, batches, size)["results"]


def format_table(tasks: list, found: dict, reference: dict, size: tuple[int, int] | None) -> str:
    """`evaluate`'s answer, a line a metric, beside the best constant's; the compared is starred."""
    where = f"at {size[0]}x{size[1]}" if size else "at their own size"
    rows = [f"{found['images']} images {where}, loss {found['loss']:.4f}",
            f"{'task':<13}{'metric':<12}{'result':>9}{'constant':>10}{'valid pixels':>18}"]
    for task in tasks:
        pixels, nan = found["pixels"][task.name], found["nan"][task.name]
        for metric, value in found["results"][task.name].items():
            row = f"{task.name:<13}{metric:<12}{value:>9.4f}{reference[task.name][metric]:>10.4f}"
            if metric == task.metric:
                row += f" {'*up' if task.higher_is_better else '*down':<5}{pixels:>12,}"
            rows.append(row)
        if nan:
            rows.append(f"{task.name:<13}the prediction is not a number (NaN) at {nan:,} of "
                        f"{pixels:,} valid pixels, and so are the metrics")
    return "\n".join(rows)


# --- pictures -----------------------------------------------------------------------------------
def draw(path: Path, rows: list[list[Tensor]]) -> None:
    """Write a PNG of rows of equally large pictures (3, H, W) in 0..1."""
    save_image(make_grid([p.cpu().float() for row in rows for p in row], nrow=len(rows[0])), path)


@torch.no_grad()
def draw_samples(path: Path, predict, tasks: list, dataset, size: tuple[int, int],
                 device: torch.device, count: int = 4) -> None:
    """Image | truth, prediction of each task | ..., for the first samples of `dataset`."""
    rows = []
    for i in range(min(count, len(dataset))):
        batch = next(iter(ToDevice([collate([dataset[i]])], device)))
        image, labels = warp(batch, size)
        predictions = predict(image)
        photo = F.interpolate(batch["image"].float() / 255, size, mode="bilinear", antialias=True)
        rows.append([photo[0]])
        for task in tasks:
            rows[-1] += [task.colours(x[task.name][0]) for x in (labels, predictions)]
    draw(path, rows)


@torch.no_grad()
def draw_photo(photo: Path, path: Path, predict, tasks: list, size: tuple[int, int] | None,
               device: torch.device) -> None:
    """Write the photo and every task's prediction, side by side at the photo's size, to path."""
    batch = collate([{"image": torch.from_numpy(read_image(photo)).permute(2, 0, 1)}])
    own = batch["size"][0].tolist()
    image, _ = warp(next(iter(ToDevice([batch], device))), size or own)
    predictions, row = predict(image), [batch["image"][0] / 255]
    for task in tasks:
        pred = F.interpolate(predictions[task.name].float(), own, mode="bilinear")
        row.append(task.colours(pred[0]))
    draw(path, [row])


def predictor(model: nn.Module, amp: torch.dtype | None):
    """model in evaluation mode, under autocast to `amp` if given, as image -> predictions."""
    model.eval()

    def predict(image: Tensor) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, amp) if amp else nullcontext():
            return model(image)
    return predict


def export_merged(model: nn.Module, size: tuple[int, int], path: Path) -> str:
    """Merge the adapters and write the network as one graph that needs no code of ours:

        torch.export.load(path).module()(images)    # (B, 3, H, W), normalised -> predictions

    Images are RGB in 0..1 less data.MEAN, divided by data.STD, of just this size; predictions are
    {task: (B, outputs, H, W)}, as the network's. Read back and compared with the unmerged network
    on the spot; raises ValueError, and leaves no file, where they differ by more than 1e-4 of the
    largest value.
    """
    if path.exists():
        raise ValueError(f"--merge {path} exists already; choose another name")
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(image)
        graph = torch.export.export(merge(model), (image,), dynamic_shapes={
            "image": {0: torch.export.Dim("batch", min=1, max=1024)}})
        write_whole(path, partial(torch.export.save, graph))
        found = torch.export.load(path).module()(image)
    error = max(((found[k] - v).abs().max() / v.abs().max()).item() for k, v in expected.items())
    if not error <= 1e-4:
        path.unlink()
        raise ValueError(f"the merged network differs by {error:.1e} from the unmerged one; nothing"
                         " was written")
    return (f"wrote {path}, {path.stat().st_size / 1e6:.0f} MB, for images of {size[0]}x{size[1]}; "
            f"predictions differ from the unmerged ones by at most {error:.1e} of the largest")


# --- cost ---------------------------------------------------------------------------------------
@torch.no_grad()
def count_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-accumulates of one image, counted while it runs through, on the meta device.

    macs_linear_conv: frozen linear layers and convolutions alone, which is (without norms and
    activations) what table 3 counts; macs_all: every matrix product, with attention and adapters.
    """
    macs = {"macs_linear_conv": 0, "macs_all": 0}

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x, extra = inputs[0], 0
        if isinstance(module, WindowAttention):
            B, N, L, C = x.shape
            dense, extra = 0, 2 * B * N * L * L * C  # q k' and its product with v
        elif isinstance(module, nn.Conv2d):
            dense = output.numel() * (module.weight[0].numel() + (module.bias is not None))
        else:
            d, k = module.weight.shape[-2:]
            dense = output.numel() * (k + (module.bias is not None))
            if isinstance(module, TGLoRALinear) and not module.merged:
                rows = output.numel() // d // len(module.ranks)  # of a group
                extra = rows * sum(module.ranks) * (k + d)
        macs["macs_linear_conv"] += dense
        macs["macs_all"] += dense + extra

    kinds = (nn.Linear, nn.Conv2d, TGLoRALinear, WindowAttention)
    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    device = next(model.parameters()).device
    training = model.training
    model.eval()(torch.zeros(1, 3, *size, device=device))
    model.train(training)
    for h in hooks:
        h.remove()
    return macs


def cost(config: argparse.Namespace) -> dict:
    """Trained parameters and MACs of the run that train.py would start with `config`."""
    tasks = make_tasks(config.tasks, CLASSES[config.dataset])
    # Costs depend on how many groups a stage has, not on which tasks are in them.
    tree = (read_tree(config.tree, config.tasks) if config.tree else
            build_tree(np.zeros((len(tasks), len(tasks))), config.groups))
    config = argparse.Namespace(**{**vars(config), "weights": "none"})
    with torch.device("meta"):
        model = build(config, tasks, tree)
    return {**ledger(model), **count_macs(model, config.size)}


def format_cost(costs: dict, size: tuple[int, int]) -> str:
    rows = [f"trained parameters   {costs['trainable']:>12,}   adapters {costs['adapters']:,}, "
            f"decoders {costs['decoders']:,}, others {costs['others']:,}",
            f"all parameters       {costs['total']:>12,}",
            f"GMACs, one image of {size[0]}x{size[1]}",
            f"  linear and convolution layers, no adapters (table 3)   "
            f"{costs['macs_linear_conv'] / 1e9:8.2f}",
            f"  all matrix products: + attention, + adapters           "
            f"{costs['macs_all'] / 1e9:8.2f}"]
    return "\n".join(rows)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="With --cost, all "
                                     "other flags are those of train.py (train.py --help).")
    add = parser.add_argument
    add("--checkpoint", type=Path, help="best.pt or last.pt of a run")
    add("--image", type=Path, nargs="+", help="predict these photos instead of evaluating")
    add("--native", action="store_true", help="at each image's own size, not the training size")
    add("--export-backbone", type=Path, help="write the backbone (fp16, official names) and stop; "
        "for runs of --method full")
    add("--merge", type=Path, help="write the network with merged adapters, as a graph that needs "
        "no code of ours (torch.export), and stop")
    add("--data-root", help="where the dataset is now, if not where it was trained")
    add("--weights", help="where the backbone's weights are now, if not where they were")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--cost", action="store_true", help="print parameters and MACs of a configuration")
    args, rest = parser.parse_known_args(argv)
    if args.cost:
        if args.checkpoint or args.image:
            parser.error("--cost goes with flags of train.py, not with --checkpoint or --image")
        from train import parse_arguments as parse_train  # which imports this module
        args.config = parse_train(rest)
    elif args.json and (args.image or args.merge or args.export_backbone):
        parser.error("--json goes with the table of metrics, or with --cost")
    elif rest or not args.checkpoint:
        parser.error(f"unknown arguments: {' '.join(rest)}" if rest else
                     "give --checkpoint FILE, or --cost and flags of train.py")
    return args


def run(args: argparse.Namespace) -> None:
    if args.cost:
        costs = cost(args.config)
        print(json.dumps(costs) if args.json else format_cost(costs, args.config.size))
        return
    with redirect_stdout(sys.stderr):  # notes on the way; the answer alone is for stdout
        answer = evaluate_checkpoint(args)
    print(answer)


def evaluate_checkpoint(args: argparse.Namespace) -> str:
    """What --checkpoint and the other flags ask for; returns the text to print."""
    state = read_checkpoint(args.checkpoint)
    config = argparse.Namespace(**state["config"])
    config.data_root = args.data_root or config.data_root
    config.weights = args.weights or config.weights
    device = pick_device(args.device)
    tasks = make_tasks(config.tasks, CLASSES[config.dataset])
    model = build(config, tasks, state["tree"])
    load_trained(model, state, args.checkpoint)
    if args.export_backbone:
        if config.method != "full":
            raise ValueError(f"{args.checkpoint} is of --method {config.method}, whose backbone is "
                             "the one it started from; only --method full trains it")
        weights = {k: v.half() for k, v in model.backbone.state_dict().items()}
        write_whole(args.export_backbone, partial(torch.save, weights))
        return f"wrote {args.export_backbone}"
    if args.merge:
        return export_merged(model, config.size, args.merge)
    predict = predictor(model.to(device), amp_dtype(config.amp, device))
    size = None if args.native else config.size
    if args.image:
        paths = [args.checkpoint.with_name(photo.stem + ".predicted.png") for photo in args.image]
        if len(set(paths)) < len(paths):
            raise ValueError("--image: two photos have the same name, and so would their pictures; "
                             "give them one at a time, or rename one")
        for photo, path in zip(args.image, paths):
            draw_photo(photo, path, predict, tasks, size, device)
        return "\n".join(f"wrote {path}" for path in paths)
    dataset = open_dataset(config, "val")
    batches = ToDevice(loader(dataset, [[i] for i in range(len(dataset))], config.workers), device)
    outcome = evaluate(predict, tasks, batches, size)
    outcome["reference"] = reference(tasks, batches, size)
    if args.json:
        return json.dumps(outcome)
    return format_table(tasks, outcome, outcome["reference"], size)


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:  # bad input; anything else is a bug and shows its trace
        raise SystemExit(f"error: {str(error).strip().splitlines()[-1]}") from error


if __name__ == "__main__":
    main()
