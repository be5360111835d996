"""Video files: what is written is what is read, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from PIL import Image, ImageSequence

from xdfast.robot.video import read_video, write_gif, write_mp4


def _film(frames: int, height: int, width: int) -> list[np.ndarray]:
    """A bright bar that moves over a gradient."""
    film = []
    for number in range(frames):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[..., 1] = np.linspace(0, 200, width, dtype=np.uint8)
        frame[:, (2 * number) % width :][:, :6] = 255
        film.append(frame)
    return film


@pytest.mark.parametrize("size", [(96, 96), (95, 97), (2, 2)])
def test_mp4_there_and_back(tmp_path: Path, size: tuple[int, int]):
    film = _film(12, *size)
    path = write_mp4(tmp_path / "new" / "film.mp4", iter(film), 80)
    frames, fps = read_video(path)
    assert fps == 80 and frames.dtype == np.uint8
    assert frames.shape == (12, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    error = np.abs(frames[:, : size[0], : size[1]].astype(int) - np.stack(film))
    assert error.mean() < (8 if size[0] > 2 else 90)  # 4:2:0 halves the colours: a 2x2 picture has one
    assert [p.name for p in path.parent.iterdir()] == ["film.mp4"]


def test_gif_keeps_its_speed(tmp_path: Path):
    path = write_gif(tmp_path / "film.gif", _film(40, 32, 32), 80)
    with Image.open(path) as gif:
        frames = list(ImageSequence.Iterator(gif))
        seconds = sum(frame.info["duration"] for frame in frames) / 1000
    assert len(frames) == 20 and abs(seconds - 40 / 80) < 0.15


def test_a_failure_leaves_no_file_and_the_old_one_in_place(tmp_path: Path):
    path = write_mp4(tmp_path / "film.mp4", _film(3, 16, 16), 10)
    before = path.read_bytes()

    def broken():
        yield from _film(2, 16, 16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mp4(path, broken(), 10)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_bad_input_is_named(tmp_path: Path, write):
    path = tmp_path / f"a.{write.__name__[-3:]}"
    frame = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="no frames"):
        write(path, [], 10)
    with pytest.raises(ValueError, match=r"frame 1 is \(8, 6, 3\), the ones before it \(8, 8, 3\)"):
        write(path, [frame, frame[:, :6]], 10)
    with pytest.raises(ValueError, match=r"frame 0 is float64 \(8, 8, 3\), not uint8"):
        write(path, [frame / 255.0], 10)
    with pytest.raises(ValueError, match="fps=0"):
        write(path, [frame], 0)
    with pytest.raises(ValueError, match="must end in"):
        write(tmp_path / "a.txt", [frame], 10)
    assert not list(tmp_path.iterdir())


def test_reading_what_is_not_a_video(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no video"):
        read_video(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"not a video at all")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(tmp_path / "a.mp4")
