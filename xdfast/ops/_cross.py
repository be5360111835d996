r"""C = Σ_ranks TᵀS of row-sharded matrices, its norm, and the products TC and SCᵀ that its gradient needs.

Every rank holds rows T, S [n, D] of the whole (scaled so that C needs no factor) and wants only the products' own rows:

    own rows of U = T C,   of V = S Cᵀ,   the diagonal of C,   Σ_{i≠j} C_ij²,   f_j = Σ_i C_ij²,   f'_i = Σ_j C_ij²

A, all-reduce C: 2 D² elements sent and received in a ring, 2 n D² FLOPs for C and 2 n D² for each product. Row and column
sums of C² need no further communication. The diagonal is taken out of C before the products: what is left of it after the
callers' own terms is often a small difference.

B, all-gather the rows: 2 N D elements, U = (T_own T_allᵀ) S_all, 4 n N D FLOPs a product, no D×D matrix. The other
bracket, T_own (T_allᵀ S_all), costs 2 D² (N + n) > 4 n N D since n ≤ N < D; with both products it is still the dearer one
from two ranks on. f_j = Σ_i S_ij U_ij is a sum over all rows: one all-reduce of D numbers, since a rank that took it from the
gathered rows would have to compute all N rows of U, N/n times the FLOPs. The diagonal travels in the same message.

A is taken iff ranks · (rows of the largest rank) ≥ D, where it sends less, computes no more, and where B would lose the
off-diagonal part: ‖C‖² − Σ C_jj² cancels, unless rank(C) < N is well below D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xdfast.ops._group import all_gather_rows

__all__ = ["Cross", "column_dots", "cross_products"]


class Cross(NamedTuple):
    """What :func:`cross_products` returns; sums over ranks except for ``u`` and ``v``.

    Attributes:
        u, v: own rows of T C and S Cᵀ [n, D], of C without its diagonal if not ``inside``; None if not wanted.
        inside: whether the diagonal is part of ``u``, ``v``, ``column_sums`` and ``row_sums``.
        diagonal: C_jj [D], from unrounded operands.
        decorrelation: Σ_{i≠j} C_ij², a scalar.
        column_sums, row_sums: Σ_i C_ij² = Σ_rows S_ij U_ij and Σ_j C_ij² = Σ_rows T_ij V_ij [D]; empty without ``u``, ``v``.

    The last four are float64.
    """

    u: Tensor | None
    v: Tensor | None
    inside: bool
    diagonal: Tensor
    decorrelation: Tensor
    column_sums: Tensor
    row_sums: Tensor


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """Σₙ x[n, d] · y[n, d] → [D], float64."""
    return (x * y).sum(0).double()


def cross_products(
    s: Tensor,  # [n, D]
    t: Tensor,  # [n, D]; the same object as s for a covariance
    need_u: bool,
    need_v: bool,
    precision: str,
    group: dist.ProcessGroup | None,
    most: int,
) -> Cross:
    """The products of the module docstring; ``group=None`` is one process alone.

    Args:
        s, t: own rows, float32 or float64. Zero rows contribute nothing.
        need_u, need_v: which products are wanted.
        precision: operands of the matrix products are rounded to it; the diagonal is not touched by that.
        group, most: the ranks, and the number of rows of the largest of them.
    """
    ranks = 1 if group is None else group.size()
    if ranks * most >= s.shape[1]:
        return _all_reduce_c(s, t, need_u, need_v, precision, group)
    return _all_gather_rows(s, t, need_u, need_v, precision, group, most)


def _rounded(x: Tensor, precision: str) -> Tensor:
    half = x.dtype == torch.float32 and precision in ("bfloat16", "float16")
    return x.to(getattr(torch, precision)) if half else x


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in fp32 or fp64 and returned in ``dtype``; operands are rounded already."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)  # on the CPU the result is rounded once more


def _all_reduce_c(
    s: Tensor, t: Tensor, need_u: bool, need_v: bool, precision: str, group: dist.ProcessGroup | None
) -> Cross:
    d = s.shape[1]
    s_low = _rounded(s, precision)
    t_low = s_low if t is s else _rounded(t, precision)
    message = s.new_empty(d * d + d)  # C and its exact diagonal in one all-reduce
    c, diagonal = message[: d * d].view(d, d), message[d * d :]
    if s_low.dtype == s.dtype:
        torch.mm(t.T, s, out=c)
    else:
        c.copy_(_mm(t_low.T, s_low, s.dtype))
    torch.sum(t * s, 0, out=diagonal)
    if group is not None:
        dist.all_reduce(message, group=group)

    c.diagonal().zero_()
    c_low = _rounded(c, precision)
    u = _mm(t_low, c_low, s.dtype) if need_u else None
    v = _mm(s_low, c_low.T, s.dtype) if need_v else None
    c.square_()
    columns = c.sum(0).double()
    none = columns.new_empty(0)
    rows = c.sum(1).double() if need_v else none
    return Cross(u, v, False, diagonal.double(), columns.sum(), columns if need_u else none, rows)


def _all_gather_rows(
    s: Tensor, t: Tensor, need_u: bool, need_v: bool, precision: str, group: dist.ProcessGroup | None, most: int
) -> Cross:
    d = s.shape[1]
    s_low = _rounded(s, precision)
    t_low = s_low if t is s else _rounded(t, precision)
    s_all, t_all = s_low, t_low
    if group is not None and t is s:
        s_all = t_all = all_gather_rows(s_low, most, group)
    elif group is not None:
        s_all, t_all = all_gather_rows(torch.cat([s_low, t_low], 1), most, group).split(d, 1)

    u = v = None
    sums = [column_dots(t, s)]
    if need_u or not need_v:  # without gradients the norm is still wanted: it comes with U
        u = _mm(_rounded(_mm(t_low, t_all.T, s.dtype), precision), s_all, s.dtype)
        sums.append(column_dots(s, u))
    if need_v:
        v = _mm(_rounded(_mm(s_low, s_all.T, s.dtype), precision), t_all, s.dtype)
        sums.append(column_dots(t, v))
    message = torch.stack(sums)
    if group is not None:
        dist.all_reduce(message, group=group)
    diagonal = message[0]
    none = diagonal.new_empty(0)
    return Cross(
        u if need_u else None,
        v,
        True,
        diagonal,
        message[1].sum() - diagonal.square().sum(),
        message[1] if need_u else none,
        message[-1] if need_v else none,
    )
