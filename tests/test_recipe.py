"""recipes.py against the papers' numbers, written here once more; and every flag reaches its place.

What a number then does is in test_reference_run.py.
"""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import StochasticDepth

import model as model_py
import similarity as similarity_py
import train
from data import CLASSES, MEAN, STD, Checked, collate, open_dataset, warp
from datasets.labels import read_image
from grouping import build_tree
from model import build
from similarity import finetune_decoders
from tasks import make_tasks
from tglora import TGLoRALinear
from util.parallel import Team

# arXiv 2509.19602, sections 4.3 and 7; what they take from MTLoRA (arXiv 2403.20320, its code):
# drop path and clip.
BOTH = dict(
    method="tglora", layers="attn+mlp", backbone="tiny", weights="imagenet", size=(448, 448),
    epochs=300, eval_every=20, warmup=20 / 300, weight_decay=0.05, accumulate=1, dropout=0.05,
    drop_path=0.2, clip=5.0, flip=True, fused=(18, 36, 72, 144))
OF_ITS_OWN = {
    "nyud": dict(tasks=["semseg", "normals", "depth"], groups=(1, 1, 2, 3), rank=63, last_rank=None,
                 batch_size=6, lr=1e-4, scales=(1, 1.2, 1.5), rotate=0),
    "pascal": dict(tasks=["semseg", "human_parts", "sal", "normals"], groups=(1, 2, 3, 4), rank=64,
                   last_rank=4, batch_size=32, lr=3.125e-5, rotate=20,
                   scales=tuple(np.linspace(0.75, 1.25, 101)))}
RANKS = {"nyud": [(63,), (63,), (42, 21), (21, 21, 21)],
         "pascal": [(64,), (48, 16), (32, 16, 16), (4, 4, 4, 4)]}


def network(*flags):
    """The network of these flags on the meta device: no weights, no time."""
    config = train.parse_arguments([*flags, "--weights", "none"])
    tasks = make_tasks(config.tasks, CLASSES[config.dataset])
    tree = build_tree(np.zeros((len(tasks), len(tasks))), config.groups)
    with torch.device("meta"):
        return build(config, tasks, tree)


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


# --- the recipes ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_the_recipe_is_the_papers(dataset):
    """Every number of section 7, and what the flags say where the paper is silent."""
    config = vars(train.parse_arguments(["--dataset", dataset]))
    for name, value in {**BOTH, **OF_ITS_OWN[dataset]}.items():
        assert config[name] == value, name


@pytest.mark.parametrize("dataset", ["nyud", "pascal"])
def test_the_network_is_the_papers(dataset):
    """gamma 4 and dropout 0.05 in every adapter, ranks a stage, drop path from 0 to 0.2."""
    model = network("--dataset", dataset)
    for stage, ranks in zip(model.backbone.layers, RANKS[dataset], strict=True):
        layers = modules(stage, TGLoRALinear)
        assert len(layers) == 4 * len(stage.blocks)
        assert {(layer.ranks, layer.scale, layer.dropout) for layer in layers} == {(ranks, 4, 0.05)}
    rates = [drop.p for drop in modules(model, StochasticDepth)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert {drop.mode for drop in modules(model, StochasticDepth)} == {"row"}


@pytest.mark.parametrize("method", ["mtlora", "mtlora+"])
def test_mtloras_adapters_have_the_same_scale_and_dropout(method):
    model = network("--dataset", "pascal", "--method", method)
    layers = modules(model, TGLoRALinear)
    assert len(layers) >= 4 * 12 and {(x.scale, x.dropout) for x in layers} == {(4, 0.05)}


def test_what_is_random_at_the_start():
    """A as nn.Linear begins, B zero; a backbone without weights by Swin's 0.02; all by the seed."""
    def start(seed):
        config = train.parse_arguments(["--tasks", "semseg,depth,normals", "--weights", "none",
                                        "--seed", str(seed)])
        tasks = make_tasks(config.tasks, 7)
        return build(config, tasks, build_tree(np.zeros((3, 3)), config.groups))

    model = start(1)
    layer = model.backbone.layers[3].blocks[0].mlp.fc2  # 1024 inputs
    for A, B in zip(layer.lora_A, layer.lora_B):
        assert A.abs().max().item() == pytest.approx(1 / 32, rel=0.01) and not B.any()
        assert A.std().item() == pytest.approx(1 / 32 / 3 ** 0.5, rel=0.05)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    table = model.backbone.layers[3].blocks[0].attn.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.05)
    for p, again, other in zip(*(m.parameters() for m in (model, start(1), start(2)))):
        assert torch.equal(p, again)
        if len(p) > 1:  # zeros or ones, or random
            assert torch.equal(p, other) == bool((p == p.flatten()[0]).all())


