"""Tests of nyud_pascal.py: labels are read as they were written, and errors name the bad file.

An archive that cannot be unpacked completely leaves no folder that looks like a dataset.
"""

import errno
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NYUD_ROOMS, PASCAL_ROOMS, room, write
from PIL import Image

import nyud_pascal
from nyud_pascal import (NYU_CLASSES, PARTS, SEMSEG, Files, find_dataset, read_array,
                         read_class_map, read_depth, read_edges, read_image, read_mask,
                         read_normals, read_parts, read_photo, unpack)

NYUD = ["semseg", "depth", "normals", "edge"]
PASCAL = ["semseg", "human_parts", "sal", "normals"]


def image_of(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


# --- samples --------------------------------------------------------------------------------------
def samples_and_rooms(name, folder, rooms, tasks):
    """Yield each sample, the room that it was written from, and the names of its missing labels."""
    for split in ("train", "val"):
        dataset = Files(name, folder, split, tasks)
        assert dataset.ids == [id for id in rooms if rooms[id][0] == split]
        for sample, id in zip(dataset, dataset.ids):
            _, number, size, missing = rooms[id]
            yield sample, room(number, size), missing


def test_nyud_samples_are_the_rooms_they_were_written_from(nyud_folder):
    """NYUD labels come back as written. Void pixels and missing labels are marked as invalid."""
    # NYUD's class for each class of a room: floor, ceiling, wall ...
    numbers = np.array([1, 21, 0, 28, 39, 37, 30])
    names = [SEMSEG["nyud"][n] for n in numbers]
    assert names == ["floor", "ceiling", "wall", "box", "other prop", "other structure", "person"]
    for sample, truth, missing in samples_and_rooms("nyud", nyud_folder, NYUD_ROOMS, NYUD):
        assert list(sample) == ["image", *NYUD]
        size = truth["semseg"].shape
        assert sample["image"].shape == (3, *size) and sample["image"].dtype == torch.uint8
        error = sample["image"].permute(1, 2, 0).numpy() - truth["image"].astype(float)
        assert abs(error).mean() < 5                                # JPEG is lossy
        expected = {"semseg": numbers[truth["semseg"]], "depth": truth["depth"][None],
                    "normals": truth["normals"].transpose(2, 0, 1), "edge": truth["edge"]}
        expected["semseg"][:2] = 255
        for task in missing:
            expected[task][:] = 0 if task in ("depth", "normals") else 255
        for task in NYUD:
            np.testing.assert_allclose(sample[task], expected[task], atol=1e-6, err_msg=task)
        assert [sample[task].dtype for task in NYUD] == [
            torch.uint8, torch.float32, torch.float32, torch.uint8]


def test_pascal_samples_are_the_rooms_they_were_written_from(pascal_folder):
    """PASCAL labels come back as written. Body parts of animals count as background.

    Normals are valid only at pixels whose PASCAL-Context class also exists in NYUD.
    """
    numbers = np.array([0, 0, 0, 9, 20, 5, 15])
    names = [SEMSEG["pascal"][n] for n in numbers[3:]]
    assert names == ["chair", "tv monitor", "bottle", "person"]
    for sample, truth, missing in samples_and_rooms("pascal", pascal_folder, PASCAL_ROOMS, PASCAL):
        if "human_parts" in missing:
            truth["human_parts"][:] = 255
        semseg = numbers[truth["semseg"]]
        semseg[:2] = 255
        np.testing.assert_array_equal(sample["semseg"], semseg)
        np.testing.assert_array_equal(sample["human_parts"], truth["human_parts"])
        np.testing.assert_array_equal(sample["sal"], truth["sal"])
        known = truth["semseg"] <= 3                    # floor, ceiling, wall, box
        normals = sample["normals"].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(normals[known], truth["normals"][known], atol=0.01)
        assert not normals[~known].any()


def test_the_second_version_of_nyud_gives_the_same_samples(nyud_folder):
    """With .png files as in NYUDv2.tar.gz, a sample is the same as with the files of NYUD_MT.tgz.

    Only the normals differ, by less than 0.01, because a .png stores them in 8 bits.
    """
    before = Files("nyud", nyud_folder, "train", NYUD)[0]
    normals = np.load(nyud_folder / "normals/433.npy")
    image_of(nyud_folder / "normals/433.png", ((normals + 1) * 127.5).round().astype(np.uint8))
    edges = np.load(nyud_folder / "edge/433.npy")
    image_of(nyud_folder / "edge/433.png", (edges * 255).astype(np.uint8))
    Image.open(nyud_folder / "images/433.jpg").save(nyud_folder / "images/433.png")
    for path in ("images/433.jpg", "normals/433.npy", "edge/433.npy"):
        (nyud_folder / path).unlink()
    after = Files("nyud", nyud_folder, "train", NYUD)[0]
    for task in ("image", "edge", "semseg", "depth"):
        assert torch.equal(after[task], before[task])
    assert (after["normals"] - before["normals"]).abs().max() < 0.01


def test_a_person_without_visible_parts_is_no_label(tmp_path):
    """If all masks are empty, the image has no label, as if nobody were there."""
    person = {"class": "person", "parts": {"part_name": "head", "mask": np.zeros((4, 5))}}
    path = tmp_path / "a.mat"
    pytest.importorskip("scipy.io").savemat(path, {"anno": {"objects": person}})
    assert read_parts(path) is None


def test_classes_and_body_parts_are_those_published():
    """There are 40 classes for NYUD, 21 for PASCAL, and six body parts.

    170 classes of PASCAL-Context also exist in NYUD (NYU_CLASSES).
    """
    assert len(set(SEMSEG["nyud"])) == 40 and len(set(SEMSEG["pascal"])) == 21
    parts = [" ".join(sorted(name for name in PARTS if PARTS[name] == n)) for n in range(1, 7)]
    assert parts == ["hair head lear lebrow leye mouth nose rear rebrow reye", "neck torso",
                     "luarm ruarm", "lhand llarm rhand rlarm", "luleg ruleg",
                     "lfoot llleg rfoot rlleg"]
    assert NYU_CLASSES == sorted(set(NYU_CLASSES))
    assert len(NYU_CLASSES) == 170 and sum(NYU_CLASSES) == 37556


def test_real_nyud_is_read_as_published(real_nyud_archive):
    """Images have their published sizes, and the labels of one sample match its files."""
    root = find_dataset("nyud", real_nyud_archive)
    train, val = (Files("nyud", root, split, NYUD) for split in ("train", "val"))
    assert [sample["image"].shape[1:] for sample in (*train, *val)] == [
        (480, 640), (468, 625), (425, 560), (480, 640), (480, 640), (468, 625)]
    sample, stored = train[0], np.array(Image.open(root / "segmentation/433.png")).astype(int)
    np.testing.assert_array_equal(sample["semseg"], np.where(stored == 0, 255, stored - 1))
    np.testing.assert_array_equal(sample["depth"][0], np.load(root / "depth/433.npy"))
    np.testing.assert_array_equal(sample["edge"], np.load(root / "edge/433.npy"))
    np.testing.assert_allclose(sample["normals"].permute(1, 2, 0),
                               np.load(root / "normals/433.npy"), atol=1e-5)


def test_real_pascal_is_read_as_published(real_pascal_archive):
    """Semseg labels are read from two folders, and body parts equal the masks in the annotation.

    In one image, normals are valid on PASCAL-Context class 158, which is also in NYUD, and invalid
    on class 207, which is not.
    """
    loadmat = pytest.importorskip("scipy.io").loadmat
    root = find_dataset("pascal", real_pascal_archive)
    rider, cow, dogs = Files("pascal", root, "train", PASCAL)
    assert set(rider["semseg"].unique().tolist()) == {0, 13, 15}
    assert set(dogs["semseg"].unique().tolist()) == {0, 12}     # from semseg/pascal-context
    assert (cow["human_parts"] == 255).all() and (dogs["human_parts"] == 255).all()
    annotation = loadmat(root / "human_parts/2008_000008.mat")["anno"][0, 0]
    expected = np.zeros((442, 500), np.uint8)
    for part in annotation["objects"][0, 0]["parts"][0]:
        expected[part["mask"].astype(bool)] = PARTS[part["part_name"][0]]
    np.testing.assert_array_equal(rider["human_parts"], expected)
    context = loadmat(root / "pascal-context/trainval/2008_000008.mat")["LabelMap"]
    valid = rider["normals"].norm(dim=0).numpy() > 0.5
    assert valid[context == 158].all() and not valid[context == 207].any()


# --- wrong datasets -------------------------------------------------------------------------------
ONES = np.ones((43, 50), np.uint8)


@pytest.mark.parametrize("name, content, message", [
    ("images/433.jpg", b"no image", "433.jpg is damaged, or is not an image"),
    ("depth/433.npy", np.ones((7, 9)),
     r"depth/433.npy has shape \(7, 9, 1\), expected \(48, 64, 1\), as its image has 48x64"),
    ("segmentation/433.png", 41 * ONES,
     r"433.png: holds class 41, expected a number in range\(0, 41\)"),
    ("gt_sets/train.txt", b"433\nstreet/433",
     "train.txt: lists image 'street/433'; the name of an image must not contain a slash or '..'"),
    ("gt_sets/train.txt", b"433\nstreet\\433", "lists image 'street.*433'"),
    ("gt_sets/train.txt", b"433\n..", "lists image '..'"),
    ("semseg/VOC12/2008_000008.png", 21 * ONES,
     r"2008_000008.png: holds class 21, expected a number in \[0, 1, .* 20, 255\]"),
    ("human_parts/2008_000008.mat", b"no MATLAB file",
     "2008_000008.mat is damaged, or is not an annotation of PASCAL-Part"),
    ("pascal-context/trainval/2008_000008.mat", b"no MATLAB file",
     "2008_000008.mat is damaged, or is not an annotation of PASCAL-Context"),
])
def test_wrong_files_are_named(nyud_folder, pascal_folder, name, content, message):
    """The error is one line that names the file, the mistake and what was expected."""
    dataset, root, tasks = "nyud", nyud_folder, NYUD
    if not (root / name).exists():
        dataset, root, tasks = "pascal", pascal_folder, PASCAL
    if isinstance(content, bytes):
        (root / name).write_bytes(content)
    else:
        write(root / name, content)
    with pytest.raises(ValueError, match=message) as error:
        Files(dataset, root, "train", tasks)[0]
    assert "\n" not in str(error.value)


def test_an_unknown_task_and_a_missing_file_are_named_at_once(nyud_folder):
    """An unknown task or a missing file raises an error as soon as the dataset is opened."""
    with pytest.raises(ValueError, match="nyud has no labels for sal; it has semseg, depth, norm"):
        Files("nyud", nyud_folder, "train", ["sal"])
    (nyud_folder / "edge/basement_0000.npy").unlink()
    assert len(Files("nyud", nyud_folder, "train", ["depth"])) == 4
    with pytest.raises(ValueError, match="no file edge/basement_0000.npy or edge/basement_0000.p"):
        Files("nyud", nyud_folder, "train", NYUD)


# --- single files ---------------------------------------------------------------------------------
def test_depth_that_was_not_measured_is_zero(tmp_path):
    """NaN, infinite and negative depths become 0. The channel axis of the file is optional.

    A file with a median depth above 80 m is refused.
    """
    depth = np.array([[1.5, np.nan, np.inf], [-1, 0, 80]], np.float32)
    for array in (depth, depth[..., None]):
        np.save(tmp_path / "a.npy", array)
        assert read_depth(tmp_path / "a.npy").tolist() == [[[1.5], [0], [0]], [[0], [0], [80]]]
    np.save(tmp_path / "a.npy", np.full((2, 3), 81.0))
    with pytest.raises(ValueError, match="a.npy has a median depth of 81, expected metres"):
        read_depth(tmp_path / "a.npy")


@pytest.mark.parametrize("invalid, refused", [(0.45, 0.89), (1.55, 1.11)])
def test_normals_of_another_length(tmp_path, invalid, refused):
    """A file is refused if over 10 % of its nonzero normals are shorter than 0.9 or over 1.1 long.

    A normal shorter than 0.5 or longer than 1.5 becomes invalid. All others are normalised.
    """
    path = tmp_path / "a.npy"
    normals = np.zeros((10, 8, 3), np.float32)
    normals[1:, :, 2] = 1.09                    # off by less than 0.1
    normals[1, :7, 2] = invalid                 # 7 of 72, less than 10 %
    np.save(path, normals)
    result = read_normals(path)
    assert not result[0].any() and not result[1, :7].any()
    np.testing.assert_allclose(result[2:], np.broadcast_to([0, 0, 1], (8, 8, 3)), atol=1e-6)
    normals[1, :, 2] = refused                  # 8 of 72, more than 10 %
    np.save(path, normals)
    with pytest.raises(ValueError, match="a.npy has normals of median length 1.09, expected 1"):
        read_normals(path)


def test_black_and_grey_pixels_of_a_png_are_no_normals(tmp_path):
    """In a .png, black and the two middle greys are invalid. Others become unit vectors here."""
    pixels = np.zeros((5, 8, 3), np.uint8)
    pixels[1], pixels[2], pixels[3:] = 127, 128, (204, 128, 26)
    normals = read_normals(image_of(tmp_path / "a.png", pixels))
    assert not normals[:3].any()
    expected = np.array([204, 128, 26]) / 127.5 - 1         # about (0.6, 0, -0.8)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(normals[3:], np.broadcast_to(expected, (2, 8, 3)), atol=1e-5)


def test_masks_may_be_stored_with_any_white(tmp_path):
    """A mask may store white as 1 or 255. If it has several greys, those above 127 become 1.

    In a .npy file of edges, numbers above 0.5 are edges.
    """
    path, truth = tmp_path / "a.png", np.eye(8, dtype=np.uint8)
    for white in (1, 255):
        image_of(path, truth * white)
        assert (read_mask(path) == truth).all() and (read_edges(path) == truth).all()
    image_of(path, np.array([[0, 1, 127, 128]] * 4, np.uint8))
    assert read_mask(path).tolist() == [[0, 0, 0, 1]] * 4
    np.save(tmp_path / "a.npy", np.array([[[0.0], [0.5], [0.51]]]))
    assert read_edges(tmp_path / "a.npy").tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("array, message", [
    (np.full((2, 2), 1500, np.uint16), "a.npy: holds uint16, expected floats; if these are milli"),
    (np.array([[None]]), "a.npy: Object arrays cannot be loaded when allow_pickle=False")])
def test_integers_and_pickled_objects_are_refused(tmp_path, array, message):
    """`read_array` refuses integers, which may be millimetres, and pickles, which may run code."""
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        read_array(tmp_path / "a.npy")


# --- photos and other images ----------------------------------------------------------------------
@pytest.mark.parametrize("name, dtype", [
    ("a.png", np.uint16), ("a.tiff", np.int32), ("a.tiff", np.float32)])
@pytest.mark.parametrize("read", [read_photo, read_mask])
def test_photos_and_masks_have_8_bits(tmp_path, read, name, dtype):
    """Greys of 16 or 32 bits are refused. Pillow would clip a photo, and a mask might read as 0."""
    path = image_of(tmp_path / name, np.eye(8).astype(dtype) * 4)
    with pytest.raises(ValueError, match=f"{name}: stores greys in 16 or 32 bits; save it as 8 b"):
        read(path)


def test_a_class_map_keeps_its_numbers(tmp_path):
    """Classes are read as they are stored: in 8 bits, in 16 bits, and as indices of a palette."""
    classes = np.arange(40, dtype=np.uint8).reshape(5, 8)
    palette = Image.fromarray(classes)
    palette.putpalette([255, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    for path in (image_of(tmp_path / "a.png", classes), tmp_path / "palette.png",
                 image_of(tmp_path / "deep.png", classes.astype(np.uint16))):
        label = read_class_map(path, range(40))
        assert label.dtype == np.uint8 and label.tolist() == classes.tolist()
    image_of(path, classes.astype(np.uint16) + 256)     # must not become 0 to 39
    with pytest.raises(ValueError, match="deep.png: holds class 256, expected a number in range"):
        read_class_map(path, range(40))


def test_only_photos_are_turned_upright_and_shrunk(tmp_path):
    """`read_photo` turns a photo upright (EXIF) and shrinks it to at most 2048 pixels per side.

    `read_image`, which reads images of a dataset, refuses the turn and does not shrink.
    """
    exif, pixels = Image.Exif(), np.zeros((8, 12, 3), np.uint8)
    exif[0x0112] = 6                    # orientation 6: turn clockwise by 90 degrees to view
    pixels[:, :6] = 200                 # bright on the left as stored, at the top as seen
    path = image_of(tmp_path / "a.png", pixels, exif=exif)
    assert read_photo(path).tolist() == pixels.transpose(1, 0, 2).tolist()
    with pytest.raises(ValueError, match="a.png: its EXIF data ask for a turn, so it may not fit"):
        read_image(path)
    exif[0x0112] = 1                    # orientation 1: upright as stored
    assert read_image(image_of(path, pixels, exif=exif)).tolist() == pixels.tolist()
    Image.new("L", (4096, 64)).save(path)
    assert read_photo(path).shape == (32, 2048, 3) and read_image(path).shape == (64, 4096, 3)


# --- archives -------------------------------------------------------------------------------------
LIST = "NYUD_MT/gt_sets/train.txt"


def make_archive(folder, name=LIST, link=None):
    """Write `folder`/NYUD_MT.tgz with one file of random bytes, and return its path.

    link: the name of a link to /etc that is also put into the archive.
    """
    path, content = folder / "NYUD_MT.tgz", np.random.default_rng(0).bytes(200_000)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(info)
    return path


def test_a_dataset_is_its_folder_one_around_it_or_an_archive(nyud_archive, pascal_archive, tmp_path,
                                                             monkeypatch):
    """find_dataset accepts the dataset's folder, its archive, and a folder that holds either.

    It prefers a folder to an archive, and refuses to choose between several folders.
    """
    pascal = pascal_archive.parent
    assert find_dataset("pascal", pascal) == pascal / "PASCAL_MT.tgz.unpacked/PASCAL_MT"
    archive = shutil.copy2(nyud_archive, tmp_path)
    root = tmp_path / "NYUD_MT.tgz.unpacked/NYUD_MT"
    for source in (tmp_path, archive, root, root.parent, str(tmp_path)):
        assert find_dataset("nyud", source) == root
    assert sorted(os.listdir(tmp_path)) == ["NYUD_MT.tgz", "NYUD_MT.tgz.unpacked"]
    monkeypatch.chdir(root)
    assert find_dataset("nyud", ".") == Path(".")
    Path(archive).unlink()              # a user may delete it to save space
    assert find_dataset("nyud", tmp_path) == root
    shutil.copytree(root, tmp_path / "NYUD_MT")
    with pytest.raises(ValueError, match="holds several copies .*/NYUD_MT, .*with --data-root"):
        find_dataset("nyud", tmp_path)
    shutil.rmtree(root.parent)
    make_archive(tmp_path).rename(tmp_path / "NYUDv2.tar.gz")
    assert find_dataset("nyud", tmp_path) == tmp_path / "NYUD_MT"


def test_a_missing_dataset_is_an_error_that_says_where_to_get_it(tmp_path):
    """The error says where to get the dataset if the folder does not exist or holds no dataset."""
    with pytest.raises(ValueError, match="nowhere does not exist.*NYUD_MT.tgz or NYUDv2.tar.gz.*"
                                         "--download.*https://github.com"):
        find_dataset("nyud", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pascal: .* holds neither ImageSets/Context/ nor an arch"):
        find_dataset("pascal", tmp_path)


@pytest.mark.parametrize("name, link, message", [
    (LIST, "NYUD_MT/images", r"\(AbsoluteLinkError\)"),
    ("PASCAL_MT/ImageSets/Context/train.txt", None,
     "holds no gt_sets/, so it is not an archive of nyud; see https://")])
def test_a_foreign_archive_leaves_no_folder(tmp_path, name, link, message):
    """An archive is refused if it leads out of its folder or holds another dataset."""
    archive = make_archive(tmp_path, name, link=link)
    with pytest.raises(ValueError, match=f"NYUD_MT.tgz .*{message}"):
        unpack("nyud", archive)
    assert os.listdir(tmp_path) == ["NYUD_MT.tgz"]


@pytest.mark.parametrize("damage", [
    lambda content: b"<html>This address has changed.</html>",
    lambda content: content[:-40],
    lambda content: content[:-8] + bytes(8),                    # gzip's checksum, at the very end
    lambda content: content[:90_000] + bytes(len(content) - 90_000)])
def test_a_damaged_archive_leaves_no_folder(tmp_path, damage):
    """A web page, an incomplete archive and wrong bytes are refused with an error of one line."""
    archive = make_archive(tmp_path)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match="NYUD_MT.tgz is damaged, or is not an archive of nyud .*; "
                                         "delete it and fetch it again, see http") as error:
        unpack("nyud", archive)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["NYUD_MT.tgz"]


def test_a_full_disk_is_not_the_archives_fault(tmp_path, monkeypatch):
    """If the disk is full, the error says so, and the unfinished folder is removed."""
    def extractall(self, path, **kwargs):
        (path / "NYUD_MT/gt_sets").mkdir(parents=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    archive = make_archive(tmp_path)
    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    with pytest.raises(OSError, match="No space left on device"):
        unpack("nyud", archive)
    assert os.listdir(tmp_path) == ["NYUD_MT.tgz"]


def test_an_unfinished_folder_is_neither_used_nor_touched(tmp_path):
    """Another run may be unpacking into the .partial folder, or a killed one has left it behind."""
    make_archive(tmp_path)
    started = tmp_path / "NYUD_MT.tgz.partial/NYUD_MT/gt_sets"
    started.mkdir(parents=True)
    with pytest.raises(ValueError, match="NYUD_MT.tgz.partial exists: either another run is unpa"):
        find_dataset("nyud", tmp_path)
    assert started.is_dir() and not (tmp_path / "NYUD_MT.tgz.unpacked").exists()


def test_an_archive_is_downloaded(server, nyud_archive, tmp_path, monkeypatch):
    """With --download, the archive is saved in --data-root.

    A dead address is an error that says where else to look, and leaves no file behind.
    """
    folder, address = server
    url = f"{address}/NYUD_MT.tgz"
    monkeypatch.setitem(nyud_pascal.ADDRESSES, "nyud", url)
    data = tmp_path / "new/data"
    with pytest.raises(ValueError, match=f"download of {url} failed: .*404.*Put the archive in"
                                         "to .*data yourself; .*https://github.com"):
        find_dataset("nyud", data, download=True)
    assert os.listdir(data) == []
    shutil.copy(nyud_archive, folder)
    assert find_dataset("nyud", data, download=True) == data / "NYUD_MT.tgz.unpacked/NYUD_MT"
    assert sorted(os.listdir(data)) == ["NYUD_MT.tgz", "NYUD_MT.tgz.unpacked"]
