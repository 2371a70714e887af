"""Train TGLoRA, from a frozen backbone to a results table, in one run.

    python train.py                                          # rooms: rendered, no downloads
    python train.py --dataset nyud --data-root data          # NYUD-v2, the paper's recipe
    python train.py --dataset nyud --data-root data --resume # go on where it stopped

The order of this file is the order of a run: recipe, weights, decoders and similarity, tree,
adapters, epochs, table and pictures. Shuffling, augmentation and dropout of a step depend on
(seed, step) alone, so a run can be continued from its step number.
References: arXiv 2509.19602, sections 4 and 7; README, "Choices the paper leaves open".
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mtlora
from checkpoint import (VERSIONS, check_space, fingerprint, load_trained, open_log,
                        read_checkpoint, save, trained_state, write_json)
from data import (CLASSES, ToDevice, draw_augmentation, epoch_batches, loader, open_dataset,
                  warp)
from eval import draw_samples, evaluate, format_table, predictor, reference
from files import progress
from grouping import Partition, build_tree, format_tree, name_tree, read_tree
from model import amp_dtype, build, ledger, pick_device, stage_ranks
from parallel import Team
from similarity import finetune_decoders, format_similarity, task_similarity
from table import read_results
from tasks import delta_m, make_tasks
from tglora import split_rank

# Every value is the default of the flag of that name.
RECIPES = {
    "rooms": dict(  # ours: a demonstration on two CPU cores; the backbone is README, rooms
        tasks="semseg,depth,normals", size="112", backbone="mini", weights="rooms_mini.pth",
        rank=24, last_rank=None, layers="attn+mlp", epochs=5, batch_size=8, lr=2e-3, dropout=0.0,
        drop_path=0.0, eval_every=1, sim_images=32, head_epochs=4, cache=True, workers=0,
        flip=True, scales="1", rotate=0.0),
    "nyud": dict(  # the paper's sections 4 and 7; the similarity's subset is ours
        tasks="semseg,normals,depth", size="448", backbone="tiny", weights="imagenet",
        rank=63, last_rank=None, layers="attn+mlp", epochs=300, batch_size=6, lr=1e-4,
        dropout=0.05, drop_path=0.2, eval_every=20, sim_images=200, head_epochs=10, cache=False,
        workers=min(4, os.cpu_count()), flip=True, scales="1,1.2,1.5", rotate=0.0),
    "pascal": dict(  # likewise; in stage 4 every task has rank 4, whatever --rank is
        tasks="semseg,human_parts,sal,normals", size="448", backbone="tiny", weights="imagenet",
        rank=64, last_rank=4, layers="attn+mlp", epochs=300, batch_size=32,
        lr=3.125e-5, dropout=0.05, drop_path=0.2, eval_every=20, sim_images=200, head_epochs=10,
        cache=False, workers=min(4, os.cpu_count()), flip=True, scales="0.75:1.25", rotate=20.0),
}


# --- the recipe -----------------------------------------------------------------------------------
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


def paper_groups(num_tasks: int) -> tuple[int, ...]:
    """Task-specific in the last stage, one group less each stage before, shared in the first."""
    return 1, max(1, num_tasks - 2), max(1, num_tasks - 1), num_tasks  # section 4.4


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """All knobs of a run, defaults from the dataset's recipe. Exits with usage on bad flags."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--dataset", choices=sorted(RECIPES), default="rooms", help="to train on")
    dataset = first.parse_known_args(argv)[0].dataset
    parser = argparse.ArgumentParser(
        description="Train TGLoRA on a CPU, a GPU, or several (torchrun). The defaults shown are "
        f"those of {dataset}.",
        parents=[first], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data-root", default="data", help="folder of the dataset, or its archive")
    add("--download", action="store_true", help="fetch the dataset's archive into --data-root")
    add("--train-rooms", type=int, default=480, help="rooms: training images")
    add("--val-rooms", type=int, default=64, help="rooms: validation images")
    add("--tasks", type=names, help="comma-separated")
    add("--size", type=size_pair, help="training size, H or HxW; images are resized to it")
    add("--backbone", help="preset of swin.py: mini, tiny, small, base")
    add("--weights", help="imagenet, torchvision, none (random) or a Swin checkpoint's path")
    add("--method", choices=("tglora", *mtlora.METHODS, "full", "decoders"), default="tglora",
        help="adapters on a frozen backbone, full fine-tuning, or the decoders alone")
    add("--groups", type=integers,
        help="task groups a stage, as in 1,1,2,3; without it, the paper's for so many tasks")
    add("--tree", help="use the tree in this file (tree.json of a run), whatever --groups says")
    add("--rank", type=int, help="combined rank of a layer's adapters, split by group size")
    add("--last-rank", type=int, help="the last stage's combined rank is this times the tasks")
    add("--layers", choices=("attn", "attn+mlp", "attn+mlp+others"), help="what is adapted")
    add("--dropout", type=float, help="on the adapters' input")
    add("--drop-path", type=float, help="stochastic depth of the deepest block")
    add("--sim-images", type=int, help="similarity: the subset, decoders and gradients alike")
    add("--head-epochs", type=int, help="similarity: epochs that train the decoders on the subset")
    add("--head-lr", type=float, default=1e-3, help="similarity: their learning rate")
    add("--normalize", choices=("elementwise", "none"), default="elementwise",
        help="similarity: of eq. 2")
    add("--flip", action=switch, help="augmentation: mirror half of the images")
    add("--scales", type=zooms, help="augmentation: zoom by one of these, or LOW:HIGH")
    add("--rotate", type=float, help="augmentation: turn by up to so many degrees")
    add("--epochs", type=int, help="passes over the training images")
    add("--batch-size", type=int, help="images a step")
    add("--accumulate", type=int, default=1, help="parts that a batch is computed in, for memory")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup", type=float, default=20 / 300, help="share of the run before the peak")
    add("--weight-decay", type=float, default=0.05, help="not on 1-D weights and bias tables")
    add("--clip", type=float, default=5.0, help="gradient norm")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--compile", action="store_true", help="the network, by torch.compile")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--workers", type=int, help="processes that load data")
    add("--cache", action=switch, help="keep decoded samples in memory")
    add("--eval-every", type=int, help="epochs between evaluations")
    add("--log-every", type=int, default=10,
        help="steps between log lines; each epoch ends with one too")
    add("--baseline", nargs="+", help="metrics.json of the single-task runs, one or one a task: "
        "best.pt is then the best by delta-m")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", help="folder of the run; default runs/DATASET")
    add("--resume", action="store_true", help="continue from --out's last.pt")
    parser.set_defaults(**RECIPES[dataset], out=f"runs/{dataset}")
    config = parser.parse_args(argv)
    config.groups = config.groups or (  # without adapters there is nothing to group
        paper_groups(len(config.tasks)) if config.method == "tglora" else (1, 1, 1, 1))
    low = dict.fromkeys(("epochs", "batch_size", "accumulate", "rank", "sim_images", "head_epochs",
                         "eval_every", "log_every", "train_rooms", "val_rooms"), 1)
    low |= dict.fromkeys(("lr", "head_lr", "warmup", "dropout", "drop_path", "weight_decay", "clip",
                          "rotate", "workers"), 0)
    for name, value in low.items():
        high = 0.99 if name in ("warmup", "dropout", "drop_path") else math.inf
        if not value <= getattr(config, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}"
                         + (f" and at most {high}" if high < 1 else ""))
    if len(config.groups) != 4:
        parser.error("--groups needs four numbers, one for each stage of the backbone")
    if min(config.size) < 32:
        parser.error("--size must be at least 32")
    return config


