"""``xdfast cache info|verify|build|remove``: the teacher caches on the command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["main"]

_USAGE = """usage: xdfast cache COMMAND [options]

  info [FOLDER]             what is in a cache; without FOLDER all those of cache="auto"
  verify FOLDER [--repair]  read every row and check it; --repair forgets damaged rows, the next run computes them
  build [options]           fill the cache that `xdfast distill` with the same options would use (--recipe works, too)
  remove FOLDER             delete a cache"""


@dataclass
class _Info:
    """What is in a teacher cache."""

    folder: str = ""
    """A cache, or a folder of caches; default: those of cache="auto"."""


@dataclass
class _Verify:
    """Reads every row of a teacher cache and checks it against its CRC."""

    folder: str
    """The cache."""
    repair: bool = False
    """Forget damaged rows, so that the next run computes them again."""


@dataclass
class _Remove:
    """Deletes a teacher cache."""

    folder: str
    """The cache."""


def main(args: list[str]) -> int:
    """Runs one command; returns the exit status (1: ``verify`` found damage)."""
    commands = {"info": _info, "verify": _verify, "build": _build, "remove": _remove}
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] not in commands:
        from xdfast.errors import nearest

        print(f"xdfast cache: unknown command {args[0]!r}.{nearest(args[0], commands)}\n\n{_USAGE}", file=sys.stderr)
        return 2
    return commands[args[0]](args[1:])


def _info(args: list[str]) -> int:
    import tyro
    from rich.console import Console
    from rich.table import Table

    from xdfast.data.store import describe
    from xdfast.pipeline.cache import find_stores
    from xdfast.pipeline.teacher import cache_root

    folder = tyro.cli(_Info, args=args, prog="xdfast cache info", config=(tyro.conf.Positional,)).folder
    found = find_stores(folder or None)
    if not found:
        print(f"no teacher cache under {cache_root()}")
    console = Console()
    for store in found:
        table = Table(show_header=False, title=store.folder.name, title_justify="left")
        for label, value in describe(store):
            table.add_row(label, value)
        console.print(table)
    return 0


def _verify(args: list[str]) -> int:
    import tyro

    from xdfast.pipeline.cache import verify_store

    options = tyro.cli(_Verify, args=args, prog="xdfast cache verify", config=(tyro.conf.PositionalRequiredArgs,))
    check = verify_store(options.folder, repair=options.repair)
    print(check)
    if check.damaged:
        print(
            "forgotten: the next run computes them again" if options.repair else "--repair makes the next run redo them"
        )
    return int(check.damaged > 0 and not options.repair)


def _build(args: list[str]) -> int:
    from xdfast import distributed
    from xdfast.cli import parse_config
    from xdfast.data.store import describe
    from xdfast.pipeline import DistillConfig
    from xdfast.pipeline.cache import build_cache

    args = args if any(a == "--out" or a.startswith("--out=") for a in args) else [*args, "--out="]
    with _ending_on_sigterm(), build_cache(parse_config(DistillConfig, args, "distill", prog="cache build")) as store:
        if distributed.is_main():
            for label, value in describe(store)[:6]:
                print(f"{label:16s} {value}")
    return 0


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends with status 0: on its way out, ``fill()`` brings what was computed to the disk."""

    def end(number: int, frame: Any) -> None:
        print("stopped; what was computed is kept, the same command continues", file=sys.stderr)
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove(args: list[str]) -> int:
    import tyro

    from xdfast.pipeline.cache import remove_store

    options = tyro.cli(_Remove, args=args, prog="xdfast cache remove", config=(tyro.conf.PositionalRequiredArgs,))
    print(f"{remove_store(options.folder) / 1e6:,.1f} MB freed")
    return 0
