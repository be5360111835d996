"""``xdfast export``, ``push`` and ``pull``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

__all__ = ["export", "pull", "push"]


@dataclasses.dataclass
class _ExportOptions:
    """A student or a robot's policy as torch.export, ONNX and AOTInductor files, each compared with PyTorch and timed beside it."""

    model: str
    """Folder of a run, student, policy, VLA or routed model; a timm name; NAME@/path/weights."""
    out: str
    """Folder for the files and export.json."""
    formats: tuple[str, ...] = ("pt2", "onnx")
    """Of pt2 (torch.export), onnx (needs xdfast[deploy]) and aoti (compiled for this kind of machine; a minute or more)."""
    pixels: Literal["unit", "uint8", "normalised"] = "unit"
    """What an image model takes: RGB in [0, 1], 0 to 255 (mean and std inside both), or normalised outside."""
    outputs: tuple[str, ...] = ()
    """Of an image model: features, logits; default: both, or what there is."""
    parts: bool = False
    """Of a diffusion policy: encode and one denoising step, instead of the whole decision."""
    skip: bool = True
    """Of a routed model: layers under conditions, one sample at a time; --no-skip: all layers with their gates, any batch."""
    image_size: int | None = None
    """Of an image model; default: its own."""
    device: str = "cpu"
    """Where eager runs, and what pt2 and aoti are made for."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes that are compared and timed."""
    tolerance: float = 1e-4
    """Largest difference to PyTorch, relative to max(1, largest output)."""
    latency_seconds: float = 5.0
    """For timing each graph; 0 leaves it out."""
    progress: bool = True
    """Tell what is being done."""


@dataclasses.dataclass
class _PushOptions:
    """A trained model with its card to the Hugging Face hub, or to a folder."""

    model: str
    """Folder of a run, or of a saved student, policy or VLA."""
    to: str
    """OWNER/NAME on the hub (made if missing), or local-dir:PATH."""
    license: str | None = None
    """Of the weights, as the hub spells it: apache-2.0, cc-by-nc-4.0, …"""
    exported: str | None = None
    """Folder of `xdfast export`, to be sent along."""
    private: bool = True
    """A repository made anew is yours alone; --no-private: everybody's."""
    revision: str | None = None
    """Branch, made if missing; default: main."""
    message: str | None = None
    """Of the commit."""


@dataclasses.dataclass
class _PullOptions:
    """A published model as a folder that the other verbs take."""

    source: str
    """OWNER/NAME on the hub, or local-dir:PATH."""
    out: str | None = None
    """Folder for the files; default: the hub's cache."""
    revision: str | None = None
    """Branch, tag or commit."""


def export(args: list[str]) -> None:
    """``xdfast export``: prints the table."""
    import tyro
    from rich.console import Console

    from xdfast.pipeline import export as run

    options = tyro.cli(_ExportOptions, args=args, prog="xdfast export")
    done = run(**vars(options))
    Console(width=None if sys.stdout.isatty() else 150).print(done.table)  # in a file lines need not fit a screen
    print(f"written to {done.path}")


def push(args: list[str]) -> None:
    """``xdfast push``."""
    import tyro

    from xdfast.pipeline import push as run

    done = run(**vars(tyro.cli(_PushOptions, args=args, prog="xdfast push")))
    print(f"{', '.join(done.files)}\nwritten to {done.where}")


def pull(args: list[str]) -> None:
    """``xdfast pull``."""
    import tyro

    from xdfast.pipeline import pull as run

    print(f"written to {run(**vars(tyro.cli(_PullOptions, args=args, prog='xdfast pull')))}")
