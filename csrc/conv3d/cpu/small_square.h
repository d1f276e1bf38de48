// SPDX-License-Identifier: Apache-2.0
//
// Squared weight gradients of a convolution whose output has few points: at each of them, the weights of some channels
// of the input meet a row of neighbours that lies as they do, so that squares are added in the accumulator's order.
#pragma once

#include <cstdint>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kSmallSquareOutputs = 8;   // channels of the output that are computed together
constexpr int64_t kSmallSquareWeights = 32;  // of which rows of neighbours hold a multiple

/// Some channels of the input of some examples.
struct SmallSquareProblem {
  const ConvShape* shape;
  const float* grad;      // [examples, points, outputs padded]
  const float* input;     // [examples, inputs, in]
  int64_t input_example;  // elements from one example to the next
  int64_t examples;
  int64_t first;       // channel
  int64_t channels;    // their number
  float* rows;         // [examples, points, width]
  float* accumulator;  // [outputs, inputs, taps]
  float scale;
  bool squared = true;  // each example's gradient; else they are added up

  TIMM_EXT_FN int64_t points() const { return shape->out[0] * shape->out[1] * shape->out[2]; }
  TIMM_EXT_FN int64_t taps() const { return shape->kernel[0] * shape->kernel[1] * shape->kernel[2]; }
  TIMM_EXT_FN int64_t blocks() const { return (shape->outputs + kSmallSquareOutputs - 1) / kSmallSquareOutputs; }
  TIMM_EXT_FN int64_t padded_outputs() const { return blocks() * kSmallSquareOutputs; }
  TIMM_EXT_FN int64_t width() const {
    return (channels * taps() + kSmallSquareWeights - 1) / kSmallSquareWeights * kSmallSquareWeights;
  }
};

}  // namespace timm_ext::cpu
