"""Tests of train.py: a run of four steps matches a second implementation, written plainly here.

This implementation runs the network once for each task. An adapted layer computes
W x + b + 4 B A drop(x): no groups are folded into one batch, and the tasks share only weights and
random masks. Eq. 8, the schedule, dropout and stochastic depth are written out as formulas, and
AdamW, clipping and BatchNorm come from torch, with their constants. The data and their
augmentation, the tasks' losses (see test_tasks.py), the window functions of attention, and the
initial weights come from the program itself.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import CLASSES, collate, draw_augmentation, warp
from model import build
from recipes import parse_arguments
from rooms import Rooms
from swin import from_windows, relative_position_index, shift_mask, to_windows
from tasks import make_tasks

TASKS = ["semseg", "depth", "normals"]
WEIGHT = {"semseg": 1, "depth": 1, "normals": 10}
TREE = [[(0, 1, 2)], [(0, 2), (1,)], [(0, 2), (1,)], [(0,), (1,), (2,)]]  # indices into TASKS
SIZE, ROOMS, BATCH, EPOCHS, SEED = (56, 84), 6, 3, 2, 5
DROPOUT, DROP_PATH = 0.1, 0.4
PEAK, WARMUP, DECAY, CLIP = 2e-3, 0.4, 2, 2
FLAGS = ["--size", "56x84", "--train-rooms", "6", "--val-rooms", "2", "--batch-size", "3",
         "--epochs", "2", "--eval-every", "2", "--seed", "5", "--tasks", ",".join(TASKS),
         "--dropout", "0.1", "--drop-path", "0.4", "--lr", "2e-3", "--warmup", "0.4",
         "--weight-decay", "2", "--clip", "2", "--scales", "0.8,1,1.3", "--rotate", "15",
         "--flip", "--rank", "6", "--log-every", "1", "--device", "cpu"]
HEADS, BLOCKS, WINDOW = (2, 4, 8, 16), 2, 7  # the backbone "mini": 2 blocks in each of 4 stages
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # the adapted layers of a block


# --- the network ----------------------------------------------------------------------------------
def keep(shape, rate):
    """A random mask: 1 / (1 - rate) where a value is kept, 0 where it is dropped."""
    return torch.empty(shape).bernoulli_(1 - rate) / (1 - rate)


def draw_masks():
    """Draw all random masks of a forward pass, in the order in which train.py draws them.

    Returns {(stage, block, name): mask}. A mask is (G, B, ...), with G groups and B images, or
    ones (G, 1) if the drop rate is 0. If `name` is a layer, the mask is for the dropout on the
    input of its adapters. If `name` is "attn" or "mlp", the mask is for the stochastic depth of
    that half of the block.
    """
    masks, (H, W) = {}, (SIZE[0] // 4, SIZE[1] // 4)
    for s in range(4):
        G, C = len(TREE[s]), 32 * 2 ** s
        windows = math.ceil(H / WINDOW) * math.ceil(W / WINDOW)
        for b in range(BLOCKS):
            rate = DROP_PATH * (s * BLOCKS + b) / (4 * BLOCKS - 1)  # grows with depth
            for half, shapes in (("attn", [(windows, WINDOW ** 2, C)] * 2),
                                 ("mlp", [(H, W, C), (H, W, 4 * C)])):
                for layer, shape in zip([n for n in LAYERS if half in n], shapes):
                    masks[s, b, layer] = keep((G, BATCH, *shape), DROPOUT)
                # Stochastic depth drops an image's whole update or none of it.
                masks[s, b, half] = keep((G, BATCH, 1, 1, 1), rate) if rate else torch.ones(G, 1)
        H, W = math.ceil(H / 2), math.ceil(W / 2)
    return masks


def predict(p, task, image, masks=None):
    """The prediction of one task.

    p: parameters and buffers by name. masks: from `draw_masks`, or None in evaluation.
    """
    maps = []
    x = F.conv2d(image, p["backbone.patch_embed.proj.weight"], p["backbone.patch_embed.proj.bias"],
                 stride=4).permute(0, 2, 3, 1)  # (B, H, W, C)
    x = norm(p, "backbone.patch_embed.norm", x)
    for s in range(4):
        group = next(g for g, members in enumerate(TREE[s]) if TASKS.index(task) in members)
        ranks = [6 // len(TASKS) * len(members) for members in TREE[s]]
        for b in range(BLOCKS):
            name = f"backbone.layers.{s}.blocks.{b}."

            def lora(layer, x):
                """Eq. 4 for one group: W x + bias + gamma B A drop(x), gamma = 4."""
                A = p[f"{name}{layer}.lora_A"].split(ranks)[group]
                B = p[f"{name}{layer}.lora_B"].split(ranks)[group].T
                thinned = x if masks is None else x * masks[s, b, layer][group]
                return x @ p[f"{name}{layer}.weight"].T + p[f"{name}{layer}.bias"] + (
                    4 * thinned @ A.T @ B.T)

            def drop_path(half, update):
                return update if masks is None else update * masks[s, b, half][group]

            table = p[name + "attn.relative_position_bias_table"]
            x = x + drop_path("attn", attention(norm(p, name + "norm1", x), lora, table, HEADS[s],
                                                shifted=b % 2 == 1))
            hidden = F.gelu(lora("mlp.fc1", norm(p, name + "norm2", x)))
            x = x + drop_path("mlp", lora("mlp.fc2", hidden))
        if s < 3:
            x = merge_patches(p, f"backbone.layers.{s}.downsample.", x)
        maps.append(x)
    return decode(p, f"decoders.{task}.", maps, training=masks is not None)


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"])


def attention(x, lora, table, heads, shifted):
    """Attention in windows of 7x7 tokens.

    lora: computes an adapted layer, given the layer's name and its input. If `shifted`, the windows
    are shifted by 3 tokens along every axis that is longer than one window. Shapes: N windows of L
    tokens, h heads.
    """
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % WINDOW, 0, -H % WINDOW))
    Hp, Wp = x.shape[1:3]
    shift = tuple(3 if shifted and n > WINDOW else 0 for n in (Hp, Wp))
    x = to_windows(x.roll((-shift[0], -shift[1]), (1, 2)), WINDOW)  # (B, N, L, C)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(2, 3)  # (B, N, h, L, C/h)
               for part in lora("attn.qkv", x).chunk(3, -1))
    logits = q @ k.mT / math.sqrt(C // heads) + table[relative_position_index(WINDOW)].movedim(2, 0)
    if any(shift):
        logits = logits + shift_mask(Hp, Wp, WINDOW, shift, x.device)[:, None]
    x = lora("attn.proj", (logits.softmax(-1) @ v).transpose(2, 3).flatten(3))
    return from_windows(x, WINDOW, Hp, Wp).roll(shift, (1, 2))[:, :H, :W]


def merge_patches(p, name, x):
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return norm(p, name + "norm", torch.cat(four, -1)) @ p[name + "reduction.weight"].T


def decode(p, name, maps, training):
    """A decoder: project each map with a 1x1 convolution, resize the maps and concatenate them.

    A 1x1 convolution, BatchNorm, ReLU and another 1x1 convolution follow. The result is resized to
    the size of the image.
    """
    fused = [(x @ p[f"{name}fuse.{i}.weight"][:, :, 0, 0].T).permute(0, 3, 1, 2)
             for i, x in enumerate(maps)]
    x = torch.cat([F.interpolate(x, fused[0].shape[2:], mode="bilinear") for x in fused], 1)
    x = F.conv2d(x, p[name + "head.0.weight"], p[name + "head.0.bias"])
    x = F.batch_norm(x, p[name + "head.1.running_mean"], p[name + "head.1.running_var"],
                     p[name + "head.1.weight"], p[name + "head.1.bias"], training, momentum=0.1,
                     eps=1e-5)
    x = F.conv2d(x.relu(), p[name + "head.3.weight"], p[name + "head.3.bias"])
    return F.interpolate(x, SIZE, mode="bilinear")


# --- a step ---------------------------------------------------------------------------------------
def learning_rate(step, steps):
    """The learning rate, which rises linearly to PEAK and then falls to 0 along half a cosine."""
    ramp = WARMUP * steps
    if step < ramp:
        return PEAK * (step + 1) / (ramp + 1)
    return PEAK * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp))) / 2


def reference(p, trained):
    """Train the parameters `p` in place. trained: the names of the parameters to train.

    Returns the losses and the gradient norm of each step, and the validation loss.
    """
    rooms = [Rooms("train", TASKS, ROOMS, SIZE, night=True)[i] for i in range(ROOMS)]
    orders = [np.random.Generator(np.random.PCG64([SEED, e])).permutation(ROOMS).reshape(-1, BATCH)
              for e in range(EPOCHS)]
    tasks = {task.name: task for task in make_tasks(TASKS, CLASSES["rooms"])}
    # 1-D parameters and position-bias tables have no weight decay.
    plain = [n for n in trained if p[n].ndim == 1 or "bias_table" in n]
    groups = [{"params": [p[n] for n in plain], "weight_decay": 0},
              {"params": [p[n] for n in trained if n not in plain], "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    steps, log, norms = np.concatenate(orders), [], []
    for step, chosen in enumerate(steps):
        torch.manual_seed(SEED * 1_000_003 + step)
        drawn = draw_augmentation(BATCH, flip=True, scales=(0.8, 1, 1.3), rotate=15)
        image, labels = warp(collate([rooms[i] for i in chosen]), SIZE, "cpu", **drawn)
        masks = draw_masks()
        losses = {t: tasks[t].loss(predict(p, t, image, masks), labels[t]) for t in TASKS}
        optimizer.zero_grad()
        sum(WEIGHT[t] * losses[t] for t in TASKS).backward()  # eq. 8
        norms.append(torch.nn.utils.clip_grad_norm_([p[n] for n in trained], CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(steps))
        optimizer.step()
        log.append({t: loss.item() for t, loss in losses.items()})
    with torch.no_grad():
        val = [warp(collate([room]), SIZE) for room in (Rooms("val", TASKS, 2, SIZE, night=True)[i]
                                                        for i in range(2))]
        validation = sum(WEIGHT[t] * tasks[t].loss(predict(p, t, image), labels[t]).item() / 2
                         for t in TASKS for image, labels in val)
    return log, norms, validation


# --- the comparison -------------------------------------------------------------------------------
@pytest.fixture
def in_double(monkeypatch):
    """Use float64 everywhere, because Adam would enlarge the rounding errors of float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_run_equals_the_reference(tmp_path, in_double):
    """train.py and `reference` agree on losses, learning rates, validation loss and weights."""
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": [[[TASKS[t] for t in g] for g in s] for s in TREE]}))
    flags = [*FLAGS, "--layers", "attn+mlp+others", "--tree", str(path)]
    model = build(parse_arguments(flags), make_tasks(TASKS, CLASSES["rooms"]), TREE)
    p = dict(model.state_dict(keep_vars=True))
    others = ("patch_embed", "downsample", "norm1", "norm2", "bias_table")
    trained = [n for n, _ in model.named_parameters() if "lora_" in n or n.startswith("decoders.")
               or any(o in n for o in others)]
    assert trained == [n for n, q in model.named_parameters() if q.requires_grad]
    start = {n: q.detach().clone() for n, q in p.items()}

    train.main([*flags, "--out", str(tmp_path / "run")])
    log, norms, validation = reference(p, trained)

    # Adam ignores a constant factor in the gradients. Missing clipping therefore shows only if the
    # factor differs between steps, so check that each step is clipped, and by different factors.
    assert min(norms) > CLIP and max(norms) > 1.3 * min(norms)
    lines = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for step, (line, losses) in enumerate(zip(lines[:4], log, strict=True)):
        assert line["lr"] == pytest.approx(learning_rate(step, 4))
        assert line["loss"] == pytest.approx(losses, rel=1e-6)
    assert lines[4]["loss"] == pytest.approx(validation, rel=1e-6)

    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    assert saved.keys() >= set(trained)
    for n in saved.keys() - {f"decoders.{t}.head.1.num_batches_tracked" for t in TASKS}:
        torch.testing.assert_close(saved[n], p[n], rtol=1e-6, atol=1e-8, msg=n)
        # Each weight changes, except biases that BatchNorm cancels: their gradient is about 0.
        assert n.endswith("head.0.bias") or (p[n] - start[n]).abs().max() > 1e-5
