// Column standardisation of a matrix: the pre-pass of the RSD loss, fused into one visit per column block.
//
//   z[n, d] = (x[n, d] - mean_d) / (std_d + eps)
//   inv_d   = 1 / (std_d + eps),   ratio_d = (std_d + eps) / std_d, 0 where std_d = 0
//
// Precision. Sums run in fp32 over at most kChunk rows and in fp64 above that, so the error does not grow with N. The
// mean is kept as hi + lo (fp32 mean of x, then the mean of x - hi) and x is centred as (x - hi) - lo: with column
// means of 1e5 standard deviations a single fp32 mean loses three digits of the gradient, the pair loses none.
// NaN and Inf stay in their own column: no operation mixes columns.
//
// Instruction sets. The kernel is written once with GCC/Clang vector types and compiled for several targets by function
// attributes; ATen's detection chooses at run time (ATEN_CPU_CAPABILITY overrides it). A wheel runs on any x86-64.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>

#include "../checks.h"

#define XD_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kVectors = 4;             // vectors of columns handled together: 4 independent accumulation chains
constexpr int64_t kChunk = 64;          // rows summed in fp32 before the sum is moved to fp64
constexpr int64_t kBufferBytes = 512 << 10;  // of the fp32 copy of a panel: half of a usual L2 cache
constexpr int64_t kPanelColumns = 128;  // 512 bytes of a row of z are written at a time
constexpr int64_t kStrip = 8;  // rows normalised with one load of a block's constants
constexpr int64_t kSerialElements = 32768;  // below this the work is done before a second thread has woken up

// W lanes. Loads and stores go through the unaligned, alias-anything twins: std::memcpy of a vector compiles to 16-byte
// pieces outside AVX-512, and the reload then stalls on store forwarding (measured: AVX2 four times slower).
template <int W>
struct Vector {
  typedef float F __attribute__((vector_size(W * 4)));
  typedef uint32_t U __attribute__((vector_size(W * 4)));
  typedef float FAny __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint16_t HAny __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

template <int W>
XD_INLINE void load(const float* p, typename Vector<W>::F& out) {
  out = *reinterpret_cast<const typename Vector<W>::FAny*>(p);
}

template <int W>
XD_INLINE void store(float* p, const typename Vector<W>::F& value) {
  *reinterpret_cast<typename Vector<W>::FAny*>(p) = value;
}

template <int W>
XD_INLINE void load(const at::BFloat16* p, typename Vector<W>::F& out) {
  using U = typename Vector<W>::U;
  out = (typename Vector<W>::F)(
      __builtin_convertvector(*reinterpret_cast<const typename Vector<W>::HAny*>(p), U) << 16);
}

// IEEE half to float in integer arithmetic, so that it vectorises on every target: shift exponent and mantissa into
// place, multiply by 2^112 to correct the exponent bias (exact, subnormals included), restore Inf/NaN and the sign.
template <int W>
XD_INLINE void load(const at::Half* p, typename Vector<W>::F& out) {
  using F = typename Vector<W>::F;
  using U = typename Vector<W>::U;
  const U wide = __builtin_convertvector(*reinterpret_cast<const typename Vector<W>::HAny*>(p), U);
  const U magnitude = (wide & 0x7fffu) << 13;
  U bits = (U)((F)magnitude * 0x1p112f);
  bits |= (U)(magnitude >= 0x0f800000u) & 0x7f800000u;  // a vector comparison gives all ones where true
  bits |= (wide & 0x8000u) << 16;
  out = (F)bits;
}

// Rows of one column block, from x itself. A partial block (fewer than `width` columns left) is padded with zeros.
template <typename T, int W, bool Partial>
struct Rows {
  const T* base;
  int64_t stride;
  int64_t columns;  // valid columns, used if Partial

