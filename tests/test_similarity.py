"""similarity.py against a direct computation, example by example; how sure a tree is."""

import json
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import similarity
import train
from grouping import best_partition, best_partitions, build_tree, format_tree, score
from model import tree_net
from similarity import (finetune_decoders, format_similarity, fresh_decoders, gradient_similarity,
                        task_similarity)
from stability import next_best, stability
from swin import build_swin
from tasks import make_tasks

NAMES = ["semseg", "depth", "normals"]


def example(seed, without=()):
    """One image with random labels; none valid for the tasks in `without`."""
    g = torch.Generator().manual_seed(seed)
    labels = {"semseg": torch.randint(4, (1, 28, 28), generator=g),
              "depth": torch.rand(1, 1, 28, 28, generator=g) + 1,
              "normals": F.normalize(torch.randn(1, 3, 28, 28, generator=g), dim=1)}
    for name in without:
        labels[name] = torch.full_like(labels[name], 255 if name == "semseg" else 0)
    return torch.randn(1, 3, 28, 28, generator=g), labels


def load(batches):
    """Batches of examples, as the decoders' training asks for them."""
    for batch in batches:
        images, labels = zip(*map(example, batch))
        yield torch.cat(images), {k: torch.cat([x[k] for x in labels]) for k in labels[0]}


def network(tasks, seed=0):
    torch.manual_seed(seed)
    everything = [tuple(range(len(tasks)))]
    return tree_net(build_swin("mini", embed_dim=16, drop_path=0.5), tasks, [everything] * 4)


# --- eq. 2 and 3 ----------------------------------------------------------------------------------
@pytest.mark.parametrize("normalize", ["elementwise", "none"])
def test_equals_direct_autograd(normalize):
    """.backward() for each task and example, and eq. 2 and 3 written out in numpy.

    Element by element, weights whose gradient is little but rounding count as much as any: how the
    sums of a gradient are cut into threads shows in the third digit.
    """
    tasks = make_tasks(NAMES, 4)
    model, examples = network(tasks), [example(0), example(1, ["depth"]), example(2), example(3)]
    found = task_similarity(model, tasks, examples, normalize)
    samples = np.full((4, 3, 3), np.nan)
    model.eval()
    for n, (image, labels) in enumerate(examples):
        g = []
        for task in tasks:
            model.zero_grad()
            task.loss(model(image)[task.name], labels[task.name]).backward()
            g.append(np.concatenate([p.grad.double().numpy().ravel()
                                     for p in model.backbone.parameters()]))
        for t in range(3):
            for u in range(3):
                if n == 1 and 1 in (t, u):
                    continue
                a, b = g[t], g[u]
                if normalize == "elementwise":
                    a, b = (np.where(abs(v) < 2.0 ** -23 * abs(v).max(), 0, v) for v in (a, b))
                    scale = np.abs(a) + np.abs(b)
                    a, b = (np.divide(v, scale, out=np.zeros_like(v), where=scale > 0)
                            for v in (a, b))
                samples[n, t, u] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    atol = 1e-5 if normalize == "none" else 5e-3
    np.testing.assert_allclose(found.samples, samples, atol=atol)
    assert found.count.tolist() == [[4, 3, 4], [3, 3, 3], [4, 3, 4]]
    for t, u in combinations(range(3), 2):
        values = samples[:, t, u][~np.isnan(samples[:, t, u])]
        assert found.mean[t, u] == pytest.approx(values.mean(), abs=atol)
        assert found.error[t, u] == pytest.approx(values.std(ddof=1) / len(values) ** 0.5, abs=atol)
    assert np.array_equal(np.diag(found.mean), np.ones(3))
    assert np.array_equal(found.mean, found.mean.T)


def test_the_default_is_the_plain_cosine():
    """As eq. 2 is printed: dividing by norms changes nothing. Element by element it does."""
    g, h = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([100.0, -1.0, 0.0])
    assert gradient_similarity(g, h) == pytest.approx(9999 / 10001)
    assert gradient_similarity(g / 201, h / 201) == pytest.approx(9999 / 10001)
    assert gradient_similarity(g, h, "elementwise").abs() < 1e-6
    assert gradient_similarity(g, g) == pytest.approx(1)
    assert gradient_similarity(g, 0 * g) == 0
    assert train.parse_arguments([]).normalize == "none"
    with pytest.raises(ValueError, match="expected elementwise or none"):
        gradient_similarity(g, h, "l2")


