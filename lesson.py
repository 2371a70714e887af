"""TGLoRA (Task-Grouped LoRA) in one file, in plain PyTorch. Read this file first.

    python lesson.py            # prints the results of each cell, in less than a minute

The cells begin with `# %%`, so editors such as VS Code can run them from top to bottom, as a
notebook. Nothing here comes from tglora.py, similarity.py, grouping.py, model.py or train.py. This
file writes the method out as simply as possible, and tests check that those files give the same
numbers.

The method: several tasks share one pretrained backbone, which is frozen. The linear layers of its
blocks get small trainable matrices, the adapters. In the first stage all tasks share one set of
adapters; from stage to stage the tasks split into groups of similar tasks, and each group has its
own set.

Reference: arXiv 2509.19602. Equation, section and algorithm numbers are the paper's.
"""

# %% Setup
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import rooms
from swin import build_swin

# Double precision, so that two ways of computing the same number agree to many digits.
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(0)

TASKS = ["semseg", "edge", "depth", "normals"]
OUTPUTS = {"semseg": 7, "edge": 1, "depth": 1, "normals": 3}    # numbers predicted per pixel
WEIGHT = {"semseg": 1, "edge": 50, "depth": 1, "normals": 10}   # weight of each loss (eq. 8)
SIZE = 64                                                       # height and width of the images

# %% 1. A room and its labels
# rooms.py renders small pictures of rooms with a person, boxes, spheres and cylinders. Because they
# are rendered, we know the ground truth of every pixel: its class, whether it lies on an edge, its
# depth and its surface normal.


def load_rooms(first, count):
    """Render `count` rooms, starting at room `first`: images (count, 3, H, W), labels by task."""
    # A seed defines a room: (0, 0, i) is the seed of room i of the training split.
    samples = [rooms.render_room((0, 0, i), SIZE, SIZE) for i in range(first, first + count)]
    image = torch.stack([sample["image"] for sample in samples]) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)    # normalise as for ImageNet
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    labels = {}
    for task in TASKS:
        label = torch.stack([sample[task] for sample in samples])
        is_classes = task in ("semseg", "edge")
        labels[task] = label.long() if is_classes else label.to(torch.get_default_dtype())
    return (image - mean) / std, labels


image, labels = load_rooms(0, 16)
print("1. A batch of rooms:", tuple(image.shape))
for task in TASKS:
    print(f"   {task:<8} label {tuple(labels[task].shape)}, from {labels[task].min():.1f} "
          f"to {labels[task].max():.1f}")

# %% 2. The frozen backbone
# The backbone is a small Swin Transformer. It cuts the image into patches of 4x4 pixels, which pass
# through four stages. Each of the first three stages ends by merging 2x2 neighbours, so the maps
# shrink and gain channels; the shapes printed below are those after the merging. The backbone was
# pretrained on other rooms, to find their classes, their edges and the salient object. We never
# change its weights.

backbone = build_swin("mini")
weights = torch.load(Path(rooms.__file__).parent / "assets/rooms_mini.pth", weights_only=True)
backbone.load_state_dict(weights)
backbone.to(torch.get_default_dtype()).eval().requires_grad_(False)

print("\n2. The four maps of the backbone (batch, height, width, channels):")
for i, feature_map in enumerate(backbone(image)):
    print(f"   stage {i + 1}: {tuple(feature_map.shape)}")

# %% 3. One decoder per task
# A decoder turns the four maps into a prediction. It projects each map to a few channels, enlarges
# the results to the size of the first map, and mixes them with two 1x1 convolutions.


class Decoder(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        channels, fused = backbone.channels, (6, 12, 24, 48)
        self.fuse = nn.ModuleList(nn.Conv2d(c, f, 1, bias=False) for c, f in zip(channels, fused))
        width = sum(fused)
        self.head = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width),
                                  nn.ReLU(), nn.Conv2d(4 * width, outputs, 1))

    def forward(self, maps):
        parts = []
        for project, x in zip(self.fuse, maps):
            x = project(x.permute(0, 3, 1, 2))                  # (B, f, h, w)
            size = parts[0].shape[2:] if parts else x.shape[2:]
            parts.append(F.interpolate(x, size, mode="bilinear"))
        x = self.head(torch.cat(parts, 1))
        return F.interpolate(x, (SIZE, SIZE), mode="bilinear")  # (B, outputs, H, W)


