"""Published settings as YAML files: ``xdfast distill --recipe rsd-cifar-cnn --teacher … --student … --data … --out …``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from xdfast.errors import nearest

__all__ = ["recipe_names", "recipe_path"]


def recipe_names() -> list[str]:
    """Names of the recipes that ship with xdfast."""
    return sorted(p.name.removesuffix(".yaml") for p in files("xdfast.recipes").iterdir() if p.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """A shipped recipe by name, or any YAML file by path.

    Raises:
        FileNotFoundError: neither; offers the nearest names.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no recipe file {name}")
        return Path(name)
    if name not in recipe_names():
        raise FileNotFoundError(
            f"unknown recipe {name!r}; known: {', '.join(recipe_names())}.{nearest(name, recipe_names())}"
        )
    return Path(str(files("xdfast.recipes") / f"{name}.yaml"))
