"""The site builds without a warning, fetches nothing, and has every public name; docstrings become Markdown that is right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from doc_blocks import ROOT

import xdfast

griffe = pytest.importorskip("griffe", reason="griffe is not installed: pip install xdfast[docs]")
pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install xdfast[docs]")

DOCSTRING = r'''def f(x, y):
    r"""Does :func:`g` to [B, L][S] as :class:`~xdfast.nn.AAD` would, and :math:`\bar x`:

    .. math:: a &= b, \\
              c &= d

    or::

        f(1, 2)

    Args:
        x, y: numbers.

    Example:
        >>> f(a[B][0], 1)
        3
    """

def g(): ...
'''


def extension():
    spec = importlib.util.spec_from_file_location("xdfast_docs_docstrings", ROOT / "docs/_site/docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_markdown(tmp_path) -> None:
    (tmp_path / "m.py").write_text(DOCSTRING, encoding="utf-8")
    extensions = griffe.load_extensions(str(ROOT / "docs/_site/docstrings.py"))
    module = griffe.load("m", search_paths=[tmp_path], extensions=extensions)
    sections = module["f"].docstring.parse("google", warnings=False)
    text = sections[0].value
    assert '<autoref identifier="m.g" optional><code>g</code></autoref>' in text
    assert '<autoref identifier="xdfast.nn.AAD" optional><code>AAD</code></autoref>' in text
    assert r"$\bar x$" in text and r"[B, L]\[S]" in text and "or:\n" in text
    assert "\n$$\\begin{split} a &= b, \\\\ c &= d \\end{split}$$\n" in text
    assert [section.kind.value for section in sections] == ["text", "parameters", "examples"]
    assert "a[B][0]" in sections[2].value[0][1]


def test_verbs_are_the_functions_and_not_their_modules() -> None:
    module = griffe.visit("m", Path("m.py"), "def f():\n    '''As :func:`xdfast.distill`.'''\n")
    assert 'identifier="xdfast.pipeline.distill.distill"' in extension().to_markdown(
        module["f"].docstring.value, module["f"]
    )


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    nav = str(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if f"'{page}'" not in nav} == set()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_site_builds_without_a_warning_and_without_a_network(tmp_path) -> None:
    from mkdocstrings import Inventory

    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    command = [str(Path(sys.executable).parent / "mkdocs"), "build", "--strict", "-d", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr[-4000:]

    pages = sorted((tmp_path / "site").rglob("*.html"))
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]+|<link[^>]*\bhref=[\"']?(?:https?:)?//[^\"' >]+"
    )
    fetched = {f"{page.name}: {found}" for page in pages for found in loaded.findall(page.read_text(encoding="utf-8"))}
    assert not fetched and len(pages) > 25
    assert "<math" in (tmp_path / "site/api/losses.html").read_text(encoding="utf-8")

    with (tmp_path / "site/objects.inv").open("rb") as file:
        documented = {name.rpartition(".")[2] for name in Inventory.parse_sphinx(file)}
    assert set(xdfast.__all__) - {"__version__"} <= documented
    for room in ("losses", "nn", "ops", "models", "data", "robot", "reporting", "pipeline", "deploy"):
        assert set(getattr(xdfast, room).__all__) <= documented, room
