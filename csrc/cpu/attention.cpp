// Softmax attention of many short sequences that lie one after another (xdfast/ops/routed/attention.py): the rows of each
// head's scores stay in cache, the products are block products of one thread (gemm.h), tasks are (sample, head, queries).
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../checks.h"
#include "gemm.h"
#include "passes.h"
#include "vector.h"

namespace xdfast {
namespace {

using at::Tensor;

constexpr int64_t kQueries = 128;  // rows of scores at a time

int64_t rounded(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// s[0 .. columns) -> exp(scale * (s - max)) in place, zeros up to `padded`; returns (maximum of scale * s, sum).
template <int W>
XD_INLINE void softmax_row(float* s, int64_t columns, int64_t padded, float scale, float& maximum, float& sum) {
  using F = typename Vector<W>::F;
  typedef int32_t I __attribute__((vector_size(W * 4)));
  for (int64_t j = columns; j < padded; ++j) s[j] = -std::numeric_limits<float>::infinity();
  F best;
  load<W>(s, best);
  F v;
  for (int64_t j = W; j < padded; j += W) {
    load<W>(s + j, v);
    best = (F)(((I)v & (I)(v > best)) | ((I)best & ~(I)(v > best)));
  }
  float m = best[0];
  for (int l = 1; l < W; ++l) m = best[l] > m ? best[l] : m;
  maximum = m * scale;
  F total = {};
  for (int64_t j = 0; j < padded; j += W) {
    load<W>(s + j, v);
    v = v * scale - maximum;
    const I tiny = (I)(v < -87.0f);  // e^-87 is 0 beside 1; the padding too
    v = (F)((I)v & ~tiny);
    F e;
    exponential<W>(v, e);
    e = (F)((I)e & ~tiny);
    total += e;
    store<W>(s + j, e);
  }
  sum = sum_of<W>(total);
}

struct Softmax {
  void (*rows)(
      float* s, int64_t lds, int64_t count, int64_t columns, bool causal, int64_t first, float scale, float* inverse,
      float* lse, int64_t ld_lse, at::BFloat16* p);
  void (*pairs)(const at::BFloat16* x, int64_t ldx, int64_t rows, int64_t columns, uint32_t* out);
  void (*scale_float)(const float* o, int64_t rows, int64_t columns, const float* by, float* out, int64_t ld);
  void (*scale_bfloat16)(const float* o, int64_t rows, int64_t columns, const float* by, at::BFloat16* out, int64_t ld);
};

// Rows of scores to probabilities that are not divided by their sum yet; p (may be null) takes them as bfloat16.
template <int W>
XD_INLINE void softmax_rows(
    float* s, int64_t lds, int64_t count, int64_t columns, bool causal, int64_t first, float scale, float* inverse,
    float* lse, int64_t ld_lse, at::BFloat16* p) {
  for (int64_t i = 0; i < count; ++i) {
    float maximum, sum;
    float* row = s + i * lds;
    softmax_row<W>(row, causal ? std::min(columns, first + i + 1) : columns, lds, scale, maximum, sum);
    inverse[i] = 1.0f / sum;
    lse[i * ld_lse] = maximum + std::log(sum);
    if (p) {
      typename Vector<W>::F v;
      for (int64_t j = 0; j < lds; j += W) {
        load<W>(row + j, v);
        store<W>(p + i * lds + j, v);
      }
    }
  }
}

// Pairs of rows side by side, the layout of bf16_gemm's B; an odd last row is paired with zeros.
XD_INLINE void pairs_any(const at::BFloat16* x, int64_t ldx, int64_t rows, int64_t columns, uint32_t* out) {
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t* __restrict even = reinterpret_cast<const uint16_t*>(x + i * ldx);
    uint32_t* __restrict o = out + i / 2 * columns;
    if (i + 1 < rows) {
      const uint16_t* __restrict odd = even + ldx;
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) o[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
    } else {
      for (int64_t j = 0; j < columns; ++j) o[j] = even[j];
    }
  }
}

template <int W, typename T>
XD_INLINE void scale_any(const float* o, int64_t rows, int64_t columns, const float* by, T* out, int64_t ld) {
  const int64_t whole = columns / W * W;
  for (int64_t i = 0; i < rows; ++i) {
    typename Vector<W>::F v;
    for (int64_t j = 0; j < whole; j += W) {
      load<W>(o + i * columns + j, v);
      store<W>(out + i * ld + j, v * by[i]);
    }
    for (int64_t j = whole; j < columns; ++j) out[i * ld + j] = static_cast<T>(o[i * columns + j] * by[i]);
  }
}

#define XD_SOFTMAX(SUFFIX, TARGET, WIDTH)                                                                            \
  TARGET void rows_##SUFFIX(                                                                                         \
      float* s, int64_t lds, int64_t count, int64_t columns, bool causal, int64_t first, float scale, float* inverse, \
      float* lse, int64_t ld_lse, at::BFloat16* p) {                                                                 \
    softmax_rows<WIDTH>(s, lds, count, columns, causal, first, scale, inverse, lse, ld_lse, p);                      \
  }                                                                                                                  \
  TARGET void pairs_##SUFFIX(const at::BFloat16* x, int64_t ldx, int64_t rows, int64_t columns, uint32_t* out) {     \
    pairs_any(x, ldx, rows, columns, out);                                                                           \
  }                                                                                                                  \
  TARGET void scale_float_##SUFFIX(                                                                                  \
      const float* o, int64_t rows, int64_t columns, const float* by, float* out, int64_t ld) {                      \
    scale_any<WIDTH, float>(o, rows, columns, by, out, ld);                                                          \
  }                                                                                                                  \
  TARGET void scale_bfloat16_##SUFFIX(                                                                               \
      const float* o, int64_t rows, int64_t columns, const float* by, at::BFloat16* out, int64_t ld) {               \
    scale_any<WIDTH, at::BFloat16>(o, rows, columns, by, out, ld);                                                   \
  }                                                                                                                  \
  const Softmax k_##SUFFIX = {rows_##SUFFIX, pairs_##SUFFIX, scale_float_##SUFFIX, scale_bfloat16_##SUFFIX};