def test_mtloras_last_blocks_drop_paths_too():
    """With every update dropped, a stage is its patch merging alone, for each group."""
    config = train.parse_arguments(["--tasks", "semseg,depth,normals", "--method", "mtlora",
                                    "--weights", "none"])
    model = build(config, make_tasks(config.tasks, 7), [[(0, 1, 2)]] * 4).train()
    for drop in modules(model, StochasticDepth):
        drop.p = 1.0
    stage, x = model.backbone.layers[1], torch.randn(2, 8, 8, 64)
    torch.testing.assert_close(stage(x), stage.downsample(x.repeat(4, 1, 1, 1)))


def test_the_tasks_weights_are_the_papers():
    """Eq. 8 with the weights of MTLoRA's code: 1, 1, 2, 5, 10; of MTI-Net's for edges: 50."""
    weights = {"semseg": 1, "depth": 1, "human_parts": 2, "sal": 5, "normals": 10, "edge": 50}
    assert {task.name: task.weight for task in make_tasks(list(weights), 21)} == weights


def test_the_outputs_and_what_is_compared():
    """Classes of each dataset; mIoU up, rmse and the mean angle down (table 1)."""
    assert {k: len(names) for k, names in CLASSES.items()} == {"rooms": 7, "nyud": 40, "pascal": 21}
    found = {t.name: (t.outputs, t.metric, t.higher_is_better) for t in make_tasks(
        ["semseg", "depth", "human_parts", "sal", "normals"], 40)}
    assert found == {"semseg": (40, "mIoU", True), "human_parts": (7, "mIoU", True),
                     "sal": (1, "mIoU", True), "depth": (1, "rmse", False),
                     "normals": (3, "mean", False)}
    thresholds = make_tasks(["sal"], 1)[0].thresholds.tolist()  # MTLoRA's code
    assert thresholds == pytest.approx([0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7,
                                        0.75, 0.8, 0.85, 0.9])


def test_the_optimizer_is_adamw_with_its_usual_numbers():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = train.make_optimizer(net, 1e-4, 0.05)
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.05, 0), strict=True):
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 and group["lr"] == 1e-4
        assert group["weight_decay"] == decay
        assert not group["amsgrad"] and not group["maximize"]


