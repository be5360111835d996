"""DALI: the same batches as Pillow's reader, whatever is wrong with the files."""

from __future__ import annotations

import io
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tolerances import VIEW_LSB

from xdfast.data import Augment, BadImage, ImageLoader, open_source
from xdfast.data.batches import BatchPlan
from xdfast.data.crops import Crop
from xdfast.data.decode import open_image
from xdfast.data.decoder import choose_decoder
from xdfast.data.jpeg import is_plain_jpeg
from xdfast.data.reader import BatchReader
from xdfast.data.views import Views

pytest.importorskip("nvidia.dali")

from xdfast.data.dali import DaliDecoder, DaliError, DaliRenderer
from xdfast.data.dali_reader import DaliReader


def photograph(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Smooth colours, with edges: what JPEG is made for; ``size`` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.SHARPEN)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def zoo() -> dict[str, bytes]:
    """Files that decoders disagree about: name → bytes."""
    good = photograph(0)
    other = {}
    for name, image, format in (
        ("rgba.png", good.convert("RGBA"), "PNG"),
        ("palette.png", good.convert("P"), "PNG"),
        ("gif.jpg", good, "GIF"),
        ("bmp.jpg", good, "BMP"),
        ("webp.webp", good, "WEBP"),
        ("gray16.png", Image.fromarray(np.asarray(good.convert("L")).astype(np.uint16) * 257), "PNG"),
    ):
        buffer = io.BytesIO()
        image.save(buffer, format)
        other[name] = buffer.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "gray.jpg": jpeg(good.convert("L")),
        "cmyk.jpg": jpeg(good.convert("CMYK")),
        "progressive.jpg": jpeg(good, progressive=True),
        "rotated.jpg": jpeg(good, exif=exif),
        "tiny.jpg": jpeg(photograph(1, (1, 1))),
        "wide.jpg": jpeg(photograph(2, (700, 3))),
        "full.jpg": jpeg(photograph(3), subsampling=0),
        "half.jpg": jpeg(photograph(4, (121, 91)), subsampling=1),
        "trailing.jpg": jpeg(good) + b"\0" * 100,
        **other,
    }


