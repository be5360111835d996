"""Names, tables and suites: what they say is what the simulators are."""

from __future__ import annotations

import pytest
from sim_process import needs_renderer, run_python

from xdfast.robot.sim.make import check_cameras, check_image_size
from xdfast.robot.sim.names import SUITES, suite, task_names, task_spec


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [
        ("metaworld/drawer-open-v3", "metaworld/drawer-open-v3"),
        ("drawer-open-v3", "metaworld/drawer-open-v3"),
        ("drawer-open", "metaworld/drawer-open-v3"),
        ("metaworld/drawer-open", "metaworld/drawer-open-v3"),
        (" Drawer_Open ", "metaworld/drawer-open-v3"),
        ("adroit/door", "adroit/door"),
        ("pen", "adroit/pen"),
        ("hammer", "metaworld/hammer-v3"),
        ("adroit/hammer", "adroit/hammer"),
    ],
)
def test_spellings(asked: str, canonical: str):
    assert task_spec(asked).name == canonical


@pytest.mark.parametrize(
    ("asked", "near"),
    [("draw-open", "drawer-open"), ("metaworld/pick-plce-v3", "pick-place"), ("adroit/doors", "door")],
)
def test_a_typo_names_the_nearest_tasks_and_the_suites(asked: str, near: str):
    with pytest.raises(ValueError, match="unknown task") as caught:
        task_spec(asked)
    message = str(caught.value)
    assert repr(asked) in message and near in message and "Did you mean" in message and "metaworld-easy" in message


def test_old_versions_and_suites_in_place_of_a_task_are_explained():
    with pytest.raises(ValueError, match=r"drawer-open.*version 3"):
        task_spec("drawer-open-v2")
    with pytest.raises(ValueError, match="is a suite of 4 tasks"):
        task_spec("adroit")


def test_suites_of_the_field():
    sizes = {name: len(suite(name)) for name in SUITES}
    assert sizes == {
        "metaworld-easy": 28,
        "metaworld-medium": 11,
        "metaworld-hard": 6,
        "metaworld-very-hard": 5,
        "metaworld-50": 50,
        "adroit": 4,
    }
    classes = [t for name in ("easy", "medium", "hard", "very-hard") for t in suite(f"metaworld-{name}")]
    assert sorted(classes) == sorted(suite("metaworld-50"))  # every task is in exactly one class
    assert sorted(task_names()) == sorted([*classes, *suite("adroit")])
    with pytest.raises(ValueError, match=r"unknown suite 'metaworld-esy'.*Did you mean 'metaworld-easy'"):
        suite("metaworld-esy")


def test_specs_are_complete():
    for name in task_names():
        spec = task_spec(name)
        assert spec.instruction and spec.cameras and spec.fps > 0 and spec.max_steps >= 200
        assert spec.has_expert == (spec.simulator == "metaworld")


def test_bad_cameras_and_sizes():
    spec = task_spec("drawer-open")
    assert check_cameras(spec, None) == ("dp3",)
    assert check_cameras(spec, ["corner", "dp3"]) == ("corner", "dp3")
    with pytest.raises(ValueError, match=r"no camera 'corner9'.*Did you mean 'corner"):
        check_cameras(spec, ("corner9",))
    with pytest.raises(ValueError, match=r"tuple of names: cameras=\('dp3',\)"):
        check_cameras(spec, "dp3")
    with pytest.raises(ValueError, match="is empty"):
        check_cameras(spec, ())
    with pytest.raises(ValueError, match="each camera once"):
        check_cameras(spec, ("dp3", "dp3"))
    for size in (0, -1, 7, 4096, 96.0, True, "96"):
        with pytest.raises(ValueError, match="image_size="):
            check_image_size(size)


_TABLES = """
import json
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from xdfast.robot.sim.names import task_names, task_spec
from xdfast.robot.sim.make import make_task
specs = [task_spec(name) for name in task_names()]
ours = {s.env for s in specs if s.simulator == "metaworld"}
problems = sorted(ours ^ set(ALL_V3_ENVIRONMENTS)) + sorted(ours ^ set(ENV_POLICY_MAP))
for spec in specs:
    if spec.simulator == "metaworld" and spec.env not in ("drawer-open-v3", "assembly-v3"):
        continue  # one class for all: the slow test starts each of them
    task = make_task(spec, 16)
    env = task._env
    task.reset(0)
    found = (env.action_space.shape, task.state().shape, str(task.state().dtype), round(1 / env.dt), env.action_space.low.min())
    if found != ((spec.action_dim,), (spec.state_dim,), "float32", spec.fps, -1.0):
        problems.append([spec.name, str(found)])
    names = {env.model.camera(i).name for i in range(env.model.ncam)}
    extra = set(spec.cameras) - names - {"dp3", "top"}
    if extra:
        problems.append([spec.name, sorted(extra)])
    task.close()
print(json.dumps(problems))
"""


@needs_renderer
def test_tables_agree_with_the_installed_simulators():
    assert run_python(_TABLES) == []
