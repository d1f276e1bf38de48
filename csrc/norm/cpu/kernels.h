// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace timm_ext::cpu {

/// weight (x - mean) rstd + bias, plane by plane: one channel of one example.
struct InstanceNormProblem {
  const float* input;   // [planes, points]
  const float* weight;  // [channels], or null for 1
  const float* bias;    // [channels], or null for 0
  float* output;        // [planes, points]
  float* mean;          // [planes]
  float* rstd;          // [planes], 1 / sqrt(variance + epsilon)
  double epsilon;
  int64_t channels;
  int64_t points;
};

/// The gradients of leaky(weight (x - mean) rstd + bias), plane by plane.
struct InstanceNormGradient {
  const float* grad;     // [planes, points], of each example apart
  const float* input;    // [planes, points]
  const float* mean;     // [planes]
  const float* rstd;     // [planes]
  const float* weight;   // [channels], or null for 1
  const float* bias;     // [channels], or null for 0
  float* grad_input;     // [planes, points]
  float* grad_weight;    // [planes]
  float* grad_bias;      // [planes]
  float slope;           // of what lies below zero
  int64_t grad_example;  // elements of grad from one example to the next
  int64_t channels;
  int64_t points;
};

/// A plane is one channel of one example.
TIMM_EXT_KERNEL(instance_norm, const InstanceNormProblem&, int64_t first_plane, int64_t last_plane);
TIMM_EXT_KERNEL(instance_norm_backward, const InstanceNormGradient&, int64_t first_plane, int64_t last_plane);

}  // namespace timm_ext::cpu