def test_millions_of_small_terms_add_up():
    """In float32 to 1e-6, also beside a few large ones."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=2_000_003) * np.where(rng.random(2_000_003) < 1e-5, 1e3, 1e-3)
    b = a * 0.1 + rng.normal(size=len(a)) * 1e-3
    exact = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    g, h = (torch.from_numpy(v).float() for v in (a, b))
    assert gradient_similarity(g, h) == pytest.approx(exact, abs=1e-6)


def test_rounding_noise_has_no_weight_element_by_element():
    """A thousand weights without a true gradient change nothing, however they agree."""
    torch.manual_seed(0)
    g, h, noise = torch.randn(500), torch.randn(500), torch.rand(1000) * 1e-8
    both = [torch.cat([x, noise]) for x in (g, h)]
    assert gradient_similarity(*both, "elementwise") == pytest.approx(
        gradient_similarity(g, h, "elementwise").item(), abs=1e-6)


def test_a_keys_bias_has_no_weight():
    """Softmax ignores it: what is computed for it is rounding, of random sign."""
    tasks = make_tasks(NAMES, 4)
    model, (image, labels) = network(tasks), example(0)
    model.eval()
    loss = tasks[0].loss(model(image)["semseg"], labels["semseg"])
    shared = dict(model.backbone.named_parameters())
    g = dict(zip(shared, torch.autograd.grad(loss, list(shared.values()))))
    largest = max(x.abs().max() for x in g.values())
    keys = torch.cat([x.chunk(3)[1] for name, x in g.items() if name.endswith("qkv.bias")])
    assert keys.abs().max() < torch.finfo().eps * largest


def test_missing_labels_are_left_out_of_their_pairs():
    """An example without depth counts for the other pair; a pair with no example is an error."""
    tasks = make_tasks(NAMES, 4)
    model = network(tasks)
    full, part = example(0), example(1, without=["depth"])
    alone, both = (task_similarity(model, tasks, e).mean for e in ([full], [full, part]))
    assert both[0, 1] == alone[0, 1] and both[0, 2] != alone[0, 2]
    with pytest.raises(ValueError, match="both semseg and depth$"):  # and no flag of train.py
        task_similarity(model, tasks, [part])


def test_a_copy_of_a_task_is_its_nearest_and_shares_its_group():
    """depth, twice, among three tasks: highest similarity, one group, and no doubt of it."""
    tasks = make_tasks(NAMES, 4)
    twin = make_tasks(["depth"], 4)[0]
    twin.name = "twin"
    tasks.append(twin)
    model = network(tasks)
    model.decoders["twin"].load_state_dict(model.decoders["depth"].state_dict())
    examples = []
    for s in range(3):
        image, labels = example(s)
        examples.append((image, {**labels, "twin": labels["depth"]}))
    found = task_similarity(model, tasks, examples)
    off_diagonal = found.mean - 2 * np.eye(4)
    assert off_diagonal.argmax() in (1 * 4 + 3, 3 * 4 + 1)
    tree = build_tree(found.mean, (1, 1, 3, 4))
    assert (1, 3) in tree[2]
    assert stability(tree, found.samples)[2] == (True, 1.0)


def test_a_task_that_needs_nothing_of_the_backbone_is_like_no_other():
    """Its prediction comes from elsewhere: similarity 0, as that of weights which nothing uses."""
    tasks = make_tasks(NAMES, 4)
    model, plain = network(tasks), task_similarity(network(tasks), tasks, [example(0)])
    model.decoders["depth"] = Fixed(1)
    model.backbone.unused = torch.nn.Parameter(torch.ones(3))
    found = task_similarity(model, tasks, [example(0)], stages=model.backbone.layers)
    assert found.mean[1].tolist() == [0, 1, 0] and found.stages[0, :, 1, 0].tolist() == [0] * 4
    assert found.mean[0, 2] == pytest.approx(plain.mean[0, 2], rel=1e-6)


class Fixed(torch.nn.Module):
    """A decoder that looks at nothing."""

    def __init__(self, outputs):
        super().__init__()
        self.value = torch.nn.Parameter(torch.ones(1, outputs, 1, 1))

    def forward(self, maps, size):
        return self.value.expand(len(maps[0]), -1, *size)


def state(model):
    """Modes, what requires a gradient, and what has one."""
    return ([m.training for m in model.modules()],
            [(p.requires_grad, p.grad is None) for p in model.parameters()])


def test_everything_is_left_as_found():
    """Modes, what requires a gradient and that there is none, also after an error; weights that
    nothing uses are 0."""
    tasks = make_tasks(NAMES, 4)
    model = network(tasks)
    model.backbone.unused = torch.nn.Parameter(torch.ones(3))
    model.backbone.layers[0].requires_grad_(False).eval()
    before = state(model)
    finetune_decoders(model, tasks, load, [[0, 1]], lr=1e-3)
    assert state(model) == before
    task_similarity(model, tasks, [example(0)])
    assert state(model) == before
    with pytest.raises(ValueError):
        task_similarity(model, tasks, [example(0, ["depth"])])
    assert state(model) == before


@pytest.mark.parametrize("failing", ["backbone", "decoder", "loss"])
def test_an_error_of_the_users_own_leaves_everything_as_found(failing):
    """Whichever part raises, in either function."""
    tasks = make_tasks(NAMES, 4)
    model = network(tasks)
    model.backbone.layers[0].requires_grad_(False).eval()
    before = state(model)

    def fail(*args):
        raise RuntimeError("of the user's own")

    if failing == "loss":
        tasks[1].loss = fail
    else:
        part = model.backbone.layers[1] if failing == "backbone" else model.decoders["depth"]
        part.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="own"):
        finetune_decoders(model, tasks, load, [[0, 1]], lr=1e-3)
    assert state(model) == before
    with pytest.raises(RuntimeError, match="own"):
        task_similarity(model, tasks, [example(0)])
    assert state(model) == before


def test_each_stage_is_compared_on_its_own_weights():
    """The first with the patches before it, in the same pass; the whole is what it is alone."""
    tasks = make_tasks(NAMES, 4)
    model, examples = network(tasks), [example(0), example(1, ["depth"])]
    found = task_similarity(model, tasks, examples, stages=model.backbone.layers)
    plain = task_similarity(model, tasks, examples)
    np.testing.assert_allclose(found.samples, plain.samples, rtol=1e-6, atol=1e-7)
    assert found.stages.shape == (2, 4, 3, 3) and plain.stages.shape == (2, 0, 3, 3)
    model.eval()
    for n, (image, labels) in enumerate(examples):
        for s, stage in enumerate(model.backbone.layers):
            own = [*(model.backbone.patch_embed.parameters() if s == 0 else ()),
                   *stage.parameters()]
            grads = {}
            for task in tasks if n == 0 else (tasks[0], tasks[2]):
                loss = task.loss(model(image)[task.name], labels[task.name])
                grads[task.name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)])
            for a, b in combinations(grads, 2):
                expected = F.cosine_similarity(grads[a], grads[b], dim=0)
                t, u = NAMES.index(a), NAMES.index(b)
                assert found.stages[n, s, t, u] == pytest.approx(expected.item(), abs=1e-5)
                assert found.stages[n, s, u, t] == found.stages[n, s, t, u]
    assert np.isnan(found.stages[1, :, 1]).all()
    means = found.as_json()["stage_similarity"]
    assert np.allclose(means, np.nanmean(found.stages, 0)) and means[0] != means[1]


# --- decoders -------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_matrix():
    """Decoders' training included; drop path is off all the while."""
    tasks, found = make_tasks(NAMES, 4), []
    for other_seed in range(2):
        model = network(tasks)
        torch.manual_seed(other_seed)  # nothing random may be left
        finetune_decoders(model, tasks, load, [[0, 1], [2, 3]], lr=1e-3)
        found.append(task_similarity(model, tasks, map(example, range(3))))
    assert np.array_equal(found[0].samples, found[1].samples)


