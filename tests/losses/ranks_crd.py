"""Checks of CRD's memory bank over ranks, run in every process of a group by tests/ranks.py."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from xdfast.losses import CRDLoss

RANK, WORLD = dist.get_rank(), dist.get_world_size()
SAMPLES, ROWS, DIM = 30, 4, 6


def batches(steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(student, teacher, ids) of all ranks together, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        ids = torch.randperm(SAMPLES, generator=generator)[: ROWS * WORLD]
        made.append((*torch.randn(2, len(ids), DIM, generator=generator), ids))
    return made


def everywhere(x: Tensor) -> list[Tensor]:
    held = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(held, x)
    return held


def check_every_rank_takes_over_all_rows() -> None:
    torch.manual_seed(0)
    shared = CRDLoss(SAMPLES, dim=DIM, negatives=5)
    expected = {side: getattr(shared, f"{side}_bank").double() for side in ("student", "teacher")}
    for student, teacher, ids in batches(3):
        mine = slice(RANK * ROWS, (RANK + 1) * ROWS)
        torch.manual_seed(100 + RANK)  # every rank draws negatives of its own
        shared(student[mine], teacher[mine], ids[mine])
        for side, rows in (("student", student), ("teacher", teacher)):
            for row, own in zip(rows.double(), ids.tolist(), strict=True):
                moved = 0.5 * expected[side][own] + 0.5 * row / row.norm()
                expected[side][own] = moved / moved.norm()
    for side, bank in expected.items():
        torch.testing.assert_close(getattr(shared, f"{side}_bank").double(), bank, rtol=1e-5, atol=1e-6)
        held = everywhere(getattr(shared, f"{side}_bank"))
        assert all(torch.equal(other, held[0]) for other in held)


def check_one_constant_from_the_first_batches_of_all_ranks() -> None:
    torch.manual_seed(0)
    shared = CRDLoss(SAMPLES, dim=DIM, negatives=5)
    alone = copy.deepcopy(shared)
    student, teacher, ids = batches(1)[0]
    mine = slice(RANK * ROWS, (RANK + 1) * ROWS)
    torch.manual_seed(100 + RANK)
    drawn = alone.draw(ids[mine])
    chosen = torch.cat((ids[mine][:, None], drawn), 1)
    torch.manual_seed(100 + RANK)
    shared(student[mine], teacher[mine], ids[mine])
    for which, (rows, bank) in enumerate(((student, alone.teacher_bank), (teacher, alone.student_bank))):
        g = torch.nn.functional.normalize(rows[mine], dim=1).double()
        mean = ((bank[chosen].double() @ g[:, :, None]).squeeze(-1) / 0.07).exp().mean()
        dist.all_reduce(mean)
        z = SAMPLES * mean / WORLD
        torch.testing.assert_close(shared.log_z[which].double(), z.log(), rtol=1e-5, atol=1e-5)


def check_ddp_leaves_the_bank_to_the_loss() -> None:
    class Task(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss = torch.nn.Linear(DIM, DIM), CRDLoss(SAMPLES, dim=DIM, negatives=5)
            self._ddp_params_and_buffers_to_ignore = [f"loss.{name}" for name, _ in self.loss.named_buffers()]

        def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
            return self.loss(self.head(student), teacher, ids)

    torch.manual_seed(0)
    task = Task()
    parallel = DistributedDataParallel(task)
    mine = slice(RANK * ROWS, (RANK + 1) * ROWS)
    for student, teacher, ids in batches(2):
        parallel(student[mine], teacher[mine], ids[mine]).backward()
    held = everywhere(task.loss.student_bank)
    assert all(torch.equal(other, held[0]) for other in held)
    assert all(torch.equal(other, everywhere(task.head.weight.grad)[0]) for other in everywhere(task.head.weight.grad))