def loss_of(task, pred, label):
    """The loss of a task, averaged over pixels. (Every pixel of a rendered room has a label.)"""
    if task == "semseg":                        # which class? cross-entropy
        return F.cross_entropy(pred, label)
    if task == "edge":                          # edges are rare, so they weigh more
        weight = torch.where(label == 1, 0.95, 0.05)
        return F.binary_cross_entropy_with_logits(pred[:, 0], label.to(pred.dtype), weight)
    if task == "depth":                         # mean absolute error in metres
        return (pred - label).abs().mean()
    return (F.normalize(pred, dim=1) - label).abs().mean()      # normals: vectors of length 1


decoders = nn.ModuleDict({task: Decoder(OUTPUTS[task]) for task in TASKS})

# Gradients that reach the backbone through an untrained decoder are mostly noise. So the decoders
# are trained first (section 4.4). The maps of the frozen backbone never change, so we compute them
# only once.
maps = backbone(image)
optimizer = torch.optim.AdamW(decoders.parameters(), lr=5e-3)
for step in range(30):
    total = sum(WEIGHT[t] * loss_of(t, decoders[t](maps), labels[t]) for t in TASKS)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    if step in (0, 29):
        print(f"\n3. Training decoders, step {step + 1}: loss {total.item():.2f}", end="")
print()

# %% 4. How similar are two tasks? (eq. 1 to 3)
# Take one image and one task, and ask: in which direction would this task change the backbone's
# weights? Against the gradient of its loss. If two tasks would change the weights in the same
# direction, sharing weights should help both. So we measure the cosine of the angle between their
# gradients.

decoders.eval()                                 # BatchNorm uses its running statistics
backbone.requires_grad_(True)                   # only to get gradients; nothing is updated
backbone_weights = list(backbone.parameters())


def gradient(task, i):
    """The gradient of a task's loss on image i with respect to all backbone weights, flattened
    to one vector of P numbers."""
    pred = decoders[task](backbone(image[i:i + 1]))
    loss = loss_of(task, pred, labels[task][i:i + 1])
    parts = torch.autograd.grad(loss, backbone_weights)
    return torch.cat([part.flatten() for part in parts])


def cosine(g, g_other):
    """Eq. 2 as printed: divide both gradients by ||g|| + ||g'||, then take their cosine. The
    division does not change the cosine."""
    scale = g.norm() + g_other.norm()
    g, g_other = g / scale, g_other / scale
    return (g @ g_other) / (g.norm() * g_other.norm())


T, N = len(TASKS), len(image)
samples = torch.ones(N, T, T)                   # one similarity matrix per image
for i in range(N):
    gradients = [gradient(task, i) for task in TASKS]           # eq. 1
    for t, u in combinations(range(T), 2):
        samples[i, t, u] = samples[i, u, t] = cosine(gradients[t], gradients[u])
similarity = samples.mean(0)                    # eq. 3: the mean over images
backbone.requires_grad_(False)

print(f"\n4. Similarity: the mean cosine of gradients with {len(gradients[0]):,} entries")
for t in range(T):
    print(f"   {TASKS[t]:<8}" + "".join(f"{value:8.3f}" for value in similarity[t]))

# %% 5. Who shares with whom? (eq. 5, eq. 6 and Algorithm 1)
# A partition puts the tasks into groups. In a good partition, each task is similar to the others in
# its group.


def score(partition):
    """Eq. 5 and 6: each task's mean similarity to the others in its group, summed over tasks."""
    total = 0
    for group in partition:
        for t in group:
            others = [u for u in group if u != t]
            if others:                          # a task that is alone scores 0
                affinity = sum(similarity[t, u] for u in others) / len(others)      # eq. 5
                total += affinity                                                   # eq. 6
    return float(total)


