"""What a robot is told: sentences for every simulated task, and the words a policy knows as numbers.

The first sentence of a task is that of :func:`xdfast.robot.sim.names.task_spec`; the others say the same in other words, so
that a policy does not learn one string by heart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from xdfast.errors import nearest
from xdfast.robot.sim.names import task_spec

__all__ = ["PAD", "UNK", "Tokenizer", "instructions_of", "words_of"]

PAD, UNK = "<pad>", "<unk>"

_WORD = re.compile(r"[^\W_]+")

#: MetaWorld task → other words for its instruction.
_OTHERS: dict[str, tuple[str, ...]] = {
    # easy
    "button-press": ("Push the button in", "Move to the wall and press its button", "Press the red button"),
    "button-press-topdown": ("Push the button down from above", "Press down on the button", "Press the top button"),
    "button-press-topdown-wall": (
        "Press down on the button behind the wall",
        "Go over the wall and push the button down",
        "Push the button behind the wall from above",
    ),
    "button-press-wall": (
        "Press the button behind the wall",
        "Go around the wall and push the button in",
        "Push the button that the wall hides",
    ),
    "coffee-button": (
        "Push the button on the coffee machine",
        "Start the coffee machine with its button",
        "Make coffee: press the button",
    ),
    "dial-turn": ("Rotate the dial", "Turn the dial around", "Give the dial a turn"),
    "door-close": ("Shut the door", "Push the door shut", "Swing the door closed"),
    "door-lock": ("Lock the door", "Turn the lock so that the door is locked", "Rotate the lock to lock the door"),
    "door-open": ("Pull the door open", "Open the door by its handle", "Swing the door open"),
    "door-unlock": (
        "Unlock the door",
        "Turn the lock so that the door is unlocked",
        "Rotate the lock to unlock the door",
    ),
    "drawer-close": ("Close the drawer", "Shut the drawer", "Push the drawer shut"),
    "drawer-open": ("Open the drawer", "Pull the drawer out", "Take the handle and open the drawer"),
    "faucet-close": ("Close the faucet", "Shut the tap", "Turn off the faucet"),
    "faucet-open": ("Open the faucet", "Open the tap", "Turn on the faucet"),
    "handle-press": ("Push the handle down", "Press down on the handle", "Lower the handle"),
    "handle-press-side": (
        "Push the handle down from the side",
        "Press down on the handle at the side",
        "Lower the handle from the side",
    ),
    "handle-pull": ("Lift the handle", "Pull up the handle", "Raise the handle"),
    "handle-pull-side": (
        "Lift the handle from the side",
        "Pull up the handle at the side",
        "Raise the handle from the side",
    ),
    "lever-pull": ("Lift the lever", "Raise the lever", "Pull up on the lever"),
    "peg-unplug-side": ("Pull the peg out sideways", "Take the peg out of the box", "Unplug the peg from its side"),
    "plate-slide": ("Push the plate into the cabinet", "Slide the plate forward", "Move the plate into the cabinet"),
    "plate-slide-back": (
        "Pull the plate back out of the cabinet",
        "Slide the plate backward",
        "Get the plate back out of the cabinet",
    ),
    "plate-slide-back-side": (
        "Pull the plate out of the cabinet sideways",
        "Slide the plate back to the side",
        "Get the plate sideways out of the cabinet",
    ),
    "plate-slide-side": (
        "Push the plate sideways into the cabinet",
        "Slide the plate to the side",
        "Move the plate sideways into the cabinet",
    ),
    "reach": ("Move the gripper to the red goal", "Go to the red goal", "Reach for the goal"),
    "reach-wall": (
        "Move the gripper around the wall to the goal",
        "Go to the red goal behind the wall",
        "Reach the goal beyond the wall",
    ),
    "window-close": ("Close the window", "Shut the window", "Slide the window shut"),
    "window-open": ("Open the window", "Slide the window open", "Move the window until it is open"),
    # medium
    "basketball": ("Put the ball into the basket", "Throw the basketball through the hoop"),
    "bin-picking": ("Take the block out of its bin and put it into the other", "Carry the block to the other bin"),
    "box-close": ("Close the box with its lid", "Cover the box"),
    "coffee-pull": ("Pull the mug off the coffee machine", "Take the mug from the coffee machine"),
    "coffee-push": ("Put the mug under the coffee machine", "Push the mug to the coffee machine"),
    "hammer": ("Drive the nail into the wall", "Take the hammer and hit the nail"),
    "peg-insert-side": ("Put the peg into the hole from the side", "Plug the peg in sideways"),
    "push-wall": ("Push the puck past the wall to the goal", "Bring the puck around the wall"),
    "soccer": ("Push the ball into the goal", "Score a goal with the ball"),
    "sweep": ("Push the block off the table", "Wipe the block from the table"),
    "sweep-into": ("Push the block into the hole", "Sweep the block along the table until it falls into the hole"),
    # hard
    "assembly": ("Put the nut over the peg", "Assemble the nut and the peg"),
    "hand-insert": ("Put the gripper into the hole", "Reach into the hole"),
    "pick-out-of-hole": ("Take the puck out of the hole", "Lift the puck from the hole"),
    "pick-place": ("Take the puck to the goal", "Pick the puck and place it at the goal"),
    "push": ("Slide the puck to the goal", "Push the puck onto the goal"),
    "push-back": ("Drag the puck back to the goal", "Push the puck backward to the goal"),
    # very hard
    "disassemble": ("Remove the nut from the peg", "Lift the nut off its peg"),
    "pick-place-wall": ("Carry the puck over the wall", "Lift the puck over the wall and place it at the goal"),
    "shelf-place": ("Place the block on the shelf", "Take the block and set it on the shelf"),
    "stick-pull": ("Pull the thermos with the stick", "Use the stick to pull the thermos"),
    "stick-push": ("Push the thermos with the stick", "Use the stick to push the thermos"),
}


def instructions_of(task: str) -> tuple[str, ...]:
    """Sentences that ask for a task, the usual one first.

    Args:
        task: a name as :func:`xdfast.robot.sim.names.task_spec` takes it.

    Raises:
        ValueError: no such task; the nearest are named.

    Example:
        >>> instructions_of("drawer-open")[:2]
        ('Pull the drawer open', 'Open the drawer')
    """
    spec = task_spec(task)
    others = _OTHERS.get(spec.env.removesuffix("-v3"), ()) if spec.simulator == "metaworld" else ()
    return (spec.instruction, *others)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; a hyphen ends a word, an apostrophe does not.

    Example:
        >>> words_of("Turn the faucet counter-clockwise!")
        ['turn', 'the', 'faucet', 'counter', 'clockwise']
    """
    return _WORD.findall(text.lower().replace("'", "").replace("\u2019", ""))


