// SPDX-License-Identifier: Apache-2.0
//
// Vectors of float from bfloat16 in memory and back, rounded to nearest even (host only).
#pragma once

#include "math/half.h"
#include "math/simd.h"

namespace timm_ext::math {

typedef uint16_t HalfBitsV __attribute__((vector_size(kVectorBytes / 2)));

// GCC 12 takes conversions between 16 and 32 bits apart.
TIMM_EXT_FN FloatV load_floats(const BFloat16* from) {
#if defined(__AVX512F__)
  __m256i bits;
  std::memcpy(&bits, from, sizeof(bits));
  return from_bits((UInt32V)_mm512_maskz_cvtepu16_epi32(-1, bits) << 16);
#elif defined(__AVX2__)
  __m128i bits;
  std::memcpy(&bits, from, sizeof(bits));
  return from_bits((UInt32V)_mm256_cvtepu16_epi32(bits) << 16);
#else
  HalfBitsV bits;
  std::memcpy(&bits, from, sizeof(bits));
  return from_bits(__builtin_convertvector(bits, UInt32V) << 16);
#endif
}

TIMM_EXT_FN void store_floats(BFloat16* to, FloatV v) {
  const UInt32V bits = bits_of(v);
  const UInt32V rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const UInt32V whole = (UInt32V)((bits & 0x7FFFFFFF) > 0x7F800000 ? UInt32V{} + 0x7FC0 : rounded);
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_maskz_cvtepi32_epi16(-1, (__m512i)whole);
#elif defined(__AVX2__)
  const __m128i narrow =
      _mm_packus_epi32(_mm256_castsi256_si128((__m256i)whole), _mm256_extracti128_si256((__m256i)whole, 1));
#else
  const HalfBitsV narrow = __builtin_convertvector(whole, HalfBitsV);
#endif
  std::memcpy(to, &narrow, sizeof(narrow));
}

}  // namespace timm_ext::math
