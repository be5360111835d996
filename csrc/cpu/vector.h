// Vectors of W floats (GCC and Clang vector extensions), with loads from float, bfloat16 and half.
//
// A kernel is written once as an always-inline template over W and compiled for several instruction sets by function
// attributes; ATen's detection chooses at run time (ATEN_CPU_CAPABILITY overrides it). A wheel runs on any x86-64.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#define XD_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define XD_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define XD_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif

namespace xdfast {

// Loads and stores go through the unaligned, alias-anything twins: std::memcpy of a vector compiles to 16-byte pieces
// outside AVX-512, and the reload then stalls on store forwarding (measured: AVX2 four times slower).
template <int W>
struct Vector {
  typedef float F __attribute__((vector_size(W * 4)));
  typedef uint32_t U __attribute__((vector_size(W * 4)));
  typedef float FAny __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint16_t HAny __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

template <int W>
XD_INLINE void load(const float* p, typename Vector<W>::F& out) {
  out = *reinterpret_cast<const typename Vector<W>::FAny*>(p);
}

template <int W>
XD_INLINE void store(float* p, const typename Vector<W>::F& value) {
  *reinterpret_cast<typename Vector<W>::FAny*>(p) = value;
}

template <int W>
XD_INLINE void load(const at::BFloat16* p, typename Vector<W>::F& out) {
  using U = typename Vector<W>::U;
  out =
      (typename Vector<W>::F)(__builtin_convertvector(*reinterpret_cast<const typename Vector<W>::HAny*>(p), U) << 16);
}

// IEEE half to float in integer arithmetic, so that it vectorises on every target: shift exponent and mantissa into
// place, multiply by 2^112 to correct the exponent bias (exact, subnormals included), restore Inf/NaN and the sign.
template <int W>
XD_INLINE void load(const at::Half* p, typename Vector<W>::F& out) {
  using F = typename Vector<W>::F;
  using U = typename Vector<W>::U;
  const U wide = __builtin_convertvector(*reinterpret_cast<const typename Vector<W>::HAny*>(p), U);
  const U magnitude = (wide & 0x7fffu) << 13;
  U bits = (U)((F)magnitude * 0x1p112f);
  bits |= (U)(magnitude >= 0x0f800000u) & 0x7f800000u;  // a vector comparison gives all ones where true
  bits |= (wide & 0x8000u) << 16;
  out = (F)bits;
}

// Round to nearest even, in integers, so that it vectorises on every target; a NaN keeps its quiet bit (rounding could
// carry it into infinity).
template <int W>
XD_INLINE void store(at::BFloat16* p, const typename Vector<W>::F& value) {
  using U = typename Vector<W>::U;
  typedef uint16_t H __attribute__((vector_size(W * 2)));
  const U bits = (U)value;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (U)((bits & 0x7fffffffu) > 0x7f800000u);  // all ones where true
  *reinterpret_cast<typename Vector<W>::HAny*>(p) =
      __builtin_convertvector((((bits >> 16) | 0x40u) & nan) | (rounded & ~nan), H);
}

template <int W>
XD_INLINE void store(at::Half* p, const typename Vector<W>::F& value) {
  for (int l = 0; l < W; ++l) p[l] = at::Half(value[l]);
}

template <int W>
XD_INLINE float sum_of(const typename Vector<W>::F& v) {
  float total = 0.0f;
  for (int l = 0; l < W; ++l) total += v[l];
  return total;
}

// e^x for |x| <= 88 by 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error 2e-7.
template <int W>
XD_INLINE void exponential(const typename Vector<W>::F& x, typename Vector<W>::F& out) {
  using F = typename Vector<W>::F;
  typedef int32_t I __attribute__((vector_size(W * 4)));
  F k = x * 1.44269504f;
  const F magic = k * 0.0f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F rounded = (k + magic) - magic;
  F r = x - rounded * 0.693359375f;
  r -= rounded * -2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I bits = (__builtin_convertvector(rounded, I) + 127) << 23;
  out = p * (F)bits;
}

}  // namespace xdfast
