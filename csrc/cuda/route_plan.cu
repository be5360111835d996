// Gates -> plan in one launch, as kernels/route_plan.py: a block per (layer, branch) walks over the units in chunks of
// its threads. A warp counts its listed units with one ballot; the warps' counts meet in shared memory. No atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "route_plan.h"

namespace xdfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__global__ void __launch_bounds__(kThreads) route_plan_kernel(const RoutePlanArguments a) {
  __shared__ int32_t counts[2][kWarps];  // of this chunk and the last: one barrier a chunk is enough
  __shared__ int32_t wrong[kWarps];
  const int64_t here = blockIdx.x;
  const int64_t layer = here / a.branches, branch = here % a.branches;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* gates = static_cast<const T*>(a.gates) + layer * a.gates_stride[1] + branch * a.gates_stride[2];
  const uint8_t* force =
      a.force == nullptr ? nullptr : a.force + layer * a.force_stride[1] + branch * a.force_stride[2];
  float* gate = a.gate + here * a.units;
  int32_t* index = a.index + here * a.units;
  int32_t* offsets = a.offsets + here * (a.samples + 1);
  int32_t before = 0, invalid = 0;  // listed units of the earlier chunks; bad gates of this thread
  for (int32_t first = 0, chunk = 0; first < a.units; first += kThreads, ++chunk) {
    const int32_t unit = first + static_cast<int32_t>(threadIdx.x);
    const bool inside = unit < a.units;
    const float g = inside ? to_float(gates[unit * a.gates_stride[0]]) : 0.0f;
    const bool active = inside && g > a.threshold;  // false for NaN
    const bool listed = active || (inside && force != nullptr && force[unit * a.force_stride[0]] != 0);
    invalid += inside && !(g >= 0.0f && g <= 1.0f);
    const unsigned ballot = __ballot_sync(0xffffffffu, listed);
    if (lane == 0) counts[chunk % 2][warp] = __popc(ballot);
    __syncthreads();
    int32_t mine = before;  // listed units before this thread's
    for (int w = 0; w < kWarps; ++w) {
      const int32_t n = counts[chunk % 2][w];
      mine += w < warp ? n : 0;
      before += n;
    }
    mine += __popc(ballot & ((1u << lane) - 1));
    if (inside) {
      gate[unit] = a.hard ? (active ? 1.0f : 0.0f) : (listed ? g : 0.0f);
      if (listed) index[mine] = unit;
      if ((unit + 1) % a.units_per_sample == 0) {
        offsets[(unit + 1) / a.units_per_sample] = (mine + (listed ? 1 : 0)) * a.rows_per_unit;
      }
    }
  }
  for (int step = 16; step > 0; step /= 2) invalid += __shfl_xor_sync(0xffffffffu, invalid, step);
  if (lane == 0) wrong[warp] = invalid;
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t total = 0;
    for (int w = 0; w < kWarps; ++w) total += wrong[w];
    a.invalid[here] = total;
    a.count[here] = before;
    offsets[0] = 0;
  }
}

}  // namespace

cudaError_t route_plan(const RoutePlanArguments& arguments, GateType type, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(arguments.layers) * static_cast<unsigned>(arguments.branches));
  switch (type) {
    case GateType::kFloat:
      route_plan_kernel<float><<<grid, kThreads, 0, stream>>>(arguments);
      break;
    case GateType::kHalf:
      route_plan_kernel<__half><<<grid, kThreads, 0, stream>>>(arguments);
      break;
    case GateType::kBFloat16:
      route_plan_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(arguments);
      break;
  }
  return cudaGetLastError();
}

}  // namespace xdfast::cuda
