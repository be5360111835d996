"""Published settings as YAML files, ``--recipe NAME``; ``xdfast recipes`` and docs/recipes.md list them."""

from __future__ import annotations

from xdfast.recipes.load import Recipe, load_recipe, load_yaml, recipe_names, recipe_path

__all__ = ["Recipe", "load_recipe", "load_yaml", "recipe_names", "recipe_path"]
