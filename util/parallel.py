"""More than one GPU: the same command under torchrun, with the same result.

    torchrun --standalone --nproc_per_node=4 train.py --dataset nyud --data-root data

Every process computes its share of each batch; gradients are averaged by DistributedDataParallel.
A batch is that of one process, dealt out like cards, and so are the images of an evaluation, whose
rows are put back in order before they are summed. Loss and BatchNorm average over the whole batch.
Alone, as in `python train.py`, a Team of one does nothing and torch.distributed is never touched.
References: https://docs.pytorch.org/docs/stable/elastic/run.html; arXiv 2006.15704.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    """The processes of a run: this one's `rank`, 0 is the leader, and their number, `size`."""

    def __init__(self, device: torch.device):
        self.rank = int(os.environ.get("RANK", 0))  # set by torchrun
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.leads, self.device = self.rank == 0, device
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            # The others wait while the leader computes similarities or writes: give it a day.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(days=1))
        if not self.leads:
            sys.stdout = open(os.devnull, "w")

    def share(self, items: list) -> list:
        """This process's part of a list: every size-th item, beginning with its rank."""
        return items[self.rank::self.size]

    def gather(self, shares: list) -> list:
        """All processes' `share`s of a list, put together again, in every process."""
        if self.size == 1:
            return shares
        parts = [None] * self.size
        dist.all_gather_object(parts, shares)
        whole = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank::self.size] = part
        return whole

    def tell(self, value):
        """The leader's `value`, in every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, x: Tensor) -> Tensor:
        """x, summed over the processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Is it true in any process?"""
        if self.size > 1:
            flag = bool(self.sum(torch.tensor(float(flag), device=self.device)))
        return flag

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """What the leader does inside (unpack, parse, download) the others then find done."""
        if self.size > 1 and not self.leads:
            dist.barrier()
        yield
        if self.size > 1 and self.leads:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """model, with gradients and BatchNorm statistics averaged over the processes.

        Before the optimizer is made: BatchNorm modules are replaced.
        """
        if self.size == 1:
            return model
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.BatchNorm2d:
                    synced = SyncBatchNorm(child.num_features).to(child.weight.device)
                    synced.load_state_dict(child.state_dict())
                    setattr(parent, name, synced)
        return nn.parallel.DistributedDataParallel(model)

    def close(self) -> None:
        """The end of the run, for all at once."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


class SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward  # every process's loss depends on every process's x


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes, which have equally many (torch's needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)

        def mean_of_all(value: Tensor) -> Tensor:
            mean = value.float().mean((0, 2, 3), keepdim=True)  # (1, C, 1, 1)
            return SumOverProcesses.apply(mean) / dist.get_world_size()

        mean = mean_of_all(x)
        var = mean_of_all((x - mean).square())
        n = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale, shift = self.weight[:, None, None], self.bias[:, None, None]
        return ((x - mean) * (var + self.eps).rsqrt() * scale + shift).to(x.dtype)
