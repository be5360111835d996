"""What ``import xdfast`` promises: the names, that they load late, and that the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys

import pytest

import xdfast

HEAVY = ("timm", "torchvision", "matplotlib", "sklearn", "rich", "tyro", "fvcore", "tensorboard", "jinja2", "PIL")


def python(code: str) -> str:
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_every_public_name_exists_and_has_a_docstring() -> None:
    for name in xdfast.__all__:
        value = getattr(xdfast, name)
        assert name == "__version__" or value.__doc__, name
    assert set(xdfast.__all__) <= set(dir(xdfast))


def test_import_loads_neither_torch_nor_anything_heavy() -> None:
    loaded = python("import sys, xdfast; print(*sorted(m for m in sys.modules if '.' not in m))").split()
    assert not {"torch", *HEAVY} & set(loaded)


def test_a_loss_loads_torch_alone() -> None:
    loaded = python(
        "import sys, xdfast; xdfast.RSDLoss(); print(*sorted(m for m in sys.modules if '.' not in m))"
    ).split()
    assert "torch" in loaded
    assert not {"timm", "torchvision", "matplotlib", "sklearn", "fvcore", "tyro"} & set(loaded)


def test_names_are_the_same_whatever_is_imported_first() -> None:
    # xdfast.pipeline has modules called distill, evaluate, finetune and report: they must not hide the functions
    code = "import {first}, xdfast; print(*[callable(getattr(xdfast, n)) for n in {names}])"
    names = ("distill", "finetune", "evaluate", "report", "export")
    for first in ("xdfast.pipeline.report", "xdfast.pipeline.export", "xdfast.pipeline.distill", "xdfast.reporting", "xdfast.cli"):
        assert python(code.format(first=first, names=names)) == "True True True True True"


def test_an_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'RSD'; public names: .*RSDLoss"):
        _ = xdfast.RSD


@pytest.mark.parametrize(
    "module",
    [
        "xdfast.ops.rsd", "xdfast.losses.rsd", "xdfast.losses.kd", "xdfast.losses.feature", "xdfast.losses",
        "xdfast.nn.aad", "xdfast.nn.gates", "xdfast.nn.router", "xdfast.nn.calibrate", "xdfast.nn.latency_budget",
        "xdfast.nn.convert", "xdfast.nn.calibrated_model", "xdfast.nn.actdistill_compat", "xdfast.nn.steps",
        "xdfast.losses.budget", "xdfast.ops.route", "xdfast.models.routed", "xdfast.models.create",
        "xdfast.models.features", "xdfast.pipeline.distill", "xdfast.pipeline.finetune",
    ],
)  # fmt: skip
def test_examples_in_docstrings_run(module) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert failed == 0
