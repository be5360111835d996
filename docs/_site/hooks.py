"""What the site takes from outside docs/: figures, examples, the contributor's guide and the changelog.

Pages link to them as a code host shows them (`../bench/results/cpu/rsd.json`). Here every such target becomes a file or a
page of the site and the link points to it, so that the same Markdown reads well in both places. A target that does not
exist is left alone, and `--strict` fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Pages of the site that are files of the repository.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
#: What a page of the site says in its own way.
INSTEAD = {"README.md": "index.md"}
#: Folders that are shown as one page each.
FOLDERS = {"bench/results": "bench/results.md", "examples": "examples.md"}
_LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for folder, make in {"bench/results": _results, "examples": _examples}.items():
        files.append(File.generated(config, FOLDERS[folder], content=make(ROOT / folder)))
    wanted = {path for file in list(files) if file.is_documentation_page() for path in _outside(file)}
    for path in sorted(wanted | {p.relative_to(ROOT).as_posix() for p in (ROOT / "bench/results").rglob("*.json")}):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def rewrite(found: re.Match) -> str:
        path = _repository_path(page.file.src_uri, found["target"])
        if path is None:
            return found[0]
        path = {**PAGES, **INSTEAD, **FOLDERS}.get(path.rstrip("/"), path)
        path = path.removeprefix("docs/")
        return f"]({posixpath.relpath(path, here or '.')}{found['anchor'] or ''})"

    return _LINK.sub(rewrite, markdown)


def _outside(file: File) -> set[str]:
    """Files of the repository, outside docs/, that a page links to."""
    found = {_repository_path(file.src_uri, link["target"]) for link in _LINK.finditer(file.content_string)}
    return {
        p for p in found if p and not p.startswith("docs/") and p not in (*PAGES, *INSTEAD) and (ROOT / p).is_file()
    }


def _repository_path(page: str, target: str) -> str | None:
    """Where a link of a page leads in the repository; None if it stays among the pages or leads nowhere."""
    origin = next((source for source, shown in PAGES.items() if shown == page), f"docs/{page}")
    if page in FOLDERS.values():
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    if path.startswith("docs/") and origin.startswith("docs/"):
        return None
    return path if (ROOT / path).exists() else None


def _results(folder: Path) -> str:
    lines = [
        "# Figures as they were measured",
        "",
        "Figures in README and on these pages come from these files, which are committed with the code: the machine, "
        "all candidates, quartiles. A folder is a device.",
        "",
    ]
    for device in sorted(p for p in folder.iterdir() if p.is_dir()):
        lines += [f"## {device.name}", ""]
        for file in sorted(device.glob("*.json")):
            lines.append(f"* [{file.name}](results/{device.name}/{file.name}) ({file.stat().st_size / 1024:.0f} KiB)")
        lines.append("")
    return "\n".join(lines)


def _examples(folder: Path) -> str:
    lines = [
        "# Examples",
        "",
        "The losses in other people's training loops: scripts of `examples/`, each run by a test.",
        "",
    ]
    for file in sorted(folder.glob("*.py")):
        lines += [f"## {file.name}", "", "```python", file.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)
