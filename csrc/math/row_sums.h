// SPDX-License-Identifier: Apache-2.0
//
// Sums of rows of 16 in float64, by halves: element i and i + 8, then i and i + 4, 2, 1; the same bits for every
// instruction set.
#pragma once

#include "math/simd.h"

namespace timm_ext::math {

#if defined(__AVX512F__)
constexpr int kSummedRows = 8;

/// Elements i and i + 8 of 16, added in float64.
template <class C>
TIMM_EXT_FN DoubleV halves_sum(const C* row) {
  return load_doubles(row) + load_doubles(row + 8);
}

/// Σ of eight rows of 16.
template <class C>
TIMM_EXT_FN DoubleV row_sums(const C* rows) {
  DoubleV fours[4], twos[2];
  for (int r = 0; r < 4; ++r) {
    const DoubleV a = halves_sum(rows + 16 * r), b = halves_sum(rows + 16 * (r + 4));
    fours[r] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int r = 0; r < 2; ++r) {
    twos[r] = __builtin_shufflevector(fours[r], fours[r + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(fours[r], fours[r + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(twos[0], twos[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(twos[0], twos[1], 1, 9, 3, 11, 5, 13, 7, 15);
}
#elif defined(__AVX2__)
constexpr int kSummedRows = 4;

template <class C>
TIMM_EXT_FN DoubleV quarters_sum(const C* row) {
  return (load_doubles(row) + load_doubles(row + 8)) + (load_doubles(row + 4) + load_doubles(row + 12));
}

/// Σ of four rows of 16.
template <class C>
TIMM_EXT_FN DoubleV row_sums(const C* rows) {
  DoubleV twos[2];
  for (int r = 0; r < 2; ++r) {
    const DoubleV a = quarters_sum(rows + 16 * r), b = quarters_sum(rows + 16 * (r + 2));
    twos[r] = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }
  return __builtin_shufflevector(twos[0], twos[1], 0, 4, 2, 6) + __builtin_shufflevector(twos[0], twos[1], 1, 5, 3, 7);
}
#else
constexpr int kSummedRows = 1;

/// Σ of a row of 16.
template <class C>
TIMM_EXT_FN double row_sums(const C* row) {
  double sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = row[i];
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}
#endif

}  // namespace timm_ext::math
