// SPDX-License-Identifier: Apache-2.0
//
// Some lanes of a vector from memory and back. Memory of the others is not touched.
#pragma once

#include "math/simd.h"

namespace timm_ext::math {

/// The first `count` lanes; the others are zero.
TIMM_EXT_FN FloatV load_first(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  FloatV v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}

/// Lanes [first, first + count) to to[0 … count − 1].
TIMM_EXT_FN void store_lanes(float* to, FloatV v, int64_t first, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to - first, static_cast<__mmask16>(((1u << count) - 1) << first), v);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = v[first + i];
#endif
}

}  // namespace timm_ext::math
