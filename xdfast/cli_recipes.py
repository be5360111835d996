"""``xdfast recipes [NAME] [--json]``: the settings that ship with xdfast on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str]) -> None:
    """Lists all recipes, or shows one with its merged settings."""
    parser = argparse.ArgumentParser(
        prog="xdfast recipes", description="Published settings: what they do, the published number, ours, the command."
    )
    parser.add_argument(
        "name", nargs="?", help="a recipe, or a YAML file of yours: shows it whole, with what it extends"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(list(args))

    from xdfast.recipes import listing, recipe_names

    if options.json:
        found = listing.row(options.name) if options.name else [listing.row(name) for name in recipe_names()]
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif options.name:
        print(listing.show(options.name))
    else:
        from rich.console import Console

        Console().print(listing.table())
