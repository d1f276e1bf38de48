// SPDX-License-Identifier: Apache-2.0
//
// Native vectors of float and double for the instruction set this file is compiled for (host only), by the compiler's
// vector extension: AVX-512, AVX2, and 16 bytes anywhere else (SSE2, NEON). The vector is never wider than a register:
// GCC 12 would take it apart into scalars.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "math/portable.h"

namespace timm_ext::math {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Loads and stores need no alignment and may alias any type.
typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32V __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32V __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64V __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64V __attribute__((vector_size(kVectorBytes)));

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
};

template <class V, class C>
TIMM_EXT_FN V load(const C* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class C>
TIMM_EXT_FN void store(C* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

typedef float HalfFloatV __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as DoubleV

TIMM_EXT_FN DoubleV load_doubles(const double* from) { return load<DoubleV>(from); }
#if defined(__AVX512F__)
// GCC 12 converts vectors of eight in halves, and warns about its own unmasked form.
TIMM_EXT_FN DoubleV load_doubles(const float* from) { return _mm512_maskz_cvtps_pd(-1, _mm256_loadu_ps(from)); }
#else
TIMM_EXT_FN DoubleV load_doubles(const float* from) { return __builtin_convertvector(load<HalfFloatV>(from), DoubleV); }
#endif

TIMM_EXT_FN void store_as(double* to, DoubleV v) { store(to, v); }
TIMM_EXT_FN void store_as(float* to, DoubleV v) { store(to, __builtin_convertvector(v, HalfFloatV)); }

TIMM_EXT_FN FloatV select(Int32V mask, FloatV yes, FloatV no) { return mask ? yes : no; }
TIMM_EXT_FN DoubleV select(Int64V mask, DoubleV yes, DoubleV no) { return mask ? yes : no; }

// x86 has a > b ? a : b in one instruction, which the compiler does not find for vectors of 64 bytes. (Masked there:
// GCC 12 warns about its own plain form.)
#if defined(__AVX512F__)
#define TIMM_EXT_X86_VECTOR(name) _mm512_##name
#define TIMM_EXT_X86_PAIR(name, a, b) _mm512_maskz_##name(-1, a, b)
#elif defined(__AVX2__)
#define TIMM_EXT_X86_VECTOR(name) _mm256_##name
#define TIMM_EXT_X86_PAIR(name, a, b) _mm256_##name(a, b)
#elif defined(__SSE2__)
#define TIMM_EXT_X86_VECTOR(name) _mm_##name
#define TIMM_EXT_X86_PAIR(name, a, b) _mm_##name(a, b)
#endif

#if defined(TIMM_EXT_X86_VECTOR)
TIMM_EXT_FN FloatV larger(FloatV a, FloatV b) { return TIMM_EXT_X86_PAIR(max_ps, a, b); }
TIMM_EXT_FN DoubleV larger(DoubleV a, DoubleV b) { return TIMM_EXT_X86_PAIR(max_pd, a, b); }
TIMM_EXT_FN FloatV smaller(FloatV a, FloatV b) { return TIMM_EXT_X86_PAIR(min_ps, a, b); }
TIMM_EXT_FN DoubleV smaller(DoubleV a, DoubleV b) { return TIMM_EXT_X86_PAIR(min_pd, a, b); }
/// Store past the caches; `to` is aligned to the vector.
TIMM_EXT_FN void stream(float* to, FloatV v) { TIMM_EXT_X86_VECTOR(stream_ps)(to, v); }
TIMM_EXT_FN void stream(double* to, DoubleV v) { TIMM_EXT_X86_VECTOR(stream_pd)(to, v); }
/// Makes streamed values visible to other threads.
TIMM_EXT_FN void end_stream() { _mm_sfence(); }
#else
TIMM_EXT_FN FloatV larger(FloatV a, FloatV b) { return select(a > b, a, b); }
TIMM_EXT_FN DoubleV larger(DoubleV a, DoubleV b) { return select(a > b, a, b); }
TIMM_EXT_FN FloatV smaller(FloatV a, FloatV b) { return select(a < b, a, b); }
TIMM_EXT_FN DoubleV smaller(DoubleV a, DoubleV b) { return select(a < b, a, b); }
TIMM_EXT_FN void stream(float* to, FloatV v) { store(to, v); }
TIMM_EXT_FN void stream(double* to, DoubleV v) { store(to, v); }
TIMM_EXT_FN void end_stream() {}
#endif

TIMM_EXT_FN UInt64V bits_of(DoubleV x) { return (UInt64V)x; }
TIMM_EXT_FN DoubleV from_bits(UInt64V bits) { return (DoubleV)bits; }
TIMM_EXT_FN UInt32V bits_of(FloatV x) { return (UInt32V)x; }
TIMM_EXT_FN FloatV from_bits(UInt32V bits) { return (FloatV)bits; }

/// The 64-bit product of every lane with a number, in two halves.
TIMM_EXT_FN void wide_product(UInt32V a, uint32_t factor, UInt32V& high, UInt32V& low) {
#if defined(TIMM_EXT_X86_VECTOR)
  typedef long long Integers __attribute__((vector_size(kVectorBytes)));
  const Integers factors = Integers{} + static_cast<long long>(factor);
  const UInt64V even = (UInt64V)TIMM_EXT_X86_PAIR(mul_epu32, (Integers)a, factors);
  const UInt64V odd = (UInt64V)TIMM_EXT_X86_PAIR(mul_epu32, (Integers)((UInt64V)a >> 32), factors);
  high = (UInt32V)(even >> 32 | (odd & ~uint64_t{0xFFFFFFFF}));
  low = (UInt32V)((even & 0xFFFFFFFF) | odd << 32);
#else
  for (unsigned lane = 0; lane < sizeof(a) / 4; ++lane) {
    const uint64_t product = uint64_t{a[lane]} * factor;
    high[lane] = static_cast<uint32_t>(product >> 32);
    low[lane] = static_cast<uint32_t>(product);
  }
#endif
}

/// The upper 24 bits of every lane as numbers in [0, 1).
TIMM_EXT_FN FloatV unit_interval(UInt32V bits) {
  return __builtin_convertvector((Int32V)(bits >> 8), FloatV) * 5.9604644775390625e-08f;  // 2^-24
}

/// Whether every lane lies in [smallest, largest]; not so for NaN.
#if defined(__AVX512F__)
TIMM_EXT_FN bool all_within(FloatV x, float smallest, float largest) {
  const __mmask16 above = _mm512_cmp_ps_mask(x, FloatV{} + smallest, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, x, FloatV{} + largest, _CMP_LE_OQ) == 0xFFFF;
}
TIMM_EXT_FN bool all_within(DoubleV x, double smallest, double largest) {
  const __mmask8 above = _mm512_cmp_pd_mask(x, DoubleV{} + smallest, _CMP_GE_OQ);
  return _mm512_mask_cmp_pd_mask(above, x, DoubleV{} + largest, _CMP_LE_OQ) == 0xFF;
}
#elif defined(TIMM_EXT_X86_VECTOR)
TIMM_EXT_FN bool all_within(FloatV x, float smallest, float largest) {
  const Int32V within = (x >= smallest) & (x <= largest);
  return TIMM_EXT_X86_VECTOR(movemask_ps)((FloatV)within) == (1 << (kVectorBytes / 4)) - 1;
}
TIMM_EXT_FN bool all_within(DoubleV x, double smallest, double largest) {
  const Int64V within = (x >= smallest) & (x <= largest);
  return TIMM_EXT_X86_VECTOR(movemask_pd)((DoubleV)within) == (1 << (kVectorBytes / 8)) - 1;
}
#else
template <class V, class C>
TIMM_EXT_FN bool all_within(V x, C smallest, C largest) {
  bool within = true;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(C); ++lane) within &= x[lane] >= smallest && x[lane] <= largest;
  return within;
}
#endif

TIMM_EXT_FN FloatV reciprocal_power_of_two(FloatV x) {
  const Int32V bits = 0x7E800000 - ((Int32V)x & 0x7F800000);
  const Int32V smallest = Int32V{} + 0x00800000;
  return (FloatV)(bits < smallest ? smallest : bits);
}

TIMM_EXT_FN DoubleV reciprocal_power_of_two(DoubleV x) {
  const Int64V bits = (int64_t{2045} << 52) - ((Int64V)x & (int64_t{2047} << 52));
  const Int64V smallest = Int64V{} + (int64_t{1} << 52);
  return (DoubleV)(bits < smallest ? smallest : bits);
}

/// One value in every lane.
TIMM_EXT_FN FloatV broadcast(const float* value) {
#if defined(TIMM_EXT_X86_VECTOR)
  return TIMM_EXT_X86_VECTOR(set1_ps)(*value);
#else
  FloatV v;
  for (int i = 0; i < kVectorBytes / 4; ++i) v[i] = *value;
  return v;
#endif
}

}  // namespace timm_ext::math
