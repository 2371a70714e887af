"""TGLoRA (Task-Grouped LoRA) in one file, in plain PyTorch. Read this file first.

    python lesson.py    # prints the results of each cell, and draws pictures in runs/lesson

The cells begin with `# %%`, so editors such as VS Code can run them from top to bottom, as a
notebook. It takes less than a minute on a CPU, and docs/LESSON.md shows it with its output and
pictures. Nothing here comes from tglora.py, similarity.py, grouping.py, model.py or train.py. This
file writes the method out as simply as possible, and tests check that those files give the same
numbers.

The method: several tasks share one pretrained backbone, which is frozen. The linear layers of its
blocks get small trainable matrices, the adapters. In the first stage all tasks share one set of
adapters; from stage to stage the tasks split into groups of similar tasks, and each group has its
own set.

Reference: arXiv 2509.19602. Equation, section and algorithm numbers are the paper's.
"""

# %% Setup
import json
from copy import deepcopy
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import rooms
from report import draw_grid, draw_tree
from swin import build_swin
from tasks import make_tasks

torch.set_num_threads(1)
torch.manual_seed(0)

# The four tasks: which class is each pixel, is it on an edge, how far away is it, and in which
# direction does its surface face? (`python train.py` has two other tasks, human_parts and sal, in
# place of semseg and edge.)
TASKS = ["semseg", "edge", "depth", "normals"]
OUTPUTS = {"semseg": 7, "edge": 1, "depth": 1, "normals": 3}    # numbers predicted per pixel
WEIGHT = {"semseg": 1, "edge": 50, "depth": 1, "normals": 10}   # weight of each loss (eq. 8)
SIZE = 112                                                      # height and width of the images
TRAIN, VAL = 192, 64                                            # rooms for training, validation
BATCH, STEPS = 4, 96                                            # two passes over the training rooms

PICTURES = Path("runs/lesson")
PICTURES.mkdir(parents=True, exist_ok=True)
drawn_tasks = make_tasks(TASKS, rooms.ROOM_CLASSES)             # they turn numbers into colours


def row(name, picture, values):
    """One row of a figure: a picture and, for each task, its label or prediction in colours."""
    return name, [picture, *(task.colours(values[task.name].float()) for task in drawn_tasks)]


# %% 1. Rooms at night and their labels
# rooms.py renders small pictures of rooms with a person, boxes, spheres and cylinders. Our camera
# works at night, so the pictures are dark and noisy. Because they are rendered, we know the ground
# truth of every pixel: its class, whether it lies on an edge, its depth and its surface normal.


def load_rooms(count):
    """Render `count` rooms: images (count, 3, H, W), and labels by task."""
    # A seed defines a room: (0, 0, i) is the seed of room i of the training split.
    samples = [rooms.render_room((0, 0, i), SIZE, SIZE, night=True) for i in range(count)]
    image = torch.stack([sample["image"] for sample in samples]) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)    # normalise as for ImageNet
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    labels = {}
    for task in TASKS:
        label = torch.stack([sample[task] for sample in samples])
        is_classes = task in ("semseg", "edge")
        labels[task] = label.long() if is_classes else label.float()
    return (image - mean) / std, labels


image, labels = load_rooms(TRAIN + VAL)
print("1. The rooms:", tuple(image.shape))
for task in TASKS:
    print(f"   {task:<8} label {tuple(labels[task].shape)}, from {labels[task].min():.1f} "
          f"to {labels[task].max():.1f}")

by_day = rooms.render_room((0, 0, 0), SIZE, SIZE)["image"] / 255
at_night = rooms.render_room((0, 0, 0), SIZE, SIZE, night=True)
draw_grid(PICTURES / "rooms.png", ["image", *TASKS],
          [("by day", [by_day] + [None] * 4), row("at night", at_night["image"] / 255, at_night)],
          drawn_tasks)

# %% 2. The frozen backbone
# The backbone is a small Swin Transformer. It cuts the image into patches of 4x4 pixels, which pass
# through four stages. Each of the first three stages ends by merging 2x2 neighbours, so the maps
# shrink and gain channels; the shapes printed below are those after the merging. The backbone was
# pretrained on other rooms, to find their classes, their edges and the salient object. We never
# change its weights. But all those rooms were photographed by day. It has never seen a dark, noisy
# image, so at night its maps are not good enough. This is what adapters can improve.

