// Standardised columns of a matrix in one visit per panel of columns.
//
//   z[n, d] = (x[n, d] - mean_d) * inv_d
//   eps on the std (RSD):             inv_d = 1 / (std_d + eps),        ratio_d = (std_d + eps) / std_d, 0 where std_d
//   = 0 eps on the variance (batch norm): inv_d = 1 / sqrt(var_d + eps),    ratio_d = 1
//
// Precision. Sums run in fp32 over at most kChunk rows and in fp64 above that, so the error does not grow with N. The
// mean is kept as hi + lo (fp32 mean of x, then the mean of x - hi) and x is centred as (x - hi) - lo: with column
// means of 1e5 standard deviations a single fp32 mean loses three digits of the gradient, the pair loses none.
// NaN and Inf stay in their own column: no operation mixes columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vector.h"

namespace xdfast {

constexpr int kVectors = 4;          // vectors of columns handled together: 4 independent accumulation chains
constexpr int64_t kChunk = 64;       // rows summed in fp32 before the sum is moved to fp64
constexpr int64_t kCopyRows = 1024;  // 64 columns of so many rows are 256 KiB: a fraction of L2
constexpr int64_t kAhead = 8;        // rows fetched ahead
constexpr int64_t kStrip = 8;        // rows normalised with one load of a block's constants

// Per column: mean = hi + lo, 1 / (std + eps), and the factor of the standardisation's own gradient. Four rows of [4,
// D].
struct ColumnStatistics {
  float *hi, *lo, *inv, *ratio;

  static ColumnStatistics at(float* rows, int64_t D) { return {rows, rows + D, rows + 2 * D, rows + 3 * D}; }
};

// One matrix to standardise. T is the type of x; z is fp32 with rows z_stride apart.
template <typename T>
struct StandardizeProblem {
  const T* x;
  int64_t stride, N, D;
  double eps;
  bool eps_on_variance;
  bool statistics_known;  // read them instead of computing them
  ColumnStatistics statistics;
  float* z;
  int64_t z_stride;
};

// Rows of one column block, from x itself. A partial block (fewer than `width` columns left) is padded with zeros.
template <typename T, int W, bool Partial>
struct Rows {
  const T* base;
  int64_t stride;
  int64_t columns;  // valid columns, used if Partial

