// Passes over rows chosen by a list: gather and normalise, scale and add back, and their derivatives. Compiled for each
// instruction set and chosen at run time, like passes.h.
//
// Row m of a compact matrix is row index[m / rows_per_unit] * rows_per_unit + m % rows_per_unit of the full one.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace xdfast {

enum class Norm { kLayer, kRms, kNone };

struct RowList {
  const int32_t* index;
  int64_t rows_per_unit;
};

// T is float, at::BFloat16 or at::Half; sums are fp32. All functions take compact rows [begin, end).
template <typename T>
struct Rows {
  // y[m] = norm(x[row]) * weight + bias; statistics[m] = (mean, 1 / std), where wanted. weight, bias may be null.
  void (*gather_norm)(
      const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, Norm norm, float eps,
      const float* weight, const float* bias, T* y, float* statistics);
  // x[row] += gate[unit] * y[m]; gate may be null (1).
  void (*scatter_add)(
      T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, const float* gate, const T* y,
      int64_t ldy);
  // dx[row] = derivative of norm(x[row]) along dy[m] * weight; weight_sum[j] += dy x_hat, bias_sum[j] += dy (may be null)
  void (*norm_backward)(
      const T* dy, const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, Norm norm,
      const float* weight, const float* statistics, T* dx, int64_t lddx, float* weight_sum, float* bias_sum);
  // y[m] = gate[unit] * x[row]; gate may be null (1).
  void (*gather)(
      const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, const float* gate, T* y);
  // dots[m] = <a[m], b[m]>
  void (*row_dots)(
      const T* a, int64_t lda, const T* b, int64_t ldb, int64_t begin, int64_t end, int64_t columns, float* dots);
  // out[m, j] = silu(a[m, j]) * a[m, columns + j]
  void (*swiglu)(const T* a, int64_t begin, int64_t end, int64_t columns, T* out);
};

// The passes for this CPU (ATEN_CPU_CAPABILITY overrides ATen's detection).
template <typename T>
const Rows<T>& rows();

}  // namespace xdfast
