"""Decoding on a GPU: the same samples and crops; pixels to the rounding of another decoder and resize."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from xdfast.data import Augment, ImageLoader, open_source

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.gpu


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((300 + i, 260 - i), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.SHARPEN).save(tmp_path / "a" / f"{i:02d}.jpg", quality=90)
    (tmp_path / "a" / "broken.jpg").write_bytes((tmp_path / "a" / "00.jpg").read_bytes()[:500])
    return open_source(tmp_path, val_fraction=None)


@pytest.mark.parametrize("settings", [{}, {"color_jitter": 0.4}, {"interpolation": "bilinear"}])
@pytest.mark.parametrize("train", [True, False])
def test_views_on_a_gpu_are_those_of_pillow(source, settings, train):
    ours, theirs = (
        ImageLoader(
            source, 8, 128, train, Augment(**settings), workers=2, decoder=decoder, digests=True, drop_last=False
        )
        for decoder in ("dali-gpu", "pillow")
    )
    for mine, other in zip(ours.epoch(1), theirs.epoch(1), strict=True):
        for name in ("ids", "labels", "slots", "views", "valid", "digests"):
            assert getattr(mine, name).equal(getattr(other, name))
        assert mine.images.is_cuda and mine.bad == other.bad
        off = (mine.images.cpu().int() - other.images.int()).abs().float().mean((1, 2, 3))
        assert off.max() <= 1.5  # chroma upsampling, inverse DCT and resize of another library; a wrong crop: tens
    ours.close()
    theirs.close()
