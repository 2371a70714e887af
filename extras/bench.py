"""Benchmark of a training step and of the backbone: time, memory, work and operations.

    python -m extras.bench                              # Swin-Tiny, two images of 448x448
    python -m extras.bench --device cuda --batch 8
    python -m extras.bench --size 112 --rounds 1        # quick: enough to count operations

The first table shows a training step for PASCAL's four tasks, with several methods and trees. The
second one compares our backbone with torchvision's. In every round, all rows of a table run once,
one after the other, so a machine that slows down affects all of them. The first round is a warm-up
and is not counted. The columns are:

    ms, quartiles       median over the rounds
    ratio               time relative to the first row: the median of the ratios in each round
    GMACs               billions of multiply-accumulates in matrix products, see `count_gmacs`
    forward, backward   number of operations, see `count_operations`
    GiB                 peak memory of PyTorch in a training step, weights included (only on CUDA)

docs/PERFORMANCE.md discusses the numbers.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import swin_t

from data import CLASSES
from model import build
from recipes import parse_arguments, uneven_tree
from swin import build_swin
from tasks import make_tasks
from train import make_optimizer, train_step
from util import amp_dtype, one_line_errors, pick_device

METHODS = {                             # {name of a row: flags of train.py}
    "MTL-LoRA, 1,1,1,1": "--groups 1,1,1,1",
    "TGLoRA, 1,2,3,4": "--groups 1,2,3,4",
    "nothing shared, 4,4,4,4": "--groups 4,4,4,4",
    "MTLoRA": "--method mtlora",
    "BDTA + MoTE": "--method bdta",
    "full fine-tuning": "--method full",
    "decoders only": "--method decoders",
    "LoRA for one task": "--tasks semseg --rank 16",
}


class Row(NamedTuple):
    """One row of a table: what is timed, and what it costs."""

    run: Callable[[], object]
    gmacs: float
    operations: tuple[int, int]         # forward, backward
    peak_gib: float | None = None       # None: not measured


# --- counting -------------------------------------------------------------------------------------
class OperationCounter(TorchDispatchMode):
    """Counts PyTorch's operations while it is active: `with OperationCounter() as counter`.

    An operation that only makes a view of its input is not counted, and neither are those in FREE.
    """

    FREE = ("aten::empty", "aten::empty_like", "aten::_unsafe_view")    # these compute nothing

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shared = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in shared)       # in-place operations write
        if not is_view and func._schema.name not in self.FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))


def loss_of(model: nn.Module, image: Tensor, amp: torch.dtype | None = None) -> Tensor:
    """A loss that needs no labels: the sum of the means of the network's outputs."""
    with torch.autocast(image.device.type, amp, enabled=amp is not None):
        outputs = model(image)
    if isinstance(outputs, dict):           # a prediction per task; our backbone returns a list
        outputs = outputs.values()
    elif isinstance(outputs, Tensor):
        outputs = [outputs]
    return sum(output.mean() for output in outputs)


def count_operations(model: nn.Module, image: Tensor,
                     amp: torch.dtype | None = None) -> tuple[int, int]:
    """The number of operations in a forward pass and in its backward pass.

    On a GPU, nearly every operation launches a kernel. The numbers depend on the device and on
    PyTorch's version. They also depend a little on the image: Swin pads maps to whole windows, and
    only shifts the windows if there is more than one.
    """
    model.zero_grad()                       # adding to an old gradient would be an operation, too
    with OperationCounter() as forward:
        loss = loss_of(model, image, amp)
    with OperationCounter() as backward:
        loss.backward()
    return forward.count, backward.count


def count_gmacs(model: nn.Module, image: Tensor, amp: torch.dtype | None = None) -> float:
    """Billions of multiply-accumulates of the matrix products in a forward and a backward pass.

    These are the products that are really computed: no gradient of frozen weights, for example.
    """
    # MATH: attention as plain products, because PyTorch does not count every fused kernel. It
    # counts weight gradients of depth-wise convolutions too high, which adds 0.3 % to BDTA's.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = loss_of(model, image, amp)
        loss.backward()
    return counter.get_total_flops() / 2e9


