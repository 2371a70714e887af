"""Where datasets come from: published archives, local copies, single files.

    root = find_dataset("nyud", Path("data"))      # a folder, the folder around it, or an archive

An archive is unpacked once, whole or not at all, and only what stays inside its folder; a download
continues where it broke off. Errors name the file, what was expected, and where to get it.
"""

import http.client
import multiprocessing
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image  # comes with torchvision

# Public copies move and die: one table, tried only on request, named in the error otherwise.
# A folder that holds `marker` is the dataset.
SOURCES = {
    "nyud": dict(
        marker="gt_sets", archives=("NYUD_MT.tgz", "NYUDv2.tar.gz"),
        url="https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz",
        documented="NYUD_MT.tgz: https://github.com/facebookresearch/astmt; NYUDv2.tar.gz: "
                   "https://github.com/prismformore/Multi-Task-Transformer"),
    "pascal": dict(
        marker="ImageSets/Context", archives=("PASCAL_MT.tgz", "PASCALContext.tar.gz"),
        url="https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz",
        documented="PASCAL_MT.tgz: https://github.com/facebookresearch/astmt; PASCALContext.tar.gz:"
                   " https://github.com/prismformore/Multi-Task-Transformer"),
}
TIMEOUT = 30  # seconds without a byte
CACHE = Path("data")  # archives are unpacked here, and what is computed from a dataset is kept


def find_dataset(name: str, source: Path, fetch: bool = False) -> Path:
    """The folder of dataset `name`, given itself, the folder around it, or an archive of it.

    fetch: download the archive into `source` when nothing is there. Raises ValueError.
    """
    source, known = Path(source), SOURCES[name]
    if source.is_file():
        return find_dataset(name, unpack(name, source))
    found = [folder for folder in (source, *sorted(source.glob("*/")), *sorted(source.glob("*/*/")))
             if (folder / known["marker"]).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{name}: {source} holds several: {', '.join(map(str, found))}; name one "
                         "with --data-root")
    if found:
        return found[0]
    archive = next((source / a for a in known["archives"] if (source / a).is_file()), None)
    if archive is None and fetch:
        source.mkdir(parents=True, exist_ok=True)
        archive = source / known["archives"][0]
        download(known["url"], archive, known["documented"])
        try:
            unpack(name, archive)
        except ValueError:
            archive.unlink()  # what came is not the dataset: the next try shall not find it
            raise
    if archive is not None:
        return find_dataset(name, unpack(name, archive))
    state = (f"holds neither {known['marker']}/ nor an archive" if source.is_dir() else
             "does not exist")
    raise ValueError(f"{name}: {source} {state}; give the dataset's folder or archive "
                     f"({' or '.join(known['archives'])}) as --data-root, or add --download. Where "
                     f"to get it: {known['documented']}")


def own_folder(path: Path, into: Path) -> Path:
    """into/NAME-KEY for what is made from `path`; KEY: of its place, size and date."""
    stat = path.stat()
    key = zlib.crc32(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return into / f"{path.name.split('.')[0]}-{key:08x}"


def unpack(name: str, archive: Path, into: Path | None = None) -> Path:
    """Unpack a tar archive of dataset `name`, once; returns the folder around it.

    Raises ValueError for a damaged archive, or one with links or paths that lead outside.
    """
    folder, known = own_folder(archive, into or CACHE), SOURCES[name]
    if folder.is_dir():
        return folder
    print(f"unpacking {archive} ({archive.stat().st_size / 1e6:.0f} MB) to {folder}", flush=True)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")  # refuses what leads outside the folder
            while tar.fileobj.read(1 << 20):  # to its end, where gzip's checksum is
                pass
        for split in ("train.txt", "val.txt"):
            if not any(partial.glob(f"*/{known['marker']}/{split}")):
                raise ValueError(f"it holds no {known['marker']}/{split}")
        partial.rename(folder)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        reason = str(error).split(":")[0].splitlines()[0]
        raise ValueError(f"cannot unpack {archive}: {reason}; fetch it again? "
                         f"({known['documented']})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def download(url: str, path: Path, documented: str) -> None:
    """Fetch url to path with progress; an interrupted download continues from `path.part`."""
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            if "html" in reply.headers.get("Content-Type", ""):
                raise ValueError("the server sent a web page, not the file")
            start = start if reply.status == 206 else 0  # 200: the server cannot continue
            total = start + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if start else "wb") as file:
                while block := reply.read1(1 << 20):  # what has come so far
                    file.write(block)
                    progress(f"{path.name}: {file.tell() / 1e6:.0f} of {total / 1e6:.0f} MB",
                             file.tell() >= total)
        if part.stat().st_size != total and total > start:
            raise ValueError(f"{part.stat().st_size} bytes came, expected {total}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        whole = isinstance(error, urllib.error.HTTPError) and error.code == 416 and (
            error.headers.get("Content-Range") == f"bytes */{start}")  # only its name is missing
        if not whole:
            kept = f"; {part} is kept, run again to continue" if part.exists() else ""
            raise ValueError(f"download of {url} failed: {error}{kept}. Other sources: "
                             f"{documented}") from error
    part.rename(path)


def read_image(path: Path, mode: str | None = "RGB") -> np.ndarray:
    """Image file -> (H, W, 3) uint8, or with mode None as stored (palette indices stay indices)."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except FileNotFoundError:
        raise ValueError(f"no image file {path}") from None
    except Exception as error:  # Pillow raises whatever the broken file led to
        raise ValueError(f"cannot read image {path}: {error}") from error


def read_array(path: Path) -> np.ndarray:
    """.npy file -> float32 array. Pickled objects are refused."""
    try:
        return np.load(path, allow_pickle=False).astype(np.float32)
    except Exception as error:  # numpy raises whatever the broken file led to
        raise ValueError(f"cannot read {path}: {error}") from error


def read_mat(path: Path, key: str) -> np.ndarray | dict:
    """Variable `key` of a MATLAB file, structs as dicts."""
    from scipy.io import loadmat  # nothing else here needs scipy
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        content = loadmat(path, simplify_cells=True)
    except Exception as error:  # scipy raises whatever the broken file led to
        raise ValueError(f"cannot read {path}: {error}") from error
    if key not in content:
        found = ", ".join(k for k in content if not k.startswith("__")) or "nothing"
        raise ValueError(f"{path} has no variable {key}; it holds {found}")
    return content[key]


@lru_cache(maxsize=None)
def other_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"))


def apart(read: Callable[[Path], np.ndarray], path: Path) -> np.ndarray:
    """read(path), in another process: a damaged MATLAB file can crash scipy, and us with it."""
    try:
        return other_process().submit(read, path.resolve()).result()
    except BrokenProcessPool as error:
        other_process.cache_clear()
        raise ValueError(f"cannot read {path}: its reader crashes") from error


def read_ids(path: Path) -> list[str]:
    """The image names of a split, one a line."""
    if not path.is_file():
        raise ValueError(f"no split file {path} (README, Data)")
    ids = path.read_text().split()
    if not ids:
        raise ValueError(f"{path} lists no image")
    return ids


def progress(text: str, last: bool) -> None:
    """One line that is overwritten on a terminal; elsewhere only the last state is printed."""
    if sys.stdout.isatty():
        print(f"\r{text} ", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)
