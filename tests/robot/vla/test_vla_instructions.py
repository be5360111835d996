"""Sentences of the tasks, and words as numbers."""

from __future__ import annotations

import doctest

import pytest

from xdfast.robot.sim.names import suite, task_names, task_spec
from xdfast.robot.vla import Tokenizer, VLASpec, compact, instructions
from xdfast.robot.vla.instructions import _OTHERS, instructions_of, words_of


def test_every_task_has_instructions_and_no_two_tasks_share_one() -> None:
    found = {task: instructions_of(task) for task in task_names()}
    assert all(found[task][0] == task_spec(task).instruction for task in found)
    metaworld = suite("metaworld-50")
    assert {f"metaworld/{short}-v3" for short in _OTHERS} == set(metaworld)
    assert all(len(found[task]) >= 4 for task in suite("metaworld-easy"))
    assert all(len(found[task]) >= 3 for task in metaworld)
    sentences = [" ".join(words_of(text)) for task in metaworld for text in found[task]]
    assert len(sentences) == len(set(sentences))
    assert max(len(words_of(text)) for text in sentences) <= VLASpec.text_length
    assert not any(text.endswith(".") or text != text.strip() for task in metaworld for text in found[task])


def test_a_task_is_named_as_anywhere() -> None:
    assert instructions_of("drawer-open") == instructions_of("metaworld/drawer-open-v3")
    with pytest.raises(ValueError, match="unknown task 'drawr-open'. Did you mean 'drawer-open'"):
        instructions_of("drawr-open")


def test_words_have_fixed_numbers_and_case_and_punctuation_do_not_matter() -> None:
    tokenizer = Tokenizer.of(["Turn the robot's dial", "turn it counter-clockwise!"])
    assert tokenizer.vocabulary[:2] == ("<pad>", "<unk>") and len(tokenizer) == 9
    same = [tokenizer.encode(text, 5).tolist() for text in ("turn the ROBOTS dial", "  Turn, the robot\u2019s (dial)?")]
    assert same[0] == same[1] and same[0][4] == 0 and 1 not in same[0]
    assert tokenizer.decode(same[0]) == "turn the robots dial"
    assert tokenizer.encode("turn the wheel", 3).tolist()[2] == 1
    again = Tokenizer(tokenizer.vocabulary)
    assert again.encode_all(["turn it", "dial"], 4).tolist() == tokenizer.encode_all(["turn it", "dial"], 4).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the instruction '' is empty; say in words"),
        (" ?! ", "is empty"),
        ("open the drawer and then close it", r"has 7 words, the policy takes 5 \(text_length\)"),
        ("opne drawr", r"no word of the instruction 'opne drawr' is known .* learned 3. Did you mean 'drawer'"),
    ],
)
def test_bad_instructions(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.of(["Open the drawer"]).encode(text, 5)


def test_bad_vocabularies_and_types() -> None:
    with pytest.raises(ValueError, match="begins with '<pad>' and '<unk>'"):
        Tokenizer(["open", "the"])
    with pytest.raises(ValueError, match="twice are: open"):
        Tokenizer(["<pad>", "<unk>", "open", "open"])
    tokenizer = Tokenizer.of(["Open the drawer"])
    with pytest.raises(TypeError, match="an instruction is a string, got int"):
        tokenizer.encode(3, 5)
    with pytest.raises(ValueError, match="no instruction to encode"):
        tokenizer.encode_all([], 5)


def test_examples_in_docstrings_run() -> None:
    for module in (instructions, compact):
        assert doctest.testmod(module).failed == 0
