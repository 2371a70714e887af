"""Where datasets come from: a folder, an archive in it, or a download.

    root = find_dataset("nyud", Path("data"))      # a folder, the folder around it, or an archive

An archive is unpacked once, whole or not at all, and only if it holds plain files and folders; a
download continues where it broke off. Errors name the file, what was expected, and where to get it.
"""

import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

from util.run import progress

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
    archives = [source, *(source / archive for archive in known["archives"])]
    folders = [source, *sorted(source.glob("*/")), *sorted(source.glob("*/*/"))]
    found = [folder for folder in folders if (folder / known["marker"]).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{name}: {source} holds several: {', '.join(map(str, found))}; name one "
                         "with --data-root")
    if found:
        return found[0]
    for archive in filter(Path.is_file, archives):
        return find_dataset(name, unpack(name, archive))
    if fetch:
        source.mkdir(parents=True, exist_ok=True)
        download(known["url"], archives[1], known["documented"])
        try:
            return find_dataset(name, archives[1])
        except ValueError:
            archives[1].unlink()  # what came is not the dataset: the next try shall not find it
            raise
    state = (f"holds neither {known['marker']}/ nor an archive" if source.is_dir() else
             "does not exist")
    raise ValueError(f"{name}: {source} {state}; give the dataset's folder or archive "
                     f"({' or '.join(known['archives'])}) as --data-root, or add --download. Where "
                     f"to get it: {known['documented']}")


def fingerprint(path: Path) -> str:
    """Eight hex digits of a file's path, size and time of change, to name what is made of it."""
    stat = path.stat()
    return f"{zlib.crc32(os.fsencode(f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}')):08x}"


def unpack(name: str, archive: Path, into: Path | None = None) -> Path:
    """Unpack a tar archive of dataset `name`, once; returns the folder around it.

    Raises ValueError for an archive that is damaged or not the dataset, or holds anything but files
    and folders under plain relative names: all of it is read before a byte is written.
    """
    known = SOURCES[name]
    folder = (into or CACHE) / f"{archive.name.split('.')[0]}-{fingerprint(archive)}"
    if folder.is_dir():
        return folder
    print(f"unpacking {archive} ({archive.stat().st_size / 1e6:.0f} MB) to {folder}", flush=True)
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            while tar.fileobj.read(1 << 20):  # to its end, where gzip's checksum is
                pass
        for member in members:
            path = PurePosixPath(member.name)
            plain = member.name.isprintable() and len(member.name) < 256 and (
                not path.is_absolute() and ".." not in path.parts)
            if not (plain and (member.isreg() or member.isdir())):
                raise ValueError(f"{member.name[:80]!r} in it is not a plain file or folder")
        for split in ("train.txt", "val.txt"):
            if not any(PurePosixPath(member.name).match(f"*/{known['marker']}/{split}")
                       for member in members):
                raise ValueError(f"it holds no {known['marker']}/{split}")
    except Exception as error:  # tarfile raises whatever the broken file led to
        reason = (str(error) or repr(error)).splitlines()[0].rstrip(":")
        raise ValueError(f"cannot unpack {archive}: {reason}; fetch it again? "
                         f"({known['documented']})") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f"{folder.name}-", folder.parent) as own:
        with tarfile.open(archive) as tar:
            tar.extractall(f"{own}/whole", members, filter="data")
        try:
            Path(own, "whole").rename(folder)
        except OSError:  # another process, with a folder of its own, was first: its files stand
            if not folder.is_dir():
                raise
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
