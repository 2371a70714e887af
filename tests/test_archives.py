"""datasets/archives.py: unpacking, and downloads from a server of the test's own."""

import errno
import http.server
import io
import multiprocessing
import os
import tarfile
import threading
import time

import pytest
import torch

from datasets import archives
from datasets.archives import download, find_dataset, unpack

SPLITS = ("NYUD_MT/gt_sets/train.txt", "NYUD_MT/gt_sets/val.txt")


def make_archive(path, *members):
    """A tar with these members: a name (a small file), or a TarInfo (a link, say)."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = 2
            tar.addfile(member, io.BytesIO(b"1\n"))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_good_archive_is_unpacked_once(tmp_path):
    """The folder around the dataset; a second call does nothing."""
    path = make_archive(tmp_path / "NYUD_MT.tgz", *SPLITS)
    folder = unpack("nyud", path, tmp_path / "into")
    assert (folder / SPLITS[0]).read_text() == "1\n"
    (folder / "mine").write_text("kept")
    assert unpack("nyud", path, tmp_path / "into") == folder and (folder / "mine").exists()


@pytest.mark.parametrize("members", [
    [*SPLITS, "../outside.txt"], [*SPLITS, "NYUD_MT/../../outside.txt"],
    [*SPLITS, "/absolute.txt"], [*SPLITS, "NYUD_MT/two\nlines.txt"],
    [*SPLITS, "d/" * 1500 + "deep.txt"],
    [*SPLITS, link("NYUD_MT/link", "gt_sets/train.txt", tarfile.SYMTYPE)],
    [*SPLITS, link("NYUD_MT/link", "/etc/passwd", tarfile.SYMTYPE)],
    [*SPLITS, link("NYUD_MT/link", SPLITS[0], tarfile.LNKTYPE)],
    [*SPLITS, link("NYUD_MT/pipe", "", tarfile.FIFOTYPE)],
    [*SPLITS, link("NYUD_MT/link", "../../outside.txt", tarfile.SYMTYPE)],
    [*SPLITS, link("NYUD_MT/link", "../outside.txt", tarfile.LNKTYPE)],
    SPLITS[:1], SPLITS[1:], ["NYUD_MT/other.txt"]])
def test_bad_archives_leave_nothing_behind(tmp_path, members):
    """Any link or pipe, paths that are not relative and plain, a split missing: one line about it,
    before a folder is made."""
    path = make_archive(tmp_path / "NYUD_MT.tgz", *members)
    with pytest.raises(ValueError, match="cannot unpack .*NYUD_MT.tgz: .*; fetch") as error:
        unpack("nyud", path, tmp_path / "into")
    assert len(str(error.value).splitlines()) == 1 and os.listdir(tmp_path) == ["NYUD_MT.tgz"]


def test_a_chain_of_links_writes_nothing_outside(tmp_path):
    """CVE-2025-4517: links that are longer, resolved, than realpath follows, so that tarfile's own
    filter takes for inside what leads outside; here 17 links, and a file through the last."""
    path, chain, deep = "NYUD_MT", [], "x" * 247
    for step in "abcdefghijklmnop":
        folder = tarfile.TarInfo(f"{path}/{deep}")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        chain += [folder, link(f"{path}/{step}", deep, tarfile.SYMTYPE)]
        path += f"/{deep}"
    up = "NYUD_MT/" + "/".join("abcdefghijklmnop") + "/" + "l" * 254
    chain += [link(up, "../" * 16, tarfile.SYMTYPE),
              link("NYUD_MT/out", up.removeprefix("NYUD_MT/") + "/../../../victim",
                   tarfile.SYMTYPE), "NYUD_MT/out/victim.py"]
    (tmp_path / "victim").mkdir()
    archive = make_archive(tmp_path / "NYUD_MT.tgz", *SPLITS, *chain)
    with pytest.raises(ValueError, match="is not a plain file or folder"):
        unpack("nyud", archive, tmp_path / "into")
    assert not os.listdir(tmp_path / "victim") and not (tmp_path / "into").exists()


def unpack_at_once(archive, into, barrier):
    barrier.wait()
    unpack("nyud", archive, into)


def test_two_processes_unpack_one_archive_at_once(tmp_path):
    """Both end well, three times out of three, and what they leave is whole."""
    context = multiprocessing.get_context("spawn")
    names = [f"NYUD_MT/images/{i}.jpg" for i in range(1500)]
    archive = make_archive(tmp_path / "NYUD_MT.tgz", *SPLITS, *names)
    for turn in range(3):
        into, barrier = tmp_path / f"into{turn}", context.Barrier(2)
        both = [context.Process(target=unpack_at_once, args=(archive, into, barrier))
                for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        folder, = into.iterdir()  # and nothing else is left
        assert folder == unpack("nyud", archive, into)
        assert all((folder / name).read_text() == "1\n" for name in [*SPLITS, *names])


def test_a_full_disk_is_not_the_archives_fault(tmp_path, monkeypatch, server):
    """It is said in words, and what was downloaded stays."""
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    monkeypatch.setattr(archives, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(archives.SOURCES["nyud"], "url", server + "file")
    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(OSError, match="No space left on device"):
        find_dataset("nyud", tmp_path / "a", fetch=True)
    assert os.listdir(tmp_path / "a") == ["NYUD_MT.tgz"] and not os.listdir(tmp_path / "cache")


@pytest.mark.parametrize("keep", [0, 1, 40, -40, -1])
def test_truncated_archives_leave_nothing_behind(tmp_path, keep):
    path = make_archive(tmp_path / "NYUD_MT.tgz", *SPLITS, "NYUD_MT/fine.txt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cannot unpack .*NYUD_MT.tgz"):
        unpack("nyud", path, tmp_path / "into")
    assert not (tmp_path / "into").exists()


# --- downloads ---
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content` in the way that the path names."""

    content, asked = b"", []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start, way = int(asked[6:-1]) if asked else 0, self.path[1:]
        if way == "missing":
            return self.send_error(404)
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            return self.end_headers()
        start = 0 if way == "forgetful" else start
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("Content-Type", "text/html" if way == "page" else "application/gzip")
        self.end_headers()
        broken = way in ("broken", "stalled") and not start
        self.wfile.write(self.content[start:len(self.content) // 2 if broken else None])
        if way == "stalled" and broken:
            self.wfile.flush()
            time.sleep(1.5)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    Handler.content = make_archive(tmp_path / "served.tgz", *SPLITS).read_bytes()
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("way, message", [("broken", "bytes came, expected"),
                                          ("stalled", "timed out")])
def test_an_interrupted_download_continues(server, tmp_path, monkeypatch, way, message):
    """The half that came is kept, also when the line just goes quiet; then the rest is asked for.
    """
    monkeypatch.setattr(archives, "TIMEOUT", 0.5)
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=f"{message}.*run again to continue. Other sources: there"):
        download(server + way, path, "there")
    half = len(Handler.content) // 2
    assert not path.exists() and (tmp_path / "file.part").stat().st_size == half
    download(server + way, path, "there")
    assert path.read_bytes() == Handler.content and Handler.asked == [None, f"bytes={half}-"]
    assert not (tmp_path / "file.part").exists()


def test_a_server_that_cannot_continue_sends_everything_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"something else")
    download(server + "forgetful", tmp_path / "file", "there")
    assert (tmp_path / "file").read_bytes() == Handler.content


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    """Killed between the last byte and the renaming; one that is too long is refused and kept."""
    (tmp_path / "file.part").write_bytes(Handler.content)
    download(server + "file", tmp_path / "file", "there")
    assert (tmp_path / "file").read_bytes() == Handler.content
    (tmp_path / "file.part").write_bytes(Handler.content + b"more")
    with pytest.raises(ValueError, match="416.*file.part is kept"):
        download(server + "file", tmp_path / "file", "there")


