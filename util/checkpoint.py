"""What a run leaves on disk, and how it is read again: whole or not at all.

A file is written beside its name and renamed, so whatever happens, the last good one stays. A
checkpoint holds what training changes (adapters, decoders, BatchNorm's statistics), the flags, the
tree, the versions of the libraries, and the fingerprint of the frozen weights, which stay in their
own file; last.pt also the optimizer and the loss scaler. It is read as tensors and plain data only
(weights_only), so that a hostile file runs nothing, and after its checksums, which torch.load
itself does not compare.
References: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from data import CLASSES
from decoders import FUSED
from model import build
from tasks import make_tasks

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__)}

# Flags of which a resumed run may have others than it began with.
MAY_CHANGE = {"out", "resume", "data_root", "download", "device", "workers", "cache", "log_every",
              "tree", "compile"}


# --- writing --------------------------------------------------------------------------------------
def write_whole(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place. Raises ValueError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's way to say that a disk is full
        temporary.unlink(missing_ok=True)
        kept = "; the one before is as it was" if path.exists() else ""
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"cannot write {path}: {reason}{kept}") from error


def save(path: Path, state: dict) -> None:
    """Write a checkpoint."""
    write_whole(path, lambda file: torch.save(state, file))


def write_json(path: Path, value: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def check_space(folder: Path, model: nn.Module) -> None:
    """Raise ValueError where last.pt (weights and two moments), best.pt and the file that replaces
    one of them would not fit on the disk."""
    trained = sum(v.numel() * v.element_size() for v in trained_state(model).values())
    need, free = 8 * trained, shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{folder}: its disk has {free / 1e6:,.0f} MB free, the checkpoints need "
                         f"{need / 1e6:,.0f} MB; make room or choose another --out")


def check_out(config: Namespace) -> dict | None:
    """The state that a run in --out goes on from, if any. Refuses to overwrite another run."""
    out = Path(config.out)
    last = out / "last.pt"
    if config.resume:
        state = read_checkpoint(last)
        differ = [f"--{k.replace('_', '-')} {v}, not {getattr(config, k, None)}"
                  for k, v in state["config"].items()
                  if k not in MAY_CHANGE and v != getattr(config, k, None)]
        if differ:
            raise ValueError(f"{last} was trained with {'; '.join(differ)}: resume with the same "
                             "flags, or choose another --out")
        return state
    if last.exists():
        raise ValueError(f"{out} already holds a run: continue it with --resume, or choose another "
                         "--out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; expected a folder, or a name for a new one")
    return None


def open_log(path: Path, step: int):
    """log.jsonl, one JSON object a line, to append to; without what is later than `step`."""
    kept = []
    for line in path.read_text().splitlines(True) if path.exists() and step else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:  # a line that a crash cut short
            break
        kept.append(line)
    write_whole(path, lambda file: file.write("".join(kept).encode()))
    return open(path, "a", buffering=1)


# --- reading --------------------------------------------------------------------------------------
def read_checkpoint(path: Path) -> dict:
    """What `save` wrote: only tensors and plain data are read. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint file {path}; train.py writes best.pt and last.pt to --out")
    try:
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()
        state = None if broken else torch.load(path, map_location="cpu", weights_only=True)
        state["model"], state["config"], state["tree"], state["fingerprint"]
    except Exception as error:  # neither documents its exceptions for a damaged file
        raise ValueError(f"{path} is not a checkpoint of train.py, or is damaged") from error
    return state


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trained parameters and the decoders' BatchNorm statistics."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def fingerprint(model: nn.Module) -> str:
    """Hash of the frozen weights: a checkpoint holds the rest and fits no other backbone."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            digest.update(name.encode() + p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_trained(model: nn.Module, state: dict, path: Path) -> None:
    """Put a checkpoint's trained weights into `model`, built from the same configuration."""
    own = fingerprint(model)
    if state["fingerprint"] != own:
        raise ValueError(f"{path} was trained on another backbone (fingerprint "
                         f"{state['fingerprint']}) than the one loaded here ({own}); it was "
                         f"--weights {state['config']['weights']}")
    expected = trained_state(model)
    differ = sorted(k for k in expected.keys() | state["model"].keys()
                    if k not in expected or k not in state["model"]
                    or expected[k].shape != state["model"][k].shape)
    if differ:
        raise ValueError(f"{path} does not fit its own configuration: {len(differ)} weights are "
                         f"missing, unknown or misshapen: {', '.join(differ[:4])}")
    model.load_state_dict(state["model"], strict=False)


def load_run(path: Path, weights: str | None = None) -> tuple[nn.Module, list, Namespace]:
    """The network of a checkpoint, its tasks and its flags; weights: where the backbone's are now.
    """
    state = read_checkpoint(path)
    older = {"without": [], "frozen": [], "fused": FUSED}  # flags that older runs lack
    config = Namespace(**{**older, **state["config"]})
    config.weights = weights or config.weights
    tasks = make_tasks(config.tasks, CLASSES.get(config.dataset))
    model = build(config, tasks, state["tree"])
    load_trained(model, state, path)
    return model, tasks, config


def read_results(path: Path) -> dict:
    """The object in a metrics.json. Raises ValueError."""
    try:
        content = json.loads(path.read_text())
        return {**content, "results": dict(content["results"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a metrics.json of a run: {error!r}") from error
