"""Imitation of demonstrations that a policy was not trained on: its own loss, task by task."""

from __future__ import annotations

import json

import pytest
import torch
from vla_parts import TASKS, make_vla, task_folders

from xdfast.bench.imitation import main, measure
from xdfast.pipeline.vla_tasks import task_demonstrations
from xdfast.robot.vla import Observation, instructions_of, save_vla

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_is_the_policys_own_on_every_third_sample(tmp_path, capsys) -> None:
    sentences = [sentence for task in TASKS for sentence in instructions_of(task)]
    vla, demos = make_vla(sentences=sentences, tasks=TASKS), task_folders(tmp_path / "demos")
    save_vla(vla, tmp_path / "vla")
    found = measure(str(tmp_path / "vla"), demos=demos)
    assert set(found["loss"]) == set(TASKS) and found["run"] == "vla"
    assert found["mean"] == pytest.approx(sum(found["loss"].values()) / 2)

    frames = [(episode, frame) for episode in range(2) for frame in range(6)][::3]
    assert found["samples"] == 2 * len(frames)
    data = task_demonstrations(demos, TASKS[1], vla.spec.cameras, tmp_path)
    words = vla.tokenizer.encode_all([instructions_of(TASKS[1])[0]], vla.spec.text_length)
    total = 0.0
    for number, frame in frames:
        episode = data.episode(number)
        ahead = [min(frame + step, 5) for step in range(vla.spec.horizon)]  # the last action is repeated
        picture = torch.from_numpy(episode.images["dp3"][frame])[None, None, None]
        with torch.no_grad():
            tokens = vla.embed(Observation(picture, torch.from_numpy(episode.state[frame])[None, None], words))
            total += float(vla.chunk_loss(vla.layers(tokens), torch.from_numpy(episode.actions[ahead])[None]))
    assert found["loss"][TASKS[1]] == pytest.approx(total / len(frames), rel=1e-4)

    out = tmp_path / "held.json"
    assert main([str(tmp_path / "vla"), "--demos", demos, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == [found] and "vla: " in capsys.readouterr().out
