"""Checking, converting and showing demonstrations, and the command line around it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdfast import cli
from xdfast.robot.demos.check import check_demos
from xdfast.robot.demos.convert import convert_demos, resize_frames
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.episode_file import write_episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.format import DemoWriter
from xdfast.robot.demos.open import open_demos
from xdfast.robot.demos.sheet import contact_sheet

FIXTURES = Path(__file__).parent / "fixtures"


def make_episode(seed: int, length: int = 30) -> Episode:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (length, 3)).astype(np.float32)
    actions[:, 2] = -1  # a gripper that stays open
    return Episode(
        images={"c": rng.integers(30, 256, (length, 12, 16, 3), dtype=np.uint8)},
        state=rng.normal(size=(length, 2)).astype(np.float32),
        actions=actions,
        success=np.arange(length) == length - 1,
        seed=seed,
    )


def write(folder: Path, *episodes: Episode) -> Path:
    """Also unsound ones, which a DemoWriter refuses."""
    DemoWriter(folder, task="t", cameras={"c": (12, 16)}, fps=20, action_dim=3, state_dim=2)
    for index, episode in enumerate(episodes):
        write_episode(folder / "episodes" / f"{index:06d}.safetensors", episode, index)
    return folder


def test_sound_demonstrations_have_no_problems(tmp_path: Path) -> None:
    episodes = [make_episode(seed) for seed in range(4)]
    seen: list[tuple[int, int]] = []
    report = check_demos(open_demos(write(tmp_path, *episodes)), progress=lambda *at: seen.append(at))
    assert report.problems == []
    assert report.notes == ["action dimensions [2] never change"]
    assert (report.episodes, report.read, report.steps, report.successes) == (4, 4, 120, 4)
    actions = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    assert np.allclose(report.actions.low, actions.min(0)) and np.allclose(report.actions.mean, actions.mean(0))
    assert np.allclose(report.brightness["c"], np.mean([e.images["c"].mean() for e in episodes]))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def _spoilt() -> dict[str, tuple[Episode, str]]:
    good = make_episode(9)

    def changed(array: str, step: int, value: float, column: int = 1) -> Episode:
        values = getattr(good, array).copy()
        values[step, column] = value
        return replace(good, **{array: values})

    black = good.images["c"].copy()
    black[[4, 20]] = 1
    still = np.repeat(good.images["c"][:1], 30, 0)
    return {
        "nan": (changed("actions", 3, np.nan), "actions: nan at step 3, dimension 1"),
        "inf": (changed("state", 0, np.inf), "state: inf at step 0, dimension 1"),
        "far": (
            changed("state", 7, 1e4),
            "state: 10000 at step 7, dimension 1, is far out of range: 98 % of all values are",
        ),
        "black": (replace(good, images={"c": black}), "camera 'c': 2 of 30 images are black, the first at step 4"),
        "still": (replace(good, images={"c": still}), "camera 'c': all 30 images are the same"),
        "twice": (replace(make_episode(2), seed=77), "the same episode as "),
        "frames": (replace(good, images={"c": good.images["c"][:-2]}), "camera 'c' has 28 frames for 30 actions"),
        "size": (replace(good, images={"c": good.images["c"][:, :-1]}), "images are 11×16"),
        "action": (
            replace(good, actions=good.actions[:, :2]),
            "actions have 2 numbers a step, those of the data set 3",
        ),
    }


@pytest.mark.parametrize("fault", _spoilt())
def test_every_fault_is_found_and_placed(tmp_path: Path, fault: str) -> None:
    spoilt, words = _spoilt()[fault]
    folder = write(tmp_path, *(make_episode(seed) for seed in range(4)), spoilt, make_episode(5))
    report = check_demos(open_demos(folder))
    assert len(report.problems) == 1
    assert words in report.problems[0].what
    assert report.problems[0].where == str(folder / "episodes" / "000004.safetensors")


def test_damaged_files_and_useless_actions(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_episode(0), make_episode(1))
    file = folder / "episodes" / "000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    report = check_demos(open_demos(folder))
    assert report.read == 1 and "does not match its checksum" in report.problems[0].what
    same = [replace(make_episode(s), actions=np.zeros((30, 3), np.float32)) for s in range(2)]
    report = check_demos(open_demos(write(tmp_path / "b", *same)))
    assert [p.what for p in report.problems] == ["all actions are the same: there is nothing to learn"]


def test_notes(tmp_path: Path) -> None:
    wild = replace(make_episode(0), success=np.zeros(30, bool))
    wild.actions[5:20, 1] = 3.0
    report = check_demos(open_demos(write(tmp_path, wild, make_episode(1))))
    assert report.problems == [] and report.successes == 1
    assert "action dimensions [1] go beyond [-1, 1]; the policy normalises them" in report.notes
    assert "1 of 2 episodes never report success" in report.notes


def test_convert_goes_on_where_it_stopped(tmp_path: Path) -> None:
    demos = open_demos(write(tmp_path / "a", *(make_episode(seed) for seed in range(3))))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_demos(demos, tmp_path / "b", progress=stop)
    first = tmp_path / "b" / "episodes" / "000000.safetensors"
    before = first.stat().st_mtime_ns
    assert sorted(convert_demos(demos, tmp_path / "b").done) == [0, 1, 2]
    assert first.stat().st_mtime_ns == before
    back = open_demos(tmp_path / "b")
    assert all(np.array_equal(back.episode(i).images["c"], demos.episode(i).images["c"]) for i in range(3))
    assert back.episode(2).seed == 2 and back.facts["source"]["fingerprint"] == demos.fingerprint()
    with pytest.raises(DemoError, match="other settings"):
        convert_demos(demos, tmp_path / "b", image_size=8)
    with pytest.raises(DemoError, match="is the source itself"):
        convert_demos(demos, tmp_path / "a")
    with pytest.raises(DemoError, match="image_size=0"):
        convert_demos(demos, tmp_path / "c", image_size=0)


def test_convert_refuses_unsound_episodes(tmp_path: Path) -> None:
    bad = make_episode(1)
    bad.actions[2, 0] = np.nan
    demos = open_demos(write(tmp_path / "a", make_episode(0), bad))
    with pytest.raises(DemoError, match="000001.safetensors cannot be used: actions: nan at step 2"):
        convert_demos(demos, tmp_path / "b")


def test_resizing_averages() -> None:
    """Antialias: a fine checkerboard becomes grey, and does not survive as whichever pixels were hit."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(board[None, :, :, None], 3, 3)
    small = resize_frames(frames, (16, 8))
    assert small.shape == (1, 16, 8, 3)
    assert np.abs(small.astype(int) - 127).max() < 12
    assert resize_frames(frames, (64, 64)) is frames


