// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace timm_ext::cpu {

/// The gradients of leaky(weight (x - mean) deviation + bias), plane by plane: one channel of one example.
struct InstanceNormProblem {
  const float* grad;       // [planes, points]
  const float* input;      // [planes, points]
  const float* mean;       // [planes]
  const float* deviation;  // [planes], reciprocal
  const float* weight;     // [channels], or null for 1
  const float* bias;       // [channels], or null for 0
  float* grad_input;       // [planes, points]
  float* grad_weight;      // [planes]
  float* grad_bias;        // [planes]
  float slope;             // of what lies below zero
  int64_t channels;
  int64_t points;
};

}  // namespace timm_ext::cpu
