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
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import (
    DATASETS,
    ToDevice,
    draw_augmentation,
    epoch_batches,
    in_order,
    loader,
    open_dataset,
    progress,
    warp,
)
from eval import (
    draw_samples,
    evaluate,
    format_table,
    load_trained,
    predictor,
    read_checkpoint,
    reference,
)
from grouping import Partition, build_tree, check_tree, format_tree
from model import MultiTaskNet, amp_dtype, build, fingerprint, ledger, trained_state
from similarity import finetune_decoders, format_similarity, task_similarity
from tasks import delta_m, make_tasks
from tglora import split_rank

# Every value is the default of the flag of that name.
RECIPES = {
    "rooms": dict(  # ours: a demonstration on two CPU cores; the backbone is README, rooms
        tasks="semseg,depth,normals", size="112", backbone="mini", weights="rooms_mini.pth",
        groups="1,1,2,3", rank=24, layers="attn+mlp", epochs=5, batch_size=8, lr=2e-3, dropout=0.0,
        drop_path=0.0, eval_every=1, sim_images=32, head_epochs=4, cache=True, workers=0,
        flip=True, scales="1"),
    "nyud": dict(  # the paper's sections 4 and 7; the similarity's subset is ours
        tasks="semseg,normals,depth", size="448", backbone="tiny", weights="imagenet",
        groups="1,1,2,3", rank=63, layers="attn+mlp", epochs=300, batch_size=6, lr=1e-4,
        dropout=0.05, drop_path=0.2, eval_every=20, sim_images=200, head_epochs=10, cache=False,
        workers=min(4, os.cpu_count()), flip=True, scales="1,1.2,1.5"),
}


# --- the recipe -----------------------------------------------------------------------------------
def size_pair(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(n) for n in text.split(","))


