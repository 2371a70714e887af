"""Train TGLoRA, from a frozen backbone to a table of results, in one run.

    python train.py                                            # rooms: rendered, no downloads
    python train.py --dataset nyud --data-root data            # NYUD-v2 with the paper's recipe
    python train.py --dataset nyud --data-root data --resume   # continue after an interruption
    python train.py --dataset nyud --data-root data --tree-only      # similarity and tree only
    torchrun --standalone --nproc_per_node=4 train.py --dataset nyud --data-root data

`run` reads from top to bottom, in the order in which things happen: settings, data, similarity and
tree, network, epochs, results. Every knob is in recipes.py. With the same settings, the shuffling,
augmentation and dropout of a step depend only on the seed, the step number and, on several GPUs,
the process. A resumed run therefore continues as if it had never stopped.

On several GPUs each process computes its share of every batch, and DistributedDataParallel
averages the gradients. Each process averages its losses over its own images. Only the first
process measures similarity, evaluates, prints and saves; the others wait for it.

In a notebook: `import train; result = train.main([])`, with flags as a list of strings.
Shapes: B batch, T tasks, H W pixels.
References: arXiv 2509.19602, sections 4 and 7; docs/CHOICES.md.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cost import ledger
from data import CLASSES, draw_augmentation, epoch_batches, loader, open_dataset, warp
from eval import evaluate, predictor, reference
from grouping import Partition, build_tree, format_tree, name_tree, read_tree
from model import build, stage_ranks
from recipes import parse_arguments
from report import draw_curves, draw_samples, draw_tree, format_line, format_table
from similarity import finetune_decoders, format_similarity, fresh_decoders, task_similarity
from stability import stability
from tasks import delta_m, make_tasks
from tglora import split_rank
from util import (VERSIONS, all_finite, amp_dtype, clock, fingerprint, load_optimizer, load_trained,
                  one_line_errors, pick_device, progress, read_checkpoint, reading, save, to_json,
                  trained_state, write_json, write_whole)


# --- settings -------------------------------------------------------------------------------------
def describe(config: argparse.Namespace) -> str:
    """A summary of the settings, printed at the start of a run."""
    height, width = config.size
    adapters = ""
    if config.method == "tglora":
        groups = ",".join(map(str, config.groups))
        adapters = f"; groups {groups}, rank {config.rank}, {config.layers}"
    return (f"{config.method} on {config.dataset}: {', '.join(config.tasks)}{adapters}\n"
            f"backbone {config.backbone}, weights {config.weights}, images of {height}x{width}\n"
            f"seed {config.seed}, epochs {config.epochs}, batch size {config.batch_size}, "
            f"learning rate {config.lr:g}, on {config.device}, to {config.out}")


def known_tree(config: argparse.Namespace) -> list[Partition] | None:
    """The tree, if it is known without measuring any similarity; otherwise None.

    The tree is known if --tree names a file, or if every stage has one group or one group per task.
    With --tree, config.groups is set to the tree's numbers of groups. Raises ValueError if the tree
    file cannot be read or does not fit the tasks. Without --tree, raises ValueError if the groups
    or the rank are impossible.
    """
    T = len(config.tasks)
    if config.tree:
        tree = read_tree(config.tree, config.tasks)
        config.groups = tuple(len(partition) for partition in tree)
        return tree
    tree = build_tree(np.zeros((T, T)), config.groups)
    for partition, rank in zip(tree, stage_ranks(config)):
        split_rank(rank, [len(group) for group in partition])
    return tree if set(config.groups) <= {1, T} else None


def as_numbers(results: dict) -> dict[str, dict[str, float]]:
    """Convert the values of {task: {metric: value}}, read from JSON, to floats; None becomes NaN.
    """
    numbers = {}
    for task, metrics in results.items():
        numbers[task] = {}
        for metric, value in metrics.items():
            numbers[task][metric] = math.nan if value is None else float(value)
    return numbers


def read_results(path: Path) -> dict:
    """Read a file of results, such as the metrics.json of a run.

    Raises ValueError if the file is missing or damaged, or if it holds no results.
    """
    with reading(path, "a results file such as the metrics.json of a run"):
        run = json.loads(path.read_text("utf-8-sig"))
        run["results"] = as_numbers(run["results"])
        if "last" in run:
            run["last"]["results"] = as_numbers(run["last"]["results"])
    return run


def read_baseline(config: argparse.Namespace, tasks: Sequence) -> dict:
    """Read the --baseline files, one for all tasks or one per task, as {task: {metric: value}}.

    Raises ValueError if a file cannot be read or is from another dataset, or if a task's main
    metric is missing or not above 0.
    """
    baseline = {}
    for path in config.baseline:
        run = read_results(Path(path))
        if run.get("dataset", config.dataset) != config.dataset:
            raise ValueError(f"--baseline {path} is a run on {run['dataset']}, not on "
                             f"{config.dataset}")
        baseline |= run["results"]
    try:
        delta_m({task.name: {task.metric: 1.0} for task in tasks}, baseline)
    except ValueError as error:
        raise ValueError(f"{', '.join(config.baseline)}: {error}") from error
    return baseline


# --- the tree -------------------------------------------------------------------------------------
def similarity_batches(config: argparse.Namespace, dataset, batch_size: int, device: torch.device,
                       label: str) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield batches of the examples on which the similarity is measured, without augmentation.

    There are `config.sim_images` examples, or fewer if the dataset is smaller. The seed decides
    which examples are used, and in which order. label: the text of the progress line.
    """
    shuffled = epoch_batches(len(dataset), len(dataset), 1, config.seed)[0]
    subset = shuffled[:config.sim_images]
    batches = [subset[i:i + batch_size] for i in range(0, len(subset), batch_size)]
    for batch in progress(loader(dataset, batches, config.workers), label):
        yield warp(batch, config.size, device)


