// One wording for every native error: what was expected, what came. The checks that a user meets first are in Python
// (xdfast/ops/_checks.py); these guard against a direct call of torch.ops.xdfast_c.*.
#pragma once

#include <ATen/core/Tensor.h>

#define XD_CHECK_MATRIX(op, t) \
  TORCH_CHECK_VALUE((t).dim() == 2, op, ": ", #t " must be a matrix [N, D], but has shape ", (t).sizes())

#define XD_CHECK_ROWS(op, t) \
  TORCH_CHECK_VALUE((t).size(0) >= 1, op, ": ", #t " must have at least one row, but has shape ", (t).sizes())

#define XD_CHECK_CPU(op, t) \
  TORCH_CHECK((t).device().is_cpu(), op, ": ", #t " must be on the CPU, but is on ", (t).device())

#define XD_CHECK_FLOAT_OR_HALF(op, t)                                                                              \
  TORCH_CHECK_TYPE(                                                                                                \
      (t).scalar_type() == at::kFloat || (t).scalar_type() == at::kBFloat16 || (t).scalar_type() == at::kHalf, op, \
      ": ", #t " must be float32, bfloat16 or float16, but is ", (t).scalar_type(),                                \
      "; convert it, or use the reference backend, which takes any floating dtype")
