"""Reads damaged files in a process of its own: ``python hardening_readers.py WHAT SEED CASES FOLDER [FIXTURES]``.

Native decoders can end a process. Each case is announced before it is tried, so that whoever started this knows which file did.
Lines: ``try NAME``, then ``done WHAT|OUTCOME``; the last line is ``end``. A wrong outcome is ``wrong …``.
"""

from __future__ import annotations

import io
import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from hardening_damage import damaged


def _say(*words: object) -> None:
    print(*words, flush=True)


# --- images -----------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    """Whole files: name → bytes."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((61, 47), Image.Resampling.BICUBIC)
    made: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "photo.jpg": (photo, "JPEG", {"quality": 90}),
        "full.jpg": (photo, "JPEG", {"subsampling": 0}),
        "progressive.jpg": (photo, "JPEG", {"progressive": True}),
        "gray.jpg": (photo.convert("L"), "JPEG", {}),
        "cmyk.jpg": (photo.convert("CMYK"), "JPEG", {}),
        "colours.png": (photo, "PNG", {}),
        "palette.png": (photo.convert("P"), "PNG", {}),
        "alpha.png": (photo.convert("RGBA"), "PNG", {}),
        "deep.png": (Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG", {}),
        "really-a-png.jpg": (photo, "PNG", {}),
        "really-a-jpeg.png": (photo, "JPEG", {}),
        "one-pixel.png": (photo.crop((0, 0, 1, 1)), "PNG", {}),
    }
    files = {}
    for name, (image, format, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        files[name] = buffer.getvalue()
    return files


def images(seed: int, cases: int, folder: Path, decoder: str) -> None:
    """Folders of damaged and whole images through the reader of batches: an image, or a bad file named and counted."""
    import numpy as np

    from xdfast.data import Augment, open_source
    from xdfast.data.batches import BatchPlan
    from xdfast.data.decode import BadImage, decode
    from xdfast.data.reader import BatchReader
    from xdfast.data.views import Views

    rng, whole, left = random.Random(seed), pictures(), cases
    while left > 0:
        root, kinds = folder / str(left), {}
        (root / "a").mkdir(parents=True)
        for i in range(8):
            (root / "a" / f"whole{i}.jpg").write_bytes(whole["photo.jpg"])
        for i in range(min(left, 24)):
            name = rng.choice(list(whole))
            data, way = damaged(whole[name], rng)
            path = root / "a" / f"{i:02d}-{name}"
            path.write_bytes(data)
            kinds[str(path)] = (f"{Path(name).suffix[1:]}, {way}", data)
            left -= 1
        _say("try", root)
        source = open_source(str(root), val_fraction=None)
        views = Views(Augment(), 32, False, 0)
        if decoder == "dali":
            from xdfast.data.dali_reader import DaliReader

            reader: Any = DaliReader(source, views, len(source), 2, None, True)
        else:
            reader = BatchReader(source, views, cache=False, digests=True)
        plan = BatchPlan(np.arange(len(source)), np.zeros(len(source), dtype=np.int64))
        batch = reader[plan]
        if decoder == "dali":
            reader.close()
        for row in range(len(source)):
            path, valid = source.path(row), bool(batch.valid[row])
            if valid == (path in batch.bad):
                _say("wrong", path, "valid" if valid else "bad", "but", batch.bad.get(path, "not named"))
            if path not in kinds:
                if not valid:
                    _say("wrong", path, "is whole, but", batch.bad[path])
                continue
            what, data = kinds[path]
            try:
                size = decode(data, path).size
                reason = ""
            except BadImage as error:
                size, reason = (0, 0), error.reason
            if valid != bool(reason == ""):
                _say("wrong", path, "Pillow says", reason or size, "the reader", "valid" if valid else batch.bad[path])
            if not valid and not batch.bad[path]:
                _say("wrong", path, "no reason is given")
            _say(f"done {what}|{'an image' if valid else 'named as bad'}")
        shutil.rmtree(root)


# --- demonstrations ---------------------------------------------------------------------------------------------------


def demonstrations(seed: int, cases: int, folder: Path, source: Path) -> None:
    """One file of a set of demonstrations damaged: episodes, or an error that names the set's file."""
    from xdfast.robot.demos.errors import DemoError
    from xdfast.robot.demos.open import open_demos

    rng = random.Random(seed)
    for case in range(cases):
        path = folder / f"{case}" / source.name
        path.parent.mkdir(parents=True)
        shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        file = rng.choice(files)
        data, way = damaged(file.read_bytes(), rng)
        file.write_bytes(data)
        _say("try", file.relative_to(path.parent), way)
        kind = file.suffix.removeprefix(".") or "no suffix"
        try:
            lengths = [len(episode) for episode in open_demos(path)]
            if not lengths or min(lengths) < 1:
                _say("wrong", file, way, "opened with lengths", lengths)
            outcome = "opened"
        except DemoError as error:
            if str(path) not in str(error):
                _say("wrong", file, way, "the error names no file:", error)
            outcome = "refused, file named"
        except Exception as error:
            _say("wrong", file.relative_to(path.parent), way, type(error).__name__, error)
            outcome = "wrong"
        _say(f"done {kind}, {way}|{outcome}")
        shutil.rmtree(path.parent)


def main() -> None:
    logging.disable(logging.WARNING)
    what, seed, cases, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    if what == "demonstrations":
        demonstrations(seed, cases, folder, Path(sys.argv[5]))
    else:
        images(seed, cases, folder, what)
    _say("end")


if __name__ == "__main__":
    main()