def names(text: str) -> list[str]:
    return text.split(",")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """All knobs of a run, defaults from the dataset's recipe. Exits with usage on unknown flags."""
    parser = argparse.ArgumentParser(
        description="Train TGLoRA on one GPU or CPU. Defaults follow --dataset (RECIPES).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", choices=sorted(DATASETS), default="rooms", help="what to train on")
    add("--data-root", default="data", help="folder of the dataset, or its archive")
    add("--download", action="store_true", help="fetch the dataset's archive into --data-root")
    add("--train-rooms", type=int, default=400, help="rooms: training images")
    add("--val-rooms", type=int, default=64, help="rooms: validation images")
    add("--tasks", type=names, help="comma-separated")
    add("--size", type=size_pair, help="training size, H or HxW; images are resized to it")
    add("--backbone", help="preset of swin.py: mini, tiny, small, base")
    add("--weights", help="imagenet, torchvision, none (random) or a Swin checkpoint's path")
    add("--method", choices=("tglora", "full", "decoders"), default="tglora",
        help="adapters on a frozen backbone, full fine-tuning, or the decoders alone")
    add("--groups", type=integers, help="task groups a stage, first to last")
    add("--tree", help="file of a saved tree (tree.json of a run): no similarity is computed")
    add("--rank", type=int, help="combined rank of a layer's adapters, split by group size")
    add("--layers", choices=("attn", "attn+mlp", "attn+mlp+others"), help="what is adapted")
    add("--dropout", type=float, help="on the adapters' input")
    add("--drop-path", type=float, help="stochastic depth of the deepest block")
    add("--sim-images", type=int, help="similarity: the subset, decoders and gradients alike")
    add("--head-epochs", type=int, help="similarity: epochs that train the decoders on the subset")
    add("--head-lr", type=float, default=1e-3, help="similarity: their learning rate")
    add("--normalize", choices=("elementwise", "none"), default="elementwise",
        help="similarity: of eq. 2")
    add("--flip", action=switch, help="augmentation: mirror half of the images")
    add("--scales", type=numbers, help="augmentation: zoom by one of these")
    add("--epochs", type=int, help="passes over the training images")
    add("--batch-size", type=int, help="images a step")
    add("--accumulate", type=int, default=1, help="parts that a batch is computed in, for memory")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup", type=float, default=20 / 300, help="share of the run before the peak")
    add("--weight-decay", type=float, default=0.05, help="not on 1-D weights and bias tables")
    add("--clip", type=float, default=5.0, help="gradient norm")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--workers", type=int, help="processes that load data")
    add("--cache", action=switch, help="keep decoded samples in memory")
    add("--eval-every", type=int, help="epochs between evaluations")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--baseline", help="metrics.json of a baseline: best.pt is then the best by delta-m")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", help="folder of the run; default runs/DATASET")
    add("--resume", action="store_true", help="continue from --out's last.pt")
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**RECIPES[dataset], out=f"runs/{dataset}")
    config = parser.parse_args(argv)
    positive = ("epochs", "batch_size", "accumulate", "rank", "sim_images", "head_epochs",
                "eval_every", "log_every", "train_rooms", "val_rooms")
    for name in positive:
        if getattr(config, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return config


def forced_tree(config: argparse.Namespace, num_tasks: int) -> list[Partition] | None:
    """The tree, where --groups leaves no choice: all tasks together or each alone; else None.

    Fails before any work if the groups or the ranks asked for cannot exist.
    """
    tree = build_tree(np.zeros((num_tasks, num_tasks)), config.groups)
    for partition in tree:
        split_rank(config.rank, [len(group) for group in partition])
    return tree if set(config.groups) <= {1, num_tasks} else None


def read_baseline(path: str, tasks: list) -> dict:
    """{task: {metric: value}} from a metrics.json; checked to have every task's metric."""
    try:
        baseline = json.loads(Path(path).read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'baseline: {path} is not a readable {{"results": {{task: {{metric: '
                         f'value}}}}}}: {error!r}') from error
    delta_m(baseline, baseline, tasks)
    return baseline


# --- the tree -------------------------------------------------------------------------------------
def read_tree(path: str, task_names: list[str]) -> list[Partition]:
    """A tree from a file {"tree": [[["semseg", "depth"], ["normals"]], ...]}, checked."""
    try:
        stages = json.loads(Path(path).read_text())["tree"]
        tree = [[tuple(sorted(task_names.index(name) for name in group)) for group in stage]
                for stage in stages]
    except OSError as error:
        raise ValueError(f"tree: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'tree: {path} is not {{"tree": [one list of groups a stage]}} with the '
                         f"tasks {', '.join(task_names)}: {error}") from error
    check_tree(tree, len(task_names))
    return tree


def compute_tree(config: argparse.Namespace, tasks: list, dataset, device: torch.device,
                 out: Path) -> list[Partition]:
    """Train decoders on the frozen backbone, compare gradients, group the tasks (3.1, 3.3, 4.4)."""
    everything = [tuple(range(len(tasks)))]
    plain = argparse.Namespace(**{**vars(config), "method": "decoders"})
    model = build(plain, tasks, [everything] * len(config.groups)).to(device)
    subset = epoch_batches(len(dataset), 1, 1, config.seed)[:config.sim_images]
    subset = [i for batch in subset for i in batch]
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
    tree = build_tree(sim, config.groups)
    write_json(out / "tree.json", {"tree": named(tree, config.tasks), "tasks": config.tasks,
                                   "similarity": sim.tolist()})
    return tree


def named(tree: list[Partition], task_names: list[str]) -> list:
    return [[[task_names[t] for t in group] for group in stage] for stage in tree]


# --- optimisation ---------------------------------------------------------------------------------
def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on what is trained; no decay on 1-D weights (biases, norms) and bias tables."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim == 1 or name.endswith("bias_table") else decayed).append(p)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                              {"params": plain, "weight_decay": 0.0}], lr=lr)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear to `peak` over the first share `warmup` of the steps, then a half cosine to 0."""
    ramp = warmup * steps
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def train_step(model: MultiTaskNet, tasks: list, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, image: Tensor, labels: dict, parts: int, clip: float,
               amp: torch.dtype | None) -> Tensor:
    """One update from a batch computed in `parts`; returns the tasks' losses (T,), unweighted."""
    losses = torch.zeros(len(tasks), device=image.device)
    weights = torch.tensor([task.weight for task in tasks], device=image.device)
    pieces = [image.chunk(parts), *(labels[task.name].chunk(parts) for task in tasks)]
    for x, *truth in zip(*pieces):
        with torch.autocast(image.device.type, amp, enabled=amp is not None):
            predictions = model(x)
        loss = torch.stack([task.loss(predictions[task.name], y) for task, y in zip(tasks, truth)])
        loss = loss * (len(x) / len(image))
        scaler.scale((weights * loss).sum()).backward()  # eq. 8
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


def is_better(found: dict, best: dict) -> bool:
    """By delta-m where a baseline was given, else by validation loss."""
    if "delta_m" in found:
        return found["delta_m"] > best["delta_m"]
    return found["loss"] < best["loss"]


# --- what a run leaves behind ---------------------------------------------------------------------
def write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def save(path: Path, state: dict) -> None:
    """Write beside and rename, so that a checkpoint is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def prepare_out(config: argparse.Namespace) -> tuple[Path, dict | None]:
    """The run's folder, and the state to resume from. Refuses to overwrite another run."""
    out = Path(config.out)
    last = out / "last.pt"
    if config.resume:
        state = read_checkpoint(last)
        may_change = {"out", "resume", "data_root", "download", "device", "workers", "cache",
                      "log_every", "tree"}
        differ = [f"--{k.replace('_', '-')} {v}, not {getattr(config, k, None)}"
                  for k, v in state["config"].items()
                  if k not in may_change and v != getattr(config, k, None)]
        if differ:
            raise ValueError(f"{last} was trained with {'; '.join(differ)}: resume with the same "
                             "flags, or choose another --out")
        return out, state
    if last.exists() or (out / "log.jsonl").exists():
        raise ValueError(f"{out} already holds a run: continue it with --resume, or choose another "
                         "--out")
    return out, None


def open_log(path: Path, step: int):
    """log.jsonl, one JSON object a line; when resuming, without what came after `step`."""
    kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] <= step
            ] if path.exists() and step else []
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return open(path, "a", buffering=1)


