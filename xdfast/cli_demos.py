"""``xdfast demos tasks|info|check|convert|show|collect``: demonstrations on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from xdfast.errors import nearest

if TYPE_CHECKING:
    from xdfast.robot.demos.check import DemoReport, Statistics
    from xdfast.robot.demos.open import Demonstrations

__all__ = ["main"]

_SHOWN = 20
_USAGE = """usage: xdfast demos COMMAND [options]

  tasks [SUITE]                          simulated tasks: actions, proprioception, cameras, expert, instruction
  info PATH                              what is in demonstrations, of whatever format
  check PATH                             read every episode: missing frames, NaN, black images, duplicates; exit 1 if there are any
  convert SRC DST [--image-size 96]      write them in xdfast's own format; the same command continues
  show PATH [--out sheet.png]            a picture: a row for each episode, moments from left to right
  collect TASK DIR [--episodes 10]       let a simulated task's scripted expert solve it

PATH: a folder of collect or convert, a LeRobotDataset v3, a diffusion_policy .zarr or .zarr.zip, a robomimic .hdf5;
docs/demonstrations.md describes them. `xdfast demos COMMAND --help` lists the options."""


@dataclass(kw_only=True)
class _Source:
    path: str
    """The demonstrations."""
    format: Literal["auto", "xdfast", "lerobot", "diffusion_policy", "robomimic"] = "auto"
    """Which format they have; auto looks."""
    limit: int | None = None
    """Only the first so many episodes."""
    cameras: tuple[str, ...] | None = None
    """Which cameras, in which order; default all."""
    state_keys: tuple[str, ...] | None = None
    """Which arrays are the proprioception, in order; "state[:2]" takes columns of one."""
    action_key: str | None = None
    """Which array is the action."""
    mask: str | None = None
    """robomimic's filter key, such as train."""


@dataclass(kw_only=True)
class _Info(_Source):
    """What is in demonstrations. Reads descriptions only; `check` reads everything."""

    fingerprint: bool = False
    """Also the digest of the content; reads all of it, unless the format is xdfast's own."""


@dataclass(kw_only=True)
class _Check(_Source):
    """Reads every episode. Exit status 1 if there is a reason not to train on them."""

    out: str = ""
    """Also write problems and statistics to this JSON file."""
    progress: bool = True
    """Show how far it is."""


@dataclass(kw_only=True)
class _Convert(_Source):
    """Writes demonstrations of any format in xdfast's own. An interrupted conversion is continued by the same command."""

    out: str
    """The new folder."""
    image_size: tuple[int, ...] = ()
    """Resize all cameras to this side, or to height and width."""
    progress: bool = True
    """Show how far it is."""


@dataclass(kw_only=True)
class _Show(_Source):
    """Writes a picture: a row for each episode, moments from left to right."""

    out: str = "demos.png"
    """The PNG."""
    rows: int = 10
    """Episodes at most."""
    columns: int = 8
    """Moments of each."""
    height: int = 96
    """Pixels of a picture."""


@dataclass(kw_only=True)
class _Collect:
    """Lets the scripted expert of a simulated task solve it, in parallel. The same command continues."""

    task: str
    """Such as metaworld/drawer-open-v3."""
    out: str
    """The folder of the demonstrations."""
    episodes: int = 10
    """To have in the folder at the end."""
    image_size: int = 96
    """Height and width of the frames in pixels."""
    cameras: tuple[str, ...] | None = None
    """Default: the task's own camera."""
    seed: int = 0
    """Of the first episode."""
    workers: int | Literal["auto"] = "auto"
    """Processes; auto: one for each core."""
    tail: int = 20
    """Steps recorded after the first success."""
    noise: float = 0.0
    """Standard deviation added to the executed actions, which span [-1, 1]."""
    progress: bool = True
    """Show how far it is."""


def main(args: Sequence[str]) -> int:
    """Runs ``xdfast demos …``; returns the exit status: 0, 1 if ``check`` found problems, 2 for a wrong call.

    Raises:
        DemoError, ImportError, ValueError: as the function behind the command.
    """
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] not in _COMMANDS:
        print(f"xdfast demos: unknown command {args[0]!r}.{nearest(args[0], _COMMANDS)}\n\n{_USAGE}", file=sys.stderr)
        return 2
    return _COMMANDS[args[0]](list(args[1:]))


_Options = TypeVar("_Options")


def _parse(options: type[_Options], args: list[str], command: str) -> _Options:
    import tyro

    return tyro.cli(options, args=args, prog=f"xdfast demos {command}", config=(tyro.conf.PositionalRequiredArgs,))


def _open(options: _Source) -> Demonstrations:
    from xdfast.robot.demos.open import open_demos

    return open_demos(
        options.path,
        format=options.format,
        limit=options.limit,
        cameras=options.cameras,
        state_keys=options.state_keys,
        action_key=options.action_key,
        mask=options.mask,
    )


