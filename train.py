"""Train TGLoRA, from a frozen backbone to a results table, in one run.

    python train.py                                          # rooms: rendered, no downloads
    python train.py --dataset nyud --data-root data          # NYUD-v2, the paper's recipe
    python train.py --dataset nyud --data-root data --resume # go on where it stopped
    python train.py --dataset nyud --data-root data --tree-only  # similarities and tree alone

`run` reads from top to bottom as a run goes: settings, data, similarity and tree, the network,
epochs, table and pictures. Every knob is in recipes.py. Shuffling, augmentation and dropout of a
step depend on (seed, step) alone, so a run can be continued from its step number.
Shapes: B batch, T tasks, H W pixels.
References: arXiv 2509.19602, sections 4 and 7; docs/CHOICES.md.
"""

import argparse
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cost import fit_budget, format_frontier, ledger
from data import (CLASSES, ToDevice, draw_augmentation, epoch_batches, loader, open_dataset, warp)
from eval import evaluate, predictor, reference
from flags import parse_arguments, read_baseline, settings, tree_without_choice
from grouping import Partition, build_tree, format_tree, name_tree, read_tree
from model import build
from similarity import finetune_decoders, format_similarity, fresh_decoders, task_similarity
from stability import stability
from tasks import delta_m, make_tasks
from util.checkpoint import (RUN_FILES, VERSIONS, check_out, check_space, fingerprint,
                             load_optimizer, load_trained, lock, open_log, read_checkpoint, save,
                             to_json, trained_state, write_json)
from util.draw import draw_curves, draw_samples, draw_tree
from util.parallel import Team
from util.report import format_line, format_table
from util.run import (LossMeter, amp_dtype, one_line_errors, pick_device, progress, reading,
                      stop_signals)


# --- the tree -------------------------------------------------------------------------------------
def compute_tree(config: argparse.Namespace, tasks: list, model: nn.Module, dataset,
                 device: torch.device) -> tuple[list[Partition], list, dict]:
    """Train decoders on the frozen backbone, compare gradients, group the tasks (3.1, 3.3, 4.4).

    model: one group, as the features are the same for all. Returns the tree, how sure each of its
    stages is, and what tree.json says of the similarities.
    """
    subset = epoch_batches(len(dataset), len(dataset), 1, config.seed)[0][:config.sim_images]
    N = len(subset)
    print(f"similarity: decoders trained on {N} images for {config.head_epochs} epochs, "
          f"then gradients of {N} examples", flush=True)

    def load(batches: Sequence[list[int]]) -> Iterator[tuple[Tensor, dict]]:
        own = [[subset[i] for i in batch] for batch in batches]
        for batch in ToDevice(loader(dataset, own, config.workers), device):
            yield warp(batch, config.size)  # not augmented

    amp = amp_dtype(config.amp, device)
    fresh_decoders(model, config.seed)
    finetune_decoders(model, tasks, load,
                      epoch_batches(N, config.batch_size, config.head_epochs, config.seed),
                      config.head_lr, amp if amp is torch.bfloat16 else None)  # fp16 overflows
    try:
        found = task_similarity(model, tasks, load([[i] for i in range(N)]), config.normalize,
                                model.backbone.layers)
    except ValueError as error:
        raise ValueError(f"{error}; use more images (--sim-images) or give --tree FILE") from error
    print(format_similarity(found, config.tasks))
    samples = found.stages if config.stage_similarity else found.samples
    tree = build_tree(np.nanmean(samples, 0), config.groups, verbose=True)  # (T, T), or one a stage
    choices = stability(tree, samples)
    return tree, choices, {**found.as_json(), "choices": [c and c._asdict() for c in choices]}


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
    ramp = warmup * steps  # steps before the peak
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)  # the first step is not lost at rate 0
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def training_batches(config: argparse.Namespace, dataset, batches: Sequence[list[int]], start: int,
                     team: Team) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """From step `start` on, this process's part of each batch: image (B, 3, H, W), labels.

    What is random in a step comes from (seed, step): the augmentation, drawn for the whole batch
    and dealt out, and, as the generator is left, the step's dropout and drop path.
    """
    own = [team.share(batch) for batch in batches[start:]]
    loaded = ToDevice(loader(dataset, own, config.workers), team.device)
    for step, batch in enumerate(loaded, start):
        seed = config.seed * 1_000_003 + step  # seeds of two runs do not meet
        torch.manual_seed(seed)
        # For all images, so that a process draws what one alone would.
        drawn = draw_augmentation(len(batches[step]), config.flip, config.scales, config.rotate)
        drawn = {name: team.share(values) for name, values in drawn.items()}
        image, labels = warp(batch, config.size, **drawn)
        torch.manual_seed(seed + 7919 * team.rank)  # every process drops others
        yield image, labels


