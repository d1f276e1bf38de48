// SPDX-License-Identifier: Apache-2.0
//
// From vectors of outputs to the accumulator, whose taps lie side by side.
#pragma once

#include "cpu/lanes.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// to += scale · values, of which there are up to four.
TIMM_EXT_FN void add_scaled(math::FloatQuad values, float scale, int64_t count, float* to) {
  if (count == 4) {
    math::store(to, math::load<math::FloatQuad>(to) + scale * values);
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] += scale * values[k];
  }
}

/// to[output, tap] += scale · from[tap, output], taps of from `tap_step` apart, outputs of to `output_step`.
TIMM_EXT_FN void add_weights(const float* from, int64_t tap_step, int64_t taps, int64_t outputs, float scale, float* to,
                             int64_t output_step) {
  for (int64_t output = 0; output < outputs; output += 4) {
    const int64_t here = smaller_of(4, outputs - output);
    for (int64_t tap = 0; tap < taps; tap += 4) {
      const int64_t count = smaller_of(4, taps - tap);
      math::FloatQuad four[4] = {};
      for (int64_t k = 0; k < count; ++k) four[k] = math::load<math::FloatQuad>(from + (tap + k) * tap_step + output);
      math::transpose(four);
      for (int64_t k = 0; k < here; ++k) add_scaled(four[k], scale, count, to + (output + k) * output_step + tap);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
