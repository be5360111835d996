"""One episode as one safetensors file with a checksum over everything it says."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xdfast.atomic import write_whole
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError

__all__ = ["EpisodeHeader", "read_episode", "read_header", "write_episode"]

_IMAGES, _INFO = "images.", "info."
_LARGEST_HEADER = 1 << 20  # ours take 1–3 KB; a damaged length would otherwise ask for gigabytes


@dataclass(frozen=True)
class EpisodeHeader:
    """What the first few kilobytes of an episode's file say.

    Attributes:
        index: the episode's number, which is also its name.
        seed: of the simulator's reset, or None.
        length: steps.
        crc: of index, seed and of each tensor's name, dtype, shape and bytes.
    """

    index: int
    seed: int | None
    length: int
    crc: int


def write_episode(path: Path, episode: Episode, index: int) -> EpisodeHeader:
    """Writes ``path``, all of it or nothing; an episode that :func:`episode_problems` found sound.

    Raises:
        DemoError: the disk is full or the folder cannot be written.
    """
    tensors = {_IMAGES + camera: frames for camera, frames in episode.images.items()}
    tensors |= {"state": episode.state, "actions": episode.actions}
    if episode.success is not None:
        tensors["success"] = episode.success
    tensors |= {_INFO + name: values for name, values in episode.info.items()}
    # save takes the buffer as it lies in memory: a flipped or sliced view must be copied first
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    header = EpisodeHeader(index, episode.seed, len(episode), _crc(index, episode.seed, tensors))
    metadata = {"index": str(index), "length": str(header.length), "crc32": f"{header.crc:08x}"}
    if header.seed is not None:
        metadata["seed"] = str(header.seed)
    try:
        # not by safetensors' save_file, whose files only their owner may read
        write_whole(path, lambda aside: aside.write_bytes(save(tensors, metadata)))
    except OSError as error:
        raise DemoError(
            f"cannot write {path}: {error}. Free some space or make the folder writable; episodes written before are unharmed"
        ) from error
    return header


def read_header(path: Path) -> EpisodeHeader:
    """The header alone; says nothing about the state of the rest.

    Raises:
        DemoError: not an episode of ours, or damaged.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = file.read(size) if size <= _LARGEST_HEADER else b""
            whole = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error}") from error
    return _parse(path, head, size, whole)


def read_episode(path: Path) -> tuple[EpisodeHeader, Episode]:
    """Reads a file and compares it with its checksum. Arrays may be read-only.

    Raises:
        DemoError: missing, cut short, or a byte is not what was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error}") from error
    size = int.from_bytes(data[:8], "little")
    header = _parse(path, data[8 : 8 + size] if size <= _LARGEST_HEADER else b"", size, len(data))
    try:
        tensors = load(data)
    # a damaged header can name a dtype that numpy lacks (KeyError), or a size beyond any memory
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise _damaged(path, str(error)) from error
    if _crc(header.index, header.seed, tensors) != header.crc:
        raise _damaged(path, "its content does not match its checksum")
    try:
        episode = Episode(
            images={n.removeprefix(_IMAGES): v for n, v in tensors.items() if n.startswith(_IMAGES)},
            state=tensors["state"],
            actions=tensors["actions"],
            success=tensors.get("success"),
            info={n.removeprefix(_INFO): v for n, v in tensors.items() if n.startswith(_INFO)},
            seed=header.seed,
        )
    except KeyError as error:
        raise _damaged(path, f"it has no tensor {error}") from error
    if len(episode) != header.length:
        raise _damaged(path, f"{len(episode)} steps, its header says {header.length}")
    return header, episode


def _parse(path: Path, head: bytes, size: int, whole: int) -> EpisodeHeader:
    try:
        entries = json.loads(head)
        metadata = entries.pop("__metadata__")
        end = max(entry["data_offsets"][1] for entry in entries.values())
        header = EpisodeHeader(
            index=int(metadata["index"]),
            seed=int(metadata["seed"]) if "seed" in metadata else None,
            length=int(metadata["length"]),
            crc=int(metadata["crc32"], 16),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if 8 + size + end != whole:
        raise _damaged(path, f"it has {whole:,} bytes, its header promises {8 + size + end:,}")
    return header


def _damaged(path: Path, why: str) -> DemoError:
    return DemoError(
        f"{path} is damaged or not an episode of xdfast ({why}); delete this file and collect or convert again: "
        "only what is missing is made again"
    )


def _crc(index: int, seed: int | None, tensors: dict[str, np.ndarray]) -> int:
    crc = zlib.crc32(f"{index} {seed}".encode())
    for name in sorted(tensors):
        values = tensors[name]
        crc = zlib.crc32(f"{name} {values.dtype} {list(values.shape)}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, crc)
    return crc
