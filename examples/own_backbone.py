"""TGLoRA on your own backbone: here torchvision's ViT is cut into four stages of three blocks.

    python -m examples.own_backbone

First measure how similar your tasks are, on the network without adapters; then build the tree; then
add the adapters. (In the other order, the gradients of the adapters would enter the similarity.)
Only linear layers can be adapted, and only those that the model calls. ViT's attention reads its
weights directly, so this example adapts only the MLPs. Nothing from model.py or swin.py is needed.

Shapes: B batch, G groups, L tokens, C channels.
"""

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from grouping import build_tree, format_tree, routing
from similarity import format_similarity, task_similarity
from tglora import add_adapters, freeze, merge, run_stages, split_rank


class Classify:
    """A task with ten classes. `task_similarity` needs a task's `name`, `valid` and `loss`."""

    def __init__(self, name: str):
        self.name = name

    def valid(self, label: Tensor) -> Tensor:
        return label >= 0

    def loss(self, pred: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(pred, label)


class MultiTaskViT(nn.Module):
    """A small ViT with one linear head per task. Your backbone would have pretrained weights."""

    def __init__(self, tasks: list):
        super().__init__()
        self.backbone = VisionTransformer(32, patch_size=8, num_layers=12, num_heads=2,
                                          hidden_dim=32, mlp_dim=64)
        blocks = self.backbone.encoder.layers
        self.stages = [blocks[0:3], blocks[3:6], blocks[6:9], blocks[9:12]]
        self.heads = nn.ModuleDict({task.name: nn.Linear(32, 10) for task in tasks})
        everyone = [tuple(range(len(tasks)))]
        self.parents, self.group_of = routing([everyone] * 4)   # one group until there is a tree

    def branch(self, tree: list, rank: int) -> None:
        """Give each group of each stage its adapters; in a layer, their ranks sum to `rank`."""
        for stage, partition in zip(self.stages, tree):
            ranks = split_rank(rank, [len(group) for group in partition])
            add_adapters(stage, ("mlp.0", "mlp.3"), ranks)
        freeze(self.backbone)                                   # except the adapters
        self.parents, self.group_of = routing(tree)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """image (B, 3, 32, 32) -> {task: logits (B, 10)}."""
        vit = self.backbone
        x = vit._process_input(image)                           # (B, L, C)
        token = vit.class_token.expand(len(x), -1, -1)
        x = torch.cat([token, x], 1) + vit.encoder.pos_embedding
        maps = run_stages(self.stages, x, self.parents)         # four (G, B, L, C)
        features = vit.encoder.ln(maps[-1])[:, :, 0]            # (G, B, C): the class tokens
        predictions = {}
        for (name, head), groups in zip(self.heads.items(), self.group_of):
            predictions[name] = head(features[groups[-1]])
        return predictions


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tasks = [Classify("shape"), Classify("colour"), Classify("texture")]
    names = [task.name for task in tasks]
    model = MultiTaskViT(tasks)

    # This data is random. With your data, train the heads before you measure the similarity.
    examples = []
    for _ in range(20):
        labels = {name: torch.randint(10, (1,)) for name in names}
        examples.append((torch.randn(1, 3, 32, 32), labels))
    similarity = task_similarity(model, tasks, examples)
    print(format_similarity(similarity, names))

    tree = build_tree(similarity.mean, (1, 1, 2, 3))            # number of groups in each stage
    print(format_tree(tree, names))
    model.branch(tree, rank=12)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    image, labels = torch.randn(8, 3, 32, 32), {name: torch.randint(10, (8,)) for name in names}
    for step in range(20):
        predictions = model(image)
        loss = sum(task.loss(predictions[task.name], labels[task.name]) for task in tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    merge(model.eval())                                         # fold the adapters into the weights
    with torch.no_grad():
        return model(image)


if __name__ == "__main__":
    main()