def _tasks(args: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from xdfast.robot.sim.names import SUITES, suite, task_names, task_spec

    names = suite(args[0]) if args else task_names()
    table = Table("task", "action", "state", "steps", "expert", "what to do", title=args[0] if args else None)
    for spec in map(task_spec, names):
        expert = "yes" if spec.has_expert else "no"
        table.add_row(
            spec.name, str(spec.action_dim), str(spec.state_dim), str(spec.max_steps), expert, spec.instruction
        )
    console = Console()
    console.print(table)
    console.print(f"suites: {', '.join(SUITES)}", highlight=False, soft_wrap=True)
    return 0


def _info(args: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    options = _parse(_Info, args, "info")
    demos = _open(options)
    # Text: "state[:2]" must not be taken for markup
    table = Table(show_header=False, title=Text(str(demos.path)), title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in _facts(demos):
        table.add_row(Text(label), Text(value))
    if options.fingerprint:
        table.add_row("fingerprint", demos.fingerprint())
    Console().print(table)
    return 0


def _facts(demos: Demonstrations) -> Iterator[tuple[str, str]]:
    from xdfast.robot.demos.format import failed_seeds

    yield "format", demos.format
    yield "task", demos.task or "not told"
    lengths = sorted(demos.lengths)
    yield "episodes", f"{len(demos)} of {lengths[0]} to {lengths[-1]} steps, {sum(lengths):,} steps in all"
    for camera, (height, width) in demos.image_sizes.items():
        yield f"camera {camera}", f"{height} × {width} (height × width)"
    yield "frequency", f"{demos.fps:g} Hz, {sum(lengths) / demos.fps:.0f} s in all" if demos.fps else "not told"
    yield "action", f"{demos.action_dim} numbers"
    yield "proprioception", f"{demos.state_dim} numbers"
    if demos.format == "xdfast" and (failed := failed_seeds(demos.path)):
        yield (
            "expert failed",
            f"{len(failed)} seeds: {', '.join(map(str, failed[:10]))}{', …' if len(failed) > 10 else ''}",
        )
    for name, value in demos.facts.items():
        text = json.dumps(value, ensure_ascii=False)
        yield name, text if len(text) <= 300 else text[:300] + " …"


def _check(args: list[str]) -> int:
    from pathlib import Path

    from rich.console import Console

    from xdfast.robot.demos.check import check_demos

    options = _parse(_Check, args, "check")
    demos = _open(options)
    with _progress("check", options.progress, sum(demos.lengths)) as update:
        report = check_demos(demos, progress=update)
    console = Console()
    console.print(_summary(demos, report))
    for title, statistics in (("actions", report.actions), ("state", report.state)):
        if len(statistics.low):
            console.print(_statistics(title, statistics))
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for problem in report.problems[:_SHOWN]:
        console.print(f"{problem.where}: {problem.what}", markup=False, highlight=False, soft_wrap=True)
    if len(report.problems) > _SHOWN:
        console.print(
            f"… and {len(report.problems) - _SHOWN} more" + ("" if options.out else "; --out FILE.json lists them all")
        )
    if options.out:
        out = Path(options.out).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_as_json(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)
    return 1 if report.problems else 0


def _summary(demos: Demonstrations, report: DemoReport) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=Text(str(demos.path)), title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_row("episodes", str(report.episodes))
    table.add_row("sound", f"{report.read}, {report.steps:,} steps")
    if report.successes is not None:
        table.add_row("with success", str(report.successes))
    for camera, brightness in report.brightness.items():
        table.add_row(Text(f"brightness of {camera}"), f"{brightness:.0f} of 255")
    table.add_row("problems", str(len(report.problems)))
    return table


def _statistics(title: str, statistics: Statistics) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("dimension", "min", "mean", "max", "std"):
        table.add_column(heading, justify="right")
    for d, row in enumerate(zip(statistics.low, statistics.mean, statistics.high, statistics.std)):
        table.add_row(str(d), *(f"{value:.4g}" for value in row))
    return table


def _as_json(report: DemoReport) -> dict[str, Any]:
    def numbers(statistics: Statistics) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in vars(statistics).items()}

    return {
        **vars(report),
        "problems": [vars(problem) for problem in report.problems],
        "actions": numbers(report.actions),
        "state": numbers(report.state),
    }


def _convert(args: list[str]) -> int:
    from xdfast.robot.demos.convert import convert_demos
    from xdfast.robot.demos.errors import DemoError

    options = _parse(_Convert, args, "convert")
    if len(options.image_size) > 2:
        raise DemoError(f"--image-size takes one side, or height and width, not {len(options.image_size)} numbers")
    demos = _open(options)
    size: Any = options.image_size[0] if len(options.image_size) == 1 else options.image_size or None
    with _progress("convert", options.progress, sum(demos.lengths)) as update:
        writer = convert_demos(demos, options.out, image_size=size, progress=update)
    print(f"{len(writer.done)} episodes in {writer.folder}")
    return 0


def _show(args: list[str]) -> int:
    from xdfast.robot.demos.sheet import contact_sheet

    options = _parse(_Show, args, "show")
    out = contact_sheet(_open(options), options.out, rows=options.rows, columns=options.columns, height=options.height)
    print(f"written to {out}")
    return 0


def _collect(args: list[str]) -> int:
    from xdfast.robot.demos.collect import collect

    collected = collect(**vars(_parse(_Collect, args, "collect")))
    failed = f", the expert failed on {len(collected.failed)} seeds" if collected.failed else ""
    print(f"{collected.episodes} episodes in {collected.folder}{failed}")
    return 0


@contextmanager
def _progress(title: str, enabled: bool, steps: int) -> Iterator[Callable[[int, int], None]]:
    """A progress line over episodes that also tells steps a second."""
    import time

    from xdfast.progress import ProgressLine

    line: ProgressLine | None = None
    began = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal line
        line = line or ProgressLine(title, total, enabled=enabled)
        line.update(done, f"{steps * done / total / max(time.monotonic() - began, 1e-9):.0f} steps/s")

    try:
        yield update
    finally:
        if line is not None:
            line.close()


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "tasks": _tasks,
    "info": _info,
    "check": _check,
    "convert": _convert,
    "show": _show,
    "collect": _collect,
}
