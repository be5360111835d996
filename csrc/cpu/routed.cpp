// Row-list passes around the matrix products of routed layers (xdfast/ops/routed/native.py). Matrices are contiguous in
// their rows; norm weights are float32; compact matrices hold exactly the rows they are given.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "rows.h"

namespace xdfast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define XD_DISPATCH(T, tensor, ...)           \
  switch ((tensor).scalar_type()) {           \
    case at::kFloat: {                        \
      using T = float;                        \
      __VA_ARGS__();                          \
      break;                                  \
    }                                         \
    case at::kBFloat16: {                     \
      using T = at::BFloat16;                 \
      __VA_ARGS__();                          \
      break;                                  \
    }                                         \
    default: {                                \
      using T = at::Half;                     \
      __VA_ARGS__();                          \
    }                                         \
  }

// About 32 KiB of rows a task: small enough to share among cores, large enough not to feel it.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns));
}

const float* floats(const OptionalTensor& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

void check_floats(const char* op, const OptionalTensor& t, int64_t size) {
  if (!t) return;
  TORCH_CHECK_VALUE(
      t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == size, op,
      ": a vector must be contiguous float32 with ", size, " elements, but is ", t->scalar_type(), " ", t->sizes());
}

// A matrix whose rows are contiguous; returns the distance between rows.
int64_t check_matrix(const char* op, const Tensor& x) {
  XD_CHECK_MATRIX(op, x);
  XD_CHECK_CPU(op, x);
  XD_CHECK_FLOAT_OR_HALF(op, x);
  TORCH_CHECK_VALUE(x.size(1) <= 1 || x.stride(1) == 1, op, ": rows must be contiguous, but strides are ", x.strides());
  return x.stride(0);
}

RowList check_list(const char* op, const Tensor& index, int64_t units, int64_t rows_per_unit, int64_t rows) {
  TORCH_CHECK_VALUE(
      index.scalar_type() == at::kInt && index.is_contiguous() && index.device().is_cpu(), op,
      ": index must be contiguous int32 on the CPU, but is ", index.scalar_type());
  TORCH_CHECK_VALUE(
      units >= 0 && units <= index.numel() && rows_per_unit >= 1, op, ": ", units, " units of ", rows_per_unit,
      " rows, but index has ", index.numel(), " entries");
  const int32_t* data = index.const_data_ptr<int32_t>();
  for (int64_t u = 0; u < units; ++u) {  // a plan of another batch must not read foreign memory
    TORCH_CHECK_VALUE(
        data[u] >= 0 && (int64_t{data[u]} + 1) * rows_per_unit <= rows, op, ": unit ", data[u], " of ", rows_per_unit,
        " rows is outside the ", rows, " rows of x; the plan belongs to another batch");
  }
  return {data, rows_per_unit};
}

Norm norm_of(int64_t code) {
  return code == 0 ? Norm::kLayer : code == 1 ? Norm::kRms : Norm::kNone;
}

std::tuple<Tensor, Tensor> gather_norm(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& index, int64_t units,
    int64_t rows_per_unit, int64_t norm, double eps, bool save) {
  const char* op = "gather_norm";
  const int64_t ldx = check_matrix(op, x), columns = x.size(1), count = units * rows_per_unit;
  const RowList list = check_list(op, index, units, rows_per_unit, x.size(0));
  check_floats(op, weight, columns);
  check_floats(op, bias, columns);
  Tensor y = at::empty({count, columns}, x.options());
  Tensor statistics = at::empty({save ? count : 0, 2}, x.options().dtype(at::kFloat));
  float* saved = save ? statistics.mutable_data_ptr<float>() : nullptr;
  XD_DISPATCH(T, x, [&] {
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, count, grain(columns), [&](int64_t begin, int64_t end) {
      rows<T>().gather_norm(
          from, ldx, list, begin, end, columns, norm_of(norm), static_cast<float>(eps), floats(weight), floats(bias),
          to, saved);
    });
  });
  return {y, statistics};
}

