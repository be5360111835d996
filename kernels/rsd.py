"""RSD loss and gradients on CUDA in three launches: standardise, multiply, differentiate. The host side.

No D×D matrix when N < D, no host synchronisation, no memset, no floating-point atomics: it can be captured in a CUDA
graph, and the same input gives the same bits. The maths stands at the top of each device file (``rsd_standardize.py``,
``rsd_product.py``, ``rsd_gradient.py``), the reasons for the tiles in ``configs.py``.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from . import configs
from .rsd_gradient import gradient_covariance, gradient_parked, gradient_resident
from .rsd_product import product
from .rsd_standardize import standardize_resident, standardize_stream

__all__ = ["rsd_loss_and_gradients", "teacher_gram"]

#: precision → (dtype of the matrices that are multiplied, name in the tile table, input_precision of tl.dot)
_PRECISIONS = {
    "float32": (torch.float32, "fp32", "ieee"),
    "tf32": (torch.float32, "tf32", "tf32"),
    "bfloat16": (torch.bfloat16, "bf16", "ieee"),
    "float16": (torch.float16, "fp16", "ieee"),
}
_VARIANCE = {"std": False, "var": True}


class _Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]  # constexprs and launch options


class _Product(NamedTuple):
    launch: _Launch
    chunk: int  # contraction length of a split
    across: int  # tiles along one side of the output
    tiles: int  # counters it needs
    parts: int  # fp32 elements of partial tiles


class _Plan(NamedTuple):
    """What depends on shapes and flags alone; sizes of the scratch memory in elements."""

    gram: bool
    ld: int  # leading dimension of S, T and P: D rounded up to 16
    ldc: int  # leading dimension of the multipliers computed here
    standardize: _Launch
    product: _Product | None
    gradient: _Launch
    matrices: tuple[int, ...]  # product dtype: z, multiplier of the student's gradient, of the teacher's
    scratch: tuple[int, ...]  # fp32: aux, sums, parts of tiles, parked U
    counters: tuple[int, int]  # int32: loss and column blocks, tiles of the product


def _up(size: int, multiple: int = 16) -> int:
    return -(-size // multiple) * multiple


def _options(tile: configs.Tile, **constants: Any) -> dict[str, Any]:
    return constants | {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _plan_standardize(n: int, ld: int, arch: int, dtype: str, student: bool, variance: bool) -> _Launch:
    kernel, tile = standardize_resident, configs.lookup("standardize_resident", arch, dtype, n)
    if tile is None:
        kernel, tile = standardize_stream, configs.lookup("standardize_stream", arch, dtype, n)
    options = _options(tile, STUDENT=student, VARIANCE=variance, ROWS=tile.rows, COLUMNS=tile.columns)
    return _Launch(kernel, (triton.cdiv(ld, tile.columns),), options)


def _plan_product(
    gram: bool, size: int, depth: int, student: bool, teacher: bool, arch: int, dtype: str, precision: str
) -> _Product:
    tile = configs.lookup("product", arch, dtype, size)
    across, steps = triton.cdiv(size, tile.rows), triton.cdiv(depth, tile.depth)
    tiles = across * (across + 1) // 2 if gram else across * across
    sources = 2 if gram and student and teacher else 1  # P and Pᵀ are one product
    splits = configs.splits(arch, tiles * sources, steps)
    options = _options(
        tile, GRAM=gram, STUDENT=student, TEACHER=teacher, SPLITS=splits, PRECISION=precision, SIZE=tile.rows,
        DEPTH=tile.depth,
    )  # fmt: skip
    chunk = triton.cdiv(steps, splits) * tile.depth
    parts = tiles * sources * splits * tile.rows**2 if splits > 1 else 0
    return _Product(_Launch(product, (tiles, splits, sources), options), chunk, across, tiles * sources, parts)


@lru_cache(maxsize=256)
def _plan(
    n: int, d: int, arch: int, precision: str, variance: bool, student: bool, teacher: bool, gram_given: bool
) -> _Plan:
    _, dtype, dot = _PRECISIONS[precision]
    gram = n < d
    ld, ldc = _up(d), _up(n if gram else d)
    sides = max(1, student + teacher)
    # Multipliers to compute. For values alone: T Tᵀ, or of P the sums of squares and no matrix.
    own_student = (student or (gram and not teacher)) and not (gram and gram_given)
    step = None
    if own_student or teacher or not gram:
        size, depth = (n, ld) if gram else (ld, n)
        step = _plan_product(gram, size, depth, own_student, teacher, arch, dtype, dot)
    sums = parked = counters = 0
    tile = configs.lookup("gradient_resident" if gram else "gradient_covariance", arch, dtype, n)
    kernel = gradient_resident if gram else gradient_covariance
    if tile is None:
        kernel, tile = gradient_parked, configs.lookup("gradient_parked", arch, dtype, n)
    blocks, row_tiles = triton.cdiv(ld, tile.columns), triton.cdiv(n, tile.rows)
    if kernel is gradient_resident:
        grid = (blocks, sides)
    elif kernel is gradient_parked:
        groups = configs.groups(arch, blocks * sides, row_tiles)
        grid = (blocks, groups, sides)
        sums, parked, counters = sides * groups * ld, (student + teacher) * n * ld, sides * blocks
    else:
        grid = (row_tiles if student or teacher else 1, blocks, sides)
        sums = 2 * step.across * ld
    options = _options(
        tile, STUDENT=student, TEACHER=teacher, PRECISION=dot, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth
    )
    square = (n if gram else ld) * ldc
    parts = step.parts if step else 0
    return _Plan(
        gram=gram,
        ld=ld,
        ldc=ldc,
        standardize=_plan_standardize(n, ld, arch, dtype, True, variance),
        product=step,
        gradient=_Launch(kernel, grid, options),
        matrices=(2 * n * ld, square * own_student, square * teacher),
        # Multiples of 64 elements keep every slice aligned for vector loads.
        scratch=tuple(_up(elements, 64) for elements in (5 * ld + 3 * blocks, sums, parts, parked)),
        counters=(_up(1 + counters, 64), step.tiles if step else 0),
    )


@cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _arch(x: Tensor) -> int:
    return _architecture(x.device) if x.is_cuda else configs.ARCHITECTURES[-1]  # the CPU: Triton's interpreter


def rsd_loss_and_gradients(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    kappa: float,
    eps: float,
    eps_mode: str,
    precision: str,
    scale: float,
    need_student: bool,
    need_teacher: bool,
    gram: Tensor | None = None,  # [N, N]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The RSD loss, its parts and its gradients in three launches (two where ``gram`` is all that would be multiplied).

    Args:
        student: [N, D], N ≥ 2, D ≥ 1, float32, bfloat16 or float16, any strides, on a CUDA device (on the CPU under
            Triton's interpreter).
        teacher: [N, D], likewise, of the same or another of these dtypes.
        kappa: weight κ of the off-diagonal part.
        eps: ε.
        eps_mode: ``"std"`` divides by (std + ε), ``"var"`` by √(var + ε).
        precision: of the matrix products: ``"float32"`` (IEEE), ``"tf32"``, ``"bfloat16"``, ``"float16"``. Everything
            else is float32.
        scale: of the loss and the gradients, not of the parts.
        need_student: compute the gradient with respect to the student.
        need_teacher: likewise, the teacher.
        gram: what :func:`teacher_gram` returned for this teacher, ε, mode and precision. Not used where N ≥ D: the
            covariance form needs no Gram matrix. Copied first where N is not divisible by 16 or the dtype differs.

    Returns:
        loss, invariance, decorrelation, mean diagonal (float32 scalars), ∂L/∂student, ∂L/∂teacher ([N, D] contiguous in
        the dtype of the input; [0, 0] if not needed).
    """
    n, d = student.shape
    matrix_dtype, _, _ = _PRECISIONS[precision]
    plan = _plan(
        n, d, _arch(student), precision, _VARIANCE[eps_mode], bool(need_student), bool(need_teacher), gram is not None
    )
    ld, plane, device = plan.ld, n * plan.ld, student.device
    z, c_student, c_teacher = torch.empty(sum(plan.matrices), dtype=matrix_dtype, device=device).split(plan.matrices)
    aux, sums, parts, parked = torch.empty(sum(plan.scratch), dtype=torch.float32, device=device).split(plan.scratch)
    counter, tile_counter = torch.empty(sum(plan.counters), dtype=torch.int32, device=device).split(plan.counters)
    # Four allocations: an op may not return views of one storage.
    loss, invariance, decorrelation, diagonal = (torch.empty((), dtype=torch.float32, device=device) for _ in range(4))
    grad_student = torch.empty((n, d) if need_student else (0, 0), dtype=student.dtype, device=device)
    grad_teacher = torch.empty((n, d) if need_teacher else (0, 0), dtype=teacher.dtype, device=device)
    if plan.gram and gram is not None:
        # Rows must start at multiples of 16 elements. N divisible by 16: nothing to do; else a copy with zeros behind.
        c_student = gram.to(matrix_dtype)
        if n != plan.ldc or c_student.stride() != (n, 1):
            c_student = pad(c_student, (0, plan.ldc - n)).contiguous()
    with torch.cuda.device_of(student):  # Triton launches on the current device; a no-op for a CPU tensor
        kernel, grid, options = plan.standardize
        kernel[grid](
            student, teacher, z, aux, counter, sum(plan.counters), n, d, ld, plane, student.stride(0),
            student.stride(1), teacher.stride(0), teacher.stride(1), eps, **options,
        )  # fmt: skip
        if plan.product is not None:
            kernel, grid, options = plan.product.launch
            kernel[grid](
                z, c_student, c_teacher, parts, sums, tile_counter, n, ld, plane, plan.ldc,
                plan.product.chunk, 1 / d if plan.gram else 1 / n, **options,
            )  # fmt: skip
        kernel, grid, options = plan.gradient
        values = (aux, counter, invariance, decorrelation, diagonal, loss, grad_student, grad_teacher, n, d, ld, plane)
        if kernel is gradient_covariance:
            kernel[grid](z, c_student, c_teacher, sums, *values, plan.product.across, kappa, scale, 1 / n, **options)
        else:
            scratch = (sums, parked) if kernel is gradient_parked else ()
            kernel[grid](z, c_student, c_teacher, *scratch, *values, plan.ldc, kappa, scale, d / n**2, **options)
    return loss, invariance, decorrelation, diagonal, grad_student, grad_teacher


