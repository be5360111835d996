r"""Short convolutions of channels-last rows with what follows them, for inference on the CPU.

.. math::
    y = a(x)\,(1 + s) + t + r, \qquad a(x) = \mathrm{mish}(\mathrm{GroupNorm}(W * x + b)) \;\text{ or }\; W * x + b

A denoiser of robot actions is two dozen such layers over 4 to 16 rows, called ten times a decision: general convolutions spend
more time on their way to the product than in it. Here windows are read in place, weights come in panels of the vector unit's
width, and norm, activation, FiLM and residual are done while the sums are in the first-level cache (csrc/cpu/conv_rows.cpp).
There is no gradient: training runs the modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xdfast.ops._extension import cpp_available
from xdfast.ops.conv_rows.reference import conv_rows_reference

__all__ = ["PackedRows", "conv_rows", "conv_rows_available", "conv_rows_reference", "pack_rows", "pack_rows_transposed"]

#: Output channels of a panel (kPanel in csrc/cpu/conv_rows.cpp).
PANEL = 16


@dataclass(frozen=True)
class PackedRows:
    """A convolution's weights as the kernel reads them.

    Attributes:
        panels: float32 [⌈O/16⌉, K·I, 16].
        bias: float32 [⌈O/16⌉ · 16], zeros behind the O that count; or None.
        outputs: O.
        kernel, stride, padding: K rows wide.
        norm: (groups, weight [O], bias [O], ε) of the GroupNorm that follows, with Mish after it; or None.
    """

    panels: Tensor
    bias: Tensor | None
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    norm: tuple[int, Tensor, Tensor, float] | None = None


def conv_rows_available() -> tuple[bool, str]:
    """Whether the kernel is at hand, and what it is or why not."""
    found, why = cpp_available("cpu")
    if found and not hasattr(torch.ops.xdfast_c, "conv_rows"):
        return False, "extension xdfast._C is of an older xdfast; rebuild it: pip install --no-build-isolation ."
    return found, "short convolutions with norm, activation and FiLM in one pass (xdfast._C)" if found else why


def pack_rows(
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    norm: tuple[int, Tensor, Tensor, float] | None = None,
) -> PackedRows:
    """Weights [O, I, K] of a convolution, its bias [O] and its norm (see :class:`PackedRows`), copied."""
    outputs, inputs, kernel = weight.shape
    spare = -outputs % PANEL
    rows = F.pad(weight.detach().float().permute(2, 1, 0).reshape(kernel * inputs, outputs), (0, spare))
    panels = rows.unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()
    padded = None if bias is None else F.pad(bias.detach().float(), (0, spare))
    if norm is not None:
        groups, gain, offset, eps = norm
        norm = groups, gain.detach().float().clone(), offset.detach().float().clone(), eps
    return PackedRows(panels, padded, outputs, kernel, stride, padding, norm)


def pack_rows_transposed(weight: Tensor, bias: Tensor | None) -> PackedRows:
    """Weights [I, O, 4] of a transposed convolution with stride 2 and padding 1, which doubles the rows.

    Output row 2j is ``x[j − 1] W₃ + x[j] W₁``, row 2j + 1 is ``x[j] W₂ + x[j + 1] W₀``: a convolution of three rows with 2·O
    outputs, whose result [B, H, 2·O] is [B, 2·H, O] in memory.

    Raises:
        ValueError: another kernel than 4.
    """
    if weight.shape[2] != 4:
        raise ValueError(f"a transposed convolution that doubles the rows has kernel 4, got {weight.shape[2]}")
    w0, w1, w2, w3 = weight.detach().transpose(0, 1).unbind(2)  # [O, I] each
    none = torch.zeros_like(w0)
    both = torch.cat([torch.stack([w3, w1, none], 2), torch.stack([none, w2, w0], 2)])
    return pack_rows(both, None if bias is None else bias.detach().repeat(2), padding=1)


def conv_rows(
    x: Tensor, packed: PackedRows, *, film: Tensor | None = None, film_offset: int = 0, residual: Tensor | None = None
) -> Tensor:
    """See the module; without a gradient.

    Args:
        x: float32 [B, H, I], contiguous.
        packed: from :func:`pack_rows`.
        film: float32 [B, F]; s are its O columns from ``film_offset`` on, t the next O.
        residual: r, float32 like the output.

    Returns:
        float32 [B, ⌊(H + 2·padding − K) / stride⌋ + 1, O]. NaN stays NaN within its window and norm group.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.

    Reference:
        The block of Diffusion Policy's denoiser, Chi et al., RSS 2023, arXiv 2303.04137, §IV-A.
    """
    groups, gain, offset, eps = packed.norm or (0, None, None, 0.0)
    return torch.ops.xdfast_c.conv_rows(
        x, packed.panels, packed.bias, packed.outputs, packed.kernel, packed.stride, packed.padding,
        groups, gain, offset, eps, film, film_offset, residual,
    )  # fmt: skip