def train_step(model: nn.Module, tasks: list, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, image: Tensor, labels: dict[str, Tensor],
               parts: int, clip: float, amp: torch.dtype | None, team: Team) -> Tensor:
    """One update from a batch computed in `parts`; returns the tasks' losses (T,), unweighted.

    All are NaN where the gradient alone is not finite. Nothing in it waits for the GPU.
    """
    # Losses are means over the valid pixels of the whole batch, of all parts and processes.
    totals = {task.name: team.sum(task.totals(labels[task.name])) for task in tasks}
    truths = {task.name: labels[task.name].chunk(parts) for task in tasks}

    model.train()
    losses = torch.zeros(len(tasks), device=image.device)
    for i, part in enumerate(image.chunk(parts)):
        with torch.autocast(image.device.type, amp, enabled=amp is not None):
            predictions = model(part)
        loss = torch.stack([task.loss(predictions[task.name], truths[task.name][i],
                                      totals[task.name]) for task in tasks])  # (T,)
        total = sum(task.weight * own for task, own in zip(tasks, loss.unbind()))  # eq. 8
        scaler.scale(total * team.size).backward()  # which averages over the processes
        losses += loss.detach()
    scaler.unscale_(optimizer)  # the norm is to be of the true gradients
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    scaler.step(optimizer)  # in fp16, not where a gradient overflowed
    scaler.update()  # of the loss scale
    optimizer.zero_grad()
    if scaler.is_enabled():  # fp16's scaler has left out a step whose gradient overflows
        return losses
    return torch.where(losses.isfinite().all() & ~norm.isfinite(), math.nan, losses)


def quality(found: dict) -> float:
    """Of an evaluation, higher is better: delta-m where it has one, else minus the loss."""
    values = found.get("delta_m", math.nan), -found["loss"]
    return next((value for value in values if not math.isnan(value)), -math.inf)