XD_SOFTMAX(baseline, , 4)
#if defined(__x86_64__)
XD_SOFTMAX(avx2, XD_TARGET_AVX2, 8)
XD_SOFTMAX(avx512, XD_TARGET_AVX512, 16)
#endif

const Softmax& softmax() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return k_avx512;
  if (capability.rfind("AVX2", 0) == 0) return k_avx2;
#endif
  return k_baseline;
}

struct Task {
  int64_t q, queries, k, keys, head, first, last;  // first row and number of a sample's queries and keys; its part
};

struct Operand {
  const void* data;
  int64_t row, head;  // strides in elements
};

// One head of one sample, queries [task.first, task.last). Scratch is reused from task to task.
struct Scratch {
  std::vector<float> scores, out, inverse;
  std::vector<at::BFloat16> p;
  std::vector<uint32_t> keys, values;
};

template <typename T>
void attend(
    const Task& t, const Operand& q, const Operand& k, const Operand& v, int64_t groups, int64_t width, float scale,
    bool causal, T* out, int64_t heads, float* lse, Scratch& scratch) {
  const Softmax& passes_here = softmax();
  const int64_t lds = rounded(t.keys, 16), kv = t.head / groups;
  const T* kd = static_cast<const T*>(k.data) + t.k * k.row + kv * k.head;
  const T* vd = static_cast<const T*>(v.data) + t.k * v.row + kv * v.head;
  scratch.scores.resize(kQueries * lds);
  scratch.out.resize(kQueries * width);
  scratch.inverse.resize(kQueries);
  constexpr bool kHalf = std::is_same_v<T, at::BFloat16>;
  if constexpr (kHalf) {
    scratch.p.resize(kQueries * lds);
    scratch.keys.resize(width / 2 * t.keys);
    scratch.values.resize((t.keys + 1) / 2 * width);
    passes().transpose_words(
        reinterpret_cast<const uint32_t*>(kd), k.row / 2, t.keys, width / 2, scratch.keys.data(), t.keys);
    passes_here.pairs(vd, v.row, t.keys, width, scratch.values.data());
  }
  for (int64_t i = t.first; i < t.last; i += kQueries) {
    const int64_t rows = std::min(kQueries, t.last - i);
    const int64_t seen = causal ? std::min(t.keys, i + rows) : t.keys;
    const T* qd = static_cast<const T*>(q.data) + (t.q + i) * q.row + t.head * q.head;
    T* to = out + ((t.q + i) * heads + t.head) * width;
    float* log = lse + (t.q + i) * heads + t.head;
    float* s = scratch.scores.data();
    if constexpr (kHalf) {
      bf16_gemm(
          rows, seen, width, qd, q.row, reinterpret_cast<const at::BFloat16*>(scratch.keys.data()), t.keys, s, lds);
      passes_here.rows(
          s, lds, rows, seen, causal, i, scale, scratch.inverse.data(), log, heads, scratch.p.data());
      bf16_gemm(
          rows, width, rounded(seen, 2), scratch.p.data(), lds,
          reinterpret_cast<const at::BFloat16*>(scratch.values.data()), width, scratch.out.data(), width);
      passes_here.scale_bfloat16(scratch.out.data(), rows, width, scratch.inverse.data(), to, heads * width);
    } else {
      gemm(false, true, rows, seen, width, 1.0f, qd, q.row, kd, k.row, s, lds);
      passes_here.rows(s, lds, rows, seen, causal, i, scale, scratch.inverse.data(), log, heads, nullptr);
      gemm(false, false, rows, width, seen, 1.0f, s, lds, vd, v.row, scratch.out.data(), width);
      passes_here.scale_float(scratch.out.data(), rows, width, scratch.inverse.data(), to, heads * width);
    }
  }
}