# --- the run --------------------------------------------------------------------------------------
def run(config: argparse.Namespace) -> None:
    """One run, from the flags to metrics.json. Raises ValueError on anything wrong in its input."""
    device = torch.device(config.device)
    amp = amp_dtype(config.amp, device)
    tasks = make_tasks(config.tasks, DATASETS[config.dataset].classes)
    tree = forced_tree(config, len(tasks))
    if config.tree:
        tree = read_tree(config.tree, config.tasks)
    baseline = read_baseline(config.baseline, tasks) if config.baseline else None
    out, resumed = prepare_out(config)
    train_set, val_set = open_dataset(config, "train"), open_dataset(config, "val")
    val_batches = ToDevice(loader(val_set, in_order(len(val_set), config.batch_size),
                                  config.workers), device)
    out.mkdir(parents=True, exist_ok=True)

    # Decoders, similarity, tree.
    if resumed:
        tree = resumed["tree"]
    elif tree is None:
        tree = compute_tree(config, tasks, train_set, device, out)
    print(format_tree(tree, config.tasks), flush=True)

    # The network and its ledger.
    model = build(config, tasks, tree).to(device)
    counts = ledger(model)
    print(f"trained parameters: adapters {counts['adapters']:,} + decoders {counts['decoders']:,} "
          f"+ others {counts['others']:,} = {counts['trainable']:,} of {counts['total']:,}")
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    step, best = 0, None
    if resumed:
        load_trained(model, resumed, out / "last.pt")
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        step, best = resumed["step"], resumed["best"]
    constant = {"config": {k: v for k, v in vars(config).items() if k != "resume"},
                "tree": tree, "fingerprint": fingerprint(model)}

    # Epochs, as one list of batches.
    batches = epoch_batches(len(train_set), config.batch_size, config.epochs, config.seed)
    per_epoch, images = len(batches) // config.epochs, len(batches[0])
    log = open_log(out / "log.jsonl", step)
    sums, since, began = torch.zeros(len(tasks), device=device), step, time.monotonic()
    for batch in ToDevice(loader(train_set, batches[step:], config.workers), device):
        torch.manual_seed(config.seed * 1_000_003 + step)  # augmentation, dropout and drop path
        image, labels = warp(batch, config.size,
                             **draw_augmentation(images, config.flip, config.scales))
        rate = learning_rate(step, len(batches), config.lr, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        sums += train_step(model, tasks, optimizer, scaler, image, labels, config.accumulate,
                           config.clip, amp)
        step += 1
        epoch, end_of_epoch = step // per_epoch, step % per_epoch == 0

        if step % config.log_every == 0 or end_of_epoch:
            losses = dict(zip(config.tasks, (sums / (step - since)).tolist()))
            check_finite(losses, since, step)
            speed = images * (step - since) / (time.monotonic() - began)
            eta = int((len(batches) - step) * images / speed)
            log.write(json.dumps({"step": step, "epoch": epoch, "lr": rate, "loss": losses}) + "\n")
            progress(f"step {step}/{len(batches)}  "
                     + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                     + f"  {speed:.1f} images/s  {memory_gib(device):.1f} GiB  ETA {eta // 3600}:"
                     f"{eta // 60 % 60:02}:{eta % 60:02}", end_of_epoch)
            sums, since, began = torch.zeros_like(sums), step, time.monotonic()

        if end_of_epoch:
            state = {**constant, "model": trained_state(model), "step": step}
            if epoch % config.eval_every == 0 or step == len(batches):
                found = evaluate(predictor(model, amp), tasks, val_batches, config.size)
                found |= {"step": step, "epoch": epoch}
                if baseline:
                    found["delta_m"] = delta_m(found["results"], baseline, tasks)
                log.write(json.dumps(found) + "\n")
                print(f"epoch {epoch}: validation loss {found['loss']:.4f}  " + "  ".join(
                    f"{t.name} {t.metric} {found['results'][t.name][t.metric]:.4f}" for t in tasks))
                if best is None or is_better(found, best):
                    best = found
                    save(out / "best.pt", {**state, "best": best})
            save(out / "last.pt", {**state, "best": best, "optimizer": optimizer.state_dict(),
                                   "scaler": scaler.state_dict()})
            began = time.monotonic()
    log.close()

    # The table and the pictures, of best.pt.
    load_trained(model, read_checkpoint(out / "best.pt"), out / "best.pt")
    trivial = reference(tasks, val_batches, config.size)
    write_json(out / "metrics.json", {**best, "reference": trivial, **counts,
                                      "tree": named(tree, config.tasks)})
    draw_samples(out / "predictions.png", predictor(model, amp), tasks, val_set, config.size,
                 device)
    print(f"best epoch {best['epoch']}, {best['images']} validation images\n"
          + format_table(tasks, best["results"], trivial)
          + (f"\ndelta-m {best['delta_m']:+.2f} %" if baseline else "")
          + f"\nwrote {out}/: metrics.json, predictions.png, best.pt, last.pt, log.jsonl")


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except (ValueError, OSError) as error:  # bad input; anything else is a bug and shows its trace
        raise SystemExit(f"error: {str(error).strip().splitlines()[-1]}") from error


if __name__ == "__main__":
    main()
