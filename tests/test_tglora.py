"""tglora.py: eq. 4 against separate layers, and against plain LoRA."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tglora import TGLoRALinear, merge, split_rank


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
