"""Small class folders, archives and images to read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Noise that differs from seed to seed; ``size`` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(name="picture")
def _picture() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture(name="encoded")
def _encoded() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """``make_folder({"cat": 3, "dog": 2}, "root")`` → a folder with cat/0.png …; every picture is another one."""

    def make(counts: dict[str, int], name: str = "root", size: tuple[int, int] = (12, 10)) -> Path:
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(1000 * number + i, size).save(root / folder / f"{i}.png")
        return root

    return make


@pytest.fixture
def make_zip(tmp_path: Path) -> Callable[..., Path]:
    """``make_zip({"cat/0.png": bytes, …})`` → an archive; a name that ends in "/" is a folder."""

    def make(members: dict[str, bytes], name: str = "data.zip", method: int = zipfile.ZIP_DEFLATED) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", method) as archive:
            for member, data in members.items():
                archive.writestr(zipfile.ZipInfo(member) if member.endswith("/") else member, data, method)
        return path

    return make