def test_decoders_learn_and_the_backbone_stays():
    """Fine-tuning changes decoders only, and lowers the loss; so it does in bf16."""
    tasks = make_tasks(NAMES, 4)
    for amp in (None, torch.bfloat16):
        model = network(tasks)
        before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        (image, labels), = load([[0]])

        def loss():
            return sum(t.weight * t.loss(model.train()(image)[t.name], labels[t.name])
                       for t in tasks)
        model.backbone.eval()
        first = loss().item()
        finetune_decoders(model, tasks, load, [[0]] * 10, lr=1e-2, amp=amp)
        assert loss().item() < first
        assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_kept_maps_give_the_same_decoders(monkeypatch):
    """As maps computed in every step, which is what is done where they do not fit.

    Not compared is the bias before BatchNorm, which takes it out again: its gradient is rounding.
    """
    tasks, states, images = make_tasks(NAMES, 4), [], []
    batches = [[0, 3], [4, 1], [2, 0], [1, 3]]  # 5 examples: the last chunk is shorter
    for memory in (similarity.MEMORY, 0):
        monkeypatch.setattr(similarity, "MEMORY", memory)
        model, seen = network(tasks), []
        model.backbone.register_forward_pre_hook(partial(lambda s, m, x: s.append(len(x[0])), seen))
        finetune_decoders(model, tasks, load, batches, lr=1e-3)
        states.append({k: v for k, v in model.decoders.state_dict().items()
                       if not k.endswith(("head.0.bias", "running_mean"))})
        images.append(seen)
    assert images == [[2, 2, 1], [2] + [2] * 4]  # each image once; a first look, then each batch
    for name, kept in states[0].items():
        torch.testing.assert_close(kept, states[1][name], atol=2e-5, rtol=1e-4)


