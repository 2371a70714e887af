"""Train TGLoRA, from a frozen backbone to a table of results, in one run.

    python train.py                                            # rooms: rendered, no downloads
    python train.py --dataset nyud --data-root data            # NYUD-v2 with the paper's recipe
    python train.py --dataset nyud --data-root data --resume   # continue after an interruption
    python train.py --dataset nyud --data-root data --tree-only      # similarity and tree only

`run` shows the method in the order in which things happen: data, similarity and tree, network,
training, results. `fit` is the training loop. Every knob is in recipes.py. With the same settings,
the shuffling, augmentation and dropout of a step depend only on the seed and the step's number, so
a resumed run continues as if it had never stopped.

One run uses one GPU. On a machine with several GPUs, start several runs, or see
examples/several_gpus.py. In a notebook: `import train; result = train.main([])`, with flags as a
list of strings.
Shapes: B batch, T tasks, H W pixels.
References: arXiv 2509.19602, sections 4 and 7; docs/CHOICES.md.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cost import ledger
from data import (CLASSES, draw_augmentation, epoch_batches, loader, open_dataset, single_images,
                  warp)
from eval import evaluate, predictor, reference
from grouping import Partition, build_tree, format_tree, name_tree
from model import build
from recipes import known_tree, parse_arguments
from report import draw_curves, draw_samples, draw_tree, format_line, format_table
from similarity import finetune_decoders, format_similarity, fresh_decoders, task_similarity
from stability import stability
from tasks import delta_m, make_tasks
from util import (VERSIONS, all_finite, amp_dtype, clock, fingerprint, load_trained,
                  one_line_errors, pick_device, progress, read_checkpoint, reading, save, to_json,
                  trained_state, write_json, write_whole)


# --- settings -------------------------------------------------------------------------------------
def describe(config: argparse.Namespace) -> str:
    """A summary of the settings, printed at the start of a run."""
    height, width = config.size
    adapters = ""
    if config.method == "tglora":
        groups = ",".join(map(str, config.groups))
        adapters = f"; groups {groups}, rank {config.rank}, {config.layers}"
    note = ""
    if config.weights == "none" and config.method != "full":
        note = "\nnote: the frozen backbone has random weights, so results will be poor"
    return (f"{config.method} on {config.dataset}: {', '.join(config.tasks)}{adapters}\n"
            f"backbone {config.backbone}, weights {config.weights}, images of {height}x{width}\n"
            f"seed {config.seed}, epochs {config.epochs}, batch size {config.batch_size}, "
            f"learning rate {config.lr:g}, on {config.device}, to {config.out}{note}")


def as_numbers(results: dict) -> dict[str, dict[str, float]]:
    """Convert the values of {task: {metric: value}}, read from JSON, to floats; None becomes NaN.
    """
    numbers = {}
    for task, metrics in results.items():
        numbers[task] = {}
        for metric, value in metrics.items():
            numbers[task][metric] = math.nan if value is None else float(value)
    return numbers


def read_results(path: Path) -> dict:
    """Read a file of results, such as the metrics.json of a run.

    Raises ValueError if the file is missing or damaged, or if it holds no results.
    """
    with reading(path, "a results file such as the metrics.json of a run"):
        run = json.loads(path.read_text("utf-8-sig"))
        run["results"] = as_numbers(run["results"])
        if "last" in run:
            run["last"]["results"] = as_numbers(run["last"]["results"])
    return run


def described_images(run: dict) -> dict:
    """What a run's results say about its validation images; None where they say nothing."""
    flags = run.get("flags", {})
    return {"dataset": run.get("dataset"), "number of images": run.get("images"),
            "size": flags.get("size"), "night": flags.get("night")}


def check_same_images(run: dict, path: Path, expected: dict, other: str | Path) -> None:
    """Raise ValueError unless the results in the file `path` are from the expected images.

    run: the content of the file. expected: what `described_images` says about the run `other`.
    """
    for name, value in described_images(run).items():
        if None not in (value, expected[name]) and value != expected[name]:
            raise ValueError(f"{path} has {name} {value}, but {other} has {name} {expected[name]}; "
                             "compare runs on the same validation images")