BROKEN = {
    "zero.jpg": b"",
    "text.jpg": b"<html>404 not found</html>" * 20,
    "header.jpg": jpeg(photograph(5))[:200],
    "half.jpg": jpeg(photograph(5))[: len(jpeg(photograph(5))) // 2],
    "nearly.jpg": jpeg(photograph(5))[:-20],
}


def folder(root: Path, files: dict[str, bytes], good: int = 12) -> Path:
    (root / "a").mkdir(parents=True)
    for i in range(good):
        (root / "a" / f"good{i:02d}.jpg").write_bytes(jpeg(photograph(100 + i, (100 + i, 80 + 3 * i))))
    for name, data in files.items():
        (root / "a" / name).write_bytes(data)
    return root


def readers(source, views, batch=8):
    return BatchReader(source, views, cache=False, digests=True), DaliReader(source, views, batch, 2, None, True)


def same(a, b) -> bool:
    names = ("images", "labels", "ids", "valid", "slots", "views", "digests")
    return all(getattr(a, name).equal(getattr(b, name)) for name in names) and a.bad == b.bad


@pytest.mark.parametrize("settings", [{}, {"interpolation": "bilinear"}, {"color_jitter": 0.4}, {"train_crop": "pad"}])
@pytest.mark.parametrize("train", [True, False])
def test_batches_are_those_of_pillow_bit_by_bit(tmp_path, settings, train):
    source = open_source(folder(tmp_path, zoo()), val_fraction=None)
    views = Views(Augment(**{"color_jitter": 0.2, **settings}), 48, train, 3)
    pillow, dali = readers(source, views)
    for epoch in range(2):
        for begin in range(0, len(source), 8):
            ids = np.arange(begin, min(begin + 8, len(source)))
            plan = BatchPlan(ids, np.full(len(ids), epoch))
            assert same(pillow[plan], dali[plan])
    dali.close()


@pytest.mark.parametrize("train", [True, False])
def test_broken_files_are_replaced_or_marked_alike(tmp_path, train):
    source = open_source(folder(tmp_path, BROKEN), val_fraction=None)
    pillow, dali = readers(source, Views(Augment(), 32, train, 0), batch=len(source))
    plan = BatchPlan(np.arange(len(source)), np.full(len(source), 4))
    ours = dali[plan]
    assert same(pillow[plan], ours)
    assert len(ours.bad) == len(BROKEN) and ours.valid.all() == train
    assert {Path(path).name for path in ours.bad} == set(BROKEN)
    dali.close()


def broken_tables(seed: int = 9) -> bytes:
    """A JPEG whose header reads well and which ends as it should, with its Huffman tables cut off."""
    return b"\xff\xd8\xff\xe0" + jpeg(photograph(seed))[4:600] + b"\0" * 50 + b"\xff\xd9"


def test_a_file_that_would_crash_dali_does_not_reach_it(tmp_path, monkeypatch):
    """In a batch of this size an error inside DALI 2.4 is mostly a segmentation fault."""
    source = open_source(folder(tmp_path, {}, good=64), val_fraction=None)
    dali = DaliReader(source, Views(Augment(scale=(1.0, 1.0)), 32, True, 0), 64, 2, None, False)
    plan = BatchPlan(np.arange(64), np.zeros(64, dtype=np.int64))
    before = dali[plan]
    Path(source.path(7)).write_bytes(broken_tables())
    real, given = DaliDecoder.__call__, []
    monkeypatch.setattr(
        DaliDecoder, "__call__", lambda self, data, crops: given.extend(data) or real(self, data, crops)
    )
    began = time.monotonic()
    after = dali[plan]
    assert time.monotonic() - began < 3 and given and broken_tables() not in given
    assert list(after.bad) == [source.path(7)]
    rows = np.arange(64) != 7
    assert after.images[rows].equal(before.images[rows]) and int(after.ids[7]) != 7 and after.valid.all()
    dali.close()


def test_what_is_called_plain_dali_decodes():
    """Damage of every kind at random places; one image a batch, where an error of DALI's is an error."""
    rng, decoder, passed = np.random.default_rng(0), DaliDecoder(1, 1), 0
    whole = [jpeg(photograph(i)) for i in range(4)] + [jpeg(photograph(5), subsampling=0), zoo()["gray.jpg"]]
    assert all(map(is_plain_jpeg, whole))
    for name in ("progressive.jpg", "trailing.jpg", "cmyk.jpg", "rgba.png"):
        assert not is_plain_jpeg(zoo()[name])
    assert not any(map(is_plain_jpeg, [*BROKEN.values(), broken_tables()]))
    for _ in range(2000):
        data = bytearray(whole[rng.integers(len(whole))])
        place = int(rng.integers(2, 700 if rng.random() < 0.7 else len(data) - 2))
        count = max(0, min(int(rng.choice([1, 4, 20, 200])), len(data) - 2 - place))
        data[place : place + count] = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
        if is_plain_jpeg(bytes(data)):
            try:
                size = open_image(bytes(data), "").size
            except BadImage:  # too large, or no image to Pillow
                continue
            if size[0] * size[1] < 1_000_000:
                passed += 1
                decoder([bytes(data)], [Crop((0, 0, *size), (8, 8), (0, 0))])
    assert passed > 300
    decoder.close()


def test_what_only_dali_refuses_is_decoded_by_pillow_from_then_on(tmp_path, monkeypatch, caplog):
    source = open_source(folder(tmp_path, {}), val_fraction=None)
    views = Views(Augment(), 32, True, 0)
    pillow, dali = readers(source, views, batch=12)
    refused = source.read(5)
    real, calls = DaliDecoder.__call__, []

    def strict(self, encoded, crops):
        calls.append(len(encoded))
        if refused in encoded:
            raise DaliError("a file this decoder cannot take")
        return real(self, encoded, crops)

    monkeypatch.setattr(DaliDecoder, "__call__", strict)
    plan = BatchPlan(np.arange(12), np.ones(12, dtype=np.int64))
    with caplog.at_level(logging.WARNING, "xdfast"):
        assert same(pillow[plan], dali[plan])
    assert "DALI cannot decode" in caplog.text and source.path(5) in caplog.text
    calls.clear()
    assert same(pillow[plan], dali[plan]) and calls == [11]  # it is not offered again
    dali.close()


def test_a_failure_that_is_no_files_fault_is_raised(tmp_path, monkeypatch):
    source = open_source(folder(tmp_path, {}), val_fraction=None)
    dali = DaliReader(source, Views(Augment(), 32, True, 0), 12, 2, None, False)

    def failing(self, encoded, crops):
        if len(encoded) > 6:
            raise DaliError("out of something")
        return [np.zeros((c.box[3], c.box[2], 3), dtype=np.uint8) for c in crops]

    monkeypatch.setattr(DaliDecoder, "__call__", failing)
    with pytest.raises(DaliError, match="out of something"):
        dali[BatchPlan(np.arange(12), np.zeros(12, dtype=np.int64))]
    dali.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("train", "jitter"), [(False, 0.0), (True, 0.0), (True, 0.4)])
