"""Files written by LeRobot, diffusion_policy's ReplayBuffer and as robomimic does: read back, whole and in order."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from robot.fixtures import demo_content as content

from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.open import open_demos

FIXTURES = Path(__file__).parent / "fixtures"
LEROBOT = ("lerobot_av1", "lerobot_h264", "lerobot_images")
ALL = (*LEROBOT, "pusht_like.zarr", "real_like.zarr.zip", "robomimic.hdf5")
NEEDS = {"lerobot": ("av", "pyarrow"), "pusht": ("zarr",), "real": ("zarr",), "robomimic": ("h5py",)}


def copy(name: str, folder: Path) -> Path:
    source = FIXTURES / name
    return Path(shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder))


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> None:
    for start, packages in NEEDS.items():
        if start in request.node.name:
            for package in packages:
                pytest.importorskip(package)


@pytest.mark.parametrize("name", LEROBOT)
def test_lerobot(name: str) -> None:
    demos = open_demos(FIXTURES / name)
    assert (demos.format, demos.task, demos.fps) == ("lerobot", "open the drawer", 10)
    assert demos.cameras == ("top", "wrist") and demos.image_sizes == content.SIZES
    assert (demos.action_dim, demos.state_dim, demos.lengths) == (4, 5, [7, 5, 12])
    for i in (2, 0, 1):  # in any order
        episode = demos.episode(i)
        assert np.array_equal(episode.actions, content.actions(i)) and np.array_equal(episode.state, content.state(i))
        for camera in content.SIZES:
            expected = content.images(i, camera)
            if name == "lerobot_images":
                assert np.array_equal(episode.images[camera], expected)
                continue
            error = episode.images[camera].astype(float) - expected
            assert np.abs(error).mean() < 5  # lossy, and colour at half the resolution
            # the red of the formula rises by 5 a frame: each frame must be the one of its step, of its own episode
            red = episode.images[camera][:, 4:-4, 4:-4, 0].mean((1, 2))
            steps = np.abs(red[:, None] - expected[:, 0, 0, 0]).argmin(1)
            assert steps.tolist() == list(range(len(episode)))


@pytest.mark.parametrize("name", ["lerobot_av1", "lerobot_h264"])
def test_lerobot_videos_as_lerobot_decodes_them(name: str) -> None:
    means = json.loads((FIXTURES / "lerobot_decoded.json").read_text())[name]
    episodes = list(open_demos(FIXTURES / name))
    for camera, expected in means.items():
        ours = np.concatenate([episode.images[camera].mean((1, 2)) for episode in episodes])
        assert (
            np.abs(ours - expected).max() < 1.5
        )  # of 255: another conversion of YUV to RGB; a neighbouring frame differs by 8


def test_pusht_like() -> None:
    demos = open_demos(FIXTURES / "pusht_like.zarr")
    assert (demos.format, demos.task, demos.fps, demos.cameras) == ("diffusion_policy", None, None, ("img",))
    for i, episode in enumerate(demos):
        assert np.array_equal(episode.images["img"], content.images(i, "top"))  # float32 of 0..255 in the file
        assert np.array_equal(episode.state, content.state(i)) and np.array_equal(episode.actions, content.actions(i))
    agent = open_demos(FIXTURES / "pusht_like.zarr", state_keys=["state[:2]", "n_contacts"])
    assert agent.state_dim == 3
    assert np.array_equal(agent.episode(2).state[:, :2], content.state(2)[:, :2])


def test_real_like() -> None:
    demos = open_demos(FIXTURES / "real_like.zarr.zip")
    assert demos.image_sizes == {"camera_0": (32, 32), "camera_1": (24, 32)}
    for i, episode in enumerate(demos):
        assert np.array_equal(episode.images["camera_0"], content.images(i, "top"))
        assert np.array_equal(episode.images["camera_1"], content.images(i, "wrist"))
        assert np.array_equal(episode.state, content.eef(i)) and np.array_equal(episode.actions, content.actions(i))
    both = open_demos(
        FIXTURES / "real_like.zarr.zip", state_keys=["robot_eef_pose", "robot_joint"], cameras=["camera_1"]
    )
    assert np.array_equal(both.episode(1).state, content.state(1))
    assert list(both.episode(1).images) == ["camera_1"]


def test_robomimic() -> None:
    demos = open_demos(FIXTURES / "robomimic.hdf5")
    assert (demos.format, demos.task, demos.fps) == ("robomimic", "Lift", 20)
    assert demos.lengths == [7, 5, 12]  # demo_2, demo_9, demo_10: by number
    for i, episode in enumerate(demos):
        assert np.array_equal(episode.images["agentview_image"], content.images(i, "top"))
        assert np.array_equal(episode.images["robot0_eye_in_hand_image"], content.images(i, "wrist"))
        quaternion = np.tile(np.float32([0, 0, 0, 1]), (len(episode), 1))
        assert np.array_equal(episode.state, np.concatenate([content.eef(i), quaternion, content.gripper(i)], 1))
        assert np.array_equal(episode.actions, content.actions(i))
        assert episode.info["reward"].tolist() == [0.0] * (len(episode) - 1) + [1.0]
    assert open_demos(FIXTURES / "robomimic.hdf5", mask="train").lengths == [7, 12]
    with pytest.raises(DemoError, match="no mask 'trian'. Did you mean 'train'"):
        open_demos(FIXTURES / "robomimic.hdf5", mask="trian")


@pytest.mark.parametrize("name", ALL)
def test_fingerprint_limit_and_pickle(name: str, tmp_path: Path) -> None:
    demos = open_demos(FIXTURES / name)
    assert open_demos(copy(name, tmp_path)).fingerprint() == demos.fingerprint()
    assert open_demos(FIXTURES / name, limit=2).fingerprint() != demos.fingerprint()
    assert open_demos(FIXTURES / name, cameras=demos.cameras[:1], state_keys=[]).fingerprint() != demos.fingerprint()
    with pytest.raises(DemoError, match="has 3 episodes, limit=4 asks for 4"):
        open_demos(FIXTURES / name, limit=4)
    copied = pickle.loads(pickle.dumps(demos))  # after use: no open file travels
    assert np.array_equal(copied.episode(1).state, demos.episode(1).state)


@pytest.mark.parametrize("name", ALL)
def test_names_that_are_not_there(name: str) -> None:
    camera = open_demos(FIXTURES / name).cameras[0]
    with pytest.raises(DemoError, match=f"Did you mean '{camera}'.*It has: "):
        open_demos(FIXTURES / name, cameras=[camera + "x"])
    with pytest.raises(
        DemoError, match=r"no 'stat' \(state_keys\).*It has: .*action|no 'stat'.*It has: .*(robot|state)"
    ):
        open_demos(FIXTURES / name, state_keys=["stat"])
    with pytest.raises(DemoError, match=r"no 'actoin' \(action_key\). Did you mean 'action"):
        open_demos(FIXTURES / name, action_key="actoin")
    assert open_demos(FIXTURES / name, state_keys=[]).episode(0).state.shape == (7, 0)


def test_pusht_like_choices_that_cannot_be() -> None:
    path = FIXTURES / "pusht_like.zarr"
    with pytest.raises(DemoError, match=r"'state' cannot be a camera, it is float32 \[24, 5\].*images: img"):
        open_demos(path, cameras=["state"])
    with pytest.raises(DemoError, match=r"'state\[2:9\]' takes columns 2 to 9 of an array that has 5"):
        open_demos(path, state_keys=["state[2:9]"])


def test_lerobot_of_an_older_version(tmp_path: Path) -> None:
    info = copy("lerobot_images", tmp_path) / "meta" / "info.json"
    info.write_text(info.read_text().replace('"v3.0"', '"v2.1"'))
    with pytest.raises(DemoError, match="LeRobotDataset v2.1.*convert_dataset_v21_to_v30"):
        open_demos(info.parent.parent)


def test_lerobot_without_its_video(tmp_path: Path) -> None:
    demos = open_demos(copy("lerobot_h264", tmp_path))
    video = demos.path / "videos" / "observation.images.wrist" / "chunk-000" / "file-001.mp4"
    video.unlink()
    demos.episode(0)  # is in the other file
    with pytest.raises(DemoError, match="episode 2, camera 'wrist': the video .*file-001.mp4 is missing"):
        demos.episode(2)


def test_lerobot_video_with_fewer_frames(tmp_path: Path) -> None:
    """The video of the whole data set replaced by one that ends 3 frames early."""
    av = pytest.importorskip("av")
    demos = open_demos(copy("lerobot_av1", tmp_path))
    video = demos.path / "videos" / "observation.images.top" / "chunk-000" / "file-000.mp4"
    frames = np.concatenate([content.images(i, "top") for i in range(3)])[:-3]
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg4", rate=content.FPS)
        stream.width = stream.height = 32
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    demos.episode(1)
    with pytest.raises(
        DemoError, match=r"episode 2, camera 'top'.*has 9 of 12 frames; the first missing one is step 9, at 2.100 s"
    ):
        demos.episode(2)


def test_lerobot_with_missing_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    demos = open_demos(copy("lerobot_images", tmp_path))
    table = demos.path / "data" / "chunk-000" / "file-000.parquet"
    rows = parquet.read_table(table)
    parquet.write_table(rows.slice(0, 20), table)
    with pytest.raises(DemoError, match="episode 2 has 8 rows .* 12 by meta/episodes"):
        demos.episode(2)
    parquet.write_table(rows.drop_columns("observation.state"), table)
    with pytest.raises(DemoError, match="no column 'observation.state'"):
        demos.episode(0)
    parquet.write_table(rows.take(list(range(23, -1, -1))), table)
    with pytest.raises(DemoError, match="frame_index .* does not count from 0 to 6"):
        demos.episode(0)
    table.unlink()
    with pytest.raises(DemoError, match="file-000.parquet is missing"):
        demos.episode(0)


def test_lerobot_with_nan_and_unequal_actions(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    demos = open_demos(copy("lerobot_images", tmp_path))
    table = demos.path / "data" / "chunk-000" / "file-000.parquet"
    rows = parquet.read_table(table)
    at = rows.schema.get_field_index("action")
    actions = rows.column("action").to_pylist()
    actions[9][3] = float("nan")  # step 2 of episode 1
    actions[20] = actions[20][:3]
    parquet.write_table(rows.set_column(at, "action", pa.array(actions, pa.list_(pa.float32()))), table)
    demos.episode(0)
    with pytest.raises(
        DemoError, match="episode 1 cannot be used: actions: nan at step 2, dimension 3.*xdfast demos check"
    ):
        demos.episode(1)
    with pytest.raises(DemoError, match="'action' has not the same number of values at each step"):
        demos.episode(2)


def test_pusht_like_with_missing_chunks(tmp_path: Path) -> None:
    """zarr reads a missing chunk as zeros: a half-copied folder must not become black pictures."""
    path = copy("pusht_like.zarr", tmp_path)
    (path / "data" / "img" / "1.0.0.0").unlink()
    with pytest.raises(DemoError, match="1 of 3 chunks of data/img are missing"):
        open_demos(path)
    assert open_demos(copy("real_like.zarr.zip", tmp_path)).lengths == [7, 5, 12]


def test_pusht_like_with_wrong_ends_and_values(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = copy("pusht_like.zarr", tmp_path)
    group = zarr.open_group(str(path), mode="r+")
    group["data/action"][8, 1] = np.nan
    with pytest.raises(DemoError, match="episode 1 cannot be used: actions: nan at step 1, dimension 1"):
        open_demos(path).episode(1)
    group["data/img"][:] = group["data/img"][:] / 255
    with pytest.raises(DemoError, match="episode 0: data/img: floats .* scaled to 0..1"):
        open_demos(path).episode(0)
    group["data/img"][0, 0, 0, 0] = 256
    with pytest.raises(DemoError, match="values go from 0 to 256"):
        open_demos(path).episode(0)
    group["meta/episode_ends"][2] = 22
    with pytest.raises(DemoError, match="data/img has 24 steps, but the episodes end at 22"):
        open_demos(path)
    group["meta/episode_ends"][1] = 3
    with pytest.raises(DemoError, match="not ascending"):
        open_demos(path)
    group["meta/episode_ends"].resize((0,))
    with pytest.raises(DemoError, match="has no episodes"):
        open_demos(path)


def test_real_like_that_must_be_unpacked(tmp_path: Path) -> None:
    outer = tmp_path / "pusht.zip"
    with zipfile.ZipFile(outer, "w") as archive:
        for file in (FIXTURES / "pusht_like.zarr").rglob("*"):
            archive.write(file, Path("pusht") / file.relative_to(FIXTURES))
    with pytest.raises(DemoError, match="unpack it"):
        open_demos(outer)


def test_robomimic_with_unlike_demonstrations(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = copy("robomimic.hdf5", tmp_path)

    def replace(name: str, values: np.ndarray) -> None:
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = values

    replace("data/demo_9/actions", np.zeros((5, 3)))
    replace("data/demo_10/obs/agentview_image", np.zeros((12, 16, 16, 3), np.uint8))
    replace("data/demo_2/obs/robot0_eef_pos", np.zeros((6, 3)))
    demos = open_demos(path)
    with pytest.raises(
        DemoError, match="demo_9 cannot be used: actions have 3 numbers a step, those of the data set 4"
    ):
        demos.episode(1)
    with pytest.raises(DemoError, match="demo_10 cannot be used: camera 'agentview_image': images are 16×16"):
        demos.episode(2)
    with pytest.raises(DemoError, match="demo_2: arrays of different lengths: .*'robot0_eef_pos': 6"):
        demos.episode(0)
    with h5py.File(path, "r+") as file:
        del file["data/demo_10/obs/robot0_eye_in_hand_image"]
        del file["data/demo_2/obs/robot0_eef_pos"], file["data/demo_2/obs/robot0_eef_quat"]
        del file["data/demo_2/obs/robot0_gripper_qpos"]
    with pytest.raises(DemoError, match="none of its arrays is known to be proprioception. .*It has: object"):
        open_demos(path)
    with pytest.raises(DemoError, match="demo_10 has no obs/robot0_eye_in_hand_image"):
        open_demos(path, state_keys=["object"]).episode(2)
    with h5py.File(path, "r+") as file:
        for name in ("agentview_image", "robot0_eye_in_hand_image"):
            del file[f"data/demo_2/obs/{name}"]
    with pytest.raises(DemoError, match="has no images.*dataset_states_to_obs.py"):
        open_demos(path)
    with h5py.File(path, "r+") as file:
        for name in list(file["data"]):
            del file["data"][name]
    with pytest.raises(DemoError, match="has no demonstrations"):
        open_demos(path)


@pytest.mark.parametrize("name", ALL)
def test_damage_is_named_or_harmless(name: str, tmp_path: Path) -> None:
    """Bytes flipped and files cut short at random: an error of ours or numbers, never another kind of error.

    These formats have no checksums (mp4, HDF5 and parquet as written by default), so not all damage can be noticed.
    """
    rng = random.Random(0)
    refused = 0
    for trial in range(30):
        (tmp_path / str(trial)).mkdir()
        path = copy(name, tmp_path / str(trial))
        ignored = ("stats.json", "tasks.parquet")
        files = (
            [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.name not in ignored)
        )
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        if trial % 3 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        file.write_bytes(data)
        try:
            for episode in open_demos(path):
                assert len(episode) > 0
        except DemoError:
            refused += 1
    assert refused > 5


def test_lerobot_that_is_only_a_description(tmp_path: Path) -> None:
    path = copy("lerobot_images", tmp_path)
    shutil.rmtree(path / "meta" / "episodes")
    with pytest.raises(DemoError, match="has no episodes"):
        open_demos(path)
    info = path / "meta" / "info.json"
    values = json.loads(info.read_text())
    values["features"] = {name: f for name, f in values["features"].items() if "images" not in name}
    shutil.copytree(FIXTURES / "lerobot_images" / "meta" / "episodes", path / "meta" / "episodes")
    info.write_text(json.dumps(values))
    with pytest.raises(DemoError, match="has no images"):
        open_demos(path)
    info.write_text("{")
    with pytest.raises(DemoError, match="info.json cannot be read"):
        open_demos(path)
