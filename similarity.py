"""How similar are two tasks? The mean cosine of their gradients on the shared backbone.

Decoders are first trained on the frozen backbone, because gradients that come through random
decoders say little (section 4.4). Then each task's loss on each example is differentiated with
respect to all backbone weights. If g and g' are the gradients of two tasks on example i,

    S(g, g')   = cos( g / (||g|| + ||g'||), g' / (||g|| + ||g'||) ) = cos(g, g')       (eq. 2)
    sim(t, t') = 1/N * sum over the examples i of S(g, g')                             (eq. 1, 3)

A mean over examples has a standard error, and differences smaller than this error may well be
noise. `task_similarity` returns means, standard errors and each example's values.

    fresh_decoders(model, seed)
    finetune_decoders(model, tasks, examples, batches, lr)
    print(format_similarity(task_similarity(model, tasks, examples), names))

Your own model and tasks only need to provide:

    model(image) -> {name of task: prediction}
    model.backbone(image) -> list of maps; gradients are taken with respect to its parameters
    model.decoders: nn.ModuleDict by name of task; decoder(maps, (H, W)) -> prediction
    task.name, task.weight, task.loss(prediction, label) -> scalar
    task.valid(label) -> bools; if none is True, the example has no label for the task

Shapes: B batch, N examples, T tasks, P backbone parameters, H W pixels, h w c height, width and
channels of a map.
Reference: arXiv 2509.19602, sections 3.1 and 4.4.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


# --- eq. 2 ----------------------------------------------------------------------------------------
def gradient_similarity(g: Tensor, g_other: Tensor) -> Tensor:
    """Cosine of two tasks' flattened gradients (P,) on the shared backbone: eq. 2.

    Eq. 2 divides both gradients by the sum of their norms first. A cosine does not notice. The
    similarity is 0 if one of the gradients is 0. Raises ValueError if the shapes differ.
    """
    if g.shape != g_other.shape:
        raise ValueError(f"gradient_similarity: the gradients have the shapes {tuple(g.shape)} and "
                         f"{tuple(g_other.shape)}; expected equal shapes")
    precision = torch.promote_types(g.dtype, torch.float32)     # squares overflow in float16
    g = g.to(precision)
    g_other = g_other.to(precision)
    # Pitfall: on a CPU, F.cosine_similarity is off by 0.15 % for 27 million float32 entries.
    # torch.sum adds pairwise, which is accurate.
    dot = (g * g_other).sum()
    norm = g.square().sum().sqrt()
    norm_other = g_other.square().sum().sqrt()
    return dot / (norm * norm_other).clamp(min=1e-30)


# --- decoders -------------------------------------------------------------------------------------
@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restores each module's train/eval mode and each parameter's requires_grad on exit."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)


def fresh_decoders(model: nn.Module, seed: int) -> None:
    """Reinitialise each task's decoder by calling its modules' `reset_parameters` methods.

    The parameters of a module that lacks this method keep their values. The new weights depend on
    the seed and the task's name, but not on the order of the tasks.
    """
    for name, decoder in model.decoders.items():
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for module in decoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


@torch.no_grad()
def backbone_maps(backbone: nn.Module, examples: Iterable[tuple[Tensor, dict[str, Tensor]]],
                  amp: torch.dtype | None) -> tuple[list[Tensor], dict[str, Tensor], torch.Size]:
    """Run the backbone on all N examples.

    Returns the maps, one (N, h, w, c) per stage, the labels by task, and the images' (H, W).
    """
    maps_of_batches, labels_of_batches = [], []
    for image, labels in examples:
        with torch.autocast(image.device.type, amp, enabled=amp is not None):
            maps = backbone(image)
        maps_of_batches.append(maps)
        labels_of_batches.append(labels)
    maps = [torch.cat(parts) for parts in zip(*maps_of_batches)]
    labels = {}
    for name in labels_of_batches[0]:
        labels[name] = torch.cat([part[name] for part in labels_of_batches])
    return maps, labels, image.shape[2:]


def finetune_decoders(model: nn.Module, tasks: Sequence,
                      examples: Iterable[tuple[Tensor, dict[str, Tensor]]],
                      batches: Iterable[list[int]], lr: float,
                      amp: torch.dtype | None = None, steps: int | None = None) -> None:
    """Train the decoders of `model` on its frozen backbone with AdamW.

    The maps of a frozen backbone never change, so they are computed once. The maps and the labels
    of all examples are kept in memory, on the device of the images.

    Args:
        examples: pairs of images (B, 3, H, W) and labels by task; read once.
        batches: for each step, the indices of its examples, counted in the order of `examples`.
        lr: learning rate of the first step; it falls linearly towards 0.
        amp: data type for autocast; None for float32.
        steps: number of batches, needed if `batches` has no length.
    """
    if steps is None:
        steps = len(batches)
    with restored(model):
        model.eval()                    # no dropout or drop path in the backbone
        model.requires_grad_(False)
        maps, labels, size = backbone_maps(model.backbone, examples, amp)
        model.decoders.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.decoders.parameters(), lr=lr, fused=True)

        for step, batch in enumerate(batches):
            # The learning rate falls towards 0. Otherwise the noise of the last steps would stay in
            # the decoders and affect the gradients of all examples.
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            batch_maps = [x[batch] for x in maps]
            total = 0
            with torch.autocast(maps[0].device.type, amp, enabled=amp is not None):
                for task in tasks:
                    prediction = model.decoders[task.name](batch_maps, size)
                    loss = task.loss(prediction, labels[task.name][batch])
                    total = total + task.weight * loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        optimizer.zero_grad()


# --- eq. 3 ----------------------------------------------------------------------------------------
class Similarity(NamedTuple):
    """Similarities of all pairs of T tasks; all three arrays are symmetric in the tasks."""

    mean: np.ndarray        # (T, T), eq. 3; ones on the diagonal
    error: np.ndarray       # (T, T), standard error of the mean; NaN for a single example
    samples: np.ndarray     # (N, T, T), eq. 2 of each example; NaN where a label is missing


def task_similarity(model: nn.Module, tasks: Sequence,
                    examples: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Similarity:
    """Similarity of each pair of tasks. `examples` yields (image (1, 3, H, W), labels by task).

    Dropout and drop path are off, and BatchNorm uses its running statistics, so an example's
    gradient depends only on that example. An example counts for a pair of tasks if it is labelled
    for both. Only a few flat gradients (P,) per task are in memory at any time, however many
    examples there are.

    Raises:
        ValueError: if no example is labelled for both tasks of a pair, or a gradient is not finite.
    """
    samples = []
    with restored(model):
        model.eval()
        model.requires_grad_(False)
        model.backbone.requires_grad_(True)
        for image, labels in examples:
            gradients = task_gradients(model, tasks, image, labels)
            sample = np.full((len(tasks), len(tasks)), np.nan)
            for t in gradients:
                sample[t, t] = 1
            for t, u in combinations(gradients, 2):
                value = gradient_similarity(gradients[t], gradients[u]).item()
                if not math.isfinite(value):
                    raise ValueError(f"similarity: the gradient of {tasks[t].name} or "
                                     f"{tasks[u].name} is not finite; lower the learning rate of "
                                     "the decoders (--head-lr)")
                sample[t, u] = sample[u, t] = value
            samples.append(sample)
    return summary(np.array(samples), tasks)


def task_gradients(model: nn.Module, tasks: Sequence, image: Tensor,
                   labels: dict[str, Tensor]) -> dict[int, Tensor]:
    """The gradient (P,) of each task's loss with respect to the backbone, by task index.

    Leaves out the tasks for which the example has no valid label.
    """
    shared = list(model.backbone.parameters())
    predictions = model(image)
    gradients = {}
    for t, task in enumerate(tasks):
        label = labels[task.name]
        if not task.valid(label).any():
            continue
        loss = task.loss(predictions[task.name], label)
        parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if part is None else part for p, part in zip(shared, parts)]
        gradients[t] = torch.cat([part.flatten() for part in parts])
    return gradients


def summary(samples: np.ndarray, tasks: Sequence) -> Similarity:
    """For each pair of tasks, the mean of the examples' values and its standard error.

    samples: (N, T, T), NaN = no value. Raises ValueError if no example has a value for a pair.
    """
    count = (~np.isnan(samples)).sum(0)                         # (T, T)
    for t, u in np.argwhere(count == 0):
        raise ValueError(f"similarity: no example has valid labels for both {tasks[t].name} and "
                         f"{tasks[u].name}; use more examples (--sim-images)")
    mean = np.nanmean(samples, 0)                               # eq. 3
    squares = np.nansum((samples - mean) ** 2, 0)
    freedom = np.where(count > 1, count - 1, np.nan)            # one example has no error
    error = np.sqrt(squares / freedom / count)
    return Similarity(mean, error, samples)


def format_similarity(similarity: Similarity, names: Sequence[str]) -> str:
    """A table of mean +- standard error."""
    rows = [["", *names]]
    for t, name in enumerate(names):
        cells = []
        for mean, error in zip(similarity.mean[t], similarity.error[t]):
            cells.append(f"{mean:.4f} +- {error:.4f}")
        cells[t] = "1"
        rows.append([name, *cells])
    margin = max(len(name) for name in names)
    width = 2 + max(len(cell) for row in rows for cell in row)
    lines = []
    for name, *cells in rows:
        lines.append(name.ljust(margin) + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)
