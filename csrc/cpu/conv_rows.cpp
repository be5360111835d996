// Convolution along one dimension of channels-last rows, with GroupNorm, Mish, FiLM and a residual in the same pass:
// the layers of a diffusion policy's denoiser (xdfast/robot/packed_unet.py), for inference. Of a few rows and a batch
// of one, general convolutions spend most of their time on the way to the product.
//
// A window of K rows of a padded [H + 2p, I] matrix is K * I numbers in a row, so the product with weights [K * I, O]
// needs no copy of windows: row h of the left factor starts at h * stride * I. Weights come in panels of kPanel output
// channels.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace xdfast {
namespace {

using at::Tensor;

constexpr int64_t kPanel = 16;
constexpr int64_t kParallelFlops = 4'000'000;  // below it a second thread costs more than it saves

struct Channels {  // of one task: outputs [first, first + count), count padded to whole panels in `product`
  int64_t first, count;
};

struct Shape {
  int64_t rows, inputs, window, step, outputs;  // rows of the result, window = K * I, step = stride * I
};

struct Finish {
  int64_t group;  // channels per group; 0: no norm, no Mish
  float eps;
  const float* norm_weight;
  const float* norm_bias;
  const float* scale;  // of FiLM, minus 1; may be null
  const float* shift;
};

// product [R, kPanel] = bias + windows [R, window] * panel [window, kPanel]
template <int W, int R>
XD_INLINE void block(
    const float* windows, int64_t step, int64_t window, const float* panel, const float* bias, float* product,
    int64_t ld) {
  using F = typename Vector<W>::F;
  constexpr int V = kPanel / W;
  F sums[R][V];
  for (int v = 0; v < V; ++v) {
    F b = {};
    if (bias) load<W>(bias + v * W, b);
    for (int r = 0; r < R; ++r) sums[r][v] = b;
  }
  for (int64_t k = 0; k < window; ++k) {
    F weights[V];
    for (int v = 0; v < V; ++v) load<W>(panel + k * kPanel + v * W, weights[v]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float x = windows[r * step + k];
      for (int v = 0; v < V; ++v) sums[r][v] += weights[v] * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store<W>(product + r * ld + v * W, sums[r][v]);
  }
}

template <int W, int MOST>
XD_INLINE void product_panel(
    const float* x, const Shape& s, const float* panel, const float* bias, float* product, int64_t ld) {
  const int64_t blocks = (s.rows + MOST - 1) / MOST;
  for (int64_t b = 0, row = 0; b < blocks; ++b) {
    const int64_t rows = s.rows * (b + 1) / blocks - row;  // blocks of about equal size
    const float* from = x + row * s.step;
    float* to = product + row * ld;
    switch (rows) {
#define XD_BLOCK(R)                                                                    \
  case R:                                                                              \
    if constexpr (R <= MOST) block<W, R>(from, s.step, s.window, panel, bias, to, ld); \
    break;
      XD_BLOCK(1)
      XD_BLOCK(2) XD_BLOCK(3) XD_BLOCK(4) XD_BLOCK(5) XD_BLOCK(6) XD_BLOCK(7) XD_BLOCK(8) XD_BLOCK(9) XD_BLOCK(10)
          XD_BLOCK(11) XD_BLOCK(12) XD_BLOCK(13) XD_BLOCK(14) XD_BLOCK(15) XD_BLOCK(16)
#undef XD_BLOCK
    }
    row += rows;
  }
}

// x tanh(softplus(x)) = x (e^2 + 2 e) / (e^2 + 2 e + 2) with e = e^x; from 20 on it is x to the last bit.
template <int W>
XD_INLINE void mish(const typename Vector<W>::F& x, typename Vector<W>::F& out) {
  using F = typename Vector<W>::F;
  typedef int32_t I __attribute__((vector_size(W * 4)));
  const I high = (I)(x > 20.0f), low = (I)(x < -87.0f);  // neither holds for NaN, which so stays NaN
  const F bounded = (F)(((I)x & ~(high | low)) | ((I)(F{} + 20.0f) & high) | ((I)(F{} - 87.0f) & low));
  F e;
  exponential<W>(bounded, e);
  const F n = e * (e + 2.0f);
  out = x * (n / (n + 2.0f));
}

// Norm, Mish and FiLM of W channels from j on, whose product is v.
template <int W>
XD_INLINE void finished(
    const Finish& f, int64_t j, float mean, float inverse, const typename Vector<W>::F& v, typename Vector<W>::F& y) {
  typename Vector<W>::F a, b;
  y = v;
  if (f.group) {
    load<W>(f.norm_weight + j, a);
    load<W>(f.norm_bias + j, b);
    mish<W>((v - mean) * (a * inverse) + b, y);
  }
  if (f.scale) {
    load<W>(f.scale + j, a);
    load<W>(f.shift + j, b);
    y += y * a + b;
  }
}

// One task's channels: product, then norm and the rest from scratch [rows, ld] to out.
template <int W, int MOST>
XD_INLINE void convolve(
    const float* x, const Shape& s, const float* panels, const float* bias, const Channels& c, const Finish& f,
    const float* residual, float* out, float* scratch) {
  using F = typename Vector<W>::F;
  const int64_t ld = (c.count + kPanel - 1) / kPanel * kPanel;
  for (int64_t p = 0; p < ld; p += kPanel) {
    product_panel<W, MOST>(
        x, s, panels + (c.first + p) * s.window, bias ? bias + c.first + p : nullptr, scratch + p, ld);
  }
  const int64_t group = f.group ? f.group : c.count;
  for (int64_t g = 0; g < c.count; g += group) {
    const int64_t wide = std::min(group, c.count - g), whole = wide / W * W;
    float mean = 0.0f, inverse = 1.0f;
    if (f.group) {  // two passes over numbers that are in the first-level cache
      F sums = {}, v;
      float rest = 0.0f;
      for (int64_t h = 0; h < s.rows; ++h) {
        const float* row = scratch + h * ld + g;
        for (int64_t j = 0; j < whole; j += W) load<W>(row + j, v), sums += v;
        for (int64_t j = whole; j < wide; ++j) rest += row[j];
      }
      mean = (sum_of<W>(sums) + rest) / static_cast<float>(s.rows * wide);
      sums = F{}, rest = 0.0f;
      for (int64_t h = 0; h < s.rows; ++h) {
        const float* row = scratch + h * ld + g;
        for (int64_t j = 0; j < whole; j += W) load<W>(row + j, v), v -= mean, sums += v * v;
        for (int64_t j = whole; j < wide; ++j) rest += (row[j] - mean) * (row[j] - mean);
      }
      inverse = 1.0f / std::sqrt((sum_of<W>(sums) + rest) / static_cast<float>(s.rows * wide) + f.eps);
    }
    const int64_t first = c.first + g;
    for (int64_t h = 0; h < s.rows; ++h) {
      const float* row = scratch + h * ld + g;
      const int64_t at = h * s.outputs + first;
      F v, y, r;
      for (int64_t j = 0; j < whole; j += W) {
        load<W>(row + j, v);
        finished<W>(f, first + j, mean, inverse, v, y);
        if (residual) load<W>(residual + at + j, r), y += r;
        store<W>(out + at + j, y);
      }
      for (int64_t j = whole; j < wide; ++j) {  // the last channels, one at a time
        float z = row[j];
        if (f.group) {
          z = (z - mean) * inverse * f.norm_weight[first + j] + f.norm_bias[first + j];
          F one = F{} + z, m;
          mish<W>(one, m);
          z = m[0];
        }
        if (f.scale) z += z * f.scale[first + j] + f.shift[first + j];
        out[at + j] = residual ? z + residual[at + j] : z;
      }
    }
  }
}

#define XD_CONVOLVE(SUFFIX, TARGET, WIDTH, MOST)                                                                  \
  TARGET void convolve_##SUFFIX(                                                                                  \
      const float* x, const Shape& s, const float* panels, const float* bias, const Channels& c, const Finish& f, \
      const float* residual, float* out, float* scratch) {                                                        \
    convolve<WIDTH, MOST>(x, s, panels, bias, c, f, residual, out, scratch);                                      \
  }

// Rows of a block: as many as there are registers for their sums.
XD_CONVOLVE(baseline, , 4, 3)
#if defined(__x86_64__)
XD_CONVOLVE(avx2, XD_TARGET_AVX2, 8, 6)
XD_CONVOLVE(avx512, XD_TARGET_AVX512, 16, 16)
#endif

decltype(&convolve_baseline) convolve_here() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return convolve_avx512;
  if (capability.rfind("AVX2", 0) == 0) return convolve_avx2;
#endif
  return convolve_baseline;
}