@lru_cache(maxsize=64)
def _plan_gram(n: int, d: int, arch: int, precision: str, variance: bool) -> tuple[_Launch, _Product]:
    _, dtype, dot = _PRECISIONS[precision]
    standardize = _plan_standardize(n, _up(d), arch, dtype, False, variance)
    return standardize, _plan_product(True, n, _up(d), True, False, arch, dtype, dot)


def teacher_gram(
    teacher: Tensor,  # [N, D]
    eps: float,
    eps_mode: str,
    precision: str,
) -> Tensor:
    """T Tᵀ / D of the standardised teacher in two launches (and a copy where N is not divisible by 16), for
    :func:`rsd_loss_and_gradients` when the same teacher batch comes again.

    Args:
        teacher: as in :func:`rsd_loss_and_gradients`.
        eps: ε.
        eps_mode: ``"std"`` or ``"var"``.
        precision: of the product.

    Returns:
        [N, N] contiguous, in the dtype of the product (float32 for ``"tf32"``).
    """
    n, d = teacher.shape
    ld = _up(d)
    (kernel, grid, options), step = _plan_gram(n, d, _arch(teacher), precision, _VARIANCE[eps_mode])
    dtype, device = _PRECISIONS[precision][0], teacher.device
    z = torch.empty(n * ld, dtype=dtype, device=device)
    aux = torch.empty(5 * ld, dtype=torch.float32, device=device)
    parts = torch.empty(step.parts, dtype=torch.float32, device=device)
    counter = torch.empty(step.tiles, dtype=torch.int32, device=device)
    gram = torch.empty((n, _up(n)), dtype=dtype, device=device)
    with torch.cuda.device_of(teacher):
        kernel[grid](
            teacher, teacher, z, aux, counter, step.tiles, n, d, ld, n * ld, teacher.stride(0), teacher.stride(1),
            teacher.stride(0), teacher.stride(1), eps, **options,
        )  # fmt: skip
        kernel, grid, options = step.launch
        kernel[grid](
            z, gram, gram, parts, aux, counter, n, ld, n * ld, _up(n), step.chunk, 1 / d, **options
        )  # fmt: skip
    return gram if n == gram.shape[1] else gram[:, :n].contiguous()