def train_decoders(config: argparse.Namespace, tasks: Sequence, dataset,
                   device: torch.device) -> nn.Module:
    """Train the decoders through which the similarity is then measured (section 4.4).

    Returns the model: the frozen backbone with these decoders, without adapters.
    """
    N = min(config.sim_images, len(dataset))
    batches = epoch_batches(N, config.batch_size, config.head_epochs, config.seed)
    print(f"similarity: training decoders on {N} images for {config.head_epochs} epochs; the "
          "gradients are compared on the same images", flush=True)
    plain = argparse.Namespace(**{**vars(config), "method": "decoders"})
    everyone = [tuple(range(len(tasks)))]
    model = build(plain, tasks, [everyone] * 4).to(device)
    fresh_decoders(model, config.seed)
    amp = amp_dtype(config.amp, device)
    if amp is torch.float16:
        amp = None                              # fp16 needs a loss scaler, which is not used here
    examples = similarity_batches(config, dataset, len(batches[0]), device, "feature maps")
    finetune_decoders(model, tasks, examples, progress(batches, "decoders"), config.head_lr, amp,
                      steps=len(batches))
    if not all_finite(model.state_dict()):
        raise ValueError("training the decoders for the similarity diverged: their weights are not "
                         "finite. Try a lower --head-lr")
    return model


def compute_tree(config: argparse.Namespace, tasks: Sequence, dataset,
                 device: torch.device) -> tuple[list[Partition], dict]:
    """Train decoders on the frozen backbone, compare the tasks' gradients and group the tasks.

    Returns the tree, and a dict that is saved in tree.json: the similarities, and the stability of
    each stage. See sections 3.1, 3.3 and 4.4 of the paper.
    """
    model = train_decoders(config, tasks, dataset, device)
    examples = similarity_batches(config, dataset, 1, device, "gradients")
    similarity = task_similarity(model, tasks, examples, config.normalize)
    print(format_similarity(similarity, config.tasks))

    tree = build_tree(similarity.mean, config.groups)
    choices = stability(tree, similarity.samples)
    print(format_tree(tree, config.tasks, choices), flush=True)
    saved = similarity.as_json()
    saved["choices"] = [choice and choice._asdict() for choice in choices]
    return tree, saved


def shared_tree(config: argparse.Namespace, tasks: Sequence, dataset, device: torch.device,
                rank: int, world: int) -> list:
    """Run `compute_tree` in the first process, and return its result in every process."""
    answer = [None, None]
    if rank == 0:
        answer = list(compute_tree(config, tasks, dataset, device))
    if world > 1:
        dist.broadcast_object_list(answer)
    return answer


