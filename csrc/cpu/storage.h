// SPDX-License-Identifier: Apache-2.0
//
// Rows of stored elements, brought to their arithmetic type and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "math/half.h"

namespace timm_ext::cpu {

using math::BFloat16;
using math::Float16;

template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

/// Brings values to arithmetic type.
template <class C, class S>
TIMM_EXT_FN void widen_to(C* to, const S* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

#if defined(__F16C__)
/// In one instruction; only the payload of a NaN may differ.
TIMM_EXT_FN void widen_to(float* to, const Float16* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m128i bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
  }
  for (; i < count; ++i) to[i] = to_float(from[i]);
}
#endif

/// A row of arithmetic type for a chunk: the storage itself, or `scratch` after conversion.
template <class C, class S>
TIMM_EXT_FN const C* widen(const S* from, int64_t count, C* scratch) {
  if constexpr (std::is_same_v<S, C>) {
    return from;
  } else {
    widen_to(scratch, from, count);
    return scratch;
  }
}

/// Values brought to storage.
template <class S, class C>
TIMM_EXT_FN void narrow(S* to, const C* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<S, C>) {
      to[i] = from[i];
    } else {
      from_float(to[i], from[i]);
    }
  }
}

}  // namespace timm_ext::cpu