def test_decoders_of_a_seed_do_not_depend_on_the_order():
    """By (seed, name): the same for other neighbours, others for another seed or name."""
    two, three = (network(make_tasks(names, 4), seed) for seed, names in
                  enumerate((["normals", "semseg"], NAMES)))
    for model in (two, three):
        fresh_decoders(model, 5)
    for name in ("semseg", "normals"):
        for a, b in zip(two.decoders[name].parameters(), three.decoders[name].parameters()):
            assert torch.equal(a, b)
    fuse = [d.fuse[0].weight for d in three.decoders.values()]
    assert not torch.equal(fuse[0], fuse[1])
    fresh_decoders(two, 6)
    assert not torch.equal(two.decoders["semseg"].fuse[0].weight, fuse[0])


# --- how sure a tree is ---------------------------------------------------------------------------
def random_samples(seed, N=30, T=5, missing=0.3):
    """(N, T, T), of which some examples say nothing of task 2."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.1, 0.3, (N, T, T)) + 0.1 * rng.normal(size=(T, T))
    x = (x + x.transpose(0, 2, 1)) / 2
    without = rng.random(N) < missing
    x[without, 2] = x[without, :, 2] = np.nan
    return x


def test_agreement_equals_a_direct_bootstrap():
    """Every draw listed and its tree built; the lead over the next best, its error."""
    for seed in range(4):
        samples = random_samples(seed)
        tree = build_tree(np.nanmean(samples, 0), (1, 2, 4, 5))
        choices = stability(tree, samples)
        rng, rebuilt = np.random.default_rng(0), []
        for times in rng.multinomial(30, np.full(30, 1 / 30), 200):
            rebuilt.append(np.nanmean(np.repeat(samples, times, 0), 0))
        assert choices[0] is None and choices[3] is None
        for stage in (1, 2):
            same = [build_tree(m, (1, 2, 4, 5))[stage] == tree[stage] for m in rebuilt]
            assert choices[stage].agreement == pytest.approx(np.mean(same))
        # Stage 3 merges the pair that is most similar; the next best is the second.
        pairs = sorted(combinations(range(5), 2), key=lambda p: -np.nanmean(samples, 0)[p])[:2]
        leads = [m[pairs[0]] - m[pairs[1]] for m in (np.nanmean(samples, 0), *rebuilt)]
        assert choices[2].decided == (leads[0] > 2 * np.std(leads[1:]))


def test_the_second_best_partition_equals_brute_force():
    """Of the last stage; and no third is invented where there are two."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        sim = rng.normal(size=(5, 5))
        splits = {frozenset(frozenset(t for t in range(5) if key[t] == g) for g in set(key))
                  for key in np.ndindex(3, 3, 3, 3, 3) if len(set(key)) == 3}
        scores = sorted((score([tuple(sorted(g)) for g in p], sim) for p in splits), reverse=True)
        best, second = best_partitions(sim, 3, 2)
        assert [score(best, sim), score(second, sim)] == pytest.approx(scores[:2])
        assert best == best_partition(sim, 3)
        assert next_best([[tuple(range(5))], best], 1, sim) == second
    assert len(best_partitions(np.eye(3), 2, 9)) == 3
    assert len(best_partitions(np.eye(3), 3, 2)) == 1