# --- the run --------------------------------------------------------------------------------------
def run(config: argparse.Namespace, open_data: Callable = open_dataset) -> None:
    """One run, flags to metrics.json, on open_data(config, split). ValueError on wrong input."""
    # Settings: whatever can be wrong is said before any work.
    team = Team(pick_device(config.device))  # one process, unless torchrun started more
    device, amp = team.device, amp_dtype(config.amp, team.device)
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    tree = read_tree(config.tree, config.tasks) if config.tree else None
    config.groups = tuple(map(len, tree or ())) or config.groups
    candidates = fit_budget(config)  # of which it takes its groups
    tree = tree or tree_without_choice(config, len(tasks))  # None: the similarity decides
    baseline = read_baseline(config, tasks) if config.baseline else None
    out = Path(config.out)
    check_out(config, tree)
    print(settings(config))
    plain = argparse.Namespace(**{**vars(config), "method": "decoders"})
    plain = build(plain, tasks, [[tuple(range(len(tasks)))]] * 4).to(device)  # looks at the weights

    # Data, and the folder of the run.
    with team.leader_first():  # which unpacks and parses, once
        train_set, val_set = open_data(config, "train"), open_data(config, "val")
    held = lock(out) if team.leads else None  # until this function ends, or the process
    last, best_pt = check_out(config, tree) or (None, None)  # of the run that --resume continues
    tree = last["tree"] if last else tree
    batches = epoch_batches(len(train_set), config.batch_size, config.epochs, config.seed)
    num_steps, per_epoch = len(batches), len(batches) // config.epochs
    batch_size = len(batches[0])  # smaller than asked for where there are fewer images
    if batch_size % team.size:
        raise ValueError(f"a batch of {batch_size} images cannot be shared evenly by {team.size} "
                         "processes; change --batch-size or --nproc_per_node")
    one_by_one = [[i] for i in range(len(val_set))]
    val_batches = ToDevice(loader(val_set, team.share(one_by_one), config.workers), device)

    # Similarity and tree: computed where nothing else says what it is.
    choices, similarity = (), {"similarity": None}
    if tree is None:
        tree, choices, similarity = team.tell(
            compute_tree(config, tasks, plain, train_set, device) if team.leads else None)
    if candidates:
        print(format_frontier(candidates, config, similarity))
    print(format_tree(tree, config.tasks, choices), flush=True)
    tree_json = {"tasks": config.tasks, **similarity, "tree": name_tree(tree, config.tasks)}
    if config.tree_only:
        team.close()  # when all have looked at --out
        if team.leads and not last:
            write_json(out / "tree.json", tree_json)
            draw_tree(out / "tree.png", out / "tree.json")
        return

    # The network and what trains it.
    model = build(config, tasks, tree).to(device)
    counts = ledger(model)
    print(f"trained parameters: adapters {counts['adapters']:,} + decoders {counts['decoders']:,} "
          f"+ others {counts['others']:,} = {counts['trainable']:,} of {counts['total']:,}")
    if config.compile:
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        model.compile(dynamic=False, fullgraph=team.size == 1)  # the weights keep their names
    net = team.wrap(model)  # the same weights, gradients averaged over the team
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    check_space(out, model)  # now rather than after an epoch
    meter, step, best, latest = LossMeter(config.tasks, 0, device), 0, None, None
    if last:
        if best_pt is not last:
            load_trained(model, best_pt, out / "best.pt")  # raises now where it does not fit
        load_trained(model, last, out / "last.pt")
        with reading(out / "last.pt", "a last.pt of train.py"):
            load_optimizer(optimizer, scaler, last)
            meter.load_state(last, team.leads)
            step, best, latest = range(num_steps + 1)[last["step"]], best_pt["best"], last["latest"]
            for found in filter(None, (best, latest)):  # what one lacks shows here, not at the end
                format_table(tasks, found, found["results"], config.size), format_line(tasks, found)
    of_the_run = {"config": {k: v for k, v in vars(config).items() if k != "resume"},
                  "tree": tree, "fingerprint": fingerprint(model), "versions": VERSIONS}

    def write(name: str) -> None:
        """A checkpoint of this moment, by one process of the team."""
        state = {**of_the_run, "model": trained_state(model), "step": step, "best": best,
                 "latest": latest}
        if name == "last.pt":  # what it takes to go on
            state |= {**meter.state(), "optimizer": optimizer.state_dict(),
                      "scaler": scaler.state_dict()}
        if team.leads:
            save(out / name, state)

    # Epochs.
    if not last:
        write("last.pt")  # from now on --resume goes on, whatever happens
    if team.leads and not (out / "tree.json").exists():
        write_json(out / "tree.json", tree_json)
    log = open_log(out / "log.jsonl", step) if team.leads else open(os.devnull, "w")
    with log, stop_signals() as signals:
        for image, labels in training_batches(config, train_set, batches, step, team):
            lr = learning_rate(step, num_steps, config.lr, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            meter.sums += train_step(net, tasks, optimizer, scaler, image, labels,
                                     config.accumulate, config.clip, amp, team)
            step += 1  # from here on, steps done
            epoch, end_of_epoch = step // per_epoch, step % per_epoch == 0

            # Once in a while: progress (the only wait for the GPU).
            log_now = step % config.log_every == 0 or end_of_epoch
            if log_now:
                losses = meter.means(step, team.sum)
                log.write(to_json({"step": step, "epoch": epoch, "lr": lr, "loss": losses}) + "\n")
                progress(meter.line(losses, step, num_steps, batch_size), end_of_epoch)
                meter.restart(step)

            # Each epoch, or every so many: measure, keep the best.
            if end_of_epoch and (epoch % config.eval_every == 0 or step == num_steps):
                found = evaluate(predictor(model, amp), tasks, val_batches, config.size,
                                 team.gather)
                found |= {"step": step, "epoch": epoch}
                if baseline:
                    found["delta_m"] = delta_m(found["results"], baseline)
                log.write(to_json(found) + "\n")
                print(f"epoch {epoch}: {format_line(tasks, found)}")
                latest = found
                if best is None or quality(found) > quality(best):
                    best = found
                    write("best.pt")
                meter.restart(step)  # evaluation is no part of the speed

            # Each epoch, and when told to stop: save for --resume. Processes agree where they log.
            stop = signals and team.size == 1 or log_now and team.any(bool(signals))
            if end_of_epoch or stop:
                write("last.pt")
            if stop:
                team.close()
                raise SystemExit(f"stopped by {' '.join(signals) or 'a signal'} after step {step} "
                                 f"of {num_steps}; continue with --resume")

    # The table and the pictures, of best.pt.
    if team.leads:
        load_trained(model, read_checkpoint(out / "best.pt"), out / "best.pt")
        every_batch = ToDevice(loader(val_set, one_by_one, config.workers), device)
        constant = reference(tasks, every_batch, config.size)
        write_json(out / "metrics.json", {
            **best, "last": latest, "reference": constant, **counts, "seed": config.seed,
            "tree": name_tree(tree, config.tasks), "dataset": config.dataset,
            "flags": {k: v for k, v in of_the_run["config"].items() if k != "out"},
            "versions": VERSIONS})
        draw_samples(out / "predictions.png", predictor(model, amp), tasks, val_set, config.size,
                     device)
        draw_curves(out / "curves.png", out / "log.jsonl", tasks)
        draw_tree(out / "tree.png", out / "tree.json")
        print(f"best epoch {best['epoch']}: " + format_table(tasks, best, constant, config.size)
              + f"\nlast epoch {latest['epoch']}: {format_line(tasks, latest)}"
              + f"\nwrote {out}/: {', '.join(RUN_FILES)}")
    team.close()


def main(argv: list[str] | None = None) -> None:
    try:
        with one_line_errors():
            run(parse_arguments(argv))
    except KeyboardInterrupt:
        raise SystemExit("interrupted; where there is a last.pt, continue with --resume, else "
                         "start again") from None


if __name__ == "__main__":
    main()
