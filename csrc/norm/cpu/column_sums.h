// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

constexpr int kColumns = 64;                 // separate sums, the same for every instruction set
constexpr int kVectors = kColumns / kLanes;  // of each of them

/// Down to 16 sums in float32, the others by halves, then in float64, the same for every instruction set.
inline double total(V (&sums)[kVectors]) {
  for (int half = kVectors / 2; half * kLanes >= 16; half /= 2) {
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
  }
  double sum = 0;
  for (int c = 0; c < 16; ++c) sum += sums[c / kLanes][c % kLanes];
  return sum;
}

/// 1 / sqrt(variance + epsilon).
inline float inverse_deviation(float variance, double epsilon) {
  return static_cast<float>(1 / std::sqrt(variance + epsilon));
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