def test_a_tie_is_undecided_and_a_clear_case_is_not():
    """As printed beside the tree; without a choice there is no remark, nor with one example."""
    noise = np.random.default_rng(0).integers(-16, 16, (50, 1, 1)) / 64  # so that sums are exact
    clear = np.zeros((50, 3, 3)) + noise
    clear[:, [0, 1], [1, 0]] += 0.5
    tie = clear.copy()
    tie[:, [0, 2], [2, 0]] = clear[::-1, [0, 1], [1, 0]]  # as similar on the mean
    for samples, remark in ((clear, "   100 % of resamples agree"), (clear[:1], "   undecided: "),
                            (tie, "   undecided: ")):
        tree = build_tree(samples.mean(0), (1, 1, 2, 3))
        lines = format_tree(tree, NAMES, stability(tree, samples)).splitlines()
        assert lines[2].startswith("stage 3   {semseg, depth} {normals}" + remark)
        assert [line.endswith("}") for line in lines] == [True, True, False, True]
    tree = build_tree(clear.mean(0), (1, 1, 2, 2))  # here the last stage chooses, and no other
    assert [c and c.decided for c in stability(tree, clear)] == [None, None, None, True]


def test_the_matrix_is_printed_in_columns():
    """Whatever names are as long as; counts where they differ between pairs."""
    samples = random_samples(0, N=9, T=3)
    known = ~np.isnan(samples)
    found = similarity.Similarity(np.nanmean(samples, 0), np.full((3, 3), 0.0121), known.sum(0),
                                  samples, samples[:, None])
    for names in (["a", "b", "c"], ["semseg", "a_task_with_a_long_name", "sal"]):
        lines = format_similarity(found, names).splitlines()
        assert len(lines) == 8
        assert len(set(map(len, lines[:4]))) == len(set(map(len, lines[4:]))) == 1
        assert lines[1].split()[:5] == [names[0], "1", f"{found.mean[0, 1]:.4f}", "+-", "0.0121"]
        assert lines[5].split() == [names[0], *map(str, found.count[0])]
    assert len(format_similarity(found._replace(count=np.full((3, 3), 9)), names).splitlines()) == 4


# --- as a user runs it ----------------------------------------------------------------------------
SMALL = ["--tasks", "semseg,depth,normals", "--train-rooms", "8", "--val-rooms", "2", "--size",
         "56", "--sim-images", "6", "--head-epochs", "2", "--batch-size", "2", "--device", "cpu",
         "--tree-only"]


def test_the_order_of_tasks_changes_names_alone(tmp_path, capsys):
    """--tasks reversed: the same similarities, tree and agreement; --tree-only ends there."""
    names = ["semseg", "depth", "normals", "sal"]
    found = []
    for order in (names, names[::-1]):
        out = tmp_path / order[0]
        train.main([*SMALL, "--tasks", ",".join(order), "--out", str(out)])
        assert {path.name for path in out.iterdir()} == {".lock", "tree.json", "tree.png"}
        found.append(json.loads((out / "tree.json").read_text()))
    text = capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"already holds a run \(tree.png, tree.json\).*--tree"):
        train.main([*SMALL, "--tasks", ",".join(order), "--out", str(out)])
    assert "% of resamples agree" in text and "trained parameters" not in text
    one, other = found
    for key in ("similarity", "standard_error", "count"):
        backwards = np.array(other[key])[::-1, ::-1]
        np.testing.assert_allclose(np.array(one[key]), backwards, atol=1e-9)
    assert one["choices"] == other["choices"]
    assert [c is None for c in one["choices"]] == [True, False, False, True]
    for stage, again in zip(one["tree"], other["tree"], strict=True):
        assert {frozenset(g) for g in stage} == {frozenset(g) for g in again}
