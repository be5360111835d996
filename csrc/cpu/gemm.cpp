#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <string>

namespace xdfast {
namespace {

using Sgemm = void (*)(
    const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
    const int*, const float*, float*, const int*);

// Looked up in the library that holds at::mm, not in the whole process: NumPy or SciPy may have brought another BLAS,
// whose integers can be 64 bits wide.
// XDFAST_CPU_GEMM=at takes at::mm all the same: the way of builds without sgemm_, for tests where there is one.
Sgemm find_sgemm() {
#if defined(__linux__)
  const char* forced = std::getenv("XDFAST_CPU_GEMM");
  if (forced && std::string(forced) == "at") return nullptr;
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&at::get_cpu_capability), &info) && info.dli_fname) {
    if (void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)) {
      void* symbol = dlsym(library, "sgemm_");
      Dl_info owner;
      if (symbol && dladdr(symbol, &owner) && owner.dli_fname && std::string(owner.dli_fname) == info.dli_fname) {
        return reinterpret_cast<Sgemm>(symbol);
      }
    }
  }
#endif
  return nullptr;
}

Sgemm sgemm() {
  static const Sgemm found = find_sgemm();
  return found;
}

at::Tensor view(const float* p, bool transposed, int64_t rows, int64_t columns, int64_t ld) {
  const auto options = at::TensorOptions().dtype(at::kFloat);
  float* data = const_cast<float*>(p);
  return transposed ? at::from_blob(data, {rows, columns}, {1, ld}, options)
                    : at::from_blob(data, {rows, columns}, {ld, 1}, options);
}

}  // namespace

void gemm(
    bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
    const float* b, int64_t ldb, float* c, int64_t ldc) {
  if (const Sgemm blas = sgemm()) {
    // BLAS is column-major: a row-major C is its transpose, so the factors change places.
    const int bm = static_cast<int>(n), bn = static_cast<int>(m), bk = static_cast<int>(k);
    const int la = static_cast<int>(ldb), lb = static_cast<int>(lda), lc = static_cast<int>(ldc);
    const float beta = 0.0f;
    blas(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &bm, &bn, &bk, &alpha, b, &la, a, &lb, &beta, c, &lc);
    return;
  }
  at::Tensor out = view(c, false, m, n, ldc);
  at::mm_out(out, view(a, transpose_a, m, k, lda), view(b, transpose_b, k, n, ldb));
  if (alpha != 1.0f) out.mul_(alpha);
}

const char* gemm_source() {
  return sgemm() ? "sgemm of torch's BLAS" : "at::mm (no sgemm exported by this torch, or XDFAST_CPU_GEMM=at)";
}

bool has_bf16_gemm() {
#if defined(__x86_64__)
  // Every CPU with AMX has AVX512-BF16 too; oneDNN takes the better one.
  static const bool supported = std::string(at::get_cpu_capability()).rfind("AVX512", 0) == 0 &&
                                __builtin_cpu_supports("avx512bf16") && at::globalContext().userEnabledMkldnn();
  return supported;
#else
  return false;
#endif
}

void bf16_gemm(
    int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc) {
  // oneDNN's kernel does not block for caches: a part of B (depth * n * 2 bytes) has to stay in L2 while A passes by.
  constexpr int64_t kDepth = 512, kRows = 128;
  for (int64_t i = 0; i < m; i += kRows) {
    const int64_t rows = std::min(kRows, m - i);
    for (int64_t d = 0; d < k; d += kDepth) {
      at::native::cpublas::brgemm(
          rows, n, std::min(kDepth, k - d), lda, ldb, ldc, d > 0, a + i * lda + d, b + d * ldb, c + i * ldc, true);
    }
  }
}

void bf16_gemm_release() {
  at::native::cpublas::brgemm_release(true);
}

}  // namespace xdfast
