#include "passes.h"

#include <ATen/Version.h>

#include <string>

namespace xdfast {
namespace {

// Widest column block of a pass with sums in a local array.
constexpr int64_t kWidest = 256;

XD_INLINE void column_dots_any(
    const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t columns, double* out) {
  for (int64_t j0 = 0; j0 < columns; j0 += kWidest) {
    const int64_t width = std::min(kWidest, columns - j0);
    float sum[kWidest];
    for (int64_t j = 0; j < width; ++j) out[j0 + j] = 0.0;
    for (int64_t i0 = 0; i0 < rows; i0 += kChunk) {
      const int64_t i1 = std::min(rows, i0 + kChunk);
      for (int64_t j = 0; j < width; ++j) sum[j] = 0.0f;
      int64_t i = i0;
      for (; i + 4 <= i1; i += 4) {  // four rows at a time: the sums are loaded and stored a quarter as often
        const float* __restrict a = x + i * ldx + j0;
        const float* __restrict b = y + i * ldy + j0;
#pragma GCC ivdep
        for (int64_t j = 0; j < width; ++j) {
          sum[j] += (a[j] * b[j] + a[j + ldx] * b[j + ldy]) +
                    (a[j + 2 * ldx] * b[j + 2 * ldy] + a[j + 3 * ldx] * b[j + 3 * ldy]);
        }
      }
      for (; i < i1; ++i) {
        const float* __restrict a = x + i * ldx + j0;
        const float* __restrict b = y + i * ldy + j0;
#pragma GCC ivdep
        for (int64_t j = 0; j < width; ++j) sum[j] += a[j] * b[j];
      }
      for (int64_t j = 0; j < width; ++j) out[j0 + j] += static_cast<double>(sum[j]);
    }
  }
}

XD_INLINE void squares_any(
    const float* p, int64_t ld, int64_t rows, int64_t columns, int64_t diagonal, double* column_sums,
    double* row_sums) {
  for (int64_t j0 = 0; j0 < columns; j0 += kWidest) {
    const int64_t width = std::min(kWidest, columns - j0);
    float sum[kWidest];
    for (int64_t i0 = 0; i0 < rows; i0 += kChunk) {
      const int64_t i1 = std::min(rows, i0 + kChunk);
      for (int64_t j = 0; j < width; ++j) sum[j] = 0.0f;
      for (int64_t i = i0; i < i1; ++i) {
        const float* __restrict row = p + i * ld + j0;
        const int64_t own = i - diagonal - j0;  // the diagonal element of this row, if in [0, width)
        const int64_t split = std::min(std::max<int64_t>(own, 0), width);
        const int64_t resume = own >= 0 && own < width ? split + 1 : split;
#pragma GCC ivdep
        for (int64_t j = 0; j < split; ++j) sum[j] += row[j] * row[j];
#pragma GCC ivdep
        for (int64_t j = resume; j < width; ++j) sum[j] += row[j] * row[j];
        if (row_sums) {
          float lanes[16] = {};  // one running sum would not vectorise: floating-point addition is not reordered
          int64_t j = 0;
          for (; j + 16 <= width; j += 16) {
            for (int l = 0; l < 16; ++l) lanes[l] += row[j + l] * row[j + l];
          }
          double total = 0.0;
          for (; j < width; ++j) total += static_cast<double>(row[j]) * row[j];
          for (int l = 0; l < 16; ++l) total += static_cast<double>(lanes[l]);
          row_sums[i] += total;
        }
      }
      for (int64_t j = 0; j < width; ++j) column_sums[j0 + j] += static_cast<double>(sum[j]);
    }
  }
}

XD_INLINE void combine_any(
    const float* u, int64_t ldu, const float* x, const float* z, int64_t ldz, const float* a, const float* c,
    const float* q, int64_t rows, int64_t columns, float* out, int64_t ld_out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* __restrict ui = u + i * ldu;
    const float* __restrict xi = x + i * ldz;
    const float* __restrict zi = z + i * ldz;
    float* __restrict oi = out + i * ld_out;
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) oi[j] = a[j] * ui[j] + c[j] * xi[j] - q[j] * zi[j];
  }
}

