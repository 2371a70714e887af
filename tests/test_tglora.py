"""tglora.py: eq. 4 against separate layers, and against plain LoRA; in a model of one's own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from tglora import TGLoRALinear, add_adapters, merge, run_stages, split_rank

ROOT = Path(__file__).parent.parent


def layer(ranks, dropout=0.0, k=12, d=20):
    """A layer whose adapters are not zero."""
    torch.manual_seed(0)
    made = TGLoRALinear(nn.Linear(k, d), ranks, dropout=dropout)
    for B in made.lora_B:
        nn.init.normal_(B)
    return made


def test_equals_the_dense_layer_at_initialisation():
    """B starts at zero, so a wrapped layer computes exactly what the layer did."""
    linear = nn.Linear(12, 20)
    x = torch.randn(6, 5, 12)
    assert torch.equal(TGLoRALinear(linear, (3, 1, 2))(x), F.linear(x, linear.weight, linear.bias))


def test_one_group_is_plain_lora():
    """y = W x + b + gamma B A x, gamma = 4."""
    lora, x = layer((3,)), torch.randn(4, 7, 12)
    A, B = lora.lora_A[0], lora.lora_B[0]
    expected = x @ lora.weight.T + lora.bias + 4 * (x @ A.T @ B.T)
    torch.testing.assert_close(lora(x), expected)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (5, 1, 2)])
def test_folded_groups_equal_separate_layers(ranks):
    """A batch of G groups equals G layers, each with its own group's input, for any rank mix."""
    folded, x = layer(ranks), torch.randn(3 * 4, 7, 12)
    for g, x_g in enumerate(x.chunk(3)):
        single = layer((ranks[g],))
        single.load_state_dict({"weight": folded.weight, "bias": folded.bias,
                                "lora_A.0": folded.lora_A[g], "lora_B.0": folded.lora_B[g]})
        torch.testing.assert_close(folded(x).chunk(3)[g], single(x_g))


def test_gradients_stay_in_their_group():
    """A loss on one group's output gives no gradient to other adapters, nor to W."""
    lora, x = layer((2, 3)), torch.randn(8, 12)
    lora(x).chunk(2)[1].square().sum().backward()
    assert lora.lora_A[0].grad.abs().max() == 0 and lora.lora_B[0].grad.abs().max() == 0
    assert lora.lora_A[1].grad.abs().max() > 0 and lora.lora_B[1].grad.abs().max() > 0
    assert lora.weight.grad is None and lora.bias.grad is None


@pytest.mark.parametrize("ranks", [(4,), (2, 2), (5, 1, 2)])
def test_merged_equals_unmerged(ranks):
    """Folding the adapters changes the output by at most 1e-5 of its size; only once."""
    lora, x = layer(ranks).eval(), torch.randn(6, 7, 12)
    expected = lora(x)
    merge(nn.Sequential(lora))
    assert (lora(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not [name for name, _ in lora.named_parameters() if "lora_" in name]
    with pytest.raises(ValueError, match="already merged"):
        lora.merge()


def test_dropout_is_on_the_adapters_input_only():
    """In training the adapter sees a thinned input, the frozen path the whole one."""
    lora, x = layer((3,), dropout=0.5).train(), torch.ones(1, 12)
    with torch.no_grad():
        lora.lora_B[0].zero_()
        assert torch.equal(lora(x), F.linear(x, lora.weight, lora.bias))
        nn.init.normal_(lora.lora_B[0])
    outputs = {tuple(lora(x).flatten().tolist()) for _ in range(5)}
    assert len(outputs) > 1
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def test_training_keeps_one_copy_of_the_input_and_a_mask_of_bytes():
    """Of everything a layer keeps for its backward pass: dropout adds a quarter of the input."""
    lora, x = layer((2, 3), dropout=0.1).train(), torch.randn(8, 512, 12, requires_grad=True)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = lora(x)
    adapters = 4 * 8 * 512 * 3 + 4 * 2 * 3 * (12 + 20)  # A x of both groups; A and B, padded
    assert sum(kept.values()) <= 1.25 * 4 * x.numel() + adapters + 4 * lora.weight.numel()
    y.sum().backward()


@pytest.mark.parametrize("rank, sizes, expected", [
    (63, (3,), (63,)), (63, (2, 1), (42, 21)), (63, (1, 1, 1), (21, 21, 21)),
    (64, (2, 1, 1), (32, 16, 16)), (7, (1, 1), (4, 3)), (4, (9, 1, 1), (2, 1, 1)),
    (10, (3, 2, 2), (4, 3, 3)),
])
def test_split_rank(rank, sizes, expected):
    """Proportional to group size, sums to the rank exactly, at least 1 each."""
    assert split_rank(rank, sizes) == expected


def test_bad_ranks_are_refused():
    """A rank below the number of groups, a rank of 0, and a batch that has no such groups."""
    with pytest.raises(ValueError, match="rank 2 is smaller than the number of task groups, 3"):
        split_rank(2, (1, 1, 1))
    with pytest.raises(ValueError, match="at least 1"):
        TGLoRALinear(nn.Linear(2, 2), (1, 0))
    with pytest.raises(ValueError, match="batch of 5 does not divide into 2 groups"):
        layer((1, 1))(torch.zeros(5, 12))


# --- a model of one's own -------------------------------------------------------------------------
def vit_blocks():
    return VisionTransformer(16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8,
                             mlp_dim=12).encoder.layers


def test_a_wrapped_layer_says_its_sizes_as_linear_does():
    """in_features and out_features, merged too."""
    lora = layer((2, 1))
    assert (lora.in_features, lora.out_features) == (12, 20)
    lora.merge()
    assert (lora.in_features, lora.out_features) == (12, 20) and "12 -> 20" in repr(lora)


def test_adapters_that_nothing_would_use_are_refused():
    """A name that no linear layer has, beside one that has; layers whose weight torch reads without
    calling them: attention's always, those of nn.TransformerEncoderLayer where no gradient is."""
    blocks = vit_blocks()
    with pytest.raises(ValueError, match=r"ends in 'mlp.1'; there are .*encoder_layer_0.mlp.0, "):
        add_adapters(blocks, ("mlp.0", "mlp.1"), (2,))
    with pytest.raises(ValueError, match="ends in 'fc'; there are none$"):
        add_adapters(nn.Sequential(), ("fc",), (2,))
    with pytest.raises(ValueError, match="self_attention.out_proj lies in nn.MultiheadAttention"):
        add_adapters(blocks, ("out_proj",), (2,))
    own = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12))
    with pytest.raises(ValueError, match="0.linear1 lies in nn.TransformerEncoderLayer"):
        add_adapters(own, ("linear1",), (2,))
    assert not [m for m in (*blocks.modules(), *own.modules()) if isinstance(m, TGLoRALinear)]
    add_adapters(blocks, ("mlp.0", "mlp.3"), (2, 1))
    assert len([m for m in blocks.modules() if isinstance(m, TGLoRALinear)]) == 4


def test_stages_branch_as_their_parents_say():
    """Each group's output is that of its own path alone, in one batch a stage; maps of any shape."""
    sizes = []

    class Stage(nn.Module):
        """A linear map, other for each group; it halves the middle."""

        def __init__(self, factors):
            super().__init__()
            self.factors = factors

        def forward(self, x):
            sizes.append(len(x))
            x = x.unflatten(0, (len(self.factors), -1)) * self.factors.view(-1, 1, 1, 1)
            return x.flatten(0, 1)[:, ::2]

    factors = [torch.tensor(f) for f in ([2.], [3., 5.], [7., 11.], [13., 17., 19.])]
    parents = [[0], [0, 0], [0, 1], [1, 0, 1]]
    x = torch.randn(4, 32, 6)
    maps = run_stages(map(Stage, factors), x, parents)
    assert sizes == [4, 8, 8, 12]
    assert [tuple(m.shape) for m in maps] == [
        (1, 4, 16, 6), (2, 4, 8, 6), (2, 4, 4, 6), (3, 4, 2, 6)]
    for g, product in enumerate((2 * 5 * 11 * 13, 2 * 3 * 7 * 17, 2 * 5 * 11 * 19)):
        torch.testing.assert_close(maps[-1][g], x[:, ::16] * product)
    with pytest.raises(ValueError, match="zip"):
        run_stages([nn.Identity()], x, parents)


