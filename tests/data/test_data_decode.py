"""One rule for every kind of image file, and a reason for every file that is none."""

from __future__ import annotations

import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from xdfast.data.decode import BadImage, decode, image_size, to_rgb


@pytest.fixture
def gray() -> np.ndarray:
    return np.arange(120, dtype=np.uint8).reshape(10, 12)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_lossless_formats_keep_the_pixels(picture, encoded, format):
    options = {"WEBP": {"lossless": True}}.get(format, {})
    image = picture(0) if format != "GIF" else picture(0).quantize(256)
    data = encoded(image, format, **options)
    out = decode(data, "x")
    assert out.mode == "RGB" and image_size(data, "x") == (12, 10)
    np.testing.assert_array_equal(out, image.convert("RGB"))


def test_grayscale_and_one_bit_fill_three_channels(encoded, gray):
    out = np.asarray(decode(encoded(Image.fromarray(gray)), "x"))
    np.testing.assert_array_equal(out, np.repeat(gray[..., None], 3, 2))
    out = np.asarray(decode(encoded(Image.fromarray(gray > 60)), "x"))
    np.testing.assert_array_equal(out[..., 1], np.where(gray > 60, 255, 0))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grayscale_is_scaled_not_saturated(encoded, format):
    values = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)
    out = np.asarray(decode(encoded(Image.fromarray(values), format), "x"))
    np.testing.assert_array_equal(out[..., 2], np.rint(values / 257))
    assert out.min() == 0 and out.max() == 255


def test_transparency_is_dropped_without_a_warning(picture, encoded):
    image = picture(1)
    clear = image.copy()
    clear.putalpha(0)
    palette = image.quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(encoded(clear), "x"), image)
        out = decode(encoded(palette, transparency=bytes(range(0, 160, 10))), "x")
        np.testing.assert_array_equal(out, palette.convert("RGB"))
        light = image.convert("LA")
        np.testing.assert_array_equal(decode(encoded(light), "x"), light.convert("L").convert("RGB"))
        decode(encoded(image.convert("L"), transparency=5), "x")


def test_cmyk_jpeg(encoded):
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red = np.asarray(decode(data, "x"))[4, 4]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_orientation_in_exif_is_ignored(picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    assert decode(encoded(picture(2), "JPEG", exif=exif), "x").size == (12, 10)


def test_the_first_frame_of_an_animation(picture, encoded):
    first = Image.new("RGB", (8, 8), "red")
    data = encoded(first, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    assert decode(data, "x").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_files_are_bad(picture, encoded, format):
    data = encoded(picture(3, (64, 64)), format)
    with pytest.raises(BadImage, match=r"^here\.jpg: ") as error:
        decode(data[: len(data) // 2], "here.jpg")
    assert error.value.path == "here.jpg" and error.value.reason
    again = pickle.loads(pickle.dumps(error.value))  # it crosses processes
    assert isinstance(again, BadImage) and str(again) == str(error.value) and again.reason == error.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am text", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"\xff\xd8\xff\xe0", "."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_bad(data, reason):
    for read in (decode, image_size):
        with pytest.raises(BadImage, match=reason):
            read(data, "x")


def test_a_decompression_bomb_is_bad_before_it_is_unpacked():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(data, "x")


def test_float_and_32_bit_pixels_have_no_known_range(encoded):
    for pixels in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), -3, np.int32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(BadImage, match="unknown range; save the image with 8 or 16 bits"):
            decode(encoded(Image.fromarray(pixels), "TIFF"), "x")


def test_rgb_is_returned_as_it_is(picture):
    image = picture(4)
    assert to_rgb(image, "x") is image
