"""Time and memory, beside what they are compared with: the backbone, a training step, inference.

    python -m tools.bench                                        # Swin-Tiny at 448x448, one table
    python -m tools.bench --only backbone,step --batch 4 --json bench.json
    python -m tools.bench --device cuda --batch 8 --compile --data-root data

The sides of a comparison alternate within a run, after one round of warming up; a row gives the
median, the quartiles, and the median of the round-by-round ratios to the first side. GMAC/s count a
forward pass once (cost.py), a step that trains everything three times, and one through
frozen weights twice, as their own gradients are never computed; "of peak" compares with the rate of
one large matrix product here. Memory is the peak over the row, without what was there before it:
allocated on a GPU, resident in a process of its own on a CPU.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from cost import count_macs
from data import CLASSES, InMemory, ToDevice, draw_augmentation, loader, open_dataset, warp
from eval import predictor
from grouping import best_partition, build_tree
from model import build
from pvt import build_pvt
from flags import Help, parse_arguments
from similarity import task_similarity
from swin import build_swin
from tasks import make_tasks
from tglora import merge
from train import make_optimizer, train_step
from util.checkpoint import write_json
from util.parallel import Team
from util.run import amp_dtype, memory_gib, pick_device

NETWORKS = {"1,1,1,1 (MTL-LoRA)": "--groups 1,1,1,1", "1,2,3,4 (TGLoRA)": "--groups 1,2,3,4",
            "4,4,4,4": "--groups 4,4,4,4", "MTLoRA": "--method mtlora"}
STEPS = {**NETWORKS, "BDTA + MoTE": "--method bdta", "full": "--method full",
         "decoders": "--method decoders"}


def network(args: argparse.Namespace, flags: str) -> tuple[nn.Module, list, argparse.Namespace]:
    """PASCAL's four tasks (or those of flags) with the paper's recipe and random weights."""
    config = parse_arguments(["--dataset", "pascal", "--weights", "none", "--backbone",
                              args.backbone, *flags.split()])
    tasks = make_tasks(config.tasks, CLASSES["pascal"])
    tree = build_tree(np.zeros((len(tasks),) * 2), config.groups)
    return build(config, tasks, tree).to(args.device), tasks, config


def inputs(args: argparse.Namespace, batch: int) -> tuple[torch.Tensor, dict]:
    """A batch of noise and labels of every task."""
    torch.manual_seed(0)
    size, where = (batch, args.size, args.size), dict(device=args.device)
    normals = nn.functional.normalize(torch.randn(batch, 3, *size[1:], **where), dim=1)
    return torch.randn(batch, 3, *size[1:], **where), {
        "semseg": torch.randint(21, size, **where), "normals": normals,
        "human_parts": torch.randint(7, size, **where), "sal": torch.randint(2, size, **where)}


def step_of(args: argparse.Namespace, flags: str, compiled: bool = False) -> tuple[Callable, float]:
    """A function that does one training step, and the GMACs of it."""
    model, tasks, config = network(args, flags)
    macs = count_macs(model, (args.size, args.size))
    if "decoders" in flags or "bdta" in flags:  # the backbone runs forward alone
        backbone_macs = count_macs(model.backbone, (args.size, args.size))["macs_all"]
        work = 3 * macs["macs_all"] - 2 * backbone_macs
    else:
        work = macs["macs_all"] * (3 if "full" in flags else 2)
    if compiled:
        model.compile(dynamic=False, fullgraph=True)
    image, labels = inputs(args, args.batch)
    return partial(trainer(args, model, tasks, config), image, labels), work * args.batch / 1e9


def trainer(args: argparse.Namespace, model: nn.Module, tasks: list,
            config: argparse.Namespace) -> Callable:
    """train_step as a function of (image, labels) alone."""
    amp = amp_dtype(args.amp, args.device)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=amp is torch.float16)
    return partial(train_step, model, tasks, optimizer, scaler, parts=1, clip=config.clip, amp=amp,
                   team=Team(args.device))


# --- measuring ------------------------------------------------------------------------------------
def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(args: argparse.Namespace, sides: dict[str, Callable]) -> dict[str, list[float]]:
    """Seconds of each side in each round; every round runs all sides, one after another."""
    seconds = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, do in sides.items():
            wait(args.device)
            began = time.perf_counter()
            do()
            wait(args.device)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(args: argparse.Namespace, flags: str) -> float:
    """Peak GiB of making a training step and doing it twice."""
    if args.device.type == "cuda":
        return peak_here(args, flags)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process only grows
        return pool.apply(peak_here, (args, flags))


def peak_here(args: argparse.Namespace, flags: str) -> float:
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = memory_gib(args.device)
    do, _ = step_of(args, flags)
    for _ in range(2):
        do()
    return memory_gib(args.device) - before


def matmul_rate(args: argparse.Namespace) -> float:
    """GMAC/s of one large matrix product, in the type that the network computes in."""
    n = 8192 if args.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=args.device, dtype=amp_dtype(args.amp, args.device))
    return n ** 3 / 1e9 / min(alternate(args, {"": lambda: a @ a})[""])


def rows(section: str, seconds: dict[str, list[float]], gmacs: dict[str, float], rate: float,
         memory: dict[str, float] | None = None) -> Iterator[dict]:
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        speed = gmacs[name] / median if name in gmacs else None
        yield {"section": section, "row": name, "ms": 1e3 * median, "low": 1e3 * low,
               "high": 1e3 * high, "ratio": statistics.median(v / f for v, f in zip(values, first)),
               "gmacs": gmacs.get(name), "gmac_per_s": speed,
               "of_peak": speed and speed / rate, "peak_gib": (memory or {}).get(name),
               "note": ""}


# --- the comparisons ------------------------------------------------------------------------------
def plain_attention(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """pvt.py's attention by loops over images and heads, with nothing fused; x (B, H, W, C)."""
    z = x if attn.ratio == 1 else attn.norm(attn.sr(x.movedim(3, 1)).movedim(1, 3))
    images = []
    for q, kv in zip(attn.q(x).flatten(1, 2), attn.kv(z).flatten(1, 2)):
        heads = zip(*(y.chunk(attn.num_heads, -1) for y in (q, *kv.chunk(2, -1))))
        images.append(torch.cat([(q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v
                                 for q, k, v in heads], -1))
    return attn.proj(torch.stack(images).view(x.shape))


def backbone(args: argparse.Namespace, rate: float) -> Iterator[dict]:
    """Swin-T beside torchvision's, PVT v2 b2 beside plain loops: forward, and with backward."""
    torch.manual_seed(0)
    image, plain = inputs(args, args.batch)[0], build_pvt("b2")
    for block in (block for stage in plain.layers for block in stage.blocks):
        block.attend = partial(plain_attention, block.attn)

    def backward(model: nn.Module, forward: Callable) -> None:
        model.zero_grad()
        maps = forward(image)
        (maps[-1] if isinstance(maps, list) else maps).sum().backward()

    swin_t = torchvision.models.swin_t(weights=None).features
    for name, models in {"Swin-T": {"torchvision": swin_t, "ours": build_swin("tiny")},
                         "PVT v2 b2": {"plain loops": plain, "ours": build_pvt("b2")}}.items():
        forward = {side: predictor(model.to(args.device), amp_dtype(args.amp, args.device))
                   for side, model in models.items()}  # in evaluation mode: no drop path
        gmacs = count_macs(models["ours"], (args.size,) * 2)["macs_all"] * args.batch / 1e9
        seconds = alternate(args, {side: partial(torch.no_grad()(f), image)
                                   for side, f in forward.items()})
        yield from rows(f"{name} forward", seconds, dict.fromkeys(models, gmacs), rate)
        seconds = alternate(args, {side: partial(backward, models[side], f)
                                   for side, f in forward.items()})
        yield from rows(f"{name} forward + backward", seconds, dict.fromkeys(models, 3 * gmacs),
                        rate)


def step(args: argparse.Namespace, rate: float) -> Iterator[dict]:
    """One training step of four tasks: three trees, MTLoRA, BDTA, no adapters, a network each."""
    memory = {name: peak(args, flags) for name, flags in STEPS.items()}
    sides = {name: step_of(args, flags) for name, flags in STEPS.items()}
    single = [step_of(args, f"--tasks {task} --rank 16")
              for task in ("semseg", "human_parts", "sal", "normals")]
    sides["a LoRA backbone for each"] = (lambda: [step() for step, _ in single],  # the obvious way
                                         sum(work for _, work in single))
    if args.compile:
        sides["1,2,3,4, compiled"] = step_of(args, NETWORKS["1,2,3,4 (TGLoRA)"], compiled=True)
    seconds = alternate(args, {name: do for name, (do, _) in sides.items()})
    yield from rows("training step", seconds, {name: work for name, (_, work) in sides.items()},
                    rate, memory)


def inference(args: argparse.Namespace, rate: float) -> Iterator[dict]:
    """Four predictions, adapters beside the weights and merged into them."""
    for batch in sorted({1, args.batch}):
        image = inputs(args, batch)[0]
        for name, flags in NETWORKS.items():
            models = {"unmerged": network(args, flags)[0], "merged": merge(network(args, flags)[0])}
            seconds = alternate(args, {
                how: partial(torch.no_grad()(predictor(model, amp_dtype(args.amp, args.device))),
                             image) for how, model in models.items()})
            gmacs = {how: count_macs(model, (args.size,) * 2)["macs_all"] * batch / 1e9
                     for how, model in models.items()}
            yield from rows(f"inference {name}, batch {batch}", seconds, gmacs, rate)


def data(args: argparse.Namespace, rate: float) -> Iterator[dict]:
    """What a sample costs, and how long a step waits for its batch (the recipe's loader)."""
    yield from data_of(args, rate, "rooms", "--train-rooms 32", "render")
    if args.data_root:
        yield from data_of(args, rate, "nyud", f"--data-root {args.data_root}", "decode")


def data_of(args: argparse.Namespace, rate: float, name: str, flags: str,
            make: str) -> Iterator[dict]:
    config = parse_arguments(["--dataset", name, "--weights", "none", "--no-cache", *flags.split()])
    augmentation = config.flip, config.scales, config.rotate
    raw = open_dataset(config, "train")
    count, batch = min(len(raw), 32), min(len(raw), config.batch_size)

    def samples() -> None:
        for i in range(count):
            raw[i]

    def warped() -> None:
        for sample in ToDevice(loader(raw, [[i] for i in range(count)]), args.device):
            warp(sample, config.size, **draw_augmentation(1, *augmentation))

    seconds = alternate(args, {f"{make} alone": samples, f"{make} + warp": warped})
    for row in rows(f"{name}, one image (1 worker)", seconds, {}, rate):
        speed = f"{1e3 * count / row['ms']:.1f} images/s"
        yield row | {key: row[key] / count for key in ("ms", "low", "high")} | {"note": speed}

    tasks, kept = make_tasks(config.tasks, CLASSES[name]), InMemory(raw)
    model = build(config, tasks, build_tree(np.eye(len(tasks)), config.groups)).to(args.device)
    step_on = trainer(args, model, tasks, config)
    batches = iter(ToDevice(loader(kept, [list(range(batch))] * (args.rounds + 1)), args.device))
    fetched = []

    def train() -> None:
        step_on(*warp(fetched.pop(), config.size, **draw_augmentation(batch, *augmentation)))

    seconds = alternate(args, {"fetch": lambda: fetched.append(next(batches)), "step": train})
    waits = statistics.median(f / (f + s) for f, s in zip(*seconds.values()))
    for row in rows(f"{name} in memory, batch {batch}", seconds, {}, rate):
        yield row | {"note": f"a step waits {waits:.2%}" if row["row"] == "fetch" else ""}


def similarity(args: argparse.Namespace, rate: float) -> Iterator[dict]:
    """Gradients and cosines of one example, and the search."""
    model, tasks, _ = network(args, "--method decoders")
    example = inputs(args, 1)
    sides = {"one example, 4 tasks": partial(task_similarity, model, tasks, [example])}
    for T, G in ((5, 2), (10, 5), (15, 7), (200, 20)):
        sim = np.random.default_rng(0).normal(size=(T, T))
        sides[f"search, {T} tasks, {G} groups"] = partial(best_partition, sim + sim.T, G)
    yield from rows("similarity", alternate(args, sides), {}, rate)


SECTIONS = {f.__name__: f for f in (step, backbone, inference, data, similarity)}


def show(row: dict) -> str:
    """One line of the table."""
    def number(key: str, form: str) -> str:
        return format(row[key], form) if row[key] is not None else ""

    spread = f"{row['low']:.1f}-{row['high']:.1f}"
    return (f"  {row['row']:<28}{row['ms']:>9.1f} {spread:>15}{row['ratio']:>8.3f}"
            f"{number('gmacs', '.1f'):>9}{number('gmac_per_s', '.0f'):>9}"
            f"{number('of_peak', '.0%'):>8}{number('peak_gib', '.2f'):>8}  {row['note']}".rstrip())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="comma-separated parts")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--size", type=int, default=448, help="of the square images")
    add("--batch", type=int, default=2, help="images a step")
    add("--rounds", type=int, default=5, help="measured rounds of each comparison")
    add("--backbone", default="tiny", help="of the network, for all but that part")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--compile", action="store_true", help="TGLoRA's step by torch.compile too")
    add("--data-root", help="NYUD-v2, for its rows of the data part")
    add("--json", help="write the rows to this file too")
    args = parser.parse_args(argv)
    unknown = set(args.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {','.join(SECTIONS)}")
    args.device = pick_device(args.device)
    rate = matmul_rate(args)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else (
        f"{torch.get_num_threads()} CPU threads")
    print(f"{name}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
          f"{args.size}x{args.size}, batch {args.batch}, matmul {rate:.0f} GMAC/s\n"
          f"  {'':<28}{'ms':>9} {'quartiles':>15}{'ratio':>8}{'GMACs':>9}{'GMAC/s':>9}"
          f"{'of peak':>8}{'GiB':>8}")
    kept, section = [], None
    for part in (name for name in SECTIONS if name in args.only.split(",")):
        for row in SECTIONS[part](args, rate):
            if row["section"] != section:
                section = row["section"]
                print(section)
            print(show(row), flush=True)
            kept.append(row)
    if args.json:
        write_json(Path(args.json), {
            "device": name, "torch": torch.__version__, "size": args.size, "batch": args.batch,
            "matmul_gmac_per_s": rate, "rows": kept})


if __name__ == "__main__":
    main()
