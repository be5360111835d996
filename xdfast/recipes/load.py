"""A recipe as it is meant: its settings over those of the recipes it extends, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from xdfast.errors import nearest

__all__ = ["FACTS", "Recipe", "load_recipe", "load_yaml", "recipe_names", "recipe_path"]

#: Keys of a recipe file that are no settings of its verb.
FACTS = ("verb", "about", "extends", "needs", "published")


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything it extends.

    Attributes:
        name: of a shipped recipe, or the path of a file.
        verb: what it is for; None: the file does not say, and any verb takes it.
        about: one line.
        settings: of the verb, merged.
        needs: settings it leaves open, each with an example.
        published: ``metric``, ``value`` (in percent unless the metric is a speedup; None: not verified), the same for
            rivals (``scratch``, ``kd``, ``ofa``), ``source``; None: nobody has published a number for it.
        extends: the recipes it builds on, nearest first.
    """

    name: str
    verb: str | None
    about: str
    settings: dict[str, Any]
    needs: dict[str, str] = field(default_factory=dict)
    published: dict[str, Any] | None = None
    extends: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What runs it, with an example of everything that it leaves open."""
        stem = Path(self.name).stem if self.name.endswith((".yaml", ".yml")) else self.name
        needs = {**self.needs, "out": f"runs/{stem}"} if "out" not in self.settings else self.needs
        options = [f"--{key.replace('_', '-')} {value}" for key, value in needs.items()]
        return " ".join([f"xdfast {self.verb or 'VERB'} --recipe {self.name}", *options])


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


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or any YAML file by path, merged with what it extends.

    ``extends: OTHER`` names a shipped recipe, or a YAML file beside the one that says so. A setting takes the place of the
    extended recipe's; two mappings (``student_options``) are merged key by key. The verb must be the same all along; about and
    published number are a recipe's own.

    Raises:
        FileNotFoundError: no such recipe, or it extends one that is not there; offers the nearest names.
        ValueError: no valid YAML, recipes that extend each other in a circle, another verb than the extended recipe's, or facts
            of the wrong kind.

    Example:
        >>> load_recipe("rsd-cifar100-swin-t-resnet18").settings["student"]
        'resnet18'
    """
    return _load(name, recipe_path(name), ())


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a mapping of settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no settings file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `setting: value` lines, got {type(values).__name__}")
    return values


def _load(name: str, path: Path, below: tuple[tuple[str, Path], ...]) -> Recipe:
    """``below``: (name, path) of the recipes that led here."""
    if path.resolve() in [there for _, there in below]:
        circle = " extends ".join(repr(n) for n in [*(n for n, _ in below), name])
        raise ValueError(f"recipe {circle}: a circle; one of them must stand on its own")
    values = load_yaml(path)
    facts = {key: values.pop(key) for key in FACTS if key in values}
    _check(name, facts)
    base = None
    if "extends" in facts:
        try:
            other = facts["extends"]
            beside = path.parent / other
            there = recipe_path(str(beside) if other.endswith((".yaml", ".yml")) else other)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"recipe {name!r} extends what is not there: {error}") from error
        base = _load(other, there, (*below, (name, path.resolve())))
        if facts.get("verb", base.verb) != base.verb and base.verb is not None:
            raise ValueError(
                f"recipe {name!r} is for `xdfast {facts['verb']}`, but extends {other!r}, which is for `xdfast {base.verb}`"
            )
        values = _merged(base.settings, values)
    needs = {**(base.needs if base else {}), **facts.get("needs", {})}
    return Recipe(
        name=name,
        verb=facts.get("verb", base.verb if base else None),
        about=facts.get("about", ""),
        settings=values,
        needs={key: str(value) for key, value in needs.items() if key not in values},
        published=facts.get("published"),
        extends=(base.name, *base.extends) if base else (),
    )


def _check(name: str, facts: dict[str, Any]) -> None:
    for key, kind, form in (
        ("verb", str, "verb: distill"),
        ("about", str, "about: one line"),
        ("extends", str, "extends: rsd-cifar-cnn"),
        ("needs", dict, "needs: {data: /data/imagenet}"),
        ("published", dict, "published: {metric: top1, value: 83.92, source: where}"),
    ):
        if key in facts and not isinstance(facts[key], kind):
            if key == "published" and facts[key] is None:
                continue
            raise ValueError(f"recipe {name!r}: {key} must be like `{form}`, got {facts[key]!r}")
    published = facts.get("published")
    if published is not None and not {"metric", "value", "source"} <= set(published):
        raise ValueError(f"recipe {name!r}: published needs metric, value and source, got {', '.join(published)}")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values of ``above`` over ``below``; where both have a mapping, its keys."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