  XD_INLINE void get(int64_t n, typename Vector<W>::F (&out)[kVectors]) const {
    const T* row = base + n * stride;
    T padded[kVectors * W];
    if (Partial) {
      std::memset(static_cast<void*>(padded), 0, sizeof(padded));
      std::memcpy(static_cast<void*>(padded), row, columns * sizeof(T));
      row = padded;
    }
    for (int v = 0; v < kVectors; ++v) load<W>(row + v * W, out[v]);
  }
};

template <int W>
XD_INLINE void flush(typename Vector<W>::F (&sum)[kVectors], double* total) {
  float lanes[kVectors * W];
  for (int v = 0; v < kVectors; ++v) store<W>(lanes + v * W, sum[v]);
  for (int j = 0; j < kVectors * W; ++j) total[j] += static_cast<double>(lanes[j]);
  for (int v = 0; v < kVectors; ++v) sum[v] = typename Vector<W>::F{};
}

// What pass 3 needs of one column block.
template <int W>
struct Statistics {
  static constexpr int C = kVectors * W;
  float hi[C], lo[C], inv[C], ratio[C];
};

// Passes 1 and 2 over one block of C = kVectors * W columns; all sums stay in registers. buffer: [N, C] for the rows as
// float32, or unused (then x is read again).
template <typename T, int W, bool Partial, bool Buffered>
XD_INLINE void column_statistics(
    const Rows<T, W, Partial>& rows, int64_t N, double eps, float* buffer, Statistics<W>& out) {
  using F = typename Vector<W>::F;
  constexpr int C = Statistics<W>::C;
  const Rows<float, W, false> buffered{buffer, C, C};
  const double count = static_cast<double>(N);
  double total[C] = {}, squares[C] = {};
  F sum[kVectors] = {}, square[kVectors] = {}, row[kVectors], hi[kVectors];

  // 1. hi = fp32 mean of x
  for (int64_t n0 = 0; n0 < N; n0 += kChunk) {
    const int64_t n1 = std::min(N, n0 + kChunk);
    for (int64_t n = n0; n < n1; ++n) {
      rows.get(n, row);
      for (int v = 0; v < kVectors; ++v) {
        sum[v] += row[v];
        if (Buffered) store<W>(buffer + n * C + v * W, row[v]);
      }
    }
    flush<W>(sum, total);
  }
  for (int j = 0; j < C; ++j) out.hi[j] = static_cast<float>(total[j] / count);
  for (int v = 0; v < kVectors; ++v) load<W>(out.hi + v * W, hi[v]);

  // 2. lo = mean of x - hi; biased variance around hi + lo
  std::memset(total, 0, sizeof(total));
  for (int64_t n0 = 0; n0 < N; n0 += kChunk) {
    const int64_t n1 = std::min(N, n0 + kChunk);
    for (int64_t n = n0; n < n1; ++n) {
      if (Buffered) {
        buffered.get(n, row);
      } else {
        rows.get(n, row);
      }
      for (int v = 0; v < kVectors; ++v) {
        const F centred = row[v] - hi[v];
        sum[v] += centred;
        square[v] += centred * centred;
      }
    }
    flush<W>(sum, total);
    flush<W>(square, squares);
  }
  for (int j = 0; j < C; ++j) {
    // Divided, not multiplied by 1/N: in a constant column x - hi is the same small number in every row, its sums are
    // exact, and only an exact quotient makes the variance exactly 0 (and so the ratio 0, not 1e10).
    const double mean_lo = total[j] / count;
    double variance = squares[j] / count - mean_lo * mean_lo;
    if (variance < 0.0) variance = 0.0;  // rounding; a NaN is kept, the comparison is false
    const double std_ = std::sqrt(variance);
    out.lo[j] = static_cast<float>(mean_lo);
    out.inv[j] = static_cast<float>(1.0 / (std_ + eps));
    out.ratio[j] = std_ == 0.0 ? 0.0f : static_cast<float>((std_ + eps) / std_);
  }
}

// Pass 3 for rows [n0, n1) of one column block: z = ((x - hi) - lo) * inv, the columns' constants in registers.
template <typename T, int W, bool Partial, bool PartialOut>
XD_INLINE void normalize_rows(
    const Rows<T, W, Partial>& rows, int64_t n0, int64_t n1, const Statistics<W>& s, float* z, int64_t z_stride,
    int64_t columns) {
  typename Vector<W>::F row[kVectors], hi[kVectors], lo[kVectors], inv[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    load<W>(s.hi + v * W, hi[v]);
    load<W>(s.lo + v * W, lo[v]);
    load<W>(s.inv + v * W, inv[v]);
  }
  for (int64_t n = n0; n < n1; ++n) {
    rows.get(n, row);
    float padded[Statistics<W>::C];
    float* out = PartialOut ? padded : z + n * z_stride;
    for (int v = 0; v < kVectors; ++v) store<W>(out + v * W, ((row[v] - hi[v]) - lo[v]) * inv[v]);
    if (PartialOut) std::memcpy(z + n * z_stride, padded, columns * sizeof(float));
  }
}

template <typename T>
struct Problem {
  const T* x;
  int64_t stride, N, D;
  double eps;
  float *z, *inv, *ratio;
  int64_t panel;  // column blocks per panel
};

// Panels [first, last) of the matrix. A panel is as many neighbouring column blocks as the buffer holds: statistics go
// block by block, but z is written panel-wide, row by row. Narrow writes at a power-of-two row stride fall into few
// cache sets (measured: half the speed at D = 2048 and 4096).
template <typename T, int W, bool Buffered>
XD_INLINE void standardize_panels(const Problem<T>& p, int64_t first, int64_t last) {
  constexpr int64_t C = Statistics<W>::C;
  const int64_t N = p.N, blocks = (p.D + C - 1) / C;
  std::unique_ptr<float[]> buffer(Buffered ? new float[p.panel * N * C] : nullptr);
  std::unique_ptr<Statistics<W>[]> statistics(new Statistics<W>[p.panel]);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t b0 = panel * p.panel, count = std::min(p.panel, blocks - b0);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t d = (b0 + b) * C, columns = std::min(C, p.D - d);
      float* own = Buffered ? buffer.get() + b * N * C : nullptr;
      Statistics<W>& s = statistics[b];
      if (columns == C) {
        column_statistics<T, W, false, Buffered>({p.x + d, p.stride, columns}, N, p.eps, own, s);
      } else {
        column_statistics<T, W, true, Buffered>({p.x + d, p.stride, columns}, N, p.eps, own, s);
      }
      std::memcpy(p.inv + d, s.inv, columns * sizeof(float));
      std::memcpy(p.ratio + d, s.ratio, columns * sizeof(float));
    }
    for (int64_t n0 = 0; n0 < N; n0 += kStrip) {
      const int64_t n1 = std::min(N, n0 + kStrip);
      for (int64_t b = 0; b < count; ++b) {
        const int64_t d = (b0 + b) * C, columns = std::min(C, p.D - d);
        const Rows<float, W, false> own{Buffered ? buffer.get() + b * N * C : nullptr, C, C};
        const Statistics<W>& s = statistics[b];
        float* z = p.z + d;
        if (Buffered && columns == C) {
          normalize_rows<float, W, false, false>(own, n0, n1, s, z, p.D, columns);
        } else if (Buffered) {
          normalize_rows<float, W, false, true>(own, n0, n1, s, z, p.D, columns);
        } else if (columns == C) {
          normalize_rows<T, W, false, false>({p.x + d, p.stride, columns}, n0, n1, s, z, p.D, columns);
        } else {
          normalize_rows<T, W, true, true>({p.x + d, p.stride, columns}, n0, n1, s, z, p.D, columns);
        }
      }
    }
  }
}

