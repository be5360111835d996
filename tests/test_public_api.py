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

#: What only an extra brings.
OPTIONAL = (
    "accelerate", "av", "captum", "diffusers", "gymnasium", "gymnasium_robotics", "h5py", "metaworld", "mkdocs", "mujoco",
    "nvidia.dali", "onnx", "onnxruntime", "onnxscript", "pyarrow", "tensorboard", "transformers", "zarr",
)  # fmt: skip


def python(code: str) -> str:
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
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


def test_no_optional_package_is_imported_for_any_public_name() -> None:
    code = "import sys, xdfast; [getattr(xdfast, n) for n in xdfast.__all__]; print(*sorted(sys.modules))"
    loaded = set(python(code).split())
    assert {"xdfast.pipeline.distill", "xdfast.robot.policy"} <= loaded
    assert loaded & set(OPTIONAL) == set()


def test_import_costs_less_than_a_second_and_a_half_beyond_torch() -> None:
    """CPU seconds, so that a busy machine does not count; the better of two, so that the first may write bytecode.

    Of the losses and layers. The verbs bring timm and torchvision as well, which import half of torch again: seconds that
    are not ours, and that only who calls a verb pays.
    """
    code = (
        "import time, torch; start = time.process_time(); import xdfast as xd; first = time.process_time() - start; "
        "xd.RSDLoss(), xd.BarlowTwinsLoss(), xd.KDLoss(), xd.AAD, xd.RoutedStack, xd.route, xd.create_loss, xd.backend; "
        "print(first, time.process_time() - start)"
    )
    imports, pieces = zip(*(map(float, python(code).split()) for _ in range(2)))
    assert min(imports) < 0.2
    assert min(pieces) < 1.5


def test_a_loss_does_not_load_the_compiler() -> None:
    """torch._dynamo alone takes three seconds to import; some of torch's decorators import it."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import xdfast as xd; xd.RSDLoss(), xd.AAD, xd.route; "
    before, after = python(code + "print(before, 'torch._dynamo' in sys.modules)").split()
    assert before == after


def test_names_are_the_same_whatever_is_imported_first() -> None:
    # xdfast.pipeline has modules called distill, evaluate, finetune and report: they must not hide the functions
    code = "import {first}, xdfast; print(*[callable(getattr(xdfast, n)) for n in {names}])"
    names = ("distill", "finetune", "evaluate", "report", "export")
    for first in ("xdfast.pipeline.report, xdfast.pipeline.export", "xdfast.cli"):
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