backbone = build_swin("mini")
weights = torch.load(Path(rooms.__file__).parent / "assets/rooms_mini.pth", weights_only=True)
backbone.load_state_dict(weights)
backbone.eval().requires_grad_(False)
frozen_maps = backbone(image)                   # they never change, so we compute them only once

print("\n2. The four maps of the backbone (images, height, width, channels):")
for i, feature_map in enumerate(frozen_maps):
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
            x = project(x.permute(0, 3, 1, 2))                  # (n, f, h, w)
            size = parts[0].shape[2:] if parts else x.shape[2:]
            parts.append(F.interpolate(x, size, mode="bilinear"))
        x = self.head(torch.cat(parts, 1))
        return F.interpolate(x, (SIZE, SIZE), mode="bilinear")  # (n, outputs, H, W)


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


def new_decoders():
    return nn.ModuleDict({task: Decoder(OUTPUTS[task]) for task in TASKS})


def frozen_maps_of(which):
    """The frozen backbone's maps for the rooms image[which]. All tasks get the same maps."""
    maps = [feature_map[which] for feature_map in frozen_maps]
    return dict.fromkeys(TASKS, maps)


def losses_of(decoders, maps_of, which):
    """The loss of each task on the rooms image[which]; maps_of(which) returns each task's maps."""
    maps = maps_of(which)
    return {task: loss_of(task, decoders[task](maps[task]), labels[task][which]) for task in TASKS}


def weighted_sum(losses):
    return sum(WEIGHT[task] * losses[task] for task in TASKS)   # eq. 8


def fit(decoders, adapters, maps_of, steps):
    """Train on the training rooms, and print the mean loss in each quarter of the steps."""
    trained = [{"params": decoders.parameters()}, {"params": adapters}]
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    # Two learning rates, for decoders and for adapters. They start low, peak at these values after
    # a tenth of the steps, and fall to almost 0.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 3e-3],
                                                   total_steps=steps, pct_start=0.1)
    decoders.train()
    history = []
    for step in range(steps):
        first = step * BATCH % TRAIN
        total = weighted_sum(losses_of(decoders, maps_of, slice(first, first + BATCH)))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        history.append(total.item())
    decoders.eval()                             # from here on, BatchNorm uses running statistics
    quarters = torch.tensor(history).view(4, -1).mean(1)
    print("   training loss:" + "".join(f"{loss:7.2f}" for loss in quarters))


