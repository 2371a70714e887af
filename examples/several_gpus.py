"""One run on several GPUs, with torchrun and torch's DistributedDataParallel.

    python train.py --dataset nyud --data-root data --tree-only --out runs/tree
    torchrun --standalone --nproc_per_node=4 -m examples.several_gpus --dataset nyud \
        --data-root data --tree runs/tree/tree.json --batch-size 8 --out runs/four
    python eval.py --checkpoint runs/four/best.pt

The flags are those of train.py. Every process computes its share of each batch. A process averages
its losses over its own images, and the gradients are averaged over the processes, so a task whose
labels are spread unevenly over them counts a little differently than on one GPU. The run is
evaluated once, at the end, and cannot be resumed.

Run train.py first with --tree-only: it finds the tree, and it unpacks the dataset if necessary.
References: https://docs.pytorch.org/docs/stable/notes/ddp.html
"""

import os
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import CLASSES, epoch_batches, open_dataset, single_images
from eval import evaluate, predictor
from model import build
from recipes import known_tree, parse_arguments
from report import format_line
from tasks import make_tasks
from train import State, learning_rate, make_folder, train_step, training_batches
from util import amp_dtype, one_line_errors


def run(config: Namespace) -> None:
    """Train in this process, as one of several that torchrun started."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    tasks, tree = make_tasks(config.tasks, CLASSES.get(config.dataset)), known_tree(config)
    if tree is None:
        raise ValueError("the tree must be known: give --tree FILE, from train.py --tree-only")
    out, amp = Path(config.out), amp_dtype(config.amp, device)
    if rank == 0:
        make_folder(out)

    train_set = open_dataset(config, "train")
    batches = epoch_batches(len(train_set), config.batch_size, config.epochs, config.seed)
    if len(batches[0]) % world:
        raise ValueError(f"a batch of {len(batches[0])} images cannot be shared evenly by {world} "
                         "processes; change --batch-size or --nproc_per_node")
    own = [batch[rank::world] for batch in batches]

    model = build(config, tasks, tree).to(device)
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = DistributedDataParallel(model)    # also copies BatchNorm's buffers from process 0
    state = State(config, model, tree, {"similarity": None}, baseline=None)
    mine = Namespace(**{**vars(config), "seed": config.seed + 7919 * rank})     # own augmentation
    for image, labels in training_batches(mine, train_set, own, 0, device):
        lr = learning_rate(state.step, len(batches), config.lr, config.warmup)
        state.set_learning_rate(lr)
        losses = train_step(network, tasks, state.optimizer, state.scaler, image, labels,
                            config.clip, amp)
        state.step += 1
        if rank == 0 and state.step % config.log_every == 0:
            words = [f"{task.name} {loss:.3f}" for task, loss in zip(tasks, losses.tolist())]
            print(f"step {state.step}/{len(batches)}  {'  '.join(words)}", flush=True)

    if rank == 0:
        state.save(out / "best.pt", resumable=False)
        val_set = open_dataset(config, "val")
        result = evaluate(predictor(model, amp), tasks, single_images(val_set, config.workers),
                          config.size, device)
        print(f"{format_line(tasks, result)}\nwrote {out / 'best.pt'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors():
        run(parse_arguments())
