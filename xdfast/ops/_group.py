"""Ranks of a process group that run one op together: how they are named, and how they agree before the first collective.

An op's schema has no process group in it, so a group travels as the name under which torch.distributed registers it
(``""`` is the default group) and is looked up inside the op. That is also what lets torch.compile trace over the op.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agree", "all_gather_rows", "catch", "group_name", "is_alone", "resolve"]

_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError, "RuntimeError": RuntimeError}


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name of a process group in torch.distributed's registry; ``None`` (the default group) is ``""``.

    Raises:
        TypeError: not a process group.
        ValueError: this process is no member of the group.
    """
    if group is None:
        return ""
    if isinstance(group, str):
        return group
    if isinstance(group, int) or type(group) is object or group is dist.GroupMember.NON_GROUP_MEMBER:
        # new_group() returns a marker (an int, in some versions a bare object) on every process it leaves out
        raise ValueError(
            "this process is no member of the group that was passed (torch.distributed.new_group returned its "
            "NON_GROUP_MEMBER marker here); make and call the loss on members only"
        )
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None (the default group), got {type(group).__name__}; "
            "of a DeviceMesh pass mesh.get_group()"
        )
    return name


def is_alone(name: str) -> bool:
    """Whether there is nobody to talk to: no process group, or the default group has one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    return name == "" and dist.get_world_size() == 1


def resolve(name: str) -> dist.ProcessGroup:
    """The group of that name.

    Raises:
        ValueError: there is no such group, or this process is no member of it.
    """
    if name == "":
        world = dist.group.WORLD
        if world is None:
            raise ValueError("torch.distributed is not initialised; call torch.distributed.init_process_group() first")
        return world
    lookup: Any = dist.distributed_c10d._resolve_process_group
    try:
        group: dist.ProcessGroup = lookup(name)
    except RuntimeError as error:
        raise ValueError(
            f"this process knows no process group named {name!r}: it is no member, or the group was destroyed ({error})"
        ) from None
    return group


def catch(check: Callable[[], None]) -> str:
    """Runs a check; its error as text instead of raised, so that it can be told to the other ranks; ``""`` if fine."""
    try:
        check()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def agree(group: dist.ProcessGroup, device: torch.device, rows: int, terms: str, error: str) -> list[int]:
    """Every rank's number of rows, once all ranks have said that they are about to run the same thing.

    One message of three integers. Without it a rank that raises leaves the others waiting in their next collective, and
    ranks of different shapes read past each other's memory. Synchronises the host.

    Args:
        group: all of its ranks must call this.
        device: where this rank's data are.
        rows: of this rank.
        terms: what has to be equal on all ranks, ``"name value, name value, …"``.
        error: ``"TypeError: message"`` of a check that failed on this rank, or ``""``.

    Raises:
        TypeError, ValueError: on every rank, if a rank has an error (its message is passed on).
        RuntimeError: on every rank, if ``terms`` differ.
    """
    # Over the CPU where the group can: no wait for the GPU, and ranks need not hold their data on the same device.
    on = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else _other_device(device)
    digest = int.from_bytes(hashlib.blake2b(terms.encode(), digest_size=7).digest(), "big")
    message = torch.tensor([rows, digest, bool(error)], dtype=torch.int64, device=on)
    gathered = torch.empty(3 * group.size(), dtype=torch.int64, device=on)
    dist.all_gather_into_tensor(gathered, message, group=group)
    table = gathered.view(-1, 3).tolist()
    if any(failed for _, _, failed in table) or any(other != digest for _, other, _ in table):
        _raise_everywhere(group, terms, error)
    return [count for count, _, _ in table]


def _other_device(device: torch.device) -> torch.device:
    return device if device.type != "cpu" else torch.device("cuda", torch.cuda.current_device())


def _raise_everywhere(group: dist.ProcessGroup, terms: str, error: str) -> None:
    held: list[tuple[str, str]] = [("", "")] * group.size()
    dist.all_gather_object(held, (terms, error), group=group)
    errors = {rank: text for rank, (_, text) in enumerate(held) if text}
    if errors:
        first = next(iter(errors.values()))
        kind, _, message = first.partition(": ")
        others = [r for r, text in errors.items() if text != first]
        also = f" (ranks {_listed(others)} failed too, with other errors)" if others else ""
        failed = [r for r, text in errors.items() if text == first]
        raise _ERRORS.get(kind, RuntimeError)(f"on rank {_listed(failed)} of the group: {message}{also}")
    parts = [text.split(", ") for text, _ in held]
    common = set(parts[0]).intersection(*parts[1:])
    kinds: dict[str, list[int]] = {}
    for rank, own in enumerate(parts):
        kinds.setdefault(", ".join(part for part in own if part not in common), []).append(rank)
    differ = "; ".join(f"rank {_listed(ranks)}: {text}" for text, ranks in kinds.items())
    raise RuntimeError(
        f"ranks of the group must call the loss with the same width, dtype, device type and options, got {differ}; "
        "build the model and the loss the same way on every rank"
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def all_gather_rows(x: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks, each rank's padded with zero rows to ``most``. x [n, D] → [ranks · most, D]."""
    if x.shape[0] < most:
        x = torch.cat([x, x.new_zeros(most - x.shape[0], x.shape[1])])
    gathered = x.new_empty(group.size() * most, x.shape[1])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered
