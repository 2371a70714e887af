"""Tests of tglora.py: the layer is compared with eq. 4, group by group, and adapters are added to
models from torch and torchvision."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.models import SwinTransformer

from tglora import TGLoRALinear, add_adapters, freeze, merge, run_stages, split_rank


def make_layer(ranks, dropout=0.0):
    """An adapted layer with 12 inputs and 20 outputs, whose adapters are not zero."""
    torch.manual_seed(0)
    layer = TGLoRALinear(nn.Linear(12, 20), ranks, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    return layer


# --- the layer ------------------------------------------------------------------------------------
def test_a_new_adapter_changes_nothing():
    """A new adapter does not change the layer's output, because its matrix B is zero."""
    linear = nn.Linear(12, 20)
    x = torch.randn(6, 5, 12)
    expected = F.linear(x, linear.weight, linear.bias)
    layer = TGLoRALinear(linear, (50, 1, 2))
    assert torch.equal(layer(x), expected)
    assert (layer.scale, layer.dropout) == (4, 0.05)
    bound = 12 ** -0.5                          # A is initialised as nn.Linear(12, r) would be
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


@pytest.mark.parametrize("ranks", [(3,), (2, 2, 2), (5, 1, 2)])
def test_each_group_equals_plain_lora(ranks):
    """The output for each group g is y_g = W x_g + b + 4 B_g A_g x_g, for equal and mixed ranks."""
    layer = make_layer(ranks)
    x = torch.randn(len(ranks) * 4, 7, 12)
    outputs = layer(x).chunk(len(ranks))
    for g, x_g in enumerate(x.chunk(len(ranks))):
        rows = slice(sum(ranks[:g]), sum(ranks[:g + 1]))
        A, B = layer.lora_A[rows], layer.lora_B[rows].T
        expected = x_g @ layer.weight.T + layer.bias + 4 * x_g @ A.T @ B.T
        torch.testing.assert_close(outputs[g], expected)


def test_gradients_stay_in_their_group():
    """A loss on one group's output gives no gradient to the other group's adapter or to W."""
    layer = make_layer((2, 3))
    layer(torch.randn(8, 12)).chunk(2)[1].square().sum().backward()
    for p in (layer.lora_A, layer.lora_B):
        assert p.grad[:2].abs().max() == 0          # the first group's rank is 2
        assert (p.grad[2:] != 0).all()
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("ranks", [(4,), (5, 1, 2)])
def test_merged_equals_unmerged(ranks):
    """Merging does not change the output, and removes the adapters."""
    layer = make_layer(ranks).eval()
    layer.scale = 2.5
    x = torch.randn(6, 7, 12)
    expected = layer(x)
    merge(nn.Sequential(layer))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not any(p.requires_grad for p in layer.parameters())
    assert (layer.in_features, layer.out_features) == (12, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_of_any_layer_are_trained(dtype):
    """Adapters are at least float32, so small steps move every entry of A, with a GradScaler too.
    The output has the layer's type."""
    linear = nn.Linear(12, 20).to(dtype)
    layer = TGLoRALinear(linear, (4,))
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype is torch.promote_types(dtype, torch.float32)
    before = layer.lora_A.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(20):
        y = layer(torch.randn(8, 12, dtype=dtype))
        assert y.dtype is dtype
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (layer.lora_A != before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_merging_is_precise(dtype):
    """Merging computes in float32, or in float64 for such a layer, and rounds only the result. This
    also holds for adapters in bfloat16 and inside autocast."""
    layer = make_layer((4,)).to(dtype)
    A, B, W = (x.double() for x in (layer.lora_A, layer.lora_B.T, layer.weight))
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    assert layer.weight.dtype is dtype
    expected = (W + 4 * B @ A).to(dtype)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.weight[0], expected, rtol=4 * tolerance, atol=4 * tolerance)


def test_dropout_is_on_the_adapters_input_only():
    """Dropout acts only on the adapter's input, not on that of W, and only in train mode."""
    layer = make_layer((3,), dropout=0.25)
    x = torch.ones(4, 12)
    frozen = F.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.25)
    torch.manual_seed(1)
    expected = frozen + 4 * dropped @ layer.lora_A.T @ layer.lora_B
    torch.testing.assert_close(layer(x), expected)
    assert (dropped == 0).any()
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_macs_are_counted_per_group():
    """The MACs of W include those of the bias. Every adapter is counted at the largest rank,
    because smaller ones are padded to it. A merged layer has no adapter MACs."""
    layer = make_layer((5, 1, 2))
    assert layer.macs(7) == (3 * 7 * 20 * 13, 3 * 7 * 5 * (12 + 20))
    layer.merge()
    assert layer.macs(7) == (3 * 7 * 20 * 13, 0)
    assert TGLoRALinear(nn.Linear(12, 20, bias=False), (2,)).macs(7) == (7 * 20 * 12, 7 * 2 * 32)


