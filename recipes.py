"""Every knob of a run: its flag, its default for each dataset, and an explanation.

    python train.py --dataset nyud --help        # this table, as help text
    config = parse_arguments(["--dataset", "nyud", "--rank", "32"])
    config.rank, config.lr                       # 32, 1e-4

A default that is a string is parsed as if you had typed it. Section, table and equation numbers
refer to arXiv 2509.19602, unless another paper is named. For your own dataset, copy another
dataset's recipe and change it:

    RECIPES["photos"] = {**RECIPES["nyud"], "tasks": "semseg,depth"}
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from grouping import Partition, build_tree, read_tree
from model import METHODS, stage_ranks
from tasks import make_tasks
from tglora import split_rank
from util import read_checkpoint
from weights import DOWNLOADS, find_file


# --- parsers of values ----------------------------------------------------------------------------
def number(low: float, high: float, convert: Callable = float) -> Callable[[str], float]:
    """A parser for one number from `low` to `high`, inclusive."""
    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:        # also if the value is NaN
            what = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} from {low} to {high}, got {text!r}")
        return value
    return parse


def integer(low: int, high: int = 10 ** 9) -> Callable[[str], int]:
    return number(low, high, int)


def text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("expected a value, got ''; leave the flag out instead")
    return value


def listed(parse_item: Callable, separator: str = ",") -> Callable[[str], tuple]:
    """A parser for items separated by `separator`. Refuses empty items."""
    def parse(text: str) -> tuple:
        items = text.split(separator)
        if "" in items:
            raise argparse.ArgumentTypeError(f"expected values separated by {separator!r}, none of "
                                             f"them empty, got {text!r}")
        return tuple(parse_item(item) for item in items)
    return parse


def size(text: str) -> tuple[int, int]:
    """Parse "448" or "448x448" as (448, 448), and "448x576" as height 448 and width 576."""
    sides = listed(integer(32, 4096), "x")(text)
    if len(sides) > 2:
        raise argparse.ArgumentTypeError("expected a size such as 448 or 448x576 (height x width), "
                                         f"got {text!r}")
    return sides[0], sides[-1]


def scales(text: str) -> tuple[float, ...]:
    """Parse zoom factors: "1,1.2,1.5" is a list; "0.75:1.25" is 101 evenly spaced values."""
    zoom = number(0.1, 10)
    if ":" not in text:
        return listed(zoom)(text)
    ends = listed(zoom, ":")(text)
    if len(ends) != 2:
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH, such as 0.75:1.25, got {text!r}")
    return tuple(np.linspace(*ends, 101).tolist())


SWITCH = "switch"       # can be turned on and off, as with --flip and --no-flip
FLAG = "flag"           # off unless it is given, as with --compile


# --- the table ------------------------------------------------------------------------------------
class Knob(NamedTuple):
    """One flag, its default for each dataset, and the text that --help shows."""

    name: str
    values: Any         # allowed values: a parser, a tuple of choices, SWITCH or FLAG
    rooms: Any
    nyud: Any
    pascal: Any
    reason: str


def same(name: str, values: Any, default: Any, reason: str) -> Knob:
    """A knob with the same default for every dataset."""
    return Knob(name, values, default, default, default, reason)


WORKERS = min(4, os.cpu_count() or 1)
TABLE = {
    "data": [
        Knob("tasks", listed(str), "human_parts,sal,depth,normals", "semseg,normals,depth",
             "semseg,human_parts,sal,normals", "tasks to learn, separated by commas"),
        same("data_root", text, "data", "folder of the dataset, or its archive"),
        same("download", FLAG, False, "download the dataset's archive into --data-root, if the "
             "dataset is not there yet"),
        same("train_rooms", integer(1, 10 ** 5), 600, "number of rendered training images, "
             "for --dataset rooms"),
        same("val_rooms", integer(1, 10 ** 5), 64, "number of rendered validation images, "
             "for --dataset rooms"),
        same("room_seed", integer(0, 2 ** 32), 0, "seed of the rendered training images, for "
             "--dataset rooms; the validation images do not depend on it"),
        same("night", SWITCH, True, "photograph the rooms with a night camera: dark and noisy, "
             "unlike the images by day that rooms_mini.pth was trained on; for --dataset rooms"),
        Knob("size", size, "112", "448", "448", "size of the network's input: one number "
             "for a square (the paper uses 448, section 4.1), or HEIGHTxWIDTH"),
        Knob("workers", integer(0, 256), 0, WORKERS, WORKERS, "number of processes that load data; "
             "0 for rooms, which are kept in memory"),
        Knob("cache", SWITCH, True, False, False, "keep all images and labels in memory"),
    ],
    "augmentation": [
        same("flip", SWITCH, True, "mirror each image with probability 1/2"),
        Knob("scales", scales, "1", "1,1.2,1.5", "0.75:1.25", "zoom each image by a random factor "
             "from this list or range LOW:HIGH; 1 for rooms, whose images are too small to zoom"),
        Knob("rotate", number(0, 180), 0, 0, 20, "rotate each image by a random angle of up to "
             "this many degrees in either direction"),
    ],
    "network": [
        Knob("backbone", str, "mini", "tiny", "tiny", "network to adapt: a Swin Transformer (mini, "
             "tiny, small, base) or a PVT v2 (pvt_v2_b0 ... pvt_v2_b5)"),
        Knob("weights", text, "rooms_mini.pth", "imagenet", "imagenet", "pretrained weights of "
             "the backbone: imagenet, torchvision, none (random), or the path of a checkpoint"),
        Knob("rank", integer(1, 4096), 20, 63, 64, "combined rank of a linear layer's adapters, "
             "divided among the groups in proportion to their number of tasks (section 4.3); "
             "nyud's default of 63 is divisible by its number of tasks, 3. For mtlora: the rank of "
             "the shared adapters; for mtlora+: the rank of each adapter"),
        Knob("last_rank", integer(1, 4096), None, None, 4, "rank per task in the last stage, "
             "used there instead of --rank (section 4.3)"),
        same("layers", ("attn", "attn+mlp", "attn+mlp+others"), "attn+mlp", "linear layers that "
             "get adapters: those of the attention (attn), or also those of the MLPs (attn+mlp); "
             "+others also trains norms, patch layers and position biases (table 1)"),
        Knob("dropout", number(0, 0.99), 0, 0.05, 0.05, "dropout on the adapters' input; 0 for "
             "rooms, whose runs are too short to overfit"),
        Knob("drop_path", number(0, 0.99), 0, 0.2, 0.2, "drop rate of stochastic depth in the last "
             "block; the rate rises linearly from 0 in the first block"),
        Knob("fused", listed(integer(1, 4096)), "6,12,24,48", "18,36,72,144", "18,36,72,144",
             "numbers of channels to which the decoders project the backbone's four feature maps; "
             "18,36,72,144 are the widths of HRNet W18"),
    ],
    "similarity and tree": [
        same("groups", listed(integer(1)), None, "number of task groups in each of the four "
             "stages; default: as in section 4.4, such as 1,2,3,4 for four tasks and 1,1,2,3 for "
             "three"),
        same("tree", text, None, "file with the tree to use, such as the tree.json of a run; the "
             "similarity is then not measured"),
        Knob("sim_images", integer(1), 192, 200, 200, "number of training images to measure the "
             "similarity on; the default is our choice, because the paper gives no number"),
        Knob("head_epochs", integer(1), 6, 20, 20, "epochs for which the decoders are trained on "
             "the --sim-images images before the similarity is measured (section 4.4); the default "
             "is our choice"),
        same("head_lr", number(1e-9, 10), 2e-3, "learning rate of the decoders during "
             "--head-epochs; it falls linearly to 0"),
        same("tree_only", FLAG, False, "stop after writing the tree, without training the "
             "network"),
    ],
    "optimisation": [
        Knob("epochs", integer(1), 4, 300, 300, "passes over the training images (section 7)"),
        Knob("batch_size", integer(1), 8, 6, 32, "images per step (section 7)"),
        same("accumulate", integer(1), 1, "compute each batch in at most this many parts, one "
             "after another, to save memory; BatchNorm and saliency's class weights then see one "
             "part at a time"),
        Knob("lr", number(1e-12, 10), 2e-3, 1e-4, 3.125e-5, "peak learning rate; for pascal, the "
             "published 5e-4 times 32 / 512, because MTLoRA's code scales it by batch size / 512"),
        same("warmup", number(0, 0.99), 20 / 300, "share of the run in which the learning rate "
             "rises to its peak; in the paper, this takes 20 of 300 epochs"),
        same("weight_decay", number(0, 10), 0.05, "weight decay of AdamW (section 7); 1-D weights "
             "and position-bias tables do not decay"),
        same("clip", number(1e-6, 1e6), 5.0, "limit on the norm of the gradient, as in MTLoRA's "
             "code"),
        same("seed", integer(0, 2 ** 32), 0, "seed for initial weights, shuffling, augmentation "
             "and dropout"),
    ],
    "machine": [
        same("device", str, "cuda" if torch.cuda.is_available() else "cpu", "device to train "
             "on, such as cpu, cuda or mps"),
        same("amp", ("auto", "bf16", "fp16", "off"), "auto", "mixed precision; auto means "
             "bf16 or fp16 on a CUDA GPU, and off elsewhere"),
        same("compile", FLAG, False, "use torch.compile: compiling takes minutes, but "
             "the steps after that are usually faster"),
    ],
    "the run": [
        same("out", text, None, "folder of the run (default: runs/DATASET); a new run needs a new "
             "folder"),
        same("resume", FLAG, False, "continue the run in --out with the flags it was started "
             "with"),
        Knob("eval_every", integer(1), 1, 20, 20, "epochs between two evaluations; the last "
             "epoch is always evaluated"),
        Knob("log_every", integer(1), 10, 20, 20, "steps between two log lines; each epoch "
             "also ends with a log line"),
        same("baseline", listed(str), None, "single-task results to compare with: one file for all "
             "tasks, such as baselines/nyud.json, or one metrics.json per task, separated by "
             "commas; the run then reports delta-m and chooses its best epoch by delta-m"),
    ],
}
DATASET_HELP = ("rooms (default; rendered, nothing to download), nyud or pascal; "
                "examples/own_dataset.py shows how to add your own")
METHOD_HELP = ("tglora (default); full: fine-tune everything; decoders: train only the decoders; "
               "mtlora, mtlora+ and bdta: see extras/")

RECIPES = {dataset: {knob.name: getattr(knob, dataset)
                     for knobs in TABLE.values() for knob in knobs}
           for dataset in ("rooms", "nyud", "pascal")}

# Changes to a dataset's recipe for --method bdta, except on rooms. They follow section 4.1 of the
# BDTA paper. Warm-up, dropout and drop path are 0, because that section does not mention them.
BDTA = dict(batch_size=8, lr=4e-4, weight_decay=1e-4, warmup=0, dropout=0, drop_path=0)

# Flags that a method or a dataset would ignore. Giving one is an error.
SIMILARITY_FLAGS = {"sim_images", "head_epochs", "head_lr"}
NO_TREE = {"groups", "tree", "tree_only", "layers", "last_rank"} | SIMILARITY_FLAGS
UNUSED = {
    "tglora": set(),
    "mtlora": NO_TREE,
    "mtlora+": NO_TREE,
    "bdta": NO_TREE | {"rank", "dropout", "fused"},
    "full": NO_TREE | {"rank", "dropout"},
    "decoders": NO_TREE | {"rank", "dropout"},
}
ROOM_FLAGS = {"train_rooms", "val_rooms", "room_seed", "night"}
UNUSED_DATA = {"rooms": {"data_root", "download"}, "nyud": ROOM_FLAGS, "pascal": ROOM_FLAGS}

# Flags that may be changed when a run is resumed.
MAY_CHANGE = {"out", "resume", "data_root", "download", "device", "workers", "cache", "log_every",
              "compile"}


# --- numbers of groups ----------------------------------------------------------------------------
def paper_groups(num_tasks: int) -> tuple[int, ...]:
    """The number of groups in each stage: 1,2,3,4 for four tasks, 1,1,2,3 for three (section 4.4).

    The first stage has one group. For T tasks, the others have T - 2, T - 1 and T groups, but at
    least one.
    """
    return 1, max(1, num_tasks - 2), max(1, num_tasks - 1), num_tasks


# --- the command line -----------------------------------------------------------------------------
def make_parser(recipe: dict[str, Any], dataset: str) -> argparse.ArgumentParser:
    """A parser for all flags. Its result holds only the flags that were typed."""
    parser = argparse.ArgumentParser(
        description="Train TGLoRA on one GPU, or on a CPU. recipes.py lists all flags. "
        f"The defaults shown are those of --dataset {dataset}. Section, table and equation "
        "numbers refer to arXiv 2509.19602.",
        usage="%(prog)s [--flag value ...]", argument_default=argparse.SUPPRESS,
        allow_abbrev=False)
    parser.add_argument("--dataset", choices=list(RECIPES), help=DATASET_HELP)
    parser.add_argument("--method", choices=METHODS, help=METHOD_HELP)
    for title, knobs in TABLE.items():
        group = parser.add_argument_group(title)
        for knob in knobs:
            reason, default = knob.reason.replace("%", "%%"), recipe[knob.name]
            options = {"help": reason if default is None else f"{reason} (default: {default})"}
            if knob.values == FLAG:
                options = {"help": reason, "action": "store_true", "default": argparse.SUPPRESS}
            elif knob.values == SWITCH:
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(knob.values, tuple):
                options["choices"] = knob.values
            else:
                options["type"] = knob.values
            group.add_argument(f"--{knob.name.replace('_', '-')}", **options)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run: the flags that were typed, and the dataset's recipe for the rest.

    With --resume, the rest comes from the run's last.pt instead. Raises ValueError if that file or
    the --tree file cannot be read, if the file of --weights does not exist, or if tasks, groups and
    rank do not fit each other. Exits with a usage message if a flag is wrong or has no effect.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="rooms")
    first.add_argument("--method", default="tglora")
    chosen, _ = first.parse_known_args(argv)            # these two select the recipe
    recipe = RECIPES.get(chosen.dataset, RECIPES["rooms"])
    if chosen.method == "bdta" and chosen.dataset != "rooms":
        recipe = {**recipe, **BDTA}
    parser = make_parser(recipe, chosen.dataset)
    typed = vars(parser.parse_args(argv))
    if "resume" in typed:
        return continued(typed.get("out", f"runs/{chosen.dataset}"), typed, parser)

    settings = {"dataset": chosen.dataset, "method": chosen.method, **defaults(recipe), **typed}
    config = argparse.Namespace(**settings)
    config.out = config.out or f"runs/{config.dataset}"
    if config.method != "tglora":
        config.groups = (1, 1, 1, 1)
    config.groups = config.groups or paper_groups(len(config.tasks))
    for name in ("groups", "fused"):
        if len(getattr(config, name)) != 4:
            parser.error(f"--{name} needs four numbers, one for each stage of the backbone")
    ignored = ignored_flags(config)
    for name in typed:
        if name in ignored:
            parser.error(f"--{name.replace('_', '-')} has no effect with {ignored[name]}; leave it "
                         "out")
    check_settings(config)
    return config


def ignored_flags(config: argparse.Namespace) -> dict[str, str]:
    """The flags that have no effect with these settings: {name: reason}."""
    ignored = {}
    if config.amp == "fp16" and not config.device.startswith("cuda"):
        ignored["amp"] = f"--device {config.device}, which computes in float32 or bf16"
    if config.tree or has_one_tree(config):
        ignored |= dict.fromkeys(SIMILARITY_FLAGS, "these settings, because the tree is known and "
                                 "no similarity is measured")
    if config.tree:
        ignored["groups"] = "--tree, which has its own groups"
    unused = UNUSED_DATA.get(config.dataset, ())
    ignored |= dict.fromkeys(unused, f"--dataset {config.dataset}")
    ignored |= dict.fromkeys(UNUSED[config.method], f"--method {config.method}")
    return ignored


def check_settings(config: argparse.Namespace) -> None:
    """Fail early if the weights do not exist, or if tasks, groups and rank do not fit each other.

    With --tree, sets config.groups to the tree's numbers of groups.
    """
    make_tasks(config.tasks, 1)                 # raises ValueError if a task is unknown
    if config.weights not in ("none", *DOWNLOADS):
        find_file(config.weights)
    tree = known_tree(config) or uneven_tree(config)
    config.groups = tuple(len(partition) for partition in tree)
    for partition, rank in zip(tree, stage_ranks(config)):
        split_rank(rank, [len(group) for group in partition])


def known_tree(config: argparse.Namespace) -> list[Partition] | None:
    """The tree, if it is known without measuring any similarity; otherwise None.

    The tree is known if --tree names a file, or if only one tree has these numbers of groups.
    """
    if config.tree:
        return read_tree(config.tree, config.tasks)
    return uneven_tree(config) if has_one_tree(config) else None


def has_one_tree(config: argparse.Namespace) -> bool:
    """Whether each stage has one group or one group per task: only one tree has such groups."""
    return all(count in (1, len(config.tasks)) for count in config.groups)


def uneven_tree(config: argparse.Namespace) -> list[Partition]:
    """The tree of equal similarities. Its groups are as uneven as their numbers allow."""
    T = len(config.tasks)
    return build_tree(np.zeros((T, T)), config.groups)


def defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe, with strings parsed as if they had been typed."""
    values = {}
    for knob in (knob for knobs in TABLE.values() for knob in knobs):
        value = recipe[knob.name]
        if isinstance(value, str) and callable(knob.values):
            value = knob.values(value)
        values[knob.name] = value
    return values


def continued(out: str, typed: dict[str, Any],
              parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings of the run in `out`, updated with the typed flags.

    Exits with a usage message if a typed flag would change a setting that is not in MAY_CHANGE.
    Raises ValueError if last.pt is missing or damaged.
    """
    path = Path(out) / "last.pt"
    if not path.is_file():
        raise ValueError(f"nothing to resume: no file {path}; check --out, or start the run "
                         "without --resume")
    saved = read_checkpoint(path)["config"]
    for name, value in typed.items():
        if name not in MAY_CHANGE and value != saved[name]:
            parser.error(f"--{name.replace('_', '-')} {value}: the run in {out} was started with "
                         f"{saved[name]}, which --resume cannot change; start a new run with "
                         "another --out")
    return argparse.Namespace(**{**saved, **typed, "out": out, "resume": True})
