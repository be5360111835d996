"""Images inside zip archives: layouts, damage, several processes."""

from __future__ import annotations

import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest

from xdfast.data import BadImage, ImageLoader, open_source
from xdfast.data.archive import ZipSource


@pytest.fixture
def members(picture, encoded) -> dict[str, bytes]:
    return {f"{c}/{i}.png": encoded(picture(10 * k + i)) for k, c in enumerate(("cat", "dog")) for i in range(3)}


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=str
)
def test_every_compression_gives_the_pixels(make_zip, members, picture, method):
    source = open_source(make_zip(members, method=method), val_fraction=None)
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for i in range(6):
        np.testing.assert_array_equal(source.load(i), picture(10 * (i // 3) + i % 3))
    assert source.size(0) == (12, 10) and source.path(4).endswith("data.zip:dog/1.png")


def test_the_split_is_that_of_the_unpacked_folder(make_zip, members, tmp_path):
    path = make_zip({f"wrap/{name}": data for name, data in members.items()})
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    for split in ("train", "val"):
        packed, unpacked = open_source(path, split=split), open_source(tmp_path / "unpacked", split=split)
        assert [packed.key(i) for i in range(len(packed))] == [unpacked.key(i) for i in range(len(unpacked))]


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"./{name}",
        lambda name: f"/{name}",
        lambda name: name.replace("/", "\\"),
        lambda name: f"a//{name}",
        lambda name: f"C:\\data\\{name}",
    ],
)
def test_odd_names_of_other_tools(make_zip, members, rename):
    source = ZipSource(make_zip({rename(name): data for name, data in members.items()}))
    assert source.classes == ["cat", "dog"] and len(source) == 6 and source.load(5).size == (12, 10)
    assert source.key(0) == "cat/0.png"


def test_system_files_and_folder_entries_are_no_images(make_zip, members):
    extra = {"__MACOSX/cat/._0.png": b"x", "cat/": b"", "cat/.DS_Store": b"x", "cat\\": b"", "./": b"", ".": b"x"}
    source = ZipSource(make_zip({**extra, **members}))
    assert len(source) == 6 and source.classes == ["cat", "dog"]


def test_parts_and_an_empty_class(make_zip, members):
    data = members["cat/0.png"]
    parts = {"train/a/1.png": data, "train/b/1.png": data, "val/a/1.png": data, "val/b/": b""}
    source = ZipSource(make_zip(parts), split="val")
    assert source.part == "val" and source.classes == ["a", "b"] and len(source) == 1
    with pytest.raises(ValueError, match="no images in class folder 'bird'"):
        ZipSource(make_zip({**members, "bird/": b""}))


def test_names_that_climb_out_are_left_out(make_zip, members, caplog):
    data = members["cat/0.png"]
    source = ZipSource(make_zip({**members, "../../evil/1.png": data, "cat/../../2.png": data}))
    assert len(source) == 6 and "left out 2 member(s) with '..'" in caplog.text


def test_depth_is_no_problem(make_zip, members):
    source = ZipSource(make_zip({**members, "cat/" + "d/" * 3000 + "1.png": members["cat/0.png"]}))
    assert len(source) == 7


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_not_a_zip(tmp_path, content):
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable zip archive .* download it again"):
        open_source(path)


def test_truncated_and_empty_archives(make_zip, members, tmp_path):
    path = make_zip(members)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a readable zip archive"):
        open_source(path)
    with pytest.raises(ValueError, match="is empty"):
        open_source(make_zip({}, "empty.zip"))
    with pytest.raises(ValueError, match="no class sub-folders"):
        open_source(make_zip({"1.png": members["cat/0.png"]}, "flat.zip"))


def _encrypt_flag(path, count: int) -> None:
    """Sets the encryption bit in the directory entries of the first ``count`` members."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(count):
        at = data.index(b"PK\x01\x02", at + 1)
        data[at + 8] |= 1
    path.write_bytes(bytes(data))


def test_an_encrypted_archive_is_refused_and_an_encrypted_member_is_bad(make_zip, members):
    path = make_zip(members)
    _encrypt_flag(path, 6)
    with pytest.raises(ValueError, match="are encrypted; unpack it with its password"):
        open_source(path)
    path = make_zip(members)
    _encrypt_flag(path, 1)
    with pytest.raises(BadImage, match="data.zip:cat/0.png: the archive member is encrypted"):
        ZipSource(path).load(0)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_is_named_with_the_member(make_zip, members, method):
    path = make_zip(members, method=method)
    source = ZipSource(path)
    data = bytearray(path.read_bytes())
    start = int(source._offset[2]) + 30 + len("cat/2.png") + 20
    data[start : start + 40] = bytes(40)
    path.write_bytes(bytes(data))
    with pytest.raises(BadImage, match="data.zip:cat/2.png: the archive member") as error:
        source.load(2)
    assert str(error.value).count("cat/2.png") == 1
    assert source.load(1).size == (12, 10)


def test_a_directory_that_points_nowhere(make_zip, members):
    path = make_zip(members)
    source = ZipSource(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BadImage, match="cat/0.png: the archive is damaged here") as error:
        source.load(0)
    assert str(error.value).count("data.zip") == 1
    path.write_bytes(b"")
    with pytest.raises(BadImage, match="cannot be read"):
        source.load(1)


def test_a_member_that_unpacks_to_more_than_it_says_is_stopped(make_zip, members):
    path = make_zip({**members, "cat/bomb.png": bytes(50_000_000)})
    source = ZipSource(path)
    bomb = [source.key(i) for i in range(len(source))].index("cat/bomb.png")
    source._unpacked[bomb] = 1000  # the directory lies
    with pytest.raises(BadImage, match="CRC differs"):
        source.load(bomb)
    source._unpacked[bomb] = 2**31
    with pytest.raises(BadImage, match="larger than 1024 MiB"):
        source.load(bomb)


def test_a_link_in_an_archive_is_not_followed(make_zip, members, tmp_path):
    path = make_zip(members)
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BadImage, match="not an image"):
        ZipSource(path).load(3)


def _pixels(source: ZipSource, i: int, queue) -> None:
    queue.put(np.asarray(source.load(i)))


def test_an_open_archive_survives_fork_and_pickling(make_zip, members, picture):
    source = ZipSource(make_zip(members))
    source.load(0)  # opens the file in this process
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_pixels, args=(source, 4, queue))
    process.start()
    np.testing.assert_array_equal(queue.get(timeout=60), picture(11))
    process.join()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).load(4), picture(11))  # what spawn does
    np.testing.assert_array_equal(source.load(3), picture(10))


def test_workers_read_one_archive_together(make_zip, members):
    source = ZipSource(make_zip(members))
    source.load(0)
    alone, together = (ImageLoader(source, batch_size=2, image_size=8, train=True, workers=w).epoch(0) for w in (0, 2))
    for a, b in zip(alone, together, strict=True):
        assert a.images.equal(b.images) and a.ids.equal(b.ids) and not a.bad
