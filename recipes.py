"""Every knob of a run: its value for each dataset, why, and the flag that changes it.

    python train.py --dataset nyud --help       # the flags, with that dataset's defaults

A recipe's keys are names of flags. Sections and tables are those of arXiv 2509.19602, where no
other paper is named.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from grouping import Partition, build_tree
from model import METHODS, stage_ranks
from tasks import delta_m
from tglora import split_rank
from util.run import reading

COMMON = dict(
    warmup=20 / 300,        # share of the run before the peak: 20 epochs of the paper's 300
    weight_decay=0.05,      # section 7; not on 1-D weights and bias tables
    clip=5.0,               # norm of the gradient; the published MTLoRA's
    accumulate=1,           # parts that a batch is computed in
    reduction=4,            # r of BDTA, the default of its paper
    head_lr=2e-3,           # of the decoders before the similarity, at first; ours
    normalize="none",       # eq. 2 as printed, the plain cosine
    log_every=10,           # steps
)
PAPER = dict(               # nyud and pascal, as in sections 4 and 7
    **COMMON,
    size="448",             # pixels, a square; images are resized to it
    backbone="tiny",        # Swin-Tiny
    weights="imagenet",     # ImageNet-1k
    layers="attn+mlp",      # table 1; "+others" is its best row and its costliest
    dropout=0.05,           # on the adapters' input
    drop_path=0.2,          # of the deepest block; falls linearly to 0 at the first
    fused=(18, 36, 72, 144),  # HRNet-W18's, whatever the backbone
    epochs=300,             # 20 of them warm-up
    eval_every=20,          # epochs
    sim_images=200,         # ours: the paper names no number
    head_epochs=20,         # ours, likewise; on kept maps they cost what 10 with a backbone do
    flip=True,              # half of the images
    cache=False,            # decoded images of a whole dataset fill the memory
    workers=min(4, os.cpu_count()),  # decoding keeps up with a GPU
)
RECIPES = {
    "rooms": dict(          # ours: a demonstration on two CPU cores
        **COMMON,
        tasks="semseg,human_parts,edge,depth,normals",
        size="112",         # 28x28 patches: 4x4 windows in stage 1, one in stages 3 and 4
        backbone="mini",    # a third of Swin-Tiny's channels
        weights="rooms_mini.pth",  # knows segmentation alone (docs/DATA.md)
        rank=20,            # adapters are then a tenth of the network's parameters
        last_rank=None,     # every stage has the same combined rank
        layers="attn+mlp",
        fused=(6, 12, 24, 48),  # a third, as the backbone
        dropout=0.0,        # four epochs do not overfit
        drop_path=0.0,
        epochs=4,
        batch_size=8,       # images a step
        lr=2e-3,            # few steps, so large ones
        eval_every=1,
        sim_images=128,     # with 32, and 4 epochs, no two seeds gave five tasks the same tree
        head_epochs=6,
        flip=True,
        scales="1",         # a zoom would only blur pictures this small
        rotate=0.0,         # degrees
        cache=True,         # rendered once
        workers=0,          # the rendered rooms lie in memory
    ),
    "nyud": dict(
        **PAPER,
        tasks="semseg,normals,depth",
        rank=63,            # divisible by three tasks: 21 for each in the last stage
        last_rank=None,
        batch_size=6,
        lr=1e-4,            # peak
        scales="1,1.2,1.5",
        rotate=0.0,
    ),
    "pascal": dict(
        **PAPER,
        tasks="semseg,human_parts,sal,normals",
        rank=64,            # combined, in stages 1 to 3
        last_rank=4,        # in stage 4 every task has rank 4, whatever --rank is (4.3)
        batch_size=32,
        lr=3.125e-5,        # peak; the published 5e-4 is scaled there by batch / 512 = 32 / 512
        scales="0.75:1.25",
        rotate=20.0,
    ),
}

BDTA = dict(                # --method bdta on nyud and pascal: section 4.1 of its paper
    batch_size=8,           # images a step, on one GPU
    lr=4e-4,                # peak
    weight_decay=1e-4,
    warmup=0.0,             # its text names a cosine and no warm-up
    dropout=0.0,            # ours, as is the next: it names neither, and drop path would
    drop_path=0.0,          # only disturb a backbone that does not learn
)


# --- how flags are written ------------------------------------------------------------------------
def size_pair(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not height.isdigit() or not (width or height).isdigit():
        raise argparse.ArgumentTypeError(f"expected 448 or 448x576, got {text!r}")
    return int(height), int(width or height)


def integers(text: str) -> tuple[int, ...]:
    if not all(n.isdigit() for n in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers as in 1,1,2,3, got {text!r}")
    return tuple(int(n) for n in text.split(","))


def zooms(text: str) -> tuple[float, ...]:
    """"1,1.2,1.5" as it is; "0.75:1.25" stands for 101 values from the first to the last."""
    try:
        values = tuple(float(n) for n in text.replace(":", ",").split(","))
    except ValueError:
        values = ()
    if not values or min(values) <= 0:
        raise argparse.ArgumentTypeError(f"expected 1,1.2,1.5 or 0.75:1.25, got {text!r}")
    if ":" in text:
        return tuple(np.linspace(values[0], values[-1], 101).tolist())
    return values


def names(text: str) -> list[str]:
    return text.split(",")


def make_parser(dataset: str, method: str,
                shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags under their headings, with the defaults of the recipe of `dataset` and `method`."""
    parser = argparse.ArgumentParser(
        description="Train TGLoRA on a CPU, a GPU, or several (torchrun). The defaults shown are "
        f"those of {dataset} with --method {method}.",
        parents=[shared], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data-root", default="data", help="folder of the dataset, or its archive")
    add("--download", action="store_true", help="fetch the dataset's archive into --data-root")
    add("--train-rooms", type=int, default=400, help="rooms: training images")
    add("--val-rooms", type=int, default=64, help="rooms: validation images")
    add("--tasks", type=names, help="comma-separated")
    add("--size", type=size_pair, help="training size, H or HxW; images are resized to it")
    add("--workers", type=int, help="processes that load data")
    add("--cache", action=switch, help="keep decoded samples in memory")

    add = parser.add_argument_group("augmentation").add_argument
    add("--flip", action=switch, help="mirror half of the images")
    add("--scales", type=zooms, help="zoom by one of these, or LOW:HIGH")
    add("--rotate", type=float, help="turn by up to so many degrees")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", help="preset of swin.py: mini, tiny, small, base; or of pvt.py: pvt_v2_b0 to "
        "pvt_v2_b5")
    add("--weights", help="imagenet, torchvision (Swin's), none (random) or a checkpoint's path")
    add("--rank", type=int, help="combined rank of a layer's adapters, split by group size")
    add("--last-rank", type=int, help="the last stage's combined rank is this times the tasks")
    add("--reduction", type=int, help="bdta: its bypass has so many times fewer channels")
    add("--layers", choices=("attn", "attn+mlp", "attn+mlp+others"), help="what is adapted")
    add("--without", type=names, default=[],
        help="layers that get no adapter, by the ends of their names: mlp.fc1,mlp.fc2")
    add("--frozen", type=names, default=[],
        help="parts of names of the backbone's weights that stay frozen whatever is trained")
    add("--dropout", type=float, help="on the adapters' input")
    add("--drop-path", type=float, help="stochastic depth of the deepest block")
    add("--fused", type=integers, help="channels to which the decoders project the four maps")

    add = parser.add_argument_group("similarity and tree").add_argument
    add("--groups", type=integers,
        help="task groups a stage, as in 1,1,2,3; without it, the paper's for so many tasks")
    add("--budget-gmacs", type=float, help="as many groups as fit what one image may cost (linear "
        "layers and convolutions), instead of --groups")
    add("--budget-params", type=float, help="likewise, trained parameters")
    add("--stage-similarity", action="store_true",
        help="merge a stage's groups by the gradients on that stage's weights alone")
    add("--tree", help="use the tree in this file (tree.json of a run), whatever --groups says")
    add("--sim-images", type=int, help="the subset, for decoders and gradients alike")
    add("--head-epochs", type=int, help="epochs that train the decoders on the subset")
    add("--head-lr", type=float, help="their learning rate at first; it falls to 0")
    add("--normalize", choices=("none", "elementwise"), help="of eq. 2")
    add("--tree-only", action="store_true", help="end when the tree is known, before any training")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, help="passes over the training images")
    add("--batch-size", type=int, help="images a step")
    add("--accumulate", type=int, help="parts that a batch is computed in, for memory")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup", type=float, help="share of the run before the peak")
    add("--weight-decay", type=float, help="not on 1-D weights and bias tables")
    add("--clip", type=float, help="gradient norm")
    add("--seed", type=int, default=0, help="of everything random")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--compile", action="store_true", help="the network, by torch.compile")

    add = parser.add_argument_group("the run").add_argument
    add("--out", help="folder of the run; default runs/DATASET")
    add("--resume", action="store_true", help="continue from --out's last.pt")
    add("--eval-every", type=int, help="epochs between evaluations")
    add("--log-every", type=int, help="steps between log lines; each epoch ends with one too")
    add("--baseline", nargs="+", help="metrics.json of the single-task runs, one or one a task: "
        "best.pt is then the best by delta-m")
    recipe = RECIPES[dataset]
    if method == "bdta" and dataset != "rooms":  # the demonstration's few steps are its own
        recipe = {**recipe, **BDTA}
    parser.set_defaults(**recipe, out=f"runs/{dataset}")
    return parser