def test_the_graph_for_gpus_makes_the_same_views_on_the_cpu(interpolation, train, jitter):
    views = Views(Augment(interpolation=interpolation, color_jitter=jitter, crop_pct=0.9), 64, train, 1)
    images = [photograph(i, (300 + 7 * i, 260 - 3 * i)) for i in range(16)]
    files = [jpeg(image) for image in images]
    crops = [views.crop(2, i, *image.size) for i, image in enumerate(images)]
    renderer = DaliRenderer(16, 64, interpolation, 2, None, jitter > 0)
    ours = renderer(files, crops, [views.jitter(2, i) for i in range(16)]).numpy()
    for i, data in enumerate(files):
        base = views.render(Image.open(io.BytesIO(data)).convert("RGB"), crops[i])
        expected = np.asarray(views.colour(Image.fromarray(base), 2, i))
        assert (
            np.abs(ours[i].astype(int) - expected.astype(int)).mean()
            <= VIEW_LSB["dali mean, jittered" if jitter else "dali mean"]
        )
    renderer.close()


@pytest.mark.parametrize(
    ("files", "damage"), [({}, False), ({}, True), ({"late.png": zoo()["rgba.png"], **BROKEN}, True)]
)
def test_whole_views_by_dali_go_to_their_rows(tmp_path, monkeypatch, files, damage) -> None:
    """The way of a GPU, with its graph on the CPU: also where a file fails inside DALI and its row is filled later."""
    source = open_source(folder(tmp_path, files), val_fraction=None)
    if damage:
        Path(source.path(3)).write_bytes(broken_tables())
        # As if DALI found out, without letting it: that would be the process's end.
        monkeypatch.setattr("xdfast.data.dali_reader.is_plain_jpeg", lambda data: data.endswith(b"\xff\xd9"))
        real = DaliRenderer.__call__

        def strict(self, encoded, crops, jitters):
            if broken_tables() in encoded:
                raise DaliError("cannot decode")
            return real(self, encoded, crops, jitters)

        monkeypatch.setattr(DaliRenderer, "__call__", strict)
    views, count = Views(Augment(color_jitter=0.3), 48, True, 3), len(source)
    pillow, dali = readers(source, views, batch=count)
    dali._dali = DaliRenderer(count, 48, "bicubic", 2, None, True)
    plan = BatchPlan(np.arange(count), np.ones(count, dtype=np.int64))
    ours, theirs = dali[plan], pillow[plan]
    assert ours.ids.equal(theirs.ids) and ours.digests.equal(theirs.digests) and set(ours.bad) == set(theirs.bad)
    off = (ours.images.int() - theirs.images.int()).abs().float().mean((1, 2, 3))
    assert off.max() <= VIEW_LSB["dali mean, jittered"]  # a row in another's place is off by tens
    dali.close()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_loader_is_the_same_with_either_decoder_and_after_an_interruption(tmp_path, kind):
    root = folder(tmp_path / "root", zoo())
    if kind != "folder":
        root = Path(shutil.make_archive(str(tmp_path / "all"), kind, root))
    source = open_source(root, val_fraction=None)
    loaders = {
        (decoder, workers): ImageLoader(
            source, 4, 72, train=True, seed=1, workers=workers, decoder=decoder, fixed_views=3, digests=True
        )
        for decoder in ("pillow", "dali")
        for workers in (1, 2)
    }
    whole = list(loaders["pillow", 1].epoch(2))
    assert len({int(v) for batch in whole for v in batch.views}) == 3  # a batch mixes the K views
    for loader in loaders.values():
        assert all(map(same, loader.epoch(2), whole))
        assert all(map(same, loader.epoch(2, start=3), whole[3:]))
        loader.close()


