"""The flags of a run: how they are typed, what they default to, and what they may be.

    config = parse_arguments(["--dataset", "nyud", "--rank", "32"])     # every knob, by name

Values come from recipes.py, or with --resume from the run that is continued. What a file says is
checked as if it had been typed.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch

from grouping import Partition, build_tree
from model import METHODS, stage_ranks
from recipes import BDTA, RECIPES, default_groups
from tasks import delta_m
from tglora import split_rank
from util.checkpoint import read_checkpoint
from util.run import reading


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


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """With defaults, and a program's examples as they stand above it."""


def make_parser(dataset: str, method: str,
                shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags under their headings, with the defaults of the recipe of `dataset` and `method`."""
    parser = argparse.ArgumentParser(
        description="Train TGLoRA on a CPU, a GPU, or several (torchrun). The defaults shown are "
        f"those of {dataset} with --method {method}.",
        parents=[shared], formatter_class=Help)
    switch = argparse.BooleanOptionalAction

    def heading(title: str, example: str) -> Callable:
        return parser.add_argument_group(title, f"as in: {example}").add_argument

    add = heading("data", "--tasks semseg,depth --size 224x288   two tasks, on smaller images")
    add("--data-root", default="data", help="folder of the dataset, or its archive")
    add("--download", action="store_true", help="fetch the dataset's archive into --data-root")
    add("--train-rooms", type=int, default=400, help="rooms: training images; more take longer")
    add("--val-rooms", type=int, default=64, help="rooms: validation images")
    add("--tasks", type=names, help="comma-separated; each has a decoder, and a place in the tree")
    add("--size", type=size_pair, help="training size, H or HxW; half takes a quarter of the time")
    add("--workers", type=int, help="processes that load data, if the GPU waits for it")
    add("--cache", action=switch, help="keep decoded samples in memory: faster, if they fit")

    add = heading("augmentation", "--no-flip --scales 1   none at all")
    add("--flip", action=switch, help="mirror half of the images: less overfitting, at no cost")
    add("--scales", type=zooms, help="zoom by one of these, or LOW:HIGH")
    add("--rotate", type=float, help="turn by up to so many degrees")

    add = heading("network", "--backbone base --rank 128 --layers attn   "
                  "a larger network, adapted in attention alone")
    add("--backbone", help="preset of swin.py: mini, tiny, small, base; or of pvt.py: pvt_v2_b0 to "
        "pvt_v2_b5")
    add("--weights", help="imagenet, torchvision (Swin's), none (random) or a checkpoint's path")
    add("--rank", type=int, help="combined rank of a layer's adapters, split by group size; the "
        "parameters grow with it")
    add("--last-rank", type=int, help="the last stage's combined rank is this times the tasks")
    add("--reduction", type=int, help="bdta: its bypass has so many times fewer channels")
    add("--layers", choices=("attn", "attn+mlp", "attn+mlp+others"), help="what is adapted")
    add("--without", type=names, default=[],
        help="layers that get no adapter, by the ends of their names: mlp.fc1,mlp.fc2")
    add("--frozen", type=names, default=[],
        help="parts of names of the backbone's weights that stay frozen whatever is trained")
    add("--dropout", type=float, help="on the adapters' input, against overfitting")
    add("--drop-path", type=float, help="stochastic depth of the deepest block, likewise")
    add("--fused", type=integers, help="channels to which the decoders project the four maps")

    add = heading("similarity and tree", "--budget-gmacs 40 --sim-images 400   "
                  "the tree that 40 GMACs buy, surer")
    add("--groups", type=integers,
        help="task groups a stage, as in 1,1,2,3; without it, the paper's for so many tasks")
    add("--budget-gmacs", type=float, help="as many groups as fit what one image may cost (linear "
        "layers and convolutions), instead of --groups")
    add("--budget-params", type=float, help="likewise, trained parameters")
    add("--stage-similarity", action="store_true",
        help="merge a stage's groups by the gradients on that stage's weights alone")
    add("--tree", help="use the tree in this file (tree.json of a run), whatever --groups says")
    add("--sim-images", type=int, help="for decoders and gradients; more make the tree surer")
    add("--head-epochs", type=int, help="epochs that train the decoders on them")
    add("--head-lr", type=float, help="their learning rate at first; it falls to 0")
    add("--normalize", choices=("none", "elementwise"), help="of eq. 2: elementwise counts weights "
        "that agree, not how large they are")
    add("--tree-only", action="store_true", help="end when the tree is known, before any training")

    add = heading("optimisation", "--batch-size 32 --accumulate 4   "
                  "four parts of 8 images: a quarter of the memory")
    add("--epochs", type=int, help="passes over the training images; more is better")
    add("--batch-size", type=int, help="images a step; memory grows with it")
    add("--accumulate", type=int, help="parts that a batch is computed in, for memory")
    add("--lr", type=float, help="peak learning rate; lower it where a loss is not finite")
    add("--warmup", type=float, help="share of the run before the peak")
    add("--weight-decay", type=float, help="not on 1-D weights and bias tables")
    add("--clip", type=float, help="largest norm of a gradient")
    add("--seed", type=int, default=0, help="of everything random: the same gives the same run")

    add = heading("machine", "--device cpu --amp off   in float32, where there is a GPU too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision; "
        "auto: on a GPU")
    add("--compile", action="store_true", help="by torch.compile: minutes first, then faster")

    add = heading("the run", "--out runs/mine --resume   go on, all other flags as in that run")
    add("--out", help="folder of the run; default runs/DATASET")
    add("--resume", action="store_true", help="continue from --out's last.pt, with its flags")
    add("--eval-every", type=int, help="epochs between evaluations, after which best.pt may change")
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


def parse_arguments(argv: list[str] | None = None, resumed: bool = False) -> argparse.Namespace:
    """All knobs of a run, defaults from the dataset's recipe, or with --resume from its last.pt.

    Exits with usage on bad flags; ValueError where last.pt's are bad. resumed: they are in `argv`.
    """
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dataset", choices=sorted(RECIPES), default="rooms", help="to train on")
    shared.add_argument("--method", choices=METHODS, default="tglora", help="adapters in a frozen "
        "backbone or, bdta, beside it; full fine-tuning; the decoders alone")
    first, _ = shared.parse_known_args(argv)  # these two choose the recipe
    parser = make_parser(first.dataset, first.method, shared)
    config = parser.parse_args(argv)
    if config.resume and not resumed:
        return resume_flags(config.out, sys.argv[1:] if argv is None else argv)
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


# --- flags of a run that there is -----------------------------------------------------------------
# What shapes a network, and what it is measured on: a checkpoint says it, and nothing else.
OF_NETWORK = ("dataset method tasks size backbone weights rank last_rank reduction layers without "
              "frozen fused groups seed amp val_rooms").split()


def as_typed(saved: dict, names: Iterable[str]) -> list[str]:
    """Of a checkpoint's flags, those called `names`, as they are typed."""
    argv = []
    for name in names:
        value, flag = saved[name], f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            argv += [flag] if value else [f"--no-{name}"] if name in ("flip", "cache") else []
        elif name == "baseline" and value:
            argv += [flag, *value]
        elif isinstance(value, (list, tuple)) and value:
            argv.append(f"{flag}={('x' if name == 'size' else ',').join(map(str, value))}")
        elif value not in (None, [], ()):
            argv.append(f"{flag}={value}")
    return argv


def checked(argv: list[str]) -> argparse.Namespace:
    """`parse_arguments`, whose complaint is a ValueError: these flags are a file's."""
    try:
        with redirect_stderr(io.StringIO()) as said:
            return parse_arguments(argv, resumed=True)
    except SystemExit:
        raise ValueError(said.getvalue().strip().rpartition("error: ")[2]) from None


def network_flags(saved: dict) -> argparse.Namespace:
    """A checkpoint's flags OF_NETWORK; the others are the recipe's."""
    skipped = NOT_OF_BDTA if saved["method"] == "bdta" else ("reduction",)
    return checked(as_typed(saved, [name for name in OF_NETWORK if name not in skipped]))


def resume_flags(out: str, argv: list[str]) -> argparse.Namespace:
    """The flags of the run in `out`, then those of `argv`."""
    path = Path(out) / "last.pt"
    saved = read_checkpoint(path)["config"]
    chosen = "groups" if saved.get("budget_gmacs") or saved.get("budget_params") else None
    with reading(path, "a last.pt of train.py"):
        return checked([*as_typed(saved, saved.keys() - {"out", "tree", chosen}), f"--out={out}",
                        *argv])


def settings(config: argparse.Namespace) -> str:
    """A run's settings, as it begins with them."""
    size = "x".join(map(str, config.size))
    return (f"{config.method} on {config.dataset}: {', '.join(config.tasks)}; groups "
            f"{','.join(map(str, config.groups))}; seed {config.seed}\n"
            f"backbone {config.backbone}, weights {config.weights}, rank {config.rank}, "
            f"{config.layers}, images of {size}\n"
            f"{config.epochs} epochs, batches of {config.batch_size}, learning rate {config.lr:g}, "
            f"on {config.device}, to {config.out}")


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