def forced_tree(config: argparse.Namespace, num_tasks: int) -> list[Partition] | None:
    """The tree, where --groups leaves no choice: all tasks together or each alone; else None.

    Fails before any work if the groups or the ranks asked for cannot exist.
    """
    tree = build_tree(np.zeros((num_tasks, num_tasks)), config.groups)
    for partition, rank in zip(tree, stage_ranks(config)):
        split_rank(rank, [len(group) for group in partition])
    return tree if set(config.groups) <= {1, num_tasks} else None


def read_baseline(paths: list[str], tasks: list) -> dict:
    """{task: {metric: value}} from metrics.json files; checked to have every task's metric."""
    baseline = {}
    for path in paths:
        baseline |= read_results(Path(path))["results"]
    try:
        delta_m({task.name: {task.metric: 1.0} for task in tasks}, baseline)
    except ValueError as error:
        raise ValueError(f"{', '.join(paths)}: {error}") from error
    return baseline


# --- the tree -------------------------------------------------------------------------------------
def compute_tree(config: argparse.Namespace, tasks: list, dataset,
                 device: torch.device) -> tuple[list[Partition], list]:
    """Train decoders on the frozen backbone, compare gradients, group the tasks (3.1, 3.3, 4.4).

    Returns the tree and the (T, T) similarities.
    """
    everything = [tuple(range(len(tasks)))]
    plain = argparse.Namespace(**{**vars(config), "method": "decoders"})
    model = build(plain, tasks, [everything] * len(config.groups)).to(device)
    subset = epoch_batches(len(dataset), len(dataset), 1, config.seed)[0][:config.sim_images]
    print(f"similarity: decoders trained on {len(subset)} images for {config.head_epochs} epochs, "
          f"then gradients of {len(subset)} examples", flush=True)
    batches = [[subset[i] for i in batch] for batch in
               epoch_batches(len(subset), config.batch_size, config.head_epochs, config.seed)]

    def warped(batches: list[list[int]]):
        for batch in ToDevice(loader(dataset, batches, config.workers), device):
            yield warp(batch, config.size)

    torch.manual_seed(config.seed)
    finetune_decoders(model, tasks, warped(batches), config.head_lr)
    sim = task_similarity(model, tasks, warped([[i] for i in subset]), config.normalize)
    print(format_similarity(sim, config.tasks))
    return build_tree(sim, config.groups), sim.tolist()