def test_contact_sheet(tmp_path: Path) -> None:
    demos = open_demos(write(tmp_path / "a", *(make_episode(seed) for seed in range(3))))
    out = contact_sheet(demos, tmp_path / "sheets" / "a.png", rows=2, columns=5, height=48)
    sheet = np.asarray(Image.open(out))
    left, wide = 84, 64 + 4  # the label; a picture of 12×16 at 48 pixels and a gap
    assert sheet.shape == (2 * (48 + 4) + 4, left + 5 * wide + 4, 3)
    for row in range(2):
        frames = resize_frames(demos.episode(row).images["c"], (48, 64))
        for column, step in enumerate((0, 7, 14, 22, 29)):
            top, start = 4 + row * 52, left + column * wide
            assert np.array_equal(sheet[top : top + 48, start : start + 64], frames[step])
    with pytest.raises(DemoError, match="not the name of a PNG"):
        contact_sheet(demos, tmp_path / "a.jpg")
    with pytest.raises(DemoError, match="at least 1 row, 2 columns"):
        contact_sheet(demos, tmp_path / "a.png", columns=1)


def test_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = str(write(tmp_path / "a", *(make_episode(seed) for seed in range(3))))
    assert cli.main(["demos", "info", folder, "--fingerprint"]) == 0
    shown = capsys.readouterr().out
    assert "3 of 30 to 30 steps" in shown and open_demos(folder).fingerprint() in shown and "12 × 16" in shown
    assert cli.main(["demos", "check", folder, "--out", str(tmp_path / "check.json")]) == 0
    assert "never change" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["steps"] == 90
    assert cli.main(["demos", "convert", folder, str(tmp_path / "b"), "--image-size", "8", "--limit", "2"]) == 0
    assert open_demos(tmp_path / "b").image_sizes == {"c": (8, 8)} and len(open_demos(tmp_path / "b")) == 2
    assert cli.main(["demos", "convert", folder, str(tmp_path / "d"), "--image-size", "8", "6"]) == 0
    assert open_demos(tmp_path / "d").image_sizes == {"c": (8, 6)}
    assert cli.main(["demos", "show", folder, "--out", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").is_file()
    bad = make_episode(4)
    bad.actions[1, 1] = np.inf
    capsys.readouterr()
    assert cli.main(["demos", "check", str(write(tmp_path / "c", make_episode(0), bad))]) == 1
    assert "actions: inf at step 1, dimension 1" in capsys.readouterr().out


def test_cli_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demos"]) == 0
    assert "convert SRC DST" in capsys.readouterr().out
    assert cli.main(["demos", "chek", "x"]) == 2
    assert "Did you mean 'check'" in capsys.readouterr().err
    assert cli.main(["demos", "info", str(tmp_path / "nothing")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert cli.main(["demos", "convert", str(tmp_path), str(tmp_path / "b"), "--image-size", "1", "2", "3"]) == 1
    assert "height and width, not 3 numbers" in capsys.readouterr().err


def test_cli_reads_a_foreign_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zarr")
    source = str(FIXTURES / "pusht_like.zarr")
    assert cli.main(["demos", "info", source, "--state-keys", "state[:2]", "n_contacts"]) == 0
    shown = capsys.readouterr().out
    assert "diffusion_policy" in shown and "state[0:2]" in shown and "3 numbers" in shown
    assert cli.main(["demos", "convert", source, str(tmp_path / "b"), "--state-keys", "state[:2]"]) == 0
    assert open_demos(tmp_path / "b").state_dim == 2


def test_cli_lists_tasks_of_a_suite(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["demos", "tasks", "adroit"]) == 0
    told = capsys.readouterr().out
    assert "adroit/pen" in told and "metaworld/" not in told and "metaworld-easy" in told
    assert cli.main(["demos", "tasks"]) == 0 and "metaworld/stick-pull-v3" in capsys.readouterr().out
    assert cli.main(["demos", "tasks", "adroid"]) == 1 and "Did you mean 'adroit'" in capsys.readouterr().err


def test_cli_collect_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    collect = pytest.importorskip("xdfast.robot.demos.collect")
    calls, signature = [], inspect.signature(collect.collect)

    def record(**options):
        signature.bind(**options)  # what collect() itself accepts; its own tests run it
        calls.append(options)
        return collect.Collected(Path("d"), 3, (5,), 100, 1.0, 1)

    monkeypatch.setattr(collect, "collect", record)
    args = ["demos", "collect", "metaworld/reach-v3", "d", "--episodes", "3", "--cameras", "a", "b", "--workers", "1"]
    assert cli.main([*args, "--noise", "0.1", "--no-progress"]) == 0
    assert "3 episodes in d, the expert failed on 1 seeds" in capsys.readouterr().out
    assert calls == [
        {
            "task": "metaworld/reach-v3",
            "out": "d",
            "episodes": 3,
            "image_size": 96,
            "cameras": ("a", "b"),
            "seed": 0,
            "workers": 1,
            "tail": 20,
            "noise": 0.1,
            "progress": False,
        }
    ]


def test_nothing_here_imports_torch() -> None:
    """Collection runs in processes that render; Triton, which torch and diffusers bring, crashes beside software OpenGL."""
    code = (
        "import sys, xdfast.robot.demos.open, xdfast.robot.demos.check, xdfast.robot.demos.convert, xdfast.robot.demos.sheet\n"
        "print([m for m in ('torch', 'triton', 'diffusers', 'h5py', 'zarr', 'av', 'pyarrow') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