# --- optimisation ---------------------------------------------------------------------------------
def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the trained parameters.

    1-D weights (biases, norms) and position-bias tables have no weight decay.
    """
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim == 1 or name.endswith("bias_table"):
            plain.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up to `peak`, then half a cosine towards 0.

    step: counted from 0. steps: number of steps in the run. warmup: the share of the steps before
    the peak.
    """
    ramp = warmup * steps                       # steps before the peak
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)   # + 1: the rate of step 0 is not 0
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def training_batches(config: argparse.Namespace, dataset, batches: Sequence[list[int]], start: int,
                     rank: int, world: int, device: torch.device
                     ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield this process's share of each batch from step `start` on: image (B, 3, H, W), labels."""
    own = [batch[rank::world] for batch in batches[start:]]
    for step, batch in enumerate(loader(dataset, own, config.workers), start):
        # Reseed, so that augmentation, dropout and drop path do not depend on earlier steps.
        torch.manual_seed(config.seed * 1_000_003 + step + 7919 * rank)
        B = len(batch["image"])
        augmentation = draw_augmentation(B, config.flip, config.scales, config.rotate)
        yield warp(batch, config.size, device, **augmentation)


def train_step(model: nn.Module, tasks: Sequence, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, image: Tensor, labels: dict[str, Tensor], clip: float,
               amp: torch.dtype | None, parts: int = 1) -> Tensor:
    """Update the weights once. Returns the losses (T,), not multiplied by the tasks' weights.

    With `parts` above 1, the batch is computed in at most that many parts to save memory, and each
    loss is the mean over the parts. If the losses are finite but the gradient is not, all losses
    are returned as NaN, except with fp16, whose scaler skips such a step. Nothing in here waits for
    the GPU.
    """
    model.train()
    losses = torch.zeros(len(tasks), device=image.device)
    images = image.chunk(parts)
    for i, part in enumerate(images):
        with torch.autocast(image.device.type, amp, enabled=amp is not None):
            predictions = model(part)
        total = 0
        for t, task in enumerate(tasks):
            label = labels[task.name].chunk(parts)[i]
            loss = task.loss(predictions[task.name], label) / len(images)
            total = total + task.weight * loss                      # eq. 8
            losses[t] += loss.detach()
        scaler.scale(total).backward()
    scaler.unscale_(optimizer)                  # clipping needs the true gradient
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.is_enabled():                     # fp16: the scaler skips a step that overflows
        return losses
    only_gradient = losses.isfinite().all() & ~norm.isfinite()
    return torch.where(only_gradient, math.nan, losses)


class LossLog:
    """Mean training losses since the last report, and the speed of training."""

    def __init__(self, tasks: Sequence, batch_size: int, step: int, device: torch.device):
        self.tasks, self.batch_size, self.device = tasks, batch_size, device
        self.restart(step)

    def restart(self, step: int) -> None:
        self.start, self.clock = step, time.monotonic()
        self.sums = torch.zeros(len(self.tasks), device=self.device)    # (T,)
        self.counts = torch.zeros_like(self.sums)

    def add(self, losses: Tensor, labels: dict[str, Tensor]) -> None:
        """Add one step's losses (T,). A task's mean leaves out steps without a label for it."""
        labelled = torch.stack([task.valid(labels[task.name]).any() for task in self.tasks])
        self.sums += losses
        self.counts += labelled

    def report(self, step: int, num_steps: int) -> dict[str, float | None]:
        """Print and return each task's mean loss since the last report, then reset the means.

        The mean is None for a task without labels. This waits for the GPU. Raises ValueError if a
        loss that was added is not finite.
        """
        means, words, bad = {}, [], []
        for task, total, count in zip(self.tasks, self.sums.tolist(), self.counts.tolist()):
            means[task.name] = total / count if count else None
            words.append(f"{task.name} {total / count:.3f}" if count else f"{task.name} -")
            if not math.isfinite(total):
                bad.append(task.name)
        if bad:
            raise ValueError(f"the loss of {', '.join(bad)}, or its gradient, is not finite "
                             f"between steps {self.start} and {step}. The checkpoints already "
                             "saved are not affected. Try a lower --lr, or --amp off")
        speed = (step - self.start) / (time.monotonic() - self.clock)   # steps per second
        left = clock((num_steps - step) / speed)
        memory = ""
        if self.device.type == "cuda":
            memory = f"  {torch.cuda.max_memory_allocated(self.device) / 2 ** 30:.1f} GiB"
        print(f"step {step}/{num_steps}  {'  '.join(words)}  {speed * self.batch_size:.1f} images/s"
              f"{memory}  {left} left", flush=True)
        self.restart(step)
        return means


def validation_score(result: dict) -> float:
    """Score used to pick the best epoch (higher is better): delta-m if known, else minus the loss.
    """
    for score in (result.get("delta_m", math.nan), -result["loss"]):
        if not math.isnan(score):
            return score
    return -math.inf


# --- the run --------------------------------------------------------------------------------------
def start_processes(device: torch.device) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started. Returns (rank, number of processes, device).

    Without torchrun, the rank is 0 and the number of processes is 1. On CUDA, each process gets its
    own device. Silences the standard output of all processes but the first.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The other processes wait while the first one measures similarity or evaluates: allow a day.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, world, device


def state_to_continue(config: argparse.Namespace, out: Path) -> dict | None:
    """The content of last.pt for a resumed run, or None for a new run.

    Raises ValueError if the folder of a new run already exists. With --resume, raises ValueError if
    a checkpoint is missing or damaged, or if last.pt has no optimizer state.
    """
    path = out / "last.pt"
    if not config.resume:
        if out.exists():
            hint = " continue the run in it with --resume, or" if path.exists() else ""
            raise ValueError(f"{out} already exists, and no run is ever overwritten:{hint} choose "
                             "another --out")
        return None
    last = read_checkpoint(path)
    if "optimizer" not in last:
        raise ValueError(f"{path} has no optimizer state, so the run cannot be resumed from it; is "
                         "it a copy of best.pt? Restore the last.pt of this run, or start a new "
                         "run with another --out")
    if last["best"]:
        read_checkpoint(out / "best.pt")        # fail now if it is gone, not after the last epoch
    return last


def open_splits(config: argparse.Namespace, rank: int, world: int) -> tuple:
    """Open the training and validation sets, in the first process before the others.

    The first process may have to unpack an archive, so the others wait until it is done.
    """
    if rank > 0:
        dist.barrier()
    splits = open_dataset(config, "train"), open_dataset(config, "val")
    if world > 1 and rank == 0:
        dist.barrier()
    return splits


def open_log(path: Path, step: int):
    """Open log.jsonl for appending.

    Drops an incomplete last line, and the lines for steps after `step`.
    """
    kept = ""
    if path.exists():
        with reading(path, "the log of a run; delete it to continue without the old lines"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept += line
    write_whole(path, kept.encode())
    return open(path, "a", buffering=1)


def run(config: argparse.Namespace) -> dict:
    """Run everything, from the settings to the results.

    Returns the content of metrics.json, or of tree.json with --tree-only. On several GPUs, only the
    first process returns the metrics; the others return {}. Raises ValueError if a setting or a
    file is wrong, or if a loss or weight is no longer finite.
    """
    # --- settings: fail early, before any work ---
    rank, world, device = start_processes(pick_device(config.device))
    leads = rank == 0
    amp = amp_dtype(config.amp, device)
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    baseline = read_baseline(config, tasks) if config.baseline else None
    tree = known_tree(config)                   # None: the similarity will decide
    out = Path(config.out)
    last = state_to_continue(config, out)       # None: a new run
    print(describe(config))

    # --- data ---
    train_set, val_set = open_splits(config, rank, world)
    batches = epoch_batches(len(train_set), config.batch_size, config.epochs, config.seed)
    num_steps, steps_per_epoch = len(batches), len(batches) // config.epochs
    batch_size = len(batches[0])                # below --batch-size if there are fewer images
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} images cannot be shared evenly among {world} "
                         "processes; change --batch-size or --nproc_per_node")
    val_batches = loader(val_set, [[i] for i in range(len(val_set))], config.workers)

    # --- similarity and tree ---
    similarity = {"similarity": None}
    if last:
        tree, similarity = last["tree"], last["similarity"]
    if tree is None:
        tree, similarity = shared_tree(config, tasks, train_set, device, rank, world)
    elif config.method == "tglora":
        print(f"the tree is known, so no similarity is measured\n{format_tree(tree, config.tasks)}")
    tree_json = {"tasks": config.tasks, **similarity, "tree": name_tree(tree, config.tasks)}
    if config.tree_only:
        if leads:
            make_folder(out)
            write_json(out / "tree.json", tree_json)
            draw_tree(out / "tree.png", out / "tree.json")
        return tree_json

    # --- the network and its optimizer ---
    model = build(config, tasks, tree).to(device)
    counts = ledger(model)
    print(f"trained parameters: adapters {counts['adapters']:,} + decoders {counts['decoders']:,} "
          f"+ others {counts['others']:,} = {counts['trainable']:,} of {counts['total']:,}")
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.compile:
        model.compile(dynamic=False)            # in place: the weights keep their names
    network = DistributedDataParallel(model) if world > 1 else model
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
    step, best, latest = 0, None, None          # steps done; the best and the latest evaluation
    if last:
        load_trained(model, last, out / "last.pt")
        load_optimizer(optimizer, last["optimizer"], out / "last.pt")
        scaler.load_state_dict(last["scaler"])
        step, best, latest = last["step"], last["best"], last["latest"]
    flags = {name: value for name, value in vars(config).items() if name not in ("resume", "out")}
    constant = {"config": flags, "tree": tree, "similarity": similarity,
                "fingerprint": fingerprint(model), "versions": VERSIONS}

    def save_checkpoint(name: str, **more) -> None:
        state = {**constant, "model": trained_state(model), "step": step, "best": best,
                 "latest": latest, **more}
        save(out / name, state)

    def save_for_resume() -> None:
        save_checkpoint("last.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    if leads:
        if not last:
            make_folder(out)
            save_for_resume()
        write_json(out / "tree.json", tree_json)
        log = open_log(out / "log.jsonl", step)

    # --- epochs ---
    losses = LossLog(tasks, batch_size, step, device)
    steps = training_batches(config, train_set, batches, step, rank, world, device)
    for image, labels in steps:
        lr = learning_rate(step, num_steps, config.lr, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_losses = train_step(network, tasks, optimizer, scaler, image, labels, config.clip, amp,
                                 config.accumulate)
        losses.add(step_losses, labels)
        step += 1                               # from here on, the number of steps done
        epoch, end_of_epoch = step // steps_per_epoch, step % steps_per_epoch == 0
        if not leads:
            continue
        if step % config.log_every == 0 or end_of_epoch:
            means = losses.report(step, num_steps)      # waits for the GPU
            log.write(to_json({"step": step, "epoch": epoch, "lr": lr, "loss": means}) + "\n")
        if end_of_epoch and (epoch % config.eval_every == 0 or step == num_steps):
            latest = evaluate(predictor(model, amp), tasks, progress(val_batches, "evaluation"),
                              config.size, device)
            latest |= {"step": step, "epoch": epoch}
            if baseline:
                latest["delta_m"] = delta_m(latest["results"], baseline)
            log.write(to_json(latest) + "\n")
            print(f"epoch {epoch}: {format_line(tasks, latest)}")
            if best is None or validation_score(latest) > validation_score(best):
                best = latest
                save_checkpoint("best.pt")
            losses.restart(step)                # evaluation does not count as training time
        if end_of_epoch:
            save_for_resume()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not leads:
        return {}

    # --- results: table and predictions of the best epoch, curves, tree ---
    log.close()
    load_trained(model, read_checkpoint(out / "best.pt"), out / "best.pt")
    constants = reference(tasks, val_batches, config.size)
    metrics = {**best, "last": latest, "reference": constants, **counts, "seed": config.seed,
               "tree": name_tree(tree, config.tasks), "dataset": config.dataset,
               "flags": flags, "versions": VERSIONS}
    write_json(out / "metrics.json", metrics)
    draw_samples(out / "predictions.png", predictor(model, amp), tasks, val_set, config.size,
                 device)
    draw_curves(out / "curves.png", out / "log.jsonl", tasks)
    draw_tree(out / "tree.png", out / "tree.json")
    print(f"best epoch {best['epoch']}: {format_table(tasks, best, constants, config.size)}\n"
          f"last epoch {latest['epoch']}: {format_line(tasks, latest)}\n"
          f"wrote {out}/: metrics.json predictions.png curves.png tree.png tree.json best.pt "
          "last.pt log.jsonl")
    return metrics


def make_folder(out: Path) -> None:
    """Create the run's folder. Raises ValueError if that fails, or if the folder exists."""
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot create {out}: {error.strerror}; choose another --out") from error


def main(argv: list[str] | None = None) -> dict:
    """Parse the flags, call `run` with the settings, and return its result.

    argv: the flags as a list of strings; None means the command line. If a flag or a file is wrong,
    the program ends with a message instead of a traceback.
    """
    with one_line_errors():
        return run(parse_arguments(argv))


if __name__ == "__main__":
    main()
