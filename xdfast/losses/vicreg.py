"""VICReg (arXiv 2105.04906) with a covariance term that forms no D×D matrix for N < D."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from xdfast.ops._checks import check_number
from xdfast.ops.covariance import vicreg_loss

__all__ = ["VICRegLoss"]


class VICRegLoss(nn.Module):
    r"""Variance-invariance-covariance loss of two views; call, defaults and values of lightly's class of that name.

    .. math::
        L = \lambda \, \mathrm{MSE}(z_a, z_b) + \frac{\mu}{2} [V(z_a) + V(z_b)] + \nu [K(z_a) + K(z_b)]

    V is the mean hinge max(0, 1 − √(var + ε)) of the columns, K the mean over columns of the squared off-diagonal
    covariances; :func:`xdfast.ops.covariance.vicreg_loss` has the equations. Differences to lightly: embeddings are
    [N, D] only, half inputs are computed in float32 and give a float32 loss, bad input raises ValueError or TypeError.

    Args:
        lambda_param, mu_param, nu_param: weights ≥ 0 of invariance, variance and covariance.
        gather_distributed: V and K of the rows of all ranks; see the function.
        eps: ε > 0.

    Shape:
        z_a, z_b: [N, D], N ≥ 2, any floating dtype. Output: scalar, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`xdfast.ops.covariance.vicreg_loss`; here at construction for bad
            options, and RuntimeError for ``gather_distributed`` in a torch without torch.distributed.

    Reference:
        Bardes, Ponce, LeCun, ICLR 2022, arXiv 2105.04906.

    Example:
        >>> import torch, xdfast
        >>> criterion = xdfast.VICRegLoss()
        >>> z_a, z_b = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128, requires_grad=True)
        >>> criterion(z_a, z_b).backward()
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.lambda_param = check_number("lambda_param", lambda_param, minimum=0)
        self.mu_param = check_number("mu_param", mu_param, minimum=0)
        self.nu_param = check_number("nu_param", nu_param, minimum=0)
        self.eps = check_number("eps", eps, minimum=0, strict=True)
        if gather_distributed and not dist.is_available():
            raise RuntimeError(
                "gather_distributed=True needs torch.distributed, which this torch was built without; "
                "use gather_distributed=False or another build of torch"
            )
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return vicreg_loss(
            z_a,
            z_b,
            lambda_param=self.lambda_param,
            mu_param=self.mu_param,
            nu_param=self.nu_param,
            gather_distributed=self.gather_distributed,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param:g}, mu_param={self.mu_param:g}, nu_param={self.nu_param:g}, "
            f"gather_distributed={self.gather_distributed}, eps={self.eps:g}"
        )
