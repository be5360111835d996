// Products of fp32 matrices that are already in cache, without copies of what a general BLAS would pack first: the
// blocks of the cross-correlation loss come from a pass that has just written them.
#pragma once

#include <cstdint>

namespace xdfast {

// One thread each. Matrices are row-major with a leading dimension.
struct PanelProducts {
  int64_t width;  // columns of a panel: b and c of `multiply` must have readable, writable columns up to a multiple
  // gram [n, n] = alpha * z z^T, z [n, k], or added to it; of the upper triangle no more than the panels that the
  // diagonal crosses. scratch: k * width floats.
  void (*gram)(
      const float* z, int64_t ldz, int64_t n, int64_t k, float alpha, bool add, float* gram, int64_t ld_gram,
      float* scratch);
  // c [m, n] = a [m, k] @ b [k, n]
  void (*multiply)(
      const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc);
};

// The kernels for this CPU (ATEN_CPU_CAPABILITY overrides ATen's detection), or null where BLAS is the better way: on
// AVX-512, until a figure from such a CPU says otherwise. XDFAST_CPU_GEMM=panels takes them there too, =blas and =at
// never.
const PanelProducts* panel_products();

}  // namespace xdfast
