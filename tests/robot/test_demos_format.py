"""Our own format: what is written comes back, and nothing half written or damaged is taken for an episode."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.format import DemoWriter, failed_seeds
from xdfast.robot.demos.manifest import Manifest
from xdfast.robot.demos.open import open_demos

SETTINGS = {
    "task": "metaworld/drawer-open-v3",
    "cameras": {"corner2": (6, 8), "wrist": (5, 5)},
    "fps": 80,
    "action_dim": 4,
    "state_dim": 9,
    "facts": {"versions": {"mujoco": "3.3.0"}, "tail": 20, "range": (1, 2)},
}


def make_episode(seed: int, length: int = 7) -> Episode:
    rng = np.random.default_rng(seed)
    images = {
        name: rng.integers(0, 256, (length, *size, 3), dtype=np.uint8) for name, size in SETTINGS["cameras"].items()
    }
    return Episode(
        images=images,
        state=rng.normal(size=(length, 9)).astype(np.float32),
        actions=rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        success=np.arange(length) > length - 3,
        info={"obj_to_target": rng.random(length, dtype=np.float32)},
        seed=seed,
    )


def same(a: Episode, b: Episode) -> bool:
    def arrays(e: Episode) -> dict[str, np.ndarray]:
        named = {**e.images, **e.info, "state": e.state, "actions": e.actions}
        return named if e.success is None else {**named, "success": e.success}

    one, two = arrays(a), arrays(b)
    return (
        a.seed == b.seed
        and one.keys() == two.keys()
        and all(one[n].dtype == two[n].dtype and np.array_equal(one[n], two[n]) for n in one)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = DemoWriter(tmp_path / "demos", **SETTINGS)
    for index in (3, 0, 11):
        writer.write(make_episode(100 + index, length=5 + index), index=index)
    return writer.folder


def test_what_is_written_comes_back(folder: Path) -> None:
    demos = open_demos(folder)
    assert (demos.format, demos.task, demos.fps) == ("xdfast", "metaworld/drawer-open-v3", 80)
    assert demos.cameras == ("corner2", "wrist")
    assert demos.image_sizes == {"corner2": (6, 8), "wrist": (5, 5)}
    assert (demos.action_dim, demos.state_dim) == (4, 9)
    assert demos.lengths == [5, 8, 16]  # by index, whatever the order of writing
    assert demos.facts["versions"] == {"mujoco": "3.3.0"}
    for episode, index in zip(demos, (0, 3, 11)):
        assert same(episode, make_episode(100 + index, length=5 + index))
    assert same(pickle.loads(pickle.dumps(demos)).episode(1), demos.episode(1))


def test_optional_parts_and_views_in_memory(tmp_path: Path) -> None:
    writer = DemoWriter(tmp_path, task=None, cameras={"c": (4, 6)}, fps=None, action_dim=1, state_dim=0)
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)
    upright = frames.transpose(0, 2, 1, 3)[:, ::-1, ::-1]  # as a renderer's flipped picture: not contiguous
    episode = Episode({"c": upright}, np.zeros((3, 0), np.float32), np.ones((3, 1), np.float32))
    writer.write(episode, index=0)
    back = open_demos(tmp_path).episode(0)
    assert same(back, episode)
    assert back.success is None and back.seed is None and back.info == {}


def test_a_choice_of_cameras(folder: Path) -> None:
    demos = open_demos(folder, cameras=["wrist"])
    assert demos.cameras == ("wrist",)
    assert list(demos.episode(0).images) == ["wrist"]
    assert demos.fingerprint() != open_demos(folder).fingerprint()
    with pytest.raises(DemoError, match="no camera 'wrost'. Did you mean 'wrist'"):
        open_demos(folder, cameras=["wrost"])
    with pytest.raises(DemoError, match="drop state_keys"):
        open_demos(folder, state_keys=["state"])


def test_limit(folder: Path) -> None:
    assert open_demos(folder, limit=2).lengths == [5, 8]
    with pytest.raises(DemoError, match="has 3 episodes, limit=10 asks for 10"):
        open_demos(folder, limit=10)
    with pytest.raises(DemoError, match="limit=0"):
        open_demos(folder, limit=0)
    with pytest.raises(IndexError, match="has 2 episodes"):
        open_demos(folder, limit=2).episode(2)


def test_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = open_demos(folder).fingerprint()
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    for file in copy.rglob("*.safetensors"):
        os.utime(file, (1, 1))
    assert open_demos(copy).fingerprint() == first
    assert open_demos(copy, limit=2).fingerprint() != first
    changed = make_episode(111, length=16)
    changed.images["wrist"][3, 2, 2, 1] ^= 1  # one bit of one pixel
    (copy / "episodes" / "000011.safetensors").unlink()
    DemoWriter(copy, **SETTINGS).write(changed, index=11)
    assert open_demos(copy).fingerprint() != first


def test_a_folder_is_continued(folder: Path) -> None:
    writer = DemoWriter(folder, **SETTINGS)
    assert writer.done == {0: 100, 3: 103, 11: 111}
    writer.record_failure(7)
    other = DemoWriter(folder, **SETTINGS)
    other.record_failure(5)
    writer.record_failure(9)  # keeps what the other one added meanwhile
    assert DemoWriter(folder, **SETTINGS).failed == {5, 7, 9} == set(failed_seeds(folder))
    with pytest.raises(DemoError, match=r"episode 3 already \(seed 103\)"):
        writer.write(make_episode(1), index=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": 20}, "fps: 80 there, 20 now"),
        ({"task": "metaworld/reach-v3"}, 'task: "metaworld/drawer-open-v3" there, "metaworld/reach-v3" now'),
        ({"cameras": {"corner2": (6, 8), "wrist": (5, 6)}}, '"wrist": [5, 5]} there'),
        ({"cameras": {"wrist": (5, 5), "corner2": (6, 8)}}, "cameras: "),  # another order of the policy's inputs
        ({"facts": {**SETTINGS["facts"], "tail": 5}}, "facts['tail']: 20 there, 5 now"),
        ({"facts": {}}, "there, nothing now"),
    ],
)
def test_other_settings_are_refused(folder: Path, change: dict, words: str) -> None:
    with pytest.raises(DemoError, match="holds demonstrations of other settings") as error:
        DemoWriter(folder, **{**SETTINGS, **change})
    assert words in str(error.value)
    assert len(open_demos(folder)) == 3


def _faults() -> dict[str, tuple]:
    def with_(**changes):
        return lambda e: [setattr(e, name, value) for name, value in changes.items()]

    def put(array: str, at: tuple, value: float):
        return lambda e: getattr(e, array).__setitem__(at, value)

    image = np.zeros((7, 6, 8, 3), np.uint8)
    wrist = np.zeros((7, 5, 5, 3), np.uint8)
    return {
        "nan": (put("actions", (4, 2), np.nan), "actions: nan at step 4, dimension 2"),
        "inf": (put("state", (6, 8), -np.inf), "state: -inf at step 6, dimension 8"),
        "action size": (
            with_(actions=np.zeros((7, 5), np.float32)),
            "actions have 5 numbers a step, those of the data set 4",
        ),
        "state steps": (with_(state=np.zeros((6, 9), np.float32)), "state have 6 steps, the actions 7"),
        "float64": (with_(actions=np.zeros((7, 4))), "actions are float64, not float32"),
        "flat": (with_(actions=np.zeros(7, np.float32)), r"actions have the shape \[7\]"),
        "empty": (with_(actions=np.zeros((0, 4), np.float32)), "it has no steps"),
        "missing frames": (
            with_(images={"corner2": image[:5], "wrist": wrist}),
            "'corner2' has 5 frames for 7 actions",
        ),
        "no camera": (with_(images={"corner2": image}), "camera 'wrist' is missing; it has: 'corner2'"),
        "strange camera": (with_(images={"corner2": image, "wrist": wrist, "top": wrist}), "'top' is not one of"),
        "other size": (
            with_(images={"corner2": image, "wrist": image}),
            r"images are 6×8 \(height × width\), those of the data set 5×5",
        ),
        "float images": (with_(images={"corner2": image / 255, "wrist": wrist}), "images are float64, not uint8"),
        "grey": (with_(images={"corner2": image[..., 0], "wrist": wrist}), r"the shape \[7, 6, 8\], not"),
        "success": (with_(success=np.zeros(7, np.int64)), r"success is int64 \[7\], not bool"),
        "info": (with_(info={"x": np.zeros(6, np.float32)}), r"info 'x' is float32 \[6\], not float32 \[7\]"),
    }


@pytest.mark.parametrize("fault", _faults())
def test_an_unsound_episode_is_not_written(tmp_path: Path, fault: str) -> None:
    spoil, words = _faults()[fault]
    writer = DemoWriter(tmp_path, **SETTINGS)
    episode = make_episode(0)
    spoil(episode)
    with pytest.raises(DemoError, match=words):
        writer.write(episode, index=0)
    assert writer.done == {} and not list((tmp_path / "episodes").iterdir())


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    for change in (
        {"fps": 0},
        {"action_dim": 0},
        {"state_dim": 2.5},
        {"cameras": {"c": (0, 4)}},
        {"facts": {"a": object()}},
    ):
        with pytest.raises(DemoError, match=next(iter(change)).removesuffix("s")):
            DemoWriter(tmp_path / "d", **{**SETTINGS, **change})
    with pytest.raises(DemoError, match="not the index"):
        DemoWriter(tmp_path / "d", **SETTINGS).write(make_episode(0), index=-1)


def test_every_flipped_byte_is_noticed(folder: Path) -> None:
    """Hundreds of damaged copies: an error of ours, or the very same content (a flip in the header's padding)."""
    file = folder / "episodes" / "000003.safetensors"
    data, original = file.read_bytes(), open_demos(folder).episode(1)
    rng = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for trial in range(600):
        damaged = bytearray(data)
        end = header if trial % 2 else len(data)  # half of them in the header, where more can go wrong
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(end)] ^= rng.randrange(1, 256)
        if trial % 10 == 0:
            damaged = damaged[: rng.randrange(len(damaged))]
        file.write_bytes(damaged)
        try:
            episode = open_demos(folder).episode(1)
        except DemoError as error:
            assert "000003.safetensors" in str(error)
            refused += 1
        else:
            assert same(episode, original)
    assert refused > 500


