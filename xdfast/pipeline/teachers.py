"""Several teachers as one: each looks at the batch in its own way, live or from its own cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xdfast.data import Batch, ImageLoader
from xdfast.data.batches import BatchPlan
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher

__all__ = ["Teachers"]


class Teachers:
    """Members in order; the outputs of the second and further ones have ``N:`` before their kind (``"2:features"``).

    Args:
        members: two or more.
        loader: of the training views, where members read caches.
    """

    def __init__(self, members: Sequence[LiveTeacher | CachedTeacher], loader: ImageLoader | None = None) -> None:
        self.members = tuple(members)
        self._watches = [member.fetch_ahead for member in self.members if isinstance(member, CachedTeacher)]
        if loader is not None and self._watches:
            loader.watch = self._fetch_ahead  # each member took the place of the one before

    def begin_epoch(self, epoch: int) -> None:
        """See :meth:`LiveTeacher.begin_epoch`."""
        for member in self.members:
            member.begin_epoch(epoch)

    def targets(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The outputs of all members, see :meth:`LiveTeacher.targets`."""
        found: dict[str, Tensor] = {}
        for number, member in enumerate(self.members, 1):
            of = "" if number == 1 else f"{number}:"
            found |= {of + kind: value for kind, value in member.targets(images, batch).items()}
        return found

    def close(self) -> None:
        """Closes all members."""
        for member in self.members:
            member.close()

    def _fetch_ahead(self, plan: BatchPlan) -> None:
        for watch in self._watches:
            watch(plan)
