"""What a run leaves on disk, and how it is read again: whole or not at all.

A file is written beside its name and renamed, so whatever happens, the last good one stays. A
checkpoint holds what training changes (adapters, decoders, BatchNorm's statistics), the flags, the
tree, the versions of the libraries, and the fingerprint of the frozen weights, which stay in their
own file; last.pt also the optimizer and the loss scaler. It is read as tensors and plain data only
(weights_only), so that a hostile file runs nothing, and after its checksums, which torch.load
itself does not compare.
References: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import fcntl
import hashlib
import io
import json
import math
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

from grouping import Partition, check_tree
from util.run import reading

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__)}

# Flags of which a resumed run may have others than it began with.
MAY_CHANGE = {"out", "resume", "data_root", "download", "device", "workers", "cache", "log_every",
              "tree", "compile"}
RUN_FILES = ("metrics.json predictions.png curves.png tree.png tree.json best.pt last.pt "
             "log.jsonl").split()


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
        reason = getattr(error.__context__ or error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"cannot write {path}: {reason}{kept}") from error


def not_finite(value) -> bool:
    """Is there a number that is not finite in the tensors of nested dicts?"""
    if isinstance(value, Tensor):
        return not value.isfinite().all()
    return isinstance(value, dict) and any(map(not_finite, value.values()))


def save(path: Path, state: dict) -> None:
    """Write a checkpoint. Raises ValueError where a tensor in it is not finite."""
    if not_finite(state):
        raise ValueError(f"{path} was not written: not all is finite after step {state['step']}; "
                         "the checkpoints are from before. Try a lower --lr or --amp off")
    write_whole(path, lambda file: torch.save(state, file))


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON: null stands for what is not a finite number."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


def write_json(path: Path, value: dict) -> None:
    write_whole(path, lambda file: file.write(to_json(value, indent=1).encode()))


# --- the folder of a run --------------------------------------------------------------------------
def check_space(folder: Path, model: nn.Module) -> None:
    """Raise ValueError where last.pt (weights and two moments), best.pt and the file that replaces
    one of them would not fit on the disk, in place of those that are there."""
    trained = sum(v.numel() * v.element_size() for v in trained_state(model).values())
    there = sum(path.stat().st_size for path in folder.glob("*.pt*"))
    need, free = 8 * trained - there, shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{folder}: its disk has {free / 1e6:,.0f} MB free, the checkpoints need "
                         f"{need / 1e6:,.0f} MB; make room or choose another --out")


def lock(out: Path) -> io.TextIOWrapper:
    """Make --out, and keep other runs out of it while the returned file is open and we live."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.lockf(file := open(out / ".lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is at work in --out {out}; choose another") from None
    return file


def check_out(config: Namespace, tree: list[Partition] | None) -> tuple[dict, dict] | None:
    """last.pt and best.pt (before there is one, last.pt again) that a run in --out goes on from.

    tree: the one asked for, if any. None for a new run. Refuses to overwrite or to mix up runs.
    """
    out, own = Path(config.out), {k: v for k, v in vars(config).items() if k not in MAY_CHANGE}
    if not config.resume:
        if found := [name for name in RUN_FILES if (out / name).exists()]:
            raise ValueError(f"{out} already holds a run ({', '.join(found)}): continue it with "
                             "--resume, take its tree with --tree, or choose another --out")
        return None
    last = best = read_checkpoint(out / "last.pt")
    with reading(out / "last.pt", "a last.pt of train.py"):
        if last["best"] or (out / "best.pt").exists():
            best = read_checkpoint(out / "best.pt")
        own["tree"] = tree or last["tree"]
        for name, state in {"it": last, "best.pt": best}.items():
            saved = {**state["config"], "tree": state["tree"]}
            differ = [f"--{k.replace('_', '-')} {saved.get(k)}, not {v}"
                      for k, v in own.items() if saved.get(k) != v]
            if differ:
                raise ValueError(f"{name} was trained with {'; '.join(differ)}: resume with the "
                                 "same flags, or choose another --out")
        step = (best["best"] or best)["step"]  # after last.pt's: a kill came between the two
        if step != best["step"] or (step <= last["step"]
                                    and to_json(best["best"]) != to_json(last["best"])):
            raise ValueError("the best.pt beside it is not the one it knows; put that back")
    return last, best


def open_log(path: Path, step: int):
    """log.jsonl, one JSON object a line, to append to; without what is later than `step`."""
    kept = []
    if path.exists() and step:
        with reading(path, "a log of train.py"):
            text = path.read_text()
            lines = text[:text.rfind("\n") + 1].splitlines(True)  # a crash may cut the last one
            kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_whole(path, lambda file: file.write("".join(kept).encode()))
    return open(path, "a", buffering=1)


# --- reading --------------------------------------------------------------------------------------
def read_checkpoint(path: Path) -> dict:
    """What `save` wrote: only tensors and plain data are read. Raises ValueError."""
    with reading(path, "a checkpoint of train.py"):
        with zipfile.ZipFile(path) as parts:
            size = sum(part.file_size for part in parts.infolist())  # none is compressed
            if size > Path(path).stat().st_size or parts.testzip():
                raise ValueError("is damaged, or unpacks to more than it is")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["tree"] = [[tuple(map(int, group)) for group in stage] for stage in state["tree"]]
        check_tree(state["tree"], len(state["config"]["tasks"]))
        state["model"].keys(), state["config"].keys(), state["fingerprint"]
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
    with reading(path, "a checkpoint of this network"):
        own = fingerprint(model)
        if state["fingerprint"] != own:
            raise ValueError(f"trained on another backbone (fingerprint {state['fingerprint']}) "
                             f"than the one loaded here ({own}); it was --weights "
                             f"{state['config'].get('weights')}")
        expected, found = trained_state(model), state["model"]
        differ = sorted(str(k) for k in expected.keys() | found.keys() if k not in expected
                        or k not in found or expected[k].shape != found[k].shape)
        if differ:
            raise ValueError(f"does not fit its own configuration: {len(differ)} weights are "
                             f"missing, unknown or misshapen: {', '.join(differ[:4])}")
        model.load_state_dict(found, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                   state: dict) -> None:
    """Put back the moments and the loss scale of last.pt, if it has just those of this network.

    AdamW does not look: with shorter ones, its fused step writes beyond the end of their memory.
    """
    moments, fp16, step = state["optimizer"]["state"], dict(state["scaler"]), state["step"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = {i: {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
           for i, p in enumerate(params) if moments or step and not fp16}  # which skips first steps
    kinds = [{(i, k): (x.shape, x.dtype) for i, kept in found.items() for k, x in kept.items()}
             for found in (own, moments)]
    done = {float(kept["step"]) for kept in moments.values()}
    if (kinds[0] != kinds[1] or not (done <= {step} or fp16 and 0 <= min(done) <= max(done) < step)
            or fp16 and not 0 < fp16["scale"] < math.inf):
        raise ValueError("its optimizer or loss scale is not of this network after its step")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {i: {
        k: torch.empty_like(own[i][k]).copy_(x) for k, x in kept.items()}
        for i, kept in moments.items()}})
    if fp16:
        scaler.load_state_dict({**scaler.state_dict(), "scale": fp16["scale"],
                                "_growth_tracker": int(fp16["_growth_tracker"])})
