// The cross-correlation loss for N < D in float32 without standardised copies of its inputs: block by block of columns
// they are standardised into cache, multiplied there by our own kernels (panels.h), and left.
#pragma once

#include "rsd_parts.h"

namespace xdfast {

// Whether this form runs here, with the threads at hand: kernels for this CPU, batches of up to 512, and room for a Gram
// matrix per thread within O(N D) memory.
bool streams(int64_t N, int64_t D, bool bf16);

Components streamed_loss(Input student, Input teacher, const Options& options);

// Only the teacher: its statistics [4, D] and its Gram matrix [N, N].
void streamed_teacher(Input teacher, const Options& options, float* statistics, float* gram);

}  // namespace xdfast
