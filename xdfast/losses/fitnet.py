"""FitNet: hints, the distance of inner feature maps (arXiv 1412.6550)."""

from __future__ import annotations

from torch import Tensor

from xdfast.losses._inputs import full_precision
from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_choice, check_pair

__all__ = ["FitNetLoss"]


@register_loss("fitnet")
class FitNetLoss(DistillLoss):
    r"""Half the squared distance between the teacher's hint layer and the regressed guided layer of the student.

    .. math::
        L = \frac{w}{2 N P} \sum_n \lVert u_h(x_n) - r(v_g(x_n)) \rVert^2

    with P the number of values per sample. The paper has no 1/P: ``reduction="sample"`` gives exactly its equation. r is
    :class:`xdfast.nn.HintRegressor`; with ``xdfast.distill(loss="fitnet", taps={"layer2": "blocks.5"})`` each tap gets one,
    and both maps are averaged to the coarser grid of the two (a teacher of patches and a student of pixels need not have the
    same). The paper trains on hints first and on logits afterwards; here the terms are summed, as later work does.

    Args:
        weight: w ≥ 0.
        reduction: ``"mean"`` over samples and values, or ``"sample"`` (mean over samples, sum over values).
        grid: places per side at which ``xdfast.distill`` compares maps, if that is coarser than both are; None: as fine as
            the coarser one.

    Shape:
        student, teacher: [N, …] of one shape with two to four dimensions, N ≥ 1. Output: scalar; float32 for half inputs.

    Raises:
        ValueError, TypeError: shapes or devices differ, no sample or value, not floating point; an option out of range.

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550, equation 3.

    Example:
        >>> import torch, xdfast
        >>> student, teacher = torch.randn(4, 64, 8, 8), torch.randn(4, 192, 8, 8)
        >>> regressor = xdfast.nn.HintRegressor(64, 192, grid=8)
        >>> xdfast.create_loss("fitnet")(regressor(student), teacher).backward()
    """

    on = "maps"

    def __init__(self, weight: float = 1.0, reduction: str = "mean", grid: int | None = None) -> None:
        super().__init__(weight)
        self.reduction = check_choice("reduction", reduction, ("mean", "sample"))
        if grid is not None and (isinstance(grid, bool) or not isinstance(grid, int) or grid < 1):
            raise ValueError(f"grid must be an integer ≥ 1 (places per side) or None, got {grid!r}")
        self.grid = grid

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        for name, x in (("student", student), ("teacher", teacher)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor of shape [N, …], got {type(x).__name__}")
            if not x.dtype.is_floating_point:
                raise TypeError(f"{name} must be floating point, got {x.dtype}; use {name}.float()")
            if not 2 <= x.dim() <= 4 or 0 in x.shape:
                raise ValueError(
                    f"{name} must be vectors [N, D], tokens [N, T, D] or maps [N, D, H, W] with at least one sample and "
                    f"value, got {list(x.shape)}"
                )
        check_pair("student", student, "teacher", teacher, fix="regress the student's maps (xdfast.nn.HintRegressor)")
        squared = (full_precision(student) - full_precision(teacher)).square().flatten(1)
        distance = squared.mean() if self.reduction == "mean" else squared.sum(1).mean()
        return distance * (self.weight / 2)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, reduction={self.reduction!r}, grid={self.grid}"
