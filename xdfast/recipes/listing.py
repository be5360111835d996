"""What there is to say of every recipe: what it does, the published number, ours where it ran, the command."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import yaml

from xdfast.recipes.load import Recipe, load_recipe, recipe_names

__all__ = ["figures", "markdown", "ours", "published", "row", "show", "table"]

_METRICS = {"top1": "top-1", "knn": "k-NN", "success": "success"}
_RIVALS = {"scratch": "scratch", "kd": "KD", "ofa": "OFA"}

#: Sections of the page: heading, what a recipe's name begins with.
_GROUPS = (
    ("RSD on CIFAR-100", ("rsd-cifar",)),
    ("RSD on ImageNet-1k", ("rsd-imagenet",)),
    ("X-Distill, stage 1", ("xdistill",)),
    ("Policies: X-Distill, stage 2", ("policy",)),
    ("VLA and ActDistill", ("vla", "actdistill")),
    ("Comparisons", ("suite", "compare")),
)


def figures() -> list[dict[str, Any]]:
    """Our own runs of recipes, as ``python -m xdfast.bench.recipes`` gathered them from ``bench/results``.

    Each has ``recipe``, ``what``, ``metric``, ``value`` in percent, ``low`` and ``high`` (95 % interval) with ``interval`` saying
    over what, ``seeds``, ``device``, ``hours`` of training (None: not recorded) and ``file``.
    """
    return json.loads((files("xdfast.recipes") / "results.json").read_text(encoding="utf-8"))


def row(name: str) -> dict[str, Any]:
    """Everything about a recipe, ready for JSON.

    Raises:
        FileNotFoundError: no such recipe; offers the nearest names.
        ValueError: a damaged file, see :func:`xdfast.recipes.load_recipe`.
    """
    recipe = load_recipe(name)
    return {
        "name": recipe.name,
        "verb": recipe.verb,
        "about": recipe.about,
        "extends": list(recipe.extends),
        "published": recipe.published,
        "ours": [figure for figure in figures() if figure["recipe"] == name],
        "command": recipe.command,
        "settings": recipe.settings,
    }


def published(recipe: Recipe) -> str:
    """The published number in words; "–" if there is none, "not verified" if there is one that was not."""
    facts = recipe.published
    if facts is None:
        return "–"
    if facts["value"] is None:
        return "not verified"
    if facts["metric"] == "speedup":
        return f"{facts['value']:.2f}× speed"
    rivals = [f"{label} {facts[key]:.2f}" for key, label in _RIVALS.items() if facts.get(key) is not None]
    digits = 2 if facts["metric"] == "top1" else 1
    text = f"{_METRICS.get(facts['metric'], facts['metric'])} {facts['value']:.{digits}f} %"
    return text + (f" ({', '.join(rivals)})" if rivals else "")


def ours(name: str) -> list[str]:
    """Our figures of a recipe in words, one line each; empty if it has not run."""
    return [_figure(figure) for figure in figures() if figure["recipe"] == name]


def table() -> Any:
    """All recipes as a rich table."""
    from rich.table import Table
    from rich.text import Text

    names = recipe_names()
    result = Table(title="xdfast VERB --recipe NAME", show_lines=True)
    result.add_column("recipe", min_width=max(len(name) for name in names))  # a name to copy stays in one piece
    result.add_column("published")
    result.add_column("ours")
    for name in names:
        recipe = load_recipe(name)
        what = Text.assemble((name, "bold"), f"\n{recipe.verb}: {recipe.about}\n", (recipe.command, "dim"))
        result.add_row(what, published(recipe), "\n".join(ours(name)) or "–")
    return result


def show(name: str) -> str:
    """One recipe in full: facts, command, merged settings as YAML.

    Raises:
        FileNotFoundError: no such recipe; offers the nearest names.
    """
    recipe = load_recipe(name)
    lines = [f"{recipe.name}: {recipe.about}" if recipe.about else recipe.name]
    if recipe.extends:
        lines.append(f"extends    {' → '.join(recipe.extends)}")
    lines.append(f"published  {published(recipe)}" + (f"; {recipe.published['source']}" if recipe.published else ""))
    lines += [f"ours       {line}" for line in ours(name)] or ["ours       –"]
    lines.append(f"command    {recipe.command}")
    settings = yaml.safe_dump(recipe.settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return "\n".join([*lines, "", settings.rstrip()])


def markdown() -> str:
    """All recipes as Markdown tables, one a section; what ``docs/recipes.md`` holds between its markers."""
    names = recipe_names()
    parts: list[str] = []
    left = [n for n in names if not any(n.startswith(starts) for _, starts in _GROUPS)]
    groups = [(title, [n for n in names if n.startswith(starts)]) for title, starts in _GROUPS]
    for title, members in [*groups, *([("Others", left)] if left else [])]:
        lines = [f"### {title}", "", "| recipe | what | published | ours | command |", "|---|---|---|---|---|"]
        for name in members:
            recipe = load_recipe(name)
            cells = (
                f"`{name}`",
                recipe.about,
                published(recipe),
                "<br>".join(ours(name)) or "–",
                f"`{recipe.command}`",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _figure(figure: dict[str, Any]) -> str:
    text = f"{figure['what']}: {_METRICS.get(figure['metric'], figure['metric'])} {figure['value']:.1f} %"
    if figure["low"] is not None:
        text += f" ({figure['low']:.1f} to {figure['high']:.1f}, {figure['interval']})"
    text += f", {figure['seeds']} seed{'s' if figure['seeds'] > 1 else ''}, {figure['device']}"
    return text if figure["hours"] is None else f"{text}, {figure['hours']:.2f} h"
