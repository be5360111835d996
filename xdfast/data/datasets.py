"""Data sets that are Python objects: torch's, torchvision's, and the digits that ship with scikit-learn."""

from __future__ import annotations

import fcntl
import inspect
import logging
import os
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from xdfast.data._rng import preserved_rng
from xdfast.data.decode import BadImage, to_rgb
from xdfast.data.sources import ImageSource
from xdfast.errors import nearest

__all__ = ["DatasetSource", "DigitsSource", "open_torchvision"]

log = logging.getLogger("xdfast")


# What Pillow raises for damaged files; anything else is a bug worth seeing.
_DAMAGED = (OSError, SyntaxError, Image.DecompressionBombError)


class DigitsSource(ImageSource):
    """1797 scans of handwritten digits, 8×8 pixels, 17 gray levels; they ship with scikit-learn, nothing is downloaded."""

    in_memory = True

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
        self.name = "sklearn:digits"
        self.classes = [str(c) for c in digits.target_names]
        self.labels = digits.target.astype(np.int64)
        self._rgb = np.repeat(gray[..., None], 3, axis=3)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._rgb[i])

    def path(self, i: int) -> str:
        return f"sklearn:digits[{i}]"

    def content_digest(self) -> bytes:
        return self._rgb.tobytes()


class DatasetSource(ImageSource):
    """A map-style torch dataset of (image, label).

    Args:
        dataset: items are (image, label, …). An image is a PIL image, an array ``[H, W, 3]`` or ``[H, W]`` of uint8, or a
            tensor ``[3, H, W]``, ``[1, H, W]`` or ``[H, W]``: uint8, or float in [0, 1]. A label is an integer ≥ 0.
        name: for messages; default: the class name.
        part: ``"train"`` or ``"val"`` if the dataset is one part of a split.

    Labels are taken from ``dataset.targets`` or ``dataset.labels`` where there are any; otherwise every item is read once.
    A random transform inside the dataset is seeded per image and epoch like our own.

    Raises:
        TypeError: an iterable dataset, or items of another form.
        ValueError: it is empty, or labels are negative.
    """

    def __init__(self, dataset: Any, name: str | None = None, part: str | None = None) -> None:
        if isinstance(dataset, type):
            raise TypeError(f"expected a dataset, got the class {dataset.__name__}; make one: {dataset.__name__}(…)")
        stream = isinstance(dataset, torch.utils.data.IterableDataset)  # which inherits a [i] that only raises
        if stream or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"expected a dataset with len() and [i], got {type(dataset).__name__}; a stream cannot be shuffled or resumed: "
                "write the images to class folders, or subclass xdfast.data.ImageSource"
            )
        if len(dataset) == 0:
            raise ValueError(f"the dataset {name or type(dataset).__name__} is empty")
        self.dataset = dataset
        self.name = name or type(dataset).__name__
        self.part = part
        labels = _known_labels(dataset)
        if labels is None:
            log.info(
                "%s has no targets or labels attribute: reading its %d items once for the labels",
                self.name,
                len(dataset),
            )
            with preserved_rng():
                labels = np.array([self._read_label(i) for i in range(len(dataset))], dtype=np.int64)
        if labels.min() < 0:
            i = int(labels.argmin())
            raise ValueError(f"{self.path(i)}: labels must be ≥ 0, got {labels[i]}")
        self.labels = labels
        self.classes = _class_names(dataset, int(labels.max()) + 1)
        self.in_memory = _holds_pixels(dataset)

    def load(self, i: int) -> Image.Image:
        path = self.path(i)
        try:
            image = self._item(i)[0]
            if isinstance(image, Image.Image):
                image.load()  # a dataset may return a file that is opened, not read
                return to_rgb(image, path)
        except _DAMAGED as error:
            raise BadImage(path, str(error) or type(error).__name__) from error
        return _to_image(image, path)

    def path(self, i: int) -> str:
        file = _file(self.dataset, i)
        return f"{self.name}[{i}]" if file is None else file[0]

    def key(self, i: int) -> str:
        file = _file(self.dataset, i)
        return f"[{i}]" if file is None else file[1]

    def _read_label(self, i: int) -> int:
        try:
            return _label(self._item(i)[1], self.path(i))
        except _DAMAGED as error:
            raise ValueError(
                f"{self.path(i)}: cannot be read, so its label is not known ({error}); repair or remove it, or give the "
                "dataset an attribute targets with all labels"
            ) from error

    def _item(self, i: int) -> Sequence[Any]:
        item = self.dataset[i]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(f"{self.name}[{i}] must be (image, label), got {type(item).__name__}")
        return item


