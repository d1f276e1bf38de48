// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "math/simd.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

using V = math::FloatV;
constexpr int64_t kLanes = sizeof(V) / sizeof(float);

TIMM_EXT_FN int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
TIMM_EXT_FN int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
TIMM_EXT_FN int64_t whole_vectors(int64_t elements) { return (elements + kLanes - 1) / kLanes * kLanes; }

/// Of two vectors that follow one another, the elements of even and of odd number.
TIMM_EXT_FN void take_apart(V first, V second, V& even, V& odd) {
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
TIMM_EXT_FN void put_together(V even, V odd, V& first, V& second) {
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

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