def read_baseline(config: argparse.Namespace, tasks: Sequence, images: int) -> dict | None:
    """Read the --baseline files, one for all tasks or one per task, as {task: {metric: value}}.

    images: the number of validation images. Returns None without --baseline. Raises ValueError if a
    file cannot be read or is from other validation images, or if a task's main metric is missing or
    not above 0.
    """
    if not config.baseline:
        return None
    flags = {"size": list(config.size), "night": config.night}
    expected = described_images({"dataset": config.dataset, "images": images, "flags": flags})
    baseline = {}
    for path in config.baseline:
        run = read_results(Path(path))
        check_same_images(run, path, expected, "this run")
        baseline |= run["results"]
    for task in tasks:
        value = baseline.get(task.name, {}).get(task.metric, math.nan)
        if not value > 0:                       # also if it is NaN
            raise ValueError(f"--baseline {','.join(config.baseline)} needs {task.name}'s "
                             f"{task.metric}, a number above 0; got {value}")
    return baseline


# --- the tree -------------------------------------------------------------------------------------
def similarity_batches(config: argparse.Namespace, dataset, batch_size: int, device: torch.device,
                       label: str) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield batches of the examples on which the similarity is measured, without augmentation.

    There are `config.sim_images` examples, or fewer if the dataset is smaller. The seed decides
    which examples are used, and in which order. label: the text of the progress line.
    """
    shuffled = epoch_batches(len(dataset), len(dataset), 1, config.seed)[0]
    subset = shuffled[:config.sim_images]
    batches = [subset[i:i + batch_size] for i in range(0, len(subset), batch_size)]
    for batch in progress(loader(dataset, batches, config.workers), label):
        yield warp(batch, config.size, device)


def train_decoders(config: argparse.Namespace, tasks: Sequence, dataset,
                   device: torch.device) -> nn.Module:
    """Train the decoders through which the similarity is then measured (section 4.4).

    Returns the model: the frozen backbone with these decoders, without adapters.
    """
    N = min(config.sim_images, len(dataset))
    batches = epoch_batches(N, config.batch_size, config.head_epochs, config.seed)
    print(f"similarity: training decoders on {N} images for {config.head_epochs} epochs; the "
          "gradients are compared on the same images", flush=True)
    plain = argparse.Namespace(**{**vars(config), "method": "decoders"})
    everyone = [tuple(range(len(tasks)))]
    model = build(plain, tasks, [everyone] * 4).to(device)
    fresh_decoders(model, config.seed)
    amp = amp_dtype(config.amp, device)
    if amp is torch.float16:
        amp = None                              # fp16 needs a loss scaler, which is not used here
    examples = similarity_batches(config, dataset, len(batches[0]), device, "feature maps")
    finetune_decoders(model, tasks, examples, progress(batches, "decoders"), config.head_lr, amp,
                      steps=len(batches))
    if not all_finite(model.state_dict()):
        raise ValueError("training the decoders for the similarity diverged: their weights are not "
                         "finite. Try a lower --head-lr")
    return model


def find_tree(config: argparse.Namespace, tasks: Sequence, dataset,
              device: torch.device) -> tuple[list[Partition], dict]:
    """Train decoders on the frozen backbone, compare the tasks' gradients and group the tasks.

    Returns the tree, and a dict that is saved in tree.json: the similarities, and the stability of
    each stage. See sections 3.1, 3.3 and 4.4 of the paper.
    """
    model = train_decoders(config, tasks, dataset, device)
    examples = similarity_batches(config, dataset, 1, device, "gradients")
    similarity = task_similarity(model, tasks, examples)            # eq. 1 to 3
    print(format_similarity(similarity, config.tasks))

    tree = build_tree(similarity.mean, config.groups)               # Algorithm 1
    choices = stability(tree, similarity.samples)
    print(format_tree(tree, config.tasks, choices), flush=True)
    return tree, {"similarity": similarity.mean.tolist(),
                  "standard_error": similarity.error.tolist(),
                  "choices": [choice and choice._asdict() for choice in choices]}


def write_tree(out: Path, config: argparse.Namespace, tree: list[Partition],
               similarity: dict) -> dict:
    """Write tree.json and tree.png, and return the content of tree.json."""
    content = {"tasks": config.tasks, **similarity, "tree": name_tree(tree, config.tasks)}
    write_json(out / "tree.json", content)
    draw_tree(out / "tree.png", out / "tree.json")
    return content


# --- optimisation ---------------------------------------------------------------------------------
def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the trained parameters.

    1-D weights (biases, norms) and position-bias tables have no weight decay.
    """
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim == 1 or name.endswith("bias_table"):
            plain.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up to `peak`, then half a cosine towards 0.

    step: counted from 0. steps: number of steps in the run. warmup: the share of the steps before
    the peak.
    """
    ramp = warmup * steps                       # steps before the peak
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)   # + 1: the rate of step 0 is not 0
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def training_batches(config: argparse.Namespace, dataset, batches: Sequence[list[int]], start: int,
                     device: torch.device) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the augmented batches from step `start` on: image (B, 3, H, W), labels by task.

    batches: the sample indices of every batch of the run (see data.epoch_batches).
    """
    for step, batch in enumerate(loader(dataset, batches[start:], config.workers), start):
        # Reseed, so that augmentation, dropout and drop path do not depend on earlier steps.
        torch.manual_seed(config.seed * 1_000_003 + step)
        B = len(batch["image"])
        augmentation = draw_augmentation(B, config.flip, config.scales, config.rotate)
        yield warp(batch, config.size, device, **augmentation)