@pytest.mark.parametrize("rank, sizes, expected", [
    (63, (3,), (63,)), (63, (2, 1), (42, 21)), (63, (1, 1, 1), (21, 21, 21)),
    (64, (2, 1, 1), (32, 16, 16)), (7, (1, 1), (4, 3)), (4, (9, 1, 1), (2, 1, 1)),
    (10, (3, 2, 2), (4, 3, 3)), (9, (1, 6, 6), (1, 4, 4)), (5, (1, 1, 6), (1, 1, 3)),
    (3, (5, 1, 1), (1, 1, 1)), (11, (3, 3, 1), (5, 5, 1)), (5, (1, 1, 7, 6), (1, 1, 2, 1))])
def test_a_rank_is_split_in_proportion(rank, sizes, expected):
    """Ranks are in proportion to the group sizes, up to rounding, and at least 1."""
    assert split_rank(rank, sizes) == expected


def test_ranks_and_batches_that_do_not_fit_are_refused():
    """Ranks that are too small and batches that cannot be split evenly are errors."""
    with pytest.raises(ValueError, match="rank 2 is smaller than the number of task groups, 3"):
        split_rank(2, (1, 1, 1))
    with pytest.raises(RuntimeError, match="dim 0 \\(5\\)"):
        make_layer((1, 1))(torch.zeros(5, 4, 12))


# --- adapters in a model --------------------------------------------------------------------------
def small_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    add_adapters(model, ("0",), (2,), scale=2.0, dropout=0.5)
    nn.init.normal_(model[0].lora_B)
    return model


def test_layers_are_chosen_by_the_ends_of_their_paths():
    """Only layers whose paths end in one of the given names are adapted, with the given ranks,
    scale and dropout."""
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
                           for name in ("mlp", "attn", "xmlp")})
    add_adapters(model, ["mlp.0", "attn.1"], (2, 1), scale=3.0, dropout=0.1)
    adapted = {name for name, m in model.named_modules() if isinstance(m, TGLoRALinear)}
    assert adapted == {"mlp.0", "attn.1"}
    layer = model["mlp"][0]
    assert (layer.ranks, layer.scale, layer.dropout) == ((2, 1), 3.0, 0.1)


def test_names_are_lists_and_match():
    """A name that matches nothing, a string instead of a list, and an empty list of layers are
    errors. The model is not changed."""
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    for names, message in ((["mlp.0", "lp.0"], "path ends in 'lp.0'; .* layers are: mlp.0, head"),
                           ("head", "got the string 'head'"), ((), "`names` is empty")):
        with pytest.raises(ValueError, match=message):
            add_adapters(model, names, (2,))
        assert type(model["mlp"][0]) is nn.Linear
    add_adapters(model, ["mlp.0"], (2,))
    assert (model["mlp"][0].scale, model["mlp"][0].dropout) == (4, 0.05)
    for names, message in ((["head", "haed"], "no parameter of the ModuleDict has 'haed'"),
                           ("head", "got the string 'head'")):
        with pytest.raises(ValueError, match=message):
            freeze(model, names)
        assert model["head"].weight.requires_grad
    freeze(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"mlp.0.lora_A", "mlp.0.lora_B"}
    freeze(model, ["head"])
    assert model["head"].weight.requires_grad and not model["mlp"][0].weight.requires_grad


def with_hook(linear):
    linear.register_forward_hook(lambda module, inputs, output: output)
    return linear


def with_computed_weight(linear):
    weight = linear.weight.detach() + 1
    del linear.weight
    linear.weight = weight
    return linear


@pytest.mark.parametrize("make", [
    lambda: nn.LazyLinear(4), lambda: nn.MultiheadAttention(4, 1).out_proj,
    lambda: with_hook(nn.Linear(4, 4)), lambda: with_computed_weight(nn.Linear(4, 4)),
    lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    lambda: nn.utils.spectral_norm(nn.Linear(4, 4))])