# --- the two tables -------------------------------------------------------------------------------
def noise(args: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch of noise (B, 3, H, W), and random labels for PASCAL's four tasks."""
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, args.size, args.size)
    size = (args.batch, args.size, args.size)
    labels = {
        "semseg": torch.randint(21, size),
        "human_parts": torch.randint(7, size),
        "sal": torch.randint(2, size),
        "normals": F.normalize(torch.randn(image.shape), dim=1),
    }
    labels = {name: label.to(args.device) for name, label in labels.items()}
    return image.to(args.device), labels


def step_row(args: argparse.Namespace, flags: str) -> Row:
    """One training step of the network that train.py builds with `flags`, with random weights."""
    on_gpu = args.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    config = parse_arguments(["--dataset", "pascal", "--weights", "none", *flags.split()])
    tasks = make_tasks(config.tasks, CLASSES["pascal"])
    model = build(config, tasks, uneven_tree(config)).to(args.device).train()
    image, labels = noise(args)
    operations = count_operations(model, image, args.amp)
    gmacs = count_gmacs(model, image, args.amp)
    model.zero_grad()

    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp is torch.float16)
    step = partial(train_step, model, tasks, optimizer, scaler, image, labels, clip=config.clip,
                   amp=args.amp)
    peak_gib = None
    if on_gpu:
        step()                              # from now on, the optimizer's moments are in memory
        torch.cuda.reset_peak_memory_stats()
        step()
        peak_gib = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    return Row(step, gmacs, operations, peak_gib)


def backbone_row(args: argparse.Namespace, backbone: nn.Module) -> Row:
    """A forward and a backward pass of a backbone whose weights are all trained."""
    backbone.to(args.device).train()
    image, _ = noise(args)

    def run() -> None:
        backbone.zero_grad()
        loss_of(backbone, image, args.amp).backward()

    operations = count_operations(backbone, image, args.amp)
    return Row(run, count_gmacs(backbone, image, args.amp), operations)


# --- measuring and printing -----------------------------------------------------------------------
def take_turns(args: argparse.Namespace, rows: dict[str, Row]) -> dict[str, list[float]]:
    """The seconds that every row took in each of `args.rounds` rounds, after a round of warm-up."""
    seconds = {name: [] for name in rows}
    for i in range(1 + args.rounds):
        for name, row in rows.items():
            wait(args.device)
            start = time.perf_counter()
            row.run()
            wait(args.device)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Wait until a CUDA GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def format_row(name: str, row: Row, seconds: list[float], first: list[float]) -> str:
    """One line of a table. seconds: of this row; first: of the first row."""
    low, median, high = 1e3 * np.percentile(seconds, (25, 50, 75))
    quartiles = f"{low:.1f}-{high:.1f}"
    ratio = np.median(np.divide(seconds, first))
    forward, backward = row.operations
    line = (f"{name:<24}{median:>9.1f} {quartiles:>17}{ratio:>7.2f}{row.gmacs:>9.2f}"
            f"{forward:>9,}{backward:>10,}")
    return line if row.peak_gib is None else f"{line}{row.peak_gib:>7.2f}"


def measure(args: argparse.Namespace, title: str, rows: dict[str, Row]) -> None:
    """Time the rows and print their table."""
    print(f"{title:<24}{'ms':>9} {'quartiles':>17}{'ratio':>7}{'GMACs':>9}{'forward':>9}"
          f"{'backward':>10}{'GiB':>7}")
    seconds = take_turns(args, rows)
    first = next(iter(seconds.values()))
    for name, row in rows.items():
        print(format_row(name, row, seconds[name], first), flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or mps; default: %(default)s")
    add("--size", type=int, default=448, help="height and width of the images; default: 448")
    add("--batch", type=int, default=2, help="images per step; default: 2")
    add("--rounds", type=int, default=5, help="number of rounds that count; default: 5")
    args = parser.parse_args(argv)
    with one_line_errors():
        args.device = pick_device(args.device)
    args.amp = amp_dtype("auto", args.device)
    print(f"{args.device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
          f"{args.batch} images of {args.size}x{args.size}")
    steps = {name: step_row(args, flags) for name, flags in METHODS.items()}
    measure(args, "training step", steps)
    backbones = {
        "Swin-T, torchvision": backbone_row(args, swin_t(weights=None)),    # with a classifier
        "Swin-T, ours": backbone_row(args, build_swin("tiny", drop_path=0.2)),
    }
    measure(args, "forward and backward", backbones)


if __name__ == "__main__":
    main()