def partitions(tasks):
    """Every way to split `tasks` into groups: the first task is alone, or joins a group of the
    others."""
    if not tasks:
        yield []
        return
    first, rest = tasks[0], tasks[1:]
    for partition in partitions(rest):
        yield [(first,), *partition]
        for i, group in enumerate(partition):
            yield [(first, *group), *partition[:i], *partition[i + 1:]]


def show(partition):
    return " ".join("{" + ", ".join(TASKS[t] for t in group) + "}" for group in partition)


# If the last stage has fewer groups than tasks, it gets the partition with the highest score. For
# example, with two groups:
print("\n5. All partitions of the tasks into two groups, best first:")
two_groups = [p for p in partitions(tuple(range(T))) if len(p) == 2]
for partition in sorted(two_groups, key=score, reverse=True):
    print(f"   {score(partition):6.3f}  {show(partition)}")

# Our tree has 1, 2, 3 and 4 groups in its four stages (section 4.4). It is built from the last
# stage to the first. In the last stage every task is alone. Algorithm 1 then merges two groups at a
# time: the pair that gives the partition with the highest score. Tasks that are together in a stage
# are therefore together in every earlier stage. (As printed, Algorithm 1 only accepts scores above
# 0, so it would find nothing if all similarities were negative. `max` has no such limit.)
partition = [(t,) for t in range(T)]
tree = [partition]
while len(partition) > 1:
    candidates = []
    for a, b in combinations(partition, 2):
        others = [group for group in partition if group not in (a, b)]
        candidates.append(sorted([*others, tuple(sorted(a + b))]))
    partition = max(candidates, key=score)
    tree.insert(0, partition)

print("   The tree:")
for stage, partition in enumerate(tree):
    print(f"   stage {stage + 1}  {show(partition)}")

# %% 6. The adapter (eq. 4)
# A linear layer computes y = W x + b. We leave W and b as they are and add a product of two thin
# matrices: y = W x + b + gamma B (A x). A maps the input to r numbers, B maps them to the output
# size. B starts at zero, so at first the adapted layer's output is that of the frozen layer.

GAMMA, RANK = 4, 12                             # RANK is divided among the groups of a stage


class AdaptedLinear(nn.Module):
    """A frozen linear layer with one adapter per group; `group` selects the active one."""

    def __init__(self, linear, ranks):
        super().__init__()
        self.linear = linear
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for rank in ranks:
            self.A.append(torch.randn(rank, linear.in_features) / linear.in_features ** 0.5)
            self.B.append(torch.zeros(linear.out_features, rank))
        self.group = 0

    def forward(self, x):
        A, B = self.A[self.group], self.B[self.group]
        return self.linear(x) + GAMMA * (x @ A.T) @ B.T         # eq. 4


linear = backbone.layers[0].blocks[0].attn.qkv
adapted = AdaptedLinear(linear, [RANK])
x = torch.randn(1, linear.in_features)
print(f"\n6. One linear layer: W is {tuple(linear.weight.shape)} and frozen, "
      f"A {tuple(adapted.A[0].shape)} and B {tuple(adapted.B[0].shape)} are trained")
print("   before training, the adapter changes the output by",
      (adapted(x) - linear(x)).abs().max().item())
nn.init.ones_(adapted.B[0])
print("   with all of B set to 1, it changes the output by up to "
      f"{(adapted(x) - linear(x)).abs().max().item():.2f}")

# %% 7. The path of one task through the tree
# Each of the four linear layers in every block gets one adapter per group of its stage. The groups
# divide the combined rank in proportion to their number of tasks (section 4.3).

