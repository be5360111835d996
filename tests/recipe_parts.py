"""Recipes that distil images, with what they leave open filled in."""

from __future__ import annotations

from xdfast.pipeline import DistillConfig
from xdfast.recipes import load_recipe, recipe_names

#: Recipes that a teacher is trained for first: it is given as a run's folder.
OWN_TEACHER = {"xdistill-cifar10": "resnet18"}


def config_of(name: str) -> DistillConfig:
    recipe = load_recipe(name)
    given = {**recipe.needs, "out": "o", **recipe.settings}
    given["teacher"] = OWN_TEACHER.get(name, given["teacher"]).partition("@")[0]
    return DistillConfig.from_dict(given, source=name)


def distillations() -> list[str]:
    recipes = [load_recipe(name) for name in recipe_names()]
    return [r.name for r in recipes if r.verb == "distill" and "target_flops" not in r.settings]
