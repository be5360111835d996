"""Barlow Twins (arXiv 2103.03230) by the same kernel as RSD."""

from __future__ import annotations

from torch import Tensor, nn

from xdfast.ops._checks import check_number
from xdfast.ops.rsd import rsd_loss

__all__ = ["BarlowTwinsLoss"]


class BarlowTwinsLoss(nn.Module):
    r"""Cross-correlation of two views pulled to the identity; call, defaults and values of lightly's class of that name.

    .. math::
        L = \sum_i (C_{ii} - 1)^2 + \lambda \sum_{i \ne j} C_{ij}^2, \quad
        C = \frac{1}{N} \hat z_a^\top \hat z_b, \quad \hat z = \frac{z - \mathrm{mean}}{\sqrt{\mathrm{var} + 10^{-5}}}
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        self.lambda_param = check_number("lambda_param", lambda_param, minimum=0)
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        loss = rsd_loss(z_b, z_a, kappa=self.lambda_param, eps=1e-5, eps_mode="var")
        assert isinstance(loss, Tensor)
        return loss