def test_the_schedule_begins_above_zero_and_ends_at_zero():
    """Of 300 epochs 20 of warm-up: the first step has 1/21 of the peak, the 21st all of it."""
    rates = [train.learning_rate(step, 300, 1e-4, 20 / 300) for step in range(301)]
    assert rates[0] == pytest.approx(1e-4 / 21) and rates[9] == pytest.approx(1e-4 * 10 / 21)
    assert rates[20] == pytest.approx(1e-4) == max(rates)
    assert rates[90] == pytest.approx(1e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[300] == pytest.approx(0, abs=1e-18)
    assert train.learning_rate(0, 300, 1e-4, 0) == pytest.approx(1e-4)


def test_a_photo_becomes_what_the_backbone_was_trained_on(tmp_path):
    """Red, green and blue in this order, less ImageNet's mean, by its deviation."""
    Image.new("RGB", (40, 40), (255, 51, 0)).save(tmp_path / "photo.png")
    photo = torch.from_numpy(read_image(tmp_path / "photo.png")).permute(2, 0, 1)
    image, _ = warp(collate([{"image": photo}]), (32, 32))
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(image.mean((0, 2, 3)), torch.tensor(expected))
    assert MEAN == (0.485, 0.456, 0.406) and STD == (0.229, 0.224, 0.225)


# --- steps ----------------------------------------------------------------------------------------
class Point(nn.Module):
    """Predicts one depth everywhere."""

    def __init__(self):
        super().__init__()
        self.depth = nn.Parameter(torch.zeros(1, 1, 1, 1))

    def forward(self, image):
        return {"depth": self.depth.expand(len(image), 1, *image.shape[2:])}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("clip, moved", [(0.25, 0.25), (5.0, 1.0)])
def test_gradients_are_clipped_at_their_true_size(clip, moved, scale):
    """The depth's L1 has a gradient of norm 1; fp16's loss scale is taken off before it is cut."""
    net, tasks = Point(), make_tasks(["depth"], 7)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    train.train_step(net, tasks, optimizer, scaler, torch.zeros(2, 3, 4, 4),
                     {"depth": torch.full((2, 1, 4, 4), 3.0)}, 1, clip, None,
                     Team(torch.device("cpu")))
    assert net.depth.item() == pytest.approx(moved)


class Number(nn.Module):
    """A decoder that predicts one number, whatever the maps."""

    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1))

    def forward(self, maps, size):
        return self.number


def test_decoders_before_the_similarity_are_trained_with_eq_8(monkeypatch):
    """Plain SGD, as Adam would hide a factor: steps of lr x weight x gradient, which is 1 here."""
    monkeypatch.setattr("torch.optim.AdamW", torch.optim.SGD)
    tasks = [SimpleNamespace(name=name, weight=weight, loss=lambda pred, label: -pred.sum())
             for name, weight in (("a", 1.0), ("b", 10.0))]
    net, label = nn.Module(), torch.zeros(1)
    net.backbone = nn.Conv2d(3, 1, 1)
    net.decoders = nn.ModuleDict({"a": Number(), "b": Number()})
    example = torch.zeros(1, 3, 4, 4), {"a": label, "b": label}
    finetune_decoders(net, tasks, lambda batches: [example for _ in batches], [[0], [0]], lr=0.1)
    assert net.decoders["a"].number.item() == pytest.approx(0.1 + 0.05)  # the rate falls to 0
    assert net.decoders["b"].number.item() == pytest.approx(1.0 + 0.5)


# --- flags ----------------------------------------------------------------------------------------
# Of every flag a value that is no recipe's.
FLAGS = {"train-rooms": "7", "val-rooms": "1", "tasks": "normals,depth,semseg", "size": "32x40",
         "workers": "3", "no-cache": None, "no-flip": None, "scales": "1.5,1.7", "rotate": "30",
         "weights": "mine.pth", "rank": "9", "last-rank": "5", "layers": "attn+mlp+others",
         "without": "mlp.fc2", "frozen": "norm2", "dropout": "0.25", "drop-path": "0.35",
         "fused": "3,4,5,6",
         "groups": "1,2,2,3", "sim-images": "2", "head-epochs": "3", "head-lr": "0.123",
         "normalize": "elementwise", "stage-similarity": None,
         "epochs": "3", "batch-size": "2", "accumulate": "2", "lr": "0.03", "warmup": "0.5",
         "weight-decay": "0.4", "clip": "0.7", "device": "cpu", "amp": "bf16", "compile": None,
         "eval-every": "2", "log-every": "5"}
