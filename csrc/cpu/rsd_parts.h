// What both forms of the cross-correlation loss share: options, blocks of columns, slices of a workspace, coefficients.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "standardize.h"

namespace xdfast {

constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which a second thread wakes up too late

inline int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Takes slices of one allocation; with no base it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    char* p = base ? base + used : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
};

// One allocation for all that `layout(arena)` takes; it is called twice, first to count.
template <typename Layout>
at::Tensor allocate(const at::Tensor& like, const Layout& layout) {
  Arena counted;
  layout(counted);
  at::Tensor memory = at::empty({counted.used}, like.options().dtype(at::kByte));
  Arena arena{reinterpret_cast<char*>(memory.mutable_data_ptr())};
  layout(arena);
  return memory;
}

// Ranges of a given step over [0, size) such that every thread gets the same number of them, none wider than `widest`.
struct Blocks {
  int64_t size, width, count;

  Blocks(int64_t size, int64_t widest, int64_t step, int64_t threads) : size(size) {
    const int64_t rounds = std::max<int64_t>(1, (size + widest * threads - 1) / (widest * threads));
    width = std::max(step, round_up((size + rounds * threads - 1) / (rounds * threads), step));
    count = (size + width - 1) / width;
  }
  int64_t begin(int64_t i) const { return i * width; }
  int64_t length(int64_t i) const { return std::min(width, size - i * width); }
};

// One of the two matrices, what is known of it beforehand, and what is wanted.
struct Input {
  at::Tensor x;                   // [N, D], unit column stride
  ColumnStatistics statistics{};  // [D] each
  bool statistics_known = false;
  float* gram = nullptr;  // [N, N] z z^T / D
  bool gram_known = false;
  float* gradient = nullptr;  // [N, D] to write, or null
};

struct Options {
  double kappa, eps, scale;
  bool eps_on_variance, bf16;
};

// gradient = a U + c T - q S of one column: scale * inv * (2 kappa / N^2 U + weight T - ratio slope S), U = unit * u.
struct GradientColumn {
  float a, c, q;

  GradientColumn(const Options& o, double n, double unit, double p, double f, double inv, double ratio) {
    inv *= o.scale;
    const double weight = 2.0 / n * (p - 1.0 - o.kappa * p);
    const double slope = 2.0 * o.kappa / n * f + weight * p;
    a = static_cast<float>(inv * 2.0 * o.kappa / (n * n) * unit);
    c = static_cast<float>(inv * weight);
    q = static_cast<float>(inv * slope * ratio);
  }
};

// (invariance, decorrelation, mean diagonal)
using Components = std::tuple<double, double, double>;

// `squares`: sum of all P_ij^2, or of those off the diagonal.
inline Components components(const double* p, int64_t D, double squares, bool with_diagonal) {
  double invariance = 0.0, diagonal_squares = 0.0, diagonal = 0.0;
  for (int64_t j = 0; j < D; ++j) {
    invariance += (p[j] - 1) * (p[j] - 1);
    diagonal_squares += p[j] * p[j];
    diagonal += p[j];
  }
  return {invariance, with_diagonal ? squares - diagonal_squares : squares, diagonal / static_cast<double>(D)};
}

}  // namespace xdfast