def test_closing_or_leaving_an_epoch_ends_the_threads(tmp_path):
    source = open_source(folder(tmp_path, {}), val_fraction=None)
    loader = ImageLoader(source, 4, 72, train=True, decoder="dali", workers=2)
    first = loader.epoch(0)
    next(first)
    assert len(list(loader.epoch(0))) == 3
    with pytest.raises(RuntimeError, match="use a second ImageLoader"):
        next(first)
    loader.close()


def test_every_fixed_view_comes_once_in_k_epochs(tmp_path):
    source = open_source(folder(tmp_path, {}), val_fraction=None)
    loader = ImageLoader(source, 5, 16, train=True, decoder="pillow", workers=0, fixed_views=3, drop_last=False)
    seen = [
        {(int(s), int(v)) for b in loader.epoch(e) for s, v in zip(b.slots, b.views, strict=True)} for e in range(6)
    ]
    assert set.union(*seen[:3]) == set.union(*seen[3:]) == {(s, v) for s in range(12) for v in range(3)}
    assert seen[0] == seen[3] and not seen[0] & seen[1]


def test_the_choice_of_a_decoder_explains_itself(tmp_path):
    photos = open_source(folder(tmp_path / "photos", {}), val_fraction=None)
    digits = open_source("sklearn:digits")
    drawings = tmp_path / "drawings" / "a"
    drawings.mkdir(parents=True)
    photograph(0).save(drawings / "0.png")
    large, small = Views(Augment(), 224, True, 0), Views(Augment(), 32, True, 0)
    policy = Views(Augment(auto_augment="rand-m9-mstd0.5-inc1"), 224, True, 0)
    lanczos = Views(Augment(interpolation="lanczos"), 224, True, 0)
    assert choose_decoder("auto", photos, large)[0] == "dali" and "DALI" in choose_decoder("auto", photos, large)[1]
    for source, views, reason in (
        (photos, small, "32 pixels"),
        (photos, policy, "auto_augment"),
        (photos, lanczos, "lanczos"),
        (digits, large, "no image files"),
        (open_source(drawings.parent, val_fraction=None), large, "no JPEG"),
    ):
        name, why = choose_decoder("auto", source, views)
        assert name == "pillow" and reason in why
        if reason not in ("32 pixels", "no JPEG"):
            with pytest.raises(ValueError, match=f"decoder='dali' cannot be used: .*{reason}"):
                choose_decoder("dali", source, views)
    with pytest.raises(ValueError, match="Did you mean 'dali'?"):
        choose_decoder("dalli", photos, large)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_decoding_on_a_gpu_needs_one(tmp_path):
    source = open_source(folder(tmp_path, {}), val_fraction=None)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        choose_decoder("dali-gpu", source, Views(Augment(), 224, True, 0))


def test_without_dali_the_choice_says_so(tmp_path, monkeypatch):
    source = open_source(folder(tmp_path, {}), val_fraction=None)
    views = Views(Augment(), 224, True, 0)
    monkeypatch.setattr("xdfast.data.decoder.dali_available", lambda: (False, "not installed: pip install it"))
    assert choose_decoder("auto", source, views) == ("pillow", "DALI is not installed: pip install it")
    with pytest.raises(ImportError, match="not installed"):
        choose_decoder("dali", source, views)
    monkeypatch.setattr("xdfast.data.dali.dali_available", lambda: (False, "not installed: pip install it"))
    with pytest.raises(ImportError, match="not installed"):
        DaliDecoder(4, 1)