# --- optimisation ---------------------------------------------------------------------------------
def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on what is trained; no decay on 1-D weights (biases, norms) and bias tables."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim == 1 or name.endswith("bias_table") else decayed).append(p)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                              {"params": plain, "weight_decay": 0.0}], lr=lr, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear to `peak` over the first share `warmup` of the steps, then a half cosine to 0."""
    ramp = warmup * steps
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def train_step(model: nn.Module, tasks: list, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, image: Tensor, labels: dict, parts: int, clip: float,
               amp: torch.dtype | None, team: Team) -> Tensor:
    """One update from a batch computed in `parts`; returns the tasks' losses (T,), unweighted.

    Nothing in it waits for the GPU.
    """
    pieces = list(zip(image.chunk(parts), *(labels[task.name].chunk(parts) for task in tasks)))
    valid = torch.stack([torch.stack([task.valid(y).sum() for task, y in zip(tasks, truth)])
                         for _, *truth in pieces]).float()  # (parts, T), pixels
    # A loss is a mean over valid pixels: of a part, it counts by its share of the whole batch's.
    share = valid / team.sum(valid.sum(0)).clamp(min=1)
    losses = torch.zeros(len(tasks), device=image.device)
    for (x, *truth), part in zip(pieces, share):
        with torch.autocast(image.device.type, amp, enabled=amp is not None):
            predictions = model(x)
        loss = torch.stack([task.loss(predictions[task.name], y) for task, y in zip(tasks, truth)])
        loss = loss * part
        total = sum(task.weight * own for task, own in zip(tasks, loss.unbind()))  # eq. 8
        scaler.scale(total * team.size).backward()  # which averages over the processes
        losses += loss.detach()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return losses


def check_finite(losses: dict[str, float], since: int, step: int) -> None:
    bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if bad:
        raise ValueError(f"the loss of {', '.join(bad)} is not finite between steps {since} and "
                         f"{step}; the checkpoints are from before. Try a lower --lr or --amp off")


def merit(found: dict) -> float:
    """How good an evaluation is: delta-m where a baseline was given, else minus the loss."""
    value = found.get("delta_m", -found["loss"])
    return -math.inf if math.isnan(value) else value