def test_three_files_adapt_an_mlp_of_six_tasks(tmp_path):
    """tglora.py, grouping.py and similarity.py alone in a folder: similarity, tree, branching,
    training, merging."""
    for name in ("tglora.py", "grouping.py", "similarity.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    done = subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); "
                           "import own"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stage 3   {sin, sin2} {cos, cos2} {sign, sign2}" in done.stdout
    first, last, difference = map(float, done.stdout.split()[-3:])
    assert last < 0.5 * first and difference < 1e-5


OWN = """
import copy
import torch
from torch import nn
from grouping import build_tree, format_tree, routing
from similarity import finetune_decoders, format_similarity, fresh_decoders, task_similarity
from tglora import add_adapters, freeze, merge, run_stages, split_rank

torch.manual_seed(0)


class Task:
    weight = 1.0

    def __init__(self, name):
        self.name = name

    def loss(self, prediction, label):
        return nn.functional.mse_loss(prediction, label)

    def valid(self, label):
        return label.isfinite()


class Head(nn.Linear):
    def forward(self, maps, size):
        return super().forward(maps[-1])


class Net(nn.Module):
    def __init__(self, backbone, tasks, tree):
        super().__init__()
        self.backbone, (self.parents, self.group_of) = backbone, routing(tree)
        self.decoders = nn.ModuleDict({task.name: Head(32, 1) for task in tasks})

    def forward(self, x):
        maps = run_stages(self.backbone.stages, x, self.parents)
        return {name: head([m[g] for m, g in zip(maps, group)], x.shape[2:])
                for (name, head), group in zip(self.decoders.items(), self.group_of)}


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(k, 32), nn.Tanh()) for k in (2, 32, 32))

    def forward(self, x):
        return [x := stage(x) for stage in self.stages]


x = torch.rand(64, 2) * 4 - 2
a, b = x[:, :1], x[:, 1:]
labels = {"sin": (2 * a).sin(), "cos": (3 * b).cos(), "sign": a * b, "sin2": (2 * a).sin() * 1.1,
          "cos2": (3 * b).cos() * 0.9, "sign2": a * b + 0.1}
tasks, backbone = [Task(name) for name in labels], Backbone()


def load(batches):
    for batch in batches:
        yield x[batch], {name: label[batch] for name, label in labels.items()}


shared = Net(copy.deepcopy(backbone), tasks, [[tuple(range(6))]] * 3)
fresh_decoders(shared, 0)
finetune_decoders(shared, tasks, load, [list(range(64))] * 100, lr=1e-2)
found = task_similarity(shared, tasks, load([[i] for i in range(64)]))
print(format_similarity(found, list(labels)))
tree = build_tree(found.mean, (1, 2, 3))
print(format_tree(tree, list(labels)))

net = Net(backbone, tasks, tree)
for stage, partition in zip(backbone.stages, tree):
    add_adapters(stage, ("0",), split_rank(12, [len(group) for group in partition]), dropout=0)
freeze(backbone)
optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(200):
    predictions = net(x)
    loss = sum(task.loss(predictions[task.name], labels[task.name]) for task in tasks)
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    unmerged, merged = net.eval()(x), merge(net)(x)
difference = max((unmerged[name] - merged[name]).abs().max() for name in labels)
print(losses[0], losses[-1], float(difference))
"""
