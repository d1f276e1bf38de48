// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

using math::FloatQuad;

constexpr int64_t kTapOutputs = 8;  // channels of the output whose weights are brought side by side

/// Where the first weights of a block of outputs are; beyond the last output, its own, which nobody reads.
TIMM_EXT_FN void first_weights(const float* from, int64_t block, int64_t outputs, int64_t output_step,
                               const float* (&to)[kTapOutputs]) {
  for (int64_t o = 0; o < kTapOutputs; ++o) {
    const int64_t output = block * kTapOutputs + o;
    to[o] = from + (output < outputs ? output : outputs - 1) * output_step;
  }
}

/// g[tap · step + output] = from[output][tap] or, mirrored, from[output][taps - 1 - tap].
TIMM_EXT_FN void transpose_taps(const float* const (&from)[kTapOutputs], int64_t taps, bool mirrored, float* g,
                                int64_t step) {
  if (taps < 4) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t o = 0; o < kTapOutputs; ++o) g[tap * step + o] = from[o][mirrored ? taps - 1 - tap : tap];
    }
    return;
  }
  for (int64_t o = 0; o < kTapOutputs; o += 4) {
    for (int64_t next = 0; next < taps; next += 4) {
      const int64_t first = next + 4 <= taps ? next : taps - 4;  // the last four may overlap those before
      FloatQuad four[4];
      for (int k = 0; k < 4; ++k) four[k] = math::load<FloatQuad>(from[o + k] + first);
      math::transpose(four);
      for (int k = 0; k < 4; ++k) {
        const int64_t tap = mirrored ? taps - 1 - first - k : first + k;
        math::store(g + tap * step + o, four[k]);
      }
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
