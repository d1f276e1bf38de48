// SPDX-License-Identifier: Apache-2.0
//
// Lanes of vectors that change places.
#pragma once

#include "math/simd.h"

namespace timm_ext::math {

/// Half a vector of values from each of two places.
TIMM_EXT_FN FloatV load_halves(const float* first, const float* second) {
  const auto a = load<HalfFloatV>(first), b = load<HalfFloatV>(second);
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3);
#endif
}

/// Two values in turn.
TIMM_EXT_FN FloatV broadcast_pair(const float* values) {
#if defined(TIMM_EXT_X86_VECTOR)
  double pair;
  std::memcpy(&pair, values, sizeof(pair));
  return (FloatV)TIMM_EXT_X86_VECTOR(set1_pd)(pair);
#else
  FloatV v;
  for (int i = 0; i < kVectorBytes / 4; ++i) v[i] = values[i % 2];
  return v;
#endif
}

/// Lanes 0 and 1, 2 and 3, … added, the sum in both.
TIMM_EXT_FN FloatV pair_sums(FloatV x) {
#if defined(__AVX512F__)
  return x + __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return x + __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return x + __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}

typedef float FloatQuad __attribute__((vector_size(16)));  // on every instruction set

/// Rows become columns.
TIMM_EXT_FN void transpose(FloatQuad (&rows)[4]) {
  const FloatQuad a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const FloatQuad b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const FloatQuad c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const FloatQuad d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

#if defined(__AVX512F__)
/// Each four rows of every four columns become columns.
TIMM_EXT_FN void transpose_quads(FloatV* rows) {
  const FloatV a = __builtin_shufflevector(rows[0], rows[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const FloatV b = __builtin_shufflevector(rows[2], rows[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const FloatV c =
      __builtin_shufflevector(rows[0], rows[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const FloatV d =
      __builtin_shufflevector(rows[2], rows[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  rows[1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  rows[2] = __builtin_shufflevector(c, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

/// Rows become columns.
TIMM_EXT_FN void transpose(FloatV (&rows)[16]) {
  for (int k = 0; k < 16; k += 4) transpose_quads(rows + k);
  for (int k = 0; k < 4; ++k) {
    FloatV &r0 = rows[k], &r1 = rows[k + 4], &r2 = rows[k + 8], &r3 = rows[k + 12];
    const FloatV a = __builtin_shufflevector(r0, r1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                 b = __builtin_shufflevector(r2, r3, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const FloatV c = __builtin_shufflevector(r0, r1, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31),
                 d = __builtin_shufflevector(r2, r3, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    r0 = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    r1 = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    r2 = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    r3 = __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
}
#endif

/// Lanes 0 and 1, 2 and 3, … exchanged.
TIMM_EXT_FN DoubleV swap_pairs(DoubleV x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#else
  return __builtin_shufflevector(x, x, 1, 0);
#endif
}

/// The first `count` lanes of one vector, the others of another.
TIMM_EXT_FN FloatV join_lanes(FloatV first, FloatV others, int64_t count) {
  Int32V lane;
  for (int i = 0; i < kVectorBytes / 4; ++i) lane[i] = i;
  return select(lane < static_cast<int32_t>(count), first, others);
}
TIMM_EXT_FN DoubleV join_lanes(DoubleV first, DoubleV others, int64_t count) {
  Int64V lane;
  for (int i = 0; i < kVectorBytes / 8; ++i) lane[i] = i;
  return select(lane < count, first, others);
}

/// Of two vectors that follow one another, the elements of even and of odd number.
TIMM_EXT_FN void take_apart(FloatV first, FloatV second, FloatV& even, FloatV& odd) {
#if defined(__AVX512F__)
  even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14);
  odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  even = __builtin_shufflevector(first, second, 0, 2, 4, 6);
  odd = __builtin_shufflevector(first, second, 1, 3, 5, 7);
#endif
}

/// The way back.
TIMM_EXT_FN void put_together(FloatV even, FloatV odd, FloatV& first, FloatV& second) {
#if defined(__AVX512F__)
  first = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  second = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  first = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
  second = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  first = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
  second = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
#endif
}

}  // namespace timm_ext::math