const float* vector_of(const char* what, const std::optional<Tensor>& t, int64_t size) {
  if (!t) return nullptr;
  TORCH_CHECK_VALUE(
      t->scalar_type() == at::kFloat && t->is_contiguous() && t->dim() == 1 && t->size(0) == size &&
          t->device().is_cpu(),
      "conv_rows: ", what, " must be contiguous float32 [", size, "], but is ", t->scalar_type(), " ", t->sizes());
  return t->const_data_ptr<float>();
}

Tensor conv_rows(
    const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t outputs, int64_t kernel,
    int64_t stride, int64_t padding, int64_t groups, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, double eps, const std::optional<Tensor>& film, int64_t film_offset,
    const std::optional<Tensor>& residual) {
  const char* op = "conv_rows";
  XD_CHECK_CPU(op, x);
  TORCH_CHECK_VALUE(
      x.scalar_type() == at::kFloat && x.dim() == 3 && x.is_contiguous(), op,
      ": x must be contiguous float32 [B, H, I], but is ", x.scalar_type(), " ", x.sizes());
  constexpr int64_t kMost = 1 << 24;  // products of two of them stay in range
  TORCH_CHECK_VALUE(
      outputs >= 1 && kernel >= 1 && stride >= 1 && padding >= 0 && groups >= 0 &&
          std::max({outputs, kernel, stride, padding}) <= kMost && (groups == 0 || outputs % groups == 0),
      op, ": outputs ", outputs, ", kernel ", kernel, ", stride ", stride, ", padding ", padding, ", groups ", groups);
  const int64_t batch = x.size(0), height = x.size(1), inputs = x.size(2), padded = height + 2 * padding;
  const int64_t count = (outputs + kPanel - 1) / kPanel;
  TORCH_CHECK_VALUE(padded >= kernel, op, ": ", height, " rows are fewer than the kernel's ", kernel);
  TORCH_CHECK_VALUE(
      panels.scalar_type() == at::kFloat && panels.is_contiguous() && panels.device().is_cpu() &&
          panels.sizes() == at::IntArrayRef({count, kernel * inputs, kPanel}),
      op, ": panels must be contiguous float32 ", at::IntArrayRef({count, kernel * inputs, kPanel}), ", but are ",
      panels.scalar_type(), " ", panels.sizes());
  const Shape shape{(padded - kernel) / stride + 1, inputs, kernel * inputs, stride * inputs, outputs};
  Finish finish{
      groups ? outputs / groups : 0,
      static_cast<float>(eps),
      vector_of("norm_weight", norm_weight, outputs),
      vector_of("norm_bias", norm_bias, outputs),
      nullptr,
      nullptr};
  TORCH_CHECK_VALUE(
      groups == 0 || (finish.norm_weight && finish.norm_bias), op, ": a norm needs norm_weight and norm_bias");
  const float* film_data = nullptr;
  if (film) {
    TORCH_CHECK_VALUE(
        film->scalar_type() == at::kFloat && film->dim() == 2 && film->is_contiguous() && film->device().is_cpu() &&
            film->size(0) == batch && film_offset >= 0 && film_offset <= film->size(1) - 2 * outputs,
        op, ": film must be contiguous float32 [", batch, ", F] with 2 * ", outputs, " columns from ", film_offset,
        " on, but is ", film->scalar_type(), " ", film->sizes());
    film_data = film->const_data_ptr<float>() + film_offset;
  }
  const std::vector<int64_t> made{batch, shape.rows, outputs};
  const float* residual_data = nullptr;
  if (residual) {
    TORCH_CHECK_VALUE(
        residual->scalar_type() == at::kFloat && residual->is_contiguous() && residual->device().is_cpu() &&
            residual->sizes() == at::IntArrayRef(made),
        op, ": residual must be contiguous float32 ", at::IntArrayRef(made), ", but is ", residual->scalar_type(), " ",
        residual->sizes());
    residual_data = residual->const_data_ptr<float>();
  }
  // The bias in whole panels, too: a block loads kPanel of it.
  const int64_t whole = count * kPanel;
  TORCH_CHECK_VALUE(
      !bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == whole), op,
      ": bias must be contiguous float32 [", whole, "], padded like the panels");
  const float* bias_data = bias ? bias->const_data_ptr<float>() : nullptr;
  Tensor out = at::empty(made, x.options());
  if (out.numel() == 0) return out;

  // A task is whole groups and whole panels.
  const int64_t unit = finish.group ? std::lcm(finish.group, kPanel) : kPanel;
  const int64_t units = outputs % unit == 0 ? outputs / unit : 1, wide = outputs / units;
  std::vector<float> copy;
  const float* data = x.const_data_ptr<float>();
  if (padding > 0) {
    copy.assign(batch * padded * inputs, 0.0f);
    for (int64_t b = 0; b < batch; ++b) {
      std::copy_n(data + b * height * inputs, height * inputs, copy.data() + (b * padded + padding) * inputs);
    }
    data = copy.data();
  }
  float* to = out.mutable_data_ptr<float>();
  const float* weights = panels.const_data_ptr<float>();
  static const auto run = convolve_here();
  const int64_t film_row = film ? film->size(1) : 0;
  const auto tasks = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(shape.rows * ((wide + kPanel - 1) / kPanel * kPanel));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n % batch, u = n / batch;  // a panel's weights serve the whole batch before the next ones
      Finish own = finish;
      if (film_data) own.scale = film_data + b * film_row, own.shift = own.scale + outputs;
      run(data + b * padded * inputs, shape, weights, bias_data, {u * wide, wide}, own,
          residual_data ? residual_data + b * shape.rows * outputs : nullptr, to + b * shape.rows * outputs,
          scratch.data());
    }
  };
  const int64_t flops = 2 * batch * shape.rows * shape.window * whole;
  if (flops < kParallelFlops) {
    tasks(0, batch * units);
  } else {
    at::parallel_for(0, batch * units, 1, tasks);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(xdfast_c, CPU, m) {
  m.impl("conv_rows", conv_rows);
}

}  // namespace xdfast
