"""``xdfast VERB``: the three verbs, the report, the demo, the recipes and the doctor on the command line.

One definition: the fields of the config dataclasses are the options, ``--recipe NAME`` (or a YAML file) sets defaults.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

__all__ = ["main"]

_VERBS = {
    "distill": "a student learns from a frozen teacher; with --target-flops, of a VLA, one that skips layers",
    "finetune": "supervised training of one model; with --task (or --tasks), of a robot's policy from demonstrations",
    "evaluate": "top-1/5, k-NN, linear probe, CKA of a run or model; success rate of a robot's policy",
    "suite": "several encoders on many robot tasks, run side by side and continued, with one report",
    "compare": "methods × pairs of teacher and student × seeds, with tables, intervals and costs",
    "report": "one HTML page and a JSON from finished runs",
    "export": "a student or policy as torch.export, ONNX and AOTInductor files, compared with PyTorch and timed",
    "push": "a trained model with its card to the Hugging Face hub, or to a folder",
    "pull": "a published model as a folder that the other verbs take",
    "cache": "teacher caches: info, verify, build, remove",
    "data": "check: look at every image, name those that cannot be read",
    "demos": "robot demonstrations: tasks, info, check, convert, show, collect",
    "demo": "scratch, KD and RSD side by side on real images, with a report",
    "demo-robot": "distilled and from-scratch encoders in a diffusion policy, in closed loop, with a report",
    "bench": "time the losses (rsd) or routed layers (routed) against their rivals on this machine",
    "recipes": "list the settings that ship with xdfast; NAME: one, whole; --json",
    "doctor": "versions, devices, backends that would run and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. Errors a user can mend are one line, without a traceback."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does the interpreter's last flush complain
        return 1


def _run(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)  # it announces every file it loads
    verbose = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        from xdfast import __version__

        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    if verb not in _VERBS:
        from xdfast.errors import nearest

        print(f"xdfast: unknown verb {verb!r}.{nearest(verb, _VERBS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[verb](rest) or 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if verbose or isinstance(error, BrokenPipeError):
            raise
        print(f"xdfast {verb}: {error}\n(--traceback shows where)", file=sys.stderr)
        return 1


def _usage() -> str:
    lines = "\n".join(f"  {name:10s} {text}" for name, text in _VERBS.items())
    hint = "`xdfast VERB --help` lists the options; --traceback shows where an error arose."
    return f"usage: xdfast VERB [options]\n\n{lines}\n\n{hint}"


def parse_config(cls: Any, args: list[str], verb: str, prog: str = "") -> Any:
    """A config from command-line options over the defaults of ``--recipe``."""
    import tyro

    from xdfast.recipes import load_recipe

    values: dict[str, Any] = {}
    rest: list[str] = []
    it = iter(_repeated(args, {"--teacher": "--more-teachers", "--teacher-size": "--more-teacher-sizes"}))
    for arg in it:
        name, _, attached = arg.partition("=")
        if name == "--recipe":
            chosen = attached or next(it, "")
            recipe = load_recipe(chosen)
            if recipe.verb not in (None, verb):
                raise ValueError(f"recipe {chosen!r} is for `xdfast {recipe.verb}`, not `xdfast {verb}`")
            values = recipe.settings
        else:
            rest.append(arg)
    values = cls.normalised(values)
    if any(arg == "--teacher" or arg.startswith("--teacher=") for arg in rest):
        values.pop("more_teachers", None)  # other teachers than the recipe's, all of them
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    default = cls.from_dict({**dict.fromkeys(required, tyro.MISSING), **values}, source="recipe")
    description = f"{_VERBS[verb]}. --recipe NAME|FILE.yaml sets defaults (`xdfast recipes` lists them)."
    return tyro.cli(cls, args=rest, default=default, prog=f"xdfast {prog or verb}", description=description)


def _repeated(args: list[str], more: dict[str, str]) -> list[str]:
    """Arguments in which the second and further values of a repeated option stand behind another one, its plural."""
    kept: list[str] = []
    others: dict[str, list[str]] = {}
    seen: set[str] = set()
    it = iter(args)
    for arg in it:
        name, equals, attached = arg.partition("=")
        if name in more and name in seen:
            others.setdefault(more[name], []).append(attached if equals else next(it, ""))
            continue
        seen.add(name)
        kept.append(arg)
    return kept + [part for plural, values in others.items() for part in (plural, *values)]


def _distill(args: list[str]) -> None:
    from xdfast.pipeline import ActDistillConfig, DistillConfig, distill

    of_vla = _names(args, "target-flops", "target_flops") or _names_a_run(args, "--teacher", "vla")
    _finish(distill(parse_config(ActDistillConfig if of_vla else DistillConfig, args, "distill")))


def _finetune(args: list[str]) -> None:
    from xdfast.pipeline import FinetuneConfig, PolicyConfig, VLAConfig, finetune

    cls: Any = VLAConfig if _names(args, "tasks") else PolicyConfig if _names(args, "task", "demos") else FinetuneConfig
    _finish(finetune(parse_config(cls, args, "finetune")))


def _evaluate(args: list[str]) -> None:
    from xdfast.pipeline import EvaluateConfig, EvaluatePolicyConfig, evaluate

    cls = EvaluatePolicyConfig if _names_a_run(args, "--model", "policy", "vla") else EvaluateConfig
    _finish(evaluate(parse_config(cls, args, "evaluate")))


def _names(args: list[str], option: str, *others: str) -> bool:
    """Whether ``--option`` is among the arguments, or the option (or one of ``others``) in the recipe they name."""
    if any(arg == f"--{option}" or arg.startswith(f"--{option}=") for arg in args):
        return True
    from xdfast.recipes import load_recipe

    recipe = _option(args, "--recipe")
    return recipe is not None and {option, *others} & set(load_recipe(recipe).settings) != set()


def _names_a_run(args: list[str], option: str, *kinds: str) -> bool:
    """Whether an option's value is the folder of a run of one of these kinds."""
    from pathlib import Path

    from xdfast.pipeline.config import load_yaml

    file = Path(_option(args, option) or ".") / "config.yaml"
    return file.is_file() and load_yaml(file).get("kind") in kinds


