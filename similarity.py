"""How similar are two tasks? The mean cosine of their gradients on the shared backbone.

Decoders are first trained for a while on the frozen backbone, because gradients through random
ones say little (section 4.4). Then, example by example, each task's loss is differentiated with
respect to all backbone weights, and the gradients are compared (eq. 1-3):

    sim(t, t') = 1/N  sum_i  cos( g / (|g| + |g'|), g' / (|g| + |g'|) )

Eq. 2 prints the norm ||g|| there, by which the fraction would change nothing: a cosine ignores
scale. The measure it cites (Task2Vec, arXiv 1902.03545, 3.3) divides element by element, which
keeps a few large weights from deciding alone; that is the default, "none" is the plain cosine.

Shapes: B batch, T tasks, P backbone parameters.
References: arXiv 2509.19602, sections 3.1 and 4.4.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def gradient_similarity(g: Tensor, g_other: Tensor, normalize: str = "elementwise") -> Tensor:
    """Similarity of two flat gradients (P,), -1 to 1 (eq. 2); normalize: "elementwise" | "none"."""
    if normalize == "elementwise":
        scale = g.abs() + g_other.abs()
        scale = torch.where(scale > 0, scale, 1.0)  # where both are 0, both stay 0
        g, g_other = g / scale, g_other / scale
    elif normalize != "none":
        raise ValueError(f"normalize: expected elementwise or none, got {normalize!r}")
    dot, square, square_other = ((a * b).sum(dtype=torch.float64)  # millions of small terms
                                 for a, b in ((g, g_other), (g, g), (g_other, g_other)))
    return dot / (square * square_other).sqrt().clamp(min=1e-30)


def finetune_decoders(model: nn.Module, tasks: list, batches: Iterable, lr: float) -> None:
    """Train the decoders of `model` on its frozen backbone, one step a batch of (image, labels)."""
    optimizer = torch.optim.AdamW(model.decoders.parameters(), lr=lr)
    model.train()
    model.backbone.requires_grad_(False).eval()  # no drop path either
    for image, labels in batches:
        predictions = model(image)
        loss = sum(task.weight * task.loss(predictions[task.name], labels[task.name])
                   for task in tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def task_similarity(model: nn.Module, tasks: list, examples: Iterable,
                    normalize: str = "elementwise") -> np.ndarray:
    """Mean similarity of every pair of tasks over `examples` of (image (1, 3, H, W), labels).

    Dropout and drop path are off and BatchNorm uses its running statistics, so an example's
    gradient depends on it alone. An example counts for a pair when both tasks have valid pixels.
    One flat gradient (P,) a task is in memory, whatever N is. Returns (T, T) float64, symmetric,
    ones on the diagonal. Raises ValueError when a pair of tasks shares no labelled example.
    """
    T = len(tasks)
    total, count = np.zeros((T, T)), np.zeros((T, T))
    model.eval()
    shared = list(model.backbone.requires_grad_(True).parameters())
    for image, labels in examples:
        predictions = model(image)
        gradients = []
        for task in tasks:
            label = labels[task.name]
            if not task.valid(label).any():
                gradients.append(None)
                continue
            loss = task.loss(predictions[task.name], label)
            parts = torch.autograd.grad(loss, shared, retain_graph=True)
            gradients.append(torch.cat([g.flatten() for g in parts]))  # (P,)
        for t in range(T):
            for u in range(t, T):
                if gradients[t] is not None and gradients[u] is not None:
                    s = 1.0 if t == u else gradient_similarity(
                        gradients[t], gradients[u], normalize).item()
                    total[[t, u], [u, t]] = total[t, u] + s
                    count[[t, u], [u, t]] = count[t, u] + 1
    model.backbone.requires_grad_(False)
    for t, u in np.argwhere(count == 0):
        raise ValueError(f"similarity: no example has valid labels for both {tasks[t].name} and "
                         f"{tasks[u].name}; use more images (--sim-images) or give --tree FILE")
    return total / count


def format_similarity(sim: np.ndarray, names: list[str]) -> str:
    """The matrix as text, one row a task."""
    width = max(map(len, names)) + 2
    head = " " * width + "".join(f"{name:>{width}}" for name in names)
    rows = (f"{name:<{width}}" + "".join(f"{s:>{width}.4f}" for s in row)
            for name, row in zip(names, sim))
    return "\n".join([head, *rows])
