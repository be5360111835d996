"""What every distillation loss has in common, and the registry of losses."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from xdfast.errors import nearest
from xdfast.ops._checks import check_number

__all__ = ["DistillLoss", "create_loss", "list_losses", "loss_options", "parse_losses", "register_loss"]

#: Constructor arguments that are no setting of a run: the pipeline's own affair, or objects.
_NO_SETTING = frozenset({"self", "weight", "on", "return_components", "group", "ddp_average", "samples", "labels"})


class DistillLoss(nn.Module):
    """Base of the losses: ``loss(student, teacher) → scalar``, already multiplied by ``weight``.

    Attributes:
        on: what the pipeline feeds it by default: ``"features"`` (penultimate), ``"logits"``, or ``"maps"`` (of the modules
            that ``taps`` names).
        default_weight: the weight the method's paper gives the term next to the cross-entropy.
        needs: what ``forward`` takes besides, in this order: of ``"targets"`` (labels of the batch) and ``"ids"`` (position
            of each sample in the training set).
        projection: what the pipeline puts before it: ``"aad"`` (:class:`xdfast.AAD`, for features and taps), ``"contrast"``
            (heads on both sides) or ``"none"``.
        at_taps: whether it is also applied to pairs of ``taps``, if it is on features.
        at_stages: whether it is also applied to the student's taps named with ``"logits"``, through a classifier on each.
    """

    on = "features"
    default_weight = 1.0
    needs: tuple[str, ...] = ()
    projection = "aad"
    at_taps = True
    at_stages = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_number("weight", weight, minimum=0)

    def forward(self, student: Tensor, teacher: Tensor) -> Any:
        raise TypeError(f"{type(self).__name__} must define forward(student, teacher)")


_registry: dict[str, tuple[type[DistillLoss], dict[str, Any]]] = {}


def register_loss(name: str, **fixed: Any) -> Callable[[type[DistillLoss]], type[DistillLoss]]:
    """Class decorator: makes a loss available as ``create_loss(name)``; ``fixed`` are preset arguments.

    Raises:
        ValueError: the name is taken by another class.
    """

    def decorator(cls: type[DistillLoss]) -> type[DistillLoss]:
        if name in _registry and _registry[name][0] is not cls:
            raise ValueError(f"loss {name!r} is already registered by {_registry[name][0].__qualname__}")
        _registry[name] = (cls, fixed)
        return cls

    return decorator


def list_losses(pattern: str = "*") -> list[str]:
    """Names of the registered losses that match a shell pattern.

    Example:
        >>> import xdfast
        >>> xdfast.list_losses("rsd*")
        ['rsd', 'rsd-logits']
    """
    return sorted(fnmatch.filter(_registry, pattern))


def create_loss(name: str, **options: Any) -> DistillLoss:
    """A registered loss by name.

    Args:
        name: see :func:`list_losses`.
        options: constructor arguments of the loss.

    Raises:
        ValueError: unknown name (the nearest ones are offered).
        TypeError: an option the loss does not have.
    """
    if name not in _registry:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(list_losses())}.{nearest(name, _registry)}")
    cls, fixed = _registry[name]
    return cls(**{**fixed, **options})


def loss_options(name: str) -> list[str]:
    """What can be set of a loss in a run's ``loss_options``: its constructor arguments but for weight and objects.

    Raises:
        ValueError: unknown name (the nearest ones are offered).

    Example:
        >>> loss_options("dkd")
        ['alpha', 'beta', 'temperature']
    """
    if name not in _registry:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(list_losses())}.{nearest(name, _registry)}")
    return [option for option in inspect.signature(_registry[name][0].__init__).parameters if option not in _NO_SETTING]


def parse_losses(text: str) -> dict[str, float | None]:
    """Name → weight of losses joined by ``+``; None where the weight is left to the method.

    Raises:
        ValueError: unknown name (the nearest ones are offered), a name twice, or a weight that is no number ≥ 0.

    Example:
        >>> parse_losses("mse+rsd:0.001")
        {'mse': None, 'rsd': 0.001}
    """
    found: dict[str, float | None] = {}
    for part in text.split("+"):
        name, colon, weight = part.strip().partition(":")
        if name not in _registry:
            known = ", ".join(list_losses())
            raise ValueError(
                f"loss: unknown {name!r}; known: {known}, joined by +, each with :WEIGHT if wanted."
                f"{nearest(name, _registry)}"
            )
        if name in found:
            raise ValueError(f"loss: {name!r} comes twice in {text!r}")
        try:
            found[name] = check_number("weight", float(weight), minimum=0) if colon else None
        except ValueError as error:
            raise ValueError(f"loss: the weight of {name!r} must be a number ≥ 0, got {weight!r}") from error
    return found
