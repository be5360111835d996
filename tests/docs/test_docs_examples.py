"""Every `Example:` of a docstring runs, in every module that has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import xdfast

PACKAGE = Path(xdfast.__file__).parent
MODULES = sorted(
    ".".join(("xdfast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = importlib.import_module(module)
    found = [example for test in doctest.DocTestFinder().find(loaded) for example in test.examples]
    failed, tried = doctest.testmod(loaded, optionflags=doctest.ELLIPSIS)
    # of examples that need hours, a robot or a hub, all that is asked is that they say so
    assert failed == 0 and found and tried == sum(not example.options.get(doctest.SKIP) for example in found)


def test_an_example_is_run_or_says_that_it_is_not() -> None:
    """Lines of a shell or of another language do not belong into `Example:`."""
    odd = []
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        odd += [
            f"{path.relative_to(PACKAGE)}:{i + 1}"
            for i, line in enumerate(lines[:-1])
            if line.strip() == "Example:" and ">>>" not in lines[i + 1]
        ]
    assert not odd
