"""Another way to measure how similar tasks are: does a step for one task help the other?

For a batch of examples, let L_j be the loss of task j. A gradient step with the loss of task i
changes the weights w of the shared backbone, and with them the losses of all tasks:

    w_i = w - lr * grad L_i(w)
    Z[i -> j] = 1 - L_j(w_i) / L_j(w)       above 0 if the step of task i helps task j
    affinity(i, j) = (Z[i -> j] + Z[j -> i]) / 2, averaged over the batches

The tree is then built from the affinities, as train.py builds it from the gradient similarities.
The decoders are trained first, as in train.py, and the examples are the same as for the similarity.
The step changes only the backbone. To first order, Z[i -> j] is lr * <g_i, g_j> / L_j, where g_i is
the gradient of L_i with respect to w. Unlike a cosine, this also depends on the gradients' lengths.

    python -m extras.lookahead --out runs/lookahead         # takes the flags of train.py
    python train.py --tree runs/lookahead/tree.json

Shapes: B batch, T tasks, P backbone parameters.
Reference: Fifty et al., Efficiently Identifying Task Groupings for Multi-Task Learning, NeurIPS
2021. In that paper, the affinity is averaged over the training steps. Here it is measured once,
like the similarity.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import CLASSES, open_dataset
from grouping import build_tree, format_tree, name_tree
from recipes import parse_arguments
from similarity import Similarity, format_similarity, restored, summary, task_gradients
from tasks import make_tasks
from train import make_folder, similarity_batches, state_to_continue, train_decoders
from util import one_line_errors, pick_device, write_json

# The learning rate `lr` of the step. On rooms, the first-order formula roughly holds at this rate:
# with a tenth of it, affinity / lr changes by at most a sixth. With ten times this rate, some
# affinities change their sign.
STEP = 1e-3


@torch.no_grad()
def task_losses(model: nn.Module, tasks: Sequence, image: Tensor,
                labels: dict[str, Tensor]) -> list[float]:
    """The loss of each task on one batch."""
    predictions = model(image)
    return [task.loss(predictions[task.name], labels[task.name]).item() for task in tasks]


def lookahead_affinity(model: nn.Module, tasks: Sequence,
                       batches: Iterable[tuple[Tensor, dict[str, Tensor]]],
                       lr: float = STEP) -> Similarity:
    """Affinity of every pair of tasks over batches of (image (B, 3, H, W), labels).

    The affinities are the `mean` of the result, with ones on the diagonal. The model runs in eval
    mode, and its weights are restored after each batch. A batch counts for a pair if it has labels
    for both tasks.

    Raises:
        ValueError: if no batch has labels for both tasks of a pair, or if a loss is not finite.
    """
    samples = []
    shared = list(model.backbone.parameters())
    with restored(model):
        model.eval()
        model.requires_grad_(False)
        model.backbone.requires_grad_(True)
        weights = nn.utils.parameters_to_vector(shared).detach()        # (P,), a copy
        for image, labels in batches:
            gradients = task_gradients(model, tasks, image, labels)
            before = np.array(task_losses(model, tasks, image, labels))
            gain = np.full((len(tasks), len(tasks)), np.nan)            # Z
            for i in gradients:
                nn.utils.vector_to_parameters(weights - lr * gradients[i], shared)
                after = np.array(task_losses(model, tasks, image, labels))
                for j in gradients:
                    gain[i, j] = 1 - after[j] / before[j]
                    if not np.isfinite(gain[i, j]):
                        raise ValueError(f"the loss of {tasks[j].name} is not finite after a step "
                                         f"for {tasks[i].name}; lower the learning rate of the "
                                         "decoders (--head-lr)")
            nn.utils.vector_to_parameters(weights, shared)
            affinity = (gain + gain.T) / 2
            affinity[list(gradients), list(gradients)] = 1
            samples.append(affinity)
    return summary(np.array(samples), tasks)


def run(config: argparse.Namespace) -> dict:
    """Measure the affinities, build the tree and write tree.json; returns the content of the file.

    config: the settings of a run (recipes.py). Raises ValueError if the folder `config.out` exists
    or a setting is wrong.
    """
    out = Path(config.out)
    state_to_continue(config, out)          # refuses an existing folder before any work
    device = pick_device(config.device)
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    train_set = open_dataset(config, "train")
    model = train_decoders(config, tasks, train_set, device)
    batches = similarity_batches(config, train_set, config.batch_size, device, "look-ahead")
    affinity = lookahead_affinity(model, tasks, batches)
    print(format_similarity(affinity, config.tasks))

    tree = build_tree(affinity.mean, config.groups)
    print(format_tree(tree, config.tasks))
    saved = {"tasks": config.tasks, **affinity.as_json(), "tree": name_tree(tree, config.tasks)}
    make_folder(out)
    write_json(out / "tree.json", saved)
    return saved


def main(argv: list[str] | None = None) -> dict:
    """The command line, with the flags of train.py. Returns the content of tree.json."""
    with one_line_errors():
        return run(parse_arguments(argv))


if __name__ == "__main__":
    main()
