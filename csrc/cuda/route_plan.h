// The planner's launch, free of torch's headers: route_plan.cu is compiled by nvcc alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace xdfast::cuda {

enum class GateType { kFloat, kHalf, kBFloat16 };

struct RoutePlanArguments {
  const void* gates;     // [units, layers, branches], strides below in elements
  const uint8_t* force;  // likewise, bool; or null
  float* gate;           // [layers, branches, units]
  int32_t* index;        // [layers, branches, units]
  int32_t* count;        // [layers, branches]
  int32_t* offsets;      // [layers, branches, samples + 1]
  int32_t* invalid;      // [layers, branches]
  int64_t gates_stride[3];
  int64_t force_stride[3];
  int32_t units;
  int32_t layers;
  int32_t branches;
  int32_t units_per_sample;
  int32_t samples;
  int32_t rows_per_unit;
  float threshold;
  bool hard;
};

cudaError_t route_plan(const RoutePlanArguments& arguments, GateType type, cudaStream_t stream);

}  // namespace xdfast::cuda
