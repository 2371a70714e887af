"""Around a run: its device and precision, its memory, its progress, signals, and its last word.

Nothing here knows of networks or data; train.py, eval.py and the tools share it. What a file can
break ends here in one line: `reading` names the file, `one_line_errors` prints it.
"""

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


# --- the machine ----------------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """--device as a device that is there. Raises ValueError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here; expected cpu, or cuda on a machine "
                         "with a GPU and its driver") from error
    return device


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for --amp: auto is bf16 where the GPU has it, else fp16; none on a CPU."""
    if choice == "auto":
        choice = "off" if device.type != "cuda" else (
            "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "linux":  # ru_maxrss there begins with the peak of the parent process
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30  # macOS: bytes


# --- progress -------------------------------------------------------------------------------------
def progress(text: str, last: bool) -> None:
    """One line that is overwritten on a terminal; elsewhere only the last state is printed."""
    if sys.stdout.isatty():
        print(f"\r{text} ", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


class LossMeter:
    """The tasks' losses since the last log line, and how fast the steps since then were."""

    def __init__(self, names: list[str], step: int, device: torch.device):
        self.names, self.device = names, device
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin anew after `step`, from now on."""
        self.sums = torch.zeros(len(self.names), device=self.device)  # of the losses, (T,)
        self.last_logged = self.timed_from = step
        self.clock = time.monotonic()

    def state(self) -> dict:
        """For last.pt."""
        return {"sums": self.sums, "since": self.last_logged}

    def load_state(self, state: dict, leads: bool) -> None:
        """Go on from `state`; of several processes one alone takes its sums over."""
        self.sums = state["sums"].float().view(len(self.names)).to(self.device) * leads
        self.timed_from = state["step"]
        self.last_logged = range(self.timed_from + 1).index(state["since"])  # no later

    def means(self, step: int, sum_all: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each task's mean loss, summed over the processes. Waits for the GPU.

        Raises ValueError where a loss, or a gradient (train_step), was not finite.
        """
        means = (sum_all(self.sums) / (step - self.last_logged)).tolist()
        bad = [name for name, mean in zip(self.names, means) if not math.isfinite(mean)]
        if bad:
            gradient = ", or the gradient," if len(bad) == len(means) else ""
            raise ValueError(f"the loss of {', '.join(bad)}{gradient} is not finite between steps "
                             f"{self.last_logged} and {step}; the checkpoints are from before. Try "
                             "a lower --lr or --amp off")
        return dict(zip(self.names, means))

    def line(self, losses: dict[str, float], step: int, num_steps: int, batch_size: int) -> str:
        """`step 40/300  depth 0.613  71.4 images/s  1.2 GiB  ETA 0:00:31`."""
        speed = batch_size * (step - self.timed_from) / (time.monotonic() - self.clock)
        left = int((num_steps - step) * batch_size / speed)  # seconds
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        return (f"step {step}/{num_steps}  {shown}  {speed:.1f} images/s  "
                f"{memory_gib(self.device):.1f} GiB  "
                f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")


# --- how it ends ----------------------------------------------------------------------------------
@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM: the run ends after its step. A second SIGINT ends it at once."""
    received = []

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Whatever the content of a file breaks inside is a ValueError of one line that names it."""
    if not Path(path).is_file():  # nor a FIFO, which would be waited for
        raise ValueError(f"no file {path}; expected {expected}")
    try:
        yield
    except Exception as error:  # readers document no list of them for a damaged file
        if type(error) is ValueError:  # says in words what is wrong
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(f"{path} is not {expected}, or is damaged: {type(error).__name__}: "
                         f"{str(error).strip().partition(chr(10))[0][:60]}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends a program with one line; anything else is a bug and shows its trace."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        line = (str(error).strip() or repr(error)).splitlines()[-1]  # a worker's ends its trace
        raise SystemExit(f"error: {line.removeprefix('ValueError: ')}") from error