def test_damaged_manifests(folder: Path) -> None:
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for damage, words in [
        (text[:40], "is damaged"),
        (text.replace("xdfast-demos", "other"), "is not a manifest"),
        (text.replace('"version": 1', '"version": 9'), "has version 9, this xdfast reads 1"),
        (text.replace('"action_dim": 4', '"action_dims": 4'), "action_dim"),
        ("[]", "is not a manifest"),
    ]:
        manifest.write_text(damage)
        with pytest.raises(DemoError, match=words):
            open_demos(folder)
    manifest.write_text(text)
    (folder / "failed.json").write_text("{")
    with pytest.raises(DemoError, match="failed.json is damaged"):
        DemoWriter(folder, **SETTINGS)


def test_wrong_paths(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DemoError, match="no such file or folder. Did you mean 'demos'"):
        open_demos(tmp_path / "demoss")
    DemoWriter(tmp_path / "empty", **SETTINGS)
    with pytest.raises(DemoError, match="has no episodes yet"):
        open_demos(tmp_path / "empty")
    (tmp_path / "file").write_text("something else")
    with pytest.raises(DemoError, match="neither HDF5"):
        open_demos(tmp_path / "file")
    with pytest.raises(DemoError, match="no folder of demonstrations that xdfast knows"):
        open_demos(tmp_path)
    with pytest.raises(DemoError, match="format='lerobott' is not known.*Did you mean 'lerobot'"):
        open_demos(folder, format="lerobott")
    with pytest.raises(DemoError, match="mask='train' is for robomimic"):
        open_demos(folder, mask="train")