def train_step(model: nn.Module, tasks: Sequence, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, image: Tensor, labels: dict[str, Tensor], clip: float,
               amp: torch.dtype | None, parts: int = 1) -> Tensor:
    """Update the weights once. Returns the losses (T,), not multiplied by the tasks' weights.

    With `parts` above 1, the batch is computed in at most that many parts to save memory. A part's
    loss counts by its share of the task's valid pixels in the batch, so the sum is the loss of the
    whole batch if that is a mean over pixels. If the losses are finite but the gradient is not, all
    losses are returned as NaN, except with fp16, whose scaler skips such a step. Nothing in here
    waits for the GPU.
    """
    model.train()
    losses = torch.zeros(len(tasks), device=image.device)
    for i, part in enumerate(image.chunk(parts)):
        with torch.autocast(image.device.type, amp, enabled=amp is not None):
            predictions = model(part)
        total = 0
        for t, task in enumerate(tasks):
            label = labels[task.name].chunk(parts)[i]
            loss = task.loss(predictions[task.name], label)
            if parts > 1:
                pixels = task.valid(labels[task.name]).sum().clamp(min=1)
                loss = loss * (task.valid(label).sum() / pixels)
            total = total + task.weight * loss                      # eq. 8
            losses[t] += loss.detach()
        scaler.scale(total).backward()
    scaler.unscale_(optimizer)                  # clipping needs the true gradient
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.is_enabled():                     # fp16: the scaler skips a step that overflows
        return losses
    only_gradient = losses.isfinite().all() & ~norm.isfinite()
    return torch.where(only_gradient, math.nan, losses)


class LossLog:
    """Mean training losses since the last report, and the speed of training."""

    def __init__(self, tasks: Sequence, batch_size: int, step: int, device: torch.device):
        self.tasks, self.batch_size, self.device = tasks, batch_size, device
        self.restart(step)

    def restart(self, step: int) -> None:
        self.start, self.clock = step, time.monotonic()
        self.sums = torch.zeros(len(self.tasks), device=self.device)    # (T,)
        self.counts = torch.zeros_like(self.sums)

    def add(self, losses: Tensor, labels: dict[str, Tensor]) -> None:
        """Add one step's losses (T,). A task's mean leaves out steps without a label for it."""
        labelled = torch.stack([task.valid(labels[task.name]).any() for task in self.tasks])
        self.sums += losses
        self.counts += labelled

    def report(self, step: int, num_steps: int) -> dict[str, float | None]:
        """Print and return each task's mean loss since the last report, then reset the means.

        The mean is None for a task without labels. This waits for the GPU. Raises ValueError if a
        loss that was added is not finite.
        """
        means, words, bad = {}, [], []
        for task, total, count in zip(self.tasks, self.sums.tolist(), self.counts.tolist()):
            means[task.name] = total / count if count else None
            words.append(f"{task.name} {total / count:.3f}" if count else f"{task.name} -")
            if not math.isfinite(total):
                bad.append(task.name)
        if bad:
            raise ValueError(f"the loss of {', '.join(bad)}, or its gradient, is not finite "
                             f"between steps {self.start} and {step}. The checkpoints already "
                             "saved are not affected. Try a lower --lr, or --amp off")
        speed = (step - self.start) / (time.monotonic() - self.clock)   # steps per second
        left = clock((num_steps - step) / speed)
        memory = ""
        if self.device.type == "cuda":
            memory = f"  {torch.cuda.max_memory_allocated(self.device) / 2 ** 30:.1f} GiB"
        print(f"step {step}/{num_steps}  {'  '.join(words)}  {speed * self.batch_size:.1f} images/s"
              f"{memory}  {left} left", flush=True)
        self.restart(step)
        return means


def validation_score(result: dict) -> float:
    """Score used to pick the best epoch (higher is better): delta-m if known, else minus the loss.
    """
    for score in (result.get("delta_m", math.nan), -result["loss"]):
        if not math.isnan(score):
            return score
    return -math.inf


