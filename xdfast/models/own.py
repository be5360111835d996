"""Models that timm does not name: ``net.py:Net`` and ``package.module:Net``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from xdfast.errors import nearest

__all__ = ["build_own", "is_own", "rebuildable"]

_SPEC = re.compile(r"(?P<place>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_own(spec: str) -> bool:
    """Whether a model is named by its code: ``FILE.py:NAME`` or ``MODULE:NAME``."""
    return _SPEC.fullmatch(spec) is not None


def build_own(spec: str, *, num_classes: int | None, pretrained: bool, image_size: int | None, options: dict) -> Any:
    """Calls what ``spec`` names, a class or function that makes a module.

    It is called with ``options``, and with ``num_classes``, ``img_size`` and ``pretrained`` where it has parameters of these
    names (and they are known).

    Returns:
        the module, an ``nn.Module``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file or module cannot be imported or has no such name (the nearest are named); the call fails.
        TypeError: it is not callable, or makes something else than a module.
    """
    make = _find(spec)
    takes = _parameters(make)
    given = dict(options)
    for name, value in (("num_classes", num_classes), ("img_size", image_size), ("pretrained", pretrained)):
        if name in takes and value is not None:
            given.setdefault(name, value)
    unknown = [name for name in given if name not in takes and "**" not in takes]
    if unknown:
        raise ValueError(
            f"{spec} has no argument {unknown[0]!r}.{nearest(unknown[0], takes)} It has: {', '.join(takes) or 'none'}"
        )
    try:
        net = make(**given)
    except Exception as error:  # the user's code can fail in any way
        raise ValueError(f"{spec} cannot be built with {given} ({type(error).__name__}: {error})") from error
    if not isinstance(net, nn.Module):
        raise TypeError(f"{spec} must make an nn.Module, got {type(net).__name__}")
    net.xdfast_own = {"spec": spec, "arguments": {k: v for k, v in given.items() if k != "pretrained"}}  # type: ignore
    return net


def rebuildable(spec: str) -> bool:
    """Whether a saved model may be made again by its spec alone: a class of ``nn.Module`` in an installed module.

    A folder of weights may come from anywhere; it must not choose what code runs. Making a module of a class that is installed
    is harmless; a file, or a function, is only called if the user names it.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or match["place"].endswith(".py"):
        return False
    try:
        found = _find(spec)
    except (ValueError, TypeError):
        return False
    return isinstance(found, type) and issubclass(found, nn.Module)


def _find(spec: str) -> Callable[..., Any]:
    match = _SPEC.fullmatch(spec)
    assert match is not None, spec
    place, name = match["place"], match["name"]
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no {name!r}.{nearest(name, known)}")
    found = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{spec} must be a class or function that makes a module, got {type(found).__name__}")
    return found


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # under a name of its own, once: classes stay the same from call to call, and pickle finds them
    name = "xdfast_own_" + hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    return sys.modules[name]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"module {name} cannot be imported ({error}); name an installed module, or a file: path/to/net.py:NAME"
        ) from error


def _parameters(make: Callable[..., Any]) -> list[str]:
    """Names it can be given; "**" if any."""
    kinds = inspect.Parameter
    found = inspect.signature(make).parameters.values()
    names = [p.name for p in found if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    return names + ["**"] * any(p.kind is kinds.VAR_KEYWORD for p in found)
