"""What README and docs/*.md show: fenced blocks with the marks before them, commands as the CLI reads them, and stand-ins.

Marks are HTML comments on the lines before a block, invisible where the page is read:

* ``<!-- no-run: REASON -->``: not run; its syntax (or its commands) is checked all the same.
* ``<!-- slow: REASON -->``: run by ``make test-slow`` only.
* ``<!-- run -->``: a bash block whose ``xdfast`` commands are executed, not only parsed.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]
_MARK = re.compile(r"<!--\s*(?P<name>[\w-]+)\s*(?::\s*(?P<reason>.*?))?\s*-->", re.S)


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of the first line of code, from 1
    language: str
    code: str
    no_run: str | None = None
    slow: str | None = None
    run: bool = False

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: a comment before a block that is no mark (a misspelt one would be silent), or a mark without its reason.
    """
    return parse_blocks((ROOT / page).read_text(encoding="utf-8"), page)


def parse_blocks(text: str, page: str) -> list[Block]:
    """:func:`blocks_of` for a text."""
    found, before = [], ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "html_block":
            before += token.content
        elif token.type == "fence":
            line = token.map[0] + 2
            found.append(Block(page, line, token.info.strip(), token.content, **_marks(before, f"{page}:{line}")))
            before = ""
        else:
            before = ""
    return found


def _marks(comments: str, place: str) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    for mark in _MARK.finditer(comments):
        name, reason = mark["name"].replace("-", "_"), (mark["reason"] or "").strip()
        if name not in ("no_run", "slow", "run"):
            raise ValueError(f"{place}: unknown mark {mark[0]!r} before a block; there are no-run, slow and run")
        if name != "run" and not reason:
            raise ValueError(f"{place}: {mark[0]!r} needs a reason: <!-- {mark['name']}: REASON -->")
        marks[name] = reason or True
    return marks


@dataclass
class StandIns:
    """What a test puts in the place of what a page names and a test cannot have: published weights, data sets, hours.

    The whole mechanism: ``words`` replaces string literals (of commands: words) that are *equal* to a key; ``settings``
    sets or adds keyword arguments in calls of the functions named (``"xd.distill"``, as the page writes it), ``options``
    adds options to commands (``"distill"``). Nothing else of a block changes. A stand-in that finds no place any more fails
    the test of its page.
    """

    words: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, list[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def unused(self) -> set[str]:
        return {*self.words, *self.settings} - self.used

    def compiled(self, block: Block) -> Any:
        """The block's code with its stand-ins; tracebacks point into the page."""
        tree = ast.parse(block.code, filename=block.place)
        ast.increment_lineno(_Replace(self).visit(tree), block.line - 1)
        return compile(ast.fix_missing_locations(tree), str(ROOT / block.page), "exec")

    def word(self, text: str) -> str:
        if text in self.words:
            self.used.add(text)
        return self.words.get(text, text)


class _Replace(ast.NodeTransformer):
    def __init__(self, stand_ins: StandIns) -> None:
        self.stand_ins = stand_ins

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            return ast.copy_location(ast.Constant(self.stand_ins.word(node.value)), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name in self.stand_ins.settings:
            self.stand_ins.used.add(name)
            values = self.stand_ins.settings[name]
            kept = [keyword for keyword in node.keywords if keyword.arg not in values]
            node.keywords = kept + [ast.keyword(k, ast.parse(repr(v), mode="eval").body) for k, v in values.items()]
        return node


def commands_of(block: Block) -> Iterator[tuple[int, list[str]]]:
    """Line and words of each command of a bash block: comments and continued lines as a shell has them.

    Options in [square brackets] are taken as given.
    """
    text = re.sub(r"\\\n", "  ", block.code)
    lines = block.code.splitlines()
    for command in text.splitlines():
        words = shlex.split(command, comments=True)
        if words:
            first = next(
                i for i, line in enumerate(lines) if line.split("\\")[0].strip() and line.split("\\")[0] in command
            )
            yield block.line + first, [w.removeprefix("[").removesuffix("]") if _usage(w) else w for w in words]


def _usage(word: str) -> bool:
    return word.startswith("[--") or (word.endswith("]") and "[" not in word)


class Parsed(BaseException):
    """Raised where the CLI has understood a command, before it does anything."""

    def __init__(self, options: Any) -> None:
        self.options = options


def parse_only(words: list[str]) -> Any:
    """What ``xdfast WORDS`` would do: the options as the CLI's own parser gives them, or None of a verb without options.

    Everything up to the parser's answer is the CLI itself: verbs, recipes, which config a command is for. Run it in an
    empty folder; a run that a command would leave gets its ``config.yaml``, by which later commands know what it is.
    """
    import tyro

    from xdfast.cli import main

    def answer(parser: Any) -> Any:
        def parse(*args: Any, **kwargs: Any) -> Any:
            raise Parsed(parser(*args, **kwargs))

        return parse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", answer(tyro.cli))
        patch.setattr(argparse.ArgumentParser, "parse_args", answer(argparse.ArgumentParser.parse_args))
        try:
            status = main([*words, "--traceback"])
        except Parsed as parsed:
            _leave_run(words[0], parsed.options)
            return parsed.options
        except SystemExit as stopped:
            raise ValueError(f"xdfast {shlex.join(words)}: the parser refused it ({stopped.code})") from None
    if status:
        raise ValueError(f"xdfast {shlex.join(words)}: exit status {status}")
    return None


def _leave_run(verb: str, options: Any) -> None:
    kinds = {"PolicyConfig": "policy", "VLAConfig": "vla", "ActDistillConfig": "vla"}
    if verb in ("distill", "finetune"):
        folder = Path(options.out)
        if not folder.is_absolute():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(f"kind: {kinds.get(type(options).__name__, verb)}\n", encoding="utf-8")