def test_layers_that_do_more_than_a_product_are_refused(make):
    """A subclass of nn.Linear, hooks, and a weight that is not a Parameter would be lost."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(make()))
    with pytest.raises(ValueError, match="add_adapters: 1.0 is not a plain nn.Linear"):
        add_adapters(model, ["0"], (2,))
    assert type(model[0]) is nn.Linear


def test_adapters_that_are_never_called_are_an_error():
    """torchvision's Swin reads its linear layers' weights without calling the layers, so a forward
    pass raises ValueError."""
    model = SwinTransformer([4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[2, 2])
    add_adapters(model, ("attn.qkv", "attn.proj"), (2,))
    with pytest.raises(ValueError, match="4 of 4 adapted layers were not called"):
        model(torch.randn(1, 3, 16, 16))


class Skipping(nn.Module):
    """A checkpointed linear layer that can be skipped."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.skip = False

    def forward(self, x):
        return x if self.skip else checkpoint(self.linear, x, use_reentrant=False)


def test_a_recomputed_layer_does_not_count_as_called():
    """During a backward pass, torch.utils.checkpoint calls layers again. If the next forward pass
    does not call them, this is still noticed."""
    model = Skipping()
    add_adapters(model, ["linear"], (2,))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    model.skip = True
    with pytest.raises(ValueError, match="1 of 1 adapted layers were not called"):
        model(x)


def test_the_fast_path_of_torchs_encoder_is_noticed():
    """torch's encoder layer calls its linear layers in train mode, but not on its fast path in eval
    mode. This is noticed because every forward pass is checked."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True))
    add_adapters(model, ("linear1", "linear2"), (2,))
    x = torch.randn(2, 5, 8)
    model.train()(x)
    model.eval()
    with torch.no_grad():
        with pytest.raises(ValueError, match="2 of 2 .* for example 0.linear1: "):
            model(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_adapters_keep_ties_and_modes():
    """A layer that a model contains twice is wrapped once. The wrapper keeps the layer's train or
    eval mode."""
    for training in (True, False):
        tied = nn.Linear(4, 4).train(training)
        model = nn.Sequential(nn.Sequential(tied), tied)
        add_adapters(model, ("0.0", "1"), (2,))
        assert isinstance(model[1], TGLoRALinear) and model[0][0] is model[1]
        assert model[1].training is training
        model(torch.randn(3, 4))


def test_an_adapted_model_can_be_copied_and_saved():
    """A copied or loaded model gives the original's predictions, and its forward pass checks its
    own layers, not the original's."""
    model = Skipping().eval()
    add_adapters(model, ["linear"], (2,))
    nn.init.normal_(model.linear.lora_B)
    x = torch.randn(2, 4)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(copied(x), expected)
        copied.skip = True
        with pytest.raises(ValueError, match="not called"):
            copied(x)


@pytest.mark.slow
def test_an_adapted_model_compiles_and_exports():
    """torch.compile finds no graph break, even if only the part with the adapters is compiled.
    Compiled and exported models give the original's output."""
    model = small_model().eval()
    x = torch.randn(2, 4)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    outer = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    add_adapters(outer, ("0.0",), (2,))
    outer[0].compile(backend="eager", fullgraph=True)
    for _ in range(3):
        outer(x)


# --- stages ---------------------------------------------------------------------------------------
class Scaled(nn.Module):
    """A stage that multiplies each group by a different factor and halves the size of dimension 1.

    It appends the size of each batch to `sizes`.
    """

    def __init__(self, factors, sizes):
        super().__init__()
        self.factors = torch.tensor(factors)
        self.sizes = sizes

    def forward(self, x):
        self.sizes.append(len(x))
        x = x.unflatten(0, (len(self.factors), -1)) * self.factors.view(-1, 1, 1, 1)
        return x.flatten(0, 1)[:, ::2]


def test_stages_branch_as_their_parents_say():
    """Each group passes through its own ancestors in the earlier stages. Each stage runs once, on
    one batch of all its groups."""
    sizes = []
    stages = [Scaled([2.], sizes), Scaled([3., 5.], sizes), Scaled([7., 11.], sizes),
              Scaled([13., 17., 19.], sizes)]
    x = torch.randn(4, 32, 6)
    maps = run_stages(stages, x, [[0], [0, 0], [0, 1], [1, 0, 1]])
    assert sizes == [4, 8, 8, 12]
    assert [tuple(m.shape) for m in maps] == [
        (1, 4, 16, 6), (2, 4, 8, 6), (2, 4, 4, 6), (3, 4, 2, 6)]
    for g, factor in enumerate((2 * 5 * 11 * 13, 2 * 3 * 7 * 17, 2 * 5 * 11 * 19)):
        torch.testing.assert_close(maps[-1][g], x[:, ::16] * factor)
    swapped = run_stages(stages[:3], x, [[0], [0, 0], [1, 0]])[-1]
    torch.testing.assert_close(swapped[0], x[:, ::8] * (2 * 5 * 7))
    with pytest.raises(ValueError, match="zip"):
        run_stages([nn.Identity()], x, [[0], [0]])
