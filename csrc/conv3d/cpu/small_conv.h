// SPDX-License-Identifier: Apache-2.0
//
// A convolution whose output has few points: weights are read once, as they lie, and meet the columns of all points.
#pragma once

#include <cstdint>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kSmallConvOutputs = 8;  // channels of the output that are computed together
constexpr int64_t kSmallConvPoints = 16;  // of which the columns hold a multiple

struct SmallConvProblem {
  const ConvShape* shape;
  const float* input;     // [examples, inputs, in]
  const int32_t* places;  // [taps, width]: of each column's element in the padded channel of all examples
  float* columns;         // [inputs, taps, width]
  const float* weight;    // its taps lie side by side, in the order of `places`
  int64_t output_step;    // of the weight
  int64_t input_step;
  const float* bias;  // [outputs], or null for none
  float* output;      // [examples, outputs, out]
  int64_t examples;
  int64_t points;  // of the output of one example
  int64_t taps;
  int64_t width;  // examples × points, rounded up
};

TIMM_EXT_FN int64_t small_conv_padded(const ConvShape& s, int axis) { return s.in[axis] + 2 * s.padding[axis]; }

TIMM_EXT_FN int64_t small_conv_blocks(const ConvShape& s) {
  return (s.outputs + kSmallConvOutputs - 1) / kSmallConvOutputs;
}

}  // namespace timm_ext::cpu
