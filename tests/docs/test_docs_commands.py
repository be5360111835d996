"""Every command that README and the docs show exists: verbs, flags and recipes by the CLI's own parser, targets of make, extras."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT, Block, blocks_of, commands_of, parse_only

from xdfast.recipes import recipe_path


def shell_pages() -> list[str]:
    return [page for page in [*PAGES, "CONTRIBUTING.md"] if any(b.language == "bash" for b in blocks_of(page))]


@pytest.mark.parametrize("page", shell_pages())
def test_commands_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    checked = 0
    for block in blocks_of(page):
        if block.language == "bash":
            for line, words in commands_of(block):
                try:
                    check(words)
                except (Exception, SystemExit) as error:
                    raise AssertionError(
                        f"{page}:{line}: {' '.join(words)}\n{error}\n{capsys.readouterr().err}"
                    ) from error
                checked += 1
    assert checked


def check(words: list[str]) -> None:
    """Raises where a command names what is not there."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # settings of the environment before a command
        words = words[1:]
    name, *rest = words
    if name == "xdfast":
        parse_only(rest)
    elif name == "torchrun" or name.endswith("python") or name == "python3":
        if "-m" in rest:
            module = rest.index("-m") + 1
            if rest[module] == "xdfast":
                parse_only(rest[module + 1 :])
            else:
                assert importlib.util.find_spec(rest[module]), f"there is no module {rest[module]}"
        else:
            script = next(word for word in rest if not word.startswith("-"))
            assert (ROOT / script).is_file(), f"there is no file {script}"
    elif name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        for target in (word for word in rest if "=" not in word):
            assert target in targets, f"the Makefile has no target {target}"
    elif name == "bash":
        assert (ROOT / rest[0]).is_file(), f"there is no file {rest[0]}"
    elif name.endswith("pip"):
        section = (
            (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        )
        extras = re.findall(r"^(\w+) = \[", section, re.M)
        for names in re.findall(r"(?:\.|xdfast)\[([\w,]+)\]", " ".join(rest)):
            assert set(names.split(",")) <= set(extras), f"extras are {', '.join(extras)}"
    else:
        assert name in (
            "cd",
            "mkdir",
            "git",
            "ls",
            "sbatch",
            "srun",
            "unzip",
            "export",
            "source",
            ".venv/bin/pre-commit",
        ), f"unknown command {name}"


def test_recipes_named_in_the_text_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"--recipe[ =]([a-z0-9-]+)", (ROOT / page).read_text(encoding="utf-8")):
            recipe_path(name)  # raises and offers the nearest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distil --data x", "exit status 2"),
        ("distill --teacher a --student b --data x --out y --epoch 3", "refused"),
        ("distill --recipe rsd-cifar-cn --data x --out y", "no recipe|rsd-cifar-cnn"),
        ("cache inspect", "exit status 2"),
        ("evaluate --model runs/x --episodes 5", "refused"),  # a policy's option, and runs/x is no policy's run
    ],
)
def test_a_wrong_command_is_found(words: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_only(words.split())


def test_what_a_command_would_leave_tells_the_next_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        type(parse_only(["finetune", "--task", "drawer-open", "--model", "resnet18", "--out", "runs/x"])).__name__
        == "PolicyConfig"
    )
    options = parse_only(["evaluate", "--model", "runs/x", "--episodes", "5"])
    assert (type(options).__name__, options.episodes) == ("EvaluatePolicyConfig", 5)


def test_a_shell_block_is_read_as_a_shell_does() -> None:
    code = 'xdfast a "b c"   # and why\n\ntorchrun -n 2 \\\n    -m xdfast d [--out e] f…\nxdfast g --keys "state[:2]"\n'
    assert list(commands_of(Block("page", 10, "bash", code))) == [
        (10, ["xdfast", "a", "b c"]),
        (12, ["torchrun", "-n", "2", "-m", "xdfast", "d", "--out", "e", "f…"]),
        (14, ["xdfast", "g", "--keys", "state[:2]"]),
    ]
