#include "rows.h"

#include <ATen/Version.h>

#include <cmath>
#include <cstring>
#include <string>

#include "vector.h"

namespace xdfast {
namespace {

// Columns that do not fill a vector pass through a buffer, so that they are computed like all others.
template <int W, typename T>
XD_INLINE void load_tail(const T* p, int64_t columns, typename Vector<W>::F& out) {
  T buffer[W];
  std::memset(buffer, 0, sizeof buffer);
  std::memcpy(buffer, p, columns * sizeof(T));
  load<W>(buffer, out);
}

template <int W, typename T>
XD_INLINE void store_tail(T* p, int64_t columns, const typename Vector<W>::F& value) {
  T buffer[W];
  store<W>(buffer, value);
  std::memcpy(p, buffer, columns * sizeof(T));
}

// 1 in the first `columns` lanes, 0 in the others.
template <int W>
XD_INLINE void lanes_below(int64_t columns, typename Vector<W>::F& out) {
  for (int l = 0; l < W; ++l) out[l] = l < columns ? 1.0f : 0.0f;
}

XD_INLINE int64_t row_of(const RowList& list, int64_t m, int64_t& unit) {
  unit = list.index[m / list.rows_per_unit];
  return unit * list.rows_per_unit + m % list.rows_per_unit;
}

template <int W, typename T>
XD_INLINE void statistics_of(const T* x, int64_t columns, Norm norm, float eps, float& mean, float& inverse) {
  using F = typename Vector<W>::F;
  const int64_t whole = columns / W * W;
  const float n = static_cast<float>(columns);
  mean = 0.0f;
  F v, mask;
  lanes_below<W>(columns - whole, mask);
  if (norm == Norm::kLayer) {
    F a = {}, b = {};
    int64_t j = 0;
    for (; j + 2 * W <= whole; j += 2 * W) {
      load<W>(x + j, v);
      a += v;
      load<W>(x + j + W, v);
      b += v;
    }
    for (; j < whole; j += W) {
      load<W>(x + j, v);
      a += v;
    }
    if (whole < columns) {
      load_tail<W>(x + whole, columns - whole, v);
      a += v;
    }
    mean = sum_of<W>(a + b) / n;
  }
  F a = {}, b = {};
  int64_t j = 0;
  for (; j + 2 * W <= whole; j += 2 * W) {
    load<W>(x + j, v);
    v -= mean;
    a += v * v;
    load<W>(x + j + W, v);
    v -= mean;
    b += v * v;
  }
  for (; j < whole; j += W) {
    load<W>(x + j, v);
    v -= mean;
    a += v * v;
  }
  if (whole < columns) {
    load_tail<W>(x + whole, columns - whole, v);
    v = (v - mean) * mask;
    a += v * v;
  }
  inverse = 1.0f / std::sqrt(sum_of<W>(a + b) / n + eps);
}

template <int W, typename T>
XD_INLINE void gather_norm_any(
    const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, Norm norm, float eps,
    const float* weight, const float* bias, T* y, float* statistics) {
  using F = typename Vector<W>::F;
  const int64_t whole = columns / W * W;
  for (int64_t m = begin; m < end; ++m) {
    int64_t unit;
    const T* row = x + row_of(list, m, unit) * ldx;
    T* out = y + m * columns;
    if (norm == Norm::kNone) {
      std::memcpy(out, row, columns * sizeof(T));
      continue;
    }
    float mean, inverse;
    statistics_of<W>(row, columns, norm, eps, mean, inverse);
    if (statistics) {
      statistics[2 * m] = mean;
      statistics[2 * m + 1] = inverse;
    }
    F v, w, b;
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t left = columns - j;
      const bool full = j < whole;
      if (full) load<W>(row + j, v);
      else load_tail<W>(row + j, left, v);
      v = (v - mean) * inverse;
      if (weight) {
        if (full) load<W>(weight + j, w);
        else load_tail<W>(weight + j, left, w);
        v *= w;
      }
      if (bias) {
        if (full) load<W>(bias + j, b);
        else load_tail<W>(bias + j, left, b);
        v += b;
      }
      if (full) store<W>(out + j, v);
      else store_tail<W>(out + j, left, v);
    }
  }
}

template <int W, typename T>
XD_INLINE void scatter_add_any(
    T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, const float* gate, const T* y,
    int64_t ldy) {
  using F = typename Vector<W>::F;
  const int64_t whole = columns / W * W;
  for (int64_t m = begin; m < end; ++m) {
    int64_t unit;
    T* row = x + row_of(list, m, unit) * ldx;
    const T* from = y + m * ldy;
    const float g = gate ? gate[unit] : 1.0f;
    F a, b;
    for (int64_t j = 0; j < whole; j += W) {
      load<W>(row + j, a);
      load<W>(from + j, b);
      store<W>(row + j, a + b * g);
    }
    if (whole < columns) {
      load_tail<W>(row + whole, columns - whole, a);
      load_tail<W>(from + whole, columns - whole, b);
      store_tail<W>(row + whole, columns - whole, a + b * g);
    }
  }
}

template <int W, typename T>
XD_INLINE void norm_backward_any(
    const T* dy, const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, Norm norm,
    const float* weight, const float* statistics, T* dx, int64_t lddx, float* weight_sum, float* bias_sum) {
  using F = typename Vector<W>::F;
  const float n = static_cast<float>(columns);
  const int64_t whole = columns / W * W;
  F mask;
  lanes_below<W>(columns - whole, mask);
  for (int64_t m = begin; m < end; ++m) {
    int64_t unit;
    const int64_t at = row_of(list, m, unit);
    const T* row = x + at * ldx;
    const T* d = dy + m * columns;
    T* out = dx + at * lddx;
    if (norm == Norm::kNone) {
      std::memcpy(out, d, columns * sizeof(T));
      continue;
    }
    const float mean = statistics[2 * m], inverse = statistics[2 * m + 1];
    F g, v, w, s, sums = {}, dots = {};
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t left = columns - j;
      const bool full = j < whole;
      if (full) {
        load<W>(d + j, g);
        load<W>(row + j, v);
        v = (v - mean) * inverse;
      } else {
        load_tail<W>(d + j, left, g);
        load_tail<W>(row + j, left, v);
        v = (v - mean) * inverse * mask;
      }
      if (weight_sum) {
        if (full) {
          load<W>(weight_sum + j, s);
          store<W>(weight_sum + j, s + g * v);
        } else {
          load_tail<W>(weight_sum + j, left, s);
          store_tail<W>(weight_sum + j, left, s + g * v);
        }
      }
      if (bias_sum) {
        if (full) {
          load<W>(bias_sum + j, s);
          store<W>(bias_sum + j, s + g);
        } else {
          load_tail<W>(bias_sum + j, left, s);
          store_tail<W>(bias_sum + j, left, s + g);
        }
      }
      if (weight) {
        if (full) load<W>(weight + j, w);
        else load_tail<W>(weight + j, left, w);
        g *= w;
      }
      sums += g;
      dots += g * v;
    }
    const float mean_g = norm == Norm::kLayer ? sum_of<W>(sums) / n : 0.0f;
    const float mean_gv = sum_of<W>(dots) / n;
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t left = columns - j;
      const bool full = j < whole;
      if (full) {
        load<W>(d + j, g);
        load<W>(row + j, v);
      } else {
        load_tail<W>(d + j, left, g);
        load_tail<W>(row + j, left, v);
      }
      if (weight) {
        if (full) load<W>(weight + j, w);
        else load_tail<W>(weight + j, left, w);
        g *= w;
      }
      v = (v - mean) * inverse;
      v = (g - mean_g - v * mean_gv) * inverse;
      if (full) store<W>(out + j, v);
      else store_tail<W>(out + j, left, v);
    }
  }
}

