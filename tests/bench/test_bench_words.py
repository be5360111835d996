"""Words or pictures: every sample under every task's instruction, and whose path it takes."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from vla_parts import TASKS, make_vla, task_folders

from xdfast.bench import imitation
from xdfast.bench.words import followed, main, measure
from xdfast.nn import routed_stacks
from xdfast.robot.vla import derive_student, instructions_of, save_vla

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demos(tmp_path) -> str:
    return task_folders(tmp_path / "demos")


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    vla = make_vla(sentences=[sentence for task in TASKS for sentence in instructions_of(task)], tasks=TASKS)
    save_vla(vla, tmp_path / "vla")
    return vla


def test_own_words_give_the_held_out_loss_and_other_words_another(teacher, demos, tmp_path) -> None:
    found = measure(str(tmp_path / "vla"), demos=demos)
    held = imitation.measure(str(tmp_path / "vla"), demos=demos)
    assert found["tasks"] == list(held["loss"]) and sum(found["samples"]) == held["samples"] and found["paths"] is None
    assert [found["loss"][i][i] for i in range(2)] == pytest.approx(list(held["loss"].values()), abs=1e-5)
    assert found["loss"][0][0] != found["loss"][0][1]


def test_shares_of_the_words_and_of_the_picture_by_hand() -> None:
    a, b = "10", "01"
    told = followed([[{a: 9, b: 1}, {b: 3, a: 1}], [{a: 1, "11": 3}, {b: 4}]])
    assert told["usual"] == [a, b]
    assert told["words"] == [[None, 0.75], [0.25, None]] and told["picture"] == [[None, 0.25], [0.0, None]]
    assert told["mean"] == {"words": 0.5, "picture": 0.125}
    same = followed([[{a: 4}, {a: 4}], [{a: 4}, {a: 4}]])
    assert same["mean"] == {"words": None, "picture": None} and same["words"] == [[None, None], [None, None]]


def test_paths_are_those_of_the_routed_layers(teacher, demos, tmp_path) -> None:
    student = derive_student(teacher, 0.5, always_on=(), router={"hidden": 4}).eval()
    save_vla(student, tmp_path / "routed")
    found = measure(str(tmp_path / "routed"), demos=demos)
    assert [[sum(cell.values()) for cell in row] for row in found["paths"]] == [[n, n] for n in found["samples"]]
    vla, tasks = imitation.held_out(str(tmp_path / "routed"), demos=demos, seed=5000)
    with torch.no_grad():
        for number, (_, batches) in enumerate(tasks):
            wanted: Counter[str] = Counter()
            for batch in batches:
                vla.layers(vla.embed(batch))
                on = routed_stacks(vla)[0].decision.gates.amax(2) > 0.5
                wanted.update("".join("01"[x] for x in row) for row in on.int().tolist())
            assert found["paths"][number][number] == wanted


@pytest.mark.parametrize("by_words", [True, False])
def test_a_router_that_looks_at_one_of_them(teacher, demos, tmp_path, by_words: bool, capsys, monkeypatch) -> None:
    student = derive_student(teacher, 0.5, always_on=(), router={"hidden": 4})
    save_vla(student, tmp_path / "routed")
    first = teacher.tokenizer.encode_all([instructions_of(TASKS[0])[0]], teacher.spec.text_length)
    from xdfast.bench import words

    real, batches = words.embedded, []

    def spy(vla, batch):
        told_first = (batch.instruction == first).all(1) if by_words else batch.task == 0
        batches.append(told_first)
        return real(vla, batch)

    monkeypatch.setattr(words, "embedded", spy)
    monkeypatch.setattr(
        words, "routed_stacks", lambda vla: [_Stack(batches, vla)] if hasattr(vla, "xdfast_route") else []
    )
    out, picture = tmp_path / "words.json", tmp_path / "words.png"
    runs = [str(tmp_path / "vla"), str(tmp_path / "routed")]
    assert main([*runs, "--demos", demos, "--out", str(out), "--figure", str(picture)]) == 0
    row = json.loads(out.read_text())["rows"][1]
    assert row["followed"]["mean"] == {"words": float(by_words), "picture": float(not by_words)}
    assert picture.stat().st_size > 5000 and "path of the words' task" in capsys.readouterr().out


class _Stack:
    """Says that samples told the first task's words (or showing its picture) went one way and the others another."""

    def __init__(self, batches, vla) -> None:
        self._batches, self._layers = batches, vla.num_layers

    @property
    def decision(self):
        first = self._batches[-1][:, None].float()
        gates = torch.cat([first, 1 - first, torch.ones(len(first), self._layers - 2)], 1)[..., None]
        return type("Decision", (), {"gates": gates})