template <typename T, int W>
XD_INLINE void standardize_range(const Problem<T>& p, int64_t first, int64_t last) {
  if (p.N * Statistics<W>::C * static_cast<int64_t>(sizeof(float)) <= kBufferBytes) {
    standardize_panels<T, W, true>(p, first, last);
  } else {
    standardize_panels<T, W, false>(p, first, last);
  }
}

template <typename T>
void standardize_baseline(const Problem<T>& p, int64_t first, int64_t last) {
  standardize_range<T, 4>(p, first, last);
}

#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma,f16c"))) void standardize_avx2(const Problem<T>& p, int64_t first, int64_t last) {
  standardize_range<T, 8>(p, first, last);
}

template <typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) void standardize_avx512(
    const Problem<T>& p, int64_t first, int64_t last) {
  standardize_range<T, 16>(p, first, last);
}
#endif

template <typename T>
void standardize(Problem<T> p) {
  void (*range)(const Problem<T>&, int64_t, int64_t) = standardize_baseline<T>;
  int64_t block = kVectors * 4;
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) {
    range = standardize_avx512<T>;
    block = kVectors * 16;
  } else if (capability.rfind("AVX2", 0) == 0) {
    range = standardize_avx2<T>;
    block = kVectors * 8;
  }
#endif
  const int64_t blocks = (p.D + block - 1) / block;
  const int64_t threads = p.N * p.D < kSerialElements ? 1 : at::get_num_threads();
  const int64_t fitting = kBufferBytes / (p.N * block * static_cast<int64_t>(sizeof(float)));
  p.panel = std::max<int64_t>(1, std::min({fitting, (blocks + threads - 1) / threads, kPanelColumns / block}));
  const int64_t panels = (blocks + p.panel - 1) / p.panel;
  at::parallel_for(0, panels, threads == 1 ? panels : 1, [&](int64_t first, int64_t last) { range(p, first, last); });
}

template <typename T>
void run(const at::Tensor& x, double eps, at::Tensor& z, at::Tensor& inv, at::Tensor& ratio) {
  standardize(Problem<T>{
      x.const_data_ptr<T>(), x.stride(0), x.size(0), x.size(1), eps, z.mutable_data_ptr<float>(),
      inv.mutable_data_ptr<float>(), ratio.mutable_data_ptr<float>(), 1});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rsd_standardize(const at::Tensor& input, double eps) {
  XD_CHECK_MATRIX("rsd_standardize", input);
  XD_CHECK_ROWS("rsd_standardize", input);
  XD_CHECK_CPU("rsd_standardize", input);
  XD_CHECK_FLOAT_OR_HALF("rsd_standardize", input);
  // Rows may be any distance apart; columns have to be neighbours.
  const at::Tensor x = input.size(1) <= 1 || input.stride(1) == 1 ? input : input.contiguous();
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor z = at::empty({x.size(0), x.size(1)}, options);
  at::Tensor inv = at::empty({x.size(1)}, options), ratio = at::empty({x.size(1)}, options);
  switch (x.scalar_type()) {
    case at::kFloat: run<float>(x, eps, z, inv, ratio); break;
    case at::kBFloat16: run<at::BFloat16>(x, eps, z, inv, ratio); break;
    default: run<at::Half>(x, eps, z, inv, ratio); break;
  }
  return {z, inv, ratio};
}

}  // namespace

TORCH_LIBRARY_IMPL(xdfast_c, CPU, m) {
  m.impl("rsd_standardize", &rsd_standardize);
}
