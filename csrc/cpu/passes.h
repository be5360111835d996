// The vectorised passes over blocks of columns, compiled for each instruction set and chosen at run time.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "standardize.h"

namespace xdfast {

// All matrices are row-major fp32 with a leading dimension (ld); sums over rows run in fp32 over kChunk rows, then
// fp64.
struct Passes {
  // Columns [d0, d1) standardised: see standardize.h.
  void (*standardize_float)(const StandardizeProblem<float>& p, int64_t d0, int64_t d1);
  void (*standardize_bfloat16)(const StandardizeProblem<at::BFloat16>& p, int64_t d0, int64_t d1);
  void (*standardize_half)(const StandardizeProblem<at::Half>& p, int64_t d0, int64_t d1);
  // out[j] = sum_i x[i, j] * y[i, j]
  void (*column_dots)(
      const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t columns, double* out);
  // column_sums[j] += p[i, j]^2 without i == j + diagonal; row_sums[i] += p[i, j]^2 with it (row_sums may be null)
  void (*squares)(
      const float* p, int64_t ld, int64_t rows, int64_t columns, int64_t diagonal, double* column_sums,
      double* row_sums);
  // out[i, j] = a[j] * u[i, j] + c[j] * x[i, j] - q[j] * z[i, j]
  void (*combine)(
      const float* u, int64_t ldu, const float* x, const float* z, int64_t ldz, const float* a, const float* c,
      const float* q, int64_t rows, int64_t columns, float* out, int64_t ld_out);
  // out[i, j] = bfloat16(x[i, j]), zeros up to padded_columns
  void (*to_bfloat16)(
      const float* x, int64_t ldx, int64_t rows, int64_t columns, int64_t padded_columns, at::BFloat16* out,
      int64_t ld_out);
  // Pairs of rows side by side, the layout of bf16_gemm's B: out[(i / 2) * 2 * ld_out + 2 * j + i % 2] = bfloat16(x[i,
  // j]); an odd last row is paired with zeros.
  void (*pair_rows)(const float* x, int64_t ldx, int64_t rows, int64_t columns, at::BFloat16* out, int64_t ld_out);
  // out[j, i] = x[i, j], 32-bit words (pairs of bfloat16)
  void (*transpose_words)(const uint32_t* x, int64_t ldx, int64_t rows, int64_t columns, uint32_t* out, int64_t ld_out);
};

// The passes for this CPU (ATEN_CPU_CAPABILITY overrides ATen's detection).
const Passes& passes();

}  // namespace xdfast
