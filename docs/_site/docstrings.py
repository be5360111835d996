"""Docstrings are written for `help()` and for a reader of the code; this makes Markdown of them for the site.

A griffe extension (mkdocs.yml names it). It touches three habits of ours that Markdown does not know: Sphinx roles, ``.. math::``
and a section ``Example:`` of doctest lines.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

import griffe

VERBS = Path(__file__).resolve().parents[2] / "xdfast/pipeline"
_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(~?)([^`<>]+)`")
_INLINE_MATH = re.compile(r":math:`([^`]+)`")
_MATH = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<rest>.*)\n(?P<body>(?:(?P=indent) +\S.*\n|\n(?=(?P=indent) +\S))*)", re.M
)
_LITERAL = re.compile(r"^(.*\S)::\n(?=\n? +\S)", re.M)
_EXAMPLE = re.compile(r"^( *)Example:[ \t]*$", re.M)


class Docstrings(griffe.Extension):
    """Markdown from our docstrings, before griffe cuts them into sections."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)


def to_markdown(text: str, obj: griffe.Object) -> str:
    """Roles become links where the site has the name, formulas `$…$` and `$$…$$`, and `Example:` griffe's `Examples:`."""
    text = _MATH.sub(_formula, text + "\n").rstrip("\n")
    text = _INLINE_MATH.sub(lambda found: f"${found[1]}$", text)
    text = _EXAMPLE.sub(r"\1Examples:", text)
    text = _LITERAL.sub(r"\1:\n", text)
    text = "\n".join(_shapes(line) for line in text.split("\n"))
    return _ROLE.sub(lambda found: _link(found[2], bool(found[1]), obj), text)


def _shapes(line: str) -> str:
    """`[B, L][S]` in prose would be a reference to a page S; in code it stays."""
    if line.lstrip().startswith((">>>", "... ")):
        return line
    parts = line.split("`")  # every second one is code
    return "`".join(part if i % 2 else part.replace("][", "]\\[") for i, part in enumerate(parts))


def _formula(found: re.Match) -> str:
    body = " ".join(line.strip() for line in [found["rest"], *found["body"].splitlines()] if line.strip())
    if "&" in body:  # Sphinx puts a split environment around such formulas by itself
        body = rf"\begin{{split}} {body} \end{{split}}"
    return f"\n{found['indent']}$${body}$$\n\n"


def _link(target: str, short: bool, obj: griffe.Object) -> str:
    """An optional reference: where the site has no such name it is plain code, without a warning."""
    shown = target.rpartition(".")[2] if short else target
    return f'<autoref identifier="{escape(_full_name(target, obj))}" optional><code>{escape(shown)}</code></autoref>'


def _full_name(target: str, obj: griffe.Object) -> str:
    verb = target.removeprefix("xdfast.")
    if (VERBS / f"{verb}.py").is_file():  # a module has the function's name, and griffe finds that first
        return f"xdfast.pipeline.{verb}.{verb}"
    if target.startswith("xdfast"):
        return target
    scope: griffe.Object | None = obj
    while scope is not None:
        if not scope.is_alias and target.split(".")[0] in scope.members:
            return f"{scope.path}.{target}"
        scope = scope.parent  # type: ignore[assignment]
    return target