for stage, partition in zip(backbone.layers, tree):
    ranks = [RANK * len(group) // T for group in partition]
    for block in stage.blocks:
        block.attn.qkv = AdaptedLinear(block.attn.qkv, ranks)
        block.attn.proj = AdaptedLinear(block.attn.proj, ranks)
        block.mlp.fc1 = AdaptedLinear(block.mlp.fc1, ranks)
        block.mlp.fc2 = AdaptedLinear(block.mlp.fc2, ranks)


def walk(task, image, verbose=False):
    """The prediction of one task, computed with the adapters of its group in every stage."""
    x, maps = backbone.patch_embed(image), []
    for stage, partition in zip(backbone.layers, tree):
        group = next(group for group in partition if TASKS.index(task) in group)
        for module in stage.modules():
            if isinstance(module, AdaptedLinear):
                module.group = partition.index(group)
        x = stage(x)
        maps.append(x)
        if verbose:
            print(f"   stage {len(maps)}: adapters of {show([group])}, map {tuple(x.shape)}")
    return decoders[task](maps)


print("\n7. The path of normals:")
walk("normals", image[:4], verbose=True)

# %% 8. Training (eq. 8)
# The total loss is the weighted sum of the tasks' losses. Only the adapters and the decoders are
# trained.

decoders.train()
trained = [p for p in backbone.parameters() if p.requires_grad]    # the adapters
trained += list(decoders.parameters())
optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0)

print("\n8. Training adapters and decoders:")
for step in range(10):
    losses = {t: loss_of(t, walk(t, image), labels[t]) for t in TASKS}
    total = sum(WEIGHT[t] * losses[t] for t in TASKS)           # eq. 8
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    if step % 3 == 0:
        print(f"   step {step + 1:2}: total {total.item():6.3f}   "
              + "  ".join(f"{t} {losses[t].item():.3f}" for t in TASKS))

# %% 9. The trick in tglora.py: groups are folded into the batch
# Running the backbone once per task is wasteful: tasks that share a group repeat the same work, and
# every layer is called four times on a small batch. But W is the same for all groups. So each stage
# runs once, on one batch of G * B images that holds its groups one after another. With our tree,
# four large calls process 1 + 2 + 3 + 4 = 10 times B images, instead of sixteen small calls with B
# images each. Norms, attention and W x work unchanged. Inside a stage, only the adapters take the
# batch apart.


def folded_forward(self, x):
    """Eq. 4 for all groups at once. The first dimension of x holds the groups one after another."""
    y = self.linear(x)                                          # W x for all groups
    parts = x.chunk(len(self.A))                                # x_g for each group g
    low_rank = [GAMMA * (x_g @ A.T) @ B.T for x_g, A, B in zip(parts, self.A, self.B)]
    return y + torch.cat(low_rank)


def predict_folded(image):
    """The predictions of all tasks, with all groups of a stage in one batch."""
    B = len(image)
    x = backbone.patch_embed(image)                             # one group of all tasks
    before, maps = [tuple(range(T))], {task: [] for task in TASKS}
    print("   image", tuple(image.shape))
    for i, (stage, partition) in enumerate(zip(backbone.layers, tree)):
        parts = x.split(B)                                      # the groups of the previous stage
        branches = []
        for group in partition:                                 # each continues from its parent
            parent = next(g for g, larger in enumerate(before) if set(group) <= set(larger))
            branches.append(parts[parent])
        x = stage(torch.cat(branches))                          # (G * B, h, w, c)
        print(f"   stage {i + 1}: {len(partition)} x {B} images -> {tuple(x.shape)}")
        for group, part in zip(partition, x.split(B)):
            for t in group:
                maps[TASKS[t]].append(part)
        before = partition
    return {task: decoders[task](maps[task]) for task in TASKS}


decoders.eval()
with torch.no_grad():
    one_by_one = {task: walk(task, image[:4]) for task in TASKS}
    AdaptedLinear.forward = folded_forward      # from here on, one call serves all groups
    print("\n9. All tasks in one folded batch:")
    together = predict_folded(image[:4])
for task in TASKS:
    difference = (one_by_one[task] - together[task]).abs().max().item()
    print(f"   {task:<8} predictions differ by at most {difference:.0e}")
    assert difference < 1e-10
