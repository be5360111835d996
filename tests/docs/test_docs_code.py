"""Every code block of README and docs/*.md runs, as it stands, on small models and data; what cannot run says why.

A page is one story: its blocks run in order in one namespace and one empty folder. ``tests/doc_pages.py`` has what each page
assumes and what stands in for published weights and data sets, ``tests/doc_blocks.py`` the marks and the mechanism.
"""

from __future__ import annotations

import ast
import logging
import shlex
from pathlib import Path

import pytest
from doc_blocks import PAGES, Block, StandIns, blocks_of, commands_of, parse_blocks
from doc_pages import PAGES as SETUPS

from xdfast.cli import main

ALL = [block for page in PAGES for block in blocks_of(page)]
#: Languages of blocks that are not code of ours.
TEXT = ("", "text", "yaml")


def runs(block: Block) -> bool:
    return block.no_run is None and (block.language == "python" or block.run)


def pages(slow: bool) -> list[str]:
    """Pages with something to run: without what is slow, or those where something is."""
    return [p for p in PAGES if any(runs(b) and (b.slow is not None or not slow) for b in ALL if b.page == p)]


@pytest.mark.parametrize(
    "page", [p for p in pages(slow=False) if any(b.slow is None for b in ALL if b.page == p and runs(b))]
)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    run_page(page, False, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", pages(slow=True))
def test_blocks_run_with_the_slow_ones(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    run_page(page, True, tmp_path, monkeypatch)


def run_page(page: str, slow: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDFAST_CACHE", str(folder / "cache"))
    import torch

    import xdfast

    names, stand_ins = SETUPS.get(page, lambda slow: ({}, StandIns()))(slow)
    names = {"__name__": "page", "xd": xdfast, "xdfast": xdfast, "torch": torch} | names
    for block in blocks_of(page):
        if not runs(block) or (block.slow is not None and not slow):
            continue
        try:
            if block.language == "python":
                exec(stand_ins.compiled(block), names)
            else:
                run_commands(block, stand_ins)
        except Exception as error:
            raise AssertionError(f"the block at {block.place} failed: {type(error).__name__}: {error}") from error
    skipped = {word for b in blocks_of(page) if b.slow and not slow for word in _words(b)}
    assert stand_ins.unused() <= skipped, (
        f"{page} does not have {stand_ins.unused() - skipped} any more: tests/doc_pages.py"
    )


def run_commands(block: Block, stand_ins: StandIns) -> None:
    for line, words in commands_of(block):
        assert words[0] == "xdfast", f"{block.page}:{line}: only xdfast's own commands are run"
        command = [stand_ins.word(word) for word in words[1:]]
        command += [o for verb, more in stand_ins.options.items() if set(verb.split()) <= set(command) for o in more]
        logging.getLogger("xdfast").info("running xdfast %s", shlex.join(command))
        assert main([*command, "--traceback"]) == 0, f"{block.page}:{line}: {shlex.join(command)}"


def _words(block: Block) -> set[str]:
    """What a stand-in could replace in a block."""
    if block.language != "python":
        return {word for _, words in commands_of(block) for word in words}
    found = set()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize("block", [b for b in ALL if b.no_run], ids=lambda b: b.place)
def test_blocks_that_cannot_run_here(block: Block) -> None:
    """Their syntax is checked; the summary of the tests lists them with their reasons."""
    if block.language == "python":
        ast.parse(block.code)
    pytest.skip(f"{block.place}: {block.no_run}")


def test_every_block_has_a_language_that_is_known() -> None:
    odd = [f"{b.place} ({b.language})" for b in ALL if b.language not in ("python", "bash", *TEXT)]
    assert not odd, f"python, bash, or text that is not run: {odd}"


def test_every_page_with_fixtures_is_there() -> None:
    assert set(SETUPS) <= set(PAGES)


def test_marks_are_read_and_misspelt_ones_are_found() -> None:
    text = "<!-- slow: takes long -->\n```python\nx = 1\n```\n\n<!-- no-run: a GPU -->\n\n```bash\nxdfast\n```\ntext\n```\na\n```\n"
    first, second, third = parse_blocks(text, "p.md")
    assert (first.line, first.slow, first.no_run, first.code) == (3, "takes long", None, "x = 1\n")
    assert (second.line, second.no_run, second.language, third.no_run) == (9, "a GPU", "bash", None)
    with pytest.raises(ValueError, match=r"p\.md:3: unknown mark '<!-- norun: x -->'"):
        parse_blocks("<!-- norun: x -->\n```python\n```\n", "p.md")
    with pytest.raises(ValueError, match="needs a reason"):
        parse_blocks("<!-- no-run -->\n```python\n```\n", "p.md")


def test_stand_ins_replace_whole_words_and_settings_alone() -> None:
    block = Block("README.md", 7, "python", 'a = f("big", "bigger", n=100, out="x")\nb = g(n=100)\n')
    stand_ins = StandIns({"big": "small", "absent": "x"}, {"f": {"n": 1, "more": (2,)}})
    calls: list = []
    exec(stand_ins.compiled(block), {"f": lambda *a, **k: calls.append((a, k)), "g": lambda **k: calls.append(k)})
    assert calls == [(("small", "bigger"), {"n": 1, "out": "x", "more": (2,)}), {"n": 100}]
    assert stand_ins.unused() == {"absent"}


def test_an_error_points_into_the_page() -> None:
    block = Block("README.md", 7, "python", "x = 1\ny = x / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        exec(StandIns().compiled(block), {})
    last = raised.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("README.md", 8)