def _option(args: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``; None if it is not there."""
    for arg, following in zip(args, [*args[1:], ""]):
        if arg == name:
            return following
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
    return None


def _suite(args: list[str]) -> int:
    from xdfast.pipeline.suite import SuiteConfig, run_suite

    result = run_suite(parse_config(SuiteConfig, args, "suite"))
    _finish(result)
    return 1 if result.failed else 0


def _compare(args: list[str]) -> int:
    from xdfast.pipeline.compare import CompareConfig, compare

    result = compare(parse_config(CompareConfig, args, "compare"))
    _finish(result)
    for pair, page in result.reports.items():
        print(f"{pair}: {page.path}")
    return 1 if result.failed else 0


def _finish(result: Any) -> None:
    from xdfast import distributed

    if distributed.is_main():
        for name, value in result.metrics.items():
            print(f"{name:14s} {value:.4g}")
        if result.path is not None:
            print(f"written to {result.path}")


@dataclasses.dataclass
class _ReportOptions:
    """One HTML page and a JSON from finished runs."""

    runs: tuple[str, ...]
    """Folders of finished runs."""
    out: str = "report.html"
    """The page; the JSON stands beside it."""
    title: str | None = None
    """Of the page; default: by what is in it."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes at which latency and images/s are measured; default: 1 and 32, of policies of several tasks 1 and 16."""
    device: str = "cpu"
    """Where they are measured."""
    measure_speed: bool = True
    """Measure at all."""
    analysis: tuple[Literal["cka", "tsne", "saliency", "robustness", "all"], ...] = ()
    """Of image models, beyond accuracy: CKA maps to the teacher, the teacher's t-SNE, saliency, accuracy under corruptions."""
    analysis_images: int | None = None
    """Validation images that CKA and robustness take; default: 1,024 and 256, above 64 px 256 and 64."""


def _report(args: list[str]) -> None:
    import tyro

    from xdfast.pipeline import report

    options = tyro.cli(_ReportOptions, args=args, prog="xdfast report", config=(tyro.conf.PositionalRequiredArgs,))
    result = report(**vars(options))
    print(f"written to {result.path} and {result.json_path}")


def _export(args: list[str]) -> None:
    from xdfast import cli_export

    cli_export.export(args)


def _push(args: list[str]) -> None:
    from xdfast import cli_export

    cli_export.push(args)


def _pull(args: list[str]) -> None:
    from xdfast import cli_export

    cli_export.pull(args)


def _cache(args: list[str]) -> int:
    from xdfast import cli_cache

    return cli_cache.main(args)


def _data(args: list[str]) -> int:
    from xdfast import cli_data

    return cli_data.main(args)


def _demos(args: list[str]) -> int:
    from xdfast import cli_demos

    return cli_demos.main(args)


def _demo(args: list[str]) -> None:
    import tyro

    from xdfast.pipeline.demo import DemoConfig, demo

    demo(tyro.cli(DemoConfig, args=args, prog="xdfast demo", description=_VERBS["demo"]))


def _demo_robot(args: list[str]) -> None:
    import tyro

    from xdfast.pipeline.demo_robot import DemoRobotConfig, demo_robot

    demo_robot(tyro.cli(DemoRobotConfig, args=args, prog="xdfast demo-robot", description=_VERBS["demo-robot"]))


@dataclasses.dataclass
class _BenchOptions:
    """The cross-correlation loss, forward and backward, against its rivals and the floor of its matrix products.

    All candidates take turns in one run; times are medians. "×" columns say how many times faster ours is; "op / floor"
    is the kernel alone over its two matrix products alone (below 1: symmetry saves a part of them).
    """

    what: Literal["rsd", "routed"]
    """Which benchmark; `xdfast bench routed --help` lists the options of the other one."""
    shapes: tuple[str, ...] = ()
    """N and D as 128x768; default: all of the committed table up to 1024x768."""
    both: bool = False
    """Gradients for both inputs (Barlow Twins) instead of the student's."""
    device: str = "auto"
    """auto, cpu or cuda."""
    budget: float = 5.0
    """Seconds of timed rounds for each shape."""
    compiled: bool = True
    """Measure the rivals under torch.compile, too."""
    out: str = ""
    """Also write the figures to this JSON file."""


def _bench(args: list[str]) -> None:

    import tyro

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory talks on stderr
    if args[:1] == ["routed"]:
        from xdfast.bench.routed_run import main as routed

        routed(args[1:])
        return
    options = tyro.cli(_BenchOptions, args=args, prog="xdfast bench", config=(tyro.conf.PositionalRequiredArgs,))
    from xdfast.bench.run import run

    values = vars(options)
    if values.pop("what") == "routed":
        raise ValueError("routed comes first, its options behind it: xdfast bench routed …")
    run(**values)


def _recipes(args: list[str]) -> None:
    from xdfast import cli_recipes

    cli_recipes.main(args)


def _doctor(args: list[str]) -> int:
    from xdfast import doctor

    return doctor.main(args)


_COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "distill": _distill,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "suite": _suite,
    "compare": _compare,
    "report": _report,
    "export": _export,
    "push": _push,
    "pull": _pull,
    "cache": _cache,
    "data": _data,
    "demos": _demos,
    "demo": _demo,
    "demo-robot": _demo_robot,
    "bench": _bench,
    "recipes": _recipes,
    "doctor": _doctor,
}