  // Rows are far apart: the hardware does not foresee the next one.
  XD_INLINE void prefetch(int64_t n) const {
    const char* row = reinterpret_cast<const char*>(base + n * stride);
    for (int64_t line = 0; line < static_cast<int64_t>(kVectors * W * sizeof(T)); line += 64)
      __builtin_prefetch(row + line);
  }

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

template <int W, bool Partial>
XD_INLINE void put_row(float* out, int64_t columns, const typename Vector<W>::F (&row)[kVectors]) {
  float padded[kVectors * W];
  float* target = Partial ? padded : out;
  for (int v = 0; v < kVectors; ++v) store<W>(target + v * W, row[v]);
  if (Partial) std::memcpy(out, padded, columns * sizeof(float));
}

template <int W>
struct BlockStatistics {
  static constexpr int C = kVectors * W;
  float hi[C], lo[C], inv[C], ratio[C];
};

// Statistics of one block of C = kVectors * W columns: chunk by chunk of rows, each with two passes while it is in L1,
// merged in fp64 after Chan. All sums of a chunk stay in registers. Up to kCopyRows rows the fp32 rows are left in z,
// which normalisation then reads: its row stride is no power of two, so the block stays in L2 where that of x would
// not.
template <typename T, int W, bool Partial>
XD_INLINE void column_statistics(const StandardizeProblem<T>& p, int64_t d, int64_t columns, BlockStatistics<W>& out) {
  using F = typename Vector<W>::F;
  constexpr int C = BlockStatistics<W>::C;
  const Rows<T, W, Partial> rows{p.x + d, p.stride, columns};
  const bool copy = p.N <= kCopyRows;
  double mean[C] = {}, m2[C] = {};

  for (int64_t n0 = 0; n0 < p.N; n0 += kChunk) {
    const int64_t n1 = std::min(p.N, n0 + kChunk);
    const double before = static_cast<double>(n0), count = static_cast<double>(n1 - n0);
    F sum[kVectors] = {}, square[kVectors] = {}, row[kVectors], hi[kVectors];
    float chunk_hi[C], chunk_lo[C], chunk_squares[C];
    for (int64_t n = n0; n < n1; ++n) {
      if (n + kAhead < p.N) rows.prefetch(n + kAhead);
      rows.get(n, row);
      for (int v = 0; v < kVectors; ++v) sum[v] += row[v];
      if (copy) put_row<W, Partial>(p.z + n * p.z_stride + d, columns, row);
    }
    for (int v = 0; v < kVectors; ++v) {
      hi[v] = sum[v] / static_cast<float>(n1 - n0);
      store<W>(chunk_hi + v * W, hi[v]);
      sum[v] = F{};
    }
    for (int64_t n = n0; n < n1; ++n) {
      rows.get(n, row);
      for (int v = 0; v < kVectors; ++v) {
        const F centred = row[v] - hi[v];
        sum[v] += centred;
        square[v] += centred * centred;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<W>(chunk_lo + v * W, sum[v]);
      store<W>(chunk_squares + v * W, square[v]);
    }
    for (int j = 0; j < C; ++j) {
      // Divided, not multiplied by 1/count: in a constant column x - hi is the same small number in every row, its sums
      // are exact, and only an exact quotient makes the variance exactly 0 (and so the ratio 0, not 1e10).
      const double lo = static_cast<double>(chunk_lo[j]) / count;
      const double delta = chunk_hi[j] + lo - mean[j];
      mean[j] += delta * (count / (before + count));
      m2[j] += (static_cast<double>(chunk_squares[j]) - lo * lo * count) +
               delta * delta * (before * count / (before + count));
    }
  }
  const double rows_count = static_cast<double>(p.N);
  const double eps_variance = p.eps_on_variance ? p.eps : 0.0, eps_std = p.eps_on_variance ? 0.0 : p.eps;
  double inv[C], ratio[C];
  for (int j = 0; j < C; ++j) {  // divisions outside of conditions, or it does not vectorise
    double variance = m2[j] / rows_count;
    variance = variance < 0.0 ? 0.0 : variance;  // rounding; a NaN is kept, the comparison is false
    const double std_ = std::sqrt(variance + eps_variance), slope = (std_ + eps_std) / std_;
    inv[j] = 1.0 / (std_ + eps_std);
    ratio[j] = std_ == 0.0 ? 0.0 : slope;
  }
  for (int j = 0; j < C; ++j) {
    out.hi[j] = static_cast<float>(mean[j]);
    out.lo[j] = static_cast<float>(mean[j] - static_cast<double>(out.hi[j]));
    out.inv[j] = static_cast<float>(inv[j]);
    out.ratio[j] = static_cast<float>(ratio[j]);
  }
}

// Rows [n0, n1) of one column block: z = ((rows - hi) - lo) * inv, the columns' constants in registers. Rows up to
// `last` are fetched ahead.
template <typename T, int W, bool Partial>
XD_INLINE void normalize_rows(
    const Rows<T, W, Partial>& rows, int64_t n0, int64_t n1, int64_t last, const BlockStatistics<W>& s, float* z,
    int64_t z_stride) {
  typename Vector<W>::F row[kVectors], hi[kVectors], lo[kVectors], inv[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    load<W>(s.hi + v * W, hi[v]);
    load<W>(s.lo + v * W, lo[v]);
    load<W>(s.inv + v * W, inv[v]);
  }
  for (int64_t n = n0; n < n1; ++n) {
    if (n + kAhead <= last) rows.prefetch(n + kAhead);
    rows.get(n, row);
    for (int v = 0; v < kVectors; ++v) row[v] = ((row[v] - hi[v]) - lo[v]) * inv[v];
    put_row<W, Partial>(z + n * z_stride, rows.columns, row);
  }
}

template <typename T, int W, bool Partial>
XD_INLINE void normalize_block(
    const StandardizeProblem<T>& p, int64_t d, int64_t columns, int64_t n0, int64_t n1, const BlockStatistics<W>& s) {
  if (p.statistics_known || p.N > kCopyRows) {
    normalize_rows<T, W, Partial>({p.x + d, p.stride, columns}, n0, n1, p.N - 1, s, p.z + d, p.z_stride);
  } else {
    normalize_rows<float, W, Partial>({p.z + d, p.z_stride, columns}, n0, n1, -1, s, p.z + d, p.z_stride);
  }
}

// Columns [d0, d1) of the matrix: statistics block by block, then z panel-wide, strip of rows by strip of rows.
template <typename T, int W>
XD_INLINE void standardize_panel(const StandardizeProblem<T>& p, int64_t d0, int64_t d1) {
  constexpr int64_t C = BlockStatistics<W>::C;
  constexpr int64_t kBlocks = 4;  // blocks normalised together: 4 * C columns of z are written at a time
  BlockStatistics<W> statistics[kBlocks];
  const ColumnStatistics& known = p.statistics;
  for (int64_t b0 = d0; b0 < d1; b0 += kBlocks * C) {
    const int64_t end = std::min(d1, b0 + kBlocks * C);
    for (int64_t d = b0; d < end; d += C) {
      const int64_t columns = std::min(C, end - d);
      BlockStatistics<W>& s = statistics[(d - b0) / C];
      if (p.statistics_known) {
        std::memset(&s, 0, sizeof(s));
        std::memcpy(s.hi, known.hi + d, columns * sizeof(float));
        std::memcpy(s.lo, known.lo + d, columns * sizeof(float));
        std::memcpy(s.inv, known.inv + d, columns * sizeof(float));
        continue;
      }
      if (columns == C) {
        column_statistics<T, W, false>(p, d, columns, s);
      } else {
        column_statistics<T, W, true>(p, d, columns, s);
      }
      std::memcpy(known.hi + d, s.hi, columns * sizeof(float));
      std::memcpy(known.lo + d, s.lo, columns * sizeof(float));
      std::memcpy(known.inv + d, s.inv, columns * sizeof(float));
      std::memcpy(known.ratio + d, s.ratio, columns * sizeof(float));
    }
    for (int64_t n0 = 0; n0 < p.N; n0 += kStrip) {
      const int64_t n1 = std::min(p.N, n0 + kStrip);
      for (int64_t d = b0; d < end; d += C) {
        const int64_t columns = std::min(C, end - d);
        if (columns == C) {
          normalize_block<T, W, false>(p, d, columns, n0, n1, statistics[(d - b0) / C]);
        } else {
          normalize_block<T, W, true>(p, d, columns, n0, n1, statistics[(d - b0) / C]);
        }
      }
    }
  }
}

}  // namespace xdfast
