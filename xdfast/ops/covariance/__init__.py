"""VICReg's loss as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from xdfast.ops._checks import check_matrix, check_number, check_pair
from xdfast.ops._group import catch, is_alone
from xdfast.ops.covariance.op import variance_covariance_op

__all__ = ["vicreg_loss"]


def vicreg_loss(
    z_a: Tensor,  # [N, D]
    z_b: Tensor,  # [N, D]
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    gather_distributed: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    r"""Variance-invariance-covariance regularisation of two views.

    .. math::
        L = \lambda \, \mathrm{MSE}(z_a, z_b) + \frac{\mu}{2} [V(z_a) + V(z_b)] + \nu [K(z_a) + K(z_b)], \quad
        V(z) = \frac{1}{D} \sum_j \max(0, 1 - \sqrt{\mathrm{var}_j + \varepsilon}), \quad
        K(z) = \frac{1}{D} \sum_{i \ne j} C_{ij}^2, \quad C = \frac{\bar z^\top \bar z}{N - 1}

    with :math:`\bar z` = z − mean and the unbiased variance. K and its gradient come from the N×N matrix
    :math:`\bar z \bar z^\top` when N < D: 4 N² D FLOPs and O(N D) memory instead of 4 N D² and O(D²). K is then a
    difference, ‖C‖² − Σ C_jj²: it loses digits where a few columns have nearly all of the variance (a ratio of standard
    deviations of 100 costs up to 4 of float32's 7), and none in the range VICReg keeps embeddings in, std near 1.
    Inputs of half precision are computed in float32, inside and outside autocast.

    Args:
        z_a, z_b: embeddings of the two views. Both get a gradient where they require one.
        lambda_param, mu_param, nu_param: weights ≥ 0 of invariance, variance and covariance.
        gather_distributed: V and K of the rows of all ranks of the default process group (the MSE stays the rank's
            own). Ranks may hold different numbers of rows. The gradient of V and K is multiplied by the number of
            ranks, which DistributedDataParallel divides out again. Without a process group it changes nothing.
            Communication: as in :func:`xdfast.ops.rsd.rsd_loss_distributed`, per view and with one matrix of rows;
            nothing in backward.
        eps: ε > 0, under the root.

    Shape:
        z_a, z_b: [N, D], N ≥ 2, any floating dtype. Output: scalar, float32 (float64 if an input is).

    Raises:
        TypeError: not tensors, integer or complex dtype, a weight that is not a number.
        ValueError: not 2-D (pool dense features first), N < 2, shapes or devices that differ, a weight < 0, ε ≤ 0.
            Among several ranks an error is raised on all of them.
        RuntimeError: ranks disagree on width, dtypes or weights; a second derivative over several ranks.

    Reference:
        Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        ICLR 2022, arXiv 2105.04906.

    Example:
        >>> import torch
        >>> from xdfast.ops.covariance import vicreg_loss
        >>> z_a, z_b = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128, requires_grad=True)
        >>> vicreg_loss(z_a, z_b).backward()
    """
    lambda_param = check_number("lambda_param", lambda_param, minimum=0)
    mu_param = check_number("mu_param", mu_param, minimum=0)
    nu_param = check_number("nu_param", nu_param, minimum=0)
    eps = check_number("eps", eps, minimum=0, strict=True)

    def check() -> None:
        check_matrix("z_a", z_a, min_rows=2)
        check_matrix("z_b", z_b, min_rows=2)
        check_pair("z_a", z_a, "z_b", z_b, fix="both views must come from the same projection head")

    over_ranks = gather_distributed and not is_alone("")
    error = ""
    if over_ranks:
        error = catch(check)  # raised by the op, on all ranks
        if error:
            z_a = z_b = torch.empty(0, 1)
    else:
        check()
    grads = torch.is_grad_enabled()
    regularisers = [
        variance_covariance_op(z, mu_param / 2, nu_param, eps, grads and z.requires_grad, over_ranks, error)[0]
        for z in (z_a, z_b)
    ]
    dtype = torch.promote_types(regularisers[0].dtype, regularisers[1].dtype)
    # Subtracted before the product with itself and in full precision: mse_loss is not on autocast's list for the CPU.
    invariance = (z_a.to(dtype) - z_b.to(dtype)).square().mean()
    return lambda_param * invariance + regularisers[0] + regularisers[1]