# --- the run --------------------------------------------------------------------------------------
class State:
    """Everything that a checkpoint holds: what changes during training, and what describes the run.
    """

    def __init__(self, config: argparse.Namespace, model: nn.Module, tree: list[Partition],
                 similarity: dict, baseline: dict | None):
        self.model = model
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        fp16 = amp_dtype(config.amp, next(model.parameters()).device) is torch.float16
        self.scaler = torch.amp.GradScaler("cuda", enabled=fp16)
        self.step = 0                           # number of steps done
        self.best, self.latest = None, None     # the best and the latest evaluation
        flags = {name: value for name, value in vars(config).items()
                 if name not in ("resume", "out")}
        self.constant = {"config": flags, "tree": tree, "similarity": similarity,
                         "baseline": baseline, "fingerprint": fingerprint(model),
                         "versions": VERSIONS}

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def save(self, path: Path, resumable: bool) -> None:
        """Write a checkpoint; if `resumable`, with the state of the optimizer."""
        content = {**self.constant, "model": trained_state(self.model), "step": self.step,
                   "best": self.best, "latest": self.latest}
        if resumable:
            content["optimizer"] = self.optimizer.state_dict()
            content["scaler"] = self.scaler.state_dict()
        save(path, content)

    def load(self, saved: dict, path: Path) -> None:
        """Continue from the content of the resumable checkpoint `path`."""
        load_trained(self.model, saved, path)
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:                     # empty unless the run used fp16 before
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best, self.latest = saved["step"], saved["best"], saved["latest"]


def state_to_continue(config: argparse.Namespace, out: Path) -> dict | None:
    """The content of last.pt for a resumed run, or None for a new run.

    Raises ValueError if the folder of a new run already exists. With --resume, raises ValueError if
    a checkpoint is missing or damaged, or if last.pt has no optimizer state.
    """
    path = out / "last.pt"
    if not config.resume:
        if out.exists():
            hint = " continue the run in it with --resume, or" if path.exists() else ""
            raise ValueError(f"{out} already exists, and no run is ever overwritten:{hint} choose "
                             "another --out")
        return None
    last = read_checkpoint(path)
    if "optimizer" not in last:
        raise ValueError(f"{path} has no optimizer state, so the run cannot be resumed from it; is "
                         "it a copy of best.pt? Restore the last.pt of this run, or start a new "
                         "run with another --out")
    if last["best"]:
        read_checkpoint(out / "best.pt")        # fail now if it is gone, not after the last epoch
    return last


