// SPDX-License-Identifier: Apache-2.0
//
// Native vectors of float and double for the instruction set this file is compiled for (host only), by the compiler's
// vector extension: AVX-512, AVX2, and 16 bytes anywhere else (SSE2, NEON). The vector is never wider than a register:
// GCC 12 would take it apart into scalars.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

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
typedef int32_t Int32V __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64V __attribute__((vector_size(kVectorBytes)));

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

TIMM_EXT_FN FloatV select(Int32V mask, FloatV yes, FloatV no) { return mask ? yes : no; }
TIMM_EXT_FN DoubleV select(Int64V mask, DoubleV yes, DoubleV no) { return mask ? yes : no; }

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

}  // namespace timm_ext::math
