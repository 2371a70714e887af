"""How similar are two tasks? The mean cosine of their gradients on the shared backbone.

Decoders are first trained on the frozen backbone, because gradients through random ones say little
(section 4.4). Then, example by example, each task's loss is differentiated with respect to all
backbone weights, and the gradients of every two tasks are compared (eq. 1-3):

    sim(t, t') = 1/N  sum_i  cos( g / (||g|| + ||g'||), g' / (||g|| + ||g'||) )

which is the plain cosine: it ignores scale. As a mean over examples it has a standard error, and
what differs by less is noise: `task_similarity` returns both, and the examples' own values.

    fresh_decoders(model, seed)
    finetune_decoders(model, tasks, load, batches, lr)
    print(format_similarity(task_similarity(model, tasks, examples), names))

Of your own it needs no more than this (x is an image or any other tensor, examples first):

    model(x) -> {task's name: prediction}       model.backbone: a module; its weights are compared
    task.name                                   task.valid(label) -> bools, all false: no label
    task.loss(prediction, label) -> a number    an example: (x, {task's name: label}), batched by 1

and to train decoders `model.backbone(x)` -> maps, a list of tensors, examples first;
`model.decoders`, an nn.ModuleDict by task's name, (maps, x.shape[2:]) -> prediction; `task.weight`,
of its loss. Train or eval mode and what requires a gradient are afterwards as they were, and no
gradient is left behind.
Shapes: B batch, N examples, T tasks, H W pixels, h w c of a map, P backbone parameters.
References: arXiv 2509.19602, sections 3.1 and 4.4; Task2Vec, arXiv 1902.03545, section 3.3.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

MEMORY = 4 * 2 ** 30  # bytes of maps and labels that `finetune_decoders` keeps at most


class Similarity(NamedTuple):
    """Of every pair of tasks, symmetric; `samples` holds eq. 2 of each example, NaN where the
    example is not labelled for both."""

    mean: np.ndarray     # (T, T), eq. 3; ones on the diagonal
    error: np.ndarray    # (T, T), the mean's standard error; NaN of a single example
    count: np.ndarray    # (T, T), examples labelled for both
    samples: np.ndarray  # (N, T, T)
    stages: np.ndarray   # (N, S, T, T), likewise, of the gradients on each stage's weights alone

    def as_json(self) -> dict[str, list]:
        """Means, counts, standard errors (None where there is none), and each stage's means."""
        return {"similarity": self.mean.tolist(), "count": self.count.tolist(),
                "standard_error": np.where(np.isnan(self.error), None, self.error).tolist(),
                "stage_similarity": np.nanmean(self.stages, 0).tolist()}


# --- eq. 2 ----------------------------------------------------------------------------------------
def gradient_similarity(g: Tensor, g_other: Tensor, normalize: str = "none",
                        sizes: Sequence[int] = ()) -> Tensor:
    """Similarity of two flat gradients (P,), -1 to 1 (eq. 2); 0 where one of them is 0.

    sizes: S of their parts, one after another; then (1 + S,), of the whole and of each part.
    normalize: "none" is eq. 2 as printed. "elementwise" divides each entry by |g| + |g'| of its
    own, as Task2Vec does: what counts is then how many weights agree, not how large they are. A
    weight without any true gradient (a key's bias: softmax ignores it) would count in full with
    its rounding errors, so entries below float32's eps times their gradient's largest are 0.
    """
    if normalize == "elementwise":
        g, g_other = (torch.where(x.abs() < torch.finfo(x.dtype).eps * x.abs().max(), 0, x)
                      for x in (g, g_other))
        scale = g.abs() + g_other.abs()
        scale = torch.where(scale > 0, scale, 1)  # where both are 0, both stay 0
        g, g_other = g / scale, g_other / scale
    elif normalize != "none":
        raise ValueError(f"normalize: expected elementwise or none, got {normalize!r}")
    # torch.sum adds pairwise: float32 does, for millions of small terms too.
    sums = torch.stack([torch.stack([part.sum() for part in product.split(sizes or len(g))])
                        for product in (g * g_other, g * g, g_other * g_other)]).double()
    dot, square, square_other = torch.cat([sums.sum(1, keepdim=True), sums], 1)  # (1 + S,) each
    found = dot / (square * square_other).sqrt().clamp(min=1e-60)
    return found if sizes else found[0]


# --- decoders -------------------------------------------------------------------------------------
@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards modules are in train or eval mode, and weights require gradients, as before."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, requires_grad in wanted:
            p.requires_grad_(requires_grad)


def fresh_decoders(model: nn.Module, seed: int) -> None:
    """Initialise each task's decoder anew, by (seed, its name): the tasks' order plays no part."""
    for name, decoder in model.decoders.items():
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for module in decoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def frozen_maps(backbone: nn.Module, load: Callable, batches: Sequence[list[int]],
                amp: torch.dtype | None = None) -> Iterator[tuple]:
    """Of each of `batches`, its images' maps, four (B, h, w, c), its labels and its (H, W).

    A frozen backbone's maps never change. They are computed once, in the type `amp`, and kept with
    the labels, on the images' device; where that takes more than MEMORY, again for each batch.
    """
    def compute(batches: Sequence[list[int]]) -> Iterator[tuple]:
        for image, labels in load(batches):
            with torch.no_grad(), torch.autocast(image.device.type, amp, amp is not None):
                maps = [x.to(amp or x.dtype) for x in backbone(image)]
            yield maps, labels, image.shape[2:]

    N, B = 1 + max(map(max, batches)), len(batches[0])
    kept = []
    for maps, labels, size in compute([list(range(i, min(i + B, N))) for i in range(0, N, B)]):
        kept.append((maps, labels))
        if sum(x.nbytes for x in (*maps, *labels.values())) * N / len(maps[0]) > MEMORY:
            yield from compute(batches)
            return
    stages, labels = zip(*kept)
    stages = [torch.cat(stage) for stage in zip(*stages)]  # four (N, h, w, c)
    labels = {name: torch.cat([part[name] for part in labels]) for name in labels[0]}
    for batch in batches:
        yield [x[batch] for x in stages], {k: v[batch] for k, v in labels.items()}, size