AT_LEAST_1 = ("epochs", "batch_size", "accumulate", "rank", "sim_images", "head_epochs",
              "eval_every", "log_every", "train_rooms", "val_rooms", "reduction")
AT_LEAST_0 = ("lr", "head_lr", "warmup", "dropout", "drop_path", "weight_decay", "clip", "rotate",
              "workers", "seed", "last_rank")
AT_MOST = dict(warmup=0.99, dropout=0.99, drop_path=0.99, workers=256, seed=2 ** 32, rank=4096,
               last_rank=4096, train_rooms=10 ** 5, val_rooms=10 ** 5)  # else without end
NOT_OF_BDTA = ("rank", "last_rank", "without", "frozen", "dropout", "fused")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """All knobs of a run, defaults from the dataset's recipe. Exits with usage on bad flags."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dataset", choices=sorted(RECIPES), default="rooms", help="to train on")
    shared.add_argument("--method", choices=METHODS, default="tglora", help="adapters in a frozen "
        "backbone or, bdta, beside it; full fine-tuning; the decoders alone")
    first, _ = shared.parse_known_args(argv)  # these two choose the recipe
    parser = make_parser(first.dataset, first.method, shared)
    config = parser.parse_args(argv)
    if (config.budget_gmacs or config.budget_params) and (
            config.groups or config.tree or config.method != "tglora"):
        parser.error("--budget-gmacs and --budget-params choose the groups of --method tglora; "
                     "leave out --groups and --tree")
    if not config.groups:
        config.groups = default_groups(config)
    for name in AT_LEAST_1 + AT_LEAST_0:
        low, high = int(name in AT_LEAST_1), AT_MOST.get(name, math.inf)
        if not low <= (getattr(config, name) or 0) <= high:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}"
                         + f" and at most {high}" * (name in AT_MOST))
    if len(config.groups) != 4:
        parser.error("--groups needs four numbers, one for each stage of the backbone")
    for name, low in (("size", 32), ("fused", 1)):
        if not low <= min(getattr(config, name)) <= max(getattr(config, name)) <= 4096:
            parser.error(f"--{name} must be at least {low} and at most 4096")
    if config.method != "tglora":  # what would be ignored, or change the cost alone
        if config.tree or set(config.groups) != {1}:
            parser.error(f"--groups and --tree go with --method tglora; {config.method} has no "
                         "groups of its own to choose")
        if config.layers != parser.get_default("layers"):
            parser.error(f"--layers goes with --method tglora; {config.method} says itself what "
                         "it adapts")
    for name in NOT_OF_BDTA if config.method == "bdta" else ("reduction",):
        if getattr(config, name) != getattr(parser.parse_args([]), name):
            parser.error(f"--{name.replace('_', '-')} does not go with --method {config.method}; "
                         "the size of bdta's bypass is --reduction, of adapters --rank")
    return config


def paper_groups(T: int) -> tuple[int, ...]:
    """Task-specific in the last stage, one group less each stage before, shared in the first (4.4).
    """
    return 1, max(1, T - 2), max(1, T - 1), T


def default_groups(config: argparse.Namespace) -> tuple[int, ...]:
    """The paper's, but for the demonstration's five tasks: there the groups of 1,3,4,5 differ
    between seeds."""
    if config.method != "tglora":  # without adapters there is nothing to group
        return 1, 1, 1, 1
    if config.dataset == "rooms" and config.tasks == names(RECIPES["rooms"]["tasks"]):
        return 1, 2, 2, 5
    return paper_groups(len(config.tasks))


# --- what only the run can check ------------------------------------------------------------------
def tree_without_choice(config: argparse.Namespace, num_tasks: int) -> list[Partition] | None:
    """The tree, where --groups leaves no choice: all tasks together or each alone; else None.

    Fails before any work if the groups or the ranks asked for cannot exist.
    """
    tree = build_tree(np.zeros((num_tasks, num_tasks)), config.groups)
    for partition, rank in zip(tree, stage_ranks(config)):
        split_rank(rank, [len(group) for group in partition])
    return tree if set(config.groups) <= {1, num_tasks} else None


def read_results(path: Path) -> dict:
    """The object in a metrics.json; its null, which is not a number, as NaN. Raises ValueError."""
    with reading(path, "a metrics.json of a run"):
        content = json.loads(path.read_text())
        for run in (content, content.get("last") or content):
            run["results"] = {task: {k: math.nan if v is None else float(v) for k, v in own.items()}
                              for task, own in run["results"].items()}
        return content


def read_baseline(config: argparse.Namespace, tasks: list) -> dict:
    """{task: {metric: value}} from --baseline's files; checked to have every task's metric."""
    baseline, paths = {}, config.baseline
    for path in paths:
        found = read_results(Path(path))
        if found.get("dataset", config.dataset) != config.dataset:
            raise ValueError(f"--baseline {path} is of {found['dataset']}, not {config.dataset}")
        baseline |= found["results"]
    try:
        delta_m({task.name: {task.metric: 1.0} for task in tasks}, baseline)
    except ValueError as error:
        raise ValueError(f"{', '.join(paths)}: {error}") from error
    return baseline