@pytest.mark.parametrize("way, message", [("missing", "404"), ("page", "a web page, not the file")])
def test_what_is_not_the_file_is_not_kept(server, tmp_path, way, message):
    with pytest.raises(ValueError, match=message):
        download(server + way, tmp_path / "file", "there")
    assert not list(tmp_path.glob("file*"))


def test_no_server_is_an_error_that_says_where_else_to_look(tmp_path):
    with pytest.raises(ValueError, match="refused.*Other sources: there"):
        download("http://127.0.0.1:9/file", tmp_path / "file", "there")


def test_a_download_that_is_no_dataset_is_removed(server, tmp_path, monkeypatch):
    """find_dataset(fetch=True): the right file is unpacked; a wrong one is not found next time."""
    source = archives.SOURCES["nyud"]
    monkeypatch.setattr(archives, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(source, "url", server + "file")
    assert (find_dataset("nyud", tmp_path / "a", fetch=True) / "gt_sets/val.txt").is_file()
    Handler.content = b"not an archive"
    with pytest.raises(ValueError, match="cannot unpack"):
        find_dataset("nyud", tmp_path / "b", fetch=True)
    assert not list((tmp_path / "b").iterdir())


def test_weights_with_a_wrong_checksum_are_refused(server, tmp_path, monkeypatch):
    """torchvision names the checksum in the file's name; what does not fit is not used."""
    from torchvision.models import Swin_T_Weights

    from swin import read_weights
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = Swin_T_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "url", server + "swin_t-704ceda3.pth")
    with pytest.raises(ValueError, match="invalid hash value.*fetch the file by hand"):
        read_weights("torchvision", "tiny")
    assert not list(tmp_path.glob("checkpoints/*.pth"))
