"""Every task by name, without starting a simulator: what it is, what to do in it, and the suites the field reports.

MetaWorld's difficulty classes are those of 3D Diffusion Policy (arXiv:2403.03954, from Seo et al., arXiv:2206.14244): 28
easy, 11 medium, 6 hard and 5 very hard tasks; together they are all 50, none is without a class. (Results in papers often
leave ``push-back`` out of "hard".)
"""

from __future__ import annotations

from xdfast.errors import nearest
from xdfast.robot.sim.task import TaskSpec

__all__ = ["SUITES", "nearest_tasks", "suite", "task_names", "task_spec"]

#: Cameras of every MetaWorld scene; ``dp3`` is ``corner2`` moved closer, as 3D Diffusion Policy and later work have it.
METAWORLD_CAMERAS = ("dp3", "corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")

_EASY = {
    "button-press": "Press the button on the wall",
    "button-press-topdown": "Press the button from above",
    "button-press-topdown-wall": "Reach over the wall and press the button from above",
    "button-press-wall": "Reach around the wall and press the button",
    "coffee-button": "Press the button of the coffee machine",
    "dial-turn": "Turn the dial",
    "door-close": "Close the door",
    "door-lock": "Lock the door by turning the lock",
    "door-open": "Open the door",
    "door-unlock": "Unlock the door by turning the lock",
    "drawer-close": "Push the drawer closed",
    "drawer-open": "Pull the drawer open",
    "faucet-close": "Turn the faucet clockwise",
    "faucet-open": "Turn the faucet counter-clockwise",
    "handle-press": "Press the handle down",
    "handle-press-side": "Press the handle down from the side",
    "handle-pull": "Pull the handle up",
    "handle-pull-side": "Pull the handle up from the side",
    "lever-pull": "Pull the lever up",
    "peg-unplug-side": "Unplug the peg sideways",
    "plate-slide": "Slide the plate into the cabinet",
    "plate-slide-back": "Slide the plate back out of the cabinet",
    "plate-slide-back-side": "Slide the plate out of the cabinet sideways",
    "plate-slide-side": "Slide the plate into the cabinet sideways",
    "reach": "Reach the red goal",
    "reach-wall": "Reach around the wall to the red goal",
    "window-close": "Push the window closed",
    "window-open": "Push the window open",
}
_MEDIUM = {
    "basketball": "Dunk the basketball into the basket",
    "bin-picking": "Move the block from one bin to the other",
    "box-close": "Put the lid on the box",
    "coffee-pull": "Pull the mug away from the coffee machine",
    "coffee-push": "Push the mug under the coffee machine",
    "hammer": "Hammer the nail into the wall",
    "peg-insert-side": "Insert the peg into the hole from the side",
    "push-wall": "Push the puck around the wall to the goal",
    "soccer": "Kick the ball into the goal",
    "sweep": "Sweep the block off the table",
    "sweep-into": "Sweep the block into the hole",
}
_HARD = {
    "assembly": "Put the nut on the peg",
    "hand-insert": "Insert the gripper into the hole",
    "pick-out-of-hole": "Pick the puck out of the hole",
    "pick-place": "Pick up the puck and carry it to the goal",
    "push": "Push the puck to the goal",
    "push-back": "Pull the puck back to the goal",
}
_VERY_HARD = {
    "disassemble": "Take the nut off the peg",
    "pick-place-wall": "Pick up the puck and carry it over the wall to the goal",
    "shelf-place": "Put the block on the shelf",
    "stick-pull": "Grasp the stick and pull the thermos with it",
    "stick-push": "Grasp the stick and push the thermos with it",
}
_METAWORLD = {**_EASY, **_MEDIUM, **_HARD, **_VERY_HARD}

#: Episodes end after 200 steps, as in the field, unless experts need longer for some seeds (docs/robot-tasks.md).
_METAWORLD_STEPS = {"bin-picking": 300, "peg-insert-side": 400, "push-back": 400}

#: Task → (actions, cameras, instruction). The first camera is the one of VRL3 and 3D Diffusion Policy for that task;
#: they show ``relocate`` to three cameras around a table made invisible, here it is seen by the camera of the VIL paper.
#: (The pen scene's view_3 and view_5 look at the table from below and are left out.)
_ADROIT = {
    "door": (28, ("top", "vil_camera", "fixed"), "Undo the latch and open the door"),
    "hammer": (26, ("top", "vil_camera", "fixed"), "Pick up the hammer and drive the nail into the board"),
    "pen": (
        24,
        ("vil_camera", "fixed", "view_1", "view_2", "view_4"),
        "Turn the pen in the hand to match the target",
    ),
    "relocate": (30, ("vil_camera", "fixed"), "Pick up the ball and carry it to the target"),
}


