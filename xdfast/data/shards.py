"""Shards, files of many images each: which files a pattern means, which part they are, which classes their labels make."""

from __future__ import annotations

import glob
import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from xdfast.data.folder import missing_path
from xdfast.data.layout import TRAIN_NAMES, VAL_NAMES

__all__ = ["choose_part", "find_shards", "is_pattern", "label_images", "some"]

log = logging.getLogger("xdfast")

_BRACE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MAX_SHARDS = 100_000


def is_pattern(text: str) -> bool:
    """True if ``text`` has braces or wildcards and is not itself the name of a file or folder."""
    return any(c in text for c in "{*?[") and not os.path.exists(text)


def find_shards(data: str | Path | Sequence[str | Path], is_shard: Callable[[str], bool]) -> list[str]:
    """The shard files that ``data`` means, sorted by base name.

    Args:
        data: a file, a folder, a pattern, or a list of those. ``{0000..0012}`` counts (as wide as it is written),
            ``{a,b}`` lists, ``*``, ``?`` and ``[]`` match. Every name that braces give must be there.
        is_shard: which base names of a folder are shards.

    Raises:
        FileNotFoundError: a file is not there, or a wildcard matches none.
        ValueError: a folder without shards, braces that mean nothing, or two shards of one name.
    """
    items = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    if not items:
        raise ValueError("the list of shards is empty; pass at least one file, folder or pattern")
    paths: list[str] = []
    for item in items:
        text = str(Path(item).expanduser())
        if os.path.isdir(text):
            inside = [n for n in os.listdir(text) if is_shard(n) and not n.startswith(".")]
            if not inside:
                raise ValueError(f"the folder {text} holds no shards; pass the folder that the shards lie in directly")
            paths += [os.path.join(text, name) for name in inside]
        else:
            paths += _matches(text) if is_pattern(text) else [text]
    paths = sorted(dict.fromkeys(paths), key=lambda path: (os.path.basename(path), path))
    missing = [path for path in paths if not os.path.isfile(path)]
    if len(missing) == len(paths) == 1:
        raise missing_path(missing[0])
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} shards do not exist: {some(missing)}")
    for a, b in itertools.pairwise(paths):
        if os.path.basename(a) == os.path.basename(b):  # their images would have the same keys
            raise ValueError(f"two shards have the same name: {a} and {b}; rename one of them")
    return paths


def _matches(pattern: str) -> list[str]:
    count = math.prod(
        int(last) - int(first) + 1 if first else choices.count(",") + 1
        for first, last, choices in _BRACE.findall(pattern)
    )
    if not 0 < count <= _MAX_SHARDS:
        raise ValueError(
            f"{pattern!r} means {count} files; a range counts up and there are at most {_MAX_SHARDS} shards"
        )
    found: list[str] = []
    for path in _expand(pattern):
        if "{" in path:
            raise ValueError(
                f"the braces in {pattern!r} mean nothing; write {{0000..0012}} to count or {{a,b}} to list"
            )
        if not is_pattern(path):
            found.append(path)
            continue
        matched = [p for p in glob.glob(path) if os.path.isfile(p)]
        if not matched:
            raise FileNotFoundError(f"no file matches {path!r}; check the folder and the wildcards")
        found += matched
    return found


def _expand(pattern: str) -> list[str]:
    match = _BRACE.search(pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        words = choices.split(",")
    else:
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for word in words for path in _expand(f"{before}{word}{after}")]


def choose_part(paths: Sequence[str], split: str, name: str) -> tuple[str | None, np.ndarray, np.ndarray]:
    """Which shards train, and which are the split that is asked for, by the words in their base names.

    Shards with a word of ``TRAIN_NAMES`` beside shards with one of ``VAL_NAMES`` are two parts; of several validation
    names the first in that list serves, the others are not used. Otherwise all shards are one set without parts.

    Returns:
        ``part`` (``split`` or None), and bool ``[S]`` masks: shards of the training part, shards of ``split``.

    Raises:
        ValueError: there are two parts, and a shard that belongs to neither.
    """
    words = [set(re.findall("[a-z]+", os.path.basename(path).lower())) for path in paths]
    named = [next((n for n in (*TRAIN_NAMES, *VAL_NAMES) if n in found), None) for found in words]
    train = np.array([n in TRAIN_NAMES for n in named], dtype=bool)
    val_name = next((n for n in VAL_NAMES if n in named), None)
    if not train.any() or val_name is None:
        everything = np.ones(len(paths), dtype=bool)
        return None, everything, everything
    stray = [path for path, n in zip(paths, named) if n is None]
    if stray:
        raise ValueError(
            f"{name} has train and {val_name} shards, but the names of {some(stray)} say neither; "
            "move them elsewhere or rename them"
        )
    unused = sorted({n for n in named if n is not None and n in VAL_NAMES and n != val_name})
    if unused:
        log.info("%s: the %s shards serve for validation, %s are not used", name, val_name, some(unused))
    val = np.array([n == val_name for n in named], dtype=bool)
    return split, train, train if split == "train" else val


def label_images(
    codes: np.ndarray, texts: Sequence[str], train: np.ndarray, chosen: np.ndarray, name: str
) -> tuple[list[str], np.ndarray]:
    """Class names and labels from the label text of each image.

    Args:
        codes: int ``[N]``, position in ``texts``; ``train`` and ``chosen`` images have one.
        texts: distinct label texts. If all that are used are integers the classes are in their order, else sorted.
        train: bool ``[N]``, the images whose labels are the classes.
        chosen: bool ``[N]``, the images to label.
        name: of the data, for messages.

    Returns:
        classes, and int64 labels of the chosen images.

    Raises:
        ValueError: a chosen image is of a class that no training image has, or none is chosen.
    """
    if not train.any():
        raise ValueError(f"{name}: the training shards hold no labelled image")
    if not chosen.any():
        raise ValueError(
            f"{name}: the validation shards hold no labelled image; add labels, or move those shards elsewhere to have a part "
            "of the training images split off"
        )
    used = {texts[code]: int(code) for code in np.unique(codes[train])}
    numeric = all(re.fullmatch(r"-?\d+", text) for text in used)
    classes = sorted(used, key=lambda text: (int(text), text)) if numeric else sorted(used)
    position = np.full(len(texts), -1, dtype=np.int64)
    for label, text in enumerate(classes):
        position[used[text]] = label
    labels = position[codes[chosen]]
    if (labels < 0).any():
        unknown = sorted({texts[code] for code in np.unique(codes[chosen][labels < 0])})
        raise ValueError(
            f"{name}: the validation shards have labels that the training shards lack: {some(unknown)}; "
            "both parts must use the same labels"
        )
    return classes, labels


def some(names: Iterable[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    shown = ", ".join(map(repr, names[:count]))
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
