"""Every knob of a run: its flag, its default for each dataset, and the reason for it.

    python train.py --dataset nyud --help        # this table, as help text
    config = parse_arguments(["--dataset", "nyud", "--rank", "32"])
    config.rank, config.lr                       # 32, 1e-4

Values are written as you would type them. Sections and tables are those of arXiv 2509.19602, unless
another paper is named. For your own dataset, copy the recipe of another one and change it:

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

from model import METHODS
from util import read_checkpoint


# --- how values are typed -------------------------------------------------------------------------
def number(low: float, high: float, convert: Callable = float) -> Callable[[str], float]:
    """A parser for one number between `low` and `high`, both included."""
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


def listed(parse_item: Callable, separator: str = ",") -> Callable[[str], tuple]:
    """A parser for a list of at least one item, none of them empty."""
    def parse(text: str) -> tuple:
        items = text.split(separator)
        if "" in items:
            raise argparse.ArgumentTypeError(f"expected values separated by {separator!r}, none of "
                                             f"them empty, got {text!r}")
        return tuple(parse_item(item) for item in items)
    return parse


def size(text: str) -> tuple[int, int]:
    """"448" is 448x448; "448x576" is a height and a width."""
    sides = listed(integer(32, 4096), "x")(text)
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected 448 or 448x576, got {text!r}")
    return sides[0], sides[-1]


def scales(text: str) -> tuple[float, ...]:
    """"1,1.2,1.5" lists zoom factors; "0.75:1.25" means 101 evenly spaced ones in this range."""
    zoom = number(0.1, 10)
    if ":" not in text:
        return listed(zoom)(text)
    ends = listed(zoom, ":")(text)
    if len(ends) != 2:
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH, got {text!r}")
    return tuple(np.linspace(*ends, 101).tolist())


SWITCH = "switch"       # --flip or --no-flip
FLAG = "flag"           # --compile; off unless given


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
             "semseg,human_parts,sal,normals", "tasks to learn; each gets a decoder"),
        same("data_root", str, "data", "folder of the dataset, or its archive"),
        same("download", FLAG, False, "fetch the dataset's archive into --data-root"),
        same("train_rooms", integer(1, 10 ** 5), 600, "rooms: number of training images"),
        same("val_rooms", integer(1, 10 ** 5), 64, "rooms: number of validation images"),
        same("room_seed", integer(0, 2 ** 32), 0, "rooms: seed of the training rooms; the "
             "validation rooms are always the same"),
        Knob("size", size, "112", "448", "448", "size of the network's input: 448 for a "
             "square, or HEIGHTxWIDTH (section 4.1)"),
        Knob("workers", integer(0, 256), 0, WORKERS, WORKERS, "processes that load data; rooms are "
             "kept in memory and need none"),
        Knob("cache", SWITCH, True, False, False, "keep all decoded images in memory"),
    ],
    "augmentation": [
        same("flip", SWITCH, True, "mirror each image with probability 1/2"),
        Knob("scales", scales, "1", "1,1.2,1.5", "0.75:1.25", "zoom by one of these factors, or by "
             "one in a range LOW:HIGH; images of rooms are too small to zoom"),
        Knob("rotate", number(0, 180), 0, 0, 20, "turn each image by up to this many degrees"),
    ],
    "network": [
        Knob("backbone", str, "mini", "tiny", "tiny", "a preset of swin.py (mini, tiny, small, "
             "base) or of extras/pvt.py (pvt_v2_b0 ... pvt_v2_b5)"),
        Knob("weights", str, "rooms_mini.pth", "imagenet", "imagenet", "pretrained backbone: "
             "imagenet, torchvision, none (random), or the path of a checkpoint"),
        Knob("rank", integer(1, 4096), 20, 63, 64, "combined rank of a linear layer's adapters, "
             "split by group size (4.3); nyud's 63 is divisible by its three tasks"),
        Knob("last_rank", integer(1, 4096), None, None, 4, "rank per task in the last stage, "
             "whatever --rank is (4.3)"),
        same("layers", ("attn", "attn+mlp", "attn+mlp+others"), "attn+mlp", "linear layers that "
             "get adapters; with others, norms, patch layers and position biases are trained too "
             "(table 1)"),
        Knob("dropout", number(0, 0.99), 0, 0.05, 0.05, "dropout on the adapters' input; rooms are "
             "trained too briefly to overfit"),
        Knob("drop_path", number(0, 0.99), 0, 0.2, 0.2, "stochastic depth: rate of the last block, "
             "rising from 0 in the first"),
        Knob("fused", listed(integer(1, 4096)), "6,12,24,48", "18,36,72,144", "18,36,72,144",
             "channels that the decoders project the four maps to; 18,36,72,144 are the widths of "
             "HRNet W18"),
    ],
    "similarity and tree": [
        same("groups", listed(integer(1)), None, "number of task groups in each of the four "
             "stages; default: the paper's for this many tasks (4.4)"),
        same("tree", str, None, "use the tree in this file (tree.json of a run)"),
        Knob("sim_images", integer(1), 192, 200, 200, "number of training images to measure the "
             "similarity on; our choice, because the paper gives no number"),
        Knob("head_epochs", integer(1), 6, 20, 20, "epochs of training the decoders on those "
             "images before that (4.4); our choice"),
        same("head_lr", number(1e-9, 10), 2e-3, "learning rate of that training; falls linearly "
             "to 0"),
        same("normalize", ("none", "elementwise"), "none", "normalisation in eq. 2; elementwise is "
             "Task2Vec's"),
        same("tree_only", FLAG, False, "write the tree and stop, without training"),
    ],
    "optimisation": [
        Knob("epochs", integer(1), 4, 300, 300, "passes over the training images (section 7)"),
        Knob("batch_size", integer(1), 8, 6, 32, "images per step (section 7)"),
        same("accumulate", integer(1), 1, "compute each batch in this many parts, to save memory; "
             "BatchNorm and class balance then see one part at a time"),
        Knob("lr", number(1e-12, 10), 2e-3, 1e-4, 3.125e-5, "peak learning rate; pascal's is the "
             "published 5e-4 times batch size / 512, a scaling that MTLoRA's code applies"),
        same("warmup", number(0, 0.99), 20 / 300, "share of the run before the peak learning rate; "
             "in the paper 20 of 300 epochs"),
        same("weight_decay", number(0, 10), 0.05, "of AdamW; 1-D weights and bias tables have none "
             "(section 7)"),
        same("clip", number(1e-6, 1e6), 5.0, "limit on the norm of the gradient, as in MTLoRA's "
             "code"),
        same("seed", integer(0, 2 ** 32), 0, "the same seed gives the same run"),
    ],
    "machine": [
        same("device", str, "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, mps ..."),
        same("amp", ("auto", "bf16", "fp16", "off"), "auto", "mixed precision; auto: only on CUDA"),
        same("compile", FLAG, False, "use torch.compile: minutes of compiling, then faster steps"),
    ],
    "the run": [
        same("out", str, None, "folder of the run, which must not exist yet; default runs/DATASET"),
        same("resume", FLAG, False, "continue the run in --out with its own flags"),
        Knob("eval_every", integer(1), 1, 20, 20, "epochs between two evaluations"),
        Knob("log_every", integer(1), 10, 20, 20, "steps between two log lines"),
        same("baseline", listed(str), None, "metrics.json of single-task runs: one file for all "
             "tasks, or one per task; the best epoch is then chosen by delta-m"),
    ],
}
DATASET_HELP = ("rooms (default; rendered, nothing to download), nyud, pascal, or your own after "
                "its file is imported")
METHOD_HELP = ("tglora (default); full: fine-tune everything; decoders: train only the decoders; "
               "mtlora, mtlora+ and bdta: see extras/")

RECIPES = {dataset: {knob.name: getattr(knob, dataset)
                     for knobs in TABLE.values() for knob in knobs}
           for dataset in ("rooms", "nyud", "pascal")}

# --method bdta, except on rooms: section 4.1 of its paper, which mentions neither dropout nor
# warm-up.
BDTA = dict(batch_size=8, lr=4e-4, weight_decay=1e-4, warmup=0, dropout=0, drop_path=0)

# Flags that a method has no use for. Giving one is an error, because it would change nothing.
NO_GROUPS = {"groups", "tree", "layers", "last_rank"}
UNUSED = {
    "tglora": set(),
    "mtlora": NO_GROUPS,
    "mtlora+": NO_GROUPS,
    "bdta": NO_GROUPS | {"rank", "dropout", "fused"},
    "full": NO_GROUPS | {"rank", "dropout"},
    "decoders": NO_GROUPS | {"rank", "dropout"},
}

# Flags that may be changed when a run is resumed.
MAY_CHANGE = {"out", "resume", "data_root", "download", "device", "workers", "cache", "log_every",
              "compile"}


# --- numbers of groups ----------------------------------------------------------------------------
def paper_groups(num_tasks: int) -> tuple[int, ...]:
    """The number of groups in each stage: 1,2,3,4 for four tasks, 1,1,2,3 for three (section 4.4).

    The first stage has one group. The others have T - 2, T - 1 and T groups, but at least one.
    """
    return 1, max(1, num_tasks - 2), max(1, num_tasks - 1), num_tasks


# --- the command line -----------------------------------------------------------------------------
def make_parser(recipe: dict[str, Any], dataset: str) -> argparse.ArgumentParser:
    """A parser of all flags that returns only those that were typed."""
    parser = argparse.ArgumentParser(
        description="Train TGLoRA on one or more GPUs, or on a CPU. recipes.py lists all flags. "
        f"The defaults shown are those of --dataset {dataset}.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
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

    With --resume, the rest comes from the run's last.pt instead; ValueError if it cannot be read.
    Exits with a usage message if a flag is wrong.
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
    useless = sorted(typed.keys() & UNUSED[config.method])
    if useless:
        parser.error(f"--{useless[0].replace('_', '-')} has no effect with --method "
                     f"{config.method}; leave it out")
    config.out = config.out or f"runs/{config.dataset}"
    if config.method != "tglora":
        config.groups = (1, 1, 1, 1)
    config.groups = config.groups or paper_groups(len(config.tasks))
    for name in ("groups", "fused"):
        if len(getattr(config, name)) != 4:
            parser.error(f"--{name} needs four numbers, one for each stage of the backbone")
    return config


def defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe, parsed as if they had been typed."""
    values = {}
    for knob in (knob for knobs in TABLE.values() for knob in knobs):
        value = recipe[knob.name]
        if isinstance(value, str) and callable(knob.values):
            value = knob.values(value)
        values[knob.name] = value
    return values


def continued(out: str, typed: dict[str, Any],
              parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings of the run in `out`, updated by the typed flags.

    Exits with a usage message if a typed flag may not be changed. Raises ValueError if last.pt is
    missing or damaged.
    """
    path = Path(out) / "last.pt"
    if not path.is_file():
        raise ValueError(f"nothing to resume: no file {path}; start the run without --resume")
    saved = read_checkpoint(path)["config"]
    for name, value in typed.items():
        if name not in MAY_CHANGE and value != saved[name]:
            parser.error(f"--{name.replace('_', '-')} {value}: the run in {out} was started with "
                         f"{saved[name]}, which --resume cannot change; start a new run with "
                         "another --out")
    return argparse.Namespace(**{**saved, **typed, "out": out, "resume": True})