ELSEWHERE = {
    "dataset", "method", "out", "resume", "baseline", "tree",  # test_train.py, test_mtlora.py
    "seed",                                                    # test_reference_run.py
    "tree_only",                                               # test_similarity.py
    "budget_gmacs", "budget_params",                           # test_budget.py
    "reduction",                                               # test_bdta.py
    "backbone", "data_root", "download"}                       # below


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run with all of FLAGS in which no step is computed: what everyone was asked for."""
    seen = SimpleNamespace(steps=[], loaders=[], drawn=[], head_steps=[], compared=[],
                           evaluations=[], out=tmp_path_factory.mktemp("run"))

    def spy(patch, where, name, instead):
        """`where.name` is `instead`, called with its arguments by their names."""
        real = getattr(where, name)
        signature = inspect.signature(real)

        def called(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return instead(SimpleNamespace(**bound.arguments), real)
        patch.setattr(where, name, called)

    def load(a, real):
        seen.loaders.append(a)
        return real(a.dataset, a.batches)

    def weights(a, real):
        seen.weights = a.source

    def draw(a, real):
        seen.drawn.append(a)
        return real(a.B, a.flip, a.scales, a.rotate)

    def head_step(optimizer):  # no other optimizer takes one
        seen.head_steps.append(optimizer.param_groups[0]["lr"])

    def similarity(a, real):
        seen.compared.append(a.normalize)
        return torch.tensor(0.5)

    def step(a, real):
        a.lr = [group["lr"] for group in a.optimizer.param_groups]
        seen.steps.append(a)
        return torch.zeros(len(a.tasks))

    def evaluate(a, real):
        seen.evaluations.append(a)
        return real(a.predict, a.tasks, a.batches, a.size)

    def compiled(self, *args, **kwargs):
        seen.compiled = self

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, train, "loader", load)
        spy(patch, model_py, "load_weights", weights)
        spy(patch, train, "draw_augmentation", draw)
        spy(patch, similarity_py, "gradient_similarity", similarity)
        patch.setattr(torch.optim.AdamW, "step", head_step)
        spy(patch, train, "train_step", step)
        spy(patch, train, "evaluate", evaluate)
        patch.setattr(nn.Module, "compile", compiled)
        flags = [part for name, value in FLAGS.items()
                 for part in (f"--{name}", value) if part is not None]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a busy machine is slow with many small steps in several
        train.main([*flags, "--out", str(seen.out / "run")])
        torch.set_num_threads(threads)
    return seen


def test_no_flag_is_forgotten():
    """Each is in the run above, or looked at elsewhere."""
    here = {name.removeprefix("no-").replace("-", "_") for name in FLAGS}
    assert vars(train.parse_arguments([])).keys() == here | ELSEWHERE
    assert not here & ELSEWHERE


def test_flags_of_data_and_augmentation_arrive(seen):
    """--train-rooms, --val-rooms, --tasks, --size, --workers, --cache, --flip, --scales and
    --rotate."""
    assert {len(a.dataset) for a in seen.loaders} == {7, 1}
    assert {a.workers for a in seen.loaders} == {3}
    assert {type(a.dataset) for a in seen.loaders} == {Checked}  # not in memory
    for a in seen.steps:
        assert [task.name for task in a.tasks] == ["normals", "depth", "semseg"]
        assert a.image.shape == (2, 3, 32, 40)
    assert {a.size for a in seen.evaluations} == {(32, 40)}
    assert len(seen.drawn) == len(seen.steps)  # nothing else is augmented
    assert {(a.B, a.flip, a.scales, a.rotate) for a in seen.drawn} == {(2, False, (1.5, 1.7), 30)}


def test_flags_of_the_network_arrive(seen):
    """--weights, --rank, --last-rank, --layers, --without, --frozen, --dropout, --drop-path,
    --fused, and --compile."""
    backbone = seen.steps[0].model.backbone
    assert seen.weights == "mine.pth" and seen.compiled is seen.steps[0].model
    layers = modules(backbone, TGLoRALinear)
    assert len(layers) == 3 * 8 and {layer.dropout for layer in layers} == {0.25}
    ranks = [sum(modules(stage, TGLoRALinear)[0].ranks) for stage in backbone.layers]
    assert ranks == [9, 9, 9, 5 * 3]
    assert [drop.p for drop in modules(backbone, StochasticDepth)] == pytest.approx(
        [0.35 * i / 7 for i in range(8)])
    block = backbone.layers[1].blocks[0]
    assert type(block.mlp.fc2) is nn.Linear and type(block.mlp.fc1) is TGLoRALinear
    assert block.norm1.weight.requires_grad and not block.norm2.weight.requires_grad
    decoder = seen.steps[0].model.decoders["depth"]
    assert [conv.out_channels for conv in decoder.fuse] == [3, 4, 5, 6]
    assert decoder.head[0].out_channels == 4 * 18


def test_flags_of_similarity_and_tree_arrive(seen):
    """--groups, --sim-images, --head-epochs, --head-lr, --normalize."""
    backbone = seen.steps[0].model.backbone
    groups = [len(modules(stage, TGLoRALinear)[0].ranks) for stage in backbone.layers]
    assert groups == [1, 2, 2, 3]
    assert len(seen.head_steps) == 3 * (2 // 2) and seen.head_steps[0] == 0.123
    assert seen.compared == [FLAGS["normalize"]] * (2 * 3)  # two examples, three pairs


def test_flags_of_optimisation_arrive(seen):
    """--epochs, --batch-size, --accumulate, --lr, --warmup, --weight-decay, --clip, --device and
    --amp."""
    assert len(seen.steps) == 3 * (7 // 2)
    for i, a in enumerate(seen.steps):
        rate = 0.03 * ((i + 1) / 5.5 if i < 4.5 else (1 + math.cos(math.pi * (i - 4.5) / 4.5)) / 2)
        assert a.lr == pytest.approx([rate, rate])
        assert [group["weight_decay"] for group in a.optimizer.param_groups] == [0.4, 0]
        assert (a.parts, a.clip, a.amp) == (2, 0.7, torch.bfloat16)
        assert a.image.device.type == "cpu" and not a.scaler.is_enabled()


def test_flags_of_the_run_arrive(seen):
    """--eval-every 2 of 3 epochs, the last one too; --log-every 5 of 9 steps, epochs' ends too."""
    lines = (seen.out / "run/log.jsonl").read_text().splitlines()
    steps = [line.split(",")[0] for line in lines if '"lr"' in line]
    assert steps == [f'{{"step": {n}' for n in (3, 5, 6, 9)]
    assert sum('"results"' in line for line in lines) == len(seen.evaluations) == 2


