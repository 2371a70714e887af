"""Benchmarks of training steps, the backbone, inference, reading data, and the similarity.

    python -m extras.bench                             # Swin-Tiny at 448x448, two images per step
    python -m extras.bench --only backbone,step --batch 4
    python -m extras.bench --device cuda --batch 8 --compile --data-root data

The sides of a comparison, such as methods or trees, get one row each. In every round, all sides of
a comparison run one after the other, so a machine that slows down affects all of them. The first
round is a warm-up and is not counted. A row shows the side's median time, its quartiles, and its
ratio to the first side (the median of the ratios in each round).

GMACs are billions of multiply-accumulates in all matrix products (macs_all of cost.py). For a
training step, they are estimated as the GMACs of several forward passes: three if everything is
trained, and two with adapters, because most weights are frozen and the gradient only passes through
them. For bdta and decoders, the backbone counts once and the rest three times.

GMAC/s is the rate, and "of peak" compares it with the rate of one large matrix product. GiB is the
peak memory of a training step, weights included; it is only measured on CUDA, and not for every
row. docs/PERFORMANCE.md discusses the numbers.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cost import count_macs
from data import CLASSES, InMemory, draw_augmentation, loader, open_dataset, warp
from eval import predictor
from extras.budget import near_best_partition
from grouping import best_partition, build_tree
from model import build
from recipes import parse_arguments
from similarity import task_similarity
from swin import build_swin
from tasks import make_tasks
from tglora import merge
from train import make_optimizer, train_step
from util import amp_dtype, one_line_errors, pick_device

ADAPTED = {                             # {name of a row: flags of train.py}, for PASCAL's tasks
    "1,1,1,1 (MTL-LoRA)": "--groups 1,1,1,1",
    "1,2,3,4 (TGLoRA)": "--groups 1,2,3,4",
    "4,4,4,4": "--groups 4,4,4,4",
    "MTLoRA": "--method mtlora",
}
TRAINED = {
    **ADAPTED,
    "BDTA + MoTE": "--method bdta",
    "full": "--method full",
    "decoders": "--method decoders",
}

Seconds = dict[str, list[float]]        # {name of a side: its time in each round}


# --- measuring ------------------------------------------------------------------------------------
def wait(device: torch.device) -> None:
    """Wait until a CUDA GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(args: argparse.Namespace, sides: dict[str, Callable]) -> Seconds:
    """Time every side once per round: one round of warm-up, then args.rounds rounds that count."""
    seconds = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, side in sides.items():
            wait(args.device)
            start = time.perf_counter()
            side()
            wait(args.device)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def matmul_rate(args: argparse.Namespace) -> float:
    """The highest measured GMAC/s of a large matrix product, in the data type set by --amp."""
    n = 8192 if args.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=args.device, dtype=amp_dtype(args.amp, args.device))
    seconds = take_turns(args, {"product": lambda: a @ a})
    return n ** 3 / 1e9 / min(seconds["product"])


def make_rows(section: str, seconds: Seconds, gmacs: dict[str, float] | None = None,
              peak_gib: dict[str, float] | None = None) -> Iterator[dict]:
    """One row per side. gmacs, peak_gib: {side: value} for the sides whose value is known."""
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        yield {
            "section": section,
            "row": name,
            "ms": 1e3 * median,
            "low": 1e3 * low,
            "high": 1e3 * high,
            "ratio": statistics.median(np.divide(values, first).tolist()),
            "gmacs": (gmacs or {}).get(name),
            "peak_gib": (peak_gib or {}).get(name),
            "note": "",
        }