def open_torchvision(spec: str, split: str) -> DatasetSource:
    """``NAME``, ``NAME:ROOT``, each with ``?download`` at the end, as in ``CIFAR10:/data?download``.

    ROOT defaults to ``$XDFAST_DATA``, else ``~/.cache/xdfast``. Data sets with a ``train=`` or ``split=`` argument have
    their own parts; the others are split by the caller.

    Raises:
        ValueError: no such data set (the nearest names are offered), or one that needs more arguments.
        FileNotFoundError: its files are not in ROOT.
    """
    import torchvision

    spec, _, option = spec.partition("?")
    if option not in ("", "download"):
        raise ValueError(f"torchvision:{spec}?{option}: the only option is ?download")
    name, _, root = spec.partition(":")
    known = {n: c for n in torchvision.datasets.__all__ if isinstance(c := getattr(torchvision.datasets, n), type)}
    cls = known.get(name) or {n.lower(): c for n, c in known.items()}.get(name.lower())
    if cls is None:
        raise ValueError(
            f"torchvision has no data set {name!r}.{nearest(name, known)} It has: {', '.join(sorted(known))}"
        )
    name = cls.__name__
    parameters = inspect.signature(cls).parameters
    needed = [
        n
        for n, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and n not in ("root", "train", "split")
    ]
    if needed or "root" not in parameters or name in ("EMNIST", "ImageFolder", "DatasetFolder", "VisionDataset"):
        raise ValueError(
            f"torchvision:{name} needs more than a folder and a split ({', '.join(needed) or 'see its documentation'}); "
            f"build torchvision.datasets.{name}(…) yourself and pass the object as data="
        )
    folder = Path(root or os.environ.get("XDFAST_DATA") or "~/.cache/xdfast").expanduser()
    options: dict[str, Any] = {"download": True} if option and "download" in parameters else {}
    choices: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        choices = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": s} for s in (("train", "trainval") if split == "train" else ("val", "valid", "test"))]
    dataset = _build(cls, folder, options, choices, f"torchvision:{name}")
    return DatasetSource(dataset, name=f"torchvision:{name}", part=split if choices != [{}] else None)


def _build(cls: type, folder: Path, options: dict[str, Any], choices: list[dict[str, Any]], shown: str) -> Any:
    for number, choice in enumerate(choices):
        try:
            if not options:
                return cls(root=str(folder), **choice)
            with _one_at_a_time(folder):
                return cls(root=str(folder), **choice, **options)
        except (RuntimeError, FileNotFoundError, urllib.error.URLError) as error:
            download = ", or add ?download" if "download" in inspect.signature(cls).parameters else ""
            raise FileNotFoundError(
                f"{shown} is not in {folder} ({error}); put its files there, name another folder ({shown}:FOLDER){download}"
            ) from error
        except ValueError:
            if number == len(choices) - 1:
                raise
            log.debug("%s has no split %r", shown, choice)
    raise ValueError(f"{shown} offers no split to use")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Ranks of one machine download once: the others wait, then find the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _file(dataset: Any, i: int) -> tuple[str, str] | None:
    """(path, path relative to the dataset's root) of an item of torchvision's ImageFolder and its kin, or None."""
    if isinstance(dataset, torch.utils.data.Subset):
        return _file(dataset.dataset, int(dataset.indices[i]))
    files = getattr(dataset, "samples", None)
    if not isinstance(files, list) or len(files) != len(dataset) or not isinstance(files[i], tuple):
        return None
    path = str(files[i][0])
    root = str(getattr(dataset, "root", "")).rstrip("/") + "/"
    return path, path.removeprefix(root)


def _known_labels(dataset: Any) -> np.ndarray | None:
    """int64 ``[N]`` without reading images, or None."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, torch.utils.data.TensorDataset):
        values: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    elif getattr(dataset, "target_transform", None) is not None:
        return None  # the stored labels are not the ones that come out
    else:
        values = next(
            (v for n in ("targets", "labels", "_labels") if (v := getattr(dataset, n, None)) is not None), None
        )
    if values is None:
        return None
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        return None
    if array.shape != (len(dataset),) or array.dtype.kind not in "iu":
        return None
    return array.astype(np.int64)


def _label(value: Any, path: str) -> int:
    kind = getattr(value, "dtype", None)  # of numpy or torch
    real = isinstance(value, (bool, float)) or (kind is not None and not _is_integer(kind))
    if real or not hasattr(value, "__int__") or getattr(value, "shape", ()) not in ((), (1,)):
        raise TypeError(f"{path}: a label must be one integer, got {type(value).__name__} {value!r}")
    return int(value)


def _is_integer(kind: Any) -> bool:
    if isinstance(kind, torch.dtype):
        return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    return np.dtype(kind).kind in "iu"


def _class_names(dataset: Any, count: int) -> list[str]:
    names = getattr(dataset, "classes", None)
    if isinstance(dataset, torch.utils.data.Subset) and names is None:
        return _class_names(dataset.dataset, count)
    if isinstance(names, (list, tuple)) and len(names) >= count:
        return [n if isinstance(n, str) else ", ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in names]
    return [str(i) for i in range(count)]


def _holds_pixels(dataset: Any) -> bool:
    """True if items are in memory and always the same, so that they may be cached."""
    # Only of classes whose code is known: a subclass may well augment in __getitem__, which a cache would freeze.
    if type(dataset) is torch.utils.data.Subset:
        return _holds_pixels(dataset.dataset)
    if type(dataset) is torch.utils.data.TensorDataset:
        return True
    if not type(dataset).__module__.startswith("torchvision."):
        return False
    stored = isinstance(getattr(dataset, "data", None), (np.ndarray, torch.Tensor))
    return stored and getattr(dataset, "transform", None) is None and getattr(dataset, "transforms", None) is None


def _to_image(image: Any, path: str) -> Image.Image:
    if isinstance(image, torch.Tensor):
        array = _tensor_to_array(image, path)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,)):
        array = image
    else:
        got = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
        raise TypeError(f"{path}: expected a PIL image, uint8 array [H, W, 3] or tensor [3, H, W], got {got}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _tensor_to_array(image: torch.Tensor, path: str) -> np.ndarray:
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise TypeError(f"{path}: expected a tensor [3, H, W], [1, H, W] or [H, W], got shape {tuple(image.shape)}")
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{path}: a float image must lie in [0, 1], got [{low:.3g}, {high:.3g}]; "
                "leave normalisation out, each model does its own"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise TypeError(f"{path}: expected a uint8 tensor or a float one in [0, 1], got {image.dtype}")
    return image.expand(3, -1, -1).permute(1, 2, 0).detach().cpu().numpy()
