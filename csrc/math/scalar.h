// SPDX-License-Identifier: Apache-2.0
//
// The vocabulary of the one-element formulas for plain float and double, on the host and on the device.
// simd.h gives the same names for vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/portable.h"

namespace timm_ext::math {

template <class To, class From>
TIMM_EXT_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

TIMM_EXT_FN float select(bool mask, float yes, float no) { return mask ? yes : no; }
TIMM_EXT_FN double select(bool mask, double yes, double no) { return mask ? yes : no; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // one instruction instead of two; NaN of either operand stays
TIMM_EXT_FN float larger(float a, float b) {
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
}
TIMM_EXT_FN float smaller(float a, float b) {
  float value;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
}
#else
TIMM_EXT_FN float larger(float a, float b) { return a > b ? a : b; }
TIMM_EXT_FN float smaller(float a, float b) { return a < b ? a : b; }
#endif
TIMM_EXT_FN double larger(double a, double b) { return a > b ? a : b; }
TIMM_EXT_FN double smaller(double a, double b) { return a < b ? a : b; }

/// 1 / x of a normal number whose reciprocal is one, too.
template <class V>
TIMM_EXT_FN V reciprocal(V x) {
  return (V{} + 1) / x;
}

#if defined(__CUDA_ARCH__)
/// To one unit in the last place, in one instruction; the exact division is ten and a branch at each element.
TIMM_EXT_FN float reciprocal(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
#endif

TIMM_EXT_FN uint64_t bits_of(double x) { return bit_cast<uint64_t>(x); }
TIMM_EXT_FN double from_bits(uint64_t bits) { return bit_cast<double>(bits); }
TIMM_EXT_FN uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
TIMM_EXT_FN float from_bits(uint32_t bits) { return bit_cast<float>(bits); }

TIMM_EXT_FN void wide_product(uint32_t a, uint32_t factor, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t{a} * factor;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

TIMM_EXT_FN float unit_interval(uint32_t bits) {
  return static_cast<float>(bits >> 8) * 5.9604644775390625e-08f;  // 2^-24
}

/// The exact power of two 2^-(e+1) that brings x = m·2^e (x >= 0, 1 <= m < 2) into [0.5, 1). At the ends of the range,
/// where that power is no normal number, the nearest one that is: denormals come to [2^-23, 1), the largest to < 4.
TIMM_EXT_FN float reciprocal_power_of_two(float x) {
  const int32_t bits = 0x7E800000 - (bit_cast<int32_t>(x) & 0x7F800000);
  return bit_cast<float>(bits < 0x00800000 ? 0x00800000 : bits);
}

TIMM_EXT_FN double reciprocal_power_of_two(double x) {
  const int64_t smallest = int64_t{1} << 52;
  const int64_t bits = (int64_t{2045} << 52) - (bit_cast<int64_t>(x) & (int64_t{2047} << 52));
  return bit_cast<double>(bits < smallest ? smallest : bits);
}

}  // namespace timm_ext::math