@pytest.mark.parametrize("name, blocks, channels", [
    ("mini", 8, 64), ("tiny", 12, 192), ("small", 24, 192), ("base", 24, 256)])
def test_backbone_arrives(name, blocks, channels):
    """--backbone: Swin's tables of depths and widths."""
    backbone = network("--backbone", name).backbone
    assert len(modules(backbone, StochasticDepth)) == blocks
    assert backbone.channels[0] == channels


def test_data_root_and_download_arrive(monkeypatch):
    """--data-root and --download, to whoever unpacks and downloads."""
    asked = []
    monkeypatch.setattr("data.find_dataset", lambda *a: asked.append(a))
    monkeypatch.setattr("data.Files", lambda *a: [None])
    open_dataset(train.parse_arguments(["--dataset", "nyud", "--data-root", "there",
                                        "--download"]), "train")
    assert asked == [("nyud", "there", True)]


@pytest.mark.parametrize("flag, name, value", [
    ([], "data_root", "data"), ([], "seed", 0), ([], "amp", "auto"), ([], "out", "runs/rooms"),
    (["--size", "448x576"], "size", (448, 576)), (["--scales", "2:1"], "scales",
                                                  tuple(np.linspace(2, 1, 101)))])
def test_values_are_read_as_documented(flag, name, value):
    assert getattr(train.parse_arguments(flag), name) == value
