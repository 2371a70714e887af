"""Every knob of a run: its value for each dataset, and why.

    python train.py --dataset nyud --help       # the flags that change them (flags.py)

A recipe's keys are names of flags. Sections and tables are those of arXiv 2509.19602, where no
other paper is named.
"""

import os
from typing import Any

COMMON = dict(
    warmup=20 / 300,        # share of the run before the peak: 20 epochs of the paper's 300
    weight_decay=0.05,      # section 7; not on 1-D weights and bias tables
    clip=5.0,               # norm of the gradient; the published MTLoRA's
    accumulate=1,           # parts that a batch is computed in
    reduction=4,            # r of BDTA, the default of its paper
    head_lr=2e-3,           # of the decoders before the similarity, at first; ours
    normalize="none",       # eq. 2 as printed, the plain cosine
    log_every=10,           # steps
)
PAPER = dict(               # nyud and pascal, as in sections 4 and 7
    **COMMON,
    size="448",             # pixels, a square; images are resized to it
    backbone="tiny",        # Swin-Tiny
    weights="imagenet",     # ImageNet-1k
    layers="attn+mlp",      # table 1; "+others" is its best row and its costliest
    dropout=0.05,           # on the adapters' input
    drop_path=0.2,          # of the deepest block; falls linearly to 0 at the first
    fused=(18, 36, 72, 144),  # HRNet-W18's, whatever the backbone
    epochs=300,             # 20 of them warm-up
    eval_every=20,          # epochs
    sim_images=200,         # ours: the paper names no number
    head_epochs=20,         # ours, likewise; on kept maps they cost what 10 with a backbone do
    flip=True,              # half of the images
    cache=False,            # decoded images of a whole dataset fill the memory
    workers=min(4, os.cpu_count()),  # decoding keeps up with a GPU
)
RECIPES = {
    "rooms": dict(          # ours: a demonstration on two CPU cores
        **COMMON,
        tasks="semseg,human_parts,edge,depth,normals",
        size="112",         # 28x28 patches: 4x4 windows in stage 1, one in stages 3 and 4
        backbone="mini",    # a third of Swin-Tiny's channels
        weights="rooms_mini.pth",  # knows segmentation alone (docs/DATA.md)
        rank=20,            # adapters are then a tenth of the network's parameters
        last_rank=None,     # every stage has the same combined rank
        layers="attn+mlp",
        fused=(6, 12, 24, 48),  # a third, as the backbone
        dropout=0.0,        # four epochs do not overfit
        drop_path=0.0,
        epochs=4,
        batch_size=8,       # images a step
        lr=2e-3,            # few steps, so large ones
        eval_every=1,
        sim_images=128,     # with 32, and 4 epochs, no two seeds gave five tasks the same tree
        head_epochs=6,
        flip=True,
        scales="1",         # a zoom would only blur pictures this small
        rotate=0.0,         # degrees
        cache=True,         # rendered once
        workers=0,          # the rendered rooms lie in memory
    ),
    "nyud": dict(
        **PAPER,
        tasks="semseg,normals,depth",
        rank=63,            # divisible by three tasks: 21 for each in the last stage
        last_rank=None,
        batch_size=6,
        lr=1e-4,            # peak
        scales="1,1.2,1.5",
        rotate=0.0,
    ),
    "pascal": dict(
        **PAPER,
        tasks="semseg,human_parts,sal,normals",
        rank=64,            # combined, in stages 1 to 3
        last_rank=4,        # in stage 4 every task has rank 4, whatever --rank is (4.3)
        batch_size=32,
        lr=3.125e-5,        # peak; the published 5e-4 is scaled there by batch / 512 = 32 / 512
        scales="0.75:1.25",
        rotate=20.0,
    ),
}

BDTA = dict(                # --method bdta on nyud and pascal: section 4.1 of its paper
    batch_size=8,           # images a step, on one GPU
    lr=4e-4,                # peak
    weight_decay=1e-4,
    warmup=0.0,             # its text names a cosine and no warm-up
    dropout=0.0,            # ours, as is the next: it names neither, and drop path would
    drop_path=0.0,          # only disturb a backbone that does not learn
)


# --- numbers of groups ----------------------------------------------------------------------------
def paper_groups(T: int) -> tuple[int, ...]:
    """Task-specific in the last stage, one group less each stage before, shared in the first (4.4).
    """
    return 1, max(1, T - 2), max(1, T - 1), T


def default_groups(config: Any) -> tuple[int, ...]:
    """The paper's, but for the demonstration's five tasks: there the groups of 1,3,4,5 differ
    between seeds."""
    if config.method != "tglora":  # without adapters there is nothing to group
        return 1, 1, 1, 1
    if config.dataset == "rooms" and config.tasks == RECIPES["rooms"]["tasks"].split(","):
        return 1, 2, 2, 5
    return paper_groups(len(config.tasks))
