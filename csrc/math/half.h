// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit floats. Conversions are written as integer arithmetic that the compiler turns into vectors on every
// instruction set; they round to nearest even, as PyTorch does.
#pragma once

#include <cstdint>

#include "math/scalar.h"

namespace timm_ext::math {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TIMM_EXT_FN float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

TIMM_EXT_FN float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float magnitude = bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t bits = bit_cast<uint32_t>(magnitude);
  const uint32_t special = bits >= 0x47800000 ? 0x7F800000 : 0;  // 2^16 and above stand for inf and NaN
  return bit_cast<float>(bits | special | sign);
}

TIMM_EXT_FN void from_float(BFloat16& to, float from) {
  const uint32_t bits = bit_cast<uint32_t>(from);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

TIMM_EXT_FN void from_float(float& to, float from) { to = from; }

TIMM_EXT_FN void from_float(Float16& to, float from) {
  const uint32_t bits = bit_cast<uint32_t>(from);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a half has the step 2^-24, which is that of a float in [0.5, 1).
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
  to.bits = static_cast<uint16_t>((magnitude >= 0x47800000 ? special : finite) | ((bits & 0x80000000) >> 16));
}

}  // namespace timm_ext::math
