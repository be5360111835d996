"""``check_images``: what it counts, what it finds with and without decoding, in one process and in several."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdfast.data import ImageSource, open_source
from xdfast.data.check import check_images


def broken_in_the_middle(jpeg: bytes) -> bytes:
    """Whole at both ends; the data between is not what the decoder expects."""
    middle = len(jpeg) // 2
    return jpeg[:middle] + b"\xff" * 400 + jpeg[middle + 400 :]


@pytest.fixture
def zoo(tmp_path, picture, encoded) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    good = picture(0, (60, 40))
    jpeg = encoded(good, "JPEG", quality=95)
    gray16 = Image.fromarray(np.asarray(good.convert("L")).astype(np.uint16) * 257)
    files = {
        "plain.jpg": jpeg,
        "gray.jpg": encoded(good.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(good.convert("CMYK"), "JPEG"),
        "rotated.jpg": encoded(picture(1, (30, 80)), "JPEG", exif=exif),
        "trailing.jpg": jpeg + b"\0" * 100,  # no end mark at its end, and whole
        "png.jpg": encoded(good),
        "gray16.png": encoded(gray16),
        "zero.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": encoded(good)[:-40],
        "middle.jpg": broken_in_the_middle(jpeg),
    }
    root = tmp_path / "zoo"
    (root / "a").mkdir(parents=True)
    for name, data in files.items():
        (root / "a" / name).write_bytes(data)
    (root / "a" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_what_is_found(zoo, full, workers, monkeypatch):
    monkeypatch.setattr("xdfast.data.check._CHUNK", 3)
    steps = []
    found = check_images(
        open_source(zoo, val_fraction=None), full=full, workers=workers, progress=lambda *step: steps.append(step)
    )
    assert (found.total, found.checked, found.full, found.interrupted) == (13, 13, full, False)
    bad = {Path(path).name: reason for path, reason in found.bad}
    silent = {} if full else {"middle.jpg"}
    assert set(bad) == {"zero.jpg", "text.jpg", "cut.jpg", "cut.png", "gone.jpg", "middle.jpg"} - set(silent)
    assert [Path(path).name for path, _ in found.bad] == sorted(bad)  # in the order of the source
    assert "empty" in bad["zero.jpg"] and "not an image" in bad["text.jpg"] and "truncated" in bad["cut.jpg"]
    kinds = {("JPEG", "RGB"): 3 + len(silent), ("JPEG", "L"): 1, ("JPEG", "CMYK"): 1, ("PNG", "RGB"): 1}
    assert {k: n for k, n in found.kinds.items() if k != ("PNG", "I;16")} == kinds
    assert found.good == sum(found.kinds.values()) == 13 - len(bad)
    assert found.rotated == 1 and found.sixteen_bit == 1
    assert sorted(found.widths)[:2] == [30, 60] and sorted(found.heights)[-2:] == [40, 80]
    assert len(found.widths) == len(found.heights) == found.good
    assert steps[-1] == (13, 13) and len(steps) == 5 and steps == sorted(steps)


def test_a_png_of_16_bits_in_three_channels_counts(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    (tmp_path / "a").mkdir()
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(12)) * 2)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a" / "deep.png").write_bytes(png)
    found = check_images(open_source(tmp_path, val_fraction=None), full=True)
    assert found.sixteen_bit == 1 and found.kinds == {("PNG", "RGB"): 1} and not found.bad


def test_images_without_files():
    found = check_images(open_source("sklearn:digits", val_fraction=None))
    assert found.good == 1797 and found.kinds == {("no file", "RGB"): 1797} and set(found.widths) == {8}


def test_archives_and_shards_are_named_with_their_member(make_zip, encoded, picture):
    path = make_zip({"a/0.png": encoded(picture(0)), "a/1.png": b"x", "b/0.png": encoded(picture(1))})
    found = check_images(open_source(path, val_fraction=None), workers=1)
    (bad,) = found.bad
    assert found.good == 2 and "data.zip" in bad[0] and "a/1.png" in bad[0]


def test_an_interruption_gives_what_was_found_so_far(zoo, monkeypatch):
    monkeypatch.setattr("xdfast.data.check._CHUNK", 2)

    def interrupt(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    for workers in (0, 2):
        found = check_images(open_source(zoo, val_fraction=None), workers=workers, progress=interrupt)
        assert found.interrupted and found.checked == 4 and found.good + len(found.bad) == 4


class Fatal(ImageSource):
    """A library that crashes on one image."""

    name, classes = "fatal", ["a"]
    labels = np.zeros(12, dtype=np.int64)

    def load(self, i: int) -> Image.Image:
        if i == 7:
            os._exit(9)
        return Image.new("RGB", (4, 4))

    def path(self, i: int) -> str:
        return f"image {i}"


def test_a_crash_names_the_images_it_may_have_been(monkeypatch):
    monkeypatch.setattr("xdfast.data.check._CHUNK", 2)
    with pytest.raises(RuntimeError, match=r"a process that looked at images died.*6 to 7 \(image 6 …\)"):
        check_images(Fatal(), workers=1)


@pytest.mark.parametrize("workers", [-1, "two", 1.5, True])
def test_workers_out_of_range(workers):
    with pytest.raises(ValueError, match="workers must be 'auto' or an integer ≥ 0"):
        check_images(Fatal(), workers=workers)
