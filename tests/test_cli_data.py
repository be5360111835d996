"""``xdfast data check``: table, list, exit status."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from xdfast.cli import main


@pytest.fixture
def folder(tmp_path):
    """train with three good images, val with a good and a bad one."""
    for name in ("train/a/0.png", "train/a/1.png", "train/b/0.png", "val/a/0.png", "val/b/0.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10)).save(path)
    (tmp_path / "data" / "val" / "b" / "0.png").write_text("no image")
    return tmp_path / "data"


def test_both_parts_are_looked_at_and_the_bad_image_is_listed(folder, tmp_path, capsys):
    out = tmp_path / "lists" / "bad.jsonl"
    assert main(["data", "check", str(folder), "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "train" in text and "val" in text and "b/0.png: not an image" in text and "PNG RGB" in text
    (line,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert line["path"] == str(folder / "val" / "b" / "0.png") and line["part"] == "val"
    assert "not an image" in line["reason"]


def test_nothing_unreadable_is_status_0_and_an_empty_list(folder, tmp_path, capsys):
    out = tmp_path / "bad.jsonl"
    out.write_text("of an earlier check\n")
    assert main(["data", "check", str(folder / "train"), "--full", "--workers", "1", "--out", str(out)]) == 0
    assert out.read_text() == "" and "decoded" in capsys.readouterr().out


def test_shards_that_the_shell_has_listed(tmp_path, capsys):
    import tarfile

    for i in range(2):
        Image.new("RGB", (5, 5)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.cls").write_text("0")
        with tarfile.open(tmp_path / f"shard-{i}.tar", "w") as tar:
            for kind in ("png", "cls"):
                tar.add(tmp_path / f"{i}.{kind}", f"{i}.{kind}")
    assert main(["data", "check", str(tmp_path / "shard-0.tar"), str(tmp_path / "shard-1.tar"), "--no-progress"]) == 0
    assert "looked at" in (text := capsys.readouterr().out) and "2" in text


def test_ctrl_c_prints_what_was_found(folder, monkeypatch, capsys):
    from xdfast.pipeline.journal import ProgressLine

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "update", interrupt)
    assert main(["data", "check", str(folder)]) == 130
    text = capsys.readouterr()
    assert "looked at" in text.out and "found so far" in text.err


def test_wrong_calls(folder, capsys):
    assert main(["data"]) == 0 and "check DATA" in capsys.readouterr().out
    assert main(["data", "chekc"]) == 2
    assert "Did you mean 'check'" in capsys.readouterr().err
    assert main(["data", "check"]) == 1
    assert "name the data" in capsys.readouterr().err
    assert main(["data", "check", str(folder), "--out", str(folder)]) == 1
    assert "is a folder; name a file" in capsys.readouterr().err
    assert main(["data", "check", str(folder / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err