def _metaworld(short: str) -> TaskSpec:
    return TaskSpec(
        name=f"metaworld/{short}-v3",
        simulator="metaworld",
        env=f"{short}-v3",
        action_dim=4,
        state_dim=9,
        cameras=METAWORLD_CAMERAS,
        max_steps=_METAWORLD_STEPS.get(short, 200),
        fps=80,
        has_expert=True,
        instruction=_METAWORLD[short],
    )


def _adroit(short: str) -> TaskSpec:
    actions, cameras, instruction = _ADROIT[short]
    return TaskSpec(
        name=f"adroit/{short}",
        simulator="adroit",
        env=short,
        action_dim=actions,
        state_dim=24,
        cameras=cameras,
        max_steps=200,
        fps=100,
        has_expert=False,
        instruction=instruction,
    )


_SPECS = {spec.name: spec for spec in [*map(_metaworld, _METAWORLD), *map(_adroit, _ADROIT)]}

#: Suite → canonical task names.
SUITES: dict[str, tuple[str, ...]] = {
    "metaworld-easy": tuple(f"metaworld/{t}-v3" for t in _EASY),
    "metaworld-medium": tuple(f"metaworld/{t}-v3" for t in _MEDIUM),
    "metaworld-hard": tuple(f"metaworld/{t}-v3" for t in _HARD),
    "metaworld-very-hard": tuple(f"metaworld/{t}-v3" for t in _VERY_HARD),
    "metaworld-50": tuple(f"metaworld/{t}-v3" for t in _METAWORLD),
    "adroit": tuple(f"adroit/{t}" for t in _ADROIT),
}


def task_names() -> list[str]:
    """Canonical names of all tasks, MetaWorld's first."""
    return list(_SPECS)


def _canonical(name: str) -> str | None:
    """The canonical name behind a spelling, or None."""
    simulator, slash, short = name.strip().lower().replace("_", "-").rpartition("/")
    if not slash:  # "hammer" is a task of both: MetaWorld's, as everywhere in the field; Adroit's is "adroit/hammer"
        simulator = "metaworld" if short.removesuffix("-v3") in _METAWORLD else "adroit"
    short = short.removesuffix("-v3") if simulator == "metaworld" else short
    full = f"metaworld/{short}-v3" if simulator == "metaworld" else f"{simulator}/{short}"
    return full if full in _SPECS else None


def task_spec(name: str) -> TaskSpec:
    """What is known of a task before it is started.

    Args:
        name: ``"metaworld/drawer-open-v3"``, ``"drawer-open-v3"``, ``"drawer-open"``, ``"adroit/door"``, ``"pen"``. A
            short name of both simulators (``"hammer"``) is MetaWorld's.

    Raises:
        ValueError: no such task; the message names the nearest ones and the suites.
    """
    canonical = _canonical(str(name))
    if canonical is None:
        asked = str(name).strip().lower().replace("_", "-")
        if asked in SUITES:
            raise ValueError(f"{name!r} is a suite of {len(SUITES[asked])} tasks, not a task: xdfast.robot.sim.suite")
        near = nearest_tasks(asked)
        old = " MetaWorld's tasks are here in version 3 (-v3)." if asked.endswith(("-v1", "-v2")) else ""
        raise ValueError(f"unknown task {name!r}.{near}{old} Tasks are in the suites {', '.join(SUITES)}")
    return _SPECS[canonical]


def nearest_tasks(name: str) -> str:
    """`` Did you mean 'drawer-open'?`` for a name that is almost a task's; an empty string for others."""
    spellings = [*_SPECS, *(full.partition("/")[2].removesuffix("-v3") for full in _SPECS)]
    asked = str(name).strip().lower().replace("_", "-")
    return nearest(asked.removesuffix("-v2").removesuffix("-v1"), dict.fromkeys(spellings))


def suite(name: str) -> list[str]:
    """Canonical names of a suite's tasks.

    Args:
        name: ``"metaworld-easy"``, ``"metaworld-medium"``, ``"metaworld-hard"``, ``"metaworld-very-hard"``,
            ``"metaworld-50"`` or ``"adroit"``.

    Raises:
        ValueError: no such suite.
    """
    key = str(name).strip().lower().replace("_", "-")
    if key not in SUITES:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(SUITES)}.{nearest(key, SUITES)}")
    return list(SUITES[key])
