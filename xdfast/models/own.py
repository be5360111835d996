"""Models that timm does not name: ``net.py:Net`` and ``package.module:Net``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from xdfast.errors import nearest

__all__ = ["TRUSTED", "allow", "build_own", "code_hash", "is_own", "rebuildable", "same_code", "split_weights"]

_TEXT = r"(?P<place>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)"
_SPEC, _WITH_WEIGHTS = re.compile(_TEXT), re.compile(f"(?P<spec>{_TEXT})@(?P<weights>.+)")

#: Code that saved models may name: specs with ``;`` between them. What is named in a process is added for it and its children.
TRUSTED = "XDFAST_OWN_CODE"
#: Packages whose classes a saved model may name without that.
_PACKAGES = ("timm", "torchvision")


def is_own(spec: str) -> bool:
    """Whether a model is named by its code: ``FILE.py:NAME`` or ``MODULE:NAME``."""
    return _SPEC.fullmatch(spec) is not None


def split_weights(text: str) -> tuple[str, str] | None:
    """(spec, file) of ``FILE.py:NAME@weights`` or ``MODULE:NAME@weights``; None if it is something else."""
    match = _WITH_WEIGHTS.fullmatch(text)
    return (match["spec"], match["weights"]) if match and not is_own(text) else None


def allow(spec: str) -> None:
    """The user named this code: models saved from it may be loaded by this process and those it starts."""
    known = _trusted()
    if _absolute(spec) not in known:
        os.environ[TRUSTED] = ";".join([*known, _absolute(spec)])


def same_code(a: str, b: str) -> bool:
    """Whether two specs name the same class, by whatever path."""
    return _absolute(a) == _absolute(b)


def code_hash(spec: str) -> str:
    """Of the file's contents; empty for a module (its package has a version) and for a file that is not there."""
    match = _SPEC.fullmatch(spec)
    file = Path(match["place"]).expanduser() if match and match["place"].endswith(".py") else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else ""


def _trusted() -> list[str]:
    return [_absolute(spec) for spec in os.environ.get(TRUSTED, "").split(";") if spec]


def _absolute(spec: str) -> str:
    match = _SPEC.fullmatch(spec)
    if match is None or not match["place"].endswith(".py"):
        return spec
    return f"{Path(match['place']).expanduser().resolve()}:{match['name']}"


def build_own(spec: str, *, num_classes: int | None, pretrained: bool, image_size: int | None, options: dict) -> Any:
    """Calls what ``spec`` names, a class or function that makes a module.

    It is called with ``options``, and with ``num_classes``, ``img_size`` and ``pretrained`` where it has parameters of these
    names (and they are known).

    Returns:
        the module, an ``nn.Module`` with ``xdfast_own`` (spec and arguments). Models saved from it may be loaded from now on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file or module cannot be imported or has no such name (the nearest are named); the call fails.
        TypeError: it is not callable, or makes something else than a module.
    """
    make = _find(spec)
    allow(spec)
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
    net.xdfast_own = {"spec": _absolute(spec), "arguments": dict(options)}  # type: ignore
    return net


def rebuildable(spec: str) -> bool:
    """Whether a saved model may be made again by its spec alone: code the user named (:func:`allow`, ``XDFAST_OWN_CODE``), or
    a class of ``nn.Module`` in timm or torchvision.

    A folder of weights may come from anywhere; it must not choose what code runs, not even what is imported.
    """
    if _absolute(spec) in _trusted():
        return True
    match = _SPEC.fullmatch(spec)
    if match is None or match["place"].partition(".")[0] not in _PACKAGES or match["place"].endswith(".py"):
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
    except Exception as error:  # whatever its code raises
        raise ValueError(
            f"module {name} cannot be imported ({type(error).__name__}: {error}); name an installed module, or a file: "
            "path/to/net.py:NAME"
        ) from error


def _parameters(make: Callable[..., Any]) -> list[str]:
    """Names it can be given; "**" if any."""
    kinds = inspect.Parameter
    found = inspect.signature(make).parameters.values()
    names = [p.name for p in found if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    return names + ["**"] * any(p.kind is kinds.VAR_KEYWORD for p in found)
