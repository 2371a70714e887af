"""Helpers for a run: the device, progress lines, files on disk, and error messages.

Nothing in this file depends on a particular network, task or dataset. Three rules protect the
checkpoints and metrics of a run:

    1. A file is written under a temporary name and then renamed, so the old file survives a crash.
    2. A checkpoint is never written if one of its tensors contains NaN or infinity.
    3. A checkpoint is read as tensors and plain data only (torch.load's `weights_only`), and it
       can only be used with the frozen backbone it was trained with (`fingerprint`).

References: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import hashlib
import io
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

VERSIONS = {
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "torchvision": str(torchvision.__version__),
}


# --- the machine ----------------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps").

    Raises ValueError if it cannot be used on this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used on this machine; expected cpu, "
                         "cuda (with an NVIDIA GPU and its driver) or mps (on a Mac)") from error
    return device


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The data type that autocast computes in, or None for float32.

    "auto" means bf16 on a CUDA GPU that supports it, fp16 on an older one, and float32 elsewhere.
    """
    if choice == "auto":
        if device.type != "cuda":
            choice = "off"
        elif torch.cuda.is_bf16_supported(including_emulation=False):
            choice = "bf16"
        else:
            choice = "fp16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


# --- progress -------------------------------------------------------------------------------------
def clock(seconds: float) -> str:
    """Format a number of seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """Yield `items` one by one and print how many are done and how much time is left.

    A terminal shows one line that is updated in place, once the work has taken a second. Elsewhere,
    as in a log file, a line appears every 5 seconds and at the end; work that takes less than 5
    seconds prints nothing.
    total: the number of items, needed if `items` has no length.
    """
    total = len(items) if total is None else total
    terminal = sys.stdout is not None and sys.stdout.isatty()   # None: stdout is closed
    pause = 0.2 if terminal else 5            # seconds between two updates
    start = shown = time.monotonic()
    written = False
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        due = now - shown >= pause and now - start >= 1
        if due or (written and done == total):
            shown, written = now, True
            left = (now - start) / done * (total - done)
            line = f"{label}: {done} of {total}, {clock(left)} left"
            print(f"\r{line}   " if terminal else line, end="" if terminal else "\n", flush=True)
    if written and terminal:
        print()


# --- errors ---------------------------------------------------------------------------------------
@contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Turn any error while reading a file into a ValueError that names the file.

    A plain ValueError keeps its whole message. For any other error, the new message ends with the
    error's type and the start of its first line. expected: the kind of file, such as "a checkpoint
    of train.py".
    """
    if not Path(path).is_file():
        raise ValueError(f"no file {path}; expected {expected}")
    try:
        yield
    except Exception as error:      # readers do not document what they raise for a damaged file
        if type(error) is ValueError:
            message = f"{path}: {error}"
        else:
            first_line = str(error).strip().partition("\n")[0]
            message = (f"{path} is damaged, or is not {expected} "
                       f"({type(error).__name__}: {first_line[:80]})")
        raise ValueError(message) from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a program with a message instead of a traceback on bad input or Ctrl-C.

    ValueError and OSError count as bad input. Any other error is a bug and keeps its traceback.
    Ctrl-C ends the program with exit status 130, as in a shell.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"\ninterrupted; {error}" if str(error) else "\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:                 # the reader of our output, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        message = str(error) or repr(error)
        # An error in a data worker arrives as text: a traceback, then the message.
        message = message.rpartition(f"\n{type(error).__name__}: ")[2].strip()
        raise SystemExit(f"error: {message}") from error


# --- writing files --------------------------------------------------------------------------------
def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely, or raise ValueError and leave the old file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def to_json(value: Any, indent: int | None = None) -> str:
    """Convert to strict JSON, in which a number that is not finite becomes null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, to_json(value, indent=1).encode())


def all_finite(value: Any) -> bool:
    """Whether all tensors in nested dicts are finite. Other values are not checked."""
    if isinstance(value, dict):
        return all(all_finite(v) for v in value.values())
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


def save(path: Path, state: dict) -> None:
    """Write a checkpoint. Raises ValueError if a tensor in it is not finite."""
    if not all_finite(state):
        raise ValueError(f"{path} was not written: the weights or the optimizer's state are "
                         f"not finite after step {state['step']}. The checkpoints already saved "
                         "are not affected. Try a lower --lr, or --amp off")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


# --- checkpoints ----------------------------------------------------------------------------------
def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint that `save` wrote.

    Raises ValueError if the file is missing, damaged, or not a checkpoint of train.py.
    """
    with reading(path, "a checkpoint of train.py"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():   # torch.load does not compare the checksums
                raise ValueError("is damaged: a checksum does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "config", "tree", "baseline", "fingerprint", "step"} - state.keys()
        if missing:
            raise ValueError("is not a checkpoint of this version of train.py: it lacks "
                             f"{', '.join(missing)}")
    return state


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: trained parameters and BatchNorm's running statistics."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def fingerprint(model: nn.Module) -> str:
    """A hash of the frozen weights. A checkpoint holds this hash instead of those weights."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_trained(model: nn.Module, state: dict, path: Path) -> None:
    """Load a checkpoint's trained weights into a model that was built from the same settings.

    Raises ValueError if the model's frozen weights are not those of the run, or if the trained
    weights do not fit the model.
    """
    ours = fingerprint(model)
    if state["fingerprint"] != ours:
        raise ValueError(f"{path} was trained on a different backbone: the frozen weights just "
                         f"loaded (fingerprint {ours}) are not those of the run (fingerprint "
                         f"{state['fingerprint']}). The run was started with --weights "
                         f"{state['config'].get('weights')}: pass the same value, or restore the "
                         "file if it has changed")
    expected, saved = trained_state(model), state["model"]
    wrong = sorted(expected.keys() ^ saved.keys())
    for name in expected.keys() & saved.keys():
        if expected[name].shape != saved[name].shape:
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} does not fit the network that its own settings describe: "
                         f"{len(wrong)} weights are missing, unknown or have the wrong shape: "
                         f"{', '.join(wrong[:4])}; the file may come from another version of this "
                         "code")
    model.load_state_dict(saved, strict=False)