void scatter_add_(
    const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& index, int64_t units,
    int64_t rows_per_unit) {
  const char* op = "scatter_add_";
  const int64_t ldx = check_matrix(op, x), ldy = check_matrix(op, y), columns = x.size(1);
  const int64_t count = units * rows_per_unit;
  const RowList list = check_list(op, index, units, rows_per_unit, x.size(0));
  TORCH_CHECK_VALUE(
      y.scalar_type() == x.scalar_type() && y.size(1) == columns && y.size(0) >= count, op, ": y must hold ", count,
      " rows of ", columns, " in the dtype of x, but is ", y.scalar_type(), " ", y.sizes());
  check_floats(op, gate, x.size(0) / rows_per_unit);
  XD_DISPATCH(T, x, [&] {
    T* to = x.mutable_data_ptr<T>();
    const T* from = y.const_data_ptr<T>();
    at::parallel_for(0, count, grain(columns), [&](int64_t begin, int64_t end) {
      rows<T>().scatter_add(to, ldx, list, begin, end, columns, floats(gate), from, ldy);
    });
  });
}

// dx is written at the listed rows alone; the sums are [columns], or [0] where not wanted.
std::tuple<Tensor, Tensor> norm_backward_(
    const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& statistics, const Tensor& index,
    int64_t units, int64_t rows_per_unit, int64_t norm, bool weight_wanted, bool bias_wanted, const Tensor& dx) {
  const char* op = "norm_backward_";
  const int64_t ldx = check_matrix(op, x), lddx = check_matrix(op, dx), columns = x.size(1);
  const int64_t count = units * rows_per_unit;
  const RowList list = check_list(op, index, units, rows_per_unit, x.size(0));
  check_floats(op, weight, columns);
  check_floats(op, statistics, norm_of(norm) == Norm::kNone ? statistics.numel() : 2 * count);
  TORCH_CHECK_VALUE(
      dy.is_contiguous() && dy.dim() == 2 && dy.size(0) == count && dy.size(1) == columns &&
          dy.scalar_type() == x.scalar_type() && dx.scalar_type() == x.scalar_type() && dx.sizes() == x.sizes(),
      op, ": dy must be contiguous [", count, ", ", columns, "] and dx like x, but are ", dy.sizes(), " and ",
      dx.sizes());
  // Rows are dealt out in fixed chunks, whatever the number of threads: the sums are the same bits on every machine.
  constexpr int64_t kChunks = 32;
  const int64_t chunk = std::max<int64_t>(1, (count + kChunks - 1) / kChunks);
  const auto options = x.options().dtype(at::kFloat);
  Tensor sums = at::zeros({2, weight_wanted || bias_wanted ? kChunks : 0, columns}, options);
  XD_DISPATCH(T, x, [&] {
    const T* derivative = dy.const_data_ptr<T>();
    const T* from = x.const_data_ptr<T>();
    T* to = dx.mutable_data_ptr<T>();
    float* data = sums.mutable_data_ptr<float>();
    at::parallel_for(0, kChunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = std::min(count, c * chunk), end = std::min(count, begin + chunk);
        rows<T>().norm_backward(
            derivative, from, ldx, list, begin, end, columns, norm_of(norm), floats(weight),
            statistics.const_data_ptr<float>(), to, lddx, weight_wanted ? data + c * columns : nullptr,
            bias_wanted ? data + (kChunks + c) * columns : nullptr);
      }
    });
  });
  return {
      weight_wanted ? sums[0].sum(0) : at::empty({0}, options), bias_wanted ? sums[1].sum(0) : at::empty({0}, options)};
}

Tensor gather(
    const Tensor& x, const OptionalTensor& gate, const Tensor& index, int64_t units, int64_t rows_per_unit) {
  const char* op = "gather";
  const int64_t ldx = check_matrix(op, x), columns = x.size(1), count = units * rows_per_unit;
  const RowList list = check_list(op, index, units, rows_per_unit, x.size(0));
  check_floats(op, gate, x.size(0) / rows_per_unit);
  Tensor y = at::empty({count, columns}, x.options());
  XD_DISPATCH(T, x, [&] {
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    at::parallel_for(0, count, grain(columns), [&](int64_t begin, int64_t end) {
      rows<T>().gather(from, ldx, list, begin, end, columns, floats(gate), to);
    });
  });
  return y;
}