class Tokenizer:
    """Words to numbers by a fixed list, which is saved with the policy; the same text always gives the same numbers.

    Args:
        vocabulary: all words in order; the first two are ``<pad>`` and ``<unk>``.

    Raises:
        ValueError: the list does not begin so, or has a word twice.

    Example:
        >>> tokenizer = Tokenizer.of(["Open the drawer", "Close the door"])
        >>> tokenizer.vocabulary
        ('<pad>', '<unk>', 'close', 'door', 'drawer', 'open', 'the')
        >>> tokenizer.encode("Open the blue door.", 6)
        tensor([5, 6, 1, 3, 0, 0])
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        if self.vocabulary[:2] != (PAD, UNK):
            raise ValueError(f"a vocabulary begins with {PAD!r} and {UNK!r}, got {list(self.vocabulary[:2])}")
        self._numbers = {word: number for number, word in enumerate(self.vocabulary)}
        if len(self._numbers) != len(self.vocabulary):
            twice = sorted({word for word in self.vocabulary if self.vocabulary.count(word) > 1})
            raise ValueError(f"a vocabulary has every word once; twice are: {', '.join(twice)}")

    @classmethod
    def of(cls, sentences: Iterable[str]) -> Tokenizer:
        """One that knows exactly the words of some sentences, in alphabetical order."""
        return cls((PAD, UNK, *sorted({word for sentence in sentences for word in words_of(sentence)})))

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str, length: int) -> Tensor:
        """Numbers of the words of a sentence, filled up with ``<pad>``, int64 ``[length]``; words not known are ``<unk>``.

        Args:
            text: the instruction.
            length: T_text, tokens for which the policy was made.

        Raises:
            ValueError: no word in it, more words than ``length``, or not one that is known.
            TypeError: no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"an instruction is a string, got {type(text).__name__}")
        words = words_of(text)
        if not words:
            raise ValueError(f"the instruction {text!r} is empty; say in words what to do")
        if len(words) > length:
            raise ValueError(
                f"the instruction has {len(words)} words, the policy takes {length} (text_length): {text!r:.120}"
            )
        numbers = [self._numbers.get(word, 1) for word in words]
        if set(numbers) == {1}:
            near = nearest(words[-1], self.vocabulary[2:])
            raise ValueError(
                f"no word of the instruction {text!r} is known to the policy, which learned {len(self) - 2}.{near}"
            )
        return torch.tensor(numbers + [0] * (length - len(numbers)))

    def encode_all(self, texts: Sequence[str], length: int) -> Tensor:
        """Several sentences, int64 ``[B, length]``; errors as in :meth:`encode`."""
        if not texts:
            raise ValueError("there is no instruction to encode")
        return torch.stack([self.encode(text, length) for text in texts])

    def decode(self, numbers: Iterable[int]) -> str:
        """The words behind some numbers, for people; without padding."""
        return " ".join(self.vocabulary[int(number)] for number in numbers if int(number) != 0)