Operand operand(const char* op, const Tensor& t, int64_t width) {
  XD_CHECK_CPU(op, t);
  TORCH_CHECK_VALUE(
      t.dim() == 3 && t.size(2) == width && t.stride(2) == 1, op,
      ": q, k and v must be [rows, heads, width] with contiguous heads, but have ", t.sizes(), " strides ", t.strides());
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

std::vector<int64_t> checked(const char* op, const Tensor& offsets, int64_t rows) {
  TORCH_CHECK_VALUE(
      offsets.scalar_type() == at::kInt && offsets.is_contiguous() && offsets.dim() == 1 && offsets.numel() >= 1, op,
      ": offsets must be contiguous int32 [B + 1], but are ", offsets.scalar_type(), " ", offsets.sizes());
  const int32_t* data = offsets.const_data_ptr<int32_t>();
  std::vector<int64_t> found(data, data + offsets.numel());
  TORCH_CHECK_VALUE(
      found.front() == 0 && found.back() <= rows && std::is_sorted(found.begin(), found.end()), op,
      ": offsets must rise from 0 to at most ", rows, " rows");
  return found;
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets_q, const Tensor& offsets_k, double scale,
    bool causal) {
  const char* op = "attention";
  const int64_t width = q.size(-1), heads = q.size(1);
  const Operand qo = operand(op, q, width), ko = operand(op, k, width), vo = operand(op, v, width);
  const auto dtype = q.scalar_type();
  TORCH_CHECK_VALUE(
      (dtype == at::kFloat || (dtype == at::kBFloat16 && has_bf16_gemm() && width % 2 == 0 && qo.row % 2 == 0 &&
                               ko.row % 2 == 0 && ko.head % 2 == 0 && k.storage_offset() % 2 == 0)) &&
          k.scalar_type() == dtype && v.scalar_type() == dtype,
      op, ": takes float32, or bfloat16 of even width on CPUs that multiply it, but got ", dtype);
  TORCH_CHECK_VALUE(
      k.sizes() == v.sizes() && k.size(1) >= 1 && heads % k.size(1) == 0, op, ": ", heads,
      " query heads cannot share the heads of keys ", k.sizes(), " and values ", v.sizes());
  const auto starts_q = checked(op, offsets_q, q.size(0)), starts_k = checked(op, offsets_k, k.size(0));
  TORCH_CHECK_VALUE(starts_q.size() == starts_k.size(), op, ": offsets of queries and keys are of different batches");
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(0), heads}, q.options().dtype(at::kFloat));
  std::vector<Task> tasks;
  const int64_t samples = static_cast<int64_t>(starts_q.size()) - 1;
  // Few heads on many cores: their queries are shared out too.
  const int64_t parts = std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(1, samples * heads));
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t queries = starts_q[b + 1] - starts_q[b], keys = starts_k[b + 1] - starts_k[b];
    TORCH_CHECK_VALUE(
        queries == 0 || (keys > 0 && (!causal || queries == keys)), op, ": sample ", b, " has ", queries,
        " queries and ", keys, " keys");
    const int64_t step = rounded(std::max<int64_t>(1, (queries + parts - 1) / parts), 16);
    for (int64_t h = 0; h < heads && queries > 0; ++h) {
      for (int64_t i = 0; i < queries; i += step) {
        tasks.push_back({starts_q[b], queries, starts_k[b], keys, h, i, std::min(queries, i + step)});
      }
    }
  }
  const int64_t groups = heads / k.size(1);
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t n = begin; n < end; ++n) {
      if (dtype == at::kFloat) {
        attend<float>(
            tasks[n], qo, ko, vo, groups, width, static_cast<float>(scale), causal, out.mutable_data_ptr<float>(),
            heads, lse.mutable_data_ptr<float>(), scratch);
      } else {
        attend<at::BFloat16>(
            tasks[n], qo, ko, vo, groups, width, static_cast<float>(scale), causal,
            out.mutable_data_ptr<at::BFloat16>(), heads, lse.mutable_data_ptr<float>(), scratch);
      }
    }
    if (dtype == at::kBFloat16) bf16_gemm_release();
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(xdfast_c, CPU, m) {
  m.impl("attention", attention);
}

}  // namespace xdfast