def open_log(path: Path, step: int):
    """Open log.jsonl for appending.

    Drops an incomplete last line, and the lines for steps after `step`.
    """
    kept = ""
    if path.exists():
        with reading(path, "the log of a run; delete it to continue without the old lines"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept += line
    write_whole(path, kept.encode())
    return open(path, "a", buffering=1)


def fit(config: argparse.Namespace, state: State, tasks: Sequence, train_set, val_set) -> None:
    """The training loop, from `state.step` to the end. Evaluates, logs and saves on the way."""
    out, device = Path(config.out), next(state.model.parameters()).device
    amp = amp_dtype(config.amp, device)
    batches = epoch_batches(len(train_set), config.batch_size, config.epochs, config.seed)
    num_steps, steps_per_epoch = len(batches), len(batches) // config.epochs
    val_batches = single_images(val_set, config.workers)
    log = open_log(out / "log.jsonl", state.step)
    losses = LossLog(tasks, len(batches[0]), state.step, device)
    if state.step:
        print(f"continuing after epoch {state.step // steps_per_epoch}")

    for image, labels in training_batches(config, train_set, batches, state.step, device):
        lr = learning_rate(state.step, num_steps, config.lr, config.warmup)
        state.set_learning_rate(lr)
        losses.add(train_step(state.model, tasks, state.optimizer, state.scaler, image, labels,
                              config.clip, amp, config.accumulate), labels)
        state.step += 1
        epoch, end_of_epoch = state.step // steps_per_epoch, state.step % steps_per_epoch == 0

        if state.step % config.log_every == 0 or end_of_epoch:
            means = losses.report(state.step, num_steps)        # waits for the GPU
            log.write(to_json({"step": state.step, "epoch": epoch, "lr": lr, "loss": means}) + "\n")
        if end_of_epoch and (epoch % config.eval_every == 0 or state.step == num_steps):
            result = evaluate(predictor(state.model, amp), tasks,
                              progress(val_batches, "evaluation"), config.size, device)
            result |= {"step": state.step, "epoch": epoch}
            if state.constant["baseline"]:
                result["delta_m"] = delta_m(result["results"], state.constant["baseline"])
            log.write(to_json(result) + "\n")
            print(f"epoch {epoch}: {format_line(tasks, result)}")
            state.latest = result
            if state.best is None or validation_score(result) > validation_score(state.best):
                state.best = result
                state.save(out / "best.pt", resumable=False)
            losses.restart(state.step)          # evaluation does not count as training time
        if end_of_epoch:
            state.save(out / "last.pt", resumable=True)
    log.close()


def report(config: argparse.Namespace, state: State, tasks: Sequence, val_set,
           counts: dict[str, int]) -> dict:
    """Write and print the results of the best epoch; returns the content of metrics.json.

    counts: numbers of parameters, from cost.ledger.
    """
    out, device = Path(config.out), next(state.model.parameters()).device
    load_trained(state.model, read_checkpoint(out / "best.pt"), out / "best.pt")
    val_batches = single_images(val_set, config.workers)
    constants = reference(tasks, val_batches, config.size)
    best, latest = state.best, state.latest
    metrics = {**best, "last": latest, "reference": constants, **counts, "seed": config.seed,
               "tree": name_tree(state.constant["tree"], config.tasks), "dataset": config.dataset,
               "flags": state.constant["config"], "versions": VERSIONS}
    write_json(out / "metrics.json", metrics)
    predict = predictor(state.model, amp_dtype(config.amp, device))
    draw_samples(out / "predictions.png", {"prediction": predict}, tasks, val_set, config.size,
                 device)
    draw_curves(out / "curves.png", out / "log.jsonl", tasks)
    print(f"best epoch {best['epoch']}: {format_table(tasks, best, constants, config.size)}\n"
          f"last epoch {latest['epoch']}: {format_line(tasks, latest)}\n"
          f"wrote {out}/: metrics.json predictions.png curves.png tree.png tree.json best.pt "
          "last.pt log.jsonl")
    return metrics


def run(config: argparse.Namespace) -> dict:
    """The whole method, from the settings to the results.

    Returns the content of metrics.json, or of tree.json with --tree-only. Raises ValueError if a
    setting or a file is wrong, or if a loss or weight is no longer finite.
    """
    device, out = pick_device(config.device), Path(config.out)
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    last = state_to_continue(config, out)       # None: a new run
    print(describe(config))
    val_set = open_dataset(config, "val")
    if last:
        tree, similarity, baseline = last["tree"], last["similarity"], last["baseline"]
    else:
        tree, similarity = known_tree(config), {"similarity": None}
        baseline = read_baseline(config, tasks, len(val_set))
    train_set = open_dataset(config, "train")

    if tree is None:
        tree, similarity = find_tree(config, tasks, train_set, device)
    elif config.method == "tglora":
        print(f"the tree is known, so no similarity is measured\n{format_tree(tree, config.tasks)}")
    if config.tree_only:
        make_folder(out)
        return write_tree(out, config, tree, similarity)

    model = build(config, tasks, tree).to(device)
    counts = ledger(model)
    print(f"trained parameters: adapters {counts['adapters']:,} + decoders {counts['decoders']:,} "
          f"+ others {counts['others']:,} = {counts['trainable']:,} of {counts['total']:,}")
    if config.compile:
        model.compile(dynamic=False)            # in place: the weights keep their names

    state = State(config, model, tree, similarity, baseline)
    if last:
        state.load(last, out / "last.pt")
    else:
        make_folder(out)
        state.save(out / "last.pt", resumable=True)
    write_tree(out, config, tree, similarity)
    fit(config, state, tasks, train_set, val_set)
    return report(config, state, tasks, val_set, counts)


def make_folder(out: Path) -> None:
    """Create the run's folder. Raises ValueError if that fails, or if the folder exists."""
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot create {out}: {error.strerror}; choose another --out") from error


def main(argv: list[str] | None = None) -> dict:
    """Parse the flags, call `run` with the settings, and return its result.

    argv: the flags as a list of strings; None means the command line. If a flag or a file is wrong,
    the program ends with a message instead of a traceback.
    """
    with one_line_errors():
        config = parse_arguments(argv)
        try:
            return run(config)
        except KeyboardInterrupt:
            if not Path(config.out, "last.pt").exists():
                raise
            raise KeyboardInterrupt(f"--out {config.out} --resume continues the run from the end "
                                    "of its last complete epoch") from None


if __name__ == "__main__":
    main()