# Gradients that reach the backbone through an untrained decoder are mostly noise. So the decoders
# are trained first, with one pass over the training rooms (section 4.4).
print("\n3. Training decoders:")
decoders = new_decoders()
fit(decoders, [], frozen_maps_of, STEPS // 2)

# %% 4. How similar are two tasks? (eq. 1 to 3)
# Take one image and one task, and ask: in which direction would this task change the backbone's
# weights? Against the gradient of its loss. If two tasks would change the weights in the same
# direction, sharing weights should help both. So we measure the cosine of the angle between their
# gradients, on 16 of the training rooms. As in the paper, the gradients of all weights of the
# backbone count, although only adapters will be trained, and one similarity serves all stages.

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
    """Eq. 2, without its scaling of both gradients by 1 / (||g|| + ||g'||): a cosine does not
    depend on the lengths of its vectors."""
    return (g @ g_other) / (g.norm() * g_other.norm())


T, N = len(TASKS), 16
samples = torch.ones(N, T, T)                   # one similarity matrix per image
for i in range(N):
    gradients = [gradient(task, i) for task in TASKS]           # eq. 1
    for t, u in combinations(range(T), 2):
        samples[i, t, u] = samples[i, u, t] = cosine(gradients[t], gradients[u])
similarity = samples.mean(0)                    # eq. 3: the mean over images
standard_error = samples.std(0) / N ** 0.5      # of the mean (16 images give only a rough one)
backbone.requires_grad_(False)

print(f"\n4. Similarity: the mean cosine of gradients with {len(gradients[0]):,} entries")
for t, u in combinations(range(T), 2):
    print(f"   {TASKS[t]:<8} {TASKS[u]:<8} {similarity[t, u]:6.3f} +- {standard_error[t, u]:.3f}")
g, g_other = gradients[2:]                      # of depth and normals
scale = g.norm() + g_other.norm()
print(f"   Depth and normals on one image: {cosine(g, g_other):.4f}, "
      f"with the scaling of eq. 2 {cosine(g / scale, g_other / scale):.4f}")

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
# are therefore together in every earlier stage. They have to be: a group has a single input, which
# its tasks share from the first stage on.
# Algorithm 1 has two misprints. It only accepts scores above 0, so it would find nothing if all
# similarities were negative. And each merge starts again from the first partition, P, where the
# latest one, Q, must be meant. Otherwise a second merge would undo the first.
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

# The paper builds such trees for PASCAL and NYUD-v2 (figure 4). When it then swaps two tasks so
# that less similar ones share adapters, TGLoRA's gain on PASCAL falls from 3.97 to 3.14 percent
# (tables 1 and 4).
names = [[[TASKS[t] for t in group] for group in partition] for partition in tree]
(PICTURES / "tree.json").write_text(json.dumps({
    "tasks": TASKS, "tree": names, "similarity": similarity.tolist(),
    "standard_error": standard_error.tolist()}))
draw_tree(PICTURES / "tree.png", PICTURES / "tree.json")

# %% 6. The adapter (eq. 4)
# A linear layer computes y = W x + b. We leave W and b as they are and add a product of two thin
# matrices: y = W x + b + gamma B (A x). A maps the input to r numbers, B maps them to the output
# size. Together they have r (inputs + outputs) numbers, W has inputs times outputs. B starts at
# zero, so at first the adapted layer's output is that of the frozen layer. A starts at random:
# if both were zero, neither would get a gradient.

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
A, B = adapted.A[0], adapted.B[0]
print(f"\n6. One linear layer: W is {tuple(linear.weight.shape)} and frozen, A {tuple(A.shape)} "
      f"and B {tuple(B.shape)} are trained")
print("   before training, the adapter changes the output by",
      (adapted(x) - linear(x)).abs().max().item())
nn.init.normal_(B, generator=torch.Generator().manual_seed(0))  # as if it had been trained
change = B @ A                                  # as large as W
print(f"   B A changes all {change.numel():,} numbers of W, but A and B have only "
      f"{A.numel() + B.numel():,}:")
print(f"   the rank of B A is {torch.linalg.matrix_rank(change)}, so it can move an output of "
      f"{len(change)} numbers in {torch.linalg.matrix_rank(change)} directions only")

# %% 7. From the image through the tree
# Each of the four linear layers in every block gets one adapter per group of its stage. The groups
# divide the combined rank in proportion to their number of tasks (section 4.3).

for stage, partition in zip(backbone.layers, tree):
    ranks = [RANK * len(group) // T for group in partition]
    for block in stage.blocks:
        block.attn.qkv = AdaptedLinear(block.attn.qkv, ranks)
        block.attn.proj = AdaptedLinear(block.attn.proj, ranks)
        block.mlp.fc1 = AdaptedLinear(block.mlp.fc1, ranks)
        block.mlp.fc2 = AdaptedLinear(block.mlp.fc2, ranks)


def walk(image):
    """The four maps for each task. Every stage runs once per group, with that group's adapters."""
    x = [backbone.patch_embed(image)] * T                       # x[t] is the input for task t
    maps = {task: [] for task in TASKS}
    for stage, partition in zip(backbone.layers, tree):
        for g, group in enumerate(partition):
            for module in stage.modules():
                if isinstance(module, AdaptedLinear):
                    module.group = g
            y = stage(x[group[0]])                              # the same x for the whole group
            for t in group:
                x[t] = y
                maps[TASKS[t]].append(y)
    return maps


print("\n7. The path of normals, for four images:")
for i, (partition, feature_map) in enumerate(zip(tree, walk(image[:4])["normals"])):
    group = next(group for group in partition if TASKS.index("normals") in group)
    print(f"   stage {i + 1}: adapters of {show([group])}, map {tuple(feature_map.shape)}")

# %% 8. Training, with a control (eq. 8)
# Only decoders and adapters are trained. Are the adapters worth it? As a control, we first train
# decoders only, and then decoders and adapters: from the same initial weights, on the same batches,
# for as many steps. Then we compare their losses on rooms that neither has seen. (The control's
# learning rate is not to blame: of six others, the best improved its total loss by only 0.04.) In
# the paper's table 1, on PASCAL, training only the decoders loses 9.95 percent against fully
# trained networks, one per task, and TGLoRA gains 3.97 percent. Both trainings start with new
# decoders, as in the program; those of cell 3 have done their work.


def adapted_maps_of(which):
    return walk(image[which])


adapters = [p for p in backbone.parameters() if p.requires_grad]
control = new_decoders()
decoders = deepcopy(control)

print("\n8. Decoders only:")
fit(control, [], frozen_maps_of, STEPS)
print("   Decoders and adapters:")
fit(decoders, adapters, adapted_maps_of, STEPS)

print(f"   Losses on {VAL} other rooms:")
for name, trained, maps_of in [("decoders only", control, frozen_maps_of),
                               ("decoders and adapters", decoders, adapted_maps_of)]:
    with torch.no_grad():
        losses = losses_of(trained, maps_of, slice(TRAIN, TRAIN + VAL))
    print(f"   {name:<22} total {weighted_sum(losses):.2f}   "
          + "  ".join(f"{task} {losses[task]:.3f}" for task in TASKS))

figure = []
for i in (TRAIN, TRAIN + 1):                    # two of the other rooms
    room = rooms.render_room((0, 0, i), SIZE, SIZE, night=True)
    figure.append(row("ground truth", room["image"] / 255, room))
    with torch.no_grad():
        for name, trained, maps_of in [("decoders only", control, frozen_maps_of),
                                       ("with adapters", decoders, adapted_maps_of)]:
            maps = maps_of(slice(i, i + 1))
            predictions = {task: trained[task](maps[task])[0] for task in TASKS}
            figure.append(row(name, None, predictions))
draw_grid(PICTURES / "predictions.png", ["image", *TASKS], figure, drawn_tasks)

# %% 9. The trick in tglora.py: groups are folded into the batch
# `walk` runs every stage once per group, on a small batch. But W is the same for all groups. So the
# program runs each stage only once, on one batch of G * n images that holds the n images of every
# group, one group after another (tglora.py). With our tree, four large calls replace 1 + 2 + 3 + 4
# = 10 small ones. Norms, attention and W x work unchanged, because they never mix images. (A
# BatchNorm in the backbone would.) Inside a stage, only the adapters take the batch apart.


def folded_forward(self, x):
    """Eq. 4 for all groups at once. The first dimension of x holds the groups one after another."""
    y = self.linear(x)                                          # W x for all groups
    parts = x.chunk(len(self.A))                                # x_g for each group g
    low_rank = [GAMMA * (x_g @ A.T) @ B.T for x_g, A, B in zip(parts, self.A, self.B)]
    return y + torch.cat(low_rank)


def walk_folded(image):
    """The four maps for each task, with all groups of a stage in one batch."""
    x = [backbone.patch_embed(image)] * T
    maps = {task: [] for task in TASKS}
    print("   image", tuple(image.shape))
    for i, (stage, partition) in enumerate(zip(backbone.layers, tree)):
        y = stage(torch.cat([x[group[0]] for group in partition]))      # (G * n, h, w, c)
        print(f"   stage {i + 1}: {len(partition)} x {len(image)} images -> {tuple(y.shape)}")
        for group, part in zip(partition, y.split(len(image))):
            for t in group:
                x[t] = part
                maps[TASKS[t]].append(part)
    return maps


# Folding must not change a prediction. But that would also be true if the adapters did nothing. So
# we also look at the trained B, and at how much a prediction changes if the decoder of a task reads
# the maps of another task, which other groups' adapters have made, at least in the last stage.
backbone.double()                               # double precision, so that numbers that should be
decoders.double()                               # equal agree to many digits
some = image[:4].double()
with torch.no_grad():
    maps = walk(some)
    AdaptedLinear.forward = folded_forward      # from here on, one call serves all groups
    print("\n9. All groups in one folded batch:")
    folded_maps = walk_folded(some)

layers = [module for module in backbone.modules() if isinstance(module, AdaptedLinear)]
trained_B = torch.cat([B.flatten() for layer in layers for B in layer.B])
print(f"   The mean absolute value in B, which started at 0: {trained_B.abs().mean():.3f}")
print("   The largest change of a prediction:")
for task, other in zip(TASKS, TASKS[1:] + TASKS[:1]):
    pred = decoders[task](maps[task])
    folded = (decoders[task](folded_maps[task]) - pred).abs().max()
    swapped = (decoders[task](maps[other]) - pred).abs().max()
    print(f"   {task:<8} {folded:.0e} with folding, {swapped:.2f} with the maps of {other}")
    assert folded < 1e-10