# --- networks and batches -------------------------------------------------------------------------
def network(args: argparse.Namespace, flags: str) -> tuple[nn.Module, list, argparse.Namespace]:
    """Build a network for PASCAL, as train.py does with `flags`, but with random weights.

    Also returns the network's tasks and its settings.
    """
    argv = ["--dataset", "pascal", "--weights", "none", "--backbone", args.backbone]
    config = parse_arguments([*argv, *flags.split()])
    tasks = make_tasks(config.tasks, CLASSES["pascal"])
    tree = build_tree(np.zeros((len(tasks), len(tasks))), config.groups)
    return build(config, tasks, tree).to(args.device), tasks, config


def noise(args: argparse.Namespace, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch of noise (batch, 3, H, W) and random labels for PASCAL's four tasks."""
    torch.manual_seed(0)
    size = (batch, args.size, args.size)
    image = torch.randn(batch, 3, args.size, args.size)
    labels = {
        "semseg": torch.randint(21, size),
        "human_parts": torch.randint(7, size),
        "sal": torch.randint(2, size),
        "normals": F.normalize(torch.randn(image.shape), dim=1),
    }
    labels = {name: label.to(args.device) for name, label in labels.items()}
    return image.to(args.device), labels


def trainer(args: argparse.Namespace, model: nn.Module, tasks: list,
            config: argparse.Namespace) -> Callable[[Tensor, dict], Tensor]:
    """Return a function that does one training step on a batch (images, labels)."""
    amp = amp_dtype(args.amp, args.device)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=amp is torch.float16)
    return partial(train_step, model, tasks, optimizer, scaler, clip=config.clip, amp=amp)


def step_of(args: argparse.Namespace, flags: str,
            compiled: bool = False) -> tuple[Callable[[], Tensor], float]:
    """Return a function that does one training step on noise, and an estimate of its GMACs."""
    model, tasks, config = network(args, flags)
    macs = count_macs(model, (args.size, args.size))["macs_all"]
    if config.method == "full":
        macs = 3 * macs
    elif config.method in ("bdta", "decoders"):         # no gradient passes through the blocks
        backbone = count_macs(model.backbone, (args.size, args.size))["macs_all"]
        macs = 3 * (macs - backbone) + backbone
    else:                               # underestimates adapters and decoders, which are trained
        macs = 2 * macs
    if compiled:
        model.compile(dynamic=False)
    image, labels = noise(args, args.batch)
    step = partial(trainer(args, model, tasks, config), image, labels)
    return step, macs * args.batch / 1e9


