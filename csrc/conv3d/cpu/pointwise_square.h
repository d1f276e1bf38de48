// SPDX-License-Identifier: Apache-2.0
//
// Weight gradients of pointwise convolutions between few channels, Σ_points grad · input, some points at a time.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "math/portable.h"

namespace timm_ext::cpu {

struct PointwiseProblem {
  const float* grad;   // [examples, outputs, points]
  const float* input;  // [examples, inputs, points]
  int64_t outputs;
  int64_t inputs;
  int64_t points;
  int64_t chunk;  // points that are summed together
  float* sums;    // [examples, chunks, outputs, inputs]

  TIMM_EXT_FN int64_t chunks() const { return (points + chunk - 1) / chunk; }
};

/// Chunks of all examples.
TIMM_EXT_KERNEL(pointwise_products, const PointwiseProblem&, int64_t first_chunk, int64_t last_chunk);

}  // namespace timm_ext::cpu
