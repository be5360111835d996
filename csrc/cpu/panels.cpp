#include "panels.h"

#include <ATen/Version.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "vector.h"

#define XD_UNROLL _Pragma("GCC unroll 16")

namespace xdfast {
namespace {

constexpr int64_t kDepth = 256;  // of a product at a time: a panel of so many rows is half of a first-level cache
constexpr int64_t kRows = 96;    // rows of a that stay in the second-level cache while all panels pass by

// c [R, 2 W] = alpha * a [R, k] @ b [k, 2 W], or added to it: all sums in registers.
template <int W, int R>
XD_INLINE void tile(
    const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float alpha, bool add, float* c, int64_t ldc) {
  using F = typename Vector<W>::F;
  F s[R][2];
  const float* row[R];
  XD_UNROLL for (int r = 0; r < R; ++r) {
    s[r][0] = s[r][1] = F{};
    row[r] = a + r * lda;
  }
  for (int64_t i = 0; i < k; ++i) {
    F left, right;
    load<W>(b + i * ldb, left);
    load<W>(b + i * ldb + W, right);
    XD_UNROLL for (int r = 0; r < R; ++r) {
      const float x = row[r][i];
      s[r][0] += left * x;
      s[r][1] += right * x;
    }
  }
  XD_UNROLL for (int r = 0; r < R; ++r) {
    XD_UNROLL for (int v = 0; v < 2; ++v) {
      F out = s[r][v] * alpha;
      if (add) {
        F before;
        load<W>(c + r * ldc + v * W, before);
        out += before;
      }
      store<W>(c + r * ldc + v * W, out);
    }
  }
}

// Rows of the next tile when `left` remain: R, and two smaller ones at the end instead of one of a row or two, whose
// few sums would wait for each other.
template <int R>
XD_INLINE int64_t tile_rows(int64_t left) {
  if (left >= 2 * R || left == R) return R;
  return left < R ? left : left < R + R / 2 ? (left + 1) / 2 : R;
}

template <int W, int R>
XD_INLINE void tiles(
    int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float alpha, bool add, float* c,
    int64_t ldc) {
  switch (rows) {
#define XD_TILE(ROWS)                                                              \
  case ROWS:                                                                       \
    if constexpr (ROWS <= R) tile<W, ROWS>(a, lda, b, ldb, k, alpha, add, c, ldc); \
    break;
    XD_TILE(1)
    XD_TILE(2)
    XD_TILE(3) XD_TILE(4) XD_TILE(5) XD_TILE(6) XD_TILE(7) XD_TILE(8) XD_TILE(9) XD_TILE(10) XD_TILE(11) XD_TILE(12)
#undef XD_TILE
  }
}

#if defined(__clang__)
#define XD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define XD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Indices{__VA_ARGS__})
#endif

// out [k, width] = z [rows, k] transposed, zeros in the columns from `rows` on.
template <int W>
XD_INLINE void pack_rows(const float* z, int64_t ldz, int64_t rows, int64_t k, float* out) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float EightAny __attribute__((vector_size(32), aligned(4), may_alias));
  typedef int Indices __attribute__((vector_size(32)));
  constexpr int64_t width = 2 * W;
  int64_t first = 0;
  for (; first + 8 <= rows; first += 8) {  // eight by eight: pairs, fours, halves interleaved
    const float* from = z + first * ldz;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
      Eight x[8], y[8];
      XD_UNROLL for (int r = 0; r < 8; ++r) x[r] = *reinterpret_cast<const EightAny*>(from + r * ldz + i);
      XD_UNROLL for (int r = 0; r < 8; r += 2) {
        y[r] = XD_SHUFFLE(x[r], x[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        y[r + 1] = XD_SHUFFLE(x[r], x[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
      XD_UNROLL for (int r = 0; r < 8; r += 4) {
        x[r] = XD_SHUFFLE(y[r], y[r + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[r + 1] = XD_SHUFFLE(y[r], y[r + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        x[r + 2] = XD_SHUFFLE(y[r + 1], y[r + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        x[r + 3] = XD_SHUFFLE(y[r + 1], y[r + 3], 2, 3, 10, 11, 6, 7, 14, 15);
      }
      XD_UNROLL for (int r = 0; r < 4; ++r) {
        y[r] = XD_SHUFFLE(x[r], x[r + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[r + 4] = XD_SHUFFLE(x[r], x[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
      XD_UNROLL for (int r = 0; r < 8; ++r) * reinterpret_cast<EightAny*>(out + (i + r) * width + first) = y[r];
    }
    for (; i < k; ++i) {
      for (int64_t r = 0; r < 8; ++r) out[i * width + first + r] = from[r * ldz + i];
    }
  }
  for (int64_t i = 0; first < width && i < k; ++i) {
    for (int64_t r = first; r < width; ++r) out[i * width + r] = r < rows ? z[r * ldz + i] : 0.0f;
  }
}

// In one function per target, not inlined into the loops around them: there GCC keeps a vector of b in memory.
using Tiles = void (*)(
    int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float alpha, bool add, float* c,
    int64_t ldc);

template <int W, int R, Tiles tiles_of>
XD_INLINE void gram_any(
    const float* z, int64_t ldz, int64_t n, int64_t k, float alpha, bool add, float* gram, int64_t ld_gram,
    float* scratch) {
  constexpr int64_t width = 2 * W;
  for (int64_t j = 0; j < n; j += width) {
    pack_rows<W>(z + j * ldz, ldz, std::min(width, n - j), k, scratch);
    for (int64_t i = j, rows; i < n; i += rows) {
      rows = tile_rows<R>(n - i);
      tiles_of(rows, z + i * ldz, ldz, scratch, width, k, alpha, add, gram + i * ld_gram + j, ld_gram);
    }
  }
}

template <int W, int R, Tiles tiles_of>
XD_INLINE void multiply_any(
    const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc) {
  for (int64_t d = 0; d < k; d += kDepth) {
    const int64_t depth = std::min(kDepth, k - d);
    for (int64_t top = 0; top < m; top += kRows) {
      const int64_t bottom = std::min(m, top + kRows);
      for (int64_t j = 0; j < n; j += 2 * W) {
        for (int64_t i = top, rows; i < bottom; i += rows) {
          rows = tile_rows<R>(bottom - i);
          tiles_of(rows, a + i * lda + d, lda, b + d * ldb + j, ldb, depth, 1.0f, d > 0, c + i * ldc + j, ldc);
        }
      }
    }
  }
}

#define XD_PANELS(SUFFIX, TARGET, WIDTH, ROWS)                                                                  \
  TARGET __attribute__((noinline)) void tiles_##SUFFIX(                                                         \
      int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float alpha, bool add, \
      float* c, int64_t ldc) {                                                                                  \
    tiles<WIDTH, ROWS>(rows, a, lda, b, ldb, k, alpha, add, c, ldc);                                            \
  }                                                                                                             \
  TARGET void gram_##SUFFIX(                                                                                    \
      const float* z, int64_t ldz, int64_t n, int64_t k, float alpha, bool add, float* gram, int64_t ld_gram,   \
      float* scratch) {                                                                                         \
    gram_any<WIDTH, ROWS, tiles_##SUFFIX>(z, ldz, n, k, alpha, add, gram, ld_gram, scratch);                    \
  }                                                                                                             \
  TARGET void multiply_##SUFFIX(                                                                                \
      const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c,      \
      int64_t ldc) {                                                                                            \
    multiply_any<WIDTH, ROWS, tiles_##SUFFIX>(a, lda, b, ldb, m, n, k, c, ldc);                                 \
  }                                                                                                             \
  const PanelProducts k_##SUFFIX = {2 * WIDTH, gram_##SUFFIX, multiply_##SUFFIX};

#if defined(__x86_64__)
XD_PANELS(avx2, XD_TARGET_AVX2, 8, 6)
XD_PANELS(avx512, XD_TARGET_AVX512, 16, 12)
#endif

const PanelProducts* choose() {
#if defined(__x86_64__)
  const char* forced = std::getenv("XDFAST_CPU_GEMM");
  const std::string way = forced ? forced : "", capability = at::get_cpu_capability();
  if (way == "at" || way == "blas") return nullptr;
  if (capability.rfind("AVX2", 0) == 0) return &k_avx2;
  if (capability.rfind("AVX512", 0) == 0 && way == "panels") return &k_avx512;
#endif
  return nullptr;
}

}  // namespace

const PanelProducts* panel_products() {
  static const PanelProducts* chosen = choose();
  return chosen;
}

}  // namespace xdfast
