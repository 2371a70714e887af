"""Tests of recipes.py: recipes match the papers, and flags reach the code that they are for.

Wrong values are usage errors.
"""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

import data
import model as model_py
import recipes
import similarity as similarity_py
import train
from data import CLASSES, Checked, open_dataset
from grouping import build_tree
from model import build
from recipes import BDTA, RECIPES, TABLE, paper_groups, parse_arguments
from tasks import make_tasks
from tglora import TGLoRALinear

# Most of these values are from arXiv 2509.19602, sections 4.1, 4.3 and 7. Drop path and clip are
# from MTLoRA's code.
BOTH = dict(
    method="tglora", layers="attn+mlp", backbone="tiny", weights="imagenet", size=(448, 448),
    epochs=300, eval_every=20, warmup=20 / 300, weight_decay=0.05, accumulate=1, dropout=0.05,
    drop_path=0.2, clip=5.0, flip=True, fused=(18, 36, 72, 144))
EACH = {
    "nyud": dict(tasks=("semseg", "normals", "depth"), groups=(1, 1, 2, 3), rank=63, last_rank=None,
                 batch_size=6, lr=1e-4, scales=(1, 1.2, 1.5), rotate=0),
    "pascal": dict(tasks=("semseg", "human_parts", "sal", "normals"), groups=(1, 2, 3, 4), rank=64,
                   last_rank=4, batch_size=32, lr=3.125e-5, rotate=20,
                   scales=tuple(np.linspace(0.75, 1.25, 101)))}
RANKS = {"nyud": [(63,), (63,), (42, 21), (21, 21, 21)],
         "pascal": [(64,), (48, 16), (32, 16, 16), (4, 4, 4, 4)]}


def modules(model, cls):
    return [module for module in model.modules() if isinstance(module, cls)]


def network(*flags):
    """Build the network for these flags on the meta device, which takes almost no time."""
    config = parse_arguments([*flags, "--weights", "none"])
    tasks = make_tasks(config.tasks, CLASSES[config.dataset])
    tree = build_tree(np.zeros((len(tasks), len(tasks))), config.groups)
    with torch.device("meta"):
        return build(config, tasks, tree)


# --- the papers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_recipe_matches_the_paper(dataset):
    """The recipe of a dataset has the values in BOTH and EACH."""
    config = vars(parse_arguments(["--dataset", dataset]))
    for name, value in {**BOTH, **EACH[dataset]}.items():
        assert config[name] == value, name


def test_bdta_recipe_matches_its_paper():
    """With --method bdta, batch size, learning rate and weight decay are those of BDTA's paper.

    Warm-up, dropout and drop path, which section 4.1 of that paper does not mention, are 0. On
    rooms, the recipe of rooms is kept.
    """
    config = parse_arguments(["--dataset", "pascal", "--method", "bdta"])
    assert (config.batch_size, config.lr, config.weight_decay, config.warmup) == (8, 4e-4, 1e-4, 0)
    assert config.drop_path == config.dropout == 0
    rooms = parse_arguments(["--method", "bdta"])
    assert all(getattr(rooms, name) == RECIPES["rooms"][name] for name in BDTA)