// Round to nearest even, in integers; a NaN keeps its quiet bit (rounding could carry it into infinity).
XD_INLINE uint32_t bfloat16_bits(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

typedef uint32_t BitsOfFloat __attribute__((may_alias));

XD_INLINE void to_bfloat16_any(
    const float* x, int64_t ldx, int64_t rows, int64_t columns, int64_t padded_columns, at::BFloat16* out,
    int64_t ld_out) {
  for (int64_t i = 0; i < rows; ++i) {
    const BitsOfFloat* __restrict in = reinterpret_cast<const BitsOfFloat*>(x + i * ldx);
    uint16_t* __restrict o = reinterpret_cast<uint16_t*>(out + i * ld_out);
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) o[j] = static_cast<uint16_t>(bfloat16_bits(in[j]));
    for (int64_t j = columns; j < padded_columns; ++j) o[j] = 0;
  }
}

XD_INLINE void pair_rows_any(
    const float* x, int64_t ldx, int64_t rows, int64_t columns, at::BFloat16* out, int64_t ld_out) {
  for (int64_t i = 0; i < rows; i += 2) {
    const BitsOfFloat* __restrict even = reinterpret_cast<const BitsOfFloat*>(x + i * ldx);
    BitsOfFloat* __restrict o = reinterpret_cast<BitsOfFloat*>(out + i * ld_out);
    if (i + 1 < rows) {
      const BitsOfFloat* __restrict odd = even + ldx;
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) o[j] = bfloat16_bits(even[j]) | bfloat16_bits(odd[j]) << 16;
    } else {
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) o[j] = bfloat16_bits(even[j]);
    }
  }
}

// 16 words of 16 rows: four rounds of interleaving row i with row i + 8 leave the transpose.
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint32_t WordsAny __attribute__((vector_size(64), aligned(4), may_alias));