Tensor row_dots(const Tensor& a, const Tensor& b) {
  const char* op = "row_dots";
  const int64_t lda = check_matrix(op, a), ldb = check_matrix(op, b);
  TORCH_CHECK_VALUE(
      a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(), op, ": both must have one shape and dtype");
  Tensor dots = at::empty({a.size(0)}, a.options().dtype(at::kFloat));
  XD_DISPATCH(T, a, [&] {
    float* to = dots.mutable_data_ptr<float>();
    at::parallel_for(0, a.size(0), grain(a.size(1)), [&](int64_t begin, int64_t end) {
      rows<T>().row_dots(a.const_data_ptr<T>(), lda, b.const_data_ptr<T>(), ldb, begin, end, a.size(1), to);
    });
  });
  return dots;
}

Tensor swiglu(const Tensor& a) {
  const char* op = "swiglu";
  check_matrix(op, a);
  TORCH_CHECK_VALUE(
      a.is_contiguous() && a.size(1) % 2 == 0, op, ": needs contiguous gate and up halves, but got ", a.sizes());
  Tensor out = at::empty({a.size(0), a.size(1) / 2}, a.options());
  XD_DISPATCH(T, a, [&] {
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, a.size(0), grain(a.size(1)), [&](int64_t begin, int64_t end) {
      rows<T>().swiglu(a.const_data_ptr<T>(), begin, end, a.size(1) / 2, to);
    });
  });
  return out;
}

// See xdfast/ops/route: per (layer, branch) the active units in ascending order, their number, their rows per sample,
// and how many gates are no number in [0, 1].
void route_plan_(
    const Tensor& gates, const OptionalTensor& force, double threshold, bool hard, int64_t rows_per_unit,
    int64_t samples, const Tensor& gate, const Tensor& index, const Tensor& count, const Tensor& offsets,
    const Tensor& invalid) {
  const char* op = "route_plan_";
  XD_CHECK_CPU(op, gates);
  TORCH_CHECK_VALUE(gates.dim() == 3, op, ": gates must be [units, layers, branches], but are ", gates.sizes());
  const int64_t units = gates.size(0), lists = gates.size(1) * gates.size(2);
  TORCH_CHECK_VALUE(
      samples >= 1 && units % samples == 0 && gate.numel() == lists * units && index.numel() == lists * units &&
          count.numel() == lists && invalid.numel() == lists && offsets.numel() == lists * (samples + 1) &&
          gate.is_contiguous() && index.is_contiguous() && offsets.is_contiguous() && count.is_contiguous() &&
          invalid.is_contiguous(),
      op, ": ", units, " units of ", samples, " samples do not fit the plan's buffers");
  const Tensor values = gates.to(at::kFloat).contiguous();
  const float* in = values.const_data_ptr<float>();
  Tensor forced;
  const bool* also = nullptr;
  if (force) {
    TORCH_CHECK_VALUE(force->scalar_type() == at::kBool && force->sizes() == gates.sizes(), op, ": force must be bool");
    forced = force->contiguous();
    also = forced.const_data_ptr<bool>();
  }
  const int64_t per_sample = units / samples;
  const float limit = static_cast<float>(threshold);  // as on a GPU: a gate of 0.3f is not above 0.3
  for (int64_t list = 0; list < lists; ++list) {
    float* g = gate.mutable_data_ptr<float>() + list * units;
    int32_t* active = index.mutable_data_ptr<int32_t>() + list * units;
    int32_t* cumulative = offsets.mutable_data_ptr<int32_t>() + list * (samples + 1);
    int32_t found = 0, bad = 0;
    cumulative[0] = 0;
    for (int64_t u = 0; u < units; ++u) {
      const float value = in[u * lists + list];
      const bool on = value > limit;
      bad += !(value >= 0.0f && value <= 1.0f);
      const bool listed = on || (also && also[u * lists + list]);
      g[u] = hard ? (on ? 1.0f : 0.0f) : (listed ? value : 0.0f);
      if (listed) active[found++] = static_cast<int32_t>(u);
      if ((u + 1) % per_sample == 0) cumulative[(u + 1) / per_sample] = static_cast<int32_t>(found * rows_per_unit);
    }
    count.mutable_data_ptr<int32_t>()[list] = found;
    invalid.mutable_data_ptr<int32_t>()[list] = bad;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(xdfast_c, CPU, m) {
  m.impl("gather_norm", gather_norm);
  m.impl("scatter_add_", scatter_add_);
  m.impl("norm_backward_", norm_backward_);
  m.impl("gather", gather);
  m.impl("row_dots", row_dots);
  m.impl("swiglu", swiglu);
  m.impl("route_plan_", route_plan_);
}

}  // namespace xdfast
