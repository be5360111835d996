"""``ImageSource``: N images with labels, read one at a time, from any process."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from PIL import Image

from xdfast.data._rng import preserved_rng
from xdfast.data.decode import BadImage

__all__ = ["ImageSource", "PackedStrings", "SubsetSource"]

_PROBES = 16


class ImageSource(ABC):
    """Images and their labels.

    Subclass it for your own storage: set the attributes, write :meth:`load` and :meth:`path`. A source is copied into
    worker processes: it must survive ``fork`` and pickling (open files lazily, per process).

    Attributes:
        name: for messages and logs.
        classes: class names; ``labels`` index this list.
        labels: int64 ``[N]``.
        in_memory: True if :meth:`load` needs no file and always gives the same pixels, so that they may be cached.
        part: ``"train"`` or ``"val"`` once it is one part of a split, else None.
    """

    name: str
    classes: list[str]
    labels: np.ndarray
    in_memory: bool = False
    part: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, images={len(self)}, classes={len(self.classes)})"

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image ``i``, RGB, fully decoded.

        Raises:
            BadImage: it cannot be read.
        """

    def read(self, i: int) -> bytes | None:
        """The encoded file of image ``i`` (JPEG, PNG, …), or None where there is none: pixels in memory, a user's dataset.

        Raises:
            BadImage: it cannot be read.
        """
        return None

    @property
    def encoded(self) -> bool:
        """True if :meth:`read` gives files, so that another decoder than Pillow can be used."""
        return type(self).read is not ImageSource.read

    @abstractmethod
    def path(self, i: int) -> str:
        """Where image ``i`` comes from: a file, an archive member, a dataset item."""

    def key(self, i: int) -> str:
        """Name of image ``i`` that stays the same when the data set is moved; splits are made from it."""
        return self.path(i)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image ``i``.

        Raises:
            BadImage: it cannot be read.
        """
        return self.load(i).size

    def short_side(self) -> int:
        """Median of the shorter sides of some images, in pixels.

        Raises:
            ValueError: none of the images looked at can be read.
        """
        sides: list[int] = []
        bad: list[BadImage] = []
        spread = np.unique(np.linspace(0, len(self) - 1, 4 * _PROBES).astype(int))
        # Every fourth first: where nothing is damaged, the images looked at come from all classes, not from the first ones.
        with preserved_rng():
            for i in np.concatenate([spread[k::4] for k in range(4)]):
                try:
                    sides.append(min(self.size(int(i))))
                except BadImage as error:
                    bad.append(error)
                if len(sides) == _PROBES:
                    break
        if not sides:
            raise ValueError(f"{self.name}: none of the {len(bad)} images looked at can be read; the first: {bad[0]}")
        return int(np.median(sides))

    def fingerprint(self) -> str:
        """sha256 over classes, names and labels: changes when an image is added, removed, renamed or moved to another class."""
        digest = hashlib.sha256()
        for text in itertools.chain(self.classes, ("",), (self.key(i) for i in range(len(self)))):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        digest.update(self.content_digest())
        return digest.hexdigest()

    def content_digest(self) -> bytes:
        """More for :meth:`fingerprint`, where the content is known without reading files; else nothing."""
        return b""


class SubsetSource(ImageSource):
    """Some images of a source, in the given order.

    Args:
        source: where they come from.
        indices: int ``[M]`` positions in ``source``.
        part: see :class:`ImageSource`.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray, part: str | None = None) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.classes = list(source.classes)
        self.labels = np.asarray(source.labels)[self.indices]
        self.in_memory = source.in_memory
        self.part = part if part is not None else source.part

    def load(self, i: int) -> Image.Image:
        return self.source.load(int(self.indices[i]))

    def read(self, i: int) -> bytes | None:
        return self.source.read(int(self.indices[i]))

    @property
    def encoded(self) -> bool:
        return self.source.encoded

    def path(self, i: int) -> str:
        return self.source.path(int(self.indices[i]))

    def key(self, i: int) -> str:
        return self.source.key(int(self.indices[i]))

    def size(self, i: int) -> tuple[int, int]:
        return self.source.size(int(self.indices[i]))

    def content_digest(self) -> bytes:
        return self.source.content_digest()


class PackedStrings:
    """A read-only list of strings in two arrays.

    A Python list of a million paths is copied page by page into every forked worker as soon as it touches the reference
    counts; arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded) or b"\0", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self._ends))[i]  # negative numbers count from the end, as in a list
        start = int(self._ends[i - 1]) if i > 0 else 0
        return self._bytes[start : int(self._ends[i])].tobytes().decode("utf-8", "surrogateescape")
