// SPDX-License-Identifier: Apache-2.0
//
// Storage types and their arithmetic type. Conversions are written as integer arithmetic that the compiler turns into
// vectors on every instruction set; they round to nearest even, as PyTorch does.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../math/scalar.h"

namespace timm_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

TIMM_EXT_FN float to_float(BFloat16 x) { return math::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

TIMM_EXT_FN float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float magnitude = math::bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t bits = math::bit_cast<uint32_t>(magnitude);
  const uint32_t special = bits >= 0x47800000 ? 0x7F800000 : 0;  // 2^16 and above stand for inf and NaN
  return math::bit_cast<float>(bits | special | sign);
}

TIMM_EXT_FN void from_float(BFloat16& to, float from) {
  const uint32_t bits = math::bit_cast<uint32_t>(from);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

TIMM_EXT_FN void from_float(Float16& to, float from) {
  const uint32_t bits = math::bit_cast<uint32_t>(from);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a half has the step 2^-24, which is that of a float in [0.5, 1).
  const uint32_t denormal = math::bit_cast<uint32_t>(math::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
  to.bits = static_cast<uint16_t>((magnitude >= 0x47800000 ? special : finite) | ((bits & 0x80000000) >> 16));
}

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