def finetune_decoders(model: nn.Module, tasks: Sequence, load: Callable,
                      batches: Sequence[list[int]], lr: float,
                      amp: torch.dtype | None = None) -> None:
    """Train the decoders of `model` on its frozen backbone, a step for each of `batches`.

    batches: lists of indices of examples, all steps of all epochs; load(batches) yields each one's
    (image (B, 3, H, W), labels). The learning rate falls linearly to 0: the last steps' noise
    would be a part of every example's gradient. amp: autocast's type, if any.
    """
    with as_found(model):
        model.eval().requires_grad_(False)  # no drop path
        model.decoders.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.decoders.parameters(), lr=lr, fused=True)
        for step, (maps, labels, size) in enumerate(
                frozen_maps(model.backbone, load, batches, amp)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
            with torch.autocast(maps[0].device.type, amp, amp is not None):
                loss = sum(task.weight * task.loss(model.decoders[task.name](maps, size),
                                                   labels[task.name]) for task in tasks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()


# --- eq. 3 ----------------------------------------------------------------------------------------
def task_similarity(model: nn.Module, tasks: Sequence, examples: Iterable,
                    normalize: str = "none", stages: Sequence[nn.Module] = ()) -> Similarity:
    """Similarity of every pair of tasks over `examples` of (image (1, 3, H, W), labels).

    stages: S parts of the backbone, in its order; by the gradients on each, with what stands before
    it and after the last, tasks are compared too, in the same pass.

    Dropout and drop path are off and BatchNorm uses its running statistics, so an example's
    gradient depends on it alone. An example counts for a pair when both tasks have valid pixels.
    One flat gradient (P,) a task is in memory, whatever N is. Raises ValueError when a pair of
    tasks shares no labelled example.
    """
    T, samples = len(tasks), []
    with as_found(model):
        model.eval().requires_grad_(False)
        shared = list(model.backbone.requires_grad_(True).parameters())
        first, sizes = {next(stage.parameters()) for stage in stages[1:]}, []  # of g's S parts
        for p in shared if stages else ():
            if not sizes or p in first:
                sizes.append(0)
            sizes[-1] += p.numel()
        g = torch.empty(T, sum(p.numel() for p in shared), device=shared[0].device)  # (T, P)
        for image, labels in examples:
            predictions = model(image)
            labelled = [t for t in range(T) if tasks[t].valid(labels[tasks[t].name]).any()]
            for t in labelled:
                loss = tasks[t].loss(predictions[tasks[t].name], labels[tasks[t].name])
                if not loss.requires_grad:  # nothing of the backbone plays a part in it
                    g[t] = 0
                    continue
                grads = torch.autograd.grad(loss, shared, retain_graph=True,
                                            materialize_grads=True)  # of unused weights, 0
                torch.cat([grad.flatten() for grad in grads], out=g[t])
            sample = np.full((1 + len(sizes), T, T), np.nan)
            for t in labelled:
                sample[:, t, t] = 1
                for u in labelled[:labelled.index(t)]:
                    sample[:, t, u] = sample[:, u, t] = gradient_similarity(
                        g[t], g[u], normalize, sizes).cpu()
            samples.append(sample)
    samples = np.array(samples).reshape(-1, 1 + len(sizes), T, T)
    samples, by_stage = samples[:, 0], samples[:, 1:]
    count = (~np.isnan(samples)).sum(0)
    for t, u in np.argwhere(count == 0):
        raise ValueError(f"similarity: no example has valid labels for both {tasks[t].name} and "
                         f"{tasks[u].name}")
    mean = np.nansum(samples, 0) / count  # eq. 3
    with np.errstate(invalid="ignore"):  # 0 / 0 of a single example
        error = np.sqrt(np.nansum((samples - mean) ** 2, 0) / (count - 1) / count)
    return Similarity(mean, error, count, samples, by_stage)


def format_similarity(found: Similarity, names: Sequence[str]) -> str:
    """Mean +- standard error, a row a task; then the counts, where they differ between pairs."""
    T = len(names)
    tables = {"": [["1" if t == u else f"{found.mean[t, u]:.4f} +- {found.error[t, u]:.4f}"
                    for u in range(T)] for t in range(T)]}
    if len(set(found.count[~np.eye(T, dtype=bool)])) > 1:
        tables["examples"] = [[str(n) for n in row] for row in found.count]
    margin, lines = max(map(len, ["examples", *names])), []
    for head, cells in tables.items():
        width = max(map(len, [*names, *sum(cells, [])])) + 2
        lines += [f"{name:<{margin}}" + "".join(f"{cell:>{width}}" for cell in row)
                  for name, row in zip([head, *names], [names, *cells])]
    return "\n".join(lines)