# --- the sections ---------------------------------------------------------------------------------
def step(args: argparse.Namespace) -> Iterator[dict]:
    """Time one training step for four tasks: several trees and methods, and a network per task."""
    sides, gmacs, peak_gib = {}, {}, {}
    for name, flags in TRAINED.items():
        if args.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        sides[name], gmacs[name] = step_of(args, flags)
        if args.device.type == "cuda":
            sides[name]()
            sides[name]()               # in this second step, the optimizer's moments are in memory
            peak_gib[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30

    single_steps, name = [], "one LoRA network per task"
    gmacs[name] = 0.0
    for task in ("semseg", "human_parts", "sal", "normals"):
        single_step, single_gmacs = step_of(args, f"--tasks {task} --rank 16")
        single_steps.append(single_step)
        gmacs[name] += single_gmacs

    def train_all() -> None:
        for single_step in single_steps:
            single_step()

    sides[name] = train_all
    if args.compile:
        name = "1,2,3,4, compiled"
        sides[name], gmacs[name] = step_of(args, "--groups 1,2,3,4", compiled=True)
    yield from make_rows("training step", take_turns(args, sides), gmacs, peak_gib)


def backbone(args: argparse.Namespace) -> Iterator[dict]:
    """Time Swin-Tiny from torchvision and from swin.py: forward only, then forward and backward."""
    torch.manual_seed(0)
    image, _ = noise(args, args.batch)
    amp = amp_dtype(args.amp, args.device)
    models = {
        "Swin-T, torchvision": torchvision.models.swin_t(weights=None).features,
        "Swin-T, ours": build_swin("tiny"),
    }
    forward, backward = {}, {}
    for name, model in models.items():
        predict = predictor(model.to(args.device), amp)
        forward[name] = partial(torch.no_grad()(predict), image)
        backward[name] = partial(forward_and_backward, model, predict, image)
    macs = count_macs(models["Swin-T, ours"], (args.size, args.size))["macs_all"]
    gmacs = macs * args.batch / 1e9
    yield from make_rows("backbone, forward", take_turns(args, forward),
                         dict.fromkeys(models, gmacs))
    yield from make_rows("backbone, forward + backward", take_turns(args, backward),
                         dict.fromkeys(models, 3 * gmacs))


def forward_and_backward(model: nn.Module, predict: Callable, image: Tensor) -> None:
    model.zero_grad()
    maps = predict(image)
    if isinstance(maps, list):          # our Swin returns four maps, torchvision's returns one
        maps = maps[-1]
    maps.sum().backward()


def inference(args: argparse.Namespace) -> Iterator[dict]:
    """Time predictions for four tasks, before and after adapters are merged into the weights."""
    amp = amp_dtype(args.amp, args.device)
    for name, flags in ADAPTED.items():
        unmerged, _, _ = network(args, flags)
        merged = merge(network(args, flags)[0])
        for batch in sorted({1, args.batch}):
            image, _ = noise(args, batch)
            sides, gmacs = {}, {}
            for side, model in {"unmerged": unmerged, "merged": merged}.items():
                sides[side] = partial(torch.no_grad()(predictor(model, amp)), image)
                macs = count_macs(model, (args.size, args.size))["macs_all"]
                gmacs[side] = macs * batch / 1e9
            yield from make_rows(f"inference {name}, batch {batch}", take_turns(args, sides), gmacs)


def data(args: argparse.Namespace) -> Iterator[dict]:
    """Time reading, loading batches and training on rooms and, with --data-root, on NYUD-v2."""
    yield from measure_data(args, "rooms", "--train-rooms 32")
    if args.data_root:
        yield from measure_data(args, "nyud", f"--data-root {args.data_root}")


def measure_data(args: argparse.Namespace, name: str, flags: str) -> Iterator[dict]:
    """Time reading samples of the dataset `name` from its files, or rendering them for rooms.

    Then load all samples into memory, and time fetching a batch and a training step on this batch.
    The training step uses the dataset's recipe, changed by `flags` of train.py.
    """
    config = parse_arguments(["--dataset", name, "--weights", "none", "--no-cache",
                              *flags.split()])
    dataset = open_dataset(config, "train")
    count = min(len(dataset), 32)

    def make_samples() -> None:
        for i in range(count):
            dataset[i]

    for row in make_rows(f"{name}, one image", take_turns(args, {"one process": make_samples})):
        for key in ("ms", "low", "high"):
            row[key] /= count
        row["note"] = f"{1e3 / row['ms']:.1f} images/s"
        yield row

    tasks = make_tasks(config.tasks, CLASSES[name])
    tree = build_tree(np.eye(len(tasks)), config.groups)
    model = build(config, tasks, tree).to(args.device)
    train_on = trainer(args, model, tasks, config)
    batch_size = min(len(dataset), config.batch_size)
    same_batch = [list(range(batch_size))] * (args.rounds + 1)
    batches = iter(loader(InMemory(dataset, "images"), same_batch))
    fetched = []

    def fetch() -> None:
        fetched.append(next(batches))

    def train_on_fetched() -> None:
        drawn = draw_augmentation(batch_size, config.flip, config.scales, config.rotate)
        train_on(*warp(fetched.pop(), config.size, args.device, **drawn))

    seconds = take_turns(args, {"fetch": fetch, "step": train_on_fetched})
    fetching, training = np.array(seconds["fetch"]), np.array(seconds["step"])
    share = float(np.median(fetching / (fetching + training)))
    for row in make_rows(f"{name} in memory, batch {batch_size}", seconds):
        if row["row"] == "fetch":
            row["note"] = f"{share:.2%} of a step"
        yield row


def similarity(args: argparse.Namespace) -> Iterator[dict]:
    """Time measuring the similarity of four tasks on one example, and three partition searches."""
    model, tasks, _ = network(args, "--method decoders")
    example = noise(args, 1)
    sides = {"one example, 4 tasks": partial(task_similarity, model, tasks, [example])}
    for T, num_groups, search in ((5, 2, best_partition), (10, 5, best_partition),
                                  (200, 20, near_best_partition)):
        sim = np.random.default_rng(0).normal(size=(T, T))
        sides[f"search, {T} tasks, {num_groups} groups"] = partial(search, sim + sim.T, num_groups)
    yield from make_rows("similarity", take_turns(args, sides))


SECTIONS = {"step": step, "backbone": backbone, "inference": inference, "data": data,
            "similarity": similarity}


# --- the command ----------------------------------------------------------------------------------
HEAD = (f"  {'':<28}{'ms':>9} {'quartiles':>15}{'ratio':>8}{'GMACs':>9}{'GMAC/s':>9}{'of peak':>8}"
        f"{'GiB':>8}")


def format_row(row: dict, peak_rate: float) -> str:
    """One line of the table. peak_rate: GMAC/s of a large matrix product."""
    quartiles = f"{row['low']:.1f}-{row['high']:.1f}"
    line = f"  {row['row']:<28}{row['ms']:>9.1f} {quartiles:>15}{row['ratio']:>8.3f}"
    if row["gmacs"] is None:
        line += " " * 26
    else:
        rate = row["gmacs"] / (row["ms"] / 1e3)
        line += f"{row['gmacs']:>9.1f}{rate:>9.0f}{rate / peak_rate:>8.0%}"
    if row["peak_gib"] is None:
        line += " " * 8
    else:
        line += f"{row['peak_gib']:>8.2f}"
    return f"{line}  {row['note']}".rstrip()


def main(argv: list[str] | None = None) -> list[dict]:
    """The command line; see the top of this file. Returns the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="sections to run, separated by commas; "
        "default: %(default)s")
    add("--device", default=device, help="cpu, cuda or mps; default: %(default)s")
    add("--size", type=int, default=448, help="height and width of the images, in pixels; "
        "the data section uses the size in each dataset's recipe; default: %(default)s")
    add("--batch", type=int, default=2, help="images per training step or forward pass; "
        "the data section uses the batch size in each dataset's recipe; default: %(default)s")
    add("--rounds", type=int, default=5, help="number of rounds that count, after one round "
        "of warm-up; default: %(default)s")
    add("--backbone", default="tiny", help="backbone for the step, inference and "
        "similarity sections; default: %(default)s")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="data type of mixed "
        "precision; auto: bf16 or fp16 on CUDA, otherwise off")
    add("--compile", action="store_true", help="in the step section, also time a training "
        "step of TGLoRA with torch.compile")
    add("--data-root", help="folder or archive of NYUD-v2; if given, the data section "
        "also measures reading NYUD's files")
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    if not set(chosen) <= set(SECTIONS):
        parser.error(f"--only {args.only}: expected one or more of {','.join(SECTIONS)}")
    with one_line_errors():
        args.device = pick_device(args.device)
        return run_sections(args, chosen)


def run_sections(args: argparse.Namespace, chosen: list[str]) -> list[dict]:
    """Print each row as soon as it is measured. Returns all rows."""
    peak_rate = matmul_rate(args)
    machine = f"{args.device.type}, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
          f"{args.size}x{args.size}, batch {args.batch}, matmul {peak_rate:.0f} GMAC/s")
    print(HEAD, flush=True)
    rows, section = [], None
    for name in chosen:
        for row in SECTIONS[name](args):
            if row["section"] != section:
                section = row["section"]
                print(section)
            print(format_row(row, peak_rate), flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
