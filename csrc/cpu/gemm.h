// Matrix products of one thread, on blocks: what the fused kernels call from inside a parallel region.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace xdfast {

// C [m, n] = alpha * op(A) [m, k] @ op(B) [k, n], all row-major with the given leading dimensions, fp32.
// By the sgemm_ of the BLAS inside libtorch_cpu where it is exported (torch's x86 wheels), else by at::mm.
void gemm(
    bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
    const float* b, int64_t ldb, float* c, int64_t ldc);

// Where gemm() comes from, in words.
const char* gemm_source();

// Whether this CPU multiplies bfloat16 faster than float32 (AVX512-BF16 or AMX) and torch uses such instructions.
bool has_bf16_gemm();

// C [m, n] (fp32) = A [m, k] @ B [k, n]; A row-major; B as pairs of rows: element (i, j) at b[(i / 2) * 2 * ldb + 2 * j
// + i % 2]. k must be even. bf16_gemm_release() ends a thread's sequence of calls (AMX tiles are configured per
// thread).
void bf16_gemm(
    int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc);
void bf16_gemm_release();

}  // namespace xdfast
