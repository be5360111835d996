"""finetune and evaluate for policies that are told what to do: trained, continued, evaluated per task; bad input is told."""

from __future__ import annotations

import pytest
import torch
from sim_process import needs_renderer
from vla_parts import TASKS, task_folders

import xdfast
from xdfast.cli import _names
from xdfast.pipeline import VLAConfig
from xdfast.pipeline.folder import load_run
from xdfast.pipeline.vla_tasks import task_demonstrations
from xdfast.robot.demos.format import DemoFolder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "crop": 20, "width": 32, "layers": 2, "heads": 2, "horizon": 8, "n_action": 4, "text_length": 8, "batch_size": 8,
    "steps": 6, "warmup_steps": 1, "log_every": 2, "progress": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> str:
    return task_folders(tmp_path_factory.mktemp("demos"))


@pytest.fixture(scope="module")
def run(demos, tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("runs") / "vla"
    return xdfast.finetune("test_resnet", tasks=["drawer-open", "drawer-close"], demos=demos, out=str(out), **SMALL)


def test_a_run_is_trained_kept_and_found_again(run, demos) -> None:
    assert run.kind == "vla" and run.metrics["tasks"] == 2 and run.metrics["steps"] == 6
    assert [row["step"] for row in run.history if row["kind"] == "train"] == [2, 4, 6]
    vla = load_run(run.path).policy
    assert vla.spec.tasks == TASKS and not vla.training
    again = xdfast.finetune(
        "test_resnet", tasks=["drawer-open", "drawer-close"], demos=demos, out=str(run.path), **SMALL
    )
    assert again.metrics == run.metrics
    with pytest.raises(AttributeError, match=r"it has a .policy, no .student"):
        _ = run.student


def test_an_interrupted_run_ends_with_the_same_weights(run, demos, tmp_path, monkeypatch) -> None:
    settings = {**SMALL, "checkpoint_seconds": 0.0, "out": str(tmp_path / "vla"), "demos": demos}
    from xdfast.pipeline import vla_task

    forward, calls = vla_task.VLATask.forward, []

    def failing(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(vla_task.VLATask, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        xdfast.finetune("test_resnet", tasks=["drawer-open", "drawer-close"], **settings)
    monkeypatch.setattr(vla_task.VLATask, "forward", forward)
    again = xdfast.finetune("test_resnet", tasks=["drawer-open", "drawer-close"], **settings)
    mine, theirs = again.policy.state_dict(), run.policy.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_it_learns_what_the_sentence_says(demos, tmp_path) -> None:
    settings = {**SMALL, "steps": 120, "lr": 3e-3, "ema": None}
    run = xdfast.finetune(
        "test_resnet", tasks=["drawer-open", "drawer-close"], demos=demos, out=str(tmp_path / "vla"), **settings
    )
    losses = [row["loss"] for row in run.history if row["kind"] == "train"]
    assert losses[-1] < 0.3 * losses[0]
    vla = run.policy
    images = torch.zeros(1, 1, 1, 24, 24, 3, dtype=torch.uint8)
    signs = [
        float(vla.instructed(text).act(images, torch.zeros(1, 1, 9))[0, 0, 0])
        for text in ("Open the drawer", "Close the drawer")
    ]
    assert signs[0] > 0.2 and signs[1] < -0.2


@needs_renderer
def test_it_is_evaluated_in_each_of_its_tasks(run, tmp_path) -> None:
    options = {"episodes": 1, "max_steps": 6, "progress": False, "device": "cpu", "eval_seed": 7, "videos": 1}
    with pytest.raises(ValueError, match="knows 2 tasks; name one: task='metaworld/drawer-open-v3'"):
        xdfast.evaluate(run, **options)
    result = xdfast.evaluate(run, task="drawer-close", **options)
    assert result.task == "metaworld/drawer-close-v3" and result.path == run.path / "tasks" / "drawer-close-v3"
    assert (result.path / "evaluation.json").is_file() and result.saliency == "" and len(result.videos) == 1
    with pytest.raises(ValueError, match="leave out which='best'"):
        xdfast.evaluate(run, task="drawer-close", which="best", **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks must be a list"),
        ({"tasks": ["drawer-opn"]}, "drawer-open"),
        ({"tasks": ["drawer-open", "metaworld/drawer-open-v3"]}, "names metaworld/drawer-open-v3 twice"),
        ({"n_action": 9}, "n_action .9. must not exceed horizon .8."),
        ({"objective": "l2"}, "objective must be one of l1, smooth_l1"),
        ({"wdith": 3}, "no setting 'wdith'. Did you mean 'width'"),
        ({"demos": "0"}, "demos must be a number"),
        ({"demo_noise": 1.5}, "demo_noise must be from 0 to 1, got 1.5"),
        ({"tasks": ["drawer-open", "door-open"]}, "has no folder door-open-v3 with the demonstrations"),
        ({"data": "images"}, "not from data and val_data"),
    ],
)
def test_bad_settings_are_told_before_any_training(demos, tmp_path, settings, message) -> None:
    given = {
        "tasks": ["drawer-open", "drawer-close"],
        "demos": demos,
        "out": str(tmp_path / "vla"),
        **SMALL,
        **settings,
    }
    with pytest.raises(ValueError, match=message):
        xdfast.finetune("test_resnet", **given)


def test_the_command_line_knows_it_by_its_tasks() -> None:
    assert _names(["--tasks", "a", "b"], "tasks") and not _names(["--task", "a"], "tasks")
    assert VLAConfig.from_dict({"tasks": ["a"], "out": "x"}).tasks == ("a",)


@needs_renderer
def test_an_experts_noisy_episodes_lie_apart(tmp_path) -> None:
    options = {"cameras": ("dp3",), "out": tmp_path / "vla", "image_size": 24, "workers": 1, "progress": False}
    clean, noisy = (task_demonstrations("1", "coffee-button", demo_noise=noise, **options) for noise in (0.0, 0.2))
    assert [d.path.name for d in (clean, noisy)] == [
        "coffee-button-v3-24px-dp3-seed0", "coffee-button-v3-24px-dp3-seed0-noise0.2",
    ]  # fmt: skip
    assert [DemoFolder(d.path).facts["noise"] for d in (clean, noisy)] == [0.0, 0.2]
    assert clean.fingerprint() != noisy.fingerprint()