WRITER = """
import sys
from pathlib import Path
sys.path.append({here!r})
import test_demos_format as parts
from xdfast.robot.demos.format import DemoWriter
writer = DemoWriter({folder!r}, **parts.SETTINGS)
print("ready", flush=True)
index = max(writer.done, default=-1)
while True:
    index += 1
    writer.write(parts.make_episode(index, length=40), index=index)
    writer.record_failure(10_000 + index)
"""


def test_a_killed_writer_leaves_whole_episodes(tmp_path: Path) -> None:
    folder = tmp_path / "demos"
    code = WRITER.format(here=str(Path(__file__).parent), folder=str(folder))
    rng = random.Random(0)
    counts = []
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.02, 0.15))
            process.send_signal(signal.SIGKILL)
        demos = open_demos(folder)
        for i, episode in enumerate(demos):
            assert same(episode, make_episode(i, length=40))
        counts.append(len(demos))
    assert counts == sorted(counts) and counts[-1] > counts[0]
    assert len(DemoWriter(folder, **SETTINGS).failed) in (counts[-1], *range(counts[-1] - 8, counts[-1]))


def test_what_a_killed_writer_left_is_swept_up(folder: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    old = folder / "episodes" / f".000004.safetensors.{int(gone.stdout)}.aside"
    young = old.with_name(f".000005.safetensors.{int(gone.stdout)}.aside")  # a process of another machine may be at it
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    DemoWriter(folder, **SETTINGS)
    assert not old.exists() and young.exists()
    assert len(open_demos(folder)) == 3


@contextlib.contextmanager
def _small_disk(path: Path, megabytes: int):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _can_mount() -> bool:
    """Root in a container often may not."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            with _small_disk(Path(folder) / "disk", 1):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@pytest.mark.skipif(not _can_mount(), reason="a small tmpfs cannot be mounted here")
def test_a_full_disk(tmp_path: Path) -> None:
    with _small_disk(tmp_path / "disk", 1):
        writer = DemoWriter(tmp_path / "disk" / "demos", **SETTINGS)
        with pytest.raises(DemoError, match="No space left.*Free some space.*unharmed"):
            for index in range(100):
                writer.write(make_episode(index, length=200), index=index)
        demos = open_demos(writer.folder)
        assert 1 <= len(demos) == len(writer.done) < 100
        for i, episode in enumerate(demos):
            assert same(episode, make_episode(i, length=200))
        assert not list((writer.folder / "episodes").glob(".*"))


def test_a_file_size_limit_is_like_a_full_disk(tmp_path: Path) -> None:
    """What can be tested everywhere: the kernel refuses to write on in the middle of an episode."""
    code = (
        "import resource, signal, sys; sys.path.append({here!r}); import test_demos_format as parts\n"
        "from xdfast.robot.demos.format import DemoWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = DemoWriter({folder!r}, **parts.SETTINGS)\n"
        "writer.write(parts.make_episode(0, length=20), index=0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "try: writer.write(parts.make_episode(1, length=200), index=1)\n"
        "except ValueError as error: print(error)\n"
    ).format(here=str(Path(__file__).parent), folder=str(tmp_path / "d"))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot write" in ran.stdout and "File too large" in ran.stdout
    assert open_demos(tmp_path / "d").lengths == [20]
    assert not list((tmp_path / "d" / "episodes").glob(".*"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match="choose another folder"):
        DemoWriter(tmp_path / "file" / "demos", **SETTINGS)


def test_manifest_keeps_tuples_equal(folder: Path) -> None:
    assert Manifest.load(folder).facts["range"] == [1, 2]  # and DemoWriter(**SETTINGS), with (1, 2), still continues