#if defined(__clang__)
#define XD_INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define XD_INTERLEAVE_HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define XD_INTERLEAVE_LOW(a, b) __builtin_shuffle(a, b, Words{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define XD_INTERLEAVE_HIGH(a, b) \
  __builtin_shuffle(a, b, Words{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

XD_INLINE void transpose_words_any(
    const uint32_t* x, int64_t ldx, int64_t rows, int64_t columns, uint32_t* out, int64_t ld_out) {
  for (int64_t i0 = 0; i0 < rows; i0 += 16) {
    for (int64_t j0 = 0; j0 < columns; j0 += 16) {
      const int64_t height = std::min<int64_t>(16, rows - i0), width = std::min<int64_t>(16, columns - j0);
      if (height < 16 || width < 16) {
        for (int64_t i = i0; i < i0 + height; ++i) {
          for (int64_t j = j0; j < j0 + width; ++j) out[j * ld_out + i] = x[i * ldx + j];
        }
        continue;
      }
      Words a[16], b[16];
      for (int i = 0; i < 16; ++i) a[i] = *reinterpret_cast<const WordsAny*>(x + (i0 + i) * ldx + j0);
      for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 8; ++i) {
          b[2 * i] = XD_INTERLEAVE_LOW(a[i], a[i + 8]);
          b[2 * i + 1] = XD_INTERLEAVE_HIGH(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; ++i) {
          a[2 * i] = XD_INTERLEAVE_LOW(b[i], b[i + 8]);
          a[2 * i + 1] = XD_INTERLEAVE_HIGH(b[i], b[i + 8]);
        }
      }
      for (int j = 0; j < 16; ++j) *reinterpret_cast<WordsAny*>(out + (j0 + j) * ld_out + i0) = a[j];
    }
  }
}

// One set of entry points per instruction set. The bodies above are inlined into each and so compiled for its target.
#define XD_PASSES(SUFFIX, TARGET, WIDTH)                                                                         \
  TARGET void standardize_float_##SUFFIX(const StandardizeProblem<float>& p, int64_t d0, int64_t d1) {           \
    standardize_panel<float, WIDTH>(p, d0, d1);                                                                  \
  }                                                                                                              \
  TARGET void standardize_bfloat16_##SUFFIX(const StandardizeProblem<at::BFloat16>& p, int64_t d0, int64_t d1) { \
    standardize_panel<at::BFloat16, WIDTH>(p, d0, d1);                                                           \
  }                                                                                                              \
  TARGET void standardize_half_##SUFFIX(const StandardizeProblem<at::Half>& p, int64_t d0, int64_t d1) {         \
    standardize_panel<at::Half, WIDTH>(p, d0, d1);                                                               \
  }                                                                                                              \
  TARGET void column_dots_##SUFFIX(                                                                              \
      const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t columns, double* out) {    \
    column_dots_any(x, ldx, y, ldy, rows, columns, out);                                                         \
  }                                                                                                              \
  TARGET void squares_##SUFFIX(                                                                                  \
      const float* p, int64_t ld, int64_t rows, int64_t columns, int64_t diagonal, double* column_sums,          \
      double* row_sums) {                                                                                        \
    squares_any(p, ld, rows, columns, diagonal, column_sums, row_sums);                                          \
  }                                                                                                              \
  TARGET void combine_##SUFFIX(                                                                                  \
      const float* u, int64_t ldu, const float* x, const float* z, int64_t ldz, const float* a, const float* c,  \
      const float* q, int64_t rows, int64_t columns, float* out, int64_t ld_out) {                               \
    combine_any(u, ldu, x, z, ldz, a, c, q, rows, columns, out, ld_out);                                         \
  }                                                                                                              \
  TARGET void to_bfloat16_##SUFFIX(                                                                              \
      const float* x, int64_t ldx, int64_t rows, int64_t columns, int64_t padded_columns, at::BFloat16* out,     \
      int64_t ld_out) {                                                                                          \
    to_bfloat16_any(x, ldx, rows, columns, padded_columns, out, ld_out);                                         \
  }                                                                                                              \
  TARGET void pair_rows_##SUFFIX(                                                                                \
      const float* x, int64_t ldx, int64_t rows, int64_t columns, at::BFloat16* out, int64_t ld_out) {           \
    pair_rows_any(x, ldx, rows, columns, out, ld_out);                                                           \
  }                                                                                                              \
  TARGET void transpose_words_##SUFFIX(                                                                          \
      const uint32_t* x, int64_t ldx, int64_t rows, int64_t columns, uint32_t* out, int64_t ld_out) {            \
    transpose_words_any(x, ldx, rows, columns, out, ld_out);                                                     \
  }                                                                                                              \
  const Passes k_##SUFFIX = {                                                                                    \
      standardize_float_##SUFFIX,                                                                                \
      standardize_bfloat16_##SUFFIX,                                                                             \
      standardize_half_##SUFFIX,                                                                                 \
      column_dots_##SUFFIX,                                                                                      \
      squares_##SUFFIX,                                                                                          \
      combine_##SUFFIX,                                                                                          \
      to_bfloat16_##SUFFIX,                                                                                      \
      pair_rows_##SUFFIX,                                                                                        \
      transpose_words_##SUFFIX};

XD_PASSES(baseline, , 4)
#if defined(__x86_64__)
XD_PASSES(avx2, XD_TARGET_AVX2, 8)
XD_PASSES(avx512, XD_TARGET_AVX512, 16)
#endif

const Passes& choose() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return k_avx512;
  if (capability.rfind("AVX2", 0) == 0) return k_avx2;
#endif
  return k_baseline;
}

}  // namespace

const Passes& passes() {
  static const Passes& chosen = choose();
  return chosen;
}

}  // namespace xdfast