# --- around the run ------------------------------------------------------------------------------
def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "linux":  # ru_maxrss there begins with the peak of the parent process
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30  # macOS: bytes


def check_out(config: argparse.Namespace) -> tuple[Path, dict | None]:
    """The run's folder, and the state to resume from. Refuses to overwrite another run."""
    out = Path(config.out)
    last = out / "last.pt"
    if config.resume:
        state = read_checkpoint(last)
        may_change = {"out", "resume", "data_root", "download", "device", "workers", "cache",
                      "log_every", "tree", "compile"}
        differ = [f"--{k.replace('_', '-')} {v}, not {getattr(config, k, None)}"
                  for k, v in state["config"].items()
                  if k not in may_change and v != getattr(config, k, None)]
        if differ:
            raise ValueError(f"{last} was trained with {'; '.join(differ)}: resume with the same "
                             "flags, or choose another --out")
        return out, state
    if last.exists():
        raise ValueError(f"{out} already holds a run: continue it with --resume, or choose another "
                         "--out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; expected a folder, or a name for a new one")
    return out, None


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM: the run ends after its step. A second SIGINT ends it at once."""
    received = []

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the run --------------------------------------------------------------------------------------
def run(config: argparse.Namespace) -> None:
    """One run, from the flags to metrics.json. Raises ValueError on anything wrong in its input."""
    team = Team(pick_device(config.device))
    device = team.device
    amp = amp_dtype(config.amp, device)
    tasks = make_tasks(config.tasks, CLASSES[config.dataset])
    tree = read_tree(config.tree, config.tasks) if config.tree else None
    if tree:
        config.groups = tuple(len(partition) for partition in tree)
    tree = tree or forced_tree(config, len(tasks))
    baseline = read_baseline(config.baseline, tasks) if config.baseline else None
    out, resumed = check_out(config)
    with team.leader_first():
        train_set, val_set = open_dataset(config, "train"), open_dataset(config, "val")
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise ValueError(f"--out {out} cannot be written to")
    images = min(config.batch_size, len(train_set))
    if images % team.size:
        raise ValueError(f"a batch of {images} images cannot be shared evenly by {team.size} "
                         "processes; change --batch-size or --nproc_per_node")
    one_by_one = [[i] for i in range(len(val_set))]
    val_batches = ToDevice(loader(val_set, team.share(one_by_one), config.workers), device)

    # Decoders, similarity, tree.
    similarity = None
    if resumed:
        tree = resumed["tree"]
    elif tree is None:
        tree, similarity = team.tell(
            compute_tree(config, tasks, train_set, device) if team.leads else None)
    print(format_tree(tree, config.tasks), flush=True)

    # The network and its ledger.
    model = build(config, tasks, tree).to(device)
    counts = ledger(model)
    print(f"trained parameters: adapters {counts['adapters']:,} + decoders {counts['decoders']:,} "
          f"+ others {counts['others']:,} = {counts['trainable']:,} of {counts['total']:,}")
    if config.compile:
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        model.compile(dynamic=False, fullgraph=team.size == 1)  # the weights keep their names
    net = team.wrap(model)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    step, best = 0, None
    sums, since = torch.zeros(len(tasks), device=device), 0  # of the losses, since that step
    if team.leads:
        check_space(out, model)
    if not resumed and team.leads:
        write_json(out / "tree.json", {"tasks": config.tasks, "similarity": similarity,
                                       "tree": name_tree(tree, config.tasks)})
    if resumed:
        load_trained(model, resumed, out / "last.pt")
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        step, best, since = resumed["step"], resumed["best"], resumed["since"]
        sums = resumed["sums"].to(device) * team.leads
    constant = {"config": {k: v for k, v in vars(config).items() if k != "resume"},
                "tree": tree, "fingerprint": fingerprint(model), "versions": VERSIONS}

    def state() -> dict:  # of this moment, as best.pt holds it
        return {**constant, "model": trained_state(model), "step": step, "best": best}

    # Epochs, as one list of batches.
    batches = epoch_batches(len(train_set), config.batch_size, config.epochs, config.seed)
    per_epoch = len(batches) // config.epochs
    mine = [team.share(batch) for batch in batches]
    log = open_log(out / "log.jsonl", step) if team.leads else open(os.devnull, "w")
    began, first = time.monotonic(), step
    with log, stop_signals() as signals:
        for batch in ToDevice(loader(train_set, mine[step:], config.workers), device):
            seed = config.seed * 1_000_003 + step
            torch.manual_seed(seed)
            drawn = draw_augmentation(images, config.flip, config.scales, config.rotate)
            image, labels = warp(batch, config.size, **{k: team.share(v) for k, v in drawn.items()})
            torch.manual_seed(seed + 7919 * team.rank)  # dropout and drop path
            rate = learning_rate(step, len(batches), config.lr, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            sums += train_step(net, tasks, optimizer, scaler, image, labels, config.accumulate,
                               config.clip, amp, team)
            step += 1
            epoch, end_of_epoch = step // per_epoch, step % per_epoch == 0

            logs = step % config.log_every == 0 or end_of_epoch
            if logs:
                losses = dict(zip(config.tasks, (team.sum(sums) / (step - since)).tolist()))
                check_finite(losses, since, step)
                speed = images * (step - first) / (time.monotonic() - began)
                eta = int((len(batches) - step) * images / speed)
                log.write(json.dumps({"step": step, "epoch": epoch, "lr": rate, "loss": losses})
                          + "\n")
                progress(f"step {step}/{len(batches)}  "
                         + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                         + f"  {speed:.1f} images/s  {memory_gib(device):.1f} GiB  "
                         f"ETA {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}", end_of_epoch)
                sums, since, began, first = torch.zeros_like(sums), step, time.monotonic(), step

            if end_of_epoch and (epoch % config.eval_every == 0 or step == len(batches)):
                found = evaluate(predictor(model, amp), tasks, val_batches, config.size,
                                 team.gather)
                found |= {"step": step, "epoch": epoch}
                if baseline:
                    found["delta_m"] = delta_m(found["results"], baseline)
                log.write(json.dumps(found) + "\n")
                print(f"epoch {epoch}: validation loss {found['loss']:.4f}  " + "  ".join(
                    f"{t.name} {t.metric} {found['results'][t.name][t.metric]:.4f}" for t in tasks))
                if best is None or merit(found) > merit(best):
                    best = found
                    if team.leads:
                        save(out / "best.pt", state())
                began = time.monotonic()

            # Processes agree on stopping where they agree on the log.
            stop = signals and team.size == 1 or logs and team.any(bool(signals))
            if team.leads and (end_of_epoch or stop):
                save(out / "last.pt", {**state(), "sums": sums, "since": since, "optimizer":
                                       optimizer.state_dict(), "scaler": scaler.state_dict()})
            if stop:
                team.close()
                raise SystemExit(f"stopped by {' '.join(signals) or 'a signal'} after step {step} "
                                 f"of {len(batches)}; continue with --resume")

    # The table and the pictures, of best.pt.
    if team.leads:
        load_trained(model, read_checkpoint(out / "best.pt"), out / "best.pt")
        trivial = reference(tasks, ToDevice(loader(val_set, one_by_one, config.workers), device),
                            config.size)
        write_json(out / "metrics.json", {**best, "reference": trivial, **counts, "seed":
                                          config.seed, "tree": name_tree(tree, config.tasks)})
        draw_samples(out / "predictions.png", predictor(model, amp), tasks, val_set, config.size,
                     device)
        print(f"best epoch {best['epoch']}: " + format_table(tasks, best, trivial, config.size)
              + (f"\ndelta-m {best['delta_m']:+.2f} %" if baseline else "")
              + f"\nwrote {out}/: metrics.json, predictions.png, tree.json, best.pt, last.pt, "
              "log.jsonl")
    team.close()


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        raise SystemExit("interrupted; where there is a last.pt, continue with --resume, else "
                         "start again") from None
    except (ValueError, OSError) as error:  # bad input; anything else is a bug and shows its trace
        raise SystemExit(f"error: {str(error).strip().splitlines()[-1]}") from error


if __name__ == "__main__":
    main()
