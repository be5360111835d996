// xdfast_c::route_plan_ on CUDA: checks, and the launch of route_plan.cu on the current stream.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "../checks.h"
#include "route_plan.h"

namespace xdfast {
namespace {

using at::Tensor;

void check_buffer(const char* op, const Tensor& t, const Tensor& gates, at::ScalarType type, int64_t size) {
  TORCH_CHECK_VALUE(
      t.device() == gates.device() && t.scalar_type() == type && t.numel() == size && t.is_contiguous(), op,
      ": a buffer of the plan must be contiguous with ", size, " elements of ", type, " on ", gates.device(), ", but is ",
      t.toString(), " ", t.sizes(), " on ", t.device());
}

// See xdfast/ops/route. Nothing is allocated and nothing synchronised, so it can be captured in a CUDA graph.
void route_plan_(
    const Tensor& gates, const std::optional<Tensor>& force, double threshold, bool hard, int64_t rows_per_unit,
    int64_t samples, const Tensor& gate, const Tensor& index, const Tensor& count, const Tensor& offsets,
    const Tensor& invalid) {
  const char* op = "route_plan_";
  TORCH_CHECK_VALUE(gates.dim() == 3, op, ": gates must be [units, layers, branches], but are ", gates.sizes());
  XD_CHECK_FLOAT_OR_HALF(op, gates);
  const int64_t units = gates.size(0), lists = gates.size(1) * gates.size(2);
  TORCH_CHECK_VALUE(
      samples >= 1 && units % samples == 0 && rows_per_unit >= 1 && units * rows_per_unit <= INT32_MAX, op, ": ", units,
      " units of ", rows_per_unit, " rows must be divisible among ", samples, " samples and fewer than 2^31 rows");
  check_buffer(op, gate, gates, at::kFloat, lists * units);
  check_buffer(op, index, gates, at::kInt, lists * units);
  check_buffer(op, count, gates, at::kInt, lists);
  check_buffer(op, offsets, gates, at::kInt, lists * (samples + 1));
  check_buffer(op, invalid, gates, at::kInt, lists);
  if (force) {
    TORCH_CHECK_VALUE(
        force->device() == gates.device() && force->scalar_type() == at::kBool && force->sizes() == gates.sizes(), op,
        ": force must be bool ", gates.sizes(), " on ", gates.device(), ", but is ", force->toString(), " ",
        force->sizes(), " on ", force->device());
  }
  if (lists == 0) return;
  cuda::RoutePlanArguments a{};
  a.gates = gates.const_data_ptr();
  a.force = force ? static_cast<const uint8_t*>(force->const_data_ptr()) : nullptr;
  a.gate = gate.mutable_data_ptr<float>();
  a.index = index.mutable_data_ptr<int32_t>();
  a.count = count.mutable_data_ptr<int32_t>();
  a.offsets = offsets.mutable_data_ptr<int32_t>();
  a.invalid = invalid.mutable_data_ptr<int32_t>();
  for (int i = 0; i < 3; ++i) {
    a.gates_stride[i] = gates.stride(i);
    a.force_stride[i] = force ? force->stride(i) : 0;
  }
  a.units = static_cast<int32_t>(units);
  a.layers = static_cast<int32_t>(gates.size(1));
  a.branches = static_cast<int32_t>(gates.size(2));
  a.units_per_sample = static_cast<int32_t>(units / samples);
  a.samples = static_cast<int32_t>(samples);
  a.rows_per_unit = static_cast<int32_t>(rows_per_unit);
  a.threshold = static_cast<float>(threshold);
  a.hard = hard;
  const auto type = gates.scalar_type() == at::kFloat  ? cuda::GateType::kFloat
                    : gates.scalar_type() == at::kHalf ? cuda::GateType::kHalf
                                                       : cuda::GateType::kBFloat16;
  const c10::cuda::CUDAGuard guard(gates.device());
  C10_CUDA_CHECK(cuda::route_plan(a, type, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(xdfast_c, CUDA, m) { m.impl("route_plan_", route_plan_); }

}  // namespace xdfast