template <int W, typename T>
XD_INLINE void gather_any(
    const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, const float* gate, T* y) {
  using F = typename Vector<W>::F;
  const int64_t whole = columns / W * W;
  for (int64_t m = begin; m < end; ++m) {
    int64_t unit;
    const T* row = x + row_of(list, m, unit) * ldx;
    T* out = y + m * columns;
    if (!gate) {
      std::memcpy(out, row, columns * sizeof(T));
      continue;
    }
    const float g = gate[unit];
    F v;
    for (int64_t j = 0; j < whole; j += W) {
      load<W>(row + j, v);
      store<W>(out + j, v * g);
    }
    if (whole < columns) {
      load_tail<W>(row + whole, columns - whole, v);
      store_tail<W>(out + whole, columns - whole, v * g);
    }
  }
}

template <int W, typename T>
XD_INLINE void row_dots_any(
    const T* a, int64_t lda, const T* b, int64_t ldb, int64_t begin, int64_t end, int64_t columns, float* dots) {
  using F = typename Vector<W>::F;
  const int64_t whole = columns / W * W;
  for (int64_t m = begin; m < end; ++m) {
    F u, v, sum = {};
    for (int64_t j = 0; j < whole; j += W) {
      load<W>(a + m * lda + j, u);
      load<W>(b + m * ldb + j, v);
      sum += u * v;
    }
    if (whole < columns) {
      load_tail<W>(a + m * lda + whole, columns - whole, u);
      load_tail<W>(b + m * ldb + whole, columns - whole, v);
      sum += u * v;
    }
    dots[m] = sum_of<W>(sum);
  }
}

template <int W>
XD_INLINE void silu_times(
    const typename Vector<W>::F& a, const typename Vector<W>::F& b, typename Vector<W>::F& out) {
  using F = typename Vector<W>::F;
  F x = -a;
  for (int l = 0; l < W; ++l) x[l] = x[l] > 87.0f ? 87.0f : (x[l] < -87.0f ? -87.0f : x[l]);  // a NaN stays
  F e;
  exponential<W>(x, e);
  out = a / (e + 1.0f) * b;
}