@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_network_matches_the_paper(dataset):
    """Adapters have gamma 4, dropout 0.05 and the paper's ranks; drop path grows from 0 to 0.2."""
    model = network("--dataset", dataset)
    for stage, ranks in zip(model.backbone.layers, RANKS[dataset], strict=True):
        adapted = modules(stage, TGLoRALinear)
        assert len(adapted) == 4 * len(stage.blocks)
        assert {(x.ranks, x.scale, x.dropout) for x in adapted} == {(ranks, 4, 0.05)}
    rates = [drop.p for drop in modules(model, StochasticDepth)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert {drop.mode for drop in modules(model, StochasticDepth)} == {"row"}


@pytest.mark.parametrize("T, groups", [
    (1, (1, 1, 1, 1)), (2, (1, 1, 1, 2)), (3, (1, 1, 2, 3)), (4, (1, 2, 3, 4)), (5, (1, 3, 4, 5))])
def test_numbers_of_groups_match_section_4_4(T, groups):
    """For T tasks, the four stages have 1, T - 2, T - 1 and T groups, but at least one each."""
    assert paper_groups(T) == groups


def test_groups_follow_from_the_number_of_tasks():
    """The default of --groups depends on the number of tasks.

    With --method full, which has no adapters, every stage has one group.
    """
    assert parse_arguments([]).groups == (1, 2, 3, 4)
    assert parse_arguments(["--tasks", "depth,sal,edge"]).groups == (1, 1, 2, 3)
    assert parse_arguments(["--method", "full"]).groups == (1, 1, 1, 1)


# --- every flag arrives ---------------------------------------------------------------------------
# Values that differ from the defaults for rooms, except that cpu is the default without a GPU.
FLAGS = {"train-rooms": "7", "val-rooms": "1", "room-seed": "6", "no-night": None,
         "tasks": "normals,depth,semseg", "size": "32x40",
         "workers": "3", "no-cache": None, "no-flip": None, "scales": "1.5,1.7", "rotate": "30",
         "weights": "mine.pth", "rank": "9", "last-rank": "5", "layers": "attn+mlp+others",
         "dropout": "0.25", "drop-path": "0.35", "fused": "3,4,5,6", "groups": "1,2,2,3",
         "sim-images": "2", "head-epochs": "3", "head-lr": "0.123",
         "epochs": "3", "batch-size": "2", "accumulate": "2", "lr": "0.03", "warmup": "0.5",
         "weight-decay": "0.4", "clip": "0.7", "device": "cpu", "amp": "bf16", "compile": None,
         "eval-every": "2", "log-every": "5"}
# The other flags, with the files that test them.
ELSEWHERE = {"dataset",                                              # test_train.py
             "method",                                               # extras/test_methods.py
             "out", "resume", "baseline", "tree", "tree_only",       # test_train.py
             "seed",                                                 # test_reference_run.py
             "backbone", "data_root", "download"}                    # this file, below


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Run train.py with FLAGS, without updating any weights, and record the important calls."""
    seen = SimpleNamespace(train_step=[], loader=[], draw_augmentation=[], gradient_similarity=[],
                           evaluate=[], load_weights=[], head_rates=[], compiled=[],
                           out=tmp_path_factory.mktemp("run") / "run")

    def spy(patch, where, name, replacement=None):
        """Patch `where.name` so that `seen` records the arguments of every call.

        The call is then passed on to `replacement` if it is given, otherwise to the original.
        """
        real = getattr(where, name)
        signature = inspect.signature(real)

        def called(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            getattr(seen, name).append(SimpleNamespace(**bound.arguments))
            if name == "train_step":
                rates = [group["lr"] for group in bound.arguments["optimizer"].param_groups]
                seen.train_step[-1].lr = rates
            return (replacement or real)(*args, **kwargs)
        patch.setattr(where, name, called)

    class NoWorkers(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers, **kwargs):
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, train, "loader")
        spy(patch, data, "loader")              # through which single_images reads
        spy(patch, train, "draw_augmentation")
        spy(patch, train, "evaluate")
        spy(patch, train, "train_step", lambda *args: torch.zeros(3))
        spy(patch, model_py, "load_weights", lambda *args: None)
        patch.setattr(recipes, "find_file", lambda path: path)      # mine.pth does not exist
        spy(patch, similarity_py, "gradient_similarity", lambda *args: torch.tensor(0.5))
        patch.setattr(data, "DataLoader", NoWorkers)
        patch.setattr(torch.optim.AdamW, "step",
                      lambda optimizer: seen.head_rates.append(optimizer.param_groups[0]["lr"]))
        patch.setattr(nn.Module, "compile", lambda self, **options: seen.compiled.append(self))
        flags = []
        for name, value in FLAGS.items():
            flags += [f"--{name}"] + ([] if value is None else [value])
        train.main([*flags, "--out", str(seen.out)])
    return seen


def test_no_flag_is_forgotten():
    """Each flag is in FLAGS or in ELSEWHERE, but not in both."""
    here = {name.removeprefix("no-").replace("-", "_") for name in FLAGS}
    assert vars(parse_arguments([])).keys() == here | ELSEWHERE
    assert not here & ELSEWHERE


def test_flags_of_data_and_augmentation_arrive(seen):
    """The data and augmentation flags reach the loader, the augmentation and the evaluation."""
    assert {len(call.dataset) for call in seen.loader} == {7, 1}
    assert {call.workers for call in seen.loader} == {3}
    assert {type(call.dataset) for call in seen.loader} == {Checked}    # not InMemory
    assert {call.dataset.dataset.night for call in seen.loader} == {False}
    for call in seen.train_step:
        assert [task.name for task in call.tasks] == ["normals", "depth", "semseg"]
        assert call.image.shape == (2, 3, 32, 40)
    assert {call.size for call in seen.evaluate} == {(32, 40)}
    assert len(seen.draw_augmentation) == len(seen.train_step)          # one call per step
    for call in seen.draw_augmentation:
        assert (call.B, call.flip, call.scales, call.rotate) == (2, False, (1.5, 1.7), 30)


def test_flags_of_the_network_arrive(seen):
    """The network flags and --compile reach the network."""
    model = seen.train_step[0].model
    assert {call.source for call in seen.load_weights} == {"mine.pth"}
    assert seen.compiled == [model]
    adapted = modules(model, TGLoRALinear)
    assert len(adapted) == 4 * 8 and {x.dropout for x in adapted} == {0.25}
    ranks = [sum(modules(stage, TGLoRALinear)[0].ranks) for stage in model.backbone.layers]
    assert ranks == [9, 9, 9, 5 * 3]
    rates = [drop.p for drop in modules(model, StochasticDepth)]
    assert rates == pytest.approx([0.35 * i / 7 for i in range(8)])
    assert model.backbone.layers[1].blocks[0].norm1.weight.requires_grad
    decoder = model.decoders["depth"]
    assert [conv.out_channels for conv in decoder.fuse] == [3, 4, 5, 6]
    assert decoder.head[0].out_channels == 4 * 18


def test_flags_of_similarity_and_tree_arrive(seen):
    """--groups reaches the network, and the similarity flags reach the similarity measurement."""
    backbone = seen.train_step[0].model.backbone
    groups = [len(modules(stage, TGLoRALinear)[0].ranks) for stage in backbone.layers]
    assert groups == [1, 2, 2, 3]
    assert seen.head_rates == pytest.approx([0.123, 0.082, 0.041])      # 3 epochs of one batch
    assert len(seen.gradient_similarity) == 2 * 3           # two images, three pairs of tasks


def test_flags_of_optimisation_arrive(seen):
    """The optimisation flags reach every training step, and so do --device and --amp."""
    assert len(seen.train_step) == 3 * (7 // 2)
    for i, call in enumerate(seen.train_step):
        rate = 0.03 * (i + 1) / 5.5
        if i > 4.5:
            rate = 0.03 * (1 + math.cos(math.pi * (i - 4.5) / 4.5)) / 2
        assert call.lr == pytest.approx([rate, rate])
        assert [group["weight_decay"] for group in call.optimizer.param_groups] == [0.4, 0]
        assert (call.parts, call.clip, call.amp) == (2, 0.7, torch.bfloat16)
        assert call.image.device.type == "cpu" and not call.scaler.is_enabled()


def test_flags_of_the_run_arrive(seen):
    """With --eval-every 2, a run of three epochs is evaluated twice: after epochs 2 and 3.

    With --log-every 5, it logs step 5 and the last step of each epoch: 3, 6 and 9.
    """
    lines = (seen.out / "log.jsonl").read_text().splitlines()
    steps = [line.split(",")[0] for line in lines if '"lr"' in line]
    assert steps == [f'{{"step": {n}' for n in (3, 5, 6, 9)]
    assert sum('"results"' in line for line in lines) == len(seen.evaluate) == 2


@pytest.mark.parametrize("name, blocks, channels", [
    ("mini", 8, 64), ("tiny", 12, 192), ("small", 24, 192), ("base", 24, 256)])
def test_backbone_arrives(name, blocks, channels):
    """Each Swin --backbone has the expected numbers of blocks, and of channels in the first map."""
    backbone = network("--backbone", name).backbone
    assert len(modules(backbone, StochasticDepth)) == blocks
    assert backbone.channels[0] == channels


def test_data_root_and_download_arrive(monkeypatch):
    """--data-root and --download reach the code that looks for the dataset."""
    asked = []
    monkeypatch.setattr("data.find_dataset", lambda *a: asked.append(a))
    monkeypatch.setattr("data.Files", lambda *a: [None])
    flags = ["--dataset", "nyud", "--data-root", "there", "--download"]
    open_dataset(parse_arguments(flags), "train")
    assert asked == [("nyud", "there", True)]


# --- values ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag, name, value", [
    ([], "data_root", "data"), ([], "seed", 0), ([], "head_lr", 2e-3), ([], "amp", "auto"),
    ([], "out", "runs/rooms"),
    (["--dataset", "nyud"], "out", "runs/nyud"), (["--size", "448x576"], "size", (448, 576)),
    (["--scales", "2:1"], "scales", tuple(np.linspace(2, 1, 101)))])
def test_values_are_read_as_documented(flag, name, value):
    """These defaults, --size with two numbers, and --scales with a range are parsed correctly."""
    assert getattr(parse_arguments(flag), name) == value


@pytest.mark.parametrize("flags, message", [
    ("--clip 0", "expected a number from 1e-06"),           # would train nothing
    ("--lr nan", "expected a number"), ("--lr inf", "expected a number"),
    ("--epochs 0", "expected a whole number from 1"), ("--epochs 1.5", "a whole number"),
    ("--dropout 1", "from 0 to 0.99"), ("--seed -1", "from 0"), ("--rank 5000", "to 4096"),
    ("--scales nan", "expected a number"), ("--scales 1,inf", "expected a number"),
    ("--scales 0.5:1:2", "expected LOW:HIGH"), ("--scales 1,", "none of them empty"),
    ("--size 64x", "none of them empty"), ("--size 64x64x64", "448 or 448x576"),
    ("--size 16", "from 32"), ("--tasks semseg,", "none of them empty"),
    ("--tasks=", "none of them empty"), ("--groups 1,2,3", "four numbers"),
    ("--groups 1,2,x,4", "a whole number"), ("--fused 1,2", "four numbers"),
    ("--method full --rank 8", "--rank has no effect with --method full"),
    ("--method decoders --layers attn", "--layers has no effect"),
    ("--method bdta --fused 1,1,1,1", "--fused has no effect"),
    ("--method mtlora --groups 1,1,1,1", "--groups has no effect"),
    ("--method bdta --tree-only", "--tree-only has no effect"),
    ("--method full --head-epochs 2", "--head-epochs has no effect with --method full"),
    ("--groups 1,1,1,4 --sim-images 2", "--sim-images has no effect with these settings"),
    ("--groups 4,4,4,4 --head-lr 1", "no similarity is measured"),
    ("--tree tree.json --head-lr 1", "--head-lr has no effect with these settings"),
    ("--tree tree.json --groups 1,1,1,4", "--groups has no effect with --tree"),
    ("--data-root data", "--data-root has no effect with --dataset rooms"),
    ("--dataset nyud --no-night", "--night has no effect with --dataset nyud"),
    ("--device cpu --amp fp16", "--amp has no effect with --device cpu"),
    ("--tree=", "expected a value"), ("--out=", "expected a value"),
    ("--frozen norm", "unrecognized"), ("--epoch 3", "unrecognized")])
def test_wrong_values_are_refused(flags, message, capsys):
    """Impossible values, unknown flags and flags without effect are usage errors."""
    with pytest.raises(SystemExit) as stop:
        parse_arguments(flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_every_flag_with_its_reason(capsys):
    """--help shows each flag with its help text, and defaults of the chosen dataset."""
    with pytest.raises(SystemExit):
        parse_arguments(["--dataset", "pascal", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for knob in (knob for knobs in TABLE.values() for knob in knobs):
        assert f"--{knob.name.replace('_', '-')}" in text
        assert knob.reason in text
    assert "(default: 3.125e-05)" in text and "(default: 0)" in text
    assert "None" not in text               # a default of None is not shown