template <int W, typename T>
XD_INLINE void swiglu_any(const T* a, int64_t begin, int64_t end, int64_t columns, T* out) {
  using F = typename Vector<W>::F;
  const int64_t whole = columns / W * W;
  for (int64_t m = begin; m < end; ++m) {
    const T* row = a + m * 2 * columns;
    F u, v, w;
    for (int64_t j = 0; j < whole; j += W) {
      load<W>(row + j, u);
      load<W>(row + columns + j, v);
      silu_times<W>(u, v, w);
      store<W>(out + m * columns + j, w);
    }
    if (whole < columns) {
      load_tail<W>(row + whole, columns - whole, u);
      load_tail<W>(row + columns + whole, columns - whole, v);
      silu_times<W>(u, v, w);
      store_tail<W>(out + m * columns + whole, columns - whole, w);
    }
  }
}

// One set of entry points per instruction set. The bodies above are inlined into each and so compiled for its target.
#define XD_ROWS(SUFFIX, TARGET, WIDTH, T)                                                                             \
  struct Rows_##SUFFIX##_##T {                                                                                        \
    TARGET static void gather_norm(                                                                                   \
        const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, Norm norm, float eps,     \
        const float* weight, const float* bias, T* y, float* statistics) {                                            \
      gather_norm_any<WIDTH, T>(x, ldx, list, begin, end, columns, norm, eps, weight, bias, y, statistics);           \
    }                                                                                                                 \
    TARGET static void scatter_add(                                                                                   \
        T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, const float* gate, const T* y,  \
        int64_t ldy) {                                                                                                \
      scatter_add_any<WIDTH, T>(x, ldx, list, begin, end, columns, gate, y, ldy);                                     \
    }                                                                                                                 \
    TARGET static void norm_backward(                                                                                 \
        const T* dy, const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, Norm norm,   \
        const float* weight, const float* statistics, T* dx, int64_t lddx, float* weight_sum, float* bias_sum) {      \
      norm_backward_any<WIDTH, T>(                                                                                    \
          dy, x, ldx, list, begin, end, columns, norm, weight, statistics, dx, lddx, weight_sum, bias_sum);           \
    }                                                                                                                 \
    TARGET static void gather(                                                                                        \
        const T* x, int64_t ldx, RowList list, int64_t begin, int64_t end, int64_t columns, const float* gate, T* y) { \
      gather_any<WIDTH, T>(x, ldx, list, begin, end, columns, gate, y);                                               \
    }                                                                                                                 \
    TARGET static void row_dots(                                                                                      \
        const T* a, int64_t lda, const T* b, int64_t ldb, int64_t begin, int64_t end, int64_t columns, float* dots) { \
      row_dots_any<WIDTH, T>(a, lda, b, ldb, begin, end, columns, dots);                                              \
    }                                                                                                                 \
    TARGET static void swiglu(const T* a, int64_t begin, int64_t end, int64_t columns, T* out) {                      \
      swiglu_any<WIDTH, T>(a, begin, end, columns, out);                                                              \
    }                                                                                                                 \
  };                                                                                                                  \
  const Rows<T> k_##SUFFIX##_##T = {                                                                                  \
      Rows_##SUFFIX##_##T::gather_norm, Rows_##SUFFIX##_##T::scatter_add, Rows_##SUFFIX##_##T::norm_backward,         \
      Rows_##SUFFIX##_##T::gather,      Rows_##SUFFIX##_##T::row_dots,    Rows_##SUFFIX##_##T::swiglu};

using Float = float;
using BFloat16 = at::BFloat16;
using Half = at::Half;

XD_ROWS(baseline, , 4, Float)
XD_ROWS(baseline, , 4, BFloat16)
XD_ROWS(baseline, , 4, Half)
#if defined(__x86_64__)
XD_ROWS(avx2, XD_TARGET_AVX2, 8, Float)
XD_ROWS(avx2, XD_TARGET_AVX2, 8, BFloat16)
XD_ROWS(avx2, XD_TARGET_AVX2, 8, Half)
XD_ROWS(avx512, XD_TARGET_AVX512, 16, Float)
XD_ROWS(avx512, XD_TARGET_AVX512, 16, BFloat16)
XD_ROWS(avx512, XD_TARGET_AVX512, 16, Half)
#endif

template <typename T>
const Rows<T>& choose(const Rows<T>& baseline, const Rows<T>& avx2, const Rows<T>& avx512) {
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return avx512;
  if (capability.rfind("AVX2", 0) == 0) return avx2;
  return baseline;
}

}  // namespace

#if defined(__x86_64__)
#define XD_CHOOSE(T)                                                                                \
  template <>                                                                                       \
  const Rows<T>& rows<T>() {                                                                        \
    static const Rows<T>& chosen = choose<T>(k_baseline_##T, k_avx2_##T, k_avx512_##T);             \
    return chosen;                                                                                  \
  }
#else
#define XD_CHOOSE(T)         \
  template <>                \
  const Rows<T>& rows<T>() { \
    return k_baseline_##T;   \
  }
#endif
XD_CHOOSE(Float)
XD_CHOOSE(BFloat16)
XD_CHOOSE(Half)

}  // namespace xdfast
